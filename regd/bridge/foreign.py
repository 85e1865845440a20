"""What comes in: the instances of other machines, from keys of etcd, as registrations in the local daemon."""

import asyncio
import logging
import time
from collections.abc import Iterable, Mapping, Sequence
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
_CONFLICT_S = 1.0  # until the next attempt, should the watch not tell what has changed
_REFUSED_S = 5.0  # until the next attempt, when the daemon refuses
_FIELDS = ("host", "port", "meta", "state")

Fields = Mapping[str, Any]
_UNHELD: Fields = {}  # it is registered, and no connection of this session holds it


class Foreign:
    """Keeps what the daemon has of other machines equal to what etcd has of them.

    Args:
        prefix: of all keys.
        machine: the name of this machine.
        local: the daemon's registrations. Their changes are to be passed on to `changed`.
        loopback: whether machines have addresses on loopback, as in a trial on one machine.
        arrivals_max: at most so many are registered; of more, those of the first machines by name.

    Attributes:
        is_known: whether it is known what etcd has.
        hosts: the host of each other machine's bridge.
        ignored: why a key is ignored, for the first keys that are.
        refused: why the daemon does not take an instance.
        shadowed: the instances that have the name of a local one, which wins.
        lag_s, lag_max_s: from a change in etcd to its reply from the daemon, the last one and the longest.
    """

    def __init__(
        self, prefix: str, machine: str, local: Local, *, loopback: bool, arrivals_max: int = ARRIVALS_MAX
    ) -> None:
        self._prefix = prefix
        self._machine = machine
        self._local = local
        self._loopback = loopback
        self._arrivals_max = arrivals_max
        self._known: dict[bytes, int] = {}  # the revision of each key
        self._arrivals: dict[Place, Fields] = {}  # what these keys say
        self._wanted: dict[Key, Fields] = {}  # at most `arrivals_max` of it
        self._chosen: set[Place] = set()  # the places of `_wanted`, if there are more
        self._must_choose = False
        self._dirty: dict[Key, None] = {}
        self._dirty_at = 0.0
        self._in_progress: dict[Key, None] = {}
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
        """Whether it is known what etcd has, and that is not too old."""
        return self.is_known and not self._is_withdrawn

    @property
    def count(self) -> int:
        """How many instances of other machines are to be registered here."""
        return 0 if self._is_withdrawn else len(self._wanted)

    def machines(self) -> dict[str, int]:
        """Return the number of instances of each other machine."""
        counts = dict.fromkeys(sorted(self.hosts), 0)
        for place in self._arrivals:
            counts[place.machine] = counts.get(place.machine, 0) + 1
        return counts

    # What etcd has.

    def replace(self, others: Mapping[bytes, Record]) -> None:
        """Take all that etcd has of other machines, as the difference to what was known."""
        revisions = {key: record.mod_revision for key, record in others.items()}
        for key, _, revision in difference(revisions, self._known):
            if revision is None:
                self._remove(key)
            else:
                self._put(key, others[key])
        self.is_known = True
        self._is_withdrawn = False
        self._mark_all()

    def apply(self, event: KeyEvent) -> None:
        """Apply a change of a key of another machine."""
        if event.revision <= self._known.get(event.key, 0):
            return
        if event.record is None:
            self._remove(event.key)
        else:
            self._put(event.key, event.record)

    def withdraw(self) -> None:
        """Register nothing until the next `replace`: etcd is away for too long."""
        self._is_withdrawn = True
        self._mark_all()

    def _put(self, key: bytes, record: Record) -> None:
        self._known[key] = record.mod_revision
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
        self._arrivals[place] = fields
        if len(self._arrivals) > self._arrivals_max and place not in self._chosen:
            self._must_choose = True
            self._mark(())
        else:
            self._set(records.arrival_key(place), fields)

    def _remove(self, key: bytes) -> None:
        self._known.pop(key, None)
        self.ignored.pop(key, None)
        self._drop(key)

    def _drop(self, key: bytes) -> None:
        """Withdraw what a key said."""
        try:
            place = records.place_of(self._prefix, key)
        except Invalid:
            return
        if not place.name:
            self.hosts.pop(place.machine, None)
        elif self._arrivals.pop(place, None) is not None:
            self._must_choose = self._must_choose or bool(self._chosen)
            self._set(records.arrival_key(place), None)

    def _ignore(self, key: bytes, why: str) -> None:
        if self.ignored.get(key) != why and len(self.ignored) < _IGNORED_MAX:
            self.ignored[key] = why
            log.warning("ignored the key %r in etcd: %s", key[:300], why)

    def _set(self, key: Key, fields: Fields | None) -> None:
        if fields is None:
            self._wanted.pop(key, None)
        else:
            self._wanted[key] = fields
        self._mark([key])

    def _choose(self) -> None:
        """Of more instances than can be registered, take those of the first machines."""
        if not self._must_choose:
            return
        self._must_choose = False
        is_full = len(self._arrivals) > self._arrivals_max
        places = sorted(self._arrivals)[: self._arrivals_max]
        self._chosen = set(places) if is_full else set()
        chosen = {records.arrival_key(place): self._arrivals[place] for place in places}
        for key, _, fields in difference(chosen, self._wanted):
            self._set(key, fields)
        if is_full and not self._is_logged_as_full:
            rest = len(self._arrivals) - self._arrivals_max
            log.warning("other machines have %d instances too many; the last machines are left out", rest)
        self._is_logged_as_full = is_full

    def differences(self, others: Mapping[bytes, Record]) -> set[str]:
        """Return in which keys etcd differs from what is known here."""
        revisions = {key: record.mod_revision for key, record in others.items()}
        return {f"{key!r} {old} {new}" for key, old, new in difference(revisions, self._known)}

    # What the daemon has.

    def changed(self, key: Key | None) -> None:
        """Look at a registration of the daemon, which has changed; None: at all."""
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
        """Return in which registrations the daemon's, which has these, differ from those that should be there."""
        wanted = {} if self._is_withdrawn else dict(self._wanted)
        actual = {}
        for key, instance in instances.items():
            if records.is_arrival(instance):
                actual[key] = _fields(instance)
            else:
                wanted.pop(key, None)
        skipped = {*self.refused, *self._dirty, *self._in_progress}
        found = difference(wanted, actual)
        return {f"{key!r} {old!r:.200} {new!r:.200}" for key, old, new in found if key not in skipped}

    async def run(self, session: Session) -> NoReturn:
        """Register and withdraw, in one session with the daemon.

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
            removals = [action for action in actions if action.new is None]
            await self._do_all(session, removals)  # first, since they make room
            await self._do_all(session, actions[len(removals) :])
            self._in_progress = {}
            if actions:
                self.lag_s = time.monotonic() - since
                self.lag_max_s = max(self.lag_s, self.lag_max_s)

    async def _do_all(self, session: Session, actions: Sequence[Action[Key, Fields]]) -> None:
        """Carry out actions, and wait until the watch shows them."""
        for start in range(0, len(actions), _REQUESTS_MAX):
            part = actions[start : start + _REQUESTS_MAX]
            revs = await asyncio.gather(*(self._do(session, action) for action in part))
            await session.reach(max(revs))

    def _actions(self, session: Session, keys: Iterable[Key]) -> list[Action[Key, Fields]]:
        """Return what to do for some keys. A local registration is never touched."""
        wanted: dict[Key, Fields] = {}
        actual: dict[Key, Fields] = {}
        for key in keys:
            instance, fields = self._local.instances.get(key), self._wanted.get(key)
            is_wanted = fields is not None and not self._is_withdrawn
            is_local = instance is not None and not records.is_arrival(instance)
            self.shadowed.discard(key)
            if instance is None:
                session.forget(key)
            if is_local:
                if is_wanted:
                    self.shadowed.add(key)
                if key in session.held:  # another holder has joined, or somebody has changed its labels
                    actual[key] = _UNHELD
                continue
            if not is_wanted:
                self.refused.pop(key, None)
            elif fields is not None:
                wanted[key] = fields
            if instance is not None:
                actual[key] = _UNHELD if key not in session.held and is_wanted else _fields(instance)
        return difference(wanted, actual)

    async def _do(self, session: Session, action: Action[Key, Fields]) -> int:
        """Carry out an action. Return the revision up to which the watch must come to show it."""
        key, _, fields = action
        instance = self._local.instances.get(key)
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
            self._later(_CONFLICT_S, key)
            return 0
        except RegdError as error:
            if not self.refused:
                log.warning("the daemon refuses instances of other machines, %s first: %s", "/".join(key), error)
            self.refused[key] = str(error)
            self._later(_REFUSED_S, key)
            return 0
        self.refused.pop(key, None)
        return rev

    def _later(self, after_s: float, key: Key) -> None:
        asyncio.get_running_loop().call_later(after_s, self._mark, [key])


def _fields(instance: Mapping[str, Any]) -> Fields:
    fields = {name: instance[name] for name in _FIELDS}
    return {**fields, "priority": instance.get("priority", 0)}
