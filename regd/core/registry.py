"""The registry as it has landed: the file holds it, readers see it. What is registered, who is near, who left.

The other state, what will be true once a batch has landed, is a draft's (`draft.py`). Must not know files,
sockets, or what time it is.
"""

from bisect import bisect_left, bisect_right, insort
from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice

from regd.core.history import History
from regd.core.lifetimes import Ending, Lifetimes
from regd.core.limits import DEFAULT, Limits
from regd.core.model import Change, Entry, Key, Op, Process, State
from regd.core.near import nearest

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
        return nearest(name, around, self.limits.near_names_max)

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
