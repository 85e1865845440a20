"""The state from which DNS answers: the registered names and their instances."""

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from regd.gateways.discovery import best_instances

__all__ = ["NameIndex", "is_own_name"]

Instance = Mapping[str, Any]


def is_own_name(name: str) -> bool:
    """Return whether the zone itself uses the name. A service of that name is not in DNS."""
    labels = name.split(".")
    return name == "ns" or labels[-1] == "addr" or is_service_prefix(labels)


def is_service_prefix(labels: list[str] | tuple[str, ...]) -> bool:
    """Return whether the labels begin with `_SERVICE._tcp`, as the names of SRV records do (RFC 2782)."""
    return len(labels) >= 2 and labels[0].startswith("_") and labels[1] == "_tcp"


class NameIndex:
    """The registered names and their instances, by name."""

    def __init__(self) -> None:
        self._names: dict[str, dict[str, Instance]] = {}
        self._below: Counter[str] = Counter()  # by name: the number of registered names that end with .NAME
        self._best: dict[str, list[Instance]] = {}  # computed by `best`, and kept until the name changes

    def __len__(self) -> int:
        return len(self._names)

    def __contains__(self, name: str) -> bool:
        """Return whether an instance of the name is registered, in any state."""
        return name in self._names

    def has_names_below(self, name: str) -> bool:
        """Return whether a registered name ends with .NAME."""
        return name in self._below

    def best(self, name: str) -> list[Instance]:
        """Return the ready instances of the best priority."""
        if name not in self._names:
            return []
        if name not in self._best:
            self._best[name] = best_instances(self._names[name].values())
        return self._best[name]

    def put(self, instance: Instance) -> None:
        """Add an instance, or replace it."""
        name = instance["name"]
        if is_own_name(name):
            return
        if name not in self._names:
            self._names[name] = {}
            self._below.update(_ends(name))
        self._names[name][instance["instance"]] = instance
        self._best.pop(name, None)

    def remove(self, name: str, instance: str) -> None:
        """Remove an instance. Without effect if it is not in the index."""
        instances = self._names.get(name, {})
        self._best.pop(name, None)
        if instances.pop(instance, None) is not None and not instances:
            del self._names[name]
            for end in _ends(name):
                self._below[end] -= 1
                if not self._below[end]:
                    del self._below[end]


def _ends(name: str) -> Iterator[str]:
    """Yield the names above a name: `shop.web` and `web` for `eu.shop.web`."""
    while "." in name:
        name = name.partition(".")[2]
        yield name
