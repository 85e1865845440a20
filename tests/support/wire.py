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

TURNS_MAX = 20_000  # until the loop must have come to rest

_Result = TypeVar("_Result")
_Arguments = TypeVarTuple("_Arguments")


class TurningLoop(asyncio.SelectorEventLoop):
    """Turns when it is told to, knows when it is at rest, and calls threads in its own."""

    def __init__(self) -> None:
        super().__init__()
        self.flush_turns = 0  # how long a call in a thread takes
        self.errors: list[str] = []
        self._soon = 0
        self.set_exception_handler(self._told)

    def _told(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
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

        def call(turns: int) -> None:
            if turns:
                self.call_soon(call, turns - 1)
            elif not future.cancelled():
                try:
                    future.set_result(func(*args))
                except Exception as error:
                    future.set_exception(error)

        self.call_soon(call, self.flush_turns)
        return future

    def turn(self) -> bool:
        """Run what is due now, and return whether that left anything to do at once."""
        self.call_soon(self.stop)
        self._soon = 0
        self.run_forever()
        return self._soon > 0

    def rest(self) -> None:
        """Turn until there is nothing that is due at once."""
        left = TURNS_MAX

        def look() -> None:
            nonlocal left
            left -= 1
            if self._soon and left:
                self._soon = -1  # this call again is no sign of life
                self.call_soon(look)
            else:
                self.stop()

        self._soon = 1
        super().call_soon(look)
        self.run_forever()
        assert left, "the loop does not come to rest"


def _place(error: BaseException) -> str:
    trace, place = error.__traceback__, "nowhere"
    while trace is not None:
        place = f"{Path(trace.tb_frame.f_code.co_filename).name}:{trace.tb_lineno}"
        trace = trace.tb_next
    return place


class _Kernel:
    """What is asked of a socket: its family, and a descriptor that is quiet while the peer is there."""

    family = socket.AF_INET

    def __init__(self, wire: "Wire", quiet: int) -> None:
        self._wire = wire
        self._quiet = quiet

    def fileno(self) -> int:
        return -1 if self._wire.eof_sent or self._wire.is_reset else self._quiet


class Wire(asyncio.Transport):
    """Both ends of one connection. The lower half of the methods is the peer's.

    As asyncio's: one chunk a turn; nothing is read, and no end seen, while reading is paused; `connection_lost`
    comes in a turn of its own; a write after `write_eof` raises.
    """

    def __init__(self, loop: TurningLoop, quiet: int) -> None:
        super().__init__({"peername": ("127.0.0.1", 40_000), "socket": _Kernel(self, quiet)})
        self._loop = loop
        self.protocol: Connection
        self.low_priority = False
        self.sent = bytearray()  # has reached the peer
        self.taking = True  # the peer reads
        self.eof_sent = False  # the peer will send no more
        self.is_reset = False
        self.lost = False  # `connection_lost` was called
        self.half_closed = False  # by the daemon
        self._inbox: deque[bytes] = deque()
        self._buffer = bytearray()
        self._high = 65_536
        self._held = False  # the protocol was told to write no more
        self._reading = True
        self._eof_told = False
        self._closing = False
        self._ending = False  # `connection_lost` is on its way
        self._due = False

    # What the protocol may call.

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
        if self.taking and not self._buffer:
            self.sent += data
            return
        self._buffer += data
        if len(self._buffer) > self._high and not self._held:
            self._held = True
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
        return self._reading and not self._closing and not self._eof_told

    # What the kernel does.

    def _lose(self, error: Exception | None) -> None:
        if self._ending:
            return
        self._closing = self._ending = True
        self._buffer.clear()
        self._loop.call_soon(self._lost, error)

    def _lost(self, error: Exception | None) -> None:
        self.protocol.connection_lost(error)
        self.lost = True
        del self.protocol  # as asyncio does: the two must not keep each other

    def _deliver_soon(self) -> None:
        if not self._due:
            self._due = True
            self._loop.call_soon(self._deliver)

    def _deliver(self) -> None:
        self._due = False
        if self.is_reset and (self._buffer or self.is_reading()):
            self._lose(ConnectionResetError())
        elif not self.is_reading():
            return
        elif self._inbox:
            self.protocol.data_received(self._inbox.popleft())
            self._deliver_soon()
        elif self.eof_sent and not self._eof_told:
            self._eof_told = True
            if not self.protocol.eof_received():
                self.close()

    # What the peer does.

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

    def take(self, most: int | None = None) -> None:
        """Read some bytes, or all there are and all that come."""
        self.taking = most is None
        if self._ending:
            return
        if self.is_reset:
            self._deliver_soon()
            return
        self.sent += self._buffer[:most]
        del self._buffer[:most]
        if not self._buffer:
            if self._held:
                self._held = False
                self.protocol.resume_writing()
            if self._closing and not self._buffer:
                self._lose(None)
