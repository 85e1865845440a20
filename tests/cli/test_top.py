"""`regctl top` on values, with time as an argument: rows, events, orders, rates, keys, and frames of any size."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as some

from regd.cli.commands import read
from regd.cli.top.model import NEW_S, Table, holders
from regd.cli.top.rates import Figures, Rates
from regd.cli.top.render import DaemonStatus, Line, age, cells, fitted, frame, lag, rate, whole
from regd.cli.top.view_state import ViewState

WALL = 1_790_000_000.0
HERE = DaemonStatus("regd at 127.0.0.1:7343", Figures(12.3, 0.4, 0.0011, 0.006, 3.0, 7_300.0))


def fields(name: str, instance: str = "", **more: Any) -> dict[str, Any]:
    plain = {"host": "127.0.0.1", "port": 80, "meta": {}, "state": "ready", "registered_at": WALL}
    return {"name": name, "instance": instance, **plain, **more}


def picture(*entries: dict[str, Any]) -> Table:
    table = Table()
    for entry in entries:
        take(table, entry)
    table.take("sync", ("", ""), None, 0.0)
    return table


def take(table: Table, entry: dict[str, Any], now: float = 0.0) -> None:
    key = (entry["name"], entry["instance"])
    table.take("change" if key in table.rows else "up", key, entry, now)


def names(made: Table, look: ViewState) -> list[str]:
    return [row.name for row in made.shown(look.sort, look.reverse, look.words)]


def texts(lines: list[Line]) -> list[str]:
    return ["".join(text for _, text in line).rstrip() for line in lines]


def drawn(made: Table, look: ViewState | None = None, size: tuple[int, int] = (80, 24), **more: Any) -> list[str]:
    daemon, now, wall = more.get("daemon", HERE), more.get("now", 0.0), more.get("wall", WALL)
    return texts(frame(made, look or ViewState(), daemon, size, now, wall))


def press(look: ViewState, made: Table, *keys: str) -> bool:
    return [look.press(key, made.shown(look.sort, look.reverse, look.words)) for key in keys][-1]


# Rows and events.


@pytest.mark.parametrize(
    ("held", "shown"),
    [
        ({}, "static"),
        ({"hold": True}, "hold"),
        ({"hold": True, "pid": 12, "ttl": 30}, "hold pid 12 ttl 30s"),
        ({"ttl": 1.5}, "ttl 1.5s"),
        ({"pid": "\x1b[31m"}, r"pid \x1b[31m"),
    ],
)
def test_holders(held: dict[str, Any], shown: str) -> None:
    assert holders(held) == shown


def test_first_snapshot_makes_no_events() -> None:
    made = picture(fields("db"))
    assert not made.events
    take(made, fields("web", "1"), 5.0)
    take(made, fields("web", "1", state="draining"), 6.0)
    take(made, fields("web", "1", state="draining", meta={"a": "b"}), 6.5)
    take(made, fields("web", "1", state="draining", meta={"a": "b"}, port=81), 7.0)
    made.take("down", ("web", "1"), None, 8.0, "process exited")
    assert [(event.kind, event.who, event.what, event.at) for event in made.events] == [
        ("down", "web/1", "process exited", 8.0),
        ("change", "web/1", "127.0.0.1:80 → 127.0.0.1:81", 7.0),
        ("change", "web/1", "nothing → a=b", 6.5),
        ("change", "web/1", "ready → draining", 6.0),
        ("up", "web/1", "127.0.0.1:80", 5.0),
    ]
    assert (made.services, list(made.rows)) == (1, [("db", "")])


def test_ages_survive_a_restart_of_the_daemon() -> None:
    made = picture(fields("db"))
    take(made, fields("db", state="draining", registered_at=WALL + 100))
    assert made.rows["db", ""].since == WALL
    take(made, fields("db", port=81, registered_at=WALL + 200))
    assert made.rows["db", ""].since == WALL + 200


def test_new_instances_are_marked() -> None:
    made = picture(fields("db"))
    take(made, fields("web"), 5.0)
    shown = drawn(made, now=5.0)
    assert shown[4].startswith("  db")
    assert shown[5].startswith("+ web")
    assert drawn(made, now=5.0 + NEW_S)[5].startswith("  web")


def test_orders_and_filter() -> None:
    made = picture(
        fields("b", registered_at=WALL - 10, state="starting", hold=True),
        fields("a", registered_at=WALL - 30, meta={"Zone": "X"}),
        fields("c", registered_at=WALL - 20, state="draining", pid=7),
    )
    look = ViewState()
    for keys, order in (
        ("N", "abc"), ("r", "cba"), ("rA", "bca"), ("r", "acb"), ("rS", "bca"), ("H", "bca"), ("s", "abc"), ("s", "bca"),
    ):  # fmt: skip
        press(look, made, *keys)
        assert "".join(names(made, look)) == order, keys
    for words, found in (("zone=x", "a"), ("127 ready", "a"), ("PID", "c"), ("nothing", ""), ("  ", "bca")):
        look.words = words
        assert "".join(names(made, look)) == found
    take(made, fields("d", registered_at=WALL))
    assert names(made, look)[0] == "d"


# Rates and other figures.


def test_rates_are_per_second_of_the_daemons_uptime() -> None:
    rates = Rates()

    def told(at: float, resolves: int, changes: int, epoch: str = "one") -> tuple[float | None, float | None]:
        requests = {"resolve": resolves, "stats": 1_000 * at}
        rates.take({"epoch": epoch, "uptime_s": at, "requests": requests, "changes": changes, "lag_s": 0.5})
        return rates.figures.requests, rates.figures.changes

    assert told(1.0, 10, 4) == (None, None)
    assert told(1.0, 10, 4) == (None, None)
    assert told(3.0, 20, 5) == (5.0, 0.5)
    assert told(5.0, 0, 0, "two") == (None, None)
    for at in range(6, 30):
        shown = told(at, 10 * at, 0, "two")
    assert shown == (10.0, 0.0)
    assert (rates.figures.lag_s, rates.figures.lag_s_max) == (0.5, None)


def test_rates_of_an_impostor() -> None:
    rates = Rates()
    for stats in ({}, {"uptime_s": "x", "requests": []}, {"uptime_s": 1, "requests": {"a": "b"}, "lag_s": None}):
        rates.take(stats)
    assert rates.figures.requests is None


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(-5, "0s"), (59.9, "59s"), (60, "1m"), (3_599, "59m"), (86_399, "23h"), (8_640_000, "100d")],
)
def test_ages(seconds: float, shown: str) -> None:
    assert age(seconds) == shown


@pytest.mark.parametrize(("per_s", "shown"), [(None, "-"), (0.0, "0/s"), (0.25, "0.2/s"), (12.6, "13/s")])
def test_rates(per_s: float | None, shown: str) -> None:
    assert rate(per_s) == shown


@pytest.mark.parametrize(
    ("seconds", "shown"), [(None, "-"), (0.00042, "0.4 ms"), (0.999, "999.0 ms"), (12.53, "12.5 s")]
)
def test_lag(seconds: float | None, shown: str) -> None:
    assert lag(seconds) == shown


# Keys.


def test_selection_follows_its_instance() -> None:
    made, look = picture(*(fields(name) for name in "bdf")), ViewState()
    look.page = 2
    press(look, made, "j", "down")
    assert look.selected == ("d", "")
    take(made, fields("a"))
    take(made, fields("c"))
    press(look, made, "k")
    assert look.selected == ("c", "")
    made.take("down", ("c", ""), None, 0.0)
    look.keep_in_range(made.shown("name", False, ""))
    assert look.selected == ("d", "")  # the row that is now in its place
    press(look, made, "G")
    assert (look.selected, look.first) == (("f", ""), 2)
    press(look, made, "pageup")
    assert (look.selected, look.first) == (("b", ""), 1)
    press(look, made, "home")
    assert (look.selected, look.first) == (("a", ""), 0)
    press(look, made, "escape", "end")
    assert look.selected == ("f", "")


def test_filter_is_typed_and_cleared() -> None:
    made, look = picture(fields("quiet"), fields("web")), ViewState()
    assert press(look, made, "/", "q", "x", "backspace", "up", "\x1b", "enter")
    assert (look.words, look.typing, names(made, look)) == ("q", False, ["quiet"])
    press(look, made, "escape")
    assert look.words == ""
    press(look, made, "/", "w", "escape")
    assert (look.words, look.typing) == ("", False)
    assert not press(look, made, "q")


def test_panes() -> None:
    made, look = picture(fields("web")), ViewState()
    press(look, made, "?")
    assert "PgUp" in "\n".join(drawn(made, look))
    press(look, made, "w")
    look.why = [f"line {n}" for n in range(30)]
    shown = drawn(made, look)
    assert (look.selected, "line 0" in shown, "  and 21 more lines" in shown) == (("web", ""), True, True)
    press(look, made, "escape")
    assert (look.pane, look.selected) == ("", ("web", ""))
    assert press(ViewState(), picture(), "w", "j", "G", "enter", "escape", "pagedown")


def test_priority_is_shown_where_it_is_not_0() -> None:
    made = picture(fields("db", "1"), fields("db", "2", priority=10))
    assert drawn(made, size=(80, 14))[3:6] == [
        "  NAME▾     INSTANCE  ADDRESS       STATE     PRIORITY   AGE  HELD BY",
        "  db        1         127.0.0.1:80  ready                 0s  static",
        "  db        2         127.0.0.1:80  ready           10    0s  static",
    ]
    assert "PRIORITY" not in drawn(made, size=(50, 14))[3]
    take(made, fields("db", "2"), 5.0)
    assert made.events[0].what == "priority 10 → 0"
    assert "PRIORITY" not in drawn(made)[3]
    take(made, fields("db", "2", priority=65_535), 6.0)
    assert made.events[0].what == "priority 0 → 65535"
    take(made, fields("db", "2", priority=1, state="draining"), 7.0)
    assert made.events[0].what == "ready → draining"


# Frames.


def test_a_frame_of_80_columns() -> None:
    made = picture(
        fields("db", registered_at=WALL - 7_300),
        fields("shop.web", "one", hold=True, state="starting", meta={"zone": "a"}),
    )
    made.take("down", ("old", ""), None, 10.0, "ttl ran out")
    assert drawn(made, size=(80, 14), now=22.0) == [
        "regd at 127.0.0.1:7343  2 instances of 2 services  up 2h",
        "requests 12/s  changes 0.4/s  lag 1.1 ms, at most 6.0 ms  3 connections",
        "",
        "  NAME▾     INSTANCE  ADDRESS       STATE      AGE  HELD BY   META",
        "  db                  127.0.0.1:80  ready       2h  static",
        "  shop.web  one       127.0.0.1:80  starting    0s  hold      zone=a",
        "",
        "",
        "",
        "",
        "── recent events ───────────────────────────────────────────────────────────────",
        "-  12s ago  old  left: ttl ran out",
        "",
        "q quit  s sort  / filter  w why  ? help  by name",
    ]


def test_frame_while_the_daemon_is_away() -> None:
    away = DaemonStatus("regd at 127.0.0.1:7343", HERE.figures, 65.0)
    made = picture(fields("db"))
    lines = frame(made, ViewState(), away, (40, 12), 0.0, WALL)
    shown = texts(lines)
    assert shown[0].startswith("away since ")
    assert " (1m)  regd at" in shown[0]
    assert shown[1].startswith("last known: 1 instance of 1 servi")
    assert {style for style, text in lines[4] if text.strip()} == {"dim"}


def test_a_narrow_terminal_keeps_instance_and_port() -> None:
    made = picture(fields("web", "one", host="2001:db8::aaaa:bbbb:cccc", port=4_321))
    head, row = drawn(made, size=(59, 12))[3:5]
    assert head.split() == ["NAME▾", "ADDRESS", "STATE", "AGE"]
    assert row.startswith("  web/one ")
    assert ":4321" in row


@pytest.mark.parametrize("width", [40, 50, 60, 80, 100, 200])
@pytest.mark.parametrize(
    "host", ["127.0.0.1", "2001:db8::aaaa:bbbb:cccc", "printer.of.the.third.floor", "far." * 6 + "e"]
)
def test_address_is_never_truncated(host: str, width: int) -> None:
    made = picture(fields("a-name-that-is-rather-long", "one", host=host, port=4_321, meta={"zone": "a" * 40}))
    take(made, fields("another-name-that-is-rather-long", "two", host=host, port=4_321), 5.0)
    address = made.rows["another-name-that-is-rather-long", "two"].address
    shown = drawn(made, size=(width, 24), now=5.0)
    assert [address in line for line in shown[4:6]] == [True, True]
    assert [line.split()[0] for line in shown[4:6]] != [address] * 2  # the name is shown, too
    assert not any(":" in line for line in drawn(made, size=(20, 24))[3:6])  # whole or not at all
    [news] = [line for line in shown if " ago  " in line]
    assert news.endswith(f": {address}") or width < 60
    assert all(address in line for line in texts(whole(made, ViewState(), HERE, 5.0, WALL))[4:6])


def test_only_visible_rows_are_rendered() -> None:
    made, look = picture(*(fields(f"n{n:03}") for n in range(200))), ViewState()
    assert drawn(made, look)[4].startswith("  n000")
    press(look, made, "G")
    shown = drawn(made, look)
    assert shown[-7].startswith("> n199")
    assert len(whole(made, ViewState(), HERE, 0.0, WALL)) == 204


def test_wide_letters_take_two_columns() -> None:
    assert (cells("é漢e\u0301"), fitted("漢字x", 4), fitted("漢字", 4), fitted("a", 3)) == (
        4,
        "漢… ",
        "漢字",
        "a  ",
    )


TEXTS = some.text(max_size=30)


@given(
    name=TEXTS, state=TEXTS, meta=some.dictionaries(TEXTS, TEXTS, max_size=3), reason=TEXTS, why=TEXTS,
    width=some.integers(1, 130), height=some.integers(1, 40), pane=some.sampled_from(["", "why", "help"]),
)  # fmt: skip
def test_frame_fits_and_has_no_control_characters(
    name: str, state: str, meta: dict[str, str], reason: str, why: str, width: int, height: int, pane: str
) -> None:
    made = picture(*(fields(name, str(n), host=state, state=state, meta=meta) for n in range(5)))
    made.take("down", (name, "1"), None, 0.0, reason)
    look = ViewState()
    look.pane, look.why, look.selected = pane, [why] * 20, (name, "2")
    for daemon in (HERE, DaemonStatus(reason, Figures(), 5.0)):
        shown = [
            "".join(text for _, text in line) for line in frame(made, look, daemon, (width, height), 0.0, WALL)
        ]
        assert len(shown) <= height
        assert all(line.isprintable() and cells(line) <= width for line in shown), shown


# The command line.


@pytest.mark.parametrize(
    ("argv", "name", "interval_s"), [([], None, 1.0), (["a*"], "a*", 1.0), (["--interval", "0.1"], None, 0.1)]
)
def test_the_command_line(argv: list[str], name: str | None, interval_s: float) -> None:
    said = read(["top", *argv])
    assert (said["name"], said["interval"]) == (name, interval_s)
