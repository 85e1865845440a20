"""Render `regctl top` as lines of styled spans, for any width and height.

The functions do no I/O and read no clock. They escape all text with `visible`.
"""

from __future__ import annotations

import time
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

from regd.cli.output import visible
from regd.cli.top.model import NEW_S, RecentEvent, Row, Table, named
from regd.cli.top.rates import Figures
from regd.cli.top.view_state import HELP, ViewState

Line = list[tuple[str, str]]  # style and text; the styles are those of `screen.py`

_GAP = "  "
_COLUMNS = ("NAME", "INSTANCE", "ADDRESS", "STATE", "PRIORITY", "AGE", "HELD BY", "META")
_SORTED_BY = {"name": "NAME", "state": "STATE", "age": "AGE", "holders": "HELD BY"}
# Widths of columns. If the terminal has room, a column is as wide as its content, but at least `_WIDTH_PREFERRED`
# (8 for a column that is not listed) and at most `_WIDTH_MAX`. Without room, it may shrink to `_WIDTH_MIN`.
_WIDTH_PREFERRED = {"AGE": 4, "META": 4}
_WIDTH_MIN = {"NAME": 12, "INSTANCE": 8, "STATE": 8, "PRIORITY": 8, "AGE": 4, "HELD BY": 8, "META": 6}
_WIDTH_MAX = {
    "NAME": 32,
    "INSTANCE": 16,
    "STATE": 9,
    "PRIORITY": 8,
    "AGE": 4,
    "HELD BY": 22,
    "META": 9_000,
}
_NAME_WIDTH_MIN = 4  # beside a wide address, NAME may be as narrow as this
_BY_WEIGHT = (
    "NAME",
    "STATE",
    "AGE",
    "HELD BY",
    "INSTANCE",
    "PRIORITY",
    "META",
)  # the last column is dropped first
_MARKS = {"up": ("new", "+", "came"), "down": ("gone", "-", "left"), "change": ("warn", "~", "changed")}
_NARROW = 60  # columns; in a narrower terminal, NAME includes the instance
_WIDE = 10_000  # columns for output that is not cut
_EVENT_LINES = 4
_PANE_LINES = 10


@dataclass(frozen=True, slots=True)
class DaemonStatus:
    """The title, the figures, and the seconds since the connection was lost (0.0 while connected)."""

    title: str
    figures: Figures
    away_s: float = 0.0


# Texts.


def cells(text: str) -> int:
    """Return the width of a text in terminal columns."""
    if text.isascii():
        return len(text)
    return sum(map(_cells, text))


def _cells(letter: str) -> int:
    if unicodedata.combining(letter):
        return 0
    return 2 if unicodedata.east_asian_width(letter) in "WF" else 1


def fitted(text: str, width: int) -> str:
    """Truncate a text, or pad it with blanks, to exactly this width."""
    text = visible(text)
    used = cells(text)
    if used > width:
        kept, used = "", 1
        for letter in text:
            if used + _cells(letter) > width:
                break
            kept, used = kept + letter, used + _cells(letter)
        text = kept + "…"
    return text + " " * (width - used) if width > 0 else ""


def age(seconds: float) -> str:
    """Return a duration in its largest unit, such as 5m."""
    whole = max(0, int(seconds))
    for unit, size in (("d", 86_400), ("h", 3_600), ("m", 60)):
        if whole >= size:
            return f"{whole // size}{unit}"
    return f"{whole}s"


def rate(per_s: float | None) -> str:
    if per_s is None:
        return "-"
    return f"{per_s:.0f}/s" if per_s >= 10 or per_s == 0 else f"{per_s:.1f}/s"


