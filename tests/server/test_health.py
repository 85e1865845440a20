"""Large amounts of work are done in slices, do not delay other connections, and give correct results."""

import asyncio
import gc
import socket
from pathlib import Path
from typing import Any

import pytest

from regd.core.limits import Limits
from regd.protocol.commands import Request
from regd.server import engine
from regd.server.connection import Connection
from regd.server.loop_monitor import LoopMonitor
from regd.server.waiting_resolves import WaitingResolve
from regd.server.watches import Watch
from tests.support.clock import HandClock
from tests.support.daemon import WAIT_S, InLoop, Peer

pytestmark = pytest.mark.socket


async def workers(daemon: InLoop, count: int) -> Peer:
    peer = await daemon.peer()
    for n in range(count):
        meta = {"zone": "ab"[n % 2], "n": str(n)}
        peer.send({"cmd": "register", "name": "w", "instance": f"{n:04}", "port": n + 1, "meta": meta})
    for _ in range(count):
        assert (await peer.reply())["ok"]
    return peer


async def test_reply_of_a_long_search_keeps_its_order(tmp_path: Path) -> None:
    async with InLoop(tmp_path / "registry.json", limits=Limits(search_step_max=3)) as daemon:
        peer = await workers(daemon, 100)
        peer.send(
            {"cmd": "resolve", "name": "w", "meta": {"n": "97"}},
            {"cmd": "resolve", "name": "w", "all": True, "meta": {"zone": "b"}},
            {"cmd": "resolve", "name": "w", "meta": {"zone": "c"}},
            {"cmd": "resolve", "name": "w", "all": True, "meta": {"zone": "c"}, "id": 1},
            {"cmd": "ping", "id": 2},
        )
        assert (await peer.reply())["port"] == 98
        found = await peer.reply()
        assert [instance["port"] for instance in found["instances"]] == list(range(2, 101, 2))
        assert found["rev"] == 100
        assert (await peer.reply())["error"] == "not_found"
        reply = await peer.reply()
        assert (reply["id"], reply["error"]) == (1, "not_found")
        assert (await peer.reply())["id"] == 2
        requests = (await peer.ask(cmd="stats"))["requests"]
        assert (requests["resolve"], requests["ping"]) == (4, 1)


async def test_search_sees_one_revision_during_writes(tmp_path: Path) -> None:
    async with InLoop(tmp_path / "registry.json", limits=Limits(search_step_max=1)) as daemon:
        peer, writer = await workers(daemon, 300), await daemon.peer()
        peer.send({"cmd": "resolve", "name": "w", "all": True})
        await asyncio.sleep(0)
        for n in range(300):
            writer.send({"cmd": "deregister", "name": "w", "instance": f"{n:04}"})
        reply = await peer.reply()
        assert len(reply["instances"]) == 300 - (reply["rev"] - 300)
        assert reply["rev"] == 300


async def test_search_does_not_delay_others(tmp_path: Path) -> None:
    async with InLoop(tmp_path / "registry.json", limits=Limits(search_step_max=1)) as daemon:
        searcher, other = await workers(daemon, 500), await daemon.peer()
        searcher.send(*({"cmd": "resolve", "name": "w", "meta": {"zone": "c"}} for _ in range(20)))
        await other.ask(cmd="ping")
        # Not all searches are answered yet: 20 searches take 10,000 iterations, a ping takes a few.
        assert (await other.ask(cmd="stats"))["requests"].get("resolve", 0) < 20
        for _ in range(20):
            assert (await searcher.reply())["error"] == "not_found"


async def test_client_that_leaves_during_its_search(tmp_path: Path) -> None:
    async with InLoop(tmp_path / "registry.json", limits=Limits(search_step_max=1)) as daemon:
        searcher, other = await workers(daemon, 200), await daemon.peer()
        searcher.send({"cmd": "resolve", "name": "w", "meta": {"zone": "c"}}, {"cmd": "ping"})
        await searcher.reset()
        while (await other.ask(cmd="stats"))["connections"] > 1:
            pass


async def test_wait_with_a_long_search_is_answered(tmp_path: Path) -> None:
    async with InLoop(tmp_path / "registry.json", limits=Limits(search_step_max=3)) as daemon:
        peer = await workers(daemon, 100)
        listener = socket.create_server(("127.0.0.1", 0))
        port = listener.getsockname()[1]
        waiting = await daemon.peer()
        waiting.send({"cmd": "resolve", "name": "w", "meta": {"here": "yes"}, "wait": 60})
        await peer.ask(cmd="register", name="w", instance="9999", port=port, meta={"here": "yes"})
        assert (await waiting.reply())["port"] == port
        listener.close()


async def test_only_accepting_instance_of_many_is_found(tmp_path: Path) -> None:
    limits = Limits(probed_instances_max=4, search_step_max=3)
    async with InLoop(tmp_path / "registry.json", limits=limits) as daemon:
        listener = socket.create_server(("127.0.0.1", 0))
        port = listener.getsockname()[1]
        peer = await workers(daemon, 40)  # on ports without a listener
        await peer.ask(cmd="register", name="w", instance="0020", port=port, force=True)
        waiting = await daemon.peer()
        waiting.send({"cmd": "resolve", "name": "w", "wait": 60})
        reply = asyncio.ensure_future(waiting.reply())
        for _ in range(1_000):
            daemon.clock.advance(0.5)
            await asyncio.sleep(0.001)
            if reply.done():
                break
        assert (await reply)["port"] == port
        listener.close()


