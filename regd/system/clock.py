"""`Clock`: the daemon's only source of time. Tests replace it by a clock that they control.

Deadlines use monotonic time, which is not affected by changes of the system clock. Wall-clock time is for
display.
"""

import asyncio
import time
from collections.abc import Callable
from typing import Protocol


class Timer(Protocol):
    """A call scheduled by `Clock.call_at`."""

    def cancel(self) -> None: ...


class Clock(Protocol):
    """The current time, and timers."""

    def now(self) -> float:
        """Return monotonic seconds."""

    def wall(self) -> float:
        """Return Unix seconds."""

    def call_at(self, when: float, call: Callable[[], None]) -> Timer:
        """Call `call` once `now()` has reached `when`."""


class LoopClock:
    """The clock of the running event loop."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()

    now = staticmethod(time.monotonic)  # not `loop.time()`, which uvloop updates only once per iteration

    def wall(self) -> float:
        return round(time.time(), 3)

    def call_at(self, when: float, call: Callable[[], None]) -> Timer:
        return self._loop.call_at(when, call)
