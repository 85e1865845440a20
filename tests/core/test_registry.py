"""The registry behaves like a plain dictionary, and its changes, applied one by one, give its list."""

from collections.abc import Mapping
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from regd.core.errors import Code, Refused
from regd.core.limits import DEFAULT, Limits
from regd.core.model import Change, Entry, Holder, Key, Op, State
from regd.core.registry import Registry
from regd.core.transaction import OwnerConflict, Transaction
from tests.support.length import examples


def wanted(
    name: str = "db",
    instance: str = "",
    port: int = 1,
    host: str = "127.0.0.1",
    meta: Mapping[str, str] | None = None,
    state: State = State.READY,
    priority: int = 0,
) -> Entry:
    return Entry(name, instance, host, port, meta or {}, state, 0, 0.0, priority=priority)


def commit(registry: Registry, *entries: Entry, now: float = 0.0) -> list[Change]:
    transaction = Transaction(registry, at=5.0)
    for entry in entries:
        transaction.register(entry)
    registry.apply(transaction.changes, now)
    return transaction.changes


def listed(
    registry: Registry, pattern: str = "*", meta: Mapping[str, str] | None = None, limit: int = 1_000
) -> list[Entry]:
    entries: list[Entry] = []
    after: Key | None = None
    while True:
        page = registry.page(pattern, meta or {}, after, limit)
        entries += page.entries
        after = page.after
        if after is None:
            return entries


def resolve(registry: Registry, name: str, meta: Mapping[str, str] | None = None) -> Entry | None:
    search = registry.search_round_robin(name, None, meta or {}, 1)
    assert search.step(DEFAULT.search_step_max)
    for entry in search.found:
        registry.mark_served(entry, meta or {})
    return search.found[0] if search.found else None


def fold(state: dict[Key, Entry], changes: list[Change]) -> None:
    """Apply changes to a state, as a client does with the events of a watch."""
    for change in changes:
        if change.op is Op.DOWN:
            assert state.pop(change.entry.key) == change.entry
        else:
            assert (change.entry.key in state) is (change.op is Op.CHANGE)
            state[change.entry.key] = change.entry


names = st.sampled_from(["a", "a-b", "a.b", "ab", "b"])
instances = st.sampled_from(["", "-", "1", "z"])
metas = st.sampled_from([{}, {"zone": "a"}, {"zone": "b", "x": "y"}])
states = st.sampled_from(list(State))
priorities = st.sampled_from([0, 0, 1, 65_535])


