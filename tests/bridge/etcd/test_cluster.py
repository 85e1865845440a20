"""A cluster of three members that are killed, frozen and left without a leader, during a lease, a watch and writes."""

import asyncio
import time
from collections.abc import AsyncIterator, Iterator

import pytest

from regd.bridge.etcd.client import Etcd
from regd.bridge.etcd.errors import DeadlineExceeded, EtcdConflict, EtcdUnavailable
from regd.bridge.etcd.lease import Lease
from regd.bridge.etcd.model import Put
from tests.bridge.etcd.conftest import PATIENT_S
from tests.support.etcd import EtcdCluster, MemberProcess, cluster
from tests.support.followers import following
from tests.support.polling import until

RECOVER_S = 60.0  # on a busy machine; some seconds on an idle one


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EtcdCluster]:
    with cluster(tmp_path_factory.mktemp("etcd"), 3) as running:
        yield running


@pytest.fixture(autouse=True)
def healthy(three: EtcdCluster) -> Iterator[None]:
    """Thaw the members that a test has frozen, and start those that it has killed."""
    yield
    three.restore()


@pytest.fixture
async def etcd(three: EtcdCluster) -> AsyncIterator[Etcd]:
    async with Etcd(three.addresses) as client:
        yield client


class Publisher:
    """Writes as a bridge does: under a claim, which it renews when it does not know whether a write took effect."""

    def __init__(self, etcd: Etcd, lease: Lease, prefix: bytes) -> None:
        self._etcd = etcd
        self._lease = lease
        self._claim = prefix + b"claim"
        self._only_if: dict[bytes, int] = {}
        self.longest_gap_s = 0.0

    async def claim(self) -> int:
        claimed = await self._etcd.claim(self._claim, b"", self._lease.id)
        assert claimed.lease == self._lease.id
        self._only_if = {self._claim: claimed.mod_revision}
        return claimed.mod_revision

    async def put(self, key: bytes, value: bytes) -> int:
        began_at = time.monotonic()
        while True:
            try:
                if not self._only_if:
                    await self.claim()
                revision = await self._etcd.commit([Put(key, value, self._lease.id)], self._only_if)
                self.longest_gap_s = max(self.longest_gap_s, time.monotonic() - began_at)
                return revision
            except (EtcdUnavailable, EtcdConflict):
                self._only_if = {}


def in_use(three: EtcdCluster, etcd: Etcd) -> MemberProcess:
    return next(member for member in three.members if member.address == etcd.member)


@pytest.mark.parametrize("way", ["kill", "freeze"])
@pytest.mark.parametrize("which", ["leader", "in use"])
@pytest.mark.long
async def test_member_fails_during_writes(
    three: EtcdCluster, etcd: Etcd, prefix: bytes, which: str, way: str
) -> None:
    """The watch reports every write, in order, and the lease is kept."""
    async with etcd.lease(10) as lease:
        publisher = Publisher(etcd, lease, prefix)
        before = await publisher.claim()
        async with Etcd(three.addresses) as other, following(other, prefix, before) as follower:
            revision = before
            for number in range(200):
                if number == 100:
                    member = in_use(three, other) if which == "in use" else three.leader()
                    member.kill() if way == "kill" else member.freeze()
                revision = await publisher.put(prefix + b"key", b"%d" % number)
            await follower.until_revision(revision, RECOVER_S)
            assert not lease.lost.is_set()
    values = [int(event.record.value) for event in follower.events if event.record and event.record.value]
    assert sorted(set(values)) == list(range(200))
    assert values == sorted(values)
    assert follower.revisions == sorted(set(follower.revisions))
    assert publisher.longest_gap_s < RECOVER_S  # 0.02 to 5 s


