"""The acceptor: accepting in slices, without free file descriptors, and until `stop`."""

import asyncio
import errno
import itertools
import logging
import os
import socket
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any, cast

import pytest

from regd.server.acceptor import Acceptor
from tests.support.daemon import WAIT_S, InLoop
from tests.support.polling import until

pytestmark = pytest.mark.socket


class NoDescriptors(socket.socket):
    """A listener whose `accept` raises the errno `number` if that is not 0."""

    number = 0
    attempts = 0

    def accept(self) -> tuple[socket.socket, Any]:
        self.attempts += 1
        if self.number:
            raise OSError(self.number, os.strerror(self.number))
        return super().accept()


class RecordedTimers:
    """The running loop, except that `call_later` only records the delay and the callback."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self.timers: list[tuple[float, Callable[[], object]]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loop, name)

    def call_later(self, delay: float, callback: Callable[..., object], *args: Any) -> None:
        self.timers.append((delay, lambda: callback(*args)))


class Recorder(asyncio.Protocol):
    """A protocol that records what it receives."""

    def __init__(self, connections: "list[Recorder]") -> None:
        self.received = b""
        self._connections = connections

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self._connections.append(self)

    def data_received(self, data: bytes) -> None:
        self.received += data


class Scene:
    """An acceptor on a listener that can fail, the accepted connections, and the clients' sockets."""

    def __init__(self) -> None:
        self.connections: list[Recorder] = []
        self.clients: list[socket.socket] = []
        self.errors: list[dict[str, Any]] = []
        asyncio.get_running_loop().set_exception_handler(lambda loop, context: self.errors.append(context))
        self.acceptor = Acceptor(lambda: Recorder(self.connections))
        self.loop = RecordedTimers()
        self.acceptor._loop = cast(asyncio.AbstractEventLoop, self.loop)
        self.listener = NoDescriptors()
        self.listener.bind(("127.0.0.1", 0))
        self.listener.listen(256)
        self.acceptor.listen(self.listener)

    def connect(self, data: bytes = b"") -> socket.socket:
        client = socket.create_connection(self.listener.getsockname())
        client.sendall(data)
        self.clients.append(client)
        return client

    async def close(self) -> None:
        self.acceptor.stop()
        await self.acceptor.started()
        for connection in self.connections:
            connection.transport.abort()
        await settle()
        self.listener.close()
        for client in self.clients:
            client.close()
        assert self.errors == []


async def settle() -> None:
    for _ in range(50):
        await asyncio.sleep(0)


@pytest.fixture
async def scene() -> AsyncIterator[Scene]:
    running = Scene()
    yield running
    await running.close()


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM])
async def test_clients_wait_without_file_descriptors_and_each_attempt_logs_one_line(
    scene: Scene, caplog: pytest.LogCaptureFixture, number: int
) -> None:
    scene.connect()
    await until(lambda: len(scene.connections) == 1)
    scene.listener.number = number
    scene.listener.attempts = 0
    waiting = [scene.connect(b"waited") for _ in range(3)]
    for attempt in (1, 2):
        await until(lambda: bool(scene.loop.timers))
        await settle()
        assert (scene.listener.attempts, len(scene.loop.timers)) == (attempt, 1)
        assert [os.strerror(number) in message for message in caplog.messages] == [True] * attempt
        assert [record.levelno for record in caplog.records] == [logging.ERROR] * attempt
        delay, retry = scene.loop.timers.pop()
        assert delay == 1.0
        if attempt == 1:
            retry()
    scene.clients[0].sendall(b"served now")
    await until(lambda: scene.connections[0].received == b"served now")
    scene.listener.number = 0
    retry()
    await until(
        lambda: [connection.received for connection in scene.connections[1:]] == [b"waited"] * len(waiting)
    )
    assert len(caplog.messages) == 2


