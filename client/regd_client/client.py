"""The async client: the verbs of the registry on one connection, which is opened on demand."""

import asyncio
import contextlib
import itertools
import os
import time
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine, Mapping
from typing import Any, Self, TypeVar, cast

from regd_client import protocol
from regd_client.arguments import (
    WAIT_S_MAX,
    RegistrationRequest,
    check_integer,
    check_seconds,
    check_service,
    check_text,
    copy_meta,
)
from regd_client.connection import Connection
from regd_client.connector import Connector, Patience
from regd_client.errors import NotFound, RegdError, Timeout, Unavailable
from regd_client.event_loop import pause, random_s, running_loop
from regd_client.mirrors import Mirror
from regd_client.models import Endpoint, Event, Hello, History, Instance, State, Stats, Why, endpoint_of
from regd_client.protocol import NOT_REGD, AddressFinder
from regd_client.registrar import Registrar
from regd_client.registration import RegistrationContext
from regd_client.watches import EventQueue, WatchState

__all__ = ["Client"]

_REPLY_S = 1.0  # time for the daemon's reply after `wait` has passed
_CONNECT_S_MIN = 0.5  # time to connect, even if less of `wait` is left
_PAUSE_S = 0.02  # maximum random pause before a `resolve` with `wait` reconnects
_SYNC_S = 15.0  # default time for the first complete copy of a mirror

T = TypeVar("T")


