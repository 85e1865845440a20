"""A registry in the caller's process: the real daemon in a thread, with its file in memory, on a Unix socket.

    from regd.testing import in_process

    with in_process.running() as registry:
        registry.register("db", 5432)
        assert regd_client.blocking.resolve("db").port == 5432
        registry.kill("db")

This registry is meant for unit tests: it starts in a few milliseconds, and a test can simulate crashes and the
passage of time. Within the `with`, it changes the environment variables `REGD_ADDRESS` and `REGD_AUTOSTART`, and
no other state of the process. The daemon logs to the logger `regd`.
"""

import asyncio
import contextlib
import heapq
import itertools
import logging
import os
import socket
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Callable, Coroutine, Iterator
from typing import Any, TypeVar

from regd.core.errors import Refused
from regd.core.model import Reason
from regd.core.transaction import Transaction
from regd.server.daemon import Config, Daemon
from regd.testing.host_process import HostError
from regd.testing.memory import IN_MEMORY, MemoryFiles, excerpt
from regd.testing.registry import Registry, found_by_children
from regd_client.errors import Unavailable, from_reply

log = logging.getLogger("regd")

_BACKLOG = 4_096
_FOLDER_BYTES_MAX = 70  # of the temporary folder's path, since a socket's path has at most 103 bytes on macOS

T = TypeVar("T")


