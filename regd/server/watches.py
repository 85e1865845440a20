"""Watchers: each is a cursor into the history of changes.

Who has seen all sleeps until a change of its names lands, and then goes on from the history. One whose peer does
not read keeps an integer; too late, it gets `reset` and the state as it is. So a slow one costs nobody anything.
Must not know sockets: a peer is whoever can be given bytes.
"""

import asyncio
from collections import Counter
from collections.abc import Mapping, Sequence
from enum import Enum
from typing import Protocol

from regd.core.errors import Code, Refused
from regd.core.limits import Limits
from regd.core.model import Change, Entry, Key, Op, Reason
from regd.core.registry import Registry
from regd.protocol import messages
from regd.server.loop_monitor import LoopMonitor
from regd.system.clock import Clock, Timer

_SLICE = 128  # entries or changes of one watch before others get a turn; watches before the loop turns
_SLICE_BYTES = 16_384  # and bytes, though at least one: what a peer that does not read can cost
_TURN_S = 0.002


class Watcher(Protocol):
    @property
    def can_take(self) -> bool:
        """Whether what is pushed now leaves soon."""

    def push(self, data: bytes) -> None: ...


class _Phase(Enum):
    SNAPSHOT = "the state is being sent, from `after` on; `cursor` is the revision at which that began"
    CATCH_UP = "all up to `cursor` was sent"
    LIVE = "all was sent"


class Watch:
    """One watch of one peer."""

    __slots__ = (
        "after",
        "cursor",
        "exact",
        "kept_bytes",
        "meta",
        "number",
        "open",
        "pattern",
        "peer",
        "phase",
        "prefix",
        "tail",
    )

    def __init__(self, peer: Watcher, number: int, pattern: str, meta: Mapping[str, str], cursor: int) -> None:
        self.peer = peer
        self.number = number
        self.pattern = pattern
        self.exact = not pattern.endswith("*")
        self.prefix = pattern.rstrip("*")
        self.meta = meta
        self.phase = _Phase.CATCH_UP
        self.cursor = cursor
        self.after: Key | None = None
        self.open = True
        self.kept_bytes = 0  # what its request takes, for whoever keeps account
        self.tail = ""  # the event that tells the peer that it has caught up

    def line(self, change: Change) -> bytes | None:
        """Return the event that a change is for this watch, None where it is none."""
        before, entry = change.before, change.entry
        if not (entry.name == self.pattern if self.exact else entry.name.startswith(self.prefix)):
            return None
        was = before is not None and before.carries(self.meta)
        if change.op is Op.DOWN:
            return messages.down(self.number, change.rev, entry, change.reason) if was else None
        if entry.carries(self.meta):
            return messages.changed(self.number, Op.CHANGE if was else Op.UP, entry)
        return messages.down(self.number, change.rev, entry, Reason.FILTERED) if was else None


