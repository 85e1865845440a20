"""Fixtures for the tests of the bridge: etcd, and machines."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.support.etcd import EtcdCluster, cluster
from tests.support.machines import Machine


@pytest.fixture
def etcd(tmp_path: Path) -> Iterator[EtcdCluster]:
    """One member of etcd, started."""
    with cluster(tmp_path) as running:
        yield running


@pytest.fixture
def make_machine(tmp_path: Path, etcd: EtcdCluster) -> Iterator[Callable[..., Machine]]:
    """Return a function that makes a machine at the next address on loopback, not started."""
    with ExitStack() as stack:
        machines: list[Machine] = []

        def make(*flags: str, name: str = "") -> Machine:
            name = name or "abcdefgh"[len(machines)]
            address = f"127.0.0.{len(machines) + 2}"
            folder = tmp_path / f"machine-{len(machines)}"
            machines.append(stack.enter_context(Machine(name, folder, address, etcd.addresses, *flags)))
            return machines[-1]

        yield make
