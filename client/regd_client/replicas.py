"""The numbers of copies: the instances that a registration with `instance="auto"` tries.

To the daemon they are ordinary instances. The client sends the revision that it has seen (`if`) with each
attempt, so that if two copies try a number at once, only one gets it. For two copies in one process, this is the
only protection: without `if`, the daemon lets a process replace its own registration.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

__all__ = ["candidates", "has_older_number", "is_number", "is_taken"]


def is_number(instance: str) -> bool:
    """Return whether an instance name is the number of a copy: an integer from 1, without leading zeros."""
    return instance.isascii() and instance.isdigit() and instance[0] != "0"


def candidates(
    entries: Iterable[Mapping[str, Any]],
    address: tuple[str, int | None],
    own_pids: Collection[int | None],
    previous: str = "",
) -> Iterator[tuple[str, int]]:
    """Yield the instances to try, each with the `if` of its `register`: its revision, 0 if it must not exist.

    If a copy is registered at this address, only its number is yielded, because workers of one server share a
    number. Otherwise `previous` comes first, then all numbers in order, without end.

    Args:
        entries: all instances of the service, as `list` returns them.
        address: the address at which the copy listens.
        own_pids: processes whose numbers are left out, because the daemon would let a process replace its own
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


def has_older_number(
    entries: Iterable[Mapping[str, Any]], address: tuple[str, int | None], instance: str
) -> bool:
    """Return whether the address already had another number when it got this one.

    Two workers of one server that start together get different numbers if a lower number becomes free between
    their requests.
    """
    revs = {
        entry["instance"]: entry["rev"]
        for entry in entries
        if is_number(entry["instance"]) and (entry["host"], entry["port"]) == address
    }
    return instance in revs and min(revs.values()) < revs[instance]


def _may_be_dead(entry: Mapping[str, Any]) -> bool:
    """Return whether the daemon may let another client replace a listed entry: it has no live owner.

    A process may have died, because the daemon asks the kernel only before it refuses a request. An entry that
    only a connection holds has a live owner, since the end of the connection would have ended it. After a restart
    of the daemon it waits for its client, and must not be replaced either.
    """
    return "pid" in entry or not ("hold" in entry or "ttl" in entry)


def is_taken(details: Mapping[str, Any]) -> bool:
    """Return whether a `conflict` with these details means that a live owner holds the number.

    If not, it means that the registration has changed since it was listed.
    """
    return "owner" in details
