"""The engine: batches, order, a slow disk, a failing disk. The test moves time and controls the disk."""

import asyncio
import gc
import json
from pathlib import Path

import pytest

from regd.core import transaction as transaction_module
from regd.core.errors import Code, Refused
from regd.core.holders import HolderEnd
from regd.core.limits import DEFAULT, Limits
from regd.core.model import Entry, Holder, Reason, State
from regd.core.registry import Registry
from regd.core.transaction import Transaction
from regd.server import engine
from regd.server.connection import Connection
from regd.server.counters import Counters
from regd.server.engine import Engine, Write
from regd.server.loop_monitor import LoopMonitor
from regd.server.stalls import Stalls
from regd.storage.files import Files
from regd.storage.store import Store, peek
from tests.support.clock import HandClock
from tests.support.daemon import WAIT_S
from tests.support.files import BROKEN, FULL, RecordedFiles
from tests.support.stored import stored
from tests.support.twins import EMPTY, line, system
from tests.support.world import World


class Bench:
    """An engine on a real file. Access to the file system is recorded, and can be delayed or made to fail."""

    def __init__(self, folder: Path, limits: Limits = DEFAULT) -> None:
        self.files = RecordedFiles()
        self.clock = HandClock()
        self.counters = Counters()
        self.path = folder / "registry.json"
        self.store = Store(self.path, print, self.files)
        self.store.open(0.0)
        self.store.begin()
        self.registry = Registry(limits=limits)
        self.engine = Engine(
            self.registry,
            self.store,
            self.clock,
            self.counters,
            LoopMonitor(self.clock),
            limits,
            Stalls(self.clock, self.registry.holder_index),
            is_gone=lambda holder: False,
            on_flush=lambda: None,
            on_commit=lambda changes: None,
            on_batch_end=lambda lost, without_registrations: None,
        )
        self.outcomes: list[object] = []
        self.task = asyncio.create_task(self.engine.run())

    def submit(self, *writes: Write) -> None:
        for write in writes:
            self.engine.submit(write, self._done)

    def _done(self, outcome: bytes | Refused) -> None:
        self.outcomes.append(outcome.code if isinstance(outcome, Refused) else int(outcome))

    async def until(self, count: int) -> None:
        async with asyncio.timeout(WAIT_S):
            while len(self.outcomes) < count:
                await asyncio.sleep(0)

    async def flush_in_flight(self) -> None:
        async with asyncio.timeout(WAIT_S):
            while not self.files.syncing.is_set():
                await asyncio.sleep(0)

    async def close(self) -> None:
        self.files.gate.set()
        self.engine.close()
        async with asyncio.timeout(WAIT_S):
            await self.task
        self.store.close()

    def held(self) -> set[str]:
        """Return the keys of the entries on disk."""
        return set(stored(self.path))


def register(name: str, port: int = 1, if_rev: int | None = None) -> Write:
    def write(transaction: Transaction) -> bytes:
        entry, _ = transaction.register(Entry(name, "", "127.0.0.1", port, {}, State.READY, 0, 0.0), if_rev)
        return b"%d" % entry.rev

    return write


