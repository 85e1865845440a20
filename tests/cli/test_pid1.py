"""regctl as process 1 of a container: signals end it, it passes signals on, and reaps orphans."""

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from regd_client.blocking import BlockingConnection
from tests.cli.test_run import LISTENER, REGCTL, Running, peer
from tests.support.daemon import ROOT, WAIT_S, DaemonProcess, environment
from tests.support.polling import block_until

__all__ = ["peer"]  # a fixture

CONTAINER = ["unshare", "--user", "--map-root-user", "--pid", "--fork", "--mount-proc", "--kill-child"]


def has_containers() -> bool:
    try:
        return (
            subprocess.run([*CONTAINER, "true"], capture_output=True, check=False, timeout=WAIT_S).returncode == 0
        )
    except OSError:
        return False


pytestmark = pytest.mark.skipif(not has_containers(), reason="this user may make no process namespace")


@contextlib.contextmanager
def process_1(daemon: DaemonProcess, *arguments: str) -> Iterator[tuple[Running, int]]:
    """Run regctl as process 1 of a namespace; yield it with its process id outside."""
    with subprocess.Popen(
        [*CONTAINER, *REGCTL, *arguments], cwd=ROOT, env=environment(REGD_ADDRESS=daemon.addresses[0]), text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
    ) as made:  # fmt: skip
        children = Path(f"/proc/{made.pid}/task/{made.pid}/children")
        try:
            block_until(lambda: children.read_text() != "")
            yield Running(made), int(children.read_text())
        finally:
            made.kill()


@pytest.mark.parametrize(
    "arguments",
    [("wait", "nobody"), ("run", "web", "--wait", "nobody", "--", "true")],
    ids=["wait", "run --wait"],
)
def test_signal_ends_commands_that_wait(
    process: DaemonProcess, peer: BlockingConnection, arguments: tuple[str, ...]
) -> None:
    with process_1(process, *arguments) as (command, number):
        block_until(lambda: peer.ask("stats")["waiting"] == 1)
        os.kill(number, signal.SIGTERM)
        assert command.process.wait(WAIT_S) == 128 + signal.SIGTERM


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129), (signal.SIGINT, 130)]
)
def test_signal_ends_watch(process: DaemonProcess, peer: BlockingConnection, number: int, status: int) -> None:
    peer.ask("register", name="db", port=1)
    with process_1(process, "watch") as (command, pid):
        assert command.line().startswith("up\tdb")
        os.kill(pid, number)
        assert command.process.wait(WAIT_S) == status
        assert "Traceback" not in command.process.stderr.read()  # type: ignore[union-attr]


def test_signals_and_exit_status_are_passed_on(process: DaemonProcess) -> None:
    with process_1(process, "run", "web", "--", sys.executable, "-c", LISTENER) as (command, number):
        assert command.line() == "waits"
        for signum in (signal.SIGWINCH, signal.SIGTTIN, signal.SIGTSTP, signal.SIGUSR1, signal.SIGTERM):
            os.kill(number, signum)
            assert command.line() == str(int(signum))
        command.type("")
        assert command.process.wait(WAIT_S) == 0


@pytest.mark.parametrize(("script", "status"), [("exit 7", 7), ("kill -9 $$", 137)])
def test_exit_status_of_the_command(process: DaemonProcess, script: str, status: int) -> None:
    with process_1(process, "run", "web", "--", "sh", "-c", script) as (command, _):
        assert command.process.wait(WAIT_S) == status


# A process that ends once its parent has ended: an orphan, which process 1 adopts.
ORPHAN = """
import os
reading, writing = os.pipe()
parent = os.fork()
if parent == 0:
    orphan = os.fork()
    if orphan == 0:
        os.close(writing)
        os.read(reading, 1)  # until all others have closed it
        os._exit(0)
    print(orphan, flush=True)
    os._exit(0)
os.waitpid(parent, 0)
os.close(writing)
input()
"""


def test_orphans_are_reaped(process: DaemonProcess) -> None:
    with process_1(process, "run", "web", "--", sys.executable, "-c", ORPHAN) as (command, number):
        orphan = Path(f"/proc/{number}/root/proc", command.line())
        block_until(lambda: not orphan.exists())
        command.end()
