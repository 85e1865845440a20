"""Following the registry: a picture that events keep true, across breaks and restarts of the daemon.

After a break the old picture stays until the new one is complete; who listens hears only the differences.
Must not know how events travel.
"""

from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from regd_client import wire
from regd_client.errors import NotFound, Unavailable

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
    return Endpoint(fields["name"], fields["instance"], fields["host"], fields["port"], fields["meta"])


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


class Follow:
    """One watch, for as long as somebody follows. `changed` hears every event in order; `live` says whether the
    picture is true now.
    """

    def __init__(self, pattern: str, meta: Mapping[str, str] | None, changed: Callable[[Event], None]) -> None:
        self.arguments: dict[str, Any] = {"name": pattern, "meta": None if meta is None else dict(meta)}
        self.picture: dict[Key, dict[str, Any]] = {}
        self.live = False
        self.on: object = None  # the connection that brings the events
        self._changed = changed
        self._fresh: dict[Key, dict[str, Any]] | None = {}  # what a snapshot has brought so far
        self._epoch: str | None = None
        self._rev: int | None = None  # up to which nothing is missing

    def position(self) -> dict[str, Any]:
        """Return the arguments of a `watch` that goes on where this one is."""
        if self._rev is None:
            self._fresh = {}
            return self.arguments
        self._fresh = None
        return {**self.arguments, "epoch": self._epoch, "since": self._rev}

    def take(self, event: Mapping[str, Any]) -> None:
        """Take what the daemon says: first the reply to `watch`, then every event."""
        kind = event.get("event")
        if kind is None:
            if event["epoch"] != self._epoch:
                self._rev = None  # a revision means nothing in another epoch
            self._epoch = event["epoch"]
            return
        if kind == "reset":
            self._fresh = {}
            self.live = False
            self._rev = None
        elif kind == "sync":
            fresh, self._fresh = self._fresh or {}, None
            news = differences(self.picture, fresh)
            self.picture = fresh
            self.live = True
            for each in news:
                self._changed(each)
            self._changed(Event("sync"))
        elif kind == "progress":
            self.live = True
        elif self._fresh is not None:
            self._fold(self._fresh, event)
        elif self._rev is None or event["rev"] > self._rev:
            self._tell(event)
        if self._fresh is None:
            self._rev = event["rev"]

    @staticmethod
    def _fold(picture: dict[Key, dict[str, Any]], event: Mapping[str, Any]) -> dict[str, Any] | None:
        """Apply an event to a picture, and return the instance that was there before."""
        key = (event["name"], event["instance"])
        before = picture.pop(key, None)
        if event["event"] != "down":
            picture[key] = dict(event)
        return before

    def _tell(self, event: Mapping[str, Any]) -> None:
        before = self._fold(self.picture, event)
        if event["event"] != "down":
            self._changed(Event("change" if before else "up", endpoint(event), event["state"]))
        elif before is not None:
            self._changed(Event("down", endpoint(before), before["state"], event["reason"]))


class Backlog:
    """Events for a listener that may be slow. Beyond a bound it is told the differences instead of every step."""

    def __init__(self, most: int = 10_000) -> None:
        self._most = most
        self._events: deque[Event] = deque()
        self._told: dict[Key, Event] = {}  # what the listener knows

    def add(self, event: Event) -> None:
        self._events.append(event)
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


class Mirror:
    """A local picture of some services: `resolve` without a round trip, taking turns among the ready instances.

    While the daemon is away the answers are from the last picture, and say so: `stale_s` is how long it has been
    away. With `stale_s_max` an older answer is refused. A daemon that hangs is noticed within 15 s.
    """

    def __init__(self, now: Callable[[], float], stale_s_max: float | None) -> None:
        self._now = now
        self._stale_s_max = stale_s_max
        self._away_since = now()
        self._follow: Follow | None = None
        self._names: dict[str, dict[str, Endpoint]] = {}  # the ready instances, by name and instance
        self._ready: dict[str, deque[Endpoint]] = {}  # of names that were asked for; the next in front
        self._served: dict[str, str] = {}  # the instance that was last, where the queue was given up since

    def follow(self, follow: Follow) -> None:
        self._follow = follow

    @property
    def live(self) -> bool:
        """Whether the picture is true now."""
        return self._follow is not None and self._follow.live

    @property
    def stale_s(self) -> float:
        """For how long the daemon has been away; 0.0 while it is there."""
        return 0.0 if self.live else max(self._now() - self._away_since, 1e-9)

    def away(self) -> None:
        """The daemon is away from now on."""
        self._away_since = self._now()

    def changed(self, event: Event) -> None:
        """Take an event, of which every one comes here."""
        found = event.endpoint
        if found is None:
            return
        if event.kind != "down" and event.state == "ready":
            self._names.setdefault(found.name, {})[found.instance] = found
        elif found.name in self._names:
            self._names[found.name].pop(found.instance, None)
            if not self._names[found.name]:
                del self._names[found.name]
        if queue := self._ready.pop(found.name, None):
            self._served[found.name] = queue[-1].instance

    def resolve(self, name: str, *, meta: Mapping[str, str] | None = None) -> Endpoint:
        """Return a ready instance that carries all of `meta`, from the picture.

        Raises:
            NotFound: there is none.
            Unavailable: the picture is older than `stale_s_max`.
        """
        ready = self._ready.get(name)
        if ready is None:
            ready = self._collect(name)
        if meta:
            for found in ready:
                if all(found.meta.get(key) == value for key, value in meta.items()):
                    ready.remove(found)
                    ready.append(found)
                    return found if self._follow is not None and self._follow.live else self._aged(found)
        elif ready:
            found = ready[0]
            ready.rotate(-1)
            return found if self._follow is not None and self._follow.live else self._aged(found)
        self._check_age()
        raise NotFound(f"no ready instance of {name!r} in the mirror", "not_found", {"stale_s": self.stale_s})

    def resolve_all(self, name: str, *, meta: Mapping[str, str] | None = None) -> list[Endpoint]:
        """Return all ready instances that carry all of `meta`, in order of instance; perhaps none.

        Raises:
            Unavailable: the picture is older than `stale_s_max`.
        """
        self._check_age()
        wanted = (meta or {}).items()
        found = sorted(self._ready.get(name) or self._collect(name), key=lambda each: each.instance)
        fits = [each for each in found if all(each.meta.get(key) == value for key, value in wanted)]
        return fits if self.live else [self._aged(each) for each in fits]

    def _collect(self, name: str) -> "deque[Endpoint]":
        there = self._names.get(name, {})
        ready = deque(there[instance] for instance in sorted(there))
        if ready:
            self._ready[name] = ready
            served = self._served.pop(name, None)
            ready.rotate(0 if served is None else -sum(each.instance <= served for each in ready))
        return ready

    def _check_age(self) -> float:
        age_s = self.stale_s
        if self._stale_s_max is not None and age_s > self._stale_s_max:
            raise Unavailable(
                f"the daemon has been away for {age_s:.1f} s, and stale_s_max is {self._stale_s_max:g}"
            )
        return age_s

    def _aged(self, found: Endpoint) -> Endpoint:
        return replace(found, stale_s=self._check_age())