class Watches:
    def __init__(self, registry: Registry, clock: Clock, limits: Limits, pulse: LoopMonitor, epoch: str) -> None:
        self._registry = registry
        self._clock = clock
        self._limits = limits
        self._pulse = pulse
        self._epoch = epoch
        self._watches: dict[str, set[Watch]] = {}  # by pattern
        self._live: dict[str, set[Watch]] = {}  # those of them that have seen all: the others need not be told
        self._lengths: Counter[int] = Counter()  # of the prefixes that stand there
        self._behind: dict[Watch, None] = {}  # in order: those that have something to send, and may
        self._pumping = False
        self._progress: Timer | None = None
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def start(
        self, peer: Watcher, number: int, pattern: str, meta: Mapping[str, str], since: tuple[str, int] | None
    ) -> Watch:
        """Begin a watch; its events are pushed from the loop's next turn on. `since` is an epoch and a revision.

        Raises:
            Refused: `busy`, too many watches.
        """
        if self._count >= self._limits.watches_total_max:
            raise Refused(Code.BUSY, f"{self._count} watches are open; try again later")
        watch = Watch(peer, number, pattern, meta, self._registry.rev)
        if since is None:
            self._begin(watch)
        elif since[0] == self._epoch and self._registry.history.knows(since[1]):
            watch.cursor = since[1]
            watch.tail = "progress"
        else:
            watch.cursor = -1  # which no history knows
        among = self._watches.setdefault(pattern, set())
        if not among and not watch.exact:
            self._lengths[len(pattern)] += 1
        among.add(watch)
        self._count += 1
        self._go_on_with(watch)
        if self._progress is None:
            self._progress_later()
        return watch

    def stop(self, watch: Watch) -> None:
        """End a watch; nothing more is pushed for it. Twice is harmless."""
        if not watch.open:
            return
        watch.open = False
        among = self._watches[watch.pattern]
        among.discard(watch)
        if not among:
            del self._watches[watch.pattern]
            if not watch.exact:
                self._lengths[len(watch.pattern)] -= 1
                self._lengths += Counter()  # without those that are 0
        self._count -= 1
        self._is_not_live(watch)
        self._behind.pop(watch, None)

    def close(self) -> None:
        if self._progress is not None:
            self._progress.cancel()

    def landed(self, changes: Sequence[Change]) -> None:
        """Have what landed sent to those whom it concerns, from the loop's next turn on: writers go first."""
        if not self._count:
            return
        for change in changes:
            if change.op is Op.KEEP or not self._live:
                continue
            name = change.entry.name
            for pattern in (name, *(name[: length - 1] + "*" for length in self._lengths)):
                for watch in self._live.pop(pattern, ()):
                    watch.phase = _Phase.CATCH_UP
                    watch.cursor = change.rev - 1
                    self._go_on_with(watch)

    def _is_live(self, watch: Watch) -> None:
        watch.phase = _Phase.LIVE
        self._live.setdefault(watch.pattern, set()).add(watch)

    def _is_not_live(self, watch: Watch) -> None:
        among = self._live.get(watch.pattern, set())
        among.discard(watch)
        if not among:
            self._live.pop(watch.pattern, None)

    def resume(self, watches: Sequence[Watch]) -> None:
        """The peer of these can take more again."""
        for watch in watches:
            if watch.phase is not _Phase.LIVE:
                self._go_on_with(watch)

    # Those who are behind.

    def _go_on_with(self, watch: Watch) -> None:
        self._behind[watch] = None
        self._pump_soon()

    def _pump_soon(self) -> None:
        if not self._pumping:
            self._pumping = True
            asyncio.get_running_loop().call_soon(self._pump)

    def _pump(self) -> None:
        """Send one slice of one watch after another, and let the loop turn in between."""
        self._pumping = False
        began = self._clock.now()
        for _ in range(min(_SLICE, len(self._behind))):
            watch = next(iter(self._behind))
            del self._behind[watch]
            if watch.peer.can_take:
                data = self._slice(watch)
                if data:
                    watch.peer.push(data)
                if watch.phase is not _Phase.LIVE:
                    self._behind[watch] = None
            if self._clock.now() > began + _TURN_S:
                break
        self._pulse.took("events", began)
        if self._behind:
            self._pump_soon()

    def _slice(self, watch: Watch) -> bytes:
        if watch.phase is _Phase.SNAPSHOT:
            return self._more_state(watch)
        history = self._registry.history
        if not history.knows(watch.cursor):
            self._begin(watch)
            return messages.event("reset", self._registry.rev, watch=watch.number)
        lines: list[bytes] = []
        size = 0
        for change in history.since(watch.cursor, _SLICE):
            line = watch.line(change)
            if line is not None:
                lines.append(line)
                size += len(line)
            watch.cursor = change.rev
            if size > _SLICE_BYTES:
                break
        if watch.cursor == self._registry.rev:
            self._is_live(watch)
            if watch.tail:
                lines.append(messages.event(watch.tail, watch.cursor, watch=watch.number))
                watch.tail = ""
        return b"".join(lines)

    def _begin(self, watch: Watch) -> None:
        watch.phase = _Phase.SNAPSHOT
        watch.cursor = self._registry.rev
        watch.after = None
        watch.tail = "sync"

    def _more_state(self, watch: Watch) -> bytes:
        """Send a page of what is there now. What changed since the first page follows from the history."""
        page = self._registry.page(watch.pattern, watch.meta, watch.after, _SLICE)
        fit = messages.fitting(page.entries, _SLICE_BYTES)
        shown = page.entries[:fit]
        watch.after = page.after if fit == len(page.entries) else shown[-1].key
        if watch.after is None:
            watch.phase = _Phase.CATCH_UP
        return b"".join(self._up(watch, entry) for entry in shown)

    @staticmethod
    def _up(watch: Watch, entry: Entry) -> bytes:
        return messages.changed(watch.number, Op.UP, entry)

    # Silence.

    def _progress_later(self) -> None:
        self._progress = self._clock.call_at(self._clock.now() + self._limits.progress_s, self._tell_progress)

    def _tell_progress(self) -> None:
        """Tell all who have seen all that there was no more. The loop turns in between."""
        self._progress = None
        live = [watch for among in self._live.values() for watch in among]
        self._tell_some(live)
        if self._count:
            self._progress_later()

    def _tell_some(self, watches: list[Watch]) -> None:
        rev = self._registry.rev
        for watch in watches[:_SLICE]:
            if watch.open and watch.phase is _Phase.LIVE and watch.peer.can_take:
                watch.peer.push(messages.event("progress", rev, watch=watch.number))
        if rest := watches[_SLICE:]:
            asyncio.get_running_loop().call_soon(self._tell_some, rest)
