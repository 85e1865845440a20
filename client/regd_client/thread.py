"""The async client in a thread of its own, for programs without an event loop.

What is registered is kept by the client itself, also while the program does something else, or nothing. Must not
know the protocol: every verb is the client's.
"""

import asyncio
import atexit
import concurrent.futures
import contextlib
import os
import threading
from collections.abc import AsyncGenerator, Coroutine, Iterator, Mapping
from types import TracebackType
from typing import Any, Self, TypeVar

from regd_client import client, listening, mirrors, registration
from regd_client.connection import abort_all
from regd_client.errors import Unavailable
from regd_client.watches import Endpoint, Event

T = TypeVar("T")

_FAREWELL_S = 1.0


class LoopThread:
    """An event loop that runs until the process ends."""

    def __init__(self) -> None:
        self.pid = os.getpid()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="regd-client", daemon=True)
        self._beginning = threading.Lock()
        self.ended = False
        try:
            self._thread.start()
        except RuntimeError:  # "can't create new thread at interpreter shutdown"
            self._loop.close()
            raise _ended() from None
        atexit.register(self._end)

    def call(self, work: Coroutine[Any, Any, T]) -> T:
        """Run it there, and wait for what it returns or raises. Whoever is interrupted here has cancelled it.

        Raises:
            Unavailable: the process is ending, and the thread has ended.
        """
        asked = self.begin(work)
        try:
            return asked.result()
        except concurrent.futures.CancelledError:
            if self.ended:
                raise _ended() from None
            raise
        finally:
            asked.cancel()

    def begin(self, work: Coroutine[Any, Any, T]) -> "concurrent.futures.Future[T]":
        """Run it there, and go on here.

        Raises:
            Unavailable: the process is ending, and the thread has ended.
        """
        with self._beginning:
            if self.ended:
                work.close()
                raise _ended()
            return asyncio.run_coroutine_threadsafe(work, self._loop)

    def _end(self) -> None:
        """Leave nothing half done at the end of the process; the names go with it."""
        if self.pid != os.getpid():
            return
        with self._beginning:
            self.ended = True
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(_FAREWELL_S)
        if not self._thread.is_alive():
            self._loop.run_until_complete(_end_all())
            self._loop.close()


def _ended() -> Unavailable:
    return Unavailable("this process is ending: regd_client.blocking can be used no more")


async def _end_all() -> None:
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)
    await abort_all("the program ended")


_threads: list[LoopThread] = []  # the last is ours; those before it, of the processes that we were forked from
_starting = threading.Lock()


def client_thread() -> LoopThread:
    """Return this process's thread; a child that was forked has none of its parent's."""
    with _starting:
        if not _threads or _threads[-1].pid != os.getpid():
            _threads.append(LoopThread())
        return _threads[-1]


def _lock_anew() -> None:
    global _starting
    _starting = threading.Lock()


os.register_at_fork(after_in_child=_lock_anew)


class BlockingRegistration:
    """A registration that was made here; deregistered on leaving the `with`."""

    def __init__(self, made: registration.Registration, thread: LoopThread) -> None:
        self._made = made
        self._thread = thread

    @property
    def endpoint(self) -> Endpoint:
        return self._made.endpoint

    @property
    def lost(self) -> bool:
        """Whether somebody took it; `lost_reason` says how."""
        return self._made.lost.is_set()

    @property
    def lost_reason(self) -> str:
        return self._made.lost_reason

    def update(
        self,
        meta: Mapping[str, str] | None = None,
        *,
        state: str | None = None,
        timeout: float | None = None,
    ) -> None:
        """Replace its meta as a whole, set its state, or both, as the async one does."""
        self._thread.call(self._made.update(meta, state=state, timeout=timeout))

    def deregister(self, *, timeout: float | None = None) -> None:
        """End it, as the async one does.

        Harmless when it has ended, in a child that was forked, and at the end of the process, with which it ends.
        """
        if self._thread.pid == os.getpid() and not self._thread.ended:
            self._thread.call(self._made.deregister(timeout=timeout))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._made.static:
            self.deregister()


class BlockingSocket:
    """A socket that listens and is registered; `close`, or leaving the `with`, ends both."""

    def __init__(self, made: listening.RegisteredSocket, thread: LoopThread) -> None:
        self._made = made
        self._thread = thread
        made.socket.setblocking(True)
        self.socket = made.socket
        self.endpoint = made.endpoint
        self.port = made.port

    def close(self) -> None:
        """Withdraw the name, and then close the socket. Idempotent."""
        if self._thread.ended:
            self.socket.close()
        else:
            self._thread.call(self._made.close())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class BlockingWatch:
    """The events of a watch, one after another; `close` ends it, and so does the end of the `with`."""

    def __init__(self, events: AsyncGenerator[Event, None], thread: LoopThread) -> None:
        self._events = events
        self._thread = thread

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Event:
        event = self._thread.call(self._next())
        if event is None:
            raise StopIteration
        return event

    async def _next(self) -> Event | None:
        return await anext(self._events, None)

    def close(self) -> None:
        """End the watch. Idempotent."""
        if not self._thread.ended and self._thread.pid == os.getpid():
            self._thread.call(self._events.aclose())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class BlockingMirror:
    """The mirror of a blocking client: `resolve` and `resolve_all` answer from it without a round trip."""

    def __init__(self, made: mirrors.Mirror, thread: LoopThread) -> None:
        self._made = made
        self._thread = thread

    @property
    def live(self) -> bool:
        """Whether the picture is true now."""
        return self._made.live

    @property
    def stale_s(self) -> float:
        """For how long the daemon has been away; 0.0 while it is there."""
        return self._made.stale_s

    def resolve(self, name: str, *, meta: Mapping[str, str] | None = None) -> Endpoint:
        """Return a ready instance that carries all of `meta`, from the picture."""

        async def resolved() -> Endpoint:
            return self._made.resolve(name, meta=meta)

        return self._thread.call(resolved())

    def resolve_all(self, name: str, *, meta: Mapping[str, str] | None = None) -> list[Endpoint]:
        """Return all ready instances that carry all of `meta`, in order of instance; perhaps none."""

        async def resolved() -> list[Endpoint]:
            return self._made.resolve_all(name, meta=meta)

        return self._thread.call(resolved())


