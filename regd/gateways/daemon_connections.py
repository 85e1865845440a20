"""Connections to the daemon, whose lines are passed on unchanged.

Short requests share one connection and are pipelined without `id`, since the daemon replies in the order of the
requests. Each `resolve` with `wait`, and each watch, has a connection of its own.
"""

import asyncio
import contextlib
import os
import socket
import struct
from collections import deque
from collections.abc import AsyncIterator, Mapping
from typing import Any

from regd.gateways.queries import Body, body_of, failure
from regd_client import protocol
from regd_client.errors import BadArgument
from regd_client.protocol import Address, connectable

__all__ = ["DaemonClient", "DaemonConnection", "slot"]

REPLY_S = 2.0  # to connect and to get the reply, in addition to `wait`
_LINE_BYTES_MAX = 2 * 1_048_576  # of a reply; the daemon's own limit is half of this
_READ_BYTES = 16_384  # of a watch, per read: about 60 events
REQUESTS_MAX = 64  # in flight on the shared connection; the daemon handles no more of one connection at a time
_TOO_LATE = f"no reply within {REPLY_S:g} s"
_RESET = struct.pack("ii", 1, 0)  # struct linger: close with a reset


def _reason(error: OSError) -> str:
    """Return the system's error message. asyncio's messages would name the call and its arguments."""
    return os.strerror(error.errno) if error.errno and error.errno > 0 else str(error)


@contextlib.asynccontextmanager
async def slot(slots: asyncio.Semaphore) -> AsyncIterator[None]:
    """Hold a slot during the block.

    Raises:
        TimeoutError: no slot is free within `REPLY_S`.
    """
    async with asyncio.timeout(REPLY_S):
        await slots.acquire()
    try:
        yield
    finally:
        slots.release()


