"""The work of a request, counted and not timed, so that a regression also shows on a busy machine.

The tests count bytecode instructions in regd and in the standard library that it calls, except the event loop;
calls of the JSON encoder and decoder; sends; and allocated bytes. The limits are about twice the measured values:
they allow refactoring, but not doing the work twice.
"""

import asyncio
import gc
import socket
import sys
import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import CodeType, FrameType
from typing import Any

import pytest

from regd.core.limits import DEFAULT
from tests.support.daemon import ROOT, WAIT_S, InLoop
from tests.support.twins import EMPTY, PLAIN, line, system
from tests.support.world import World

CACHED_RESOLVE_STEPS_MAX = 70
REGISTER_STEPS_MAX = 10_000  # including the line of the file
SENDS_MAX = 20  # for 1,000 pipelined resolves
CONNECTION_BYTES_MAX = 6_144  # as `connections_max` counts it

_TESTS = str(ROOT / "tests")
_LEFT_OUT = ("/asyncio/", "/selectors.py", "/concurrent/", "/threading.py")


@dataclass
class Work:
    """Instructions by file, and calls of the JSON encoder and decoder."""

    instructions: Counter[str] = field(default_factory=Counter)
    encodings: int = 0
    decodings: int = 0

    @property
    def steps(self) -> int:
        return self.instructions.total()

    def begun(self, code: CodeType) -> bool:
        """Record the start of a call, and return whether its instructions are counted."""
        name = code.co_filename
        if name.endswith(("/json/encoder.py", "/json/decoder.py")):
            self.encodings += code.co_name == "encode"
            self.decodings += code.co_name == "raw_decode"
        if name.startswith(str(ROOT)):
            return not name.startswith(_TESTS)
        return not any(part in name for part in _LEFT_OUT)


def counted(action: Callable[[], object]) -> Work:
    """Call a function, and return its work."""
    work = Work()
    if sys.version_info >= (3, 12):
        _count_by_monitoring(work, action)
    else:
        _count_by_tracing(work, action)
    return work


def _count_by_tracing(work: Work, action: Callable[[], object]) -> None:
    def trace_opcode(frame: FrameType, event: str, arg: object) -> Any:
        if event == "opcode":
            work.instructions[frame.f_code.co_filename] += 1
        return trace_opcode

    def trace_call(frame: FrameType, event: str, arg: object) -> Any:
        if not work.begun(frame.f_code):
            return None
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        return trace_opcode

    original = sys.gettrace()
    sys.settrace(trace_call)
    try:
        action()
    finally:
        sys.settrace(original)


def _count_by_monitoring(work: Work, action: Callable[[], object]) -> None:
    """Since Python 3.12, tracing misses the instructions of code that is traced for the first time."""
    if sys.version_info >= (3, 12):
        tool, monitoring = 4, sys.monitoring
        is_counted: dict[CodeType, bool] = {}

        def started(code: CodeType, offset: int) -> None:
            is_counted[code] = work.begun(code)

        def instruction(code: CodeType, offset: int) -> None:
            if is_counted.get(code):
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
    """A daemon in memory with a thousand registrations and warm caches."""

    def __init__(self) -> None:
        self.world = World(EMPTY, DEFAULT)
        self.wire = self.world.connect()
        self.world.settle()
        for start in range(0, 1_000, 50):
            self.ask(*(line("register", name=f"n{n}", port=1) for n in range(start, start + 50)))
        self.ask(line("register", name="db", port=5432))
        for _ in range(3):
            self.ask(PLAIN)

    def ask(self, *requests: bytes) -> None:
        self.wire.send(b"".join(requests))
        self.world.settle()

    def work_of_receiving(self, data: bytes) -> Work:
        """Return the work of one call of `data_received`."""
        works: list[Work] = []
        receive = self.wire.protocol.data_received
        self.world.do(lambda: works.append(counted(lambda: receive(data))))
        self.world.settle()
        return works[0]

    def work_of_writing(self, request: bytes) -> Work:
        """Return the work of a write from the received bytes to the reply."""
        self.wire.send(request)
        return counted(self.world.settle)

    def close(self) -> None:
        assert self.world.loop.errors == []
        self.world.stop()


@pytest.fixture
def bench() -> Iterator[Bench]:
    with system():
        bench = Bench()
        yield bench
        bench.close()


def test_steps_of_a_cached_resolve(bench: Bench) -> None:
    assert 0 < bench.work_of_receiving(PLAIN).steps <= CACHED_RESOLVE_STEPS_MAX


def test_steps_of_a_register(bench: Bench) -> None:
    bench.work_of_writing(line("register", name="one", port=1))
    bench.work_of_writing(line("deregister", name="one"))
    assert 0 < bench.work_of_writing(line("register", name="one", port=1)).steps <= REGISTER_STEPS_MAX


def test_json_calls(bench: Bench) -> None:
    """A cached resolve neither decodes nor encodes JSON; a register decodes its line and encodes without json."""
    resolve, register = (
        bench.work_of_receiving(PLAIN),
        bench.work_of_writing(line("register", name="one", port=1)),
    )
    assert (resolve.decodings, resolve.encodings) == (0, 0)
    assert (register.decodings, register.encodings) == (1, 0)


# On real sockets.


class RawClient:
    def __init__(self, port: int) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port))
        self.socket.setblocking(False)

    async def ask(self, data: bytes) -> None:
        """Send requests, and run the loop until all are answered."""
        self.socket.sendall(data)
        left = data.count(b"\n")
        async with asyncio.timeout(WAIT_S):
            while left:
                await asyncio.sleep(0)
                try:
                    left -= self.socket.recv(1_048_576).count(b"\n")
                except BlockingIOError:
                    pass


@pytest.mark.socket
async def test_sends_for_pipelined_resolves(daemon: InLoop, monkeypatch: pytest.MonkeyPatch) -> None:
    client = RawClient(daemon.port)
    await client.ask(line("register", name="db", port=1))
    for _ in range(3):
        await client.ask(PLAIN)
    [connection] = daemon.server.connections
    transport, sends = connection._transport, 0

    class Counted:
        """The transport, with its writes counted."""

        def __getattr__(self, name: str) -> Any:
            return getattr(transport, name)

        def write(self, data: bytes) -> None:
            nonlocal sends
            sends += 1
            transport.write(data)

    connection._transport = Counted()  # type: ignore[assignment]
    await client.ask(PLAIN * 1_000)
    connection._transport = transport
    client.socket.close()
    assert 0 < sends <= SENDS_MAX


@pytest.mark.socket
async def test_memory_of_a_connection(daemon: InLoop) -> None:
    count, warm = 100, RawClient(daemon.port)
    await warm.ask(line("register", name="db", port=1) + PLAIN)
    tracemalloc.start(8)
    try:
        bytes_before = _allocated()
        clients = [RawClient(daemon.port) for _ in range(count)]
        while len(daemon.server.connections) <= count:
            await asyncio.sleep(0)
        for request in (line("register", name="db", port=1), line("ping"), PLAIN):
            await asyncio.gather(*(client.ask(request) for client in clients))
        bytes_after = _allocated()
    finally:
        tracemalloc.stop()
    for client in [warm, *clients]:
        client.socket.close()
    assert 500 < (bytes_after - bytes_before) / count <= CONNECTION_BYTES_MAX


def _allocated() -> int:
    """Return the bytes allocated by regd, including in functions that it calls."""
    gc.collect()
    ours = tracemalloc.Filter(True, str(ROOT / "regd" / "*"), all_frames=True)
    return sum(trace.size for trace in tracemalloc.take_snapshot().filter_traces([ours]).statistics("filename"))
