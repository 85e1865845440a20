"""Watches: apply the daemon's events to a copy of the registry, across reconnects and restarts of the daemon.

After a reconnect the old copy stays in use until the new one is complete; the consumer gets only the differences.
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

_COMPARED = ("host", "port", "meta", "state", "priority", "hold", "pid", "ttl")  # not time and revision


def _is_changed(old: Mapping[str, Any], new: Mapping[str, Any]) -> bool:
    """Return whether an instance has changed, apart from its time and revision."""
    return any(old.get(name) != new.get(name) for name in _COMPARED)


def differences(old: Mapping[Key, dict[str, Any]], new: Mapping[Key, dict[str, Any]]) -> list[Event]:
    """Return the events that lead from one copy to another."""
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
    """The connection that delivers a watch's events. Tests use other objects."""

    @property
    def usable(self) -> bool:
        """Whether more events can arrive."""

    @property
    def ended_at(self) -> float | None:
        """When the connection broke (`time.monotonic`); None while it is usable."""


class WatchState:
    """The state of one watch, over any number of connections.

    `on_event` is called with every event in order, but with `sync` only once. `on_end` is called when the watch
    has ended.

    Attributes:
        instances: the current copy, as of the last event; the fields are those of the protocol.
        source: the connection that delivers the events, None while there is none.
        ended: whether the watch has ended.
    """

    def __init__(
        self,
        pattern: str,
        meta: Mapping[str, str] | None,
        on_event: Callable[[Event], None],
        on_end: Callable[[], None] = lambda: None,
    ) -> None:
        self.pattern = pattern
        self.instances: dict[Key, dict[str, Any]] = {}
        self.source: EventSource | None = None
        self.ended = False
        self._arguments: dict[str, Any] = {"name": pattern, "meta": None if meta is None else dict(meta)}
        self._on_event = on_event
        self._on_end = on_end
        self._is_current = False  # `instances` is up to date, as long as `source` is usable
        self._stale_from = time.monotonic()  # since when `instances` is out of date, if not `_is_current`
        self._synced = False  # `on_event` was called with `sync`
        self._snapshot: dict[Key, dict[str, Any]] | None = {}  # the received part of a new copy
        self._epoch: str | None = None  # the epoch of `_rev`
        self._new_epoch: str | None = None  # the epoch of the connection
        self._rev: int | None = None  # all events up to this revision have been received

    @property
    def live(self) -> bool:
        """Whether the copy is up to date."""
        return self._is_current and self.source is not None and self.source.usable

    @property
    def stale_s(self) -> float:
        """Seconds for which the copy may have been out of date; 0.0 while it is live."""
        return 0.0 if self.live else max(time.monotonic() - self._stale_since(), 1e-9)

    @property
    def epoch(self) -> str | None:
        """The daemon's epoch as of the last event."""
        return self._epoch

    @property
    def rev(self) -> int:
        """The revision up to which all events have been received; 0 before the first copy is complete."""
        return self._rev or 0

    def _stale_since(self) -> float:
        if not self._is_current:
            return self._stale_from
        ended_at = None if self.source is None else self.source.ended_at
        return time.monotonic() if ended_at is None else ended_at

    def _mark_stale(self) -> None:
        self._stale_from = self._stale_since()
        self._is_current = False

    def begin(self, source: EventSource | None) -> dict[str, Any]:
        """Start or resume the watch on a connection, and return the arguments of the `watch` request.

        With `source` None, the caller passes the events on itself, and `live` stays False.
        """
        self._mark_stale()
        self.source = source
        if self._rev is None:
            self._snapshot = {}
            return self._arguments
        self._snapshot = None
        return {**self._arguments, "epoch": self._epoch, "since": self._rev}

    def pause(self) -> None:
        """Stop using the connection."""
        self._mark_stale()
        self.source = None

    def end(self) -> None:
        """End the watch."""
        self.pause()
        self.ended = True
        self._on_end()

    def take(self, fields: Mapping[str, Any]) -> None:
        """Handle the reply to `watch`, and then each event."""
        kind = fields.get("event")
        if kind is None:
            self._new_epoch = fields["epoch"]
            return
        if kind == "reset":
            self._mark_stale()
            self._snapshot = {}
            self._rev = None
        elif kind == "sync":
            self._complete(self._snapshot or {})
        elif kind == "progress":
            self._is_current = True
        elif self._snapshot is not None:
            self._apply(self._snapshot, fields)
        elif self._rev is None or fields["rev"] > self._rev:
            self._pass_on(fields)
        if self._snapshot is None:
            # Set both together, since a revision is valid only in its epoch.
            self._epoch, self._rev = self._new_epoch, fields["rev"]

    def _complete(self, snapshot: dict[Key, dict[str, Any]]) -> None:
        """Replace the copy with a complete snapshot, and pass on the differences."""
        events = differences(self.instances, snapshot)
        self.instances, self._snapshot = snapshot, None
        self._is_current = True
        for event in events:
            self._on_event(event)
        if not self._synced:
            self._synced = True
            self._on_event(Event("sync"))

    @staticmethod
    def _apply(instances: dict[Key, dict[str, Any]], fields: Mapping[str, Any]) -> dict[str, Any] | None:
        """Apply an event to a copy. Return the previous fields of the instance; None if the copy lacked it."""
        key = (fields["name"], fields["instance"])
        previous = instances.pop(key, None)
        if fields["event"] != "down":
            instances[key] = dict(fields)
            if len(instances) > protocol.INSTANCES_MAX:
                raise protocol.not_a_reply(f"to watch: more than {protocol.INSTANCES_MAX} instances")
        return previous

    def _pass_on(self, fields: Mapping[str, Any]) -> None:
        previous = self._apply(self.instances, fields)
        if fields["event"] != "down":
            kind: EventKind = "change" if previous else "up"
            self._on_event(Event(kind, endpoint_of(fields), fields["state"]))
        elif previous is not None:
            self._on_event(Event("down", endpoint_of(previous), previous["state"], fields["reason"]))


