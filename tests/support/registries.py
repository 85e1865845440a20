"""A daemon whose connections a test can break and which it can restart, and comparable replies."""

import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from regd.server.daemon import Config, Daemon
from regd_client.client import Client
from regd_client.errors import RegdError
from tests.support.daemon import InLoop

VARYING = (
    "message",
    "registered_at",
    "since",
    "age_s",
    "epoch",
    "version",
    "connection",
)  # differ from run to run


class Registry:
    def __init__(self, daemon: InLoop) -> None:
        self._daemon = daemon
        self._starts = 0

    @property
    def address(self) -> str:
        return f"tcp://127.0.0.1:{self._daemon.port}"

    def client(self) -> Client:
        return Client(self.address)

    def cut(self) -> None:
        """Break all connections."""
        for connection in list(self._daemon.server.connections):
            connection.cut()

    @contextlib.asynccontextmanager
    async def away(self) -> AsyncIterator[None]:
        """Stop the daemon during the block, and start it again at the end."""
        config = Config(registry=self._daemon.registry, port=self._daemon.port)
        await self._daemon.server.stop()
        yield
        self._starts += 1
        self._daemon.server = Daemon(config, clock=self._daemon.clock, epoch=f"start {self._starts}")
        await self._daemon.server.start()


@contextlib.asynccontextmanager
async def running(folder: Path) -> AsyncIterator[Registry]:
    """Run a daemon at the address in REGD_ADDRESS."""
    async with InLoop(folder / "registry.json") as daemon:
        registry = Registry(daemon)
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("REGD_ADDRESS", registry.address)
            yield registry


def comparable(reply: Any) -> Any:
    """Return a reply without the fields that differ from run to run."""
    if isinstance(reply, dict):
        fields = {key: comparable(value) for key, value in reply.items() if key not in VARYING}
        if "connection" in reply:
            fields["connection"] = reply["connection"] is not None
        return fields
    return [comparable(item) for item in reply] if isinstance(reply, list) else reply


async def outcome(client: Client, cmd: str, **arguments: Any) -> Any:
    """Return the comparable reply to a request, without `id`, or the class, code and details of the error."""
    try:
        connection = await client._connect()
        reply = dict(await connection.ask(cmd, arguments))
    except RegdError as error:
        return type(error).__name__, error.code, comparable(error.details)
    reply.pop("id")
    return comparable(reply)
