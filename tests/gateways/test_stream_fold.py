"""The events of a stream add up to the daemon's `list`, also after disconnects, cuts and restarts."""

import asyncio
import contextlib
import json
import random
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from regd.gateways.daemon_connections import DaemonClient
from regd.gateways.readers import Readers
from regd.gateways.routes import Gateway
from regd_client.errors import RegdError
from regd_client.protocol import parse_address
from tests.gateways.asgi import Exchange
from tests.support.daemon import WAIT_S
from tests.support.registries import Registry, running

pytestmark = pytest.mark.socket
NAMES = ["a", "b", "a.b"]


class Reader:
    """Follows a stream as an `EventSource` does: it reconnects with the id of the last event."""

    def __init__(self, app: Gateway) -> None:
        self._app = app
        self.instances: dict[tuple[str, str], dict[str, Any]] = {}
        self.rev = -1  # the revision of the last event with an id
        self.last_event_id = ""
        self.resets = 0
        self.exchange: Exchange | None = None

    async def follow(self) -> None:
        while True:
            headers = {"last_event_id": self.last_event_id} if self.last_event_id else {}
            self.exchange = Exchange(self._app, "/v1/watch", **headers)
            try:
                await self._read(self.exchange)
            finally:
                self.exchange.disconnect()
            await asyncio.sleep(0.001)

    async def _read(self, exchange: Exchange) -> None:
        if (await exchange.message())["status"] != 200:
            return
        rest, more = "", True
        while more:
            part = await exchange.message()
            more = part.get("more_body", False)
            *blocks, rest = (rest + part["body"].decode()).split("\n\n")
            for block in blocks:
                self._take(dict(line.partition(": ")[::2] for line in block.splitlines()))

    def _take(self, fields: dict[str, str]) -> None:
        self.last_event_id = fields.get("id", self.last_event_id)
        if "data" not in fields:
            return
        data = json.loads(fields["data"])
        key = (data.get("name"), data.get("instance"))
        match fields["event"]:
            case "reset":
                self.resets += 1
                self.instances.clear()
            case "up" | "change":
                self.instances[key] = {name: data[name] for name in data if name not in ("event", "watch")}
            case "down":
                del self.instances[key]  # a KeyError if an event came twice
        self.rev = data["rev"] if fields.get("id") else -1 if fields["event"] == "reset" else self.rev


@contextlib.asynccontextmanager
async def following(registry: Registry) -> AsyncIterator[Reader]:
    daemon = DaemonClient(parse_address(registry.address))
    reader = Reader(Gateway(daemon, Readers(restricted=False)))
    task = asyncio.create_task(reader.follow())
    try:
        yield reader
        assert not task.done()
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        daemon.close()


async def equal(registry: Registry, reader: Reader) -> None:
    """Wait until the reader has the daemon's revision, and compare the instances."""
    async with registry.client() as client, asyncio.timeout(WAIT_S):
        listed = await (await client._connector.connect()).ask("list", {})
        while reader.rev < listed["rev"]:
            await asyncio.sleep(0.001)
    expected = {(entry["name"], entry["instance"]): entry for entry in listed["instances"]}
    assert reader.instances == expected


async def change(registry: Registry, rng: random.Random) -> None:
    async with registry.client() as client:
        for _ in range(rng.randint(1, 5)):
            name, instance = rng.choice(NAMES), rng.choice(["", "1"])
            with contextlib.suppress(RegdError):
                if rng.random() < 0.6:
                    port = rng.randint(1, 9)
                    await client.register(name, port, instance=instance, static=True, meta={"n": str(port)})
                else:
                    await client.deregister(name, instance)


@pytest.mark.parametrize("seed", range(6))
async def test_fold_of_the_stream_is_the_list(seed: int, tmp_path: Path) -> None:
    rng = random.Random(seed)
    async with running(tmp_path) as registry, following(registry) as reader:
        for _ in range(12):
            await change(registry, rng)
            match rng.choice(["nothing", "disconnect", "cut", "restart"]):
                case "disconnect":
                    assert reader.exchange is not None
                    reader.exchange.disconnect()
                case "cut":
                    registry.cut()
                case "restart":
                    async with registry.away():
                        pass
            await change(registry, rng)
            await equal(registry, reader)
    assert reader.resets <= 2  # one at the start; another if the first stream was cut within its snapshot
