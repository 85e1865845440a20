"""The latest changes, bounded in count and bytes, for watchers.

A watcher is a revision in this history. If the changes after that revision are gone, it starts again with a
snapshot. The history survives restarts, and so do positions in it: each life of the daemon is an epoch, and a
position is valid up to the last revision that its epoch left on disk.
"""

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from operator import attrgetter

from regd.core.limits import DEFAULT, Limits
from regd.core.model import Change

_CHANGE_BYTES = 256  # of a change itself, besides its entries


class History:
    """All changes after a revision, up to the present one.

    `changes` are those of earlier epochs, all after `rev`; `epochs` are those epochs, with their last revisions.
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
        self._start = 0  # the changes before are dropped; their places are freed now and then
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
            self._before = self._changes[self._start].rev
            self._start += 1
        if self._start > 1_024 and 4 * self._start > len(self):
            del self._changes[: self._start]
            del self._weights[: self._start]
            self._start = 0

    def knows(self, rev: int) -> bool:
        """Whether every change after a revision is still here."""
        return self._before <= rev <= self._last

    def reaches(self, epoch: str, rev: int) -> bool:
        """Whether a watcher that saw a revision in an epoch can go on from there."""
        last = self._last if epoch == self._epoch else self._epochs.get(epoch, -1)
        return rev <= last and self.knows(rev)

    def since(self, rev: int, most: int) -> list[Change]:
        """Return up to `most` changes after a revision, for which `knows` must be true."""
        # Revisions that a failing disk took are missing, so that a revision is not an index.
        at = bisect_right(self._changes, rev, self._start, key=_REV)
        return self._changes[at : at + most]


_REV = attrgetter("rev")
