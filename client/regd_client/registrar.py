"""The registrar of a client owns its registrations and watches, and restores them after a reconnect.

Commands for one name are sent one at a time, under a lock. Replies and `lost` events are handled in callbacks of
the connection, in the order in which the daemon sent them; tasks could run in a different order.
"""

import asyncio
import contextlib
import itertools
import os
import time
import weakref
from collections.abc import Coroutine, Mapping
from typing import Any, TypeVar

from regd_client import protocol, replicas
from regd_client.connection import Connection, OnFields
from regd_client.connector import Connector, Patience
from regd_client.errors import Conflict, RegdError, Unavailable
from regd_client.event_loop import pause, random_s, wait_shared
from regd_client.logger import log
from regd_client.models import Key
from regd_client.registration import Registration
from regd_client.watches import WatchState

__all__ = ["Registrar"]

_CLOSE_S = 0.2  # to withdraw registrations when the client is closed while the daemon is away
_WITHDRAW_PAUSE_S = (0.02, 0.5)  # the first and the longest pause between attempts to withdraw
_RESTORE_PAUSE_S = (0.02, 0.5)  # maximum random pause before the first attempt to restore, and before later ones
_RETRY_S = 1.0  # before the next attempt to restore a registration that the daemon refused
_SILENT_S = 5.0  # ping a daemon that has sent nothing for this time
_REPLACED = "replaced by a newer registration of this process"

T = TypeVar("T")


