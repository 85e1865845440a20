"""`regctl top` in a real terminal: keys, sizes, and a daemon that restarts."""

import functools
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from regd_client.blocking import BlockingConnection
from tests.support.daemon import DaemonProcess, environment
from tests.support.terminal import SEEN_S, Terminal

SELDOM = ("--interval", "3600")  # so that only a key, an event or a new size causes a request or a frame
WITHOUT = "sys.modules['prompt_toolkit'] = None"  # as if the extra were not installed
Top = Callable[..., Terminal]


@pytest.fixture
def peer(process: DaemonProcess) -> Iterator[BlockingConnection]:
    with BlockingConnection(process.addresses[0]) as made:
        yield made


@pytest.fixture
def top(process: DaemonProcess) -> Top:
    def make(*argv: str, **more: Any) -> Terminal:
        return Terminal("top", "--interval", "0.2", *argv, REGD_ADDRESS=process.addresses[0], **more)

    return make


def register(peer: BlockingConnection, *names: str, **more: object) -> None:
    for at, name in enumerate(names):
        assert peer.ask("register", name=name, port=8_000 + at, **more)["ok"]


def listed(terminal: Terminal) -> list[str]:
    """Return the names in the table, from top to bottom."""
    head = next(
        (at for at, line in enumerate(terminal.lines) if line.startswith("  NAME")), terminal.screen.lines
    )
    rows = terminal.lines[head + 1 :]
    end = next((at for at, line in enumerate(rows) if not line or line.startswith("──")), len(rows))
    return [row[2:].split()[0] for row in rows[:end]]


def test_instances_appear_and_disappear(peer: BlockingConnection, top: Top) -> None:
    register(peer, "db", "web", hold=True, pid=os.getpid(), ttl=60)
    with top() as terminal:
        terminal.wait_for("regd at 127.0.0.1:", "2 instances of 2 services", "recent events", "requests ", "lag ")
        terminal.wait_until(lambda: terminal.line("  db").split()[1:3] == ["127.0.0.1:8000", "ready"])
        terminal.wait_until(lambda: f"hold pid {os.getpid()} ttl" in terminal.line("  db"))
        register(peer, "api")
        terminal.wait_for("3 instances of 3 services", "api  came: 127.0.0.1:8000")
        terminal.wait_until(lambda: terminal.line("+ api"))
        peer.ask("update", name="db", state="draining")
        terminal.wait_for("db  changed: ready → draining")
        peer.ask("deregister", name="web")
        terminal.wait_for("2 instances of 2 services", "web  left: deregistered")
        terminal.wait_until(lambda: listed(terminal) == ["api", "db"])
        terminal.type("q")
        assert terminal.wait_for_exit() == 0
        assert terminal.is_restored


def test_sort_select_and_filter(peer: BlockingConnection, top: Top) -> None:
    register(peer, "b", "a", "c")
    peer.ask("update", name="c", state="starting")
    times = {fields["name"]: fields["registered_at"] for fields in peer.ask("list")["instances"]}
    youngest_first = sorted(times, key=lambda name: (-times[name], name))  # times may be equal, in milliseconds
    with top() as terminal:
        terminal.wait_for("3 instances")
        terminal.wait_until(lambda: listed(terminal) == ["a", "b", "c"])
        terminal.type("r")
        terminal.wait_until(lambda: listed(terminal) == ["c", "b", "a"])
        terminal.type("rA")
        terminal.wait_until(lambda: "AGE▾" in terminal.text and listed(terminal) == youngest_first)
        terminal.type("s")
        terminal.wait_until(lambda: "STATE▾" in terminal.text and listed(terminal) == ["c", "a", "b"])
        terminal.type("N\x1b[B\x1b[B")  # down, twice
        terminal.wait_until(lambda: terminal.line("> b"))
        terminal.type("k")
        terminal.wait_until(lambda: terminal.line("> a"))
        terminal.type("/START")
        terminal.wait_until(lambda: listed(terminal) == ["c"])
        terminal.wait_until(
            lambda: "1 of 3 instances" in terminal.text and terminal.lines[-1].startswith("/START_")
        )
        terminal.type("q\x7f\r")  # here `q` is only a letter
        terminal.wait_until(lambda: terminal.lines[-1].startswith("/START  q quit"))
        terminal.type("\x1b")
        terminal.wait_until(lambda: listed(terminal) == ["a", "b", "c"])
        terminal.type("?")
        terminal.wait_for("PgUp", "reverse the order")
        terminal.type("\x1b")
        terminal.wait_for("recent events")


def test_why(peer: BlockingConnection, top: Top) -> None:
    register(peer, "db", "web")
    with top(*SELDOM) as terminal:
        terminal.wait_for("2 instances")
        terminal.type("jw")
        terminal.wait_for("── why", "db at 127.0.0.1:8000: ready", "static: has no owner")
        terminal.type("j")
        terminal.wait_for("web at 127.0.0.1:8001: ready")
        peer.ask("deregister", name="web")
        terminal.wait_for("1 instance of 1 service", "web left")
        terminal.wait_until(lambda: terminal.line("> db"))
        peer.ask("deregister", name="db")
        terminal.wait_for("nothing is registered", "web left")
        terminal.type("\x1b")
        terminal.wait_until(lambda: "── why" not in terminal.text)
        terminal.type("\x03")
        assert terminal.wait_for_exit() == 130
        assert terminal.is_restored


def fits(terminal: Terminal, width: int, height: int) -> bool:
    head = terminal.line("  NAME")
    return (
        len(terminal.lines) == height
        and terminal.lines[-1].startswith("q quit  s sort")
        and bool(head)
        and ("INSTANCE" in head) is (width >= 60)
        and ("zone=a" if width >= 60 else "db/one") in terminal.text
    )


