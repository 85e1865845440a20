"""Quotas of connections: buffered bytes, memory of requests that wait, slots for long replies.

Users who may write and users who may only read have a `Share` each, so that readers take nothing from writers.
"""

from dataclasses import dataclass
from typing import Protocol

from regd.core.errors import Code, Refused
from regd.server.scheduler import FairScheduler
from regd.server.waiting_resolves import WaitingResolves
from regd.server.watches import Watches


class LimitedConnection(Protocol):
    """A connection, as the quotas use it."""

    def refuse(self, refusal: Refused) -> None:
        """Send an error and close."""

    def cut(self) -> None:
        """Close at once; unsent bytes are lost."""

    def slot_granted(self) -> None:
        """Continue with the reply that waited for a slot."""


class BufferQuota:
    """Buffered bytes, by connection and in total. Beyond the limit, the connections with the most are dropped."""

    def __init__(self, bytes_max: int) -> None:
        self._bytes_max = bytes_max
        self._sizes: dict[LimitedConnection, int] = {}
        self.total = 0

    def record(self, connection: LimitedConnection, size: int) -> list[LimitedConnection]:
        """Record a connection's buffered bytes and return the connections to drop until usage is below 7/8."""
        previous = self._sizes.get(connection, 0)
        if size == previous:
            return []
        self.total += size - previous
        if size:
            self._sizes[connection] = size
        else:
            del self._sizes[connection]
        if self.total <= self._bytes_max:
            return []
        excess = self.total - self._bytes_max * 7 // 8
        to_drop = []
        for largest in sorted(self._sizes, key=self._sizes.__getitem__, reverse=True):
            if excess <= 0:
                break
            to_drop.append(largest)
            excess -= self._sizes[largest]
        return to_drop


class MemoryQuota:
    """Memory of writes and `resolve`s that wait, and of watches. Beyond the limit, requests are refused."""

    def __init__(self, bytes_max: int) -> None:
        self._bytes_max = bytes_max
        self.total = 0

    def check(self, size: int) -> None:
        """Check that `size` more bytes fit.

        Raises:
            Refused: `busy`.
        """
        if self.total + size > self._bytes_max:
            raise Refused(Code.BUSY, f"{self.total} bytes of requests are kept already; try again later")

    def take(self, size: int) -> None:
        self.total += size

    def release(self, size: int) -> None:
        self.total -= size


class Slots:
    """Slots for replies that take several time slices. Connections wait for a slot in order of arrival."""

    def __init__(self, slots_max: float) -> None:
        self._slots_max = slots_max
        self._taken: set[LimitedConnection] = set()
        self._waiting: dict[LimitedConnection, None] = {}

    def acquire(self, connection: LimitedConnection) -> bool:
        """Return whether the connection has a slot. If not, `slot_granted` is called once it has one."""
        if connection not in self._taken:
            if len(self._taken) >= self._slots_max:
                self._waiting[connection] = None
                return False
            self._waiting.pop(connection, None)
            self._taken.add(connection)
        return True

    def release(self, connection: LimitedConnection) -> None:
        """Give the connection's slot to the next in the queue, or remove it from the queue. Idempotent."""
        self._waiting.pop(connection, None)
        if connection in self._taken:
            self._taken.discard(connection)
            if self._waiting:
                successor = next(iter(self._waiting))
                del self._waiting[successor]
                self._taken.add(successor)
                successor.slot_granted()


@dataclass(slots=True)
class Share:
    """The resources of one class of users: users who may write, or users who may only read."""

    scheduler: FairScheduler
    watches: Watches
    waiting_resolves: WaitingResolves
    input: BufferQuota
    output: BufferQuota
    memory: MemoryQuota
    slow_replies: Slots
