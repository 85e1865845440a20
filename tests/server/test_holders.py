"""Holders over real sockets: an entry lives as long as its connections, processes and leases."""

import asyncio
import contextlib
import os
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from regd.core.holders import HolderEnd
from regd.core.limits import Limits
from regd.system import probes
from tests.support.daemon import WAIT_S, InLoop, Peer
from tests.support.files import RecordedFiles
from tests.support.stored import stored

pytestmark = pytest.mark.socket


@pytest.fixture
def spawn() -> Iterator[Callable[[], subprocess.Popen[bytes]]]:
    """Start processes that sleep until the end of the test."""
    processes = []

    def start() -> subprocess.Popen[bytes]:
        processes.append(subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE))
        return processes[-1]

    yield start
    for process in processes:
        process.kill()
        process.communicate()


async def until_gone(peer: Peer, name: str) -> dict[str, Any]:
    """Wait until a name cannot be resolved any more, and return the reply."""
    async with asyncio.timeout(WAIT_S):
        while (reply := await peer.ask(cmd="resolve", name=name))["ok"]:
            await asyncio.sleep(0)
    return reply


async def until_not_listed(peer: Peer, name: str) -> None:
    async with asyncio.timeout(WAIT_S):
        while (await peer.ask(cmd="list", name=name))["instances"]:
            await asyncio.sleep(0)


async def test_hold_ends_with_the_connection(daemon: InLoop) -> None:
    one, two = await daemon.peer(), await daemon.peer()
    assert (await one.ask(cmd="register", name="a", port=1, hold=True))["ok"]
    reply = await two.ask(cmd="resolve", name="a")
    assert (reply["hold"], "pid" in reply, "ttl" in reply) == (True, False, False)
    assert stored(daemon.registry)["a"].hold
    await one.close()
    assert (await until_gone(two, "a"))["error"] == "not_found"
    await until_not_listed(two, "a")
    assert (await two.ask(cmd="resolve", name="a"))["last"]["reason"] == "connection closed"


async def test_hold_ends_when_the_client_closes_its_sending_side(daemon: InLoop) -> None:
    one, two = await daemon.peer(), await daemon.peer()
    one.send({"cmd": "watch"}, {"cmd": "register", "name": "a", "port": 1, "hold": True})
    one.writer.write_eof()
    lines = [await one.reply() for _ in range(5)]
    assert [line.get("event") for line in lines] == [None, "sync", "up", None, "down"] or (
        sorted(str(line.get("event")) for line in lines) == ["None", "None", "down", "sync", "up"]
    )
    await until_not_listed(two, "a")


async def test_several_holders(daemon: InLoop) -> None:
    one, two, three = await daemon.peer(), await daemon.peer(), await daemon.peer()
    for peer in (one, two):
        assert (await peer.ask(cmd="register", name="a", port=1, hold=True))["rev"] == 1
    await one.close()
    assert (await two.ask(cmd="deregister", name="a", id=1))["removed"] in (0, 1)
    await until_not_listed(three, "a")


async def test_holder_deregisters_its_own_hold(daemon: InLoop) -> None:
    one, two = await daemon.peer(), await daemon.peer()
    for peer in (one, two):
        await peer.ask(cmd="register", name="a", port=1, hold=True)
    assert await one.ask(cmd="deregister", name="a") == {"ok": True, "removed": 0, "rev": 1}
    assert (await one.ask(cmd="resolve", name="a"))["ok"]
    assert await two.ask(cmd="deregister", name="a") == {"ok": True, "removed": 1, "rev": 2}


async def test_deregister_by_another_client_notifies_the_holders(daemon: InLoop) -> None:
    one, two = await daemon.peer(), await daemon.peer()
    await one.ask(cmd="register", name="a", port=1, hold=True)
    assert (await two.ask(cmd="deregister", name="a"))["removed"] == 1
    assert await one.reply() == {"event": "lost", "name": "a", "instance": "", "reason": "deregistered", "rev": 2}


async def test_draining_by_one_holder_withdraws_that_holder(daemon: InLoop) -> None:
    one, two = await daemon.peer(), await daemon.peer()
    for peer in (one, two):
        await peer.ask(cmd="register", name="a", port=1, hold=True)
    assert (await one.ask(cmd="update", name="a", state="draining"))["rev"] == 1
    assert (await one.ask(cmd="resolve", name="a"))["state"] == "ready"
    await two.close()
    await until_not_listed(one, "a")
    assert (await one.ask(cmd="register", name="a", port=1, hold=True))["ok"]
    assert (await one.ask(cmd="update", name="a", state="draining"))["ok"]
    assert (await one.ask(cmd="list", name="a"))["instances"][0]["state"] == "draining"


