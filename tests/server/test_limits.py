"""Each row of the table of limits at n-1, n and n+1: requests up to the limit succeed, more fail as documented.

`test_every_limit_has_a_test` fails for a limit without a test.
"""

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Callable, Sized
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import pytest

from regd.core.history import History
from regd.core.limits import DEFAULT, Limits
from regd.core.model import Change, Entry, Op, State
from regd.core.registry import Registry
from regd.core.transaction import Transaction
from regd.protocol.commands import Request
from regd.protocol.messages import HTTP_REFUSAL
from regd.server.scheduler import FairScheduler, Worker
from regd.system.open_files import fit_limits
from regd.system.peer_credentials import PeerCredentials
from tests.support.daemon import WAIT_S, InLoop, Peer
from tests.support.files import RecordedFiles
from tests.support.peers import STRANGER, FakeCredentials
from tests.support.polling import until

pytestmark = pytest.mark.socket

TESTED: set[str] = set()
"""The rows that the tests below are about."""


def rows(*names: str) -> Callable[[Any], Any]:
    TESTED.update(names)
    return lambda test: test


Running = Callable[..., Any]


@pytest.fixture
def running(tmp_path: Path) -> Running:
    """Run a daemon with changed limits: `async with running(connections_max=3) as daemon`."""

    @contextlib.asynccontextmanager
    async def run(
        files: RecordedFiles | None = None, peers: PeerCredentials | None = None, **limits: float
    ) -> AsyncIterator[InLoop]:
        path = tmp_path / "registry.json"
        async with InLoop(path, limits=replace(DEFAULT, **cast(Any, limits)), files=files, peers=peers) as daemon:
            yield daemon

    return run


def has(things: Sized, count: int) -> bool:
    return len(things) >= count


def is_waiting(daemon: InLoop, count: int) -> bool:
    return daemon.server.waiting == count


# Arguments.


