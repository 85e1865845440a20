"""A search in steps finds the same instances as a search in one step."""

from hypothesis import given
from hypothesis import strategies as st

from regd.core.instances import Instances, Search, SearchPosition
from regd.core.limits import Limits
from regd.core.model import Entry, State
from regd.core.registry import Registry
from regd.core.transaction import Transaction


def entry(instance: str, port: int = 1, priority: int = 0, **meta: str) -> Entry:
    return Entry("w", instance, "127.0.0.1", port, meta, State.READY, 0, 0.0, priority=priority)


def rank(entry: Entry) -> tuple[int, str]:
    return entry.priority, entry.instance


def registry_of(*entries: Entry, limits: Limits | None = None) -> Registry:
    return Registry(entries, 1, limits or Limits())


instances = st.text(alphabet="abz01", max_size=3)
priorities = st.sampled_from([0, 0, 0, 1, 7, 65_535])


@given(st.lists(st.tuples(st.sampled_from(["", "a", "b1", "z"]), st.none() | priorities)), instances)
def test_instances_behave_like_a_sorted_dict(steps: list[tuple[str, int | None]], asked: str) -> None:
    service, model = Instances(), dict[str, Entry]()
    for count, (instance, priority) in enumerate(steps):
        if priority is not None:
            model[instance] = entry(instance, count + 1, priority)
            service.set(model[instance])
        elif instance in model:
            del model[instance]
            service.remove(instance)
        assert service.entries == [model[key] for key in sorted(model)]
        assert service.ranked == sorted(model.values(), key=rank)
        assert (service.ranked is service.entries) is (len({each.priority for each in model.values()}) <= 1)
    assert service.get(asked) == model.get(asked)
    assert service.index_after(asked) == sum(key <= asked for key in model)


def search_order(entries: list[Entry], served: str | None, after: Entry | None = None) -> list[Entry]:
    """Return entries in the order of a search: by priority, then from the instance after `served` on.

    With `after`, the search begins after that entry, and continues at the beginning.
    """

    def key(entry: Entry) -> tuple[int, bool, str]:
        return entry.priority, served is not None and entry.instance <= served, entry.instance

    ordered = sorted(entries, key=key)
    if after is None:
        return ordered
    return sorted(ordered, key=lambda entry: key(entry) <= key(after))


@given(
    st.dictionaries(instances, st.tuples(priorities, st.booleans())),
    st.none() | instances,
    st.none() | st.tuples(instances, priorities),
    st.integers(1, 9),
    st.integers(1, 9),
)
def test_search_in_steps_equals_a_single_step(
    spread: dict[str, tuple[int, bool]],
    served: str | None,
    begin: tuple[str, int] | None,
    most: int,
    count: int,
) -> None:
    known = [entry(instance, 1 + fits, priority) for instance, (priority, fits) in spread.items()]
    entries = sorted(known, key=rank)
    after = entry(begin[0], priority=begin[1]) if begin else None
    search = Search(
        entries, most, lambda each: each.port == 2, served, SearchPosition(served, after) if after else None
    )
    steps = 1
    while not search.step(count):
        entries.clear()  # changes between two steps have no effect
        steps += 1
    assert search.found == [each for each in search_order(known, served, after) if each.port == 2][:most]
    assert steps <= max(1, -(-len(known) // count))
    if search.found:
        assert search.position == SearchPosition(served, search.found[-1])


def resolved(registry: Registry, **meta: str) -> str:
    search = registry.search_round_robin("w", None, meta, 1)
    assert search.step(1_000)
    registry.mark_served(search.found[0], meta)
    return search.found[0].instance


def test_round_robin_is_among_the_best_priority() -> None:
    registry = registry_of(entry("a", priority=5), entry("b"), entry("c", priority=1), entry("d"))
    assert [resolved(registry) for _ in range(4)] == ["b", "d", "b", "d"]


def test_next_priority_is_used_while_the_best_is_not_ready() -> None:
    registry = registry_of(*(entry(f"{n}", priority=n // 2) for n in range(4)))
    assert [resolved(registry), resolved(registry), resolved(registry)] == ["0", "1", "0"]
    transaction = Transaction(registry, 0.0)
    transaction.update(("w", "0"), None, State.DRAINING)
    registry.apply(transaction.changes, 0.0)
    assert [resolved(registry), resolved(registry)] == ["1", "1"]
    transaction = Transaction(registry, 0.0)
    transaction.deregister(("w", "1"))
    registry.apply(transaction.changes, 0.0)
    assert [resolved(registry) for _ in range(3)] == ["2", "3", "2"]
    transaction = Transaction(registry, 0.0)
    transaction.update(("w", "0"), None, State.READY)
    registry.apply(transaction.changes, 0.0)
    assert [resolved(registry) for _ in range(3)] == ["0", "0", "0"]


def test_best_priority_is_that_of_the_instances_with_the_labels() -> None:
    registry = registry_of(
        entry("a"),
        entry("b", priority=1, zone="x"),
        entry("c", priority=1, zone="x"),
        entry("d", priority=2, zone="x"),
    )
    assert [resolved(registry, zone="x") for _ in range(3)] == ["b", "c", "b"]
    assert resolved(registry) == "a"


def test_each_filter_has_its_own_round_robin_position() -> None:
    registry = registry_of(*(entry(f"{n}", zone="ab"[n % 2], n=f"{n}") for n in range(6)))
    seen: dict[str, list[str]] = {"a": [], "b": [], "": []}
    for _ in range(12):
        for zone, got in seen.items():
            got.append(resolved(registry, **({"zone": zone} if zone else {})))
            resolved(registry, n="3")
    for zone, among in (("a", "024"), ("b", "135"), ("", "012345")):
        got = seen[zone]
        assert got == got[: len(among)] * (12 // len(among))
        assert set(got) == set(among)


def test_round_robin_continues_when_instances_change() -> None:
    registry = registry_of(*(entry(f"{n}") for n in (1, 2, 3)))
    assert [resolved(registry), resolved(registry)] == ["1", "2"]
    transaction = Transaction(registry, 0.0)
    transaction.deregister(("w", "2"))
    transaction.register(entry("4"))
    registry.apply(transaction.changes, 0.0)
    assert [resolved(registry) for _ in range(3)] == ["3", "4", "1"]


def test_round_robin_positions_are_kept_for_a_bounded_number_of_filters() -> None:
    meta = {f"k{m}": "v" for m in range(50)}
    entries = [Entry("w", f"{n}", "127.0.0.1", 1, meta, State.READY, 0, 0.0) for n in range(3)]
    registry = registry_of(*entries, limits=Limits(round_robin_filters_max=10))
    for m in range(50):
        resolved(registry, **{f"k{m}": "v"})
    assert len(registry._served) == 10
