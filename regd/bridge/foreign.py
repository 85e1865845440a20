"""Registers the instances of other machines, which are keys in etcd, in the local daemon."""

import asyncio
import logging
import time
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from typing import Any, NoReturn

from regd.bridge import records
from regd.bridge.claim import host_of
from regd.bridge.etcd.model import KeyEvent, Record
from regd.bridge.local import Local, Session
from regd.bridge.reconcile import Action, difference
from regd.bridge.records import Place
from regd.core.errors import Invalid
from regd_client.errors import Conflict, NotFound, RegdError, Unavailable
from regd_client.models import Key

__all__ = ["ARRIVALS_MAX", "Foreign"]

log = logging.getLogger("regd.bridge")

ARRIVALS_MAX = 50_000
_IGNORED_MAX = 1_000  # keys that do not parse and are remembered, so that each is logged once
_REQUESTS_MAX = 1_000  # to the daemon at a time
_CONFLICT_S = 1.0  # until the next attempt, if the watch shows no change before
_REFUSED_S = 5.0  # until the refused registrations are tried again
_REFUSED_MAX = 1_000  # tried again at a time; a full registry would refuse 50,000 each time
_FIELDS = ("host", "port", "meta", "state")

Fields = Mapping[str, Any]
Version = tuple[int, int]  # `mod_revision`, and the hash of the value: after etcd was restored, revisions repeat
_UNHELD: Fields = {}  # of a registration that no connection of this session holds, or should hold


