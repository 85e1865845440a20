"""The DNS server on UDP and TCP, with a cache of answers."""

import asyncio
import contextlib
import random
import socket
import time
from collections.abc import Callable, Sequence
from typing import cast

from regd.gateways.dns_messages import refuse, respond
from regd.gateways.listeners import BACKLOG
from regd.gateways.name_index import NameIndex
from regd.gateways.readers import Readers

__all__ = ["AnswerCache", "DnsServer"]

CONNECTIONS_MAX = 64  # over TCP; more are closed at once
IDLE_S = 10.0  # for a whole message over TCP
_CACHED_MAX = 1_024
_CACHED_BYTES_MAX = 16_384
_CACHED_S = 1.0
# Cached answers per query, each with the records in another order: most clients take the first record, and those
# that ask within the same second should not all connect to the same instance.
_ORDERS = 8
_QUERY_BYTES_MAX = 512  # longer queries are not cached
_ID_BYTES = 2  # every query has its own id, which the cache leaves out

State = Callable[[], NameIndex | None]


class AnswerCache:
    """Answers queries. Equal queries get one of a few answers from a cache, which every change clears.

    Args:
        state: returns the current state; None if the state is unknown or too old.
        clock: returns the time in seconds.
    """

    def __init__(self, state: State, clock: Callable[[], float] = time.monotonic) -> None:
        self._state = state
        self._clock = clock
        self._rng = random.Random()
        # By query and number of the order: the time until which the answer is valid, and the answer.
        self._answers: dict[tuple[bytes, bool, int], tuple[float, bytes]] = {}

    def clear(self) -> None:
        """Remove all answers, because the state has changed."""
        self._answers.clear()

    def answer(self, query: bytes, *, tcp: bool) -> bytes | None:
        """Return the answer to a query; None if the query gets none."""
        key = (query[_ID_BYTES:], tcp, self._rng.randrange(_ORDERS))
        now = self._clock()
        valid_until, rest = self._answers.get(key, (0.0, b""))
        if now < valid_until:
            return query[:_ID_BYTES] + rest
        index = self._state()
        answer = respond(query, index, self._rng, tcp=tcp)
        if answer is None:
            return None
        if index is not None and len(query) <= _QUERY_BYTES_MAX and len(answer) <= _CACHED_BYTES_MAX:
            if len(self._answers) >= _CACHED_MAX:
                self._answers.clear()
            self._answers[key] = (now + _CACHED_S, answer[_ID_BYTES:])
        return answer


class DnsServer:
    """Serves bound sockets: UDP on datagram sockets, TCP on listening ones."""

    def __init__(self, cache: AnswerCache, readers: Readers) -> None:
        self._cache = cache
        self._readers = readers
        self._datagrams: list[asyncio.DatagramTransport] = []
        self._servers: list[asyncio.Server] = []
        self._connections: set[asyncio.Task[None]] = set()

    async def start(self, sockets: Sequence[socket.socket]) -> None:
        loop = asyncio.get_running_loop()
        for sock in sockets:
            if sock.type == socket.SOCK_DGRAM:
                transport, _ = await loop.create_datagram_endpoint(
                    lambda: _Datagrams(self._cache, self._readers), sock=sock
                )
                self._datagrams.append(transport)
            else:
                self._servers.append(await asyncio.start_server(self._accept, sock=sock, backlog=BACKLOG))

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if len(self._connections) >= CONNECTIONS_MAX:
            writer.transport.abort()
            return
        task = asyncio.ensure_future(self._serve(reader, writer))
        self._connections.add(task)
        task.add_done_callback(self._connections.discard)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            with contextlib.suppress(OSError, asyncio.IncompleteReadError):  # including TimeoutError
                await self._answer_all(reader, writer)
            writer.close()
            with contextlib.suppress(OSError):
                async with asyncio.timeout(IDLE_S):
                    await writer.wait_closed()  # until the client has read the answers
        finally:
            writer.transport.abort()

    async def _answer_all(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer the messages of a connection in order. Each message is sent after its length (RFC 7766).

        Raises:
            OSError, IncompleteReadError: the connection ended, or the client is too slow.
        """
        peer, own = writer.get_extra_info("peername"), writer.get_extra_info("sockname")
        may_read = self._readers.may_read_by_tcp(peer, own)
        while True:
            async with asyncio.timeout(IDLE_S):
                length = int.from_bytes(await reader.readexactly(2))
                query = await reader.readexactly(length)
            answer = self._cache.answer(query, tcp=True) if may_read else refuse(query)
            if answer is not None:
                writer.write(len(answer).to_bytes(2) + answer)
                async with asyncio.timeout(IDLE_S):
                    await writer.drain()
            await asyncio.sleep(0)  # a client that sends many queries at once does not delay others

    async def close(self) -> None:
        """Close the sockets and the connections."""
        for transport in self._datagrams:
            transport.close()
        for server in self._servers:
            server.close()
        for task in self._connections:
            task.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)


class _Datagrams(asyncio.DatagramProtocol):
    def __init__(self, cache: AnswerCache, readers: Readers) -> None:
        self._cache = cache
        self._readers = readers
        self._own = ("", 0)
        self._transport: asyncio.DatagramTransport | None = None
        self._is_full = False  # while the kernel's buffer is full, answers are dropped, as on a network

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.DatagramTransport, transport)
        self._own = transport.get_extra_info("sockname")

    def pause_writing(self) -> None:
        self._is_full = True

    def resume_writing(self) -> None:
        self._is_full = False

    def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
        if self._is_full:
            return
        may_read = self._readers.may_read_by_udp(addr, self._own)
        answer = self._cache.answer(data, tcp=False) if may_read else refuse(data)
        if answer is not None and self._transport is not None:
            self._transport.sendto(answer, addr)
