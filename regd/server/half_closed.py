"""Connections that are kept for a reply or for events, and whose peer sends nothing more or is not read.

The peer may have closed its sending side alone and wait (`echo … | nc -N`), or it may be gone. Only the kernel
knows, and it does not say so by itself.
"""

from typing import Protocol

from regd.system.clock import Clock, Timer

CHECK_S = 2.0  # between two checks of one connection
_CHECKS_MAX = 128  # at a time
_SLICE_S = 0.002


class Waiter(Protocol):
    @property
    def is_waiting(self) -> bool:
        """Whether it is kept for a reply, and its peer's end would not be seen."""

    def is_gone(self) -> bool:
        """Ask the kernel whether nobody has the peer's end open any more."""

    def cut(self) -> None: ...


class HalfClosed:
    """Checks its connections every few seconds, in turn, and cuts those whose peer is gone."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._waiters: dict[Waiter, None] = {}
        self._timer: Timer | None = None

    def add(self, waiter: Waiter) -> None:
        """Check this one until it waits no more. Idempotent."""
        self._waiters.setdefault(waiter)
        if self._timer is None:
            self._check_later()

    def discard(self, waiter: Waiter) -> None:
        """Check this one no more. Idempotent."""
        self._waiters.pop(waiter, None)
        if not self._waiters:
            self.close()

    def close(self) -> None:
        """Check nothing any more. Idempotent."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _check_later(self) -> None:
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
                    self._waiters[waiter] = None  # behind the others
            if self._clock.now() > until:
                break
        if self._waiters:
            self._check_later()
