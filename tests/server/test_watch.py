"""A watcher gets each change once and in order: its events add up to `list`, also for slow and resumed watchers."""

import asyncio
import json
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from regd.core.limits import DEFAULT, Limits
from regd.core.model import Entry, State
from regd.core.registry import Registry
from regd.core.transaction import Transaction
from regd.server.loop_monitor import LoopMonitor
from regd.server.watches import Watches
from tests.support.clock import HandClock
from tests.support.daemon import WAIT_S, InLoop, Peer
from tests.support.length import examples

pytestmark = pytest.mark.socket


class Fold:
    """The state of the registry that the events of a watch add up to."""

    def __init__(self, peer: Peer) -> None:
        self.peer = peer
        self.state: dict[tuple[str, str], dict[str, Any]] = {}
        self.events: list[str] = []
        self.rev = 0
        self.synced = False

    def take(self, event: dict[str, Any]) -> None:
        kind = event["event"]
        self.events.append(kind)
        if kind in ("up", "change"):
            fields = {key: value for key, value in event.items() if key not in ("event", "watch")}
            key = (event["name"], event["instance"])
            if self.synced:
                assert (key in self.state) is (kind == "change")
            self.state[key] = fields
        elif kind == "down":
            gone = self.state.pop((event["name"], event["instance"]), None)
            assert gone is not None or not self.synced
        elif kind == "reset":
            self.state.clear()
            self.synced = False
        if self.synced:
            assert event["rev"] > self.rev or kind in ("progress", "sync")
        if kind == "sync":
            self.synced = True
        if self.synced:
            self.rev = event["rev"]

    async def until(self, rev: int) -> None:
        while not self.synced or self.rev < rev:
            self.take(await self.peer.reply())


async def watching(daemon: InLoop, **arguments: Any) -> tuple[Fold, dict[str, Any]]:
    peer = await daemon.peer()
    reply = await peer.ask(cmd="watch", **arguments)
    assert reply["ok"], reply
    return Fold(peer), reply


async def listed(peer: Peer, **arguments: Any) -> dict[tuple[str, str], dict[str, Any]]:
    reply = await peer.ask(cmd="list", **arguments)
    return {(instance["name"], instance["instance"]): instance for instance in reply["instances"]}


async def test_snapshot_sync_and_changes(daemon: InLoop) -> None:
    writer = await daemon.peer()
    await writer.ask(cmd="register", name="a", port=1)
    await writer.ask(cmd="register", name="b", port=1)
    fold, reply = await watching(daemon)
    assert reply == {"ok": True, "watch": 1, "epoch": "5eed5eed5eed5eed", "rev": 2}
    await writer.ask(cmd="update", name="a", meta={"k": "v"})
    await writer.ask(cmd="register", name="b", port=2)
    await writer.ask(cmd="deregister", name="a")
    await fold.until(6)
    assert fold.state == await listed(writer)
    assert fold.events[-4:] == ["change", "down", "up", "down"] or "sync" in fold.events[-4:]


async def test_filter(daemon: InLoop) -> None:
    writer = await daemon.peer()
    fold, _ = await watching(daemon, name="w*", meta={"zone": "a"})
    await fold.until(0)
    for request in (
        {"cmd": "register", "name": "other", "port": 1, "meta": {"zone": "a"}},
        {"cmd": "register", "name": "w", "port": 1},
        {"cmd": "update", "name": "w", "meta": {"zone": "a", "x": ""}},
        {"cmd": "update", "name": "w", "meta": {"zone": "a"}},
        {"cmd": "update", "name": "w", "meta": {"zone": "b"}},
        {"cmd": "register", "name": "w2", "port": 1, "meta": {"zone": "a"}},
    ):
        assert (await writer.ask(request))["ok"]
    await fold.until(6)
    assert fold.events == ["sync", "up", "change", "down", "up"]
    assert fold.state == await listed(writer, name="w*", meta={"zone": "a"})


