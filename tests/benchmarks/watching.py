"""Rows: the time from sending a change until its watchers receive it, with one watcher and with 1,000."""

from collections.abc import Callable

from tests.benchmarks.bench import Bench, Rounds
from tests.benchmarks.figures import Bars, Report, Table, at_most, middle, number
from tests.benchmarks.generator import Measured
from tests.benchmarks.peers import Etcd, Nats, Redis
from tests.benchmarks.servers import Regd, RegdFast, Server

SERVERS: list[type[Server]] = [Regd, RegdFast, Redis, Etcd, Nats]
KEYS = ("p50_us", "p99_us", "last_p50_us", "last_p99_us")
_DELIVERIES = 50_000  # in one measurement with many watchers, as an estimate
_CHANGES = 300


def of(watchers: int) -> Callable[[Bench], Rounds]:
    changes = max(min(_CHANGES, _DELIVERIES // watchers), 20)

    def measure(bench: Bench) -> Rounds:
        def follow(server: Server) -> Callable[[], Measured]:
            options = {"watchers": watchers, "changes": max(round(changes * min(bench.seconds, 1)), 10)}
            bench.load.run(server, "follow", **options)
            return lambda: bench.load.run(server, "follow", **options)

        with bench.running(SERVERS, durable=True, names=1_000) as servers:
            return bench.in_turn({server.label: follow(server) for server in servers})

    return measure


def tell(watchers: int) -> Callable[[Rounds], Report]:
    row = f"change to watcher, {watchers:,} watcher{'s' * (watchers > 1)}"

    def told(rounds: Rounds) -> Report:
        table = Table(
            ["server", "p50 µs", "p99 µs", "last watcher, p50 µs", "last watcher, p99 µs", "load core busy"]
        )
        order = sorted(rounds, key=lambda what: middle(rounds, what, "p50_us"))
        for what in order:
            share = f"{middle(rounds, what, 'load_share'):.0%}"
            table.lines.append([what, *(number(middle(rounds, what, key)) for key in KEYS), share])
        most = {"etcd": 1.2} if watchers == 1 else {"etcd": 0.6, "NATS": 1.0}
        goals = [
            goal
            for key, part in (("p50_us", "p50"), ("p99_us", "p99"))
            for label in ("regd", "regd, fast")
            for peer, times in most.items()
            for goal in at_most(rounds, label, times, peer, f"{row}, {part}: {label}", key)
        ]
        bars = [(what, middle(rounds, what, "p50_us")) for what in order]
        return Report([table], goals, [Bars(row, "µs, p50", bars)])

    return told
