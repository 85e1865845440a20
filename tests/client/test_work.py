"""The cost of a resolve in function calls, which, unlike seconds, do not depend on the load of the machine."""

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

CALLS_PER_TASK = 20


class Daemon(asyncio.Transport):
    """A transport to a daemon with one service. The daemon answers in the next loop iteration."""

    def __init__(self) -> None:
        super().__init__()
        self.connection = Connection(Address("h", 1), lambda connection, event: None)
        self.connection.connection_made(self)

    def write(self, data: Any) -> None:
        asyncio.get_running_loop().call_soon(self._answer, data)

    def _answer(self, data: bytes) -> None:
        members = b',"name":"a","instance":"","host":"h","port":1,"meta":{"k":"v"},"state":"ready","rev":1}\n'
        ids = (line.partition(b'"id":')[2].partition(b",")[0] for line in data.splitlines())
        answers = b"".join(b'{"ok":true,"id":' + id + members for id in ids)
        self.connection.get_buffer(-1)[: len(answers)] = answers
        self.connection.buffer_updated(len(answers))

    def is_closing(self) -> bool:
        return False

    def close(self) -> None:
        asyncio.get_running_loop().call_soon(self.connection.connection_lost, None)

    def abort(self) -> None:
        pass


class Calls:
    """Counts the calls that the client's code makes, including calls of functions written in C."""

    def __init__(self) -> None:
        self.count = 0

    def __enter__(self) -> "Calls":
        sys.setprofile(self._called)
        return self

    def __exit__(self, *_: object) -> None:
        sys.setprofile(None)

    def _called(self, frame: FrameType, event: str, arg: object) -> None:
        self.count += event.endswith("call") and "/regd_client/" in frame.f_code.co_filename


@pytest.mark.parametrize(("tasks", "calls_max"), [(1, 40), (50, 31)])  # at present 38 and 29
async def test_calls_of_a_resolve(tasks: int, calls_max: int, monkeypatch: pytest.MonkeyPatch) -> None:
    client = Client()
    client._connector.connection = Daemon().connection

    async def ask() -> None:
        for _ in range(CALLS_PER_TASK):
            assert (await client.resolve("a")).port == 1

    await ask()
    encoded_or_decoded: list[object] = []
    with monkeypatch.context() as patch:
        patch.setattr(json, "loads", encoded_or_decoded.append)
        patch.setattr(protocol, "_encode", encoded_or_decoded.append)
        with Calls() as calls:
            await asyncio.gather(*(ask() for _ in range(tasks)))
    assert not encoded_or_decoded  # repeated requests and replies come from the caches
    assert calls.count / (tasks * CALLS_PER_TASK) <= calls_max
    await client.close()
