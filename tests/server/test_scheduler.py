"""Who is served when: at once while there is time, and nobody waits for ever."""

import asyncio

from regd.server.scheduler import READONLY_S, FairScheduler
from tests.support.daemon import WAIT_S


class Worker:
    """Takes so long each time, and has so much to do."""

    def __init__(self, turns: FairScheduler, name: str, log: list[str], takes_s: float, times: int) -> None:
        self.turns, self.name, self.log, self.takes_s, self.times = turns, name, log, takes_s, times

    def run(self) -> None:
        self.log.append(self.name)
        self.times -= 1
        self.turns.spent(self.takes_s)
        if self.times:
            self.turns.schedule(self, busy=True)


async def drain(workers: list[Worker]) -> None:
    async with asyncio.timeout(WAIT_S):
        while any(each.times for each in workers):
            await asyncio.sleep(0)


async def test_there_is_time_until_it_is_spent_and_again_when_the_loop_has_turned() -> None:
    turns, log = FairScheduler(), list[str]()
    seen = []
    for _ in range(2):
        turns.spent(0.002)
        seen.append(turns.has_time)
    turns.schedule(one := Worker(turns, "one", log, 0.0, 1), busy=False)
    await drain([one])
    assert [*seen, turns.has_time] == [True, False, True]


async def test_whoever_has_little_to_do_does_not_wait_for_the_busy() -> None:
    turns, log = FairScheduler(), list[str]()
    busy = [Worker(turns, f"busy{n}", log, 0.001, 20) for n in range(50)]
    for each in busy:
        turns.schedule(each, busy=True)
    await asyncio.sleep(0)
    before = len(log)
    fresh = Worker(turns, "fresh", log, 0.0001, 1)
    turns.schedule(fresh, busy=False)
    await drain([fresh])
    assert len(log) - before <= 5
    await drain(busy)


async def test_those_with_little_time_take_no_more_in_one_turn_of_the_loop_however_many_they_are() -> None:
    turns, log = FairScheduler(READONLY_S, READONLY_S), list[str]()
    seen = [turns.has_time]
    turns.spent(READONLY_S)
    assert [*seen, turns.has_time] == [True, False]
    workers = [Worker(turns, f"one{n}", log, 0.0005, 2) for n in range(100)]
    for each in workers:
        turns.schedule(each, busy=False)
    steps = []
    async with asyncio.timeout(WAIT_S):
        while any(each.times for each in workers):
            before = len(log)
            await asyncio.sleep(0)
            steps.append(len(log) - before)
    assert max(steps) <= 2 * READONLY_S / 0.0005
    assert len(log) == 200


async def test_the_busy_go_on_among_many_who_come_and_each_in_its_turn() -> None:
    turns, log = FairScheduler(), list[str]()
    busy = [Worker(turns, f"busy{n}", log, 0.001, 5) for n in range(4)]
    for each in busy:
        turns.schedule(each, busy=True)
    for _ in range(100):
        for _ in range(10):
            turns.schedule(Worker(turns, "fresh", log, 0.001, 1), busy=False)
        await asyncio.sleep(0)
    assert not any(each.times for each in busy)
    assert [name for name in log if name != "fresh"] == [f"busy{n}" for n in range(4)] * 5
