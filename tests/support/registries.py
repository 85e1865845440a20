"""A daemon in the test's loop, with `cut` and `away`."""

import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from regd.server.daemon import Config, Daemon
from regd_client.client import Client
from regd_client.errors import RegdError
from tests.support.daemon import InLoop

WORDS = ("message", "registered_at", "since", "age_s", "epoch", "version", "connection")  # differ from run to run


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
        for each in list(self._daemon.server.connections):
            each.cut()

    @contextlib.asynccontextmanager
    async def away(self) -> AsyncIterator[None]:
        """Stop, and be back at the end."""
        config = Config(registry=self._daemon.registry, port=self._daemon.port)
        await self._daemon.server.stop()
        yield
        self._starts += 1
        self._daemon.server = Daemon(config, clock=self._daemon.clock, epoch=f"start {self._starts}")
        await self._daemon.server.start()


@contextlib.asynccontextmanager
async def running(folder: Path) -> AsyncIterator[Registry]:
    """Run a daemon, where clients find it."""
    async with InLoop(folder / "registry.json") as daemon:
        made = Registry(daemon)
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("REGD_ADDRESS", made.address)
            yield made


def plain(said: Any) -> Any:
    """Return a reply without what differs from run to run."""
    if isinstance(said, dict):
        kept = {key: plain(value) for key, value in said.items() if key not in WORDS}
        if "connection" in said:
            kept["connection"] = said["connection"] is not None
        return kept
    return [plain(each) for each in said] if isinstance(said, list) else said


async def outcome(client: Client, cmd: str, **arguments: Any) -> Any:
    """Return the reply to a request without its `id`, or the class, code and details of its error; all plain."""
    try:
        connection = await client._connect()
        reply = dict(await connection.ask(cmd, arguments))
    except RegdError as error:
        return type(error).__name__, error.code, plain(error.details)
    reply.pop("id")
    return plain(reply)
