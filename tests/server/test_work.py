"""How much work a request is, counted and not timed: so a regression is seen on a machine that is busy.

Counted are Python's instructions, in regd and in what it uses of the standard library but the event loop: the same
in every run. With them goes what costs more than its instructions tell: JSON, sends, commits, memory that stays.

`FIGURES` is what it was when somebody last looked. To renew it after a change that is meant, or an improvement, do
this once with each of Python 3.11, 3.12 and 3.13 (with pytest):

    python -m tests.server.test_work            # prints the table, with this Python's column as it is now
    python -m tests.server.test_work --write    # and puts it in its place here
"""

import asyncio
import gc
import itertools
import socket
import sys
import tempfile
import tracemalloc
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import CodeType, FrameType
from typing import Any, cast

import pytest

from regd.core.limits import DEFAULT
from regd.server.streams import Streams
from tests.fuzz.wire import Wire
from tests.fuzz.world import World
from tests.support.daemon import ROOT, WAIT_S, InLoop
from tests.support.twins import EMPTY, PLAIN, line, system

ROOM = 1.25  # what more is a regression

# On Python 3.11, 3.12 and 3.13; a later one is compared with the last.
FIGURES: dict[str, tuple[float, float, float]] = {
    "a known resolve": (33, 30, 31),
    "a known resolve: JSON": (0, 0, 0),
    "16 known resolves at once": (87, 75, 76),
    "16 known resolves at once: JSON": (0, 0, 0),
    "a known resolve with an id": (196, 175, 178),
    "a known resolve with an id: JSON": (0, 0, 0),
    "16 known resolves with ids at once": (1411, 1300, 1333),
    "16 known resolves with ids at once: JSON": (0, 0, 0),
    "a resolve that is not known": (1458, 1345, 1387),
    "a resolve that is not known: JSON read": (1, 1, 1),
    "a resolve that is not known: JSON written": (0, 0, 0),
    "a resolve of nobody": (3751, 3294, 3258),
    "a resolve of nobody: JSON read": (1, 1, 1),
    "a resolve of nobody: JSON written": (1, 1, 1),
    "a ping": (922, 854, 898),
    "a ping: JSON read": (1, 1, 1),
    "a ping: JSON written": (1, 1, 1),
    "a register": (3988, 3818, 3871),
    "a register: its lines": (1023, 931, 955),
    "a register: JSON read": (1, 1, 1),
    "a register: JSON written": (0, 0, 0),
    "a register with meta and hold": (5009, 4753, 4841),
    "a register with meta and hold: its lines": (1119, 1019, 1042),
    "a register with meta and hold: JSON read": (1, 1, 1),
    "a register with meta and hold: JSON written": (1, 1, 1),
    "a change of meta": (4746, 4511, 4596),
    "a change of meta: its lines": (1119, 1019, 1042),
    "a change of meta: JSON read": (1, 1, 1),
    "a change of meta: JSON written": (2, 2, 2),
    "a deregister": (3772, 3607, 3694),
    "a deregister: its lines": (992, 902, 927),
    "a deregister: JSON read": (1, 1, 1),
    "a deregister: JSON written": (1, 1, 1),
    "50 registers": (153390, 141028, 143194),
    "50 registers: its lines": (11209, 10232, 10058),
    "50 registers: JSON read": (50, 50, 50),
    "50 registers: JSON written": (0, 0, 0),
    "a change to one watcher": (555, 509, 530),
    "a change to one watcher: JSON written": (0, 0, 0),
    "a change to 49 more watchers": (17591, 16121, 16954),
    "a change to 49 more watchers: JSON written": (0, 0, 0),
    "a connection that comes": (154, 144, 145),
    "a connection that goes": (478, 452, 487),
    "commits for 1,000 writes of 50 connections": (20, 20, 20),
    "commits for 1,000 writes of 50 connections that think": (20, 20, 20),
    "sends for 1,000 registers in a row": (16, 16, 16),
    "a known resolve, from socket to socket": (140, 123, 126),
    "50 known resolves, from socket to socket": (5285, 4631, 4781),
    "sends for 1,000 resolves in a row": (9, 9, 9),
    "sends for 992 resolves, 16 at once": (62, 62, 62),
    "bytes that stay of a connection": (1972, 1980, 1980),
    "bytes that stay of a connection that has asked": (1997, 2005, 2004),
    "bytes that stay of a reply that is remembered": (275, 275, 275),
}  # fmt: skip