async def test_pid_ends_with_the_process(daemon: InLoop, spawn: Callable[[], subprocess.Popen[bytes]]) -> None:
    process, peer = spawn(), await daemon.peer()
    assert (await peer.ask(cmd="register", name="a", port=1, pid=process.pid))["ok"]
    assert (await peer.ask(cmd="resolve", name="a"))["pid"] == process.pid
    process.kill()
    process.wait()
    await until_gone(peer, "a")
    await until_not_listed(peer, "a")
    assert (await peer.ask(cmd="resolve", name="a"))["last"]["reason"] == "process exited"
    refused = await peer.ask(cmd="register", name="a", port=1, pid=process.pid)
    assert (refused["error"], refused["field"]) == ("bad_argument", "pid")


async def test_first_failed_condition_ends_the_entry(
    daemon: InLoop, spawn: Callable[[], subprocess.Popen[bytes]]
) -> None:
    one, two, process = await daemon.peer(), await daemon.peer(), spawn()
    await one.ask(cmd="register", name="a", port=1, pid=process.pid, hold=True)
    await one.ask(cmd="register", name="b", port=1, hold=True, ttl=5)
    await one.ask(cmd="register", name="c", port=1, hold=True, ttl=50)
    process.kill()
    await until_not_listed(two, "a")
    daemon.clock.advance(5)
    await until_not_listed(two, "b")
    await one.close()
    await until_not_listed(two, "c")


async def test_ttl_ends_without_renew(daemon: InLoop) -> None:
    peer = await daemon.peer()
    await peer.ask(cmd="register", name="a", port=1, ttl=2)
    daemon.clock.advance(1.9)
    assert await peer.ask(cmd="renew", name="a") == {"ok": True, "ttl": 2}
    daemon.clock.advance(1.9)
    assert (await peer.ask(cmd="renew", name="a", ttl=10.5)) == {"ok": True, "ttl": 10.5}
    daemon.clock.advance(10.4)
    reply = await peer.ask(cmd="resolve", name="a")
    assert (reply["ttl"], reply["rev"]) == (2, 1)
    daemon.clock.advance(0.1)
    assert (await peer.ask(cmd="resolve", name="a"))["error"] == "not_found"
    await until_not_listed(peer, "a")
    assert (await peer.ask(cmd="renew", name="a"))["last"]["reason"] == "ttl expired"
    await peer.ask(cmd="register", name="s", port=1)
    assert (await peer.ask(cmd="renew", name="s"))["error"] == "bad_argument"


async def test_suspended_time_is_added_to_leases(daemon: InLoop) -> None:
    peer = await daemon.peer()
    await peer.ask(cmd="register", name="a", port=1, ttl=5)
    daemon.clock.advance(4)
    daemon.clock.stop(60)
    daemon.clock.advance(0.9)
    assert (await peer.ask(cmd="resolve", name="a"))["ok"]
    daemon.clock.advance(0.1)
    assert (await peer.ask(cmd="resolve", name="a"))["last"]["reason"] == "ttl expired"


async def test_renewal_before_the_late_timer_counts_from_now(daemon: InLoop) -> None:
    """The daemon reads a renewal or registration before its late timer fires."""
    peer = await daemon.peer()
    await peer.ask(cmd="register", name="a", port=1, ttl=5)
    daemon.clock.advance(4)
    daemon.clock.skip(60)
    assert (await peer.ask(cmd="renew", name="a"))["ok"]
    assert (await peer.ask(cmd="register", name="b", port=1, ttl=5))["ok"]
    daemon.clock.advance(4.9)
    for name in "ab":
        assert (await peer.ask(cmd="resolve", name=name))["ok"]
    daemon.clock.advance(0.1)
    for name in "ab":
        assert (await peer.ask(cmd="resolve", name=name))["error"] == "not_found"


async def test_suspended_time_is_added_to_the_claim_deadline(tmp_path: Path) -> None:
    async with restarted(tmp_path, {"cmd": "register", "name": "a", "port": 1, "hold": True}) as daemon:
        peer = await daemon.peer()
        daemon.clock.advance(29)
        daemon.clock.stop(100)
        daemon.clock.advance(0.9)
        assert (await peer.ask(cmd="resolve", name="a"))["ok"]
        daemon.clock.advance(0.1)
        assert (await peer.ask(cmd="resolve", name="a"))["last"]["reason"] == "connection closed"


