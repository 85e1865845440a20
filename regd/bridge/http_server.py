"""A small HTTP server on loopback: `/metrics` for Prometheus, `/status` for `regctl bridge --status`."""

import asyncio
import contextlib
import json
import socket
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from regd.bridge import metrics
from regd.gateways.readers import Readers

__all__ = ["HttpServer"]

_HEAD_BYTES_MAX = 8_192
_HEAD_S = 10.0  # for a whole request
_CONNECTIONS_MAX = 64
_HOSTS = ("localhost", "127.0.0.1", "[::1]")
_REASONS = {200: "OK", 400: "Bad Request", 403: "Forbidden", 404: "Not Found", 405: "Method Not Allowed"}


class HttpServer:
    """Serves the status on sockets that listen.

    Args:
        status: returns what to serve.
        readers: who may read.
    """

    def __init__(self, status: Callable[[], Mapping[str, Any]], readers: Readers) -> None:
        self._status = status
        self._readers = readers
        self._servers: list[asyncio.Server] = []
        self._connections: set[asyncio.StreamWriter] = set()

    async def start(self, sockets: Sequence[socket.socket]) -> None:
        for sock in sockets:
            self._servers.append(await asyncio.start_server(self._serve, sock=sock, limit=_HEAD_BYTES_MAX))

    def close(self) -> None:
        """Close the sockets and all connections. Idempotent."""
        for server in self._servers:
            server.close()
        for writer in list(self._connections):
            writer.transport.abort()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if len(self._connections) >= _CONNECTIONS_MAX:
            writer.transport.abort()
            return
        self._connections.add(writer)
        try:
            with contextlib.suppress(
                OSError, TimeoutError, asyncio.IncompleteReadError, asyncio.LimitOverrunError
            ):
                async with asyncio.timeout(_HEAD_S):
                    head = await reader.readuntil(b"\r\n\r\n")
                    peer, own = (writer.get_extra_info(name) for name in ("peername", "sockname"))
                    may_read = self._readers.may_read_by_tcp(peer, own)
                    writer.write(_response(*self._answer(head, may_read)))
                    await writer.drain()
        finally:
            self._connections.discard(writer)
            writer.close()

    def _answer(self, head: bytes, may_read: bool) -> tuple[int, str, bytes]:
        lines = head.decode("latin-1").split("\r\n")
        hosts = [line.partition(":")[2].strip() for line in lines[1:] if line.lower().startswith("host:")]
        # A page of another site can reach this port under a name of its own (DNS rebinding).
        if len(hosts) != 1 or _host(hosts[0]) not in _HOSTS:
            return 400, "text/plain", b"Host must be localhost, 127.0.0.1 or [::1]\n"
        if not may_read:
            return 403, "text/plain", b"only the user of the bridge may read this\n"
        method, _, rest = lines[0].partition(" ")
        if method != "GET":
            return 405, "text/plain", b"GET only\n"
        match rest.partition(" ")[0]:
            case "/metrics":
                return 200, *metrics.render(self._status())
            case "/status":
                return 200, "application/json", json.dumps(self._status()).encode() + b"\n"
            case _:
                return 404, "text/plain", b"/metrics or /status\n"


def _host(text: str) -> str:
    host, colon, port = text.lower().rpartition(":")
    return host if colon and port.isascii() and port.isdigit() else text.lower()


def _response(status: int, content_type: str, body: bytes) -> bytes:
    head = (
        f"HTTP/1.1 {status} {_REASONS[status]}\r\nContent-Type: {content_type}\r\n"
        f"Content-Length: {len(body)}\r\nConnection: close\r\nX-Content-Type-Options: nosniff\r\n"
        "Cross-Origin-Resource-Policy: same-origin\r\n\r\n"
    )
    return head.encode() + body
