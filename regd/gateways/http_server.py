"""uvicorn as the gateway runs it: with limits of its own, and streams that end before it stops."""

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
IDLE_S = 10.0  # for a whole request, and between two; and for a client that does not read
UNREAD_BYTES_MAX = 64 * 1_048_576  # of all replies
_STOP_S = 1  # for the responses in progress
_LINGER_S = 0.5  # for clients that read slowly, within _STOP_S
# States of a client whose request is not whole, or not valid.
_INCOMPLETE: tuple[object, ...] = (h11.IDLE, h11.SEND_BODY, h11.ERROR)


class _Protocol(H11Protocol):
    """uvicorn's protocol, for peers that send too much, do not read, or close their sending side."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._input_ended = asyncio.Event()
        self.app_state = {INPUT_ENDED: self._input_ended}
        if self.limit_concurrency is not None and len(self.connections) > 2 * self.limit_concurrency:
            transport.abort()  # between the two numbers, the response is 503

    def data_received(self, data: bytes) -> None:
        # In parts, because h11 limits a head only until it is complete. After an error the rest is ignored: a
        # connection closed with unread input is reset, and the response lost.
        for start in range(0, len(data), guard.HEAD_BYTES_MAX):
            if not self.transport.is_closing() and self.conn.their_state is not h11.ERROR:
                super().data_received(data[start : start + guard.HEAD_BYTES_MAX])

    def handle_events(self) -> None:
        """Read the next request, but not before the client has read the previous replies."""
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
        """Answer a client that has only closed its sending side; asyncio would close the connection."""
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
        """Return whether a stream is being sent, which waits for its reader."""
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
        else:  # these bytes would end up in a response
            self.transport.close()


class _Since:
    """Remembers since when the value of each connection is unchanged."""

    def __init__(self) -> None:
        self._values: dict[_Protocol, tuple[object, float]] = {}

    def update(self, values: Mapping[_Protocol, object], now: float) -> list[tuple[_Protocol, float]]:
        """Take the current values, and return since when each is the same, the longest first."""
        previous = self._values
        self._values = {
            connection: previous[connection]
            if connection in previous and previous[connection][0] == value
            else (value, now)
            for connection, value in values.items()
        }
        found = [(connection, since) for connection, (_, since) in self._values.items()]
        return sorted(found, key=lambda pair: pair[1])


class HttpServer(uvicorn.Server):
    """uvicorn, without its signal handlers: they raise the signal again, and the process would end with 143."""

    def __init__(self, gateway: Gateway, connections_max: int = CONNECTIONS_MAX) -> None:
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
                backlog=BACKLOG,
                limit_concurrency=connections_max + 1,  # that number and more get 503
                timeout_keep_alive=int(IDLE_S),
                timeout_graceful_shutdown=_STOP_S,
            )
        )
        self._gateway = gateway
        self._incomplete = _Since()  # of connections without a whole request: the previous one
        self._unread = _Since()  # of connections whose client does not read: the bytes left

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        yield

    async def on_tick(self, counter: int) -> bool:
        self._close_incomplete(time.monotonic())
        self._drop_unread(time.monotonic())
        return await super().on_tick(counter)

    def _connections(self) -> list[_Protocol]:
        return [each for each in self.server_state.connections if isinstance(each, _Protocol)]

    def _close_incomplete(self, now: float) -> None:
        """Close connections that have sent no whole request for too long: uvicorn has no limit for that."""
        requests = {each: each.cycle for each in self._connections() if each.conn.their_state in _INCOMPLETE}
        for connection, since in self._incomplete.update(requests, now):
            if now - since > IDLE_S:
                connection.transport.close()

    def _drop_unread(self, now: float) -> None:
        """Drop clients that do not read their replies, and the slowest of those that leave too much unread.

        Streams are no part of it: they have limits of their own, and wait for their readers.
        """
        sizes = {each: each.transport.get_write_buffer_size() for each in self._connections()}
        unread = {each: size for each, size in sizes.items() if size and not each.is_in_stream}
        excess = sum(unread.values()) - UNREAD_BYTES_MAX
        for connection, since in self._unread.update(unread, now):
            if now - since > IDLE_S or (excess > 0 and len(unread) > 1):
                excess -= unread.pop(connection)
                connection.transport.abort()

    async def shutdown(self, sockets: list[socket] | None = None) -> None:
        self._gateway.stop()  # otherwise the streams would be cut at the end of the graceful shutdown
        asyncio.get_running_loop().call_later(_LINGER_S, self._abort)
        await super().shutdown(sockets)

    def _abort(self) -> None:
        """Drop the connections that are left: their client does not read, or the daemon does not answer."""
        logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)  # no errors of the application
        for connection in self._connections():
            connection.transport.abort()
