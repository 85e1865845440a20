"""The rates of requests and changes, computed from successive replies to `stats`.

The clock is the daemon's uptime. A figure is None if it is missing in the reply.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_SAMPLES = 6  # the number of replies over which rates are averaged


@dataclass(frozen=True, slots=True)
class Figures:
    """The figures at the top of `regctl top`.

    `requests` and `changes` are per second. `stats` requests are left out, since regctl itself sends them.
    """

    requests: float | None = None
    changes: float | None = None
    lag_s: float | None = None
    lag_s_max: float | None = None
    connections: float | None = None
    uptime_s: float | None = None


def _number(fields: Mapping[str, Any], name: str) -> float | None:
    value = fields.get(name)
    return float(value) if isinstance(value, int | float) else None


class Rates:
    """Computes the figures from the last replies to `stats`."""

    def __init__(self) -> None:
        self.figures = Figures()
        self._samples: deque[tuple[float, float, float]] = deque(maxlen=_SAMPLES)  # time, requests, changes
        self._epoch: object = None

    def take(self, stats: Mapping[str, Any]) -> None:
        if stats.get("epoch") != self._epoch:  # the daemon was restarted, so its counters start at 0 again
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