async def flush(daemon: InLoop, files: RecordedFiles, peer: Peer, seconds: float, **request: Any) -> None:
    """Make a change whose flush takes this long."""
    files.gate.clear()
    files.syncing.clear()
    peer.send(request)
    async with asyncio.timeout(WAIT_S):
        while not files.syncing.is_set():
            await asyncio.sleep(0)
    daemon.clock.advance(seconds)
    files.gate.set()
    assert (await peer.reply())["ok"]


async def test_lease_ends_during_consecutive_slow_flushes(tmp_path: Path) -> None:
    files = RecordedFiles()
    async with InLoop(tmp_path / "registry.json", files=files) as daemon:
        writer, other = await daemon.peer(), await daemon.peer()
        await writer.ask(cmd="register", name="a", port=1, ttl=1)
        for n in range(3):
            await flush(daemon, files, writer, 0.5, cmd="register", name=f"n{n}", port=1)
            assert (await other.ask(cmd="resolve", name="a"))["ok"]
        await flush(daemon, files, writer, 0.5, cmd="register", name="n3", port=1)
        daemon.clock.advance(0)
        assert (await other.ask(cmd="resolve", name="a"))["last"]["reason"] == "ttl expired"


async def test_near_deadline_during_a_slow_flush_is_not_polled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = RecordedFiles()
    async with InLoop(tmp_path / "registry.json", files=files) as daemon:
        peer, looks = await daemon.peer(), 0
        await peer.ask(cmd="register", name="a", port=1, ttl=1)
        daemon.clock.advance(0.749)  # 0.25 s of the flush pass, and the deadline is 0.001 s away
        registry = daemon.server._registry
        assert registry is not None
        expire = registry.expire

        def count(now: float, most: int) -> list[HolderEnd]:
            nonlocal looks
            looks += 1
            return expire(now, most)

        monkeypatch.setattr(registry, "expire", count)
        await flush(daemon, files, peer, 10, cmd="register", name="b", port=1)
        assert looks < 200
        daemon.clock.advance(0.2)
        assert (await peer.ask(cmd="resolve", name="a"))["error"] == "not_found"


async def test_suspension_during_a_slow_flush_counts_once(tmp_path: Path) -> None:
    files = RecordedFiles()
    async with InLoop(tmp_path / "registry.json", files=files) as daemon:
        writer, other = await daemon.peer(), await daemon.peer()
        await writer.ask(cmd="register", name="a", port=1, ttl=5)
        daemon.clock.advance(4)
        files.gate.clear()
        files.syncing.clear()
        writer.send({"cmd": "register", "name": "b", "port": 1})
        async with asyncio.timeout(WAIT_S):
            while not files.syncing.is_set():
                await asyncio.sleep(0)
        daemon.clock.stop(60)
        daemon.clock.advance(10)
        files.gate.set()
        assert (await writer.reply())["ok"]
        daemon.clock.advance(0.9)
        assert (await other.ask(cmd="resolve", name="a"))["ok"]
        daemon.clock.advance(0.1)
        assert (await other.ask(cmd="resolve", name="a"))["error"] == "not_found"


async def test_conflict(daemon: InLoop, spawn: Callable[[], subprocess.Popen[bytes]]) -> None:
    one, two, process = await daemon.peer(), await daemon.peer(), spawn()
    await one.ask(cmd="register", name="a", port=1, hold=True, pid=process.pid)
    refused = await two.ask(cmd="register", name="a", port=2, hold=True)
    assert refused["error"] == "conflict"
    assert refused["owner"]["pid"] == process.pid
    assert "127.0.0.1 port" in refused["owner"]["connection"]
    # The same connection or process may move its name.
    assert (await one.ask(cmd="register", name="a", port=3, hold=True, pid=process.pid))["replaced"]
    assert (await two.ask(cmd="register", name="a", port=4, hold=True, pid=process.pid))["replaced"]
    assert (await one.reply())["event"] == "lost"
    # `force` takes the name over, and the old holder is notified.
    assert (await one.ask(cmd="register", name="a", port=5, force=True))["replaced"]
    assert await two.reply() == {"event": "lost", "name": "a", "instance": "", "reason": "replaced", "rev": 6}
    # A static entry is always replaced.
    assert (await two.ask(cmd="register", name="a", port=6))["replaced"]


