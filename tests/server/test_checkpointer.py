"""The checkpointer: when the registry file is written. The test moves time, and ends each checkpoint."""

import asyncio
import errno
import os
import threading
from typing import cast

import pytest

from regd.server.checkpointer import Checkpointer
from regd.storage.store import Store
from tests.support.clock import HandClock
from tests.support.daemon import WAIT_S


class SlowStore:
    """A store whose checkpoints take until the test ends them."""

    path = "/x/registry.json"

    def __init__(self, clock: HandClock) -> None:
        self.needs_checkpoint = self.edited = False
        self.written: list[float] = []  # when each checkpoint began
        self.takes_s = 0.0
        self.failing = False
        self.gate = threading.Event()
        self.gate.set()
        self._clock = clock

    def is_file_edited(self) -> bool:
        return self.edited

    def checkpoint(self) -> None:
        self.needs_checkpoint = self.edited = False
        self.written.append(self._clock.now())
        assert self.gate.wait(WAIT_S)
        self._clock.skip(self.takes_s)
        if self.failing:
            self.needs_checkpoint = True
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class Bench:
    def __init__(self) -> None:
        self.clock = HandClock()
        self.began = self.clock.now()
        self.store = SlowStore(self.clock)
        self.checkpointer = Checkpointer(cast(Store, self.store), self.clock, 1.0)

    def change(self) -> None:
        self.store.needs_checkpoint = True
        self.checkpointer.on_change()
        self.clock.advance(0)

    async def settle(self) -> None:
        """Wait until no checkpoint is being written."""
        async with asyncio.timeout(WAIT_S):
            while self.checkpointer._task is not None:
                await asyncio.sleep(0)

    async def advance(self, seconds: float) -> None:
        self.clock.advance(seconds)
        await self.settle()

    @property
    def written(self) -> list[float]:
        return [at - self.began for at in self.store.written]


async def test_first_change_is_written_at_once_and_later_changes_together() -> None:
    bench = Bench()
    bench.change()
    await bench.settle()
    assert bench.written == [0]
    for _ in range(3):
        await bench.advance(0.25)
        bench.change()
        await bench.settle()
    assert bench.written == [0]
    await bench.advance(0.25)
    assert bench.written == [0, 1]
    await bench.advance(100)
    assert bench.written == [0, 1]  # no change, no checkpoint
    bench.change()
    await bench.settle()
    assert bench.written == [0, 1, 101]
    await bench.checkpointer.close()


async def test_change_during_a_checkpoint_is_in_the_next_checkpoint() -> None:
    bench = Bench()
    bench.store.gate.clear()
    bench.change()
    async with asyncio.timeout(WAIT_S):
        while not bench.store.written:
            await asyncio.sleep(0)
    bench.change()
    assert bench.written == [0]  # one at a time
    bench.store.gate.set()
    await bench.settle()
    await bench.advance(1)
    assert bench.written == [0, 1]
    await bench.checkpointer.close()


async def test_writing_takes_at_most_a_tenth_of_the_time() -> None:
    bench = Bench()
    bench.store.takes_s = 2.0
    bench.change()
    await bench.settle()
    bench.change()
    await bench.advance(17.5)
    assert bench.written == [0]
    await bench.advance(0.5)
    assert bench.written == [0, 20]
    await bench.checkpointer.close()


async def test_failure_is_logged_once_and_retried(caplog: pytest.LogCaptureFixture) -> None:
    bench = Bench()
    bench.store.failing = True
    bench.change()
    await bench.settle()
    for _ in range(3):
        await bench.advance(1)
    assert bench.written == [0, 1, 2, 3]
    assert [record.message for record in caplog.records] == [
        "cannot write /x/registry.json: No space left on device; the journal has all changes"
    ]
    bench.store.failing = False
    await bench.advance(1)
    assert caplog.records[-1].message == "/x/registry.json can be written again"
    await bench.advance(10)
    assert bench.written == [0, 1, 2, 3, 4]
    await bench.checkpointer.close()


async def test_close_writes_the_last_checkpoint() -> None:
    bench = Bench()
    bench.change()
    await bench.settle()
    bench.change()
    await bench.checkpointer.close()
    assert bench.written == [0, 0]
    bench.checkpointer.on_change()
    await bench.advance(10)
    await bench.checkpointer.close()
    assert bench.written == [0, 0]


async def test_close_writes_a_file_again_that_another_program_has_changed() -> None:
    bench = Bench()
    bench.change()
    await bench.settle()
    bench.store.edited = True
    await bench.checkpointer.close()
    await bench.checkpointer.close()
    assert bench.written == [0, 0]