def meta_of(size: int) -> dict[str, str]:
    return {"k": "ä" * ((size - 1) // 2) + "v" * ((size - 1) % 2)}


def named(size: int) -> str:
    """Return a name of `length` characters with labels of the maximum length."""
    return ".".join("a" * 63 for _ in range(size // 64)) + ("." if size > 63 else "") + "a" * (size % 64)


ARGUMENTS: list[tuple[str, str, Callable[[Any], dict[str, Any]], float]] = [
    ("id_chars_max", "bad_request", lambda n: {"cmd": "ping", "id": "x" * n}, 1),
    ("name_chars_max", "bad_argument", lambda n: {"cmd": "register", "name": named(n), "port": 1}, 1),
    ("label_chars_max", "bad_argument", lambda n: {"cmd": "register", "name": "a" * n, "port": 1}, 1),
    (
        "instance_chars_max",
        "bad_argument",
        lambda n: {"cmd": "register", "name": "a", "instance": "x" * n, "port": 1},
        1,
    ),
    (
        "host_chars_max",
        "bad_argument",
        lambda n: {"cmd": "register", "name": "a", "host": named(n), "port": 1},
        1,
    ),
    (
        "meta_keys_max",
        "bad_argument",
        lambda n: {"cmd": "register", "name": "a", "port": 1, "meta": {str(k): "" for k in range(n)}},
        1,
    ),
    (
        "meta_bytes_max",
        "bad_argument",
        lambda n: {"cmd": "register", "name": "a", "port": 1, "meta": meta_of(n)},
        1,
    ),
    ("ttl_s_max", "bad_argument", lambda n: {"cmd": "register", "name": "a", "port": 1, "ttl": n}, 0.001),
    ("ttl_s_min", "bad_argument", lambda n: {"cmd": "register", "name": "a", "port": 1, "ttl": n}, -0.001),
    ("reply_instances_max", "bad_argument", lambda n: {"cmd": "list", "limit": n}, 1),
]
TESTED.update(row for row, *_ in ARGUMENTS)


@pytest.mark.parametrize(("row", "code", "request_of", "step"), ARGUMENTS, ids=[case[0] for case in ARGUMENTS])
async def test_arguments(
    row: str, code: str, request_of: Callable[[Any], dict[str, Any]], step: float, daemon: InLoop
) -> None:
    peer = await daemon.peer()
    most = getattr(DEFAULT, row)
    for value in (most - step, most):
        assert (await peer.ask(request_of(value)))["ok"], value
    assert (await peer.ask(request_of(most + step)))["error"] == code


@rows("wait_s_max")
async def test_wait(daemon: InLoop) -> None:
    peer = await daemon.peer()
    most = DEFAULT.wait_s_max
    peer.send(*({"cmd": "resolve", "name": "a", "wait": most + step, "id": str(step)} for step in (-1, 0, 1)))
    refused = await peer.reply()
    assert (refused["id"], refused["error"]) == ("1", "bad_argument")
    daemon.clock.advance(most)
    assert {(await peer.reply())["error"] for _ in range(2)} == {"timeout"}


@rows("line_bytes_max")
@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
async def test_line(end: bytes, daemon: InLoop) -> None:
    peer = await daemon.peer()
    for step in (-1, 0, 1):
        line = b'{"cmd":"ping"' + b" " * (DEFAULT.line_bytes_max + step - 14) + b"}"
        reply = await peer.ask(line + end)
        assert (reply["ok"], reply.get("error")) == ((False, "too_large") if step > 0 else (True, None))
    assert (await peer.ask(cmd="ping"))["ok"]


@rows("bare_line_bytes_max")
async def test_bare_line(daemon: InLoop) -> None:
    for step, expected in ((-1, None), (0, None), (1, "bad_request")):
        peer = await daemon.peer()
        reply = await peer.ask(b"ping".ljust(DEFAULT.bare_line_bytes_max + step) + b"\n")
        assert (reply["ok"], reply.get("error")) == (expected is None, expected)


@rows("line_idle_s_max")
async def test_unfinished_line(daemon: InLoop) -> None:
    peer, idle = await daemon.peer(), await daemon.peer()
    assert (await idle.ask(cmd="ping"))["ok"]
    peer.send(b'{"cmd":')
    await until(lambda: daemon.server.waiting_bytes)
    daemon.clock.advance(DEFAULT.line_idle_s_max - 0.1)
    peer.send(b'"ping"')
    await until(lambda: daemon.server.waiting_bytes == 13)
    daemon.clock.advance(DEFAULT.line_idle_s_max - 0.1)
    peer.send(b"}\n{")
    assert (await peer.reply())["ok"]
    daemon.clock.advance(DEFAULT.line_idle_s_max)
    assert (await peer.reply())["error"] == "timeout"
    assert await peer.rest() == b""
    daemon.clock.advance(86_400)
    assert (await idle.ask(cmd="ping"))["ok"]  # an idle connection has no time limit


# Counts. `take(n)` uses the n-th of the permitted units and returns the reply.


async def three(take: Callable[[int], Any]) -> None:
    for n in range(3):
        assert (await take(n))["ok"], n
    assert (await take(3))["error"] == "busy"


@rows("connections_max")
async def test_connections(running: Running) -> None:
    async with running(connections_max=3) as daemon:

        async def connect(n: int) -> dict[str, Any]:
            peer: Peer = await daemon.peer()
            return await peer.ask(cmd="ping")

        await three(connect)
        for peer in (daemon.peers[0], daemon.peers[3]):
            await peer.close()
        await until(lambda: len(daemon.server.connections) == 2)
        assert (await connect(4))["ok"]


@rows("readonly_connections_max")
async def test_readonly_connections_leave_room_for_writers(running: Running) -> None:
    credentials = FakeCredentials()
    async with running(peers=credentials, readonly_connections_max=3, connections_max=5) as daemon:

        async def connect(n: int) -> dict[str, Any]:
            peer: Peer = await daemon.peer()
            return await peer.ask(cmd="ping")

        await three(connect)
        credentials.uid = 0
        owner = await daemon.peer()
        stats = await owner.ask(cmd="stats")
        assert (stats["connections"], stats["readonly_connections"]) == (4, 3)
        for peer in daemon.peers[:4]:
            await peer.close()
        await until(lambda: len(daemon.server.connections) == 1)
        assert (await owner.ask(cmd="stats"))["readonly_connections"] == 0


class ManualScheduler:
    """A scheduler that never has time: its workers run when the test calls them."""

    has_time = False

    def __init__(self) -> None:
        self.waiting: list[Worker] = []

    def schedule(self, worker: Worker, busy: bool) -> None:
        self.waiting.append(worker)

    def spent(self, seconds: float) -> None:
        pass


@pytest.mark.socket
async def test_writer_is_served_while_a_readonly_connection_waits_for_time(
    running: Running,
) -> None:
    credentials = FakeCredentials()
    async with running(peers=credentials) as daemon:
        assert daemon.server._connections is not None
        reader = await daemon.peer()
        assert (await reader.ask(cmd="ping"))["ok"]
        scheduler = daemon.server._connections.readers.scheduler = cast(FairScheduler, ManualScheduler())
        [connection] = daemon.server.connections
        reader.send(b'{"cmd":"resolve","name":"db"}\n' * 100)
        await until(lambda: not connection._transport.is_reading())
        reader.send(b'{"cmd":"ping"}\n')
        credentials.uid = 0
        owner = await daemon.peer()
        assert (await owner.ask(cmd="register", name="db", port=1))["ok"]
        assert (await owner.ask(cmd="resolve", name="db"))["port"] == 1
        assert (await owner.ask(cmd="resolve", name="db"))["port"] == 1
        assert not connection._transport.is_reading()
        while not connection._transport.is_reading():
            cast(ManualScheduler, scheduler).waiting.pop(0).run()
        await until(lambda: bool(cast(ManualScheduler, scheduler).waiting))
        cast(ManualScheduler, scheduler).waiting.pop(0).run()
        assert [(await reader.reply())["ok"] for _ in range(101)] == [True] * 101


@pytest.mark.socket
async def test_readonly_input_is_split_in_its_time_slice(running: Running) -> None:
    """Splitting thousands of short lines takes milliseconds; a thousand readers could block the loop for a second."""
    credentials = FakeCredentials()
    async with running(peers=credentials) as daemon:
        assert daemon.server._connections is not None
        reader = await daemon.peer()
        assert (await reader.ask(cmd="ping"))["ok"]
        scheduler = daemon.server._connections.readers.scheduler = cast(FairScheduler, ManualScheduler())
        [connection] = daemon.server.connections
        reader.send(b"ping\n" * 100 + b'{"cmd":"ping"}')
        reader.writer.write_eof()
        await until(lambda: connection._conversation.input_ended or not connection._transport.is_reading())
        assert not connection._conversation.parser.has_lines
        waits = cast(ManualScheduler, scheduler).waiting
        while waits or connection in daemon.server.connections:
            if waits:
                waits.pop(0).run()
            await asyncio.sleep(0)
        assert (await reader.rest()) == b'{"ok":true}\n' * 101


@rows("readonly_pending_bytes_max")
@pytest.mark.parametrize("step", [-1, 0, 1])
async def test_waiting_requests_of_readonly_users_leave_room_for_writers(step: int, running: Running) -> None:
    credentials = FakeCredentials()
    size = Request("watch", None, {"name": "a"}).weight_bytes
    async with running(peers=credentials, readonly_pending_bytes_max=2 * size + step) as daemon:
        reader = await daemon.peer()
        replies = [await reader.ask(cmd="watch", name="a")]
        assert (await reader.reply())["event"] == "sync"
        replies.append(await reader.ask(cmd="watch", name="a"))
        assert [reply.get("error") for reply in replies] == [None, "busy" if step < 0 else None]
        credentials.uid = 0
        owner = await daemon.peer()
        assert (await ask_watch(owner, "a"))["ok"]
        await reader.reset()
        await until(lambda: daemon.server.pending_bytes == size)


@rows("readonly_output_bytes_total_max")
async def test_unsent_bytes_of_readonly_users_drop_only_readonly_connections(running: Running) -> None:
    """The writer keeps its connection although it has the most unsent bytes."""
    credentials = FakeCredentials()
    credentials.uid = 0
    async with running(peers=credentials, readonly_output_bytes_total_max=300_000) as daemon:
        owner = await daemon.peer()
        for n in range(900):
            owner.send({"cmd": "register", "name": f"n{n}", "port": 1, "meta": {"k": "v" * 1_000}})
        for _ in range(900):
            await owner.reply()
        reading = await daemon.peer()
        assert (await reading.ask(cmd="register", name="held", port=1, hold=True))["ok"]
        reading.writer.transport.pause_reading()
        reading.send(b"list\n" * 100)
        await until(lambda: daemon.server.unsent_bytes)
        credentials.uid = STRANGER
        for _ in range(12):
            deaf = await daemon.peer()
            deaf.writer.transport.pause_reading()
            deaf.send(b"list\n" * 100)
        async with asyncio.timeout(WAIT_S):
            while not (await owner.ask(cmd="stats"))["dropped"]:
                pass
        assert (await owner.ask("resolve held"))["ok"]
        reading.writer.transport.resume_reading()
        for _ in range(100):
            assert (await reading.reply())["ok"]


@rows("readonly_input_bytes_total_max")
async def test_unfinished_bytes_of_readonly_users_drop_only_readonly_connections(running: Running) -> None:
    credentials = FakeCredentials()
    credentials.uid = 0
    async with running(peers=credentials, readonly_input_bytes_total_max=3_000) as daemon:
        owner = await daemon.peer()
        owner.send(b"{" + b" " * 9_999)
        await until(lambda: daemon.server.waiting_bytes == 10_000)
        credentials.uid = STRANGER
        readers = [await daemon.peer() for _ in range(3)]
        for reader in readers:
            reader.send(b"{" + b" " * 999)
        await until(lambda: daemon.server.waiting_bytes == 13_000)
        readers[0].send(b"  ")
        assert (await readers[0].reply())["error"] == "busy"
        assert (await owner.ask(b'"cmd":"ping"}\n'))["ok"]
        assert (await readers[1].ask(b'"cmd":"ping"}\n'))["ok"]


@rows("readonly_watches_total_max", "readonly_parked_total_max")
async def test_watches_and_waits_of_readonly_users_leave_room_for_writers(running: Running) -> None:
    credentials = FakeCredentials()
    async with running(
        peers=credentials,
        readonly_watches_total_max=3,
        watches_total_max=3,
        readonly_parked_total_max=3,
        parked_total_max=3,
    ) as daemon:
        for uid in (STRANGER, 0):
            credentials.uid = uid
            peers = [await daemon.peer() for _ in range(4)]
            await three(partial(watch_as, peers))
            waiting = daemon.server.waiting + 3
            for peer in peers[:3]:
                peer.send({"cmd": "resolve", "name": "a", "wait": 60, "id": 1})
            await until(partial(is_waiting, daemon, waiting))
            assert (await peers[3].ask(cmd="resolve", name="a", wait=60, id=2))["error"] == "busy"
        stats = await peers[0].ask(cmd="stats")
        assert (stats["watches"], stats["waiting"]) == (6, 6)


@rows("readonly_slow_replies_max")
async def test_readonly_slow_replies_wait_for_a_slot(
    running: Running,
) -> None:
    credentials = FakeCredentials()
    credentials.uid = 0
    async with running(peers=credentials, readonly_slow_replies_max=1, search_step_max=1) as daemon:
        owner = await daemon.peer()
        for n in range(12):
            await owner.ask(cmd="register", name="a", port=1, instance=f"{n:02}", meta={"k": "v"})
        credentials.uid = STRANGER
        readers = [await daemon.peer() for _ in range(5)]
        request = {"cmd": "resolve", "name": "a", "all": True, "meta": {"k": "v"}}
        assert daemon.server._connections is not None
        slow, most = daemon.server._connections.readers.slow_replies, 0
        for reader in readers:
            reader.send(*[request] * 3)
        await until(lambda: slow._waiting)
        readers[1].writer.transport.abort()
        replies = [
            asyncio.create_task(reader.reply()) for n, reader in enumerate(readers) if n != 1 for _ in range(1)
        ]
        async with asyncio.timeout(WAIT_S):
            while not all(reply.done() for reply in replies):
                most = max(most, len(slow._taken))
                await asyncio.sleep(0)
        assert most == 1
        assert {len(reply.result()["instances"]) for reply in replies} == {12}
        for n in (0, 2, 3, 4):
            for _ in range(2):
                assert len((await readers[n].reply())["instances"]) == 12
        await until(lambda: not (slow._taken or slow._waiting))


async def test_no_reply_for_a_client_that_left_while_it_waited_for_a_slot(running: Running) -> None:
    credentials = FakeCredentials()
    credentials.uid = 0
    async with running(peers=credentials, readonly_slow_replies_max=1, search_step_max=1) as daemon:
        owner = await daemon.peer()
        for n in range(12):
            await owner.ask(cmd="register", name="a", port=1, instance=f"{n:02}")
        credentials.uid = STRANGER
        credentials.is_gone = lambda connection: True  # type: ignore[method-assign]
        readers = [await daemon.peer() for _ in range(3)]
        for reader in readers:
            reader.send({"cmd": "resolve", "name": "a", "all": True})
        assert len((await readers[0].reply())["instances"]) == 12  # `readers[0]` was no longer waiting
        assert [await reader.rest() for reader in readers[1:]] == [b"", b""]


@rows("readonly_round_robin_filters_max")
def test_readonly_resolves_do_not_advance_the_round_robin_of_writers() -> None:
    entries = [Entry("a", str(n), "127.0.0.1", 1, {"k": "v"}, State.READY, 1, 0.0) for n in range(3)]
    registry = Registry(entries, 1, Limits(readonly_round_robin_filters_max=2, round_robin_filters_max=2))

    def resolve(*, readonly: bool, **meta: str) -> str:
        search = registry.search_round_robin("a", None, meta, 1, readonly=readonly)
        assert search.step(10)
        registry.mark_served(search.found[0], meta, readonly=readonly)
        return search.found[0].instance

    for meta in ({}, {"k": "v"}):
        replies = [(resolve(readonly=False, **meta), resolve(readonly=True, **meta)) for _ in range(3)]
        assert [own for own, _ in replies] == ["0", "1", "2"], meta
        assert sorted(own for _, own in replies) == ["0", "1", "2"], meta
    for n in range(10):
        search = registry.search_round_robin("a", None, {"k": "v"}, 1, readonly=True)
        search.step(10)
        registry.mark_served(search.found[0], {"k": "v", "n": str(n)}, readonly=True)
    assert len(registry._served_readonly) == 2
    assert resolve(readonly=False, k="v") == "0"


@rows("readonly_probes_max", "probes_max")
@pytest.mark.parametrize("uid", [STRANGER, 0])
async def test_probes(uid: int, running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """Writers and read-only users have separate limits. The next address is probed when a probe ends."""
    credentials, running_now, most = FakeCredentials(), set[Any](), 0
    gates: list[asyncio.Future[None]] = []

    async def connect(address: Any, timeout_s: float) -> str:
        nonlocal most
        running_now.add(address)
        most = max(most, len(running_now))
        gates.append(asyncio.get_running_loop().create_future())
        try:
            await gates[-1]
        finally:
            running_now.discard(address)
        return ""

    monkeypatch.setattr("regd.system.probes._connect", connect)
    credentials.uid = 0
    async with running(peers=credentials, readonly_probes_max=2, probes_max=3) as daemon:
        owner = await daemon.peer()
        for n in range(8):
            await owner.ask(cmd="register", name=f"a{n}", port=1 + n)
        credentials.uid = uid
        peer = await daemon.peer()
        peer.send(*({"cmd": "resolve", "name": f"a{n}", "wait": 60, "id": n} for n in range(8)))
        await until(lambda: daemon.server.waiting == 8 and len(gates) == (2 if uid else 3))
        for n in range(8):
            await until(partial(has, gates, n + 1))
            gates[n].set_result(None)
            assert (await peer.reply())["ok"]
        assert most == (2 if uid else 3)


@pytest.mark.parametrize("hard", [1_024, 4_096, 20_000])
def test_readonly_share_with_a_low_file_limit(hard: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("regd.system.open_files.raise_open_files", lambda wanted: min(wanted, hard - 192))
    limits = fit_limits(DEFAULT)
    assert limits.readonly_connections_max <= limits.connections_max / 4 + 1
    assert limits.readonly_probes_max <= limits.probes_max / 4 + 1
    assert limits.connections_max + limits.processes_max + limits.probes_max + limits.readonly_probes_max <= hard


@rows("held_max")
async def test_held(running: Running) -> None:
    async with running(held_max=3) as daemon:
        peer, other = await daemon.peer(), await daemon.peer()
        await three(lambda n: peer.ask(cmd="register", name=f"a{n}", port=1, hold=True))
        assert (await other.ask(cmd="register", name="a3", port=1, hold=True))["ok"]
        # In one batch too; a deregistration makes room.
        peer.send(
            {"cmd": "deregister", "name": "a0"},
            {"cmd": "register", "name": "b", "port": 1, "hold": True},
            {"cmd": "register", "name": "c", "port": 1, "hold": True},
            {"cmd": "register", "name": "b", "port": 1, "hold": True, "meta": {"k": "v"}},
        )
        assert [(await peer.reply()).get("error") for _ in range(4)] == [None, None, "busy", None]


@rows("process_held_max")
@pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="this system cannot watch a process")
async def test_held_by_a_process(running: Running) -> None:
    child = await asyncio.create_subprocess_exec("sleep", "60")
    try:
        async with running(process_held_max=3) as daemon:
            peer, other = await daemon.peer(), await daemon.peer()
            own: dict[str, Any] = {"cmd": "register", "port": 1, "pid": os.getpid()}
            await three(lambda n: (peer, other)[n % 2].ask({**own, "name": f"a{n}", "hold": n == 1}))
            assert (await peer.ask(cmd="register", name="a3", port=1, pid=child.pid))["ok"]
            # In one batch too; a deregistration makes room.
            peer.send({"cmd": "deregister", "name": "a0"}, *({**own, "name": name} for name in "bcb"))
            assert [(await peer.reply()).get("error") for _ in range(4)] == [None, None, "busy", None]
    finally:
        child.kill()
        await child.wait()


@rows("holders_max")
async def test_holders(running: Running) -> None:
    async with running(holders_max=3) as daemon:
        peers = [await daemon.peer() for _ in range(4)]
        await three(lambda n: peers[n].ask(cmd="register", name="a", port=1, hold=True))


@rows("processes_max")
@pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="this system cannot watch a process")
async def test_processes(running: Running) -> None:
    children = [await asyncio.create_subprocess_exec("sleep", "60") for _ in range(4)]
    try:
        async with running(processes_max=3) as daemon:
            peer = await daemon.peer()
            await three(lambda n: peer.ask(cmd="register", name=f"a{n}", port=1, pid=children[n].pid))
    finally:
        for child in children:
            child.kill()
            await child.wait()


@rows("watches_max", "watches_total_max")
async def test_watches(running: Running) -> None:
    async with running(watches_max=3) as daemon:
        peer = await daemon.peer()
        await three(lambda n: ask_watch(peer, f"a{n}"))
        assert (await ask_watch(await daemon.peer(), "a"))["ok"]
    async with running(watches_total_max=3) as daemon:
        peers = [await daemon.peer() for _ in range(4)]
        await three(lambda n: ask_watch(peers[n], "a"))
        await peers[0].reset()
        await until(lambda: len(daemon.server.connections) == 3)
        assert (await ask_watch(peers[3], "a"))["ok"]


async def watch_as(peers: list[Peer], n: int) -> dict[str, Any]:
    return await ask_watch(peers[n], "a")


async def ask_watch(peer: Peer, name: str, **more: Any) -> dict[str, Any]:
    reply = await peer.ask(cmd="watch", name=name, **more)
    if reply["ok"]:
        assert (await peer.reply())["event"] == "sync"
    return reply


@rows("parked_max", "parked_total_max")
@pytest.mark.parametrize("row", ["parked_max", "parked_total_max"])
async def test_waiting_resolves(row: str, running: Running) -> None:
    async with running(**{row: 3}) as daemon:
        peer, last = await daemon.peer(), await daemon.peer()
        peer.send(*({"cmd": "resolve", "name": "a", "wait": 60, "id": n} for n in range(3)))
        await until(lambda: daemon.server.waiting == 3)
        reply = await (peer if row == "parked_max" else last).ask(cmd="resolve", name="a", wait=60, id=3)
        assert (reply["id"], reply["error"]) == (3, "busy")
        await peer.reset()
        await until(lambda: daemon.server.waiting == 0)


@rows("registrations_max")
async def test_registrations(running: Running) -> None:
    async with running(registrations_max=3) as daemon:
        peer = await daemon.peer()
        await three(lambda n: peer.ask(cmd="register", name=f"a{n}", port=1))
        assert (await peer.ask(cmd="register", name="a0", port=2))["ok"]


@rows("registry_bytes_max")
async def test_registry_bytes(running: Running) -> None:
    size = Entry("a", "", "127.0.0.1", 1, {"k": "v"}, State.READY, 1, 0.0).weight_bytes
    for step, code in ((-1, "busy"), (0, None), (1, None)):
        async with running(registry_bytes_max=size + step) as daemon:
            peer = await daemon.peer()
            reply = await peer.ask(cmd="register", name="a", port=1, meta={"k": "v"})
            assert reply.get("error") == code
            await peer.ask(cmd="deregister", name="a")


@rows("writes_waiting_max")
async def test_writes_waiting(running: Running) -> None:
    files = RecordedFiles()
    async with running(files, writes_waiting_max=3) as daemon:
        peers = [await daemon.peer() for _ in range(5)]
        files.syncing.clear()
        files.gate.clear()
        peers[4].send({"cmd": "register", "name": "first", "port": 1})
        await until(files.syncing.is_set)
        for n, peer in enumerate(peers[:3]):
            peer.send({"cmd": "register", "name": f"a{n}", "port": 1})
            assert (await peers[3].ask(cmd="ping"))["ok"]
        assert (await peers[3].ask(cmd="register", name="d", port=1))["error"] == "busy"
        files.gate.set()
        for peer in peers[:3]:
            assert (await peer.reply())["ok"]


@rows("pending_bytes_max")
@pytest.mark.parametrize("step", [-1, 0, 1])
async def test_pending_bytes(step: int, running: Running) -> None:
    """The bytes of waiting writes, waiting resolves and watches are counted, and all are released."""
    watch = Request("watch", None, {"name": "a", "meta": {"k": "v"}}).weight_bytes
    wait = 2 * Request("resolve", None, {"name": "a", "wait": 60.0}).weight_bytes
    write = Request("register", None, {"name": "a", "port": 1}).weight_bytes
    files = RecordedFiles()
    async with running(files, pending_bytes_max=watch + wait + write + step) as daemon:
        peer, other = await daemon.peer(), await daemon.peer()
        assert (await ask_watch(peer, "a", meta={"k": "v"}))["ok"]
        peer.send({"cmd": "resolve", "name": "a", "wait": 60, "id": 1})
        await until(lambda: daemon.server.waiting)
        files.syncing.clear()
        files.gate.clear()
        other.send({"cmd": "register", "name": "b", "port": 1})
        if step < 0:
            assert (await other.reply())["error"] == "busy"
        else:
            await until(files.syncing.is_set)
            assert daemon.server.pending_bytes == watch + wait + write
            files.gate.set()
            assert (await other.reply())["ok"]
        files.gate.set()
        assert daemon.server.pending_bytes == watch + wait
        assert (await peer.ask(cmd="unwatch", watch=1))["ok"]
        daemon.clock.advance(60)
        assert (await peer.reply())["error"] == "timeout"
        assert daemon.server.pending_bytes == 0
        await ask_watch(peer, "a")
        peer.send({"cmd": "resolve", "name": "a", "wait": 60, "id": 1})
        await until(lambda: daemon.server.waiting)
        await peer.reset()
        await until(lambda: daemon.server.pending_bytes == 0)


@rows("requests_in_flight_max")
async def test_requests_in_flight(running: Running) -> None:
    files = RecordedFiles()
    async with running(files, requests_in_flight_max=3) as daemon:
        peer, other = await daemon.peer(), await daemon.peer()
        files.gate.clear()
        peer.send(*({"cmd": "register", "name": f"a{n}", "port": 1} for n in range(5)))
        await until(lambda: daemon.server.pending_bytes)
        for _ in range(3):
            assert (await other.ask(cmd="ping"))["ok"]
        one = Request("register", None, {"name": "a0", "port": 1}).weight_bytes
        assert daemon.server.pending_bytes == 3 * one
        files.gate.set()
        assert [(await peer.reply())["ok"] for _ in range(5)] == [True] * 5


# Buffered bytes.


@rows("input_bytes_total_max")
async def test_input_bytes(running: Running) -> None:
    async with running(input_bytes_total_max=3_000) as daemon:
        peers = [await daemon.peer() for _ in range(3)]
        for peer in peers:
            peer.send(b"{" + b" " * 999)
        await until(lambda: daemon.server.waiting_bytes == 3_000)
        peers[0].send(b"  ")
        assert (await peers[0].reply())["error"] == "busy"  # the connection with the most bytes
        assert await peers[0].rest() == b""
        for peer in peers[1:]:
            assert (await peer.ask(b'"cmd":"ping"}\n'))["ok"]


@rows("close_linger_s_max")
async def test_lingering_close(running: Running) -> None:
    async with running() as daemon:
        peer = await daemon.peer()
        peer.send(b"GET / HTTP/1.1\r\n\r\n")
        assert await peer.rest() == HTTP_REFUSAL
        daemon.clock.advance(DEFAULT.close_linger_s_max / 2)
        await (await daemon.peer()).ask(cmd="ping")
        assert len(daemon.server.connections) == 2
        daemon.clock.advance(DEFAULT.close_linger_s_max)
        await until(lambda: len(daemon.server.connections) == 1)


# Pages, history and departures, without a socket.


def change(rev: int, **meta: str) -> Change:
    return Change(rev, Op.UP, Entry(f"n{rev}", "", "127.0.0.1", 1, meta, State.READY, rev, 0.0))


@rows("history_changes_max", "history_bytes_max")
@pytest.mark.parametrize(
    ("limits", "kept"), [(Limits(history_changes_max=3), 3), (Limits(history_bytes_max=0), 1)]
)
def test_history(limits: Limits, kept: int) -> None:
    history = History(0, limits)
    for rev in range(1, 9):
        history.add(change(rev))
    assert len(history) == kept
    assert (history.has_all_after(8 - kept), history.has_all_after(7 - kept)) == (True, False)


def test_history_bytes() -> None:
    history = History(0, Limits())
    history.add(change(1, k="v"))
    one = history.weight_bytes
    for step, kept in ((-1, 2), (0, 3), (1, 3)):
        history = History(0, Limits(history_bytes_max=3 * one + step))
        for rev in range(1, 9):
            history.add(change(rev, k="v"))
        assert len(history) == kept


def registry_of(count: int, **limits: int) -> Registry:
    entries = [Entry(f"n{n:03}", "", "127.0.0.1", 1, {"n": str(n)}, State.READY, 1, 0.0) for n in range(count)]
    return Registry(entries, 1, replace(DEFAULT, **cast(Any, limits)))


@rows("list_scan_max")
def test_list_scan() -> None:
    for scan, count in ((3, 0), (4, 1), (5, 1)):
        page = registry_of(5, list_scan_max=scan).page("*", {"n": "3"}, None, 10)
        assert (len(page.entries), page.after is None) == (count, scan == 5)


@rows("near_candidates_max", "near_names_max")
def test_near() -> None:
    for most, names in ((2, {"n010", "n011"}), (4, {"n009", "n010", "n011"})):
        assert set(registry_of(20, near_candidates_max=most).near("n010x")) == names
    assert len(registry_of(20).near("n0")) <= DEFAULT.near_names_max
    assert len(registry_of(20).near("n01")) == DEFAULT.near_names_max


@rows("departures_max", "departures_kept")
def test_departures() -> None:
    registry = registry_of(0, departures_max=3, departures_kept=2)
    for name in ("a", "b", "c", "d"):
        for n in range(3):
            transaction = Transaction(registry, 0.0)
            transaction.register(Entry(name, str(n), "127.0.0.1", 1, {}, State.READY, 0, 0.0))
            transaction.deregister((name, str(n)))
            registry.apply(transaction.changes, 0.0)
    assert [len(registry.departures(name)) for name in ("a", "b", "c", "d")] == [0, 2, 2, 2]


@rows("reply_bytes_max", "reply_instances_max")
async def test_replies(running: Running) -> None:
    for most, more in ((4, False), (3, False), (2, True)):
        async with running(reply_instances_max=most) as daemon:
            peer = await daemon.peer()
            for n in range(3):
                await peer.ask(cmd="register", name="a", instance=str(n), port=1)
            assert ("next" in await peer.ask(cmd="list")) is more
            assert ("more" in await peer.ask(cmd="resolve", name="a", all=True)) is more
    async with running(reply_bytes_max=2_000) as daemon:
        peer = await daemon.peer()
        for n in range(30):
            await peer.ask(cmd="register", name="a", instance=str(n), port=1)
        for cmd in ("list", "resolve"):
            peer.send({"cmd": cmd, "name": "a", **({"all": True} if cmd == "resolve" else {})})
            assert len(await peer.line()) <= 2_000


# Tested elsewhere: the journal in tests/storage, checkpoints in test_checkpointer, time slices and probed instances in
# test_health, round robin in test_registry, the time of a probe in test_waiting_resolves, `progress` in
# test_watch, clients that do not read in test_connection.
TESTED.update({"search_step_max", "round_robin_filters_max", "probed_instances_max", "probe_s_max", "progress_s"})
TESTED.update({"journal_segment_bytes_max", "journal_bytes_max", "checkpoint_interval_s"})
TESTED.update({"output_bytes_max", "output_bytes_total_max"})


def test_every_limit_has_a_test() -> None:
    assert {row.name for row in fields(Limits)} == TESTED