class Registrar:
    """The registrations and watches of a client.

    Attributes:
        lingers: the registrar is closed, but keeps the connection open to withdraw registrations.
    """

    def __init__(self, connector: Connector) -> None:
        self._connector = connector
        connector.on_lost = self._on_lost
        self.lingers = False
        self._registrations: dict[Key, Registration] = {}
        self._watches: dict[WatchState, None] = {}
        self._locks: weakref.WeakValueDictionary[Key, asyncio.Lock] = weakref.WeakValueDictionary()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._run_task: asyncio.Task[None] | None = None  # restores everything after a reconnect
        self._closed = False
        self._idle = asyncio.Event()  # set while there are no registrations and watches

    def active(self, name: str, instance: str | None) -> Registration | None:
        """Return the client's active registration of this name, or None."""
        registration = self._registrations.get((name, instance or ""))
        return registration if registration is not None and registration._is_active else None

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
            task.exception()  # mark the exception as retrieved, since all callers may have been cancelled

    # Registering.

    async def register(self, registration: Registration) -> Registration:
        """Register, and restore the registration after each reconnect.

        If the caller is cancelled, the registration is withdrawn.

        Returns:
            The registration, or the client's earlier registration of the same name and address.
        """
        registering = self._start(self._register(registration), "regd-client-register")
        registration._registering = registering
        try:
            return await wait_shared(registering)
        except asyncio.CancelledError:
            if registration._request.static:
                registration._finish("given up")
            elif not registering.cancelling():  # else the event loop is ending, and cancels all tasks
                self.withdraw(registration)
            raise

    async def _register(self, registration: Registration) -> Registration:
        result = registration

        def on_reply(reply: dict[str, Any]) -> None:
            nonlocal result
            result = self._registered(registration, connection, reply)

        registration._global_key = str(self._connector.addresses.find()), *registration._key
        patience = Patience.LOGGED if registration._patient else Patience.NONE
        try:
            connection = await self._connector.connect(registration._request.timeout_s, patience)
            if registration._is_copy:
                await self._register_copy(connection, registration, on_reply)
            else:
                await self._register_at(connection, registration, on_reply)
        except RegdError as error:
            if registration._connection is None:
                registration._finish(str(error))
            raise
        return result

    async def _register_at(
        self, connection: Connection, registration: Registration, on_reply: OnFields, **other: Any
    ) -> None:
        async with self._lock(registration._key):
            if registration._is_active:
                earlier = _NEWEST.get(registration._global_key)
                _NEWEST[registration._global_key] = registration
                try:
                    await self._send(connection, registration, on_reply, **other)
                except RegdError:
                    if earlier is not None and earlier._is_active:
                        _NEWEST[registration._global_key] = earlier
                    else:
                        _NEWEST.pop(registration._global_key, None)
                    raise

    def _registered(
        self, registration: Registration, connection: Connection, reply: Mapping[str, Any]
    ) -> Registration:
        static = registration._request.static
        earlier = self._registrations.get(registration._key)
        if earlier is not None and earlier._is_active and not static and earlier._is_at(reply):
            earlier._request = registration._request
            earlier._registered_on(connection, reply)
            _NEWEST[earlier._global_key] = earlier
            return earlier
        if earlier is not None:
            self._lose(earlier, _REPLACED, registration)
        registration._registered_on(connection, reply)
        if not static:
            self._registrations[registration._key] = registration
            self._update_task()
        return registration

    async def _send(
        self, connection: Connection, registration: Registration, on_reply: OnFields, **other: Any
    ) -> None:
        """Send `register`. If the daemon cannot see the process, bind the name to the connection alone."""
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
        """Return the fields of `register` that bind it to the connection, and to this process if possible.

        A registration for another process is bound to that process alone.
        """
        request = registration._request
        if request.static:
            return {}
        if connection.shares_processes is None:
            daemon_host = (await connection.ask("hello", {}))["host"]
            own_host = protocol.own_host()
            connection.shares_processes = None not in own_host.values() and all(
                daemon_host[key] == value for key, value in own_host.items()
            )
        if not connection.shares_processes:
            return {"hold": True}
        return {"hold": True, "pid": os.getpid()} if request.pid is None else {"pid": request.pid}

    # Copies: registrations with `instance="auto"`.

    async def _register_copy(
        self, connection: Connection, registration: Registration, on_reply: OnFields, previous: str = ""
    ) -> None:
        """Register under `previous` if that is free, else under the lowest number that no live owner holds."""
        own_pids = (os.getpid(), registration._request.pid)
        while registration._is_active:
            entries = await _list(connection, registration._key[0])
            for instance, rev in replicas.candidates(
                entries, registration._requested_address, own_pids, previous
            ):
                if self._is_own(registration, instance):
                    continue
                registration._take_instance(instance)
                try:
                    await self._register_at(connection, registration, on_reply, **{"if": rev})
                except Conflict as conflict:
                    if replicas.is_taken(conflict.details):
                        continue
                    break  # the registration has changed, so list the instances again
                entries = await _list(connection, registration._key[0])
                if not replicas.has_older_number(entries, registration._requested_address, instance):
                    return
                await registration._end_on(connection)
                self._drop(registration)
                break

    def _is_own(self, registration: Registration, instance: str) -> bool:
        """Return whether another copy in this process has the number `instance`, or is trying to get it."""
        newest = _NEWEST.get((*registration._global_key[:-1], instance))
        return (
            newest is not None
            and newest is not registration
            and newest._is_active
            and newest._key[1] == instance
            and newest._requested_address != registration._requested_address
        )

    async def _restore_copy(self, connection: Connection, registration: Registration) -> None:
        """Register a copy again, under another number if another owner has its number."""
        previous = registration._key

        def on_reply(reply: Mapping[str, Any]) -> None:
            self._registrations.pop(previous, None)
            registration._registered_on(connection, reply)
            self._registrations[registration._key] = registration
            if registration._key != previous:
                _NEWEST.pop((*registration._global_key[:-1], previous[1]), None)
                name, number = registration._key
                log.warning("%s has instance %s now: instance %s was taken meanwhile", name, number, previous[1])

        try:
            await self._register_copy(connection, registration, on_reply, previous[1])
        finally:
            if registration._connection is not connection:
                registration._take_instance(previous[1])

    # Restoring.

    async def _restore(self, connection: Connection) -> bool:
        """Repeat on this connection the registrations and watches that are not on it yet.

        Returns:
            False if a registration must be retried later.
        """
        missing = [
            registration
            for registration in self._registrations.values()
            if registration._is_active and registration._connection is not connection
        ]
        work = [self._restore_registration(connection, registration) for registration in missing]
        done = all(await asyncio.gather(*work))
        for state in list(self._watches):
            if state.source is not connection and not state.ended:
                await self._send_watch(connection, state)
        return done

    async def _restore_registration(self, connection: Connection, registration: Registration) -> bool:
        try:
            if registration._is_copy:
                await self._restore_copy(connection, registration)
                return True
            return await self._restore_same(connection, registration)
        except Unavailable:
            return False
        except RegdError as error:
            if registration._restore_error != str(error):
                name = registration.endpoint.name
                log.warning("could not register %s again, still trying: %s", name, error)
            registration._restore_error = str(error)
            return False

    async def _restore_same(self, connection: Connection, registration: Registration) -> bool:
        async with self._lock(registration._key):
            if not registration._is_active or registration._connection is connection:
                return True
            newer = _newer(registration)
            if newer is not None and newer._requested_address != registration._requested_address:
                # If both were restored, they would take the name from each other again and again.
                self._lose(registration, _REPLACED, newer)
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
        return True

    async def holder(self, registration: Registration, timeout_s: float | None = None) -> Connection:
        """Wait until the registration is on a usable connection, and return the connection.

        Raises:
            NotFound: the registration has ended, or another owner has the name.
            Unavailable: the daemon did not come back in time.
        """
        try:
            async with asyncio.timeout(self._connector.timeout_s if timeout_s is None else timeout_s):
                while registration._is_active and not (
                    registration._connection and registration._connection.usable
                ):
                    registration._moved.clear()
                    await registration._moved.wait()
        except TimeoutError:
            raise self._connector.unavailable() from None
        if not registration._is_active or registration._connection is None:
            raise registration._gone()
        return registration._connection

    # Lost registrations.

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
        """Mark a registration as lost, and never restore it, so that two owners do not fight for the name."""
        if registration._is_active:
            registration.lost_reason = reason
            registration.lost.set()
            more = ""
            if newer is not None and newer._requested_address != registration._requested_address:
                old, new = _text(registration), _text(newer)
                more = f": it was at {old}, the newer one is at {new}; to keep both, give each its own instance="
            log.warning("lost the registration of %s: %s%s", registration.endpoint.name, reason, more)
        self._finish(registration, reason)

    def _finish(self, registration: Registration, why: str) -> None:
        registration._finish(why)
        self._drop(registration)

    def _drop(self, registration: Registration) -> None:
        if self._registrations.get(registration._key) is registration:
            del self._registrations[registration._key]
            self._update_task()

    # Withdrawing.

    def withdraw(self, registration: Registration) -> "asyncio.Task[None]":
        """End a registration, in a task that continues even if the caller is cancelled."""
        if registration._withdrawing is None or registration._withdrawing.done():
            registration._withdrawn_at = time.monotonic()
            registration._withdrawing = self._start(self._withdraw(registration), "regd-client-withdraw")
            registration._moved.set()
        return registration._withdrawing

    async def _withdraw(self, registration: Registration) -> None:
        if registration._registering is not None:
            await asyncio.wait((registration._registering,))
        pause_s, longest_s = _WITHDRAW_PAUSE_S
        while registration._connection is not None and not registration._over:  # None if it was never registered
            try:
                await self._end(registration, await self._connector.connect())
                break
            except Unavailable:
                await pause(random_s(0, pause_s))
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
                raise Unavailable("this process is registering the name again")

    async def _claim(self, connection: Connection, registration: Registration) -> bool:
        """Claim the entry that a restarted daemon keeps for its client, so that this client can end it.

        Returns:
            Whether there is such an entry. If there is none, the registration has ended with its connection.
        """
        if registration._request.pid is not None:
            return True  # it is bound to a process only, so there is nothing to claim
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

    # Watches.

    async def watch(self, state: WatchState) -> None:
        """Start a watch, which is resumed after each reconnect. Call `unwatch` in the end, even if this fails.

        Raises:
            RegdError: the daemon is away, or refuses the pattern.
        """
        connection = await self._connector.connect(patience=Patience.NONE)
        await self._send_watch(connection, state)
        self._watches[state] = None
        self._update_task()

    def unwatch(self, state: WatchState) -> None:
        """End a watch, or an attempt to start it."""
        self._watches.pop(state, None)
        if isinstance(state.source, Connection):
            state.source.unwatch(state.take)
        state.end()
        self._update_task()

    async def _send_watch(self, connection: Connection, state: WatchState) -> None:
        arguments = state.begin(connection)
        try:
            await connection.ask("watch", arguments, state.take)
        except RegdError as error:
            state.pause()
            raise await connection.explained(error, "watch", arguments) from None

    # The background task, which runs while there are registrations or watches.

    @property
    def _is_needed(self) -> bool:
        return bool(self._registrations or self._watches)

    def _update_task(self) -> None:
        """Start the background task if it is needed, or wake it so that it ends."""
        if not self._is_needed:
            self._idle.set()
        elif not self._closed and (self._run_task is None or self._run_task.done()):
            self._run_task = asyncio.create_task(self._run(), name="regd-client-keep")
            _TASKS.add(self._run_task)
            self._run_task.add_done_callback(self._stopped)

    def _stopped(self, task: "asyncio.Task[None]") -> None:
        _TASKS.discard(task)
        if task.cancelled():
            if self._run_task is task and self._connector.connection is not None:
                self._connector.connection.abort("the event loop ended")  # nothing else closes it
        elif (bug := task.exception()) is not None:
            log.error("a bug in regd_client: it no longer restores registrations and watches", exc_info=bug)

    async def _run(self) -> None:
        logged = False
        while self._is_needed:
            try:
                connection = await self._connector.connect()
                done = await self._restore(connection)
            except RegdError as error:
                if not logged:
                    log.warning("the registry is away, still trying: %s", error)
                    logged = True
                await pause(random_s(0, _RESTORE_PAUSE_S[1]))
                continue
            if logged:
                log.warning("the registry is back")
                logged = False
            await self._until_break(connection, None if done else _RETRY_S)
            if not connection.usable:
                await pause(random_s(0, _RESTORE_PAUSE_S[0]))  # so that clients do not reconnect all at once

    async def _until_break(self, connection: Connection, retry_s: float | None) -> None:
        """Wait until the connection breaks, the task is not needed, or `retry_s` has passed.

        Meanwhile, ping a silent daemon.
        """
        while connection.usable and self._is_needed:
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

    # Closing.

    def stop(self) -> None:
        """End the watches, and stop the background task."""
        watches, self._watches = self._watches, {}
        for state in watches:
            state.end()
        if self._run_task is not None:
            task, self._run_task = self._run_task, None
            task.cancel()

    async def close(self) -> None:
        """End all registrations.

        Those on a working connection end when the caller closes it. Those whose connection is broken are
        withdrawn when the daemon is back. If that takes longer than 0.2 s, `lingers` becomes True: a task
        continues until the daemon is back or the event loop ends, and then closes the connection.
        """
        self._closed = True
        withdrawing: dict[asyncio.Task[None], Registration] = {}
        try:
            await self._check_connection()
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

    async def _check_connection(self) -> None:
        """Ping, to notice a broken connection, since a restarted daemon keeps the registrations that it held."""
        connection = self._connector.connection
        if connection is not None and connection.usable and self._registrations:
            with contextlib.suppress(RegdError, TimeoutError):
                async with asyncio.timeout(_CLOSE_S):
                    await connection.ask("ping", {})

    async def _linger(self, withdrawing: Mapping["asyncio.Task[None]", Registration]) -> None:
        try:
            await asyncio.wait(withdrawing)
        finally:
            for registration in withdrawing.values():
                self._finish(registration, "the client was closed")
            self._connector.end()


