"""A relay between clients and a daemon: it can cut, refuse and hold back, and tells what was said."""

import asyncio
import contextlib
import json
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self


class Relay:
    """`to` is the daemon's port, for the connections that are made from now on."""

    def __init__(self, to: int) -> None:
        self.to = to
        self.port = 0
        self.said: list[dict[str, Any]] = []  # by clients
        self.flowing = asyncio.Event()  # while not set, nothing goes through to clients
        self.flowing.set()
        self.cut_at: Callable[[dict[str, Any]], bool] = lambda said: False
        self._open: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None

    async def accept(self) -> None:
        """Take connections, again at the same port where it has refused them."""
        self._server = await asyncio.start_server(self._relay, "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]

    def refuse(self) -> None:
        """Take no connection more."""
        assert self._server is not None
        self._server.close()

    def cut(self) -> None:
        """Break all connections, to both sides."""
        for writer in self._open:
            writer.transport.abort()

    def count(self, cmd: str) -> int:
        """Return how often clients have said this."""
        return sum(request["cmd"] == cmd for request in self.said)

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
            there, onward = await asyncio.open_connection("127.0.0.1", self.to)
            ends = {writer, onward}
            self._open |= ends
            back = asyncio.create_task(self._back(there, writer))
            try:
                await self._forth(reader, onward)
            finally:
                back.cancel()
                for end in ends:
                    end.transport.abort()
                self._open -= ends
        writer.transport.abort()

    async def _forth(self, reader: asyncio.StreamReader, onward: asyncio.StreamWriter) -> None:
        while line := await reader.readline():
            fields = json.loads(line)
            self.said.append(fields)
            if self.cut_at(fields):
                return
            onward.write(line)

    async def _back(self, there: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await there.read(65_536):
            await self.flowing.wait()
            writer.write(data)
        writer.transport.abort()
