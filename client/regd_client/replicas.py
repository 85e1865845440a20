"""The numbers of copies: which instances a registration with `instance="auto"` tries.

To the daemon they are ordinary instances. The client tries a number together with the revision that it has seen
(`if`), so of two copies that try a number at once only one gets it. That matters for two copies in one process:
without `if`, the daemon lets a process replace its own registration.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

__all__ = ["has_older_twin", "is_number", "is_taken", "places"]


def is_number(instance: str) -> bool:
    """Return whether an instance is that of a copy: a number from 1, without leading zeros."""
    return instance.isascii() and instance.isdigit() and instance[0] != "0"


def places(
    entries: Iterable[Mapping[str, Any]],
    address: tuple[str, int | None],
    own_pids: Collection[int | None],
    previous: str = "",
) -> Iterator[tuple[str, int]]:
    """Yield the instances to try, each with the revision at which it may be taken, 0 if it must not exist.

    If a copy is registered at this address, it is the only one: workers of one server share a number. Otherwise
    the numbers come in order, after `previous`, the number that the copy had before. There is no end.

    Args:
        entries: all instances of the service, as `list` returns them.
        address: where the copy listens.
        own_pids: processes that must not lose a number to this copy: the daemon lets a process replace its own
            registration.
        previous: the number that the copy had before, "" if it had none.
    """
    numbered = {entry["instance"]: entry for entry in entries if is_number(entry["instance"])}
    for instance in sorted(numbered, key=int):
        if (numbered[instance]["host"], numbered[instance]["port"]) == address:
            yield instance, numbered[instance]["rev"]
            return
    if previous and previous not in numbered:
        yield previous, 0
    for number in itertools.count(1):
        entry = numbered.get(str(number))
        if entry is None:
            yield str(number), 0
        elif _may_be_dead(entry) and entry.get("pid") not in own_pids:
            yield str(number), entry["rev"]


def has_older_twin(entries: Iterable[Mapping[str, Any]], address: tuple[str, int | None], instance: str) -> bool:
    """Return whether the address had another number already when it got this one.

    Two workers of one server that start together get two numbers if a lower one becomes free between their looks.
    """
    revs = {
        entry["instance"]: entry["rev"]
        for entry in entries
        if is_number(entry["instance"]) and (entry["host"], entry["port"]) == address
    }
    return instance in revs and min(revs.values()) < revs[instance]


def _may_be_dead(entry: Mapping[str, Any]) -> bool:
    """Return whether the daemon may let others replace an entry that it has listed.

    Before it refuses, it asks the kernel whether the process is gone. A connection that is gone has ended its
    registration, and one that only waits for its client after a restart of the daemon must not be replaced.
    """
    return "pid" in entry or not ("hold" in entry or "ttl" in entry)


def is_taken(details: Mapping[str, Any]) -> bool:
    """Return whether a `conflict` with these details says that a living owner holds the number.

    Otherwise the registration has changed since it was listed.
    """
    return "owner" in details
