"""`--idle-exit`: when an idle daemon exits, and what happens to a client that connects at that moment."""

import asyncio
import logging
from collections.abc import AsyncIterator, Hashable
from pathlib import Path

import pytest

from regd.core.limits import DEFAULT
from regd.server.idle_exit import IdleExit
from tests.support.clock import HandClock
from tests.support.daemon import WAIT_S, InLoop, Peer
from tests.support.polling import until

IDLE_S = 80.0
ENDED_S = IDLE_S * 1.02  # the latest time


class Timer:
    """An `IdleExit` with a clock and an idle state that the test sets."""

    def __init__(self) -> None:
        self.clock = HandClock()
        self.mark: Hashable | None = 0
        self.over = 0
        self.idle = IdleExit(self.clock, IDLE_S, lambda: self.mark, self._end)
        self.idle.start()

    def _end(self) -> None:
        self.over += 1


def test_exit_is_called_once_after_the_idle_time() -> None:
    watched = Timer()
    watched.clock.advance(IDLE_S - 1)
    assert watched.over == 0
    watched.clock.advance(ENDED_S - IDLE_S + 1)
    assert watched.over == 1
    watched.clock.advance(10 * IDLE_S)
    assert watched.over == 1


@pytest.mark.parametrize("between", [None, 1], ids=["in use", "in use between two checks"])
def test_use_restarts_the_idle_time(between: Hashable | None) -> None:
    watched = Timer()
    watched.clock.advance(IDLE_S - 1)
    watched.mark = between
    watched.clock.advance(IDLE_S / 8)
    watched.mark = watched.mark if between else 2
    watched.clock.advance(IDLE_S * 3 / 4)
    assert watched.over == 0
    watched.clock.advance(IDLE_S / 4 + 2)
    assert watched.over == 1


def test_suspended_time_counts_as_one_check() -> None:
    """While a machine is suspended, no client can reach the daemon."""
    watched = Timer()
    watched.clock.stop(1_000 * IDLE_S)
    assert watched.over == 0
    watched.clock.advance(ENDED_S)
    assert watched.over == 1


def test_no_exit_after_close() -> None:
    watched = Timer()
    watched.idle.close()
    watched.clock.advance(2 * ENDED_S)
    assert watched.over == 0


@pytest.fixture
async def idling(tmp_path: Path) -> AsyncIterator[InLoop]:
    async with InLoop(tmp_path / "registry.json", idle_exit_s=IDLE_S, unix=tmp_path / "s") as running:
        yield running


async def ends(daemon: InLoop, within_s: float) -> bool:
    """Advance time, and return whether the daemon has decided to exit."""
    idled = asyncio.ensure_future(daemon.server.ended())
    daemon.clock.advance(within_s)
    for _ in range(3):
        await asyncio.sleep(0)
    done = idled.done()
    idled.cancel()
    await asyncio.gather(idled, return_exceptions=True)
    return done


async def alone(daemon: InLoop) -> None:
    await until(lambda: not daemon.server.connections)


@pytest.mark.socket
async def test_registrations_and_connections_keep_the_daemon_running(idling: InLoop) -> None:
    peer = await idling.peer()
    await peer.ask(cmd="register", name="db", port=1)
    assert not await ends(idling, 3 * ENDED_S)
    await peer.close()
    await alone(idling)
    assert not await ends(idling, 3 * ENDED_S)  # a static registration
    peer = await idling.peer()
    await peer.ask(cmd="deregister", name="db")
    assert not await ends(idling, 3 * ENDED_S)  # a client is connected
    await peer.ask(cmd="watch", name="*")
    assert not await ends(idling, 3 * ENDED_S)
    await peer.reset()
    await alone(idling)
    assert not await ends(idling, IDLE_S * 0.75)
    assert await ends(idling, ENDED_S * 0.5)


@pytest.mark.socket
async def test_short_connection_restarts_the_idle_time(idling: InLoop) -> None:
    assert not await ends(idling, IDLE_S * 0.9)
    peer = await idling.peer()
    await peer.ask("ping")
    await peer.close()
    await alone(idling)
    assert not await ends(idling, IDLE_S * 0.9)
    assert await ends(idling, ENDED_S)


@pytest.mark.socket
@pytest.mark.parametrize("family", ["tcp", "unix"])
async def test_half_closed_watcher_keeps_the_daemon_running(idling: InLoop, family: str, tmp_path: Path) -> None:
    if family == "unix":
        peer = Peer(*await asyncio.open_unix_connection(tmp_path / "s"))
        idling.peers.append(peer)
    else:
        peer = await idling.peer()
    await peer.ask(cmd="watch", name="*")
    peer.writer.write_eof()
    [connection] = idling.server.connections
    await until(lambda: connection._conversation.input_ended)
    assert not await ends(idling, 3 * ENDED_S)
    assert b"progress" in await peer.line() + await peer.line()  # `sync`
    await peer.close()
    async with asyncio.timeout(WAIT_S):
        while (
            idling.server.connections
        ):  # `progress`: over TCP the first write to a closed peer only causes its RST
            idling.clock.advance(DEFAULT.progress_s)
            await asyncio.sleep(0)
    assert not await ends(idling, IDLE_S / 2)
    assert await ends(idling, ENDED_S)


@pytest.mark.socket
async def test_idle_exit_logs_one_line_and_accepts_no_connection(
    idling: InLoop, caplog: pytest.LogCaptureFixture
) -> None:
    """A client that connects at that moment gets no reply; its connection breaks."""
    with caplog.at_level(logging.INFO):
        assert await ends(idling, ENDED_S)
        late = await idling.peer()
        late.send({"cmd": "register", "name": "db", "port": 1})
        await idling.server.stop()
        with pytest.raises(ConnectionError):
            await late.rest()
    assert [record.message for record in caplog.records if "leaving" in record.message] == [
        "nothing was registered and nobody connected for 80 s: leaving"
    ]
    assert b'"db"' not in idling.registry.read_bytes()


async def test_daemon_without_the_option_does_not_exit(daemon: InLoop) -> None:
    assert not await ends(daemon, 100_000.0)
