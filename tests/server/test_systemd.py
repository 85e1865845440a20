"""What a service manager says in the environment, and what it is told, with time by hand."""

import asyncio
import contextlib
import logging
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from regd.server.daemon import Config, Daemon
from regd.system import systemd
from regd.system.listener import InheritedSocket, ListenError
from regd.system.systemd import Notifier, Watchdog, handed_over, watchdog_s
from tests.support.clock import HandClock
from tests.support.daemon import WAIT_S, Peer

OURS = str(os.getpid())


# What is handed over.


@pytest.fixture
def listener(monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    """A socket that listens, at the number where those that are handed over begin."""
    with socket.create_server(("127.0.0.1", 0)) as made:
        made.set_inheritable(True)
        monkeypatch.setattr(systemd, "_FIRST_FILE", made.fileno())
        yield made


@pytest.mark.parametrize(
    ("environment", "name"),
    [
        ({"LISTEN_PID": OURS, "LISTEN_FDS": "1"}, "unknown"),
        ({"LISTEN_PID": OURS, "LISTEN_FDS": "1", "LISTEN_FDNAMES": "regd.socket"}, "regd.socket"),
        ({"LISTEN_PID": OURS, "LISTEN_FDS": "1", "LISTEN_FDNAMES": "", "LISTEN_PIDFDID": "7"}, ""),
    ],
)
def test_what_is_handed_over_is_taken(listener: socket.socket, environment: dict[str, str], name: str) -> None:
    environment["PATH"] = "/bin"
    assert handed_over(environment) == [InheritedSocket(listener.fileno(), name)]
    assert environment == {"PATH": "/bin"}
    assert not listener.get_inheritable()


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"LISTEN_FDS": "1"},
        {"LISTEN_PID": OURS},
        {"LISTEN_PID": OURS, "LISTEN_FDS": "0", "LISTEN_FDNAMES": ""},
        {"LISTEN_PID": "1", "LISTEN_FDS": "1"},
        {"LISTEN_PID": f"0{OURS}", "LISTEN_FDS": "1"},
        {"LISTEN_PID": "", "LISTEN_FDS": "1", "LISTEN_FDNAMES": "a:b"},
    ],
)
def test_what_is_for_another_is_left(listener: socket.socket, environment: dict[str, str]) -> None:
    assert handed_over(environment) == []
    assert environment == {}
    assert listener.get_inheritable()


@pytest.mark.parametrize(
    ("count", "names", "says"),
    [
        ("x", None, "LISTEN_FDS is 'x'"),
        ("-1", None, "LISTEN_FDS is '-1'"),
        (" 1", None, "LISTEN_FDS is ' 1'"),
        ("1\n", None, r"LISTEN_FDS is '1\\n'"),
        ("٣", None, "LISTEN_FDS is "),
        ("9" * 6, None, "LISTEN_FDS is "),
        ("99999", None, "is not there"),
        ("1", "a:b", "LISTEN_FDNAMES has 2 names"),
    ],
)
def test_what_cannot_be_is_told(
    listener: socket.socket, count: str, names: str | None, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "set_inheritable", spared(listener.fileno()))
    environment = {"LISTEN_PID": OURS, "LISTEN_FDS": count}
    if names is not None:
        environment["LISTEN_FDNAMES"] = names
    with pytest.raises(ListenError, match=says) as refused:
        handed_over(environment)
    assert "\n" not in str(refused.value)
    assert environment == {}


def spared(file: int) -> object:
    """Return an `os.set_inheritable` that touches no file of the test's own process but this one."""
    real = os.set_inheritable

    def set_inheritable(number: int, inheritable: bool) -> None:
        real(number if number == file else 10**6, inheritable)

    return set_inheritable


# Listening on it.


@contextlib.contextmanager
def handed(*listeners: socket.socket) -> Iterator[list[InheritedSocket]]:
    """Hand over copies, as the service manager does, which goes on listening."""
    with contextlib.ExitStack() as stack:
        for listener in listeners:
            stack.enter_context(listener)
        yield [InheritedSocket(os.dup(listener.fileno()), "test") for listener in listeners]


def unix(path: Path | str, kind: socket.SocketKind = socket.SOCK_STREAM) -> socket.socket:
    made = socket.socket(socket.AF_UNIX, kind)
    made.bind(str(path))
    if kind != socket.SOCK_DGRAM:
        made.listen()
    return made


@pytest.mark.socket
async def test_it_listens_on_what_is_handed_over_alone(tmp_path: Path) -> None:
    path = tmp_path / "s"
    four = socket.create_server(("127.0.0.1", 0))
    six = socket.create_server(("::1", 0), family=socket.AF_INET6)
    own = unix(path)
    with handed(own, six, four) as files:
        server = Daemon(Config(registry=tmp_path / "r.json", unix=tmp_path / "not", inherited=files))
        await server.start()
        try:
            assert server.addresses == [
                f"unix://{path}",
                f"tcp://[::1]:{six.getsockname()[1]}",
                f"tcp://127.0.0.1:{four.getsockname()[1]}",
            ]
            assert not (tmp_path / "not").exists()
            for number, listener in enumerate((own, six, four)):
                peer = await connected(listener)
                assert (await peer.ask(cmd="register", name=f"n{number}", port=1))["ok"]  # so who asks is known
                await peer.close()
            assert server.status.startswith("3 registrations at revision 3, ")
        finally:
            await server.stop()
        assert path.is_socket()
        with socket.socket(socket.AF_UNIX) as later:  # the service manager listens still
            later.connect(str(path))


