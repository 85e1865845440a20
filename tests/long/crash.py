"""Repeatedly kill a daemon under load with SIGKILL, on one registry: `python -m tests.long.crash`.

After each kill the file must load, and each key must have its last acknowledged state or one requested later. When
the kill happens is random: a seed repeats the requests, not the timing.
"""

import argparse
import asyncio
import json
import random
import signal
import sys
import tempfile
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from tests.long.victim import Victim
from tests.support.daemon import WAIT_S, Peer

KINDS = ("random", "step", "repair", "soon", "two")
_WRITERS = 4
_KEYS_EACH = 5
_BURST_MAX = 12
_LOAD_S_MAX = 0.3
_STEPS_MAX = 250  # file operations since the daemon's start; some twenty commits
_START_S_MAX = 0.3  # including the start of the interpreter
_FAIL_SHARE = 0.3


class Found(NamedTuple):
    """A registration in the file or the daemon. `mark` identifies the request that set it."""

    port: int
    mark: str


@dataclass
class Ask:
    """A request for one key."""

    key: "Key"
    request: Mapping[str, Any]
    sent: int  # its position among all requests and replies
    answered: int | None = None

    def after(self, before: Found | None) -> tuple[Found | None, str]:
        """Return the state of the key after the request, and the expected reply: `ok` or the error."""
        cmd, request = self.request["cmd"], self.request
        if cmd != "register" and before is None:
            return None, "not_found"
        if request.get("if") == 0 and before is not None:
            return before, "conflict"
        if cmd == "deregister":
            return None, "ok"
        mark = request["meta"]["mark"]
        if cmd == "update":
            assert before is not None
            return Found(before.port, mark), "ok"
        return Found(request["port"], mark), "ok"


@dataclass
class Key:
    """What a writer knows of one of its keys."""

    name: str
    acknowledged: Found | None = None
    open: list[Ask] = field(default_factory=list)  # not answered, or answered with storage_failed

    def answer(self, ask: Ask, reply: Mapping[str, Any]) -> None:
        answer = "ok" if reply["ok"] else reply["error"]
        if answer == "storage_failed":
            return
        after, expected = ask.after(self.acknowledged)
        assert answer == expected, f"{ask.request} on {self.acknowledged}: {reply}"
        self.acknowledged = after
        self.open = self.open[self.open.index(ask) + 1 :]

    def may_be(self, clean_since: int, *, is_failing: bool) -> set[Found | None]:
        """Return the states that a crash may leave.

        A refused request may be in the file until the next acknowledged commit, but no earlier request may be.
        """
        asks = [ask for ask in self.open if ask.answered is None or ask.answered > clean_since]
        states = {self.acknowledged}
        for begin in range(len(asks) if is_failing else 1):
            state = self.acknowledged
            for ask in asks[begin:]:
                state, _ = ask.after(state)
                states.add(state)
        return states


@dataclass
class Figures:
    rounds: int = 0
    acknowledged: int = 0
    failed: int = 0
    unanswered: int = 0
    in_a_commit: int = 0  # a temporary file is left, or the file has unacknowledged changes
    refused: int = 0  # second daemons


class Writer(asyncio.Protocol):
    """A connection that sends bursts of requests, each after the replies to the last, until the daemon is killed.

    It is an asyncio protocol, since a stream discards received data when its connection is reset.
    """

    def __init__(self, rounds: "Rounds", keys: Sequence[Key]) -> None:
        self._rounds = rounds
        self._keys = keys
        self._asked: deque[Ask] = deque()
        self._rest = b""
        self._transport: asyncio.WriteTransport | None = None
        self.gone: asyncio.Future[None] | None = None  # None if it was never connected

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.WriteTransport)
        self._transport = transport
        self.gone = asyncio.get_running_loop().create_future()
        self._burst()

    def _burst(self) -> None:
        assert self._transport is not None
        chance = self._rounds.random
        self._asked.extend(
            self._rounds.ask(chance.choice(self._keys)) for _ in range(chance.randint(1, _BURST_MAX))
        )
        self._transport.write(b"".join(json.dumps(ask.request).encode() + b"\n" for ask in self._asked))

    def data_received(self, data: bytes) -> None:
        *lines, self._rest = (self._rest + data).split(b"\n")
        try:
            for line in lines:
                self._rounds.answered(self._asked.popleft(), json.loads(line))
        except BaseException as error:
            assert self.gone is not None
            self.gone.set_exception(error)
            raise
        if not self._asked:
            self._burst()

    def connection_lost(self, error: Exception | None) -> None:
        assert self.gone is not None
        if not self.gone.done():
            self.gone.set_result(None)


