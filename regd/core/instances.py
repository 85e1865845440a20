"""The instances of one name, and a search among them that can be done in steps.

A name may have a hundred thousand instances, so nothing here looks at all of them at once.
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

    `entries` are in order of instance; `ranked` are the same, the best priority first, then in order of instance.
    `served` is the name of the instance resolved last; the next `resolve` begins after it.
    """

    __slots__ = ("entries", "ranked", "served")

    def __init__(self) -> None:
        self.entries: list[Entry] = []
        self.ranked = self.entries  # the very same list as long as all instances have one priority
        self.served: str | None = None

    def get(self, instance: str) -> Entry | None:
        if len(self.entries) == 1:  # as of most names
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
        """Add an entry that comes after all others."""
        if not self.entries:
            self.ranked = self.entries = [entry]  # a list of exactly one element: most names have one instance
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
        """Drop the second list if one is enough."""
        if self.ranked and self.ranked[0].priority == self.ranked[-1].priority:
            self.ranked = self.entries

    def is_sole_best(self, entry: Entry) -> bool:
        """Whether no other instance has the priority of an entry, or a better one."""
        ranked = self.ranked
        return ranked[0] is entry and (len(ranked) == 1 or ranked[1].priority != entry.priority)

    def behind(self, instance: str | None) -> int:
        """Return the index of the first instance behind `instance`, which need not exist; None is before all."""
        return 0 if instance is None else bisect_right(self.entries, instance, key=_instance)


class Place(NamedTuple):
    """Where the next search begins: after `entry`, in the order of a search with this `turn`."""

    turn: str | None
    entry: Entry


class Search:
    """A search for up to `most` entries that fit, once around. `found` are those so far.

    `entries` are ranked as in `Instances`: the best priority comes first. Within a priority the search begins
    behind the instance `turn`, which need not exist; None is before all. With `after`, it begins there instead.

    It sees the entries as they were at its first step.
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
        "_turn",
        "found",
    )

    def __init__(
        self,
        entries: list[Entry],
        most: int,
        fits: Callable[[Entry], bool],
        turn: str | None = None,
        after: Place | None = None,
    ) -> None:
        self._entries = entries
        self._copied = False
        self._left = len(entries)
        self._most = most
        self._fits = fits
        self._turn = turn
        self.found: list[Entry] = []
        # The present range of indices, and the range that follows it within the same priority, which ends at
        # `_high`.
        self._at = self._end = self._high = 0
        self._rest = (0, 0)
        if after is not None:
            self._turn = after.turn
            self._begin_behind(after.entry)
        elif entries:
            self._begin_priority(0)

    @property
    def place(self) -> Place:
        """Where the next search begins: after the last entry found."""
        return Place(self._turn, self.found[-1])

    def _begin_behind(self, entry: Entry) -> None:
        low = bisect_left(self._entries, entry.priority, key=_priority)
        self._high = bisect_right(self._entries, entry.priority, low, key=_priority)
        self._at = bisect_right(self._entries, entry.instance, low, self._high, key=_instance)
        turn = low
        if self._turn is not None:
            turn = bisect_right(self._entries, self._turn, low, self._high, key=_instance)
        if self._turn is None or entry.instance > self._turn:
            self._end, self._rest = self._high, (low, turn)
        else:
            self._end, self._rest = turn, (turn, turn)

    def _begin_priority(self, low: int) -> None:
        """Begin with the priority whose entries begin at index `low`, behind its turn."""
        entries = self._entries
        high = len(entries)
        if high - low > 1 and entries[low].priority != entries[-1].priority:
            high = bisect_right(entries, entries[low].priority, low, key=_priority)
        at = low if self._turn is None else bisect_right(entries, self._turn, low, high, key=_instance)
        self._at, self._end, self._rest, self._high = at, high, (low, at), high

    def _next_range(self) -> None:
        """Go on before the turn of this priority, or else with the next priority."""
        (start, end), self._rest = self._rest, (0, 0)
        if start < end:
            self._at, self._end = start, end
        else:
            self._begin_priority(self._high if self._high < len(self._entries) else 0)

    def go_on(self, looks: int) -> bool:
        """Look at up to `looks` more entries. Return whether the search is complete."""
        if looks > self._left:
            looks = self._left
        self._left -= looks
        while looks:
            while self._at == self._end:
                self._next_range()
            start = self._at
            self._at = self._end if self._end - start < looks else start + looks
            looks -= self._at - start
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
