"""A proxy that cuts, delays, splits and drops at random, from a seed.

While `calm` is set it forwards everything, including data that it had held back.
"""

import asyncio
import contextlib
import random
import socket
import struct
from collections import Counter
from types import TracebackType
from typing import Self

ACCIDENTS = ("delay", "dribble", "deaf", "truncate", "cut")
LIKELY = 0.02  # the probability of an accident for a chunk or a new connection


class Proxy:
    def __init__(self, port: int, rng: random.Random) -> None:
        self.port = 0
        self.calm = asyncio.Event()
        self.hears = asyncio.Event()  # while cleared, connections are accepted and nothing is forwarded
        self.hears.set()
        self.accidents: Counter[str] = Counter()
        self._to = port
        self._rng = rng
        self._pumps: list[asyncio.Task[None]] = []  # of the direction to the daemon, one per connection
        self._tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.close()
        self.calm.set()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def cut(self, share: float = 1.0) -> None:
        """Cut `count` of the open connections."""
        for pump in self._rng.sample(self._pumps, round(share * len(self._pumps))):
            self.accidents["cut"] += 1
            pump.cancel()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.create_task(self._connect(reader, writer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _connect(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            if self._unlucky():
                raise ConnectionRefusedError
            answers, daemon = await asyncio.open_connection("127.0.0.1", self._to)
        except OSError:
            self.accidents["refuse"] += 1
            await self._end(writer)
            return
        there = asyncio.create_task(self._pump(reader, daemon))
        back = asyncio.create_task(self._pump(answers, writer))
        self._pumps.append(there)
        try:
            await asyncio.wait((there, back), return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._pumps.remove(there)
            for pump in (there, back):
                pump.cancel()
            await asyncio.gather(there, back, return_exceptions=True)
            await self._end(writer)
            try:
                if self._unlucky(0.3):
                    await self._while_wild(2.0)  # the daemon sees the end later than the client
            finally:
                await self._end(daemon)

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            while chunk := await reader.read(65_536):
                accident = self._rng.choice(ACCIDENTS) if self._unlucky() else ""
                self.accidents[accident] += 1
                if accident == "cut":
                    return
                if accident in ("delay", "deaf"):
                    await self._while_wild(0.2 if accident == "delay" else 3.0)
                await self.hears.wait()
                if accident == "dribble":
                    for at in range(len(chunk[:2_000])):
                        writer.write(chunk[at : at + 1])
                        await asyncio.sleep(0)
                    chunk = chunk[2_000:]
                if accident == "truncate":
                    begin = chunk.rfind(b"\n", 0, -1) + 1  # of the last line
                    writer.write(chunk[: self._rng.randrange(begin, len(chunk))])
                    return
                writer.write(chunk)
                await writer.drain()

    def _unlucky(self, likely: float = LIKELY) -> bool:
        return not self.calm.is_set() and self._rng.random() < likely

    async def _while_wild(self, most_s: float) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._rng.uniform(0, most_s)):  # `wait_for` may swallow a cancellation
                await self.calm.wait()

    async def _end(self, writer: asyncio.StreamWriter) -> None:
        """Close one side, with a FIN after the sent data or with a reset."""
        if self._rng.random() < 0.5:
            sock = writer.get_extra_info("socket")
            with contextlib.suppress(OSError):
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            writer.transport.abort()
        else:
            writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()
