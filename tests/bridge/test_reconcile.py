"""Applying the difference of two mappings to the first gives the second."""

from hypothesis import given
from hypothesis import strategies as st

from regd.bridge.reconcile import Action, difference

MAPPINGS = st.dictionaries(st.text("abc", max_size=2), st.integers(0, 3))


def apply(mapping: dict[str, int], actions: list[Action[str, int]]) -> dict[str, int]:
    changed = dict(mapping)
    for key, old, new in actions:
        assert changed.get(key) == old
        if new is None:
            del changed[key]
        else:
            changed[key] = new
    return changed


@given(MAPPINGS, MAPPINGS)
def test_the_difference_leads_from_one_mapping_to_the_other(
    wanted: dict[str, int], actual: dict[str, int]
) -> None:
    actions = difference(wanted, actual)
    assert apply(actual, actions) == wanted
    assert len({action.key for action in actions}) == len(actions)


@given(MAPPINGS, MAPPINGS)
def test_idempotence(wanted: dict[str, int], actual: dict[str, int]) -> None:
    assert difference(wanted, wanted) == []
    assert difference(wanted, apply(actual, difference(wanted, actual))) == []


@given(MAPPINGS, MAPPINGS, st.lists(st.text("abc", max_size=2)))
def test_only_the_keys_that_are_looked_at(
    wanted: dict[str, int], actual: dict[str, int], keys: list[str]
) -> None:
    actions = difference(wanted, actual, dict.fromkeys(keys))
    assert actions == [action for action in difference(wanted, actual, dict.fromkeys(keys)) if action.key in keys]
    changed = apply(actual, actions)
    assert {key: changed.get(key) for key in keys} == {key: wanted.get(key) for key in keys}
    assert {key: value for key, value in changed.items() if key not in keys} == {
        key: value for key, value in actual.items() if key not in keys
    }


@given(MAPPINGS, MAPPINGS)
def test_removals_come_first(wanted: dict[str, int], actual: dict[str, int]) -> None:
    removals = [action.new is None for action in difference(wanted, actual)]
    assert removals == sorted(removals, reverse=True)
