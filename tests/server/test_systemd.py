"""Inherited sockets and notifications (sd_listen_fds(3), sd_notify(3)), with time moved by hand."""

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
from regd.system.systemd import Notifier, Watchdog, take_inherited_sockets, watchdog_s
from tests.support.clock import HandClock
from tests.support.daemon import WAIT_S, Peer

OURS = str(os.getpid())


# The variables about inherited sockets.


@pytest.fixture
def listener(monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    """A listening socket whose descriptor counts as the first inherited one."""
    with socket.create_server(("127.0.0.1", 0)) as sock:
        sock.set_inheritable(True)
        monkeypatch.setattr(systemd, "_FIRST_FILE", sock.fileno())
        yield sock


@pytest.mark.parametrize(
    ("environment", "name"),
    [
        ({"LISTEN_PID": OURS, "LISTEN_FDS": "1"}, "unknown"),
        ({"LISTEN_PID": OURS, "LISTEN_FDS": "1", "LISTEN_FDNAMES": "regd.socket"}, "regd.socket"),
        ({"LISTEN_PID": OURS, "LISTEN_FDS": "1", "LISTEN_FDNAMES": "", "LISTEN_PIDFDID": "7"}, ""),
    ],
)
def test_inherited_sockets(listener: socket.socket, environment: dict[str, str], name: str) -> None:
    environment["PATH"] = "/bin"
    assert take_inherited_sockets(environment) == [InheritedSocket(listener.fileno(), name)]
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
def test_variables_for_another_process_are_ignored(listener: socket.socket, environment: dict[str, str]) -> None:
    assert take_inherited_sockets(environment) == []
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
        ("99999", None, "is not open"),
        ("1", "a:b", "LISTEN_FDNAMES has 2 names"),
    ],
)
def test_invalid_variables_are_an_error(
    listener: socket.socket, count: str, names: str | None, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "set_inheritable", restricted_set_inheritable(listener.fileno()))
    environment = {"LISTEN_PID": OURS, "LISTEN_FDS": count}
    if names is not None:
        environment["LISTEN_FDNAMES"] = names
    with pytest.raises(ListenError, match=says) as refused:
        take_inherited_sockets(environment)
    assert "\n" not in str(refused.value)
    assert environment == {}


def restricted_set_inheritable(file: int) -> object:
    """Return an `os.set_inheritable` that fails for every descriptor but `file`, to spare those of pytest."""
    real = os.set_inheritable

    def set_inheritable(number: int, inheritable: bool) -> None:
        real(number if number == file else 10**6, inheritable)

    return set_inheritable


# Listening on inherited sockets.


@contextlib.contextmanager
def inherited(*listeners: socket.socket) -> Iterator[list[InheritedSocket]]:
    """Yield duplicates of listening sockets, as the service manager passes them while it keeps its own."""
    with contextlib.ExitStack() as stack:
        for listener in listeners:
            stack.enter_context(listener)
        yield [InheritedSocket(os.dup(listener.fileno()), "test") for listener in listeners]


def unix(path: Path | str, kind: socket.SocketKind = socket.SOCK_STREAM) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, kind)
    sock.bind(str(path))
    if kind != socket.SOCK_DGRAM:
        sock.listen()
    return sock


@pytest.mark.socket
async def test_daemon_listens_only_on_inherited_sockets(tmp_path: Path) -> None:
    path = tmp_path / "s"
    ipv4 = socket.create_server(("127.0.0.1", 0))
    ipv6 = socket.create_server(("::1", 0), family=socket.AF_INET6)
    unix_socket = unix(path)
    with inherited(unix_socket, ipv6, ipv4) as files:
        server = Daemon(Config(registry=tmp_path / "r.json", unix=tmp_path / "not", inherited=files))
        await server.start()
        try:
            assert server.addresses == [
                f"unix://{path}",
                f"tcp://[::1]:{ipv6.getsockname()[1]}",
                f"tcp://127.0.0.1:{ipv4.getsockname()[1]}",
            ]
            assert not (tmp_path / "not").exists()
            for number, listener in enumerate((unix_socket, ipv6, ipv4)):
                peer = await connected(listener)
                # Only a client whose user is known may register.
                assert (await peer.ask(cmd="register", name=f"n{number}", port=1))["ok"]
                await peer.close()
            assert server.status.startswith("3 registrations at revision 3, ")
        finally:
            await server.stop()
        assert path.is_socket()
        with socket.socket(socket.AF_UNIX) as later:  # the service manager still listens
            later.connect(str(path))


