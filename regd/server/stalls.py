"""Stalls: time in which the daemon could not receive renewals, since it was stopped or its loop or disk blocked.

This time is added to the deadlines of leases, and of holds that wait for their client to reconnect.
"""

import logging

from regd.core.holders import HolderIndex
from regd.system.clock import Clock

log = logging.getLogger("regd")

CHECK_S = 0.5  # the longest time between two calls of `now_after_prolonging` while the daemon runs
_LATE_S = 0.25  # a call may be late by this time, and a flush take this time, without being a stall
_LOG_FROM_S = 2.0  # shorter stalls are not logged


class Stalls:
    """Detects stalls. Set, renew and end leases at the time that `now_after_prolonging` returns.

    A flush is a stall too, because a renewal that follows a write on its connection waits until the write is
    committed. But the first quarter of a second of a flush does not count. Otherwise no lease would ever end
    while one flush follows another.
    """

    def __init__(self, clock: Clock, holders: HolderIndex) -> None:
        self._clock = clock
        self._holders = holders
        self._called_at = clock.now()
        self._flushing_since: float | None = None

    def start(self) -> None:
        """Ignore the time before this call."""
        self._called_at = self._clock.now()

    def now_after_prolonging(self) -> float:
        """Add the stall since the last call, if there was one, to the deadlines. Return the current time."""
        now = self._clock.now()
        lost_s = 0.0
        if now - self._called_at > CHECK_S + _LATE_S:
            lost_s = now - self._called_at  # all of it, since it is unknown when the daemon was stopped
        elif self._flushing_since is not None:
            lost_s = now - max(self._called_at, self._flushing_since + _LATE_S)
        self._called_at = now
        if lost_s > 0 and self._holders.next_deadline() is not None:
            self._holders.prolong(lost_s)
            if lost_s > _LOG_FROM_S:
                log.info("could not receive renewals for %.1f s: added to every ttl and to the grace", lost_s)
        return now

    @property
    def is_flush_stalled(self) -> bool:
        """Whether the flush in flight has become a stall, so that no deadline comes nearer until it ends."""
        return self._flushing_since is not None and self._clock.now() >= self._flushing_since + _LATE_S

    def flush_began(self) -> None:
        self._flushing_since = self.now_after_prolonging()

    def flush_ended(self) -> None:
        self.now_after_prolonging()
        self._flushing_since = None
