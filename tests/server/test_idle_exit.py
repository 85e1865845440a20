"""An idle daemon exits by itself: when, when not, and what a client sees that connects in that moment."""

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
ENDED_S = IDLE_S * 9 / 8  # at the latest


class Watched:
    """An `IdleExit` with a clock and a mark that the test sets."""

    def __init__(self) -> None:
        self.clock = HandClock()
        self.mark: Hashable | None = 0
        self.over = 0
        self.idle = IdleExit(self.clock, IDLE_S, lambda: self.mark, self._end)
        self.idle.start()

    def _end(self) -> None:
        self.over += 1


def test_exit_is_called_once_after_the_time_and_not_before() -> None:
    watched = Watched()
    watched.clock.advance(IDLE_S - 1)
    assert watched.over == 0
    watched.clock.advance(ENDED_S - IDLE_S + 1)
    assert watched.over == 1
    watched.clock.advance(10 * IDLE_S)
    assert watched.over == 1


@pytest.mark.parametrize("between", [None, 1], ids=["in use", "in use between two checks"])
def test_use_starts_the_time_again(between: Hashable | None) -> None:
    watched = Watched()
    watched.clock.advance(IDLE_S - 1)
    watched.mark = between
    watched.clock.advance(IDLE_S / 8)
    watched.mark = watched.mark if between else 2
    watched.clock.advance(IDLE_S - IDLE_S / 8)
    assert watched.over == 0
    watched.clock.advance(IDLE_S / 4)
    assert watched.over == 1


def test_time_in_which_the_process_did_not_run_is_one_check() -> None:
    """As after a machine wakes up: until then no client could reach the daemon."""
    watched = Watched()
    watched.clock.stop(1_000 * IDLE_S)
    assert watched.over == 0
    watched.clock.advance(ENDED_S)
    assert watched.over == 1


def test_no_exit_after_close() -> None:
    watched = Watched()
    watched.idle.close()
    watched.clock.advance(2 * ENDED_S)
    assert watched.over == 0


@pytest.fixture
async def idling(tmp_path: Path) -> AsyncIterator[InLoop]:
    async with InLoop(tmp_path / "registry.json", idle_exit_s=IDLE_S, unix=tmp_path / "s") as running:
        yield running


async def ends(daemon: InLoop, within_s: float) -> bool:
    """Let time pass, and return whether the daemon wants to exit."""
    idled = asyncio.ensure_future(daemon.server.idled())
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
async def test_registrations_and_connections_keep_the_daemon(idling: InLoop) -> None:
    peer = await idling.peer()
    await peer.ask(cmd="register", name="db", port=1)
    assert not await ends(idling, 3 * ENDED_S)
    await peer.close()
    await alone(idling)
    assert not await ends(idling, 3 * ENDED_S)  # static: nobody holds it, and it stays
    peer = await idling.peer()
    await peer.ask(cmd="deregister", name="db")
    assert not await ends(idling, 3 * ENDED_S)  # connected
    await peer.ask(cmd="watch", name="*")
    assert not await ends(idling, 3 * ENDED_S)
    await peer.reset()
    await alone(idling)
    assert not await ends(idling, IDLE_S * 0.75)
    assert await ends(idling, ENDED_S * 0.5)


@pytest.mark.socket
async def test_a_client_that_came_and_went_starts_the_time_again(idling: InLoop) -> None:
    assert not await ends(idling, IDLE_S * 0.9)
    peer = await idling.peer()
    await peer.ask("ping")
    await peer.close()
    await alone(idling)
    assert not await ends(idling, IDLE_S * 0.9)
    assert await ends(idling, ENDED_S)


@pytest.mark.socket
@pytest.mark.parametrize("family", ["tcp", "unix"])
async def test_a_half_closed_watcher_keeps_the_daemon_until_it_closes(
    idling: InLoop, family: str, tmp_path: Path
) -> None:
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
    assert b"progress" in await peer.line() + await peer.line()  # the first is `sync`
    await peer.close()
    async with asyncio.timeout(WAIT_S):
        while idling.server.connections:  # `progress`, in vain: over TCP the first is what tells the system
            idling.clock.advance(DEFAULT.progress_s)
            await asyncio.sleep(0)
    assert not await ends(idling, IDLE_S / 2)
    assert await ends(idling, ENDED_S)


@pytest.mark.socket
async def test_the_exit_logs_one_line_and_accepts_no_connection(
    idling: InLoop, caplog: pytest.LogCaptureFixture
) -> None:
    """Who connects then is not half served: the connection breaks without a word, whatever was asked."""
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


async def test_without_the_option_the_daemon_stays(daemon: InLoop) -> None:
    assert not await ends(daemon, 100_000.0)
