"""What is registered at a fake, and who holds it, in words. Must not know what becomes of either."""

import time
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

Key = tuple[str, str]  # name and instance


@dataclass(frozen=True, eq=False)
class Holder:
    """A connection (`hold`), else a process (`pid`), else nobody in particular. A withdrawn one keeps nothing."""

    session: object | None  # None: from before a restart; with `hold`, not claimed since
    hold: bool
    pid: int | None
    ttl: float | None
    withdrawn: bool = False

    def is_same(self, other: "Holder") -> bool:
        """Whether `other` is this one again."""
        if self.hold or other.hold:
            return self.hold and other.hold and self.session is not None and self.session is other.session
        return self.pid == other.pid

    def is_claimed_by(self, other: "Holder") -> bool:
        return self.unclaimed and other.hold and self.pid == other.pid

    @property
    def unclaimed(self) -> bool:
        return self.hold and self.session is None


@dataclass(frozen=True, eq=False)
class Entry:
    """One registration as it stands at `rev`. A change makes another."""

    name: str
    instance: str
    host: str
    port: int
    meta: Mapping[str, str]
    state: str
    holders: tuple[Holder, ...] = ()
    rev: int = 0
    registered_at: float = 0.0

    @property
    def key(self) -> Key:
        return self.name, self.instance

    @property
    def text(self) -> str:
        """NAME or NAME/INSTANCE."""
        return f"{self.name}/{self.instance}" if self.instance else self.name

    def shown(self) -> dict[str, Any]:
        """Return the instance object of the wire."""
        fields: dict[str, Any] = {
            "name": self.name,
            "instance": self.instance,
            "host": self.host,
            "port": self.port,
            "meta": dict(self.meta),
            "state": self.state,
            "rev": self.rev,
            "registered_at": self.registered_at,
        }
        if any(each.hold for each in self.holders):
            fields["hold"] = True
        for each in reversed(self.holders):  # the first that has one is told
            if each.pid is not None:
                fields["pid"] = each.pid
            if each.ttl is not None:
                fields["ttl"] = whole(each.ttl)
        return fields

    def looks_like(self, other: "Entry") -> bool:
        """Whether others see the same of both, but for `rev`."""
        return self.shown() | {"rev": 0} == other.shown() | {"rev": 0}

    def carries(self, meta: Mapping[str, str]) -> bool:
        return all(self.meta.get(key) == value for key, value in meta.items())


def whole(seconds: float) -> float | int:
    """Return 10 for 10.0."""
    return int(seconds) if seconds.is_integer() else seconds


class Change(NamedTuple):
    """`entry` is the new one, for `down` the last one; `before` what stood there until then."""

    rev: int
    kind: str
    entry: Entry
    before: Entry | None
    reason: str = ""


class Departure(NamedTuple):
    instance: str
    reason: str
    at: float  # monotonic seconds

    @property
    def age_s(self) -> float:
        return round(time.monotonic() - self.at, 3)


def fits(pattern: str, name: str) -> bool:
    return name.startswith(pattern[:-1]) if pattern.endswith("*") else name == pattern


def described(holder: Holder) -> dict[str, object]:
    """Return who holds, as people are told."""
    owner: dict[str, object] = {}
    if holder.hold:
        owner["connection"] = None if holder.session is None else str(holder.session)
    if holder.pid is not None:
        owner["pid"] = holder.pid
    if holder.ttl is not None:
        owner["ttl"] = whole(holder.ttl)
    if holder.withdrawn:
        owner["withdrawn"] = True
    return owner


def is_mine(holder: Holder, wanted: Entry, session: object | None) -> bool:
    if session is not None and holder.session is session:
        return True
    return holder.pid is not None and any(holder.pid == wish.pid for wish in wanted.holders)


def with_withdrawn(holders: Iterable[Holder], which: Collection[Holder]) -> tuple[Holder, ...]:
    return tuple(replace(each, withdrawn=True) if each in which else each for each in holders)
