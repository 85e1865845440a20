"""What the client needs of asyncio's event loop."""

import asyncio
import time
from types import BuiltinFunctionType
from typing import TypeVar

from regd_client.errors import RegdError, Unavailable

__all__ = ["pause", "running_loop", "wait_shared"]

T = TypeVar("T")


def running_loop() -> asyncio.AbstractEventLoop:
    """Return the running event loop.

    Raises:
        RegdError: no asyncio event loop runs here.
    """
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        raise RegdError(
            "regd_client needs asyncio, and no asyncio event loop runs here: under trio, or without a loop, use "
            "regd_client.blocking (in a thread)"
        ) from None


async def pause(seconds: float) -> None:
    """Sleep, even if a test has stopped the clock that the event loop reads, as freezegun does."""
    if isinstance(time.monotonic, BuiltinFunctionType):  # not replaced by a clock that may stand still
        await asyncio.sleep(seconds)
    else:
        await asyncio.to_thread(time.sleep, seconds)


async def wait_shared(task: "asyncio.Task[T]") -> T:
    """Wait for a task that others wait for too. It goes on when this caller is cancelled.

    Raises:
        Unavailable: the task was cancelled, since the client was closed.
    """
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        if task.cancelled():
            raise Unavailable("the client was closed meanwhile") from None
        raise
    except RegdError as error:  # a copy for each caller: raising one exception twice would mix their tracebacks
        raise type(error)(str(error), error.code, error.details) from error