class EventQueue:
    """The queue between a watch and its consumer, which may be slow.

    A queue of more than `events_max` events is shortened to at most one event for each instance: the difference
    between the state that the consumer has seen and the current state.
    """

    def __init__(self, events_max: int = 10_000) -> None:
        self._events_max = events_max
        self._events: deque[Event] = deque()
        self._seen: dict[Key, Event] = {}  # by instance, the last event that the consumer has received
        self._more = asyncio.Event()
        self._ended = False

    async def next(self) -> Event | None:
        """Wait for an event, and return it; None at the end."""
        while not self._events:
            if self._ended:
                return None
            self._more.clear()
            await self._more.wait()
        return self.take()

    def end(self) -> None:
        """End the queue: `next` returns the remaining events, and then None."""
        self._ended = True
        self._more.set()

    def add(self, event: Event) -> None:
        self._events.append(event)
        self._more.set()
        if len(self._events) > self._events_max:
            self._shorten()

    def _shorten(self) -> None:
        """Replace the queued events by fewer that lead to the same state.

        These are at most one for each instance, and `sync` if it was among the queued events.
        """
        current = dict(self._seen)
        last: dict[Key, Event] = {}
        synced = False
        for event in self._events:
            synced = synced or event.kind == "sync"
            if event.endpoint is not None:
                key = _key(event.endpoint)
                last[key] = event
                if event.kind == "down":
                    current.pop(key, None)
                else:
                    current[key] = event
        self._events.clear()
        for key, event in last.items():
            if key in current:
                self._events.append(replace(event, kind="change" if key in self._seen else "up"))
            elif key in self._seen:
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
                self._seen.pop(key, None)
            else:
                self._seen[key] = event
        return event


def _key(endpoint: Endpoint) -> Key:
    return endpoint.name, endpoint.instance
