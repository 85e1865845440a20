"""Rows: durable registrations, over 50 connections, and one at a time on one connection."""

import json
import shutil
import statistics
import subprocess
from collections.abc import Callable

from tests.benchmarks.bench import Bench, Rounds
from tests.benchmarks.figures import Goal, Report, Table, at_least, by_rate, middle, number, rates
from tests.benchmarks.generator import Measured
from tests.benchmarks.machine import SERVER_CORE, on_core
from tests.benchmarks.peers import Etcd, Nats, Redis, Zookeeper
from tests.benchmarks.servers import Regd, RegdFast, Server

SERVERS: list[type[Server]] = [Regd, RegdFast, Redis, Zookeeper, Etcd, Nats]
BARE, PING = "the bare sequence", "a ping to {}"
_MORE_US = 200


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
        goals = []
        if size == 1_000:
            goals += at_least(rounds, "regd", 2.0, "etcd", row) + at_least(rounds, "regd", 1.0, "ZooKeeper", row)
        if size == 10_000:
            goals += at_least(rounds, "regd", 1.0, "etcd", row)
        return Report(
            [by_rate(rounds, "Redis")], goals, [rates(rounds, row, "etcd", 2.0 if size == 1_000 else 1.0)]
        )

    return tell


def one_after_the_other(bench: Bench) -> Rounds:
    """Measure a bare write and sync of as many bytes as regd's file has, a ping, and a registration, in each round."""
    with bench.running(SERVERS, durable=True, names=1_000) as servers:
        things = {}
        for server in servers:
            if isinstance(server, Regd):
                things[PING.format(server.label)] = bench.ask(server, work="ping", connections=1)
                if BARE not in things:
                    things[BARE] = _bare(bench, server)
            things[server.label] = bench.ask(server, work="write", connections=1, verify=1_000)
        return bench.in_turn(things)


def _bare(bench: Bench, server: Regd) -> Callable[[], Measured]:
    folder = bench.place()
    folder.mkdir()
    copy = shutil.copy(server.registry, folder)
    words = [str(bench.load.folder / "bare"), copy, f"--warm={bench.warm_s}", f"--seconds={bench.seconds}"]

    def measure() -> Measured:
        with on_core(SERVER_CORE):
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
    goals = []
    for key, what in (("p50_us", "p50"), ("p99_us", "p99")):
        for label in ("regd", "regd, fast"):
            # Compared within a round.
            allowed = [1.5 * bare[key] + _MORE_US for bare in rounds[BARE]]
            beyond = [took[key] - most for took, most in zip(rounds[label], allowed, strict=True)]
            goals.append(
                Goal(
                    f"one register on one connection, {what}: {label}",
                    f"{number(middle(rounds, label, key))} µs",
                    f"≤ 1.5 × bare + 0.2 ms = {number(statistics.median(allowed))} µs",
                    statistics.median(beyond) <= 0,
                )
            )
    return Report([table], goals)
