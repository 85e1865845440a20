"""The table of all rows."""

from collections.abc import Callable
from dataclasses import dataclass

from tests.benchmarks import calling, footprint, lookups, registering, watching
from tests.benchmarks.bench import Bench, Rounds
from tests.benchmarks.figures import Report


@dataclass(frozen=True)
class Row:
    word: str
    title: str
    measure: Callable[[Bench], Rounds]
    tell: Callable[[Rounds], Report]


ROWS = (
    Row("resolve", "resolve, 50 connections, one at a time", lookups.one_at_a_time, lookups.tell_one_at_a_time),
    Row("resolve16", "resolve, 50 connections, 16 deep", lookups.sixteen_deep, lookups.tell_sixteen_deep),
    Row("names", "resolve among 1,000, 10,000 and 100,000 names", lookups.among_many, lookups.tell_among_many),
    *(
        Row(
            f"register{size // 1_000}k",
            f"durable register, 50 connections, among {size:,} registrations",
            registering.among(size),
            registering.tell_among(size),
        )
        for size in (1_000, 10_000, 100_000)
    ),
    Row(
        "single",
        "durable registers one after another on one connection, among 1,000",
        registering.one_after_the_other,
        registering.tell_one_after_the_other,
    ),
    *(
        Row(
            f"watch{watchers}",
            f"from a change to its watchers, {watchers:,} watcher{'s' * (watchers > 1)}",
            watching.of(watchers),
            watching.tell(watchers),
        )
        for watchers in (1, 1_000)
    ),
    Row("local", "resolve from a mirror, in the same process", calling.local, calling.tell_local),
    *(
        Row(
            f"client{tasks}",
            "resolve through a client library in Python, "
            + ("one task" if tasks == 1 else f"{tasks} tasks at once"),
            calling.remote(tasks),
            calling.tell_remote(tasks),
        )
        for tasks in (1, 50)
    ),
    Row("start", "start with 100,000 registrations on file", footprint.start, footprint.tell_start),
    Row("memory", "memory for registrations and connections", footprint.memory, footprint.tell_memory),
    Row("command", "`regctl resolve NAME` as a whole process", footprint.command, footprint.tell_command),
)