@pytest.mark.parametrize("before", ["pass", WITHOUT])
def test_sizes(peer: BlockingConnection, top: Top, before: str) -> None:
    register(peer, "db", "web", instance="one", meta={"zone": "a"})
    with top(*SELDOM, before=before, width=100) as terminal:
        terminal.wait_for("META", "zone=a", "INSTANCE")
        for width, height in ((80, 24), (50, 14), (20, 5), (100, 30)):
            terminal.resize(width, height)
            terminal.wait_until(functools.partial(fits, terminal, width, height))


def test_restart_of_the_daemon(process: DaemonProcess, peer: BlockingConnection, top: Top) -> None:
    register(peer, "db", "web")
    with top() as terminal:
        terminal.wait_for("2 instances")
        process.end()
        terminal.wait_for("away since", "last known: 2 instances", "still trying")
        terminal.wait_until(lambda: listed(terminal) == ["db", "web"])
        process.start()
        terminal.wait_for("requests ", "2 instances")
        with BlockingConnection(process.addresses[0]) as again:
            register(again, "api")
            terminal.wait_for("api  came")
            terminal.wait_until(lambda: listed(terminal) == ["api", "db", "web"])


@pytest.mark.parametrize("before", ["pass", WITHOUT])
def test_texts_of_other_programs_reach_the_terminal_escaped(
    peer: BlockingConnection, top: Top, before: str
) -> None:
    register(peer, "db", meta={"note": "\x1b]0;mine\x07\x1b[31m\u202ered\x9b2J"})
    with top(before=before, width=140) as terminal:
        terminal.wait_for(r"note=\x1b]0;mine\x07\x1b[31m\u202ered\x9b2J")
        for wild in (b"\x1b]0;", b"\x07", b"\x1b[31mred", "\u202e".encode(), "\x9b".encode()):
            assert wild not in terminal.raw


def test_signal_restores_the_terminal(peer: BlockingConnection, top: Top) -> None:
    with top() as terminal:
        terminal.wait_for("nothing is registered")
        terminal.process.send_signal(signal.SIGTERM)
        assert terminal.wait_for_exit() == 128 + signal.SIGTERM
        assert terminal.is_restored


# Without the extra.


@pytest.mark.long
def test_plain_table_without_prompt_toolkit(process: DaemonProcess, peer: BlockingConnection, top: Top) -> None:
    register(peer, "db")
    with top(before=WITHOUT) as terminal:
        terminal.wait_for("1 instance of 1 service", "pip install prompt_toolkit")
        register(peer, "web")
        terminal.wait_for("web  came")
        terminal.type("r")
        terminal.wait_until(lambda: listed(terminal) == ["web", "db"])
        process.end()
        terminal.wait_for("away since")
        process.start()
        terminal.wait_for("requests ")
        terminal.type("q")
        assert terminal.wait_for_exit() == 0
        assert terminal.is_restored


def test_ctrl_c_ends_the_plain_table(peer: BlockingConnection, top: Top) -> None:
    with top(before=WITHOUT) as terminal:
        terminal.wait_for("nothing is registered")
        terminal.type("\x03")
        assert terminal.wait_for_exit() == 130
        assert terminal.is_restored


# Without a terminal.


def piped(process: DaemonProcess, *argv: str, **variables: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "regd.cli.regctl", "top", *argv],
        env=environment(REGD_ADDRESS=process.addresses[0], **variables),
        stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=SEEN_S, check=False,
    )  # fmt: skip


def test_without_a_terminal_one_frame_is_printed(process: DaemonProcess, peer: BlockingConnection) -> None:
    register(peer, "db", "web", meta={"note": "\x1b[31mred" + 100 * "x"})
    done = piped(process, "d*")
    assert (done.returncode, done.stderr) == (0, "")
    title, figures, _, head, row = done.stdout.splitlines()
    assert title.startswith("regd at 127.0.0.1:")
    assert "1 instance of 1 service" in title
    assert "lag " in figures
    assert head.split()[0] == "NAME▾"
    assert row.split() == [
        "db",
        "127.0.0.1:8000",
        "ready",
        row.split()[3],
        "static",
        r"note=\x1b[31mred" + 100 * "x",
    ]


def test_json_is_one_object(process: DaemonProcess, peer: BlockingConnection) -> None:
    register(peer, "db", "web")
    done = piped(process, "--json")
    said = json.loads(done.stdout)
    assert (done.returncode, said["address"], set(said)) == (
        0,
        process.addresses[0],
        {"address", "stats", "instances"},
    )
    assert [instance["name"] for instance in said["instances"]] == ["db", "web"]
    assert said["stats"]["registrations"] == 2


def test_errors_at_the_start(process: DaemonProcess) -> None:
    done = piped(process, "*x")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("regctl: ")
    process.end()
    done = piped(process)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (3, "", 1)
    assert "start one with `regd`" in done.stderr


def test_other_commands_do_not_import_top(process: DaemonProcess) -> None:
    code = "import sys; from regd.cli.regctl import main; main(); print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code, "list", "x*"],
        env=environment(REGD_ADDRESS=process.addresses[0]), capture_output=True, text=True, timeout=SEEN_S, check=True,
    )  # fmt: skip
    loaded = done.stdout.split()
    assert "regd.cli.commands" in loaded
    assert not [module for module in loaded if module.startswith(("regd.cli.top", "prompt_toolkit", "asyncio"))]


def test_dumb_terminal_gets_one_frame(process: DaemonProcess, top: Top) -> None:
    with top(TERM="dumb") as terminal:
        assert terminal.wait_for_exit() == 0
        assert "nothing is registered" in terminal.text
        assert b"\x1b" not in terminal.raw
