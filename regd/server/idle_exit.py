"""Ends a daemon that was started on demand once it was idle for some time."""

from collections.abc import Callable, Hashable

from regd.system.clock import Clock

_CHECKS = 60  # so many checks in a row must find the daemon idle


class IdleExit:
    """Calls `exit` once the daemon was idle for `after_s` seconds, or up to a sixtieth more.

    `idle_mark` returns None while the daemon is in use, else a value that differs if it was used since the last
    call. Checks are counted instead of seconds, so that time in which the process was stopped, and no client
    could reach it, counts as one check. `exit` is called within the last check, so no client can connect in
    between.
    """

    def __init__(
        self, clock: Clock, after_s: float, idle_mark: Callable[[], Hashable | None], exit: Callable[[], None]
    ) -> None:
        self._clock = clock
        self._interval_s = after_s / _CHECKS
        self._idle_mark = idle_mark
        self._exit = exit
        self._mark: Hashable | None = None
        self._idle_checks = 0
        self._closed = False

    def start(self) -> None:
        self._clock.call_at(self._clock.now() + self._interval_s, self._check)

    def close(self) -> None:
        """Check no more. Idempotent."""
        self._closed = True

    def _check(self) -> None:
        if self._closed:
            return
        previous, self._mark = self._mark, self._idle_mark()
        is_idle = self._mark is not None and self._mark == previous
        self._idle_checks = self._idle_checks + 1 if is_idle else 0
        if self._idle_checks >= _CHECKS:
            self._closed = True
            self._exit()
        else:
            self.start()