class Client:
    """A client of one daemon. Any number of tasks may use it at once; they share its connection.

        async with Client() as client:
            endpoint = await client.resolve("runner")

    The connection is opened on demand, and reopened when it is lost. A client belongs to the event loop that
    first uses it.

    If no daemon listens at the address, calls fail at once, except `register`, which tries for 5 s and logs that.
    With `connect_timeout_s`, every call tries to connect for that long.

    Every call takes `timeout`: seconds for the whole call, including connecting. After that time the call raises
    `Unavailable` if there is no connection, else `Timeout`; the daemon may or may not have made the change. Every
    call raises `Unavailable` if no daemon answers, `BadArgument` if an argument has the wrong type or an invalid
    value, and another `RegdError` if the daemon refuses.

    Args:
        address: `tcp://HOST:PORT`, `HOST:PORT` or `unix:///path`; by default $REGD_ADDRESS, which is read for
            each new connection, else the project registry of the current folder, else `tcp://127.0.0.1:7343`.
        connect_timeout_s: seconds to try to connect.

    Raises:
        BadArgument: an argument has the wrong type or an invalid value.
    """

    def __init__(self, address: str | None = None, *, connect_timeout_s: float | None = None) -> None:
        check_text("address", address)
        check_seconds("connect_timeout_s", connect_timeout_s)
        self._address = address
        self._addresses = AddressFinder(address)
        self._connect_timeout_s = connect_timeout_s
        self._reset()

    def _reset(self) -> None:
        self._pid = os.getpid()
        self._connector = Connector(self._addresses, self._connect_timeout_s)
        self._registrar = Registrar(self._connector)

    def __repr__(self) -> str:
        try:
            address = str(self._addresses.find())
        except RegdError:
            address = repr(self._address or os.environ.get("REGD_ADDRESS"))
        connected = self._pid == os.getpid() and self._connector.usable is not None
        return f"<Client {address}, {'connected' if connected else 'not connected'}>"

    async def __aenter__(self) -> Self:
        try:
            await self._connect()
        except BaseException:
            await self.close()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connection, which ends its registrations and watches. Idempotent. The next call reconnects.

        A daemon that is away will have the registrations again when it is back. So the client withdraws them
        then, in the background, if the event loop still runs.
        """
        self._check_fork()
        connector, registrar = self._connector, self._registrar
        self._reset()  # before the first await, so that a concurrent call gets a new connection
        registrar.stop()
        try:
            await registrar.close()
        finally:
            if not registrar.lingers:
                connector.end()
        if not registrar.lingers:
            await connector.close()

    # The verbs.

    async def ping(self, *, timeout: float | None = None) -> None:
        """Check that the daemon answers.

            await client.ping(timeout=1)

        Args:
            timeout: seconds for the whole call.

        Raises:
            Unavailable: no daemon answers.
            Timeout: the daemon did not reply within `timeout`.
        """
        await self._within(timeout, "ping", self._ask("ping"))

    async def hello(self, *, timeout: float | None = None) -> Hello:
        """Return the daemon's version, epoch, features and limits.

            print((await client.hello())["version"])

        Args:
            timeout: seconds for the whole call.

        Returns:
            A dictionary with `server`, `version`, `protocol`, `epoch`, `rev`, `features`, `limits`, `host` and
            `loop`.

        Raises:
            Unavailable: no daemon answers.
            Timeout: the daemon did not reply within `timeout`.
        """
        return cast(Hello, await self._within(timeout, "hello", self._ask("hello")))

    async def stats(self, *, timeout: float | None = None) -> Stats:
        """Return the daemon's counters, gauges and limits.

            print((await client.stats())["registrations"])

        Args:
            timeout: seconds for the whole call.

        Returns:
            A dictionary; PROTOCOL.md describes its fields.

        Raises:
            Unavailable: no daemon answers.
            Timeout: the daemon did not reply within `timeout`.
        """
        return cast(Stats, await self._within(timeout, "stats", self._ask("stats")))

    async def why(self, name: str, instance: str | None = None, *, timeout: float | None = None) -> Why:
        """Return what the daemon knows about a name: its instances, their owners, and why others have ended.

            print((await client.why("db"))["departures"])

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
        check_service(name, instance)
        return cast(Why, await self._within(timeout, "why", self._ask("why", name=name, instance=instance)))

    async def history(
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

            for change in (await client.history("db"))["changes"]:
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
        if name is not None or instance is not None:
            check_service(name, instance)
        for field, value in (("since", since), ("before", before), ("limit", limit)):
            check_integer(field, value)
        if age_s is not None:
            check_seconds("age_s", age_s)
        ask = self._ask(
            "history", name=name, instance=instance, since=since, before=before, age_s=age_s, limit=limit
        )
        return cast(History, await self._within(timeout, "history", ask))

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
    ) -> RegistrationContext:
        """Register a service. `await` the result for a `Registration`, or use it with `async with`.

            async with client.register("runner", 5050) as registration:
                await registration.lost.wait()

        The registration lasts as long as this connection and this process, and ends with the `async with`. After
        a reconnect, the client restores it.

        Args:
            name: the service's name: labels of a-z, 0-9, `-` and `_`, joined by dots.
            port: 1 to 65535. Open the port first, or use `listen` or `lifespan`.
            host: the address at which others reach the service; by default 127.0.0.1.
            instance: a name for this instance, if the service has several. `auto`: the lowest number from 1 that
                no live owner holds; `Registration.instance` is that number.
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
        check_integer("port", port, required=True)
        return RegistrationContext(
            self,
            RegistrationRequest(name, port, host, instance, meta, state, priority, static, force, pid, timeout),
        )

    async def deregister(self, name: str, instance: str | None = None, *, timeout: float | None = None) -> None:
        """End a registration, whichever client made it.

            await client.deregister("worker", "1")

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
        check_service(name, instance)
        self._check_fork()
        own = self._registrar.active(name, instance)
        if own is not None:
            await own.deregister(timeout=timeout)
        else:
            work = self._ask("deregister", name=name, instance=instance)
            await self._within(timeout, "deregister", work)

    async def update(
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

            await client.update("worker", state="draining", instance="1")

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
        check_service(name, instance)
        check_text("state", state)
        check_integer("priority", priority)
        meta = copy_meta(meta)
        self._check_fork()
        own = self._registrar.active(name, instance)
        if own is not None:
            await own.update(meta, state=state, priority=priority, timeout=timeout)
        else:
            work = self._ask("update", name=name, instance=instance, meta=meta, state=state, priority=priority)
            await self._within(timeout, "update", work)

    async def resolve(
        self,
        name: str,
        *,
        instance: str | None = None,
        meta: Mapping[str, str] | None = None,
        wait: float | None = None,
        timeout: float | None = None,
    ) -> Endpoint:
        """Return the endpoint of a ready instance of the best priority; calls rotate through all such instances.

            endpoint = await client.resolve("db", wait=10)
            reader, writer = await asyncio.open_connection(*endpoint.address)

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
        arguments: dict[str, Any] = {"name": name}
        if instance is not None:
            arguments["instance"] = instance
        if meta is not None:
            arguments["meta"] = copy_meta(meta)
        if wait is None and timeout is None and type(name) is str and (instance is None or type(instance) is str):
            # The fast path for the most frequent call.
            connection = self._connector.usable or await self._connect()
            return endpoint_of(await connection.ask("resolve", arguments, cached=True))
        check_service(name, instance)
        check_seconds("wait", wait, WAIT_S_MAX)
        work = self._resolve(arguments) if wait is None else self._wait_for(arguments, wait)
        return await self._within(timeout, "resolve", work)

    async def _resolve(self, arguments: dict[str, Any]) -> Endpoint:
        return endpoint_of(await self._ask("resolve", **arguments))

    async def _wait_for(self, arguments: dict[str, Any], wait: float) -> Endpoint:
        running_loop()
        until = time.monotonic() + wait
        while True:
            left_s = min(wait, max(0.0, until - time.monotonic()))
            try:
                async with asyncio.timeout(left_s + _REPLY_S):
                    connection = await self._connect(max(left_s, _CONNECT_S_MIN), Patience.SILENT)
                    left_s = min(left_s, max(0.0, until - time.monotonic()))
                    return endpoint_of(await connection.ask("resolve", {**arguments, "wait": left_s}))
            except Unavailable as error:
                if error.code == NOT_REGD or time.monotonic() >= until:
                    raise
            except TimeoutError as error:
                if isinstance(error, RegdError):
                    raise
                name = arguments["name"]
                raise Unavailable(f"the daemon did not answer while waiting {wait:g} s for {name!r}") from None
            await pause(random_s(0, _PAUSE_S))

    async def resolve_all(
        self, name: str, *, meta: Mapping[str, str] | None = None, timeout: float | None = None
    ) -> list[Endpoint]:
        """Return the endpoints of all ready instances, in order of priority and instance; [] if there are none.

            for endpoint in await client.resolve_all("worker"):
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
        check_service(name)
        return await self._within(timeout, "resolve_all", self._resolve_all(name, copy_meta(meta)))

    async def _resolve_all(self, name: str, meta: dict[str, str] | None) -> list[Endpoint]:
        try:
            reply = await self._ask("resolve", name=name, all=True, meta=meta)
        except NotFound:
            return []
        if not reply.get("more"):
            return [endpoint_of(fields) for fields in reply["instances"]]
        instances = await self._instances(name, meta)
        endpoints = [endpoint_of(fields) for fields in instances if fields["state"] == "ready"]
        return sorted(endpoints, key=lambda endpoint: endpoint.priority)  # the daemon sorts by instance only

    async def instances(
        self, pattern: str = "*", *, meta: Mapping[str, str] | None = None, timeout: float | None = None
    ) -> list[Instance]:
        """Return all registrations, in any state, in order of name and instance.

            for instance in await client.instances("worker*"):
                print(instance["name"], instance["state"])

        The daemon sends the registrations in pages. A registration that exists throughout the call is in the
        list exactly once.

        Args:
            pattern: a name, or a prefix followed by `*`.
            meta: only instances with all of these labels.
            timeout: seconds for the whole call.

        Raises:
            Unavailable: no daemon answers.
            Timeout: the daemon did not reply within `timeout`.
            BadArgument: an argument has the wrong type or an invalid value.
        """
        check_text("pattern", pattern, required=True)
        return await self._within(timeout, "instances", self._instances(pattern, copy_meta(meta)))

    async def _instances(self, pattern: str, meta: dict[str, str] | None) -> list[Instance]:
        instances: list[Instance] = []
        after = None
        for number in itertools.count(1):
            reply = await self._ask("list", name=pattern, meta=meta, after=after)
            protocol.add_page(instances, reply, number)
            after = reply.get("next")
            if after is None:
                break
        return instances

    # Watches and mirrors.

    def watch(
        self, pattern: str = "*", *, meta: Mapping[str, str] | None = None, timeout: float | None = None
    ) -> AsyncGenerator[Event, None]:
        """Yield an `up` event for each existing instance, then `sync`, and then every change as it happens.

            async for event in client.watch("worker*"):
                print(event.kind, event.endpoint)

        After a reconnect, the events are only the differences from the state before. A consumer that falls more
        than 10,000 events behind also gets only the differences. The watch ends when the client is closed.

        Args:
            pattern: a name, or a prefix followed by `*`.
            meta: only instances with all of these labels.
            timeout: seconds to wait for the daemon to accept the watch.

        Raises:
            Unavailable: no daemon answers at the beginning.
            Timeout: the daemon did not accept the watch within `timeout`.
            BadArgument: an argument has the wrong type or an invalid value.
        """
        check_text("pattern", pattern, required=True)
        check_seconds("timeout", timeout)
        return self._watch(pattern, copy_meta(meta), timeout)

    async def _watch(
        self, pattern: str, meta: dict[str, str] | None, timeout: float | None, close: bool = False
    ) -> AsyncGenerator[Event, None]:
        """Yield events. With `close`, the client was created for this watch and is closed with it.

        This generator must not iterate over another one: an event loop that ends closes all generators at once,
        so the inner generator could be closed first.
        """
        self._check_fork()
        queue = EventQueue()
        registrar, watch = self._registrar, WatchState(pattern, meta, queue.add, queue.end)
        try:
            await self._within(timeout, "watch", registrar.watch(watch))
            while (event := await queue.next()) is not None:
                yield event
        finally:
            registrar.unwatch(watch)
            if close:
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
        """Keep a local copy of the matching instances, to resolve names without a round trip.

            async with client.mirror("worker*") as mirror:
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
        check_text("pattern", pattern, required=True)
        check_seconds("stale_s_max", stale_s_max)
        check_seconds("timeout", timeout)
        timeout_s = _SYNC_S if timeout is None else timeout
        running_loop()
        self._check_fork()
        registrar, mirror = self._registrar, Mirror(pattern, copy_meta(meta), stale_s_max)
        try:
            try:
                async with asyncio.timeout(timeout_s):
                    await registrar.watch(mirror._watch)
                    await mirror._synced.wait()
            except TimeoutError as error:
                if isinstance(error, RegdError):
                    raise
                if self._connector.usable is None:
                    raise self._connector.unavailable() from None
                message = f"the daemon did not send all instances of {pattern!r} within {timeout_s:g} s"
                raise Unavailable(message) from None
            if mirror._watch.ended:
                raise Unavailable("the client was closed meanwhile")
            yield mirror
        finally:
            registrar.unwatch(mirror._watch)

    # The connection.

    async def _ask(self, cmd: str, **arguments: Any) -> dict[str, Any]:
        connection = self._connector.usable or await self._connect()
        try:
            return await connection.ask(cmd, arguments)
        except RegdError as error:
            raise await connection.explained(error, cmd, arguments) from None

    def _check_fork(self) -> None:
        """In a forked child, forget the connection, registrations and watches, which belong to the parent."""
        if self._pid != os.getpid():
            self._reset()

    async def _connect(self, timeout_s: float | None = None, patience: Patience = Patience.NONE) -> Connection:
        self._check_fork()
        return await self._connector.connect(timeout_s, patience)

    async def _within(self, timeout: float | None, what: str, work: Coroutine[Any, Any, T]) -> T:
        """Await `work` for at most `timeout` seconds.

        Raises:
            Unavailable: the time has passed, and there is no connection.
            Timeout: the time has passed.
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
            if self._connector.usable is None:
                raise self._connector.unavailable() from None
            raise Timeout(f"{what} was not answered within {timeout:g} s") from None
