"""The registrar of a client: it owns the client's registrations and watches, and restores them when the
connection breaks.

Commands for one name are sent one at a time, under a lock. Replies and `lost` events are handled in the daemon's
order. So this is done in callbacks of the connection: tasks could run in another order.
"""

import asyncio
import contextlib
import os
import random
import time
import weakref
from collections.abc import Coroutine, Mapping
from typing import Any, TypeVar

from regd_client import protocol
from regd_client.connection import Connection, OnFields
from regd_client.connector import Connector, Patience
from regd_client.errors import Conflict, RegdError, Unavailable
from regd_client.event_loop import pause, wait_shared
from regd_client.logger import log
from regd_client.models import Key
from regd_client.registration import Registration
from regd_client.watches import WatchState

__all__ = ["Registrar"]

_CLOSE_S = 0.2  # for a daemon that comes back just when the client is closed
_WITHDRAW_PAUSE_S = (0.02, 0.5)  # the first and the longest pause between attempts to withdraw
_RESTORE_PAUSE_S = (0.02, 0.5)  # the longest random pause before the first attempt to restore, and before others
_RETRY_S = 1.0  # between attempts to register what the daemon refused
_SILENT_S = 5.0  # a daemon that is silent for so long is pinged
_REPLACED = "replaced by a newer registration of this process"

T = TypeVar("T")


