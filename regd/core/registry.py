"""The registry: what is registered, who is near, who left.

Two states, each with one home. `Registry` is what has landed: the file holds it, readers see it. `Draft` is
what will be true once the batch that is being put together has landed; conditions are judged against it.
Changes go from a draft to the file to `Registry.land`. Must not know files, sockets, or what time it is.
"""

from bisect import bisect_left, bisect_right, insort
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from difflib import SequenceMatcher

from regd.core.errors import Code, Refused
from regd.core.limits import DEFAULT, Limits
from regd.core.model import Change, Entry, Key, Op, State

_AFTER_ANY = chr(0x7F)  # sorts behind every character of a name and of an instance


@dataclass(slots=True)
class _Turns:
    """The ready instances of one name, and whose turn it is."""

    ready: list[Entry] | None = None  # None: to be collected anew
    turn: int = 0


@dataclass(frozen=True, slots=True)
class Page:
    """A part of a list, in order of keys; `after` is where the next part goes on, None at the end."""

    entries: list[Entry]
    after: Key | None


@dataclass(frozen=True, slots=True)
class Departure:
    reason: str
    at: float  # monotonic seconds, as `now`


class Registry:
    """What has landed."""

    def __init__(self, entries: Iterable[Entry] = (), rev: int = 0, limits: Limits = DEFAULT) -> None:
        self.limits = limits
        self.rev = rev
        self._entries: dict[Key, Entry] = {entry.key: entry for entry in entries}
        self._keys: list[Key] = sorted(self._entries)
        self._turns: dict[str, _Turns] = {}  # only of names that were resolved
        self._departures: OrderedDict[str, Departure] = OrderedDict()
        self.weight_bytes = sum(entry.weight_bytes for entry in self._entries.values())

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, key: Key) -> Entry | None:
        return self._entries.get(key)

    def land(self, changes: Iterable[Change], now: float) -> None:
        """Make the changes of a draft, in their order, visible to readers."""
        for change in changes:
            entry = change.entry
            before = self._entries.get(entry.key)
            if before is not None:
                self.weight_bytes -= before.weight_bytes
            if change.op is Op.DOWN:
                del self._entries[entry.key]
                del self._keys[bisect_left(self._keys, entry.key)]
                self._departed(entry.name, Departure(change.reason, now))
            else:
                if before is None:
                    insort(self._keys, entry.key)
                self._entries[entry.key] = entry
                self.weight_bytes += entry.weight_bytes
            turns = self._turns.get(entry.name)
            if turns is not None:
                turns.ready = None
            self.rev = change.rev

    def _departed(self, name: str, departure: Departure) -> None:
        if not self._has(name):
            self._turns.pop(name, None)
        self._departures[name] = departure
        self._departures.move_to_end(name)
        if len(self._departures) > self.limits.departures_max:
            self._departures.popitem(last=False)

    def _has(self, name: str) -> bool:
        at = bisect_left(self._keys, (name, ""))
        return at < len(self._keys) and self._keys[at][0] == name

    def _named(self, name: str) -> Iterator[Entry]:
        start = bisect_left(self._keys, (name, ""))
        for key in self._keys[start : bisect_right(self._keys, (name, _AFTER_ANY), lo=start)]:
            yield self._entries[key]

    # Resolving.

    def ready(self, name: str) -> list[Entry]:
        """Return the ready instances of a name, in order of instance."""
        turns = self._turns.get(name)
        if turns is None:
            if not self._has(name):
                return []  # a name that nobody has must cost no memory
            turns = self._turns[name] = _Turns()
        if turns.ready is None:
            turns.ready = [entry for entry in self._named(name) if entry.state is State.READY]
        return turns.ready

    def resolve(self, name: str, instance: str | None, meta: Mapping[str, str]) -> Entry | None:
        """Return a ready instance that carries `meta`, taking turns; None when there is none."""
        if instance is not None:
            entry = self._entries.get((name, instance))
            return entry if entry and entry.state is State.READY and entry.carries(meta) else None
        ready = self.ready(name)
        if not ready:
            return None
        turns = self._turns[name]
        for step in range(len(ready)):
            at = (turns.turn + step) % len(ready)
            if not meta or ready[at].carries(meta):
                turns.turn = at + 1
                return ready[at]
        return None

    # Listing.

    def page(self, pattern: str, meta: Mapping[str, str], after: Key | None, limit: int) -> Page:
        """List up to `limit` entries behind `after` whose name fits `pattern` and that carry `meta`.

        A page may hold fewer, none even, and still have an `after`: only so many entries are looked at.
        """
        prefix, any_end = (pattern[:-1], True) if pattern.endswith("*") else (pattern, False)
        start = bisect_left(self._keys, (prefix, ""))
        if after is not None:
            start = max(start, bisect_right(self._keys, after))
        found: list[Entry] = []
        for at in range(start, min(start + self.limits.list_scan_max, len(self._keys))):
            key = self._keys[at]
            if not (key[0].startswith(prefix) if any_end else key[0] == prefix):
                return Page(found, None)
            entry = self._entries[key]
            if not meta or entry.carries(meta):
                if len(found) == limit:
                    return Page(found, found[-1].key)
                found.append(entry)
        at = start + self.limits.list_scan_max
        return Page(found, self._keys[at - 1] if at < len(self._keys) else None)

    # Explaining.

    def near(self, name: str) -> list[str]:
        """Return names that somebody who asked for `name` may have meant, the nearest first.

        Looks at a bounded number of neighbours in order, and compares closely only those that could be near.
        """
        half = self.limits.near_candidates_max // 2
        start = bisect_left(self._keys, (name, ""))
        around = {key[0] for key in self._keys[max(0, start - half) : start + half]}
        return _nearest(name, around, self.limits.near_names_max)

    def last(self, name: str) -> Departure | None:
        """Return how the last instance of a name that was here left, while it is remembered."""
        return self._departures.get(name)


