"""The data that `regctl top` shows: a table of the instances, and recent events.

The functions do no I/O and read no clock.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from regd.cli.output import address_of, instance_name, labels, priority_of, visible

Key = tuple[str, str]  # name and instance
SORTS = ("name", "age", "state", "holders")
NEW_S = 10.0  # how long an instance is marked as new
_EVENTS_MAX = 50
_STATES = ("starting", "draining", "ready")  # the order when sorting by state


@dataclass(frozen=True, slots=True)
class Row:
    """One instance. Its texts are free of control characters. `since` is in Unix seconds."""

    key: Key
    name: str
    instance: str
    address: str
    state: str
    priority: str  # "" for 0
    holders: str
    meta: str
    since: float
    seen_at: float  # on the same clock as `now` in `Table.take`; -inf for the first snapshot

    @property
    def words(self) -> str:
        """The text in which the words of a filter must occur."""
        texts = (self.name, self.instance, self.address, self.state, self.priority, self.holders, self.meta)
        return " ".join(texts).lower()


@dataclass(frozen=True, slots=True)
class RecentEvent:
    """An event for display. `kind` is "up", "change" or "down", `at` the time of `Table.take`."""

    kind: str
    who: str
    what: str
    at: float


def holders(fields: Mapping[str, Any]) -> str:
    """Return the owners of an instance as a short text."""
    owners = ["hold"] if fields.get("hold") else []
    owners += [f"pid {fields['pid']}"] if fields.get("pid") is not None else []
    owners += [f"ttl {fields['ttl']}s"] if fields.get("ttl") is not None else []
    return visible(" ".join(owners)) or "static"


def named(name: str, instance: str) -> str:
    """Return NAME/INSTANCE without control characters."""
    return visible(instance_name(name, instance))


def _row(fields: Mapping[str, Any], previous: Row | None, now: float) -> Row:
    address = visible(address_of(fields))
    since = fields.get("registered_at")
    same = previous if previous is not None and previous.address == address else None
    return Row(
        key=(fields["name"], fields["instance"]),
        name=visible(fields["name"]),
        instance=visible(fields["instance"]),
        address=address,
        state=visible(fields["state"]),
        priority=str(priority_of(fields) or ""),
        holders=holders(fields),
        meta=visible(labels(fields)),
        since=same.since if same else float(since) if isinstance(since, int | float) else 0.0,
        seen_at=previous.seen_at if previous else now,
    )


class Table:
    """The instances by key, and the recent events, the newest first."""

    def __init__(self) -> None:
        self.rows: dict[Key, Row] = {}
        self.events: deque[RecentEvent] = deque(maxlen=_EVENTS_MAX)
        self.synced = False  # the first snapshot is complete
        self._version = 0
        # Caches: the version and its number of services; the query and its rows.
        self._counted = (0, 0)
        self._shown: tuple[object, list[Row]] = (None, [])

    @property
    def services(self) -> int:
        if self._counted[0] != self._version:
            self._counted = self._version, len({name for name, _ in self.rows})
        return self._counted[1]

    def take(self, kind: str, key: Key, fields: Mapping[str, Any] | None, now: float, reason: str = "") -> None:
        """Apply an event at the time `now`. `fields` are those of the instance; None for "down" and "sync"."""
        if kind == "sync":
            self.synced = True
            return
        self._version += 1
        previous = self.rows.pop(key, None)
        what = visible(reason)
        if fields is not None:
            row = _row(fields, previous, now if self.synced else float("-inf"))
            self.rows[key] = row
            what = row.address if previous is None else _difference(previous, row)
        if self.synced:
            self.events.appendleft(RecentEvent(kind, named(*key), what, now))

    def shown(self, sort: str, reverse: bool, words: str) -> list[Row]:
        """Return the rows that contain all of the words, sorted."""
        query = (self._version, sort, reverse, words)
        if self._shown[0] != query:
            filters = words.lower().split()
            rows = [row for row in self.rows.values() if all(word in row.words for word in filters)]
            rows.sort(key=lambda row: row.key)
            if sort != "name" or reverse:
                rows.sort(key=_ORDERS[sort], reverse=reverse)
            self._shown = (query, rows)
        return self._shown[1]


def _difference(previous: Row, row: Row) -> str:
    """Return the most important difference between two rows of an instance."""
    for old, new in (
        (previous.state, row.state),
        (previous.address, row.address),
        (previous.holders, row.holders),
        (previous.meta, row.meta),
    ):
        if old != new:
            return f"{old or 'nothing'} → {new or 'nothing'}"
    if previous.priority != row.priority:
        return f"priority {previous.priority or 0} → {row.priority or 0}"
    return "again"


def _state(row: Row) -> int:
    return _STATES.index(row.state) if row.state in _STATES else -1


_ORDERS: dict[str, Any] = {
    "name": lambda row: row.key,
    "age": lambda row: -row.since,  # the youngest first
    "state": _state,
    "holders": lambda row: row.holders,
}
