"""Writes checkpoints of the journal in the background, soon after a change but not too often."""

import asyncio
import logging
from concurrent.futures import ThreadPoolExecutor

from regd.storage.store import Store
from regd.system.clock import Clock, Timer

log = logging.getLogger("regd")

_WRITING_SHARE_MAX = 0.1  # the largest part of the time that is spent writing
_LOG_FAILURE_EVERY_S = 30.0


class Checkpointer:
    """Writes a checkpoint at the earliest `interval_s` after the last one, or later if writing is slow."""

    def __init__(self, store: Store, clock: Clock, interval_s: float) -> None:
        self._store = store
        self._clock = clock
        self._interval_s = interval_s
        self._not_before = float("-inf")
        self._timer: Timer | None = None
        self._task: asyncio.Task[None] | None = None
        self._is_closed = False
        self._failure_logged_at: float | None = None  # None while the file can be written
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="regd-checkpoint")

    def on_change(self) -> None:
        """Schedule a checkpoint: at once if the last one is old enough."""
        if self._timer is None and self._task is None and not self._is_closed:
            self._timer = self._clock.call_at(max(self._not_before, self._clock.now()), self._begin)

    def _begin(self) -> None:
        self._timer = None
        self._task = asyncio.create_task(self._write(), name="regd-checkpoint")

    async def _write(self) -> None:
        began = self._clock.now()
        try:
            await asyncio.get_running_loop().run_in_executor(self._thread, self._store.checkpoint)
        except OSError as error:
            self._failed(error)
        else:
            if self._failure_logged_at is not None:
                self._failure_logged_at = None
                log.warning("%s can be written again", self._store.path)
        now = self._clock.now()
        self._not_before = now + max(self._interval_s, (1 / _WRITING_SHARE_MAX - 1) * (now - began))
        self._task = None
        if self._store.needs_checkpoint:
            self.on_change()

    def _failed(self, error: OSError) -> None:
        now = self._clock.now()
        if self._failure_logged_at is None or now - self._failure_logged_at >= _LOG_FAILURE_EVERY_S:
            self._failure_logged_at = now
            why = error.strerror or "unknown error"
            log.error("cannot write %s: %s; the journal has all changes", self._store.path, why)

    async def close(self) -> None:
        """Write the last checkpoint, unless the file already has everything. Idempotent."""
        self._is_closed = True
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._task is not None:
            await self._task
        if self._store.needs_checkpoint or self._store.is_file_edited():
            await self._write()
        self._thread.shutdown()
