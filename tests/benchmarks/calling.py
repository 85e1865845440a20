"""Rows: resolve in a Python program, through a client library and from the local mirror."""

import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable
from typing import Any

from tests.benchmarks.bench import Bench, Rounds
from tests.benchmarks.figures import Bars, Goal, Report, Table, at_least, middle, number, ratio
from tests.benchmarks.generator import Measured, WrongReply
from tests.benchmarks.machine import LOAD_CORE, on_core
from tests.benchmarks.peers import Etcd, Nats, Redis
from tests.benchmarks.servers import Regd, RegdFast, Server
from tests.support.daemon import environment

# The server, the word for `caller`, and the module that must be installed.
CALLS: dict[str, tuple[type[Server], str, str]] = {
    "regd_client": (Regd, "regd", "regd_client"),
    "regd_client, regd fast": (RegdFast, "regd", "regd_client"),
    "redis.asyncio": (Redis, "redis", "redis"),
    "redis.asyncio with hiredis": (Redis, "hiredis", "hiredis"),
    "nats-py": (Nats, "nats", "nats"),
    "etcd by grpc.aio": (Etcd, "etcd", "grpc"),
}
TASKS = {"one task": 1, "50 tasks": 50}
_LEAVE_S = 60.0


def call(library: str, server: Server, **options: Any) -> Measured:
    words = [sys.executable, "-m", "tests.benchmarks.caller", library, str(server.port)]
    words += [f"--{key}={value}" for key, value in options.items()]
    with on_core(LOAD_CORE):
        done = subprocess.run(
            words, env=environment(), capture_output=True, text=True, timeout=_LEAVE_S, check=False
        )
    if done.returncode != 0:
        raise WrongReply(f"{library}: {done.stderr}")
    measured: Measured = json.loads(done.stdout)
    return measured


def remote(tasks: int) -> Callable[[Bench], Rounds]:
    def measure(bench: Bench) -> Rounds:
        kinds = list(dict.fromkeys(kind for kind, _, _ in CALLS.values()))
        with bench.running(kinds, names=1_000) as servers:
            by_kind = {type(server): server for server in servers}
            things = {}
            for what, (kind, library, module) in CALLS.items():
                if kind not in by_kind:
                    continue
                if importlib.util.find_spec(module) is None:
                    bench.skip(what, module)
                    continue
                things[what] = _repeated(bench, library, by_kind[kind], tasks)
            return bench.in_turn(things)

    return measure


def _repeated(bench: Bench, library: str, server: Server, tasks: int) -> Callable[[], Measured]:
    return lambda: call(library, server, tasks=tasks, warm=bench.warm_s, seconds=bench.seconds)


def tell_remote(tasks: int) -> Callable[[Rounds], Report]:
    row = "remote resolve in Python, " + ("one task" if tasks == 1 else f"{tasks} tasks")

    def tell(rounds: Rounds) -> Report:
        table = Table(["client", "a second", "ratio to redis.asyncio"])
        order = sorted(rounds, key=lambda what: -middle(rounds, what, "a_second"))
        for what in order:
            compared = str(ratio(rounds, what, "redis.asyncio", "a_second")) if "redis.asyncio" in rounds else ""
            table.lines.append([what, number(middle(rounds, what, "a_second")), compared])
        least = 1.0 if tasks == 1 else 4.0
        goals = [
            goal
            for what in ("regd_client", "regd_client, regd fast")
            for goal in at_least(rounds, what, least, "redis.asyncio", row)
        ]
        bars = [(what, middle(rounds, what, "a_second")) for what in order]
        mark = least * middle(rounds, "redis.asyncio", "a_second") if "redis.asyncio" in rounds else None
        return Report([table], goals, [Bars(row, "a second", bars, mark)])

    return tell


def local(bench: Bench) -> Rounds:
    with bench.running([Regd], names=1_000) as [server]:
        return bench.in_turn({"local": lambda: call("mirror", server, seconds=bench.seconds)})


def tell_local(rounds: Rounds) -> Report:
    mirror, cache = (middle(rounds, "local", key) for key in ("mirror_us", "cache_us"))
    table = Table(
        ["what", "µs"], [["mirror.resolve", number(mirror)], ["a dictionary with expiry", number(cache)]]
    )
    goal = Goal("local resolve from a mirror", f"{number(mirror)} µs", "≤ 1 µs", mirror <= 1)
    return Report([table], [goal])
