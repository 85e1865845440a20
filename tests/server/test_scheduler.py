"""The scheduler runs a worker at once while time is left, and no worker waits forever."""

import asyncio

from regd.server.scheduler import READONLY_S, FairScheduler
from tests.support.daemon import WAIT_S


class Worker:
    """A worker that needs `times` time slices of `takes_s` seconds."""

    def __init__(self, scheduler: FairScheduler, name: str, log: list[str], takes_s: float, times: int) -> None:
        self.scheduler, self.name, self.log, self.takes_s, self.times = scheduler, name, log, takes_s, times

    def run(self) -> None:
        self.log.append(self.name)
        self.times -= 1
        self.scheduler.spent(self.takes_s)
        if self.times:
            self.scheduler.schedule(self, busy=True)


async def drain(workers: list[Worker]) -> None:
    async with asyncio.timeout(WAIT_S):
        while any(worker.times for worker in workers):
            await asyncio.sleep(0)


async def test_time_is_available_again_in_the_next_iteration() -> None:
    scheduler, log = FairScheduler(), list[str]()
    seen = []
    for _ in range(2):
        scheduler.spent(0.002)
        seen.append(scheduler.has_time)
    scheduler.schedule(one := Worker(scheduler, "one", log, 0.0, 1), busy=False)
    await drain([one])
    assert [*seen, scheduler.has_time] == [True, False, True]


async def test_fresh_worker_does_not_wait_for_busy_ones() -> None:
    scheduler, log = FairScheduler(), list[str]()
    busy = [Worker(scheduler, f"busy{n}", log, 0.001, 20) for n in range(50)]
    for worker in busy:
        scheduler.schedule(worker, busy=True)
    await asyncio.sleep(0)
    before = len(log)
    fresh = Worker(scheduler, "fresh", log, 0.0001, 1)
    scheduler.schedule(fresh, busy=False)
    await drain([fresh])
    assert len(log) - before <= 5
    await drain(busy)


async def test_many_workers_share_the_time_of_one_iteration() -> None:
    scheduler, log = FairScheduler(READONLY_S, READONLY_S), list[str]()
    seen = [scheduler.has_time]
    scheduler.spent(READONLY_S)
    assert [*seen, scheduler.has_time] == [True, False]
    workers = [Worker(scheduler, f"one{n}", log, 0.0005, 2) for n in range(100)]
    for worker in workers:
        scheduler.schedule(worker, busy=False)
    steps = []
    async with asyncio.timeout(WAIT_S):
        while any(worker.times for worker in workers):
            before = len(log)
            await asyncio.sleep(0)
            steps.append(len(log) - before)
    assert max(steps) <= 2 * READONLY_S / 0.0005
    assert len(log) == 200


async def test_busy_workers_continue_in_order_among_fresh_ones() -> None:
    scheduler, log = FairScheduler(), list[str]()
    busy = [Worker(scheduler, f"busy{n}", log, 0.001, 5) for n in range(4)]
    for worker in busy:
        scheduler.schedule(worker, busy=True)
    for _ in range(100):
        for _ in range(10):
            scheduler.schedule(Worker(scheduler, "fresh", log, 0.001, 1), busy=False)
        await asyncio.sleep(0)
    assert not any(worker.times for worker in busy)
    assert [name for name in log if name != "fresh"] == [f"busy{n}" for n in range(4)] * 5
