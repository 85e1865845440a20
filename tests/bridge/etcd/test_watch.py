"""Watches of a real etcd: order, cuts, restarts, compaction, large changes, half-open connections."""

import asyncio
import contextlib
import shutil
from pathlib import Path

import pytest

from regd.bridge.etcd import watch
from regd.bridge.etcd.client import Etcd
from regd.bridge.etcd.errors import Compacted
from regd.bridge.etcd.model import Delete, KeyEvent, Put, Record
from tests.bridge.etcd.conftest import PATIENT_S
from tests.support.byte_relay import ByteRelay
from tests.support.etcd import EtcdCluster, cluster
from tests.support.followers import following
from tests.support.polling import block_until, until

TASKS = 32


async def put_many(etcd: Etcd, prefix: bytes, count: int, value: bytes) -> int:
    """Put keys, each with a revision of its own, and return the last revision."""
    numbers = iter(range(count))

    async def put() -> int:
        return max([await etcd.put(prefix + b"%d" % number, value) for number in numbers], default=0)

    return max(await asyncio.gather(*(put() for _ in range(TASKS))))


async def test_changes_are_reported_in_order(etcd: Etcd, prefix: bytes) -> None:
    before = (await etcd.read(prefix)).revision
    async with etcd.lease(60) as lease, following(etcd, prefix, before) as follower:
        a, b = prefix + b"a", prefix + b"b"
        first = await etcd.put(a, b"1", lease.id)
        second = await etcd.commit([Put(b, b"2"), Delete(a)])
        await etcd.put(prefix[:-1] + b"0", b"outside of the prefix")
        third = await etcd.delete(b)
        await follower.until_revision(third)
        assert follower.events == [
            KeyEvent(a, first, Record(b"1", first, lease.id)),
            KeyEvent(b, second, Record(b"2", second, 0)),
            KeyEvent(a, second, None),
            KeyEvent(b, third, None),
        ]


async def test_watch_of_an_empty_store_reports_its_first_change(tmp_path: Path) -> None:
    with cluster(tmp_path) as server:
        async with Etcd(server.addresses, deadline_s=PATIENT_S) as etcd, following(etcd, b"/", 0) as follower:
            revision = await etcd.put(b"/a", b"")
            await follower.until_revision(revision)
            assert follower.revisions == [revision]


async def test_every_change_is_reported_once_across_broken_connections(
    etcd: Etcd, server: EtcdCluster, prefix: bytes
) -> None:
    last = before = (await etcd.read(prefix)).revision
    async with (
        ByteRelay(server.members[0].port) as relay,
        Etcd([relay.address]) as watcher,
        following(watcher, prefix, before) as follower,
    ):
        for _ in range(10):
            seen = follower.revision
            writing = asyncio.create_task(put_many(etcd, prefix, 100, b"x" * 1_000))
            await until(lambda seen=seen: follower.revision > seen)  # type: ignore[misc]
            relay.cut()
            last = await writing
        await follower.until_revision(last)
    assert follower.revisions == list(range(before + 1, last + 1))


async def test_no_change_is_lost_when_the_connection_breaks_during_catch_up(
    etcd: Etcd, server: EtcdCluster, prefix: bytes
) -> None:
    """etcd sends a thousand revisions per response; the header of each has the revision of the store."""
    before = (await etcd.read(prefix)).revision
    last = await put_many(etcd, prefix, 1_500, b"x" * 1_000)
    async with ByteRelay(server.members[0].port) as relay, Etcd([relay.address]) as watcher:
        revisions: list[int] = []
        async with contextlib.aclosing(watcher.watch(prefix, before)) as batches:
            async for batch in batches:
                revisions += [event.revision for event in batch.events]
                if revisions[-1] == last:
                    break
                relay.cut()
    assert revisions == list(range(before + 1, last + 1))


@pytest.mark.parametrize(("count", "size"), [(1_100, 20_000), (25, 1_000_000)])
async def test_changes_larger_than_a_response_of_grpc(etcd: Etcd, prefix: bytes, count: int, size: int) -> None:
    before = (await etcd.read(prefix)).revision
    last = await put_many(etcd, prefix, count, b"x" * size)
    async with following(etcd, prefix, before) as follower:
        await follower.until_revision(last)
    assert follower.revisions == list(range(before + 1, last + 1))
    assert {len(event.record.value) for event in follower.events if event.record} == {size}
    await etcd.commit([Delete(event.key) for event in follower.events])


@pytest.mark.long
async def test_slow_reader_gets_every_change(etcd: Etcd, prefix: bytes) -> None:
    before = (await etcd.read(prefix)).revision
    async with contextlib.aclosing(etcd.watch(prefix, before)) as batches:
        await etcd.put(prefix, b"")
        revisions = [event.revision for event in (await anext(batches)).events]
        last = await put_many(etcd, prefix, 1_200, b"x" * 2_000)
        async for batch in batches:
            revisions += [event.revision for event in batch.events]
            if revisions[-1] == last:
                break
    assert revisions == list(range(before + 1, last + 1))


