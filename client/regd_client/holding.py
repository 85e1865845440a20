"""What a client has registered: made, made again after a break, lost, and left. All of it is decided here.

What is said of one name goes one after another, in its turn. What the daemon says is taken in its place among all
that it says, and not when a task comes to it. Must not know when to make all good again: the keeper does.
"""

import asyncio
import contextlib
import os
import random
import time
import weakref
from collections.abc import Callable, Coroutine, Mapping
from typing import Any, TypeVar

from regd_client import wire
from regd_client.connection import Connection, Heard
from regd_client.connector import Connector, joined, pause
from regd_client.errors import Conflict, RegdError, Unavailable
from regd_client.logger import log
from regd_client.registration import Registration
from regd_client.watches import Key

_CLOSE_S = 0.2  # for a daemon that comes back just when the client is closed
_PAUSE_S = (0.02, 0.5)  # before the first try to leave again, and the longest

T = TypeVar("T")


class Holdings:
    """`changed` is called when there is more to keep, or less."""

    def __init__(self, link: Connector, changed: Callable[[], None]) -> None:
        self._link = link
        link.lost = self._lost
        self._changed = changed
        self._of: dict[Key, Registration] = {}
        self._turns: weakref.WeakValueDictionary[Key, asyncio.Lock] = weakref.WeakValueDictionary()
        self._tasks: set[asyncio.Task[Any]] = set()
        self.lingers = False  # it is closed, and what is still to be withdrawn keeps the link open

    def __len__(self) -> int:
        return len(self._of)

    def kept(self, name: str, instance: str | None) -> Registration | None:
        """Return what the caller has under that name."""
        found = self._of.get((name, instance or ""))
        return found if found is not None and found.kept else None

    def _turn(self, key: Key) -> asyncio.Lock:
        return self._turns.setdefault(key, asyncio.Lock())

    def _begin(self, work: Coroutine[Any, Any, T], name: str) -> "asyncio.Task[T]":
        task = asyncio.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._done)
        return task

    def _done(self, task: "asyncio.Task[Any]") -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()  # whoever waits for it has it, and perhaps nobody does

    # Made.

    async def register(self, wanted: Registration) -> Registration:
        """Make it, and keep it from then on. What the caller has at that address already is returned instead.

        Whoever is cancelled here has registered nothing: what was made all the same is left again.
        """
        wanted.making = self._begin(self._make(wanted), "regd-client-register")
        try:
            return await joined(wanted.making)
        except asyncio.CancelledError:
            if wanted.static:
                wanted.finish("given up")
            elif not wanted.making.cancelling():  # then the event loop ends
                self.leave(wanted)
            raise

    async def _make(self, wanted: Registration) -> Registration:
        stands = wanted

        def made(reply: dict[str, Any]) -> None:
            nonlocal stands
            stands = self._made(wanted, connection, reply)

        wanted.place = str(wire.find_address(self._link.address)), *wanted.key
        try:
            connection = await self._link.connected(wanted.timeout_s, wanted.patience)
            async with self._turn(wanted.key):
                if wanted.kept:
                    earlier = _NEWEST.get(wanted.place)
                    _NEWEST[wanted.place] = wanted
                    try:
                        await self._ask(connection, wanted, made)
                    except RegdError:
                        if earlier is not None and earlier.kept:
                            _NEWEST[wanted.place] = earlier
                        raise
        except RegdError as error:
            if wanted.on is None:
                wanted.finish(str(error))
            raise
        return stands

    def _made(self, made: Registration, connection: Connection, reply: Mapping[str, Any]) -> Registration:
        earlier = self._of.get(made.key)
        if earlier is not None and earlier.kept and not made.static and earlier.is_at(reply):
            earlier.arguments = made.arguments
            earlier.made_on(connection, reply)
            _NEWEST[earlier.place] = earlier
            return earlier
        if earlier is not None:
            self._lose(earlier, _REPLACED, made)
        made.made_on(connection, reply)
        if not made.static:
            self._of[made.key] = made
            self._changed()
        return made

    async def _ask(self, connection: Connection, each: Registration, heard: Heard, **other: Any) -> None:
        """Register it, held by the connection and bound to the process, where the daemon can see that."""
        hold = await self._conditions(connection, each)
        try:
            await connection.ask("register", {**each.arguments, **hold, **other}, heard)
        except RegdError as refusal:
            if "pid" not in hold or not _cannot_be_seen(refusal, hold["pid"]):
                raise
            connection.shares_processes = False
            await connection.ask("register", {**each.arguments, "hold": True, **other}, heard)

    async def _conditions(self, connection: Connection, each: Registration) -> dict[str, Any]:
        """Return how long it lasts: as the connection, and as the process where the daemon sees the same ones as
        we do. What is another process's lasts as that alone.
        """
        if each.static:
            return {}
        if connection.shares_processes is None:
            theirs = (await connection.ask("hello", {}))["host"]
            ours = wire.own_host()
            connection.shares_processes = None not in ours.values() and all(
                theirs[key] == value for key, value in ours.items()
            )
        if not connection.shares_processes:
            return {"hold": True}
        return {"hold": True, "pid": os.getpid()} if each.process is None else {"pid": each.process}

    # Made again.

    async def restore(self, connection: Connection) -> bool:
        """Register again what this connection does not hold. Returns whether all is done."""
        missing = [each for each in self._of.values() if each.kept and each.on is not connection]
        return all(await asyncio.gather(*(self._again(connection, each) for each in missing)))

    async def _again(self, connection: Connection, each: Registration) -> bool:
        async with self._turn(each.key):
            if not each.kept or each.on is connection:
                return True
            newer = _newer(each)
            if newer is not None and newer.where != each.where:
                self._lose(each, _REPLACED, newer)  # else each would take the name from the other for ever
                return True
            try:
                await self._ask(connection, each, lambda reply: each.made_on(connection, reply), force=None)
            except Conflict as conflict:
                self._lose(each, str(conflict))
            except Unavailable:
                return False
            except RegdError as trouble:
                if each.trouble != str(trouble):
                    log.warning("could not register %s again, still trying: %s", each.endpoint.name, trouble)
                each.trouble = str(trouble)
                return False
        return True

    async def holder(self, each: Registration, timeout_s: float | None = None) -> Connection:
        """Return the connection that holds it, once one does.

        Raises:
            NotFound: it has ended, or is somebody else's now.
            Unavailable: no daemon comes back in time.
        """
        try:
            async with asyncio.timeout(self._link.timeout_s if timeout_s is None else timeout_s):
                while each.kept and (each.on is None or not each.on.usable):
                    each.moved.clear()
                    await each.moved.wait()
        except TimeoutError:
            raise self._link.away() from None
        if not each.kept or each.on is None:
            raise each.gone()
        return each.on

    # Lost.

    def _lost(self, connection: Connection, event: Mapping[str, Any]) -> None:
        each = self._of.get((event["name"], event["instance"]))
        if each is None or each.on is not connection:
            return
        newer = _newer(each)
        if newer is not None and event["reason"] == "replaced":
            self._lose(each, _REPLACED, newer)
        else:
            self._lose(each, event["reason"])

    def _lose(self, each: Registration, reason: str, newer: Registration | None = None) -> None:
        """It is somebody else's now. It is not registered again: two would take it from each other for ever."""
        if each.kept:
            each.lost_reason = reason
            each.lost.set()
            more = ""
            if newer is not None and newer.where != each.where:
                ours, theirs = wire.joined(*each.where), wire.joined(*newer.where)
                more = (
                    f": it was at {ours}, the newer one is at {theirs}; to keep both, give each its own instance="
                )
            log.warning("lost the registration of %s: %s%s", each.endpoint.name, reason, more)
        self._finish(each, reason)

    def _finish(self, each: Registration, why: str) -> None:
        each.finish(why)
        self._drop(each)

    def _drop(self, each: Registration) -> None:
        if self._of.get(each.key) is each:
            del self._of[each.key]
            self._changed()

    # Left.

    def leave(self, each: Registration) -> "asyncio.Task[None]":
        """End it, in a task that goes on when nobody waits any more."""
        if each.leaving is None or each.leaving.done():
            each.left_at = time.monotonic()
            each.leaving = self._begin(self._leave(each), "regd-client-leave")
            each.moved.set()
        return each.leaving

    async def _leave(self, each: Registration) -> None:
        if each.making is not None:
            await asyncio.wait((each.making,))
        pause_s, longest_s = _PAUSE_S
        while each.on is not None and not each.over:  # or it was never made
            try:
                connection = await self._link.connected()
                async with self._turn(each.key):
                    newer = _newer(each) if each.on is not connection else None
                    if newer is None or newer.began < each.left_at:
                        if each.on is connection or await self._claim(connection, each):
                            await each.end_on(connection)
                    elif newer.on is None:
                        raise Unavailable("this process is just registering it again")
                break
            except Unavailable:
                await pause(random.uniform(0, pause_s))
                pause_s = min(2 * pause_s, longest_s)
            except RegdError:
                self._drop(each)
                raise
        self._finish(each, "deregistered")

    async def _claim(self, connection: Connection, each: Registration) -> bool:
        """Claim what a daemon that was restarted keeps for its client, in order to end it.

        Returns whether there is such a thing. All else ended with the connection that held it.
        """
        if each.process is not None:
            return True  # nobody's connection holds it
        pid = (await self._conditions(connection, each)).get("pid")
        while (known := await each.known(connection)) is not None and _is_unclaimed(known, pid):
            with contextlib.suppress(Conflict):
                await self._ask(
                    connection,
                    each,
                    lambda reply: each.made_on(connection, reply),
                    **{"force": None, "if": known["rev"]},
                )
                return True
        return False

    async def close(self) -> None:
        """Keep nothing more. What a restarted daemon keeps for its client is ended first.

        That takes 0.2 s at most here. Then `lingers` is true: it goes on until the daemon is back, or the event
        loop ends, and closes the link.
        """
        self._changed = lambda: None  # the keeper has ended
        leaving: dict[asyncio.Task[None], Registration] = {}
        try:
            for each in list(self._of.values()):
                if each.on is not None and (each.leaving is not None or not each.on.usable):
                    leaving[self.leave(each)] = each
            if leaving:
                await asyncio.wait(leaving, timeout=_CLOSE_S)
        finally:
            rest = {task: each for task, each in leaving.items() if not task.done()}
            for each in [each for each in self._of.values() if each not in rest.values()]:
                self._finish(each, "the client was closed")
            for task in self._tasks - rest.keys():
                task.cancel()
            if rest:
                self.lingers = True
                task = asyncio.create_task(self._linger(rest), name="regd-client-linger")
                _LINGERING.add(task)
                task.add_done_callback(_LINGERING.discard)

    async def _linger(self, leaving: Mapping["asyncio.Task[None]", Registration]) -> None:
        try:
            await asyncio.wait(leaving)
        finally:
            for each in leaving.values():
                self._finish(each, "the client was closed")
            self._link.end()


_REPLACED = "replaced by a newer registration of this process"
_LINGERING: set["asyncio.Task[None]"] = set()  # a loop keeps its tasks weakly
# By the daemon's address, name and instance: what this process registered there last, with any of its clients.
_NEWEST: weakref.WeakValueDictionary[tuple[str, ...], Registration] = weakref.WeakValueDictionary()


def _newer(each: Registration) -> Registration | None:
    """Return what this process has registered, or is registering, under the same name after this."""
    found = _NEWEST.get(each.place)
    return found if found is not None and found is not each and found.kept else None


def _cannot_be_seen(refusal: RegdError, pid: int) -> bool:
    """Whether the daemon refuses a process only because it cannot see or watch it."""
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


def _is_unclaimed(known: Mapping[str, Any], pid: int | None) -> bool:
    """Whether there is a holder that nobody has claimed since the daemon was started, and that may be us."""
    owners = known["owners"]
    return known.get("more_owners", False) or any(
        owner.get("connection", "") is None and owner.get("pid") == pid for owner in owners
    )
