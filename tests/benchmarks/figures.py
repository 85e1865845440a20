"""From rounds to figures: medians, and ratios that are taken within a round. And what a row tells of them."""

import statistics
from dataclasses import dataclass, field
from typing import NamedTuple

from tests.benchmarks.bench import Rounds


class Ratio(NamedTuple):
    """A median, and the lowest and highest round."""

    middle: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.middle:.2f} ({self.low:.2f}–{self.high:.2f})"


def middle(rounds: Rounds, what: str, key: str) -> float:
    return statistics.median(each[key] for each in rounds[what])


def ratio(rounds: Rounds, what: str, to: str, key: str) -> Ratio:
    """Compare within each round, then take the median: what slows the machine down for a while slows both."""
    each = [one[key] / other[key] for one, other in zip(rounds[what], rounds[to], strict=True)]
    return Ratio(statistics.median(each), min(each), max(each))


@dataclass
class Goal:
    """One figure, and what is to be reached."""

    what: str
    measured: str
    to_reach: str
    reached: bool


@dataclass
class Table:
    head: list[str]
    lines: list[list[str]] = field(default_factory=list)


@dataclass
class Bars:
    """A part of the plot: what each bar is and how long, and where a mark stands."""

    title: str
    unit: str
    bars: list[tuple[str, float]]
    mark: float | None = None


@dataclass
class Told:
    tables: list[Table]
    goals: list[Goal]
    bars: list[Bars] = field(default_factory=list)


def number(value: float) -> str:
    """Three digits are all that rounds agree on."""
    if value >= 1_000:
        digits = max(len(f"{value:.0f}") - 3, 0)
        return f"{round(value / 10**digits) * 10**digits:,}"
    return f"{value:.3g}"
