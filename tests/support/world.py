"""A daemon without sockets, threads, disk or time: a real `Daemon` on replaced system interfaces.

Deterministic, and fast enough for a thousand conversations a second.
"""

import asyncio
import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from regd.core.limits import Limits
from regd.server import half_closed
from regd.server.connection import Connections
from regd.server.daemon import Config, Daemon
from regd.storage.files import Files
from regd.system import probes, processes
from regd.testing.memory import MemoryFiles
from tests.support.clock import HandClock
from tests.support.daemon import EPOCH
from tests.support.peers import FakeCredentials
from tests.support.wire import SteppedLoop, Wire

REGISTRY = Path("/regd-fuzz/registry.json")


# Limits that small inputs reach.
TIGHT = Limits(
    line_bytes_max=700,
    requests_in_flight_max=3,
    writes_waiting_max=8,
    output_bytes_max=1_024,
    output_bytes_total_max=40_960,
    input_bytes_total_max=4_096,
    reply_instances_max=3,
    held_max=3,
    holders_max=2,
    watches_max=3,
    watches_total_max=4,
    journal_bytes_max=2_048,
    parked_max=3,
    parked_total_max=4,
    probes_max=2,
    registrations_max=8,
    processes_max=3,
)


class FullableFiles(MemoryFiles):
    """Files in memory, with one registry; while `failing` is set, the disk is full."""

    def __init__(self, registry: bytes) -> None:
        super().__init__()
        self.failing = False
        self.make_folder(REGISTRY.parent)
        fd = self.create(REGISTRY)
        self.write(fd, registry)
        self.close(fd)

    def write(self, fd: int, data: bytes) -> None:
        if self.failing:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        super().write(fd, data)

    def sync_folder(self, path: Path) -> None:
        if self.failing:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        super().sync_folder(path)


class _NoListeners:
    """Replaces the daemon's listening sockets."""

    def __init__(self) -> None:
        self.sockets: list[Any] = []
        self.notes: list[str] = []

    def open_tcp(self, port: int) -> None:
        pass

    def close(self, files: Files) -> None:
        pass


class _NoThread:
    """In place of the engine's thread: calls are made in the loop's own thread, after some iterations."""

    def call(self, function: Callable[..., None], *arguments: Any) -> "asyncio.Future[None]":
        return asyncio.get_running_loop().run_in_executor(None, function, *arguments)

    def close(self) -> None:
        pass


class World:
    """A daemon with its loop, disk and clock. `connect` opens a connection to it."""

    def __init__(self, registry: bytes, limits: Limits = TIGHT) -> None:
        self.loop = SteppedLoop()
        self.clock = HandClock()
        self.files = FullableFiles(registry)
        self._quiet = os.eventfd(0)  # never readable
        peers = FakeCredentials()
        peers.uid = 0
        config = Config(registry=REGISTRY, port=0, limits=limits)

        async def start() -> Daemon:
            server = Daemon(config, clock=self.clock, files=self.files, epoch=EPOCH, peers=peers)
            server._listeners = _NoListeners()  # type: ignore[assignment]
            server._engine._thread = _NoThread()  # type: ignore[assignment]
            await server.start()
            return server

        self.server = self.loop.run_until_complete(start())
        self.connections: Connections = self.server._connections
        self.parts = self.connections.parts

    def connect(self) -> Wire:
        wire = Wire(self.loop, self._quiet)
        wire.protocol = self.connections.create()
        self.loop.call_soon(wire.protocol.connection_made, wire)
        return wire

    def do(self, action: Callable[[], object]) -> None:
        """Call a function inside the loop, in one iteration."""
        self.loop.call_soon(action)
        self.loop.run_once()

    def settle(self) -> None:
        """Run the loop until only timers are left."""
        self.loop.run_until_idle()

    def pass_time(self, seconds: float) -> None:
        self.do(lambda: self.clock.advance(seconds))
        self.settle()

    def end_processes(self) -> None:
        for file in list(self.parts.reaper.processes._files.values()):
            os.eventfd_write(file, 1)
        self.loop.run_once()  # the selector is polled once in an iteration
        self.settle()

    @property
    def timers(self) -> list[object]:
        """The pending timers' callbacks, except those of the loop monitor."""
        calls = [timer.call for _, _, timer in self.clock._timers if timer.call is not None]
        return [call for call in calls if not call.__qualname__.startswith("LoopMonitor.")]

    def stop(self) -> None:
        try:
            self.loop.run_until_complete(self.server.stop())
            self.settle()
        finally:
            self.loop.close()
            os.close(self._quiet)


# Fakes of the system: processes with an even pid run, and addresses with an even port accept connections.


def _pidfd_open(pid: int, flags: int = 0) -> int:
    if pid % 2:
        raise ProcessLookupError(3, os.strerror(3))
    return os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)


async def _connect(address: probes.Address, timeout_s: float) -> str:
    await asyncio.sleep(0)
    return "connection refused" if address[1] % 2 else ""


_FAKES: tuple[tuple[Any, str, object], ...] = (
    (os, "pidfd_open", _pidfd_open),
    (processes, "start_ticks", str),
    (processes, "boot_id", lambda: "boot"),
    (probes, "_connect", _connect),
    (half_closed, "CHECK_S", 900.0),  # every conversation with a wait advances time by an hour
)


@contextmanager
def faked_system() -> Iterator[None]:
    """Replace the system calls by which the daemon checks processes and addresses."""
    with pytest.MonkeyPatch.context() as patch:
        for module, name, fake in _FAKES:
            patch.setattr(module, name, fake)
        yield
