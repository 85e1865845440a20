"""The registry: what is registered, who is near, who left.

Two states, each with one home. `Registry` is what has landed: the file holds it, readers see it. `Draft` is
what will be true once the batch that is being put together has landed; conditions are judged against it.
Changes go from a draft to the file to `Registry.land`. Must not know files, sockets, or what time it is.
"""

from bisect import bisect_left, bisect_right, insort
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from difflib import SequenceMatcher
from itertools import islice, takewhile

from regd.core.errors import Code, Refused
from regd.core.history import History
from regd.core.lifetimes import Ending, Lifetimes
from regd.core.limits import DEFAULT, Limits
from regd.core.model import Change, Entry, Holder, Key, Op, Process, Reason, State

_Filter = frozenset[tuple[str, str]]
_FILTERS_KEPT = 32  # of one name; more are put together each time


class _Turns:
    """The ready instances of one name, and whose turn it is: who was served longest ago."""

    def __init__(self) -> None:
        self.ready: list[Entry] | None = None  # None: to be collected anew
        self._queues: dict[_Filter, deque[Entry]] = {}  # by what they must carry, the next in front
        self._served: dict[str, int] = {}  # by instance: when it was served last, in serves
        self._serves = 0

    def look_again(self) -> None:
        """Something changed; who was served when is kept."""
        self.ready = None
        self._queues.clear()

    def queue(self, ready: list[Entry], meta: Mapping[str, str]) -> "deque[Entry]":
        filter = frozenset(meta.items())
        queue = self._queues.get(filter)
        if queue is None:
            if len(self._queues) >= _FILTERS_KEPT:
                self._queues.clear()
            fits = [entry for entry in ready if not meta or entry.carries(meta)]
            queue = deque(sorted(fits, key=lambda entry: self._served.get(entry.instance, 0)))
            self._queues[filter] = queue
        return queue

    def serve(self, queue: "deque[Entry]", entry: Entry) -> None:
        """It was this one's turn: now it is the last."""
        if len(self._served) > 2 * len(self.ready or ()) + 8:
            there = {each.instance for each in self.ready or ()}
            self._served = {key: at for key, at in self._served.items() if key in there}
        self._serves += 1
        self._served[entry.instance] = self._serves
        if queue[0] is entry:
            queue.rotate(-1)
        else:
            queue.remove(entry)
            queue.append(entry)


@dataclass(frozen=True, slots=True)
class Page:
    """A part of a list, in order of keys; `after` is where the next part goes on, None at the end."""

    entries: list[Entry]
    after: Key | None


@dataclass(frozen=True, slots=True)
class Departure:
    instance: str
    reason: str
    at: float  # monotonic seconds, as `now`


