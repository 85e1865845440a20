"""Reads, transactions and claims, with a real etcd."""

import asyncio
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from regd.bridge.etcd import client
from regd.bridge.etcd.client import Etcd
from regd.bridge.etcd.errors import EtcdConflict, EtcdRefused, LeaseNotFound
from regd.bridge.etcd.model import Delete, Operation, Put, Record, key_range
from regd.bridge.etcd.stubs import rpc_pb2 as rpc
from regd.bridge.etcd.transactions import BYTES_MAX, OPERATIONS_MAX, transactions
from tests.bridge.etcd.conftest import PATIENT_S
from tests.support.etcd import EtcdCluster


@pytest.mark.parametrize(
    ("prefix", "expected"),
    [
        (b"/a/", (b"/a/", b"/a0")),
        (b"a\xff", (b"a\xff", b"b")),
        (b"a\xfe\xff\xff", (b"a\xfe\xff\xff", b"a\xff")),
        (b"\xff", (b"\xff", b"\0")),
        (b"", (b"\0", b"\0")),
    ],
)
def test_range_of_a_prefix(prefix: bytes, expected: tuple[bytes, bytes]) -> None:
    assert key_range(prefix) == expected


async def test_read_returns_what_was_put(etcd: Etcd, prefix: bytes) -> None:
    empty = await etcd.read(prefix)
    assert empty.records == {}
    first = await etcd.put(prefix + b"a", b"1")
    second = await etcd.put(prefix + b"b", b"\xff\x00")
    outside = await etcd.put(key_range(prefix)[1], b"")
    assert await etcd.read(prefix) == (
        outside,
        {prefix + b"a": Record(b"1", first, 0), prefix + b"b": Record(b"\xff\x00", second, 0)},
    )
    assert empty.revision < first < second < outside
    await etcd.delete(prefix + b"a")
    assert list((await etcd.read(prefix)).records) == [prefix + b"b"]
    assert key_range(prefix)[1] in (await etcd.read(b"")).records


