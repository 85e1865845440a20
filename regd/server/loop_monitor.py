"""Measures for `stats` how late the event loop's timers run, and which work has blocked the loop longest."""

from regd.system.clock import Clock, Timer

_MEASURE_EVERY_S = 1.0


class LoopMonitor:
    """Runs a timer every second. `lag_s` is how late its last call was, `lag_max_s` the most since the start."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._timer: Timer | None = None
        self.lag_s = 0.0
        self.lag_max_s = 0.0
        self.slowest_s = 0.0
        self._slowest = ""
        self._slowest_at = 0.0

    def start(self) -> None:
        due = self._clock.now() + _MEASURE_EVERY_S
        self._timer = self._clock.call_at(due, lambda: self._measure_lag(due))

    def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def _measure_lag(self, due: float) -> None:
        self.lag_s = max(0.0, self._clock.now() - due)
        self.lag_max_s = max(self.lag_max_s, self.lag_s)
        self.start()

    def record(self, what: str, began: float) -> float:
        """Record that the work `what` has blocked the loop since `began`. Return the current time."""
        now = self._clock.now()
        if now - began > self.slowest_s:
            self.slowest_s, self._slowest, self._slowest_at = now - began, what, now
        return now

    def stats(self) -> dict[str, object]:
        """Return the fields for `stats`."""
        slowest: dict[str, object] | None = None
        if self._slowest:
            age_s = round(self._clock.now() - self._slowest_at, 3)
            slowest = {"what": self._slowest, "took_s": round(self.slowest_s, 6), "age_s": age_s}
        return {"lag_s": round(self.lag_s, 6), "lag_max_s": round(self.lag_max_s, 6), "slowest": slowest}
