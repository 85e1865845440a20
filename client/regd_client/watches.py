"""Watches: the daemon's events, folded into a picture that stays true across breaks and restarts.

After a break the old picture stays until the new one is complete; the listener gets only the differences.
"""

import asyncio
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Protocol

from regd_client import protocol
from regd_client.models import Endpoint, Event, EventKind, Key, endpoint_of

__all__ = ["EventQueue", "EventSource", "WatchState", "differences"]

_COMPARED = ("host", "port", "meta", "state", "hold", "pid", "ttl")  # not the time and revision of a registration


def _is_changed(old: Mapping[str, Any], new: Mapping[str, Any]) -> bool:
    """Return whether an instance differs in anything that a listener is told."""
    return any(old.get(name) != new.get(name) for name in _COMPARED)


def differences(old: Mapping[Key, dict[str, Any]], new: Mapping[Key, dict[str, Any]]) -> list[Event]:
    """Return the events that lead from one picture to another."""
    events = []
    for key, fields in old.items():
        if key not in new:
            events.append(Event("down", endpoint_of(fields), fields["state"], "away meanwhile"))
    for key, fields in new.items():
        if key not in old:
            events.append(Event("up", endpoint_of(fields), fields["state"]))
        elif _is_changed(old[key], fields):
            events.append(Event("change", endpoint_of(fields), fields["state"]))
    return events


class EventSource(Protocol):
    """The connection that brings a watch's events."""

    @property
    def usable(self) -> bool:
        """Whether more events can come."""

    @property
    def ended_at(self) -> float | None:
        """When the connection broke (`time.monotonic`), None while it is usable."""


class WatchState:
    """One watch over any number of connections.

    `on_event` is called with every event in order, `sync` only once; `on_end` when no more events come.
    """

    def __init__(
        self,
        pattern: str,
        meta: Mapping[str, str] | None,
        on_event: Callable[[Event], None],
        on_end: Callable[[], None] = lambda: None,
    ) -> None:
        self.pattern = pattern
        self.picture: dict[Key, dict[str, Any]] = {}
        self.source: EventSource | None = None
        self.ended = False
        self._arguments: dict[str, Any] = {"name": pattern, "meta": None if meta is None else dict(meta)}
        self._on_event = on_event
        self._on_end = on_end
        self._is_true = False  # the picture, as long as `source` is usable
        self._untrue_since = time.monotonic()
        self._synced = False  # the listener has had `sync`
        self._snapshot: dict[Key, dict[str, Any]] | None = {}  # the part of a new picture that has come
        self._epoch: str | None = None  # of `_rev`
        self._new_epoch: str | None = None  # of the connection
        self._rev: int | None = None  # the revision up to which no event is missing

    @property
    def live(self) -> bool:
        """Whether the picture is true now."""
        return self._is_true and self.source is not None and self.source.usable

    @property
    def stale_s(self) -> float:
        """Seconds for which the picture may have been untrue; 0.0 while it is live."""
        return 0.0 if self.live else max(time.monotonic() - self._stale_since(), 1e-9)

    def _stale_since(self) -> float:
        if not self._is_true:
            return self._untrue_since
        ended_at = None if self.source is None else self.source.ended_at
        return time.monotonic() if ended_at is None else ended_at

    def _doubt(self) -> None:
        self._untrue_since = self._stale_since()
        self._is_true = False

    def begin(self, source: EventSource) -> dict[str, Any]:
        """Continue on a connection, and return the arguments of its `watch` request."""
        self._doubt()
        self.source = source
        if self._rev is None:
            self._snapshot = {}
            return self._arguments
        self._snapshot = None
        return {**self._arguments, "epoch": self._epoch, "since": self._rev}

    def pause(self) -> None:
        """Leave the connection."""
        self._doubt()
        self.source = None

    def end(self) -> None:
        """End the watch."""
        self.pause()
        self.ended = True
        self._on_end()

    def take(self, fields: Mapping[str, Any]) -> None:
        """Take what the daemon sends: first the reply to `watch`, then every event."""
        kind = fields.get("event")
        if kind is None:
            self._new_epoch = fields["epoch"]
            return
        if kind == "reset":
            self._doubt()
            self._snapshot = {}
            self._rev = None
        elif kind == "sync":
            self._complete(self._snapshot or {})
        elif kind == "progress":
            self._is_true = True
        elif self._snapshot is not None:
            self._fold(self._snapshot, fields)
        elif self._rev is None or fields["rev"] > self._rev:
            self._pass_on(fields)
        if self._snapshot is None:
            # Together: a revision of one epoch must not be taken for one of another.
            self._epoch, self._rev = self._new_epoch, fields["rev"]

    def _complete(self, snapshot: dict[Key, dict[str, Any]]) -> None:
        """Replace the picture by a complete snapshot, and pass on the differences."""
        events = differences(self.picture, snapshot)
        self.picture, self._snapshot = snapshot, None
        self._is_true = True
        for event in events:
            self._on_event(event)
        if not self._synced:
            self._synced = True
            self._on_event(Event("sync"))

    @staticmethod
    def _fold(picture: dict[Key, dict[str, Any]], fields: Mapping[str, Any]) -> dict[str, Any] | None:
        """Apply an event to a picture, and return the previous state of its instance."""
        key = (fields["name"], fields["instance"])
        previous = picture.pop(key, None)
        if fields["event"] != "down":
            picture[key] = dict(fields)
            if len(picture) > protocol.INSTANCES_MAX:
                raise protocol.not_a_reply(f"to watch: more than {protocol.INSTANCES_MAX} instances")
        return previous

    def _pass_on(self, fields: Mapping[str, Any]) -> None:
        previous = self._fold(self.picture, fields)
        if fields["event"] != "down":
            kind: EventKind = "change" if previous else "up"
            self._on_event(Event(kind, endpoint_of(fields), fields["state"]))
        elif previous is not None:
            self._on_event(Event("down", endpoint_of(previous), previous["state"], fields["reason"]))


