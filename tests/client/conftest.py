"""A daemon behind a relay, where the client finds it."""

from collections.abc import AsyncIterator

import pytest

from tests.client.relay import Relay
from tests.support.daemon import InLoop


@pytest.fixture
async def relay(daemon: InLoop, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Relay]:
    async with Relay(daemon.port) as running:
        monkeypatch.setenv("REGD_ADDRESS", f"tcp://127.0.0.1:{running.port}")
        yield running
