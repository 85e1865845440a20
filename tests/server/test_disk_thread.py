"""The engine's thread: order, exceptions, and cancelled futures."""

import asyncio
import threading

import pytest

from regd.server.disk_thread import DiskThread
from tests.support.daemon import WAIT_S


async def test_calls_are_made_in_order_in_one_thread() -> None:
    thread = DiskThread("disk")
    calls: list[tuple[int, str]] = []
    async with asyncio.timeout(WAIT_S):
        await asyncio.gather(
            *(thread.call(lambda n: calls.append((n, threading.current_thread().name)), n) for n in range(3))
        )
    assert calls == [(n, "disk") for n in range(3)]
    thread.close()


async def test_exception_is_raised_where_the_call_is_awaited() -> None:
    thread = DiskThread("disk")

    def fail() -> None:
        raise OSError(5, "no disk")

    with pytest.raises(OSError, match="no disk"):
        await thread.call(fail)
    await thread.call(lambda: None)  # the thread still works
    thread.close()


async def test_cancelled_call_is_made_and_its_result_dropped() -> None:
    thread = DiskThread("disk")
    gate, done = threading.Event(), threading.Event()
    call = thread.call(lambda: done.set() if gate.wait(WAIT_S) else None)
    call.cancel()
    gate.set()
    async with asyncio.timeout(WAIT_S):
        await thread.call(lambda: None)
    assert done.is_set()
    assert call.cancelled()
    thread.close()


async def test_close_without_a_call_is_idempotent() -> None:
    thread = DiskThread("disk")
    thread.close()
    thread.close()
