"""What is told of a run, in Markdown: the part of `regd/BENCHMARKS.md` between its markers."""

from pathlib import Path

from tests.benchmarks.figures import Goal, Table, Told, ratio
from tests.benchmarks.results import Results
from tests.benchmarks.rows import ROWS
from tests.support.daemon import ROOT

PAGE = ROOT / "regd" / "BENCHMARKS.md"
PLOT = ROOT / "regd" / "benchmarks.svg"
BEGIN, END = "<!-- begin: written by make bench -->\n", "<!-- end: written by make bench -->\n"


def _table(table: Table) -> str:
    lines = [table.head, ["---"] + ["---:"] * (len(table.head) - 1), *table.lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def _goals(found: list[Goal]) -> str:
    table = Table(["work", "measured", "to reach", "reached"])
    table.lines = [
        [goal.what, goal.measured, goal.to_reach, "yes" if goal.reached else "**no**"] for goal in found
    ]
    return _table(table)


def row_text(told: Told) -> str:
    return "\n".join([*map(_table, told.tables), *([_goals(told.goals)] if told.goals else [])])


def _compared(results: Results, row: str, what: str, to: str) -> str:
    rounds = results.rows.get(row, {})
    if what not in rounds or to not in rounds:
        return "(not measured)"
    return f"{ratio(rounds, what, to, 'a_second').middle:.2f}"


def summary(results: Results, goals: list[Goal]) -> str:
    """Say in three sentences what the page says."""

    def pair(row: str, to: str) -> str:
        return f"{_compared(results, row, 'regd', to)} ({_compared(results, row, 'regd, fast', to)})"

    client = [_compared(results, f"client{tasks}", "regd_client", "redis.asyncio") for tasks in (1, 50)]
    reached = sum(goal.reached for goal in goals)
    return (
        f"regd on asyncio's own loop (with `fast` in brackets) looks a name up {pair('resolve', 'Redis')} times as "
        f"often a second as Redis when 50 connections ask one at a time, {pair('resolve16', 'Redis')} times when "
        f"they ask 16 deep, and through the Python clients {client[0]} times from one task and {client[1]} from 50. "
        f"It makes {pair('register1k', 'etcd')} times as many durable registrations a second as etcd among 1,000 of "
        f"them, {pair('register10k', 'etcd')} among 10,000 and {pair('register100k', 'etcd')} among 100,000. "
        f"Of {len(goals)} figures to reach, {reached} are reached.\n"
    )


def generated(results: Results) -> str:
    told = {row: row.tell(results.rows[row.word]) for row in ROWS if row.word in results.rows}
    goals = [goal for each in told.values() for goal in each.goals]
    machine = "; ".join(f"{key}: {value}" for key, value in results.machine.items())
    parts = [
        summary(results, goals),
        f"Measured on {results.day}, in {results.rounds} rounds. {machine}.\n",
        *(f"Left out, {word}.\n" for word in results.left_out),
        f"![The rows as bars]({PLOT.name})\n",
        "## To reach\n",
        _goals(goals),
        "## All figures\n",
    ]
    for row, each in told.items():
        parts += [f"### {row.title}\n", *map(_table, each.tables)]
    return "\n".join(parts)


def write(results: Results, page: Path = PAGE) -> None:
    """Put what a run has found between the markers; what stands around them stays."""
    text = page.read_text()
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    page.write_text(f"{before}{BEGIN}\n{generated(results)}\n{END}{after}")
