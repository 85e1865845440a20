"""The user of a client, and who may write: with the kernel's messages as bytes, real sockets, and real users."""

import json
import os
import shutil
import socket
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from regd.system import peer_credentials
from regd.system.listener import ListenError
from regd.system.peer_credentials import PeerCredentials, by_table, is_connection, owner, question
from tests.support.daemon import DaemonProcess, InLoop, environment
from tests.support.peers import STRANGER, FakeCredentials

OURS, THEIRS = ("127.0.0.1", 7343), ("127.0.0.1", 40_000)
LISTEN, ESTABLISHED, TIME_WAIT = 10, 1, 6
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
linux = pytest.mark.skipif(sys.platform != "linux", reason="asks Linux's kernel")


def row(
    source: peer_credentials.End,
    destination: peer_credentials.End,
    uid: int,
    inode: int,
    state: int = ESTABLISHED,
    mapped: bool = False,
) -> bytes:
    """Build a reply of the kernel: an nlmsghdr and an inet_diag_msg (linux/inet_diag.h)."""
    ends = b""
    for host, _ in (source, destination):
        host = f"::ffff:{host}" if mapped else host
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        ends += socket.inet_pton(family, host).ljust(16, b"\0")
    id = struct.pack("!HH", source[1], destination[1]) + ends + struct.pack("=III", 0, 1, 2)
    body = struct.pack("=BBBB", 2, state, 0, 0) + id + struct.pack("=IIIII", 0, 0, 0, uid, inode)
    return struct.pack("=IHHII", 16 + len(body), 20, 0, 0, 0) + body


def test_request_names_the_clients_end_of_the_connection() -> None:
    request = question(THEIRS, OURS)
    assert len(request) == 72 == struct.unpack_from("=I", request)[0]
    assert struct.unpack_from("!HH", request, 24) == (40_000, 7343)


@pytest.mark.parametrize("mapped", [False, True])
def test_reply_about_the_connection_has_its_user(mapped: bool) -> None:
    reply = row(THEIRS, OURS, 1000, 4711, mapped=mapped)
    assert is_connection(reply, THEIRS, OURS)
    assert owner(reply) == 1000


@pytest.mark.parametrize(
    "found",
    [
        b"",
        row(THEIRS, OURS, 0, 4711)[:60],
        # A listener of another user on the port of a client that has closed.
        row(THEIRS, ("127.0.0.1", 0), 0, 4711, LISTEN),
        row(THEIRS, OURS, 0, 4711, LISTEN),
        row(("127.0.0.1", 40_001), OURS, 0, 4711),
        row(THEIRS, ("127.0.0.1", 7344), 0, 4711),
        row(("127.0.0.2", 40_000), OURS, 0, 4711),
    ],
    ids=["none", "short", "listener", "listening state", "other port", "other port of ours", "other address"],
)
def test_reply_about_another_socket_is_not_used(found: bytes) -> None:
    assert not is_connection(found, THEIRS, OURS)


@pytest.mark.parametrize("state", [ESTABLISHED, TIME_WAIT])
def test_socket_without_an_owner_is_unknown_although_it_shows_root(state: int) -> None:
    assert owner(row(THEIRS, OURS, 0, 0, state)) is None


TABLE = """\
  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode
   0: 0100007F:1CAF 00000000:0000 0A 00000000:00000000 00:00000000 00000000  1000        0 11 1 0 100 0 0 10 0
   1: 0100007F:9C40 0100007F:1CAF 01 00000000:00000000 00:00000000 00000000  1001        0 12 1 0 20 4 30 10 -1
   2: 0100007F:9C41 0100007F:1CAF 04 00000000:00000000 00:00000000 00000000     0        0 0 1 0 20 4 30 10 -1
   3: 0100007F:9C42 0100007F:1CAF 0A 00000000:00000000 00:00000000 00000000     0        0 13 1 0 20 4 30 10 -1
"""
TABLE6 = """\
  sl  local_address                         remote_address                        st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode
   0: 0000000000000000FFFF00000100007F:9C43 0000000000000000FFFF00000100007F:1CAF 01 0:0 00:0 0  1003 0 14 1
   1: 00000000000000000000000001000000:9C44 00000000000000000000000001000000:1CAF 01 0:0 00:0 0  1004 0 15 1
"""


