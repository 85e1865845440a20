"""A mirror: the services that somebody follows, to be resolved without a round trip.

Must not know how the picture is kept true.
"""

from collections import deque
from collections.abc import Mapping
from dataclasses import replace

from regd_client.errors import NotFound, Unavailable
from regd_client.watches import Endpoint, Event, WatchState


class Mirror:
    """A local picture of some services: `resolve` without a round trip, taking turns among the ready instances.

    While the daemon is away the answers are from the last picture, and say so: `stale_s` is how long it has been
    away. With `stale_s_max` an older answer is refused. A daemon that hangs is noticed within 15 s, and has been
    away since it was last heard. So has that of a mirror that nobody keeps: after its `async with`, after the
    client was closed, in a child that was forked.
    """

    def __init__(self, stale_s_max: float | None) -> None:
        self._stale_s_max = stale_s_max
        self._follow: WatchState
        self._names: dict[str, dict[str, Endpoint]] = {}  # the ready instances, by name and instance
        self._ready: dict[str, deque[Endpoint]] = {}  # of names that were asked for; the next in front
        self._served: dict[str, str] = {}  # the instance that was last, where the queue was given up since

    def follow(self, follow: WatchState) -> None:
        self._follow = follow

    @property
    def live(self) -> bool:
        """Whether the picture is true now."""
        return self._follow.live

    @property
    def stale_s(self) -> float:
        """For how long the daemon has been away; 0.0 while it is there."""
        return self._follow.stale_s

    def changed(self, event: Event) -> None:
        """Take an event, of which every one comes here."""
        found = event.endpoint
        if found is None:
            return
        if event.kind != "down" and event.state == "ready":
            self._names.setdefault(found.name, {})[found.instance] = found
        elif found.name in self._names:
            self._names[found.name].pop(found.instance, None)
        queue = self._ready.pop(found.name, None)
        if not self._names.get(found.name):
            self._names.pop(found.name, None)
            self._served.pop(found.name, None)
        elif queue:
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
                    return found if self._follow.live else self._aged(found)
        elif ready:
            found = ready[0]
            ready.rotate(-1)
            return found if self._follow.live else self._aged(found)
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
