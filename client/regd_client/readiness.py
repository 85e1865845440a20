"""Waits until a service is ready. With `lifespan(..., ready=…)`, it is registered as `starting` until then."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Awaitable, Callable
from typing import NoReturn

from regd_client.errors import BadArgument, NotFound, RegdError
from regd_client.event_loop import pause
from regd_client.logger import log
from regd_client.registration import Registration

__all__ = ["Ready", "check_ready", "discard", "mark_ready", "until_ready"]

Ready = Callable[[], Awaitable[object]] | Awaitable[object]

_PAUSE_S = 0.5  # between two calls of the service's function, and between attempts to reach the daemon


def check_ready(ready: object) -> None:
    """Raise `BadArgument` unless `ready` is None, an awaitable or a function."""
    if ready is not None and not callable(ready) and not inspect.isawaitable(ready):
        message = f"ready must be a function that returns an awaitable, or an awaitable, not {ready!r:.80}"
        raise BadArgument(message, details={"field": "ready"})


async def until_ready(name: str, ready: Ready) -> None:
    """Wait until the service is ready: the function or awaitable has returned anything but False.

    A function that returns False or fails is called again. An awaitable can be awaited only once.
    """
    logged = ""
    while True:
        try:
            if await (ready() if callable(ready) else ready) is not False:
                return
            why = "ready returned False"
        except Exception as trouble:
            why = f"{type(trouble).__name__}: {trouble}"
        if not callable(ready):
            log.error("%s stays `starting`: %s", name, why)
            await _for_ever()
        if why != logged:
            logged = why
            log.warning("%s is not ready yet, asking again: %s", name, why)
        await pause(_PAUSE_S)


async def _for_ever() -> NoReturn:
    await asyncio.get_running_loop().create_future()
    raise AssertionError("unreachable")


async def mark_ready(registration: Registration) -> bool:
    """Set the state `ready`, as soon as there is a daemon. Return False if the registration has ended."""
    logged = False
    while True:
        try:
            await registration.update(state="ready")
            return True
        except NotFound:
            return False
        except RegdError as trouble:
            if not logged:
                logged = True
                log.warning("%s is ready, still trying to say so: %s", registration.endpoint.name, trouble)
        await pause(_PAUSE_S)


def discard(ready: Ready | None) -> None:
    """Close a coroutine that was not awaited because the port was never opened."""
    if inspect.iscoroutine(ready) and inspect.getcoroutinestate(ready) == inspect.CORO_CREATED:
        ready.close()
