"""A watch of etcd in a task, which keeps what it has seen."""

import asyncio
import contextlib
from collections.abc import AsyncIterator

from regd.bridge.etcd.client import Etcd
from regd.bridge.etcd.model import KeyEvent
from tests.support.polling import until


class Follower:
    """What a watch has seen so far, and the error that ended it."""

    def __init__(self) -> None:
        self.revision = 0
        self.events: list[KeyEvent] = []
        self.error: Exception | None = None

    @property
    def revisions(self) -> list[int]:
        return [event.revision for event in self.events]

    async def run(self, etcd: Etcd, prefix: bytes, after_revision: int) -> None:
        try:
            async with contextlib.aclosing(etcd.watch(prefix, after_revision)) as batches:
                async for batch in batches:
                    assert batch.events[-1].revision == batch.revision
                    self.revision = batch.revision
                    self.events += batch.events
        except Exception as error:
            self.error = error

    async def until_revision(self, revision: int, within_s: float = 60.0) -> None:
        """Wait until a revision has been seen, and fail if the watch ends before."""
        await until(lambda: self.revision >= revision or self.error, within_s)
        if self.error is not None:
            raise self.error


@contextlib.asynccontextmanager
async def following(etcd: Etcd, prefix: bytes, after_revision: int) -> AsyncIterator[Follower]:
    """Watch a prefix during the block."""
    follower = Follower()
    task = asyncio.create_task(follower.run(etcd, prefix, after_revision))
    try:
        yield follower
    finally:
        task.cancel()
        await asyncio.wait([task])