async def connected(listener: socket.socket) -> Peer:
    if listener.family == socket.AF_UNIX:
        return Peer(*await asyncio.open_unix_connection(listener.getsockname()))
    return Peer(*await asyncio.open_connection(*listener.getsockname()[:2]))


@pytest.mark.socket
async def test_a_unix_socket_alone_will_do(tmp_path: Path) -> None:
    own = unix(tmp_path / "s")
    with handed(own) as files:
        server = Daemon(Config(registry=tmp_path / "r.json", inherited=files))
        await server.start()
        try:
            peer = await connected(own)
            assert (await peer.ask(cmd="register", name="a", port=1))["ok"]
            await peer.close()
        finally:
            await server.stop()


def bound(
    family: socket.AddressFamily, kind: socket.SocketKind, host: str, listens: bool = True
) -> socket.socket:
    made = socket.socket(family, kind)
    if family == socket.AF_INET6:
        made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    made.bind((host, 0))
    if listens:
        made.listen()
    return made


STREAM, DGRAM = socket.SOCK_STREAM, socket.SOCK_DGRAM
V4, V6 = socket.AF_INET, socket.AF_INET6


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("any", "listens on 0.0.0.0, and regd on loopback alone"),
        ("any6", "listens on ::, and regd on loopback alone"),
        ("mapped", "listens on ::ffff:127.0.0.1, and regd on loopback alone"),
        ("udp", "is no TCP and no Unix stream socket"),
        ("datagram", "is no TCP and no Unix stream socket"),
        ("packets", "is no TCP and no Unix stream socket"),
        ("connected", "does not listen"),
        ("bound", "does not listen"),
        ("abstract", "has no path"),
        ("netlink", "is neither TCP nor Unix"),
        ("file", "cannot be used"),
        ("closed", "cannot be used"),
    ],
)
async def test_anything_else_is_refused_and_nothing_touched(tmp_path: Path, kind: str, says: str) -> None:
    with contextlib.ExitStack() as stack:
        good = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        file = number(stack, kind, tmp_path)
        files = [InheritedSocket(os.dup(good.fileno()), "good"), InheritedSocket(file, "b\x1bd")]
        registry = tmp_path / "folder" / "r.json"
        with pytest.raises(ListenError, match=says) as refused:
            await Daemon(Config(registry=registry, inherited=files)).start()
        assert str(refused.value).startswith(f"the inherited socket {file} ('b\\x1bd') ")
        assert not registry.parent.exists()


def number(stack: contextlib.ExitStack, kind: str, folder: Path) -> int:
    """Return the number of a file that is nothing for regd."""
    if kind == "closed":
        return 1_000_000
    if kind == "file":
        return os.open(os.devnull, os.O_RDONLY)
    if kind == "connected":
        one, other = socket.socketpair()
        stack.enter_context(other)
        return one.detach()
    made = {
        "any": lambda: bound(V4, STREAM, "0.0.0.0"),
        "any6": lambda: bound(V6, STREAM, "::"),
        "mapped": lambda: bound(V6, STREAM, "::ffff:127.0.0.1"),
        "udp": lambda: bound(V4, DGRAM, "127.0.0.1", listens=False),
        "datagram": lambda: unix(folder / "d", DGRAM),
        "packets": lambda: unix(folder / "p", socket.SOCK_SEQPACKET),
        "bound": lambda: bound(V4, STREAM, "127.0.0.1", listens=False),
        "abstract": lambda: unix(f"\0regd-test-{os.getpid()}"),
        "netlink": lambda: socket.socket(socket.AF_NETLINK, socket.SOCK_RAW),
    }
    return made[kind]().detach()


# What it is told.


@pytest.fixture
def inbox(tmp_path: Path) -> Iterator[socket.socket]:
    """The service manager's end."""
    with unix(tmp_path / "notify", DGRAM) as made:
        made.setblocking(False)
        yield made


def told(inbox: socket.socket) -> list[str]:
    """Return what has come."""
    found = []
    with contextlib.suppress(BlockingIOError):
        while True:
            found.append(inbox.recv(4_096).decode())
    return found


class Beating:
    """A heart with time by hand, and a status that the test sets."""

    def __init__(self, address: str, watchdog: float | None) -> None:
        self.clock = HandClock()
        self.status = "calm"
        self.heart = Watchdog(Notifier({"NOTIFY_SOCKET": address}), self.clock, watchdog, lambda: self.status)