class Registry:
    """What has landed. `claim_s` is how long what was loaded with `hold` waits for its client."""

    def __init__(
        self,
        entries: Iterable[Entry] = (),
        rev: int = 0,
        limits: Limits = DEFAULT,
        *,
        now: float = 0.0,
        claim_s: float = 0.0,
    ) -> None:
        self.limits = limits
        self.rev = rev
        self.history = History(rev, limits)
        self.lifetimes = Lifetimes(claim_s)
        self.last_holder = 0  # the highest id that was given
        self._entries: dict[Key, Entry] = {entry.key: entry for entry in entries}
        self._keys: list[Key] = sorted(self._entries)
        self._turns: dict[str, _Turns] = {}  # only of names that were resolved
        self._departures: OrderedDict[str, deque[Departure]] = OrderedDict()
        self.weight_bytes = sum(entry.weight_bytes for entry in self._entries.values())
        for entry in self._entries.values():
            self.lifetimes.move(None, entry, now)
            self.last_holder = max(self.last_holder, *(holder.id for holder in entry.holders), 0)

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, key: Key) -> Entry | None:
        return self._entries.get(key)

    def land(self, changes: Iterable[Change], now: float) -> set[Process]:
        """Make the changes of a draft, in their order, visible to readers.

        Returns the processes of which nothing is held any more.
        """
        free: set[Process] = set()
        for change in changes:
            entry, before = change.entry, change.before
            after = None if change.op is Op.DOWN else entry
            if before is not None:
                self.weight_bytes -= before.weight_bytes
            if after is None:
                del self._entries[entry.key]
                del self._keys[bisect_left(self._keys, entry.key)]
                self._departed(entry.name, Departure(entry.instance, change.reason, now))
            else:
                if before is None:
                    insort(self._keys, entry.key)
                self._entries[entry.key] = entry
                self.weight_bytes += entry.weight_bytes
            free |= self.lifetimes.move(before, after, now)
            self._look_again(entry.name)
            self.rev = change.rev
            if change.op is not Op.KEEP:
                self.history.add(change)
        return {process for process in free if not self.lifetimes.knows(process)}

    def _look_again(self, name: str) -> None:
        turns = self._turns.get(name)
        if turns is not None:
            turns.look_again()

    def gone(self, ending: Ending) -> None:
        """Resolve no more what only this one held. A draft must end it."""
        self.lifetimes.mark(ending)
        for name, _ in self.lifetimes.held_by(ending):
            self._look_again(name)

    def expire(self, now: float) -> list[Ending]:
        """Return whose time is over, as `gone`."""
        endings = self.lifetimes.expire(now)
        for ending in endings:
            self.gone(ending)
        return endings

    def _departed(self, name: str, departure: Departure) -> None:
        if not self._has(name):
            self._turns.pop(name, None)
        self._departures.setdefault(name, deque(maxlen=self.limits.departures_kept)).append(departure)
        self._departures.move_to_end(name)
        if len(self._departures) > self.limits.departures_max:
            self._departures.popitem(last=False)

    def _has(self, name: str) -> bool:
        at = bisect_left(self._keys, (name, ""))
        return at < len(self._keys) and self._keys[at][0] == name

    def is_ready(self, entry: Entry) -> bool:
        return entry.state is State.READY and self.lifetimes.is_alive(entry)

    def named(self, name: str) -> Iterator[Entry]:
        """Return the instances of a name, in order, whatever their state."""
        at = bisect_left(self._keys, (name, ""))
        while at < len(self._keys) and self._keys[at][0] == name:
            yield self._entries[self._keys[at]]
            at += 1

    # Resolving.

    def ready(self, name: str) -> list[Entry]:
        """Return the ready instances of a name, in order of instance."""
        turns = self._turns.get(name)
        if turns is None:
            if not self._has(name):
                return []  # a name that nobody has must cost no memory
            turns = self._turns[name] = _Turns()
        if turns.ready is None:
            turns.ready = [entry for entry in self.named(name) if self.is_ready(entry)]
        return turns.ready

    def resolve(self, name: str, instance: str | None, meta: Mapping[str, str]) -> Entry | None:
        """Return a ready instance that carries `meta`, taking turns; None when there is none."""
        if instance is not None:
            entry = self._entries.get((name, instance))
            return entry if entry and self.is_ready(entry) and entry.carries(meta) else None
        ready = self.ready(name)
        if not ready:
            return None
        turns = self._turns[name]
        queue = turns.queue(ready, meta)
        if not queue:
            return None
        entry = queue[0]
        turns.serve(queue, entry)
        return entry

    def in_turn(self, name: str, instance: str | None, meta: Mapping[str, str]) -> list[Entry]:
        """Return all that `resolve` would, the one whose turn it is first; `took` says who got it."""
        ready = self.ready(name)
        if not ready:
            return []
        queue = self._turns[name].queue(ready, meta)
        return [entry for entry in queue if instance is None or entry.instance == instance]

    def took(self, entry: Entry, meta: Mapping[str, str]) -> None:
        """Say that `entry`, of `in_turn`, was given to somebody."""
        turns = self._turns[entry.name]
        turns.serve(turns.queue(self.ready(entry.name), meta), entry)

    # Listing.

    def page(self, pattern: str, meta: Mapping[str, str], after: Key | None, limit: int) -> Page:
        """List up to `limit` entries behind `after` whose name fits `pattern` and that carry `meta`.

        A page may hold fewer, none even, and still have an `after`: only so many entries are looked at.
        """
        prefix, any_end = (pattern[:-1], True) if pattern.endswith("*") else (pattern, False)
        start = bisect_left(self._keys, (prefix, ""))
        if after is not None:
            start = max(start, bisect_right(self._keys, after))
        found: list[Entry] = []
        for at in range(start, min(start + self.limits.list_scan_max, len(self._keys))):
            key = self._keys[at]
            if not (key[0].startswith(prefix) if any_end else key[0] == prefix):
                return Page(found, None)
            entry = self._entries[key]
            if not meta or entry.carries(meta):
                if len(found) == limit:
                    return Page(found, found[-1].key)
                found.append(entry)
        at = start + self.limits.list_scan_max
        return Page(found, self._keys[at - 1] if at < len(self._keys) else None)

    # Explaining.

    def near(self, name: str) -> list[str]:
        """Return names that somebody who asked for `name` may have meant, the nearest first.

        Looks at a bounded number of neighbours in order, and compares closely only those that could be near.
        """
        half = self.limits.near_candidates_max // 2
        start = bisect_left(self._keys, (name, ""))
        around = {key[0] for key in self._keys[max(0, start - half) : start + half]}
        return _nearest(name, around, self.limits.near_names_max)

    def last(self, name: str, now: float) -> Departure | None:
        """Return how the last instance of a name that was here left, while it is remembered.

        One that is known to be gone has left, though that has not landed yet.
        """
        for entry in islice(self.named(name), self.limits.near_candidates_max):
            reason = self.lifetimes.death(entry)
            if reason is not None:
                return Departure(entry.instance, reason, now)
        departures = self._departures.get(name)
        return departures[-1] if departures else None

    def departures(self, name: str) -> list[Departure]:
        """Return the last departures of a name, the newest first."""
        return list(reversed(self._departures.get(name, ())))


