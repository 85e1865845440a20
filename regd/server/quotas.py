"""Quotas of connections: buffered bytes, memory of pending requests, slots for long replies.

Users who may write and users who may only read have a `Share` each, so that readers take nothing from writers.
"""

from dataclasses import dataclass
from typing import Protocol

from regd.core.errors import Code, Refused
from regd.server.pending_resolves import PendingResolves
from regd.server.scheduler import FairScheduler
from regd.server.watches import Watches


class Peer(Protocol):
    """A connection, as quotas see it."""

    def refuse(self, refusal: Refused) -> None:
        """Send an error and close."""

    def cut(self) -> None:
        """Close at once; unsent bytes are lost."""

    def slot_granted(self) -> None:
        """Go on with the reply that waited for a slot."""


class BufferQuota:
    """Buffered bytes, by connection and in total. Beyond the limit the connections with the most are dropped."""

    def __init__(self, bytes_max: int) -> None:
        self._bytes_max = bytes_max
        self._sizes: dict[Peer, int] = {}
        self.total = 0

    def record(self, peer: Peer, size: int) -> list[Peer]:
        """Record a connection's buffered bytes, and return the connections to drop until usage is below 7/8."""
        previous = self._sizes.get(peer, 0)
        if size == previous:
            return []
        self.total += size - previous
        if size:
            self._sizes[peer] = size
        else:
            del self._sizes[peer]
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
    """Bytes of pending requests: writes, watches and waits. Beyond the limit requests are refused."""

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
    """Permits for replies that take several time slices. Connections wait for a permit in order of arrival."""

    def __init__(self, slots_max: float) -> None:
        self._slots_max = slots_max
        self._taken: set[Peer] = set()
        self._waiting: dict[Peer, None] = {}

    def acquire(self, peer: Peer) -> bool:
        """Return whether the connection has a slot. If not, `slot_granted` is called once it has one."""
        if peer not in self._taken:
            if len(self._taken) >= self._slots_max:
                self._waiting[peer] = None
                return False
            self._waiting.pop(peer, None)
            self._taken.add(peer)
        return True

    def release(self, peer: Peer) -> None:
        """Pass the connection's slot to the next in line, or take the connection out of the line. Idempotent."""
        self._waiting.pop(peer, None)
        if peer in self._taken:
            self._taken.discard(peer)
            if self._waiting:
                successor = next(iter(self._waiting))
                del self._waiting[successor]
                self._taken.add(successor)
                successor.slot_granted()


@dataclass(slots=True)
class Share:
    """What one class of users takes of the daemon: users who may write, or users who may only read."""

    scheduler: FairScheduler
    watches: Watches
    pending_resolves: PendingResolves
    input: BufferQuota
    output: BufferQuota
    memory: MemoryQuota
    slow_replies: Slots
