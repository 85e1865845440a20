"""Stalls: time in which the daemon could not receive renewals: it was stopped, or its loop or disk blocked.

That time is added to the deadlines of leases, and of holds that wait for their client.
"""

import logging

from regd.core.holders import HolderIndex
from regd.system.clock import Clock

log = logging.getLogger("regd")

LOOK_S = 0.5  # between two calls of `now`, at most
_LATE_S = 0.25  # a call may be so late, and a flush take so long, without being a stall
_LOG_FROM_S = 2.0  # shorter stalls are not logged


class Stalls:
    """The time for setting, renewing and ending leases is `now`.

    A renewal that follows a write on its connection waits for the flush in flight, and then for its own. The
    first quarter of a second of each flush is not a stall, so that a lease that is not renewed ends even while
    one flush follows another.
    """

    def __init__(self, clock: Clock, holders: HolderIndex) -> None:
        self._clock = clock
        self._holders = holders
        self._looked_at = clock.now()
        self._flushing_since: float | None = None

    def start(self) -> None:
        """Forget the time before this call."""
        self._looked_at = self._clock.now()

    def now(self) -> float:
        """Add the stall since the last call, if any, to the deadlines. Return the time."""
        now = self._clock.now()
        lost_s = 0.0
        if now - self._looked_at > LOOK_S + _LATE_S:
            lost_s = now - self._looked_at  # when in that time the daemon was stopped is unknown
        elif self._flushing_since is not None:
            lost_s = now - max(self._looked_at, self._flushing_since + _LATE_S)
        self._looked_at = now
        if lost_s > 0 and self._holders.next_deadline() is not None:
            self._holders.prolong(lost_s)
            if lost_s > _LOG_FROM_S:
                log.info("could not receive renewals for %.1f s: added to every ttl and to the grace", lost_s)
        return now

    @property
    def time_stands_still(self) -> bool:
        """Whether a flush takes so long that no deadline comes nearer."""
        return self._flushing_since is not None and self._clock.now() >= self._flushing_since + _LATE_S

    def flush_began(self) -> None:
        self._flushing_since = self.now()

    def flush_ended(self) -> None:
        self.now()
        self._flushing_since = None
