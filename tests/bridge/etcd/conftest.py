"""A member of etcd, shared by the tests of a module, a client of it, and a prefix for each test."""

import itertools
from collections.abc import AsyncIterator, Iterator

import pytest

from regd.bridge.etcd.client import Etcd
from tests.support.etcd import EtcdCluster, cluster

PATIENT_S = 15.0  # a deadline that is not exceeded even on a busy machine
_numbers = itertools.count()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EtcdCluster]:
    with cluster(tmp_path_factory.mktemp("etcd")) as running:
        yield running


@pytest.fixture
async def etcd(server: EtcdCluster) -> AsyncIterator[Etcd]:
    async with Etcd(server.addresses, deadline_s=PATIENT_S) as client:
        yield client


@pytest.fixture
def prefix() -> bytes:
    return b"/%d/" % next(_numbers)