async def test_instance_of_another_machine_gives_way_to_a_local_one(daemon: InLoop) -> None:
    bridge, other, service = await daemon.peer(), await daemon.peer(), await daemon.peer()
    arrival: dict[str, Any] = {
        "cmd": "register",
        "name": "a",
        "instance": "b",
        "hold": True,
        "meta": {"regd.machine": "b"},
    }
    assert (await bridge.ask({**arrival, "port": 1}))["ok"]
    # An instance of another machine does not replace an instance of another machine.
    assert (await other.ask({**arrival, "port": 2}))["error"] == "conflict"
    local = {"cmd": "register", "name": "a", "instance": "b", "port": 3, "hold": True}
    assert (await service.ask(local))["replaced"]
    assert (await bridge.reply())["event"] == "lost"
    assert (await bridge.ask({**arrival, "port": 1}))["error"] == "conflict"
    assert (await service.ask(cmd="resolve", name="a"))["port"] == 3


async def test_owner_that_the_kernel_reports_dead_is_dead(
    daemon: InLoop, spawn: Callable[[], subprocess.Popen[bytes]]
) -> None:
    one, two, process = await daemon.peer(), await daemon.peer(), spawn()
    await one.ask(cmd="register", name="a", port=1, hold=True)
    await one.ask(cmd="register", name="b", port=1, pid=process.pid)
    two.send({"cmd": "register", "name": "a", "port": 2, "hold": True})
    two.send({"cmd": "register", "name": "b", "port": 2, "hold": True})
    one.writer.write_eof()
    process.kill()
    process.wait()
    assert (await two.reply())["replaced"]
    assert (await two.reply())["replaced"]


async def test_static_and_held_entries_replace_each_other(daemon: InLoop) -> None:
    one, two = await daemon.peer(), await daemon.peer()
    await one.ask(cmd="register", name="a", port=1)
    assert (await one.ask(cmd="register", name="a", port=1, hold=True))["rev"] == 2
    assert (await two.ask(cmd="resolve", name="a"))["hold"]
    assert (await two.ask(cmd="register", name="a", port=1))["rev"] == 3
    await one.close()
    assert "hold" not in await two.ask(cmd="resolve", name="a")


async def test_holder_of_a_static_entry_sets_its_lifetime(
    daemon: InLoop, spawn: Callable[[], subprocess.Popen[bytes]]
) -> None:
    one, two, process = await daemon.peer(), await daemon.peer(), spawn()
    for name in ("hold", "pid", "ttl"):
        await two.ask(cmd="register", name=name, port=1)
    await one.ask(cmd="register", name="hold", port=1, hold=True)
    await two.ask(cmd="register", name="pid", port=1, pid=process.pid)
    await two.ask(cmd="register", name="ttl", port=1, ttl=5)
    await one.close()
    await until_not_listed(two, "hold")
    process.kill()
    await until_not_listed(two, "pid")
    daemon.clock.advance(5)
    await until_not_listed(two, "ttl")


@pytest.mark.parametrize("conditions", [{"hold": True}, {"pid": "own"}, {"ttl": 5}])
async def test_registration_without_conditions_is_static(
    daemon: InLoop, conditions: dict[str, Any], spawn: Callable[[], subprocess.Popen[bytes]]
) -> None:
    one, two, process = await daemon.peer(), await daemon.peer(), spawn()
    conditions = {key: process.pid if value == "own" else value for key, value in conditions.items()}
    await one.ask({"cmd": "register", "name": "a", "port": 1, **conditions})
    assert (await two.ask(cmd="register", name="a", port=1))["rev"] == 2
    process.kill()
    process.wait()
    await one.close()
    daemon.clock.advance(60)
    assert (await two.ask(cmd="register", name="last", port=1))["rev"] == 3  # after the end of the process
    assert (await two.ask(cmd="why", name="a"))["instances"][0]["owners"] == [{"static": True}]
    assert (await two.ask(cmd="stats"))["processes"] == 0