class Foreign:
    """Keeps the daemon's registrations of other machines' instances equal to the keys in etcd.

    Args:
        prefix: of all keys.
        machine: the name of this machine.
        local: the daemon's registrations. It calls `changed` for each change.
        loopback: whether machines have addresses on loopback, as in a trial on one machine.
        arrivals_max: how many instances are registered; of more, those of the first machines by name.

    Attributes:
        is_known: whether the keys in etcd have been read.
        hosts: the host of each other machine's bridge.
        ignored: keys that do not parse, with the reason; the first 1,000.
        refused: instances that the daemon refuses, with its message.
        shadowed: instances that are not registered because a local one has the same name and instance.
        requests: how many registrations and withdrawals the daemon was asked for.
        lag_s, lag_max_s: from a change in etcd to the daemon's reply, the last one and the longest.
    """

    def __init__(
        self, prefix: str, machine: str, local: Local, *, loopback: bool, arrivals_max: int = ARRIVALS_MAX
    ) -> None:
        self._prefix = prefix
        self._machine = machine
        self._local = local
        self._loopback = loopback
        self._arrivals_max = arrivals_max
        self._known: dict[bytes, Version] = {}
        self._arrivals: dict[Place, Fields] = {}  # the registrations that these keys ask for
        self._wanted: dict[Key, Fields] = {}  # at most `arrivals_max` of them
        self._last: Place | None = None  # the last of `_wanted` in order; None if all arrivals are in it
        self._must_choose = False
        self._dirty: dict[Key, None] = {}
        self._dirty_at = 0.0
        self._in_progress: dict[Key, None] = {}
        self._retry: asyncio.TimerHandle | None = None
        self._wake = asyncio.Event()
        self._is_withdrawn = False
        self._is_logged_as_full = False
        self.is_known = False
        self.hosts: dict[str, str] = {}
        self.ignored: dict[bytes, str] = {}
        self.refused: dict[Key, str] = {}
        self.shadowed: set[Key] = set()
        self.requests = 0
        self.lag_s = self.lag_max_s = 0.0

    @property
    def is_current(self) -> bool:
        """Whether the keys in etcd are known, and not out of date for longer than `--stale-s`."""
        return self.is_known and not self._is_withdrawn

    @property
    def count(self) -> int:
        """How many instances of other machines should be registered here."""
        return 0 if self._is_withdrawn else len(self._wanted)

    def machines(self) -> dict[str, int]:
        """Return the number of instances of each other machine."""
        counts = dict.fromkeys(sorted(self.hosts), 0)
        for place in self._arrivals:
            counts[place.machine] = counts.get(place.machine, 0) + 1
        return counts

    # Keys in etcd.

    def replace(self, others: Mapping[bytes, Record]) -> None:
        """Replace the known keys of other machines by all that etcd has."""
        for key, _, version in difference(_versions(others), self._known):
            if version is None:
                self._remove(key)
            else:
                self._put(key, others[key])
        self.is_known = True
        self._is_withdrawn = False
        self._mark_all()

    def apply(self, event: KeyEvent) -> None:
        """Apply a change of a key of another machine."""
        if event.revision <= self._known.get(event.key, (0, 0))[0]:
            return
        if event.record is None:
            self._remove(event.key)
        else:
            self._put(event.key, event.record)

    def withdraw(self) -> None:
        """Deregister everything until the next `replace`: etcd is away for too long."""
        self._is_withdrawn = True
        self._mark_all()

    def _put(self, key: bytes, record: Record) -> None:
        self._known[key] = _version(record)
        try:
            place = records.place_of(self._prefix, key)
            if not place.name:
                self.hosts[place.machine] = host_of(record)
                return
            fields = records.arrival(place, records.published(record.value), loopback=self._loopback)
        except Invalid as error:
            self._drop(key)
            self._ignore(key, str(error))
            return
        self.ignored.pop(key, None)
        is_new = place not in self._arrivals
        self._arrivals[place] = fields
        if self._is_left_out(place):
            return
        self._must_choose |= is_new and len(self._arrivals) > self._arrivals_max
        self._set(records.arrival_key(place), fields)

    def _remove(self, key: bytes) -> None:
        self._known.pop(key, None)
        self.ignored.pop(key, None)
        self._drop(key)

    def _drop(self, key: bytes) -> None:
        """Forget the claim or the instance of a key."""
        try:
            place = records.place_of(self._prefix, key)
        except Invalid:
            return
        if not place.name:
            self.hosts.pop(place.machine, None)
        elif self._arrivals.pop(place, None) is not None and not self._is_left_out(place):
            self._must_choose |= self._last is not None
            self._set(records.arrival_key(place), None)

    def _is_left_out(self, place: Place) -> bool:
        return self._last is not None and place > self._last

    def _ignore(self, key: bytes, why: str) -> None:
        if self.ignored.get(key) != why and len(self.ignored) < _IGNORED_MAX:
            self.ignored[key] = why
            log.warning("ignored the key %r in etcd: %s", key[:300].decode(errors="backslashreplace"), why)

    def _set(self, key: Key, fields: Fields | None) -> None:
        if fields is None:
            self._wanted.pop(key, None)
        else:
            self._wanted[key] = fields
        self._mark([key])

    def _choose(self) -> None:
        """Choose the instances of the first machines if there are more than can be registered."""
        if not self._must_choose:
            return
        self._must_choose = False
        is_full = len(self._arrivals) > self._arrivals_max
        places = sorted(self._arrivals)[: self._arrivals_max]
        self._last = places[-1] if is_full else None
        chosen = {records.arrival_key(place): self._arrivals[place] for place in places}
        for key, _, fields in difference(chosen, self._wanted):
            self._set(key, fields)
        if is_full and not self._is_logged_as_full:
            rest = len(self._arrivals) - self._arrivals_max
            log.warning("other machines have %d instances too many; the last machines are left out", rest)
        self._is_logged_as_full = is_full

    def differences(self, others: Mapping[bytes, Record]) -> set[str]:
        """Return the keys in etcd that differ from the known ones."""
        return {f"{key!r} {old} {new}" for key, old, new in difference(_versions(others), self._known)}

    # Registrations in the daemon.

    def changed(self, key: Key | None) -> None:
        """Note that a registration in the daemon has changed; None: any of them may have changed."""
        if key is None:
            self._mark_all()
        elif key in self._wanted or records.MACHINE in self._local.instances.get(key, {}).get("meta", ()):
            self._mark([key])

    def _mark(self, keys: Iterable[Key]) -> None:
        if not self._dirty:
            self._dirty_at = time.monotonic()
        self._dirty.update(dict.fromkeys(keys))
        if self.is_known:
            self._wake.set()

    def _mark_all(self) -> None:
        arrived = [key for key, instance in self._local.instances.items() if records.is_arrival(instance)]
        self._mark([*arrived, *self._wanted])

    def unregistered(self, instances: Mapping[Key, Mapping[str, Any]]) -> set[str]:
        """Return where the daemon's registrations, as listed, differ from those that should be there."""
        wanted = {} if self._is_withdrawn else dict(self._wanted)
        actual = {}
        for key, instance in instances.items():
            if records.is_arrival(instance):
                actual[key] = _fields(instance)
            else:
                wanted.pop(key, None)
        skipped = {*self.refused, *self._dirty, *self._in_progress}
        actions = difference(wanted, actual)
        return {f"{key!r} {old!r:.200} {new!r:.200}" for key, old, new in actions if key not in skipped}

    async def run(self, session: Session) -> NoReturn:
        """Register and deregister in one session with the daemon.

        Raises:
            RegdError: the session has ended.
        """
        self._in_progress = {}
        self._mark_all()  # the connections of this session hold nothing yet
        while True:
            await self._wake.wait()
            self._wake.clear()
            self._choose()
            self._in_progress, self._dirty = self._dirty, {}
            since = self._dirty_at
            actions = self._actions(session, self._in_progress)
            keys = [action.key for action in actions]
            removals = sum(action.new is None for action in actions)
            await self._settle(session, keys[:removals])  # first, since they make room
            await self._settle(session, keys[removals:])
            self._in_progress = {}
            if actions:
                self.lag_s = time.monotonic() - since
                self.lag_max_s = max(self.lag_s, self.lag_max_s)

    async def _settle(self, session: Session, keys: Sequence[Key]) -> None:
        """Make registrations as they should be, and wait until the watch shows them.

        What to do is decided at the moment of sending: a local service may have taken a name meanwhile.
        """
        for start in range(0, len(keys), _REQUESTS_MAX):
            actions = self._actions(session, keys[start : start + _REQUESTS_MAX])
            requests = [self._do(session, action, self._local.instances.get(action.key)) for action in actions]
            await session.reach(max(await asyncio.gather(*requests), default=0))

    def _actions(self, session: Session, keys: Iterable[Key]) -> list[Action[Key, Fields]]:
        """Return the actions for some keys. A local registration is never touched."""
        wanted: dict[Key, Fields] = {}
        actual: dict[Key, Fields] = {}
        for key in keys:
            instance = self._local.instances.get(key)
            fields = None if self._is_withdrawn else self._wanted.get(key)
            is_local = instance is not None and not records.is_arrival(instance)
            self.shadowed.discard(key)
            if instance is None:
                session.forget(key)
            if is_local or fields is None:
                self.refused.pop(key, None)
            if is_local:
                if fields is not None:
                    self.shadowed.add(key)
                if key in session.held:  # another holder has joined, or somebody has changed its labels
                    actual[key] = _UNHELD
                continue
            if fields is not None:
                wanted[key] = fields
            if instance is not None:
                actual[key] = _UNHELD if fields is not None and key not in session.held else _fields(instance)
        return difference(wanted, actual)

    async def _do(self, session: Session, action: Action[Key, Fields], instance: Mapping[str, Any] | None) -> int:
        """Carry out an action on what is registered. Return the revision at which the watch shows it."""
        key, _, fields = action
        if_rev = 0 if instance is None else instance["rev"]
        self.requests += 1
        try:
            if fields is None and instance is not None and not records.is_arrival(instance):
                rev = await session.release(key, if_rev)
            elif fields is None:
                rev = await session.deregister(key, if_rev)
            else:
                rev = await session.register(key, fields, if_rev)
        except Unavailable:
            raise
        except (Conflict, NotFound):
            self._dirty[key] = None  # the registration has just changed: decide again when the watch shows it
            asyncio.get_running_loop().call_later(_CONFLICT_S, self._wake.set)
            return 0
        except RegdError as error:
            self._refuse(key, str(error))
            return 0
        self.refused.pop(key, None)
        return rev

    def _refuse(self, key: Key, why: str) -> None:
        if not self.refused:
            log.warning("the daemon refuses instances of other machines, %s first: %s", "/".join(key), why)
        self.refused.pop(key, None)
        self.refused[key] = why  # at the end, so that all are tried in turn
        if self._retry is None:
            self._retry = asyncio.get_running_loop().call_later(_REFUSED_S, self._try_refused)

    def _try_refused(self) -> None:
        self._retry = None
        if len(self.refused) > _REFUSED_MAX:
            self._retry = asyncio.get_running_loop().call_later(_REFUSED_S, self._try_refused)
        self._mark(islice(self.refused, _REFUSED_MAX))


def _version(record: Record) -> Version:
    return record.mod_revision, hash(record.value)


def _versions(others: Mapping[bytes, Record]) -> dict[bytes, Version]:
    return {key: _version(record) for key, record in others.items()}


def _fields(instance: Mapping[str, Any]) -> Fields:
    fields = {name: instance[name] for name in _FIELDS}
    return {**fields, "priority": instance.get("priority", 0)}
