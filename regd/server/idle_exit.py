"""Whether anybody needs the daemon: one that was started on demand ends when nobody has for a while.

Must not know what a registration or a connection is, nor how the daemon ends.
"""

from collections.abc import Callable, Hashable

from regd.system.clock import Clock

_LOOKS = 8  # that must find it quiet, one after the other


class IdleExit:
    """`quiet` returns None while somebody needs the daemon, else a mark that is another one when somebody was
    there meanwhile. `over` is called once, in the moment in which the last look has found it quiet.

    Looks are counted, not seconds: time in which the daemon did not run, and nobody could reach it, is one look.
    It is over between `after_s` and an eighth more after whoever was the last has gone.
    """

    def __init__(
        self, clock: Clock, after_s: float, quiet: Callable[[], Hashable | None], over: Callable[[], None]
    ) -> None:
        self._clock = clock
        self._step_s = after_s / _LOOKS
        self._quiet = quiet
        self._over = over
        self._mark: Hashable | None = None
        self._looks = 0
        self._closed = False

    def start(self) -> None:
        self._clock.call_at(self._clock.now() + self._step_s, self._look)

    def close(self) -> None:
        self._closed = True

    def _look(self) -> None:
        if self._closed:
            return
        before, self._mark = self._mark, self._quiet()
        self._looks = self._looks + 1 if self._mark is not None and self._mark == before else 0
        if self._looks >= _LOOKS:
            self._closed = True
            self._over()
        else:
            self.start()