_STORAGE = str(ROOT / "regd" / "storage")
_TESTS = str(ROOT / "tests")
_LEFT_OUT = ("/asyncio/", "/selectors.py", "/concurrent/", "/threading.py")


@dataclass
class Work:
    """Instructions by file, and how often JSON was written and read."""

    instructions: Counter[str] = field(default_factory=Counter)
    encodings: int = 0
    decodings: int = 0

    def sum(self, storage: bool = False) -> int:
        """Return the instructions without those for the file, or those alone."""
        return sum(count for name, count in self.instructions.items() if name.startswith(_STORAGE) is storage)

    def begun(self, code: CodeType) -> bool:
        """Count a call. Returns whether its instructions are to be counted."""
        name = code.co_filename
        if name.endswith(("/json/encoder.py", "/json/decoder.py")):
            self.encodings += code.co_name == "encode"
            self.decodings += code.co_name == "raw_decode"
        return not (name.startswith(_TESTS) or any(part in name for part in _LEFT_OUT))


def counted(action: Callable[[], object]) -> Work:
    """Do something, and return the work that it was."""
    work = Work()
    if sys.version_info >= (3, 12):
        _count_by_monitoring(work, action)
    else:
        _count_by_tracing(work, action)
    return work


def _count_by_tracing(work: Work, action: Callable[[], object]) -> None:
    def each(frame: FrameType, event: str, arg: object) -> Any:
        if event == "opcode":
            work.instructions[frame.f_code.co_filename] += 1
        return each

    def called(frame: FrameType, event: str, arg: object) -> Any:
        if not work.begun(frame.f_code):
            return None
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        return each

    before = sys.gettrace()
    sys.settrace(called)
    try:
        action()
    finally:
        sys.settrace(before)


def _count_by_monitoring(work: Work, action: Callable[[], object]) -> None:
    """From Python 3.12 on tracing does not see what code does when it is first traced."""
    if sys.version_info >= (3, 12):
        tool, monitoring = 4, sys.monitoring
        wanted: dict[CodeType, bool] = {}

        def started(code: CodeType, offset: int) -> None:
            wanted[code] = work.begun(code)

        def instruction(code: CodeType, offset: int) -> None:
            if wanted.get(code):
                work.instructions[code.co_filename] += 1

        events = monitoring.events
        callbacks = {events.PY_START: started, events.PY_RESUME: started, events.INSTRUCTION: instruction}
        monitoring.use_tool_id(tool, "regd's work")
        try:
            for event, callback in callbacks.items():
                monitoring.register_callback(tool, event, callback)
            monitoring.set_events(tool, events.PY_START | events.PY_RESUME | events.INSTRUCTION)
            action()
        finally:
            monitoring.set_events(tool, 0)
            for event in callbacks:
                monitoring.register_callback(tool, event, None)
            monitoring.free_tool_id(tool)


