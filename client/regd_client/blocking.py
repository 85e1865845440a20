"""The blocking client, for programs without an event loop: the client's verbs as functions that block.

    with regd_client.blocking.register("shop", 8000):
        endpoint = regd_client.blocking.resolve("db", wait=10)

The async client does the work, in a background thread. `Client(address)` offers all verbs on one connection.
`BlockingConnection` sends one request after another, without a thread.

This module does not import asyncio; the first call does. So commands start quickly, and a server that only calls
`register_process` never imports asyncio.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import threading
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Self, TypeVar

from regd_client.blocking_connection import BlockingConnection
from regd_client.errors import Unavailable

if TYPE_CHECKING:
    import concurrent.futures

    from regd_client import client, lifespans, mirrors, registration
    from regd_client.models import Endpoint, Event, Hello, History, Instance, State, Stats, Why

__all__ = [
    "BlockingConnection",
    "BlockingMirror",
    "BlockingRegistration",
    "BlockingSocket",
    "BlockingWatch",
    "Client",
    "deregister",
    "listen",
    "register",
    "register_process",
    "resolve",
    "resolve_all",
]

T = TypeVar("T")

_JOIN_S = 1.0


# The background thread.


class LoopThread:
    """A thread that runs an event loop until the process ends."""

    def __init__(self) -> None:
        import asyncio

        self.pid = os.getpid()
        self._ended = False
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="regd-client", daemon=True)
        self._lock = threading.Lock()
        try:
            self._thread.start()
        except RuntimeError:  # "can't create new thread at interpreter shutdown"
            self._loop.close()
            raise self._unusable() from None
        atexit.register(self._end)

    @property
    def ended(self) -> bool:
        """Whether the thread is unusable: this process is exiting, or is a fork of the thread's process."""
        return self._ended or self.pid != os.getpid()

    def call(self, work: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine in the thread, and return its result. Ctrl-C in the caller cancels the coroutine.

        Raises:
            Unavailable: this process is exiting, or is a fork of the thread's process.
        """
        future = self.begin(work)
        import concurrent.futures

        try:
            return future.result()
        except concurrent.futures.CancelledError:
            if self.ended:
                raise self._unusable() from None
            raise
        finally:
            future.cancel()

    def begin(self, work: Coroutine[Any, Any, T]) -> concurrent.futures.Future[T]:
        """Start a coroutine in the thread, without waiting for it.

        Raises:
            Unavailable: this process is exiting, or is a fork of the thread's process.
        """
        if self.pid == os.getpid():  # in a forked child, the lock may be held forever
            with self._lock:
                if not self._ended:  # else imports may fail, since a `__del__` can run very late
                    import asyncio

                    return asyncio.run_coroutine_threadsafe(work, self._loop)
        work.close()
        raise self._unusable()

    def call_function(self, function: Callable[[], T]) -> T:
        """Run a plain function in the thread and return its result, like `call`."""

        async def run() -> T:
            return function()

        return self.call(run())

    def _unusable(self) -> Unavailable:
        if self.pid != os.getpid():
            return Unavailable("it belongs to the parent process of this fork; open another one here")
        return Unavailable(_EXITING)

    def _end(self) -> None:
        """When the process ends, cancel all tasks and close all connections, which ends the registrations."""
        if self.pid != os.getpid():
            return
        with self._lock:
            self._ended = True
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(_JOIN_S)
        if not self._thread.is_alive():
            self._loop.run_until_complete(_cancel_all())
            self._loop.close()


async def _cancel_all() -> None:
    import asyncio

    from regd_client.connection import abort_all

    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await abort_all("the program ended")


_EXITING = "this process is exiting; regd_client.blocking can no longer be used"
# The last element is the thread of this process. After a fork, those of the parent processes precede it.
_threads: list[LoopThread] = []
_starting = threading.Lock()


def client_thread() -> LoopThread:
    """Return this process's thread; start it at the first call, and again in a forked child.

    Raises:
        Unavailable: the process is exiting, and no thread can be started.
    """
    try:
        from regd_client import api, lifespans  # noqa: F401 - fails only while the interpreter exits
    except ImportError:
        raise Unavailable(_EXITING) from None
    with _starting:
        if not _threads or _threads[-1].pid != os.getpid():
            _threads.append(LoopThread())
        return _threads[-1]


def _replace_lock() -> None:
    global _starting
    _starting = threading.Lock()


os.register_at_fork(after_in_child=_replace_lock)


# What the verbs return.


class BlockingRegistration:
    """A registration, from `register`. Leaving the `with` deregisters it, unless it is static."""

    def __init__(self, registration: registration.Registration, thread: LoopThread) -> None:
        self._registration = registration
        self._thread = thread

    def __repr__(self) -> str:
        return f"<Blocking{repr(self._registration).removeprefix('<')}"

    @property
    def endpoint(self) -> Endpoint:
        """Where the service is registered."""
        return self._registration.endpoint

    @property
    def instance(self) -> str:
        """The instance's name, "" without one; with `instance="auto"` the number that this copy has."""
        return self._registration.instance

    @property
    def lost(self) -> bool:
        """Whether another process or client has taken the name."""
        return self._registration.lost.is_set()

    @property
    def lost_reason(self) -> str:
        """Why the registration was lost; "" until then."""
        return self._registration.lost_reason

    def update(
        self,
        meta: Mapping[str, str] | None = None,
        *,
        state: State | None = None,
        priority: int | None = None,
        timeout: float | None = None,
    ) -> None:
        """Replace the labels, or set the state or priority. Wait for the reconnect if needed.

            registration.update({"zone": "b"}, state="ready")

        Args:
            meta: the new labels, which replace all previous ones; None leaves them as they are.
            state: `starting`, `ready` or `draining`; None leaves it as it is.
            priority: 0 to 65535, lower is preferred; None leaves it as it is.
            timeout: seconds for the whole call; by default it waits up to 5 s for a daemon.

        Raises:
            NotFound: the registration has ended, or another owner has the name.
            Unavailable: no daemon answers in time.
            Timeout: the daemon did not reply within `timeout`.
            BadArgument: an argument has the wrong type or an invalid value.
        """
        self._thread.call(self._registration.update(meta, state=state, priority=priority, timeout=timeout))

    def deregister(self, *, timeout: float | None = None) -> None:
        """End the registration: set it `draining`, then remove it. Idempotent.

        The call does nothing in a forked child, or while the process exits: the exit ends the registration
        anyway.

        Args:
            timeout: seconds to wait for the daemon's confirmation; by default 2 s, or 0.2 s without a daemon.

        Raises:
            Unavailable: the registration is static, and no daemon answers.
            RegdError: the daemon refuses.
        """
        if not self._thread.ended:
            self._thread.call(self._registration.deregister(timeout=timeout))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if not self._registration._request.static:
            self.deregister()


class BlockingSocket:
    """A registered listening socket, from `listen`. Leaving the `with` withdraws the name and closes the socket.

    Attributes:
        socket: the socket, in blocking mode.
        endpoint: the registered address.
        port: the port of the socket.
    """

    def __init__(self, registered: lifespans.RegisteredSocket, thread: LoopThread) -> None:
        self._registered = registered
        self._thread = thread
        registered.socket.setblocking(True)
        self.socket = registered.socket
        self.endpoint = registered.endpoint
        self.port = registered.port

    def __repr__(self) -> str:
        return repr(self._registered).replace("RegisteredSocket", "BlockingSocket")

    def close(self) -> None:
        """Withdraw the name, and close the socket 0.1 s later. Idempotent."""
        if self._thread.ended:
            self.socket.close()
        else:
            self._thread.call(self._registered.close())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class BlockingWatch:
    """An iterator of events, from `Client.watch`. Leaving the `with` ends the watch."""

    def __init__(self, events: AsyncGenerator[Event, None], pattern: str, thread: LoopThread) -> None:
        self._events = events
        self._pattern = pattern
        self._thread = thread

    def __repr__(self) -> str:
        return f"<BlockingWatch {self._pattern!r}>"

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
        if not self._thread.ended:
            self._thread.call(self._events.aclose())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class BlockingMirror:
    """A local copy of the instances that match a pattern, from `Client.mirror`. Any thread may use it.

    Iterating yields the endpoints of all ready instances, in order of name and instance.
    """

    def __init__(self, mirror: mirrors.Mirror, thread: LoopThread) -> None:
        self._mirror = mirror
        self._thread = thread

    def __repr__(self) -> str:
        return f"<Blocking{repr(self._mirror).removeprefix('<')}"

    @property
    def live(self) -> bool:
        """Whether the copy is up to date."""
        return self._mirror.live

    @property
    def stale_s(self) -> float:
        """Seconds for which the copy may have been out of date; 0.0 while the copy is live."""
        return self._mirror.stale_s

    @property
    def changes(self) -> int:
        """The number of changes so far, to pass to `changed`."""
        return self._mirror.changes

    def changed(self, since: int | None = None, *, timeout: float | None = None) -> int:
        """Wait until a ready instance appears, disappears, or changes its address, labels or priority.

            while True:
                seen = mirror.changes
                write_configuration(list(mirror))
                mirror.changed(seen)

        Args:
            since: an earlier value of `changes`; the call returns at once if there were changes since. By
                default it waits for the next change.
            timeout: seconds to wait; by default without a limit.

        Returns:
            The current value of `changes`.

        Raises:
            Timeout: nothing changed in time.
            Unavailable: the mirror has ended: its `with` was left, or the client was closed.
        """
        return self._thread.call(self._mirror.changed(since, timeout=timeout))

    def __iter__(self) -> Iterator[Endpoint]:
        return self._thread.call_function(lambda: iter(self._mirror))

    def resolve(self, name: str, *, meta: Mapping[str, str] | None = None) -> Endpoint:
        """Return the endpoint of a ready instance of the best priority; calls rotate through all such instances.

            endpoint = mirror.resolve("worker", meta={"zone": "a"})

        Args:
            name: the service's name.
            meta: labels; the instance must have all of them.

        Raises:
            NotFound: no ready instance has the name and the labels.
            Unavailable: the copy is older than `stale_s_max`.
        """
        return self._thread.call_function(lambda: self._mirror.resolve(name, meta=meta))

    def resolve_all(self, name: str, *, meta: Mapping[str, str] | None = None) -> list[Endpoint]:
        """Return all ready instances in order of priority and instance; [] if there are none.

            for endpoint in mirror.resolve_all("worker"):
                print(endpoint)

        Args:
            name: the service's name.
            meta: only instances with all of these labels.

        Raises:
            Unavailable: the copy is older than `stale_s_max`.
        """
        return self._thread.call_function(lambda: self._mirror.resolve_all(name, meta=meta))


# The client.


class Client:
    """A blocking client of one daemon, with the verbs of `regd_client.Client`.

        with regd_client.blocking.Client("unix:///run/regd.sock") as client:
            endpoint = client.resolve("db", wait=10)

    Any thread may use it. The first call opens the connection, in the background thread. A forked child opens a
    connection of its own.

    Args:
        address: `tcp://HOST:PORT`, `HOST:PORT` or `unix:///path`; by default $REGD_ADDRESS, which is read for
            each new connection, else the project registry of the current folder, else `tcp://127.0.0.1:7343`.
        connect_timeout_s: seconds for which every call tries to connect. By default, `register` tries for 5 s,
            and the other calls fail at once if no daemon listens.

    Raises:
        BadArgument: an argument has the wrong type or an invalid value.
        Unavailable: the process is exiting.
    """

    def __init__(self, address: str | None = None, *, connect_timeout_s: float | None = None) -> None:
        self._thread = client_thread()
        from regd_client import client

        self._client = client.Client(address, connect_timeout_s=connect_timeout_s)

    def __repr__(self) -> str:
        return f"<blocking.{repr(self._client).removeprefix('<')}"

    @property
    def _thread_and_client(self) -> tuple[LoopThread, client.Client]:
        if self._thread.pid != os.getpid():
            self._thread = client_thread()
        return self._thread, self._client

    def close(self) -> None:
        """Close the connection, which ends registrations and watches. Idempotent. The next call reconnects."""
        if not self._thread.ended:
            self._thread.call(self._client.close())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def ping(self, *, timeout: float | None = None) -> None:
        """Check that the daemon answers.

            client.ping(timeout=1)

        Args:
            timeout: seconds for the whole call.

        Raises:
            Unavailable: no daemon answers.
            Timeout: the daemon did not reply within `timeout`.
        """
        thread, client = self._thread_and_client
        thread.call(client.ping(timeout=timeout))

    def hello(self, *, timeout: float | None = None) -> Hello:
        """Return the daemon's version, epoch, features and limits.

            print(client.hello()["version"])

        Args:
            timeout: seconds for the whole call.

        Returns:
            A dictionary with `server`, `version`, `protocol`, `epoch`, `rev`, `features`, `limits`, `host` and
            `loop`.

        Raises:
            Unavailable: no daemon answers.
            Timeout: the daemon did not reply within `timeout`.
        """
        thread, client = self._thread_and_client
        return thread.call(client.hello(timeout=timeout))

    def stats(self, *, timeout: float | None = None) -> Stats:
        """Return the daemon's counters, gauges and limits.

            print(client.stats()["registrations"])

        Args:
            timeout: seconds for the whole call.

        Returns:
            A dictionary; PROTOCOL.md describes its fields.

        Raises:
            Unavailable: no daemon answers.
            Timeout: the daemon did not reply within `timeout`.
        """
        thread, client = self._thread_and_client
        return thread.call(client.stats(timeout=timeout))

    def why(self, name: str, instance: str | None = None, *, timeout: float | None = None) -> Why:
        """Return what the daemon knows about a name: its instances, their owners, and why others have ended.

            print(client.why("db")["departures"])

        Args:
            name: the service's name.
            instance: only this instance.
            timeout: seconds for the whole call.

        Returns:
            A dictionary with `name`, `instances` (each with its owners and its last probe) and `departures`
            (each with its reason).

        Raises:
            NotFound: the daemon knows nothing about the name.
            Unavailable: no daemon answers.
            Timeout: the daemon did not reply within `timeout`.
            BadArgument: an argument has the wrong type or an invalid value.
        """
        thread, client = self._thread_and_client
        return thread.call(client.why(name, instance, timeout=timeout))

    def history(
        self,
        name: str | None = None,
        instance: str | None = None,
        *,
        since: int | None = None,
        before: int | None = None,
        age_s: float | None = None,
        limit: int | None = None,
        timeout: float | None = None,
    ) -> History:
        """Return past changes, oldest first: the latest ones, or those after or before a point.

            for change in client.history("db")["changes"]:
                print(change["op"], change["port"])

        The daemon keeps the history over restarts, and deletes the oldest changes when it grows too large.

        Args:
            name: only changes of this service.
            instance: only changes of this instance.
            since: the changes after this revision.
            before: the changes before this revision.
            age_s: the changes of the last `age_s` seconds. Pass one of `since`, `before` and `age_s`, or none of
                them for the latest changes.
            limit: how many changes at most, 1 to 1,000; by default 100.
            timeout: seconds for the whole call.

        Returns:
            A dictionary with `changes`, and with `next` if there are more: the `since` of the next call, or its
            `before` if neither `since` nor `age_s` was given. With `name`, a page may have fewer changes than
            `limit`, even none, and still have a `next`.

        Raises:
            Unavailable: no daemon answers.
            Timeout: the daemon did not reply within `timeout`.
            BadArgument: an argument has a wrong type or value.
            RegdError: the daemon cannot read its journal, or is too old to keep one.
        """
        thread, client = self._thread_and_client
        return thread.call(
            client.history(name, instance, since=since, before=before, age_s=age_s, limit=limit, timeout=timeout)
        )

    def register(
        self,
        name: str,
        port: int,
        *,
        host: str | None = None,
        instance: str | None = None,
        meta: Mapping[str, str] | None = None,
        state: State | None = None,
        priority: int | None = None,
        static: bool = False,
        force: bool = False,
        pid: int | None = None,
        timeout: float | None = None,
    ) -> BlockingRegistration:
        """Register a service. Use the result with `with`, or call its `deregister`.

            with client.register("runner", 5050):
                serve()

        The registration lasts as long as this connection and this process. After a reconnect, the client restores
        it.

        Args:
            name: the service's name: labels of a-z, 0-9, `-` and `_`, joined by dots.
            port: 1 to 65535. Open the port first, or use `listen`, which does both.
            host: the address at which others reach the service; by default 127.0.0.1.
            instance: a name for this instance, if the service has several; `auto` for a free number.
            meta: labels that `resolve` can filter by.
            state: `starting` (not ready yet), `ready` or `draining` (about to stop); by default `ready`.
            priority: 0 to 65535, lower is preferred: others resolve this instance only while no ready instance
                has a lower number; by default 0.
            static: keep the registration after the connection and the process end, until it is deregistered.
            force: take the name even if its owner is alive.
            pid: the process to bind the registration to, instead of this one. If the daemon cannot see the
                process, the registration lasts as long as this connection.
            timeout: seconds for the whole call; by default it waits up to 5 s for a daemon.

        Raises:
            Conflict: a live owner holds the name; `details["owner"]` describes it.
            Denied: this user may not register.
            Unavailable: no daemon answers.
            Timeout: the daemon did not reply within `timeout`.
            BadArgument: an argument has the wrong type or an invalid value.
        """
        thread, client = self._thread_and_client
        context = client.register(
            name,
            port,
            host=host,
            instance=instance,
            meta=meta,
            state=state,
            priority=priority,
            static=static,
            force=force,
            pid=pid,
            timeout=timeout,
        )
        return BlockingRegistration(thread.call(context), thread)

    def deregister(self, name: str, instance: str | None = None, *, timeout: float | None = None) -> None:
        """End a registration, whichever client made it.

            client.deregister("worker", "1")

        Args:
            name: the service's name.
            instance: the instance's name; by default the instance without a name.
            timeout: seconds for the whole call.

        Raises:
            NotFound: there is no such registration.
            Denied: this user may not deregister.
            Unavailable: no daemon answers.
            Timeout: the daemon did not reply within `timeout`.
            BadArgument: an argument has the wrong type or an invalid value.
        """
        thread, client = self._thread_and_client
        thread.call(client.deregister(name, instance, timeout=timeout))

    def update(
        self,
        name: str,
        meta: Mapping[str, str] | None = None,
        *,
        state: State | None = None,
        priority: int | None = None,
        instance: str | None = None,
        timeout: float | None = None,
    ) -> None:
        """Replace the labels of a registration, or set its state or priority, whichever client made it.

            client.update("worker", state="draining", instance="1")

        Args:
            name: the service's name.
            meta: the new labels, which replace all previous ones; None leaves them as they are.
            state: `starting`, `ready` or `draining`; None leaves it as it is.
            priority: 0 to 65535, lower is preferred; None leaves it as it is.
            instance: the instance's name; by default the instance without a name.
            timeout: seconds for the whole call.

        Raises:
            NotFound: there is no such registration.
            Denied: this user may not change it.
            Unavailable: no daemon answers.
            Timeout: the daemon did not reply within `timeout`.
            BadArgument: an argument has the wrong type or an invalid value.
        """
        thread, client = self._thread_and_client
        work = client.update(name, meta, state=state, priority=priority, instance=instance, timeout=timeout)
        thread.call(work)

    def resolve(
        self,
        name: str,
        *,
        instance: str | None = None,
        meta: Mapping[str, str] | None = None,
        wait: float | None = None,
        timeout: float | None = None,
    ) -> Endpoint:
        """Return the endpoint of a ready instance of the best priority; calls rotate through all such instances.

            endpoint = client.resolve("db", wait=10)
            sock = socket.create_connection(endpoint.address)

        Args:
            name: the service's name.
            instance: only this instance.
            meta: labels; the instance must have all of them.
            wait: seconds (at most 3600) to wait for the daemon, and for an instance that accepts a connection; if
                the connection to the daemon is lost, the client reconnects. By default the call fails at once.
            timeout: seconds for the whole call.

        Raises:
            NotFound: no ready instance matches; `details["near"]` may have similar names.
            Timeout: no instance accepted a connection within `wait`; the message says why.
            Unavailable: no daemon answers.
            BadArgument: an argument has the wrong type or an invalid value.
        """
        thread, client = self._thread_and_client
        return thread.call(client.resolve(name, instance=instance, meta=meta, wait=wait, timeout=timeout))

    def resolve_all(
        self, name: str, *, meta: Mapping[str, str] | None = None, timeout: float | None = None
    ) -> list[Endpoint]:
        """Return the endpoints of all ready instances, in order of priority and instance; [] if there are none.

            for endpoint in client.resolve_all("worker"):
                print(endpoint)

        Args:
            name: the service's name.
            meta: only instances with all of these labels.
            timeout: seconds for the whole call.

        Raises:
            Unavailable: no daemon answers.
            Timeout: the daemon did not reply within `timeout`.
            BadArgument: an argument has the wrong type or an invalid value.
        """
        thread, client = self._thread_and_client
        return thread.call(client.resolve_all(name, meta=meta, timeout=timeout))

    def instances(
        self, pattern: str = "*", *, meta: Mapping[str, str] | None = None, timeout: float | None = None
    ) -> list[Instance]:
        """Return all registrations, in any state, in order of name and instance.

            for instance in client.instances("worker*"):
                print(instance["name"], instance["state"])

        Args:
            pattern: a name, or a prefix followed by `*`.
            meta: only instances with all of these labels.
            timeout: seconds for the whole call.

        Raises:
            Unavailable: no daemon answers.
            Timeout: the daemon did not reply within `timeout`.
            BadArgument: an argument has the wrong type or an invalid value.
        """
        thread, client = self._thread_and_client
        return thread.call(client.instances(pattern, meta=meta, timeout=timeout))

    def watch(
        self, pattern: str = "*", *, meta: Mapping[str, str] | None = None, timeout: float | None = None
    ) -> BlockingWatch:
        """Iterate over an `up` event for each existing instance, then `sync`, and then every change.

            with client.watch("worker*") as events:
                for event in events:
                    print(event.kind, event.endpoint)

        Args:
            pattern: a name, or a prefix followed by `*`.
            meta: only instances with all of these labels.
            timeout: seconds to wait for the daemon to accept the watch.

        Raises:
            Unavailable: no daemon answers at the beginning (raised when the first event is requested).
            Timeout: the daemon did not accept the watch within `timeout`.
            BadArgument: an argument has the wrong type or an invalid value.
        """
        thread, client = self._thread_and_client
        return BlockingWatch(client.watch(pattern, meta=meta, timeout=timeout), pattern, thread)

    @contextlib.contextmanager
    def mirror(
        self,
        pattern: str = "*",
        *,
        meta: Mapping[str, str] | None = None,
        stale_s_max: float | None = None,
        timeout: float | None = None,
    ) -> Iterator[BlockingMirror]:
        """Keep a local copy of the matching instances, to resolve names without a round trip.

            with client.mirror("worker*") as mirror:
                endpoint = mirror.resolve("worker")

        Args:
            pattern: a name, or a prefix followed by `*`.
            meta: only instances with all of these labels.
            stale_s_max: seconds for which the copy may be out of date before `resolve` raises `Unavailable`; by
                default without a limit.
            timeout: seconds to wait for the first complete copy; by default 15 s.

        Raises:
            Unavailable: no daemon answers, or the first copy was not complete in time.
            BadArgument: an argument has the wrong type or an invalid value.
        """
        thread, client = self._thread_and_client
        context = client.mirror(pattern, meta=meta, stale_s_max=stale_s_max, timeout=timeout)
        mirror = thread.call(context.__aenter__())
        try:
            yield BlockingMirror(mirror, thread)
        finally:
            if not thread.ended:
                thread.call(context.__aexit__(None, None, None))


# The verbs as functions.


def register(
    name: str,
    port: int,
    *,
    host: str | None = None,
    instance: str | None = None,
    meta: Mapping[str, str] | None = None,
    state: State | None = None,
    priority: int | None = None,
    static: bool = False,
    force: bool = False,
    pid: int | None = None,
    timeout: float | None = None,
) -> BlockingRegistration:
    """Register a service. Use the result with `with`, or call its `deregister`.

        with regd_client.blocking.register("runner", 5050):
            serve()

    The registration lasts as long as this process. The background thread restores it after a reconnect.

    Args:
        name: the service's name: labels of a-z, 0-9, `-` and `_`, joined by dots.
        port: 1 to 65535. Open the port first, or use `listen`, which does both.
        host: the address at which others reach the service; by default 127.0.0.1.
        instance: a name for this instance, if the service has several; `auto` for a free number.
        meta: labels that `resolve` can filter by.
        state: `starting` (not ready yet), `ready` or `draining` (about to stop); by default `ready`.
        priority: 0 to 65535, lower is preferred: others resolve this instance only while no ready instance has a
            lower number; by default 0.
        static: keep the registration after the process ends, until it is deregistered.
        force: take the name even if its owner is alive.
        pid: the process to bind the registration to, instead of this one. If the daemon cannot see the
            process, the registration lasts as long as the connection.
        timeout: seconds for the whole call; by default it waits up to 5 s for a daemon.

    Raises:
        Conflict: a live owner holds the name; `details["owner"]` describes it.
        Denied: this user may not register.
        Unavailable: no daemon answers, or the process is exiting.
        Timeout: the daemon did not reply within `timeout`.
        BadArgument: an argument has the wrong type or an invalid value.
    """
    thread = client_thread()
    from regd_client import api

    context = api.register(
        name,
        port,
        host=host,
        instance=instance,
        meta=meta,
        state=state,
        priority=priority,
        static=static,
        force=force,
        pid=pid,
        timeout=timeout,
    )
    return BlockingRegistration(thread.call(context), thread)


def register_process(
    name: str,
    port: int,
    *,
    host: str | None = None,
    instance: str | None = None,
    meta: Mapping[str, str] | None = None,
    priority: int | None = None,
    drain_s: float = 0.1,
) -> None:
    """Register a server whose port is open, until this process ends.

        def when_ready(server):  # in gunicorn.conf.py
            blocking.register_process("shop", server.LISTENERS[0].getsockname()[1])

    Call it in the main thread of the process that owns the port, after the process has set its signal handlers.
    On SIGTERM and SIGINT, the client withdraws the name and waits `drain_s` before it calls those handlers. The
    call leaves no thread behind, and no connection if the daemon can see this process, so workers may be forked
    from it. While no daemon answers or another owner has the name, the client tries again every second (by
    SIGALRM).

    Args:
        name: the service's name: labels of a-z, 0-9, `-` and `_`, joined by dots.
        port: 1 to 65535.
        host: the address at which others reach the service; by default 127.0.0.1.
        instance: a name for this instance, if the service has several; `auto` for a free number.
        meta: labels that `resolve` can filter by.
        priority: 0 to 65535, lower is preferred: others resolve this instance only while no ready instance has a
            lower number; by default 0.
        drain_s: seconds between withdrawing the name and calling the program's signal handler.

    Raises:
        BadArgument: an argument has the wrong type, or the daemon refuses it.
        RegdError: registering failed and cannot be retried: SIGALRM is in use, or this is not the main thread.
    """
    from regd_client.arguments import RegistrationRequest, check_integer
    from regd_client.process_registration import ProcessRegistration

    check_integer("port", port, required=True)
    request = RegistrationRequest(name, port, host=host, instance=instance, meta=meta, priority=priority)
    ProcessRegistration(request, drain_s).register()


def listen(
    name: str,
    port: int | None = None,
    *,
    host: str = "127.0.0.1",
    instance: str | None = None,
    meta: Mapping[str, str] | None = None,
    priority: int | None = None,
    timeout: float | None = None,
) -> BlockingSocket:
    """Open a listening socket and register it. No other process can take the port in between.

        with regd_client.blocking.listen("runner") as listening:
            connection, _ = listening.socket.accept()

    Args:
        name: the service's name: labels of a-z, 0-9, `-` and `_`, joined by dots.
        port: 1 to 65535, or 0 for any free port. By default the port that this name and instance had last, if
            it is free, else a free port that the system gives to no other program, so that the service can have
            it again the next time.
        host: the IP address to listen on. For 0.0.0.0 and ::, the client registers the loopback address.
        instance: a name for this instance, if the service has several; `auto` for a free number.
        meta: labels that `resolve` can filter by.
        priority: 0 to 65535, lower is preferred: others resolve this instance only while no ready instance has a
            lower number; by default 0.
        timeout: seconds to register; by default it waits up to 5 s for a daemon.

    Raises:
        OSError: the port is in use, or not allowed.
        Conflict: a live owner holds the name.
        Denied: this user may not register.
        Unavailable: no daemon answers, or the process is exiting.
        Timeout: the daemon did not reply within `timeout`.
        BadArgument: an argument has the wrong type or an invalid value.
    """
    thread = client_thread()
    from regd_client import lifespans

    async def listen() -> lifespans.RegisteredSocket:
        return await lifespans.listen(
            name, port, host=host, instance=instance, meta=meta, priority=priority, timeout=timeout
        )

    return BlockingSocket(thread.call(listen()), thread)


def deregister(name: str, instance: str | None = None, *, timeout: float | None = None) -> None:
    """End a registration, whichever client made it.

        regd_client.blocking.deregister("db")

    Args:
        name: the service's name.
        instance: the instance's name; by default the instance without a name.
        timeout: seconds for the whole call.

    Raises:
        NotFound: there is no such registration.
        Denied: this user may not deregister.
        Unavailable: no daemon answers, or the process is exiting.
        Timeout: the daemon did not reply within `timeout`.
        BadArgument: an argument has the wrong type or an invalid value.
    """
    thread = client_thread()
    from regd_client import api

    thread.call(api.deregister(name, instance, timeout=timeout))


def resolve(
    name: str,
    *,
    instance: str | None = None,
    meta: Mapping[str, str] | None = None,
    wait: float | None = None,
    timeout: float | None = None,
) -> Endpoint:
    """Return the endpoint of a ready instance of the best priority; calls rotate through all such instances.

        endpoint = regd_client.blocking.resolve("db", wait=10)
        sock = socket.create_connection(endpoint.address)

    Args:
        name: the service's name.
        instance: only this instance.
        meta: labels; the instance must have all of them.
        wait: seconds (at most 3600) to wait for the daemon, and for an instance that accepts a connection; if the
            connection to the daemon is lost, the client reconnects. By default the call fails at once.
        timeout: seconds for the whole call.

    Returns:
        An `Endpoint`: `name`, `instance`, `host`, `port`, `meta`, `priority`, `address`, `url()`.

    Raises:
        NotFound: no ready instance matches; `details["near"]` may have similar names.
        Timeout: no instance accepted a connection within `wait`; the message says why.
        Unavailable: no daemon answers, or the process is exiting.
        BadArgument: an argument has the wrong type or an invalid value.
    """
    thread = client_thread()
    from regd_client import api

    return thread.call(api.resolve(name, instance=instance, meta=meta, wait=wait, timeout=timeout))


def resolve_all(
    name: str, *, meta: Mapping[str, str] | None = None, timeout: float | None = None
) -> list[Endpoint]:
    """Return the endpoints of all ready instances, in order of priority and instance; [] if there are none.

        for endpoint in regd_client.blocking.resolve_all("worker"):
            print(endpoint)

    Args:
        name: the service's name.
        meta: only instances with all of these labels.
        timeout: seconds for the whole call.

    Raises:
        Unavailable: no daemon answers, or the process is exiting.
        Timeout: the daemon did not reply within `timeout`.
        BadArgument: an argument has the wrong type or an invalid value.
    """
    thread = client_thread()
    from regd_client import api

    return thread.call(api.resolve_all(name, meta=meta, timeout=timeout))
