"""Which user listens on a port, and whether that is the command of `regctl run`."""

import contextlib
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest

from regd.cli import port_owner
from regd.cli.port_owner import Listener, is_of, listener
from regd_client.blocking import BlockingConnection
from tests.cli.test_run import running
from tests.support.daemon import DaemonProcess
from tests.support.peers import STRANGER
from tests.support.polling import block_until
from tests.support.ports import free_port

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="asks Linux's kernel")
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
WAYS = [port_owner._by_netlink, port_owner._by_table]


@contextlib.contextmanager
def sleeping() -> Iterator[int]:
    """Run a process that sleeps, and yield its process id."""
    with subprocess.Popen(["sleep", "60"]) as process:
        try:
            yield process.pid
        finally:
            process.kill()


def listens(host: str, port: int = 0, uid: int | None = None) -> socket.socket:
    """Listen, as another user if `uid` is given: a socket belongs to the effective user of its creator."""
    if uid is not None:
        os.seteuid(uid)
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    finally:
        if uid is not None:
            os.seteuid(0)


@pytest.mark.parametrize("ask", WAYS)
@pytest.mark.parametrize(
    ("bound", "host"), [("127.0.0.1", "127.0.0.1"), ("0.0.0.0", "127.0.0.1"), ("::1", "::1"), ("::", "::1")]
)
def test_listener_and_its_user(ask: Callable[[str, int], Listener | None], bound: str, host: str) -> None:
    with listens(bound) as there:
        port = there.getsockname()[1]
        expected = Listener(os.geteuid(), os.fstat(there.fileno()).st_ino)
        assert ask(host, port) == expected
        with socket.create_connection((host, port)):  # a connection on that port is not a listener
            assert ask(host, port) == expected
    assert ask(host, port) is None


@pytest.mark.parametrize("ask", WAYS)
def test_dual_stack_socket(ask: Callable[[str, int], Listener | None]) -> None:
    with socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True) as there:
        found = ask("127.0.0.1", there.getsockname()[1])
        assert found is not None
        assert found.inode == os.fstat(there.fileno()).st_ino


def test_bound_socket_is_not_a_listener() -> None:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        assert listener("127.0.0.1", bound.getsockname()[1]) is None


def test_table_is_read_without_netlink(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(host: str, port: int) -> None:
        raise OSError("Address family not supported by protocol")

    monkeypatch.setattr(port_owner, "_by_netlink", refused)
    with listens("127.0.0.1") as there:
        found = listener("127.0.0.1", there.getsockname()[1])
        assert found is not None
        assert found.uid == os.geteuid()


def test_sockets_of_this_user_and_of_root_are_accepted() -> None:
    with sleeping() as command:
        assert is_of(command, Listener(os.geteuid(), 1))
        assert is_of(command, Listener(0, 1))
        assert not is_of(command, Listener(STRANGER, 1))


def test_socket_open_in_the_command_is_accepted() -> None:
    with listens("127.0.0.1") as there, sleeping() as other:
        inode = os.fstat(there.fileno()).st_ino
        assert is_of(os.getpid(), Listener(STRANGER, inode))
        assert not is_of(other, Listener(STRANGER, inode))


def test_overflow_user_is_not_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 65_534)
    with sleeping() as command:
        for all_mapped in (True, False):
            monkeypatch.setattr(port_owner, "_all_users_are_mapped", lambda mapped=all_mapped: mapped)
            assert is_of(command, Listener(65_534, 1)) == all_mapped


@needs_root
def test_user_of_the_command_is_accepted() -> None:
    """As with `sudo -u`: the command runs as this user, and its child as another user."""
    code = f"import subprocess; subprocess.run(['sleep', '60'], user={STRANGER})"
    with subprocess.Popen([sys.executable, "-c", code], start_new_session=True) as command:
        try:
            block_until(lambda: is_of(command.pid, Listener(STRANGER, 1)))
            assert not is_of(command.pid, Listener(STRANGER + 1, 1))
        finally:
            os.killpg(command.pid, 9)


COMMAND = """
import os, socket, sys
port = int(os.environ["PORT"])
print(port, flush=True)
sys.stdin.readline()
there = socket.create_server(("127.0.0.1", port))
print("listens", flush=True)
sys.stdin.readline()
"""


@pytest.mark.long
@needs_root
@pytest.mark.parametrize("port", ["auto", "given"])
def test_port_of_another_user_is_not_registered(process: DaemonProcess, port: str) -> None:
    if port == "given":
        port = str(free_port())
    with (
        running(process, "web", "--port", port, "--", sys.executable, "-c", COMMAND) as command,
        BlockingConnection(process.addresses[0]) as peer,
    ):
        taken = int(command.line())
        with listens("127.0.0.1", taken, STRANGER):
            assert command.told() == (
                f"regctl: web is not registered: user {STRANGER} listens at 127.0.0.1:{taken}, not the command; "
                "stop that program, or use --socket"
            )
            assert peer.ask("list")["instances"] == []
        command.type("")
        assert command.line() == "listens"
        assert command.told() == f"regctl: web is registered at 127.0.0.1:{taken}"
        command.type("")
        assert command.process.wait(15) == 0


@needs_root
def test_command_that_changes_its_user_is_registered(process: DaemonProcess) -> None:
    imports = "import os, socket, sys"  # import first: another user may not be able to read this Python
    code = COMMAND.replace(imports, f'{imports}; "".encode("idna"); os.setuid({STRANGER})')
    with running(process, "web", "--", sys.executable, "-c", code) as command:
        port = int(command.line())
        command.type("")
        assert command.line() == "listens"
        assert command.told() == f"regctl: web is registered at 127.0.0.1:{port}"
        command.type("")
        assert command.process.wait(15) == 0
