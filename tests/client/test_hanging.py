"""A hanging or absent daemon is detected within the documented time."""

import asyncio
import contextlib
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

import regd_client
from regd_client import client as client_module
from regd_client import connection as connection_module
from regd_client import registrar
from regd_client.client import Client
from tests.client.relay import Relay
from tests.support.daemon import WAIT_S, DaemonProcess
from tests.support.polling import until

pytestmark = pytest.mark.socket

assert registrar._SILENT_S + connection_module.HANGS_S + connection_module._RECHECK_S <= 15  # as documented
QUIET_S, HANGS_S, AGAIN_S = 0.4, 0.6, 0.05
LATE_S = 5.0  # how late a busy machine may be; less than the time limits that must not count here


@pytest.fixture(autouse=True)
def hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shorten the client's timeouts to about a thirtieth."""
    monkeypatch.setattr(registrar, "_SILENT_S", QUIET_S)
    monkeypatch.setattr(connection_module, "HANGS_S", HANGS_S)
    monkeypatch.setattr(connection_module, "_RECHECK_S", AGAIN_S)
    monkeypatch.setattr(connection_module, "_CLOSE_S", 0.1)


async def test_call_to_a_hanging_daemon_ends(relay: Relay) -> None:
    async with Client() as client:
        relay.flowing.clear()
        with pytest.raises(regd_client.Unavailable, match="no answer for"):
            await client.ping()


@pytest.mark.sample(2)
@pytest.mark.parametrize("data", [b" ", b'{"event":"progress","watch":1,"rev":1}\n'], ids=["a line", "events"])
async def test_call_ends_if_the_reply_arrives_slowly_without_an_end(data: bytes) -> None:
    async def drip(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while True:
                writer.write(data)
                await writer.drain()
                await asyncio.sleep(HANGS_S / 10)
        writer.transport.abort()
        over.set()

    over = asyncio.Event()
    async with await asyncio.start_server(drip, "127.0.0.1", 0) as server:
        async with asyncio.timeout(WAIT_S), Client(f"127.0.0.1:{server.sockets[0].getsockname()[1]}") as client:
            with pytest.raises(regd_client.Unavailable, match="no answer for"):
                await client.ping()
        async with asyncio.timeout(WAIT_S):
            await over.wait()


async def test_wait_at_a_hanging_daemon_ends(relay: Relay, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_module, "_REPLY_S", 0.1)
    async with Client() as client:
        relay.flowing.clear()
        began = time.monotonic()
        with pytest.raises(regd_client.Unavailable, match="did not answer while waiting"):
            await client.resolve("nobody", wait=0.2)
        assert 0.2 <= time.monotonic() - began < 0.2 + 0.1 + LATE_S


@pytest.mark.parametrize("timeout_s", [0.05, WAIT_S])
async def test_wait_without_a_daemon_lasts_as_long_as_requested(tmp_path: Path, timeout_s: float) -> None:
    """The time of one attempt to connect may be shorter or longer than the wait."""
    client = Client(f"unix://{tmp_path}/none", connect_timeout_s=timeout_s)
    began = time.monotonic()
    with pytest.raises(regd_client.Unavailable, match="No such file"):
        await client.resolve("nobody", wait=0.6)
    assert 0.6 <= time.monotonic() - began < 0.6 + client_module._CONNECT_S_MIN + LATE_S
    await client.close()


async def test_longest_wait_is_not_exceeded(relay: Relay, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sum of floats may exceed 3,600 s, the daemon's maximum."""
    now = 2057.667004242337
    assert (now + 3_600) - now > 3_600
    monkeypatch.setattr(client_module, "time", SimpleNamespace(monotonic=lambda: now))
    async with Client() as client:
        waiting = asyncio.create_task(client.resolve("nobody", wait=3_600))
        await until(lambda: relay.count("resolve"))
        assert relay.requests[-1]["wait"] <= 3_600
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)


@pytest.mark.long
async def test_blocked_loop_reads_replies_before_timeouts(process: DaemonProcess) -> None:
    """Some event loops run timers before they read from sockets."""
    async with Client(process.addresses[0]) as client:
        connection = await client._connect()
        ping = asyncio.create_task(client.ping())
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        time.sleep(2 * HANGS_S)  # noqa: ASYNC251 - in this time, the reply arrives and the timer expires
        assert connection._watchdog is not None
        connection._watchdog.cancel()
        connection._check()
        await ping


async def test_close_does_not_wait_for_a_daemon_that_does_not_read() -> None:
    async def deaf(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        reading = writer.transport
        assert isinstance(reading, asyncio.ReadTransport)
        reading.pause_reading()
        await over.wait()
        writer.transport.abort()

    over = asyncio.Event()
    async with await asyncio.start_server(deaf, "127.0.0.1", 0) as server:
        client = Client(f"127.0.0.1:{server.sockets[0].getsockname()[1]}")
        connection = await client._connect()
        for _ in range(200):  # far more than the kernel buffers
            connection.post("update", {"name": "a", "meta": {"k": "v" * 60_000}})
        await asyncio.sleep(0)
        async with asyncio.timeout(WAIT_S):
            await client.close()
        over.set()


async def test_mirror_of_a_hanging_daemon_is_not_live(relay: Relay) -> None:
    async with Client() as client, client.mirror("*", stale_s_max=0.0) as mirror:
        last_word_at = time.monotonic()
        relay.flowing.clear()
        await until(lambda: not mirror.live)
        assert time.monotonic() - last_word_at < QUIET_S + HANGS_S + 2 * AGAIN_S + LATE_S
        assert mirror.stale_s > QUIET_S + HANGS_S - AGAIN_S  # counted from the last message of the daemon
