"""`regctl wait --http`: which responses mean that a service is ready, and how much of a response is read."""

import asyncio
import contextlib
from collections.abc import AsyncIterator

import pytest

from regd.cli import http_probe
from regd.cli.http_probe import why_not_ready


class Server:
    """Answers each connection with the same bytes, and records the requests."""

    def __init__(self, answer: bytes, stays_open: bool = False) -> None:
        self.requests: list[bytes] = []
        self.port = 0
        self._answer = answer
        self._stays_open = stays_open
        self._tasks: set[asyncio.Task[None] | None] = set()

    async def _reply(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._tasks.add(asyncio.current_task())
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            self.requests.append(await reader.readuntil(b"\r\n\r\n"))
            writer.write(self._answer)
            await writer.drain()
            if self._stays_open:
                await reader.read()
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()

    @contextlib.asynccontextmanager
    async def running(self, host: str = "127.0.0.1") -> AsyncIterator["Server"]:
        async with await asyncio.start_server(self._reply, host, 0) as server:
            self.port = server.sockets[0].getsockname()[1]
            yield self
        await asyncio.gather(*filter(None, self._tasks))


async def ask(answer: bytes, stays_open: bool = False, timeout_s: float = 5.0) -> str:
    async with Server(answer, stays_open).running() as server:
        return await why_not_ready("127.0.0.1", server.port, "/healthz", timeout_s)


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        (b"HTTP/1.1 200 OK\r\n\r\nfine", ""),
        (b"HTTP/1.0 204 No Content\r\n\r\n", ""),
        (b"HTTP/1.1 299\r\n\r\n", ""),
        (b"HTTP/1.1 200 OK\n\n", ""),
        (b"HTTP/1.1 200 OK\r\n", ""),  # the status is enough
        (b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\nHTTP/1.1 200 OK\r\n\r\n", ""),
        (b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\nHTTP/1.1 503 No\r\n\r\n", "answered 503 No"),
        (b"HTTP/1.1 301 Moved Permanently\r\nLocation: /other\r\n\r\n", "answered 301 Moved Permanently"),
        (b"HTTP/1.1 304 Not Modified\r\n\r\n", "answered 304 Not Modified"),
        (b"HTTP/1.1 404 Not Found\r\n\r\n", "answered 404 Not Found"),
        (b"HTTP/1.1 503\r\n\r\n", "answered 503"),
        (b"HTTP/1.1 500 \x1b[31m\xe9\r\n\r\n", "answered 500 \\x1b[31mé"),
        (b"HTTP/1.1 500 " + 200 * b"x" + b"\r\n\r\n", "answered 500 " + 80 * "x"),
        (b"", "no HTTP response: the connection was closed"),
        (b"HTTP/1.1 100 Continue\r\n", "no HTTP response: the connection was closed"),
        (b'{"ok":false}\n', "no HTTP response: it begins with b'{\"ok\":false}\\n'"),
        (b"HTTP/2 200\r\n\r\n", "no HTTP response: it begins with b'HTTP/2 200\\r\\n'"),
        (b"HTTP/1.1 999 OK\r\n\r\n", "no HTTP response: it begins with b'HTTP/1.1 999 OK\\r\\n'"),
        (b"x" * 200_000, "no HTTP response: its head has more than 65536 bytes"),
        (b"HTTP/1.1 200 OK" + b"x" * 200_000, "no HTTP response: its head has more than 65536 bytes"),
        (b"HTTP/1.1 100 Go on\r\n" + 5_000 * b"Header: 0123456789\r\n", "no HTTP response: its head has more than 65536 bytes"),
        (5_000 * b"HTTP/1.1 100 Go on\r\n\r\n", "no HTTP response: its head has more than 65536 bytes"),
    ],
)  # fmt: skip
async def test_readiness_by_response(answer: bytes, why: str) -> None:
    assert await ask(answer) == why


async def test_request_is_complete_and_the_redirect_is_not_followed() -> None:
    async with Server(b"HTTP/1.1 302 Found\r\nLocation: /login\r\n\r\n").running("::1") as server:
        assert await why_not_ready("::1", server.port, "/healthz?a=b") == "answered 302 Found"
        host = f"[::1]:{server.port}".encode()
        assert server.requests == [
            b"GET /healthz?a=b HTTP/1.1\r\nHost: " + host + b"\r\nUser-Agent: regctl\r\n"
            b"Accept: */*\r\nConnection: close\r\n\r\n"
        ]


async def test_body_without_an_end_is_not_awaited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_probe, "_BODY_S", 0.01)
    assert await ask(b"HTTP/1.1 200 OK\r\n\r\nevents", stays_open=True) == ""


@pytest.mark.parametrize("answer", [b"", b"HTTP/1.1 200", b"HTTP/1.1 100 Continue\r\n\r\n"])
async def test_server_that_hangs(answer: bytes) -> None:
    assert await ask(answer, stays_open=True, timeout_s=0.05) == "no response within 0.05 s"


async def test_no_listener_is_not_ready() -> None:
    async with Server(b"").running() as server:
        port = server.port
    assert await why_not_ready("127.0.0.1", port, "/") == "Connection refused"