async def test_writes_during_a_flush_form_the_next_batch(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    bench.files.gate.clear()
    bench.files.syncing.clear()
    bench.submit(register("first"))
    await bench.flush_in_flight()
    bench.submit(*(register(f"n{n}") for n in range(500)))
    assert bench.outcomes == []
    bench.files.gate.set()
    await bench.until(501)
    assert bench.outcomes == list(range(1, 502))
    assert bench.counters.commits == 2
    await bench.close()


async def test_change_is_invisible_until_it_is_on_disk(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    bench.files.gate.clear()
    bench.files.syncing.clear()
    bench.submit(register("db"))
    await bench.flush_in_flight()
    assert bench.registry.get(("db", "")) is None
    assert bench.registry.rev == 0
    bench.files.gate.set()
    await bench.until(1)
    assert "db" in bench.held()
    assert bench.registry.get(("db", "")) is not None
    await bench.close()


async def test_failed_batch_is_refused_as_a_whole(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    bench.submit(register("old"))
    await bench.until(1)
    bench.files.failing["sync_data"] = FULL
    bench.submit(register("a", if_rev=0), register("a", 2, if_rev=0), register("b"))
    await bench.until(4)
    assert bench.outcomes[1:] == [Code.STORAGE_FAILED] * 3
    assert (bench.registry.rev, len(bench.registry)) == (1, 1)
    bench.files.failing.clear()
    bench.submit(register("a", if_rev=0), register("a", 2, if_rev=0))
    await bench.until(6)
    assert bench.outcomes[4:] == [2, Code.CONFLICT]  # the failed writes used no revision
    assert bench.held() == {"old", "a"}
    await bench.close()


async def test_refusal_waits_for_the_flush_of_earlier_writes(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    bench.files.gate.clear()
    bench.submit(register("a", if_rev=0), register("a", 2, if_rev=0))
    await bench.flush_in_flight()
    assert bench.outcomes == []
    bench.files.gate.set()
    await bench.until(2)
    assert bench.outcomes == [1, Code.CONFLICT]
    await bench.close()


async def test_batch_without_changes_is_not_written(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    bench.submit(register("a"))
    await bench.until(1)
    bench.files.failing["sync_data"] = bench.files.failing["create"] = FULL
    bench.submit(register("a"), register("a", 2, if_rev=7))
    await bench.until(3)
    assert bench.outcomes == [1, 1, Code.CONFLICT]
    assert bench.counters.commits == 1
    await bench.close()


async def test_repeated_request_is_confirmed_only_if_the_disk_has_it(tmp_path: Path) -> None:
    """The entry was removed from the file by hand, which the next start would accept."""
    bench = Bench(tmp_path)
    bench.submit(register("a"))
    await bench.until(1)
    bench.store.checkpoint()
    bench.path.write_text("{}")
    bench.files.failing["create"] = FULL
    bench.submit(register("a"))
    await bench.until(2)
    assert bench.outcomes == [1, Code.STORAGE_FAILED]
    bench.files.failing.clear()
    bench.submit(register("a"))
    await bench.until(3)
    assert bench.outcomes[2] == 1
    assert "a" in json.loads(bench.path.read_bytes())
    await bench.close()


@pytest.mark.parametrize("count", [3, 4, 5])
async def test_writes_that_wait_are_limited(tmp_path: Path, count: int) -> None:
    bench = Bench(tmp_path, Limits(writes_waiting_max=4))
    bench.submit(*(register(f"n{n}") for n in range(min(count, 4))))
    if count > 4:
        with pytest.raises(Refused) as refusal:
            bench.submit(register("n4"))
        assert refusal.value.code is Code.BUSY
    await bench.until(min(count, 4))
    await bench.close()


async def test_close_commits_waiting_writes_and_refuses_later_ones(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    bench.submit(*(register(f"n{n}") for n in range(10)))
    bench.engine.close()
    with pytest.raises(Refused) as refusal:
        bench.submit(register("late"))
    assert refusal.value.code is Code.SHUTTING_DOWN
    await bench.close()
    assert bench.outcomes == list(range(1, 11))
    assert len(bench.held()) == 10


async def test_unexpected_exception_ends_the_engine(tmp_path: Path) -> None:
    bench = Bench(tmp_path)

    def bug(transaction: Transaction) -> bytes:
        raise ZeroDivisionError

    bench.submit(bug)
    with pytest.raises(ZeroDivisionError):
        await bench.task
    bench.store.close()


def deregister(name: str) -> Write:
    def write(transaction: Transaction) -> bytes:
        transaction.deregister((name, ""))
        return b"%d" % transaction.rev

    return write


async def test_refused_change_is_void_though_its_line_may_be_on_disk(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    bench.submit(register("keep"))
    await bench.until(1)
    bench.files.failing["sync_data"] = BROKEN
    bench.submit(deregister("keep"))
    await bench.until(2)
    assert "keep" not in bench.held()  # after a crash now, either state is correct
    bench.files.failing.clear()
    bench.submit(register("other"))
    await bench.until(3)
    assert bench.outcomes == [1, "storage_failed", 2]
    assert bench.held() == {"keep", "other"}
    await bench.close()


async def test_end_of_a_holder_is_never_refused_and_is_written_first(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    held = Entry("held", "", "127.0.0.1", 1, {}, State.READY, 0, 0.0, holders=(Holder(0, 7, hold=True),))
    bench.submit(lambda transaction: b"%d" % transaction.register(held, session=7)[0].rev)
    await bench.until(1)
    bench.files.failing["sync_data"] = bench.files.failing["create"] = FULL
    ending = HolderEnd(Reason.CLOSED, session=7)
    bench.registry.mark_gone(ending)
    assert not any(map(bench.registry.is_ready, bench.registry.instances_of("held")))
    bench.engine.end(ending)
    bench.submit(register("other"))
    await bench.until(2)
    assert bench.outcomes == [1, "storage_failed"]
    assert len(bench.registry) == 0
    # The failed lines have revisions 2 and 3 and may be on disk, so the end must have another revision.
    assert bench.registry.rev == 4
    bench.files.failing.clear()
    bench.clock.advance(1)
    async with asyncio.timeout(WAIT_S):
        while bench.store.has_unsaved:
            await asyncio.sleep(0)
    assert bench.held() == set()
    assert [(change.rev, change.op) for change in peek(bench.path, Files()).history] == [(1, "up"), (4, "down")]
    await bench.close()


async def test_end_is_written_when_the_daemon_stops(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    held = Entry("held", "", "127.0.0.1", 1, {}, State.READY, 0, 0.0, holders=(Holder(0, 7, hold=True),))
    bench.submit(lambda transaction: b"%d" % transaction.register(held, session=7)[0].rev)
    await bench.until(1)
    bench.files.failing["sync_data"] = FULL
    ending = HolderEnd(Reason.CLOSED, session=7)
    bench.registry.mark_gone(ending)
    bench.engine.end(ending)
    async with asyncio.timeout(WAIT_S):
        while len(bench.registry):
            await asyncio.sleep(0)
    bench.files.failing.clear()
    await bench.close()
    assert bench.held() == set()


@pytest.mark.parametrize("fails", [False, True])
async def test_end_of_many_holders_takes_several_batches(
    fails: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (transaction_module, engine):
        monkeypatch.setattr(module, "ENDS_MAX", 4)
    bench = Bench(tmp_path)

    def held(name: str) -> Write:
        entry = Entry(name, "", "127.0.0.1", 1, {}, State.READY, 0, 0.0, holders=(Holder(0, 7, hold=True),))
        return lambda transaction: b"%d" % transaction.register(entry, session=7)[0].rev

    bench.submit(*(held(f"n{n}") for n in range(10)))
    await bench.until(10)
    commits = bench.counters.commits
    ending = HolderEnd(Reason.CLOSED, session=7)
    bench.registry.mark_gone(ending)
    assert not any(
        bench.registry.is_ready(entry) for n in range(10) for entry in bench.registry.instances_of(f"n{n}")
    )
    if fails:
        bench.files.failing["sync_data"] = bench.files.failing["create"] = FULL
    bench.engine.end(ending)
    async with asyncio.timeout(WAIT_S):
        while len(bench.registry):
            await asyncio.sleep(0)
            assert not any(
                bench.registry.is_ready(e) for n in range(10) for e in bench.registry.instances_of(f"n{n}")
            )
    bench.files.failing.clear()
    await bench.close()
    assert fails or bench.counters.commits == commits + 3
    assert fails or bench.registry.rev == 20
    assert not bench.registry.holder_index._gone_sessions
    assert bench.held() == set()


def test_committed_batch_and_its_connections_are_freed() -> None:
    """A batch may have 1,024 requests of 64 KB each, which no quota counts after the commit."""
    with system():
        world = World(EMPTY, DEFAULT)
        kept = world.connections.open
        wire = world.connect()
        world.settle()
        gc.collect()
        wire.send(line("register", name="db", port=1))
        world.settle()
        wire.reset()
        world.settle()
        connections = [each for each in gc.get_objects() if isinstance(each, Connection)]
        count = len([each for each in connections if each._connections is world.connections])
        world.stop()
        assert (len(kept), count) == (0, 0)