class Bench:
    """A daemon in memory, with some registrations, where nothing is done for the first time."""

    def __init__(self) -> None:
        self.world = World(EMPTY, DEFAULT)
        self.asker = self.connect(1)[0]
        for start in range(0, 1_000, 50):
            self.ask(*(line("register", name=f"n{n}", port=1) for n in range(start, start + 50)))
        for n in range(3):
            self.ask(line("register", name="warm", port=1 + n, meta={"k": "v"}, hold=True))
            self.ask(line("resolve", name="warm"), line("resolve", name="warm", id=n), line("ping"))
            self.ask(line("deregister", name="warm"))
        self.ask(line("register", name="db", port=5432))
        for _ in range(3):
            self.ask(PLAIN)

    def connect(self, count: int) -> list[Wire]:
        made = [self.world.connect() for _ in range(count)]
        self.world.settle()
        return made

    def ask(self, *requests: bytes) -> None:
        self.asker.send(b"".join(requests))
        self.world.settle()

    def received(self, data: bytes) -> Work:
        """Return the work of one call of `data_received`."""
        works: list[Work] = []
        receive = self.asker.protocol.data_received
        self.world.do(lambda: works.append(counted(lambda: receive(data))))
        self.world.settle()
        return works[0]

    def landed(self, *requests: bytes, wires: list[Wire] | None = None) -> Work:
        """Return the work of requests from their bytes to their replies, each on a connection of its own."""
        for wire, request in zip(wires or [self.asker], requests, strict=True):
            wire.send(request)
        return counted(self.world.settle)

    def close(self) -> None:
        assert self.world.loop.errors == []
        self.world.stop()


# What is looked at. Each yields figures, by name.

Figures = Iterator[tuple[str, float]]


def resolving(bench: Bench) -> Figures:
    """What is known: no JSON, and no instruction for each line."""
    for name, data in {
        "a known resolve": PLAIN,
        "16 known resolves at once": PLAIN * 16,
        "a known resolve with an id": line("resolve", name="db", id=12_345),
        "16 known resolves with ids at once": b"".join(line("resolve", name="db", id=n) for n in range(1, 17)),
    }.items():
        work = bench.received(data)
        yield name, work.sum()
        yield f"{name}: JSON", work.encodings + work.decodings


def deciding(bench: Bench) -> Figures:
    """What is not known."""
    bench.ask(line("register", name="new", port=1))
    for name, data in {
        "a resolve that is not known": line("resolve", name="new"),
        "a resolve of nobody": line("resolve", name="nobody"),
        "a ping": line("ping"),
    }.items():
        work = bench.received(data)
        yield name, work.sum()
        yield f"{name}: JSON read", work.decodings
        yield f"{name}: JSON written", work.encodings


def writing(bench: Bench) -> Figures:
    """From bytes to reply, but for the file; and its lines, among a thousand."""
    wires = bench.connect(50)
    for _ in range(2):  # the second time none is new
        for name, requests in {
            "a register": [line("register", name="one", port=1)],
            "a register with meta and hold": [line("register", name="two", port=1, meta={"k": "v"}, hold=True)],
            "a change of meta": [line("update", name="two", meta={"k": "w"})],
            "a deregister": [line("deregister", name="one")],
            "50 registers": [line("register", name=f"n{n}", port=1 + _, meta={"k": "v"}) for n in range(50)],
        }.items():
            work = bench.landed(*requests, wires=wires[: len(requests)])
            if _:
                yield name, work.sum()
                yield f"{name}: its lines", work.sum(storage=True)
                yield f"{name}: JSON read", work.decodings
                yield f"{name}: JSON written", work.encodings


def watching(bench: Bench) -> Figures:
    """What a change costs more where there are watchers of it."""
    costs: list[Work] = []
    for more in (0, 1, 49):
        for wire in bench.connect(more):
            wire.send(line("watch", name="db"))
        bench.world.settle()
        for value in "ab":  # the second time none is new
            work = bench.landed(line("update", name="db", meta={"k": value}))
        costs.append(work)
    for name, (before, after) in zip(("one watcher", "49 more watchers"), itertools.pairwise(costs), strict=True):
        yield f"a change to {name}", after.sum() - before.sum()
        yield f"a change to {name}: JSON written", after.encodings - before.encodings


def coming_and_going(bench: Bench) -> Figures:
    for _ in range(2):
        wire = bench.world.connect()
        came = counted(bench.world.settle).sum()
        wire.end()
        went = counted(bench.world.settle).sum()
    yield "a connection that comes", came
    yield "a connection that goes", went