async def test_filtered_has_its_reason(daemon: InLoop) -> None:
    peer = await daemon.peer()
    peer.send(
        {"cmd": "watch", "meta": {"k": "v"}}, {"cmd": "register", "name": "a", "port": 1, "meta": {"k": "v"}}
    )
    peer.send({"cmd": "update", "name": "a", "meta": {}})
    lines = [await peer.reply() for _ in range(6)]
    [down] = [line for line in lines if line.get("event") == "down"]
    assert down == {"event": "down", "watch": 1, "name": "a", "instance": "", "reason": "filtered", "rev": 2}


async def test_resume(daemon: InLoop) -> None:
    writer = await daemon.peer()
    fold, reply = await watching(daemon)
    await writer.ask(cmd="register", name="a", port=1)
    await fold.until(1)
    await fold.peer.close()
    for port in range(2, 5):
        await writer.ask(cmd="register", name="a", port=port)
    again, _ = await watching(daemon, epoch=reply["epoch"], since=fold.rev)
    again.state, again.rev, again.synced = fold.state, fold.rev, True
    await again.until(7)
    assert again.events[:6] == ["down", "up"] * 3
    assert again.state == await listed(writer)


@pytest.mark.parametrize("position", [{"epoch": "other", "since": 1}, {"epoch": "5eed5eed5eed5eed", "since": 99}])
async def test_unknown_position(daemon: InLoop, position: dict[str, Any]) -> None:
    writer = await daemon.peer()
    await writer.ask(cmd="register", name="a", port=1)
    fold, _ = await watching(daemon, **position)
    await fold.until(1)
    assert fold.events == ["reset", "up", "sync"]
    assert fold.state == await listed(writer)


async def test_watcher_that_does_not_read(tmp_path: Path) -> None:
    limits = Limits(history_changes_max=50)
    async with InLoop(tmp_path / "registry.json", limits=limits) as daemon:
        writer = await daemon.peer()
        slow, _ = await watching(daemon)
        quick, _ = await watching(daemon)
        slow.peer.writer.transport.pause_reading()  # type: ignore[attr-defined]
        rev = 0
        meta = {"k": "v" * 4_000}
        while daemon.server.unsent_bytes == 0:
            assert rev < 6_000, "the kernel buffers everything"
            rev = (await writer.ask(cmd="register", name=f"n{rev % 7}", port=rev % 60_000 + 1, meta=meta))["rev"]
            await quick.until(rev)
        assert "reset" not in quick.events
        for _ in range(100):
            rev = (await writer.ask(cmd="register", name="last", port=rev % 60_000 + 1))["rev"]
        assert daemon.server.unsent_bytes < 200_000
        slow.peer.writer.transport.resume_reading()  # type: ignore[attr-defined]
        await slow.until(rev)
        await quick.until(rev)
        assert "reset" in slow.events
        assert slow.state == quick.state == await listed(writer)


async def test_progress(daemon: InLoop) -> None:
    fold, _ = await watching(daemon)
    await fold.until(0)
    daemon.clock.advance(30)
    assert await fold.peer.reply() == {"event": "progress", "watch": 1, "rev": 0}
    daemon.clock.advance(30)
    assert (await fold.peer.reply())["event"] == "progress"


async def test_unwatch(daemon: InLoop) -> None:
    peer = await daemon.peer()
    assert (await peer.ask(cmd="watch"))["watch"] == 1
    assert (await peer.reply())["event"] == "sync"
    assert (await peer.ask(cmd="watch", name="a"))["watch"] == 2
    assert (await peer.reply())["event"] == "sync"
    assert await peer.ask(cmd="unwatch", watch=1) == {"ok": True}
    assert (await peer.ask(cmd="unwatch", watch=1))["error"] == "not_found"
    peer.send({"cmd": "register", "name": "b", "port": 1}, {"cmd": "register", "name": "a", "port": 1})
    lines = [await peer.reply() for _ in range(3)]
    assert [line["watch"] for line in lines if "event" in line] == [2]


async def test_bare_line(daemon: InLoop) -> None:
    peer = await daemon.peer()
    assert (await peer.ask("watch w*"))["watch"] == 1
    assert (await peer.reply())["event"] == "sync"


