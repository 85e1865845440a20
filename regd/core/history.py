"""The latest changes, bounded in number and bytes, from which watches are served.

The position of a watch is a revision. If the history no longer has the changes after it, the watch begins again
with a snapshot. Positions survive restarts: each run of the daemon is an epoch, and a position of an earlier
epoch is valid up to the last revision that this epoch left on disk.
"""

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from operator import attrgetter

from regd.core.limits import DEFAULT, Limits
from regd.core.model import Change

_CHANGE_BYTES = 256  # the memory of a change without its entries


class History:
    """The changes after some revision, without a gap.

    Args:
        rev: the revision before the first change.
        limits: how many changes and bytes are kept.
        changes: changes of earlier epochs, in order, all after `rev`.
        epoch: the present epoch.
        epochs: the earlier epochs whose positions are valid, each with its last revision.
    """

    def __init__(
        self,
        rev: int,
        limits: Limits = DEFAULT,
        *,
        changes: Iterable[Change] = (),
        epoch: str = "",
        epochs: Mapping[str, int] | None = None,
    ) -> None:
        self._limits = limits
        self._changes: list[Change] = []
        self._weights: list[int] = []  # of each change
        self._start = 0  # the index of the first change that is kept; `add` deletes those before it in bulk
        self._before = rev  # the revision before the first change that is kept
        self._last = rev
        self._epoch = epoch
        self._epochs = epochs or {}
        self.weight_bytes = 0
        for change in changes:
            self.add(change)

    def __len__(self) -> int:
        return len(self._changes) - self._start

    def __iter__(self) -> Iterator[Change]:
        return islice(self._changes, self._start, None)

    def add(self, change: Change) -> None:
        """Append a change, and drop the oldest ones beyond the limits."""
        previous = change.previous
        weight = _CHANGE_BYTES + change.entry.weight_bytes
        weight += previous.weight_bytes if previous is not None else 0
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
            self._before = self._changes[self._start].rev
            self._start += 1
        if self._start > 1_024 and 4 * self._start > len(self):
            del self._changes[: self._start]
            del self._weights[: self._start]
            self._start = 0

    def has_all_after(self, rev: int) -> bool:
        """Whether the history has all changes after a revision. False for a revision of the future."""
        return self._before <= rev <= self._last

    def can_resume(self, epoch: str, rev: int) -> bool:
        """Whether a watch can resume after this revision of this epoch."""
        last = self._last if epoch == self._epoch else self._epochs.get(epoch, -1)
        return rev <= last and self.has_all_after(rev)

    def since(self, rev: int, most: int) -> list[Change]:
        """Return up to `most` changes after a revision. `has_all_after` must be true for it."""
        # The index cannot be computed: there are gaps between revisions, since a failing disk uses some up.
        at = bisect_right(self._changes, rev, self._start, key=_REV)
        return self._changes[at : at + most]


_REV = attrgetter("rev")
