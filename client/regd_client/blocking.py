"""One connection that blocks, for programs without an event loop: `regctl` is the first of them.

The same lines as everywhere, from `wire`. Imports no asyncio, and of socket only what is written in C, so that a
command starts quickly.
"""

from __future__ import annotations

from _socket import AF_UNIX, SOCK_STREAM, getaddrinfo, socket

from regd_client import wire

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import TracebackType
    from typing import Any, Self


class BlockingConnection:
    """Ask one thing after the other.

    `timeout_s` bounds every wait, the connecting one too; there are no second tries.
    """

    def __init__(self, address: str | None = None, timeout_s: float = 5.0) -> None:
        self.address = wire.find_address(address)
        self._rest = b""
        self._timeout_s = timeout_s
        try:
            self._socket = self._connect(timeout_s)
        except OSError as error:
            raise wire.unavailable(self.address, error.strerror or str(error)) from error

    def _connect(self, timeout_s: float) -> socket:
        if self.address.path:
            return _connected(AF_UNIX, self.address.path, timeout_s)
        host, trouble = self.address.host, OSError("no address")
        # As bytes where it is ASCII: else it is encoded by a codec whose import takes longer than all the rest.
        for family, *_, where in getaddrinfo(
            host.encode() if host.isascii() else host, self.address.port, type=SOCK_STREAM
        ):
            try:
                return _connected(family, where, timeout_s)
            except OSError as error:
                trouble = error
        raise trouble

    def ask(self, cmd: str, **arguments: Any) -> dict[str, Any]:
        """Send a request and return the daemon's reply, whether it is `ok` or not.

        Raises:
            Unavailable: the connection broke, or the answer took too long.
            BadArgument: the request cannot be sent.
        """
        line = wire.request(cmd, None, arguments)
        wait = arguments.get("wait")
        try:
            self._socket.settimeout(self._timeout_s + wait if wait is not None else self._timeout_s)
            self._socket.sendall(line)
            return wire.reply(self._line())
        except OSError as error:
            raise wire.unavailable(self.address, error.strerror or str(error)) from error

    def events(self) -> Iterator[dict[str, Any]]:
        """Yield what comes without being asked for, for ever. Behind a `watch`.

        Raises:
            Unavailable: the connection broke.
        """
        try:
            self._socket.settimeout(None)
            while True:
                yield wire.reply(self._line())
        except OSError as error:
            raise wire.unavailable(self.address, error.strerror or str(error)) from error

    def _line(self) -> bytes:
        parts = [self._rest]
        size = 0
        while b"\n" not in parts[-1]:
            part = self._socket.recv(65_536)
            size += len(part)
            if not part or size > wire.REPLY_BYTES_MAX:
                raise ConnectionResetError("the connection ended before the answer")
            parts.append(part)
        line, _, self._rest = b"".join(parts).partition(b"\n")
        return line

    def close(self) -> None:
        self._socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _connected(family: int, where: Any, timeout_s: float) -> socket:
    made = socket(family, SOCK_STREAM)
    try:
        made.settimeout(timeout_s)
        made.connect(where)
    except BaseException:
        made.close()
        raise
    return made
