"""Rows: time to start with 100,000 registrations, memory for them and for 5,000 connections, and the time of a whole
`regctl` process."""

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from tests.benchmarks.bench import Bench, Rounds
from tests.benchmarks.figures import Goal, Report, Table, middle, number, ratio
from tests.benchmarks.generator import Measured
from tests.benchmarks.machine import LOAD_CORE, on_core
from tests.benchmarks.peers import Etcd, Memcached, Nats, Redis, Zookeeper
from tests.benchmarks.servers import Regd, RegdFast, Server
from tests.support.daemon import environment

MANY, IDLE = 100_000, 5_000
MB = 1e6
_RUNS = 20


def start(bench: Bench) -> Rounds:
    """Measure the time from exec to the `listening` line, and the memory at that time."""
    with bench.running([Regd, RegdFast], names=MANY) as servers:

        def again(server: Server) -> Callable[[], Measured]:
            def measure() -> Measured:
                server.end()
                began = time.perf_counter()
                server.start()
                return {"seconds": time.perf_counter() - began, "resident": server.resident_bytes / MB}

            return measure

        return bench.in_turn({server.label: again(server) for server in servers})


def tell_start(rounds: Rounds) -> Report:
    table = Table(["server", "seconds until it listens", "MB then"])
    goals = []
    for what in rounds:
        took = middle(rounds, what, "seconds")
        table.lines.append([what, number(took), number(middle(rounds, what, "resident"))])
        goals.append(Goal(f"start with {MANY:,} registrations: {what}", f"{number(took)} s", "≤ 1 s", took <= 1))
    return Report([table], goals)


def memory(bench: Bench) -> Rounds:
    """Measure memory empty, with all registrations, and with connections that have sent a request. One round."""
    rounds: Rounds = {}
    for kind in (Regd, RegdFast, Redis, Memcached, Etcd, Nats, Zookeeper):
        with bench.running([kind], durable=True) as servers:
            for server in servers:
                empty = server.resident_bytes
                bench.load.fill(server, MANY)
                full = server.resident_bytes
                measured = {"empty": empty / MB, "full": (full - empty) / MB}
                rounds[server.label] = [measured]
        if kind.connections_max < IDLE:
            continue
        with bench.running([kind], names=IDLE) as servers:
            for server in servers:
                before = server.resident_bytes
                bench.load.hold(server, IDLE)
                rounds[server.label][0]["each_kb"] = (server.resident_bytes - before) / IDLE / 1e3
    return rounds


def tell_memory(rounds: Rounds) -> Report:
    table = Table(
        ["server", "MB empty", f"MB for {MANY:,} registrations", f"KB for each of {IDLE:,} connections"]
    )
    goals = []
    for what, [measured] in rounds.items():
        each = number(measured["each_kb"]) if "each_kb" in measured else "fewer allowed"
        table.lines.append([what, number(measured["empty"]), number(measured["full"]), each])
        if what.startswith("regd"):
            full, each_kb = measured["full"], measured["each_kb"]
            goals += [
                Goal(f"memory for {MANY:,} registrations: {what}", f"{number(full)} MB", "≤ 100 MB", full <= 100),
                Goal(f"memory for an idle connection: {what}", f"{number(each_kb)} KB", "≤ 5 KB", each_kb <= 5),
            ]
    return Report([table], goals)


def command(bench: Bench) -> Rounds:
    """Measure whole processes, one after the other. Each round is the median of 20."""
    python, script = sys.executable, str(Path(sys.executable).parent / "regctl")
    ask = ["resolve", "svc-000000"]
    words = {"python -c pass": [python, "-c", "pass"], "regctl": [script, *ask]}
    words["python -m regd.cli.regctl"] = [python, "-m", "regd.cli.regctl", *ask]
    with bench.running([Regd], names=1_000) as [server]:
        # Allow .pyc files, as an installed regctl has them.
        plain = {key: value for key, value in environment().items() if not key.startswith("PYTHON")}
        plain["REGD_ADDRESS"] = f"127.0.0.1:{server.port}"

        def run(what: str) -> float:
            with on_core(LOAD_CORE):
                began = time.perf_counter()
                done = subprocess.run(words[what], env=plain, capture_output=True, text=True, check=True)
                took = time.perf_counter() - began
            assert what.endswith("pass") or done.stdout == "127.0.0.1:10000\n", done.stdout
            return took * 1e3

        rounds: Rounds = {what: [] for what in words}
        for _ in range(bench.rounds):
            runs = [{what: run(what) for what in words} for _ in range(_RUNS)]
            for what in words:
                rounds[what].append({"ms": sorted(run[what] for run in runs)[_RUNS // 2]})
        return rounds


def tell_command(rounds: Rounds) -> Report:
    table = Table(["process", "ms", "ratio"])
    for what in rounds:
        table.lines.append(
            [what, number(middle(rounds, what, "ms")), str(ratio(rounds, what, "python -c pass", "ms"))]
        )
    measured = ratio(rounds, "regctl", "python -c pass", "ms")
    goal = Goal(
        "regctl resolve NAME", f"{measured} × python -c pass", "≤ 2.5 × python -c pass", measured.middle <= 2.5
    )
    return Report([table], [goal])