class Client:
    """The registry at one address, without an event loop: `regd_client.Client`, each verb of which blocks.

        with regd_client.blocking.Client("unix:///run/regd.sock") as client:
            found = client.resolve("db", wait=10)

    Any thread may use it. It opens one connection in the client's own thread when a verb is called first. After a
    fork a child begins with a connection of its own.
    """

    def __init__(self, address: str | None = None, *, connect_timeout_s: float | None = None) -> None:
        self._thread = client_thread()
        self._client = client.Client(address, connect_timeout_s=connect_timeout_s)

    @property
    def _own(self) -> tuple[LoopThread, client.Client]:
        if self._thread.pid != os.getpid():
            self._thread = client_thread()
        return self._thread, self._client

    def close(self) -> None:
        """Close the connection, and with it end what it holds. The next call opens another. Idempotent."""
        if self._thread.pid == os.getpid() and not self._thread.ended:
            self._thread.call(self._client.close())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def ping(self, *, timeout: float | None = None) -> None:
        """Ask whether a daemon answers."""
        thread, own = self._own
        thread.call(own.ping(timeout=timeout))

    def hello(self, *, timeout: float | None = None) -> dict[str, Any]:
        """Return who answers."""
        thread, own = self._own
        return thread.call(own.hello(timeout=timeout))

    def stats(self, *, timeout: float | None = None) -> dict[str, Any]:
        """Return the daemon's counters, gauges and limits."""
        thread, own = self._own
        return thread.call(own.stats(timeout=timeout))

    def why(self, name: str, instance: str | None = None, *, timeout: float | None = None) -> dict[str, Any]:
        """Return what is known of a name."""
        thread, own = self._own
        return thread.call(own.why(name, instance, timeout=timeout))

    def register(
        self,
        name: str,
        port: int,
        *,
        host: str | None = None,
        instance: str | None = None,
        meta: Mapping[str, str] | None = None,
        state: str | None = None,
        static: bool = False,
        force: bool = False,
        pid: int | None = None,
        timeout: float | None = None,
    ) -> BlockingRegistration:
        """Register a service; use it with `with`, or call its `deregister`."""
        thread, own = self._own

        async def registered() -> registration.Registration:
            return await own.register(
                name,
                port,
                host=host,
                instance=instance,
                meta=meta,
                state=state,
                static=static,
                force=force,
                pid=pid,
                timeout=timeout,
            )

        return BlockingRegistration(thread.call(registered()), thread)

    def deregister(self, name: str, instance: str | None = None, *, timeout: float | None = None) -> None:
        """End a registration, whoever made it."""
        thread, own = self._own
        thread.call(own.deregister(name, instance, timeout=timeout))

    def update(
        self,
        name: str,
        meta: Mapping[str, str] | None = None,
        *,
        state: str | None = None,
        instance: str | None = None,
        timeout: float | None = None,
    ) -> None:
        """Replace the meta of a registration as a whole, set its state, or both."""
        thread, own = self._own
        thread.call(own.update(name, meta, state=state, instance=instance, timeout=timeout))

    def resolve(
        self,
        name: str,
        *,
        instance: str | None = None,
        meta: Mapping[str, str] | None = None,
        wait: float | None = None,
        timeout: float | None = None,
    ) -> Endpoint:
        """Return a ready instance."""
        thread, own = self._own
        return thread.call(own.resolve(name, instance=instance, meta=meta, wait=wait, timeout=timeout))

    def resolve_all(
        self, name: str, *, meta: Mapping[str, str] | None = None, timeout: float | None = None
    ) -> list[Endpoint]:
        """Return all ready instances."""
        thread, own = self._own
        return thread.call(own.resolve_all(name, meta=meta, timeout=timeout))

    def instances(
        self, pattern: str = "*", *, meta: Mapping[str, str] | None = None, timeout: float | None = None
    ) -> list[dict[str, Any]]:
        """Return every registration whose name fits, as the wire has it."""
        thread, own = self._own
        return thread.call(own.instances(pattern, meta=meta, timeout=timeout))

    def watch(
        self, pattern: str = "*", *, meta: Mapping[str, str] | None = None, timeout: float | None = None
    ) -> BlockingWatch:
        """Return an iterator of what is there as `up` events, `sync`, and then every change as it happens."""
        thread, own = self._own
        return BlockingWatch(own.watch(pattern, meta=meta, timeout=timeout), thread)

    @contextlib.contextmanager
    def mirror(
        self,
        pattern: str = "*",
        *,
        meta: Mapping[str, str] | None = None,
        stale_s_max: float | None = None,
        timeout: float | None = None,
    ) -> Iterator[BlockingMirror]:
        """Keep a local picture of the services whose name fits; any thread may resolve from it."""
        thread, own = self._own
        kept = own.mirror(pattern, meta=meta, stale_s_max=stale_s_max, timeout=timeout)
        made = thread.call(kept.__aenter__())
        try:
            yield BlockingMirror(made, thread)
        finally:
            if not thread.ended:
                thread.call(kept.__aexit__(None, None, None))
