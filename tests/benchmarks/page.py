"""The results of a run as Markdown: the marked parts of `regd/BENCHMARKS.md` and of this folder's README."""

from pathlib import Path

from tests.benchmarks.figures import Goal, Report, Table, middle, number, ratio
from tests.benchmarks.results import Results
from tests.benchmarks.rows import ROWS
from tests.support.daemon import ROOT

PAGE = ROOT / "regd" / "BENCHMARKS.md"
TARGETS = Path(__file__).parent / "README.md"
PLOT = ROOT / "regd" / "benchmarks.svg"
BEGIN, END = "<!-- begin: written by make bench -->\n", "<!-- end: written by make bench -->\n"

_SERVERS = ("regd", "regd, fast", "Redis", "etcd", "ZooKeeper", "NATS")
_CLIENTS = {
    "regd": "regd_client",
    "regd, fast": "regd_client, regd fast",
    "Redis": "redis.asyncio",
    "etcd": "etcd by grpc.aio",
    "NATS": "nats-py",
}
# The lines of the first table: title, row, and key of the figure.
_LINES = (
    ("lookups a second, 50 connections", "resolve", "a_second"),
    ("the same, 16 requests at a time", "resolve16", "a_second"),
    ("durable registrations a second, among 1,000", "register1k", "a_second"),
    ("the same, among 10,000", "register10k", "a_second"),
    ("the same, among 100,000", "register100k", "a_second"),
    ("one durable registration, µs", "single", "p50_us"),
    ("from a change to its watcher, µs", "watch1", "p50_us"),
    ("the same, 1,000 watchers, µs", "watch1000", "p50_us"),
    ("lookups a second from Python, one task", "client1", "a_second"),
    ("the same, 50 tasks", "client50", "a_second"),
    ("memory for 100,000 registrations, MB", "memory", "full"),
)


def _table(table: Table) -> str:
    lines = [table.head, ["---"] + ["---:"] * (len(table.head) - 1), *table.lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def _goals(goals: list[Goal]) -> str:
    table = Table(["work", "measured", "target", "reached"])
    table.lines = [
        [goal.what, goal.measured, goal.to_reach, "yes" if goal.reached else "**no**"] for goal in goals
    ]
    return _table(table)


def row_text(told: Report) -> str:
    return "\n".join([*map(_table, told.tables), *([_goals(told.goals)] if told.goals else [])])


def _figure(results: Results, row: str, server: str, key: str) -> str:
    rounds = results.rows.get(row, {})
    return number(middle(rounds, server, key)) if server in rounds else "–"


def _ratio(results: Results, row: str, server: str, to: str) -> str:
    rounds = results.rows.get(row, {})
    if server not in rounds or to not in rounds:
        return "–"
    return f"{ratio(rounds, server, to, 'a_second').middle:.2f}"


def summary(results: Results) -> str:
    """Return the three sentences at the start of the page."""

    def figure(row: str, server: str = "regd") -> str:
        return _figure(results, row, server, "a_second")

    def compared(row: str, to: str, server: str = "regd") -> str:
        return _ratio(results, row, server, to)

    one, many = (compared(row, "redis.asyncio", "regd_client") for row in ("client1", "client50"))
    return (
        f"On one core, regd answers {figure('resolve')} lookups a second over 50 connections, "
        f"{compared('resolve', 'Redis')} times as many as Redis; with uvloop it answers "
        f"{figure('resolve', 'regd, fast')}, {compared('resolve', 'Redis', 'regd, fast')} times as many. "
        f"It makes {figure('register1k')} durable registrations a second among 1,000 registrations, "
        f"{compared('register1k', 'etcd')} times as many as etcd, and {figure('register100k')} among 100,000, "
        f"{compared('register100k', 'etcd')} times as many. "
        f"A Python program makes {figure('client1', 'regd_client')} lookups a second from one task and "
        f"{figure('client50', 'regd_client')} from 50, {one} and {many} times as many as with redis.asyncio.\n"
    )


def _overview(results: Results) -> str:
    table = Table(["", *_SERVERS])
    for what, row, key in _LINES:
        names = [_CLIENTS.get(server, "") if row.startswith("client") else server for server in _SERVERS]
        table.lines.append([what, *(_figure(results, row, name, key) for name in names)])
    return _table(table)


def _told(results: Results) -> list[tuple[str, Report]]:
    return [(row.title, row.tell(results.rows[row.word])) for row in ROWS if row.word in results.rows]


def generated(results: Results) -> str:
    """Return the generated part of BENCHMARKS.md."""
    machine = "; ".join(f"{key}: {value}" for key, value in results.machine.items())
    parts = [
        summary(results),
        _overview(results),
        f"Measured on {results.day}, in {results.rounds} rounds. {machine}.\n",
        *(f"Left out, {word}.\n" for word in results.left_out),
        f"![The rows as bars]({PLOT.name})\n",
        "## All figures\n",
    ]
    for title, told in _told(results):
        parts += [f"### {title}\n", *map(_table, told.tables)]
    return "\n".join(parts)


def targets(results: Results) -> str:
    """Return the generated part of this folder's README: the targets, and whether they are reached."""
    goals = [goal for _, told in _told(results) for goal in told.goals]
    reached = sum(goal.reached for goal in goals)
    return f"In the run of {results.day}, {reached} of {len(goals)} targets are reached.\n\n{_goals(goals)}"


def _replace(page: Path, text: str) -> None:
    """Replace what is between the markers of a page."""
    before, after = page.read_text().split(BEGIN)[0], page.read_text().split(END)[1]
    page.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}")


def write(results: Results, page: Path = PAGE, readme: Path = TARGETS) -> None:
    """Write the results of a run into both pages."""
    _replace(page, generated(results))
    _replace(readme, targets(results))
