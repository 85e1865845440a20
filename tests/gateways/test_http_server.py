"""The HTTP server on real sockets, in the test's event loop: headers, limits, bad input, shutdown."""

import asyncio
import contextlib
import random
import socket
import time
from collections.abc import AsyncIterator
from pathlib import Path

import h11
import pytest
import uvicorn
from starlette.types import Receive, Scope, Send

from regd.gateways import guard, http_server
from regd.gateways.daemon_connections import DaemonClient
from regd.gateways.guard import HEAD_BYTES_MAX
from regd.gateways.http_server import HttpServer
from regd.gateways.readers import Readers
from regd.gateways.routes import Gateway
from regd_client.protocol import parse_address
from tests.support.daemon import WAIT_S
from tests.support.polling import until
from tests.support.registries import Registry, running

pytestmark = pytest.mark.socket


class Site:
    def __init__(self, registry: Registry, server: HttpServer, port: int, serving: "asyncio.Task[None]") -> None:
        self.registry = registry
        self.server = server
        self.port = port
        self.serving = serving

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.open_connection("127.0.0.1", self.port)

    async def send(self, data: bytes) -> bytes:
        """Send bytes, and return all bytes received until the server closes the connection."""
        reader, writer = await self.connect()
        writer.write(data)
        try:
            async with asyncio.timeout(WAIT_S):
                return await reader.read()
        finally:
            writer.close()

    async def get(self, path: str, *headers: str, method: str = "GET") -> bytes:
        lines = [f"{method} {path} HTTP/1.1", "Host: localhost", "Connection: close", *headers, "", ""]
        return await self.send("\r\n".join(lines).encode())


@pytest.fixture
async def site(tmp_path: Path) -> AsyncIterator[Site]:
    async with running(tmp_path) as registry:
        daemon = DaemonClient(parse_address(registry.address))
        server = HttpServer(Gateway(daemon, Readers(restricted=False)))
        with socket.create_server(("127.0.0.1", 0)) as listener:
            serving = asyncio.create_task(server.serve([listener]))
            yield Site(registry, server, listener.getsockname()[1], serving)
            server.should_exit = True
            await serving
        daemon.close()


def status(response: bytes) -> int:
    return int(response.split(b" ", 2)[1])