def committing(bench: Bench) -> Figures:
    """50 connections, each with one write at a time: the next at once, or when it has thought about it."""
    wires, tally = bench.connect(50), bench.world.context.tally
    bench.world.loop.flush_turns = 5
    for name, thinks in (("", 1), (" that think", 3)):
        before = tally.commits
        left = [20] * 50
        due: dict[int, int] = dict.fromkeys(range(50), 0)  # the turn in which each sends its next
        seen = [len(wire.sent) for wire in wires]
        for turn in itertools.count():
            for n in [n for n, when in due.items() if when == turn]:
                del due[n]
                left[n] -= 1
                wires[n].send(line("register", name=f"n{n}", port=1 + left[n]))
            bench.world.loop.turn()
            for n, wire in enumerate(wires):
                if len(wire.sent) > seen[n]:
                    seen[n] = len(wire.sent)
                    if left[n]:
                        due[n] = turn + 1 + n % thinks
            if not (due or any(left) or bench.world.context.engine._waiting):
                break
        bench.world.settle()
        yield f"commits for 1,000 writes of 50 connections{name}", tally.commits - before


def gathering(bench: Bench) -> Figures:
    """How often something is sent for a pipeline of registers."""
    wire = bench.connect(1)[0]
    writes = 0

    def write(data: bytes) -> None:
        nonlocal writes
        writes += 1
        Wire.write(wire, data)

    wire.write = write  # type: ignore[method-assign]
    wire.send(b"".join(line("register", name=f"n{n}", port=7) for n in range(1_000)))
    bench.world.settle()
    assert wire.sent.count(b"\n") == 1_000
    yield "sends for 1,000 registers in a row", writes


IN_MEMORY = (resolving, deciding, writing, watching, coming_and_going, committing, gathering)

# On real sockets.


class Caller:
    def __init__(self, port: int) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port))
        self.socket.setblocking(False)

    async def ask(self, data: bytes) -> None:
        """Send requests, and let the loop turn until all are answered."""
        self.socket.sendall(data)
        left = data.count(b"\n")
        async with asyncio.timeout(WAIT_S):
            while left:
                await asyncio.sleep(0)
                try:
                    left -= self.socket.recv(1_048_576).count(b"\n")
                except BlockingIOError:
                    pass


async def serving(daemon: InLoop) -> AsyncIterator[tuple[str, float]]:
    """What the streams do for a known resolve, beside what the connection does."""
    callers = [Caller(daemon.port) for _ in range(50)]
    await callers[0].ask(line("register", name="db", port=1))
    for caller in callers:
        for _ in range(3):
            await caller.ask(PLAIN)
    streams = cast(Streams, daemon.server._streams)
    for _ in range(2):
        callers[0].socket.sendall(PLAIN)
        one = counted(streams._serve).sum()
        assert callers[0].socket.recv(4_096)
    for caller in callers:
        caller.socket.sendall(PLAIN)
    many = counted(streams._serve).sum()
    yield "a known resolve, from socket to socket", one
    yield "50 known resolves, from socket to socket", many
    for caller in callers:
        assert caller.socket.recv(4_096)
        caller.socket.close()


