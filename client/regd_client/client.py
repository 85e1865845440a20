"""The client: the verbs of the registry on one connection that is opened when needed, and again when it broke.

What the caller has registered and follows is the truth: after a break it is made so again, by one task that lives
as long as there is something to keep. Must not know how a request is written.
"""

import asyncio
import contextlib
import logging
import os
import random
import time
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from types import TracebackType
from typing import Any, Self

from regd_client import wire
from regd_client.connection import Connection
from regd_client.errors import Conflict, RegdError, Unavailable
from regd_client.following import Backlog, Endpoint, Event, Follow, endpoint
from regd_client.link import Link
from regd_client.picture import Mirror
from regd_client.registration import Registering, Registration

log = logging.getLogger("regd_client")

CONNECT_TIMEOUT_S = 5.0
_PAUSE_S = (0.02, 0.5)  # at most, before the first try to make all good, and before others
_ONE_TRY_S = 0.5  # to connect, however little time is left
_SLACK_S = 1.0  # for an answer that comes when the time is over
_AGAIN_S = 1.0  # between two tries to register again what the daemon could not take
_PICTURE_S = 15.0  # for the first picture of a mirror
_QUIET_S = 5.0  # while something is kept, a daemon that is silent for so long is asked whether it is there


class Client:
    """The registry at one address. Any number of tasks may use it at once; they share its connection.

        async with Client() as client:
            found = await client.resolve("runner")

    `address` is `tcp://HOST:PORT`, `HOST:PORT` or `unix:///path`; left out, $REGD_ADDRESS is read at each new
    connection, and without it tcp://127.0.0.1:7343 is taken. Where nobody answers, connecting is tried again for
    `connect_timeout_s` seconds. It belongs to the event loop that first uses it.

    Every verb raises `Unavailable` when no daemon answers, `BadArgument` for what the daemon does not take, and
    `RegdError` for its other refusals.
    """

    def __init__(self, address: str | None = None, *, connect_timeout_s: float = CONNECT_TIMEOUT_S) -> None:
        self._address = address
        self._connect_timeout_s = connect_timeout_s
        self._begin()

    def _begin(self) -> None:
        self._pid = os.getpid()
        self._link = Link(self._address, self._connect_timeout_s, self._lost)
        self._registrations: dict[tuple[str, str], Registration] = {}  # that must be held
        self._follows: dict[Follow, None] = {}
        self._keeper: asyncio.Task[None] | None = None
        self._news: asyncio.Event | None = None  # something to keep was added

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
        """Close the connection, and with it end what it holds. The next call opens another. Twice is harmless."""
        self._check_fork()
        link, follows, keeper = self._link, self._follows, self._keeper
        self._begin()  # before anything is waited for: whoever calls from now on has a connection of its own
        link.end()
        for follow in follows:
            follow.end()
        if keeper is not None:
            keeper.cancel()
        await link.close()
        if keeper is not None and keeper is not asyncio.current_task():
            await asyncio.wait((keeper,))

    # The verbs.

    async def ping(self) -> None:
        """Ask whether a daemon answers."""
        await self._ask("ping")

    async def hello(self) -> dict[str, Any]:
        """Return who answers: `server`, `version`, `protocol`, `epoch`, `rev`, `features`, `limits`, …"""
        return await self._ask("hello")

    async def stats(self) -> dict[str, Any]:
        """Return the daemon's counters, gauges and limits."""
        return await self._ask("stats")

    async def why(self, name: str, instance: str | None = None) -> dict[str, Any]:
        """Return what is known of a name: `instances` with owners and last probe, `departures` with reasons.

        Raises:
            NotFound: nothing is.
        """
        return await self._ask("why", name=name, instance=instance)

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
    ) -> "Registering":
        """Register a service; `await` it for a `Registration`, or use it with `async with`.

        It lasts as long as this connection and this process, comes back after a break by itself, and is
        deregistered on leaving the `async with`. `static`: it outlives all that, until somebody deregisters it.
        `state` is `starting` for a service that is not ready yet. `force` takes the name from a living owner.

        Raises:
            Conflict: another owner has the name, and lives; `details["owner"]` says who.
        """
        arguments = {
            "name": name,
            "port": port,
            "host": host,
            "instance": instance,
            "meta": None if meta is None else dict(meta),
            "state": state,
            "force": force or None,
        }
        return Registering(self, arguments, static)

    async def deregister(self, name: str, instance: str | None = None) -> None:
        """End a registration, whoever made it.

        Raises:
            NotFound: there is none.
        """
        self._registrations.pop((name, instance or ""), None)
        await self._ask("deregister", name=name, instance=instance)

    async def update(
        self,
        name: str,
        meta: Mapping[str, str] | None = None,
        *,
        state: str | None = None,
        instance: str | None = None,
    ) -> None:
        """Replace the meta of a registration as a whole, set its state, or both.

        Raises:
            NotFound: there is none.
        """
        given = None if meta is None else dict(meta)
        await self._ask("update", name=name, instance=instance, meta=given, state=state)
        if own := self._registrations.get((name, instance or "")):
            own.altered(given, state)

    async def resolve(
        self,
        name: str,
        *,
        instance: str | None = None,
        meta: Mapping[str, str] | None = None,
        wait: float | None = None,
    ) -> Endpoint:
        """Return a ready instance, taking turns among those that carry all of `meta`.

        With `wait`, the first that can be reached within so many seconds, whatever breaks meanwhile.

        Raises:
            NotFound: there is none; `details` may name some that are `near`.
            Timeout: none within `wait`; the message says why.
        """
        asked = {"name": name, "instance": instance, "meta": None if meta is None else dict(meta)}
        if wait is None:
            return endpoint(await self._ask("resolve", **asked))
        until = time.monotonic() + wait
        while True:
            left_s = min(wait, max(0.0, until - time.monotonic()))
            try:
                async with asyncio.timeout(left_s + _SLACK_S):
                    connection = await self._connected(max(left_s, _ONE_TRY_S))
                    left_s = min(left_s, max(0.0, until - time.monotonic()))
                    return endpoint(await connection.ask("resolve", {**asked, "wait": left_s}))
            except Unavailable:
                if time.monotonic() >= until:
                    raise
            except TimeoutError as error:
                if isinstance(error, RegdError):
                    raise
                raise Unavailable(f"the daemon said nothing while {wait:g} s were waited for {name!r}") from None
            await asyncio.sleep(random.uniform(0, _PAUSE_S[0]))

    async def resolve_all(self, name: str, *, meta: Mapping[str, str] | None = None) -> list[Endpoint]:
        """Return all ready instances that carry all of `meta`, in order of instance.

        Raises:
            NotFound: there is none.
        """
        wanted = None if meta is None else dict(meta)
        reply = await self._ask("resolve", name=name, all=True, meta=wanted)
        if not reply.get("more"):
            return [endpoint(fields) for fields in reply["instances"]]
        listed = await self.instances(name, meta=meta)
        return [endpoint(fields) for fields in listed if fields["state"] == "ready"]

    async def instances(
        self, pattern: str = "*", *, meta: Mapping[str, str] | None = None
    ) -> list[dict[str, Any]]:
        """Return every registration whose name is `pattern`, or begins with it before a `*`, as the wire has it.

        They come in pages; a registration that is there throughout is in the list once.
        """
        found: list[dict[str, Any]] = []
        after = None
        while True:
            wanted = None if meta is None else dict(meta)
            reply = await self._ask("list", name=pattern, meta=wanted, after=after)
            found += reply["instances"]
            after = reply.get("next")
            if after is None:
                return found

    # Following.

    async def watch(
        self, pattern: str = "*", *, meta: Mapping[str, str] | None = None
    ) -> AsyncGenerator[Event, None]:
        """Yield what is there as `up` events, `sync`, and then every change as it happens.

        After a break the events are the differences between what was told and what is. A listener that is far
        behind is told the differences instead of every step. It ends when the client is closed.
        """
        backlog = Backlog()
        async with self._following(Follow(pattern, meta, backlog.add, backlog.end)):
            while (event := await backlog.next()) is not None:
                yield event

    @contextlib.asynccontextmanager
    async def mirror(
        self,
        pattern: str = "*",
        *,
        meta: Mapping[str, str] | None = None,
        stale_s_max: float | None = None,
    ) -> AsyncIterator[Mirror]:
        """Keep a local picture of the services whose name fits, and resolve from it without a round trip.

            async with client.mirror("worker*") as mirror:
                found = mirror.resolve("worker")

        Raises:
            Unavailable: the first picture did not come in time, or a later answer is older than `stale_s_max`.
        """
        mirror = Mirror(stale_s_max)
        complete = asyncio.Event()

        def changed(event: Event) -> None:
            mirror.changed(event)
            if event.kind == "sync":
                complete.set()

        follow = Follow(pattern, meta, changed, complete.set)
        mirror.follow(follow)
        async with self._following(follow):
            try:
                async with asyncio.timeout(_PICTURE_S):
                    await complete.wait()
            except TimeoutError:
                raise Unavailable(f"the daemon told too little of {pattern!r} in {_PICTURE_S:g} s") from None
            if follow.ended:
                raise Unavailable("the client was closed meanwhile")
            yield mirror

    @contextlib.asynccontextmanager
    async def _following(self, follow: Follow) -> AsyncIterator[None]:
        connection = await self._connected()
        try:
            await self._follow(connection, follow)
            self._follows[follow] = None
            self._keep()
            yield
        finally:
            self._check_fork()
            self._follows.pop(follow, None)
            self._unfollow(follow)

    def _unfollow(self, follow: Follow) -> None:
        if isinstance(follow.on, Connection):
            follow.on.forget(follow.take)  # the watch is that connection's, and no other's
        follow.end()

    async def _follow(self, connection: Connection, follow: Follow) -> None:
        try:
            await connection.ask("watch", follow.begin(connection), follow.take)
        except RegdError:
            follow.pause()
            raise

    # The connection.

    async def _ask(self, cmd: str, **arguments: Any) -> dict[str, Any]:
        return await (await self._connected()).ask(cmd, arguments)

    def _check_fork(self) -> None:
        """In a child, begin with nothing: connection, registrations and watches are the parent's."""
        if self._pid != os.getpid():
            self._begin()

    async def _connected(self, within_s: float | None = None) -> Connection:
        self._check_fork()
        return await self._link.connected(within_s)

    # What is kept.

    async def _hold(self, connection: Connection) -> dict[str, Any]:
        """Return the conditions of a registration that is ours: the connection, and the process where the daemon
        sees the same processes as we do.
        """
        if connection.shares_processes is None:
            theirs = (await connection.ask("hello", {}))["host"]
            connection.shares_processes = None not in theirs.values() and theirs == wire.own_host()
        return {"hold": True, "pid": os.getpid() if connection.shares_processes else None}

    def _keep(self) -> None:
        """See to it that somebody keeps what was registered and is followed."""
        if self._news is None:
            self._news = asyncio.Event()
        self._news.set()
        if self._keeper is None or self._keeper.done():
            self._keeper = asyncio.create_task(self._keep_all(), name="regd-client-keep")
            _KEEPERS.add(self._keeper)
            self._keeper.add_done_callback(self._kept)

    def _kept(self, keeper: "asyncio.Task[None]") -> None:
        _KEEPERS.discard(keeper)
        if self._keeper is keeper and keeper.cancelled() and self._link.connection is not None:
            self._link.connection.abort("the event loop ended")  # and nobody else will close it
        elif not keeper.cancelled() and (bug := keeper.exception()) is not None:
            log.error("what was registered is not kept any more", exc_info=bug)

    async def _keep_all(self) -> None:
        told = False
        while self._registrations or self._follows:
            try:
                connection = await self._connected()
                whole = await self._restore(connection)
            except RegdError as trouble:
                if not told:
                    log.warning("the registry is away, trying on: %s", trouble)
                    told = True
                await asyncio.sleep(random.uniform(0, _PAUSE_S[1]))
                continue
            if told:
                log.info("the registry is back")
                told = False
            await self._while_it_lasts(connection, None if whole else _AGAIN_S)
            if not connection.usable:
                await asyncio.sleep(random.uniform(0, _PAUSE_S[0]))  # not all clients of a daemon at once

    async def _while_it_lasts(self, connection: Connection, again_s: float | None) -> None:
        """Wait until the connection breaks, or something is to be done. One that says nothing is asked."""
        assert self._news is not None
        while connection.usable and (self._registrations or self._follows):
            self._news.clear()
            quiet_s = time.monotonic() - connection.heard_at
            news = asyncio.ensure_future(self._news.wait())
            try:
                await asyncio.wait(
                    (connection.closed, news),
                    timeout=max(0.0, _QUIET_S - quiet_s) if again_s is None else again_s,
                    return_when=asyncio.FIRST_COMPLETED,
                )
                if news.done() or again_s is not None:
                    return
            finally:
                news.cancel()
            if connection.usable and time.monotonic() - connection.heard_at >= _QUIET_S:
                with contextlib.suppress(RegdError):
                    await connection.ask("ping", {})

    async def _restore(self, connection: Connection) -> bool:
        """Register again and follow again what this connection does not know. Returns whether all is done."""
        missing = [each for each in self._registrations.values() if each.on is not connection]
        outcomes = await asyncio.gather(*(self._again(connection, each) for each in missing))
        for follow in list(self._follows):
            if follow.on is not connection and not follow.ended:
                await self._follow(connection, follow)
        return all(outcomes)

    async def _again(self, connection: Connection, registration: "Registration") -> bool:
        try:
            conditions = {**await self._hold(connection), "force": None}
            wanted: dict[str, Any] = {}
            while wanted != registration.arguments:  # an update may be answered before this is, and stays
                if self._registrations.get(registration.key) is not registration:
                    return True  # left meanwhile
                wanted = dict(registration.arguments)
                reply = await connection.ask("register", {**wanted, **conditions})
        except Conflict as conflict:
            self._drop(registration, str(conflict))
        except Unavailable:
            raise
        except RegdError as trouble:
            log.warning("could not register %s again, trying on: %s", registration.endpoint.name, trouble)
            return False
        else:
            registration.made_on(connection, reply)
        return True

    def _lost(self, connection: Connection, event: Mapping[str, Any]) -> None:
        registration = self._registrations.get((event["name"], event["instance"]))
        if registration is not None:
            self._drop(registration, str(event["reason"]))

    def _drop(self, registration: "Registration", reason: str) -> None:
        """It is somebody else's now. It is not registered again: two would take it from each other for ever."""
        self._registrations.pop(registration.key, None)
        registration.lost_reason = reason
        registration.lost.set()
        log.warning("lost the registration of %s: %s", registration.endpoint.name, reason)


_KEEPERS: set["asyncio.Task[None]"] = set()  # a loop keeps its tasks weakly
