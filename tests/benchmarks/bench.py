"""Start the servers of a row together, and measure them one after the other in rounds."""

import contextlib
import itertools
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.benchmarks.generator import Generator, Measured
from tests.benchmarks.machine import others_s
from tests.benchmarks.servers import Floor, Server

# The measurements of a row by server or client, one dict for each round.
Rounds = dict[str, list[Measured]]
_OTHERS_MAX = 0.05  # of a core
_TRIES = 2
_LOOK_S, _LOOKS = 0.25, 12


@dataclass
class Bench:
    load: Generator
    folder: Path
    rounds: int
    seconds: float
    warm_s: float = 0.2  # before each measurement
    warm_up_s: float = 2.0  # for each server, once
    patience_s: float = 300.0  # in total, to wait until other programs use less of the machine
    left_out: list[str] = field(default_factory=list)
    _count: "itertools.count[int]" = field(default_factory=itertools.count)

    def place(self) -> Path:
        """Return a new folder."""
        return self.folder / f"server{next(self._count)}"

    @contextlib.contextmanager
    def running(
        self, kinds: Sequence[type[Server]], *, durable: bool = False, names: int | Sequence[int] = 0
    ) -> Iterator[list[Server]]:
        """Start the installed servers, register names at each, and end them together."""
        Floor.binary = self.load.folder / "floor"
        with contextlib.ExitStack() as stack:
            there = []
            each = [names] * len(kinds) if isinstance(names, int) else names
            for kind, count in zip(kinds, each, strict=True):
                if missing := kind.missing():
                    self.skip(kind.label, missing)
                    continue
                there.append(server := stack.enter_context(kind(self.place(), durable=durable)))
                if count and kind is not Floor:
                    self.load.fill(server, min(count, kind.names_max))
            yield there

    def skip(self, label: str, missing: str) -> None:
        word = f"{label}: {missing} is not installed"
        if word not in self.left_out:
            self.left_out.append(word)
            self.tell(f"left out, {word}")

    def in_turn(self, things: Mapping[str, Callable[[], Measured]]) -> Rounds:
        """Measure each in every round, so that a slow phase of the machine affects all."""
        measured: Rounds = {what: [] for what in things}
        for _ in range(self.rounds):
            for what, measure in things.items():
                measured[what].append(self._quietest(measure))
        return measured

    def _quietest(self, measure: Callable[[], Measured]) -> Measured:
        """Measure, again if other programs used the machine meanwhile, and return the quietest measurement."""
        best: Measured = {}
        for _ in range(_TRIES):
            self._wait_for_quiet()
            others, began = others_s(), time.monotonic()
            measured = measure()
            measured["others"] = (others_s() - others) / (time.monotonic() - began)
            if not best or measured["others"] < best["others"]:
                best = measured
            if best["others"] < _OTHERS_MAX:
                break
        return best

    def _wait_for_quiet(self) -> None:
        for _ in range(_LOOKS):
            if self.patience_s <= 0:
                return
            before = others_s()
            time.sleep(_LOOK_S)
            if others_s() - before < _OTHERS_MAX * _LOOK_S:
                return
            self.patience_s -= _LOOK_S

    def ask(self, server: Server, **options: Any) -> Callable[[], Measured]:
        """Return a function that measures the requests of `options` at a server over many connections.

        First it warms the server up and sends a request for each name.
        """
        options.setdefault("names", min(1_000, server.names_max))
        if server.protocol != "floor":
            self.load.run(server, **options, once=True)
            self.load.run(server, **options, seconds=self.warm_up_s)
        return lambda: self.load.run(server, **options, warm=self.warm_s, seconds=self.seconds)

    def tell(self, line: str) -> None:
        sys.stdout.write(f"{time.strftime('%H:%M:%S')} {line}\n")
        sys.stdout.flush()