class Histories(RuleBasedStateMachine):
    """Random batches, some of which are dropped, compared with a plain dictionary.

    `model` is the committed state, and `uncommitted` the state with the changes of the transaction.
    """

    def __init__(self) -> None:
        super().__init__()
        self.registry = Registry()
        self.transaction = Transaction(self.registry, 5.0)
        self.model: dict[Key, tuple[str, int, Mapping[str, str], State, int]] = {}
        self.uncommitted = dict(self.model)
        self.folded: dict[Key, Entry] = {}
        self.rev = 0

    @rule(name=names, instance=instances, port=st.integers(1, 2), meta=metas, state=states, priority=priorities)
    def register(
        self, name: str, instance: str, port: int, meta: Mapping[str, str], state: State, priority: int
    ) -> None:
        entry, replaced = self.transaction.register(
            wanted(name, instance, port, meta=meta, state=state, priority=priority)
        )
        before = self.uncommitted.get((name, instance))
        assert replaced is (before is not None and before[1] != port)
        self.uncommitted[name, instance] = (entry.host, port, meta, state, priority)

    @rule(name=names, instance=instances)
    def deregister(self, name: str, instance: str) -> None:
        if (name, instance) in self.uncommitted:
            self.transaction.deregister((name, instance))
            del self.uncommitted[name, instance]
        else:
            with pytest.raises(Refused) as refusal:
                self.transaction.deregister((name, instance))
            assert refusal.value.code is Code.NOT_FOUND

    @rule(
        name=names,
        instance=instances,
        meta=metas,
        state=st.none() | states,
        priority=st.none() | priorities,
    )
    def update(
        self, name: str, instance: str, meta: Mapping[str, str], state: State | None, priority: int | None
    ) -> None:
        if (name, instance) in self.uncommitted:
            self.transaction.update((name, instance), meta, state, priority=priority)
            host, port, _, before, previous = self.uncommitted[name, instance]
            new = previous if priority is None else priority
            self.uncommitted[name, instance] = (host, port, meta, state or before, new)

    @rule()
    def commit(self) -> None:
        changes = self.transaction.changes
        assert [change.rev for change in changes] == list(range(self.rev + 1, self.rev + 1 + len(changes)))
        self.rev += len(changes)
        self.registry.apply(changes, 0.0)
        fold(self.folded, changes)
        self.model = dict(self.uncommitted)
        self.transaction = Transaction(self.registry, 5.0)

    @rule()
    def drop(self) -> None:
        self.transaction = Transaction(self.registry, 5.0)
        self.uncommitted = dict(self.model)

    @invariant()
    def state_is_the_model(self) -> None:
        entries = listed(self.registry)
        assert {e.key: (e.host, e.port, e.meta, e.state, e.priority) for e in entries} == self.model
        assert [e.key for e in entries] == sorted(self.model)
        assert self.registry.rev == self.rev
        assert self.registry.weight_bytes == sum(e.weight_bytes for e in entries)

    @invariant()
    def folded_changes_are_the_list(self) -> None:
        assert [self.folded[key] for key in sorted(self.folded)] == listed(self.registry, limit=2)

    @invariant()
    def resolve_goes_around_the_best_ready_instances(self) -> None:
        for name in {name for name, _ in self.model}:
            ready = {
                key: value[4] for key, value in self.model.items() if key[0] == name and value[3] is State.READY
            }
            best = {key for key, priority in ready.items() if priority == min(ready.values())}
            seen = [resolve(self.registry, name) for _ in best or (None,)]
            assert {entry.key for entry in seen if entry} == best

    @invariant()
    def sole_ready_entries_are_resolved_every_time(self) -> None:
        for entry in listed(self.registry):
            if self.registry.is_sole_ready(entry):
                assert [resolve(self.registry, entry.name) for _ in range(3)] == [entry] * 3

    @invariant()
    def a_filter_has_its_own_best_priority(self) -> None:
        for name in {name for name, _ in self.model}:
            fits = {
                key: value[4]
                for key, value in self.model.items()
                if key[0] == name and value[3] is State.READY and value[2].get("zone") == "b"
            }
            best = {key for key, priority in fits.items() if priority == min(fits.values())}
            seen = [resolve(self.registry, name, {"zone": "b"}) for _ in best or (None,)]
            assert {entry.key for entry in seen if entry} == best


Histories.TestCase.settings = settings(max_examples=examples(150), stateful_step_count=40, deadline=None)
TestHistories = Histories.TestCase


def test_round_robin_is_even_and_in_order() -> None:
    registry = Registry()
    commit(registry, *(wanted(instance=str(n)) for n in range(3)))
    seen = [resolve(registry, "db") for _ in range(6)]
    assert [entry.instance for entry in seen if entry] == ["0", "1", "2", "0", "1", "2"]


@pytest.mark.parametrize("priorities", [(0, 0), (3, 3), (0, 1), (1, 0), (0, 0, 1), (0, 1, 1)])
def test_sole_ready_entry_has_the_best_priority_alone(priorities: tuple[int, ...]) -> None:
    registry = Registry()
    commit(registry, *(wanted(instance=str(n), priority=each) for n, each in enumerate(priorities)))
    best = min(priorities)
    for entry in registry.instances_of("db"):
        is_sole = entry.priority == best and priorities.count(best) == 1
        assert registry.is_sole_ready(entry) is is_sole


def test_standby_is_not_the_sole_ready_entry_while_the_primary_starts() -> None:
    registry = Registry()
    commit(registry, wanted(instance="a", state=State.STARTING), wanted(instance="b", priority=1))
    assert not any(registry.is_sole_ready(entry) for entry in registry.instances_of("db"))


def test_another_priority_at_the_same_address_is_one_change() -> None:
    registry = Registry()
    commit(registry, wanted(priority=1))
    [change] = commit(registry, wanted(priority=2))
    assert (change.op, change.rev, change.entry.priority, change.previous and change.previous.priority) == (
        Op.CHANGE, 2, 2, 1,
    )  # fmt: skip
    assert commit(registry, wanted(priority=2)) == []
    [change] = commit(registry, wanted())
    assert (change.op, change.entry.priority) == (Op.CHANGE, 0)


