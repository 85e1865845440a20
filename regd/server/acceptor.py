"""Accepts connections on the listening sockets, and creates the asyncio protocol of each connection.

`loop.create_server` handles a lack of file descriptors badly: asyncio logs an error for each connection that
cannot be accepted, and uvloop closes such connections without a log line. Here new connections stay in the
kernel's queue, and each listener logs one line a second.
"""

import asyncio
import errno
import logging
import socket
from collections.abc import Callable

log = logging.getLogger("regd")

_ACCEPTS_MAX = 64  # per listener and loop iteration, so that open connections are served in between
_OUT_OF_RESOURCES = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
_RETRY_S = 1.0


class Acceptor:
    """Accepts connections in the running loop. `create_protocol` returns the protocol of a new connection."""

    def __init__(self, create_protocol: Callable[[], asyncio.BaseProtocol]) -> None:
        self._loop = asyncio.get_running_loop()
        self._create_protocol = create_protocol
        self._listeners: list[socket.socket] = []
        self._starting: set[asyncio.Task[None]] = set()

    @property
    def starting(self) -> int:
        """The number of accepted connections that have no protocol yet."""
        return len(self._starting)

    def listen(self, listener: socket.socket) -> None:
        """Accept connections on a listening socket from now on."""
        listener.setblocking(False)
        self._listeners.append(listener)
        self._loop.add_reader(listener, self._accept, listener)

    def stop(self) -> None:
        """Accept no more connections. Connections already accepted still get their protocol. Idempotent."""
        for listener in self._listeners:
            self._loop.remove_reader(listener)
        self._listeners.clear()

    async def started(self) -> None:
        """Wait until every accepted connection has its protocol."""
        if self._starting:
            await asyncio.wait(self._starting)

    def _accept(self, listener: socket.socket) -> None:
        for _ in range(_ACCEPTS_MAX):
            try:
                connection, _ = listener.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as error:
                if error.errno not in _OUT_OF_RESOURCES:
                    raise
                log.error("cannot accept connections: %s; trying again in %g s", error.strerror, _RETRY_S)
                self._loop.remove_reader(listener)
                self._loop.call_later(_RETRY_S, self._resume, listener)
                return
            connection.setblocking(False)
            if connection.family != socket.AF_UNIX:
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            task = self._loop.create_task(self._start(connection))
            self._starting.add(task)
            task.add_done_callback(self._starting.discard)

    def _resume(self, listener: socket.socket) -> None:
        if listener in self._listeners:
            self._loop.add_reader(listener, self._accept, listener)

    async def _start(self, connection: socket.socket) -> None:
        try:
            await self._loop.connect_accepted_socket(self._create_protocol, connection)
        except BaseException:
            connection.close()
            raise