async def connected(listener: socket.socket) -> Peer:
    if listener.family == socket.AF_UNIX:
        return Peer(*await asyncio.open_unix_connection(listener.getsockname()))
    return Peer(*await asyncio.open_connection(*listener.getsockname()[:2]))


@pytest.mark.socket
async def test_inherited_unix_socket_alone(tmp_path: Path) -> None:
    listener = unix(tmp_path / "s")
    with inherited(listener) as files:
        server = Daemon(Config(registry=tmp_path / "r.json", inherited=files))
        await server.start()
        try:
            peer = await connected(listener)
            assert (await peer.ask(cmd="register", name="a", port=1))["ok"]
            await peer.close()
        finally:
            await server.stop()


def bound(
    family: socket.AddressFamily, kind: socket.SocketKind, host: str, listens: bool = True
) -> socket.socket:
    sock = socket.socket(family, kind)
    if family == socket.AF_INET6:
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    sock.bind((host, 0))
    if listens:
        sock.listen()
    return sock


STREAM, DGRAM = socket.SOCK_STREAM, socket.SOCK_DGRAM
V4, V6 = socket.AF_INET, socket.AF_INET6


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("any", "listens on 0.0.0.0, but regd takes loopback addresses only"),
        ("any6", "listens on ::, but regd takes loopback addresses only"),
        ("mapped", "listens on ::ffff:127.0.0.1, but regd takes loopback addresses only"),
        ("udp", "is neither a TCP nor a Unix stream socket"),
        ("datagram", "is neither a TCP nor a Unix stream socket"),
        ("packets", "is neither a TCP nor a Unix stream socket"),
        ("connected", "does not listen"),
        ("bound", "does not listen"),
        ("abstract", "has no path"),
        ("netlink", "is neither TCP nor Unix"),
        ("file", "cannot be used"),
        ("closed", "cannot be used"),
    ],
)
async def test_unusable_inherited_socket_is_an_error(tmp_path: Path, kind: str, says: str) -> None:
    with contextlib.ExitStack() as stack:
        good = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        file = unusable_file(stack, kind, tmp_path)
        files = [InheritedSocket(os.dup(good.fileno()), "good"), InheritedSocket(file, "b\x1bd")]
        registry = tmp_path / "folder" / "r.json"
        with pytest.raises(ListenError, match=says) as refused:
            await Daemon(Config(registry=registry, inherited=files)).start()
        assert str(refused.value).startswith(f"the inherited socket {file} ('b\\x1bd') ")
        assert not registry.parent.exists()


