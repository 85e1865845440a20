"""Who follows is never told a false picture, whatever breaks, ends or is cancelled on the way."""

import asyncio
import random

import pytest

from regd_client.client import Client
from tests.client.relay import Relay, until
from tests.support.daemon import InLoop

pytestmark = [pytest.mark.socket, pytest.mark.usefixtures("relay")]


async def listen(client: Client) -> None:
    async for _ in client.watch("x"):
        pass


@pytest.mark.parametrize("turns", range(8))
async def test_a_cancelled_watch_leaves_none(daemon: InLoop, turns: int) -> None:
    """The daemon takes 256 of a connection."""
    async with Client() as client:
        for _ in range(3):
            task = asyncio.create_task(listen(client))
            for _ in range(turns):
                await asyncio.sleep(0)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        await client.ping()  # behind what was said of the watches
        await client.ping()  # and behind what was answered to that
        assert (await client.stats())["watches"] == 0


async def test_ending_one_watch_after_a_break_leaves_the_others(
    relay: Relay, daemon: InLoop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each connection counts its watches from 1."""
    peer = await daemon.peer()
    await peer.ask(cmd="register", name="w", port=1)
    monkeypatch.setattr(random, "uniform", lambda low, high: 0.5)  # what is kept comes back after the new one
    async with Client() as client:
        old = client.mirror("w")
        await old.__aenter__()
        relay.cut()
        await until(lambda: not client._connection.usable)  # type: ignore[union-attr]
        async with client.mirror("w") as mirror:
            await old.__aexit__(None, None, None)
            await client.ping()
            await peer.ask(cmd="register", name="w", port=2)
            await until(lambda: mirror.resolve("w").port == 2)
