"""Shares out the event loop's time among connections that have something to do.

Whoever has just got something is served at once, while there is time; who has used up its part waits behind.
So a hundred peers with dear requests cost another one a few milliseconds, not a hundred times their part.
Must not know what they do.
"""

import asyncio
from collections import deque
from typing import Protocol

FRESH_S = 0.003  # of one turn of the loop, for those who have just got something
BUSY_S = 0.002  # and for those who have used up their part before
READONLY_S = 0.001  # for each of the two, of users who may only read


class Worker(Protocol):
    def run(self) -> None: ...


class FairScheduler:
    """`fresh_s` and `busy_s` are how much time of one turn of the loop it shares out."""

    def __init__(self, fresh_s: float = FRESH_S, busy_s: float = BUSY_S) -> None:
        self._fresh_s = fresh_s
        self._busy_s = busy_s
        self._spent_s = 0.0  # since the loop is known to have turned
        self._fresh: deque[Worker] = deque()
        self._busy: deque[Worker] = deque()
        self._scheduled = False

    @property
    def has_time(self) -> bool:
        """Whether somebody may be served now. Else it must `schedule`."""
        return self._spent_s < self._fresh_s

    def spent(self, seconds: float) -> None:
        """Count what serving took."""
        self._spent_s += seconds

    def schedule(self, worker: Worker, busy: bool) -> None:
        """Have somebody go on in a later turn; a `busy` one behind those that are not."""
        (self._busy if busy else self._fresh).append(worker)
        self._run_soon()

    def _run_soon(self) -> None:
        if not self._scheduled:
            self._scheduled = True
            asyncio.get_running_loop().call_soon(self._run)

    def _run(self) -> None:
        self._scheduled = False
        self._spent_s = 0.0
        self._serve(self._fresh, self._fresh_s)
        # Whatever comes in this turn has its time still, and some is always left for the busy.
        self._serve(self._busy, self._spent_s + self._busy_s)
        self._spent_s -= min(self._spent_s, self._busy_s)
        if self._fresh or self._busy:
            self._run_soon()

    def _serve(self, waiting: deque[Worker], until_s: float) -> None:
        for _ in range(len(waiting)):
            waiting.popleft().run()
            if self._spent_s >= until_s:
                return