async def test_many_watchers_of_one_name(daemon: InLoop) -> None:
    """Several watchers receive a large snapshot while the registry changes."""
    writer = await daemon.peer()
    for n in range(600):
        writer.send({"cmd": "register", "name": f"n{n:03}", "port": 1})
    for _ in range(600):
        assert (await writer.reply())["ok"]
    folds = [(await watching(daemon, name="n*"))[0] for _ in range(5)]
    writer.send(*({"cmd": "deregister", "name": f"n{n:03}"} for n in range(0, 600, 3)))
    writer.send(*({"cmd": "register", "name": f"n{n:03}", "port": 2} for n in range(0, 600, 5)))
    replies = [await writer.reply() for _ in range(320)]
    for fold in folds:
        await fold.until(replies[-1]["rev"])
        assert fold.state == await listed(writer)


class Slot:
    """A client that accepts as many events as the test allows."""

    def __init__(self) -> None:
        self.room = 1
        self.events: list[dict[str, Any]] = []

    @property
    def can_take(self) -> bool:
        return self.room > 0

    def push(self, data: bytes) -> None:
        self.room -= 1
        self.events += [json.loads(line) for line in data.splitlines()]


async def test_changes_during_the_snapshot_follow_it() -> None:
    registry = Registry()

    def land(*entries: Entry) -> None:
        transaction = Transaction(registry, 5.0)
        for entry in entries:
            transaction.register(entry)
        registry.apply(transaction.changes, 0.0)
        watches.on_changes(transaction.changes)

    def entry(n: int, port: int) -> Entry:
        return Entry(f"n{n:03}", "", "127.0.0.1", port, {}, State.READY, 0, 0.0)

    clock = HandClock()
    watches, peer = Watches(registry, clock, DEFAULT, LoopMonitor(clock)), Slot()
    land(*(entry(n, 1) for n in range(300)))
    watch = watches.start(peer, 1, "*", {}, None)
    await asyncio.sleep(0)
    assert len(peer.events) == 128
    land(entry(0, 2), entry(299, 2), entry(300, 2))  # already sent, not sent yet, new
    peer.room = 100
    watches.resume([watch])
    async with asyncio.timeout(WAIT_S):
        while peer.events[-1]["event"] != "sync":
            await asyncio.sleep(0)
    ports: dict[str, int] = {}
    for event in peer.events[:-1]:
        if event["event"] == "down":
            ports.pop(event["name"], None)
        else:
            ports[event["name"]] = event["port"]
    assert ports == {f"n{n:03}": 2 if n in (0, 299, 300) else 1 for n in range(301)}
    assert peer.events[-1]["rev"] == registry.rev
    watches.close()


class Follower:
    """A watcher that reads sometimes, loses its connection, and resumes."""

    def __init__(self, arguments: dict[str, Any]) -> None:
        self.arguments = arguments
        self.fold: Fold | None = None
        self.epoch = ""

    async def connect(self, daemon: InLoop) -> None:
        old = self.fold
        position = {"epoch": self.epoch, "since": old.rev} if old is not None and old.synced else {}
        peer = await daemon.peer()
        reply = await peer.ask(cmd="watch", **self.arguments, **position)
        self.epoch = reply["epoch"]
        self.fold = Fold(peer)
        if position and old is not None:
            self.fold.state, self.fold.rev, self.fold.synced = old.state, old.rev, True

    async def lose(self) -> None:
        """Close the connection. Events in the kernel's buffer are lost."""
        if self.fold is not None:
            await self.fold.peer.reset()

    async def read(self, count: int) -> None:
        """Read up to `count` of the events that have arrived."""
        assert self.fold is not None
        for _ in range(count):
            try:
                async with asyncio.timeout(0):
                    line = await self.fold.peer.reader.readline()
            except TimeoutError:
                return
            if line:
                self.fold.take(json.loads(line))

    async def check(self, daemon: InLoop, writer: Peer) -> None:
        """Check that the events add up to `list` at the same revision."""
        assert self.fold is not None
        reply = await writer.ask(cmd="list", **self.arguments)
        marker = await writer.ask(
            cmd="register", name="marker", port=1, meta={"zone": "a", "n": str(reply["rev"])}
        )
        while not self.fold.synced or self.fold.rev < marker["rev"]:
            self.fold.take(await self.fold.peer.reply())
        state = {key: item for key, item in self.fold.state.items() if key[0] != "marker"}
        listed = {
            (instance["name"], instance["instance"]): instance
            for instance in reply["instances"]
            if instance["name"] != "marker"
        }
        assert state == listed


