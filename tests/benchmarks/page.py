"""What is told of the rows, as text in Markdown."""

from tests.benchmarks.figures import Goal, Table, Told


def _table(table: Table) -> str:
    lines = [table.head, ["---"] + ["---:"] * (len(table.head) - 1), *table.lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def goals(found: list[Goal]) -> str:
    head = Table(["work", "measured", "to reach", ""])
    head.lines = [[goal.what, goal.measured, goal.to_reach, "✓" if goal.reached else "✗"] for goal in found]
    return _table(head)


def tables(told: Told) -> str:
    return "\n".join(["", *map(_table, told.tables), *([goals(told.goals)] if told.goals else [])])