class EventQueue:
    """The events between a watch and its listener, which may be slow.

    Beyond `events_max` events, the queue keeps for each instance only the difference from what the listener
    knows.
    """

    def __init__(self, events_max: int = 10_000) -> None:
        self._events_max = events_max
        self._events: deque[Event] = deque()
        self._taken: dict[Key, Event] = {}  # the picture that the listener has
        self._more = asyncio.Event()
        self._ended = False

    async def next(self) -> Event | None:
        """Wait for an event. Returns None at the end."""
        while not self._events:
            if self._ended:
                return None
            self._more.clear()
            await self._more.wait()
        return self.take()

    def end(self) -> None:
        """Add no more events; those in the queue can still be taken."""
        self._ended = True
        self._more.set()

    def add(self, event: Event) -> None:
        self._events.append(event)
        self._more.set()
        if len(self._events) > self._events_max:
            self._shorten()

    def _shorten(self) -> None:
        """Replace the events by those that lead to the same picture with one event for each instance."""
        picture = dict(self._taken)
        last: dict[Key, Event] = {}
        synced = False
        for event in self._events:
            synced = synced or event.kind == "sync"
            if event.endpoint is not None:
                key = _key(event.endpoint)
                last[key] = event
                if event.kind == "down":
                    picture.pop(key, None)
                else:
                    picture[key] = event
        self._events.clear()
        for key, event in last.items():
            if key in picture:
                self._events.append(replace(event, kind="change" if key in self._taken else "up"))
            elif key in self._taken:
                self._events.append(event)
        if synced:
            self._events.append(Event("sync"))
        self._events_max = max(self._events_max, 2 * len(self._events))

    def __len__(self) -> int:
        return len(self._events)

    def take(self) -> Event:
        event = self._events.popleft()
        if event.endpoint is not None:
            key = _key(event.endpoint)
            if event.kind == "down":
                self._taken.pop(key, None)
            else:
                self._taken[key] = event
        return event


def _key(endpoint: Endpoint) -> Key:
    return endpoint.name, endpoint.instance