class World:
    """A daemon that restarts, a writer, and three watchers. Each method is a step of a random history."""

    LIMITS = Limits(history_changes_max=12)

    def __init__(self, path: Path) -> None:
        self.path = path
        self.epochs = (f"epoch{n}" for n in count())
        self.followers = [Follower({}), Follower({"meta": {"zone": "a"}}), Follower({"name": "m*"})]
        self.daemon: InLoop
        self.writer: Peer

    async def begin(self) -> None:
        self.daemon = InLoop(self.path, limits=self.LIMITS, epoch=next(self.epochs))
        await self.daemon.__aenter__()
        for follower in self.followers:
            await follower.connect(self.daemon)
        self.writer = await self.daemon.peer()

    async def end(self) -> None:
        await self.daemon.server.stop()
        await self.daemon.__aexit__(None, None, None)

    async def register(self, one: int, two: int) -> None:
        await self.writer.ask(cmd="register", name=f"n{one}", port=1 + two, meta={"zone": "ab"[two % 2]})

    async def update(self, one: int, two: int) -> None:
        await self.writer.ask(cmd="update", name=f"n{one}", meta={"zone": "ab"[two % 2], "n": str(two)})

    async def deregister(self, one: int, two: int) -> None:
        await self.writer.ask(cmd="deregister", name=f"n{one}")

    async def burst(self, one: int, two: int) -> None:
        """Make more changes than the history keeps."""
        self.writer.send(*({"cmd": "register", "name": f"n{one}", "port": 10 + n} for n in range(9)))
        for _ in range(9):
            await self.writer.reply()

    async def read(self, one: int, two: int) -> None:
        await self.followers[one % 3].read(two * 3)

    async def lose(self, one: int, two: int) -> None:
        await self.followers[one % 3].lose()
        await self.followers[one % 3].connect(self.daemon)

    async def restart(self, one: int, two: int) -> None:
        await self.end()
        await self.begin()

    async def check(self, one: int, two: int) -> None:
        await self.followers[one % 3].check(self.daemon, self.writer)


names = ["register", "register", "update", "deregister", "burst", "read", "lose", "restart", "check"]
steps = st.lists(st.tuples(st.sampled_from(names), st.integers(0, 3), st.integers(0, 3)), min_size=5, max_size=25)


@settings(max_examples=examples(60), deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps)
def test_random_histories_with_breaks_and_restarts(
    tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[str, int, int]]
) -> None:
    async def run() -> None:
        world = World(tmp_path_factory.mktemp("history") / "registry.json")
        await world.begin()
        for step, one, two in steps:
            await getattr(world, step)(one, two)
        for n in range(3):
            await world.check(n, 0)
        await world.end()

    asyncio.run(run())


async def test_unwatch_keeps_watches_of_other_names(daemon: InLoop) -> None:
    peer, writer = await daemon.peer(), await daemon.peer()
    for name in ("aa*", "bb*", "bb*", "bbc*", "aa", "bb1"):
        await peer.ask(cmd="watch", name=name)
        assert (await peer.reply())["event"] == "sync"
    for number in (1, 2, 5):
        assert (await peer.ask(cmd="unwatch", watch=number))["ok"]
    await writer.ask(cmd="register", name="bb1", port=1)
    await writer.ask(cmd="register", name="aa", port=1)
    await writer.ask(cmd="register", name="bbc", port=1)
    events = [await peer.reply() for _ in range(4)]
    assert sorted((event["watch"], event["name"]) for event in events) == [
        (3, "bb1"),
        (3, "bbc"),
        (4, "bbc"),
        (6, "bb1"),
    ]