@contextlib.contextmanager
def beating(address: str, watchdog: float | None) -> Iterator[Beating]:
    made = Beating(address, watchdog)
    try:
        yield made
    finally:
        made.heart.stop()


def test_a_life(inbox: socket.socket) -> None:
    with beating(inbox.getsockname(), 4.0) as one:
        one.clock.advance(60)
        assert told(inbox) == []
        one.heart.start()
        assert told(inbox) == ["READY=1\nSTATUS=calm\nWATCHDOG=1"]
        one.clock.advance(1.9)
        assert told(inbox) == []
        one.clock.advance(6)
        assert told(inbox) == ["WATCHDOG=1"] * 3
        one.status = "busy"
        one.clock.advance(4)
        assert told(inbox) == ["WATCHDOG=1\nSTATUS=busy", "WATCHDOG=1"]
        one.heart.stop()
        one.heart.stop()
        one.clock.advance(60)
        assert told(inbox) == ["STOPPING=1\nSTATUS=stopping"]


def test_without_a_watchdog_there_is_news_alone(inbox: socket.socket) -> None:
    with beating(inbox.getsockname(), None) as one:
        one.heart.start()
        one.clock.advance(60)
        one.status = "busy"
        one.clock.advance(60)
        assert told(inbox) == ["READY=1\nSTATUS=calm", "STATUS=busy"]


def test_a_loop_that_stands_still_gives_no_sign(inbox: socket.socket) -> None:
    with beating(inbox.getsockname(), 4.0) as one:
        one.heart.start()
        told(inbox)
        one.clock.stop(60)
        assert told(inbox) == ["WATCHDOG=1"]  # when it goes on, and not for what it has missed


def test_one_that_was_never_ready_does_not_stop(inbox: socket.socket) -> None:
    with beating(inbox.getsockname(), 4.0):
        pass
    assert told(inbox) == []


def test_an_abstract_address() -> None:
    name = f"regd-test-notify-{os.getpid()}"
    with unix(f"\0{name}", DGRAM) as inbox, beating(f"@{name}", None) as one:
        inbox.settimeout(WAIT_S)
        one.heart.start()
        assert inbox.recv(100).startswith(b"READY=1\n")


@pytest.mark.parametrize("address", ["/no/such/socket", "@regd-test-nobody", "/" + "x" * 200, "vsock:2:1", "x"])
def test_what_cannot_be_told_is_one_line_and_no_end(address: str, caplog: pytest.LogCaptureFixture) -> None:
    with beating(address, 0.2) as one:
        one.heart.start()
        one.clock.advance(60)
    assert len(caplog.records) == 1
    assert caplog.messages[0].startswith(f"cannot notify '{address}': ")


def test_one_who_does_not_listen_holds_nobody_up(inbox: socket.socket, caplog: pytest.LogCaptureFixture) -> None:
    with beating(inbox.getsockname(), 0.2) as one:
        one.heart.start()
        one.clock.advance(1_000)
        assert len(told(inbox)) < 10_000
        assert len(caplog.records) == 1
        one.clock.advance(0.2)
        assert told(inbox) == ["WATCHDOG=1"] * 2


def test_when_there_are_no_more_files_it_gives_its_sign(
    inbox: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    with beating(inbox.getsockname(), 4.0) as one:
        one.heart.start()
        told(inbox)

        def none(*_: object) -> None:
            raise OSError(24, "Too many open files")

        monkeypatch.setattr(socket, "socket", none)
        one.clock.advance(2)
        monkeypatch.undo()
        assert told(inbox) == ["WATCHDOG=1"]


def test_nobody_wants_to_know(caplog: pytest.LogCaptureFixture) -> None:
    for environment in ({}, {"NOTIFY_SOCKET": ""}):
        clock = HandClock()
        heart = Watchdog(Notifier(environment), clock, 4.0, lambda: "calm")
        heart.start()
        assert not clock._timers
        heart.stop()
        assert environment == {}
    assert caplog.records == []


@pytest.mark.parametrize(
    ("environment", "seconds"),
    [
        ({}, None),
        ({"WATCHDOG_USEC": "30000000"}, 30.0),
        ({"WATCHDOG_USEC": "500000", "WATCHDOG_PID": OURS}, 0.5),
        ({"WATCHDOG_USEC": "500000", "WATCHDOG_PID": "1"}, None),
        ({"WATCHDOG_USEC": "500000", "WATCHDOG_PID": ""}, None),
        ({"WATCHDOG_PID": OURS}, None),
    ],
)
def test_how_often_a_sign_is_wanted(
    environment: dict[str, str], seconds: float | None, caplog: pytest.LogCaptureFixture
) -> None:
    assert watchdog_s(environment) == seconds
    assert environment == {}
    assert caplog.records == []


@pytest.mark.parametrize("text", ["", "0", "000", "-1", "1.5", "x", "1" * 21, "1" * 10_000])
def test_an_unusable_interval_is_a_line(text: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert watchdog_s({"WATCHDOG_USEC": text}) is None
    [message] = caplog.messages
    assert "no number of microseconds" in message
