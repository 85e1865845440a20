"""Work in time slices: order, the limits of a slice, and what happens to items that are added or discarded."""

import asyncio

from regd.server.loop_monitor import LoopMonitor
from regd.server.work_queue import NextIteration, WorkQueue
from tests.support.clock import HandClock
from tests.support.daemon import WAIT_S

SLICE_S = 0.002


class Bench:
    """A queue whose items take `takes_s` each. `times` says how often an item adds itself again."""

    def __init__(self, takes_s: float = 0.0, times: dict[int, int] | None = None, *, first: bool = False) -> None:
        self.clock = HandClock()
        self.monitor = LoopMonitor(self.clock)
        self.queue: WorkQueue[int] = WorkQueue(self._process, SLICE_S, "items", self.clock, self.monitor)
        self.takes_s = takes_s
        self.times = times or {}
        self.first = first
        self.done: list[int] = []

    def _process(self, item: int) -> None:
        self.done.append(item)
        self.clock.advance(self.takes_s)
        if self.times.get(item, 0):
            self.times[item] -= 1
            (self.queue.add_first if self.first else self.queue.add)(item)

    async def slices(self) -> list[int]:
        """Return the number of items processed in each loop iteration."""
        sizes = []
        async with asyncio.timeout(WAIT_S):
            while len(self.queue):
                before = len(self.done)
                await asyncio.sleep(0)
                sizes.append(len(self.done) - before)
        return sizes


async def test_items_are_processed_in_order_and_once() -> None:
    bench = Bench()
    for item in (3, 1, 2, 1, 3):
        bench.queue.add(item)
    assert bench.done == []  # nothing is done before the next iteration
    await bench.slices()
    assert bench.done == [3, 1, 2]


async def test_slice_is_limited_in_items() -> None:
    bench = Bench()
    for item in range(300):
        bench.queue.add(item)
    assert await bench.slices() == [128, 128, 44]


async def test_slice_is_limited_in_time() -> None:
    bench = Bench(takes_s=0.6 * SLICE_S)
    for item in range(5):
        bench.queue.add(item)
    assert await bench.slices() == [2, 2, 1]
    assert bench.monitor.stats()["slowest"] is not None


async def test_item_added_again_comes_last() -> None:
    bench = Bench(times={1: 2})
    for item in (1, 2, 3):
        bench.queue.add(item)
    await bench.slices()
    assert bench.done == [1, 2, 3, 1, 1]


async def test_item_added_first_comes_first() -> None:
    bench = Bench(times={1: 2}, first=True)
    for item in (1, 2):
        bench.queue.add(item)
    await bench.slices()
    assert bench.done == [1, 1, 1, 2]


async def test_discarded_item_is_not_processed() -> None:
    bench = Bench()
    for item in (1, 2):
        bench.queue.add(item)
    bench.queue.discard(1)
    bench.queue.discard(1)
    await bench.slices()
    assert bench.done == [2]


async def test_empty_queue_does_nothing() -> None:
    bench = Bench()
    bench.queue.add(1)
    bench.queue.discard(1)
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    bench.queue.add(2)
    await bench.slices()
    assert bench.done == [2]


async def test_repeated_call_soon_calls_once_an_iteration() -> None:
    calls: list[int] = []
    call = NextIteration(lambda: calls.append(1))
    call.request()
    call.request()
    assert calls == []
    await asyncio.sleep(0)
    assert calls == [1]
    call.request()
    await asyncio.sleep(0)
    assert calls == [1, 1]