class InProcessRegistry(Registry):
    """A registry in this process, created by `running`.

    Any thread may call its methods, with or without an event loop. No method sleeps.
    """

    def __init__(self) -> None:
        self._pid = os.getpid()
        self._lock = threading.Lock()  # held during each call
        self._files = MemoryFiles()
        self._folder = tempfile.TemporaryDirectory(prefix="regd-", dir=_short_folder())
        self._socket = os.path.join(self._folder.name, "regd.sock")
        self._server: Daemon | None = None
        self._failure: Exception | None = None
        self._failure_task: asyncio.Task[None] | None = None
        self._thread = _LoopThread()
        self._clock = _Clock(self._thread.loop)
        super().__init__(f"unix://{self._socket}", None)
        try:
            self.start()
        except BaseException:
            self.end()
            raise
        _LIVING.add(self)

    @property
    def port(self) -> int:
        raise AttributeError(f"{self!r} has no port; use its address")

    # Simulate the end of registrations.

    def kill(self, name: str, instance: str | None = None) -> None:
        """End a registration as if its process had been killed: `down` with the reason `process exited`.

            registry.register("db", 5432)
            registry.kill("db")
            regd_client.blocking.resolve("db")  # NotFound: its process exited

        It does not matter which client made the registration, or with which options. The client keeps its other
        registrations. The client is not notified, and registers again when it reconnects, for example after
        `cut`.

        Args:
            name: the service's name.
            instance: the name of the instance; by default "".

        Raises:
            NotFound: there is no such registration.
            Unavailable: the registry is stopped.
        """
        self._end_registration(name, instance, Reason.EXITED)

    def expire(self, name: str, instance: str | None = None) -> None:
        """End a registration as if its lease had not been renewed: `down` with the reason `ttl expired`.

        Apart from the reason, `expire` does the same as `kill`. To make leases expire by themselves, use
        `advance`.

        Args:
            name: the service's name.
            instance: the name of the instance; by default "".

        Raises:
            NotFound: there is no such registration.
            Unavailable: the registry is stopped.
        """
        self._end_registration(name, instance, Reason.EXPIRED)

    def _end_registration(self, name: str, instance: str | None, reason: Reason) -> None:
        key = name, instance or ""

        def drop(transaction: Transaction) -> bytes:
            transaction.drop(key, reason)
            return b""

        async def end() -> None:
            await self._running().write(drop)

        try:
            self._call(end())
        except Refused as refused:
            fields = {"error": refused.code, "message": refused.message, **refused.details}
            raise from_reply(fields) from None

    # Control the daemon.

    def cut(self) -> None:
        """Break all connections, which ends the registrations that depend on them.

            async with regd_client.register("web", 8000) as registration:
                registry.cut()  # the client reconnects, and registers it again

        Clients reconnect, register again and resume their watches. When this returns, the registrations have
        ended, unless their clients have already reconnected.
        """
        self._call(self._cut())

    async def _cut(self) -> None:
        if self._server is None:
            return
        connections = set(self._server.connections)
        for connection in connections:
            connection.cut()
        # The connections end in the next iteration of the event loop.
        while connections & self._server.connections:  # noqa: ASYNC110
            await asyncio.sleep(0)
        await self._server.write(_change_nothing)  # done once the ends of the registrations are committed

    def stop(self) -> None:
        """Stop the daemon. Connections end, and new ones are refused. Registrations are kept. Idempotent."""
        self._call(self._stop())

    async def _stop(self) -> None:
        if self._server is not None:
            server, self._server = self._server, None
            await server.stop()

    def start(self) -> None:
        """Start the daemon again at the same address, with the same registrations. Idempotent."""
        self._call(self._start())

    async def _start(self) -> None:
        if self._server is None:
            config = Config(registry=IN_MEMORY, inherited=[self._listener()])
            server = Daemon(config, clock=self._clock, files=self._files)
            await server.start()
            self._server = server
            self._failure_task = asyncio.create_task(self._watch_for_failure(server))

    def _listener(self) -> socket.socket:
        """Return a listening socket. Its folder is private to this user, whatever the umask."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._socket)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            listener.bind(self._socket)
            listener.listen(_BACKLOG)
            listener.setblocking(False)
        except BaseException:
            listener.close()
            raise
        return listener

    async def _watch_for_failure(self, server: Daemon) -> None:
        """If the daemon fails, stop it, so that clients do not wait for it. Later calls raise the failure."""
        try:
            await server.failed()
        except Exception as error:
            log.critical("the registry in this process has failed", exc_info=error)
            self._failure = error
            await self._stop()

    def advance(self, seconds: float) -> None:
        """Move the daemon's clock forward. Everything that is due by then happens at once, in order.

            registry.advance(60)  # leases that were not renewed for a minute have expired

        Leases expire, a `resolve` with `wait` times out, and after a restart, registrations end that no client
        has claimed. The clock of the process itself does not change.

        Args:
            seconds: 0 or more.

        Raises:
            ValueError: `seconds` is negative.
            Unavailable: the registry is stopped.
        """
        if not seconds >= 0:
            raise ValueError(f"advance({seconds!r}): seconds must be 0 or more")
        self._call(self._advance(seconds))

    async def _advance(self, seconds: float) -> None:
        server = self._running()
        await server.write(
            _change_nothing
        )  # wait for the present flush, which otherwise seems to take `seconds` longer
        self._clock.advance(seconds)
        await server.write(_change_nothing)

    # Inspect, and end.

    def described(self) -> str:
        """Return the registrations as text."""
        state = "" if self._server is not None else ", stopped"
        return "\n".join([f"{self!r}{state}:", *excerpt(self._files, IN_MEMORY)])

    def end(self) -> None:
        """End the daemon and its thread for good. Idempotent, and without effect in a forked child.

        A client that still has registrations receives `lost` for them, so that it does not register them with
        another daemon.

        Raises:
            HostError: the daemon has failed.
        """
        if self._pid != os.getpid() or not self._thread.is_alive:
            return
        if sys.is_finalizing():
            return  # the interpreter is exiting inside the `with`, and threads no longer run
        _LIVING.discard(self)
        with self._lock:
            try:
                self._thread.call(self._leave())
            finally:
                self._thread.end()
                self._folder.cleanup()
        if self._failure is not None:
            raise HostError(f"regd: {self!r} has failed: {self._failure!r}") from self._failure

    async def _leave(self) -> None:
        try:
            # While the program exits, the daemon cannot start a thread, so it cannot write.
            if self._server is not None and threading.main_thread().is_alive():
                await self._deregister_all(self._server)
        finally:
            await self._stop()
            if self._failure_task is not None:
                await self._failure_task

    @staticmethod
    async def _deregister_all(server: Daemon) -> None:
        keys = server.keys()

        def deregister(transaction: Transaction) -> bytes:
            for key in keys:
                if transaction.get(key) is not None:
                    transaction.deregister(key)
            return b""

        await server.write(deregister)

    def _running(self) -> Daemon:
        if self._server is None:
            raise Unavailable(f"{self!r} is stopped; start it first")
        return self._server

    def _call(self, work: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine in the daemon's loop, and return its result."""
        try:
            if self._pid != os.getpid():
                raise HostError("regd: this registry belongs to the parent process of this fork; use it there")
            with self._lock:
                if self._failure is not None:
                    raise HostError(f"regd: {self!r} has failed: {self._failure!r}") from self._failure
                if not self._thread.is_alive:
                    raise HostError(f"regd: {self!r} has ended")
                return self._thread.call(work)
        finally:
            work.close()  # has no effect if it was started

    def _forget_in_child(self) -> None:
        """Close a forked child's copies of the daemon's sockets: open copies would keep connections alive."""
        server = self._server
        nowhere = os.open(os.devnull, os.O_RDWR)
        for own in server.sockets if server is not None else ():
            if own.fileno() >= 0:
                os.dup2(nowhere, own.fileno(), inheritable=False)
        os.close(nowhere)


