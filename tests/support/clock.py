"""A clock that tests move by hand."""

import heapq
import itertools
from collections.abc import Callable


class HandTimer:
    def __init__(self, call: Callable[[], None]) -> None:
        self.call: Callable[[], None] | None = call

    def cancel(self) -> None:
        self.call = None


class HandClock:
    """A `Clock` whose time changes only by calls of `advance`, `skip` and `stop`."""

    def __init__(self, wall: float = 1_790_000_000.0) -> None:
        self._now = 1_000.0
        self._wall = wall
        self._timers: list[tuple[float, int, HandTimer]] = []
        self._count = itertools.count()

    def now(self) -> float:
        return self._now

    def wall(self) -> float:
        return self._wall

    def call_at(self, when: float, call: Callable[[], None]) -> HandTimer:
        timer = HandTimer(call)
        heapq.heappush(self._timers, (when, next(self._count), timer))
        return timer

    def advance(self, seconds: float) -> None:
        """Move time forward, and call the timers that expire meanwhile, in order and on time."""
        end = self._now + seconds
        while self._timers and self._timers[0][0] <= end:
            when, _, timer = heapq.heappop(self._timers)
            self._now = max(self._now, when)
            if timer.call is not None:
                timer.call()
        self._now = end
        self._wall += seconds

    def stop(self, seconds: float) -> None:
        """Move time forward as a suspended process sees it: timers that expire meanwhile are called at the end."""
        self.skip(seconds)
        self.advance(0)

    def skip(self, seconds: float) -> None:
        """Move time forward without calling any timer."""
        self._now += seconds
        self._wall += seconds