async def test_restart(tmp_path: Path, spawn: Callable[[], subprocess.Popen[bytes]]) -> None:
    path = tmp_path / "registry.json"
    lives, dies = spawn(), spawn()
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    async with InLoop(path) as first:
        peer = await first.peer()
        held: dict[str, dict[str, Any]] = {
            "static": {},
            "hold": {"hold": True},
            "lost": {"hold": True},
            "ttl": {"ttl": 40},
            "lives": {"pid": lives.pid},
            "dies": {"pid": dies.pid},
            "kept": {"pid": lives.pid, "hold": True, "port": port},
        }
        for name, conditions in held.items():
            assert (await peer.ask({"cmd": "register", "name": name, "port": 1, **conditions}))["ok"]
        await first.server.stop()  # before the clients disconnect
    dies.kill()
    dies.wait()
    async with InLoop(path) as second:
        peer = await second.peer()
        watcher = await second.peer()
        assert (await until_gone(peer, "dies"))["error"] == "not_found"
        await until_not_listed(peer, "dies")
        rev = (await watcher.ask(cmd="watch", name="hold"))["rev"]
        assert [(await watcher.reply())["event"] for _ in range(2)] == ["up", "sync"]
        names = [instance["name"] for instance in (await peer.ask(cmd="list"))["instances"]]
        assert names == ["hold", "kept", "lives", "lost", "static", "ttl"]
        assert (await peer.ask(cmd="register", name="hold", port=1, hold=True))["rev"] <= rev
        second.clock.advance(29.9)
        assert (await peer.ask(cmd="resolve", name="lost"))["ok"]
        second.clock.advance(0.1)
        await until_not_listed(peer, "lost")
        second.clock.advance(10)
        await until_not_listed(peer, "ttl")
        names = [instance["name"] for instance in (await peer.ask(cmd="list"))["instances"]]
        assert names == ["hold", "kept", "lives", "static"]
        await watcher.close()
        lives.kill()
        await until_not_listed(peer, "kept")
        await until_not_listed(peer, "lives")
    listener.close()


@contextlib.asynccontextmanager
async def restarted(tmp_path: Path, *requests: dict[str, Any]) -> AsyncIterator[InLoop]:
    """Run a daemon that has loaded the entries of `requests`, which no client has claimed yet."""
    path = tmp_path / "registry.json"
    async with InLoop(path) as first:
        peer = await first.peer()
        for request in requests:
            assert (await peer.ask(request))["ok"]
        await first.server.stop()
    async with InLoop(path) as second:
        yield second


async def test_unclaimed_hold_conflicts_only_while_its_process_lives(
    tmp_path: Path, spawn: Callable[[], subprocess.Popen[bytes]]
) -> None:
    process = spawn()
    register: dict[str, Any] = {"cmd": "register", "port": 1, "hold": True}
    both = {**register, "name": "both", "pid": process.pid}
    async with restarted(tmp_path, {**register, "name": "hold"}, both) as daemon:
        peer = await daemon.peer()
        assert (await peer.ask({**register, "name": "hold", "port": 2}))["replaced"]
        refused = await peer.ask({**register, "name": "both", "port": 2})
        assert (refused["error"], refused["owner"]["pid"]) == ("conflict", process.pid)
        assert f"pid {process.pid}" in refused["message"]
        owner = await daemon.peer()
        rev = (await peer.ask(cmd="resolve", name="both"))["rev"]
        assert (await owner.ask(both))["rev"] == rev  # a claim
        process.kill()
        process.wait()
        assert (await peer.ask({**register, "name": "both", "port": 2}))["ok"]


