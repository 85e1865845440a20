"""Quotas, without sockets: which connections are dropped, which requests are refused, and the order of slots."""

import pytest

from regd.core.errors import Refused
from regd.server.quotas import BufferQuota, MemoryQuota, Slots


class Peer:
    def __init__(self, name: str = "") -> None:
        self.name = name
        self.grants = 0

    def refuse(self, refusal: Refused) -> None: ...

    def cut(self) -> None: ...

    def slot_granted(self) -> None:
        self.grants += 1


def test_buffered_bytes_are_counted_by_connection_and_in_total() -> None:
    quota, one, two = BufferQuota(100), Peer(), Peer()
    assert quota.record(one, 60) == quota.record(two, 40) == []
    assert quota.total == 100
    assert quota.record(one, 10) == []
    assert quota.total == 50
    assert quota.record(one, 0) == quota.record(two, 0) == quota.record(two, 0) == []
    assert (quota.total, quota._sizes) == (0, {})


@pytest.mark.parametrize(
    ("sizes", "dropped"), [([50, 50], 0), ([50, 51], 1), ([20, 30, 51], 1), ([34, 34, 34], 1)]
)
def test_largest_connections_are_dropped_beyond_the_limit(sizes: list[int], dropped: int) -> None:
    quota, peers = BufferQuota(100), [Peer(str(size)) for size in sizes]
    result = [quota.record(peer, size) for peer, size in zip(peers, sizes, strict=True)][-1]
    largest = sorted(sizes, reverse=True)[:dropped]
    assert [getattr(peer, "name", None) for peer in result] == [str(size) for size in largest]


def test_connections_are_dropped_down_to_seven_eighths() -> None:
    quota = BufferQuota(80)
    for _ in range(8):
        quota.record(Peer(), 10)
    to_drop = quota.record(Peer(), 1)
    assert len(to_drop) == 2  # 81 - 2 * 10 <= 70 < 81 - 10
    for peer in to_drop:
        quota.record(peer, 0)
    assert quota.total == 61


def test_memory_is_refused_beyond_the_limit_and_released() -> None:
    quota = MemoryQuota(100)
    quota.check(100)
    quota.take(60)
    with pytest.raises(Refused, match="60 bytes"):
        quota.check(41)
    quota.check(40)
    quota.release(60)
    assert quota.total == 0


def test_slots_are_granted_in_order_of_arrival() -> None:
    slots, peers = Slots(1), [Peer() for _ in range(3)]
    assert [slots.acquire(peer) for peer in peers] == [True, False, False]
    assert slots.acquire(peers[0])  # it already has a slot
    slots.release(peers[0])
    assert [peer.grants for peer in peers] == [0, 1, 0]
    assert not slots.acquire(peers[0])  # after the others
    slots.release(peers[1])
    slots.release(peers[1])
    assert [peer.grants for peer in peers] == [0, 1, 1]


def test_connection_that_stopped_waiting_gets_no_slot() -> None:
    slots, peers = Slots(1), [Peer() for _ in range(3)]
    for peer in peers:
        slots.acquire(peer)
    slots.release(peers[1])
    slots.release(peers[0])
    assert [peer.grants for peer in peers] == [0, 0, 1]
    slots.release(peers[2])
    assert (slots._taken, slots._waiting) == (set(), {})