class Registrar:
    """The registrations and watches of a client.

    Attributes:
        lingers: the registrar is closed, and keeps the connection open to withdraw registrations.
    """

    def __init__(self, connector: Connector) -> None:
        self._connector = connector
        connector.on_lost = self._on_lost
        self.lingers = False
        self._registrations: dict[Key, Registration] = {}
        self._watches: dict[WatchState, None] = {}
        self._locks: weakref.WeakValueDictionary[Key, asyncio.Lock] = weakref.WeakValueDictionary()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._keeping: asyncio.Task[None] | None = None  # restores all after a break
        self._closed = False
        self._idle = asyncio.Event()  # nothing is left to keep

    def kept(self, name: str, instance: str | None) -> Registration | None:
        """Return the caller's registration of that name, None if there is none."""
        registration = self._registrations.get((name, instance or ""))
        return registration if registration is not None and registration._kept else None

    def _lock(self, key: Key) -> asyncio.Lock:
        return self._locks.setdefault(key, asyncio.Lock())

    def _start(self, work: Coroutine[Any, Any, T], name: str) -> "asyncio.Task[T]":
        task = asyncio.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._done)
        return task

    def _done(self, task: "asyncio.Task[Any]") -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()  # retrieved here, since perhaps no caller waits

    # Register.

    async def register(self, registration: Registration) -> Registration:
        """Register, and keep the registration from then on. Returns an earlier registration of the same address.

        A cancelled caller has registered nothing: what was registered all the same is withdrawn.
        """
        registering = self._start(self._register(registration), "regd-client-register")
        registration._registering = registering
        try:
            return await wait_shared(registering)
        except asyncio.CancelledError:
            if registration._request.static:
                registration._finish("given up")
            elif not registering.cancelling():  # else the event loop ends
                self.withdraw(registration)
            raise

    async def _register(self, registration: Registration) -> Registration:
        result = registration

        def on_reply(reply: dict[str, Any]) -> None:
            nonlocal result
            result = self._registered(registration, connection, reply)

        registration._place = str(self._connector.addresses.find()), *registration._key
        patience = Patience.LOGGED if registration._patient else Patience.NONE
        try:
            connection = await self._connector.connect(registration._request.timeout_s, patience)
            async with self._lock(registration._key):
                if registration._kept:
                    earlier = _NEWEST.get(registration._place)
                    _NEWEST[registration._place] = registration
                    try:
                        await self._send(connection, registration, on_reply)
                    except RegdError:
                        if earlier is not None and earlier._kept:
                            _NEWEST[registration._place] = earlier
                        raise
        except RegdError as error:
            if registration._connection is None:
                registration._finish(str(error))
            raise
        return result

    def _registered(
        self, registration: Registration, connection: Connection, reply: Mapping[str, Any]
    ) -> Registration:
        static = registration._request.static
        earlier = self._registrations.get(registration._key)
        if earlier is not None and earlier._kept and not static and earlier._is_at(reply):
            earlier._request = registration._request
            earlier._registered_on(connection, reply)
            _NEWEST[earlier._place] = earlier
            return earlier
        if earlier is not None:
            self._lose(earlier, _REPLACED, registration)
        registration._registered_on(connection, reply)
        if not static:
            self._registrations[registration._key] = registration
            self._keep()
        return registration

    async def _send(
        self, connection: Connection, registration: Registration, on_reply: OnFields, **other: Any
    ) -> None:
        """Send `register`, bound to the connection, and to the process if the daemon can see it."""
        binding = await self._binding(connection, registration)
        fields = registration._request.fields
        arguments = {**fields, **binding, **other}
        try:
            await connection.ask("register", arguments, on_reply)
        except RegdError as refusal:
            if "pid" not in binding or not _is_invisible(refusal, binding["pid"]):
                raise await connection.explained(refusal, "register", arguments) from None
            connection.shares_processes = False
            await connection.ask("register", {**fields, "hold": True, **other}, on_reply)

    async def _binding(self, connection: Connection, registration: Registration) -> dict[str, Any]:
        """Bind the registration to the connection, and to the process if the daemon can see it.

        A registration for another process is bound to that process alone.
        """
        request = registration._request
        if request.static:
            return {}
        if connection.shares_processes is None:
            theirs = (await connection.ask("hello", {}))["host"]
            ours = protocol.own_host()
            connection.shares_processes = None not in ours.values() and all(
                theirs[key] == value for key, value in ours.items()
            )
        if not connection.shares_processes:
            return {"hold": True}
        return {"hold": True, "pid": os.getpid()} if request.pid is None else {"pid": request.pid}

    # Restore.

    async def _restore(self, connection: Connection) -> bool:
        """Register and watch again what this connection does not know. Returns whether nothing is left to do."""
        missing = [
            registration
            for registration in self._registrations.values()
            if registration._kept and registration._connection is not connection
        ]
        done = all(await asyncio.gather(*(self._restore_one(connection, each) for each in missing)))
        for state in list(self._watches):
            if state.source is not connection and not state.ended:
                await self._send_watch(connection, state)
        return done

    async def _restore_one(self, connection: Connection, registration: Registration) -> bool:
        async with self._lock(registration._key):
            if not registration._kept or registration._connection is connection:
                return True
            newer = _newer(registration)
            if newer is not None and newer._where != registration._where:
                self._lose(
                    registration, _REPLACED, newer
                )  # else the two would take the name from each other for ever
                return True
            try:
                await self._send(
                    connection,
                    registration,
                    lambda reply: registration._registered_on(connection, reply),
                    force=None,
                )
            except Conflict as conflict:
                self._lose(registration, str(conflict))
            except Unavailable:
                return False
            except RegdError as trouble:
                if registration._trouble != str(trouble):
                    name = registration.endpoint.name
                    log.warning("could not register %s again, still trying: %s", name, trouble)
                registration._trouble = str(trouble)
                return False
        return True

    async def holder(self, registration: Registration, timeout_s: float | None = None) -> Connection:
        """Wait until a connection holds the registration, and return the connection.

        Raises:
            NotFound: the registration has ended, or the name was taken.
            Unavailable: no daemon comes back in time.
        """
        try:
            async with asyncio.timeout(self._connector.timeout_s if timeout_s is None else timeout_s):
                while registration._kept and not (registration._connection and registration._connection.usable):
                    registration._moved.clear()
                    await registration._moved.wait()
        except TimeoutError:
            raise self._connector.unavailable() from None
        if not registration._kept or registration._connection is None:
            raise registration._gone()
        return registration._connection

    # Lose.

    def _on_lost(self, connection: Connection, event: Mapping[str, Any]) -> None:
        registration = self._registrations.get((event["name"], event["instance"]))
        if registration is None or registration._connection is not connection:
            return
        newer = _newer(registration)
        if newer is not None and event["reason"] == "replaced":
            self._lose(registration, _REPLACED, newer)
        else:
            self._lose(registration, event["reason"])

    def _lose(self, registration: Registration, reason: str, newer: Registration | None = None) -> None:
        """Mark a registration as lost. It is not restored: two owners would take the name from each other."""
        if registration._kept:
            registration.lost_reason = reason
            registration.lost.set()
            more = ""
            if newer is not None and newer._where != registration._where:
                ours, theirs = _text(registration), _text(newer)
                more = (
                    f": it was at {ours}, the newer one is at {theirs}; to keep both, give each its own instance="
                )
            log.warning("lost the registration of %s: %s%s", registration.endpoint.name, reason, more)
        self._finish(registration, reason)

    def _finish(self, registration: Registration, why: str) -> None:
        registration._finish(why)
        self._drop(registration)

    def _drop(self, registration: Registration) -> None:
        if self._registrations.get(registration._key) is registration:
            del self._registrations[registration._key]
            self._keep()

    # Withdraw.

    def withdraw(self, registration: Registration) -> "asyncio.Task[None]":
        """End a registration, in a task that continues when no caller waits any more."""
        if registration._withdrawing is None or registration._withdrawing.done():
            registration._withdrawn_at = time.monotonic()
            registration._withdrawing = self._start(self._withdraw(registration), "regd-client-withdraw")
            registration._moved.set()
        return registration._withdrawing

    async def _withdraw(self, registration: Registration) -> None:
        if registration._registering is not None:
            await asyncio.wait((registration._registering,))
        pause_s, longest_s = _WITHDRAW_PAUSE_S
        while registration._connection is not None and not registration._over:  # else it was never registered
            try:
                await self._end(registration, await self._connector.connect())
                break
            except Unavailable:
                await pause(random.uniform(0, pause_s))
                pause_s = min(2 * pause_s, longest_s)
            except RegdError:
                self._drop(registration)
                raise
        self._finish(registration, "deregistered")

    async def _end(self, registration: Registration, connection: Connection) -> None:
        async with self._lock(registration._key):
            holds = registration._connection is connection
            newer = None if holds else _newer(registration)
            if newer is None or newer._began < registration._withdrawn_at:
                if holds or await self._claim(connection, registration):
                    await registration._end_on(connection)
            elif newer._connection is None:
                raise Unavailable("this process is just registering it again")

    async def _claim(self, connection: Connection, registration: Registration) -> bool:
        """Claim the entry that a restarted daemon keeps for its client, in order to end it.

        Returns whether there is such an entry. Any other ended with the connection that held it.
        """
        if registration._request.pid is not None:
            return True  # it was not bound to a connection
        pid = (await self._binding(connection, registration)).get("pid")
        while (current := await registration._current(connection)) is not None and _is_unclaimed(current, pid):
            with contextlib.suppress(Conflict):
                await self._send(
                    connection,
                    registration,
                    lambda reply: registration._registered_on(connection, reply),
                    **{"force": None, "if": current["rev"]},
                )
                return True
        return False

    # Watch.

    def watching(self, state: WatchState) -> "_Watching":
        """Watch, over breaks, until the end of the `async with`."""
        return _Watching(self, state)

    async def watch(self, state: WatchState) -> None:
        """Watch from now on.

        Raises:
            RegdError: the daemon is away, or refuses the pattern.
        """
        connection = await self._connector.connect(patience=Patience.NONE)
        try:
            await self._send_watch(connection, state)
        except BaseException:
            self.unwatch(state)
            raise
        self._watches[state] = None
        self._keep()

    def unwatch(self, state: WatchState) -> None:
        """End a watch."""
        self._watches.pop(state, None)
        if isinstance(state.source, Connection):
            state.source.unwatch(state.take)
        state.end()
        self._keep()

    async def _send_watch(self, connection: Connection, state: WatchState) -> None:
        arguments = state.begin(connection)
        try:
            await connection.ask("watch", arguments, state.take)
        except RegdError as error:
            state.pause()
            raise await connection.explained(error, "watch", arguments) from None

    # The task that keeps it all. It runs while there is something to keep.

    @property
    def _wanted(self) -> bool:
        return bool(self._registrations or self._watches)

    def _keep(self) -> None:
        if not self._wanted:
            self._idle.set()
        elif not self._closed and (self._keeping is None or self._keeping.done()):
            self._keeping = asyncio.create_task(self._run(), name="regd-client-keep")
            _TASKS.add(self._keeping)
            self._keeping.add_done_callback(self._stopped)

    def _stopped(self, task: "asyncio.Task[None]") -> None:
        _TASKS.discard(task)
        if task.cancelled():
            if self._keeping is task and self._connector.connection is not None:
                self._connector.connection.abort("the event loop ended")  # nothing else will close it
        elif (bug := task.exception()) is not None:
            log.error("what was registered is not kept any more", exc_info=bug)

    async def _run(self) -> None:
        logged = False
        while self._wanted:
            try:
                connection = await self._connector.connect()
                done = await self._restore(connection)
            except RegdError as trouble:
                if not logged:
                    log.warning("the registry is away, still trying: %s", trouble)
                    logged = True
                await pause(random.uniform(0, _RESTORE_PAUSE_S[1]))
                continue
            if logged:
                log.warning("the registry is back")
                logged = False
            await self._until_break(connection, None if done else _RETRY_S)
            if not connection.usable:
                await pause(random.uniform(0, _RESTORE_PAUSE_S[0]))  # not all clients of a daemon at once

    async def _until_break(self, connection: Connection, retry_s: float | None) -> None:
        """Wait until the connection breaks, nothing is to keep, or `retry_s` is over. Ping a silent daemon."""
        while connection.usable and self._wanted:
            self._idle.clear()
            silent_s = time.monotonic() - connection.heard_at
            idle = asyncio.ensure_future(self._idle.wait())
            try:
                await asyncio.wait(
                    (connection.closed, idle),
                    timeout=max(0.0, _SILENT_S - silent_s) if retry_s is None else retry_s,
                    return_when=asyncio.FIRST_COMPLETED,
                )
            finally:
                idle.cancel()
            if retry_s is not None:
                return
            if connection.usable and time.monotonic() - connection.heard_at >= _SILENT_S:
                with contextlib.suppress(RegdError):
                    await connection.ask("ping", {})

    # Close.

    def stop(self) -> None:
        """End the watches, and restore nothing any more."""
        watches, self._watches = self._watches, {}
        for state in watches:
            state.end()
        if self._keeping is not None:
            task, self._keeping = self._keeping, None
            task.cancel()

    async def close(self) -> None:
        """End all registrations. What a restarted daemon keeps for its client is withdrawn first.

        That takes 0.2 s at most. Then `lingers` is true: withdrawing continues until the daemon is back or the
        event loop ends, and closes the connection.
        """
        self._closed = True
        withdrawing: dict[asyncio.Task[None], Registration] = {}
        try:
            for registration in list(self._registrations.values()):
                connection = registration._connection
                if connection is not None and (registration._withdrawing is not None or not connection.usable):
                    withdrawing[self.withdraw(registration)] = registration
            if withdrawing:
                await asyncio.wait(withdrawing, timeout=_CLOSE_S)
        finally:
            rest = {task: registration for task, registration in withdrawing.items() if not task.done()}
            for registration in list(self._registrations.values()):
                if registration not in rest.values():
                    self._finish(registration, "the client was closed")
            for task in self._tasks - rest.keys():
                task.cancel()
            if rest:
                self.lingers = True
                lingering = asyncio.create_task(self._linger(rest), name="regd-client-linger")
                _LINGERING.add(lingering)
                lingering.add_done_callback(_LINGERING.discard)

    async def _linger(self, withdrawing: Mapping["asyncio.Task[None]", Registration]) -> None:
        try:
            await asyncio.wait(withdrawing)
        finally:
            for registration in withdrawing.values():
                self._finish(registration, "the client was closed")
            self._connector.end()