async def test_pages_are_of_one_revision(etcd: Etcd, prefix: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """A transaction changes the first and the last key, so they differ only if pages are of several revisions."""
    monkeypatch.setattr(client, "_PAGE_KEYS", 2)
    first, last = prefix + b"0", prefix + b"9"
    await etcd.commit([Put(prefix + b"%d" % number, b"0") for number in range(10)])

    async def write() -> None:
        for number in range(200):
            value = b"%d" % number
            await etcd.commit([Put(first, value), Put(last, value)])

    writing = asyncio.create_task(write())
    while not writing.done():
        snapshot = await etcd.read(prefix)
        assert len(snapshot.records) == 10
        assert list(snapshot.records) == sorted(snapshot.records)
        assert snapshot.records[first].value == snapshot.records[last].value
    await writing


async def test_read_begins_again_after_a_compaction_between_two_pages(
    etcd: Etcd, server: EtcdCluster, prefix: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "_PAGE_KEYS", 1)
    await etcd.commit([Put(prefix + b"a", b"1"), Put(prefix + b"b", b"1")])
    call = etcd._calls.call
    pages: list[int] = []
    async with Etcd(server.addresses, deadline_s=PATIENT_S) as other:

        async def call_and_compact(method: Any, request: rpc.RangeRequest, repeatable: bool) -> Any:
            pages.append(request.revision)
            if len(pages) == 2:
                server.ctl("compaction", str(await other.put(prefix + b"b", b"2")))
            return await call(method, request, repeatable)

        monkeypatch.setattr(etcd._calls, "call", call_and_compact)
        snapshot = await etcd.read(prefix)
    assert [record.value for record in snapshot.records.values()] == [b"1", b"2"]
    assert [revision != 0 for revision in pages] == [False, True, False, True]


@pytest.mark.sample(4)
@pytest.mark.parametrize(("count", "size"), [(10_000, 400), (20, 1_000_000)])
async def test_prefix_larger_than_a_response_of_grpc(etcd: Etcd, prefix: bytes, count: int, size: int) -> None:
    keys = [prefix + b"%05d" % number for number in range(count)]
    await etcd.commit([Put(key, b"x" * (size - len(key))) for key in keys])
    snapshot = await etcd.read(prefix)
    assert list(snapshot.records) == keys
    await etcd.commit([Delete(key) for key in keys])


async def test_operations_are_split_into_several_transactions(etcd: Etcd, prefix: bytes) -> None:
    before = (await etcd.read(prefix)).revision
    many: list[Operation] = [Put(prefix + b"%d" % number, b"") for number in range(2 * OPERATIONS_MAX + 1)]
    assert await etcd.commit(many) == before + 3
    large = [Put(prefix + b"large%d" % number, b"x" * (BYTES_MAX // 2)) for number in range(4)]
    assert await etcd.commit(large) == before + 7
    key = prefix + b"twice"
    assert await etcd.commit([Put(key, b"1"), Delete(key), Put(key, b"2")]) == before + 10
    records = (await etcd.read(prefix)).records
    assert len(records) == len(many) + len(large) + 1
    assert records[key].value == b"2"
    assert await etcd.commit([]) == 0


async def test_refused_writes(etcd: Etcd, prefix: bytes) -> None:
    with pytest.raises(EtcdRefused, match="request is too large"):
        await etcd.put(prefix, b"x" * 2_000_000)
    with pytest.raises(EtcdRefused, match="larger than max"):
        await etcd.put(prefix, b"x" * 20_000_000)
    with pytest.raises(EtcdRefused, match="key is not provided"):
        await etcd.put(b"", b"")
    with pytest.raises(LeaseNotFound):
        await etcd.put(prefix, b"", lease=1)
    assert (await etcd.read(prefix)).records == {}


async def test_only_if(etcd: Etcd, prefix: bytes) -> None:
    guard, key = prefix + b"guard", prefix + b"key"
    await etcd.commit([Put(key, b"1")], only_if={guard: 0})
    revision = await etcd.put(guard, b"")
    for expected in (0, revision - 1, revision + 1):
        with pytest.raises(EtcdConflict):
            await etcd.commit([Put(key, b"2")], only_if={guard: expected})
    assert (await etcd.read(prefix)).records[key].value == b"1"
    many: list[Operation] = [Put(prefix + b"%d" % number, b"") for number in range(OPERATIONS_MAX + 1)]
    await etcd.commit(many, only_if={guard: revision})
    assert len((await etcd.read(prefix)).records) == len(many) + 2


async def test_claim(etcd: Etcd, prefix: bytes) -> None:
    async with etcd.lease(10) as ours, etcd.lease(10) as theirs:
        claimed = await etcd.claim(prefix, b"us", ours.id)
        assert claimed == (await etcd.read(prefix)).records[prefix]
        assert claimed.lease == ours.id
        assert await etcd.claim(prefix, b"them", theirs.id) == claimed
        again = await etcd.claim(prefix, b"still us", ours.id)
        assert again == (await etcd.read(prefix)).records[prefix]
        assert again.mod_revision > claimed.mod_revision
    async with etcd.lease(10) as next_one:
        assert (await etcd.claim(prefix, b"them", next_one.id)).lease == next_one.id


async def test_only_one_of_many_claims_succeeds(etcd: Etcd, server: EtcdCluster, prefix: bytes) -> None:
    async with etcd.lease(10) as first, etcd.lease(10) as second, etcd.lease(10) as third:
        leases = [lease.id for lease in (first, second, third)]
        results = await asyncio.gather(*(etcd.claim(prefix, b"", lease) for lease in leases))
        assert len({(result.lease, result.mod_revision) for result in results}) == 1


OPERATIONS = st.lists(
    st.builds(Put, st.sampled_from([b"a", b"b", b"c"]), st.sampled_from([b"", b"x" * 400_000]), st.just(0))
    | st.builds(Delete, st.binary(min_size=1, max_size=2)),
    max_size=300,
)


@given(OPERATIONS)
def test_transactions_are_within_etcd_s_limits(operations: list[Operation]) -> None:
    batches = list(transactions(operations, {b"guard": 1}))
    keys = []
    for batch in batches:
        assert len(batch.success) <= OPERATIONS_MAX
        assert batch.ByteSize() <= BYTES_MAX
        assert len(batch.compare) == 1
        own = [request.request_put.key or request.request_delete_range.key for request in batch.success]
        assert len(set(own)) == len(own)
        keys += own
    assert keys == [operation.key for operation in operations]
