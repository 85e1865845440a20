"""Deadlines are exact, can be prolonged together, and are checked a bounded number at a time."""

import heapq

import pytest

from regd.core import holders as module
from regd.core.holders import HolderIndex
from regd.core.model import Entry, Holder, Key, State


def leased(n: int, ttl_s: float) -> Entry:
    return Entry(f"n{n}", "", "127.0.0.1", 1, {}, State.READY, 0, 0.0, (Holder(n, 1, ttl_s=ttl_s),))


def ended(lifetimes: HolderIndex, now: float) -> list[Key]:
    """Expire as the daemon does: as often as there is something to say by now."""
    keys = []
    while (deadline := lifetimes.next_deadline()) is not None and deadline <= now:
        keys += [ending.holder[0] for ending in lifetimes.expire(now, 256) if ending.holder]
    return keys


def test_deadlines_are_exact_after_renewals() -> None:
    lifetimes = HolderIndex(30.0)
    entries = [leased(n, 5.0 + n % 7) for n in range(2_000)]
    due = {}
    for entry in entries:
        lifetimes.move(None, entry, 0.0)
    for now in range(1, 5):
        for n, entry in enumerate(entries):
            if n % 3 == now % 3:
                lifetimes.renew(entry.key, entry.holders[0], float(now), 3.0 + n % 11)
                due[entry.key] = now + 3.0 + n % 11
    due = {entry.key: due.get(entry.key, 5.0 + n % 7) for n, entry in enumerate(entries)}
    for now in range(5, 20):
        assert sorted(ended(lifetimes, float(now))) == sorted(key for key, end in due.items() if end == now)
    assert lifetimes.next_deadline() is None


def test_prolong_moves_existing_deadlines_only() -> None:
    lifetimes = HolderIndex(30.0)
    one, two = leased(1, 5.0), leased(2, 5.0)
    lifetimes.move(None, one, 0.0)
    lifetimes.prolong(100.0)
    lifetimes.move(None, two, 100.0)
    assert lifetimes.next_deadline() == 105.0
    lifetimes.prolong(1.0)
    assert ended(lifetimes, 105.9) == []
    assert sorted(ended(lifetimes, 106.0)) == [one.key, two.key]


def test_one_pass_drops_a_bounded_number_of_outdated_deadlines(monkeypatch: pytest.MonkeyPatch) -> None:
    """200,000 renewed leases must not hold the loop in the moment in which they would have ended."""
    lifetimes = HolderIndex(30.0)
    entries = [leased(n, 5.0) for n in range(5_000)]
    for entry in entries:
        lifetimes.move(None, entry, 0.0)
    for entry in entries:
        lifetimes.renew(entry.key, entry.holders[0], 1.0, 5.0)
    taken = 0

    def pop(queue: list[module.Record]) -> module.Record:
        nonlocal taken
        taken += 1
        return heapq.heappop(queue)

    monkeypatch.setattr(module, "heappop", pop)
    looks = 0
    while (deadline := lifetimes.next_deadline()) is not None and deadline < 6.0:
        assert lifetimes.expire(5.0, 256) == []
        assert taken <= 3 * 256
        taken = 0
        looks += 1
    assert looks > 5
    assert lifetimes.next_deadline() == 6.0


def test_outdated_deadlines_use_little_memory() -> None:
    """A day long each, and renewed or given up at once."""
    lifetimes = HolderIndex(30.0)
    kept = leased(0, 86_400.0)
    lifetimes.move(None, kept, 0.0)
    most = 0
    for n in range(1, 5_000):
        entry = leased(n, 86_400.0)
        lifetimes.move(None, entry, float(n))
        lifetimes.renew(entry.key, entry.holders[0], float(n), 80_000.0)
        lifetimes.renew(kept.key, kept.holders[0], float(n), 86_400.0)
        lifetimes.move(entry, None, float(n))
        most = max(most, len(lifetimes._queue) + len(lifetimes._shrinking))
    assert most < 300
    assert lifetimes.next_deadline() is not None
    assert ended(lifetimes, 4_999 + 86_400.0) == [kept.key]