_MIDDLE_MAX = 24  # characters that are compared closely: beyond that names are not near, and comparing is dear


def _nearest(name: str, candidates: Iterable[str], most: int) -> list[str]:
    letters = set(name)
    scored: list[tuple[float, str]] = []
    for candidate in candidates:
        # Cheap tests first: a polling script asks for an unknown name many times a second.
        if candidate == name or abs(len(candidate) - len(name)) > 3 or len(letters ^ set(candidate)) > 4:
            continue
        likeness = _likeness(candidate, name)
        if likeness >= 0.6:
            scored.append((-likeness, candidate))
    return [candidate for _, candidate in sorted(scored)[:most]]


def _likeness(one: str, two: str) -> float:
    """Return 0.0 to 1.0, in time that has a bound: what both begin and end with is not compared."""
    start = _common(one, two)
    end = _common(one[start:][::-1], two[start:][::-1])
    middle, other = one[start : len(one) - end], two[start : len(two) - end]
    if max(len(middle), len(other)) > _MIDDLE_MAX:
        return 0.0
    if sorted(middle) == sorted(other):
        return 1.0
    alike = sum(block.size for block in SequenceMatcher(None, middle, other).get_matching_blocks())
    return 2 * (start + end + alike) / (len(one) + len(two))


def _common(one: str, two: str) -> int:
    """Return how many characters both begin with."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, two, strict=False)))


class Contested(Exception):
    """Another owner lives. Whoever knows the owner's process and connection says so to the peer."""

    def __init__(self, entry: Entry, owner: Holder) -> None:
        super().__init__(entry.name)
        self.entry = entry
        self.owner = owner


@dataclass(frozen=True, slots=True)
class Lost:
    """A connection that no longer has what it held, because somebody else wanted so."""

    session: int
    rev: int
    entry: Entry
    reason: Reason


def _nobody(holder: Holder) -> bool:
    return False


