"""Requests to a daemon in the same event loop: bodies, broken connections, restarts and hangs."""

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from regd.gateways import daemon_connections
from regd.gateways.daemon_connections import DaemonClient
from regd_client.protocol import parse_address
from tests.support.daemon import WAIT_S, InLoop
from tests.support.polling import until
from tests.support.registries import Registry, running

pytestmark = pytest.mark.socket


@pytest.fixture
async def registry(tmp_path: Path) -> AsyncIterator[Registry]:
    async with running(tmp_path) as registry:
        yield registry


@pytest.fixture
async def daemon(registry: Registry) -> AsyncIterator[DaemonClient]:
    daemon = DaemonClient(parse_address(registry.address))
    yield daemon
    daemon.close()


async def test_body_is_the_reply(tmp_path: Path) -> None:
    async with InLoop(tmp_path / "registry.json") as inner:
        peer = await inner.peer()
        await peer.ask(cmd="register", name="db", port=5432, meta={"a": "\u202e\n</script>"})
        daemon = DaemonClient(parse_address(f"127.0.0.1:{inner.port}"))
        for cmd, arguments in [
            ("list", {}), ("resolve", {"name": "db"}), ("resolve", {"name": "cache"}), ("hello", {}),
            ("list", {"limit": "x"}), ("help", {"topic": "list"}), ("history", {"name": "db"}),
        ]:  # fmt: skip
            peer.send({"cmd": cmd, **arguments})
            assert (await daemon.ask(cmd, arguments)).line == await peer.line(), cmd
        daemon.close()


async def test_requests_at_once_get_their_own_replies(registry: Registry, daemon: DaemonClient) -> None:
    async with registry.client() as client:
        for number in range(1, 21):
            await client.register(f"s{number}", number, static=True)
    bodies = await asyncio.gather(*(daemon.ask("resolve", {"name": f"s{number}"}) for number in range(1, 21)))
    assert [json.loads(body.line)["port"] for body in bodies] == list(range(1, 21))


async def test_cancelled_request_does_not_shift_the_replies(registry: Registry, daemon: DaemonClient) -> None:
    await daemon.ask("ping", {})
    first = asyncio.create_task(daemon.ask("hello", {}))
    second = asyncio.create_task(daemon.ask("stats", {}))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    first.cancel()
    assert b'"uptime_s"' in (await second).line


async def test_after_a_cut_and_a_restart_the_next_request_succeeds(
    registry: Registry, daemon: DaemonClient
) -> None:
    assert (await daemon.ask("ping", {})).status == 200
    registry.cut()
    assert (await daemon.ask("ping", {})).status == 200
    async with registry.away():
        body = await daemon.ask("ping", {})
        assert (body.status, json.loads(body.line)["error"]) == (503, "unavailable")
        assert (await daemon.ask_alone("resolve", {"name": "a", "wait": 5}, 5.0)).status == 503
    assert (await daemon.ask("ping", {})).status == 200


async def test_silent_daemon_is_unavailable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(daemon_connections, "REPLY_S", 0.05)
    requests: list[bytes] = []

    async def read(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while line := await reader.readline():
            requests.append(line)
        writer.close()

    async with await asyncio.start_server(read, "127.0.0.1", 0) as server:
        daemon = DaemonClient(parse_address(f"127.0.0.1:{server.sockets[0].getsockname()[1]}"))
        for body in [await daemon.ask("ping", {}), await daemon.ask_alone("ping", {}, 0.0)]:
            assert body.status == 503
            assert "no reply within" in body.message
        assert daemon._pipeline is None or daemon._pipeline.broken  # the next request does not wait for this one
        # On a busy machine, the time may be over before the requests arrive.
        assert set(requests) <= {b'{"cmd":"ping"}\n'}
        daemon.close()


async def test_requests_in_flight_are_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(daemon_connections, "REQUESTS_MAX", 2)
    requests: list[bytes] = []
    answering = asyncio.Event()

    async def read(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while line := await reader.readline():
            requests.append(line)
            await answering.wait()
            writer.write(b'{"ok":true}\n')
        writer.close()

    async with await asyncio.start_server(read, "127.0.0.1", 0) as server:
        daemon = DaemonClient(parse_address(f"127.0.0.1:{server.sockets[0].getsockname()[1]}"))
        asked = [asyncio.create_task(daemon.ask("ping", {})) for _ in range(5)]
        await until(lambda: requests)
        assert daemon._slots.locked()
        assert daemon._pipeline is not None
        assert len(daemon._pipeline._replies) == 2
        with monkeypatch.context() as patch:
            patch.setattr(daemon_connections, "REPLY_S", 0.01)
            body = await daemon.ask("ping", {})
        assert (body.status, json.loads(body.line)["error"]) == (503, "busy")
        assert not any(task.done() for task in asked)  # they are still waiting on the first connection
        answering.set()
        async with asyncio.timeout(WAIT_S):
            assert {body.status for body in await asyncio.gather(*asked)} == {200}
        daemon.close()


async def test_other_program_is_unavailable() -> None:
    async def greet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"220 mail\n")
        await reader.read()
        writer.close()

    async with await asyncio.start_server(greet, "127.0.0.1", 0) as server:
        daemon = DaemonClient(parse_address(f"127.0.0.1:{server.sockets[0].getsockname()[1]}"))
        assert (await daemon.ask("ping", {})).status == 503
        daemon.close()


async def test_wait_ends_with_its_caller(registry: Registry, daemon: DaemonClient) -> None:
    waiting = asyncio.create_task(daemon.ask_alone("resolve", {"name": "late", "wait": 60.0}, 60.0))
    await gauge(daemon, "waiting", 1)
    waiting.cancel()
    await gauge(daemon, "waiting", 0)


async def test_wait_is_answered(registry: Registry, daemon: DaemonClient) -> None:
    waiting = asyncio.create_task(daemon.ask_alone("resolve", {"name": "late", "wait": 60.0}, 60.0))
    await gauge(daemon, "waiting", 1)
    async with (
        await asyncio.start_server(lambda _, writer: writer.close(), "127.0.0.1", 0) as server,
        registry.client() as client,
    ):
        port = server.sockets[0].getsockname()[1]
        await client.register("late", port, static=True)
        async with asyncio.timeout(WAIT_S):
            assert json.loads((await waiting).line)["port"] == port


async def gauge(daemon: DaemonClient, name: str, expected: int) -> None:
    """Wait until a gauge of `stats` has this value."""
    async with asyncio.timeout(WAIT_S):
        while json.loads((await daemon.ask("stats", {})).line)[name] != expected:
            await asyncio.sleep(0.001)