def test_update_keeps_values_that_are_none() -> None:
    registry = Registry()
    commit(registry, wanted(meta={"a": "b"}, state=State.STARTING, priority=1))
    transaction = Transaction(registry, 9.0)
    entry = transaction.update(("db", ""), None, None, priority=7)
    assert (entry.meta, entry.state, entry.priority, entry.rev) == ({"a": "b"}, State.STARTING, 7, 2)
    entry = transaction.update(("db", ""), {}, State.READY)
    assert (entry.meta, entry.state, entry.priority, entry.rev) == ({}, State.READY, 7, 3)
    assert transaction.update(("db", ""), None, None, priority=7) is entry
    assert transaction.update(("db", ""), None, None, priority=0).priority == 0


def test_round_robin_among_matching_instances() -> None:
    registry = Registry()
    commit(registry, *(wanted(instance=str(n), meta={"zone": "ab"[n % 2]}) for n in range(4)))
    seen = [resolve(registry, "db", {"zone": "b"}) for _ in range(4)]
    assert [entry.instance for entry in seen if entry] == ["1", "3", "1", "3"]
    assert resolve(registry, "db", {"zone": "c"}) is None


def test_unknown_name_keeps_no_state() -> None:
    registry = Registry()
    commit(registry, wanted())
    for n in range(1_000):
        assert resolve(registry, f"x{n}") is None
        assert resolve(registry, f"x{n}", {"zone": "b"}) is None
    assert (len(registry._instances_by_name), len(registry._served)) == (1, 0)


def test_same_registration_again_is_no_change() -> None:
    registry = Registry()
    commit(registry, wanted(meta={"a": "b"}))
    assert commit(registry, wanted(meta={"a": "b"})) == []
    assert registry.rev == 1


def test_new_address_gives_down_and_up() -> None:
    registry = Registry()
    commit(registry, wanted(port=1))
    changes = commit(registry, wanted(port=2))
    assert [(c.rev, c.op, c.entry.port, c.reason) for c in changes] == [
        (2, Op.DOWN, 1, "replaced"),
        (3, Op.UP, 2, ""),
    ]


def test_meta_change_keeps_the_registration_time() -> None:
    registry = Registry()
    commit(registry, wanted())
    transaction = Transaction(registry, at=99.0)
    entry, _ = transaction.register(wanted(meta={"a": "b"}))
    assert (entry.registered_at, entry.rev) == (5.0, 2)


@pytest.mark.parametrize(
    ("if_rev", "there", "fits"),
    [(0, False, True), (0, True, False), (1, True, True), (2, True, False), (1, False, False)],
)
def test_register_with_if(if_rev: int, there: bool, fits: bool) -> None:
    registry = Registry()
    if there:
        commit(registry, wanted())
    transaction = Transaction(registry, 0.0)
    if fits:
        transaction.register(wanted(port=2), if_rev)
    else:
        with pytest.raises(Refused) as refusal:
            transaction.register(wanted(port=2), if_rev)
        assert refusal.value.code is Code.CONFLICT
        assert refusal.value.details == {"rev": 1 if there else 0}
        assert transaction.changes == []


def test_conditions_apply_within_a_batch() -> None:
    transaction = Transaction(Registry(), 0.0)
    transaction.register(wanted(), if_rev=0)
    with pytest.raises(Refused):
        transaction.register(wanted(port=2), if_rev=0)
    transaction.register(wanted(port=2), if_rev=1)


@pytest.mark.parametrize("count", [2, 3])
def test_registrations_are_limited(count: int) -> None:
    registry = Registry(limits=Limits(registrations_max=3))
    commit(registry, *(wanted(f"n{n}") for n in range(count)))
    transaction = Transaction(registry, 0.0)
    if count < 3:
        transaction.register(wanted("one-more"))
    with pytest.raises(Refused) as refusal:
        transaction.register(wanted("too-many"))
    assert refusal.value.code is Code.BUSY
    transaction.register(wanted("n0", port=2))  # no more than before
    transaction.deregister(("n1", ""))
    transaction.register(wanted("too-many"))