# References to running tasks, since an event loop has only weak references to them.
_TASKS: set["asyncio.Task[None]"] = set()
_LINGERING: set["asyncio.Task[None]"] = set()
# The last registration that any client of this process has made: by the daemon's address, name and instance.
_NEWEST: weakref.WeakValueDictionary[tuple[str, ...], Registration] = weakref.WeakValueDictionary()


def _newer(registration: Registration) -> Registration | None:
    """Return a later registration of the same name by this process, finished or in progress; else None."""
    newest = _NEWEST.get(registration._global_key)
    return newest if newest is not None and newest is not registration and newest._is_active else None


def _text(registration: Registration) -> str:
    host, port = registration._requested_address
    return protocol.host_port(host, port or 0)


async def _list(connection: Connection, name: str) -> list[dict[str, Any]]:
    """Return all instances of a service."""
    entries: list[dict[str, Any]] = []
    after = None
    for number in itertools.count(1):
        reply = await connection.ask("list", {"name": name, "after": after})
        protocol.add_page(entries, reply, number)
        after = reply.get("next")
        if after is None:
            break
    return entries


def _is_invisible(refusal: RegdError, pid: int) -> bool:
    """Return whether the daemon refuses an existing process because it cannot see or watch it."""
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
    """Return whether the entry has a holder that no client has claimed since the daemon restarted."""
    return entry.get("more_owners", False) or any(
        owner.get("connection", "") is None and owner.get("pid") == pid for owner in entry["owners"]
    )