async def test_no_retry_after_stop(scene: Scene, caplog: pytest.LogCaptureFixture) -> None:
    scene.listener.number = errno.EMFILE
    scene.connect()
    await until(lambda: bool(scene.loop.timers))
    scene.acceptor.stop()
    scene.listener.number = 0
    [(_, retry)] = scene.loop.timers
    retry()
    await settle()
    assert (scene.connections, scene.listener.attempts) == ([], 1)
    assert len(caplog.messages) == 1


@pytest.mark.parametrize("number", [errno.ECONNABORTED, errno.EINTR, errno.EAGAIN])
async def test_client_that_left_before_accept_is_skipped(
    scene: Scene, caplog: pytest.LogCaptureFixture, number: int
) -> None:
    scene.listener.number = number
    scene.connect(b"x")
    await until(lambda: bool(scene.listener.attempts))
    scene.listener.number = 0
    await until(lambda: [connection.received for connection in scene.connections] == [b"x"])
    assert (scene.loop.timers, caplog.messages) == ([], [])


async def test_other_errors_of_accept_are_reported(scene: Scene) -> None:
    scene.listener.number = errno.EPERM
    scene.connect()
    await until(lambda: bool(scene.errors))
    scene.listener.number = 0
    assert {type(error["exception"]) for error in scene.errors} == {PermissionError}
    scene.errors.clear()
    await until(lambda: len(scene.connections) == 1)
    assert scene.loop.timers == []


async def test_clients_are_accepted_in_slices(scene: Scene) -> None:
    """Many new connections at once, as when a test suite starts, do not delay the open ones."""
    for _ in range(200):
        scene.connect()
    counts = [0]
    while len(scene.connections) < 200:
        await asyncio.sleep(0)
        counts.append(len(scene.connections))
    assert max(after - before for before, after in itertools.pairwise(counts)) <= 64


async def test_stop_accepts_no_connection_and_serves_open_connections(scene: Scene) -> None:
    client = scene.connect()
    await until(lambda: len(scene.connections) == 1)
    scene.acceptor.stop()
    scene.acceptor.stop()
    scene.connect()
    await settle()
    assert len(scene.connections) == 1
    client.sendall(b"still here")
    await until(lambda: scene.connections[0].received == b"still here")


async def test_starting_connection_is_counted_and_awaited(scene: Scene) -> None:
    scene.connect()
    scene.acceptor._accept(scene.listener)
    assert scene.acceptor.starting == 1
    scene.acceptor.stop()
    await scene.acceptor.started()
    assert (len(scene.connections), scene.acceptor.starting) == (1, 0)


async def test_accepted_sockets_are_non_blocking_without_delay(scene: Scene, tmp_path: Path) -> None:
    client = scene.connect()
    await until(lambda: len(scene.connections) == 1)
    transport = scene.connections[0].transport
    accepted = transport.get_extra_info("socket")
    assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
    assert not os.get_blocking(accepted.fileno())
    assert transport.get_extra_info("peername") == client.getsockname()
    with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as unix:
        listener.bind(os.fspath(tmp_path / "s"))
        listener.listen()
        scene.acceptor.listen(listener)
        unix.connect(os.fspath(tmp_path / "s"))
        unix.sendall(b"by path")
        await until(lambda: scene.connections[-1].received == b"by path")
        assert scene.connections[-1].transport.get_extra_info("socket").family == socket.AF_UNIX
        scene.acceptor.stop()


async def test_daemon_without_file_descriptors_serves_clients_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    accept = socket.socket.accept
    failing = True

    def fail(self: socket.socket) -> tuple[socket.socket, Any]:
        if failing:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        return accept(self)

    monkeypatch.setattr("regd.server.acceptor._RETRY_S", 0.01)
    async with InLoop(tmp_path / "registry.json") as daemon:
        monkeypatch.setattr(socket.socket, "accept", fail)
        with socket.create_connection(("127.0.0.1", daemon.port)) as client:
            client.sendall(b'{"cmd":"ping"}\n')
            client.setblocking(False)
            await until(lambda: "cannot accept connections" in caplog.text)
            failing = False
            async with asyncio.timeout(WAIT_S):
                assert await asyncio.get_running_loop().sock_recv(client, 100) == b'{"ok":true}\n'
