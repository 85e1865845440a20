"""What every row has: servers that are started together, and rounds in which each has its turn."""

import contextlib
import itertools
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests.benchmarks.generator import Generator, Measured
from tests.benchmarks.servers import Floor, Server

# What was measured in a row: by what it was, round after round.
Rounds = dict[str, list[Measured]]


@dataclass
class Bench:
    load: Generator
    folder: Path
    rounds: int
    seconds: float
    warm: float
    left_out: list[str] = field(default_factory=list)
    _count: "itertools.count[int]" = field(default_factory=itertools.count)

    def place(self) -> Path:
        """Return a folder that nobody has had."""
        return self.folder / f"server{next(self._count)}"

    @contextlib.contextmanager
    def running(
        self, kinds: Sequence[type[Server]], *, durable: bool = False, names: int = 0
    ) -> Iterator[list[Server]]:
        """Start those that are installed, let each hold so many names, and end them together."""
        Floor.binary = self.load.folder / "floor"
        with contextlib.ExitStack() as stack:
            there = []
            for kind in kinds:
                if missing := kind.missing():
                    self.skip(kind.label, missing)
                    continue
                there.append(server := stack.enter_context(kind(self.place(), durable=durable)))
                if names and kind is not Floor:
                    self.load.fill(server, names)
            yield there

    def skip(self, label: str, missing: str) -> None:
        word = f"{label}: {missing} is not installed"
        if word not in self.left_out:
            self.left_out.append(word)
            self.tell(f"left out, {word}")

    def in_turn(self, things: Sequence[Server], measure: Callable[[Server], Measured]) -> Rounds:
        """Measure one after the other, and again, round after round: what changes meanwhile changes for all."""
        found: Rounds = {thing.label: [] for thing in things}
        for _ in range(self.rounds):
            for thing in things:
                found[thing.label].append(measure(thing))
        return found

    def tell(self, line: str) -> None:
        sys.stdout.write(f"{time.strftime('%H:%M:%S')} {line}\n")
        sys.stdout.flush()
