"""Watches. Each watch is a cursor into the history of changes.

A watch that has sent all events is live: it does nothing until a change concerns it, and then sends from the
history. A watch whose client does not read keeps only its cursor. If the history no longer reaches back to the
cursor, the client gets `reset` and the current state. So a client that reads slowly delays no other client.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from enum import Enum
from typing import Protocol

from regd.core.errors import Code, Refused
from regd.core.limits import Limits
from regd.core.model import Change, Key, Op, Reason
from regd.core.registry import Registry
from regd.protocol import messages
from regd.server.loop_monitor import LoopMonitor
from regd.server.work_queue import WorkQueue
from regd.system.clock import Clock, Timer

_SLICE = 128  # entries or changes of one watch at a time
_SLICE_BYTES = 16_384  # of one watch at a time, since they stay buffered if the client does not read
_SLICE_S = 0.002


class Watcher(Protocol):
    """The connection of a watch."""

    @property
    def can_take(self) -> bool:
        """Whether the client reads, so that an event pushed now is sent soon."""

    def push(self, data: bytes) -> None: ...


class _Phase(Enum):
    SNAPSHOT = "the current state is being sent, next the entries after `after`; it began at revision `cursor`"
    CATCH_UP = "events up to revision `cursor` were sent, and later ones may follow"
    LIVE = "all events were sent"


class Watch:
    """One watch of one connection."""

    __slots__ = (
        "after",
        "cursor",
        "exact",
        "is_open",
        "meta",
        "number",
        "pattern",
        "pending_bytes",
        "phase",
        "prefix",
        "tail",
        "watcher",
    )

    def __init__(self, watcher: Watcher, number: int, pattern: str, meta: Mapping[str, str], cursor: int) -> None:
        self.watcher = watcher
        self.number = number
        self.pattern = pattern
        self.exact = not pattern.endswith("*")
        self.prefix = pattern.rstrip("*")
        self.meta = meta
        self.phase = _Phase.CATCH_UP
        self.cursor = cursor
        self.after: Key | None = None
        self.is_open = True
        self.pending_bytes = 0  # the size of the request, which the memory quota includes
        self.tail = ""  # the event that follows once the client has all events: `sync` or `progress`

    def line(self, change: Change) -> bytes | None:
        """Return the event for a change, None if the change does not concern this watch."""
        previous, entry = change.previous, change.entry
        if not (entry.name == self.pattern if self.exact else entry.name.startswith(self.prefix)):
            return None
        matched = previous is not None and previous.carries(self.meta)
        if change.op is Op.DOWN:
            return messages.down(self.number, change.rev, entry, change.reason) if matched else None
        if entry.carries(self.meta):
            return messages.changed(self.number, Op.CHANGE if matched else Op.UP, entry)
        return messages.down(self.number, change.rev, entry, Reason.FILTERED) if matched else None


class Watches:
    """The watches of one class of users."""

    def __init__(self, registry: Registry, clock: Clock, limits: Limits, monitor: LoopMonitor) -> None:
        self._registry = registry
        self._clock = clock
        self._limits = limits
        self._watches: dict[str, set[Watch]] = {}  # by pattern
        self._live: dict[str, set[Watch]] = {}  # by pattern
        self._lengths: Counter[int] = Counter()  # lengths of the patterns that end in `*`
        self._to_send = WorkQueue(self._send_slice, _SLICE_S, "events", clock, monitor)
        self._progress_due = WorkQueue(self._send_progress, _SLICE_S, "events", clock, monitor)
        self._progress_timer: Timer | None = None
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def start(
        self, watcher: Watcher, number: int, pattern: str, meta: Mapping[str, str], since: tuple[str, int] | None
    ) -> Watch:
        """Start a watch. Its first events are pushed in the next iteration of the event loop.

        `since` is the epoch and revision up to which the client has all events, None to begin with a snapshot.

        Raises:
            Refused: `busy`, too many watches.
        """
        if self._count >= self._limits.watches_total_max:
            raise Refused(Code.BUSY, f"{self._count} watches are open; try again later")
        watch = Watch(watcher, number, pattern, meta, self._registry.rev)
        if since is None:
            self._begin_snapshot(watch)
        elif self._registry.history.can_resume(*since):
            watch.cursor = since[1]
            watch.tail = "progress"
        else:
            watch.cursor = -1  # the history never has this revision, so the client gets `reset`
        same_pattern = self._watches.setdefault(pattern, set())
        if not same_pattern and not watch.exact:
            self._lengths[len(pattern)] += 1
        same_pattern.add(watch)
        self._count += 1
        self._to_send.add(watch)
        if self._progress_timer is None:
            self._schedule_progress()
        return watch

    def stop(self, watch: Watch) -> None:
        """Stop a watch. No more events are pushed for it. Idempotent."""
        if not watch.is_open:
            return
        watch.is_open = False
        same_pattern = self._watches[watch.pattern]
        same_pattern.discard(watch)
        if not same_pattern:
            del self._watches[watch.pattern]
            if not watch.exact:
                self._lengths[len(watch.pattern)] -= 1
                self._lengths += Counter()  # removes lengths whose count is 0
        self._count -= 1
        self._discard_live(watch)
        self._to_send.discard(watch)
        self._progress_due.discard(watch)

    def close(self) -> None:
        """Send no more `progress` events."""
        if self._progress_timer is not None:
            self._progress_timer.cancel()

    def on_changes(self, changes: Sequence[Change]) -> None:
        """Wake the live watches that changes concern. Their events are sent in later iterations of the loop."""
        if not self._count:
            return
        for change in changes:
            if change.op is Op.KEEP or not self._live:
                continue
            name = change.entry.name
            for pattern in (name, *(name[: length - 1] + "*" for length in self._lengths)):
                for watch in self._live.pop(pattern, ()):
                    watch.phase = _Phase.CATCH_UP
                    watch.cursor = change.rev - 1  # all events before this change were sent
                    self._to_send.add(watch)

    def resume(self, watches: Sequence[Watch]) -> None:
        """Continue the watches of a client that reads again."""
        for watch in watches:
            if watch.phase is not _Phase.LIVE:
                self._to_send.add(watch)

    def _set_live(self, watch: Watch) -> None:
        watch.phase = _Phase.LIVE
        self._live.setdefault(watch.pattern, set()).add(watch)

    def _discard_live(self, watch: Watch) -> None:
        same_pattern = self._live.get(watch.pattern, set())
        same_pattern.discard(watch)
        if not same_pattern:
            self._live.pop(watch.pattern, None)

    # Watches with events to send.

    def _send_slice(self, watch: Watch) -> None:
        """Send some events. A watch whose client does not read leaves the queue until `resume`."""
        if not watch.watcher.can_take:
            return
        data = self._slice(watch)
        if data:
            watch.watcher.push(data)
        if watch.is_open and watch.phase is not _Phase.LIVE:
            self._to_send.add(watch)

    def _slice(self, watch: Watch) -> bytes:
        if watch.phase is _Phase.SNAPSHOT:
            return self._next_page(watch)
        history = self._registry.history
        if not history.has_all_after(watch.cursor):
            self._begin_snapshot(watch)
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
            self._set_live(watch)
            if watch.tail:
                lines.append(messages.event(watch.tail, watch.cursor, watch=watch.number))
                watch.tail = ""
        return b"".join(lines)

    def _begin_snapshot(self, watch: Watch) -> None:
        watch.phase = _Phase.SNAPSHOT
        watch.cursor = self._registry.rev
        watch.after = None
        watch.tail = "sync"

    def _next_page(self, watch: Watch) -> bytes:
        """Return a page of the snapshot. Changes since its first page are sent from the history afterwards."""
        page = self._registry.page(watch.pattern, watch.meta, watch.after, _SLICE)
        fit = messages.count_fitting(page.entries, _SLICE_BYTES)
        shown = page.entries[:fit]
        watch.after = page.after if fit == len(page.entries) else shown[-1].key
        if watch.after is None:
            watch.phase = _Phase.CATCH_UP
        return b"".join(messages.changed(watch.number, Op.UP, entry) for entry in shown)

    # `progress` events.

    def _schedule_progress(self) -> None:
        due = self._clock.now() + self._limits.progress_s
        self._progress_timer = self._clock.call_at(due, self._queue_progress)

    def _queue_progress(self) -> None:
        self._progress_timer = None
        for same_pattern in self._live.values():
            for watch in same_pattern:
                self._progress_due.add(watch)
        if self._count:
            self._schedule_progress()

    def _send_progress(self, watch: Watch) -> None:
        """Tell the client up to which revision it has all events."""
        if watch.phase is _Phase.LIVE and watch.watcher.can_take:
            watch.watcher.push(messages.event("progress", self._registry.rev, watch=watch.number))
