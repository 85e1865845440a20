"""A mirror: a local copy of some of the registry's instances, to resolve names without a round trip."""

import asyncio
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import groupby

from regd_client.arguments import check_seconds
from regd_client.errors import NotFound, Timeout, Unavailable
from regd_client.models import Endpoint, Event
from regd_client.watches import WatchState

__all__ = ["Mirror"]


class Mirror:
    """A local copy of the instances that match a pattern, from `mirror` or `Client.mirror`.

        async with regd_client.mirror("worker*") as mirror:
            endpoint = mirror.resolve("worker")
            endpoints = list(mirror)

    Iterating yields the endpoints of all ready instances, in order of name and instance.

    The mirror becomes stale when the connection to the daemon is lost. A stale mirror answers from its last copy;
    `stale_s` of an endpoint is the number of seconds for which its mirror has been stale. With `stale_s_max`, the
    mirror raises `Unavailable` once it has been stale for longer. The client detects a hung daemon within 15 s;
    the mirror then counts as stale from the last time that the daemon sent something. A mirror is also stale
    after its `async with`, after the client was closed, and in a forked child.
    """

    def __init__(self, pattern: str, meta: Mapping[str, str] | None, stale_s_max: float | None) -> None:
        self._stale_s_max = stale_s_max
        self._watch = WatchState(pattern, meta, self._take, self._end)
        self._synced = asyncio.Event()  # the first copy is complete, or the watch has ended
        self._changes = 0
        self._changed = asyncio.Event()  # replaced after each change
        self._names: dict[str, dict[str, Endpoint]] = {}  # the ready instances, by name and instance
        # For `resolve`: by name, a queue of endpoints for each priority, the best priority first. The first
        # endpoint of a queue is the next to return. A change of a name drops its queues; `_served` then has, by
        # priority, the instance that was returned last, so that the new queues continue after it.
        self._queues: dict[str, list[deque[Endpoint]]] = {}
        self._served: dict[str, dict[int, str]] = {}

    def __repr__(self) -> str:
        count = sum(map(len, self._names.values()))
        state = "live" if self.live else "ended" if self._watch.ended else f"stale for {self.stale_s:.1f} s"
        return f"<Mirror {self._watch.pattern!r} {count} ready, {state}>"

    @property
    def live(self) -> bool:
        """Whether the copy is up to date."""
        return self._watch.live

    @property
    def stale_s(self) -> float:
        """Seconds for which the copy may have been out of date; 0.0 while the copy is live."""
        return self._watch.stale_s

    @property
    def changes(self) -> int:
        """The number of changes so far, to pass to `changed`."""
        return self._changes

    async def changed(self, since: int | None = None, *, timeout: float | None = None) -> int:
        """Wait until a ready instance appears, disappears, or changes its address, labels or priority.

            while True:
                seen = mirror.changes
                write_configuration(list(mirror))
                await mirror.changed(seen)

        Args:
            since: an earlier value of `changes`; the call returns at once if there were changes since. By
                default it waits for the next change.
            timeout: seconds to wait; by default without a limit.

        Returns:
            The current value of `changes`.

        Raises:
            Timeout: nothing changed in time.
            Unavailable: the mirror has ended: its `async with` was left, or the client was closed.
        """
        check_seconds("timeout", timeout)
        if since is None:
            since = self._changes
        try:
            async with asyncio.timeout(timeout):
                while self._changes == since and not self._watch.ended:
                    await self._changed.wait()
        except TimeoutError:
            raise Timeout(f"the mirror did not change within {timeout:g} s") from None
        if self._changes == since:
            raise Unavailable("the mirror has ended")
        return self._changes

    def __iter__(self) -> Iterator[Endpoint]:
        """Iterate over the current endpoints of all ready instances, in order of name and instance.

        Raises:
            Unavailable: the copy is older than `stale_s_max`.
        """
        self._check_age()
        return iter([endpoint for name in sorted(self._names) for endpoint in self._ready(name)])

    def resolve(self, name: str, *, meta: Mapping[str, str] | None = None) -> Endpoint:
        """Return the endpoint of a ready instance of the best priority; calls rotate through all such instances.

        Args:
            name: the service's name.
            meta: labels; the instance must have all of them.

        Raises:
            NotFound: no ready instance has the name and the labels.
            Unavailable: the copy is older than `stale_s_max`.
        """
        queues = self._queues.get(name)
        if queues is None:
            queues = self._make_queues(name)
        if meta:
            for queue in queues:
                for endpoint in queue:
                    if _has_labels(endpoint, meta):
                        queue.remove(endpoint)
                        queue.append(endpoint)
                        return endpoint if self._watch.live else self._stale(endpoint)
        elif queues:
            endpoint = queues[0][0]
            queues[0].rotate(-1)
            return endpoint if self._watch.live else self._stale(endpoint)
        self._check_age()
        raise NotFound(f"no ready instance of {name!r} in the mirror", "not_found", {"stale_s": self.stale_s})

    def resolve_all(self, name: str, *, meta: Mapping[str, str] | None = None) -> list[Endpoint]:
        """Return all ready instances in order of priority and instance; [] if there are none.

        Args:
            name: the service's name.
            meta: only instances with all of these labels.

        Raises:
            Unavailable: the copy is older than `stale_s_max`.
        """
        self._check_age()
        matching = [endpoint for endpoint in self._ready(name) if _has_labels(endpoint, meta or {})]
        return sorted(matching, key=_priority)

    def _ready(self, name: str) -> list[Endpoint]:
        """Return all ready instances of a name in order of instance."""
        instances = self._names.get(name, {})
        endpoints = [instances[instance] for instance in sorted(instances)]
        return endpoints if self.live else [self._stale(endpoint) for endpoint in endpoints]

    def _take(self, event: Event) -> None:
        if event.endpoint is None:
            self._synced.set()
        elif self._apply(event, event.endpoint):
            self._changes += 1
            self._wake()

    def _end(self) -> None:
        self._synced.set()
        self._wake()

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    def _apply(self, event: Event, endpoint: Endpoint) -> bool:
        """Apply an event to the ready instances, and return whether they have changed."""
        name, instance = endpoint.name, endpoint.instance
        previous = self._names.get(name, {}).get(instance)
        if event.kind != "down" and event.state == "ready":
            self._names.setdefault(name, {})[instance] = endpoint
            changed = previous != endpoint
        elif previous is not None:
            del self._names[name][instance]
            changed = True
        else:
            return False
        queues = self._queues.pop(name, None)
        if not self._names[name]:
            del self._names[name]
            self._served.pop(name, None)
        elif queues:
            self._served[name] = {queue[-1].priority: queue[-1].instance for queue in queues}
        return changed

    def _make_queues(self, name: str) -> list[deque[Endpoint]]:
        instances = self._names.get(name, {})
        ranked = sorted(instances.values(), key=lambda endpoint: (endpoint.priority, endpoint.instance))
        queues = [deque(endpoints) for _, endpoints in groupby(ranked, _priority)]
        served = self._served.pop(name, {})
        for queue in queues:
            last = served.get(queue[0].priority)
            queue.rotate(0 if last is None else -sum(endpoint.instance <= last for endpoint in queue))
        if queues:
            self._queues[name] = queues
        return queues

    def _check_age(self) -> float:
        """Return `stale_s`, or raise `Unavailable` if it exceeds `stale_s_max`."""
        age_s = self.stale_s
        if self._stale_s_max is not None and age_s > self._stale_s_max:
            raise Unavailable(
                f"the daemon has been away for {age_s:.1f} s, and stale_s_max is {self._stale_s_max:g}"
            )
        return age_s

    def _stale(self, endpoint: Endpoint) -> Endpoint:
        return replace(endpoint, stale_s=self._check_age())


def _priority(endpoint: Endpoint) -> int:
    return endpoint.priority


def _has_labels(endpoint: Endpoint, meta: Mapping[str, str]) -> bool:
    return all(endpoint.meta.get(key) == value for key, value in meta.items())
