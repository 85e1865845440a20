"""The fake and a daemon in the test's loop, with one face: what is tried with the one is tried with the other."""

import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Protocol

import pytest

from regd.server.lifecycle import Config, Server
from regd_client import testing
from regd_client.client import Client
from regd_client.connection import Connection
from regd_client.errors import RegdError
from tests.support.daemon import InLoop

WORDS = ("message", "registered_at", "since", "age_s", "epoch", "version", "connection")  # may be its own


class Registry(Protocol):
    def client(self) -> Client: ...

    def cut(self) -> None:
        """Break all connections."""

    def away(self) -> contextlib.AbstractAsyncContextManager[None]:
        """Stop, and be back at the end."""


class Fake:
    def __init__(self, fake: testing.FakeRegistry) -> None:
        self.fake = fake

    def client(self) -> Client:
        client = Client()
        client._link._opener = self.fake._open  # also while a daemon is tried beside it
        return client

    def cut(self) -> None:
        self.fake.cut()

    @contextlib.asynccontextmanager
    async def away(self) -> AsyncIterator[None]:
        with self.fake.away():
            yield


class Real:
    def __init__(self, daemon: InLoop) -> None:
        self._daemon = daemon
        self._starts = 0

    @property
    def address(self) -> str:
        return f"tcp://127.0.0.1:{self._daemon.port}"

    def client(self) -> Client:
        client = Client(self.address)
        client._link._opener = Connection.open
        return client

    def cut(self) -> None:
        for each in list(self._daemon.server.connections):
            each.cut()

    @contextlib.asynccontextmanager
    async def away(self) -> AsyncIterator[None]:
        config = Config(registry=self._daemon.registry, port=self._daemon.port)
        await self._daemon.server.stop()
        yield
        self._starts += 1
        self._daemon.server = Server(config, clock=self._daemon.clock, epoch=f"start {self._starts}")
        await self._daemon.server.start()


@contextlib.asynccontextmanager
async def fake() -> AsyncIterator[Fake]:
    with testing.fake() as made:
        yield Fake(made)


@contextlib.asynccontextmanager
async def real(folder: Path) -> AsyncIterator[Real]:
    """Run a daemon, where clients find it."""
    async with InLoop(folder / "registry.json") as daemon:
        running = Real(daemon)
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("REGD_ADDRESS", running.address)
            yield running


def plain(said: Any) -> Any:
    """Return what the two must agree in."""
    if isinstance(said, dict):
        kept = {key: plain(value) for key, value in said.items() if key not in WORDS}
        if "connection" in said:
            kept["connection"] = said["connection"] is not None
        return kept
    return [plain(each) for each in said] if isinstance(said, list) else said


async def outcome(client: Client, cmd: str, **arguments: Any) -> Any:
    """Return the reply to a request without its `id`, or the class, code and details of its error; all plain."""
    try:
        connection = await client._connected()
        reply = dict(await connection.ask(cmd, arguments))
    except RegdError as error:
        return type(error).__name__, error.code, plain(error.details)
    reply.pop("id")
    return plain(reply)
