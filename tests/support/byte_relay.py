"""A relay between clients and a server, which can break connections, hold bytes back and refuse connections."""

import asyncio
import contextlib
import socket
from types import TracebackType
from typing import Self


class ByteRelay:
    """Forwards connections to a port of 127.0.0.1.

    Attributes:
        flowing: while it is not set, connections stay open, and bytes are held back in both directions.
        accepted: number of connections.
    """

    def __init__(self, to: int) -> None:
        self.to = to
        self.port = 0
        self.accepted = 0
        self.flowing = asyncio.Event()
        self.flowing.set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._listener: socket.socket | None = None

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def accept(self) -> None:
        """Accept connections. After `refuse`, the port is the same as before.

        This does not use `asyncio.start_server`, because a server that is closed just after it has accepted a
        connection never closes that connection.
        """
        self._listener = socket.create_server(("127.0.0.1", self.port))
        self._listener.setblocking(False)
        self.port = self._listener.getsockname()[1]
        asyncio.get_running_loop().add_reader(self._listener, self._accept, self._listener)

    def _accept(self, listener: socket.socket) -> None:
        with contextlib.suppress(BlockingIOError):
            accepted, _ = listener.accept()
            task = asyncio.create_task(self._relay(accepted))
            self.accepted += 1
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
            task.add_done_callback(lambda _: accepted.close())  # also if it was cancelled before its first step

    def refuse(self) -> None:
        """Refuse new connections."""
        if self._listener is not None:
            asyncio.get_running_loop().remove_reader(self._listener)
            self._listener.close()
            self._listener = None

    def cut(self) -> None:
        """Break all connections, to clients and to the server."""
        for task in self._tasks:
            task.cancel()

    async def __aenter__(self) -> Self:
        self.accept()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.refuse()
        self.cut()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _relay(self, accepted: socket.socket) -> None:
        """Forward a connection until it ends on either side."""
        writers: list[asyncio.StreamWriter] = []
        try:
            reader, writer = await asyncio.open_connection(sock=accepted)
            writers.append(writer)
            server_reader, server_writer = await asyncio.open_connection("127.0.0.1", self.to)
            writers.append(server_writer)
            async with asyncio.TaskGroup() as group:
                group.create_task(self._forward_to_server(reader, server_writer))
                group.create_task(self._forward(server_reader, writer))
        except (OSError, ExceptionGroup):
            pass
        finally:
            for writer in writers:
                writer.transport.abort()

    async def _forward_to_server(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await self._forward(reader, writer)

    async def _forward(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65_536):
            await self.flowing.wait()
            writer.write(data)
            await writer.drain()
        raise ConnectionResetError("the connection has ended")