def test_total_bytes_are_limited() -> None:
    entry = wanted(meta={"k": "v" * 100})
    registry = Registry(limits=Limits(registry_bytes_max=entry.weight_bytes))
    commit(registry, entry)
    with pytest.raises(Refused) as refusal:
        Transaction(registry, 0.0).update(entry.key, {"k": "v" * 101}, None)
    assert refusal.value.code is Code.BUSY
    Transaction(registry, 0.0).update(entry.key, {"k": "v" * 99}, None)


@given(
    st.sets(st.tuples(names, instances)),
    st.integers(1, 5),
    st.integers(1, 5),
    st.sampled_from(["*", "a*", "a", "a.b", "b*", "zz*"]),
)
def test_pages_list_every_entry_once(keys: set[Key], limit: int, scan: int, pattern: str) -> None:
    entries = [wanted(name, instance) for name, instance in keys]
    registry = Registry(entries, limits=Limits(list_scan_max=scan))
    prefix = pattern.rstrip("*")
    fits = [key for key in sorted(keys) if key[0].startswith(prefix) and ("*" in pattern or key[0] == prefix)]
    assert [entry.key for entry in listed(registry, pattern, limit=limit)] == fits


def test_entry_present_throughout_is_listed_once() -> None:
    registry = Registry()
    commit(registry, *(wanted(f"n{n:02}") for n in range(10)))
    first = registry.page("*", {}, None, 5)
    transaction = Transaction(registry, 0.0)
    transaction.deregister(("n04", ""))
    transaction.register(wanted("n00a"))
    transaction.register(wanted("n06a"))
    registry.apply(transaction.changes, 0.0)
    second = registry.page("*", {}, first.after, 100)
    assert [entry.name for entry in first.entries + second.entries] == [
        *(f"n{n:02}" for n in range(7)), "n06a", "n07", "n08", "n09",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("asked", "near"),
    [("runnr", "runner"), ("bd", "db"), ("runners", "runner"), ("wroker", "worker"), ("zzzz", None)],
)
def test_suggestions_for_misspelled_names(asked: str, near: str | None) -> None:
    registry = Registry()
    commit(registry, *(wanted(name) for name in ("db", "runner", "worker", "cache")))
    assert registry.near(asked)[:1] == ([near] if near else [])


def test_departures_are_kept_up_to_a_limit() -> None:
    registry = Registry(limits=Limits(departures_max=2))
    for n in range(3):
        commit(registry, wanted(f"n{n}"))
        transaction = Transaction(registry, 0.0)
        transaction.deregister((f"n{n}", ""))
        registry.apply(transaction.changes, now=float(n))
    assert registry.last_departure("n0", 0.0) is None
    last = registry.last_departure("n2", 0.0)
    assert last is not None
    assert (last.reason, last.at) == ("deregistered", 2.0)


def test_suggestions_compare_a_bounded_number_of_names(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []

    def count(name: str, candidates: set[str], most: int) -> list[str]:
        seen.append(len(candidates))
        return []

    monkeypatch.setattr("regd.core.registry.nearest", count)
    registry = Registry([wanted(f"n{n:06}") for n in range(5_000)])
    registry.near("n00250x")
    assert seen == [DEFAULT.near_candidates_max]


def test_batch_reuses_capacity_that_it_freed() -> None:
    first, second = wanted("a"), wanted("b")
    registry = Registry(limits=Limits(registry_bytes_max=first.weight_bytes))
    transaction = Transaction(registry, 0.0)
    transaction.register(first)
    transaction.deregister(first.key)
    transaction.register(second)
    registry.apply(transaction.changes, 0.0)
    assert registry.get(second.key) is not None


def test_conflict_rechecks_the_owner_first() -> None:
    registry = Registry()
    owner = Holder(0, 1, hold=True)
    commit(registry, replace(wanted(), holders=(owner,)))
    rival = replace(wanted(port=2), holders=(replace(owner, session=2),))
    with pytest.raises(OwnerConflict):
        Transaction(registry, 0.0).register(rival, session=2)
    asked: list[Holder] = []
    transaction = Transaction(registry, 0.0, is_gone=lambda holder: not asked.append(holder))  # type: ignore[func-returns-value]
    assert transaction.register(rival, session=2)[1]
    assert [holder.session for holder in asked] == [1]
