"""The instances of one name, and a search among them that can be done in steps.

A name may have a hundred thousand instances, so nothing here looks at all of them at once.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Callable
from operator import attrgetter

from regd.core.model import Entry

_instance = attrgetter("instance")


class Instances:
    """The instances of one name, in order. `served` is the one resolved last; round-robin goes on behind it."""

    __slots__ = ("entries", "served")

    def __init__(self) -> None:
        self.entries: list[Entry] = []
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
        if at < len(self.entries) and self.entries[at].instance == entry.instance:
            self.entries[at] = entry
        else:
            self.entries.insert(at, entry)

    def append(self, entry: Entry) -> None:
        """Add an entry that comes after all others."""
        if self.entries:
            self.entries.append(entry)
        else:
            self.entries = [entry]  # a list of exactly one element: most names have one instance

    def remove(self, instance: str) -> None:
        del self.entries[bisect_left(self.entries, instance, key=_instance)]

    def behind(self, instance: str | None) -> int:
        """Return the index of the first instance behind `instance`, which need not exist; None is before all."""
        return 0 if instance is None else bisect_right(self.entries, instance, key=_instance)


class Search:
    """A search for up to `most` entries that fit, from index `start` on, once around. `found` are those so far.

    It sees the entries as they were at its first step.
    """

    __slots__ = ("_at", "_entries", "_fits", "_kept", "_left", "_most", "found")

    def __init__(self, entries: list[Entry], start: int, most: int, fits: Callable[[Entry], bool]) -> None:
        self._entries = entries
        self._kept = False
        self._at = start
        self._left = len(entries)
        self._most = most
        self._fits = fits
        self.found: list[Entry] = []

    def go_on(self, looks: int) -> bool:
        """Look at up to `looks` more entries. Return whether the search is complete."""
        entries = self._entries
        looks = min(looks, self._left)
        self._left -= looks
        for _ in range(looks):
            if self._at == len(entries):
                self._at = 0
            entry = entries[self._at]
            self._at += 1
            if self._fits(entry):
                self.found.append(entry)
                if len(self.found) == self._most:
                    self._left = 0
                    break
        if self._left and not self._kept:  # the list may change before the next step
            self._entries, self._kept = list(entries), True
        return not self._left
