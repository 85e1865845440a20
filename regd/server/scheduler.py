"""Shares the event loop's time among connections that have requests to answer.

A connection that has just received something is served at once while there is time; one that has used up its time
slice waits behind the others. So a hundred connections with expensive requests delay another one by a few
milliseconds, not by a hundred time slices.
"""

from collections import deque
from typing import Protocol

from regd.server.work_queue import NextIteration

FRESH_S = 0.003  # in one iteration of the event loop, for workers that have just received something
BUSY_S = 0.002  # and for workers that have used up a time slice before
READONLY_S = 0.001  # each of the two, for connections of users who may only read


class Worker(Protocol):
    def run(self) -> None:
        """Use a time slice, and report it with `spent`."""


class FairScheduler:
    """Gives out `fresh_s` and `busy_s` seconds in each iteration of the event loop."""

    def __init__(self, fresh_s: float = FRESH_S, busy_s: float = BUSY_S) -> None:
        self._fresh_s = fresh_s
        self._busy_s = busy_s
        self._spent_s = 0.0  # in this iteration, and in some before if they took little
        self._fresh: deque[Worker] = deque()
        self._busy: deque[Worker] = deque()
        self._next = NextIteration(self._run)

    @property
    def has_time(self) -> bool:
        """Whether a worker may run now, without `schedule`."""
        return self._spent_s < self._fresh_s

    def spent(self, seconds: float) -> None:
        """Count the time that a worker has used."""
        self._spent_s += seconds
        if self._spent_s > self._fresh_s / 4:
            self._next.request()  # to begin anew in the next iteration

    def schedule(self, worker: Worker, busy: bool) -> None:
        """Run a worker in a later iteration; a `busy` one after those that are not."""
        (self._busy if busy else self._fresh).append(worker)
        self._next.request()

    def _run(self) -> None:
        self._spent_s = 0.0
        self._serve(self._fresh, self._fresh_s)
        # Busy workers always get some time. What they use is not taken from those that receive something now.
        self._serve(self._busy, self._spent_s + self._busy_s)
        self._spent_s -= min(self._spent_s, self._busy_s)
        if self._fresh or self._busy:
            self._next.request()

    def _serve(self, workers: deque[Worker], until_s: float) -> None:
        for _ in range(len(workers)):
            workers.popleft().run()
            if self._spent_s >= until_s:
                return
