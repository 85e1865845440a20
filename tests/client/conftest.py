"""Fixtures for the tests of the client: a relay in front of the daemon, or a registry with two clients.

REGD_ADDRESS is set to the address of the relay or registry.
"""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from regd_client import Client
from tests.client.relay import Relay
from tests.support.daemon import InLoop
from tests.support.registries import Registry, running


@pytest.fixture
async def relay(daemon: InLoop, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Relay]:
    async with Relay(daemon.port) as relay:
        monkeypatch.setenv("REGD_ADDRESS", f"tcp://127.0.0.1:{relay.port}")
        yield relay


@pytest.fixture
async def registry(tmp_path: Path) -> AsyncIterator[Registry]:
    async with running(tmp_path) as registry:
        yield registry


@pytest.fixture
async def client(registry: Registry) -> AsyncIterator[Client]:
    async with Client() as client:
        yield client


@pytest.fixture
async def other(registry: Registry) -> AsyncIterator[Client]:
    async with Client() as client:
        yield client
