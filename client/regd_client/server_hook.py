"""Servers of an event loop: a door notices when one opens its port, and delays the closing of its listener.

asyncio's servers open their port with `loop.create_server`. Servers with an accept loop of their own, as Tornado,
pass a listening socket to `loop.add_reader`. While there are doors, both methods go through here. A server that
uses neither is found by its listening socket, if its port is known. Must not know what is registered.
"""

import asyncio
import contextlib
import os
import socket
import stat
from collections.abc import Callable, Coroutine, Iterable
from typing import Any, NoReturn

_HERE = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # where all addresses are reached from this machine

Withdraw = Callable[[], Coroutine[Any, Any, None]]


class ListenHook:
    """One who waits for a server to open: on `port`, or the first, with None.

    `opened` is called once, with the host and port that it can be reached at. Before it closes, `withdraw` is
    awaited, while new connections still find it.
    """

    def __init__(self, port: int | None, opened: Callable[[str, int], None], withdraw: Withdraw) -> None:
        self.withdraw = withdraw
        self._port = port
        self._opened = opened
        self._used = False

    def fits(self, sockets: Iterable[Any]) -> bool:
        return not self._used and any(self._port in (None, port) for _, port in addresses(sockets))

    def open(self, sockets: Iterable[Any]) -> None:
        self._used = True
        host, port = next(each for each in addresses(sockets) if self._port in (None, each[1]))
        self._opened(host, port)

    def look(self) -> bool:
        """Open it if this process listens on the port already. Returns whether it does."""
        if self._port is None:
            return False
        with contextlib.ExitStack() as stack:
            found = [stack.enter_context(each) for each in _own_sockets()]
            listening = [each for each in found if is_listener(each) and self.fits([each])]
            if listening:
                self.open(listening)
            return bool(listening)

    def __enter__(self) -> "ListenHook":
        loop = asyncio.get_running_loop()
        opener = vars(loop).get("create_server")
        if not isinstance(opener, _Opener):
            opener = _Opener(loop)
            vars(loop)["create_server"] = opener
            vars(loop)["add_reader"] = opener.add_reader
        opener.doors.append(self)
        return self

    def __exit__(self, *_: object) -> None:
        found = vars(asyncio.get_running_loop())
        opener = found["create_server"]
        opener.doors.remove(self)
        if not opener.doors:
            del found["create_server"], found["add_reader"]


class _Opener:
    """Stands in for a loop's `create_server` and `add_reader`."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.doors: list[ListenHook] = []
        self._create = loop.create_server
        self._add_reader = loop.add_reader

    async def __call__(
        self, *args: Any, sock: socket.socket | None = None, **more: Any
    ) -> asyncio.AbstractServer:
        door = None
        if sock is not None and (door := self._door([sock])) is not None:
            # One of its own: whoever passes a socket to a server closes it himself, too.
            sock = socket.socket(fileno=os.dup(sock.fileno()))
        try:
            server = await self._create(*args, sock=sock, **more)
        except BaseException:
            if door is not None and sock is not None:
                sock.close()
            raise
        door = door or self._door(server.sockets)
        return server if door is None else _DrainingServer(server, door)

    def add_reader(self, fd: Any, callback: Callable[..., Any], *args: Any) -> None:
        self._add_reader(fd, callback, *args)
        with contextlib.suppress(OSError, ValueError), _same(fd if isinstance(fd, int) else fd.fileno()) as found:
            if is_listener(found) and (door := self._door([found])) is not None:
                door.open([found])

    def _door(self, sockets: Iterable[Any]) -> ListenHook | None:
        return next((each for each in self.doors if each.fits(sockets)), None)


class _DrainingServer(asyncio.AbstractServer):
    """A server that closes once its door is done."""

    def __init__(self, server: asyncio.Server, door: ListenHook) -> None:
        self._server = server
        self._door = door
        self._closing: asyncio.Task[None] | None = None
        self._heard()

    def _heard(self) -> None:
        if self._server.is_serving() and self._door.fits(self._server.sockets):
            self._door.open(self._server.sockets)

    def close(self) -> None:
        loop = self._server.get_loop()
        if not loop.is_running():
            self._server.close()
        elif self._closing is None:
            self._closing = loop.create_task(self._close(), name="regd-client-close")

    async def _close(self) -> None:
        try:
            await self._door.withdraw()
        finally:
            self._server.close()

    async def wait_closed(self) -> None:
        await self._server.wait_closed()

    async def start_serving(self) -> None:
        await self._server.start_serving()
        self._heard()

    async def serve_forever(self) -> NoReturn:
        await self.start_serving()
        try:
            await self._server.get_loop().create_future()
        finally:
            self.close()
            await self.wait_closed()
        raise AssertionError("for ever")

    def get_loop(self) -> asyncio.AbstractEventLoop:
        return self._server.get_loop()

    def is_serving(self) -> bool:
        return self._server.is_serving()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._server, name)


def is_listener(found: socket.socket) -> bool:
    """Whether it accepts TCP connections."""
    if found.family not in (socket.AF_INET, socket.AF_INET6) or found.type != socket.SOCK_STREAM:
        return False
    return bool(found.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))


def _same(fd: int) -> socket.socket:
    """Return a socket of one's own for the one behind a descriptor.

    Raises:
        OSError: there is none.
    """
    if not stat.S_ISSOCK(os.fstat(fd).st_mode):
        raise OSError(f"descriptor {fd} is no socket")
    copied = os.dup(fd)
    try:
        return socket.socket(fileno=copied)
    except BaseException:
        os.close(copied)
        raise


def _own_sockets() -> list[socket.socket]:
    """Return copies of all sockets of this process, to be closed by the caller."""
    found = []
    for name in os.listdir("/dev/fd"):
        with contextlib.suppress(OSError):
            found.append(_same(int(name)))
    return found


def addresses(sockets: Iterable[Any]) -> list[tuple[str, int]]:
    """Return where others on this machine reach these sockets, the oldest family first."""
    found: list[tuple[bool, str, int]] = []
    for each in sockets:
        where = each.getsockname()
        if isinstance(where, tuple):  # else it is a Unix socket
            host, port = str(where[0]), int(where[1])
            found.append((":" in host, _HERE.get(host, host), port))
    return [(host, port) for _, host, port in sorted(found)]
