"""The latest changes, bounded in count and bytes, for watchers.

A watcher is a revision in this history. If the changes after that revision are gone, it starts again with a
snapshot.
"""

from regd.core.limits import DEFAULT, Limits
from regd.core.model import Change

_CHANGE_BYTES = 256  # of a change itself, besides its entries


class History:
    """The changes from `first` to `last`, without a gap."""

    def __init__(self, rev: int, limits: Limits = DEFAULT) -> None:
        self._limits = limits
        self._changes: list[Change] = []
        self._weights: list[int] = []  # of each change
        self._start = 0  # the changes before are dropped; their places are freed now and then
        self._last = rev
        self.weight_bytes = 0

    def __len__(self) -> int:
        return len(self._changes) - self._start

    def add(self, change: Change) -> None:
        before = change.before
        weight = _CHANGE_BYTES + change.entry.weight_bytes + (before.weight_bytes if before is not None else 0)
        self._changes.append(change)
        self._weights.append(weight)
        self._last = change.rev
        self.weight_bytes += weight
        limits = self._limits
        if len(self._changes) <= limits.history_changes_max and self.weight_bytes <= limits.history_bytes_max:
            return
        while len(self) > limits.history_changes_max or (
            self.weight_bytes > limits.history_bytes_max and len(self) > 1
        ):
            self.weight_bytes -= self._weights[self._start]
            self._start += 1
        if self._start > 1_024 and 4 * self._start > len(self):
            del self._changes[: self._start]
            del self._weights[: self._start]
            self._start = 0

    def knows(self, rev: int) -> bool:
        """Whether every change after a revision is still here."""
        return self._last - len(self) <= rev <= self._last

    def since(self, rev: int, most: int) -> list[Change]:
        """Return up to `most` changes after a revision, for which `knows` must be true."""
        at = len(self._changes) - (self._last - rev)
        return self._changes[at : at + most]