def unusable_file(stack: contextlib.ExitStack, kind: str, folder: Path) -> int:
    """Return the descriptor of a file that regd cannot use."""
    if kind == "closed":
        return 1_000_000
    if kind == "file":
        return os.open(os.devnull, os.O_RDONLY)
    if kind == "connected":
        one, other = socket.socketpair()
        stack.enter_context(other)
        return one.detach()
    sockets = {
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
    return sockets[kind]().detach()


# Notifications.


@pytest.fixture
def inbox(tmp_path: Path) -> Iterator[socket.socket]:
    """The service manager's end of the notify socket."""
    with unix(tmp_path / "notify", DGRAM) as sock:
        sock.setblocking(False)
        yield sock


def received(inbox: socket.socket) -> list[str]:
    """Return the messages received since the last call."""
    messages = []
    with contextlib.suppress(BlockingIOError):
        while True:
            messages.append(inbox.recv(4_096).decode())
    return messages


class Service:
    """A `Watchdog` with time moved by hand, and a status that the test sets."""

    def __init__(self, address: str, interval_s: float | None) -> None:
        self.clock = HandClock()
        self.status = "calm"
        self.watchdog = Watchdog(
            Notifier({"NOTIFY_SOCKET": address}), self.clock, interval_s, lambda: self.status
        )


@contextlib.contextmanager
def service(address: str, interval_s: float | None) -> Iterator[Service]:
    service = Service(address, interval_s)
    try:
        yield service
    finally:
        service.watchdog.stop()


def test_ready_watchdog_status_and_stopping(inbox: socket.socket) -> None:
    with service(inbox.getsockname(), 4.0) as regd:
        regd.clock.advance(60)
        assert received(inbox) == []
        regd.watchdog.start()
        assert received(inbox) == ["READY=1\nSTATUS=calm\nWATCHDOG=1"]
        regd.clock.advance(1.9)
        assert received(inbox) == []
        regd.clock.advance(6)
        assert received(inbox) == ["WATCHDOG=1"] * 3
        regd.status = "busy"
        regd.clock.advance(4)
        assert received(inbox) == ["WATCHDOG=1\nSTATUS=busy", "WATCHDOG=1"]
        regd.watchdog.stop()
        regd.watchdog.stop()
        regd.clock.advance(60)
        assert received(inbox) == ["STOPPING=1\nSTATUS=stopping"]


def test_only_status_changes_without_a_watchdog(inbox: socket.socket) -> None:
    with service(inbox.getsockname(), None) as regd:
        regd.watchdog.start()
        regd.clock.advance(60)
        regd.status = "busy"
        regd.clock.advance(60)
        assert received(inbox) == ["READY=1\nSTATUS=calm", "STATUS=busy"]


def test_suspended_loop_sends_no_pings(inbox: socket.socket) -> None:
    with service(inbox.getsockname(), 4.0) as regd:
        regd.watchdog.start()
        received(inbox)
        regd.clock.stop(60)
        assert received(inbox) == ["WATCHDOG=1"]  # one ping when the loop continues, none for the missed pings


def test_no_stopping_without_ready(inbox: socket.socket) -> None:
    with service(inbox.getsockname(), 4.0):
        pass
    assert received(inbox) == []


def test_abstract_address() -> None:
    name = f"regd-test-notify-{os.getpid()}"
    with unix(f"\0{name}", DGRAM) as inbox, service(f"@{name}", None) as regd:
        inbox.settimeout(WAIT_S)
        regd.watchdog.start()
        assert inbox.recv(100).startswith(b"READY=1\n")


@pytest.mark.parametrize("address", ["/no/such/socket", "@regd-test-nobody", "/" + "x" * 200, "vsock:2:1", "x"])
def test_unreachable_notify_socket_logs_one_line(address: str, caplog: pytest.LogCaptureFixture) -> None:
    with service(address, 0.2) as regd:
        regd.watchdog.start()
        regd.clock.advance(60)
    assert len(caplog.records) == 1
    assert caplog.messages[0].startswith(f"cannot notify '{address}': ")


def test_full_notify_socket_does_not_block(inbox: socket.socket, caplog: pytest.LogCaptureFixture) -> None:
    with service(inbox.getsockname(), 0.2) as regd:
        regd.watchdog.start()
        regd.clock.advance(1_000)
        assert len(received(inbox)) < 10_000
        assert len(caplog.records) == 1
        regd.clock.advance(0.2)
        assert received(inbox) == ["WATCHDOG=1"] * 2


def test_ping_is_sent_without_file_descriptors(inbox: socket.socket, monkeypatch: pytest.MonkeyPatch) -> None:
    with service(inbox.getsockname(), 4.0) as regd:
        regd.watchdog.start()
        received(inbox)

        def out_of_descriptors(*_: object) -> None:
            raise OSError(24, "Too many open files")

        monkeypatch.setattr(socket, "socket", out_of_descriptors)
        regd.clock.advance(2)
        monkeypatch.undo()
        assert received(inbox) == ["WATCHDOG=1"]


def test_no_notify_socket(caplog: pytest.LogCaptureFixture) -> None:
    for environment in ({}, {"NOTIFY_SOCKET": ""}):
        clock = HandClock()
        watchdog = Watchdog(Notifier(environment), clock, 4.0, lambda: "calm")
        watchdog.start()
        assert not clock._timers
        watchdog.stop()
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
def test_watchdog_interval(
    environment: dict[str, str], seconds: float | None, caplog: pytest.LogCaptureFixture
) -> None:
    assert watchdog_s(environment) == seconds
    assert environment == {}
    assert caplog.records == []


@pytest.mark.parametrize("text", ["", "0", "000", "-1", "1.5", "x", "1" * 21, "1" * 10_000])
def test_invalid_watchdog_interval_logs_one_line(text: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert watchdog_s({"WATCHDOG_USEC": text}) is None
    [message] = caplog.messages
    assert "not a number of microseconds" in message
