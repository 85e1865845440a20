"""What stands for a socket between a client and a fake: a transport for asyncio, and a socket that blocks.

Both take whole lines, and may be told of events from any thread. Must not know what a line says.
"""

import asyncio
import contextlib
import json
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any, Protocol


class End(Protocol):
    """The fake's end of it."""

    def take(self, line: bytes) -> None: ...
    def closed(self) -> None: ...
    def call(self, work: Callable[[], None]) -> None: ...


def encoded(fields: Mapping[str, Any]) -> bytes:
    return json.dumps(fields, separators=(",", ":")).encode() + b"\n"


class Transport(asyncio.Transport):
    """Stands between a protocol on an event loop and a fake. `end` is set right after."""

    end: End

    def __init__(self, protocol: asyncio.BufferedProtocol) -> None:
        super().__init__()
        self.loop = asyncio.get_running_loop()
        self._protocol = protocol
        self._lines: deque[bytes] = deque()
        self._closing = False
        self._cut = False

    # The protocol's side: on its loop.

    def write(self, data: bytes | bytearray | memoryview) -> None:
        for line in bytes(data).splitlines():
            if not self._closing:
                self.end.take(line)

    def get_write_buffer_size(self) -> int:
        return 0

    def is_closing(self) -> bool:
        return self._closing or self._cut

    def close(self) -> None:
        if not self._closing:
            self._closing = True
            self.end.closed()
            self._soon(self._protocol.connection_lost, None)

    def abort(self) -> None:
        self.close()

    # The fake's side: any thread.

    def send(self, fields: Mapping[str, Any]) -> None:
        self._lines.append(encoded(fields))
        self._soon(self._deliver)

    def cut(self) -> None:
        """Break it, once what was sent is there. From now on nobody takes it for usable."""
        self._cut = True
        self._soon(self.close)

    def later(self, seconds: float, call: Callable[[], None]) -> Callable[[], None]:
        timer = self.loop.call_later(seconds, self.end.call, call)
        return lambda: self._soon(timer.cancel)

    def _soon(self, call: Callable[..., object], *args: object) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed, and nobody there hears anything
            self.loop.call_soon_threadsafe(call, *args)

    def _deliver(self) -> None:
        while self._lines and not self._closing:
            data = self._lines.popleft()
            while data and not self._closing:
                room = memoryview(self._protocol.get_buffer(len(data)))
                part = data[: len(room)]
                room[: len(part)] = part
                self._protocol.buffer_updated(len(part))
                data = data[len(part) :]


class Socket:
    """Stands for a socket that a thread reads and writes. `end` is set right after."""

    end: End

    def __init__(self, timeout_s: float | None) -> None:
        self._timeout_s = timeout_s
        self._news = threading.Condition()
        self._data = bytearray()
        self._timers: dict[object, tuple[float, Callable[[], None]]] = {}
        self._closed = False

    def settimeout(self, timeout_s: float | None) -> None:
        self._timeout_s = timeout_s

    def sendall(self, data: bytes) -> None:
        if self._closed:
            raise BrokenPipeError("the fake registry is away")
        for line in data.splitlines():
            self.end.take(line)

    def recv(self, most: int) -> bytes:
        """Wait for what there is to read; b"" at the end."""
        until = None if self._timeout_s is None else time.monotonic() + self._timeout_s
        while True:
            self._ring()
            with self._news:
                if self._data or self._closed:
                    part = bytes(self._data[:most])
                    del self._data[:most]
                    return part
                if until is not None and time.monotonic() >= until:
                    raise TimeoutError("timed out")
                dues = [due for due, _ in self._timers.values()] + ([] if until is None else [until])
                self._news.wait(max(0.0, min(dues) - time.monotonic()) if dues else None)

    def _ring(self) -> None:
        with self._news:
            due = [each for each, (at, _) in self._timers.items() if at <= time.monotonic()]
            calls = [self._timers.pop(each)[1] for each in due]
        for call in calls:  # which may want the fake's lock: not under ours
            self.end.call(call)

    def close(self) -> None:
        self.cut()
        self.end.closed()

    # The fake's side: any thread.

    def send(self, fields: Mapping[str, Any]) -> None:
        with self._news:
            self._data += encoded(fields)
            self._news.notify_all()

    def cut(self) -> None:
        with self._news:
            self._closed = True
            self._news.notify_all()

    def later(self, seconds: float, call: Callable[[], None]) -> Callable[[], None]:
        token = object()
        with self._news:
            self._timers[token] = time.monotonic() + seconds, call
        return lambda: self._timers.pop(token, None) and None
