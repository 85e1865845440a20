"""The instances of one name, and a search among them.

A name may have a hundred thousand instances. So a search is done in steps, with other work in between.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Callable
from operator import attrgetter
from typing import NamedTuple

from regd.core.model import Entry

_instance = attrgetter("instance")
_priority = attrgetter("priority")
_rank = attrgetter("priority", "instance")


class Instances:
    """The instances of one name.

    Attributes:
        entries: in order of instance.
        ranked: in order of priority, the best first, then of instance.
        served: the round-robin position: the instance that was resolved last. It may have ended since.
    """

    __slots__ = ("entries", "ranked", "served")

    def __init__(self) -> None:
        self.entries: list[Entry] = []
        self.ranked = self.entries  # the same list object, unless there are several priorities
        self.served: str | None = None

    def get(self, instance: str) -> Entry | None:
        if len(self.entries) == 1:  # the usual case
            entry = self.entries[0]
            return entry if entry.instance == instance else None
        at = bisect_left(self.entries, instance, key=_instance)
        if at < len(self.entries) and self.entries[at].instance == instance:
            return self.entries[at]
        return None

    def set(self, entry: Entry) -> None:
        if len(self.entries) == 1 and self.entries[0].instance == entry.instance:
            self.entries[0] = entry
            return
        if not self.entries:
            self.append(entry)
            return
        at = bisect_left(self.entries, entry.instance, key=_instance)
        previous = self.entries[at] if at < len(self.entries) else None
        if previous is not None and previous.instance != entry.instance:
            previous = None
        if self.ranked is self.entries and self.entries[0].priority != entry.priority:
            self.ranked = self.entries.copy()
        if self.ranked is not self.entries:
            if previous is not None:
                del self.ranked[bisect_left(self.ranked, _rank(previous), key=_rank)]
            self.ranked.insert(bisect_left(self.ranked, _rank(entry), key=_rank), entry)
        if previous is not None:
            self.entries[at] = entry
        else:
            self.entries.insert(at, entry)
        self._share()

    def append(self, entry: Entry) -> None:
        """Add an entry whose instance is after all others in order."""
        if not self.entries:
            self.ranked = self.entries = [entry]  # a literal: with `append`, the list would reserve more memory
        elif self.ranked is self.entries and self.entries[0].priority == entry.priority:
            self.entries.append(entry)
        else:
            self.set(entry)

    def remove(self, instance: str) -> None:
        at = bisect_left(self.entries, instance, key=_instance)
        if self.ranked is not self.entries:
            del self.ranked[bisect_left(self.ranked, _rank(self.entries[at]), key=_rank)]
        del self.entries[at]
        self._share()

    def _share(self) -> None:
        """Drop the second list if all instances have one priority."""
        if self.ranked and self.ranked[0].priority == self.ranked[-1].priority:
            self.ranked = self.entries

    def is_sole_best(self, entry: Entry) -> bool:
        """Whether no other instance has the priority of an entry, or a better one."""
        ranked = self.ranked
        return ranked[0] is entry and (len(ranked) == 1 or ranked[1].priority != entry.priority)

    def index_after(self, instance: str) -> int:
        """Return the index in `entries` of the first instance after `instance`, which need not exist."""
        return bisect_right(self.entries, instance, key=_instance)


class SearchPosition(NamedTuple):
    """A position in a search: the last entry that was found, and the round-robin position of the search."""

    served: str | None
    entry: Entry


class Search:
    """A search that looks at each instance of a name once, in steps. It sees the entries as of its first step.

    Args:
        entries: the instances, as in `Instances.ranked`. The search goes from the best priority to the worst.
        most: how many entries to find.
        fits: whether an entry is wanted.
        served: the round-robin position. Each priority is searched from the instance after it to the last, then
            from the first to it. None: from the first to the last.
        after: begin after this position; the instances before it are searched last.

    Attributes:
        found: the entries found so far.
    """

    __slots__ = (
        "_at",
        "_copied",
        "_end",
        "_entries",
        "_fits",
        "_high",
        "_left",
        "_most",
        "_rest",
        "_served",
        "found",
    )

    def __init__(
        self,
        entries: list[Entry],
        most: int,
        fits: Callable[[Entry], bool],
        served: str | None = None,
        after: SearchPosition | None = None,
    ) -> None:
        self._entries = entries
        self._copied = False
        self._left = len(entries)
        self._most = most
        self._fits = fits
        self._served = served
        self.found: list[Entry] = []
        # The range of indices that is searched now, from `_at` to `_end`, and the range that follows it. Both are
        # of one priority, which ends at `_high`.
        self._at = self._end = self._high = 0
        self._rest = (0, 0)
        if after is not None:
            self._served = after.served
            self._begin_after(after.entry)
        elif entries:
            self._begin_priority(0)

    @property
    def position(self) -> SearchPosition:
        """The position after the last entry found, for another search."""
        return SearchPosition(self._served, self.found[-1])

    def _begin_after(self, entry: Entry) -> None:
        low = bisect_left(self._entries, entry.priority, key=_priority)
        self._high = bisect_right(self._entries, entry.priority, low, key=_priority)
        self._at = bisect_right(self._entries, entry.instance, low, self._high, key=_instance)
        first = low
        if self._served is not None:
            first = bisect_right(self._entries, self._served, low, self._high, key=_instance)
        if self._served is None or entry.instance > self._served:
            self._end, self._rest = self._high, (low, first)
        else:
            self._end, self._rest = first, (first, first)

    def _begin_priority(self, low: int) -> None:
        """Search the priority whose entries begin at index `low`."""
        entries = self._entries
        high = len(entries)
        if high - low > 1 and entries[low].priority != entries[-1].priority:
            high = bisect_right(entries, entries[low].priority, low, key=_priority)
        at = low if self._served is None else bisect_right(entries, self._served, low, high, key=_instance)
        self._at, self._end, self._rest, self._high = at, high, (low, at), high

    def _next_range(self) -> None:
        """Continue with the rest of this priority, or else with the next priority."""
        (start, end), self._rest = self._rest, (0, 0)
        if start < end:
            self._at, self._end = start, end
        else:
            self._begin_priority(self._high if self._high < len(self._entries) else 0)

    def step(self, count: int) -> bool:
        """Look at up to `count` more entries. Return whether the search is complete."""
        if count > self._left:
            count = self._left
        self._left -= count
        while count:
            while self._at == self._end:
                self._next_range()
            start = self._at
            self._at = self._end if self._end - start < count else start + count
            count -= self._at - start
            for at in range(start, self._at):
                entry = self._entries[at]
                if self._fits(entry):
                    self.found.append(entry)
                    if len(self.found) == self._most:
                        self._left = 0
                        return True
        if self._left and not self._copied:  # the list may change before the next step
            self._entries, self._copied = list(self._entries), True
        return not self._left
