"""The engine: takes writes from all connections, commits them in batches, and answers once they are on disk.

One flush at a time is in flight, in a thread, so the event loop never waits for the disk. Writes that arrive
during a flush form the next batch, so the slower the disk, the larger the batches. If a flush fails, the whole
batch is dropped and all of its writes are refused. Only the ends of gone holders take effect even then.
"""

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from regd.core.errors import Code, Refused
from regd.core.holders import HolderEnd
from regd.core.limits import Limits
from regd.core.model import By, Change, Holder, Process, Reason
from regd.core.registry import Registry
from regd.core.transaction import ENDS_MAX, OwnershipLost, Transaction
from regd.server.counters import Counters
from regd.server.disk_thread import DiskThread
from regd.server.loop_monitor import LoopMonitor
from regd.server.stalls import Stalls
from regd.storage.store import Store
from regd.system.clock import Clock

log = logging.getLogger("regd")

Write = Callable[[Transaction], bytes]
"""Evaluates one request: adds its changes to the transaction and returns the reply, or raises `Refused`."""

Done = Callable[[bytes | Refused], None]
"""Called once with the reply or the refusal: after the flush, or without one if there was nothing to write.

If `Engine.run` raises, the writes without an outcome get no call.
"""


class _Submitted(NamedTuple):
    """A write that waits for its batch, and the process or user that requested it."""

    write: Write
    done: Done
    by: By | None


_BATCH_MAX = 1_024  # writes; limits the time that one batch takes
_SLICE = 128  # writes evaluated, applied or answered in one time slice
_SLICE_S = 0.003  # a time slice ends earlier if the writes have taken so long
_GATHER_S = 0.002  # the longest wait for clients to write again
_QUIET_ITERATIONS_MAX = 16  # loop iterations without a new write: about 0.1 ms if the loop is idle
_REPAIR_AFTER_S = 1.0
_LOG_FAILURE_EVERY_S = 30.0