async def test_unclaimed_owner_whose_process_ended_is_dead(
    tmp_path: Path, spawn: Callable[[], subprocess.Popen[bytes]]
) -> None:
    process = spawn()
    both = {"cmd": "register", "name": "a", "port": 1, "hold": True, "pid": process.pid}
    async with restarted(tmp_path, both) as daemon:
        peer = await daemon.peer()
        peer.send({"cmd": "register", "name": "a", "port": 2, "hold": True})
        process.kill()
        process.wait()
        # Either reply is possible, since the loop learns of both events in one iteration.
        assert (await peer.reply())["ok"]


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Results of probes, by host. Probes of other hosts fail the test."""
    results: dict[str, str] = {}

    async def connect(address: probes.Address, timeout_s: float) -> str:
        return results[address[0]]

    monkeypatch.setattr(probes, "_connect", connect)
    return results


async def until_probed(daemon: InLoop, count: int) -> None:
    async with asyncio.timeout(WAIT_S):
        while daemon.server.probed < count:
            await asyncio.sleep(0)


async def test_unclaimed_entry_of_a_living_process_ends_when_its_address_refuses(
    tmp_path: Path, answers: dict[str, str]
) -> None:
    """Entries with `hold` and `pid` are probed at the claim deadline and every 30 s. No answer is not a refusal."""
    requests = [
        {"cmd": "register", "name": name, "host": host, "port": 1, "hold": True, "pid": os.getpid()}
        for name, host in (("left", "127.0.0.1"), ("blocked", "127.0.0.2"), ("far", "192.0.2.1"))
    ]
    answers |= {"127.0.0.1": "connection refused", "127.0.0.2": "no answer"}
    async with restarted(tmp_path, *requests) as daemon:
        peer = await daemon.peer()
        daemon.clock.advance(29.9)
        assert (await peer.ask(cmd="resolve", name="left"))["ok"]
        assert daemon.server.probed == 0
        daemon.clock.advance(0.1)
        await until_not_listed(peer, "left")
        assert (await peer.ask(cmd="resolve", name="left"))["last"]["reason"] == "connection closed"
        await until_probed(daemon, 2)
        for answer in ("", "no answer", "connection reset by peer"):
            answers["127.0.0.2"] = answer
            daemon.clock.advance(29.9)
            before = daemon.server.probed
            daemon.clock.advance(0.1)
            await until_probed(daemon, before + 1)
            assert (await peer.ask(cmd="resolve", name="blocked"))["ok"]
        answers["127.0.0.2"] = "connection refused"
        daemon.clock.advance(30)
        await until_not_listed(peer, "blocked")
        assert [instance["name"] for instance in (await peer.ask(cmd="list"))["instances"]] == ["far"]


async def test_claimed_registration_is_not_probed(tmp_path: Path, answers: dict[str, str]) -> None:
    both = {"cmd": "register", "name": "a", "port": 1, "hold": True, "pid": os.getpid()}
    async with restarted(tmp_path, both) as daemon:
        peer, other = await daemon.peer(), await daemon.peer()
        assert (await peer.ask(both))["ok"]
        daemon.clock.advance(120)
        assert (await other.ask(cmd="resolve", name="a"))["ok"]
        assert daemon.server.probed == 0
        await peer.reset()
        await until_not_listed(other, "a")


async def test_claim_during_the_probe_keeps_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    probed, answer = asyncio.Event(), asyncio.Event()

    async def connect(address: probes.Address, timeout_s: float) -> str:
        probed.set()
        await answer.wait()
        return "connection refused"

    monkeypatch.setattr(probes, "_connect", connect)
    both = {"cmd": "register", "name": "a", "port": 1, "hold": True, "pid": os.getpid()}
    async with restarted(tmp_path, both) as daemon:
        peer = await daemon.peer()
        daemon.clock.advance(30)
        async with asyncio.timeout(WAIT_S):
            await probed.wait()
        assert (await peer.ask(both))["ok"]
        answer.set()
        await until_probed(daemon, 1)
        assert (await peer.ask(cmd="resolve", name="a"))["ok"]
        daemon.clock.advance(60)
        assert (await peer.ask(cmd="resolve", name="a"))["ok"]


async def test_many_unclaimed_registrations_are_probed_a_few_at_a_time(
    tmp_path: Path, answers: dict[str, str]
) -> None:
    answers["127.0.0.1"] = "connection refused"
    requests = [
        {"cmd": "register", "name": f"n{n}", "port": n + 1, "hold": True, "pid": os.getpid()} for n in range(400)
    ]
    async with restarted(tmp_path, *requests) as daemon:
        peer = await daemon.peer()
        daemon.clock.advance(30)
        assert len([task for task in asyncio.all_tasks() if task.get_name() == "regd-probe"]) <= 64
        async with asyncio.timeout(WAIT_S):
            while (await peer.ask(cmd="stats"))["registrations"]:
                daemon.clock.advance(0)


async def test_reused_pid(tmp_path: Path, spawn: Callable[[], subprocess.Popen[bytes]]) -> None:
    path = tmp_path / "registry.json"
    other = spawn()
    async with InLoop(path) as first:
        await (await first.peer()).ask(cmd="register", name="a", port=1, pid=other.pid)
        await first.server.stop()
    text = path.read_text()
    born = text.partition('"born": "')[2].partition('"')[0]
    path.write_text(text.replace(born, born[:-1] + ("1" if born[-1] != "1" else "2")))
    async with InLoop(path) as second:
        assert (await until_gone(await second.peer(), "a"))["error"] == "not_found"


async def test_refused_register_keeps_the_existing_entry(tmp_path: Path) -> None:
    async with InLoop(tmp_path / "registry.json", limits=Limits(held_max=2)) as daemon:
        one, two = await daemon.peer(), await daemon.peer()
        await two.ask(cmd="register", name="victim", port=1)
        for name in ("a", "b"):
            await one.ask(cmd="register", name=name, port=1, hold=True)
        assert (await one.ask(cmd="register", name="victim", port=2, hold=True))["error"] == "busy"
        assert (await two.ask(cmd="resolve", name="victim"))["port"] == 1
        assert (await one.ask(cmd="register", name="a", port=2, hold=True, ttl=9))["replaced"]


async def test_claims_of_several_workers_change_nothing(
    tmp_path: Path, spawn: Callable[[], subprocess.Popen[bytes]]
) -> None:
    path, processes = tmp_path / "registry.json", [spawn(), spawn()]
    async with InLoop(path) as first:
        for process in processes:
            peer = await first.peer()
            await peer.ask(cmd="register", name="pids", port=1, hold=True, pid=process.pid)
            await peer.ask(cmd="register", name="holds", port=1, hold=True)
        await first.server.stop()
    async with InLoop(path) as second:
        peers = [await second.peer() for _ in range(3)]
        rev = (await peers[2].ask(cmd="hello"))["rev"]
        for peer, process in zip(peers[1::-1], processes, strict=True):
            assert (await peer.ask(cmd="register", name="pids", port=1, hold=True, pid=process.pid))["rev"] <= rev
        await peers[0].ask(cmd="register", name="holds", port=1, hold=True)
        assert (await peers[2].ask(cmd="hello"))["rev"] == rev
        await peers[0].reset()
        async with asyncio.timeout(WAIT_S):
            while len((await peers[2].ask(cmd="why", name="holds"))["instances"][0]["owners"]) > 1:
                pass
        assert (await peers[2].ask(cmd="resolve", name="holds"))["ok"]  # another worker may still claim it
        second.clock.advance(30)
        await until_not_listed(peers[2], "holds")


@pytest.mark.parametrize("ending", ["close", "half"])
@pytest.mark.parametrize(
    "behind", [b"quit\n", b'{"cmd":"ping"}\n' * 6_000]
)  # more than regd reads, less than the kernel buffers
async def test_hold_ends_although_its_client_is_not_read(daemon: InLoop, ending: str, behind: bytes) -> None:
    one, two = await daemon.peer(), await daemon.peer()
    wait = {"cmd": "resolve", "name": "none", "wait": 600}
    await one.ask(cmd="register", name="a", port=1, hold=True)
    one.send({**wait, "id": 1} if behind == b"quit\n" else wait, behind)
    async with asyncio.timeout(WAIT_S):
        while not daemon.server.waiting:
            await asyncio.sleep(0)
    assert (await two.ask(cmd="resolve", name="a"))["ok"]
    if ending == "half":
        one.writer.write_eof()
    else:
        await one.close()
    async with asyncio.timeout(WAIT_S):
        while (await two.ask(cmd="resolve", name="a"))["ok"]:
            daemon.clock.advance(0.05)


async def test_slow_disk_does_not_expire_a_lease(tmp_path: Path) -> None:
    files = RecordedFiles()
    async with InLoop(tmp_path / "registry.json", files=files) as daemon:
        one, two = await daemon.peer(), await daemon.peer()
        await one.ask(cmd="register", name="a", port=1, ttl=1)
        files.gate.clear()
        files.syncing.clear()
        one.send({"cmd": "update", "name": "a", "meta": {"k": "v"}}, {"cmd": "renew", "name": "a"})
        async with asyncio.timeout(WAIT_S):
            while not files.syncing.is_set():
                await asyncio.sleep(0)
        daemon.clock.advance(3)
        assert (await two.ask(cmd="resolve", name="a"))["ok"]
        files.gate.set()
        assert (await one.reply())["ok"]
        assert (await one.reply())["ttl"] == 1
        daemon.clock.advance(2)
        await until_not_listed(two, "a")


async def test_processes_beyond_the_watch_limit_live_on(
    tmp_path: Path, spawn: Callable[[], subprocess.Popen[bytes]]
) -> None:
    path, processes = tmp_path / "registry.json", [spawn(), spawn()]
    async with InLoop(path) as first:
        peer = await first.peer()
        for n, process in enumerate(processes):
            await peer.ask(cmd="register", name=f"n{n}", port=1, pid=process.pid)
        await first.server.stop()
    async with InLoop(path, limits=Limits(processes_max=1)) as second:
        peer = await second.peer()
        for n in range(2):
            assert (await peer.ask(cmd="resolve", name=f"n{n}"))["ok"]
        assert (await peer.ask(cmd="register", name="more", port=1, pid=os.getpid()))["error"] == "busy"
        for n, process in enumerate(processes):
            process.kill()
            process.wait()
            async with asyncio.timeout(WAIT_S):
                while (await peer.ask(cmd="resolve", name=f"n{n}"))["ok"]:
                    second.clock.advance(0.5)


async def test_many_holders_at_once(daemon: InLoop) -> None:
    peers = [await daemon.peer() for _ in range(100)]
    for peer in peers:
        peer.send(*({"cmd": "register", "name": f"n{n}", "port": 1, "hold": True} for n in range(10)))
    for peer in peers:
        for _ in range(10):
            assert (await peer.reply())["ok"]
    other = await daemon.peer()
    known = await other.ask(cmd="why", name="n1")
    assert (len(known["instances"][0]["owners"]), known["instances"][0]["more_owners"]) == (32, True)
    for peer in peers:
        await peer.reset()
    for n in range(10):
        await until_not_listed(other, f"n{n}")
    assert (await other.ask(cmd="stats"))["rev"] == 20


async def test_stop_answers_waiting_requests(daemon: InLoop) -> None:
    peer = await daemon.peer()
    peer.send({"cmd": "resolve", "name": "a", "wait": 50, "id": 7})
    async with asyncio.timeout(WAIT_S):
        while not daemon.server.waiting:
            await asyncio.sleep(0)
    await daemon.server.stop()
    reply = await peer.reply()
    assert (reply["id"], reply["error"]) == (7, "shutting_down")


async def test_draining_by_register_withdraws_the_holder(
    daemon: InLoop, spawn: Callable[[], subprocess.Popen[bytes]]
) -> None:
    peer, processes = await daemon.peer(), [spawn(), spawn()]
    for process in processes:
        await peer.ask(cmd="register", name="a", port=1, pid=process.pid)
    other = await daemon.peer()
    assert (await other.ask(cmd="register", name="a", port=1, pid=processes[0].pid, state="draining"))["ok"]
    assert (await peer.ask(cmd="resolve", name="a"))["ok"]
    processes[1].kill()
    await until_not_listed(peer, "a")


async def test_withdrawn_holder_may_return_or_leave(daemon: InLoop) -> None:
    one, two = await daemon.peer(), await daemon.peer()
    for peer in (one, two):
        await peer.ask(cmd="register", name="a", port=1, hold=True)
    assert (await one.ask(cmd="update", name="a", state="draining"))["rev"] == 1
    owners = (await two.ask(cmd="why", name="a"))["instances"][0]["owners"]
    assert [owner.get("withdrawn", False) for owner in owners] == [True, False]
    assert (await one.ask(cmd="update", name="a", state="ready"))["rev"] == 1
    assert (await two.ask(cmd="update", name="a", state="draining"))["rev"] == 1
    assert (await one.ask(cmd="resolve", name="a"))["ok"]
    # Deregistering a hold that was withdrawn ends nothing.
    assert await two.ask(cmd="deregister", name="a") == {"ok": True, "removed": 0, "rev": 1}
    assert await one.ask(cmd="deregister", name="a") == {"ok": True, "removed": 1, "rev": 2}


async def test_withdrawn_holders_still_conflict_until_the_last_ends(
    daemon: InLoop,
) -> None:
    one, two, rival = [await daemon.peer() for _ in range(3)]
    for peer in (one, two):
        await peer.ask(cmd="register", name="a", port=1, hold=True)
    await one.ask(cmd="update", name="a", state="draining")
    assert (await rival.ask(cmd="register", name="a", port=2, hold=True))["error"] == "conflict"
    await two.reset()
    await until_not_listed(rival, "a")
    assert (await rival.ask(cmd="register", name="a", port=2, hold=True))["ok"]


async def test_expiry_of_many_leases_does_not_extend_the_rest(tmp_path: Path) -> None:
    """Each batch of expired leases is a slow flush, during which more leases expire."""
    files = RecordedFiles()
    async with InLoop(tmp_path / "registry.json", files=files) as daemon:
        peer, other = await daemon.peer(), await daemon.peer()
        for n in range(20):
            peer.send({"cmd": "register", "name": f"n{n}", "port": 1, "ttl": 1 + n / 4})
        for _ in range(20):
            assert (await peer.reply())["ok"]
        began = daemon.clock.now()
        commits = (await other.ask(cmd="stats"))["commits"]
        files.syncing.clear()
        while (await other.ask(cmd="stats"))["registrations"]:
            files.gate.clear()
            async with asyncio.timeout(WAIT_S):
                while not files.syncing.is_set():
                    daemon.clock.advance(0.25)
                    for _ in range(10):
                        await other.ask(cmd="ping")  # let the engine start the batch
            daemon.clock.advance(1.0)
            files.syncing.clear()
            files.gate.set()
            before = commits
            async with asyncio.timeout(WAIT_S):
                while before == (commits := (await other.ask(cmd="stats"))["commits"]):
                    pass
            # The leases last 5.75 s, of which 0.25 s pass during each flush of 1 s. The rest is for a busy machine.
            assert daemon.clock.now() - began < 100
