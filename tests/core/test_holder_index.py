"""Deadlines of leases: exact after renewals, prolonged together, and handled in bounded time and memory."""

import heapq

import pytest

from regd.core import holders as module
from regd.core.holders import HolderIndex
from regd.core.model import Entry, Holder, Key, State


def leased(n: int, ttl_s: float) -> Entry:
    return Entry(f"n{n}", "", "127.0.0.1", 1, {}, State.READY, 0, 0.0, (Holder(n, 1, ttl_s=ttl_s),))


def ended(holders: HolderIndex, now: float) -> list[Key]:
    """Expire all leases that end by `now`, in as many calls as the daemon makes."""
    keys = []
    while (deadline := holders.next_deadline()) is not None and deadline <= now:
        keys += [ending.holder[0] for ending in holders.expire(now, 256) if ending.holder]
    return keys


def test_deadlines_are_exact_after_renewals() -> None:
    holders = HolderIndex(30.0)
    entries = [leased(n, 5.0 + n % 7) for n in range(2_000)]
    due = {}
    for entry in entries:
        holders.update(None, entry, 0.0)
    for now in range(1, 5):
        for n, entry in enumerate(entries):
            if n % 3 == now % 3:
                holders.renew(entry.key, entry.holders[0], float(now), 3.0 + n % 11)
                due[entry.key] = now + 3.0 + n % 11
    due = {entry.key: due.get(entry.key, 5.0 + n % 7) for n, entry in enumerate(entries)}
    for now in range(5, 20):
        assert sorted(ended(holders, float(now))) == sorted(key for key, end in due.items() if end == now)
    assert holders.next_deadline() is None


def test_prolong_moves_existing_deadlines_only() -> None:
    holders = HolderIndex(30.0)
    one, two = leased(1, 5.0), leased(2, 5.0)
    holders.update(None, one, 0.0)
    holders.prolong(100.0)
    holders.update(None, two, 100.0)
    assert holders.next_deadline() == 105.0
    holders.prolong(1.0)
    assert ended(holders, 105.9) == []
    assert sorted(ended(holders, 106.0)) == [one.key, two.key]


def test_one_pass_drops_a_bounded_number_of_outdated_deadlines(monkeypatch: pytest.MonkeyPatch) -> None:
    """200,000 renewed leases must not hold the event loop at the time of their first deadlines."""
    holders = HolderIndex(30.0)
    entries = [leased(n, 5.0) for n in range(5_000)]
    for entry in entries:
        holders.update(None, entry, 0.0)
    for entry in entries:
        holders.renew(entry.key, entry.holders[0], 1.0, 5.0)
    taken = 0

    def pop(queue: list[module.Record]) -> module.Record:
        nonlocal taken
        taken += 1
        return heapq.heappop(queue)

    monkeypatch.setattr(module, "heappop", pop)
    calls = 0
    while (deadline := holders.next_deadline()) is not None and deadline < 6.0:
        assert holders.expire(5.0, 256) == []
        assert taken <= 3 * 256
        taken = 0
        calls += 1
    assert calls > 5
    assert holders.next_deadline() == 6.0


def test_outdated_deadlines_use_little_memory() -> None:
    """Each lease lasts a day, and is renewed and then ended at once."""
    holders = HolderIndex(30.0)
    kept = leased(0, 86_400.0)
    holders.update(None, kept, 0.0)
    most = 0
    for n in range(1, 5_000):
        entry = leased(n, 86_400.0)
        holders.update(None, entry, float(n))
        holders.renew(entry.key, entry.holders[0], float(n), 80_000.0)
        holders.renew(kept.key, kept.holders[0], float(n), 86_400.0)
        holders.update(entry, None, float(n))
        most = max(most, len(holders._queue) + len(holders._shrinking))
    assert most < 300
    assert holders.next_deadline() is not None
    assert ended(holders, 4_999 + 86_400.0) == [kept.key]
