"""Fixture for the tests of the client: a relay in front of the daemon, at the address in REGD_ADDRESS."""

from collections.abc import AsyncIterator

import pytest

from tests.client.relay import Relay
from tests.support.daemon import InLoop


@pytest.fixture
async def relay(daemon: InLoop, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Relay]:
    async with Relay(daemon.port) as relay:
        monkeypatch.setenv("REGD_ADDRESS", f"tcp://127.0.0.1:{relay.port}")
        yield relay
