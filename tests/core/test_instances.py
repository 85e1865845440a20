"""A search among many instances in slices finds what one search finds."""

from hypothesis import given
from hypothesis import strategies as st

from regd.core.instances import Instances, Search
from regd.core.limits import Limits
from regd.core.model import Entry, State
from regd.core.registry import Registry
from regd.core.transaction import Transaction


def entry(instance: str, port: int = 1, **meta: str) -> Entry:
    return Entry("w", instance, "127.0.0.1", port, meta, State.READY, 0, 0.0)


def registry_of(*entries: Entry, limits: Limits | None = None) -> Registry:
    return Registry(entries, 1, limits or Limits())


instances = st.text(alphabet="abz01", max_size=3)


@given(st.lists(st.tuples(instances, st.booleans())), instances)
def test_service_behaves_like_an_ordered_dict(steps: list[tuple[str, bool]], asked: str) -> None:
    service, model = Instances(), dict[str, Entry]()
    for count, (instance, stays) in enumerate(steps):
        if stays:
            model[instance] = entry(instance, count + 1)
            service.set(model[instance])
        elif instance in model:
            del model[instance]
            service.remove(instance)
    assert service.entries == [model[key] for key in sorted(model)]
    assert service.get(asked) == model.get(asked)
    assert service.behind(asked) == sum(key <= asked for key in model)


@given(st.lists(st.booleans()), st.integers(0, 9), st.integers(1, 9), st.integers(1, 9))
def test_sliced_search_equals_one_search(fits: list[bool], start: int, most: int, looks: int) -> None:
    entries = [entry(f"{n:03}", port=1 + yes) for n, yes in enumerate(fits)]
    start = min(start, len(entries))
    search = Search(entries, start, most, lambda each: each.port == 2)
    turns = 1
    while not search.go_on(looks):
        entries.clear()  # what happens between two slices changes nothing
        turns += 1
    around = [*range(start, len(fits)), *range(start)]
    assert [entry.instance for entry in search.found] == [f"{n:03}" for n in around if fits[n]][:most]
    assert turns <= max(1, -(-len(fits) // looks))


def served(registry: Registry, **meta: str) -> str:
    search = registry.search_in_turn("w", None, meta, 1)
    assert search.go_on(1_000)
    registry.mark_served(search.found[0], meta)
    return search.found[0].instance


def test_each_filter_has_its_own_round_robin_position() -> None:
    registry = registry_of(*(entry(f"{n}", zone="ab"[n % 2], n=f"{n}") for n in range(6)))
    seen: dict[str, list[str]] = {"a": [], "b": [], "": []}
    for _ in range(12):
        for zone, got in seen.items():
            got.append(served(registry, **({"zone": zone} if zone else {})))
            served(registry, n="3")
    for zone, among in (("a", "024"), ("b", "135"), ("", "012345")):
        got = seen[zone]
        assert got == got[: len(among)] * (12 // len(among))
        assert set(got) == set(among)


def test_round_robin_continues_when_instances_change() -> None:
    registry = registry_of(*(entry(f"{n}") for n in (1, 2, 3)))
    assert [served(registry), served(registry)] == ["1", "2"]
    transaction = Transaction(registry, 0.0)
    transaction.deregister(("w", "2"))
    transaction.register(entry("4"))
    registry.apply(transaction.changes, 0.0)
    assert [served(registry) for _ in range(3)] == ["3", "4", "1"]


def test_round_robin_positions_are_kept_for_a_bounded_number_of_filters() -> None:
    meta = {f"k{m}": "v" for m in range(50)}
    entries = [Entry("w", f"{n}", "127.0.0.1", 1, meta, State.READY, 0, 0.0) for n in range(3)]
    registry = registry_of(*entries, limits=Limits(round_robin_filters_max=10))
    for m in range(50):
        served(registry, **{f"k{m}": "v"})
    assert len(registry._served) == 10
