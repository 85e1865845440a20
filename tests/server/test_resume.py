"""Watches that resume after restarts of the daemon: after a stop or a kill they get exactly the missed events.

A life of the daemon lasts from its start to its stop or kill. A kill is simulated: the next daemon starts in a
copy of the files as they are on disk at that moment.
"""

import asyncio
import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.support.daemon import InLoop, Peer
from tests.support.files import BROKEN, RecordedFiles
from tests.support.length import examples
from tests.support.polling import until

pytestmark = pytest.mark.socket


class Lives:
    """A registry, and the daemon that runs on it at the moment."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files = RecordedFiles()
        self.daemon: InLoop
        self.peer: Peer
        self.rev = 0
        self.positions: list[tuple[str, int]] = []  # every epoch, with each of its revisions that was on disk
        self.left: dict[
            str, int
        ] = {}  # the last revision of each epoch that is surely on disk; -1 if not even its start is
        self._numbers = itertools.count(1)

    @property
    def epoch(self) -> str:
        return self.daemon.server._epoch

    async def begin(self) -> None:
        number = next(self._numbers)
        files, self.files = self.files, RecordedFiles()
        self.files.failing = files.failing
        self.daemon = InLoop(self.folder / "registry.json", files=self.files, epoch=f"epoch{number}")
        await self.daemon.__aenter__()
        self.peer = await self.daemon.peer()
        self.positions.append((self.epoch, self.rev))

    async def end(self) -> None:
        await self.daemon.__aexit__(None, None, None)

    def _note_epoch(self) -> None:
        store = self.daemon.server._store
        self.left[self.epoch] = store._rev if store._start is None else -1

    async def stop(self) -> None:
        await self.end()
        self._note_epoch()
        await self.begin()

    async def kill(self) -> None:
        """Continue in a copy of the folder. The old daemon ends, and its files are not used any more."""
        checkpointer = self.daemon.server._checkpointer
        await until(lambda: checkpointer._task is None)
        other = self.folder.with_name(f"life{next(self._numbers)}")
        shutil.copytree(self.folder, other, ignore=shutil.ignore_patterns("*.lock"))
        self._note_epoch()
        failing, self.files.failing = self.files.failing, {}
        await self.end()
        self.files.failing = failing
        self.folder = other
        await self.begin()

    async def ask(self, cmd: str, name: str, **arguments: Any) -> dict[str, Any]:
        reply = await self.peer.ask(cmd=cmd, name=name, **arguments)
        if reply["ok"] and reply["rev"] > self.rev:
            self.rev = reply["rev"]
            self.positions.append((self.epoch, self.rev))
        return reply

    async def resume(self, epoch: str, since: int) -> list[dict[str, Any]]:
        """Return the events of a resumed watch, up to `progress` or the end of a snapshot."""
        peer = await self.daemon.peer()
        assert (await peer.ask(cmd="watch", epoch=epoch, since=since))["epoch"] == self.epoch
        events: list[dict[str, Any]] = []
        while not events or events[-1]["event"] not in ("progress", "sync"):
            events.append(await peer.reply())
        await peer.close()
        return events


async def changed(lives: Lives) -> None:
    """Make changes of every kind; the watches with a filter need the old `meta` of a change."""
    await lives.ask("register", "a", port=1, meta={"zone": "a"})
    await lives.ask("update", "a", meta={"zone": "b"})
    await lives.ask("register", "b", port=2)
    await lives.ask("register", "b", port=3)  # replaced: two revisions
    await lives.ask("update", "b", state="draining")
    await lives.ask("deregister", "a")


@pytest.fixture
async def lives(tmp_path: Path) -> Any:
    (folder := tmp_path / "life0").mkdir()
    lives = Lives(folder)
    await lives.begin()
    yield lives
    await lives.end()


HOW: dict[str, Callable[[Lives], Any]] = {"stop": Lives.stop, "kill": Lives.kill}


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("writes_file", [False, True])
async def test_watch_resumes_from_every_position_with_exactly_the_missed_events(
    lives: Lives, how: str, writes_file: bool
) -> None:
    for _ in range(3):
        await changed(lives)
        if writes_file:
            lives.daemon.clock.advance(2)
        await HOW[how](lives)
    await changed(lives)
    everything = await lives.resume("epoch1", 0)
    assert [event["rev"] for event in everything] == [*range(1, lives.rev + 1), lives.rev]
    for epoch, rev in lives.positions:
        assert await lives.resume(epoch, rev) == [event for event in everything[:-1] if event["rev"] > rev] + [
            everything[-1]
        ]


@pytest.mark.parametrize("how", HOW)
async def test_filter_of_a_resumed_watch_has_the_old_meta(lives: Lives, how: str) -> None:
    await lives.ask("register", "a", port=1, meta={"zone": "a"})
    epoch, rev = lives.epoch, lives.rev
    await lives.ask("update", "a", meta={"zone": "b"})
    await HOW[how](lives)
    await lives.ask("update", "a", meta={"zone": "a"})
    peer = await lives.daemon.peer()
    await peer.ask(cmd="watch", meta={"zone": "a"}, epoch=epoch, since=rev)
    events = [await peer.reply() for _ in range(3)]
    assert [(event["event"], event["rev"], event.get("reason")) for event in events] == [
        ("down", 2, "filtered"), ("up", 3, None), ("progress", 3, None),
    ]  # fmt: skip


@pytest.mark.parametrize("how", HOW)
async def test_position_later_than_its_epoch_left_on_disk_is_reset(lives: Lives, how: str) -> None:
    await changed(lives)
    rev = lives.rev
    await HOW[how](lives)
    await changed(lives)
    assert (await lives.resume("epoch1", rev + 1))[0]["event"] == "reset"
    assert (await lives.resume(lives.epoch, lives.rev + 1))[0]["event"] == "reset"
    assert (await lives.resume("epoch9", rev))[0]["event"] == "reset"


def edit(folder: Path) -> None:
    text = (folder / "registry.json").read_text()
    (folder / "registry.json").write_text(text.replace('"port": 3', '"port": 4'))


def remove_journal(folder: Path) -> None:
    for path in folder.glob("registry.journal*"):
        path.unlink()


BREAKS: dict[str, Callable[[Path], None]] = {
    "an edit by hand": edit,
    "no journal": remove_journal,
    "no file": lambda folder: (folder / "registry.json").unlink(),
}


@pytest.mark.parametrize("what", BREAKS)
async def test_broken_history_resets_the_watches_of_earlier_epochs(lives: Lives, what: str) -> None:
    await changed(lives)
    old = lives.epoch, lives.rev
    await lives.end()
    BREAKS[what](lives.folder)
    await lives.begin()
    assert (await lives.resume(*old))[0]["event"] == "reset"
    new = lives.epoch, (await lives.peer.ask("list"))["rev"]
    await lives.ask("register", "late", port=1)
    await lives.kill()
    assert [event["event"] for event in await lives.resume(*new)] == ["up", "progress"]


@pytest.mark.parametrize("step", ["write", "sync_data"])
async def test_revision_of_a_refused_change_is_not_a_valid_position(lives: Lives, step: str) -> None:
    """No watcher has seen its revision. But its line may be on disk after a kill, and is then an event."""
    await changed(lives)
    old = lives.epoch, lives.rev
    lives.files.failing[step] = BROKEN
    assert (await lives.ask("register", "refused", port=1))["error"] == "storage_failed"
    assert [event["event"] for event in await lives.resume(*old)] == ["progress"]
    await lives.kill()
    events = await lives.resume(*old)
    assert [event.get("name") for event in events[:-1]] in ([], ["refused"])
    assert bool(events[:-1]) is (await lives.peer.ask("resolve refused"))["ok"]


@pytest.mark.parametrize("recovers", [False, True])
async def test_end_seen_while_the_disk_failed(lives: Lives, recovers: bool) -> None:
    """A watcher has seen its revision. If it was never written, the position is not valid in the next life."""
    await changed(lives)
    old = lives.epoch, lives.rev
    await lives.ask("register", "leased", port=1, ttl=1)
    lives.files.failing["sync_data"] = lives.files.failing["write"] = BROKEN
    lives.daemon.clock.advance(2)
    await until(lambda: lives.daemon.server._store.has_unsaved)
    [_, down, progress] = await lives.resume(*old)
    assert (down["event"], down["reason"]) == ("down", "ttl expired")
    seen = lives.epoch, progress["rev"]
    if recovers:
        lives.files.failing.clear()
        lives.daemon.clock.advance(2)
        await until(lambda: not lives.daemon.server._store.needs_repair)
    await lives.kill()
    lives.files.failing.clear()
    assert (await lives.resume(*seen))[0]["event"] == ("progress" if recovers else "reset")
    assert [event["event"] for event in await lives.resume(*old)][:2] == (
        ["up", "down"] if recovers else ["up", "progress"]
    )


@pytest.mark.parametrize("how", HOW)
async def test_start_on_a_failing_disk_keeps_positions(lives: Lives, how: str) -> None:
    await changed(lives)
    old = lives.epoch, lives.rev
    if how == "stop":
        await lives.end()
        lives.files.failing["write"] = BROKEN
        await lives.begin()
    else:
        lives.files.failing["write"] = BROKEN
        await lives.kill()
    assert (await lives.ask("register", "refused", port=1))["error"] == "storage_failed"
    assert [event["event"] for event in await lives.resume(*old)] == ["progress"]
    lives.files.failing.clear()
    assert (await lives.ask("register", "late", port=1))["ok"]
    assert [event.get("name") for event in await lives.resume(*old)] == ["late", None]
    await lives.kill()
    assert [event.get("name") for event in await lives.resume(*old)] == ["late", None]


# Random histories.


class Follower:
    """A watcher that loses its connection and resumes; it must not get `reset` without a reason."""

    def __init__(self) -> None:
        self.position = "none", 0
        self.state: dict[str, dict[str, Any]] = {}

    async def catch_up(self, lives: Lives) -> None:
        events = await lives.resume(*self.position)
        is_reset = events[0]["event"] == "reset"
        epoch, rev = self.position
        assert not is_reset or rev > lives.left.get(epoch, rev if epoch == lives.epoch else -1), (epoch, rev)
        if is_reset:
            self.state.clear()
        for event in events[is_reset:-1]:
            kind, name = event.pop("event"), event["name"]
            del event["watch"]
            assert (name in self.state) is (kind != "up"), (kind, event)
            self.state.pop(name, None)
            if kind != "down":
                self.state[name] = event
        self.position = lives.epoch, events[-1]["rev"]
        reply = await lives.peer.ask("list")
        if reply["rev"] > self.position[1]:  # a lease has ended in between
            await self.catch_up(lives)
        else:
            assert self.state == {instance["name"]: instance for instance in reply["instances"]}


STEPS = (
    "register",
    "register",
    "lease",
    "update",
    "deregister",
    "stop",
    "kill",
    "fail",
    "mend",
    "catch up",
    "time",
)
steps = st.lists(st.tuples(st.sampled_from(STEPS), st.integers(0, 3), st.integers(0, 3)), min_size=5, max_size=30)


async def take(lives: Lives, followers: list[Follower], step: str, one: int, two: int) -> None:
    name = f"n{one}"
    match step:
        case "register":
            await lives.ask("register", name, port=1 + two, meta={"zone": "ab"[two % 2]})
        case "lease":  # watchers see its end even if the disk fails
            await lives.ask("register", name, port=1 + two, ttl=1 + two)
        case "update":
            await lives.ask("update", name, meta={"zone": "ab"[two % 2], "n": str(two)})
        case "deregister":
            await lives.ask("deregister", name)
        case "stop" | "kill":
            await HOW[step](lives)
        case "fail":
            lives.files.failing[("write", "sync_data", "rename", "sync")[two]] = BROKEN
        case "mend":
            lives.files.failing.clear()
        case "catch up":
            await followers[one % 2].catch_up(lives)
        case "time":
            lives.daemon.clock.advance(two)


@settings(max_examples=examples(100), deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps)
def test_events_of_a_resumed_watch_add_up_to_list(
    tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[str, int, int]]
) -> None:
    async def run() -> None:
        (folder := tmp_path_factory.mktemp("lives") / "life0").mkdir()
        lives, followers = Lives(folder), [Follower(), Follower()]
        await lives.begin()
        for step in steps:
            await take(lives, followers, *step)
        lives.files.failing.clear()
        for follower in followers:
            await follower.catch_up(lives)
        await lives.end()
        stored = json.loads((lives.folder / "registry.json").read_bytes())
        if stored.pop("$regd")["rev"] == followers[1].position[1]:  # no lease has ended in between
            assert stored.keys() == followers[1].state.keys()

    asyncio.run(run())
