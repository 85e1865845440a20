"""Watches of a member with scripted answers: where a watch resumes, and how it takes each response."""

import asyncio
import gc
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st

from regd.bridge.etcd import watch
from regd.bridge.etcd.client import Etcd
from regd.bridge.etcd.errors import Compacted, EtcdRefused, EtcdUnavailable
from regd.bridge.etcd.model import User
from regd.bridge.etcd.stubs import kv_pb2 as kv
from regd.bridge.etcd.stubs import rpc_pb2 as rpc
from tests.support.followers import Follower, following
from tests.support.polling import until
from tests.support.scripted_etcd import WATCH_ID, ScriptedEtcd, canceled, changes, created, header, progress


async def watched(
    script: ScriptedEtcd, until_revision: int, after_revision: int = 1, user: User | None = None
) -> Follower:
    """Watch until a revision is seen."""
    async with (
        script.serve(),
        Etcd([script.address], user=user) as etcd,
        following(etcd, b"/", after_revision) as follower,
    ):
        await follower.until_revision(until_revision)
        return follower


async def test_watch_resumes_after_its_last_change_not_after_the_revision_of_the_store() -> None:
    script = ScriptedEtcd([created(5_001), changes(2, 3, 1_001, store=5_001)], [created(), changes(1_001, 1_002)])
    follower = await watched(script, 1_002)
    assert script.starts == [1, 1_001]
    assert follower.revisions == [2, 3, 1_001, 1_002]


async def test_progress_that_overtakes_changes_does_not_move_the_watch() -> None:
    script = ScriptedEtcd([created(), changes(2), progress(9)], [created(9), changes(2, 5, 9)])
    follower = await watched(script, 9)
    assert script.starts == [1, 2]
    assert follower.revisions == [2, 5, 9]


async def test_fragments_of_a_revision_are_one_batch() -> None:
    script = ScriptedEtcd(
        [
            created(),
            changes(2, 3, 4, fragment=True),
            changes(4, 4, fragment=True, key=b"/b"),
            changes(4, key=b"/c"),
        ]
    )
    async with script.serve(), Etcd([script.address]) as etcd:
        batches = []
        async for batch in etcd.watch(b"/", 1):
            batches.append([(event.key, event.revision) for event in batch.events])
            if batch.revision == 4:
                break
    assert batches == [[(b"/k2", 2), (b"/k3", 3)], [(b"/k4", 4), (b"/b", 4), (b"/b", 4), (b"/c", 4)]]


async def test_revision_cut_between_fragments_is_reported_whole() -> None:
    script = ScriptedEtcd(
        [created(), changes(2, 3, fragment=True)],
        [created(), changes(2, 3, fragment=True), changes(3, key=b"/b")],
    )
    follower = await watched(script, 3)
    assert script.starts == [1, 2]
    assert [(event.key, event.revision) for event in follower.events] == [(b"/k2", 2), (b"/k3", 3), (b"/b", 3)]


async def test_incomplete_revision_is_dropped_when_the_token_expires(tmp_path: Path) -> None:
    """Otherwise its changes would be reported twice."""
    script = ScriptedEtcd(
        [created(), changes(2, 3, fragment=True)],
        [created(), changes(2, 3, fragment=True), changes(3, key=b"/b")],
    )
    script.breaks = (grpc.StatusCode.UNAUTHENTICATED, "etcdserver: invalid auth token")
    password_file = tmp_path / "password"
    password_file.write_text("secret")
    follower = await watched(script, 3, user=User("a", password_file))
    assert [(event.key, event.revision) for event in follower.events] == [(b"/k2", 2), (b"/k3", 3), (b"/b", 3)]


async def test_compacted_watch_ends() -> None:
    compacted = rpc.WatchResponse(header=header(90), watch_id=WATCH_ID, canceled=True, compact_revision=57)
    with pytest.raises(Compacted, match="57"):
        await watched(ScriptedEtcd([created(), compacted]), 9)


@pytest.mark.parametrize("reason", ["etcdserver: permission denied", "etcdserver: invalid auth token"])
async def test_refused_watch_ends(reason: str) -> None:
    with pytest.raises(EtcdRefused, match="etcd refuses to watch b'/'"):
        await watched(ScriptedEtcd([canceled(reason)]), 9)


