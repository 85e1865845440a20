"""Three machines and three members of etcd: after each disturbance they agree again."""

import asyncio
import json
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.daemon import WAIT_S
from tests.support.machines import Machine, Site, foreign, site, until_agreed
from tests.support.polling import until

STALE_S = 3.0
LEASE_END_S = 60.0  # for a lease to end: its time to live, again after a change of the leader, and a busy machine


@pytest.fixture
def three(tmp_path: Path) -> Iterator[Site]:
    with site(tmp_path, 3, 3, "--stale-s", str(STALE_S), "--compare-s", "1") as running:
        running.start()
        yield running
        for machine in running.machines:
            log = machine.bridge.text()
            assert "differences between" not in log, log
            assert "Traceback" not in log, log


async def populate(machines: list[Machine], count: int = 3) -> None:
    """Register static instances at every machine, which need no probe."""
    for number, machine in enumerate(machines):
        async with machine.client() as client:
            for instance in range(count):
                await client.register(
                    "web", 5_000 + instance, host=f"10.9.{number}.1", instance=str(instance), static=True
                )
    await until_agreed(machines)


async def until_lacking(machine: Machine, other: str, within_s: float = LEASE_END_S) -> None:
    """Wait until a machine has nothing of another."""
    async with asyncio.timeout(within_s):
        while any(
            fields["meta"]["regd.machine"] == other for fields in foreign(await machine.instances()).values()
        ):
            await asyncio.sleep(0.05)


@pytest.mark.long
async def test_a_partition_longer_than_the_lease(three: Site) -> None:
    if three.network is None:
        pytest.skip("needs network namespaces")
    a, b, c = three.machines
    await populate(three.machines)
    three.cut(0)
    await until_lacking(b, "a")
    await until_lacking(c, "a")
    await until_agreed([b, c])
    # The machine that was cut off has withdrawn the others' instances, and goes on with its own.
    await until_lacking(a, "b")
    async with a.client() as client:
        assert (await client.resolve("web")).host == "10.9.0.1"
        await client.deregister("web", "0")
        await client.register("late", 1, host="10.9.0.1", static=True)
    three.heal(0)
    await until_agreed(three.machines)


@pytest.mark.long
async def test_a_frozen_bridge(three: Site) -> None:
    a, b, c = three.machines
    await populate(three.machines)
    a.bridge.send(signal.SIGSTOP)
    try:
        await until_lacking(b, "a")
        async with a.client() as client, c.client() as other:
            await client.deregister("web", "0")
            await other.deregister("web", "1")
        three.etcd.ctl("compact", str(revision(three)))
    finally:
        a.bridge.send(signal.SIGCONT)
    await until_agreed(three.machines)
    assert a.bridge.status()["counts"]["leases_lost"] == 1


@pytest.mark.long
async def test_compaction_behind_a_watch_that_broke(three: Site) -> None:
    """The changes that a watch has missed are gone: everything is read again, and the difference applied."""
    a, b, c = three.machines
    await populate(three.machines)
    b.bridge.send(signal.SIGSTOP)
    try:
        for member in three.etcd.members:
            member.kill()
        three.etcd.start()
        async with a.client() as client:
            await client.deregister("web", "0")
            await client.register("late", 1, host="10.9.0.1", static=True)
        async with c.client() as other:
            await other.resolve("late", wait=LEASE_END_S)
        three.etcd.ctl("compact", str(revision(three)))
    finally:
        b.bridge.send(signal.SIGCONT)
    await until_agreed(three.machines)


def revision(three: Site) -> int:
    reply = json.loads(three.etcd.ctl("get", "x", "-w", "json"))
    return int(reply["header"]["revision"])


@pytest.mark.long
async def test_a_frozen_member_of_etcd(three: Site) -> None:
    await populate(three.machines)
    leader = three.etcd.leader()
    leader.freeze()
    try:
        async with three.machines[1].client() as client:
            await client.deregister("web", "0")
            await client.register("other", 1, host="10.9.1.1", static=True)
        await until_agreed(three.machines)
    finally:
        leader.thaw()
    await until_agreed(three.machines)


@pytest.mark.parametrize("number", [signal.SIGKILL, pytest.param(signal.SIGTERM, marks=pytest.mark.long)])
async def test_restarts(three: Site, number: int) -> None:
    a, b, _ = three.machines
    await populate(three.machines)
    # The daemon: what it held is claimed again.
    a.daemon.end(number)
    a.daemon.start()
    await until_agreed(three.machines)
    # The bridge.
    b.bridge.end(number)
    async with b.client() as client:
        await client.deregister("web", "0")
    b.bridge.start()
    await until_agreed(three.machines)
    # Both.
    a.bridge.end(number)
    a.daemon.end(number)
    a.start()
    await until_agreed(three.machines)


@pytest.mark.long
async def test_etcd_away(three: Site) -> None:
    a, b, _ = three.machines
    await populate(three.machines)
    for member in three.etcd.members:
        member.kill()
    async with a.client() as client:
        # The others' instances stay for a while, then they are withdrawn; local ones are as before.
        assert foreign(await a.instances())
        await until_lacking(a, "b")
        await until_lacking(a, "c")
        assert (await client.resolve("web")).host == "10.9.0.1"
        await client.register("late", 1, host="10.9.0.1", static=True)
        await client.deregister("web", "1")
    await until_lacking(b, "a")
    status = b.bridge.status()
    assert (status["foreign"]["count"], status["foreign"]["stale_s"] > STALE_S) == (0, True)
    three.etcd.start()
    await until_agreed(three.machines)
    log = a.bridge.text()
    assert log.count("etcd is away for 3 s") == 1, log


@pytest.mark.long
async def test_the_daemon_away_for_too_long(three: Site) -> None:
    a, b, _ = three.machines
    await populate(three.machines)
    a.daemon.end()
    await until_lacking(b, "a", WAIT_S + STALE_S)
    a.daemon.start()
    await until_agreed(three.machines)
    assert a.bridge.text().count("nothing is published") == 1


@pytest.mark.long
async def test_a_member_killed_under_load(three: Site) -> None:
    """Every change arrives once and in order at another machine, across the death of a member."""
    a, b, _ = three.machines
    await until_agreed(three.machines)
    seen: list[str] = []
    ready = asyncio.Event()

    async def watch() -> None:
        async with b.client() as client:
            async for event in client.watch("load"):
                if event.kind == "sync":
                    ready.set()
                elif event.endpoint is not None and event.kind != "down":
                    seen.append(event.endpoint.meta["n"])

    watching = asyncio.create_task(watch())
    await ready.wait()
    async with a.client() as client:
        for number in map(str, range(150)):
            await client.register("load", 1, host="10.9.0.1", meta={"n": number}, static=True)
            if int(number) < 50:
                await until(lambda number=number: seen[-1:] == [number])  # type: ignore[misc]
            elif number == "50":
                three.etcd.leader().kill()
            else:
                await asyncio.sleep(0.02)
    await until(lambda: seen[-1] == "149", 60)
    watching.cancel()
    await asyncio.gather(watching, return_exceptions=True)
    # Changes of one instance become one while etcd is slow or has no leader; none is doubled or out of order.
    assert seen == sorted(set(seen), key=int)


@pytest.mark.long
async def test_no_difference_is_found_by_the_comparison(three: Site) -> None:
    await populate(three.machines, 20)
    for machine in three.machines:
        await machine.bridge.until(lambda status: status["counts"]["comparisons"] >= 2)
        assert machine.bridge.status()["foreign"]["count"] == 40
