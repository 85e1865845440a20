"""Medians of rounds, ratios within rounds, and the tables, targets and bars of a row."""

import statistics
from dataclasses import dataclass, field
from typing import NamedTuple

from tests.benchmarks.bench import Rounds


class Ratio(NamedTuple):
    """The median of all rounds, the lowest and the highest."""

    middle: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.middle:.2f} ({self.low:.2f}–{self.high:.2f})"


def middle(rounds: Rounds, what: str, key: str) -> float:
    return statistics.median(sample[key] for sample in rounds[what])


def ratio(rounds: Rounds, what: str, to: str, key: str) -> Ratio:
    """Return the median of the ratios within each round, so that a slow phase of the machine affects both sides."""
    ratios = [one[key] / other[key] for one, other in zip(rounds[what], rounds[to], strict=True)]
    return Ratio(statistics.median(ratios), min(ratios), max(ratios))


@dataclass
class Goal:
    """A figure and its target."""

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
    """A panel of the plot: its bars by name, and an optional mark."""

    title: str
    unit: str
    bars: list[tuple[str, float]]
    mark: float | None = None


@dataclass
class Report:
    tables: list[Table]
    goals: list[Goal]
    bars: list[Bars] = field(default_factory=list)


def number(value: float) -> str:
    """Format a figure with three significant digits."""
    if value >= 999.5:
        digits = max(len(f"{value:.0f}") - 3, 0)
        return f"{round(value / 10**digits) * 10**digits:,}"
    return f"{value:.3g}"


def by_rate(rounds: Rounds, to: str) -> Table:
    """Return a table of servers, fastest first."""
    head = [
        "server",
        "a second",
        f"ratio to {to}",
        "p50 µs",
        "p99 µs",
        "server core busy",
        "load core busy",
    ]
    table = Table(head)
    for what in sorted(rounds, key=lambda what: -middle(rounds, what, "a_second")):
        rate, p50, p99, server, load = (
            middle(rounds, what, key) for key in ("a_second", "p50_us", "p99_us", "server_share", "load_share")
        )
        compared = str(ratio(rounds, what, to, "a_second")) if to in rounds else ""
        table.lines.append(
            [what, number(rate), compared, number(p50), number(p99), f"{server:.0%}", f"{load:.0%}"]
        )
    return table


def rates(rounds: Rounds, title: str, mark: str, part: float = 1.0) -> Bars:
    ordered = sorted(((what, middle(rounds, what, "a_second")) for what in rounds), key=lambda bar: -bar[1])
    return Bars(title, "a second", ordered, dict(ordered)[mark] * part if mark in rounds else None)


def at_least(rounds: Rounds, what: str, least: float, to: str, row: str) -> list[Goal]:
    """Return the target of a ratio to another server; empty if one of the two was left out."""
    if what not in rounds or to not in rounds:
        return []
    measured = ratio(rounds, what, to, "a_second")
    return [Goal(f"{row}: {what}", f"{measured} × {to}", f"≥ {least:g} × {to}", measured.middle >= least)]


def at_most(rounds: Rounds, what: str, most: float, to: str, title: str, key: str) -> list[Goal]:
    """Return the target of a time in proportion to another server's; empty if one of the two was left out."""
    if what not in rounds or to not in rounds:
        return []
    measured = ratio(rounds, what, to, key)
    return [Goal(title, f"{measured} × {to}", f"≤ {most:g} × {to}", measured.middle <= most)]