async def test_compaction_while_a_watch_is_behind(etcd: Etcd, server: EtcdCluster, prefix: bytes) -> None:
    before = (await etcd.read(prefix)).revision
    async with ByteRelay(server.members[0].port) as relay, Etcd([relay.address]) as watcher:
        async with following(watcher, prefix, before) as follower:
            await follower.until_revision(await etcd.put(prefix + b"a", b"1"))
            relay.refuse()
            relay.cut()
            await etcd.put(prefix + b"b", b"2")
            compacted = await etcd.delete(prefix + b"a")
            server.ctl("compaction", str(compacted))
            relay.accept()
            await until(lambda: follower.error)
            assert isinstance(follower.error, Compacted)
            assert f"compacted revision {compacted}" in str(follower.error)
            assert len(follower.events) == 1
        snapshot = await watcher.read(prefix)
        assert list(snapshot.records) == [prefix + b"b"]
        async with following(watcher, prefix, snapshot.revision) as follower:
            await follower.until_revision(await etcd.put(prefix + b"c", b""))
            assert len(follower.events) == 1


async def test_watch_after_the_compacted_revision(etcd: Etcd, server: EtcdCluster, prefix: bytes) -> None:
    compacted = await etcd.put(prefix + b"a", b"")
    last = await etcd.put(prefix + b"b", b"")
    server.ctl("compaction", str(compacted))
    async with following(etcd, prefix, compacted) as follower:
        await follower.until_revision(last)
    assert follower.revisions == [last]


@pytest.mark.long
async def test_restart_of_etcd(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with cluster(tmp_path) as server:
        [member] = server.members
        async with Etcd(server.addresses, deadline_s=PATIENT_S) as etcd, following(etcd, b"/", 0) as follower:
            await follower.until_revision(await etcd.put(b"/a", b"1"))
            member.kill()
            await until(lambda: "no member of etcd answers" in caplog.text)
            await asyncio.to_thread(server.start)
            last = int(server.ctl("put", "/b", "2", "-w", "json").partition('"revision":')[2].partition(",")[0])
            await follower.until_revision(last)
            assert [event.key for event in follower.events] == [b"/a", b"/b"]
    lines = [record.getMessage() for record in caplog.records if record.name == "regd.bridge"]
    assert [line.partition(":")[0] for line in lines] == [
        "no member of etcd answers; still trying", f"etcd answers again, at {member.address.partition(':')[0]}"
    ]  # fmt: skip


@pytest.mark.long
async def test_watch_ends_when_etcd_has_lost_its_data(tmp_path: Path) -> None:
    with cluster(tmp_path) as server:
        [member] = server.members
        async with Etcd(server.addresses, deadline_s=PATIENT_S) as etcd:
            for number in range(20):
                await etcd.put(b"/%d" % number, b"")
            async with following(etcd, b"/", 0) as follower:
                await until(lambda: len(follower.events) == 20)
                member.kill()
                shutil.rmtree(member.data)
                await asyncio.to_thread(server.start)
                await until(lambda: follower.error)
                assert isinstance(follower.error, Compacted)


async def test_ended_watches_leave_no_watcher_in_etcd(etcd: Etcd, server: EtcdCluster, prefix: bytes) -> None:
    watchers = "etcd_debugging_mvcc_watcher_total"
    [member] = server.members
    block_until(lambda: member.metric(watchers) == 0)
    before = (await etcd.read(prefix)).revision
    async with contextlib.AsyncExitStack() as stack:
        for _ in range(50):
            await stack.enter_async_context(following(etcd, prefix, before))
        await until(lambda: member.metric(watchers) == 50)
    await until(lambda: member.metric(watchers) == 0)


async def test_closing_the_client_cancels_its_watches(server: EtcdCluster, prefix: bytes) -> None:
    async with Etcd(server.addresses, deadline_s=PATIENT_S) as etcd:
        before = (await etcd.read(prefix)).revision
        watching = asyncio.create_task(anext(etcd.watch(prefix, before)))
        await until(lambda: server.members[0].metric("etcd_debugging_mvcc_watcher_total") == 1)
    await asyncio.wait([watching], timeout=PATIENT_S)
    assert watching.cancelled()


@pytest.mark.long
async def test_half_open_connection_is_noticed(
    etcd: Etcd, server: EtcdCluster, prefix: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the pings of HTTP/2 alone. Without one of the options of grpc they would take a minute."""
    monkeypatch.setattr(watch, "QUIET_S", 1_000.0)
    before = (await etcd.read(prefix)).revision
    async with (
        ByteRelay(server.members[0].port) as relay,
        Etcd([relay.address, *server.addresses]) as watcher,
        following(watcher, prefix, before) as follower,
    ):
        await follower.until_revision(await etcd.put(prefix, b""))
        relay.flowing.clear()
        await follower.until_revision(await etcd.put(prefix, b""), within_s=30)
        assert relay.accepted == 1
    assert len(follower.events) == 2
