"""The difference of two mappings, as a list of actions. Pure; both directions of the bridge use it."""

from collections.abc import Hashable, Iterable, Mapping
from typing import Generic, NamedTuple, TypeVar

__all__ = ["Action", "difference"]

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class Action(NamedTuple, Generic[K, V]):
    """Change `key` from `old` to `new`. None: it is absent."""

    key: K
    old: V | None
    new: V | None


def difference(
    wanted: Mapping[K, V], actual: Mapping[K, V], keys: Iterable[K] | None = None
) -> list[Action[K, V]]:
    """Return the actions that turn `actual` into `wanted`, one for each key that differs.

    Removals come first: they make room.

    Args:
        wanted, actual: the mappings.
        keys: compare only these; all by default.
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
