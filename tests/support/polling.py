"""Wait for a condition, with one upper bound for all tests."""

import asyncio
import itertools
import time
from collections.abc import Callable

from tests.support.daemon import WAIT_S

_EVERY_ITERATION = 1_000  # checks in every loop iteration, before one check per millisecond


async def until(condition: Callable[[], object], within_s: float = WAIT_S) -> None:
    """Wait until `condition()` is true.

    Raises:
        TimeoutError: it is still false after `within_s` seconds.
    """
    async with asyncio.timeout(within_s):
        for count in itertools.count():
            if condition():
                return
            await asyncio.sleep(0 if count < _EVERY_ITERATION else 0.001)


def block_until(condition: Callable[[], object], within_s: float = WAIT_S) -> None:
    """Block the thread until `condition()` is true. For tests without an event loop.

    Raises:
        AssertionError: it is still false after `within_s` seconds.
    """
    end = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < end, f"still false after {within_s:g} s"
        time.sleep(0.01)