async def test_watch_canceled_by_etcd_is_created_again() -> None:
    ended = rpc.WatchResponse(header=header(3), watch_id=WATCH_ID, canceled=True, cancel_reason="shutting down")
    script = ScriptedEtcd([created(), changes(3), ended], [created(), changes(4)])
    assert (await watched(script, 4)).revisions == [3, 4]
    assert script.starts == [1, 3]


async def test_watch_requires_a_member_with_a_leader() -> None:
    script = ScriptedEtcd([created(), changes(2)])
    await watched(script, 2)
    assert script.metadata[0]["hasleader"] == "true"


async def test_quiet_watch_asks_for_a_response(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "QUIET_S", 0.4)
    script = ScriptedEtcd([created()])
    async with script.serve(), Etcd([script.address]) as etcd, following(etcd, b"/", 1):
        await until(lambda: script.progress_requests > watch._QUIET_MAX)
    assert len(script.starts) == 1


async def test_watch_without_responses_is_created_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "QUIET_S", 0.05)
    script = ScriptedEtcd([created()], [created(), changes(2)])
    script.breaks, script.answers_progress = None, False
    async with script.serve(), Etcd([script.address]) as etcd, following(etcd, b"/", 1) as follower:
        await follower.until_revision(2)
    assert script.progress_requests >= 2


async def test_watch_ends_when_etcd_has_lost_revisions() -> None:
    script = ScriptedEtcd([created(40)])
    script.revision = 40
    with pytest.raises(Compacted):
        await watched(script, 99, after_revision=50)


async def test_member_that_is_behind_is_watched() -> None:
    script = ScriptedEtcd([created(40), changes(51)])
    script.revision = 50
    assert (await watched(script, 51, after_revision=50)).revisions == [51]


class EndingStream:
    """A stream that ends when `ends` is set."""

    def __init__(self) -> None:
        self.is_read = False
        self.ends = asyncio.Event()

    async def receive(self) -> rpc.WatchResponse:
        self.is_read = True
        await self.ends.wait()
        raise EtcdUnavailable("the stream has ended")


async def test_cancelled_watch_retrieves_the_error_of_its_stream() -> None:
    """Otherwise asyncio logs the error, if the stream ends just before the watch is cancelled."""
    logged: list[object] = []
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(lambda _, context: logged.append(context["message"]))
    for iterations in range(6):
        stream: Any = EndingStream()
        member: Any = SimpleNamespace(given_up=loop.create_future())
        async with Etcd(["127.0.0.1:1"]) as etcd:
            receiving = asyncio.create_task(watch.Watch(etcd._calls, b"/", 1)._next(member, stream))
            await until(lambda stream=stream: stream.is_read)  # type: ignore[misc]
            stream.ends.set()
            for _ in range(iterations):
                await asyncio.sleep(0)
            receiving.cancel()
            await asyncio.gather(receiving, return_exceptions=True)
            del receiving
        gc.collect()
    assert not logged


@given(st.lists(st.integers(1, 4), max_size=12), st.data())
def test_every_change_is_reported_once_in_order_in_whole_revisions(keys: list[int], data: st.DataObject) -> None:
    """Streams break after any response. `keys`: how many keys change at each revision."""
    history = [(2 + index, b"%d" % key) for index, count in enumerate(keys) for key in range(count)]
    position = watch.Position(1)
    seen: list[tuple[int, bytes]] = []
    while seen != history:
        rest = [item for item in history if item[0] >= position.revision]
        while rest:
            size = data.draw(st.integers(1, len(rest)))
            part, rest = rest[:size], rest[size:]
            splits_revision = bool(rest) and rest[0][0] == part[-1][0]
            events = [kv.Event(kv=kv.KeyValue(key=key, mod_revision=revision)) for revision, key in part]
            response = rpc.WatchResponse(header=header(99), fragment=splits_revision, events=events)
            if batch := position.take(response):
                seen += [(event.revision, event.key) for event in batch.events]
                assert batch.revision == seen[-1][0]
            assert seen == [item for item in history if item[0] <= position.revision]
            if data.draw(st.booleans()):
                break
        position.begin_stream()
