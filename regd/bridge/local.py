"""The local daemon: a watch of all its registrations, and the connections that hold those that came in."""

import asyncio
import contextlib
import itertools
import logging
from collections.abc import Callable, Coroutine, Mapping
from typing import Any, NoReturn

from regd.bridge import records
from regd.bridge.reconcile import difference
from regd_client import protocol
from regd_client.connection import Connection
from regd_client.connector import Connector
from regd_client.errors import Conflict, Denied, RegdError, Unavailable
from regd_client.event_loop import random_s
from regd_client.models import Event, Key
from regd_client.protocol import AddressFinder
from regd_client.watches import WatchState

__all__ = ["Local", "LocalRefusal", "Session"]

log = logging.getLogger("regd.bridge")

_PING_S = 5.0  # between two pings, with which a daemon that hangs is noticed
_PAUSE_S = 0.5  # at most, before the next attempt
_CONNECT_S = 5.0


class LocalRefusal(Exception):
    """The daemon refuses this bridge, and would refuse it again. The message is one line."""


class _Watch(WatchState):
    """A watch that also tells of its position after every line from the daemon."""

    def __init__(self, on_event: Callable[[Event], None], on_line: Callable[[], None]) -> None:
        super().__init__("*", None, on_event)
        self._on_line = on_line

    def take(self, fields: Mapping[str, Any]) -> None:
        super().take(fields)
        self._on_line()


class Session:
    """Connections to one run of the daemon. When one breaks, the session has ended.

    Attributes:
        held: by name and instance, the connection that holds what came in.
    """

    def __init__(self, connection: Connection, held_max: int, watch: _Watch) -> None:
        self.held: dict[Key, Connection] = {}
        self._held_max = held_max
        self._watch = watch
        self._connections = [connection]
        self._counts = [1]  # registrations that each connection holds; the bridge itself is one
        self._moved = asyncio.Event()
        self._placing = asyncio.Lock()

    async def list_all(self) -> dict[Key, dict[str, Any]]:
        """Return all registrations of the daemon.

        Raises:
            RegdError: the daemon is away.
        """
        instances: list[dict[str, Any]] = []
        after = None
        for number in itertools.count(1):
            page = await self._connections[0].ask("list", {"after": after, "limit": 1_000})
            protocol.add_page(instances, page, number)
            after = page.get("next")
            if after is None:
                break
        return {(instance["name"], instance["instance"]): instance for instance in instances}

    async def register(self, key: Key, fields: Mapping[str, Any], if_rev: int) -> int:
        """Register what came in, if the registration is at revision `if_rev`. Return its revision.

        Raises:
            RegdError: the daemon refuses, or is away.
        """
        connection = self.held.get(key)
        is_new = connection is None
        if connection is None:
            number = await self._place()
            connection = self._connections[number]
            self._counts[number] += 1
            self.held[key] = connection
        name, instance = key
        arguments = {"name": name, "instance": instance, "hold": True, "if": if_rev, **fields}
        try:
            return int((await connection.ask("register", arguments))["rev"])
        except RegdError:
            if is_new:
                self.forget(key)
            raise

    async def deregister(self, key: Key, if_rev: int) -> int:
        """Withdraw what came in, if it is at revision `if_rev`. Return the registry's revision.

        Raises:
            RegdError: the daemon refuses, or is away.
        """
        connection = self.held.get(key, self._connections[0])
        name, instance = key
        reply = await connection.ask("deregister", {"name": name, "instance": instance, "if": if_rev})
        self.forget(key)
        return int(reply["rev"])

    async def release(self, key: Key, if_rev: int) -> int:
        """Give up the hold of what a local service has registered too, at revision `if_rev`.

        Raises:
            RegdError: the daemon refuses, or is away.
        """
        connection = self.held.get(key)
        if connection is None:
            return 0
        await connection.ask("ping", {})  # its reply comes after `lost`, if the hold has ended already
        return await self.deregister(key, if_rev) if key in self.held else 0

    def on_lost(self, connection: Connection, event: Mapping[str, Any]) -> None:
        """Take note that somebody else has ended or replaced what a connection held."""
        key = (event["name"], event["instance"])
        if self.held.get(key) is connection:
            self.forget(key)

    def forget(self, key: Key) -> None:
        """Take note that a registration has ended, whoever ended it. Idempotent."""
        connection = self.held.pop(key, None)
        if connection is not None:
            self._counts[self._connections.index(connection)] -= 1

    async def _place(self) -> int:
        """Return the number of a connection that may hold one more. The caller counts it at once."""
        async with self._placing:
            for number, count in enumerate(self._counts):
                if count < self._held_max:
                    return number
            async with asyncio.timeout(_CONNECT_S):
                connection = await Connection.open(self._connections[0].address, self.on_lost)
            self._connections.append(connection)
            self._counts.append(0)
            self.moved()
            return len(self._counts) - 1

    async def reach(self, rev: int) -> None:
        """Wait until the watch has received all changes up to a revision."""
        await self._until(lambda: self._watch.rev >= rev)

    async def until_live(self) -> None:
        """Wait until the watch is up to date."""
        await self._until(lambda: self._watch.live)

    async def _until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            self._moved.clear()
            await self._moved.wait()

    def moved(self) -> None:
        """Wake those that wait for the watch, or for another connection."""
        self._moved.set()

    async def until_break(self) -> None:
        """Wait until a connection breaks. Ping the daemon meanwhile."""
        while all(connection.usable for connection in self._connections):
            closed = [connection.closed for connection in self._connections]
            done, _ = await asyncio.wait(closed, timeout=_PING_S, return_when=asyncio.FIRST_COMPLETED)
            if not done:
                for connection in self._connections:
                    connection.post("ping", {})

    def close(self) -> None:
        """Close the connections, which ends what they hold."""
        for connection in self._connections:
            connection.end()