class DaemonConnection:
    """A connection to send requests and read lines."""

    def __init__(self) -> None:
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def open(self, address: Address, limit: int = _LINE_BYTES_MAX) -> None:
        """Connect. At most twice `limit` bytes are read ahead.

        Raises:
            OSError: no daemon listens at the address.
        """
        if address.path:
            with connectable(address.path) as path:
                self._streams = await asyncio.open_unix_connection(path, limit=limit)
        else:
            self._streams = await asyncio.open_connection(address.host, address.port, limit=limit)

    @property
    def _reader(self) -> asyncio.StreamReader:
        assert self._streams is not None
        return self._streams[0]

    @property
    def _writer(self) -> asyncio.StreamWriter:
        assert self._streams is not None
        return self._streams[1]

    def send(self, request: bytes) -> None:
        self._writer.write(request)

    async def read_line(self) -> bytes:
        """Read a whole line.

        Raises:
            ConnectionError: the connection ended before the line did, or the line is longer than any reply.
        """
        try:
            return await self._reader.readuntil(b"\n")
        except (asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            raise ConnectionResetError("it closed the connection before the reply") from None

    async def read(self) -> bytes:
        """Read the bytes that have arrived; b"" at the end of the connection."""
        return await self._reader.read(_READ_BYTES)

    def abort(self) -> None:
        """Close the connection with a reset, so that the daemon drops a wait or a watch at once. Idempotent.

        After an ordinary close the daemon would continue, because a client that has closed its socket looks
        like one that has only stopped sending.
        """
        if self._streams is None:
            return
        sock = self._writer.get_extra_info("socket")
        if sock is not None and sock.family != socket.AF_UNIX and sock.fileno() >= 0:  # uvloop: None once closed
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
        self._writer.transport.abort()


class _Pipeline:
    """A connection on which requests are pipelined: replies come in the order of the requests."""

    def __init__(self, connection: DaemonConnection) -> None:
        self.broken = False
        self._connection = connection
        self._replies: deque[asyncio.Future[bytes]] = deque()
        self._reading = asyncio.create_task(self._read(), name="regd-gateway-replies")

    async def ask(self, request: bytes) -> bytes:
        """Send a request and return its reply. If the caller is cancelled, the reply is still read, and dropped.

        Raises:
            ConnectionError: the connection broke before the reply.
        """
        reply: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        if self.broken:
            raise ConnectionResetError("the connection broke before the request")
        self._replies.append(reply)
        self._connection.send(request)
        return await reply

    async def _read(self) -> None:
        try:
            while True:
                line = await self._connection.read_line()
                if not self._replies:
                    return  # the daemon closes the connection; the line says why: `busy`, `shutting_down`
                reply = self._replies.popleft()
                if not reply.done():
                    reply.set_result(line)
        except OSError:
            return
        finally:
            self.close()

    def close(self) -> None:
        """Close the connection. Requests that wait for a reply fail. Idempotent."""
        self.broken = True
        self._connection.abort()
        while self._replies:
            reply = self._replies.popleft()
            if not reply.done():
                reply.set_exception(ConnectionResetError("it closed the connection before the reply"))
        self._reading.cancel()


class DaemonClient:
    """Asks the daemon at an address. Without a daemon, or a reply in time, the answer is `unavailable`."""

    def __init__(self, address: Address) -> None:
        self.address = address
        self._pipeline: _Pipeline | None = None
        self._connecting = asyncio.Lock()
        self._slots = asyncio.Semaphore(REQUESTS_MAX)

    async def ask(self, cmd: str, arguments: Mapping[str, Any]) -> Body:
        """Ask on the shared connection. The answer is `busy` if earlier requests on it take too long."""
        try:
            request = protocol.encode_request(cmd, None, arguments)
        except BadArgument as error:
            return failure("bad_argument", str(error))
        try:
            async with slot(self._slots):
                return await self._ask_in_time(request)
        except TimeoutError:
            return failure("busy", "too many requests wait for the daemon; try again later")

    async def _ask_in_time(self, request: bytes) -> Body:
        try:
            async with asyncio.timeout(REPLY_S):
                return body_of(await self._ask(request))
        except TimeoutError:
            self.close()  # on this connection, later requests would wait as long for the daemon
            return self.unavailable(_TOO_LATE)
        except OSError as error:
            return self.unavailable(_reason(error))

    async def _ask(self, request: bytes) -> bytes:
        """Ask. If the connection breaks, ask once more, because the daemon may have been restarted."""
        try:
            return await (await self._connected()).ask(request)
        except ConnectionResetError:
            return await (await self._connected()).ask(request)

    async def ask_alone(self, cmd: str, arguments: Mapping[str, Any], wait_s: float) -> Body:
        """Ask on a separate connection. If the caller is cancelled, the daemon drops the request."""
        async with self.ask_and_keep_open(cmd, arguments, wait_s) as (body, _):
            return body

    @contextlib.asynccontextmanager
    async def ask_and_keep_open(
        self, cmd: str, arguments: Mapping[str, Any], wait_s: float = 0.0, read_ahead_bytes: int = _LINE_BYTES_MAX
    ) -> AsyncIterator[tuple[Body, DaemonConnection]]:
        """Ask on a separate connection, which stays open until the block ends. `wait_s` is added to `REPLY_S`."""
        connection = DaemonConnection()
        try:
            async with asyncio.timeout(wait_s + REPLY_S):
                await connection.open(self.address, read_ahead_bytes // 2)
                connection.send(protocol.encode_request(cmd, None, arguments))
                body = body_of(await connection.read_line())
        except BadArgument as error:
            body = failure("bad_argument", str(error))
        except TimeoutError:
            body = self.unavailable(_TOO_LATE)
        except OSError as error:
            body = self.unavailable(_reason(error))
        except BaseException:
            connection.abort()
            raise
        try:
            yield body, connection
        finally:
            connection.abort()

    async def _connected(self) -> _Pipeline:
        async with self._connecting:
            if self._pipeline is None or self._pipeline.broken:
                connection = DaemonConnection()
                await connection.open(self.address)
                self._pipeline = _Pipeline(connection)
            return self._pipeline

    def close(self) -> None:
        """Close the shared connection. Idempotent; the next request opens another."""
        if self._pipeline is not None:
            self._pipeline.close()

    def unavailable(self, why: str) -> Body:
        return failure("unavailable", str(protocol.unavailable(self.address, why)))
