"""Leases that are kept, revoked and lost, with a real etcd."""

import time
from pathlib import Path
from typing import Any

import pytest

from regd.bridge.etcd import member
from regd.bridge.etcd.client import Etcd
from regd.bridge.etcd.errors import LeaseNotFound
from regd.bridge.etcd.lease import Lease
from regd.bridge.etcd.stubs import rpc_pb2 as rpc
from tests.bridge.etcd.conftest import PATIENT_S
from tests.support.byte_relay import ByteRelay
from tests.support.etcd import EtcdCluster, cluster
from tests.support.followers import following
from tests.support.polling import block_until, until

TTL_S = 2  # the shortest that etcd grants


@pytest.mark.long
async def test_lease_outlives_its_ttl(etcd: Etcd, prefix: bytes) -> None:
    ttl_s = 3 * TTL_S  # a lease of 2 s is lost if a busy machine stops for 1.4 s
    async with etcd.lease(ttl_s) as lease:
        await etcd.put(prefix, b"", lease.id)
        granted_at = lease._refreshed_at
        await until(lambda: lease._refreshed_at > granted_at + ttl_s)
        assert not lease.lost.is_set()
        assert 0 < lease.remaining_s <= ttl_s
        assert prefix in (await etcd.read(prefix)).records
        assert etcd.silent_s < ttl_s


class InstantStream:
    """A stream on which etcd answers at once. It notes when a request was sent."""

    async def send(self, request: Any) -> None:
        self.sent_at = time.monotonic()

    async def receive(self) -> rpc.LeaseKeepAliveResponse:
        return rpc.LeaseKeepAliveResponse(TTL=TTL_S)


async def test_remaining_time_counts_from_the_request_not_from_the_response() -> None:
    async with Etcd(["127.0.0.1:1"]) as etcd:
        lease = Lease(etcd._calls, 1, TTL_S, 0.0)
        stream: Any = InstantStream()
        await lease._refresh(stream)
        assert 0.0 < lease._refreshed_at <= stream.sent_at


async def test_lease_is_revoked_at_the_end_of_the_block(etcd: Etcd, prefix: bytes) -> None:
    async with etcd.lease(60) as lease:
        revision = await etcd.put(prefix, b"", lease.id)
    async with following(etcd, prefix, revision) as follower:
        await follower.until_revision(revision + 1)
    [event] = follower.events
    assert event == (prefix, revision + 1, None)


async def test_revoked_lease_is_lost(etcd: Etcd, server: EtcdCluster, prefix: bytes) -> None:
    async with etcd.lease(TTL_S) as lease:
        await etcd.put(prefix, b"", lease.id)
        server.ctl("lease", "revoke", f"{lease.id:x}")
        await until(lease.lost.is_set)
        assert lease.remaining_s == 0
        with pytest.raises(LeaseNotFound):
            await etcd.put(prefix, b"", lease.id)
    async with etcd.lease(TTL_S) as lease:
        await etcd.put(prefix, b"", lease.id)


@pytest.mark.long
async def test_lease_is_lost_in_a_partition(
    etcd: Etcd, server: EtcdCluster, prefix: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    async with (
        ByteRelay(server.members[0].port) as relay,
        Etcd([relay.address], deadline_s=PATIENT_S) as cut_off,
        cut_off.lease(TTL_S) as lease,
    ):
        revision = await cut_off.put(prefix, b"", lease.id)
        async with following(etcd, prefix, revision) as follower:
            relay.flowing.clear()
            await follower.until_revision(revision + 1)
        assert follower.events[0].record is None
        assert not lease.lost.is_set()  # etcd has not said so yet
        relay.flowing.set()
        await until(lease.lost.is_set, 30)
        assert f"etcd at {relay.address} did not refresh a lease in time" in caplog.text


@pytest.mark.long
async def test_lease_moves_to_the_next_member_when_a_refresh_is_not_answered(
    server: EtcdCluster, prefix: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(member, "_OPTIONS", ())  # no pings
    async with (
        ByteRelay(server.members[0].port) as relay,
        Etcd([relay.address, *server.addresses], deadline_s=PATIENT_S) as etcd,
        etcd.lease(4) as lease,
    ):
        await etcd.put(prefix, b"", lease.id)
        relay.flowing.clear()
        await until(lambda: etcd.member != relay.address or lease.lost.is_set())
        refreshed_at = lease._refreshed_at
        await until(lambda: lease._refreshed_at > refreshed_at or lease.lost.is_set())
        assert not lease.lost.is_set()


@pytest.mark.long
async def test_lease_is_lost_while_the_event_loop_is_blocked(
    etcd: Etcd, server: EtcdCluster, prefix: bytes
) -> None:
    async with etcd.lease(TTL_S) as lease:
        await etcd.put(prefix, b"", lease.id)
        block_until(lambda: f"{lease.id:x}" not in server.ctl("lease", "list"))
        await until(lease.lost.is_set)
        assert (await etcd.read(prefix)).records == {}


@pytest.mark.long
async def test_end_of_a_lease_does_not_wait_for_etcd(tmp_path: Path) -> None:
    with cluster(tmp_path) as server:
        async with Etcd(server.addresses) as etcd, etcd.lease(60) as lease:
            server.members[0].kill()
            left_at = time.monotonic()
        assert time.monotonic() - left_at < 10
        assert not lease.lost.is_set()


@pytest.mark.long
async def test_lease_survives_a_restart_of_etcd(tmp_path: Path, prefix: bytes) -> None:
    with cluster(tmp_path) as server:
        async with Etcd(server.addresses, deadline_s=PATIENT_S) as etcd, etcd.lease(6) as lease:
            await etcd.put(prefix, b"", lease.id)
            server.members[0].kill()
            refreshed_at = lease._refreshed_at
            server.start()
            await until(lambda: lease._refreshed_at > refreshed_at, 30)
            assert not lease.lost.is_set()
            assert prefix in (await etcd.read(prefix)).records