@pytest.mark.sample(8)
@pytest.mark.parametrize(
    ("request_", "code"),
    [
        (b"GET /v1/list HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n", 200),
        (b"GET /nowhere HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n", 404),
        (b"POST /v1/list HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n", 405),
        (b"OPTIONS * HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n", 405),
        (b"GET /v1/list HTTP/1.1\r\nHost: evil.example\r\nConnection: close\r\n\r\n", 400),
        (b"GET /v1/list HTTP/1.0\r\n\r\n", 400),
        (b"GET /v1/list HTTP/1.1\r\n\r\n", 400),
        (b"GET /v1/list HTTP/1.1\r\nHost: localhost\r\nHost: localhost\r\n\r\n", 400),
        (b"GET http://evil.example/v1/list HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n", 404),
        (b"GET /v1/list\xff HTTP/1.1\r\nHost: localhost\r\n\r\n", 400),
        (b"GET /v1/list%0d%0aX:1 HTTP/1.1\r\nHost: a.localhost\r\nConnection: close\r\n\r\n", 404),
        (b"GET /v1/list?" + b"a" * HEAD_BYTES_MAX + b" HTTP/1.1\r\nHost: localhost\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\n" + b"X: y\r\n" * HEAD_BYTES_MAX, 400),
        (b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nX: " + b"y" * 20_000 + b"\r\n\r\n", 400),
        (b"GET /v1/watch HTTP/1.1\r\nHost: localhost\r\nLast-Event-ID: " + b"x" * 65_536 + b"\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: gzip, chunked\r\n\r\n", 400),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\0" * 50 + b"\r\n\r\n", 400),
        (b'{"cmd":"list"}\n\n', 400),
        (b"GET /v1/list HTTP/1.1\r\nHost:\r\nConnection: close\r\n\r\n", 400),
        (b"GET /v1/list HTTP/1.1\r\nHost: a@localhost\r\nConnection: close\r\n\r\n", 400),
        (b"GET /v1/list HTTP/1.1\r\nHost: localhost evil.example\r\nConnection: close\r\n\r\n", 400),
        (b"GET /v1/list HTTP/1.1\r\nHost: 127.0.0.1.evil.example\r\nConnection: close\r\n\r\n", 400),
        (b"GET /v1/list?" + b"a=&" * 5_000 + b" HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n", 400),
        (b"GET /v1/\xc0\xaf HTTP/1.1\r\nHost: localhost\r\n\r\n", 400),
        (b"GET /v1/%c0%af%ff HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n", 404),
        (b"GET /v1/list%00 HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n", 404),
        (b"GET //evil.example/.. HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n", 404),
        (b"GET /v1/list HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n"
         b"Connection: close\r\n\r\n0\r\n\r\n", 200),
        (b"GET /v1/hello HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade, close\r\nUpgrade: h2c\r\n\r\n", 200),
        (b"CONNECT localhost:22 HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n", 405),
        *((f"{method} /v1/list HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode(), 405)
          for method in ("PUT", "DELETE", "PATCH", "TRACE", "PROPFIND", "get", "REGISTER")),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400),
    ],
)  # fmt: skip
async def test_every_response_has_the_headers(site: Site, request_: bytes, code: int) -> None:
    response = await site.send(request_)
    head = response.partition(b"\r\n\r\n")[0].decode().lower()
    assert status(response) == code
    for name, value in guard.HEADERS:
        assert head.count(f"\r\n{name.lower()}: {value.lower()}") == 1, name
    assert "\r\nserver:" not in head
    assert "\r\nset-cookie:" not in head
    assert "\r\naccess-control" not in head


async def test_head_has_no_body(site: Site) -> None:
    response = await site.get("/v1/hello", method="HEAD")
    assert response.endswith(b"\r\n\r\n")
    assert b"content-length: 0" not in response


async def test_request_byte_by_byte(site: Site) -> None:
    reader, writer = await site.connect()
    for byte in b"GET /healthz HTTP/1.1\r\nHost: [::1]:7380\r\nConnection: close\r\n\r\n":
        writer.write(bytes([byte]))
        await asyncio.sleep(0)
    assert (await reader.read()).endswith(b"ok\n")
    writer.close()


async def test_pipelined_requests(site: Site) -> None:
    one = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n"
    response = await site.send(one * 3 + one.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n"))
    assert response.count(b"HTTP/1.1 200 OK") == 4


async def test_websocket_upgrade_gets_no_handshake(site: Site) -> None:
    response = await site.get(
        "/v1/hello", "Upgrade: websocket", "Connection: Upgrade", "Sec-WebSocket-Version: 13",
        "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==", "Origin: http://evil.example",
    )  # fmt: skip
    assert status(response) == 403


async def test_idle_connections_and_late_requests_are_closed(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_server, "IDLE_S", 0.0)
    streams = [await site.connect() for _ in range(300)]
    beginnings = (
        b"",
        b"G",
        b"GET / HTTP/1.1\r\nHost: local",
        b"GET /nowhere HTTP/1.1\r\nContent-Length: 5\r\nHost: localhost\r\n\r\nab",
    )
    for number, (_, writer) in enumerate(streams):
        writer.write(beginnings[number % len(beginnings)])
    async with asyncio.timeout(WAIT_S):
        for reader, writer in streams:
            with contextlib.suppress(ConnectionError):
                assert b" 200 " not in await reader.read()
            writer.close()
    monkeypatch.undo()
    assert status(await site.get("/healthz")) == 200


async def test_connections_are_limited(site: Site) -> None:
    site.server.config.limit_concurrency = 3
    streams = [await site.connect() for _ in range(2)]
    await until(lambda: len(site.server._connections()) == 2)
    assert status(await site.get("/healthz")) == 503
    for _, writer in streams:
        writer.close()
    async with asyncio.timeout(WAIT_S):
        while status(await site.get("/healthz")) != 200:
            await asyncio.sleep(0.01)


async def test_stop_ends_streams_and_waits_as_complete_responses(site: Site) -> None:
    requests = [
        asyncio.create_task(site.send(f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode()))
        for path in ("/v1/watch", "/v1/resolve?name=late&wait=60")
    ]
    async with site.registry.client() as client, asyncio.timeout(WAIT_S):
        while (stats := await client.stats())["watches"] != 1 or stats["waiting"] != 1:
            await asyncio.sleep(0.001)
    idle_reader, idle_writer = await site.connect()
    site.server.should_exit = True
    async with asyncio.timeout(WAIT_S):
        stream, wait = await asyncio.gather(*requests)
        await site.serving
        assert await idle_reader.read() == b""
    assert stream.endswith(b"\r\n0\r\n\r\n")
    assert status(wait) == 503
    idle_writer.close()


async def test_client_that_stops_reading_costs_little(site: Site) -> None:
    reader, writer = await site.connect()
    writer.write(b"GET /v1/watch HTTP/1.1\r\nHost: localhost\r\n\r\n")
    await reader.readuntil(b"event: sync")
    writer.transport.pause_reading()  # type: ignore[attr-defined]
    async with site.registry.client() as client:
        await client.register("a", 1, static=True)
        for number in range(300):
            await client.update("a", {"text": f"{number}" + "x" * 4_000})
    (connection,) = site.server._connections()
    assert connection.transport.get_write_buffer_size() < 256 * 1_024
    writer.transport.abort()


# Clients that close their sending side.

HALF_CLOSED = {
    "/healthz": (200, b"ok\n"),
    "/v1/list": (200, b"}\n"),
    "/nowhere": (404, b"Not Found"),
    "/v1/resolve?name=late&wait=60": (503, b"}\n"),
    "/v1/watch": (200, b"\r\n0\r\n\r\n"),
}


@pytest.mark.parametrize("path", HALF_CLOSED)
@pytest.mark.usefixtures("without_ticks")
async def test_half_closed_client_gets_its_reply(site: Site, path: str) -> None:
    site.server.config.timeout_keep_alive = 3_600
    reader, writer = await site.connect()
    writer.write(f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
    writer.write_eof()
    async with asyncio.timeout(WAIT_S):
        response = await reader.read()
    code, end = HALF_CLOSED[path]
    assert (status(response), response.endswith(end)) == (code, True)
    writer.close()
    await until(lambda: not site.server._connections() and not site.server.server_state.tasks)
    async with site.registry.client() as client, asyncio.timeout(WAIT_S):
        while (stats := await client.stats())["watches"] or stats["waiting"]:
            await asyncio.sleep(0.001)


async def test_half_closed_client_gets_all_pipelined_replies(site: Site) -> None:
    reader, writer = await site.connect()
    writer.write(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n" * 5)
    writer.write_eof()
    async with asyncio.timeout(WAIT_S):
        assert (await reader.read()).count(b"HTTP/1.1 200 OK") == 5
    writer.close()


@pytest.mark.parametrize("data", [b"", b"GET / HTT", b"GET / HTTP/1.1\r\nHost: localhost\r\n"])
async def test_end_within_a_head_closes(site: Site, data: bytes) -> None:
    reader, writer = await site.connect()
    writer.write(data)
    writer.write_eof()
    async with asyncio.timeout(WAIT_S):
        assert await reader.read() == b""
    writer.close()


# Clients that do not read.


@pytest.fixture
def without_ticks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Turn off the server's checks of its limits, so that the test decides when they are made."""
    monkeypatch.setattr(HttpServer, "on_tick", uvicorn.Server.on_tick)


LARGE = b"x" * 8_388_608  # more than the kernel buffers for a connection


class LargeReplies:
    """An application that answers every request with `LARGE`, and counts the requests."""

    def __init__(self) -> None:
        self.requests = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.requests += 1
        headers = [(b"content-length", b"%d" % len(LARGE))]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": LARGE})


@pytest.fixture
async def large(site: Site) -> LargeReplies:
    assert status(await site.get("/healthz")) == 200  # the server loads its application with the first request
    site.server.config.loaded_app = app = LargeReplies()
    return app


async def ask_and_not_read(site: Site, count: int = 1) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Send requests, and return once the first response cannot be sent because the client does not read."""
    known = site.server._connections()
    reader, writer = await site.connect()
    writer.transport.pause_reading()  # type: ignore[attr-defined]
    writer.write(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n" * count)
    await until(
        lambda: any(
            each.transport.get_write_buffer_size() for each in site.server._connections() if each not in known
        )
    )
    return reader, writer


async def rest(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> int:
    writer.transport.resume_reading()  # type: ignore[attr-defined]
    writer.write_eof()
    async with asyncio.timeout(WAIT_S):
        return len(await reader.read())


@pytest.mark.usefixtures("without_ticks")
async def test_client_that_does_not_read_is_dropped(site: Site, large: LargeReplies) -> None:
    _, writer = await ask_and_not_read(site)
    now = time.monotonic()
    site.server._drop_unread(now)
    site.server._drop_unread(now + http_server.IDLE_S - 1)
    assert len(site.server._connections()) == 1
    site.server._drop_unread(now + http_server.IDLE_S + 1)
    await until(lambda: not site.server._connections())
    writer.transport.abort()


@pytest.mark.usefixtures("without_ticks")
async def test_slow_client_is_not_dropped(site: Site, large: LargeReplies) -> None:
    reader, writer = await ask_and_not_read(site)
    (connection,) = site.server._connections()
    now = time.monotonic()
    for _ in range(3):
        site.server._drop_unread(now)
        now += http_server.IDLE_S + 1
        size = connection.transport.get_write_buffer_size()
        writer.transport.resume_reading()  # type: ignore[attr-defined]
        while connection.transport.get_write_buffer_size() == size:
            await reader.read(65_536)
        writer.transport.pause_reading()  # type: ignore[attr-defined]
        site.server._drop_unread(now)
    assert not connection.transport.is_closing()
    await rest(reader, writer)
    writer.close()


async def test_unread_replies_are_limited_in_all(
    site: Site, large: LargeReplies, monkeypatch: pytest.MonkeyPatch
) -> None:
    streams = [await ask_and_not_read(site) for _ in range(4)]
    now = time.monotonic()
    site.server._drop_unread(now)
    assert len(site.server._connections()) == 4
    monkeypatch.setattr(http_server, "UNREAD_BYTES_MAX", len(LARGE) // 8)
    await until(lambda: len(site.server._connections()) == 1)  # a single client may leave more bytes unread
    lengths = await asyncio.gather(*(rest(*each) for each in streams), return_exceptions=True)
    assert sum(isinstance(length, int) and length > len(LARGE) for length in lengths) == 1
    for _, writer in streams:
        writer.transport.abort()


async def test_next_request_waits_until_the_reply_is_read(site: Site, large: LargeReplies) -> None:
    reader, writer = await ask_and_not_read(site, count=5)
    writer.write(b"GET / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
    (connection,) = site.server._connections()
    await until(lambda: connection.flow.read_paused)
    for _ in range(10):  # by now, a request that was read would have been counted
        await asyncio.sleep(0)
    assert large.requests == 1
    writer.transport.resume_reading()  # type: ignore[attr-defined]
    async with asyncio.timeout(WAIT_S):
        response = await reader.read()
    assert response.count(b"HTTP/1.1 200 OK") == large.requests == 6
    assert len(response) > 6 * len(LARGE)
    writer.transport.abort()


@pytest.mark.usefixtures("without_ticks")
async def test_stream_stops_while_its_client_does_not_read(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_server, "UNREAD_BYTES_MAX", 0)
    reader, writer = await site.connect()
    writer.write(b"GET /v1/watch HTTP/1.1\r\nHost: localhost\r\n\r\n")
    await reader.readuntil(b"event: sync")
    writer.transport.pause_reading()  # type: ignore[attr-defined]
    (connection,) = site.server._connections()
    connection.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4_096)
    async with site.registry.client() as client:
        await client.register("a", 1, static=True)
        while not connection.transport.get_write_buffer_size():
            await client.update("a", {"text": "x" * 4_000, "time": str(time.monotonic())})
    site.server._drop_unread(time.monotonic())
    site.server._drop_unread(time.monotonic() + 2 * http_server.IDLE_S)
    assert connection.is_in_stream
    assert not connection.transport.is_closing()
    writer.transport.abort()


@pytest.mark.usefixtures("without_ticks")
async def test_idle_connection_is_closed_and_used_connection_stays_open(site: Site) -> None:
    reader, writer = await site.connect()
    request = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n"
    now = time.monotonic()
    for _ in range(3):
        writer.write(request)
        await reader.readuntil(b"\r\n\r\nok\n")
        (connection,) = site.server._connections()
        while connection.conn.their_state is not h11.IDLE:
            await asyncio.sleep(0)
        now += http_server.IDLE_S + 1
        site.server._close_incomplete(now)
        assert not connection.transport.is_closing()
    site.server._close_incomplete(now + http_server.IDLE_S + 1)
    async with asyncio.timeout(WAIT_S):
        assert await reader.read() == b""
    writer.close()


async def test_connections_beyond_those_that_get_503_are_closed(site: Site) -> None:
    site.server.config.limit_concurrency = 1
    streams = [await site.connect() for _ in range(2)]
    await until(lambda: len(site.server._connections()) == 2)
    reader, writer = await site.connect()
    async with asyncio.timeout(WAIT_S):
        with contextlib.suppress(ConnectionError):
            assert await reader.read() == b""
    assert len(site.server._connections()) == 2
    for _, each in (*streams, (reader, writer)):
        each.close()


@pytest.mark.parametrize("query", [b"", b"?a=b"])
@pytest.mark.parametrize(("excess", "code"), [(0, 200), (1, 400)])
async def test_head_of_the_limit_passes(site: Site, query: bytes, excess: int, code: int) -> None:
    beginning = b"GET /healthz" + query + b" HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nX: "
    end = b"\r\n\r\n"
    filling = b"y" * (HEAD_BYTES_MAX + excess - len(beginning) - len(end))
    assert status(await site.send(beginning + filling + end)) == code


@pytest.mark.parametrize(
    ("beginning", "code"),
    [
        (b"GET / HTTP/1.1\r\nHost: localhost\r\nX: ", 400),
        (b"\x16\x03\x01\x02\x00\x01\x00\r\n\r\n", 400),
        (b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 20000000\r\n\r\n", 405),
    ],
)  # fmt: skip
async def test_client_that_sends_on_gets_the_response(site: Site, beginning: bytes, code: int) -> None:
    """The response is not lost in a reset of the connection."""
    reader, writer = await site.connect()
    writer.write(beginning)
    for _ in range(200):
        writer.write(b"x" * 100_000)
        await writer.drain()
    async with asyncio.timeout(WAIT_S):
        assert status(await reader.readuntil(b"\r\n\r\n")) == code
    writer.transport.abort()


@pytest.mark.usefixtures("without_ticks")
async def test_client_that_sends_on_without_end_is_closed(site: Site) -> None:
    reader, writer = await site.connect()
    writer.write(b"\r\n\0\r\n\r\n")
    assert status(await reader.read()) == 400  # `read` ends since the server has closed its sending side
    (connection,) = site.server._connections()
    writer.write(b"x" * 100_000)
    now = time.monotonic()
    site.server._close_incomplete(now)
    assert not connection.transport.is_closing()
    site.server._close_incomplete(now + http_server.IDLE_S + 1)
    assert connection.transport.is_closing()
    writer.transport.abort()


async def test_stop_drops_clients_that_do_not_read(
    site: Site, large: LargeReplies, caplog: pytest.LogCaptureFixture
) -> None:
    streams = [await ask_and_not_read(site, count=2) for _ in range(3)]
    site.server.should_exit = True
    async with asyncio.timeout(WAIT_S):
        await site.serving
    assert not site.server.server_state.tasks
    assert not site.server._connections()
    assert [record.getMessage() for record in caplog.records if record.levelname == "ERROR"] == []
    for _, writer in streams:
        writer.transport.abort()


REQUESTS = [
    b"GET /v1/list?name=a*&limit=3 HTTP/1.1\r\nHost: localhost:7380\r\nAccept: */*\r\n\r\n",
    b"GET /v1/watch HTTP/1.1\r\nHost: [::1]\r\nLast-Event-ID: 5eed-1\r\n\r\n",
    b"GET /v1/resolve?name=a&wait=0 HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\nGET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"GET /a?b HTTP/1.1\r\nHost: web.localhost\r\nSec-Fetch-Site: none\r\nContent-Length: 3\r\n\r\nabc",
]
PIECES = [
    b"\0", b"\r\n", b"\n", b" ", b"%", b"%00", b"%0d%0a", b"%ff", b"/", b"//", b"?", b"&", b"=", b"HTTP/2", b"\xff",
    b"Transfer-Encoding: chunked\r\n", b"Content-Length: 1\r\n", b"Host: evil.example\r\n", b"POST", b"[", b"{", b"\xc0\x80",
]  # fmt: skip


async def test_server_survives_any_bytes(site: Site, caplog: pytest.LogCaptureFixture) -> None:
    rng = random.Random(17)
    for number in range(200):
        data = rng.choice(REQUESTS)
        for _ in range(rng.randint(1, 4)):
            start = rng.randrange(len(data))
            data = data[:start] + rng.choice(PIECES) + data[start + rng.randrange(6) :]
        reader, writer = await site.connect()
        writer.write(data)
        if number % 2:
            writer.write_eof()
        with contextlib.suppress(TimeoutError, ConnectionError):
            async with asyncio.timeout(0.02):
                response = await reader.read(65_536)
                assert response == b"" or response.startswith(b"HTTP/1.1 ")
                assert not response.startswith(b"HTTP/1.1 500")
        writer.transport.abort()
    assert status(await site.get("/healthz")) == 200
    assert [record.getMessage() for record in caplog.records if record.levelname == "ERROR"] == []
    async with asyncio.timeout(WAIT_S), site.registry.client() as client:
        while (await client.stats())["watches"]:
            await asyncio.sleep(0.01)
