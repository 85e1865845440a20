"""Two daemons in memory with the same input, one of them without a resolve cache.

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

FLUSH_TURNS = 4  # of the loop, while a batch is on its way to the disk
PLAIN = b'{"cmd":"resolve","name":"db"}\n'
EMPTY = b'{"$regd": {"format": 1, "rev": 0}}'


@contextmanager
def system() -> Iterator[None]:
    """Let processes be there, and be ours."""
    with faked_system(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(processes, "_uids", lambda pid: {0})
        yield


def line_of(fields: dict[str, Any]) -> bytes:
    return json.dumps(fields, separators=(",", ":")).encode() + b"\n"


def line(cmd: str, **arguments: Any) -> bytes:
    return line_of({"cmd": cmd, **arguments})


class Line:
    """A connection to each of the two daemons, over which the same is said."""

    def __init__(self, wires: list[Wire]) -> None:
        self.wires = wires
        self._seen = 0

    def send(self, *data: bytes) -> None:
        """Send chunks; each arrives in a turn of its own."""
        for wire in self.wires:
            for chunk in data:
                wire.send(chunk)

    def each(self, do: Callable[[Wire], object]) -> None:
        for wire in self.wires:
            do(wire)

    def new(self) -> bytes:
        """Return what has come since; it must be the same from both."""
        remembering, other = (bytes(wire.sent[self._seen :]) for wire in self.wires)
        assert remembering == other
        self._seen += len(other)
        return other

    def replies(self) -> list[dict[str, Any]]:
        return [json.loads(each) for each in self.new().splitlines()]


class Twins:
    """Two daemons that the same happens to. The second remembers no reply."""

    def __init__(self, registry: bytes = EMPTY, limits: Limits = DEFAULT) -> None:
        self.worlds = [World(registry, limits) for _ in range(2)]
        self.replies, forgetful = (world.connections.cache for world in self.worlds)
        forgetful.put = lambda entry: None  # type: ignore[method-assign]
        self.lines: list[Line] = []
        for world in self.worlds:
            world.loop.flush_turns = FLUSH_TURNS
        self.writer, self.asker = self.connect(), self.connect()

    def connect(self) -> Line:
        self.lines.append(Line([world.connect() for world in self.worlds]))
        self.turn()
        return self.lines[-1]

    def each(self, do: Callable[[World], object]) -> None:
        for world in self.worlds:
            do(world)

    def turn(self) -> None:
        self.each(lambda world: world.loop.turn())

    def settle(self) -> None:
        self.each(World.settle)

    def ask(self, request: bytes = PLAIN) -> dict[str, Any]:
        """Ask for something that is answered at once, in just one turn, and return the reply."""
        self.asker.send(request)
        self.turn()
        [reply] = self.asker.replies()
        assert isinstance(reply, dict)
        return reply

    def write(self, *requests: bytes) -> list[dict[str, Any]]:
        """Send requests in one chunk, and return the replies once all has landed."""
        self.writer.send(b"".join(requests))
        self.settle()
        return self.writer.replies()

    def know(self, name: str = "db") -> None:
        """Have the reply about a name remembered, and the asker come to rest."""
        for _ in range(3):
            self.ask(line("resolve", name=name))
        count = self.replies.count
        self.ask(line("resolve", name=name))
        assert self.replies.count == count + 1, "nothing was remembered"

    def follow(self, count: int = 40) -> list[dict[str, Any]]:
        """Ask in every turn from now on, and return the replies."""
        found = [self.ask() for _ in range(count)]
        self.settle()
        for each in self.lines:
            each.new()
        return found

    def set_full(self, full: bool) -> None:
        for world in self.worlds:
            world.files.failing = full

    def advance(self, seconds: float) -> None:
        """Let time pass, and nothing else yet."""
        self.each(lambda world: world.do(lambda: world.clock.advance(seconds)))

    def close(self) -> None:
        for world in self.worlds:
            assert world.loop.errors == []
            world.stop()
