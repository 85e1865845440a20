"""Streams with both ends in the test's hand: a protocol that keeps what it is told, and plain sockets as peers."""

import asyncio
import os
import select
import socket
import struct
from collections.abc import Callable
from typing import Any, cast

import pytest

from regd.server.streams import Stream, Streams
from tests.support.daemon import WAIT_S

MANY = bytes(range(256)) * 4_096  # a MiB: more than small sockets take
KIB = 1_024
# What systems offer: epoll, or sockets that the loop looks at. Not the latter with uvloop on Linux, where libuv forgets
# a socket that was reset; regd has epoll there.
WAYS = ["epoll", "loop"]
if os.environ.get("REGD_TEST_LOOP") == "uvloop" and hasattr(select, "epoll"):
    WAYS.remove("loop")
if not hasattr(select, "epoll"):
    WAYS.remove("epoll")


async def until(true: Any) -> None:
    """Let the loop turn until something that happens by itself has happened."""
    async with asyncio.timeout(WAIT_S):
        while not true():
            await asyncio.sleep(0)


async def turns(count: int) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


class Told(asyncio.Protocol):
    """Keeps what it is told, and sees that what asyncio promises to protocols is kept. `on` has what a call does."""

    transport: Stream

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.got = bytearray()
        self.error: Exception | None = None
        self.stays = True  # when the peer has closed its side
        self.on: dict[str, Callable[[], object]] = {}
        self.size_at: dict[str, int] = {}  # what was kept when it was told to pause, and to resume

    def _told(self, call: str) -> None:
        assert self.calls[:1] == ([] if call == "made" else ["made"]), "connection_made comes first, and once"
        assert "lost" not in self.calls, f"{call} behind connection_lost"
        self.calls.append(call)
        if call in self.on:
            self.on[call]()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(Stream, transport)
        self._told("made")

    def data_received(self, data: bytes) -> None:
        assert type(data) is bytes
        assert 0 < len(data) <= 32_768
        assert "eof" not in self.calls, "bytes behind the end"
        assert self.transport.is_reading(), "bytes while nobody reads"
        self.got += data
        self._told("data")

    def eof_received(self) -> bool:
        assert self.transport.is_reading(), "an end while nobody reads"
        assert "eof" not in self.calls, "the end twice"
        self._told("eof")
        return self.stays

    def pause_writing(self) -> None:
        assert self.calls.count("paused") == self.calls.count("resumed"), "paused twice"
        self.size_at["paused"] = self.transport.get_write_buffer_size()
        self._told("paused")

    def resume_writing(self) -> None:
        assert self.calls.count("paused") == self.calls.count("resumed") + 1, "resumed and not paused"
        self.size_at["resumed"] = self.transport.get_write_buffer_size()
        self._told("resumed")

    def connection_lost(self, exc: Exception | None) -> None:
        assert self.transport.is_closing()
        self.error = exc
        self._told("lost")

    @property
    def is_lost(self) -> bool:
        return "lost" in self.calls


class Caller:
    """The peer's end: a plain socket, looked at from the test."""

    def __init__(self, address: Any, receives_bytes: int | None) -> None:
        self.socket = socket.socket()
        if receives_bytes is not None:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receives_bytes)
        self.socket.connect(address)
        self.socket.setblocking(False)
        self.got = bytearray()
        self.end = ""  # "eof" or "reset"

    def send(self, data: bytes) -> None:
        assert self.socket.send(data) == len(data)

    def take(self, most: int = 2**30) -> None:
        """Read what is there."""
        while most > 0 and not self.end:
            try:
                data = self.socket.recv(min(most, 65_536))
            except BlockingIOError:
                return
            except ConnectionResetError:
                self.end = "reset"
                return
            self.got += data
            most -= len(data)
            if not data:
                self.end = "eof"

    def took(self) -> bytearray:
        """Read what is there, and return all that was read."""
        self.take()
        return self.got

    async def rest(self) -> bytes:
        """Read up to the end."""
        await until(lambda: self.took() is None or self.end)
        return bytes(self.got)

    @property
    def has_ended(self) -> bool:
        return bool(self.end) or self.socket.fileno() < 0

    def shut(self) -> None:
        self.socket.shutdown(socket.SHUT_WR)

    def reset(self) -> None:
        if self.socket.fileno() < 0:
            return
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.socket.close()


class Bench:
    """Streams behind a listener, both ends of each, and what the loop was told of errors."""

    def __init__(self, streams: Streams, protocol: Callable[[], Told] = Told) -> None:
        self.streams = streams
        self.listener = socket.create_server(("127.0.0.1", 0), backlog=512)
        self.protocol = protocol
        self.told: list[Told] = []
        self.callers: list[Caller] = []
        self.errors: list[dict[str, Any]] = []
        self.served = 0
        asyncio.get_running_loop().set_exception_handler(lambda loop, context: self.errors.append(context))
        streams.listen(self.listener, self._made)
        assert not self.listener.getblocking(), "the second look for a caller would hold the loop"

    def _made(self) -> Told:
        self.told.append(self.protocol())
        return self.told[-1]

    def call(self, receives_bytes: int | None = None) -> Caller:
        self.callers.append(Caller(self.listener.getsockname(), receives_bytes))
        return self.callers[-1]

    async def pair(self, receives_bytes: int | None = None) -> tuple[Caller, Told]:
        """Return both ends of a connection."""
        count = len(self.told)
        caller = self.call(receives_bytes)
        await until(lambda: len(self.told) > count)
        return caller, self.told[-1]

    async def narrow(self) -> tuple[Caller, Told]:
        """Return both ends of a connection that takes few bytes."""
        caller, told = await self.pair(4_096)
        told.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4_096)
        return caller, told

    async def full(self) -> tuple[Caller, Told, int]:
        """Return both ends of one that takes nothing more, and how much it has taken. Some of it is kept."""
        caller, told = await self.narrow()
        told.transport.write(MANY[:262_144])
        before = -1
        while before != (before := told.transport.get_write_buffer_size()):
            await turns(5)
        assert 0 < before < 262_144
        return caller, told, 262_144

    async def is_quiet(self) -> bool:
        """Whether the loop has nothing to do with any stream, turn after turn."""
        await turns(5)
        before = self.served
        await turns(50)
        epoll = self.streams._epoll
        return self.served == before and (epoll is None or epoll.closed or not epoll.poll(0))

    async def close(self) -> None:
        for each in self.told:
            each.on.clear()
            each.transport.abort()
        await turns(2)
        self.streams.close()
        self.listener.close()
        for caller in self.callers:
            caller.socket.close()
        assert self.errors == []
        assert all(each.calls.count("lost") == 1 for each in self.told)
        assert all(each.transport.get_extra_info("socket").fileno() == -1 for each in self.told)


def made_streams(way: str) -> Streams:
    with pytest.MonkeyPatch.context() as patch:
        if way == "loop":
            patch.delattr(select, "epoll", raising=False)
        made = Streams()
    assert (made._epoll is None) is (way == "loop")
    return made
