"""What all connections of a daemon share: its parts, the bytes that wait, and who is there under which number.

Must not know lines.
"""

import asyncio
import logging
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from regd.core.errors import Code, Refused
from regd.core.limits import Limits
from regd.core.transaction import OwnershipLost
from regd.protocol import messages
from regd.server.counters import Counters
from regd.server.engine import Engine
from regd.server.event_log import EventLog
from regd.server.half_closed import HalfClosed
from regd.server.handlers import Handlers
from regd.server.loop_monitor import LoopMonitor
from regd.server.pending_resolves import PendingResolves
from regd.server.reaper import Reaper
from regd.server.resolve_cache import ResolveCache
from regd.server.scheduler import FairScheduler
from regd.server.watches import Watches
from regd.system.clock import Clock
from regd.system.peer_credentials import PeerCredentials

if TYPE_CHECKING:
    from regd.server.connection import Connection

log = logging.getLogger("regd")

_COMPLAIN_EVERY_S = 10.0
_RECEIVED_BYTES_MAX = 16_384  # at a time, of one connection


class BufferQuota:
    """Bytes that wait, per connection and in all. Beyond the bound the largest give way."""

    def __init__(self, bytes_max: int) -> None:
        self._bytes_max = bytes_max
        self._held: dict[Connection, int] = {}
        self.total = 0

    def hold(self, connection: "Connection", size: int) -> "list[Connection]":
        """Set what waits of a connection, and return those that are too much for all: room for an eighth."""
        before = self._held.get(connection, 0)
        if size == before:
            return []
        self.total += size - before
        if size:
            self._held[connection] = size
        else:
            del self._held[connection]
        if self.total <= self._bytes_max:
            return []
        excess = self.total - self._bytes_max * 7 // 8
        gone = []
        for each in sorted(self._held, key=self._held.__getitem__, reverse=True):
            if excess <= 0:
                break
            gone.append(each)
            excess -= self._held[each]
        return gone


class MemoryQuota:
    """Bytes that are kept of requests. When there is no room, no more is taken."""

    def __init__(self, bytes_max: int) -> None:
        self._bytes_max = bytes_max
        self.total = 0

    def check(self, size: int) -> None:
        """See that there is room for so many more.

        Raises:
            Refused: `busy`.
        """
        if self.total + size > self._bytes_max:
            raise Refused(Code.BUSY, f"{self.total} bytes of requests are kept already; try again later")

    def take(self, size: int) -> None:
        self.total += size

    def give(self, size: int) -> None:
        self.total -= size


class Slots:
    """So many connections may be at a reply that takes several time slices; the others wait in order."""

    def __init__(self, most: float) -> None:
        self._most = most
        self._taken: set[Connection] = set()
        self._waiting: dict[Connection, None] = {}

    def take(self, connection: "Connection") -> bool:
        """Return whether the connection has a slot. If not, it is scheduled once there is one for it."""
        if connection not in self._taken:
            if len(self._taken) >= self._most:
                self._waiting[connection] = None
                return False
            self._waiting.pop(connection, None)
            self._taken.add(connection)
        return True

    def give(self, connection: "Connection") -> None:
        """Give the slot back, or wait for none any more. Idempotent."""
        self._waiting.pop(connection, None)
        if connection in self._taken:
            self._taken.discard(connection)
            if self._waiting:
                following = next(iter(self._waiting))
                del self._waiting[following]
                self._taken.add(following)
                following.schedule(busy=True)


@dataclass(slots=True)
class Share:
    """What the connections of one kind of user take of the daemon: of those who may write, or may only read.

    Nothing in here is shared between the two, so that readers never take what belongs to a writer.
    """

    turns: FairScheduler
    watches: Watches
    waits: PendingResolves
    input: BufferQuota
    output: BufferQuota
    kept: MemoryQuota
    slow: Slots


@dataclass(slots=True)
class Context:
    """What all connections of a daemon share."""

    limits: Limits
    engine: Engine
    answers: Handlers
    replies: ResolveCache
    reaper: Reaper
    peers: PeerCredentials
    clock: Clock
    tally: Counters
    pulse: LoopMonitor
    writers: Share
    readers: Share
    half_closed: HalfClosed
    events: EventLog
    connections: "set[Connection]" = field(default_factory=set)
    sessions: "Sessions" = field(default_factory=lambda: Sessions())
    # Every connection receives into this one buffer: asyncio's own reads allocate 256 KiB each.
    received: memoryview = field(default_factory=lambda: memoryview(bytearray(_RECEIVED_BYTES_MAX)))
    alone: asyncio.Event = field(default_factory=asyncio.Event)  # set when the last connection has gone
    _complained_at: dict[str, float] = field(default_factory=dict)  # by the complaint

    def complain(self, peer: object, seen: bytes) -> None:
        """Log a stranger; `repr` keeps its bytes from the terminal."""
        self.tally.bad_protocol += 1
        self._complain("refused %s, which does not speak regd: %r…", peer_text(peer), seen)

    @staticmethod
    def denied(uid: int | None) -> Refused:
        """Return what to answer a user who may not write. Most want a registry of their own."""
        own = "run a regd of your own, `regd --port off --unix PATH`, and set REGD_ADDRESS=unix://PATH"
        if uid is None:
            return Refused(
                Code.DENIED, f"the system does not tell regd which user you are, so you may only read; {own}"
            )
        return Refused(
            Code.DENIED, f"user {uid} may only read here; {own}; or have this one started with --allow-uid {uid}"
        )

    def _complain(self, text: str, *values: object) -> None:
        """Log one line of a kind in a while: a flood of strangers must not flood the log."""
        now = self.clock.now()
        if now - self._complained_at.get(text, float("-inf")) >= _COMPLAIN_EVERY_S:
            self._complained_at[text] = now
            log.warning(text, *values)


class Sessions:
    """The connections that live, by the number that registrations know them by."""

    def __init__(self) -> None:
        self._count = 0
        self._open: dict[int, Connection] = {}

    def add(self, connection: "Connection") -> int:
        self._count += 1
        self._open[self._count] = connection
        return self._count

    def remove(self, session: int) -> None:
        self._open.pop(session, None)

    def is_cut(self, session: int) -> bool:
        """Whether the kernel knows that the connection has ended, told already or not."""
        connection = self._open.get(session)
        return connection is None or connection.is_cut()

    def peer_of(self, session: int) -> str | None:
        connection = self._open.get(session)
        return connection.peer if connection else None

    def tell(self, lost: OwnershipLost) -> None:
        """Tell a connection that somebody took what it held."""
        connection = self._open.get(lost.session)
        if connection is not None:
            entry = lost.entry
            connection.push(
                messages.event("lost", lost.rev, name=entry.name, instance=entry.instance, reason=lost.reason)
            )


def peer_text(peer: object) -> str:
    return f"{peer[0]} port {peer[1]}" if isinstance(peer, tuple) else "a peer on the Unix socket"