@contextlib.contextmanager
def running() -> Iterator[InProcessRegistry]:
    """Run a registry in this process. Inside the `with`, `REGD_ADDRESS` has its address.

        with regd.testing.in_process.running() as registry:
            registry.register("db", 5432)
            subprocess.run([sys.executable, "-m", "shop"], check=True)

    Child processes find it too. In nested `with` blocks, several registries run at once: `REGD_ADDRESS` has the
    address of the innermost, and each has an attribute `address`.

    Raises:
        HostError: the daemon has failed. It is raised at the end of the `with`.
        OSError: no socket or temporary folder can be created.
    """
    registry = InProcessRegistry()
    try:
        with found_by_children(registry):
            yield registry
    finally:
        registry.end()


class _Loop(asyncio.SelectorEventLoop):
    """asyncio's own event loop, independent of the policy, with a clock that tests do not patch."""

    def time(self) -> float:
        return time.clock_gettime(time.CLOCK_MONOTONIC)


class _LoopThread:
    """A thread with an event loop."""

    def __init__(self) -> None:
        self.loop = _Loop()
        self.loop.set_debug(False)  # PYTHONASYNCIODEBUG and `python -X dev` are meant for the caller's loops
        # A daemon thread, so that a program can exit inside the `with`.
        self._thread = threading.Thread(target=self._run, name="regd-in-process", daemon=True)
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        return not self.loop.is_closed()

    def _run(self) -> None:
        try:
            self.loop.run_forever()
            self.loop.run_until_complete(_cancel_all())
        finally:
            self.loop.close()

    def call(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self.loop).result()

    def end(self) -> None:
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join()


async def _cancel_all() -> None:
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


class _Timer:
    def __init__(self, call: Callable[[], None]) -> None:
        self.call: Callable[[], None] | None = call

    def cancel(self) -> None:
        self.call = None


class _Clock:
    """The daemon's `Clock`: the loop's time plus the seconds passed to `advance`. For the loop's thread only."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._ahead_s = 0.0
        self._timers: list[tuple[float, int, _Timer]] = []  # a heap
        self._numbers = itertools.count()
        self._alarm: asyncio.TimerHandle | None = None

    def now(self) -> float:
        return self._loop.time() + self._ahead_s

    def wall(self) -> float:
        return round(time.time() + self._ahead_s, 3)

    def call_at(self, when: float, call: Callable[[], None]) -> _Timer:
        timer = _Timer(call)
        heapq.heappush(self._timers, (when, next(self._numbers), timer))
        if self._timers[0][2] is timer:
            self._set_alarm()
        return timer

    def advance(self, seconds: float) -> None:
        """Move the clock forward, and call each timer that is due at its time."""
        end = self.now() + seconds
        try:
            while self._timers and self._timers[0][0] <= end:
                when, _, timer = heapq.heappop(self._timers)
                self._move_to(when)
                if timer.call is not None:
                    timer.call()
            self._move_to(end)
        finally:
            self._set_alarm()

    def _move_to(self, when: float) -> None:
        self._ahead_s += max(0.0, when - self.now())

    def _set_alarm(self) -> None:
        if self._alarm is not None:
            self._alarm.cancel()
            self._alarm = None
        if self._timers:
            self._alarm = self._loop.call_at(self._timers[0][0] - self._ahead_s, self.advance, 0.0)


def _change_nothing(transaction: Transaction) -> bytes:
    return b""


def _short_folder() -> str | None:
    """Return where to create temporary folders: None, the default, or /tmp if the default path is too long."""
    return "/tmp" if len(os.fsencode(tempfile.gettempdir())) > _FOLDER_BYTES_MAX else None


_LIVING: "weakref.WeakSet[InProcessRegistry]" = weakref.WeakSet()


def _forget_all_in_child() -> None:
    for registry in list(_LIVING):
        registry._forget_in_child()
    _LIVING.clear()


os.register_at_fork(after_in_child=_forget_all_in_child)
