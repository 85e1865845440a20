"""One asyncio connection that many tasks share: it routes replies to their callers and events to their watches.

Requests and replies are matched by id, so that cancelling one caller does not affect the others. Requests made in
the same iteration of the event loop are sent together.
"""

import asyncio
import os
import socket
import struct
import time
import weakref
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, cast

from regd_client import protocol, replies
from regd_client.errors import RegdError, Unavailable, from_reply
from regd_client.protocol import Address

__all__ = ["Connection", "OnFields", "OnLost", "abort_all"]

HANGS_S = 9.0  # a daemon that sends nothing for this long while a request waits is considered hung
_RECHECK_S = 0.25  # before the second check: input may be unread, if the event loop was blocked
_CLOSE_S = 1.0  # time for the daemon to read the remaining output
_RESET = struct.pack("ii", 1, 0)  # SO_LINGER with a timeout of 0: close() sends a reset (socket(7))
_CHUNK_BYTES = 16_384  # maximum size of one read

OnFields = Callable[[dict[str, Any]], None]


class _WaitingRequest(NamedTuple):
    """A request that waits for its reply, which is due at `due_at` (`time.monotonic`)."""

    reply: "asyncio.Future[dict[str, Any]]"
    due_at: float
    cached: bool
    cmd: str
    arguments: dict[str, Any]


