"""uvicorn as the gateway runs it: with limits of its own, and streams that end before it stops."""

import contextlib
import logging
import time
from collections.abc import Generator
from socket import socket

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from regd.gateways import guard
from regd.gateways.routes import Gateway

__all__ = ["HttpServer"]

CONNECTIONS_MAX = 1_024
IDLE_S = 10.0  # for a whole request, and between two
_STOP_S = 1  # for the responses in progress
_TICKS_PER_S = 10  # of `on_tick`
_INCOMPLETE: tuple[object, ...] = (h11.IDLE, h11.SEND_BODY)  # states of a client whose request is not whole


class _Protocol(H11Protocol):
    """uvicorn's protocol, whose own answer to bytes that are no request has the headers of all others."""

    def send_400_response(self, msg: str) -> None:
        body = f"{msg}\n".encode()
        headers = {
            **dict(guard.HEADERS),
            "Content-Type": "text/plain; charset=utf-8",
            "Content-Length": str(len(body)),
            "Connection": "close",
        }
        head = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        if self.cycle is None or self.cycle.response_complete:  # else these bytes would end up in a response
            self.transport.write(f"HTTP/1.1 400 Bad Request\r\n{head}\r\n".encode() + body)
        self.transport.close()


class HttpServer(uvicorn.Server):
    """uvicorn, without its signal handlers: they raise the signal again, and the process would end with 143."""

    def __init__(self, gateway: Gateway) -> None:
        logging.getLogger("uvicorn.error").setLevel(logging.ERROR)  # its warnings are about requests of any peer
        super().__init__(
            uvicorn.Config(
                gateway,
                http=_Protocol,
                ws="none",
                lifespan="off",
                loop="none",
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,
                headers=guard.HEADERS,
                h11_max_incomplete_event_size=guard.HEAD_BYTES_MAX,
                limit_concurrency=CONNECTIONS_MAX,
                timeout_keep_alive=int(IDLE_S),
                timeout_graceful_shutdown=_STOP_S,
            )
        )
        self._gateway = gateway
        # When each connection that has sent no whole request was first seen so: uvicorn has no limit for that.
        self._incomplete: dict[object, float] = {}

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        yield

    async def on_tick(self, counter: int) -> bool:
        if counter % _TICKS_PER_S == 0:
            self._close_incomplete(time.monotonic())
        return await super().on_tick(counter)

    def _close_incomplete(self, now: float) -> None:
        connections = [
            connection
            for connection in self.server_state.connections
            if isinstance(connection, H11Protocol) and connection.conn.their_state in _INCOMPLETE
        ]
        self._incomplete = {connection: self._incomplete.get(connection, now) for connection in connections}
        for connection in connections:
            if now - self._incomplete[connection] > IDLE_S:
                connection.transport.close()

    async def shutdown(self, sockets: list[socket] | None = None) -> None:
        self._gateway.stop()  # otherwise the streams would be cut at the end of the graceful shutdown
        await super().shutdown(sockets)