def _nearest(name: str, candidates: Iterable[str], most: int) -> list[str]:
    letters = set(name)
    scored: list[tuple[float, str]] = []
    for candidate in candidates:
        # Cheap tests first: a polling script asks for an unknown name many times a second.
        if candidate == name or abs(len(candidate) - len(name)) > 3 or len(letters ^ set(candidate)) > 4:
            continue
        swapped = sorted(candidate) == sorted(name)
        likeness = 1.0 if swapped else SequenceMatcher(None, candidate, name).ratio()
        if likeness >= 0.6:
            scored.append((-likeness, candidate))
    return [candidate for _, candidate in sorted(scored)[:most]]


class Draft:
    """The changes of one batch over a registry. Each request is judged against all before it.

    `at` is the wall clock in Unix seconds, for display. A request that is refused leaves no change.
    """

    def __init__(self, registry: Registry, at: float) -> None:
        self._registry = registry
        self._at = at
        self._over: dict[Key, Entry | None] = {}
        self._count = len(registry)
        self._weight_bytes = registry.weight_bytes
        self.changes: list[Change] = []

    @property
    def rev(self) -> int:
        return self._registry.rev + len(self.changes)

    def get(self, key: Key) -> Entry | None:
        return self._over[key] if key in self._over else self._registry.get(key)

    def register(self, wanted: Entry, if_rev: int | None = None) -> tuple[Entry, bool]:
        """Register `wanted`, whose `rev` and `registered_at` are set here.

        Returns the entry as it now stands, and whether it replaced another address.

        Raises:
            Refused: `conflict` where `if_rev` fails, `busy` where the registry is full.
        """
        before = self.get(wanted.key)
        self._check_if(before, if_rev, wanted.key)
        moved = before is not None and (before.host, before.port) != (wanted.host, wanted.port)
        if before is not None and not moved and before.meta == wanted.meta and before.state == wanted.state:
            return before, False
        self._check_room(wanted, before)
        if before is not None and moved:
            self._add(Op.DOWN, before, "replaced")
        op = Op.UP if before is None or moved else Op.CHANGE
        since = self._at if before is None or moved else before.registered_at
        return self._add(op, replace(wanted, rev=self.rev + 1, registered_at=since)), moved

    def deregister(self, key: Key, if_rev: int | None = None) -> Entry:
        """End a registration and return it.

        Raises:
            Refused: `not_found`, or `conflict` where `if_rev` fails.
        """
        before = self._must(key)
        self._check_if(before, if_rev, key)
        return self._add(Op.DOWN, before, "deregistered")

    def update(
        self, key: Key, meta: Mapping[str, str] | None, state: State | None, if_rev: int | None = None
    ) -> Entry:
        """Set `meta` (as a whole), `state` or both, and return the entry as it now stands.

        Raises:
            Refused: `not_found`, `conflict` where `if_rev` fails, `busy` where the registry is full.
        """
        before = self._must(key)
        self._check_if(before, if_rev, key)
        after = replace(
            before,
            meta=before.meta if meta is None else meta,
            state=before.state if state is None else state,
            rev=self.rev + 1,
            encoded=None,
        )
        if after.meta == before.meta and after.state is before.state:
            return before
        self._check_room(after, before)
        return self._add(Op.CHANGE, after)

    def _must(self, key: Key) -> Entry:
        entry = self.get(key)
        if entry is None:
            name, instance = key
            which = f"{name!r} with instance {instance!r}" if instance else repr(name)
            raise Refused(Code.NOT_FOUND, f"no registration of {which}")
        return entry

    def _check_if(self, before: Entry | None, if_rev: int | None, key: Key) -> None:
        rev = before.rev if before else 0
        if if_rev is not None and if_rev != rev:
            now = f"is at revision {rev}" if before else "does not exist"
            raise Refused(Code.CONFLICT, f"the registration of {key[0]!r} {now}, and `if` says {if_rev}", rev=rev)

    def _check_room(self, wanted: Entry, before: Entry | None) -> None:
        limits = self._registry.limits
        if before is None and self._count >= limits.registrations_max:
            raise Refused(Code.BUSY, f"the registry is full: {limits.registrations_max} registrations")
        freed = before.weight_bytes if before else 0
        if wanted.weight_bytes > freed and (
            self._weight_bytes + wanted.weight_bytes - freed > limits.registry_bytes_max
        ):
            raise Refused(Code.BUSY, f"the registry is full: {limits.registry_bytes_max} bytes")

    def _add(self, op: Op, entry: Entry, reason: str = "") -> Entry:
        before = self.get(entry.key)
        after = None if op is Op.DOWN else entry
        self._count += (after is not None) - (before is not None)
        self._weight_bytes += after.weight_bytes if after else 0
        self._weight_bytes -= before.weight_bytes if before else 0
        self._over[entry.key] = after
        self.changes.append(Change(self.rev + 1, op, entry, reason))
        return entry