class Engine:
    """Commits writes. `is_gone` asks the operating system whether a holder is gone.

    `on_flush` is called when changes are on disk, `on_commit` with these changes when readers see them.
    `on_batch_end` is called with the registrations that were lost to another client, and with the processes that
    no longer hold anything.
    """

    def __init__(
        self,
        registry: Registry,
        store: Store,
        clock: Clock,
        counters: Counters,
        monitor: LoopMonitor,
        limits: Limits,
        stalls: Stalls,
        is_gone: Callable[[Holder], bool],
        on_flush: Callable[[], None],
        on_commit: Callable[[Sequence[Change]], None],
        on_batch_end: Callable[[Sequence[OwnershipLost], set[Process]], None],
    ) -> None:
        self._registry = registry
        self._store = store
        self._clock = clock
        self._counters = counters
        self._monitor = monitor
        self._limits = limits
        self._stalls = stalls
        self._is_gone = is_gone
        self._on_flush = on_flush
        self._on_commit = on_commit
        self._on_batch_end = on_batch_end
        self._slice_began = 0.0
        self._waiting: deque[_Submitted | HolderEnd] = deque()
        self._wake = asyncio.Event()
        self._closing = False
        self._repair_due = False
        self._repair = False  # commit even without a change
        self._failure_logged_at: float | None = None  # None while the disk works
        self._thread = DiskThread("regd-commit")

    def submit(self, write: Write, done: Done, by: By | None = None) -> None:
        """Queue a write. `done` is called later, in the order of submission.

        Raises:
            Refused: `busy` or `shutting_down`; nothing was queued.
        """
        if self._closing:
            raise Refused(Code.SHUTTING_DOWN, "regd is stopping; connect again in a moment")
        if len(self._waiting) >= self._limits.writes_waiting_max:
            raise Refused(Code.BUSY, f"{self._limits.writes_waiting_max} writes are waiting; try again later")
        self._waiting.append(_Submitted(write, done, by))
        self._wake.set()

    def end(self, ending: HolderEnd) -> None:
        """Queue the end of a gone holder, after the writes that were submitted before. It is never refused.

        Does nothing while the daemon stops: then it closes the connections itself, and what they hold is to stay.
        """
        if not self._closing:
            self._waiting.append(ending)
            self._wake.set()

    def close(self) -> None:
        """Accept no more writes; `run` returns once the waiting writes are committed."""
        self._closing = True
        self._wake.set()

    async def run(self) -> None:
        """Commit batches until closed.

        Raises:
            StorageError: another regd has taken over the registry; this one must end. Any other exception is a
                bug.
        """
        try:
            while self._waiting or self._repair or not self._closing:
                if self._waiting:
                    count = await self._commit_batch(self._next_batch())  # no variable keeps the batch alive
                    await self._gather(len(self._waiting) + count)
                elif self._repair:
                    self._repair = False
                    await self._commit([])
                else:
                    self._wake.clear()
                    await self._wake.wait()
            if self._store.needs_repair:
                await self._commit([])
        finally:
            self._thread.close()

    def _next_batch(self) -> list[_Submitted | HolderEnd]:
        batch: list[_Submitted | HolderEnd] = []
        writes = 0
        while self._waiting and writes < _BATCH_MAX and len(batch) < ENDS_MAX:
            batch.append(self._waiting.popleft())
            writes += not isinstance(batch[-1], HolderEnd)
        return batch

    async def _gather(self, expected: int) -> None:
        """Wait a little for the clients that were just answered to write again, so that one flush serves all.

        Without this, half of the clients would write while the flush for the other half is in flight. Returns
        when `expected` writes wait, or no further write arrives.
        """
        until = self._clock.now() + _GATHER_S
        quiet_iterations, previous = 0, len(self._waiting)
        while previous < expected and quiet_iterations < _QUIET_ITERATIONS_MAX and not self._closing:
            await asyncio.sleep(0)
            waiting = len(self._waiting)
            quiet_iterations = 0 if waiting > previous else quiet_iterations + 1
            previous = waiting
            if self._clock.now() >= until:
                break

    async def _commit_batch(self, batch: Sequence[_Submitted | HolderEnd]) -> int:
        """Evaluate a batch, commit it, apply it to the registry, and answer it. Return its length."""
        transaction = Transaction(self._registry, self._clock.wall(), self._is_gone)
        outcomes = await self._evaluate(batch, transaction)
        endings = [item for item in batch if isinstance(item, HolderEnd)]
        failure = await self._commit_or_check(transaction.changes, outcomes)
        if failure is not None:
            transaction = await self._end_after_failure(endings)
        without_registrations: set[Process] = set()
        for count, changes in enumerate(_slices(transaction.changes)):
            if count:
                await self._yield_to_loop()
            without_registrations |= self._registry.apply(changes, self._stalls.now_after_prolonging())
            self._on_commit(changes)
        self._waiting.extendleft(reversed(transaction.unfinished))
        for ending in endings:
            if ending not in transaction.unfinished:
                self._registry.holder_index.unmark(ending)
        self._counters.changes += len(transaction.changes)
        without_registrations = {
            process for process in without_registrations if not self._registry.holder_index.has_process(process)
        }
        self._on_batch_end(transaction.lost, without_registrations)
        dones = [item.done for item in batch if not isinstance(item, HolderEnd)]
        for count, (done, outcome) in enumerate(zip(dones, outcomes, strict=True), 1):
            done(failure or outcome)
            if count % _SLICE == 0 or self._clock.now() > self._slice_began + _SLICE_S:
                await self._yield_to_loop()
        self._monitor.record("batch", self._slice_began)
        return len(batch)

    async def _evaluate(
        self, batch: Sequence[_Submitted | HolderEnd], transaction: Transaction
    ) -> list[bytes | Refused]:
        """Evaluate a batch in order, and return the replies to its writes, to be sent if the flush succeeds."""
        outcomes: list[bytes | Refused] = []
        adjacent: list[HolderEnd] = []  # ended together, so that an entry with many holders changes only once
        self._slice_began = self._clock.now()
        for count, item in enumerate(batch, 1):
            if isinstance(item, HolderEnd):
                adjacent.append(item)
                continue
            if adjacent:
                await self._end(transaction, adjacent)
                adjacent.clear()
            transaction.by = item.by
            try:
                outcomes.append(item.write(transaction))
            except Refused as refusal:
                outcomes.append(refusal.without_traceback())
            if count % _SLICE == 0 or self._clock.now() > self._slice_began + _SLICE_S:
                await self._yield_to_loop()
        if adjacent:
            await self._end(transaction, adjacent)
        return outcomes

    async def _end(self, transaction: Transaction, endings: Sequence[HolderEnd]) -> None:
        transaction.by = None
        for count, _ in enumerate(transaction.end(*endings), 1):
            if count % _SLICE == 0 or self._clock.now() > self._slice_began + _SLICE_S:
                await self._yield_to_loop()

    async def _yield_to_loop(self) -> None:
        """End the time slice, and let the event loop run once."""
        self._monitor.record("batch", self._slice_began)
        await asyncio.sleep(0)
        self._slice_began = self._clock.now()

    async def _end_after_failure(self, endings: Sequence[HolderEnd]) -> Transaction:
        """Apply the ends of holders in a failed batch. They are written once the disk works again.

        Their revisions are above all revisions of the failed batch, because its lines may be on disk all the
        same, and a start must not take them for these changes.
        """
        store = self._store
        transaction = Transaction(
            self._registry, self._clock.wall(), self._is_gone, rev_written=store.rev_written
        )
        await self._end(transaction, endings)
        if transaction.changes:
            store.apply_unsaved(transaction.changes)
            self._repair_later()
        return transaction

    async def _commit_or_check(
        self, changes: Sequence[Change], outcomes: Sequence[bytes | Refused]
    ) -> Refused | None:
        """Commit the changes. If there are none, check that the disk still has the state that replies confirm.

        Returns the refusal for all writes of the batch if that fails.
        """
        if changes or self._store.has_unsaved:
            return await self._commit(changes)
        if all(isinstance(outcome, Refused) for outcome in outcomes):
            return None
        try:
            await self._thread.call(self._store.ensure_saved)
        except OSError as error:
            self._counters.commits_failed += 1
            return self._storage_refusal(error)
        return None

    async def _commit(self, changes: Sequence[Change]) -> Refused | None:
        self._monitor.record("batch", self._slice_began)
        self._stalls.flush_began()
        try:
            await self._thread.call(self._store.commit, changes)
        except OSError as error:
            self._counters.commits_failed += 1
            return self._storage_refusal(error)
        finally:
            self._stalls.flush_ended()
            self._slice_began = self._clock.now()
        self._counters.commits += 1
        self._on_flush()
        if self._failure_logged_at is not None:
            self._failure_logged_at = None
            log.warning("%s can be written again", self._store.path)
        return None

    def _storage_refusal(self, error: OSError) -> Refused:
        """Log a failure of the disk, schedule a repair if necessary, and return the refusal for the writes."""
        now = self._clock.now()
        reason = error.strerror or "unknown error"
        if self._failure_logged_at is None or now - self._failure_logged_at >= _LOG_FAILURE_EVERY_S:
            self._failure_logged_at = now
            log.error(
                "cannot write %s: %s; changes are refused until it can be written", self._store.path, reason
            )
        if self._store.needs_repair:
            self._repair_later()
        return Refused(
            Code.STORAGE_FAILED, f"the registry could not be written ({reason}); the change is not in effect"
        )

    def _repair_later(self) -> None:
        if not self._closing and not self._repair_due:
            self._repair_due = True
            self._clock.call_at(self._clock.now() + _REPAIR_AFTER_S, self._request_repair)

    def _request_repair(self) -> None:
        self._repair_due = False
        if self._store.needs_repair and not self._closing:
            self._repair = True
            self._wake.set()


def _slices(changes: Sequence[Change]) -> Iterator[Sequence[Change]]:
    """Split changes into slices to apply, without separating the two changes of a replacement."""
    start = 0
    while start < len(changes):
        end = min(start + _SLICE, len(changes))
        end += end < len(changes) and changes[end - 1].reason == Reason.REPLACED
        yield changes[start:end]
        start = end
