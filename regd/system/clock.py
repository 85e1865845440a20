"""The only source of time. Tests use a clock that they move by hand.

Deadlines are monotonic, so that a step of the wall clock has no effect; the wall clock is for display.
"""

import asyncio
import time
from collections.abc import Callable
from typing import Protocol


class Timer(Protocol):
    """A call that is scheduled by `Clock.call_at`."""

    def cancel(self) -> None: ...


class Clock(Protocol):
    """Time, and calls at a time."""

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

    now = staticmethod(time.monotonic)  # as `loop.time()`, which uvloop updates only once per iteration

    def wall(self) -> float:
        return round(time.time(), 3)

    def call_at(self, when: float, call: Callable[[], None]) -> Timer:
        return self._loop.call_at(when, call)
