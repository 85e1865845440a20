"""A relay between clients and a daemon. It can break and refuse connections, and delay replies."""

import asyncio
import contextlib
import json
import socket
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self


class Relay:
    """Forwards connections to the daemon at the port `to`, and records the requests."""

    def __init__(self, to: int) -> None:
        self.to = to
        self.port = 0
        self.requests: list[dict[str, Any]] = []
        self.flowing = asyncio.Event()  # while it is not set, replies are delayed
        self.flowing.set()
        self.cut_at: Callable[[dict[str, Any]], bool] = lambda request: False
        self._open: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._cuts = 0
        self._listener: socket.socket | None = None

    def accept(self) -> None:
        """Accept connections. After `refuse`, on the same port as before.

        This does not use `asyncio.start_server`, because a server that is closed just after it has accepted a
        connection never closes that connection.
        """
        self._listener = socket.create_server(("127.0.0.1", self.port))
        self._listener.setblocking(False)
        self.port = self._listener.getsockname()[1]
        asyncio.get_running_loop().add_reader(self._listener, self._accept, self._listener)

    def _accept(self, listener: socket.socket) -> None:
        with contextlib.suppress(BlockingIOError):
            task = asyncio.create_task(self._relay(listener.accept()[0], self._cuts))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    def refuse(self) -> None:
        """Refuse new connections."""
        if self._listener is not None:
            asyncio.get_running_loop().remove_reader(self._listener)
            self._listener.close()
            self._listener = None

    def cut(self) -> None:
        """Break all connections, on both sides."""
        self._cuts += 1
        for writer in self._open:
            writer.transport.abort()

    def count(self, cmd: str) -> int:
        """Return the number of requests with this command."""
        return sum(request["cmd"] == cmd for request in self.requests)

    async def __aenter__(self) -> Self:
        self.accept()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.refuse()
        self.cut()
        await asyncio.gather(*self._tasks)

    async def _relay(self, accepted: socket.socket, cuts: int) -> None:
        """Forward a connection until it ends on either side. It was accepted after `cuts` cuts."""
        reader, writer = await asyncio.open_connection(sock=accepted)
        with contextlib.suppress(OSError):
            daemon_reader, daemon_writer = await asyncio.open_connection("127.0.0.1", self.to)
            ends = {writer, daemon_writer}
            self._open |= ends
            replies = asyncio.create_task(self._forward_replies(daemon_reader, writer))
            try:
                if cuts == self._cuts:
                    await self._forward_requests(reader, daemon_writer)
            finally:
                replies.cancel()
                for end in ends:
                    end.transport.abort()
                self._open -= ends
        writer.transport.abort()

    async def _forward_requests(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while line := await reader.readline():
            request = json.loads(line)
            self.requests.append(request)
            if self.cut_at(request):
                return
            writer.write(line)

    async def _forward_replies(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65_536):
            await self.flowing.wait()
            writer.write(data)
        writer.transport.abort()
