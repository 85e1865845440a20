"""An event loop that runs one iteration at a time, and connections in it without a socket.

`Wire` behaves like asyncio's socket transport, as seen from the protocol.
"""

import asyncio
import socket
from collections import deque
from collections.abc import Callable
from concurrent.futures import Executor
from contextvars import Context as Variables
from pathlib import Path
from typing import Any, TypeVar, TypeVarTuple

from regd.server.connection import Connection

ITERATIONS_MAX = 20_000  # after which the loop must be idle

_Result = TypeVar("_Result")
_Arguments = TypeVarTuple("_Arguments")


class SteppedLoop(asyncio.SelectorEventLoop):
    """An event loop that runs single iterations on request, and thread pool calls in the loop's own thread."""

    def __init__(self) -> None:
        super().__init__()
        self.flush_iterations = 0  # the duration of a call in the thread pool
        self.errors: list[str] = []
        self._soon = 0
        self.set_exception_handler(self._record_error)

    def _record_error(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        self.errors.append(f"{context.get('message')}: {context.get('exception')!r}")
        if isinstance(error := context.get("exception"), BaseException):
            error.__context__ = None
            self.errors[-1] += f" at {_place(error)}"

    def call_soon(  # type: ignore[override]  # the stub's is generic
        self, callback: Callable[..., object], *args: Any, context: Variables | None = None
    ) -> asyncio.Handle:
        self._soon += 1
        return super().call_soon(callback, *args, context=context)

    def run_in_executor(
        self,
        executor: Executor | None,
        func: Callable[[*_Arguments], _Result],
        *args: *_Arguments,
    ) -> "asyncio.Future[_Result]":
        future: asyncio.Future[_Result] = self.create_future()

        def call(iterations_left: int) -> None:
            if iterations_left:
                self.call_soon(call, iterations_left - 1)
            elif not future.cancelled():
                try:
                    future.set_result(func(*args))
                except Exception as error:
                    future.set_exception(error)

        self.call_soon(call, self.flush_iterations)
        return future

    def run_once(self) -> bool:
        """Run one iteration, and return whether it scheduled more callbacks."""
        self.call_soon(self.stop)
        self._soon = 0
        self.run_forever()
        return self._soon > 0

    def run_until_idle(self) -> None:
        """Run iterations until no callback is ready."""
        left = ITERATIONS_MAX

        def check() -> None:
            nonlocal left
            left -= 1
            if self._soon and left:
                self._soon = -1  # do not count the next check
                self.call_soon(check)
            else:
                self.stop()

        self._soon = 1
        super().call_soon(check)
        self.run_forever()
        assert left, "the loop does not become idle"


def _place(error: BaseException) -> str:
    trace, place = error.__traceback__, "nowhere"
    while trace is not None:
        place = f"{Path(trace.tb_frame.f_code.co_filename).name}:{trace.tb_lineno}"
        trace = trace.tb_next
    return place


class _Kernel:
    """The socket of a `Wire`, as far as the daemon uses it: the family, and a descriptor that is never readable."""

    family = socket.AF_INET

    def __init__(self, wire: "Wire", quiet: int) -> None:
        self._wire = wire
        self._quiet = quiet

    def fileno(self) -> int:
        return -1 if self._wire.eof_sent or self._wire.is_reset else self._quiet


class Wire(asyncio.Transport):
    """Both ends of one connection. The last group of methods is the peer's.

    It behaves like asyncio's transport: it delivers one chunk in a loop iteration, and neither data nor EOF while
    reading is paused; `connection_lost` is called in a later iteration; a write after `write_eof` raises.
    """

    def __init__(self, loop: SteppedLoop, quiet: int) -> None:
        super().__init__({"peername": ("127.0.0.1", 40_000), "socket": _Kernel(self, quiet)})
        self._loop = loop
        self.protocol: Connection
        self.low_priority = False
        self.sent = bytearray()  # received by the peer
        self.peer_reads = True
        self.eof_sent = False  # by the peer
        self.is_reset = False
        self.lost = False  # `connection_lost` was called
        self.half_closed = False  # by the daemon
        self._inbox: deque[bytes] = deque()
        self._buffer = bytearray()
        self._high = 65_536
        self._writing_paused = False
        self._reading = True
        self._eof_delivered = False
        self._closing = False
        self._ending = False  # `connection_lost` is scheduled
        self._delivery_scheduled = False

    # Called by the protocol.

    def get_write_buffer_size(self) -> int:
        return len(self._buffer)

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        assert high is not None
        assert low == 0
        self._high = high

    def is_closing(self) -> bool:
        return self._closing

    def can_write_eof(self) -> bool:
        return True

    def write(self, data: Any) -> None:
        assert type(data) is bytes
        if self.half_closed:
            raise RuntimeError("Cannot call write() after write_eof()")
        if self._ending or not data:
            return
        if self.is_reset:
            self._lose(BrokenPipeError())
            return
        if self.peer_reads and not self._buffer:
            self.sent += data
            return
        self._buffer += data
        if len(self._buffer) > self._high and not self._writing_paused:
            self._writing_paused = True
            self.protocol.pause_writing()

    def write_eof(self) -> None:
        if not self._closing:
            self.half_closed = True

    def close(self) -> None:
        if self._closing:
            return
        self._closing = True
        if not self._buffer:
            self._lose(None)

    def abort(self) -> None:
        self._lose(None)

    def pause_reading(self) -> None:
        if not self._closing:
            self._reading = False

    def resume_reading(self) -> None:
        if not self._closing and not self._reading:
            self._reading = True
            self._deliver_soon()

    def is_reading(self) -> bool:
        return self._reading and not self._closing and not self._eof_delivered

    # The kernel's part.

    def _lose(self, error: Exception | None) -> None:
        if self._ending:
            return
        self._closing = self._ending = True
        self._buffer.clear()
        self._loop.call_soon(self._lost, error)

    def _lost(self, error: Exception | None) -> None:
        self.protocol.connection_lost(error)
        self.lost = True
        del self.protocol  # as asyncio does, to break the reference cycle

    def _deliver_soon(self) -> None:
        if not self._delivery_scheduled:
            self._delivery_scheduled = True
            self._loop.call_soon(self._deliver)

    def _deliver(self) -> None:
        self._delivery_scheduled = False
        if self.is_reset and (self._buffer or self.is_reading()):
            self._lose(ConnectionResetError())
        elif not self.is_reading():
            return
        elif self._inbox:
            self.protocol.data_received(self._inbox.popleft())
            self._deliver_soon()
        elif self.eof_sent and not self._eof_delivered:
            self._eof_delivered = True
            if not self.protocol.eof_received():
                self.close()

    # Called by the peer.

    def send(self, data: bytes) -> None:
        if data and not (self.eof_sent or self.is_reset):
            self._inbox.append(data)
            self._deliver_soon()

    def end(self) -> None:
        self.eof_sent = True
        self._deliver_soon()

    def reset(self) -> None:
        self.is_reset = True
        self._inbox.clear()
        self._deliver_soon()

    def take(self, bytes_max: int | None = None) -> None:
        """Read at most `bytes_max` bytes; with None read everything, now and from now on."""
        self.peer_reads = bytes_max is None
        if self._ending:
            return
        if self.is_reset:
            self._deliver_soon()
            return
        self.sent += self._buffer[:bytes_max]
        del self._buffer[:bytes_max]
        if not self._buffer:
            if self._writing_paused:
                self._writing_paused = False
                self.protocol.resume_writing()
            if self._closing and not self._buffer:
                self._lose(None)
