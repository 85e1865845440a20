"""Three machines with bridges over three members of etcd, a random history, and disturbances.

`python -m tests.long.cluster [--minutes M] [--seed S]`, or `make soak-cluster`. While services come, change and go on
every machine, daemons and bridges are killed, ended and frozen, machines are cut off, members of etcd die and freeze,
and etcd compacts its history. Half of the rounds have several disturbances at once. After each round every machine
must have what the others have, and each watcher what `list` shows; no bridge may have found a difference in its own
comparison. Needs root for the network of namespaces; otherwise the machines are addresses on loopback, and none is
cut off.
"""

import asyncio
import contextlib
import json
import logging
import random
import signal
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from regd_client import Client, RegdError, Registration
from tests.long import command
from tests.support.machines import Machine, Site, foreign, site, until_agreed

STALE_S = 20.0
COMPARE_S = 5.0  # between two comparisons of a bridge with everything; 60 s by default
AGREE_S = 90.0
LONG_S = 14.0  # longer than a lease
NAMES = ("web", "db", "cache", "queue")


class Failure(Exception):
    """A promise was broken."""


class Services:
    """The services of a machine, and a watcher. They go on while the daemon is away."""

    def __init__(self, machine: Machine, number: int, rng: random.Random) -> None:
        self._machine = machine
        self._host = f"10.9.{number}.1"
        self._rng = rng
        self._client = Client(machine.address, connect_timeout_s=1.0)
        self._watching = Client(machine.address, connect_timeout_s=60.0)
        self._held: dict[tuple[str, str], Registration] = {}
        self.changes = 0
        self.is_quiet = asyncio.Event()
        self.watched: dict[tuple[str, str], tuple[str, int]] = {}

    async def run(self) -> None:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._watch())
            while True:
                if not self.is_quiet.is_set():
                    with contextlib.suppress(RegdError, TimeoutError):
                        async with asyncio.timeout(5):
                            await self._change()
                            self.changes += 1
                await asyncio.sleep(self._rng.uniform(0, 0.1))

    async def _watch(self) -> None:
        async for event in self._watching.watch("*"):
            if event.endpoint is None:
                continue
            key = (event.endpoint.name, event.endpoint.instance)
            if event.kind == "down":
                self.watched.pop(key, None)
            else:
                self.watched[key] = (event.endpoint.host, event.endpoint.port)

    async def _change(self) -> None:
        key = (self._rng.choice(NAMES), self._rng.choice(["", "1", "2"]))
        name, instance = key
        port = self._rng.randrange(1, 5)
        match self._rng.randrange(6):
            case 0 | 1:
                registration = await self._client.register(
                    name, port, host=self._host, instance=instance, meta={"n": str(self.changes)}
                )
                self._held[key] = registration
            case 2:
                await self._client.register(name, port, host=self._host, instance=f"s{instance}", static=True)
            case 3:
                await self._client.deregister(name, self._rng.choice([instance, f"s{instance}"]))
            case 4:
                state: Any = self._rng.choice(["ready", "draining", "starting"])
                await self._client.update(name, {"n": str(self.changes)}, state=state, instance=instance)
            case 5 if self._rng.random() < 0.2:
                await self._client.close()  # all that it holds ends at once
                self._held.clear()

    async def close(self) -> None:
        await self._client.close()
        await self._watching.close()


