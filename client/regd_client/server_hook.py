"""Hooks an event loop, to detect when a server opens its port, and to delay the closing of the port.

Most asyncio servers open their port with `loop.create_server`. Servers with their own accept loop, such as
Tornado, pass a listening socket to `loop.add_reader`. A hook replaces both methods while it is installed. A
server that uses neither method is found by its port, among the sockets of this process.
"""

import asyncio
import contextlib
import os
import socket
import stat
from collections.abc import Callable, Coroutine, Iterable
from typing import Any, NoReturn

__all__ = ["ListenHook", "Withdraw", "addresses", "is_listener"]

_LOOPBACK = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # a server on a wildcard address is reached at loopback

Withdraw = Callable[[], Coroutine[Any, Any, None]]


class ListenHook:
    """Detects the server that opens `port`; with None, the first server that opens any port.

    The hook calls `on_open` once, with the server's host and port. When the server is to close its listener, the
    hook first awaits `withdraw`; until then the listener accepts connections.
    """

    def __init__(self, port: int | None, on_open: Callable[[str, int], None], withdraw: Withdraw) -> None:
        self.withdraw = withdraw
        self._port = port
        self._on_open = on_open
        self._used = False

    def matches(self, sockets: Iterable[Any]) -> bool:
        """Return whether this hook still waits for a server, and the sockets have its port."""
        return not self._used and any(self._port in (None, port) for _, port in addresses(sockets))

    def open(self, sockets: Iterable[Any]) -> None:
        """Report that the server with these sockets is open."""
        self._used = True
        host, port = next(address for address in addresses(sockets) if self._port in (None, address[1]))
        self._on_open(host, port)

    def find_open_port(self) -> bool:
        """Report a socket of this process that listens on the port. Return whether there is one."""
        if self._port is None:
            return False
        with contextlib.ExitStack() as stack:
            sockets = [stack.enter_context(sock) for sock in _own_sockets()]
            listening = [sock for sock in sockets if is_listener(sock) and self.matches([sock])]
            if listening:
                self.open(listening)
            return bool(listening)

    def __enter__(self) -> "ListenHook":
        loop = asyncio.get_running_loop()
        patch = vars(loop).get("create_server")
        if not isinstance(patch, _LoopPatch):
            patch = _LoopPatch(loop)
            vars(loop)["create_server"] = patch
            vars(loop)["add_reader"] = patch.add_reader
        patch.hooks.append(self)
        return self

    def __exit__(self, *_: object) -> None:
        members = vars(asyncio.get_running_loop())
        patch = members["create_server"]
        patch.hooks.remove(self)
        if not patch.hooks:
            del members["create_server"], members["add_reader"]


class _LoopPatch:
    """Replaces a loop's `create_server` and `add_reader`."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.hooks: list[ListenHook] = []
        self._create_server = loop.create_server
        self._add_reader = loop.add_reader

    async def __call__(
        self, *args: Any, sock: socket.socket | None = None, **more: Any
    ) -> asyncio.AbstractServer:
        hook = None
        if sock is not None and (hook := self._find([sock])) is not None:
            # Give the server a copy, since the program may close its own socket before `withdraw` has finished.
            sock = socket.socket(fileno=os.dup(sock.fileno()))
        try:
            server = await self._create_server(*args, sock=sock, **more)
        except BaseException:
            if hook is not None and sock is not None:
                sock.close()
            raise
        hook = hook or self._find(server.sockets)
        return server if hook is None else _DrainingServer(server, hook)

    def add_reader(self, fd: Any, callback: Callable[..., Any], *args: Any) -> None:
        self._add_reader(fd, callback, *args)
        with contextlib.suppress(OSError, ValueError), _copy(fd if isinstance(fd, int) else fd.fileno()) as sock:
            if is_listener(sock) and (hook := self._find([sock])) is not None:
                hook.open([sock])

    def _find(self, sockets: Iterable[Any]) -> ListenHook | None:
        return next((hook for hook in self.hooks if hook.matches(sockets)), None)


class _DrainingServer(asyncio.AbstractServer):
    """A server whose `close` first awaits the hook's `withdraw`."""

    def __init__(self, server: asyncio.Server, hook: ListenHook) -> None:
        self._server = server
        self._hook = hook
        self._closing: asyncio.Task[None] | None = None
        self._open_if_serving()

    def _open_if_serving(self) -> None:
        if self._server.is_serving() and self._hook.matches(self._server.sockets):
            self._hook.open(self._server.sockets)

    def close(self) -> None:
        loop = self._server.get_loop()
        if not loop.is_running():
            self._server.close()
        elif self._closing is None:
            self._closing = loop.create_task(self._close(), name="regd-client-close")

    async def _close(self) -> None:
        try:
            await self._hook.withdraw()
        finally:
            self._server.close()

    async def wait_closed(self) -> None:
        await self._server.wait_closed()

    async def start_serving(self) -> None:
        await self._server.start_serving()
        self._open_if_serving()

    async def serve_forever(self) -> NoReturn:
        await self.start_serving()
        try:
            await self._server.get_loop().create_future()
        finally:
            self.close()
            await self.wait_closed()
        raise AssertionError("unreachable")

    def get_loop(self) -> asyncio.AbstractEventLoop:
        return self._server.get_loop()

    def is_serving(self) -> bool:
        return self._server.is_serving()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._server, name)


def is_listener(sock: socket.socket) -> bool:
    """Return whether the socket accepts TCP connections."""
    if sock.family not in (socket.AF_INET, socket.AF_INET6) or sock.type != socket.SOCK_STREAM:
        return False
    return bool(sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))


def _copy(fd: int) -> socket.socket:
    """Return a socket with a duplicate of the descriptor.

    Raises:
        OSError: the descriptor is not a socket.
    """
    if not stat.S_ISSOCK(os.fstat(fd).st_mode):
        raise OSError(f"descriptor {fd} is not a socket")
    copied = os.dup(fd)
    try:
        return socket.socket(fileno=copied)
    except BaseException:
        os.close(copied)
        raise


def _own_sockets() -> list[socket.socket]:
    """Return copies of all sockets of this process. The caller closes them."""
    sockets = []
    for name in os.listdir("/dev/fd"):
        with contextlib.suppress(OSError):
            sockets.append(_copy(int(name)))
    return sockets


def addresses(sockets: Iterable[Any]) -> list[tuple[str, int]]:
    """Return the hosts and ports at which this machine can reach TCP sockets, IPv4 before IPv6."""
    rows: list[tuple[bool, str, int]] = []
    for sock in sockets:
        name = sock.getsockname()
        if isinstance(name, tuple):  # not a Unix socket
            host, port = str(name[0]), int(name[1])
            rows.append((":" in host, _LOOPBACK.get(host, host), port))
    return [(host, port) for _, host, port in sorted(rows)]
