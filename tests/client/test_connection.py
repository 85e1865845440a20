"""A connection sends requests in few chunks, and reads replies that are split anywhere."""

import asyncio
from typing import Any

import pytest

import regd_client
from regd_client.client import Client
from regd_client.connection import Connection
from regd_client.protocol import Address
from tests.support.daemon import InLoop

pytestmark = pytest.mark.socket


class Sending:
    """A transport that counts the lines of each chunk that is sent."""

    def __init__(self, connection: Connection) -> None:
        self.pieces: list[int] = []
        self._transport: Any = connection._transport
        connection._transport = self  # type: ignore[assignment]

    def write(self, data: bytes) -> None:
        self.pieces.append(data.count(b"\n"))
        self._transport.write(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)


async def test_requests_of_one_loop_iteration_are_sent_together(daemon: InLoop) -> None:
    async with Client(f"127.0.0.1:{daemon.port}") as client:
        sending = Sending(await client._connect())
        for many in (50, 1, 50):
            for _ in range(3):
                await asyncio.gather(*(client.ping() for _ in range(many)))
        assert sum(sending.pieces) == 3 * (50 + 1 + 50)
        assert sending.pieces == [50] * 3 + [1] * 3 + [1, 49] + [50] * 2


async def test_single_request_is_sent_at_once(daemon: InLoop) -> None:
    async with Client(f"127.0.0.1:{daemon.port}") as client:
        connection = await client._connect()
        await connection.ask("ping", {})
        sending = Sending(connection)
        answer = connection.ask("ping", {})
        assert sending.pieces == [1]
        second = connection.ask("ping", {})
        assert sending.pieces == [1]
        await asyncio.gather(answer, second)
        assert sending.pieces == [1, 1]
        both = [connection.ask("ping", {}) for _ in range(2)]
        assert sending.pieces == [1, 1]
        await asyncio.gather(*both)
        assert sending.pieces == [1, 1, 2]


class Nowhere(asyncio.Transport):
    """A transport that discards what is sent."""

    def write(self, data: object) -> None:
        pass

    def is_closing(self) -> bool:
        return False

    def close(self) -> None:
        pass


INSTANCE = b'"instance":"","host":"h","port":1,"meta":{},"state":"ready","rev":5'


@pytest.mark.parametrize("size", [1, 2, 3, 7, 50, 64, 1_000, 100_000])
async def test_replies_do_not_depend_on_how_they_are_split(size: int) -> None:
    events: list[Any] = []
    connection = Connection(Address("h", 1), lambda connection, event: events.append(event["name"]))
    connection.connection_made(Nowhere())
    requests = [
        connection.ask("resolve", {"name": "a"}, cached=True),
        connection.ask("watch", {"name": "*"}, lambda said: events.append(said["rev"])),
        connection.ask("resolve", {"name": "a"}, cached=True),
        connection.ask("resolve", {"name": "b"}),
        connection.ask("resolve", {"name": "b"}, cached=True),
        connection.ask("resolve", {"name": "a"}, cached=True),
    ]
    requests[-1].cancel()
    said = (
        b'{"ok":true,"id":1,"name":"a",%s}\n'
        b'{"ok":true,"id":2,"watch":1,"epoch":"e","rev":2}\n'
        b'{"event":"sync","watch":1,"rev":3}\n'
        b'{"event":"lost","name":"a","instance":"","reason":"replaced","rev":4}\n'
        b'{"ok":true,"id":3,"name":"a",%s}\n'
        b'{"event":"up","watch":1,"name":"a",%s,"later":"' + b"v" * 70_000 + b'"}\n'
        b'{"ok":false,"id":5,"error":"not_found","message":"none"}\n'
        b'{"ok":true,"id":6,"name":"a",%s}\n'
        b'{"ok":true,"id":4,"name":"b",%s}\n'
    )
    said %= (INSTANCE,) * said.count(b"%s")
    while said:
        room = connection.get_buffer(-1)[:size]
        piece, said = said[: len(room)], said[len(room) :]
        room[: len(piece)] = piece
        connection.buffer_updated(len(piece))
    assert events == [2, 3, "a", 5]
    assert [reply.result()["port"] for reply in requests[:4:2]] == [1, 1]
    assert (requests[3].result()["id"], requests[3].result()["name"]) == (4, "b")
    assert isinstance(requests[4].exception(), regd_client.NotFound)
    connection.connection_lost(None)
    await connection.closed
