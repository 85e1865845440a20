"""What `regctl top` shows: the instances that are there, and what just came and went.

Time comes in as an argument, and so do events. Must not know a terminal, a connection or a daemon.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from regd.cli.output import visible
from regd_client.protocol import host_port

Key = tuple[str, str]  # name and instance
SORTS = ("name", "age", "state", "holders")
NEW_S = 10.0  # for so long an instance counts as just come
_NEWS_MOST = 50
_STATES = ("starting", "draining", "ready")  # what is not as usual comes first


@dataclass(frozen=True, slots=True)
class Row:
    """One instance. All of its texts are fit for a terminal. `since` is in Unix seconds."""

    key: Key
    name: str
    instance: str
    address: str
    state: str
    holders: str
    meta: str
    since: float
    seen_at: float  # by the caller's `now`; -inf for what was there at the beginning

    @property
    def words(self) -> str:
        """What a filter looks at."""
        return " ".join((self.name, self.instance, self.address, self.state, self.holders, self.meta)).lower()


@dataclass(frozen=True, slots=True)
class RecentEvent:
    """Something that happened `at` a time by the caller's `now`: `kind` is `up`, `change` or `down`."""

    kind: str
    who: str
    what: str
    at: float


def holders(fields: Mapping[str, Any]) -> str:
    """Return what an instance lasts with, as short as can be."""
    held = ["hold"] if fields.get("hold") else []
    held += [f"pid {fields['pid']}"] if fields.get("pid") is not None else []
    held += [f"ttl {fields['ttl']}s"] if fields.get("ttl") is not None else []
    return visible(" ".join(held)) or "static"


def named(name: str, instance: str) -> str:
    """Return what people call an instance."""
    return visible(f"{name}/{instance}" if instance else name)


def _row(fields: Mapping[str, Any], before: Row | None, now: float) -> Row:
    address = visible(host_port(fields["host"], fields["port"]))
    since = fields.get("registered_at")
    known = before if before is not None and before.address == address else None
    return Row(
        key=(fields["name"], fields["instance"]),
        name=visible(fields["name"]),
        instance=visible(fields["instance"]),
        address=address,
        state=visible(fields["state"]),
        holders=holders(fields),
        meta=visible(" ".join(f"{key}={value}" for key, value in fields["meta"].items())),
        # A daemon that was restarted counts from its own start: what we have seen before is no younger for that.
        since=known.since if known else float(since) if isinstance(since, int | float) else 0.0,
        seen_at=before.seen_at if before else now,
    )


class Table:
    """The instances, and the newest of the news first."""

    def __init__(self) -> None:
        self.rows: dict[Key, Row] = {}
        self.news: deque[RecentEvent] = deque(maxlen=_NEWS_MOST)
        self.synced = False  # all that was there at the beginning is here
        self._version = 0
        self._counted = (0, 0)  # at which version, and how many services there are
        self._shown: tuple[object, list[Row]] = (None, [])

    @property
    def services(self) -> int:
        if self._counted[0] != self._version:
            self._counted = self._version, len({name for name, _ in self.rows})
        return self._counted[1]

    def take(self, kind: str, key: Key, fields: Mapping[str, Any] | None, now: float, reason: str = "") -> None:
        """Take an event; `fields` are those of the instance, None for `down`. `sync` ends the beginning."""
        if kind == "sync":
            self.synced = True
            return
        self._version += 1
        before = self.rows.pop(key, None)
        what = visible(reason)
        if fields is not None:
            row = _row(fields, before, now if self.synced else float("-inf"))
            self.rows[key] = row
            what = row.address if before is None else _changes(before, row)
        if self.synced:
            self.news.appendleft(RecentEvent(kind, named(*key), what, now))

    def shown(self, sort: str, reverse: bool, words: str) -> list[Row]:
        """Return the rows that carry each of the words, in order."""
        asked = (self._version, sort, reverse, words)
        if self._shown[0] != asked:
            wanted = words.lower().split()
            rows = [row for row in self.rows.values() if all(word in row.words for word in wanted)]
            rows.sort(key=lambda row: row.key)
            if sort != "name" or reverse:
                rows.sort(key=_ORDERS[sort], reverse=reverse)
            self._shown = (asked, rows)
        return self._shown[1]


def _changes(before: Row, row: Row) -> str:
    """Return what is different, the weightiest first."""
    for old, new in (
        (before.state, row.state),
        (before.address, row.address),
        (before.holders, row.holders),
        (before.meta, row.meta),
    ):
        if old != new:
            return f"{old or 'nothing'} → {new or 'nothing'}"
    return "again"


def _state(row: Row) -> int:
    return _STATES.index(row.state) if row.state in _STATES else -1


_ORDERS: dict[str, Any] = {
    "name": lambda row: row.key,
    "age": lambda row: -row.since,  # the youngest first
    "state": _state,
    "holders": lambda row: row.holders,
}
