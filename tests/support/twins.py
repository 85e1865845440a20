"""Two daemons in memory that receive the same input, one of them without a resolve cache.

Their output must be equal, byte for byte.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from regd.core.limits import DEFAULT, Limits
from regd.system import processes
from tests.support.wire import Wire
from tests.support.world import World, faked_system

FLUSH_ITERATIONS = 4  # loop iterations until a batch is on disk
PLAIN = b'{"cmd":"resolve","name":"db"}\n'
EMPTY = b'{"$regd": {"format": 1, "rev": 0}}'


@contextmanager
def system() -> Iterator[None]:
    """Fake the processes of the system: all of them run and belong to this user."""
    with faked_system(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(processes, "_uids", lambda pid: {0})
        yield


def line_of(fields: dict[str, Any]) -> bytes:
    return json.dumps(fields, separators=(",", ":")).encode() + b"\n"


def line(cmd: str, **arguments: Any) -> bytes:
    return line_of({"cmd": cmd, **arguments})


class Pair:
    """A connection to each of the two daemons, with the same input on both."""

    def __init__(self, wires: list[Wire]) -> None:
        self.wires = wires
        self._seen = 0

    def send(self, *data: bytes) -> None:
        """Send chunks. Each chunk arrives in a loop iteration of its own."""
        for wire in self.wires:
            for chunk in data:
                wire.send(chunk)

    def for_each(self, action: Callable[[Wire], object]) -> None:
        for wire in self.wires:
            action(wire)

    def received(self) -> bytes:
        """Return the bytes received since the last call, which both daemons must have sent alike."""
        cached, uncached = (bytes(wire.sent[self._seen :]) for wire in self.wires)
        assert cached == uncached
        self._seen += len(cached)
        return cached

    def replies(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.received().splitlines()]


class Twins:
    """Two daemons with the same input, disk and time. The second caches no reply."""

    def __init__(self, registry: bytes = EMPTY, limits: Limits = DEFAULT) -> None:
        self.worlds = [World(registry, limits) for _ in range(2)]
        self.cache, disabled_cache = (world.connections.cache for world in self.worlds)
        disabled_cache.put = lambda entry: None  # type: ignore[method-assign]
        self.pairs: list[Pair] = []
        for world in self.worlds:
            world.loop.flush_iterations = FLUSH_ITERATIONS
        self.writer, self.reader = self.connect(), self.connect()

    def connect(self) -> Pair:
        self.pairs.append(Pair([world.connect() for world in self.worlds]))
        self.run_once()
        return self.pairs[-1]

    def for_each(self, action: Callable[[World], object]) -> None:
        for world in self.worlds:
            action(world)

    def run_once(self) -> None:
        self.for_each(lambda world: world.loop.run_once())

    def settle(self) -> None:
        self.for_each(World.settle)

    def ask(self, request: bytes = PLAIN) -> dict[str, Any]:
        """Send a request that is answered within one loop iteration, and return the reply."""
        self.reader.send(request)
        self.run_once()
        [reply] = self.reader.replies()
        assert isinstance(reply, dict)
        return reply

    def write(self, *requests: bytes) -> list[dict[str, Any]]:
        """Send requests in one chunk, and return the replies once all changes are applied."""
        self.writer.send(b"".join(requests))
        self.settle()
        return self.writer.replies()

    def cache_reply(self, name: str = "db") -> None:
        """Resolve a name until its reply comes from the cache."""
        for _ in range(3):
            self.ask(line("resolve", name=name))
        count = self.cache.count
        self.ask(line("resolve", name=name))
        assert self.cache.count == count + 1, "the reply was not cached"

    def poll(self, count: int = 40) -> list[dict[str, Any]]:
        """Resolve `db` in each of the next loop iterations, and return the replies."""
        replies = [self.ask() for _ in range(count)]
        self.settle()
        for pair in self.pairs:
            pair.received()
        return replies

    def set_full(self, full: bool) -> None:
        for world in self.worlds:
            world.files.failing = full

    def advance(self, seconds: float) -> None:
        """Advance the clocks, without waiting for the effects."""
        self.for_each(lambda world: world.do(lambda: world.clock.advance(seconds)))

    def close(self) -> None:
        for world in self.worlds:
            assert world.loop.errors == []
            world.stop()
