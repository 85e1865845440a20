"""The bridge's own HTTP server: what it answers, and to whom."""

import asyncio
import json
import socket
from collections.abc import AsyncIterator
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from regd.bridge.bridge import Bridge, Options
from regd.bridge.http_server import HttpServer
from regd.gateways.listeners import bind_loopback
from regd.gateways.readers import Readers
from tests.support.daemon import WAIT_S


class Refusing(Readers):
    def __init__(self) -> None:
        super().__init__(restricted=False)

    def may_read_by_tcp(self, peer: Any, own: Any) -> bool:
        return False


async def status() -> dict[str, Any]:
    bridge = Bridge(Options(("127.0.0.1:1",), "a", address="127.0.0.1:1"))
    try:
        return dict(bridge.status())
    finally:
        for sock in bridge._sockets:
            sock.close()
        await bridge._end([])


@pytest.fixture
async def port() -> AsyncIterator[int]:
    fields = await status()
    sockets = bind_loopback(0, (socket.SOCK_STREAM,), "--metrics")
    server = HttpServer(lambda: fields, Readers(restricted=False))
    await server.start(sockets)
    yield sockets[0].getsockname()[1]
    server.close()


async def ask(port: int, request: bytes, host: str = "127.0.0.1") -> tuple[int, bytes]:
    reader, writer = await asyncio.open_connection(host, port)
    writer.write(request)
    async with asyncio.timeout(WAIT_S):
        reply = await reader.read()
    writer.close()
    await writer.wait_closed()
    if not reply:
        return 0, b""
    head, _, body = reply.partition(b"\r\n\r\n")
    assert f"Content-Length: {len(body)}".encode() in head
    return int(head.split()[1]), body


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
async def test_metrics_and_status(port: int, host: str) -> None:
    code, body = await ask(port, f"GET /metrics HTTP/1.1\r\nHost: localhost:{port}\r\n\r\n".encode(), host)
    assert code == 200
    families = {family.name: family for family in text_string_to_metric_families(body.decode())}
    assert families["regd_bridge_etcd_up"].samples[0].value == 0
    assert families["regd_bridge_differences"].type == "counter"
    code, body = await ask(port, b"GET /status HTTP/1.0\r\nhost: [::1]\r\n\r\n", host)
    assert (code, json.loads(body)["machine"]) == (200, "a")


@pytest.mark.parametrize(
    ("request_", "code"),
    [
        (b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n", 404),
        (b"POST /status HTTP/1.1\r\nHost: localhost\r\n\r\n", 405),
        (b"GET /status HTTP/1.1\r\n\r\n", 400),
        (b"GET /status HTTP/1.1\r\nHost: evil.example\r\n\r\n", 400),
        (b"GET /status HTTP/1.1\r\nHost: localhost.evil.example:80\r\n\r\n", 400),
        (b"GET /status HTTP/1.1\r\nHost: localhost\r\nHost: localhost\r\n\r\n", 400),
        (b"\r\n\r\n", 400),
        (b"\xff\xfe\r\n\r\n", 400),
        (b"x" * 20_000, 0),
    ],
)
async def test_other_requests(port: int, request_: bytes, code: int) -> None:
    try:
        assert (await ask(port, request_))[0] == code
    except ConnectionResetError:
        assert code == 0


async def test_users_who_may_not_read() -> None:
    sockets = bind_loopback(0, (socket.SOCK_STREAM,), "--metrics")
    server = HttpServer(dict, Refusing())
    await server.start(sockets)
    code, _ = await ask(sockets[0].getsockname()[1], b"GET /status HTTP/1.1\r\nHost: localhost\r\n\r\n")
    assert code == 403
    server.close()