@pytest.mark.skipif(sys.byteorder != "little", reason="the table is in the machine's order, this one in another")
@pytest.mark.parametrize(
    ("theirs", "ours", "uid"),
    [
        (("127.0.0.1", 40_000), OURS, 1001),
        (("127.0.0.1", 40_001), OURS, None),
        (("127.0.0.1", 40_002), OURS, None),
        (("127.0.0.1", 40_003), OURS, 1003),
        (("::1", 40_004), ("::1", 7343), 1004),
        (("127.0.0.1", 40_005), OURS, None),
    ],
    ids=["peer", "no inode", "listener", "mapped", "IPv6", "none"],
)
def test_proc_net_tcp_gives_the_same(
    theirs: peer_credentials.End,
    ours: peer_credentials.End,
    uid: int | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "tcp").write_text(TABLE)
    (tmp_path / "tcp6").write_text(TABLE6)
    monkeypatch.setattr(peer_credentials, "_TABLES", (str(tmp_path / "tcp"), str(tmp_path / "tcp6")))
    assert by_table(theirs, ours) == uid


def connection(host: str, as_host: str = "") -> tuple[socket.socket, socket.socket, socket.socket]:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.create_server((host, 0), family=family)
    client = socket.create_connection((as_host or host, listener.getsockname()[1]))
    return listener, listener.accept()[0], client


@linux
@pytest.mark.parametrize(("host", "as_host"), [("127.0.0.1", ""), ("::1", ""), ("127.0.0.1", "::ffff:127.0.0.1")])
@pytest.mark.parametrize("table", [False, True])
def test_kernel_reports_the_user_of_the_client(host: str, as_host: str, table: bool) -> None:
    try:
        listener, ours, theirs = connection(host, as_host)
    except OSError as error:
        pytest.skip(f"no {host} here: {error}")
    credentials = PeerCredentials()
    with listener, ours, theirs:
        credentials.open([listener])
        if table:
            credentials._ask = by_table
        assert credentials.uid_of(ours) == os.geteuid()
        theirs.close()
        assert credentials.uid_of(ours) is None, "a closed socket must not count as root's"
    credentials.close()


@linux
def test_inherited_unix_socket_before_tcp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Inherited sockets are in any order; the check of netlink needs a TCP socket."""
    listener, ours, theirs = connection("127.0.0.1")
    with listener, ours, theirs, socket.socket(socket.AF_UNIX) as unix:
        unix.bind(str(tmp_path / "s"))
        first, credentials, alone = PeerCredentials(), PeerCredentials(), PeerCredentials()
        first.open([listener])
        credentials.open([unix, listener])
        assert (credentials._ask is by_table) == (first._ask is by_table)
        assert credentials.uid_of(ours) == os.geteuid()
        monkeypatch.setattr(peer_credentials, "_TABLES", ())
        alone.open([unix])
        assert alone.uid_of(unix) is None, "an unconnected socket has no user"
        here, there = socket.socketpair()
        with here, there:
            assert alone.uid_of(here) == os.geteuid()
    for sock in (first, credentials, alone):
        sock.close()


def test_listener_on_the_port_of_a_closed_client_is_not_used(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The kernel returns a listener if no connection matches. Any program could listen on a closed client's port."""
    credentials = PeerCredentials()
    monkeypatch.setattr(credentials, "_row", lambda theirs, ours: row(THEIRS, ("127.0.0.1", 0), 0, 4711, LISTEN))
    assert credentials._by_netlink(THEIRS, OURS) is None


@linux
def test_proc_net_tcp_is_read_without_netlink(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peer_credentials, "_NETLINK_SOCK_DIAG", 31)  # no such family
    listener, ours, theirs = connection("127.0.0.1")
    credentials = PeerCredentials()
    with listener, ours, theirs:
        credentials.open([listener])
        assert credentials._ask is by_table
        assert credentials.uid_of(ours) == os.geteuid()


@pytest.fixture
def unable_to_report(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peer_credentials, "_NETLINK_SOCK_DIAG", 31)
    monkeypatch.setattr(peer_credentials, "_TABLES", ("/nowhere",))


