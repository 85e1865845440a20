"""What somebody leaves ends, and nothing else does, whatever breaks or is cancelled on the way."""

import asyncio

import pytest

from regd_client.client import Client
from tests.client.relay import Relay, until
from tests.support.daemon import WAIT_S, InLoop

pytestmark = pytest.mark.socket


async def gone(client: Client, name: str) -> None:
    async with asyncio.timeout(WAIT_S):
        while await client.instances(name):
            await asyncio.sleep(0.001)


@pytest.mark.parametrize("turns", range(1, 6))
@pytest.mark.parametrize("connecting", [False, True])
async def test_a_close_that_is_cancelled_has_closed(
    relay: Relay, daemon: InLoop, turns: int, connecting: bool
) -> None:
    client = Client()
    async with Client(f"127.0.0.1:{daemon.port}") as other:
        if not connecting:
            await client.register("a", 1)
        asked = asyncio.create_task(client.ping())
        await asyncio.sleep(0)
        closing = asyncio.create_task(client.close())
        for _ in range(turns):
            await asyncio.sleep(0)
        closing.cancel()
        await asyncio.gather(closing, asked, return_exceptions=True)
        await gone(other, "a")
        await until(lambda: len(daemon.server.connections) == 1)
