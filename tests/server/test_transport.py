"""What the daemon relies on in asyncio's and uvloop's transports: resets, exceptions, and freed resources."""

import asyncio
import contextlib
import gc
import os
import random
import socket
import struct
from collections.abc import Callable
from typing import Any

import pytest

from regd.server.connection import Connection
from tests.support.daemon import InLoop, Peer
from tests.support.polling import until

pytestmark = pytest.mark.socket

RESET = struct.pack("ii", 1, 0)
SCRIPTS = (
    b'{"cmd":"ping"}\n' * 40,
    b'{"cmd":"register","name":"a","port":1,"hold":true}\n{"cmd":"resolve","name":"a"}\n',
    b'{"cmd":"resolve","name":"none","wait":60}\n',
    b'{"cmd":"watch","id":1}\n{"cmd":"list","id":2}\n',
    b"GET / HTTP/1.1\r\n\r\n",
    b"\x16\x03\x01 not for regd",
    b'{"cmd":"list"}\nquit\n',
    b'{"cmd":"unfinished',
)


def _reset(client: socket.socket) -> None:
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
    client.close()


def _shut_and_close(client: socket.socket) -> None:
    client.shutdown(socket.SHUT_WR)
    client.close()


def _read_and_reset(client: socket.socket) -> None:
    with contextlib.suppress(BlockingIOError):
        client.recv(64)
    _reset(client)


ENDS: tuple[Callable[[socket.socket], None], ...] = (
    _reset,
    socket.socket.close,
    _shut_and_close,
    _read_and_reset,
)


async def test_client_may_end_its_connection_at_any_moment(daemon: InLoop) -> None:
    errors: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: errors.append(context))
    witness = await daemon.peer()
    choices = random.Random(11)
    for _ in range(300):
        script, end = choices.choice(SCRIPTS), choices.choice(ENDS)
        client = socket.create_connection(("127.0.0.1", daemon.port))
        client.setblocking(False)
        for _ in range(choices.randrange(4)):
            await asyncio.sleep(0)
        cut = choices.randrange(len(script) + 1)
        client.sendall(script[:cut])
        for _ in range(choices.randrange(6)):
            await asyncio.sleep(0)
        with contextlib.suppress(OSError):  # the daemon may have closed it already
            client.send(script[cut:])
        for _ in range(choices.randrange(6)):
            await asyncio.sleep(0)
        end(client)
    assert (await witness.ask(cmd="ping"))["ok"]
    daemon.clock.advance(60.0)  # half-closed clients get the reply to their wait, watchers get `progress`
    await until(lambda: _others_are_gone(daemon))
    assert (await witness.ask(cmd="resolve", name="a"))["error"] == "not_found"
    assert errors == []


def _others_are_gone(daemon: InLoop) -> bool:
    daemon.clock.advance(1.0)
    return len(daemon.server.connections) == 1


@pytest.mark.parametrize("method", ["data_received", "eof_received", "_begin"])
async def test_bug_closes_only_its_own_connection(
    daemon: InLoop, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    errors: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: errors.append(context))
    witness = await daemon.peer()
    assert (await witness.ask(cmd="ping"))["ok"]
    original = getattr(Connection, method)

    def broken(self: Connection, *arguments: Any) -> Any:
        if method == "_begin":
            original(self, *arguments)
        raise ZeroDivisionError

    with monkeypatch.context() as patch:
        patch.setattr(Connection, method, broken)
        victim = Peer(*await asyncio.open_connection("127.0.0.1", daemon.port))
        victim.send("ping")
        if method == "eof_received":
            victim.writer.write_eof()
        with contextlib.suppress(ConnectionError):
            assert b"internal" not in await victim.rest()
        await until(lambda: bool(errors))
    await victim.close()
    await until(lambda: len(daemon.server.connections) == 1)
    assert isinstance(errors[0]["exception"], ZeroDivisionError)
    assert (await witness.ask(cmd="ping"))["ok"]
    errors.clear()


async def test_ended_connection_is_freed_without_the_garbage_collector(daemon: InLoop) -> None:
    """The daemon freezes objects for the garbage collector, so connections must be freed by reference counting."""
    connections = daemon.server._connections
    gc.collect()
    gc.disable()
    try:
        for end in ENDS:
            for script in SCRIPTS:
                client = socket.create_connection(("127.0.0.1", daemon.port))
                client.setblocking(False)
                await until(lambda: len(daemon.server.connections) == 1)
                client.sendall(script)
                for _ in range(3):
                    await asyncio.sleep(0)
                end(client)
                await until(lambda: _all_are_gone(daemon))
        for _ in range(5):
            await asyncio.sleep(0)
        left = [
            item for item in gc.get_objects() if isinstance(item, Connection) and item._connections is connections
        ]
        assert left == []
    finally:
        gc.enable()


def _all_are_gone(daemon: InLoop) -> bool:
    daemon.clock.advance(5.0)
    return not daemon.server.connections


async def test_no_descriptor_is_left_open(daemon: InLoop) -> None:
    peer = await daemon.peer()
    await peer.ask(cmd="ping")
    before = len(os.listdir("/proc/self/fd"))
    for script in SCRIPTS:
        client = socket.create_connection(("127.0.0.1", daemon.port))
        client.sendall(script)
        await asyncio.sleep(0)
        _reset(client)
    await until(lambda: _others_are_gone(daemon))
    # Fewer are open if a client of an earlier test, in a thread, has closed its connection only now.
    await until(lambda: len(os.listdir("/proc/self/fd")) <= before)