class Local:
    """The registrations of the local daemon, and a session with it, whenever there is one.

    Args:
        address: of the daemon; None for the default.
        bridge: the fields with which the bridge registers itself.
        on_change: called with the key of each instance that has changed; with None if any may have.
    """

    def __init__(
        self, address: str | None, bridge: Mapping[str, Any], on_change: Callable[[Key | None], None]
    ) -> None:
        self._addresses = AddressFinder(address)
        self._connector = Connector(self._addresses, None)
        self._connector.on_lost = self._on_lost
        self._bridge = bridge
        self._on_change = on_change
        self._watch = _Watch(self._take, self._move)
        self._epoch: str | None = None
        self._is_complete = False
        self._is_registered = False  # the bridge was, at least once
        self._lost = ""  # why the daemon is away, if that was logged
        self.session: Session | None = None

    @property
    def address(self) -> str:
        return str(self._addresses.find())

    @property
    def instances(self) -> Mapping[Key, Mapping[str, Any]]:
        """All registrations, as of the last event."""
        return self._watch.instances

    @property
    def epoch(self) -> str:
        return self._watch.epoch or ""

    @property
    def rev(self) -> int:
        return self._watch.rev

    @property
    def is_complete(self) -> bool:
        """Whether `instances` has been complete once."""
        return self._is_complete

    @property
    def stale_s(self) -> float:
        """Seconds since `instances` may be out of date."""
        return self._watch.stale_s

    def differences(self, instances: Mapping[Key, Mapping[str, Any]]) -> set[str]:
        """Return in which registrations the daemon, which has these, differs from what is known here."""
        there = {key: instance["rev"] for key, instance in instances.items()}
        known = {key: instance["rev"] for key, instance in self.instances.items()}
        return {f"{key!r} {old} {new}" for key, old, new in difference(there, known)}

    async def run(self, work: Callable[[Session], Coroutine[Any, Any, None]]) -> NoReturn:
        """Keep a session with the daemon, and run `work` in each.

        Raises:
            LocalRefusal: another bridge serves the daemon, or this user may not register.
        """
        while True:
            try:
                connection = await self._connector.connect()
                await self._run_session(connection, work)
                self._log_loss("it closed the connection")
            except (RegdError, OSError, TimeoutError) as error:
                self._log_loss(str(error) or "no answer in time")
            await asyncio.sleep(random_s(0, _PAUSE_S))

    async def _run_session(
        self, connection: Connection, work: Callable[[Session], Coroutine[Any, Any, None]]
    ) -> None:
        limits = (await connection.ask("hello", {}))["limits"]
        session = Session(connection, int(limits["held_max"]), self._watch)
        try:
            await self._register_bridge(connection)
            await connection.ask("watch", self._watch.begin(connection), self._watch.take)
            self.session = session
            working = asyncio.create_task(self._work(session, work), name="regd-bridge-session")
            breaking = asyncio.create_task(session.until_break(), name="regd-bridge-break")
            try:
                await asyncio.wait((working, breaking), return_when=asyncio.FIRST_COMPLETED)
                if working.done():
                    await working
            finally:
                working.cancel()
                breaking.cancel()
                await asyncio.gather(working, breaking, return_exceptions=True)
        finally:
            self.session = None
            self._watch.pause()
            session.close()

    async def _work(self, session: Session, work: Callable[[Session], Coroutine[Any, Any, None]]) -> None:
        await session.until_live()
        log.info("connected to the daemon at %s", self.address)
        self._lost = ""
        await work(session)

    async def _register_bridge(self, connection: Connection) -> None:
        try:
            await connection.ask("register", {"name": records.BRIDGE, "hold": True, **self._bridge})
        except Conflict as conflict:
            if self._is_registered:
                raise  # by a connection that the daemon has not yet seen to be closed
            where, _, _ = str(conflict).partition(";")  # what follows is for services
            raise LocalRefusal(
                f"another bridge serves the daemon at {self.address}: {where}; end it first"
            ) from None
        except Denied as denial:
            raise LocalRefusal(str(denial)) from None
        self._is_registered = True

    def _log_loss(self, why: str) -> None:
        if not self._lost:
            log.warning("the daemon at %s is away: %s; still trying", self.address, why)
        self._lost = why

    def _take(self, event: Event) -> None:
        if event.endpoint is None:
            self._is_complete = True
            self._on_change(None)
            return
        self._on_change((event.endpoint.name, event.endpoint.instance))

    def _on_lost(self, connection: Connection, event: Mapping[str, Any]) -> None:
        if self.session is not None:
            self.session.on_lost(connection, event)

    def _move(self) -> None:
        """Note the position of the watch. In another epoch, all that is published has another value."""
        if self._epoch != self._watch.epoch:
            self._epoch = self._watch.epoch
            self._on_change(None)
        if self.session is not None:
            self.session.moved()

    async def close(self) -> None:
        """End the session, and with it all that it holds. Idempotent."""
        if self.session is not None:
            self.session.close()
        with contextlib.suppress(Unavailable):
            await self._connector.close()
