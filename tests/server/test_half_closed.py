"""A half-closed connection stays open while the client's process lives, and is closed soon after its end."""

import asyncio
import json
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from regd.server.half_closed import CHECK_S, HalfClosed
from regd.system import peer_credentials
from tests.support.clock import HandClock
from tests.support.daemon import InLoop, environment
from tests.support.polling import until

pytestmark = [pytest.mark.socket, pytest.mark.skipif(sys.platform != "linux", reason="asks Linux's kernel")]

WAIT = b'{"cmd":"resolve","name":"no","wait":3600}\n'
WATCH = b'{"cmd":"watch","name":"no"}\n'
PEER = """
import socket, sys
family, address, line, half = sys.argv[1:]
peer = socket.socket(socket.AF_UNIX if family == "unix" else socket.AF_INET)
peer.connect(address if family == "unix" else ("127.0.0.1", int(address)))
peer.sendall(line.encode())
if half == "half":
    peer.shutdown(socket.SHUT_WR)
print("sent", flush=True)
print(peer.makefile().read(), end="", flush=True)
"""


@pytest.fixture
async def daemon(tmp_path: Path) -> AsyncIterator[InLoop]:
    async with InLoop(tmp_path / "registry.json", unix=tmp_path / "s") as running:
        yield running


def begin(daemon: InLoop, family: str, line: bytes, half: bool) -> "subprocess.Popen[str]":
    address = str(daemon.config.unix) if family == "unix" else str(daemon.port)
    process = subprocess.Popen(
        [sys.executable, "-c", PEER, family, address, line.decode(), "half" if half else ""],
        env=environment(), stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    return process


def under_way(daemon: InLoop) -> int:
    assert daemon.server._connections is not None
    return daemon.server.waiting + len(daemon.server._connections.writers.watches)


@pytest.mark.parametrize("line", [WAIT, WATCH], ids=["wait", "watch"])
@pytest.mark.parametrize("half", [False, True], ids=["open", "half closed"])
@pytest.mark.parametrize("family", ["tcp", "unix"])
async def test_process_killed_during_a_wait_is_noticed(
    daemon: InLoop, family: str, half: bool, line: bytes
) -> None:
    processes = [begin(daemon, family, line, half) for _ in range(3)]
    try:
        await until(lambda: under_way(daemon) == 3)
        if half:  # the client is still connected
            await until(
                lambda: all(connection._conversation.input_ended for connection in daemon.server.connections)
            )
        daemon.clock.advance(2 * CHECK_S)
        assert under_way(daemon) == 3
        for process in processes[:2]:
            process.send_signal(signal.SIGKILL)
            process.wait()
        living = daemon.server.connections
        await until(
            lambda: len(living) - sum(connection._conversation.input_ended for connection in living) <= 1 - half
        )
        daemon.clock.advance(2 * CHECK_S)
        await until(lambda: len(daemon.server.connections) == 1)
        assert under_way(daemon) == 1
    finally:
        for process in processes:
            process.kill()
            process.communicate()


@pytest.mark.parametrize("table", [False, True])
async def test_half_closed_client_gets_its_reply(
    daemon: InLoop, table: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if table:
        daemon.server._peers.close()
        daemon.server._peers._ask = peer_credentials.by_table
    peer = await daemon.peer()
    peer.send(WAIT)
    peer.writer.write_eof()
    await until(lambda: daemon.server.waiting)
    await until(lambda: all(connection._conversation.input_ended for connection in daemon.server.connections))
    for _ in range(20):
        daemon.clock.advance(CHECK_S)
        await asyncio.sleep(0)
    assert daemon.server.waiting == 1
    other = await daemon.peer()
    assert (await other.ask(cmd="register", name="no", port=1, host="db.example"))["ok"]
    assert json.loads(await peer.rest())["host"] == "db.example"
    await until(lambda: len(daemon.server.connections) == 1)


@pytest.mark.parametrize("table", [False, True])
async def test_killed_client_that_is_not_read_is_noticed(daemon: InLoop, table: bool) -> None:
    """regd reads little after a wait without an id, and so does not see the EOF."""
    if table:
        daemon.server._peers.close()
        daemon.server._peers._ask = peer_credentials.by_table
    plain = socket.create_connection(("127.0.0.1", daemon.port))
    plain.sendall(WAIT + b'{"cmd":"ping"}\n' * 20_000)
    await until(lambda: any(not connection._reading for connection in daemon.server.connections))
    plain.shutdown(socket.SHUT_WR)
    daemon.clock.advance(2 * CHECK_S)
    await asyncio.sleep(0)
    assert daemon.server.waiting == 1
    plain.close()
    daemon.clock.advance(2 * CHECK_S)
    await until(lambda: not daemon.server.connections)


async def test_wait_continues_if_the_kernel_cannot_be_asked(daemon: InLoop) -> None:
    daemon.server._peers.close()
    peer = await daemon.peer()
    peer.send(WAIT)
    await until(lambda: daemon.server.waiting)
    await peer.close()
    await until(lambda: all(connection._conversation.input_ended for connection in daemon.server.connections))
    daemon.clock.advance(10 * CHECK_S)
    await asyncio.sleep(0)
    assert daemon.server.waiting == 1


class Waiter:
    def __init__(self) -> None:
        self.checks = 0
        self.gone = self.is_cut = False
        self.is_waiting = True

    def is_gone(self) -> bool:
        self.checks += 1
        return self.gone

    def cut(self) -> None:
        self.is_cut = True


def test_connections_are_checked_in_slices_every_few_seconds() -> None:
    clock = HandClock()
    half_closed, waiters = HalfClosed(clock), [Waiter() for _ in range(5_000)]
    for waiter in waiters:
        half_closed.add(waiter)
        half_closed.add(waiter)
    steps = []
    for _ in range(round(2 * CHECK_S / 0.02)):
        before = sum(waiter.checks for waiter in waiters)
        clock.advance(0.02)
        steps.append(sum(waiter.checks for waiter in waiters) - before)
    assert max(steps) <= 128
    assert all(waiter.checks for waiter in waiters)
    for waiter in waiters[1:]:
        waiter.is_waiting = False
    waiters[0].gone = True
    clock.advance(10 * CHECK_S)
    assert [waiter.is_cut for waiter in waiters[:2]] == [True, False]
    assert not any(timer.call for _, _, timer in clock._timers), "no connection waits, but a timer is left"


def test_discarded_connection_is_not_checked() -> None:
    clock = HandClock()
    half_closed, waiter = HalfClosed(clock), Waiter()
    half_closed.add(waiter)
    half_closed.discard(waiter)
    half_closed.discard(waiter)
    clock.advance(10 * CHECK_S)
    assert waiter.checks == 0