class Connection(asyncio.BufferedProtocol):
    """A connection to a daemon. `Connection.open` creates one.

    Attributes:
        closed: a future that is done once the socket is closed.
        heard_at: when the daemon last sent anything (`time.monotonic`).
        ended_at: when the connection broke, or when a hung daemon last sent anything; None while the connection
            is usable.
        shares_processes: whether the daemon can see this process; None if that is not known yet.
    """

    def __init__(self, address: Address, on_lost: "OnLost") -> None:
        self.address = address
        self.heard_at = time.monotonic()
        self.received = False  # whether the other end has sent any byte
        self.ended_at: float | None = None
        self.shares_processes: bool | None = None
        self._on_lost = on_lost
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._waiting: dict[int, _WaitingRequest] = {}  # by id
        self._on_reply: dict[int, OnFields | None] = {}  # by id; None: the watch was ended before the reply
        self._watches: dict[int, OnFields] = {}
        self._id = 0
        self._output: list[bytes] = []
        self._single = False  # only one request was waiting at the last flush
        # All input goes through this buffer. asyncio would allocate 256 KiB for each read, for which malloc often
        # calls mmap and munmap. That takes 20 of the 90 µs of a request.
        self._chunk = memoryview(bytearray(_CHUNK_BYTES))
        self._line_start = bytearray()  # the incomplete line at the end of the input
        self._error: RegdError | None = None  # why the connection is unusable
        self._watchdog: asyncio.TimerHandle | None = None
        self._suspects_hang = False  # the previous check found no input
        self.closed: asyncio.Future[None] = self._loop.create_future()

    def __repr__(self) -> str:
        state = "usable" if self.usable else f"broken: {self._error}" if self._error else "not connected"
        return f"<Connection to {self.address}, {state}>"

    @classmethod
    async def open(cls, address: Address, on_lost: "OnLost") -> "Connection":
        """Connect once. `on_lost` is called with each `lost` event.

        Raises:
            OSError: the connection failed.
        """
        loop = asyncio.get_running_loop()
        if address.path:
            with protocol.connectable(address.path) as path:
                _, connection = await loop.create_unix_connection(lambda: cls(address, on_lost), path)
        else:
            _, connection = await loop.create_connection(
                lambda: cls(address, on_lost), address.host, address.port
            )
        return connection

    @property
    def usable(self) -> bool:
        return self._error is None and self._transport is not None and not self._transport.is_closing()

    def ask(
        self, cmd: str, arguments: dict[str, Any], on_reply: OnFields | None = None, cached: bool = False
    ) -> "asyncio.Future[dict[str, Any]]":
        """Send a request, and return a future for its reply.

        `on_reply` is called with a successful reply, in the order of the daemon's replies, even if the caller was
        cancelled. For `watch`, it is then called with every event. With `cached`, callers share one dictionary
        for equal replies, without `id`: never modify it.

        Raises:
            RegdError: the connection is already broken. The future raises it if the daemon refuses the request,
                or if the connection breaks before the reply.
        """
        if self._error is not None:
            raise _copy(self._error)
        self._id += 1
        line = protocol.cached_request(cmd, self._id, arguments)
        reply = self._loop.create_future()
        due_at = time.monotonic() + (arguments.get("wait") or 0.0)
        self._waiting[self._id] = _WaitingRequest(reply, due_at, cached, cmd, arguments)
        if on_reply is not None:
            self._on_reply[self._id] = on_reply
        if self._watchdog is None:
            self._watchdog = self._loop.call_later(HANGS_S, self._check)
        self._output.append(line)
        if self._single and len(self._waiting) == 1:
            self._flush()  # there is probably only one caller, so no other request to send with this one
        elif len(self._output) == 1:
            self._loop.call_soon(self._flush)
        return reply

    async def explained(self, error: RegdError, cmd: str, arguments: Mapping[str, Any]) -> RegdError:
        """Return the error to raise for a refused request: `unsupported` if the daemon is too old for it."""
        part = protocol.unsupported_part(cmd, arguments, {"error": error.code, **error.details})
        if part is None:
            return error
        try:
            hello, described = await self.ask("hello", {}), await self.ask("help", {})
        except RegdError:
            return error
        refusal = protocol.unsupported(self.address, cmd, part, hello, described)
        return error if refusal is None else from_reply(refusal)

    def post(self, cmd: str, arguments: dict[str, Any]) -> None:
        """Send a request and ignore its reply."""
        if self.usable:
            self.ask(cmd, arguments).add_done_callback(lambda reply: reply.cancelled() or reply.exception())

    def unwatch(self, on_reply: OnFields) -> None:
        """End the watch with this callback, even if the daemon has not confirmed the watch yet."""
        for id, listener in self._on_reply.items():
            if listener == on_reply:
                self._on_reply[id] = None
        for watch in [watch for watch, listener in self._watches.items() if listener == on_reply]:
            del self._watches[watch]
            self.post("unwatch", {"watch": watch})

    def abort(self, why: str, ended_at: float | None = None) -> None:
        """Abort the connection. Requests that wait fail with `why` in their error."""
        self._break(protocol.unavailable(self.address, why), ended_at)
        if self._transport is not None:
            self._transport.abort()

    def end(self) -> None:
        """Close the connection without waiting. Buffered output is still sent."""
        self._flush()
        self._reset_if_only_waiting()
        self._break(Unavailable(f"the connection to regd at {self.address} was closed here"))

    async def close(self) -> None:
        """Close the connection, and wait up to 1 s for the daemon to read the output. Idempotent."""
        self.end()
        if self._transport is None:
            return
        try:
            async with asyncio.timeout(_CLOSE_S):
                await asyncio.shield(self.closed)
        except TimeoutError:
            pass
        finally:
            self._transport.abort()
        await asyncio.shield(self.closed)

    def _reset_if_only_waiting(self) -> None:
        """If all requests without a reply are still within their `wait`, let the socket close with a reset.

        The daemon then drops these requests at once. After an ordinary close it would keep them, because a client
        that has closed its socket looks like one that has only stopped sending.
        """
        now = time.monotonic()
        if (
            not self.usable
            or not self._waiting
            or any(request.due_at <= now for request in self._waiting.values())
        ):
            return
        assert self._transport is not None
        sock = self._transport.get_extra_info("socket")
        if self._transport.get_write_buffer_size() == 0 and sock.family != socket.AF_UNIX:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)

    def _flush(self) -> None:
        self._single = len(self._waiting) == 1
        if self._output and self.usable:
            assert self._transport is not None
            self._transport.write(b"".join(self._output))
        self._output.clear()

    def _check(self) -> None:
        """Abort the connection if a reply is overdue and the daemon has sent nothing for too long."""
        self._watchdog = None
        if not self._waiting or self._error is not None:
            return
        silent_since = max(self.heard_at, min(request.due_at for request in self._waiting.values()))
        left_s = silent_since + HANGS_S - time.monotonic()
        if left_s <= 0 and self._suspects_hang:
            self.abort(f"no answer for {HANGS_S:g} s", self.heard_at)
            return
        self._suspects_hang = left_s <= 0
        self._watchdog = self._loop.call_later(min(left_s, HANGS_S) if left_s > 0 else _RECHECK_S, self._check)

    # asyncio.BufferedProtocol.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        _OPEN.add(self)

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._chunk

    def buffer_updated(self, nbytes: int) -> None:
        self.received = True
        first, *lines = bytes(self._chunk[:nbytes]).split(b"\n")
        if not lines:
            if not self._line_start:  # further parts of an endless line do not prove that the daemon works
                self.heard_at = time.monotonic()
            self._line_start += first
            if len(self._line_start) > protocol.REPLY_BYTES_MAX:
                self._break(protocol.not_a_reply("a line without an end"))
            return
        last = lines.pop()
        if self._line_start:
            first = bytes(self._line_start) + first
        self._line_start[:] = last
        self._take_line(first)
        for line in lines:
            self._take_line(line)

    def _take_line(self, line: bytes) -> None:
        if self._error is not None:
            return
        id, text = protocol.split_reply(line)
        request = self._waiting.get(id)
        try:
            if request is not None and request.cached:
                self._take_reply(id, request, protocol.cached_reply(text))
                return
            fields = protocol.decode_line(line)
            if "event" in fields:
                self._take_event(fields)
            elif "id" in fields:
                id = fields["id"]
                if type(id) is not int or (request := self._waiting.get(id)) is None:
                    raise protocol.not_a_reply(f"no request has id {id!r:.40}")
                self._take_reply(id, request, protocol.check_result(request.cmd, request.arguments, fields))
            elif fields["ok"]:
                raise protocol.not_a_reply("id is missing", line)
            else:
                self._break(protocol.refused(self.address, fields))
        except Unavailable as error:
            self._break(error)

    def _take_reply(self, id: int, request: _WaitingRequest, fields: dict[str, Any]) -> None:
        self.heard_at = time.monotonic()
        del self._waiting[id]
        if id in self._on_reply:
            self._call_on_reply(self._on_reply.pop(id), request.cmd, fields)
        if request.reply.done():  # the caller was cancelled
            return
        if fields["ok"]:
            request.reply.set_result(fields)
        else:
            request.reply.set_exception(protocol.refusal(fields, self.address))

    def _take_event(self, event: dict[str, Any]) -> None:
        kind = event["event"]
        if kind == "lost":
            self._on_lost(self, event)
        elif replies.is_known_event(kind):
            on_event = self._watches.get(event["watch"])
            if on_event is not None:  # an event of an unknown watch does not prove that the daemon works
                self.heard_at = time.monotonic()
                on_event(event)

    def _call_on_reply(self, on_reply: OnFields | None, cmd: str, fields: dict[str, Any]) -> None:
        if not fields["ok"]:
            return
        if on_reply is None:
            if cmd == "watch":
                self.post("unwatch", {"watch": fields["watch"]})
            return
        if cmd == "watch":
            self._watches[fields["watch"]] = on_reply
        on_reply(fields)

    def eof_received(self) -> None:
        self._handle_break()  # asyncio calls `connection_lost` later

    def connection_lost(self, exc: Exception | None) -> None:
        _OPEN.discard(self)
        self._handle_break()
        if not self.closed.done():
            self.closed.set_result(None)

    def _handle_break(self) -> None:
        why = "the connection broke before the reply; the change may or may not have been made"
        self._break(protocol.unavailable(self.address, why))

    def _break(self, error: RegdError, ended_at: float | None = None) -> None:
        """Fail the requests that wait, and all later requests, with this error. Idempotent."""
        if self._error is None:
            self._error = error
            self.ended_at = time.monotonic() if ended_at is None else ended_at
        requests, self._waiting = self._waiting, {}
        self._watches.clear()
        self._on_reply.clear()
        for request in requests.values():
            if not request.reply.done():
                request.reply.set_exception(_copy(error))
        if self._watchdog is not None:
            self._watchdog.cancel()
            self._watchdog = None
        if self._transport is not None:
            self._transport.close()

    def _release_in_child(self) -> None:
        """In a forked child, close the parent's socket without sending anything and without an event loop."""
        self._error = Unavailable("the connection belongs to the parent process of this fork")
        self.ended_at = time.monotonic()
        sock = self._transport.get_extra_info("socket") if self._transport is not None else None
        if sock is not None and sock.fileno() >= 0:
            # Replace the socket behind the descriptor, which the transport still owns.
            null = os.open(os.devnull, os.O_RDWR)
            os.dup2(null, sock.fileno(), inheritable=False)
            os.close(null)


OnLost = Callable[[Connection, dict[str, Any]], None]
_OPEN: "weakref.WeakSet[Connection]" = weakref.WeakSet()


async def abort_all(why: str) -> None:
    """Abort all connections of this event loop, and wait until their sockets are closed."""
    loop = asyncio.get_running_loop()
    connections = [connection for connection in _OPEN if connection._loop is loop]
    for connection in connections:
        connection.abort(why)
    await asyncio.gather(*(asyncio.shield(connection.closed) for connection in connections))


def _release_all_in_child() -> None:
    for connection in list(_OPEN):
        connection._release_in_child()
    _OPEN.clear()


os.register_at_fork(after_in_child=_release_all_in_child)


def _copy(error: RegdError) -> RegdError:
    """Return a copy of the error for one caller, since raising the same object twice would mix the tracebacks."""
    return type(error)(str(error), error.code, error.details)