def test_outside_linux_every_user_may_write_and_a_warning_is_logged(
    unable_to_report: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(peer_credentials, "_LINUX", False)
    credentials = PeerCredentials()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        credentials.open([listener])
    assert credentials.may_write(None)
    assert not credentials.may_write(STRANGER)  # a Unix socket reports its peer on every system
    assert "any user of this machine may write" in caplog.text


@linux
def test_tcp_is_refused_if_the_kernel_does_not_report_users(unable_to_report: None) -> None:
    credentials = PeerCredentials()
    with (
        socket.create_server(("127.0.0.1", 0)) as listener,
        pytest.raises(ListenError, match=r"--port off --unix PATH.*--allow-any-user"),
    ):
        credentials.open([listener])
    assert not credentials.may_write(None)


@linux
def test_allow_any_user_lets_unknown_users_write_with_a_warning(
    unable_to_report: None, caplog: pytest.LogCaptureFixture
) -> None:
    credentials = PeerCredentials(anyone=True)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        credentials.open([listener])
    assert credentials.may_write(None)
    assert credentials.may_write(STRANGER)
    assert "every user of this machine may write (--allow-any-user)" in caplog.text


@linux
def test_table_without_the_listener_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is the table of another network namespace, for example, which has none of the connections."""
    (tmp_path / "tcp").write_text(TABLE)
    monkeypatch.setattr(peer_credentials, "_NETLINK_SOCK_DIAG", 31)
    monkeypatch.setattr(peer_credentials, "_TABLES", (str(tmp_path / "tcp"),))
    with socket.create_server(("127.0.0.1", 0)) as listener, pytest.raises(ListenError):
        PeerCredentials().open([listener])


def test_unix_client_of_unknown_user_may_only_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """With and without a TCP listener."""
    credentials = PeerCredentials()
    credentials.open([])
    with socket.socket(socket.AF_UNIX) as unconnected:
        assert not credentials.may_write(credentials.uid_of(unconnected))
    assert not credentials.may_write(None)
    assert not credentials.may_write(peer_credentials.ALL_USERS)


# User namespaces, simulated and real.

OVERFLOW = 65_534


@pytest.fixture
def in_namespace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Simulate a user namespace that maps 1000 users, with 65534 as the overflow uid."""
    (tmp_path / "uid_map").write_text("         0     100000       1000\n")
    (tmp_path / "overflowuid").write_text(f"{OVERFLOW}\n")
    monkeypatch.setattr(peer_credentials, "_UID_MAP", str(tmp_path / "uid_map"))
    monkeypatch.setattr(peer_credentials, "_OVERFLOW", str(tmp_path / "overflowuid"))
    return tmp_path


@pytest.mark.parametrize(
    ("uid_map", "overflow", "unmapped"),
    [
        ("0 0 4294967295\n", "65534", None),
        ("0 0 1000\n1000 1000 4294966295\n", "65534", None),
        ("0 1000 1\n", "65534", OVERFLOW),
        ("0 1000 1\n", "99", 99),
        ("0 1000 1\n", None, OVERFLOW),  # ProcSubset=pid hides it
        ("", "65534", OVERFLOW),  # no user is mapped yet
        ("what\n", "65534", OVERFLOW),
    ],
)
def test_overflow_uid(uid_map: str, overflow: str | None, unmapped: int | None, in_namespace: Path) -> None:
    (in_namespace / "uid_map").write_text(uid_map)
    if overflow is None:
        (in_namespace / "overflowuid").unlink()
    else:
        (in_namespace / "overflowuid").write_text(overflow)
    assert peer_credentials.unmapped_uid() == unmapped


def test_kernel_without_user_namespaces(in_namespace: Path) -> None:
    (in_namespace / "uid_map").unlink()
    assert peer_credentials.unmapped_uid() is None


@linux
def test_unmapped_user_is_unknown(in_namespace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    credentials = PeerCredentials()
    listener, ours, theirs = connection("127.0.0.1")
    with listener, ours, theirs:
        credentials.open([listener])
        monkeypatch.setattr(credentials, "_ask", lambda theirs, ours: OVERFLOW)
        assert credentials.uid_of(ours) is None
        monkeypatch.setattr(credentials, "_ask", lambda theirs, ours: 999)
        assert credentials.uid_of(ours) == 999
    credentials.close()


def test_unmapped_daemon_has_no_user(
    in_namespace: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Otherwise every other unmapped user would count as the daemon's user."""
    monkeypatch.setattr(os, "geteuid", lambda: OVERFLOW)
    credentials = PeerCredentials((OVERFLOW,))
    credentials.open([])
    assert not credentials.may_write(OVERFLOW)
    assert "is not mapped in this user namespace" in caplog.text


def unshared(*how: str) -> list[str]:
    """Return the command line prefix that runs a command in a user namespace."""
    command = ["unshare", *how, "--"]
    if shutil.which("unshare") is None or subprocess.run([*command, "true"], capture_output=True).returncode:
        pytest.skip("no user namespaces for this user")
    return command


@linux
@needs_root
@pytest.mark.parametrize("via", ["tcp", "unix"])
def test_unmapped_user_of_a_real_namespace_may_only_read(via: str, tmp_path: Path) -> None:
    path = tmp_path / "s"
    with DaemonProcess(
        tmp_path / "registry.json", "--unix", str(path), before=unshared("--map-root-user")
    ) as daemon:
        daemon.start()
        os.chmod(path, 0o666)
        for folder in (tmp_path, *tmp_path.parents[:-1]):
            if "pytest" in str(folder):
                folder.chmod(0o755)
        where: int | str = daemon.port if via == "tcp" else str(path)
        denied, read = ask_as(STRANGER, where, WRITES[0], {"cmd": "list"})
        assert (denied["error"], read["ok"]) == ("denied", True)
        assert "--allow-uid" not in str(denied["message"])
        assert str(OVERFLOW) not in str(denied["message"])
        [own] = ask_as(0, where, {"cmd": "register", "name": "own", "port": 1})
        assert own["ok"]
        _, log = daemon.end()
    assert "(unknown user): register evil" in log


@linux
def test_allow_uid_refuses_the_overflow_uid(tmp_path: Path) -> None:
    daemon = DaemonProcess(
        tmp_path / "r.json", "--allow-uid", str(OVERFLOW), before=unshared("--user", "--map-root-user")
    )
    done = subprocess.run(
        daemon.command("--port", "0"), env=environment(), capture_output=True, text=True, timeout=20
    )
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert f"--allow-uid {OVERFLOW}" in done.stderr
    assert "/proc/self/uid_map" in done.stderr
    assert not (tmp_path / "r.json").exists()


WRITES: list[dict[str, Any]] = [
    {"cmd": "register", "name": "evil", "port": 1},
    {"cmd": "register", "name": "db", "port": 1, "force": True},
    {"cmd": "deregister", "name": "db"},
    {"cmd": "update", "name": "db", "meta": {}},
    {"cmd": "renew", "name": "db"},
]
BARE_WRITES = ["register evil 666", "REGISTER db 666", "deregister db"]
READS = ["ping", "hello", "help", "list", "stats"]


@pytest.mark.socket
@pytest.mark.parametrize("uid", [STRANGER, None])
async def test_other_user_may_only_read(
    uid: int | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "regd")
    credentials = FakeCredentials()
    credentials.uid = 0
    async with InLoop(tmp_path / "registry.json", peers=credentials) as daemon:
        assert (await (await daemon.peer()).ask(cmd="register", name="db", port=5432, ttl=10))["ok"]
        before = daemon.registry.read_bytes()
        credentials.uid = uid
        stranger = await daemon.peer()
        for request in WRITES:
            reply = await stranger.ask(request)
            assert (reply["ok"], reply["error"]) == (False, "denied"), request
        for line in BARE_WRITES:
            assert (await stranger.ask(line))["error"] == "denied", line
        assert daemon.registry.read_bytes() == before
        for cmd in READS:
            assert (await stranger.ask(cmd=cmd))["ok"]
        assert (await stranger.ask(cmd="resolve", name="db"))["port"] == 5432
        assert (await stranger.ask(cmd="watch"))["ok"]
        told_of = [message for message in caplog.messages if message.startswith("denied")]
        assert len(told_of) == 1, "repeated denials must not flood the log"
        daemon.clock.advance(1)
        [first, rest] = [message for message in caplog.messages if message.startswith("denied")]
        assert ": register evil at 127.0.0.1:1: " in first
        assert ": deregister db: " in rest
        assert rest.endswith(f"({len(WRITES) + len(BARE_WRITES) - 2} more left out)")


@pytest.mark.socket
@pytest.mark.parametrize(("allowed", "code"), [((), "denied"), ((STRANGER,), None)])
async def test_allow_uid(allowed: tuple[int, ...], code: str | None, tmp_path: Path) -> None:
    async with InLoop(tmp_path / "registry.json", peers=FakeCredentials(allowed)) as daemon:
        reply = await (await daemon.peer()).ask(cmd="register", name="db", port=1)
        assert reply.get("error") == code


@linux
@pytest.mark.socket
async def test_pid_must_belong_to_the_clients_user(tmp_path: Path) -> None:
    async with InLoop(tmp_path / "registry.json", peers=FakeCredentials((STRANGER,))) as daemon:
        peer = await daemon.peer()
        reply = await peer.ask(cmd="register", name="mine", port=1, pid=os.getpid())
        assert (reply["error"], reply["field"]) == ("denied", "pid")
        assert (await peer.ask(cmd="register", name="mine", port=1, pid=2**31 - 1))["error"] == "bad_argument"
        assert (await peer.ask(cmd="list"))["instances"] == []


# Real users.

AS_ANOTHER = """
import json, os, socket, sys
"".encode("idna")  # loaded now: another user may not be able to read this Python
os.setgroups([]); os.setgid({uid}); os.setuid({uid})
where = {where!r}
peer = socket.socket(socket.AF_UNIX if isinstance(where, str) else socket.AF_INET)
peer.connect(where if isinstance(where, str) else ("127.0.0.1", where))
with peer:
    for request in json.loads(sys.argv[1]):
        if request.get("pid") == "own":
            request["pid"] = os.getpid()
        peer.sendall(json.dumps(request).encode() + b"\\n")
    peer.shutdown(socket.SHUT_WR)
    print(peer.makefile().read(), end="")
"""


def ask_as(uid: int, where: int | str, *requests: dict[str, Any]) -> list[dict[str, Any]]:
    script = AS_ANOTHER.format(uid=uid, where=where)
    done = subprocess.run(
        [sys.executable, "-c", script, json.dumps(requests)],
        env=environment(),
        stdout=subprocess.PIPE,
        timeout=20,
        check=True,
    )
    return [json.loads(line) for line in done.stdout.splitlines()]


@linux
@needs_root
def test_real_other_user_may_only_read(process: DaemonProcess) -> None:
    replies = ask_as(STRANGER, process.port, *WRITES[:1], {"cmd": "list"})
    assert [reply.get("error") for reply in replies] == ["denied", None]
    assert f"user {STRANGER}" in str(replies[0]["message"])
    assert replies[1]["instances"] == []
    assert process.port
    _, errors = process.end()
    assert f"(user {STRANGER}): register evil" in errors


@linux
@needs_root
def test_allowed_real_user_may_register_only_its_own_processes(tmp_path: Path) -> None:
    with DaemonProcess(tmp_path / "registry.json", "--allow-uid", str(STRANGER)) as daemon:
        daemon.start()
        others = {"cmd": "register", "name": "a", "port": 1, "pid": os.getpid()}
        own = {"cmd": "register", "name": "b", "port": 1, "pid": "own"}
        replies = ask_as(STRANGER, daemon.port, others, own)
        assert [reply.get("error") for reply in replies] == ["denied", None]


@linux
@needs_root
def test_client_that_closed_before_the_check_may_not_write(process: DaemonProcess) -> None:
    """The kernel reports root for a closed socket. A client that closes quickly must not be allowed to write."""
    assert process.process is not None
    os.kill(process.process.pid, 19)  # stopped, so that the daemon accepts only after the client has closed
    try:
        with socket.create_connection(("127.0.0.1", process.port)) as peer:
            peer.sendall(b'{"cmd":"register","name":"evil","port":1}\n')
    finally:
        os.kill(process.process.pid, 18)
    assert ask_as(0, process.port, {"cmd": "list"})[0]["instances"] == []


@pytest.mark.parametrize("value", ["www-data", "-1", "1.5", "4294967295", "4294967296"])
def test_allow_uid_takes_a_number(value: str, tmp_path: Path) -> None:
    daemon = DaemonProcess(tmp_path / "registry.json", f"--allow-uid={value}")
    done = subprocess.run(daemon.command(), env=environment(), capture_output=True, text=True, timeout=20)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "id -u" in done.stderr
