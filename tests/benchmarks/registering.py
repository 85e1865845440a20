"""Rows: durable registrations, over 50 connections, and one at a time on one connection."""

import json
import subprocess
from collections.abc import Callable

from tests.benchmarks.bench import Bench, Rounds
from tests.benchmarks.figures import Report, Table, at_least, at_most, by_rate, middle, number, rates
from tests.benchmarks.generator import Measured
from tests.benchmarks.machine import SERVER_CORE, on_core
from tests.benchmarks.peers import Etcd, Nats, Redis, Zookeeper
from tests.benchmarks.servers import Regd, RegdFast, Server

SERVERS: list[type[Server]] = [Regd, RegdFast, Redis, Zookeeper, Etcd, Nats]
BARE, PING = "the bare sequence", "a ping to {}"


def among(size: int) -> Callable[[Bench], Rounds]:
    """Return a function that measures registrations over 50 connections among `size` names.

    It reads the last registrations back and compares them.
    """

    def measure(bench: Bench) -> Rounds:
        with bench.running(SERVERS, durable=True, names=size) as servers:
            return bench.in_turn(
                {server.label: bench.ask(server, work="write", names=size, verify=2_000) for server in servers}
            )

    return measure


def tell_among(size: int) -> Callable[[Rounds], Report]:
    row = f"register among {size:,}"

    def tell(rounds: Rounds) -> Report:
        goals = at_least(rounds, "regd", 1.5, "etcd", row) + at_least(rounds, "regd", 0.8, "ZooKeeper", row)
        return Report([by_rate(rounds, "Redis")], goals, [rates(rounds, row, "etcd", 1.5)])

    return tell


def one_after_the_other(bench: Bench) -> Rounds:
    """Measure a bare append and sync, a ping, and a registration, in each round."""
    with bench.running(SERVERS, durable=True, names=1_000) as servers:
        things = {}
        for server in servers:
            if isinstance(server, Regd):
                things[PING.format(server.label)] = bench.ask(server, work="ping", connections=1)
                if BARE not in things:
                    things[BARE] = _bare(bench)
            things[server.label] = bench.ask(server, work="write", connections=1, verify=1_000)
        return bench.in_turn(things)


def _bare(bench: Bench) -> Callable[[], Measured]:
    """Return a function that measures the bare sequence, in a new file each time."""
    program = str(bench.load.folder / "bare")

    def measure() -> Measured:
        with on_core(SERVER_CORE):
            words = [program, str(bench.place()), f"--warm={bench.warm_s}", f"--seconds={bench.seconds}"]
            done = subprocess.run(words, capture_output=True, text=True, check=True)
        measured: Measured = json.loads(done.stdout)
        return measured

    return measure


def tell_one_after_the_other(rounds: Rounds) -> Report:
    table = Table(["what", "p50 µs", "p99 µs", "a second"])
    for what in sorted(rounds, key=lambda what: middle(rounds, what, "p50_us")):
        table.lines.append(
            [what, *(number(middle(rounds, what, key)) for key in ("p50_us", "p99_us", "a_second"))]
        )
    goals = [
        goal
        for label in ("regd", "regd, fast")
        for goal in at_most(rounds, label, 1.2, "etcd", f"one register on one connection, p50: {label}", "p50_us")
    ]
    return Report([table], goals)
