"""A daemon without sockets, threads, disk or time: put together by `Server` itself, on doors that are faked below it.

Quick enough for a thousand conversations a second, and the same every time. `Wire` behaves as asyncio's transport of
a socket does, seen from the protocol: what it is told when, and what it may not do any more. Must not know what the
bytes mean.
"""

import asyncio
import itertools
import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Executor
from contextlib import contextmanager
from contextvars import Context as Variables
from pathlib import Path
from typing import Any, TypeVar, TypeVarTuple

from regd.core.limits import Limits
from regd.server import probes, processes
from regd.server.connection import Connection
from regd.server.context import Context
from regd.server.lifecycle import Config, Server
from regd.storage.files import Files, Print
from tests.support.clock import HandClock
from tests.support.daemon import EPOCH
from tests.support.peers import Told

REGISTRY = Path("/regd-fuzz/registry.json")
TURNS_MAX = 20_000  # until the loop must have come to rest

_Result = TypeVar("_Result")
_Arguments = TypeVarTuple("_Arguments")

# Small, so that small inputs reach them.
TIGHT = Limits(
    line_bytes_max=700,
    requests_in_flight_max=3,
    writes_waiting_max=8,
    output_bytes_max=1_024,
    output_bytes_total_max=16_384,
    input_bytes_total_max=4_096,
    reply_instances_max=3,
    held_max=3,
    holders_max=2,
    watches_max=3,
    watches_total_max=4,
    parked_max=3,
    parked_total_max=4,
    probes_max=2,
    registrations_max=8,
    processes_max=3,
)


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

    def run_in_executor(  # a future, which the stub makes a coroutine's
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


def _place(error: BaseException) -> str:
    trace, place = error.__traceback__, "nowhere"
    while trace is not None:
        place = f"{Path(trace.tb_frame.f_code.co_filename).name}:{trace.tb_lineno}"
        trace = trace.tb_next
    return place


class _Kernel:
    """What `is_cut` asks of a socket: a descriptor that is quiet while the peer is there."""

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


class MemoryFiles(Files):
    """The door to files that are in memory; `failing` makes the disk full."""

    def __init__(self, registry: bytes) -> None:
        self.failing = False
        self.contents: dict[Path, tuple[bytes, int]] = {REGISTRY: (registry, 0)}
        self._open: dict[int, Path] = {}
        self._count = itertools.count(1)

    def make_folder(self, path: Path) -> None:
        pass

    def lock(self, path: Path) -> int:
        return -1

    def unlock(self, fd: int) -> None:
        pass

    def read(self, path: Path) -> bytes:
        return self.contents[path][0]

    def create(self, path: Path) -> int:
        fd = next(self._count)
        self._open[fd] = path
        self.contents[path] = (b"", fd)
        return fd

    def write(self, fd: int, data: bytes) -> None:
        if self.failing:
            raise OSError(28, os.strerror(28))
        path = self._open[fd]
        self.contents[path] = (self.contents[path][0] + data, fd)

    def sync(self, fd: int) -> None:
        pass

    def close(self, fd: int) -> None:
        del self._open[fd]

    def rename(self, source: Path, target: Path) -> None:
        self.contents[target] = self.contents.pop(source)

    def sync_folder(self, path: Path) -> None:
        if self.failing:
            raise OSError(5, os.strerror(5))

    def remove(self, path: Path) -> None:
        del self.contents[path]

    def print(self, file: Path | int) -> Print | None:
        path = self._open[file] if isinstance(file, int) else file
        found = self.contents.get(path)
        return Print(found[1], len(found[0]), 0, True) if found else None


class _NoListeners:
    """Stands where the listening sockets are: nobody can call."""

    def __init__(self) -> None:
        self.sockets: list[Any] = []
        self.notes: list[str] = []

    def open_tcp(self, port: int) -> None:
        pass

    def deepen(self) -> None:
        pass

    def close(self, files: Files) -> None:
        pass


class World:
    """A daemon, its disk and its time. Connections are made with `connect`."""

    def __init__(self, registry: bytes, limits: Limits = TIGHT) -> None:
        self.loop = TurningLoop()
        self.clock = HandClock()
        self.files = MemoryFiles(registry)
        self._quiet = os.eventfd(0)  # never readable
        peers = Told()
        peers.uid = 0
        self.server = Server(
            Config(registry=REGISTRY, port=0, limits=limits),
            clock=self.clock,
            files=self.files,
            epoch=EPOCH,
            peers=peers,
        )
        self.server._listeners = _NoListeners()  # type: ignore[assignment]
        self.loop.run_until_complete(self.server.start())
        assert self.server._context is not None
        self.context: Context = self.server._context

    def connect(self) -> Wire:
        wire = Wire(self.loop, self._quiet)
        wire.protocol = Connection(self.context)
        self.loop.call_soon(wire.protocol.connection_made, wire)
        return wire

    def do(self, action: Callable[[], object]) -> None:
        """Have something happen inside the loop, and let that turn once."""
        self.loop.call_soon(action)
        self.loop.turn()

    def settle(self) -> None:
        """Turn until there is nothing to do but wait."""
        for _ in range(TURNS_MAX):
            if not self.loop.turn():
                return
        raise AssertionError("the loop does not come to rest")

    def pass_time(self, seconds: float) -> None:
        self.do(lambda: self.clock.advance(seconds))
        self.settle()

    def end_processes(self) -> None:
        for file in list(self.context.reaper.processes._files.values()):
            os.eventfd_write(file, 1)
        self.loop.turn()  # the selector looks once a turn
        self.settle()

    @property
    def timers(self) -> list[object]:
        """What time will still call."""
        return [timer.call for _, _, timer in self.clock._timers if timer.call is not None]

    def stop(self) -> None:
        try:
            self.loop.run_until_complete(self.server.stop())
            self.settle()
        finally:
            self.loop.close()
            os.close(self._quiet)


# What the system says of processes and addresses: even ones live, and accept.


def _pidfd_open(pid: int, flags: int = 0) -> int:
    if pid % 2:
        raise ProcessLookupError(3, os.strerror(3))
    return os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)


async def _connect(address: probes.Address, timeout_s: float) -> str:
    await asyncio.sleep(0)
    return "connection refused" if address[1] % 2 else ""


_FAKES: tuple[tuple[Any, str, object], ...] = (
    (os, "pidfd_open", _pidfd_open),
    (processes, "_start_ticks", str),
    (processes, "boot_id", lambda: "boot"),
    (probes, "_connect", _connect),
)


@contextmanager
def faked_system() -> Iterator[None]:
    """Let the daemon ask us where it would ask the system about processes and addresses."""
    before = [getattr(where, name) for where, name, _ in _FAKES]
    try:
        for where, name, fake in _FAKES:
            setattr(where, name, fake)
        yield
    finally:
        for (where, name, _), was in zip(_FAKES, before, strict=True):
            setattr(where, name, was)