class Draft:
    """The changes of one batch over a registry. Each request is judged against all before it.

    `at` is the wall clock in Unix seconds, for display. A request that is refused leaves no change.
    `is_gone` says of a holder, at the last moment, whether the system knows it to be gone.
    """

    def __init__(self, registry: Registry, at: float, is_gone: Callable[[Holder], bool] = _nobody) -> None:
        self._registry = registry
        self._at = at
        self._is_gone = is_gone
        self._over: dict[Key, Entry | None] = {}
        self._held: set[Key] = set()  # given holders here
        self._count = len(registry)
        self._weight_bytes = registry.weight_bytes
        self.rev = registry.rev
        self.changes: list[Change] = []
        self.lost: list[Lost] = []

    def get(self, key: Key) -> Entry | None:
        return self._over[key] if key in self._over else self._registry.get(key)

    def register(
        self, wanted: Entry, if_rev: int | None = None, *, session: int | None = None, force: bool = False
    ) -> tuple[Entry, bool]:
        """Register `wanted` with its one holder or none; `rev`, `registered_at` and the holder's id are set here.

        `session` is the connection that asks. Returns the entry as it now stands, and whether it replaced another
        address.

        Raises:
            Refused: `conflict` where `if_rev` fails or another owner lives, `busy` where something is full.
        """
        before = self.get(wanted.key)
        self._check_if(before, if_rev, wanted.key)
        if before is None:
            return self._put(wanted, None), False
        if (before.host, before.port) == (wanted.host, wanted.port):
            return self._join(wanted, before, session), False
        rivals = [holder for holder in before.holders if not self._is_mine(holder, wanted, session)]
        if not force:
            self._check_rivals(rivals, before)
        self._check_room(wanted, before)
        self._add(Op.DOWN, before, Reason.REPLACED)
        self._tell(before, (each for each in before.holders if each.session != session), Reason.REPLACED)
        return self._put(wanted, before), True

    def _put(self, wanted: Entry, replaced: Entry | None) -> Entry:
        """Add an entry where none stands now."""
        if replaced is None:
            self._check_room(wanted, None)
        holders = tuple(self._known(holder) for holder in wanted.holders)
        return self._add(Op.UP, replace(wanted, rev=self.rev + 1, registered_at=self._at, holders=holders))

    def _known(self, holder: Holder) -> Holder:
        limits = self._registry.limits
        lifetimes = self._registry.lifetimes
        if holder.hold and lifetimes.held_count(holder.session) + len(self._held) >= limits.held_max:
            mine = [key for key in self._held if self._holds(key, holder.session)]
            if lifetimes.held_count(holder.session) + len(mine) >= limits.held_max:
                raise Refused(Code.BUSY, f"this connection holds {limits.held_max} registrations already")
        self._registry.last_holder += 1
        return replace(holder, id=self._registry.last_holder)

    def _holds(self, key: Key, session: int | None) -> bool:
        entry = self.get(key)
        return entry is not None and any(each.hold and each.session == session for each in entry.holders)

    def _join(self, wanted: Entry, before: Entry, session: int | None) -> Entry:
        """Register at the address that is registered: one more holder, or the same one again."""
        if not wanted.holders:
            return self._set(before, wanted, ())
        [wish] = wanted.holders
        kept = [holder for holder in before.holders if not holder.is_same(wish)]
        others = [holder for holder in kept if not holder.withdrawn]
        if wanted.state is State.DRAINING and others and len(kept) < len(before.holders):
            return self._alter(before, self._withdrawn(before, session))
        again = next((each for each in before.holders if replace(each, id=0) == wish), None)
        if again is not None and again.ttl_s is None:
            return self._set(before, wanted, before.holders)
        if again is None and len(kept) >= self._registry.limits.holders_max:
            raise Refused(Code.BUSY, f"{wanted.name!r} has {len(kept)} holders already")
        return self._set(before, wanted, (*kept, self._known(wish)))

    def _set(self, before: Entry, wanted: Entry, holders: tuple[Holder, ...]) -> Entry:
        """Give an entry the meta and state that are wanted, and these holders."""
        after = replace(before, meta=wanted.meta, state=wanted.state, holders=holders)
        self._check_room(after, before)
        return self._alter(before, after)

    def _alter(self, before: Entry, after: Entry) -> Entry:
        if after.seen != before.seen:
            return self._add(Op.CHANGE, replace(after, rev=self.rev + 1, encoded=None))
        if after.holders != before.holders:
            return self._add(Op.KEEP, after)
        return before

    @staticmethod
    def _is_mine(holder: Holder, wanted: Entry, session: int | None) -> bool:
        if session is not None and holder.session == session:
            return True
        return holder.process is not None and any(holder.process == wish.process for wish in wanted.holders)

    def _check_rivals(self, rivals: Iterable[Holder], before: Entry) -> None:
        """Refuse where somebody else holds it and lives. Who has not claimed it yet counts as dead."""
        for holder in rivals:
            if holder.withdrawn or (holder.hold and holder.session is None):
                continue
            if self._registry.lifetimes.gone(holder) is not None or self._is_gone(holder):
                continue
            raise Contested(before, holder)

    def _tell(self, entry: Entry, holders: Iterable[Holder], reason: Reason) -> None:
        for session in {holder.session for holder in holders if holder.hold and holder.session is not None}:
            self.lost.append(Lost(session, self.rev, entry, reason))

    def deregister(self, key: Key, if_rev: int | None = None, *, session: int | None = None) -> int:
        """End a registration; where the one who asks is one of several holders, only its own hold.

        Returns how many registrations that ended.

        Raises:
            Refused: `not_found`, or `conflict` where `if_rev` fails.
        """
        before = self._must(key)
        self._check_if(before, if_rev, key)
        others = tuple(each for each in before.holders if session is None or each.session != session)
        if len(others) < len(before.holders) and any(not holder.withdrawn for holder in others):
            self._alter(before, replace(before, holders=others))
            return 0
        self._add(Op.DOWN, before, Reason.DEREGISTERED)
        self._tell(before, others, Reason.DEREGISTERED)
        return 1

    def update(
        self,
        key: Key,
        meta: Mapping[str, str] | None,
        state: State | None,
        if_rev: int | None = None,
        *,
        session: int | None = None,
    ) -> Entry:
        """Set `meta` (as a whole), `state` or both, and return the entry as it now stands.

        `draining` by one of several holders withdraws that one, and leaves the state to the others.

        Raises:
            Refused: `not_found`, `conflict` where `if_rev` fails, `busy` where the registry is full.
        """
        before = self._must(key)
        self._check_if(before, if_rev, key)
        after = replace(before, meta=before.meta if meta is None else meta)
        own = {each.id for each in before.holders if session is not None and each.session == session}
        others = any(each.id not in own and not each.withdrawn for each in before.holders)
        if state is State.DRAINING and own and others:
            after = self._withdrawn(after, session)
        elif state is not None:
            holders = tuple(
                replace(each, withdrawn=each.id not in own and each.withdrawn) for each in before.holders
            )
            after = replace(after, state=state, holders=holders)
        self._check_room(after, before)
        return self._alter(before, after)

    @staticmethod
    def _withdrawn(entry: Entry, session: int | None) -> Entry:
        """Keep a holder known, so that it can deregister its own, but let it hold nothing."""
        holders = tuple(
            replace(each, withdrawn=True) if each.session == session else each for each in entry.holders
        )
        return replace(entry, holders=holders)

    def end(self, ending: Ending) -> None:
        """Take a holder that is gone off all that it held; what nobody else holds goes with it."""
        for key in {*self._registry.lifetimes.held_by(ending), *self._held}:
            before = self.get(key)
            if before is None:
                continue
            kept = tuple(holder for holder in before.holders if not ending.hits(holder))
            if len(kept) == len(before.holders):
                continue
            if any(not holder.withdrawn for holder in kept):
                self._alter(before, replace(before, holders=kept))
            else:
                self._add(Op.DOWN, before, ending.reason)

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
        freed = before.weight_bytes if before else 0
        if wanted.weight_bytes > freed and (
            self._weight_bytes + wanted.weight_bytes - freed > limits.registry_bytes_max
        ):
            raise Refused(Code.BUSY, f"the registry is full: {limits.registry_bytes_max} bytes")

    def _add(self, op: Op, entry: Entry, reason: str = "") -> Entry:
        before = self.get(entry.key)
        after = None if op is Op.DOWN else entry
        self._count += (after is not None) - (before is not None)
        self._weight_bytes += after.weight_bytes if after else 0
        self._weight_bytes -= before.weight_bytes if before else 0
        self._over[entry.key] = after
        if after is not None and after.holders:
            self._held.add(entry.key)
        self.rev += op is not Op.KEEP
        self.changes.append(Change(self.rev, op, entry, reason, before))
        return entry
