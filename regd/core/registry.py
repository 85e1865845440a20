"""The committed registry: what is on disk, and what readers see.

A registration has three states:

| state         | kept in                 | written by                            | read by            |
| ------------- | ----------------------- | ------------------------------------- | ------------------ |
| committed     | `Registry`,             | `Registry.load`, at start;            | every read, and    |
|               | its `HolderIndex`       | `Registry.apply`, after a flush       | `watch` afterwards |
| pending       | `Transaction`,          | the engine, with each write of a      | later writes of    |
|               | one at a time           | batch, before the flush               | the same batch     |
| presumed dead | marks in `HolderIndex`, | `mark_dead` and `expire`, as soon as  | `resolve`, `why`,  |
|               | as well as committed    | a holder is gone; `settle`, once that | conflict checks    |
|               |                         | is committed                          |                    |

If a flush fails, the transaction is dropped, and nobody has seen any of it. Only the ends of gone holders are
applied all the same, since a holder that is presumed dead never comes back. `HolderGone` is such an end, on its
way from the mark to a transaction.

Two things are neither pending nor on disk: a lease's deadline, which `HolderIndex.renew` moves at once, and
`last_holder`, which a transaction counts up even if it is dropped. An `Entry` is never altered: a change replaces
it.
"""

from bisect import bisect_left, insort
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import islice
from operator import attrgetter

from regd.core.history import History
from regd.core.holders import HolderGone, HolderIndex
from regd.core.instances import Instances, Place, Search
from regd.core.limits import DEFAULT, Limits
from regd.core.model import Change, Entry, Key, Op, Process, State
from regd.core.suggestions import nearest

_TOUCHED_MAX = 1_000  # names, one by one


@dataclass(frozen=True, slots=True)
class ListPage:
    """A part of a list, in order of keys; the next part starts behind `after`, None at the end."""

    entries: list[Entry]
    after: Key | None


@dataclass(frozen=True, slots=True)
class Departure:
    """The end of an instance, kept for `last` and `why`."""

    instance: str
    reason: str
    at: float  # monotonic seconds, as `now`


