"""The client: the verbs of the registry on one connection that is opened when needed, and again when it broke.

What the caller has registered and follows is kept by others. Must not know how a request is written.
"""

import asyncio
import contextlib
import itertools
import os
import random
import time
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine, Mapping
from types import TracebackType
from typing import Any, Self, TypeVar

from regd_client import wire
from regd_client.arguments import (
    WAIT_S_MAX,
    check_flag,
    check_registration,
    check_seconds,
    check_service,
    check_text,
    labels,
)
from regd_client.connection import Connection
from regd_client.connector import Connector, Patience, pause, running_loop
from regd_client.errors import BadArgument, RegdError, Timeout, Unavailable
from regd_client.mirrors import Mirror
from regd_client.registrar import Registrar
from regd_client.registration import RegistrationContext
from regd_client.watches import Endpoint, Event, EventQueue, WatchState, endpoint
from regd_client.wire import NOT_REGD

_SLACK_S = 1.0  # for an answer that comes when the time is over
_ONE_TRY_S = 0.5  # to connect, however little time is left
_PAUSE_S = 0.02  # at most, before a wait goes on at a daemon that is back
_PICTURE_S = 15.0  # for the first picture of a mirror

T = TypeVar("T")


class Client:
    """The registry at one address. Any number of tasks may use it at once; they share its connection.

        async with Client() as client:
            found = await client.resolve("runner")

    `address` is `tcp://HOST:PORT`, `HOST:PORT` or `unix:///path`; left out, $REGD_ADDRESS is read at each new
    connection, and without it tcp://127.0.0.1:7343 is taken. It belongs to the event loop that first uses it.

    Where nobody listens, verbs fail at once; `register` tries again for 5 s, and logs so at once. With
    `connect_timeout_s` all of them try to connect for so many seconds.

    Every verb takes `timeout`: seconds for the whole call, connecting included. When they are over it raises
    `Unavailable` if there is no connection, else `Timeout`; a change may have been made or not. Every verb raises
    `Unavailable` when no daemon answers, `BadArgument` for what is no argument of it, and `RegdError` for other
    refusals.
    """

    def __init__(self, address: str | None = None, *, connect_timeout_s: float | None = None) -> None:
        check_text("address", address)
        check_seconds("connect_timeout_s", connect_timeout_s)
        self._address = address
        self._connect_timeout_s = connect_timeout_s
        self._begin()

    def _begin(self) -> None:
        self._pid = os.getpid()
        self._link = Connector(self._address, self._connect_timeout_s)
        self._keeper = Registrar(self._link)

    async def __aenter__(self) -> Self:
        try:
            await self._connected()
        except BaseException:
            await self.close()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connection, and with it end what it holds. The next call opens another. Idempotent.

        Where the daemon is away, what it still has to withdraw is withdrawn in the background, as long as the
        event loop lives.
        """
        self._check_fork()
        link, keeper = self._link, self._keeper
        self._begin()  # before anything is waited for: whoever calls from now on has a connection of its own
        keeper.end()
        try:
            await keeper.holdings.close()
        finally:
            if not keeper.holdings.lingers:
                link.end()
        if not keeper.holdings.lingers:
            await link.close()

    # The verbs.

    async def ping(self, *, timeout: float | None = None) -> None:
        """Ask whether a daemon answers."""
        await self._within(timeout, "ping", self._ask("ping"))

    async def hello(self, *, timeout: float | None = None) -> dict[str, Any]:
        """Return who answers: `server`, `version`, `protocol`, `epoch`, `rev`, `features`, `limits`, …"""
        return await self._within(timeout, "hello", self._ask("hello"))

    async def stats(self, *, timeout: float | None = None) -> dict[str, Any]:
        """Return the daemon's counters, gauges and limits."""
        return await self._within(timeout, "stats", self._ask("stats"))

    async def why(
        self, name: str, instance: str | None = None, *, timeout: float | None = None
    ) -> dict[str, Any]:
        """Return what is known of a name: `instances` with owners and last probe, `departures` with reasons.

        Raises:
            NotFound: nothing is.
        """
        check_service(name, instance)
        return await self._within(timeout, "why", self._ask("why", name=name, instance=instance))

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
    ) -> "RegistrationContext":
        """Register a service; `await` it for a `Registration`, or use it with `async with`.

        It lasts as long as this connection and this process, comes back after a break by itself, and is
        deregistered on leaving the `async with`. `static`: it outlives all that, until somebody deregisters it.
        `state` is `starting` for a service that is not ready yet. `force` takes the name from a living owner.
        `pid`, for who starts services: it lasts as long as that process, and not as this one; where the daemon
        does not see the same processes, as long as this connection. Without a daemon it tries for 5 s, or for
        `timeout` seconds.

        Raises:
            Conflict: another owner has the name, and lives; `details["owner"]` says who.
        """
        check_registration(name, port, host, instance, state, pid)
        check_flag("static", static)
        check_flag("force", force)
        check_seconds("timeout", timeout)
        if static and pid is not None:
            raise BadArgument("what is static outlives every process: leave out `pid`", details={"field": "pid"})
        arguments = {
            "name": name,
            "port": port,
            "host": host,
            "instance": instance,
            "meta": labels(meta),
            "state": state,
            "force": force or None,
        }
        return RegistrationContext(self, arguments, static, pid, timeout)

    async def deregister(self, name: str, instance: str | None = None, *, timeout: float | None = None) -> None:
        """End a registration, whoever made it; one that was made with this client as its own `deregister` does.

        Raises:
            NotFound: there is none.
        """
        check_service(name, instance)
        self._check_fork()
        own = self._keeper.holdings.kept(name, instance)
        if own is not None:
            await own.deregister(timeout=timeout)
        else:
            asked = self._ask("deregister", name=name, instance=instance)
            await self._within(timeout, "deregister", asked)

    async def update(
        self,
        name: str,
        meta: Mapping[str, str] | None = None,
        *,
        state: str | None = None,
        instance: str | None = None,
        timeout: float | None = None,
    ) -> None:
        """Replace the meta of a registration as a whole, set its state, or both.

        Raises:
            NotFound: there is none.
        """
        check_service(name, instance)
        check_text("state", state)
        replacing = labels(meta)
        self._check_fork()
        own = self._keeper.holdings.kept(name, instance)
        if own is not None:
            await own.update(replacing, state=state, timeout=timeout)
        else:
            asked = self._ask("update", name=name, instance=instance, meta=replacing, state=state)
            await self._within(timeout, "update", asked)

    async def resolve(
        self,
        name: str,
        *,
        instance: str | None = None,
        meta: Mapping[str, str] | None = None,
        wait: float | None = None,
        timeout: float | None = None,
    ) -> Endpoint:
        """Return a ready instance, taking turns among those that carry all of `meta`.

        With `wait`, the first that can be reached within so many seconds, whatever breaks meanwhile. It waits for
        the daemon, too.

        Raises:
            NotFound: there is none; `details` may name some that are `near`.
            Timeout: none within `wait`; the message says why.
        """
        asked: dict[str, Any] = {"name": name}
        if instance is not None:
            asked["instance"] = instance
        if meta is not None:
            asked["meta"] = labels(meta)
        if wait is None and timeout is None and type(name) is str and (instance is None or type(instance) is str):
            connection = self._link.usable or await self._connected()
            return endpoint(await connection.ask("resolve", asked, again=True))
        check_service(name, instance)
        check_seconds("wait", wait, WAIT_S_MAX)
        work = self._resolve(asked) if wait is None else self._wait_for(asked, wait)
        return await self._within(timeout, "resolve", work)

    async def _resolve(self, asked: dict[str, Any]) -> Endpoint:
        return endpoint(await self._ask("resolve", **asked))

    async def _wait_for(self, asked: dict[str, Any], wait: float) -> Endpoint:
        running_loop()
        until = time.monotonic() + wait
        while True:
            left_s = min(wait, max(0.0, until - time.monotonic()))
            try:
                async with asyncio.timeout(left_s + _SLACK_S):
                    connection = await self._connected(max(left_s, _ONE_TRY_S), Patience.SILENT)
                    left_s = min(left_s, max(0.0, until - time.monotonic()))
                    return endpoint(await connection.ask("resolve", {**asked, "wait": left_s}))
            except Unavailable as error:
                if error.code == NOT_REGD or time.monotonic() >= until:
                    raise
            except TimeoutError as error:
                if isinstance(error, RegdError):
                    raise
                name = asked["name"]
                raise Unavailable(f"the daemon said nothing while {wait:g} s were waited for {name!r}") from None
            await pause(random.uniform(0, _PAUSE_S))

    async def resolve_all(
        self, name: str, *, meta: Mapping[str, str] | None = None, timeout: float | None = None
    ) -> list[Endpoint]:
        """Return all ready instances that carry all of `meta`, in order of instance.

        Raises:
            NotFound: there is none.
        """
        check_service(name)
        return await self._within(timeout, "resolve_all", self._resolve_all(name, labels(meta)))

    async def _resolve_all(self, name: str, meta: dict[str, str] | None) -> list[Endpoint]:
        reply = await self._ask("resolve", name=name, all=True, meta=meta)
        if not reply.get("more"):
            return [endpoint(fields) for fields in reply["instances"]]
        listed = await self._instances(name, meta)
        return [endpoint(fields) for fields in listed if fields["state"] == "ready"]

    async def instances(
        self, pattern: str = "*", *, meta: Mapping[str, str] | None = None, timeout: float | None = None
    ) -> list[dict[str, Any]]:
        """Return every registration whose name is `pattern`, or begins with it before a `*`, as the wire has it.

        They come in pages; a registration that is there throughout is in the list once.
        """
        check_text("pattern", pattern, required=True)
        return await self._within(timeout, "instances", self._instances(pattern, labels(meta)))

    async def _instances(self, pattern: str, meta: dict[str, str] | None) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = []
        after = None
        for number in itertools.count(1):
            reply = await self._ask("list", name=pattern, meta=meta, after=after)
            wire.add_page(found, reply, number)
            after = reply.get("next")
            if after is None:
                break
        return found

    # Following.

    def watch(
        self, pattern: str = "*", *, meta: Mapping[str, str] | None = None, timeout: float | None = None
    ) -> AsyncGenerator[Event, None]:
        """Yield what is there as `up` events, `sync`, and then every change as it happens.

        After a break the events are the differences between what was told and what is. A listener that is far
        behind is told the differences instead of every step. It ends when the client is closed. `timeout` is for
        the beginning: until the daemon has accepted the watch.
        """
        check_text("pattern", pattern, required=True)
        check_seconds("timeout", timeout)
        return self._watch(pattern, labels(meta), timeout)

    async def _watch(
        self, pattern: str, meta: dict[str, str] | None, timeout: float | None, own: bool = False
    ) -> AsyncGenerator[Event, None]:
        """Yield events. `own`: the client was made for this, and ends with it.

        There is no other generator within: at its end an event loop closes all that are left at once.
        """
        self._check_fork()
        backlog = EventQueue()
        try:
            async with contextlib.AsyncExitStack() as stack:
                following = self._keeper.following(WatchState(pattern, meta, backlog.add, backlog.end))
                await self._within(timeout, "watch", stack.enter_async_context(following))
                while (event := await backlog.next()) is not None:
                    yield event
        finally:
            if own:
                await self.close()

    @contextlib.asynccontextmanager
    async def mirror(
        self,
        pattern: str = "*",
        *,
        meta: Mapping[str, str] | None = None,
        stale_s_max: float | None = None,
        timeout: float | None = None,
    ) -> AsyncIterator[Mirror]:
        """Keep a local picture of the services whose name fits, and resolve from it without a round trip.

            async with client.mirror("worker*") as mirror:
                found = mirror.resolve("worker")

        `timeout` is for the first picture, 15 s where it is left out.

        Raises:
            Unavailable: the first picture did not come in time, or a later answer is older than `stale_s_max`.
        """
        check_text("pattern", pattern, required=True)
        check_seconds("stale_s_max", stale_s_max)
        check_seconds("timeout", timeout)
        within_s = _PICTURE_S if timeout is None else timeout
        running_loop()
        self._check_fork()
        mirror = Mirror(stale_s_max)
        complete = asyncio.Event()

        def changed(event: Event) -> None:
            mirror.changed(event)
            if event.kind == "sync":
                complete.set()

        follow = WatchState(pattern, labels(meta), changed, complete.set)
        mirror.follow(follow)
        async with contextlib.AsyncExitStack() as stack:
            try:
                async with asyncio.timeout(within_s):
                    await stack.enter_async_context(self._keeper.following(follow))
                    await complete.wait()
            except TimeoutError as error:
                if isinstance(error, RegdError):
                    raise
                if self._link.usable is None:
                    raise self._link.away() from None
                raise Unavailable(f"the daemon told too little of {pattern!r} in {within_s:g} s") from None
            if follow.ended:
                raise Unavailable("the client was closed meanwhile")
            yield mirror

    # The connection.

    async def _ask(self, cmd: str, **arguments: Any) -> dict[str, Any]:
        return await (self._link.usable or await self._connected()).ask(cmd, arguments)

    def _check_fork(self) -> None:
        """In a child, begin with nothing: connection, registrations and watches are the parent's."""
        if self._pid != os.getpid():
            self._begin()

    async def _connected(self, within_s: float | None = None, patience: Patience = Patience.NONE) -> Connection:
        self._check_fork()
        return await self._link.connected(within_s, patience)

    async def _within(self, timeout: float | None, what: str, work: Coroutine[Any, Any, T]) -> T:
        """Do it within so many seconds.

        Raises:
            Unavailable: they are over, and there is no connection.
            Timeout: they are over.
        """
        if timeout is None:
            return await work
        try:
            check_seconds("timeout", timeout)
            running_loop()
        except RegdError:
            work.close()
            raise
        try:
            async with asyncio.timeout(timeout):
                return await work
        except TimeoutError as error:
            if isinstance(error, RegdError):
                raise
            if self._link.usable is None:
                raise self._link.away() from None
            raise Timeout(f"{what} was not answered within {timeout:g} s") from None
