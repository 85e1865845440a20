"""Following the registry: a picture that events keep true, across breaks and restarts of the daemon.

After a break the old picture stays until the new one is complete; who listens hears only the differences.
Must not know how events travel.
"""

import asyncio
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from regd_client import wire

Key = tuple[str, str]  # name and instance


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where an instance of a service listens. `str()` is HOST:PORT, an IPv6 host in brackets.

    `stale_s` is 0.0 while the daemon is there; from a mirror whose daemon is away, for how long it has been.
    """

    name: str
    instance: str
    host: str
    port: int
    meta: Mapping[str, str] = field(hash=False)
    stale_s: float = field(default=0.0, compare=False)

    def __str__(self) -> str:
        return wire.joined(self.host, self.port)


def endpoint(fields: Mapping[str, Any]) -> Endpoint:
    """Return the caller's own: the fields may belong to others."""
    return Endpoint(fields["name"], fields["instance"], fields["host"], fields["port"], {**fields["meta"]})


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened to a service.

    `kind` is `up`, `change` or `down`, or `sync`, once, when all that was there at the beginning has been told.
    `endpoint` is the instance, for `down` as it last was, None for `sync`. `reason` belongs to `down`.
    """

    kind: str
    endpoint: Endpoint | None = None
    state: str = ""
    reason: str = ""


def _told(fields: Mapping[str, Any]) -> tuple[object, ...]:
    """What of an instance makes a difference to a listener: not when and at which revision it was registered."""
    return tuple(fields.get(name) for name in ("host", "port", "meta", "state", "hold", "pid", "ttl"))


def differences(old: Mapping[Key, dict[str, Any]], new: Mapping[Key, dict[str, Any]]) -> list[Event]:
    """Return the events that lead from one picture to another."""
    events = []
    for key, fields in old.items():
        if key not in new:
            events.append(Event("down", endpoint(fields), fields["state"], "away meanwhile"))
    for key, fields in new.items():
        if key not in old:
            events.append(Event("up", endpoint(fields), fields["state"]))
        elif _told(fields) != _told(old[key]):
            events.append(Event("change", endpoint(fields), fields["state"]))
    return events


class EventSource(Protocol):
    """What events come from: whether it brings any more, and until when it did."""

    @property
    def usable(self) -> bool: ...
    @property
    def ended_at(self) -> float | None: ...


class WatchState:
    """One watch, for as long as somebody follows: `changed` hears every event in order, `sync` only once, and
    `ended` that no more come.
    """

    def __init__(
        self,
        pattern: str,
        meta: Mapping[str, str] | None,
        changed: Callable[[Event], None],
        ended: Callable[[], None] = lambda: None,
    ) -> None:
        self.picture: dict[Key, dict[str, Any]] = {}
        self.on: EventSource | None = None  # the connection that brings the events
        self._arguments: dict[str, Any] = {"name": pattern, "meta": None if meta is None else dict(meta)}
        self._changed = changed
        self.ended = False
        self._tell_end = ended
        self._true = False  # the picture, for as long as `on` is there
        self._untrue_since = time.monotonic()
        self._synced = False  # told so
        self._fresh: dict[Key, dict[str, Any]] | None = {}  # what a snapshot has brought so far
        self._epoch: str | None = None
        self._rev: int | None = None  # up to which nothing is missing

    @property
    def live(self) -> bool:
        """Whether the picture is true now."""
        return self._true and self.on is not None and self.on.usable

    @property
    def stale_s(self) -> float:
        """For how long the picture may have been untrue; 0.0 while it is live."""
        return 0.0 if self.live else max(time.monotonic() - self._stale_since(), 1e-9)

    def _stale_since(self) -> float:
        if not self._true:
            return self._untrue_since
        ended_at = None if self.on is None else self.on.ended_at
        return time.monotonic() if ended_at is None else ended_at

    def _doubt(self) -> None:
        self._untrue_since = self._stale_since()
        self._true = False

    def begin(self, on: EventSource) -> dict[str, Any]:
        """Follow on a connection, and return the arguments of the `watch` that goes on where this one is."""
        self._doubt()
        self.on = on
        if self._rev is None:
            self._fresh = {}
            return self._arguments
        self._fresh = None
        return {**self._arguments, "epoch": self._epoch, "since": self._rev}

    def pause(self) -> None:
        """Follow on no connection."""
        self._doubt()
        self.on = None

    def end(self) -> None:
        """Follow no more."""
        self.pause()
        self.ended = True
        self._tell_end()

    def take(self, event: Mapping[str, Any]) -> None:
        """Take what the daemon says: first the reply to `watch`, then every event."""
        kind = event.get("event")
        if kind is None:
            if event["epoch"] != self._epoch:
                self._rev = None  # a revision means nothing in another epoch
            self._epoch = event["epoch"]
            return
        if kind == "reset":
            self._doubt()
            self._fresh = {}
            self._rev = None
        elif kind == "sync":
            self._replace(self._fresh or {})
        elif kind == "progress":
            self._true = True
        elif self._fresh is not None:
            self._fold(self._fresh, event)
        elif self._rev is None or event["rev"] > self._rev:
            self._tell(event)
        if self._fresh is None:
            self._rev = event["rev"]

    def _replace(self, fresh: dict[Key, dict[str, Any]]) -> None:
        """Take a snapshot that is complete, and tell what is different."""
        news = differences(self.picture, fresh)
        self.picture, self._fresh = fresh, None
        self._true = True
        for each in news:
            self._changed(each)
        if not self._synced:
            self._synced = True
            self._changed(Event("sync"))

    @staticmethod
    def _fold(picture: dict[Key, dict[str, Any]], event: Mapping[str, Any]) -> dict[str, Any] | None:
        """Apply an event to a picture, and return the instance that was there before."""
        key = (event["name"], event["instance"])
        before = picture.pop(key, None)
        if event["event"] != "down":
            picture[key] = dict(event)
            if len(picture) > wire.INSTANCES_MAX:
                raise wire.not_a_reply(f"to watch: more than {wire.INSTANCES_MAX} instances")
        return before

    def _tell(self, event: Mapping[str, Any]) -> None:
        before = self._fold(self.picture, event)
        if event["event"] != "down":
            self._changed(Event("change" if before else "up", endpoint(event), event["state"]))
        elif before is not None:
            self._changed(Event("down", endpoint(before), before["state"], event["reason"]))


class EventQueue:
    """Events for a listener that may be slow, until the end. Beyond a bound it is told the differences instead of
    every step.
    """

    def __init__(self, most: int = 10_000) -> None:
        self._most = most
        self._events: deque[Event] = deque()
        self._told: dict[Key, Event] = {}  # what the listener knows
        self._more = asyncio.Event()
        self._over = False

    async def next(self) -> Event | None:
        """Wait for an event; None at the end."""
        while not self._events:
            if self._over:
                return None
            self._more.clear()
            await self._more.wait()
        return self.take()

    def end(self) -> None:
        """Let the listener hear what there is, and no more."""
        self._over = True
        self._more.set()

    def add(self, event: Event) -> None:
        self._events.append(event)
        self._more.set()
        if len(self._events) > self._most:
            self._shorten()

    def _shorten(self) -> None:
        """Replace the events by those that lead to the same picture in one step for each instance."""
        picture = dict(self._told)
        reasons: dict[Key, Event] = {}
        synced = False
        for event in self._events:
            synced = synced or event.kind == "sync"
            if event.endpoint is not None:
                key = (event.endpoint.name, event.endpoint.instance)
                reasons[key] = event
                if event.kind == "down":
                    picture.pop(key, None)
                else:
                    picture[key] = event
        self._events.clear()
        for key, event in reasons.items():
            if key in picture:
                self._events.append(replace(event, kind="change" if key in self._told else "up"))
            elif key in self._told:
                self._events.append(event)
        if synced:
            self._events.append(Event("sync"))
        self._most = max(self._most, 2 * len(self._events))

    def __len__(self) -> int:
        return len(self._events)

    def take(self) -> Event:
        event = self._events.popleft()
        if event.endpoint is not None:
            key = (event.endpoint.name, event.endpoint.instance)
            if event.kind == "down":
                self._told.pop(key, None)
            else:
                self._told[key] = event
        return event
