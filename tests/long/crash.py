"""Repeatedly kill a daemon under load with SIGKILL, on one registry: `python -m tests.long.crash`.

After each kill the file and its journal must load, and each key must have its last acknowledged state or one requested
later. Over all lives, `history` must have every acknowledged change exactly once, and resumed watchers must have the
state that `list` shows. When the kill happens is random: a seed repeats the requests, not the timing.
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
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from regd.storage.files import Files
from regd.storage.recovery import Recovery
from regd.storage.store import peek
from tests.long.victim import Victim
from tests.support.daemon import WAIT_S, Peer

KINDS = ("random", "step", "repair", "soon", "two")
_WRITERS = 4
_KEYS_EACH = 5
_BURST_MAX = 12
_LOAD_S_MAX = 0.3
_STEPS_MAX = 400  # file operations since the daemon's start; some hundred commits
_STEPS_S = 60.0  # for these operations, on a disk that others use too
_START_S_MAX = 0.3  # including the start of the interpreter
_FAIL_SHARE = 0.3
_SELDOM = 0.2  # the share of the lives in which the second watcher resumes


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
    in_a_commit: int = 0  # the journal has a torn batch or unacknowledged changes
    in_a_checkpoint: int = 0  # a temporary file is left
    rotations: int = 0  # segments begun after the start of a daemon
    refused: int = 0  # second daemons
    resumed: int = 0  # watches
    missed: int = 0  # events that they got
    in_history: int = 0  # changes


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


class Fold:
    """The state that the events of a watch add up to, over all lives of the daemon."""

    def __init__(self) -> None:
        self.epoch = ""
        self.rev: int | None = None  # None before the first `sync`
        self.state: dict[str, Found] = {}
        self.last: tuple[int, str, str] | None = None  # revision, kind and name of the last event
        self.is_valid = True  # else the disk does not know the epoch: its daemon could write nothing

    @property
    def position(self) -> dict[str, Any]:
        return {} if self.rev is None else {"epoch": self.epoch, "since": self.rev}

    def take(self, event: Mapping[str, Any]) -> None:
        kind, rev = event["event"], event["rev"]
        if kind == "reset":
            assert not self.is_valid, f"reset at {rev}, though {self.position} is on disk"
            self.rev, self.last = None, None
            self.state.clear()
            return
        if kind not in ("up", "change", "down"):
            assert kind == "sync" or rev == self.rev, f"{kind} {rev} behind {self.rev}"
            self.rev = rev
            return
        name = event["name"]
        if self.rev is not None:
            assert rev == self.rev + 1, f"revision {rev} behind {self.rev}"
            assert (name in self.state) is (kind != "up"), f"{event}, and it had {self.state.get(name)}"
            self.rev, self.last = rev, (rev, kind, name)
        if kind == "down":
            del self.state[name]
        else:
            self.state[name] = Found(event["port"], event["meta"]["mark"])


class WatchConnection(asyncio.Protocol):
    """A watch that resumes from the position of `fold`."""

    def __init__(self, fold: Fold) -> None:
        self.missed = 0  # events
        self._fold = fold
        self._epoch: str | None = None  # of this daemon, until the first event
        self._rest = b""
        loop = asyncio.get_running_loop()
        self.caught_up: asyncio.Future[None] = loop.create_future()
        self.gone: asyncio.Future[None] = loop.create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.WriteTransport)
        if self._fold.rev is None:
            self._fold.state.clear()
        transport.write(json.dumps({"cmd": "watch", "name": "*", **self._fold.position}).encode() + b"\n")

    def data_received(self, data: bytes) -> None:
        *lines, self._rest = (self._rest + data).split(b"\n")
        try:
            for line in map(json.loads, lines):
                if "ok" in line:
                    self._epoch = line["epoch"]
                    continue
                self._fold.epoch, self._epoch = self._epoch or self._fold.epoch, None
                self._fold.take(line)
                self.missed += not self.caught_up.done()
                if line["event"] in ("sync", "progress") and not self.caught_up.done():
                    self.caught_up.set_result(None)
        except BaseException as error:
            self.gone.set_exception(error)
            raise

    def connection_lost(self, error: Exception | None) -> None:
        if not self.gone.done():
            self.gone.set_result(None)


class Rounds:
    """A registry, and what all writers and watchers know of it."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.registry = folder / "deep" / "registry.json"
        self.figures = Figures()
        self.random = random.Random(seed)
        self._keys = [[Key(f"w{w}.k{k}") for k in range(_KEYS_EACH)] for w in range(_WRITERS)]
        self._tick = 0  # counts requests and replies
        self._rev = 0  # the highest acknowledged revision
        self._clean_since = 0  # a commit that was acknowledged began after this tick
        self._is_failing = False
        self._watcher, self._seldom_watcher = Fold(), Fold()
        self._changes: dict[int, tuple[str, str, int | None]] = {}  # acknowledged: op, name, port
        self._history: list[Mapping[str, Any]] = []
        self._segments: set[int] = set()  # the first lines of all that were found

    def run(self, kind: str) -> None:
        self._is_failing = kind == "repair"
        plan = {
            "step": f"{self.random.randint(1, _STEPS_MAX)}, 0, 0",
            "repair": f"0, {_FAIL_SHARE}, {self.random.randrange(2**32)}",
        }
        with Victim(self.registry, plan.get(kind, "")) as victim, Victim(self.registry) as other:
            victim.launch()
            if kind == "two":
                other.launch()
            if kind == "soon":
                time.sleep(self.random.uniform(0, _START_S_MAX))
            else:
                listening = victim.listens(), kind == "two" and other.listens()
                if kind == "two":
                    victim = self._the_one_of_two(victim, other, listening)
                if any(listening):
                    asyncio.run(self._load(victim, kind))
            victim.end(signal.SIGKILL)
        self._verify()
        self.figures.rounds += 1

    def _the_one_of_two(self, one: Victim, other: Victim, listening: tuple[bool, bool]) -> Victim:
        assert sum(listening) == 1, "of two daemons that start at once, exactly one must be refused"
        stays, goes = (one, other) if listening[0] else (other, one)
        status, errors = goes.end(0)
        assert status == 1
        assert "in use by another regd" in errors
        self.figures.refused += 1
        return stays

    # The load.

    async def _load(self, victim: Victim, kind: str) -> None:
        assert victim.process is not None
        loop = asyncio.get_running_loop()
        connections: list[Writer | WatchConnection] = []
        try:
            connections.append(await self._resume(self._watcher, victim.port))
            if self.random.random() < _SELDOM:
                connections.append(await self._resume(self._seldom_watcher, victim.port))
            await self._check_list(victim.port)
            await self._check_history(victim.port)
            for keys in self._keys:
                writer = Writer(self, keys)
                connections.append(writer)
                await loop.create_connection(lambda writer=writer: writer, "127.0.0.1", victim.port)  # type: ignore[misc]
        except ConnectionError:
            assert kind == "step", "the daemon ended by itself"
        if kind != "step":
            await asyncio.sleep(self.random.uniform(0, _LOAD_S_MAX))
            victim.process.send_signal(signal.SIGKILL)
        async with asyncio.timeout(_STEPS_S):
            await asyncio.gather(*(each.gone for each in connections if each.gone is not None))

    async def _resume(self, fold: Fold, port: int) -> WatchConnection:
        """Resume a watch, and compare it with the registry once it has caught up."""
        watch = WatchConnection(fold)
        resumes = fold.rev is not None
        await asyncio.get_running_loop().create_connection(lambda: watch, "127.0.0.1", port)
        async with asyncio.timeout(WAIT_S):
            await asyncio.wait((watch.caught_up, watch.gone), return_when=asyncio.FIRST_COMPLETED)
        if watch.gone.done():
            await watch.gone  # raises what was wrong
        if not watch.caught_up.done():
            raise ConnectionResetError
        assert (fold.rev, fold.state) == (self._rev, self._acknowledged())
        self.figures.resumed += resumes
        self.figures.missed += watch.missed if resumes else 0
        return watch

    async def _replies(self, port: int, request: dict[str, Any], following: str) -> AsyncIterator[dict[str, Any]]:
        """Yield the replies to a request, page by page. `following` is the argument that takes `next`."""
        peer = Peer(*await asyncio.open_connection("127.0.0.1", port, limit=2**21))
        try:
            while True:
                peer.send(request)
                line = await peer.line()
                if not line.endswith(b"\n"):
                    raise ConnectionResetError
                reply = json.loads(line)
                yield reply
                if "next" not in reply:
                    return
                request = request | {following: reply["next"]}
        finally:
            await peer.close()

    async def _check_list(self, port: int) -> None:
        """Compare the daemon's `list` with what the disk had."""
        async for reply in self._replies(port, {"cmd": "list"}, "after"):
            listed = {
                instance["name"]: Found(instance["port"], instance["meta"]["mark"])
                for instance in reply["instances"]
            }
            assert listed == self._acknowledged()
            assert reply["rev"] == self._rev

    async def _check_history(self, port: int) -> None:
        """Check that the history since the last check has each revision once, and each acknowledged change."""
        last = self._history[-1]["rev"] if self._history else 0
        found: list[Mapping[str, Any]] = []
        async for reply in self._replies(port, {"cmd": "history", "since": last, "limit": 1_000}, "since"):
            found += reply["changes"]
        assert [change["rev"] for change in found] == list(range(last + 1, self._rev + 1))
        for change in found:
            if (acknowledged := self._changes.pop(change["rev"], None)) is not None:
                op, name, request_port = acknowledged
                assert (change["op"], change["name"]) == (op, name), f"{change}, not {acknowledged}"
                assert request_port in (None, change["port"]), f"{change}, not {acknowledged}"
        assert not self._changes, f"acknowledged, and not in the history: {self._changes}"
        self._history += found
        self.figures.in_history += len(found)

    async def check_all_of_history(self) -> None:
        """Compare the history that is kept with what was seen of it in earlier lives."""
        with Victim(self.registry) as victim:
            victim.launch()
            assert victim.listens()
            self._rev = self._peek().rev
            await self._resume(self._seldom_watcher, victim.port)
            await self._check_history(victim.port)
            kept: list[Mapping[str, Any]] = []
            async for reply in self._replies(
                victim.port, {"cmd": "history", "since": 0, "limit": 1_000}, "since"
            ):
                kept += reply["changes"]
            assert kept == self._history[len(self._history) - len(kept) :]
            victim.end(signal.SIGKILL)

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
            cmd = ask.request["cmd"]
            op = {"register": "up", "update": "change", "deregister": "down"}[cmd]
            assert reply["rev"] not in self._changes, f"{ask.request} and another have {reply}"
            self._changes[reply["rev"]] = (op, ask.key.name, ask.request.get("port"))
        elif reply["error"] == "storage_failed":
            assert self._is_failing
            self.figures.failed += 1

    # After the kill.

    def _all(self) -> list[Key]:
        return [key for keys in self._keys for key in keys]

    def _acknowledged(self) -> dict[str, Found]:
        return {key.name: key.acknowledged for key in self._all() if key.acknowledged}

    def _peek(self) -> Recovery:
        return peek(self.registry, Files())

    def _verify(self) -> None:
        found = self._peek()
        held = {entry.name: Found(entry.port, entry.meta["mark"]) for entry in found.entries}
        assert found.rev >= self._rev, f"revision {found.rev} on disk, {self._rev} was acknowledged"
        assert held.keys() <= {key.name for key in self._all()}
        was_in_a_commit = any("not written whole" in note for note in found.notes)
        for key in self._all():
            state = held.get(key.name)
            may_be = key.may_be(self._clean_since, is_failing=self._is_failing)
            assert state in may_be, f"{key.name} is {state} on disk; it may be {may_be}"
            was_in_a_commit |= state != key.acknowledged
            self.figures.unanswered += sum(ask.answered is None for ask in key.open)
            key.acknowledged, key.open = state, []
        self._rev = found.rev
        for fold in (self._watcher, self._seldom_watcher):
            self._verify_watcher(fold, found)
        self.figures.in_a_commit += was_in_a_commit
        self.figures.in_a_checkpoint += self.registry.with_name(self.registry.name + ".tmp").exists()
        self._count_rotations()

    def _verify_watcher(self, fold: Fold, found: Recovery) -> None:
        """Check that a watcher has nothing that the disk does not have."""
        if fold.rev is None:
            return
        was_valid = fold.is_valid and not self._is_failing
        fold.is_valid = fold.epoch == found.epoch or fold.epoch in found.epochs
        assert fold.is_valid or not was_valid, f"the disk does not know the epoch of {fold.position}"
        assert fold.rev <= found.rev, f"a watcher has revision {fold.rev}, the disk {found.rev}"
        if fold.last is None or fold.last[0] <= found.history_rev:
            return
        rev, kind, name = fold.last
        change = next(change for change in found.history if change.rev == rev)
        assert (change.op, change.entry.name) == (kind, name), f"a watcher has {fold.last}, the disk {change}"

    def _count_rotations(self) -> None:
        heads = [path.read_bytes().partition(b"\n")[0] for path in self.registry.parent.glob("registry.journal*")]
        lines = {json.loads(head)["line"] for head in heads if head.endswith(b"}")}
        self.figures.rotations += max(len(lines - self._segments) - 1, 0)
        self._segments |= lines


def run(folder: Path, rounds: int, seed: int) -> Figures:
    """Kill a daemon `crashes` times. Raises AssertionError if a promise is broken."""
    crashes = Rounds(folder, seed)
    for count in range(rounds):
        kind = KINDS[count % len(KINDS)]
        try:
            crashes.run(kind)
        except AssertionError as error:
            raise AssertionError(f"seed {seed}, round {count}, {kind}: {error}") from error
    asyncio.run(crashes.check_all_of_history())
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