class Rounds:
    """A registry, and what all writers know of it."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.registry = folder / "deep" / "registry.json"
        self.figures = Figures()
        self.random = random.Random(seed)
        self._keys = [[Key(f"w{w}.k{k}") for k in range(_KEYS_EACH)] for w in range(_WRITERS)]
        self._tick = 0  # counts requests and replies
        self._rev = 0  # the highest acknowledged revision
        self._clean_since = 0  # a commit that was acknowledged began after this tick
        self._is_failing = False

    def run(self, kind: str) -> None:
        self._is_failing = kind == "repair"
        plan = {
            "step": f"{self.random.randint(1, _STEPS_MAX)}, 0, 0",
            "repair": f"0, {_FAIL_SHARE}, {self.random.randrange(2**32)}",
        }
        with Victim(self.registry, plan.get(kind, "")) as victim, Victim(self.registry) as other:
            before = self._touched()
            victim.launch()
            if kind == "two":
                other.launch()
            if kind == "soon":
                time.sleep(self.random.uniform(0, _START_S_MAX))
            else:
                listening = victim.listens(), kind == "two" and other.listens()
                if kind == "two":
                    victim = self._the_one_of_two(victim, other, listening, before)
                if any(listening):
                    asyncio.run(self._load(victim, kind))
            victim.end(signal.SIGKILL)
        self._verify()
        self.figures.rounds += 1

    def _the_one_of_two(
        self, one: Victim, other: Victim, listening: tuple[bool, bool], before: tuple[object, ...] | None
    ) -> Victim:
        assert sum(listening) == 1, "of two daemons that start at once, exactly one must be refused"
        stays, goes = (one, other) if listening[0] else (other, one)
        status, errors = goes.end(0)
        assert status == 1
        assert "in use by another regd" in errors
        assert before in (None, self._touched())
        self.figures.refused += 1
        return stays

    def _touched(self) -> tuple[object, ...] | None:
        if not self.registry.exists():
            return None
        status = self.registry.stat()
        return (status.st_ino, status.st_mtime_ns, self.registry.read_bytes())

    # The load.

    async def _load(self, victim: Victim, kind: str) -> None:
        assert victim.process is not None
        loop = asyncio.get_running_loop()
        writers = [Writer(self, keys) for keys in self._keys]
        try:
            await self._hold_against_list(victim.port)
            for writer in writers:
                await loop.create_connection(lambda writer=writer: writer, "127.0.0.1", victim.port)  # type: ignore[misc]
        except ConnectionError:
            assert kind == "step", "the daemon ended by itself"
        if kind != "step":
            await asyncio.sleep(self.random.uniform(0, _LOAD_S_MAX))
            victim.process.send_signal(signal.SIGKILL)
        async with asyncio.timeout(WAIT_S):
            await asyncio.gather(*(writer.gone for writer in writers if writer.gone is not None))

    async def _hold_against_list(self, port: int) -> None:
        """Compare the daemon's `list` with the file's content."""
        peer = Peer(*await asyncio.open_connection("127.0.0.1", port))
        peer.send("list")
        line = await peer.line()
        await peer.close()
        if not line.endswith(b"\n"):
            raise ConnectionResetError
        reply = json.loads(line)
        listed = {
            instance["name"]: Found(instance["port"], instance["meta"]["mark"]) for instance in reply["instances"]
        }
        assert listed == {key.name: key.acknowledged for key in self._all() if key.acknowledged}
        assert reply["rev"] == self._rev

    def ask(self, key: Key) -> Ask:
        self._tick += 1
        request: dict[str, Any] = {"cmd": self.random.choice(("register", "register", "update", "deregister"))}
        request["name"] = key.name
        if request["cmd"] != "deregister":
            request["meta"] = {"mark": str(self._tick)}
        if request["cmd"] == "register":
            request["port"] = 1 + self._tick % 60_000
        if request["cmd"] == "register" and self.random.random() < 0.3:
            request["if"] = 0
        ask = Ask(key, request, self._tick)
        key.open.append(ask)
        return ask

    def answered(self, ask: Ask, reply: Mapping[str, Any]) -> None:
        self._tick += 1
        ask.answered = self._tick
        ask.key.answer(ask, reply)
        if reply["ok"]:
            self.figures.acknowledged += 1
            self._rev = max(self._rev, reply["rev"])
            self._clean_since = max(self._clean_since, ask.sent)
        elif reply["error"] == "storage_failed":
            assert self._is_failing
            self.figures.failed += 1

    # After the kill.

    def _all(self) -> list[Key]:
        return [key for keys in self._keys for key in keys]

    def _verify(self) -> None:
        temporary = self.registry.with_name(self.registry.name + ".tmp")
        was_in_a_commit = temporary.exists()
        held: dict[str, Any] = json.loads(self.registry.read_bytes()) if self.registry.exists() else {}
        rev = held.pop("$regd", {"rev": 0})["rev"]
        assert rev >= self._rev, f"revision {rev} in the file, {self._rev} was acknowledged"
        assert held.keys() <= {key.name for key in self._all()}
        for key in self._all():
            fields = held.get(key.name)
            state = Found(fields["port"], fields["meta"]["mark"]) if fields else None
            may_be = key.may_be(self._clean_since, is_failing=self._is_failing)
            assert state in may_be, f"{key.name} is {state} in the file; it may be {may_be}"
            was_in_a_commit |= state != key.acknowledged
            self.figures.unanswered += sum(ask.answered is None for ask in key.open)
            key.acknowledged, key.open = state, []
        self._rev = rev
        self.figures.in_a_commit += was_in_a_commit


def run(folder: Path, rounds: int, seed: int) -> Figures:
    """Kill a daemon `crashes` times. Raises AssertionError if a promise is broken."""
    crashes = Rounds(folder, seed)
    for count in range(rounds):
        kind = KINDS[count % len(KINDS)]
        try:
            crashes.run(kind)
        except AssertionError as error:
            raise AssertionError(f"seed {seed}, round {count}, {kind}: {error}") from error
    return crashes.figures


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tests.long.crash", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--seed", type=int, default=random.randrange(2**32))
    args = parser.parse_args()
    sys.stdout.write(f"seed {args.seed}\n")
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        figures = run(Path(folder), args.rounds, args.seed)
    for what, value in vars(figures).items():
        sys.stdout.write(f"{what.replace('_', ' '):<20} {value:>9,}\n")
    sys.stdout.write(f"{'seconds':<20} {time.monotonic() - began:>9.1f}\n")


if __name__ == "__main__":
    main()
