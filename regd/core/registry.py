"""The committed registry: what is on disk, and what readers see.

A registration has up to three states at once:

| state         | kept in                | set by                                   | read by               |
| ------------- | ---------------------- | ---------------------------------------- | --------------------- |
| committed     | `Registry` and its     | `Registry.load` at the start;            | every read; watches   |
|               | `HolderIndex`          | `Registry.apply` after a commit          |                       |
| uncommitted   | `Transaction`          | the writes of a batch                    | later writes of the   |
|               |                        |                                          | same batch            |
| known gone    | marks in `HolderIndex` | `mark_gone` and `expire`, when a holder  | `resolve`, `why`,     |
|               |                        | is gone, until that is committed         | conflict checks       |

If a commit fails, its transaction is dropped, and no client has seen its changes. The ends of holders are the
only exception: they take effect although they are not on disk, since a holder that is gone cannot come back.

Two values change without a commit, and are not on disk: the deadline of a lease, which `HolderIndex.renew` sets,
and `last_holder_id`, which a transaction increases even if it is dropped.
"""

from bisect import bisect_left, insort
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import islice
from operator import attrgetter

from regd.core.history import History
from regd.core.holders import HolderEnd, HolderIndex
from regd.core.instances import Instances, Search, SearchPosition
from regd.core.limits import DEFAULT, Limits
from regd.core.model import Change, Entry, Key, Op, Process, State
from regd.core.suggestions import nearest

_INVALIDATED_MAX = 1_000  # if an end concerns more names, `on_any_changed` is called once instead


@dataclass(frozen=True, slots=True)
class ListPage:
    """A page of a list, in order of keys. The next page begins after the key `after`; None: no next page."""

    entries: list[Entry]
    after: Key | None


@dataclass(frozen=True, slots=True)
class Departure:
    """The end of an instance, kept for the field `last` of `not_found`, and for `why`."""

    instance: str
    reason: str
    at: float  # monotonic seconds


