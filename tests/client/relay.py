"""A relay between clients and a daemon that can break and refuse connections and delay replies."""

import asyncio
import contextlib
import json
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self


class Relay:
    """Forwards connections to the daemon at the port `to`, and records the requests."""

    def __init__(self, to: int) -> None:
        self.to = to
        self.port = 0
        self.requests: list[dict[str, Any]] = []
        self.flowing = asyncio.Event()  # while not set, replies are held back
        self.flowing.set()
        self.cut_at: Callable[[dict[str, Any]], bool] = lambda request: False
        self._open: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None

    async def accept(self) -> None:
        """Accept connections. After `refuse`, on the same port as before."""
        self._server = await asyncio.start_server(self._relay, "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]

    def refuse(self) -> None:
        """Refuse new connections."""
        assert self._server is not None
        self._server.close()

    def cut(self) -> None:
        """Break all connections, on both sides."""
        for writer in self._open:
            writer.transport.abort()

    def count(self, cmd: str) -> int:
        """Return the number of requests with this command."""
        return sum(request["cmd"] == cmd for request in self.requests)

    async def __aenter__(self) -> Self:
        await self.accept()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.refuse()
        self.cut()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _relay(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        with contextlib.suppress(OSError):
            daemon_reader, daemon_writer = await asyncio.open_connection("127.0.0.1", self.to)
            ends = {writer, daemon_writer}
            self._open |= ends
            replies = asyncio.create_task(self._forward_replies(daemon_reader, writer))
            try:
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