class _Watching:
    """An `async with` around a watch.

    It is no generator: when it ends, an event loop closes all its generators at once, and a generator that waits
    within another one would break.
    """

    def __init__(self, registrar: Registrar, state: WatchState) -> None:
        self._registrar = registrar
        self._state = state

    async def __aenter__(self) -> None:
        await self._registrar.watch(self._state)

    async def __aexit__(self, *_: object) -> None:
        self._registrar.unwatch(self._state)


# An event loop refers to its tasks weakly.
_TASKS: set["asyncio.Task[None]"] = set()
_LINGERING: set["asyncio.Task[None]"] = set()
# By the daemon's address, name and instance: the last registration of this process, by any of its clients.
_NEWEST: weakref.WeakValueDictionary[tuple[str, ...], Registration] = weakref.WeakValueDictionary()


def _newer(registration: Registration) -> Registration | None:
    """Return the registration of the same name that this process has made, or is making, after this one."""
    newest = _NEWEST.get(registration._place)
    return newest if newest is not None and newest is not registration and newest._kept else None


def _text(registration: Registration) -> str:
    host, port = registration._where
    return protocol.host_port(host, port or 0)


def _is_invisible(refusal: RegdError, pid: int) -> bool:
    """Return whether the daemon refuses a process only because it cannot see or watch it."""
    if refusal.code == "unsupported":
        return True
    if refusal.code != "bad_argument" or refusal.details.get("field") != "pid":
        return False
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


def _is_unclaimed(entry: Mapping[str, Any], pid: int | None) -> bool:
    """Return whether the entry has a holder that no client has claimed since the daemon's start: perhaps us."""
    return entry.get("more_owners", False) or any(
        owner.get("connection", "") is None and owner.get("pid") == pid for owner in entry["owners"]
    )
