"""Machines for tests: each has a daemon and a bridge, as processes, and an address of its own."""

import asyncio
import contextlib
import json
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Self

from regd.bridge import records
from regd_client import Client
from tests.support.daemon import WAIT_S, DaemonProcess, environment
from tests.support.etcd import EtcdCluster, cluster
from tests.support.network import Network, network

PREFIX = "/regd/v1/default/"
AGREE_S = 40.0  # for pictures to agree, also after a lease has ended, on a busy machine
START_S = 30.0


class BridgeProcess:
    """A process of `regctl bridge`. Its log is in a file."""

    def __init__(
        self, log: Path, *flags: str, address: str, before: Sequence[str] = (), hide: str = "pass"
    ) -> None:
        self.log = log
        self._before = before
        self._command = [
            *before, sys.executable, "-c",
            f"import sys; {hide}; from regd.cli.regctl import main; raise SystemExit(main())",
            "bridge", *flags,
        ]  # fmt: skip
        self._environment = environment(REGD_ADDRESS=address)
        self.process: subprocess.Popen[str] | None = None
        self.url = ""

    def launch(self) -> None:
        """Start the process, and do not wait for it."""
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self._command, env=self._environment, stdout=subprocess.PIPE, stderr=log, text=True
            )

    def start(self) -> None:
        """Start the process, and wait until it serves its metrics."""
        self.launch()
        assert self.process is not None
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line.startswith("metrics http://"), self.text()
        self.url = line.split()[1]

    def text(self) -> str:
        """Return what it has logged."""
        return self.log.read_text()

    def status(self) -> dict[str, Any]:
        if self._before:  # its port is in another network
            command = [*self._before, sys.executable, "-m", "regd.cli.regctl", "bridge", "--status", "--json"]
            done = subprocess.run(
                command, env=self._environment, capture_output=True, text=True, timeout=WAIT_S, check=True
            )
            return dict(json.loads(done.stdout))
        with urllib.request.urlopen(self.url.replace("/metrics", "/status"), timeout=WAIT_S) as response:
            fields = json.load(response)
        assert isinstance(fields, dict)
        return fields

    async def until(self, condition: Callable[[dict[str, Any]], object]) -> None:
        """Wait until a condition holds for the status, without blocking the event loop.

        Raises:
            TimeoutError: it does not hold after `WAIT_S` seconds.
        """
        async with asyncio.timeout(WAIT_S):
            while not condition(await asyncio.to_thread(self.status)):
                await asyncio.sleep(0.02)

    def metrics(self) -> str:
        with urllib.request.urlopen(self.url, timeout=WAIT_S) as response:
            return str(response.read().decode())

    def send(self, number: int) -> None:
        assert self.process is not None
        self.process.send_signal(number)

    def wait(self) -> int:
        assert self.process is not None
        try:
            status = self.process.wait(START_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise
        assert self.process.stdout is not None
        self.process.stdout.close()
        self.process = None
        return status

    def end(self, number: int = signal.SIGTERM) -> int:
        """Send a signal, and return the exit status. Idempotent."""
        if self.process is None:
            return 0
        self.send(number)
        return self.wait()


class Machine:
    """A daemon and a bridge, at an address of their own.

    Args:
        name: of the machine.
        folder: for the registry and the logs.
        advertise: the address.
        etcd: the addresses of etcd's members.
        before: the command line to run both under, such as `ip netns exec NAME`.
    """

    def __init__(
        self,
        name: str,
        folder: Path,
        advertise: str,
        etcd: Sequence[str],
        *flags: str,
        before: Sequence[str] = (),
    ) -> None:
        self.name = name
        self.advertise = advertise
        self.before = before
        folder.mkdir(exist_ok=True)
        unix = folder / "regd.sock"
        self.daemon = DaemonProcess(
            folder / "registry.json", "--unix", str(unix), "--log", str(folder / "regd.log"), before=before
        )
        self.address = f"unix://{unix}"
        self.bridge = BridgeProcess(
            folder / "bridge.log", "--etcd", ",".join(etcd), "--machine", name, "--advertise", advertise, *flags,
            address=self.address, before=before,
        )  # fmt: skip

    def start(self) -> None:
        self.daemon.start()
        self.bridge.start()

    def close(self) -> None:
        self.bridge.end(signal.SIGKILL)
        self.daemon.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @contextlib.asynccontextmanager
    async def client(self) -> AsyncIterator[Client]:
        async with Client(self.address, connect_timeout_s=START_S) as client:
            yield client

    async def instances(self) -> dict[tuple[str, str], dict[str, Any]]:
        """Return what the daemon has, without the bridge itself."""
        async with self.client() as client:
            listed: list[dict[str, Any]] = [{**instance} for instance in await client.instances()]
        return {
            (fields["name"], fields["instance"]): fields for fields in listed if fields["name"] != records.BRIDGE
        }


class Site:
    """Machines, and etcd for them; with a network if they are in namespaces."""

    def __init__(self, machines: list[Machine], etcd: EtcdCluster, network: Network | None) -> None:
        self.machines = machines
        self.etcd = etcd
        self.network = network

    def start(self) -> None:
        for machine in self.machines:
            machine.start()

    def cut(self, number: int) -> None:
        """Cut a machine off."""
        assert self.network is not None
        self.network.cut(number + 1)

    def heal(self, number: int) -> None:
        assert self.network is not None
        self.network.heal(number + 1)


@contextlib.contextmanager
def site(folder: Path, size: int, members: int, *flags: str) -> Iterator[Site]:
    """Make machines and start etcd: in a network of namespaces if this user may make one, else on loopback."""
    with contextlib.ExitStack() as stack:
        net: Network | None = None
        with contextlib.suppress(OSError):
            net = stack.enter_context(network(size))
        etcd = stack.enter_context(cluster(folder, members, host=net.host if net else "127.0.0.1"))
        machines = []
        for number, name in enumerate("abcdefgh"[:size]):
            address = net.address(number + 1) if net else f"127.0.0.{number + 2}"
            before = net.before(number + 1) if net else ()
            machine = Machine(name, folder / name, address, etcd.addresses, *flags, before=before)
            machines.append(stack.enter_context(machine))
        yield Site(machines, etcd, net)


def local(instances: dict[tuple[str, str], dict[str, Any]]) -> dict[tuple[str, str], dict[str, Any]]:
    return {key: fields for key, fields in instances.items() if records.MACHINE not in fields["meta"]}


def arrivals(
    machine: Machine, instances: dict[tuple[str, str], dict[str, Any]]
) -> dict[tuple[str, str], dict[str, Any]]:
    """Return how the local instances of a machine, all of which are published, look at the others."""
    registrations = {}
    for (name, instance), fields in local(instances).items():
        place = records.Place(machine.name, name, instance)
        host = machine.advertise if records.is_loopback(fields["host"]) else fields["host"]
        registrations[records.arrival_key(place)] = {
            "host": host,
            "port": fields["port"],
            "meta": {**fields["meta"], records.MACHINE: machine.name},
            "state": fields["state"],
            "priority": fields.get("priority", 0) + records.PRIORITY_FARTHER,
        }
    return registrations


def foreign(instances: dict[tuple[str, str], dict[str, Any]]) -> dict[tuple[str, str], dict[str, Any]]:
    """Return what a daemon has of other machines."""
    names = ("host", "port", "meta", "state", "priority")
    return {
        key: {name: fields[name] for name in names}
        for key, fields in instances.items()
        if records.MACHINE in fields["meta"]
    }


async def disagreement(machines: Sequence[Machine]) -> str:
    """Return in what the machines disagree: each must have exactly what the others have locally; "" if they do."""
    pictures = await asyncio.gather(*(machine.instances() for machine in machines))
    for machine, picture in zip(machines, pictures, strict=True):
        wanted: dict[tuple[str, str], dict[str, Any]] = {}
        for other, of_other in zip(machines, pictures, strict=True):
            if other is not machine:
                wanted |= arrivals(other, of_other)
        wanted = {key: fields for key, fields in wanted.items() if key not in local(picture)}
        actual = foreign(picture)
        if actual != wanted:
            missing, extra = wanted.keys() - actual.keys(), actual.keys() - wanted.keys()
            different = {key for key in wanted.keys() & actual.keys() if wanted[key] != actual[key]}
            return f"{machine.name} lacks {missing}, has {extra} too much, and {different} differently"
    return ""


async def until_agreed(machines: Sequence[Machine], within_s: float = AGREE_S) -> None:
    """Wait until all machines have what the others have.

    Raises:
        AssertionError: they still disagree.
    """
    why = "nothing was compared"
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(within_s):
            while why := await disagreement(machines):
                await asyncio.sleep(0.05)
    if why:
        logs = "\n".join(f"{machine.name}: {machine.bridge.text()[-2_000:]}" for machine in machines)
        raise AssertionError(f"{why}\n{logs}")


@contextlib.asynccontextmanager
async def listener(host: str, port: int = 0) -> AsyncIterator[int]:
    """Listen at an address during the block. The kernel completes up to 128 connections."""
    with socket.create_server((host, port)) as server:
        yield server.getsockname()[1]
