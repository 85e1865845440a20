"""Evaluate a batch of writes. The result is a list of changes to commit.

Each write sees the committed registry and the earlier writes of its batch. `Store.commit` writes the changes to
the journal, and `Registry.apply` then makes them visible.
"""

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import chain

from regd.core.errors import Code, Refused
from regd.core.holders import HolderEnd
from regd.core.model import By, Change, Entry, Holder, Key, Op, Process, Reason, State
from regd.core.registry import Registry

ENDS_MAX = 10_000  # changes in one transaction; `end` leaves the rest to the next one

Owner = int | Process | None
"""What holds a registration: a session, a process, or None for a `hold` that its client has not claimed yet."""


class OwnerConflict(Exception):
    """The name is held by `owner`, which is alive. `entry` is its registration.

    It is not a `Refused`, because its message needs what only the server knows about the owner.
    """

    def __init__(self, entry: Entry, owner: Holder) -> None:
        super().__init__(entry.name)
        self.entry = entry
        self.owner = owner


@dataclass(frozen=True, slots=True)
class OwnershipLost:
    """A session lost a registration that it held, because another client replaced or deregistered it."""

    session: int
    rev: int
    entry: Entry
    reason: Reason


def _never_gone(holder: Holder) -> bool:
    return False


class Transaction:
    """One batch of writes. `changes` is its result; a write that is refused adds no change.

    Args:
        registry: the committed state. Only `last_holder_id` is changed, to assign ids.
        at: the time of the changes, in Unix seconds, for display.
        is_gone: asks the operating system whether a holder is gone, before `OwnerConflict` is raised for it: the
            daemon may not have noticed its end yet.
        rev_written: the highest revision that may be on disk. New revisions are above it, and above
            `registry.rev`.

    Attributes:
        changes: the changes in order.
        lost: the registrations that sessions have lost to other clients.
        by: the origin of the changes that follow, recorded in each; the caller sets it.
        rev: the revision of the last change.
        unfinished: the arguments of `end` that another transaction must finish, because this one is full.
    """

    def __init__(
        self,
        registry: Registry,
        at: float,
        is_gone: Callable[[Holder], bool] = _never_gone,
        *,
        rev_written: int = 0,
    ) -> None:
        self._registry = registry
        self._at = at
        self._is_gone = is_gone
        self._uncommitted: dict[Key, Entry | None] = {}  # None: ended in this batch
        self._held: dict[Key, None] = {}  # entries that have holders, in order of change
        self._newly_held: Counter[Owner] = Counter()  # registrations that an owner gains in this batch
        self._count = len(registry)
        self._weight_bytes = registry.weight_bytes
        self.rev = max(registry.rev, rev_written)
        self.by: By | None = None
        self.changes: list[Change] = []
        self.lost: list[OwnershipLost] = []
        self.unfinished: dict[HolderEnd, None] = {}

    def get(self, key: Key) -> Entry | None:
        """Return the entry of a key, with the changes of this transaction; None if there is none."""
        return self._uncommitted[key] if key in self._uncommitted else self._registry.get(key)

    def register(
        self, entry: Entry, if_rev: int | None = None, *, session: int | None = None, force: bool = False
    ) -> tuple[Entry, bool]:
        """Register an instance, or change its registration.

        Registering the same address again adds a holder, or updates the conditions of the same holder. Another
        address replaces the registration, unless another owner of it is alive.

        Args:
            entry: the registration, with one holder or none. Its `rev` and `registered_at` and the holder's `id`
                are ignored and assigned here.
            if_rev: the revision that the registration must have; 0 means that there must be none.
            session: the connection that sent the request.
            force: replace the registration even if another owner is alive.

        Returns:
            The new entry, and whether it replaced a registration at another address.

        Raises:
            OwnerConflict: another owner is alive, and `force` is false.
            Refused: `conflict`, the registration is not at revision `if_rev`; `busy`, a limit is reached.
        """
        previous = self.get(entry.key)
        self._check_revision(previous, if_rev, entry.key)
        if previous is None:
            self._check_capacity(entry, None)
            return self._insert(self._with_holder_ids(entry)), False
        if (previous.host, previous.port) == (entry.host, entry.port):
            return self._join(entry, previous, session), False
        rivals = [holder for holder in previous.holders if not self._is_same_owner(holder, entry, session)]
        if not force and (entry.is_remote or not previous.is_remote):
            self._check_owners(rivals, previous)
        self._check_capacity(entry, previous)
        entry = self._with_holder_ids(entry)
        self._record(Op.DOWN, previous, previous, Reason.REPLACED)
        others = [holder for holder in previous.holders if holder.session != session]
        self._report_lost(previous, others, Reason.REPLACED)
        return self._insert(entry), True

    def _insert(self, entry: Entry) -> Entry:
        """Add an entry. Its key must not be registered."""
        return self._record(Op.UP, self._copy_at_next_revision(entry, registered_at=self._at), None)

    def _copy_at_next_revision(
        self,
        entry: Entry,
        *,
        meta: Mapping[str, str] | None = None,
        state: State | None = None,
        priority: int | None = None,
        holders: tuple[Holder, ...] | None = None,
        registered_at: float | None = None,
    ) -> Entry:
        """Return a copy of an entry at the next revision. None keeps the entry's value."""
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

    def _with_holder_ids(self, entry: Entry) -> Entry:
        if not entry.holders:
            return entry
        return replace(entry, holders=tuple(self._with_id(holder, entry.key) for holder in entry.holders))

    def _with_id(self, holder: Holder, key: Key) -> Holder:
        """Return a holder with a new id.

        Raises:
            Refused: `busy`, its connection or its process holds as many registrations as it may.
        """
        limits, owners = self._registry.limits, _owners(self.get(key))
        if holder.hold and holder.session not in owners:
            self._check_held(holder.session, limits.held_max, "this connection")
        if holder.process is not None and holder.process not in owners:
            self._check_held(holder.process, limits.process_held_max, f"process {holder.process.pid}")
        self._registry.last_holder_id += 1
        return replace(holder, id=self._registry.last_holder_id)

    def _check_held(self, owner: Owner, most: int, who: str) -> None:
        if self._registry.holder_index.held_count(owner) + self._newly_held[owner] >= most:
            raise Refused(Code.BUSY, f"{who} holds {most} registrations already; deregister some")

    def _join(self, entry: Entry, previous: Entry, session: int | None) -> Entry:
        """Register again at the same address: add a holder, or update the same holder."""
        if not entry.holders:
            return self._change_entry(previous, entry, ())
        [requested] = entry.holders
        known = next((holder for holder in previous.holders if holder.is_same(requested)), None)
        known = known or next((holder for holder in previous.holders if holder.is_claimed_by(requested)), None)
        others = [holder for holder in previous.holders if holder is not known and not holder.withdrawn]
        if entry.state is State.DRAINING and known is not None and others:
            return self._record_if_different(
                previous, self._copy_at_next_revision(previous, holders=_withdraw(previous, {known.id}))
            )
        # Not so with a lease, which registering again renews: a new holder gets a new deadline.
        if known is not None and replace(known, id=0) == requested and known.ttl_s is None:
            return self._change_entry(previous, entry, previous.holders)
        if known is None and len(previous.holders) >= self._registry.limits.holders_max:
            raise Refused(Code.BUSY, f"{entry.name!r} has {len(previous.holders)} holders already")
        new = self._with_id(requested, entry.key)
        if known is None:
            return self._change_entry(previous, entry, (*previous.holders, new))
        return self._change_entry(
            previous, entry, tuple(new if holder is known else holder for holder in previous.holders)
        )

    def _change_entry(self, previous: Entry, entry: Entry, holders: tuple[Holder, ...]) -> Entry:
        """Give the previous entry the meta, state and priority of `entry`, and these holders."""
        after = self._copy_at_next_revision(
            previous, meta=entry.meta, state=entry.state, priority=entry.priority, holders=holders
        )
        self._check_capacity(after, previous)
        return self._record_if_different(previous, after)

    def _record_if_different(self, previous: Entry, after: Entry) -> Entry:
        """Record that `after` follows `previous`, unless they are equal. Return the entry in effect.

        A change that clients cannot see, of the holders alone, takes no revision.
        """
        if not after.looks_like(previous):
            return self._record(Op.CHANGE, after, previous)
        if after.holders != previous.holders:
            return self._record(Op.KEEP, replace(after, rev=previous.rev), previous)
        return previous

    @staticmethod
    def _is_same_owner(holder: Holder, entry: Entry, session: int | None) -> bool:
        if session is not None and holder.session == session:
            return True
        return holder.process is not None and any(holder.process == other.process for other in entry.holders)

    def _check_owners(self, rivals: Iterable[Holder], previous: Entry) -> None:
        """Raise `OwnerConflict` if one of `rivals` is alive.

        An unclaimed hold counts as gone, unless it has a process that is alive.
        """
        for holder in rivals:
            if holder.withdrawn or (holder.unclaimed and holder.process is None):
                continue
            if self._registry.holder_index.gone_reason(holder) is not None or self._is_gone(holder):
                continue
            raise OwnerConflict(previous, holder)

    def _report_lost(self, entry: Entry, holders: Iterable[Holder], reason: Reason) -> None:
        for session in {holder.session for holder in holders if holder.session is not None}:
            self.lost.append(OwnershipLost(session, self.rev, entry, reason))

    def deregister(self, key: Key, if_rev: int | None = None, *, session: int | None = None) -> int:
        """End a registration. If `session` is one of several holders, end only its hold.

        Args:
            if_rev: the revision that the registration must have.
            session: the connection that sent the request.

        Returns:
            How many registrations have ended: 1, or 0 if there are other holders.

        Raises:
            Refused: `not_found`; `conflict`, the registration is not at revision `if_rev`.
        """
        previous = self._require(key)
        self._check_revision(previous, if_rev, key)
        others = tuple(holder for holder in previous.holders if session is None or holder.session != session)
        if len(others) < len(previous.holders) and any(not holder.withdrawn for holder in others):
            self._record_if_different(previous, self._copy_at_next_revision(previous, holders=others))
            return 0
        self._record(Op.DOWN, previous, previous, Reason.DEREGISTERED)
        self._report_lost(previous, others, Reason.DEREGISTERED)
        return 1

    def drop(self, key: Key, reason: Reason) -> None:
        """End a registration for a reason, without regard to its holders, which are not notified.

        Raises:
            Refused: `not_found`.
        """
        previous = self._require(key)
        self._record(Op.DOWN, previous, previous, reason)

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
        """Change a registration, and return the new entry. None keeps a value; `meta` is replaced as a whole.

        If one of several holders sets `draining`, that holder is withdrawn, and the state stays as it is.

        Args:
            if_rev: the revision that the registration must have.
            session: the connection that sent the request.

        Raises:
            Refused: `not_found`; `conflict`, the registration is not at revision `if_rev`; `busy`, the registry
                is full.
        """
        previous = self._require(key)
        self._check_revision(previous, if_rev, key)
        own = {holder.id for holder in previous.holders if session is not None and holder.session == session}
        others = any(holder.id not in own and not holder.withdrawn for holder in previous.holders)
        holders = previous.holders
        if state is State.DRAINING and own and others:
            state, holders = None, _withdraw(previous, own)
        elif state is not None:
            holders = tuple(
                replace(holder, withdrawn=holder.id not in own and holder.withdrawn) for holder in holders
            )
        after = self._copy_at_next_revision(previous, meta=meta, state=state, priority=priority, holders=holders)
        self._check_capacity(after, previous)
        return self._record_if_different(previous, after)

    def end(self, *endings: HolderEnd) -> Iterator[None]:
        """Remove gone holders from their registrations, and end the registrations that have no other holder.

        A generator: it yields before each registration, so that the caller can interleave other work. If the
        transaction has `ENDS_MAX` changes, it stops and adds the endings to `unfinished`.
        """
        sessions = {ending.session: ending.reason for ending in endings if ending.session is not None}
        processes = {ending.process: ending.reason for ending in endings if ending.process is not None}
        ids = {ending.holder[1]: ending.reason for ending in endings if ending.holder is not None}

        def reason(holder: Holder) -> Reason | None:
            if holder.hold and holder.session in sessions:
                return sessions[holder.session]
            if holder.process is not None and holder.process in processes:
                return processes[holder.process]
            return ids.get(holder.id)

        held_by = self._registry.holder_index.held_by
        for key in chain(chain.from_iterable(map(held_by, endings)), self._held.copy()):
            if len(self.changes) >= ENDS_MAX:
                self.unfinished.update(dict.fromkeys(endings))
                return
            yield  # a key may come twice; the second time there is nothing left to do
            previous = self.get(key)
            if previous is None:
                continue
            kept = tuple(holder for holder in previous.holders if reason(holder) is None)
            if len(kept) == len(previous.holders):
                continue
            if any(not holder.withdrawn for holder in kept):
                self._record_if_different(previous, self._copy_at_next_revision(previous, holders=kept))
            else:
                last = [why for holder in previous.holders if (why := reason(holder)) and not holder.withdrawn]
                self._record(Op.DOWN, previous, previous, last[-1] if last else Reason.CLOSED)

    def _require(self, key: Key) -> Entry:
        entry = self.get(key)
        if entry is None:
            name, instance = key
            which = f"{name!r} with instance {instance!r}" if instance else repr(name)
            raise Refused(Code.NOT_FOUND, f"no registration of {which}")
        return entry

    def _check_revision(self, previous: Entry | None, if_rev: int | None, key: Key) -> None:
        rev = previous.rev if previous else 0
        if if_rev is not None and if_rev != rev:
            now = f"is at revision {rev}" if previous else "does not exist"
            raise Refused(Code.CONFLICT, f"the registration of {key[0]!r} {now}, and `if` says {if_rev}", rev=rev)

    def _check_capacity(self, entry: Entry, previous: Entry | None) -> None:
        limits = self._registry.limits
        if previous is None and self._count >= limits.registrations_max:
            raise Refused(Code.BUSY, f"the registry is full: {limits.registrations_max} registrations")
        added = entry.weight_bytes - (previous.weight_bytes if previous else 0)
        if added > 0 and self._weight_bytes + added > limits.registry_bytes_max:
            raise Refused(Code.BUSY, f"the registry is full: {limits.registry_bytes_max} bytes")

    def _record(self, op: Op, entry: Entry, previous: Entry | None, reason: str = "") -> Entry:
        """Append a change to `changes`. For `down`, `entry` is the entry that ends."""
        key = entry.key
        after = None if op is Op.DOWN else entry
        self._count += (after is not None) - (previous is not None)
        self._weight_bytes += after.weight_bytes if after else 0
        self._weight_bytes -= previous.weight_bytes if previous else 0
        self._uncommitted[key] = after
        if after is not None and after.holders:
            self._held[key] = None
        if (previous is not None and previous.holders) or (after is not None and after.holders):
            self._count_held(previous, after)
        self.rev += op is not Op.KEEP
        self.changes.append(Change(self.rev, op, entry, reason, previous, self._at, self.by))
        return entry

    def _count_held(self, previous: Entry | None, after: Entry | None) -> None:
        old, new = _owners(previous), _owners(after)
        if old != new:
            self._newly_held.update(new - old)
            self._newly_held.subtract(old - new)


def _withdraw(entry: Entry, ids: Collection[int]) -> tuple[Holder, ...]:
    """Return the holders of an entry, and mark those with these ids as withdrawn.

    A withdrawn holder stays in the entry, so that it can still deregister.
    """
    return tuple(replace(holder, withdrawn=True) if holder.id in ids else holder for holder in entry.holders)


def _owners(entry: Entry | None) -> set[Owner]:
    """Return the owners of an entry: the sessions and processes of its holders."""
    owners: set[Owner] = set()
    for holder in entry.holders if entry is not None else ():
        if holder.hold:
            owners.add(holder.session)
        if holder.process is not None:
            owners.add(holder.process)
    return owners
