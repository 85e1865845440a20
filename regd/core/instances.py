"""The instances of one name, and looking for the right ones among them, in slices.

A name may have a hundred thousand instances, so nothing here looks at all of them at once.
Must not know what makes an instance fit.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Callable
from operator import attrgetter

from regd.core.model import Entry

_instance = attrgetter("instance")


class Instances:
    """The instances of one name, in order. `served` is who was resolved last, the next one is behind it."""

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
            self.entries = [entry]  # exactly as large as it must be: most names have one instance
            return
        at = bisect_left(self.entries, entry.instance, key=_instance)
        if at < len(self.entries) and self.entries[at].instance == entry.instance:
            self.entries[at] = entry
        else:
            self.entries.insert(at, entry)

    def remove(self, instance: str) -> None:
        del self.entries[bisect_left(self.entries, instance, key=_instance)]

    def behind(self, instance: str | None) -> int:
        """Return where the instances behind this one begin, whether it is there or not; None is before all."""
        return 0 if instance is None else bisect_right(self.entries, instance, key=_instance)


class Search:
    """Looks for up to `most` entries that fit, from `start` on and once around. `found` is what there is so far.

    It sees the entries as they were at first, whatever happens between two slices.
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
        """Look at so many more. Returns whether that was all."""
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
        if self._left and not self._kept:  # they may change before the next slice
            self._entries, self._kept = list(entries), True
        return not self._left