class Registry:
    """The committed registrations. `claim_s` is how long a loaded `hold` waits for its client.

    `on_entry_changed` is called with a name when replies about that name may have changed, `on_any_changed` when
    replies about many names may have.
    """

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
        self.holders = HolderIndex(claim_s)
        self.last_holder = 0  # the highest holder id in use
        self.weight_bytes = 0
        self._count = 0
        self._services: dict[str, Instances] = {}
        self._names: list[str] = []  # in order
        self._served: OrderedDict[tuple[str, int], str] = (
            OrderedDict()
        )  # the instance served last, by name and filter
        self._served_readonly: OrderedDict[tuple[str, int], str] = OrderedDict()
        self._departures: OrderedDict[str, deque[Departure]] = OrderedDict()
        self.on_entry_changed: Callable[[str], None] = lambda name: None
        self.on_any_changed: Callable[[], None] = lambda: None
        self.load(entries, rev, now)

    def load(
        self, entries: Iterable[Entry], rev: int, now: float, history: History | None = None, wall: float = 0.0
    ) -> None:
        """Fill an empty registry with stored entries, as of revision `rev`, and its history.

        `wall` is the time `now` in Unix seconds: departures of earlier lives have that.
        """
        self.rev = rev
        self.history = History(rev, self.limits) if history is None else history
        for change in self.history:
            if change.op is Op.DOWN:
                age_s = max(wall - change.at, 0.0)
                self._departed(change.entry.name, Departure(change.entry.instance, change.reason, now - age_s))
        in_order = sorted(entries, key=attrgetter("name", "instance"))
        self._count = len(in_order)
        self.weight_bytes = sum(entry.weight_bytes for entry in in_order)
        for entry in in_order:
            if (service := self._services.get(entry.name)) is None:
                service = self._services[entry.name] = Instances()
                self._names.append(entry.name)
            service.append(entry)
            if entry.holders:
                self.holders.move(None, entry, now)
                self.last_holder = max(self.last_holder, *(holder.id for holder in entry.holders))

    def __len__(self) -> int:
        return self._count

    def get(self, key: Key) -> Entry | None:
        name, instance = key
        service = self._services.get(name)
        return service.get(instance) if service is not None else None

    def keys(self) -> list[Key]:
        """Return the keys of all entries, in order."""
        return [entry.key for entry in self._behind("", None)]

    def apply(self, changes: Iterable[Change], now: float) -> set[Process]:
        """Make committed changes visible to readers, in their order.

        Returns the processes that no longer hold anything.
        """
        free: set[Process] = set()
        for change in changes:
            entry, before = change.entry, change.before
            if before is not None:
                self.weight_bytes -= before.weight_bytes
            after = None if change.op is Op.DOWN else entry
            if after is not None:
                self._set(after, before)
            else:
                self._remove(entry)
                self._departed(entry.name, Departure(entry.instance, change.reason, now))
            if entry.holders or (before is not None and before.holders):
                free |= self.holders.move(before, after, now)
            self.on_entry_changed(entry.name)
            if change.op is not Op.KEEP:
                self.rev = change.rev
                self.history.add(change)
        return {process for process in free if not self.holders.knows(process)}

    def _set(self, entry: Entry, before: Entry | None = None) -> None:
        service = self._services.get(entry.name)
        if service is None:
            service = self._services[entry.name] = Instances()
            insort(self._names, entry.name)
        service.set(entry)
        self._count += before is None
        self.weight_bytes += entry.weight_bytes

    def _remove(self, entry: Entry) -> None:
        service = self._services[entry.name]
        service.remove(entry.instance)
        self._count -= 1
        if not service.entries:
            del self._services[entry.name]
            del self._names[bisect_left(self._names, entry.name)]

    def mark_dead(self, ending: HolderGone) -> None:
        """Stop resolving what only this holder held. A transaction must end its registrations."""
        self.holders.mark(ending)
        self._touch(ending)

    def expire(self, now: float, most: int) -> list[HolderGone]:
        """Mark up to `most` holders dead whose time is over, and return them."""
        endings = self.holders.expire(now, most)
        for ending in endings:
            self._touch(ending)
        return endings

    def _touch(self, ending: HolderGone) -> None:
        keys = self.holders.held_by(ending)
        if len(keys) > _TOUCHED_MAX:
            self.on_any_changed()
            return
        for name, _ in keys:
            self.on_entry_changed(name)

    def _departed(self, name: str, departure: Departure) -> None:
        self._departures.setdefault(name, deque(maxlen=self.limits.departures_kept)).append(departure)
        self._departures.move_to_end(name)
        if len(self._departures) > self.limits.departures_max:
            self._departures.popitem(last=False)

    def is_ready(self, entry: Entry) -> bool:
        return entry.state is State.READY and self.holders.is_alive(entry)

    def _fits(self, meta: Mapping[str, str], entry: Entry) -> bool:
        return self.is_ready(entry) and entry.carries(meta)

    def is_sole_ready(self, entry: Entry) -> bool:
        """True if the entry is ready, and no other instance of its name has its priority or a better one."""
        service = self._services.get(entry.name)
        return service is not None and service.is_sole_best(entry) and self.is_ready(entry)

    def instances_of(self, name: str) -> Iterator[Entry]:
        """Return the instances of a name, in order, whatever their state."""
        service = self._services.get(name)
        return iter(service.entries) if service is not None else iter(())

    # Resolve.

    def search(self, name: str, instance: str | None, meta: Mapping[str, str], most: int) -> Search:
        """Return a search for up to `most` ready instances that carry `meta`.

        The best priority comes first, then it is in order of instance.
        """
        return Search(self._instances(name, instance), most, partial(self._fits, meta))

    def search_in_turn(
        self,
        name: str,
        instance: str | None,
        meta: Mapping[str, str],
        most: int,
        after: Place | None = None,
        *,
        readonly: bool = False,
    ) -> Search:
        """Return the same search in round-robin order: of each priority from behind the instance served last.

        With `after`, it begins where another search ended. `mark_served` moves the round-robin position. With
        `readonly`, it uses the position of users who may only read, so that they do not move the other one.
        """
        entries = self._instances(name, instance)
        turn = self._last_served(name, meta, readonly) if len(entries) > 1 else None
        return Search(entries, most, partial(self._fits, meta), turn, after)

    def mark_served(self, entry: Entry, meta: Mapping[str, str], *, readonly: bool = False) -> None:
        """Move the round-robin position to `entry`, a result of `search_in_turn`."""
        service = self._services.get(entry.name)
        if service is None or len(service.entries) == 1:
            return
        if not meta and not readonly:
            if not service.is_sole_best(entry):  # its reply may come from a cache, which moves no position
                service.served = entry.instance
            return
        # By hash: filters may share a position, and each takes only a number of memory.
        key = (entry.name, hash(frozenset(meta.items())))
        served = self._served_readonly if readonly else self._served
        served[key] = entry.instance
        served.move_to_end(key)
        if len(served) > (
            self.limits.readonly_round_robin_filters_max if readonly else self.limits.round_robin_filters_max
        ):
            served.popitem(last=False)

    def _last_served(self, name: str, meta: Mapping[str, str], readonly: bool) -> str | None:
        service = self._services[name]
        if not meta and not readonly:
            return service.served
        served = self._served_readonly if readonly else self._served
        return served.get((name, hash(frozenset(meta.items()))), service.served)

    def _instances(self, name: str, instance: str | None) -> list[Entry]:
        """Return the instances of a name, ranked, or only the one that is named."""
        service = self._services.get(name)
        if service is None:
            return []
        if instance is None:
            return service.ranked
        entry = service.get(instance)
        return [entry] if entry is not None else []

    # List.

    def page(self, pattern: str, meta: Mapping[str, str], after: Key | None, limit: int) -> ListPage:
        """List up to `limit` entries behind `after` whose name fits `pattern` and that carry `meta`.

        At most `list_scan_max` entries are looked at. So a page may be short, or even empty, and have an `after`.
        """
        prefix, any_end = (pattern[:-1], True) if pattern.endswith("*") else (pattern, False)
        found: list[Entry] = []
        last: Key | None = None
        for count, entry in enumerate(self._behind(prefix, after)):
            if not (entry.name.startswith(prefix) if any_end else entry.name == prefix):
                return ListPage(found, None)
            if count == self.limits.list_scan_max:
                return ListPage(found, last)
            if not meta or entry.carries(meta):
                if len(found) == limit:
                    return ListPage(found, found[-1].key)
                found.append(entry)
            last = entry.key
        return ListPage(found, None)

    def _behind(self, prefix: str, after: Key | None) -> Iterator[Entry]:
        """Return the entries of names from `prefix` on, in order, without those up to and including `after`."""
        name, instance = after if after is not None and after[0] >= prefix else (prefix, None)
        at = bisect_left(self._names, name)
        if instance is not None and name in self._services:
            service = self._services[name]
            yield from islice(service.entries, service.behind(instance), None)
            at += 1
        for each in islice(self._names, at, None):
            yield from self._services[each].entries

    # Explain.

    def near(self, name: str) -> list[str]:
        """Return names similar to `name`, the most similar first.

        Only the neighbours of `name` in alphabetical order are compared, `near_candidates_max` at most.
        """
        half = self.limits.near_candidates_max // 2
        start = bisect_left(self._names, name)
        around = self._names[max(0, start - half) : start + half]
        return nearest(name, around, self.limits.near_names_max)

    def last(self, name: str, now: float) -> Departure | None:
        """Return the latest departure of a name, None if none is remembered.

        An instance that is presumed dead has left.
        """
        for entry in islice(self.instances_of(name), self.limits.near_candidates_max):
            reason = self.holders.death(entry)
            if reason is not None:
                return Departure(entry.instance, reason, now)
        departures = self._departures.get(name)
        return departures[-1] if departures else None

    def departures(self, name: str) -> list[Departure]:
        """Return the remembered departures of a name, the newest first."""
        return list(reversed(self._departures.get(name, ())))
