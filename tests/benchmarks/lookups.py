"""Rows: one name looked up, over 50 connections, by a server that holds 1,000 and more."""

from tests.benchmarks.bench import Bench, Rounds
from tests.benchmarks.figures import Bars, Goal, Table, Told, middle, number, ratio
from tests.benchmarks.generator import Measured
from tests.benchmarks.peers import Memcached, Redis
from tests.benchmarks.servers import Floor, Regd, RegdFast, Server

SERVERS: list[type[Server]] = [Floor, Regd, RegdFast, Redis, Memcached]
SIZES = (1_000, 10_000, 100_000)
CONNECTIONS = 50


def ask(bench: Bench, depth: int) -> Rounds:
    def measure(server: Server) -> Measured:
        return bench.load.run(
            server, depth=depth, connections=CONNECTIONS, warm=bench.warm, seconds=bench.seconds
        )

    with bench.running(SERVERS, names=SIZES[0]) as servers:
        return bench.in_turn(servers, measure)


def table(rounds: Rounds, to: str) -> Table:
    found = Table(
        [
            "server",
            "a second",
            f"ratio to {to}",
            "p50 µs",
            "p99 µs",
            "its core is busy",
            "the load's core is busy",
        ]
    )
    for what in sorted(rounds, key=lambda what: -middle(rounds, what, "a_second")):
        figures = [
            middle(rounds, what, key) for key in ("a_second", "p50_us", "p99_us", "server_share", "load_share")
        ]
        compared = str(ratio(rounds, what, to, "a_second")) if to in rounds else ""
        rate, p50, p99, server, load = figures
        found.lines.append(
            [what, number(rate), compared, number(p50), number(p99), f"{server:.0%}", f"{load:.0%}"]
        )
    return found


def bars(rounds: Rounds, title: str, mark: str | None = None, part: float = 1.0) -> Bars:
    rates = sorted(((what, middle(rounds, what, "a_second")) for what in rounds), key=lambda bar: -bar[1])
    return Bars(title, "a second", rates, dict(rates)[mark] * part if mark in rounds else None)


def at_least(rounds: Rounds, what: str, to: str, least: float, row: str) -> list[Goal]:
    """The goal of being so many times as fast as another."""
    if what not in rounds or to not in rounds:
        return []
    found = ratio(rounds, what, to, "a_second")
    return [Goal(f"{row}: {what}", f"{found} × {to}", f"≥ {least:g} × {to}", found.middle >= least)]


def one_at_a_time(bench: Bench) -> Rounds:
    return ask(bench, 1)


def tell_one_at_a_time(rounds: Rounds) -> Told:
    row = "resolve, one at a time"
    goals = at_least(rounds, "regd", "Redis", 0.85, row) + at_least(rounds, "regd, fast", "Redis", 1.05, row)
    return Told([table(rounds, "Redis")], goals, [bars(rounds, "resolve, one at a time", "Redis")])


def sixteen_deep(bench: Bench) -> Rounds:
    return ask(bench, 16)


def tell_sixteen_deep(rounds: Rounds) -> Told:
    row = "resolve, 16 deep"
    goals = at_least(rounds, "regd", "Redis", 1.2, row) + at_least(rounds, "regd, fast", "Redis", 1.2, row)
    return Told([table(rounds, "Redis")], goals, [bars(rounds, "resolve, 16 deep", "Redis", 1.2)])
