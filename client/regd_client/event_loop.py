"""Helpers for asyncio's event loop."""

import asyncio
import random
import time
from types import BuiltinFunctionType
from typing import TypeVar

from regd_client.errors import RegdError, Unavailable

__all__ = ["pause", "random_s", "running_loop", "wait_shared"]

_random = random.SystemRandom()  # a program that has seeded `random` keeps its sequence

T = TypeVar("T")


def running_loop() -> asyncio.AbstractEventLoop:
    """Return the running event loop.

    Raises:
        RegdError: no asyncio event loop is running.
    """
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        raise RegdError(
            "regd_client needs asyncio, and no asyncio event loop runs here: under trio, or without a loop, use "
            "regd_client.blocking (in a thread)"
        ) from None


async def pause(seconds: float) -> None:
    """Sleep, also if a test has stopped the event loop's clock, as freezegun does."""
    if isinstance(time.monotonic, BuiltinFunctionType):  # not patched
        await asyncio.sleep(seconds)
    else:
        await asyncio.to_thread(time.sleep, seconds)


def random_s(least_s: float, most_s: float) -> float:
    """Return a random time in seconds, so that clients do not all try again at the same moment."""
    return _random.uniform(least_s, most_s)


async def wait_shared(task: "asyncio.Task[T]") -> T:
    """Return the result of a task that several callers await. Cancelling a caller does not cancel the task.

    Raises:
        Unavailable: the task was cancelled because the client was closed.
    """
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        if task.cancelled():
            raise Unavailable("the client was closed meanwhile") from None
        raise
    except RegdError as error:  # raise a copy, since raising the same object twice would mix the tracebacks
        raise type(error)(str(error), error.code, error.details) from error
