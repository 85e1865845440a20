"""The peers' sockets: bytes in, bytes out, and their ends. A `Stream` is an asyncio transport.

asyncio's own cost more than all that regd does for a lookup: for each socket that is ready, a dozen calls between
the loop and the protocol. Here one callback of the loop serves all that are ready, from an epoll of their own.
Those of low priority have another one, and a bounded time in each turn of the loop, however many they are.
Must not know what the bytes mean.
"""

import asyncio
import contextlib
import errno
import logging
import select
import socket
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

log = logging.getLogger("regd")

_RECEIVED_BYTES_MAX = 16_384  # at a time
_READY_MAX = 64  # streams served at a time
_LOOKS = 2  # in one turn of the loop: while some are served, others become ready
_CALLERS_MAX = 64  # taken in one turn
_LOW_S = 0.001  # for streams of low priority, in one turn of the loop
_NO_FILES = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
_AGAIN_S = 1.0  # until callers are taken again, when there was no file for one
_IN, _OUT = 1, 4  # as EPOLLIN and EPOLLOUT
_NOBODY = asyncio.Protocol()


class Streams:
    """All streams of a daemon, in the running loop."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._listeners: list[socket.socket] = []
        self._served: dict[int, Stream] = {}  # by file number
        self._closed = False
        self._epoll = select.epoll() if hasattr(select, "epoll") else None
        if self._epoll is not None:
            self._loop.add_reader(self._epoll.fileno(), self._serve)
        self._low_epoll: select.epoll | None = None  # made with the first stream of low priority
        self._low_ready: deque[tuple[int, int]] = deque()  # to be served before others are asked for

    def listen(self, listener: socket.socket, protocol: Callable[[], asyncio.Protocol]) -> None:
        """Take callers, each with a protocol of its own."""
        listener.setblocking(False)
        self._listeners.append(listener)
        self._loop.add_reader(listener, self._take, listener, protocol)

    def deafen(self) -> None:
        """Take no more callers."""
        for listener in self._listeners:
            self._loop.remove_reader(listener)
        self._listeners.clear()

    def close(self) -> None:
        """Serve nobody any more."""
        self.deafen()
        self._closed = True
        if self._epoll is None:
            for file in self._served:
                self._loop.remove_reader(file)
                self._loop.remove_writer(file)
        for epoll in (self._epoll, self._low_epoll):
            if epoll is not None and not epoll.closed:
                self._loop.remove_reader(epoll.fileno())
                epoll.close()
        self._served.clear()

    def _take(self, listener: socket.socket, protocol: Callable[[], asyncio.Protocol]) -> None:
        for _ in range(_CALLERS_MAX):
            try:
                caller, address = listener.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as error:
                if error.errno not in _NO_FILES:
                    raise
                log.error("cannot take callers: %s; trying again in %g s", error.strerror, _AGAIN_S)
                self._loop.remove_reader(listener)
                self._loop.call_later(_AGAIN_S, self._take_again, listener, protocol)
                return
            caller.setblocking(False)
            if caller.family != socket.AF_UNIX:
                caller.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            stream = Stream(self, self._loop, caller, address, protocol())
            try:
                stream.begin()
            except Exception as error:
                self._failed(stream, error)

    def _take_again(self, listener: socket.socket, protocol: Callable[[], asyncio.Protocol]) -> None:
        if listener in self._listeners:
            self._loop.add_reader(listener, self._take, listener, protocol)

    def want(self, stream: "Stream", before: int, events: int) -> None:
        """Have a stream served when the system reports one of `events` for it."""
        file = stream.file
        if self._closed:
            return
        if events:
            self._served[file] = stream
        else:
            del self._served[file]
        epoll = self._epoll_of(stream)
        if epoll is None:  # not Linux: each is the loop's
            for event, add, remove in (
                (_IN, self._loop.add_reader, self._loop.remove_reader),
                (_OUT, self._loop.add_writer, self._loop.remove_writer),
            ):
                if events & event and not before & event:
                    add(file, self._serve_one, stream, event)
                elif before & event and not events & event:
                    remove(file)
        elif not before:
            epoll.register(file, events)
        elif events:
            epoll.modify(file, events)
        else:  # the system would report an end again and again
            epoll.unregister(file)

    def _epoll_of(self, stream: "Stream") -> "select.epoll | None":
        if self._epoll is None or not stream.low_priority:
            return self._epoll
        if self._low_epoll is None:
            self._low_epoll = select.epoll()
            self._loop.add_reader(self._low_epoll.fileno(), self._serve_low)
        return self._low_epoll

    def _serve(self) -> None:
        assert self._epoll is not None
        for _ in range(_LOOKS):
            for file, events in self._epoll.poll(0, _READY_MAX):
                stream = self._served.get(file)
                if stream is None:  # it was closed in this very turn
                    continue
                try:
                    stream.serve(events)
                except Exception as error:
                    self._failed(stream, error)

    def _serve_low(self) -> None:
        """Serve some; those behind them come first in the next turn of the loop, so that each gets its turn."""
        assert self._low_epoll is not None
        until = time.monotonic() + _LOW_S
        if not self._low_ready:
            self._low_ready.extend(self._low_epoll.poll(0, _READY_MAX))
        while self._low_ready:
            file, events = self._low_ready.popleft()
            stream = self._served.get(file)
            if stream is not None:  # another one of this number, perhaps: it finds nothing to do
                self._serve_one(stream, events)
            if time.monotonic() > until:
                return

    def _serve_one(self, stream: "Stream", events: int) -> None:
        try:
            stream.serve(events)
        except Exception as error:
            self._failed(stream, error)

    def _failed(self, stream: "Stream", error: Exception) -> None:
        """A bug in a connection closes that connection."""
        self._loop.call_exception_handler(
            {"message": "a connection failed", "exception": error, "transport": stream}
        )
        stream.abort()


class Stream(asyncio.Transport):
    """One connected socket. As with asyncio's, `write` sends what it can at once and keeps the rest."""

    __slots__ = (
        "_address",
        "_closing",
        "_events",
        "_high",
        "_loop",
        "_lost",
        "_low",
        "_out",
        "_paused",
        "_protocol",
        "_reading",
        "_shutting",
        "_socket",
        "_streams",
        "file",
        "low_priority",
    )

    def __init__(
        self,
        streams: Streams,
        loop: asyncio.AbstractEventLoop,
        connected: socket.socket,
        address: object,
        protocol: asyncio.Protocol,
    ) -> None:
        self._streams = streams
        self._loop = loop
        self._socket = connected
        self.file = connected.fileno()
        self._address = address
        self._protocol = protocol
        self.low_priority = False  # set by the protocol in `connection_made`: others are served first
        self._events = 0  # that it wants to be served for
        self._out: bytearray | None = None  # what the system did not take yet
        self._high, self._low = 65_536, 16_384
        self._paused = False  # the protocol was told to write no more
        self._reading = True
        self._shutting = False  # no more will be written
        self._closing = False
        self._lost = False  # the protocol was told, or is about to be

    def begin(self) -> None:
        self._protocol.connection_made(self)
        self._want()

    def serve(self, events: int) -> None:
        if events != _IN and self._out is not None:
            self._send()
        if not self._reading:  # from a moment ago
            return
        try:
            data = self._socket.recv(_RECEIVED_BYTES_MAX)
        except (BlockingIOError, InterruptedError):
            return
        except OSError as error:
            self._end(error)
            return
        if data:
            self._protocol.data_received(data)
        elif self._protocol.eof_received():
            self._reading = False
            self._want()
        else:
            self.close()

    def _want(self) -> None:
        events = 0 if self._lost else (_IN if self._reading else 0) | (_OUT if self._out is not None else 0)
        if events != self._events:
            before, self._events = self._events, events
            self._streams.want(self, before, events)

    # Writing.

    def write(self, data: bytes | bytearray | memoryview) -> None:
        if self._closing:
            return
        if self._out is None:
            try:
                sent = self._socket.send(data)
            except (BlockingIOError, InterruptedError):
                sent = 0
            except OSError as error:
                self._end(error)
                return
            if sent == len(data):
                return
            self._out = bytearray(memoryview(data)[sent:])
            self._want()
        else:
            self._out += data
        if len(self._out) > self._high and not self._paused:
            self._paused = True
            self._protocol.pause_writing()

    def _send(self) -> None:
        assert self._out is not None
        try:
            sent = self._socket.send(self._out)
        except (BlockingIOError, InterruptedError):
            return
        except OSError as error:
            self._end(error)
            return
        del self._out[:sent]
        if not self._out:
            self._out = None
            self._want()
            if self._shutting:
                self._shut_down()
            if self._closing:
                self._end(None)
                return
        if self._paused and self.get_write_buffer_size() <= self._low:
            self._paused = False
            self._protocol.resume_writing()

    def can_write_eof(self) -> bool:
        return True

    def write_eof(self) -> None:
        """Send no more behind what is still to be sent. Twice is harmless.

        Raises:
            OSError: the peer has reset the connection.
        """
        if self._shutting or self._closing:
            return
        self._shutting = True
        if self._out is None:
            self._socket.shutdown(socket.SHUT_WR)

    def _shut_down(self) -> None:
        with contextlib.suppress(OSError):  # the peer has reset it; its next look tells
            self._socket.shutdown(socket.SHUT_WR)

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        self._high = 65_536 if high is None else high
        self._low = self._high // 4 if low is None else low

    def get_write_buffer_size(self) -> int:
        return 0 if self._out is None else len(self._out)

    # Reading.

    def is_reading(self) -> bool:
        return self._reading and not self._closing

    def pause_reading(self) -> None:
        self._reading = False
        self._want()

    def resume_reading(self) -> None:
        """Read on. Not for a peer that has closed its side: it would be told so again."""
        self._reading = not self._closing
        self._want()

    # Ending.

    def is_closing(self) -> bool:
        return self._closing

    def close(self) -> None:
        """Close once everything is sent."""
        if not self._closing:
            self._closing = True
            self._reading = False
            if self._out is None:
                self._end(None)
            else:
                self._want()

    def abort(self) -> None:
        """Close now; what is not sent is lost."""
        self._end(None)

    def _end(self, error: OSError | None) -> None:
        if not self._lost:
            self._closing = self._lost = True
            self._reading = False
            self._out = None
            self._want()
            self._loop.call_soon(self._tell, error)

    def _tell(self, error: OSError | None) -> None:
        try:
            self._protocol.connection_lost(error)
        finally:
            self._socket.close()
            self._protocol = _NOBODY  # which knows this one: neither is left for the collector of garbage

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return self._infos().get(name, default)

    def _infos(self) -> Mapping[str, object]:
        return {"socket": self._socket, "peername": self._address}