async def test_batch_is_applied_in_slices_and_watchers_miss_nothing(
    daemon: InLoop, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "_SLICE", 3)
    writers = [await daemon.peer() for _ in range(10)]
    watchers = []
    for count, writer in enumerate(writers):
        for n in range(60):
            writer.send({"cmd": "register", "name": f"n{count}", "instance": str(n), "port": 1 + n % 7})
    for turn in range(60):
        watchers.append(await daemon.peer())
        watchers[-1].send({"cmd": "watch", "name": ["*", "n3", "n*", "n10*"][turn % 4]})
        await asyncio.sleep(0)
    for writer in writers:
        for _ in range(60):
            assert (await writer.reply())["ok"]
    last = await writers[0].ask(cmd="register", name="n3", instance="last", port=9)
    for turn, watcher in enumerate(watchers):
        pattern = ["*", "n3", "n*", "n10*"][turn % 4]
        seen: dict[tuple[str, str], int] = {}
        rev, synced = 0, False
        watcher.send({"cmd": "ping", "id": "end"})
        while (line := await watcher.reply()).get("id") != "end" or (pattern != "n10*" and rev < last["rev"]):
            if line.get("event") == "up":
                key = (line["name"], line["instance"])
                assert not synced or (key not in seen and line["rev"] > rev), line
                seen[key] = rev = line["rev"]
            synced = synced or line.get("event") == "sync"
        count = {"*": 601, "n*": 601, "n3": 61, "n10*": 0}[pattern]
        assert len(seen) == count


async def test_replacement_is_atomic_for_readers(daemon: InLoop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "_SLICE", 1)
    writer, reader = await daemon.peer(), await daemon.peer()
    await writer.ask(cmd="register", name="db", port=1)
    writer.send(*({"cmd": "register", "name": "db", "port": 1 + n % 2} for n in range(1, 400)))
    replies = asyncio.ensure_future(read(writer, 399))
    while not replies.done():
        assert (await reader.ask(cmd="resolve", name="db"))["ok"]
    await replies


async def read(peer: Peer, count: int) -> None:
    for _ in range(count):
        assert (await peer.reply())["ok"]


async def test_many_leases_end_in_slices(daemon: InLoop) -> None:
    peer = await daemon.peer()
    for n in range(700):
        peer.send({"cmd": "register", "name": "w", "instance": str(n), "port": 1, "ttl": 1})
    await read(peer, 700)
    daemon.clock.advance(2)
    assert (await peer.ask(cmd="resolve", name="w"))["error"] == "not_found"
    while (await peer.ask(cmd="stats"))["registrations"]:
        pass
    assert (await peer.ask(cmd="stats"))["rev"] == 1_400


async def test_loop_lag_is_reported(daemon: InLoop) -> None:
    peer = await daemon.peer()
    stats = await peer.ask(cmd="stats")
    assert (stats["lag_s"], stats["lag_max_s"], stats["slowest"]) == (0.0, 0.0, None)
    daemon.clock.advance(0.5)
    daemon.clock.stop(2.5)  # of these 2.5 s, the monitor's timer was late for 2 s
    daemon.clock.advance(10)
    stats = await peer.ask(cmd="stats")
    assert (stats["lag_s"], stats["lag_max_s"]) == (0.0, 2.0)


def test_slowest_step_is_reported_by_name() -> None:
    clock = HandClock()
    monitor = LoopMonitor(clock)
    for what, took_s in (("list", 0.002), ("watch", 0.005), ("ping", 0.001)):
        began = clock.now()
        clock.advance(took_s)
        assert monitor.record(what, began) == clock.now()
    clock.advance(3)
    slowest = monitor.stats()["slowest"]
    assert slowest == {"what": "watch", "took_s": 0.005, "age_s": 3.001}


async def test_connection_leaves_no_reference_cycles(daemon: InLoop) -> None:
    """The daemon freezes objects for the garbage collector, so connections must be freed by reference counting."""
    other = await daemon.peer()
    await other.ask(cmd="register", name="db", port=1, hold=True)
    requests: list[bytes | dict[str, Any]] = [
        {"cmd": "register", "name": "a", "port": 2, "hold": True},
        {"cmd": "register", "name": "db", "port": 2},  # refused with `conflict`
        {"cmd": "register", "name": "A", "port": 2},
        {"cmd": "deregister", "name": "none"},
        {"cmd": "resolve", "name": "none"},
        {"cmd": "resolve", "name": "a", "wait": 0},
        {"cmd": "resolve", "name": "a", "wait": 60, "id": 1},
        {"cmd": "resolve", "name": "db", "wait": 0, "id": 2},
        {"cmd": "list"},
        {"cmd": "watch", "name": "a*"},
        {"cmd": "unwatch", "watch": 9},
        b'{"cmd":NaN}\n',
    ]
    gc.collect()
    gc.disable()
    try:
        for ending in (b"", b"quit\n", b"GET / HTTP/1.1\r\n\r\n", b'{"cmd":"resolve","name":"a","wait":60}\n'):
            peer = await daemon.peer()
            peer.send(*requests, ending)
            for _ in range(8):
                assert await peer.line()
            await peer.reset()
        async with asyncio.timeout(WAIT_S):
            while len(daemon.server.connections) > 1:
                await asyncio.sleep(0)
        daemon.clock.advance(1)  # the checker of half-closed connections
        async with asyncio.timeout(WAIT_S):
            while (await other.ask(cmd="stats"))["registrations"] > 1:
                pass
        await other.ask(cmd="list")
        kinds = Connection | WaitingResolve | Watch | Request
        assert [type(item) for item in gc.get_objects() if isinstance(item, kinds)] == [Connection]
    finally:
        gc.enable()
