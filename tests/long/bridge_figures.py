"""The figures of the bridge: `python -m tests.long.bridge_figures [WHAT ...]`, or `make bridge-figures`.

Everything runs on this machine, etcd with three members too: with fewer cores than processes, figures of many
machines are those of the processors.
"""

import argparse
import asyncio
import contextlib
import itertools
import json
import logging
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

from regd.bridge.etcd.client import Etcd
from regd.bridge.etcd.model import Put
from regd.bridge.records import Place, key_of
from regd_client import Client
from tests.support.etcd import cluster
from tests.support.machines import PREFIX, Machine, foreign, site, until_agreed

CHANGES = 300


def show(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def in_ms(seconds: list[float]) -> str:
    ordered = sorted(seconds)
    p99 = ordered[int(0.99 * len(ordered))]
    return f"p50 {1_000 * statistics.median(ordered):.1f} ms, p99 {1_000 * p99:.1f} ms, max {1_000 * ordered[-1]:.1f} ms"


async def latency(folder: Path) -> None:
    """A change on one machine until `resolve` on another, beside a durable put and its watch."""
    with site(folder, 2, 3) as made:
        made.start()
        a, b = made.machines
        await until_agreed(made.machines)
        times: list[float] = []
        gone: list[float] = []
        async with a.client() as client, b.client() as other:
            for number in range(CHANGES):
                waiting = asyncio.create_task(other.resolve(f"s{number}", wait=10))
                await asyncio.sleep(0.01)
                began = time.perf_counter()
                await client.register(f"s{number}", 1, host="10.9.0.1", static=True)
                await waiting
                times.append(time.perf_counter() - began)
            mirror_times = asyncio.Queue[float]()
            watching = asyncio.create_task(_downs(other, mirror_times))
            for number in range(100):
                service = Client(a.address)
                await service.register(f"dead{number}", 1, host="10.9.0.1")
                await other.resolve(f"dead{number}", wait=10)
                began = time.perf_counter()
                await service.close()
                gone.append(await mirror_times.get() - began)
            watching.cancel()
            await asyncio.gather(watching, return_exceptions=True)
        show(f"change on a until resolve on b: {in_ms(times)}")
        show(f"death on a until down on b: {in_ms(gone)}")
        base = await _put_and_watch(made.etcd.addresses)
        show(
            f"durable put and watch: {in_ms(base)}; ratio {statistics.median(times) / statistics.median(base):.1f}"
        )


async def _downs(client: Client, times: "asyncio.Queue[float]") -> None:
    async for event in client.watch("dead*"):
        if event.kind == "down":
            times.put_nowait(time.perf_counter())


async def _put_and_watch(addresses: list[str]) -> list[float]:
    times = []
    async with Etcd(addresses) as etcd, Etcd(addresses[1:]) as other:
        revision = await etcd.put(b"/x", b"")
        batches = other.watch(b"/x", revision)
        for _ in range(CHANGES):
            await asyncio.sleep(0.01)
            following = asyncio.ensure_future(anext(batches))
            began = time.perf_counter()
            await etcd.put(b"/x", b"x" * 150)
            await following
            times.append(time.perf_counter() - began)
        await batches.aclose()
    return times


async def size(folder: Path) -> None:
    """19 machines with 500 instances in etcd: a bridge and a daemon that start see all of them."""
    with cluster(folder, 3) as etcd, Machine("zz", folder / "zz", "127.0.0.2", etcd.addresses) as machine:
        value = json.dumps({"host": "10.0.0.1", "port": 80, "meta": {"zone": "a", "version": "1.2.3"}}).encode()
        async with Etcd(etcd.addresses) as client:
            for number in range(19):
                places = [Place(f"m{number}", f"service{i % 50}", str(i)) for i in range(500)]
                await client.commit([Put(key_of(PREFIX, place), value) for place in places])
        began = time.perf_counter()
        machine.start()
        started = time.perf_counter()
        async with machine.client() as other:
            await _until(other, 9_500)
        done = time.perf_counter()
        assert machine.bridge.process is not None
        assert len(foreign(await machine.instances())) == 9_500
        show(f"9,500 instances of 19 machines: {done - started:.1f} s after daemon and bridge have started,")
        show(f"{done - began:.1f} s with their start")
        assert machine.daemon.process is not None
        cpu = [_cpu_s(process.pid) for process in (machine.daemon.process, machine.bridge.process)]
        show(f"CPU of daemon and bridge since their start: {cpu[0]:.1f} s, {cpu[1]:.1f} s")
        show(f"the bridge has {_rss_mib(machine.bridge.process.pid):.0f} MiB")


async def _until(client: Client, count: int) -> None:
    while (await client.stats())["registrations"] < count:
        await asyncio.sleep(0.02)


def _cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _rss_mib(pid: int) -> float:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1_024
    raise LookupError(pid)


async def twenty(folder: Path) -> None:
    """20 machines with 500 instances each, all on this host, from a cold start."""
    with cluster(folder, 3) as etcd, contextlib.ExitStack() as stack:
        machines = [
            stack.enter_context(
                Machine(f"m{number}", folder / f"m{number}", f"127.0.1.{number + 1}", etcd.addresses)
            )
            for number in range(20)
        ]
        for machine in machines:
            machine.daemon.start()
        for number, machine in enumerate(machines):
            async with machine.client() as client:
                work = [
                    client.register(
                        f"service{i % 50}", 80, host=f"10.0.0.{number + 1}", instance=str(i), static=True
                    )
                    for i in range(500)
                ]
                await asyncio.gather(*work)
        began = time.perf_counter()
        for machine in machines:
            machine.bridge.launch()
        for machine in machines:
            async with machine.client() as client:
                await _until(client, 20 * 500)
        took = time.perf_counter() - began
        sizes = [_rss_mib(m.bridge.process.pid) for m in machines if m.bridge.process is not None]
        show(
            f"20 machines x 500 on this host, from the start of all bridges: {took:.1f} s; largest {max(sizes):.0f} MiB"
        )


async def partition(folder: Path) -> None:
    """A machine is cut off for 30 s."""
    with site(folder, 3, 3) as made:
        if made.network is None:
            show("partition: needs network namespaces")
            return
        made.start()
        for number, machine in enumerate(made.machines):
            async with machine.client() as client:
                for instance in range(100):
                    await client.register("web", 1, host=f"10.9.{number}.1", instance=str(instance), static=True)
        await until_agreed(made.machines)
        began = time.perf_counter()
        made.cut(0)
        while any(f["meta"]["regd.machine"] == "a" for f in foreign(await made.machines[1].instances()).values()):
            await asyncio.sleep(0.05)
        dropped = time.perf_counter() - began
        await asyncio.sleep(30 - dropped)
        made.heal(0)
        began = time.perf_counter()
        await until_agreed(made.machines)
        show(
            f"cut off: dropped after {dropped:.1f} s; all agree {time.perf_counter() - began:.1f} s after healing"
        )


async def away(folder: Path) -> None:
    """etcd is away for 30 s: pings of the local daemon before and meanwhile."""
    with site(folder, 3, 3) as made:
        made.start()
        for number, machine in enumerate(made.machines):
            async with machine.client() as client:
                for instance in range(100):
                    await client.register("web", 1, host=f"10.9.{number}.1", instance=str(instance), static=True)
        await until_agreed(made.machines)
        async with made.machines[0].client() as client:
            before = await _pings(client, 10)
            for member in made.etcd.members:
                member.kill()
            meanwhile = await _pings(client, 30)
            assert (await client.resolve("web")).host == "10.9.0.1"
        made.etcd.start()
        began = time.perf_counter()
        await until_agreed(made.machines)
        show(f"ping before: {in_ms(before)}; etcd away: {in_ms(meanwhile)}")
        show(f"all agree {time.perf_counter() - began:.1f} s after etcd is back")


async def _pings(client: Client, seconds: float) -> list[float]:
    times = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        began = time.perf_counter()
        await client.ping()
        times.append(time.perf_counter() - began)
        await asyncio.sleep(0.005)
    return times


async def load(folder: Path) -> None:
    """50 changes/s while the leader of etcd is killed."""
    with site(folder, 3, 3) as made:
        made.start()
        a, b = made.machines[:2]
        await until_agreed(made.machines)
        seen: list[tuple[float, str]] = []
        ready = asyncio.Event()

        async def watch() -> None:
            async with b.client() as client:
                async for event in client.watch("load*"):
                    if event.kind == "sync":
                        ready.set()
                    elif event.kind == "up" and event.endpoint is not None:
                        seen.append((time.perf_counter(), event.endpoint.name))

        watching = asyncio.create_task(watch())
        await ready.wait()
        count = 1_000
        async with a.client() as client:
            began = time.perf_counter()
            for number in range(count):
                await client.register(f"load{number}", 1, host="10.9.0.1", static=True)
                if number == count // 3:
                    made.etcd.leader().kill()
                await asyncio.sleep(max(0.0, began + number / 50 - time.perf_counter()))
        while len({name for _, name in seen}) < count:
            await asyncio.sleep(0.1)
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)
        names = [name for _, name in seen]
        gaps = [later - earlier for (earlier, _), (later, _) in itertools.pairwise(seen)]
        show(
            f"leader killed under 50 changes/s: {len(names)} events of {count}, {len(names) - len(set(names))} doubled,"
        )
        show(f"longest gap {max(gaps):.2f} s")


FIGURES: dict[str, Callable[[Path], Awaitable[None]]] = {
    "latency": latency, "load": load, "partition": partition, "away": away, "size": size, "twenty": twenty,
}  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.long.bridge_figures", description=__doc__)
    parser.add_argument("what", nargs="*", metavar="WHAT", help=f"of {', '.join(FIGURES)}; all by default")
    for what in parser.parse_args().what or FIGURES:
        logging.getLogger("regd_client").setLevel(logging.CRITICAL)
        with tempfile.TemporaryDirectory() as folder:
            asyncio.run(_run(FIGURES[what], Path(folder)))
    return 0


async def _run(figure: Callable[[Path], Awaitable[None]], folder: Path) -> None:
    await figure(folder)


if __name__ == "__main__":
    raise SystemExit(main())
