"""The difference of two pictures, as a list of actions. Pure; both directions of the bridge use it."""

from collections.abc import Hashable, Iterable, Mapping
from typing import Generic, NamedTuple, TypeVar

__all__ = ["Action", "difference"]

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class Action(NamedTuple, Generic[K, V]):
    """What makes `key` as wanted: set it to `new`, or remove it if that is None. `old` is what it has."""

    key: K
    old: V | None
    new: V | None


def difference(
    wanted: Mapping[K, V], actual: Mapping[K, V], keys: Iterable[K] | None = None
) -> list[Action[K, V]]:
    """Return the actions that turn one picture into another, one for each key that differs.

    Removals come first: they make room.

    Args:
        wanted, actual: the pictures.
        keys: look at these only; by default at all.
    """
    if keys is None:
        keys = dict.fromkeys([*actual, *wanted])
    actions = [
        Action(key, old, new)
        for key in keys
        if (old := actual.get(key)) != (new := wanted.get(key)) or (key in actual) != (key in wanted)
    ]
    actions.sort(key=lambda action: action.new is not None)
    return actions