@pytest.mark.long
async def test_lease_and_watch_move_from_a_frozen_member(three: EtcdCluster, etcd: Etcd, prefix: bytes) -> None:
    async with etcd.lease(6) as lease, following(etcd, prefix, await etcd.put(prefix, b"", lease.id)) as follower:
        frozen = in_use(three, etcd)
        frozen.freeze()
        await until(lambda: etcd.member != frozen.address, RECOVER_S)
        refreshed_at = lease._refreshed_at
        await until(lambda: lease._refreshed_at > refreshed_at, RECOVER_S)
        assert not lease.lost.is_set()
        addresses = [address for address in three.addresses if address != frozen.address]
        async with Etcd(addresses, deadline_s=PATIENT_S) as other:
            await follower.until_revision(await other.put(prefix, b"2"))


@pytest.mark.long
async def test_read_survives_the_election_of_a_leader(three: EtcdCluster, etcd: Etcd, prefix: bytes) -> None:
    await etcd.put(prefix, b"")
    three.leader().kill()
    etcd._calls.repeat_s = RECOVER_S
    assert list((await etcd.read(prefix)).records) == [prefix]


@pytest.mark.long
async def test_late_writes_of_a_frozen_member_have_no_effect(
    three: EtcdCluster, etcd: Etcd, prefix: bytes
) -> None:
    """They are in its socket when it is thawed. Without the new claim, it would perform some of them."""
    keys = [prefix + b"%d" % number for number in range(50)]
    claim = prefix + b"claim"
    frozen = three.members[0]
    async with Etcd([frozen.address], deadline_s=0.5) as early, etcd.lease(60) as lease:
        claimed = await etcd.claim(claim, b"", lease.id)
        await early.read(prefix)
        frozen.freeze()
        unchanged = {claim: claimed.mod_revision}
        results = await asyncio.gather(
            *(early.commit([Put(key, b"early")], unchanged) for key in keys), return_exceptions=True
        )
        assert {type(result) for result in results} <= {EtcdUnavailable, DeadlineExceeded}
        again = await etcd.claim(claim, b"", lease.id)
        await etcd.commit([Put(key, b"late") for key in keys], {claim: again.mod_revision})
        frozen.thaw()
        await asyncio.to_thread(frozen.wait_until_healthy)
        async with Etcd([frozen.address], deadline_s=PATIENT_S) as first:
            await first.put(prefix + b"after", b"")
            records = (await first.read(prefix)).records
        assert {records[key].value for key in keys} == {b"late"}


@pytest.mark.long
async def test_member_without_a_leader_counts_as_lost(
    three: EtcdCluster, etcd: Etcd, prefix: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    """Two of three members are frozen. The third accepts connections, but has no leader."""
    alone, *others = three.members
    async with Etcd([alone.address]) as lonely:
        revision = await lonely.put(prefix, b"1")
        async with following(lonely, prefix, revision) as follower:
            for member in others:
                member.freeze()
            await until(lambda: "no member of etcd answers" in caplog.text, RECOVER_S)
            lonely._calls.repeat_s = 0.0
            with pytest.raises(EtcdUnavailable):
                await lonely.read(prefix)
            with pytest.raises(EtcdUnavailable):
                await lonely.put(prefix, b"2")
            for member in others:
                member.thaw()
            await asyncio.to_thread(alone.wait_until_healthy)
            lonely._calls.repeat_s = RECOVER_S
            last = (await lonely.claim(prefix + b"claim", b"", 0)).mod_revision
            await follower.until_revision(last, RECOVER_S)
    assert "no leader" in caplog.text or "did not answer in time" in caplog.text


@pytest.mark.long
async def test_all_members_are_killed(three: EtcdCluster, etcd: Etcd, prefix: bytes) -> None:
    async with (
        etcd.lease(10) as lease,
        following(etcd, prefix, await etcd.put(prefix, b"", lease.id)) as follower,
    ):
        for member in three.members:
            member.kill()
        with pytest.raises(EtcdUnavailable):
            await etcd.put(prefix, b"")
        await asyncio.to_thread(three.restore)
        last = (await etcd.claim(prefix + b"claim", b"", lease.id)).mod_revision
        await follower.until_revision(last, RECOVER_S)
        refreshed_at = lease._refreshed_at
        await until(lambda: lease._refreshed_at > refreshed_at, RECOVER_S)
        assert not lease.lost.is_set()
        assert etcd.silent_s < RECOVER_S
