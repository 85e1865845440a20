"""How much a daemon does: figures from the differences of its counters.

Whoever answers may be no regd, so each figure may be missing. Must not know a terminal or a clock: time is the
daemon's own.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_SAMPLES = 6  # the figures are over so many, so that they can be read


@dataclass(frozen=True, slots=True)
class Figures:
    """Requests and changes a second; None: not known yet. What asks for `stats` is not counted: that is us."""

    requests: float | None = None
    changes: float | None = None
    lag_s: float | None = None
    lag_s_max: float | None = None
    connections: float | None = None
    uptime_s: float | None = None


def _number(fields: Mapping[str, Any], name: str) -> float | None:
    found = fields.get(name)
    return float(found) if isinstance(found, int | float) else None


class Rates:
    """Takes each reply to `stats`, and has the figures of the last few."""

    def __init__(self) -> None:
        self.figures = Figures()
        self._samples: deque[tuple[float, float, float]] = deque(maxlen=_SAMPLES)  # time, requests, changes
        self._epoch: object = None

    def take(self, stats: Mapping[str, Any]) -> None:
        if stats.get("epoch") != self._epoch:  # another life of the daemon, whose counters began again
            self._epoch = stats.get("epoch")
            self._samples.clear()
        uptime_s, requests = _number(stats, "uptime_s"), stats.get("requests")
        if uptime_s is not None and isinstance(requests, dict):
            asked = sum(_number(requests, name) or 0.0 for name in requests if name != "stats")
            self._samples.append((uptime_s, asked, _number(stats, "changes") or 0.0))
        per_s = self._per_second()
        self.figures = Figures(
            *per_s,
            _number(stats, "lag_s"),
            _number(stats, "lag_max_s"),
            _number(stats, "connections"),
            uptime_s,
        )

    def _per_second(self) -> tuple[float | None, float | None]:
        if len(self._samples) < 2:
            return None, None
        first, last = self._samples[0], self._samples[-1]
        took_s = last[0] - first[0]
        if took_s <= 0:
            return None, None
        return (last[1] - first[1]) / took_s, (last[2] - first[2]) / took_s
