"""uvicorn for the gateway: with limits that uvicorn lacks, and with streams that end before the server stops."""

import asyncio
import contextlib
import logging
import time
from collections.abc import Generator, Mapping
from socket import socket

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from regd.gateways import guard
from regd.gateways.listeners import BACKLOG
from regd.gateways.routes import INPUT_ENDED, STREAM_PATH, Gateway

__all__ = ["HttpServer"]

CONNECTIONS_MAX = 1_024
IDLE_S = 10.0  # for a whole request, between two requests, and for a client that does not read
UNREAD_BYTES_MAX = 64 * 1_048_576  # of all responses
_STOP_S = 1  # for the responses in progress
_LINGER_S = 0.5  # of this second, for clients that read slowly
# h11's states of a client whose request is incomplete or invalid.
_INCOMPLETE: tuple[object, ...] = (h11.IDLE, h11.SEND_BODY, h11.ERROR)


class _Protocol(H11Protocol):
    """uvicorn's protocol, also for clients that send too much, do not read, or close their sending side."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._input_ended = asyncio.Event()
        self.app_state = {INPUT_ENDED: self._input_ended}
        if self.limit_concurrency is not None and len(self.connections) > 2 * self.limit_concurrency:
            transport.abort()  # above the limit the response is 503, above twice the limit there is none

    def data_received(self, data: bytes) -> None:
        # Pass the data on in parts, because h11 checks the size of a head only while it is incomplete. After an
        # error, ignore the rest: closing without reading it would reset the connection, and lose the response.
        for start in range(0, len(data), guard.HEAD_BYTES_MAX):
            if not self.transport.is_closing() and self.conn.their_state is not h11.ERROR:
                super().data_received(data[start : start + guard.HEAD_BYTES_MAX])

    def handle_events(self) -> None:
        """Read the next request once the client has read the previous responses."""
        if self.flow.write_paused:
            self.flow.pause_reading()
        else:
            super().handle_events()

    def resume_writing(self) -> None:
        super().resume_writing()
        if not self.transport.is_closing():
            self.flow.resume_reading()
            self.handle_events()

    def eof_received(self) -> bool:  # type: ignore[override]
        """Keep the connection open for the response to a client that has only closed its sending side."""
        self._input_ended.set()
        if self.cycle is None or self.cycle.response_complete:
            return False
        self.cycle.keep_alive = False
        return True

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._input_ended.set()

    @property
    def is_in_stream(self) -> bool:
        """Whether this connection sends an event stream. A stream pauses while its client does not read."""
        cycle = self.cycle
        if cycle is None or cycle.response_complete:
            return False
        return cycle.response_started and cycle.scope["path"] == STREAM_PATH

    def send_400_response(self, msg: str) -> None:
        body = f"{msg}\n".encode()
        headers = {
            **dict(guard.HEADERS),
            "Content-Type": "text/plain; charset=utf-8",
            "Content-Length": str(len(body)),
            "Connection": "close",
        }
        head = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        if self.cycle is None or self.cycle.response_complete:
            self.transport.write(f"HTTP/1.1 400 Bad Request\r\n{head}\r\n".encode() + body)
            self.transport.write_eof()
        else:  # a response is in progress, and these bytes would become a part of it
            self.transport.close()


class _UnchangedSince:
    """Records since when the value of each connection has been the same."""

    def __init__(self) -> None:
        self._values: dict[_Protocol, tuple[object, float]] = {}

    def update(self, values: Mapping[_Protocol, object], now: float) -> list[tuple[_Protocol, float]]:
        """Record the current values. Return since when each has been the same, the longest first."""
        previous = self._values
        self._values = {
            connection: previous[connection]
            if connection in previous and previous[connection][0] == value
            else (value, now)
            for connection, value in values.items()
        }
        pairs = [(connection, since) for connection, (_, since) in self._values.items()]
        return sorted(pairs, key=lambda pair: pair[1])


class HttpServer(uvicorn.Server):
    """uvicorn, without its signal handlers: they raise the signal again, and the process would end with 143."""

    def __init__(self, gateway: Gateway, connections_max: int = CONNECTIONS_MAX) -> None:
        # uvicorn's warnings are about bad requests, which any client can send.
        logging.getLogger("uvicorn.error").setLevel(logging.ERROR)
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
                backlog=BACKLOG,
                limit_concurrency=connections_max + 1,  # from this number on, the response is 503
                timeout_keep_alive=int(IDLE_S),
                timeout_graceful_shutdown=_STOP_S,
            )
        )
        self._gateway = gateway
        self._incomplete = _UnchangedSince()  # by connection with an incomplete request: the request before that
        self._unread = _UnchangedSince()  # by connection whose client does not read: the number of unread bytes

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        yield

    async def on_tick(self, counter: int) -> bool:
        self._close_incomplete(time.monotonic())
        self._drop_unread(time.monotonic())
        return await super().on_tick(counter)

    def _connections(self) -> list[_Protocol]:
        return [connection for connection in self.server_state.connections if isinstance(connection, _Protocol)]

    def _close_incomplete(self, now: float) -> None:
        """Close connections that have sent no whole request for too long. uvicorn has no such limit."""
        incomplete = [
            connection for connection in self._connections() if connection.conn.their_state in _INCOMPLETE
        ]
        requests = {connection: connection.cycle for connection in incomplete}
        for connection, since in self._incomplete.update(requests, now):
            if now - since > IDLE_S:
                connection.transport.close()

    def _drop_unread(self, now: float) -> None:
        """Drop clients that do not read, and the slowest clients if too many bytes are unread in total.

        Event streams do not count: they have limits of their own, and pause while their client does not read.
        """
        sizes = {connection: connection.transport.get_write_buffer_size() for connection in self._connections()}
        unread = {connection: size for connection, size in sizes.items() if size and not connection.is_in_stream}
        excess = sum(unread.values()) - UNREAD_BYTES_MAX
        for connection, since in self._unread.update(unread, now):
            if now - since > IDLE_S or (excess > 0 and len(unread) > 1):
                excess -= unread.pop(connection)
                connection.transport.abort()

    async def shutdown(self, sockets: list[socket] | None = None) -> None:
        self._gateway.stop()  # else uvicorn would cut the event streams when the time for the shutdown is over
        asyncio.get_running_loop().call_later(_LINGER_S, self._abort)
        await super().shutdown(sockets)

    def _abort(self) -> None:
        """Drop the connections whose client does not read, or whose request the daemon does not answer."""
        # uvicorn would log each dropped connection as an error of the application.
        logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
        for connection in self._connections():
            connection.transport.abort()