class Registry:
    """The committed registrations, their holders and their history.

    Args:
        entries: stored registrations, as for `load`.
        rev: their revision.
        limits: the limits in use.
        now: monotonic seconds.
        claim_s: the seconds that a client has to claim a loaded `hold`.

    Attributes:
        rev: the revision of the last change.
        holder_index: the `HolderIndex` of the registrations.
        history: the recent changes.
        on_entry_changed: is called with a name whenever a reply about that name may have changed.
        on_any_changed: is called whenever replies about many names may have changed.
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
        self.holder_index = HolderIndex(claim_s)
        self.last_holder_id = 0  # the highest id that was assigned
        self.weight_bytes = 0
        self._count = 0
        self._instances_by_name: dict[str, Instances] = {}
        self._names: list[str] = []  # in order
        # The round-robin positions of `meta` filters, and those of users who may only read: the instance that was
        # resolved last, by name and hash of the filter.
        self._served: OrderedDict[tuple[str, int], str] = OrderedDict()
        self._served_readonly: OrderedDict[tuple[str, int], str] = OrderedDict()
        self._departures: OrderedDict[str, deque[Departure]] = OrderedDict()
        self.on_entry_changed: Callable[[str], None] = lambda name: None
        self.on_any_changed: Callable[[], None] = lambda: None
        self.load(entries, rev, now)

    def load(
        self, entries: Iterable[Entry], rev: int, now: float, history: History | None = None, wall: float = 0.0
    ) -> None:
        """Fill an empty registry with what is stored.

        Args:
            entries: the stored entries, in any order.
            rev: their revision.
            now: monotonic seconds.
            history: the recent changes; without it, watches cannot resume.
            wall: the time `now` in Unix seconds, from which the age of earlier departures is computed.
        """
        self.rev = rev
        self.history = History(rev, self.limits) if history is None else history
        for change in self.history:
            if change.op is Op.DOWN:
                age_s = max(wall - change.at, 0.0)
                departure = Departure(change.entry.instance, change.reason, now - age_s)
                self._add_departure(change.entry.name, departure)
        in_order = sorted(entries, key=attrgetter("name", "instance"))
        self._count = len(in_order)
        self.weight_bytes = sum(entry.weight_bytes for entry in in_order)
        for entry in in_order:
            if (instances := self._instances_by_name.get(entry.name)) is None:
                instances = self._instances_by_name[entry.name] = Instances()
                self._names.append(entry.name)
            instances.append(entry)
            if entry.holders:
                self.holder_index.update(None, entry, now)
                self.last_holder_id = max(self.last_holder_id, *(holder.id for holder in entry.holders))

    def __len__(self) -> int:
        return self._count

    def get(self, key: Key) -> Entry | None:
        """Return the entry of a key, None if it is not registered."""
        name, instance = key
        instances = self._instances_by_name.get(name)
        return instances.get(instance) if instances is not None else None

    def keys(self) -> list[Key]:
        """Return the keys of all entries, in order."""
        return [entry.key for entry in self._entries_after("", None)]

    def apply(self, changes: Iterable[Change], now: float) -> set[Process]:
        """Make committed changes visible to readers, in order. `now` is in monotonic seconds.

        Returns:
            The processes that held a registration and no longer do.
        """
        without_registrations: set[Process] = set()
        for change in changes:
            entry, previous = change.entry, change.previous
            if previous is not None:
                self.weight_bytes -= previous.weight_bytes
            after = None if change.op is Op.DOWN else entry
            if after is not None:
                self._set(after, previous)
            else:
                self._remove(entry)
                self._add_departure(entry.name, Departure(entry.instance, change.reason, now))
            if entry.holders or (previous is not None and previous.holders):
                without_registrations |= self.holder_index.update(previous, after, now)
            self.on_entry_changed(entry.name)
            if change.op is not Op.KEEP:
                self.rev = change.rev
                self.history.add(change)
        return {process for process in without_registrations if not self.holder_index.has_process(process)}

    def _set(self, entry: Entry, previous: Entry | None) -> None:
        instances = self._instances_by_name.get(entry.name)
        if instances is None:
            instances = self._instances_by_name[entry.name] = Instances()
            insort(self._names, entry.name)
        instances.set(entry)
        self._count += previous is None
        self.weight_bytes += entry.weight_bytes

    def _remove(self, entry: Entry) -> None:
        instances = self._instances_by_name[entry.name]
        instances.remove(entry.instance)
        self._count -= 1
        if not instances.entries:
            del self._instances_by_name[entry.name]
            del self._names[bisect_left(self._names, entry.name)]

    def mark_gone(self, ending: HolderEnd) -> None:
        """Mark a holder as gone. Registrations without another holder are no longer resolved.

        The caller must pass `ending` to `Transaction.end` soon, which ends them.
        """
        self.holder_index.mark_gone(ending)
        self._invalidate(ending)

    def expire(self, now: float, most: int) -> list[HolderEnd]:
        """Mark holders as gone whose deadline has passed, and return their ends, as `HolderIndex.expire` does."""
        endings = self.holder_index.expire(now, most)
        for ending in endings:
            self._invalidate(ending)
        return endings

    def _invalidate(self, ending: HolderEnd) -> None:
        keys = self.holder_index.held_by(ending)
        if len(keys) > _INVALIDATED_MAX:
            self.on_any_changed()
            return
        for name, _ in keys:
            self.on_entry_changed(name)

    def _add_departure(self, name: str, departure: Departure) -> None:
        self._departures.setdefault(name, deque(maxlen=self.limits.departures_kept)).append(departure)
        self._departures.move_to_end(name)
        if len(self._departures) > self.limits.departures_max:
            self._departures.popitem(last=False)

    def is_ready(self, entry: Entry) -> bool:
        """Whether an entry is resolved: its state is `ready`, and it is alive."""
        return entry.state is State.READY and self.holder_index.is_alive(entry)

    def _matches(self, meta: Mapping[str, str], entry: Entry) -> bool:
        return self.is_ready(entry) and entry.carries(meta)

    def is_sole_ready(self, entry: Entry) -> bool:
        """Whether an entry is ready, and no other instance of its name has its priority or a better one."""
        instances = self._instances_by_name.get(entry.name)
        return instances is not None and instances.is_sole_best(entry) and self.is_ready(entry)

    def instances_of(self, name: str) -> Iterator[Entry]:
        """Return the instances of a name in order, including those that are not ready."""
        instances = self._instances_by_name.get(name)
        return iter(instances.entries) if instances is not None else iter(())

    # Resolve.

    def search(self, name: str, instance: str | None, meta: Mapping[str, str], most: int) -> Search:
        """Return a search for up to `most` ready instances with the labels `meta`.

        It finds the best priority first, and within a priority goes in order of instance. `instance` restricts it
        to one instance.
        """
        return Search(self._candidates(name, instance), most, partial(self._matches, meta))

    def search_round_robin(
        self,
        name: str,
        instance: str | None,
        meta: Mapping[str, str],
        most: int,
        after: SearchPosition | None = None,
        *,
        readonly: bool = False,
    ) -> Search:
        """Like `search`, but in round-robin order: within a priority, it begins after the instance served last.

        The search does not move the round-robin position; `mark_served` does.

        Args:
            after: begin where another search has ended.
            readonly: use the position of users who may only read. They have their own, so that they cannot
                influence which instances other users get.
        """
        entries = self._candidates(name, instance)
        served = self._last_served(name, meta, readonly) if len(entries) > 1 else None
        return Search(entries, most, partial(self._matches, meta), served, after)

    def mark_served(self, entry: Entry, meta: Mapping[str, str], *, readonly: bool = False) -> None:
        """Move the round-robin position to `entry`, which a client got from `search_round_robin`."""
        instances = self._instances_by_name.get(entry.name)
        if instances is None or len(instances.entries) == 1:
            return
        if not meta and not readonly:
            # The reply for a sole best instance may be cached, and a cached reply moves no position.
            if not instances.is_sole_best(entry):
                instances.served = entry.instance
            return
        # The hash takes less memory than the filter. If two filters have one hash, they share a position.
        key = (entry.name, hash(frozenset(meta.items())))
        served = self._served_readonly if readonly else self._served
        served[key] = entry.instance
        served.move_to_end(key)
        if len(served) > (
            self.limits.readonly_round_robin_filters_max if readonly else self.limits.round_robin_filters_max
        ):
            served.popitem(last=False)

    def _last_served(self, name: str, meta: Mapping[str, str], readonly: bool) -> str | None:
        instances = self._instances_by_name[name]
        if not meta and not readonly:
            return instances.served
        served = self._served_readonly if readonly else self._served
        return served.get((name, hash(frozenset(meta.items()))), instances.served)

    def _candidates(self, name: str, instance: str | None) -> list[Entry]:
        """Return the instances of a name, as in `Instances.ranked`, or only the instance `instance`."""
        instances = self._instances_by_name.get(name)
        if instances is None:
            return []
        if instance is None:
            return instances.ranked
        entry = instances.get(instance)
        return [entry] if entry is not None else []

    # List.

    def page(self, pattern: str, meta: Mapping[str, str], after: Key | None, limit: int) -> ListPage:
        """Return up to `limit` entries after the key `after`, with the labels `meta`.

        `pattern` is a name, or a prefix followed by `*`. At most `list_scan_max` entries are looked at, so a page
        may have few entries, or none, although it is not the last.
        """
        prefix, is_prefix = (pattern[:-1], True) if pattern.endswith("*") else (pattern, False)
        entries: list[Entry] = []
        last: Key | None = None
        for count, entry in enumerate(self._entries_after(prefix, after)):
            if not (entry.name.startswith(prefix) if is_prefix else entry.name == prefix):
                return ListPage(entries, None)
            if count == self.limits.list_scan_max:
                return ListPage(entries, last)
            if not meta or entry.carries(meta):
                if len(entries) == limit:
                    return ListPage(entries, entries[-1].key)
                entries.append(entry)
            last = entry.key
        return ListPage(entries, None)

    def _entries_after(self, prefix: str, after: Key | None) -> Iterator[Entry]:
        """Yield the entries with a name from `prefix` on and a key after `after`, in order of keys."""
        name, instance = after if after is not None and after[0] >= prefix else (prefix, None)
        at = bisect_left(self._names, name)
        if instance is not None and name in self._instances_by_name:
            instances = self._instances_by_name[name]
            yield from islice(instances.entries, instances.index_after(instance), None)
            at += 1
        for name in islice(self._names, at, None):
            yield from self._instances_by_name[name].entries

    # Explain.

    def near(self, name: str) -> list[str]:
        """Return names similar to `name`, the most similar first.

        Only the neighbours of `name` in alphabetical order are compared, `near_candidates_max` at most.
        """
        half = self.limits.near_candidates_max // 2
        start = bisect_left(self._names, name)
        around = self._names[max(0, start - half) : start + half]
        return nearest(name, around, self.limits.near_names_max)

    def last_departure(self, name: str, now: float) -> Departure | None:
        """Return the latest departure of a name, None if none is kept.

        An instance that is known to be gone counts as departed now.
        """
        for entry in islice(self.instances_of(name), self.limits.near_candidates_max):
            reason = self.holder_index.end_reason(entry)
            if reason is not None:
                return Departure(entry.instance, reason, now)
        departures = self._departures.get(name)
        return departures[-1] if departures else None

    def departures(self, name: str) -> list[Departure]:
        """Return the departures of a name that are kept, the latest first."""
        return list(reversed(self._departures.get(name, ())))
