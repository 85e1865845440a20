"""Divides the event loop's time among connections that have requests to answer.

A connection that has just received something is fresh: it is served at once while time is left in this loop
iteration. A connection that has used up its time slice is busy: it waits until the fresh connections were
served. So a hundred connections with expensive requests delay a fresh one by milliseconds, not by a hundred
time slices.
"""

from collections import deque
from typing import Protocol

from regd.server.work_queue import NextIteration

FRESH_S = 0.003  # for fresh connections, per iteration of the event loop
BUSY_S = 0.002  # for busy connections, per iteration
READONLY_S = 0.001  # for fresh and for busy connections of users who may only read, per iteration


class Worker(Protocol):
    def run(self) -> None:
        """Use a time slice, and report it with `spent`."""


class FairScheduler:
    """Runs fresh workers for `fresh_s` and busy workers for `busy_s` seconds per iteration of the event loop."""

    def __init__(self, fresh_s: float = FRESH_S, busy_s: float = BUSY_S) -> None:
        self._fresh_s = fresh_s
        self._busy_s = busy_s
        self._spent_s = 0.0  # time used since the last reset, which may be some iterations ago
        self._fresh: deque[Worker] = deque()
        self._busy: deque[Worker] = deque()
        self._next = NextIteration(self._run)

    @property
    def has_time(self) -> bool:
        """Whether a worker may run now, without `schedule`."""
        return self._spent_s < self._fresh_s

    def spent(self, seconds: float) -> None:
        """Count time that a worker has used."""
        self._spent_s += seconds
        if self._spent_s > self._fresh_s / 4:
            self._next.request()  # to reset the count in the next iteration

    def schedule(self, worker: Worker, busy: bool) -> None:
        """Run a worker in a later iteration, a busy worker after the fresh ones."""
        (self._busy if busy else self._fresh).append(worker)
        self._next.request()

    def _run(self) -> None:
        self._spent_s = 0.0
        self._serve(self._fresh, self._fresh_s)
        # Busy workers always get some time. It is not subtracted from the time of fresh workers.
        self._serve(self._busy, self._spent_s + self._busy_s)
        self._spent_s -= min(self._spent_s, self._busy_s)
        if self._fresh or self._busy:
            self._next.request()

    def _serve(self, workers: deque[Worker], until_s: float) -> None:
        for _ in range(len(workers)):
            workers.popleft().run()
            if self._spent_s >= until_s:
                return
