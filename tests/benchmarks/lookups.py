"""Rows: resolve over 50 connections, with 1 and with 16 requests at a time, among 1,000 names and more."""

from tests.benchmarks.bench import Bench, Rounds
from tests.benchmarks.figures import Bars, Goal, Report, Table, at_least, by_rate, middle, number, rates, ratio
from tests.benchmarks.peers import Epmd, Etcd, Memcached, Nats, Redis, Zookeeper
from tests.benchmarks.servers import Floor, Regd, RegdFast, Server

SERVERS: list[type[Server]] = [Floor, Regd, RegdFast, Redis, Memcached, Zookeeper, Nats, Etcd]
SIZES = (1_000, 10_000, 100_000)
NEW = "{}, not asked for before"


def one_at_a_time(bench: Bench) -> Rounds:
    with bench.running([*SERVERS, Epmd], names=SIZES[0]) as servers:
        return bench.in_turn({server.label: bench.ask(server) for server in servers})


def tell_one_at_a_time(rounds: Rounds) -> Report:
    row = "resolve, one at a time"
    goals = at_least(rounds, "regd", 0.75, "Redis", row) + at_least(rounds, "regd, fast", 0.95, "Redis", row)
    return Report([by_rate(rounds, "Redis")], goals, [rates(rounds, row, "Redis")])


def sixteen_deep(bench: Bench) -> Rounds:
    with bench.running(SERVERS, names=SIZES[0]) as servers:
        return bench.in_turn({server.label: bench.ask(server, depth=16) for server in servers})


def tell_sixteen_deep(rounds: Rounds) -> Report:
    row = "resolve, 16 deep"
    goals = at_least(rounds, "regd", 1.15, "Redis", row) + at_least(rounds, "regd, fast", 1.3, "Redis", row)
    return Report([by_rate(rounds, "Redis")], goals, [rates(rounds, row, "Redis", 1.2)])


def among(label: str, size: int) -> str:
    return f"{label}, {size:,}"


def among_many(bench: Bench) -> Rounds:
    """Measure lookups of known names in every round; once, with the largest size, first lookups of names."""
    kinds = [Regd, RegdFast, Redis]
    with bench.running(kinds * len(SIZES), names=[size for size in SIZES for _ in kinds]) as servers:
        sizes = [size for size in SIZES for _ in range(len(servers) // len(SIZES))]
        held = list(zip(servers, sizes, strict=True))
        first = {
            NEW.format(server.label): [bench.load.run(server, names=size, once=True)]
            for server, size in held
            if size == SIZES[-1]
        }
        again = {among(server.label, size): bench.ask(server, names=size) for server, size in held}
        return first | bench.in_turn(again)


def tell_among_many(rounds: Rounds) -> Report:
    head = ["server", *(f"{size:,} names" for size in SIZES), *(f"{size:,} : 1,000" for size in SIZES[1:])]
    table = Table([*head, f"{SIZES[-1]:,}, each for the first time"])
    goals: list[Goal] = []
    bars: list[tuple[str, float]] = []
    for label in ("regd", "regd, fast", "Redis"):
        if among(label, SIZES[0]) not in rounds:
            continue
        speeds = [middle(rounds, among(label, size), "a_second") for size in SIZES]
        slower = [ratio(rounds, among(label, size), among(label, SIZES[0]), "a_second") for size in SIZES[1:]]
        first = middle(rounds, NEW.format(label), "a_second")
        table.lines.append([label, *map(number, speeds), *map(str, slower), number(first)])
        bars += [(among(label, size), speed) for size, speed in zip(SIZES, speeds, strict=True)]
        if label != "Redis":
            goals += [
                Goal(
                    f"resolve among {size:,} names: {label}",
                    f"{part} × at 1,000",
                    "≥ 0.9 × at 1,000",
                    part.middle >= 0.9,
                )
                for size, part in zip(SIZES[1:], slower, strict=True)
            ]
    return Report([table], goals, [Bars("resolve among many names", "a second", bars)])