class History:
    """One random history."""

    def __init__(self, of: Site, seed: int) -> None:
        self._site = of
        self._rng = random.Random(seed)
        self._services = [
            Services(machine, number, random.Random(f"{seed} {number}"))
            for number, machine in enumerate(of.machines)
        ]
        self.figures: Counter[str] = Counter()
        self.longest_s = 0.0
        self.acts: list[str] = []
        self._locks = {machine.name: asyncio.Lock() for machine in of.machines}
        self._etcd_lock = asyncio.Lock()  # one disturbance of etcd at a time, and of each machine

    async def run(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        running = [asyncio.create_task(services.run()) for services in self._services]
        try:
            await self._quiet_point()
            while time.monotonic() < end:
                await self._round()
                for task in running:
                    if task.done():
                        task.result()
        finally:
            for task in running:
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)
            for services in self._services:
                await services.close()

    async def _round(self) -> None:
        acts: list[Callable[[], Awaitable[None]]] = [
            self.kill_daemon, self.end_daemon, self.freeze_daemon, self.kill_bridge, self.end_bridge,
            self.freeze_bridge, self.kill_member, self.freeze_member, self.stop_etcd, self.compact,
        ]  # fmt: skip
        if self._site.network is not None:
            acts += [self.cut, self.cut]
        chosen = self._rng.sample(acts, self._rng.randint(1, 4))
        self.acts = [act.__name__ for act in chosen]
        self.figures.update(self.acts)
        if self._rng.random() < 0.5:
            await asyncio.gather(*(act() for act in chosen))
        else:
            for act in chosen:
                await act()
                await asyncio.sleep(self._rng.uniform(0, 1))
        await self._quiet_point()

    async def _quiet_point(self) -> None:
        for services in self._services:
            services.is_quiet.set()
        began = time.monotonic()
        try:
            await until_agreed(self._site.machines, AGREE_S)
        except AssertionError as error:
            raise Failure(f"after {self.acts}: {error}") from None
        self.longest_s = max(self.longest_s, time.monotonic() - began)
        for machine, services in zip(self._site.machines, self._services, strict=True):
            await self._check_watcher(machine, services)
            log = machine.bridge.text()
            if "differences between" in log or "Traceback" in log:
                raise Failure(f"after {self.acts}, machine {machine.name}: {log[-4_000:]}")
            self.figures["instances of other machines compared"] += len(foreign(await machine.instances()))
            services.is_quiet.clear()
        self.figures["rounds"] += 1

    async def _check_watcher(self, machine: Machine, services: Services) -> None:
        wanted: Any = None
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(30):
                while wanted is None or wanted != services.watched:
                    async with machine.client() as client:
                        listed = await client.instances()
                    wanted = {(i["name"], i["instance"]): (i["host"], i["port"]) for i in listed}
                    await asyncio.sleep(0.05)
        if wanted != services.watched:
            raise Failure(f"after {self.acts}: the watcher of {machine.name} has another picture")

    # Disturbances.

    def _machine(self) -> Machine:
        return self._rng.choice(self._site.machines)

    def _time_s(self) -> float:
        return LONG_S if self._rng.random() < 0.2 else self._rng.uniform(0, 3)

    async def kill_daemon(self) -> None:
        await self._restart_daemon(signal.SIGKILL)

    async def end_daemon(self) -> None:
        await self._restart_daemon(signal.SIGTERM)

    async def _restart_daemon(self, number: int) -> None:
        machine = self._machine()
        async with self._locks[machine.name]:
            await asyncio.to_thread(machine.daemon.end, number)
            await asyncio.sleep(self._rng.choice([0.0, 0.0, 2.0]))
            await asyncio.to_thread(machine.daemon.start)

    async def freeze_daemon(self) -> None:
        machine = self._machine()
        async with self._locks[machine.name]:
            process = machine.daemon.process
            assert process is not None
            process.send_signal(signal.SIGSTOP)
            await asyncio.sleep(self._time_s())
            process.send_signal(signal.SIGCONT)

    async def kill_bridge(self) -> None:
        await self._restart_bridge(signal.SIGKILL)

    async def end_bridge(self) -> None:
        await self._restart_bridge(signal.SIGTERM)

    async def _restart_bridge(self, number: int) -> None:
        machine = self._machine()
        async with self._locks[machine.name]:
            await asyncio.to_thread(machine.bridge.end, number)
            await asyncio.sleep(self._rng.choice([0.0, 0.0, 2.0, LONG_S]))
            await asyncio.to_thread(machine.bridge.start)

    async def freeze_bridge(self) -> None:
        machine = self._machine()
        async with self._locks[machine.name]:
            machine.bridge.send(signal.SIGSTOP)
            await asyncio.sleep(self._time_s())
            machine.bridge.send(signal.SIGCONT)

    async def kill_member(self) -> None:
        async with self._etcd_lock:
            member = self._rng.choice(self._site.etcd.members)
            member.kill()
            await asyncio.sleep(self._rng.uniform(0, 3))
            await asyncio.to_thread(self._site.etcd.start, member)

    async def freeze_member(self) -> None:
        async with self._etcd_lock:
            member = self._rng.choice(self._site.etcd.members)
            member.freeze()
            await asyncio.sleep(self._time_s())
            member.thaw()

    async def stop_etcd(self) -> None:
        async with self._etcd_lock:
            for member in self._site.etcd.members:
                member.kill()
            await asyncio.sleep(self._rng.choice([2.0, LONG_S, STALE_S + 3]))
            await asyncio.to_thread(self._site.etcd.start)

    async def compact(self) -> None:
        async with self._etcd_lock:
            reply = json.loads(await asyncio.to_thread(self._site.etcd.ctl, "get", "x", "-w", "json"))
            await asyncio.to_thread(self._site.etcd.ctl, "compact", str(reply["header"]["revision"]))

    async def cut(self) -> None:
        number = self._rng.randrange(len(self._site.machines))
        self._site.cut(number)
        await asyncio.sleep(self._rng.choice([1.0, 4.0, LONG_S]))
        self._site.heal(number)


async def run(folder: Path, seed: int, seconds: float) -> Counter[str]:
    """Run a history, and return its figures.

    Raises:
        Failure: a promise was broken.
    """
    flags = ("--stale-s", str(STALE_S), "--compare-s", str(COMPARE_S))
    with site(folder, 3, 3, *flags) as made:
        made.start()
        history = History(made, seed)
        await history.run(seconds)
    history.figures["changes"] = sum(services.changes for services in history._services)
    history.figures["longest time to agree, in ms"] = round(1_000 * history.longest_s)
    return history.figures


if __name__ == "__main__":
    logging.getLogger("regd_client").setLevel(logging.CRITICAL)
    raise SystemExit(command.main("tests.long.cluster", __doc__, run, Failure))
