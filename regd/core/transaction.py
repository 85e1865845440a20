"""The pending state: the registry as it will be once the batch of writes in preparation is committed.

Each write of the batch is evaluated against the committed state and the writes before it. The changes then go to
the journal, and once they are on disk to `Registry.apply`.
"""

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import chain

from regd.core.errors import Code, Refused
from regd.core.holders import HolderGone
from regd.core.model import By, Change, Entry, Holder, Key, Op, Process, Reason, State
from regd.core.registry import Registry

ENDS_MAX = 10_000  # changes in one transaction, after which `end` leaves the rest to the next transaction

Owner = int | Process | None
"""A connection, by its session, or a process; None: the connection of an unclaimed hold."""


class OwnerConflict(Exception):
    """Another owner is alive. The caller describes the owner to the peer."""

    def __init__(self, entry: Entry, owner: Holder) -> None:
        super().__init__(entry.name)
        self.entry = entry
        self.owner = owner


@dataclass(frozen=True, slots=True)
class OwnershipLost:
    """A session lost a registration that it held: somebody else replaced or deregistered it."""

    session: int
    rev: int
    entry: Entry
    reason: Reason


def _nobody(holder: Holder) -> bool:
    return False


class Transaction:
    """The changes of one batch of writes. A refused write leaves no change.

    `at` is the wall clock in Unix seconds, for display. `is_gone` asks the operating system whether a holder is
    gone, before a conflict with a living owner is reported. Revisions begin behind `rev_written`, if that is more
    than the registry's. `by` is set to who makes the changes that follow.
    """

    def __init__(
        self,
        registry: Registry,
        at: float,
        is_gone: Callable[[Holder], bool] = _nobody,
        *,
        rev_written: int = 0,
    ) -> None:
        self._registry = registry
        self._at = at
        self._is_gone = is_gone
        self._pending: dict[Key, Entry | None] = {}  # None: ended in this batch
        self._held: dict[Key, None] = {}  # entries that have holders, in order of change
        self._newly_held: Counter[Owner] = Counter()  # registrations that an owner gains in this batch
        self._count = len(registry)
        self._weight_bytes = registry.weight_bytes
        self.rev = max(registry.rev, rev_written)
        self.by: By | None = None
        self.changes: list[Change] = []
        self.lost: list[OwnershipLost] = []
        self.unfinished: dict[HolderGone, None] = {}

    def get(self, key: Key) -> Entry | None:
        """Return an entry as of the pending state."""
        return self._pending[key] if key in self._pending else self._registry.get(key)

    def register(
        self, wanted: Entry, if_rev: int | None = None, *, session: int | None = None, force: bool = False
    ) -> tuple[Entry, bool]:
        """Register `wanted`, which has one holder or none.

        The entry's `rev` and `registered_at` and the holder's id are assigned here, whatever `wanted` has.
        `session` is the connection of the peer. Returns the new entry, and whether it replaced another address.

        Raises:
            OwnerConflict: another owner is alive.
            Refused: `conflict`, the entry is not at revision `if_rev`; `busy`, a limit is reached.
        """
        before = self.get(wanted.key)
        self._check_if(before, if_rev, wanted.key)
        if before is None:
            self._check_room(wanted, None)
            return self._put(self._with_known_holders(wanted)), False
        if (before.host, before.port) == (wanted.host, wanted.port):
            return self._join(wanted, before, session), False
        rivals = [holder for holder in before.holders if not self._is_mine(holder, wanted, session)]
        if not force and (wanted.is_elsewhere or not before.is_elsewhere):
            self._check_rivals(rivals, before)
        self._check_room(wanted, before)
        wanted = self._with_known_holders(wanted)
        self._add(Op.DOWN, before, before, Reason.REPLACED)
        self._tell(before, (each for each in before.holders if each.session != session), Reason.REPLACED)
        return self._put(wanted), True

    def _put(self, wanted: Entry) -> Entry:
        """Add an entry whose key is not registered."""
        return self._add(Op.UP, self._next(wanted, registered_at=self._at), None)

    def _next(
        self,
        entry: Entry,
        *,
        meta: Mapping[str, str] | None = None,
        state: State | None = None,
        priority: int | None = None,
        holders: tuple[Holder, ...] | None = None,
        registered_at: float | None = None,
    ) -> Entry:
        """Return a copy of an entry at the next revision, with these contents; None keeps what it has."""
        return Entry(  # `dataclasses.replace` takes three times as long
            entry.name,
            entry.instance,
            entry.host,
            entry.port,
            entry.meta if meta is None else meta,
            entry.state if state is None else state,
            self.rev + 1,
            entry.registered_at if registered_at is None else registered_at,
            entry.holders if holders is None else holders,
            entry.priority if priority is None else priority,
        )

    def _with_known_holders(self, wanted: Entry) -> Entry:
        if not wanted.holders:
            return wanted
        return replace(wanted, holders=tuple(self._known(holder, wanted.key) for holder in wanted.holders))

    def _known(self, holder: Holder, key: Key) -> Holder:
        """Return a holder with its id, if its connection and its process may hold one more registration."""
        limits, owners = self._registry.limits, _owners(self.get(key))
        if holder.hold and holder.session not in owners:
            self._check_held(holder.session, limits.held_max, "this connection")
        if holder.process is not None and holder.process not in owners:
            self._check_held(holder.process, limits.process_held_max, f"process {holder.process.pid}")
        self._registry.last_holder += 1
        return replace(holder, id=self._registry.last_holder)

    def _check_held(self, owner: Owner, most: int, who: str) -> None:
        if self._registry.holders.held_count(owner) + self._newly_held[owner] >= most:
            raise Refused(Code.BUSY, f"{who} holds {most} registrations already; deregister some")

    def _join(self, wanted: Entry, before: Entry, session: int | None) -> Entry:
        """Register at the address that `before` has: add a holder, or update the same holder."""
        if not wanted.holders:
            return self._set(before, wanted, ())
        [wish] = wanted.holders
        old = next((each for each in before.holders if each.is_same(wish)), None)
        old = old or next((each for each in before.holders if each.is_claimed_by(wish)), None)
        others = [each for each in before.holders if each is not old and not each.withdrawn]
        if wanted.state is State.DRAINING and old is not None and others:
            return self._alter(before, self._next(before, holders=_withdrawn(before, {old.id})))
        if old is not None and replace(old, id=0) == wish and old.ttl_s is None:
            return self._set(before, wanted, before.holders)
        if old is None and len(before.holders) >= self._registry.limits.holders_max:
            raise Refused(Code.BUSY, f"{wanted.name!r} has {len(before.holders)} holders already")
        new = self._known(wish, wanted.key)
        if old is None:
            return self._set(before, wanted, (*before.holders, new))
        return self._set(before, wanted, tuple(new if each is old else each for each in before.holders))

    def _set(self, before: Entry, wanted: Entry, holders: tuple[Holder, ...]) -> Entry:
        """Give an entry the meta, state and priority of `wanted`, and these holders."""
        after = self._next(
            before, meta=wanted.meta, state=wanted.state, priority=wanted.priority, holders=holders
        )
        self._check_room(after, before)
        return self._alter(before, after)

    def _alter(self, before: Entry, after: Entry) -> Entry:
        """Replace `before` by `after`, its copy at the next revision, if they differ. Return the new entry."""
        if not after.looks_like(before):
            return self._add(Op.CHANGE, after, before)
        if after.holders != before.holders:
            return self._add(Op.KEEP, replace(after, rev=before.rev), before)
        return before

    @staticmethod
    def _is_mine(holder: Holder, wanted: Entry, session: int | None) -> bool:
        if session is not None and holder.session == session:
            return True
        return holder.process is not None and any(holder.process == wish.process for wish in wanted.holders)

    def _check_rivals(self, rivals: Iterable[Holder], before: Entry) -> None:
        """Refuse if another owner is alive. An unclaimed hold counts as dead, unless its process is alive."""
        for holder in rivals:
            if holder.withdrawn or (holder.unclaimed and holder.process is None):
                continue
            if self._registry.holders.gone(holder) is not None or self._is_gone(holder):
                continue
            raise OwnerConflict(before, holder)

    def _tell(self, entry: Entry, holders: Iterable[Holder], reason: Reason) -> None:
        for session in {holder.session for holder in holders if holder.session is not None}:
            self.lost.append(OwnershipLost(session, self.rev, entry, reason))

    def deregister(self, key: Key, if_rev: int | None = None, *, session: int | None = None) -> int:
        """End a registration, or only the hold of `session` if that is one of several holders.

        Returns the number of registrations that ended.

        Raises:
            Refused: `not_found`; `conflict`, the entry is not at revision `if_rev`.
        """
        before = self._must(key)
        self._check_if(before, if_rev, key)
        others = tuple(each for each in before.holders if session is None or each.session != session)
        if len(others) < len(before.holders) and any(not holder.withdrawn for holder in others):
            self._alter(before, self._next(before, holders=others))
            return 0
        self._add(Op.DOWN, before, before, Reason.DEREGISTERED)
        self._tell(before, others, Reason.DEREGISTERED)
        return 1

    def drop(self, key: Key, reason: Reason) -> None:
        """End a registration for `reason`, whatever its holders. They are not notified.

        Raises:
            Refused: `not_found`.
        """
        before = self._must(key)
        self._add(Op.DOWN, before, before, reason)

    def update(
        self,
        key: Key,
        meta: Mapping[str, str] | None,
        state: State | None,
        if_rev: int | None = None,
        *,
        priority: int | None = None,
        session: int | None = None,
    ) -> Entry:
        """Replace `meta` as a whole, set `state` and `priority`, and return the new entry. None keeps a value.

        `draining` by one of several holders withdraws that holder and leaves the state as it is.

        Raises:
            Refused: `not_found`; `conflict`, the entry is not at revision `if_rev`; `busy`, the registry is full.
        """
        before = self._must(key)
        self._check_if(before, if_rev, key)
        own = {each.id for each in before.holders if session is not None and each.session == session}
        others = any(each.id not in own and not each.withdrawn for each in before.holders)
        holders = before.holders
        if state is State.DRAINING and own and others:
            state, holders = None, _withdrawn(before, own)
        elif state is not None:
            holders = tuple(replace(each, withdrawn=each.id not in own and each.withdrawn) for each in holders)
        after = self._next(before, meta=meta, state=state, priority=priority, holders=holders)
        self._check_room(after, before)
        return self._alter(before, after)

    def end(self, *endings: HolderGone) -> Iterator[None]:
        """Remove gone holders from the registrations that they held, and end those that have no other holder.

        Yields before each registration. After `ENDS_MAX` changes the rest is left to another transaction, and the
        endings are `unfinished`.
        """
        sessions = {each.session: each.reason for each in endings if each.session is not None}
        processes = {each.process: each.reason for each in endings if each.process is not None}
        ids = {each.holder[1]: each.reason for each in endings if each.holder is not None}

        def reason(holder: Holder) -> Reason | None:
            if holder.hold and holder.session in sessions:
                return sessions[holder.session]
            if holder.process is not None and holder.process in processes:
                return processes[holder.process]
            return ids.get(holder.id)

        held_by = self._registry.holders.held_by
        for key in chain(chain.from_iterable(map(held_by, endings)), self._held.copy()):
            if len(self.changes) >= ENDS_MAX:
                self.unfinished.update(dict.fromkeys(endings))
                return
            yield  # a key may come twice; the second time there is nothing left to do
            before = self.get(key)
            if before is None:
                continue
            kept = tuple(holder for holder in before.holders if reason(holder) is None)
            if len(kept) == len(before.holders):
                continue
            if any(not holder.withdrawn for holder in kept):
                self._alter(before, self._next(before, holders=kept))
            else:
                last = [why for holder in before.holders if (why := reason(holder)) and not holder.withdrawn]
                self._add(Op.DOWN, before, before, last[-1] if last else Reason.CLOSED)

    def _must(self, key: Key) -> Entry:
        entry = self.get(key)
        if entry is None:
            name, instance = key
            which = f"{name!r} with instance {instance!r}" if instance else repr(name)
            raise Refused(Code.NOT_FOUND, f"no registration of {which}")
        return entry

    def _check_if(self, before: Entry | None, if_rev: int | None, key: Key) -> None:
        rev = before.rev if before else 0
        if if_rev is not None and if_rev != rev:
            now = f"is at revision {rev}" if before else "does not exist"
            raise Refused(Code.CONFLICT, f"the registration of {key[0]!r} {now}, and `if` says {if_rev}", rev=rev)

    def _check_room(self, wanted: Entry, before: Entry | None) -> None:
        limits = self._registry.limits
        if before is None and self._count >= limits.registrations_max:
            raise Refused(Code.BUSY, f"the registry is full: {limits.registrations_max} registrations")
        added = wanted.weight_bytes - (before.weight_bytes if before else 0)
        if added > 0 and self._weight_bytes + added > limits.registry_bytes_max:
            raise Refused(Code.BUSY, f"the registry is full: {limits.registry_bytes_max} bytes")

    def _add(self, op: Op, entry: Entry, before: Entry | None, reason: str = "") -> Entry:
        """Add a change to `before`, the pending entry of this key; for `down`, `entry` is `before`."""
        key = entry.key
        after = None if op is Op.DOWN else entry
        self._count += (after is not None) - (before is not None)
        self._weight_bytes += after.weight_bytes if after else 0
        self._weight_bytes -= before.weight_bytes if before else 0
        self._pending[key] = after
        if after is not None and after.holders:
            self._held[key] = None
        if (before is not None and before.holders) or (after is not None and after.holders):
            self._count_held(before, after)
        self.rev += op is not Op.KEEP
        self.changes.append(Change(self.rev, op, entry, reason, before, self._at, self.by))
        return entry

    def _count_held(self, before: Entry | None, after: Entry | None) -> None:
        old, new = _owners(before), _owners(after)
        if old != new:
            self._newly_held.update(new - old)
            self._newly_held.subtract(old - new)


def _withdrawn(entry: Entry, ids: Collection[int]) -> tuple[Holder, ...]:
    """Return the holders of an entry, those with these ids withdrawn. They stay, so that they can deregister."""
    return tuple(replace(each, withdrawn=True) if each.id in ids else each for each in entry.holders)


def _owners(entry: Entry | None) -> set[Owner]:
    """Return the connections and processes that hold an entry."""
    owners: set[Owner] = set()
    for holder in entry.holders if entry is not None else ():
        if holder.hold:
            owners.add(holder.session)
        if holder.process is not None:
            owners.add(holder.process)
    return owners