def lag(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    return f"{1_000 * seconds:.1f} ms" if seconds < 1 else f"{seconds:.1f} s"


def cut(line: Line, width: int) -> Line:
    """Truncate a line to the width."""
    spans: Line = []
    for style, text in line:
        text = visible(text)
        if cells(text) > width:
            text = fitted(text, width)
        width -= cells(text)
        if text:
            spans.append((style, text))
    return spans


# The frame.


def frame(
    content: Table, view: ViewState, daemon: DaemonStatus, size: tuple[int, int], now: float, wall: float
) -> list[Line]:
    """Return the lines for a terminal of this size (columns, rows).

    `now` is the time on the clock of the table's events, `wall` is the time in Unix seconds.
    """
    width, height = size
    rows = content.shown(view.sort, view.reverse, view.words)
    under = _under(content, view, height, width, now)
    above = _above(content, view, daemon, len(rows), wall)[: max(1, height - 4)]
    view.page = max(1, height - len(above) - len(under) - 2)  # 2: the header of the table, and the line of keys
    view.keep_in_range(rows)
    lines = [*above, *table(rows, view, width, now, wall, away=daemon.away_s > 0)]
    if not rows:
        lines.append([("dim", _nothing(content, view))])
    lines += [[] for _ in range(height - len(under) - 1 - len(lines))]
    lines = [*lines[: max(1, height - len(under) - 1)], *under, _keys(view)]
    return [cut(line, width) for line in lines[-height:]] if height > 1 else [cut(lines[0], width)]


def whole(content: Table, view: ViewState, daemon: DaemonStatus, now: float, wall: float) -> list[Line]:
    """Return a frame with all rows at full width, for a pipe or a file."""
    rows = content.shown(view.sort, view.reverse, view.words)
    view.page = max(1, len(rows))
    lines = [*_above(content, view, daemon, len(rows), wall), *table(rows, view, _WIDE, now, wall)]
    return lines if rows else [*lines, [("dim", _nothing(content, view))]]


def _nothing(content: Table, view: ViewState) -> str:
    return f"no instance matches {view.words!r}" if view.words and content.rows else "nothing is registered"


def _above(content: Table, view: ViewState, daemon: DaemonStatus, shown: int, wall: float) -> list[Line]:
    figures = daemon.figures
    instances = len(content.rows)
    counted = f"{shown} of {instances}" if view.words else f"{instances}"
    counted += f" instance{'' if instances == 1 else 's'} of {_many(content.services, 'service')}"
    if daemon.away_s:
        since = time.strftime("%H:%M:%S", time.localtime(wall - daemon.away_s))
        title: Line = [("away", f"away since {since} ({age(daemon.away_s)})"), ("title", f"  {daemon.title}")]
        what: Line = [("dim", f"last known: {counted}; still trying")]
    else:
        title = [("title", daemon.title), ("", f"  {counted}")]
        if figures.uptime_s is not None:
            title.append(("dim", f"  up {age(figures.uptime_s)}"))
        what = [
            ("", f"requests {rate(figures.requests)}  changes {rate(figures.changes)}"),
            ("", f"  lag {lag(figures.lag_s)}, at most {lag(figures.lag_s_max)}"),
            ("dim", "" if figures.connections is None else f"  {_many(int(figures.connections), 'connection')}"),
        ]
    return [title, what, []]


def _many(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"


def _keys(view: ViewState) -> Line:
    if view.typing:
        return [("key", "/"), ("", view.words + "_"), ("dim", "  Enter keeps it, Esc clears it")]
    words: Line = [("warn", f"/{view.words}  ")] if view.words else []
    order: Line = [("dim", f"by {view.sort}{', reversed' if view.reverse else ''}  ")]
    keys = (("q", "quit"), ("s", "sort"), ("/", "filter"), ("w", "why"), ("?", "help"))
    return [*words, *(span for key, does in keys for span in (("key", key), ("", f" {does}  "))), *order]


# The table.


def table(
    rows: Sequence[Row], view: ViewState, width: int, now: float, wall: float, away: bool = False
) -> list[Line]:
    """Return the header and the visible rows."""
    seen = rows[view.first : view.first + view.page]
    texts = [_texts(row, wall, width < _NARROW) for row in seen]
    widths = _widths(texts, width - 2)
    head = [*_head(view, widths)]
    lines: list[Line] = [[("head", "  " + _GAP.join(head))]]
    for row, columns in zip(seen, texts, strict=True):
        lines.append(_line(row, columns, widths, row.key == view.selected, now, away))
    return lines


def _head(view: ViewState, widths: dict[str, int]) -> list[str]:
    arrow = "▴" if view.reverse else "▾"
    names = ((name, name + arrow if _SORTED_BY[view.sort] == name else name) for name in widths)
    return [_aligned(name, text, widths[name]) for name, text in names]


def _aligned(column: str, text: str, width: int) -> str:
    if column in ("AGE", "PRIORITY"):
        return text.rjust(width)
    return fitted(text, width)


def _texts(row: Row, wall: float, narrow: bool) -> dict[str, str]:
    name, instance = (named(*row.key), "") if narrow else (row.name, row.instance)
    since = age(wall - row.since)
    shown = (name, instance, row.address, row.state, row.priority, since, row.holders, row.meta)
    return dict(zip(_COLUMNS, shown, strict=True))


def _widths(texts: Sequence[dict[str, str]], width: int) -> dict[str, int]:
    """Return the columns that fit, in order, with their widths.

    Users copy addresses, so that column is never truncated; it is dropped if it leaves no room for a name.
    """
    arrow = _SORTED_BY.values()
    ideal = {name: max(len(name) + (name in arrow), *(cells(row[name]) for row in texts), 0) for name in _COLUMNS}
    for name in ("INSTANCE", "PRIORITY", "META"):
        if not any(row[name] for row in texts):
            del ideal[name]
    address = ideal.pop("ADDRESS")
    ideal = {
        name: min(max(size, _WIDTH_PREFERRED.get(name, 8)), _WIDTH_MAX[name]) for name, size in ideal.items()
    }
    minimum = {name: min(size, _WIDTH_MIN[name]) for name, size in ideal.items()}
    widths: dict[str, int] = {}
    left = width
    has_address = width >= address + len(_GAP) + _NAME_WIDTH_MIN
    if has_address:
        left -= address + len(_GAP)
        minimum["NAME"] = min(minimum["NAME"], left)
    for name in filter(ideal.__contains__, _BY_WEIGHT):
        if left < minimum[name] and widths:
            break
        widths[name] = minimum[name]
        left -= minimum[name] + len(_GAP)
    left += len(_GAP)
    for name in widths:
        more = max(0, min(ideal[name] - widths[name], left))
        widths[name] += more
        left -= more
    if has_address:
        widths["ADDRESS"] = address
    return {name: widths[name] for name in _COLUMNS if name in widths}


def _line(
    row: Row, texts: dict[str, str], widths: dict[str, int], selected: bool, now: float, away: bool
) -> Line:
    new = now - row.seen_at < NEW_S
    mark = ">" if selected else "+" if new else " "
    style = "selected" if selected else "dim" if away else ""
    line: Line = [(style or ("new" if new else ""), mark + " ")]
    for name, width in widths.items():
        own = "warn" if name == "STATE" and row.state != "ready" else "dim" if name == "META" else ""
        if name == "NAME" and new:
            own = "new"
        line.append((style or own, _aligned(name, texts[name], width)))
        line.append((style, _GAP))
    return line[:-1]


# Below the table: recent events, or a pane.


def _under(content: Table, view: ViewState, height: int, width: int, now: float) -> list[Line]:
    if view.pane == "help":
        lines: list[Line] = [[("key", f"{keys:<9}"), ("", f"  {does}")] for keys, does in HELP]
        return [_rule("keys", width), *lines[: max(1, height - 6)]]
    if view.pane == "why":
        most = max(1, min(_PANE_LINES, height - 8))
        lines = [[("dim" if text.startswith(" ") else "", text)] for text in view.why]
        if len(lines) > most:
            lines = [*lines[: most - 1], [("dim", f"  and {len(lines) - most + 1} more lines")]]
        return [_rule("why", width), *lines, *([] for _ in range(most - len(lines)))]
    most = _EVENT_LINES if height >= 18 else 2 if height >= 12 else 0
    if most == 0:
        return []
    events = [_event(event, width, now) for _, event in zip(range(most), content.events, strict=False)]
    return [_rule("recent events", width), *events, *([] for _ in range(most - len(events)))]


def _rule(title: str, width: int) -> Line:
    return [("dim", f"── {title} " + "─" * max(0, width - len(title) - 4))]


def _event(event: RecentEvent, width: int, now: float) -> Line:
    style, mark, did = _MARKS[event.kind]
    begins, ends = f"{age(now - event.at):>4} ago  ", f": {event.what}" if event.what else ""
    room = max(_NAME_WIDTH_MIN, width - len(f"{mark}   {begins}{did}") - cells(ends))
    who = event.who if cells(event.who) <= room else fitted(event.who, room)
    return [(style, f"{mark} "), ("dim", begins), ("", who), (style, f"  {did}"), ("dim", ends)]