async def sending(daemon: InLoop) -> AsyncIterator[tuple[str, float]]:
    caller = Caller(daemon.port)
    await caller.ask(line("register", name="db", port=1))
    for _ in range(3):
        await caller.ask(PLAIN)
    sends = 0
    with pytest.MonkeyPatch.context() as patch:

        def send(self: socket.socket, data: bytes) -> int:
            nonlocal sends
            sends += 1
            return super(socket.socket, self).send(data)

        patch.setattr(socket.socket, "send", send, raising=False)
        await caller.ask(PLAIN * 1_000)
        at_once, sends = sends, 0
        for _ in range(1_000 // 16):
            await caller.ask(PLAIN * 16)
    yield "sends for 1,000 resolves in a row", at_once
    yield "sends for 992 resolves, 16 at once", sends
    caller.socket.close()


async def keeping(daemon: InLoop) -> AsyncIterator[tuple[str, float]]:
    """Bytes that stay of a connection that is there, and of a reply that is remembered."""
    count, warm = 100, Caller(daemon.port)
    await warm.ask(line("register", name="db", port=1) + PLAIN)
    tracemalloc.start(8)
    try:
        before = _kept()
        callers = [Caller(daemon.port) for _ in range(count)]
        while len(daemon.server.connections) <= count:
            await asyncio.sleep(0)
        fresh = _kept()
        for request in (line("register", name="db", port=1), line("ping"), PLAIN):
            await asyncio.gather(*(each.ask(request) for each in callers))
        used = _kept()
        await warm.ask(b"".join(line("register", name=f"m{n}", port=1) for n in range(count)))
        registered = _kept()
        await warm.ask(b"".join(line("resolve", name=f"m{n}") for n in range(count)))
        resolved = _kept()
    finally:
        tracemalloc.stop()
    yield "bytes that stay of a connection", (fresh - before) / count
    yield "bytes that stay of a connection that has asked", (used - before) / count
    yield "bytes that stay of a reply that is remembered", (resolved - registered) / count
    for caller in [warm, *callers]:
        caller.socket.close()


def _kept() -> int:
    """Return the bytes that are allocated for regd, by its own code or what that calls."""
    gc.collect()
    ours = tracemalloc.Filter(True, str(ROOT / "regd" / "*"), all_frames=True)
    return sum(trace.size for trace in tracemalloc.take_snapshot().filter_traces([ours]).statistics("filename"))


ON_SOCKETS = (serving, sending, keeping)


def measured(look: Callable[[Bench], Figures]) -> dict[str, float]:
    with system():
        bench = Bench()
        figures = dict(look(bench))
        bench.close()
    return figures


async def measured_on_sockets(
    look: Callable[[InLoop], AsyncIterator[tuple[str, float]]], path: Path
) -> dict[str, float]:
    async with InLoop(path) as daemon:
        return {name: figure async for name, figure in look(daemon)}


COLUMN = min(sys.version_info.minor, 13) - 11


def check(figures: dict[str, float]) -> None:
    """Compare with the table."""
    wrong = []
    for name, figure in figures.items():
        known = FIGURES[name][COLUMN] if name in FIGURES else -1
        if figure > known * ROOM:
            wrong.append(f"{name}: {figure:g}, was {known:g}")
    hint = "more than a quarter above FIGURES; where that is meant, renew them: see the head of this file"
    assert not wrong, "; ".join([*wrong, hint])


@pytest.mark.parametrize("look", IN_MEMORY, ids=lambda look: look.__name__)
def test_a_request_is_no_more_work_than_it_was(look: Callable[[Bench], Figures]) -> None:
    check(measured(look))


@pytest.mark.socket
@pytest.mark.skipif(sys.platform != "linux", reason="the figures are of Linux")
@pytest.mark.parametrize("look", ON_SOCKETS, ids=lambda look: look.__name__)
async def test_a_socket_is_no_more_work_than_it_was(
    look: Callable[[InLoop], AsyncIterator[tuple[str, float]]], tmp_path: Path
) -> None:
    check(await measured_on_sockets(look, tmp_path / "registry.json"))


def main() -> int:
    table: list[str] = []
    figures: dict[str, float] = {}
    for look in IN_MEMORY:
        figures |= measured(look)
    with tempfile.TemporaryDirectory() as folder:
        for number, on_sockets in enumerate(ON_SOCKETS):
            path = Path(folder) / str(number) / "registry.json"
            figures |= asyncio.run(measured_on_sockets(on_sockets, path))
    for name, figure in figures.items():
        row = list(FIGURES.get(name, (0, 0, 0)))
        row[COLUMN] = round(figure)
        table.append(f'    "{name}": ({", ".join(f"{each:g}" for each in row)}),\n')
    print("".join(table), end="")
    if "--write" in sys.argv:
        here = Path(__file__)
        head, start, rest = here.read_text().partition("] = {\n")
        _, end, tail = rest.partition("}  # fmt: skip\n")
        here.write_text("".join([head, start, *table, end, tail]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
