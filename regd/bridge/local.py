"""The local daemon: a watch of all its registrations, and the connections that hold other machines' instances."""

import asyncio
import contextlib
import itertools
import logging
import time
from collections.abc import Callable, Coroutine, Mapping
from typing import Any, NamedTuple, NoReturn

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
_CONNECT_S = 5.0  # for a further connection
_FULL_S = 1.0  # after a failure to open a further connection, until the next attempt


class LocalRefusal(Exception):
    """The daemon refuses this bridge for good. The message is one line."""


class _Watch(WatchState):
    """A watch that calls `on_line` after each line from the daemon. True: the line completes a snapshot."""

    def __init__(self, on_event: Callable[[Event], None], on_line: Callable[[bool], None]) -> None:
        super().__init__("*", None, on_event)
        self._on_line = on_line

    def take(self, fields: Mapping[str, Any]) -> None:
        super().take(fields)
        self._on_line(fields.get("event") == "sync")


class Hold(NamedTuple):
    """The connection that holds a registration. `since_rev`: the watch's revision at the request."""

    connection: Connection
    since_rev: int


class Session:
    """Connections to one run of the daemon. When one breaks, the session has ended.

    Attributes:
        held: the instances of other machines that this session has registered.
    """

    def __init__(self, connection: Connection, held_max: int, watch: _Watch) -> None:
        self.held: dict[Key, Hold] = {}
        self._held_max = held_max
        self._watch = watch
        self._connections = [connection]
        self._counts = [1]  # registrations that each connection holds; the bridge itself is one
        self._moved = asyncio.Event()
        self._placing = asyncio.Lock()
        self._full_until = 0.0
        self._why_full = ""

    async def list_all(self) -> dict[Key, dict[str, Any]]:
        """Return all registrations of the daemon, once the watch has received their changes too.

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
                await self.reach(page["rev"])
                break
        return {(instance["name"], instance["instance"]): instance for instance in instances}

    async def register(self, key: Key, fields: Mapping[str, Any], if_rev: int) -> int:
        """Register an instance of another machine, if the registration is at revision `if_rev`.

        Returns the revision of the registration.

        Raises:
            RegdError: the daemon refuses, or is away.
        """
        is_new = key not in self.held
        if is_new:
            number = await self._place()
            self._counts[number] += 1
            self.held[key] = Hold(self._connections[number], self._watch.rev)
        name, instance = key
        arguments = {"name": name, "instance": instance, "hold": True, "if": if_rev, **fields}
        try:
            return int((await self.held[key].connection.ask("register", arguments))["rev"])
        except RegdError:
            if is_new:
                self.forget(key)
            raise

    async def deregister(self, key: Key, if_rev: int) -> int:
        """Deregister an instance of another machine, if it is at revision `if_rev`.

        Returns the revision of its end; 0 if another client keeps it registered.

        Raises:
            RegdError: the daemon refuses, or is away.
        """
        hold = self.held.get(key)
        connection = self._connections[0] if hold is None else hold.connection
        name, instance = key
        reply = await connection.ask("deregister", {"name": name, "instance": instance, "if": if_rev})
        self.forget(key)
        return int(reply["rev"]) if reply["removed"] else 0

    async def release(self, key: Key, if_rev: int) -> int:
        """Give up the hold of a registration that a local service holds too, at revision `if_rev`.

        Raises:
            RegdError: the daemon refuses, or is away.
        """
        hold = self.held.get(key)
        if hold is None:
            return 0
        await hold.connection.ask("ping", {})  # its reply comes after `lost`, if the hold has ended already
        return await self.deregister(key, if_rev) if key in self.held else 0

    def on_lost(self, connection: Connection, event: Mapping[str, Any]) -> None:
        """Note that another client has ended or replaced a registration that a connection held.

        The event may come after the watch's, when the key is registered again. Then its revision is an old one.
        """
        key = (event["name"], event["instance"])
        hold = self.held.get(key)
        if hold is not None and hold.connection is connection and hold.since_rev < event["rev"]:
            self.forget(key)

    def forget(self, key: Key) -> None:
        """Note that a registration has ended. Idempotent."""
        hold = self.held.pop(key, None)
        if hold is not None:
            self._counts[self._connections.index(hold.connection)] -= 1

    async def _place(self) -> int:
        """Return the number of a connection that may hold one more. The caller counts it at once.

        Raises:
            RegdError: all are full, and the daemon accepts no further one.
        """
        async with self._placing:
            for number, count in enumerate(self._counts):
                if count < self._held_max:
                    return number
            if time.monotonic() < self._full_until:
                raise RegdError(self._why_full, "busy")
            try:
                connection = await self._open()
            except OSError as error:
                self._full_until = time.monotonic() + _FULL_S
                self._why_full = f"cannot open another connection: {str(error) or 'no answer in time'}"
                raise RegdError(self._why_full, "busy") from None
            self._connections.append(connection)
            self._counts.append(0)
            self.moved()
            return len(self._counts) - 1

    async def _open(self) -> Connection:
        """Open a further connection, and check that the daemon does not close it for being one too many.

        Raises:
            OSError: the daemon closes the connection, or does not answer.
        """
        async with asyncio.timeout(_CONNECT_S):
            connection = await Connection.open(self._connections[0].address, self.on_lost)
            try:
                await connection.ask("ping", {})
            except BaseException:
                connection.end()
                raise
            return connection

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
        """Wake the tasks that wait for the watch, or for another connection."""
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
    """The registrations of the local daemon, and the session with it.

    Args:
        address: of the daemon; None for the default.
        bridge: the fields with which the bridge registers itself.
        on_change: called with the key of each instance that has changed; with None if any may have.

    Attributes:
        is_complete: whether `instances` has been complete once.
        session: None while the daemon is away.
    """

    def __init__(
        self, address: str | None, bridge: Mapping[str, Any], on_change: Callable[[Key | None], None]
    ) -> None:
        self._addresses = AddressFinder(address)
        self._connector = Connector(self._addresses, None)
        self._connector.on_lost = self._on_lost
        self._own = {"name": records.BRIDGE, "hold": True, **bridge}
        self._on_change = on_change
        self._watch = _Watch(self._take, self._move)
        self._epoch: str | None = None
        self.is_complete = False
        self._is_registered = False  # this bridge has been registered at least once
        self._lost = ""  # why the daemon is away; "" if that was not logged
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
    def stale_s(self) -> float:
        """Seconds since `instances` may be out of date."""
        return self._watch.stale_s

    def differences(self, instances: Mapping[Key, Mapping[str, Any]]) -> set[str]:
        """Return where the daemon's registrations, as listed, differ from the known ones."""
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
                self._log_loss("the connection has ended")
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
            await connection.ask("register", self._own)
        except Conflict as conflict:
            if self._is_registered:
                raise  # the owner is this bridge's last connection, whose end the daemon has not noticed yet
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
        if event.endpoint is not None:
            self._on_change((event.endpoint.name, event.endpoint.instance))

    def _on_lost(self, connection: Connection, event: Mapping[str, Any]) -> None:
        if (event["name"], event["instance"]) == (records.BRIDGE, ""):
            # Somebody has deregistered the bridge itself, which `--status` and Prometheus need.
            connection.post("register", self._own)
        elif self.session is not None:
            self.session.on_lost(connection, event)

    def _move(self, is_snapshot: bool) -> None:
        """Note the position of the watch.

        In another epoch, all published instances have another value. After a snapshot, any instance may have
        another revision, and the watch reports only those whose other fields have changed.
        """
        if is_snapshot or self._epoch != self._watch.epoch:
            self.is_complete = self.is_complete or is_snapshot
            self._epoch = self._watch.epoch
            self._on_change(None)
        if self.session is not None:
            self.session.moved()

    async def close(self) -> None:
        """End the session and the registrations that it holds. Idempotent."""
        if self.session is not None:
            self.session.close()
        with contextlib.suppress(Unavailable):
            await self._connector.close()
