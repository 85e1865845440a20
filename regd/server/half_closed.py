"""Closes connections of clients that were killed while they waited for a reply or for events.

A killed client looks like one that has closed its sending side and still waits for the reply (`echo … | nc -N`).
While a connection is not read, the daemon does not even notice that. So it asks the kernel regularly.
"""

from typing import Protocol

from regd.system.clock import Clock, Timer

CHECK_S = 2.0  # between two checks of a connection
_CHECKS_MAX = 128  # connections checked at a time
_SLICE_S = 0.002


class Waiter(Protocol):
    """A connection, as `HalfClosed` uses it."""

    @property
    def is_waiting(self) -> bool:
        """Whether the client waits for replies or events, and its end would go unnoticed."""

    def is_gone(self) -> bool:
        """Return whether no process has the client's end of the connection open any more."""

    def cut(self) -> None: ...


class HalfClosed:
    """Checks its connections one after another, each every few seconds, and cuts those whose client is gone."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._waiters: dict[Waiter, None] = {}  # in the order of their next checks
        self._timer: Timer | None = None

    def add(self, waiter: Waiter) -> None:
        """Check a connection for as long as it waits. Idempotent."""
        self._waiters.setdefault(waiter)
        if self._timer is None:
            self._schedule_check()

    def discard(self, waiter: Waiter) -> None:
        """Stop checking a connection. Idempotent."""
        self._waiters.pop(waiter, None)
        if not self._waiters:
            self.close()

    def close(self) -> None:
        """Stop all checks. Idempotent."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _schedule_check(self) -> None:
        pause_s = CHECK_S * min(1.0, _CHECKS_MAX / len(self._waiters))
        self._timer = self._clock.call_at(self._clock.now() + pause_s, self._check)

    def _check(self) -> None:
        self._timer = None
        until = self._clock.now() + _SLICE_S
        for _ in range(min(len(self._waiters), _CHECKS_MAX)):
            waiter = next(iter(self._waiters))
            del self._waiters[waiter]
            if waiter.is_waiting:
                if waiter.is_gone():
                    waiter.cut()
                else:
                    self._waiters[waiter] = None  # to the end of the order
            if self._clock.now() > until:
                break
        if self._waiters:
            self._schedule_check()
