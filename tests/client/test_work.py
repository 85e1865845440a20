"""What a resolve costs the client, in work and not in seconds: a regression is seen on a noisy machine, too."""

import asyncio
import json
import sys
from types import FrameType
from typing import Any

import pytest

from regd_client import protocol
from regd_client.client import Client
from regd_client.connection import Connection
from regd_client.protocol import Address

pytestmark = pytest.mark.socket  # on uvloop, too

EACH = 20


class Daemon(asyncio.Transport):
    """A connection to a daemon that knows one service, and answers in the next turn of the loop."""

    def __init__(self) -> None:
        super().__init__()
        self.connection = Connection(Address("h", 1), lambda connection, event: None)
        self.connection.connection_made(self)

    def write(self, data: Any) -> None:
        asyncio.get_running_loop().call_soon(self._answer, data)

    def _answer(self, data: bytes) -> None:
        said = b',"name":"a","instance":"","host":"h","port":1,"meta":{"k":"v"},"state":"ready","rev":1}\n'
        ids = (line.partition(b'"id":')[2].partition(b",")[0] for line in data.splitlines())
        answers = b"".join(b'{"ok":true,"id":' + id + said for id in ids)
        self.connection.get_buffer(-1)[: len(answers)] = answers
        self.connection.buffer_updated(len(answers))

    def is_closing(self) -> bool:
        return False

    def close(self) -> None:
        asyncio.get_running_loop().call_soon(self.connection.connection_lost, None)

    def abort(self) -> None:
        pass


class Calls:
    """Counts the functions that the client's code calls: its own and others, those that are written in C, too."""

    def __init__(self) -> None:
        self.count = 0

    def __enter__(self) -> "Calls":
        sys.setprofile(self._called)
        return self

    def __exit__(self, *_: object) -> None:
        sys.setprofile(None)

    def _called(self, frame: FrameType, event: str, arg: object) -> None:
        self.count += event.endswith("call") and "/regd_client/" in frame.f_code.co_filename


@pytest.mark.parametrize(("tasks", "calls_max"), [(1, 40), (50, 31)])  # 38 and 29 when this was written
async def test_a_resolve_is_so_many_calls(tasks: int, calls_max: int, monkeypatch: pytest.MonkeyPatch) -> None:
    client = Client()
    client._connector.connection = Daemon().connection

    async def ask() -> None:
        for _ in range(EACH):
            assert (await client.resolve("a")).port == 1

    await ask()
    dear: list[object] = []
    with monkeypatch.context() as watched:
        watched.setattr(json, "loads", dear.append)
        watched.setattr(protocol, "_encode", dear.append)
        with Calls() as calls:
            await asyncio.gather(*(ask() for _ in range(tasks)))
    assert not dear  # what was asked and answered before is not written and read again
    assert calls.count / (tasks * EACH) <= calls_max
    await client.close()
