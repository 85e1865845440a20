"""The engine: takes writes from all connections, commits them in batches, and answers once they are on disk.

One flush is in flight, in a thread. Writes that arrive meanwhile wait and are the next batch, so the disk
determines the size of a batch, and the event loop never waits for the disk. A batch whose flush fails is dropped
as a whole, and all of its writes are refused. Only the ends of gone holders are applied all the same.
"""

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from regd.core.errors import Code, Refused
from regd.core.holders import HolderGone
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
"""Is called once, with the reply or refusal, after the flush."""


class _Submitted(NamedTuple):
    """A write that waits, and who requested it."""

    write: Write
    done: Done
    by: By | None


_BATCH_MAX = 1_024  # writes; bounds the time of one batch
_SLICE = 128  # writes evaluated, applied or answered in one loop iteration
_TURN_S = 0.003  # and so long, if they are expensive
_GATHER_S = 0.002  # at most, for peers that write again
_QUIET_TURNS = 16  # loop iterations: about 0.1 ms if the loop is idle
_REPAIR_AFTER_S = 1.0
_COMPLAIN_EVERY_S = 30.0


class Engine:
    """Commits writes. `is_gone` asks the operating system whether a holder is gone.

    `committed` is called when changes are on disk; `landed` with changes as readers see them; `settled`, at the
    end of a batch, with the sessions that lost a registration and the processes that no longer hold anything.
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
        committed: Callable[[], None],
        landed: Callable[[Sequence[Change]], None],
        settled: Callable[[Sequence[OwnershipLost], set[Process]], None],
    ) -> None:
        self._registry = registry
        self._store = store
        self._clock = clock
        self._counters = counters
        self._monitor = monitor
        self._limits = limits
        self._stalls = stalls
        self._is_gone = is_gone
        self._committed = committed
        self._landed = landed
        self._settled = settled
        self._turn = 0.0  # when this loop iteration began
        self._waiting: deque[_Submitted | HolderGone] = deque()
        self._wake = asyncio.Event()
        self._closing = False
        self._repair_due = False
        self._repair = False  # commit, even without a change
        self._complained_at: float | None = None  # when a failing disk was last logged; None while it works
        self._thread = DiskThread("regd-commit")

    def submit(self, write: Write, done: Done, by: By | None = None) -> None:
        """Queue a write of a peer; `done` is called later, in the order of submission.

        Raises:
            Refused: `busy` or `shutting_down`; nothing was queued.
        """
        if self._closing:
            raise Refused(Code.SHUTTING_DOWN, "regd is stopping; connect again in a moment")
        if len(self._waiting) >= self._limits.writes_waiting_max:
            raise Refused(Code.BUSY, f"{self._limits.writes_waiting_max} writes are waiting; try again later")
        self._waiting.append(_Submitted(write, done, by))
        self._wake.set()

    def end(self, ending: HolderGone) -> None:
        """Queue the end of a gone holder, behind the writes that came before. Never refused.

        Ignored while the daemon stops, since it closes the connections itself.
        """
        if not self._closing:
            self._waiting.append(ending)
            self._wake.set()

    def close(self) -> None:
        """Accept no more writes; `run` returns once the waiting writes are committed."""
        self._closing = True
        self._wake.set()

    async def run(self) -> None:
        """Commit batches until closed. An exception is a bug, and must end the process."""
        try:
            while self._waiting or self._repair or not self._closing:
                if self._waiting:
                    count = await self._commit_batch(self._next_batch())  # no variable keeps the batch alive
                    await self._linger(len(self._waiting) + count)
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

    def _next_batch(self) -> list[_Submitted | HolderGone]:
        batch: list[_Submitted | HolderGone] = []
        writes = 0
        while self._waiting and writes < _BATCH_MAX and len(batch) < ENDS_MAX:
            batch.append(self._waiting.popleft())
            writes += not isinstance(batch[-1], HolderGone)
        return batch

    async def _linger(self, wanted: int) -> None:
        """Wait a little for the peers that were just answered to write again, so that one flush serves them all.

        Without this, half of the peers would write while the flush of the other half is in flight. Returns when
        no further write arrives.
        """
        until = self._clock.now() + _GATHER_S
        quiet_turns, before = 0, len(self._waiting)
        while before < wanted and quiet_turns < _QUIET_TURNS and not self._closing:
            await asyncio.sleep(0)
            waiting = len(self._waiting)
            quiet_turns = 0 if waiting > before else quiet_turns + 1
            before = waiting
            if self._clock.now() >= until:
                break

    async def _commit_batch(self, batch: Sequence[_Submitted | HolderGone]) -> int:
        """Evaluate a batch, commit it, apply it to the registry, and answer it. Return its length."""
        transaction = Transaction(self._registry, self._clock.wall(), self._is_gone)
        outcomes = await self._evaluate(batch, transaction)
        endings = [each for each in batch if isinstance(each, HolderGone)]
        failure = await self._commit_or_check(transaction.changes, outcomes)
        if failure is not None:
            transaction = await self._end_all_the_same(endings)
        free: set[Process] = set()
        for count, changes in enumerate(_slices(transaction.changes)):
            if count:
                await self._yield_to_loop()
            free |= self._registry.apply(changes, self._stalls.now())
            self._landed(changes)
        self._waiting.extendleft(reversed(transaction.unfinished))
        for ending in endings:
            if ending not in transaction.unfinished:
                self._registry.holders.unmark(ending)
        self._counters.changes += len(transaction.changes)
        self._settled(transaction.lost, {each for each in free if not self._registry.holders.has_process(each)})
        dones = [each.done for each in batch if not isinstance(each, HolderGone)]
        for count, (done, outcome) in enumerate(zip(dones, outcomes, strict=True), 1):
            done(failure or outcome)
            if count % _SLICE == 0 or self._clock.now() > self._turn + _TURN_S:
                await self._yield_to_loop()
        self._monitor.took("batch", self._turn)
        return len(batch)

    async def _evaluate(
        self, batch: Sequence[_Submitted | HolderGone], transaction: Transaction
    ) -> list[bytes | Refused]:
        """Evaluate a batch in order, and return the replies to its writes if the flush succeeds."""
        outcomes: list[bytes | Refused] = []
        adjacent: list[HolderGone] = []  # ended together, so that an entry of many holders is changed once
        self._turn = self._clock.now()
        for count, each in enumerate(batch, 1):
            if isinstance(each, HolderGone):
                adjacent.append(each)
                continue
            if adjacent:
                await self._end(transaction, adjacent)
                adjacent.clear()
            transaction.by = each.by
            try:
                outcomes.append(each.write(transaction))
            except Refused as refusal:
                outcomes.append(refusal.without_traceback())
            if count % _SLICE == 0 or self._clock.now() > self._turn + _TURN_S:
                await self._yield_to_loop()
        if adjacent:
            await self._end(transaction, adjacent)
        return outcomes

    async def _end(self, transaction: Transaction, endings: Sequence[HolderGone]) -> None:
        transaction.by = None
        for count, _ in enumerate(transaction.end(*endings), 1):
            if count % _SLICE == 0 or self._clock.now() > self._turn + _TURN_S:
                await self._yield_to_loop()

    async def _yield_to_loop(self) -> None:
        """Let the event loop serve others."""
        self._monitor.took("batch", self._turn)
        await asyncio.sleep(0)
        self._turn = self._clock.now()

    async def _end_all_the_same(self, endings: Sequence[HolderGone]) -> Transaction:
        """Evaluate the ends in a failed batch alone; they are written once the disk works again.

        Their revisions are above those of the failed batch: its lines may be on disk, and must not be taken for
        these changes.
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
        """Commit changes, if there are any. Else see that the disk still has what is confirmed now."""
        if changes or self._store.has_unsaved:
            return await self._commit(changes)
        if all(isinstance(outcome, Refused) for outcome in outcomes):
            return None
        try:
            await self._thread.call(self._store.ensure_saved)
        except OSError as error:
            self._counters.commits_failed += 1
            return self._failed(error)
        return None

    async def _commit(self, changes: Sequence[Change]) -> Refused | None:
        self._monitor.took("batch", self._turn)
        self._stalls.flush_began()
        try:
            await self._thread.call(self._store.commit, changes)
        except OSError as error:
            self._counters.commits_failed += 1
            return self._failed(error)
        finally:
            self._stalls.flush_ended()
            self._turn = self._clock.now()
        self._counters.commits += 1
        self._committed()
        if self._complained_at is not None:
            self._complained_at = None
            log.warning("%s can be written again", self._store.path)
        return None

    def _failed(self, error: OSError) -> Refused:
        now = self._clock.now()
        why = error.strerror or "unknown error"
        if self._complained_at is None or now - self._complained_at >= _COMPLAIN_EVERY_S:
            self._complained_at = now
            log.error("cannot write %s: %s; changes are refused until it can be written", self._store.path, why)
        if self._store.needs_repair:
            self._repair_later()
        return Refused(
            Code.STORAGE_FAILED, f"the registry could not be written ({why}); the change is not in effect"
        )

    def _repair_later(self) -> None:
        if not self._closing and not self._repair_due:
            self._repair_due = True
            self._clock.call_at(self._clock.now() + _REPAIR_AFTER_S, self._repair_now)

    def _repair_now(self) -> None:
        self._repair_due = False
        if self._store.needs_repair and not self._closing:
            self._repair = True
            self._wake.set()


def _slices(changes: Sequence[Change]) -> Iterator[Sequence[Change]]:
    """Split changes into slices to apply. The two changes of a replacement stay in one slice."""
    start = 0
    while start < len(changes):
        end = min(start + _SLICE, len(changes))
        end += end < len(changes) and changes[end - 1].reason == Reason.REPLACED
        yield changes[start:end]
        start = end
