"""A connection without asyncio: one request after another. `regctl` is built on it.

It imports little, so that a command starts quickly.
"""

from __future__ import annotations

import socket as socket_module
import sys
from collections.abc import Iterator

# Bound here: a test that replaces them in their modules changes nothing here.
from socket import AF_UNIX, SOCK_STREAM, SOL_SOCKET, getaddrinfo, socket
from time import monotonic
from types import TracebackType
from typing import Any, Self

from regd_client import protocol
from regd_client.errors import Unavailable

__all__ = ["BlockingConnection"]

_EVENTS_MAX = 10_000  # before one reply


class BlockingConnection:
    """One connection, one request after another, without asyncio. It is not opened again after a break.

        with BlockingConnection() as connection:
            reply = connection.ask("resolve", name="db")

    Args:
        address: `tcp://HOST:PORT`, `HOST:PORT` or `unix:///path`; by default $REGD_ADDRESS, else
            the project registry of the current folder, else `tcp://127.0.0.1:7343`.
        timeout_s: seconds for connecting, and for every reply.
        autostart: start a daemon on demand; False for a program that only observes.

    Raises:
        Unavailable: no daemon answers.
        BadArgument: the address has another form.
    """

    def __init__(
        self, address: str | protocol.Address | None = None, timeout_s: float = 5.0, *, autostart: bool = True
    ) -> None:
        self.address = address if isinstance(address, protocol.Address) else protocol.find_address(address)
        self._rest = b""
        self._events: list[dict[str, Any]] = []  # that came before a reply
        self._timeout_s = timeout_s
        try:
            self._open(autostart and protocol.autostart_wanted(self.address))
        except Unavailable:
            raise
        except OSError as error:
            raise protocol.unavailable(self.address, error.strerror or str(error)) from error

    def __repr__(self) -> str:
        state = "open" if hasattr(self, "_socket") and self._socket.fileno() >= 0 else "closed"
        return f"<BlockingConnection to {self.address}, {state}>"

    def _open(self, may_start: bool) -> None:
        if not may_start:
            self._socket = self._connect(self._timeout_s)
            return
        try:
            self._connect_and_ping()
        except OSError as error:
            from regd_client import autostart

            if not autostart.is_gone(error):
                raise
            autostart.until_open(self.address, self._timeout_s, self._connect_and_ping)

    def _connect_and_ping(self) -> None:
        """Connect, and ping the daemon: one that is about to exit when idle does not answer."""
        self._socket = self._connect(self._timeout_s)
        try:
            self._socket.sendall(protocol.encode_request("ping", None, {}))
            reply = protocol.check_result(
                "ping", {}, protocol.decode_line(self._line(monotonic() + self._timeout_s))
            )
            if not reply["ok"]:
                raise protocol.refused(self.address, reply)
        except BaseException:
            self._socket.close()
            raise

    def _connect(self, timeout_s: float) -> socket:
        make_socket, resolve = _unpatched()
        if self.address.path:
            with protocol.connectable(self.address.path) as path:
                return _connected(make_socket(AF_UNIX, SOCK_STREAM), path, timeout_s)
        host, trouble = self.address.host, OSError("no address")
        # As bytes if it is ASCII: the codec idna encodes a string, and its import takes longer than all the rest.
        for family, *_, address in resolve(
            host.encode() if host.isascii() else host, self.address.port, type=SOCK_STREAM
        ):
            try:
                return _connected(make_socket(family, SOCK_STREAM), address, timeout_s)
            except OSError as error:
                trouble = error
        raise trouble

    def ask(self, cmd: str, **arguments: Any) -> dict[str, Any]:
        """Send a request and return the daemon's reply, with `ok` or not. Every value in it is checked.

            reply = connection.ask("register", name="db", port=5432)

        Args:
            cmd: a command of the protocol (PROTOCOL.md).
            arguments: the command's arguments; None leaves one out.

        Returns:
            The reply as a dictionary.

        Raises:
            Unavailable: the connection broke, the reply took longer than `timeout_s`, or the peer is not a regd.
            BadArgument: an argument is no JSON value, or the request is too long.
        """
        reply = self._ask(cmd, arguments)
        if reply["ok"] or (part := protocol.unsupported_part(cmd, arguments, reply)) is None:
            return reply
        try:
            hello, described = self._ask("hello", {}), self._ask("help", {})
        except Unavailable:
            return reply
        return protocol.unsupported(self.address, cmd, part, hello, described) or reply

    def _ask(self, cmd: str, arguments: dict[str, Any]) -> dict[str, Any]:
        line = protocol.encode_request(cmd, None, arguments)
        wait = arguments.get("wait")
        timeout_s = self._timeout_s + (0.0 if wait is None else wait)
        until = monotonic() + timeout_s
        try:
            self._socket.settimeout(timeout_s)
            self._socket.sendall(line)
            while "event" in (fields := protocol.decode_line(self._line(until))):
                self._events.append(fields)
                if len(self._events) > _EVENTS_MAX:
                    raise protocol.not_a_reply(f"to {cmd}: events, and no reply")
        except OSError as error:
            if isinstance(error, Unavailable):
                raise
            raise protocol.unavailable(self.address, error.strerror or str(error)) from error
        return protocol.check_result(cmd, arguments, fields)

    @property
    def peer_pid(self) -> int | None:
        """The process that opened the daemon's Unix socket, as the kernel says (unix(7)); None if it does not."""
        try:
            credentials = self._socket.getsockopt(
                SOL_SOCKET, socket_module.SO_PEERCRED, 12
            )  # struct ucred: pid, uid, gid
        except (OSError, AttributeError):
            return None
        return int.from_bytes(credentials[:4], sys.byteorder, signed=True) or None

    def events(self) -> Iterator[dict[str, Any]]:
        """Yield the events of a `watch`, for ever. The last may be a refusal, before the daemon closes.

        Raises:
            Unavailable: the connection broke, or the peer is not a regd.
        """
        while self._events:
            yield self._events.pop(0)
        try:
            self._socket.settimeout(None)
            while True:
                fields = protocol.decode_line(self._line())
                if fields.get("ok"):
                    raise protocol.not_a_reply("a reply to nothing")
                yield fields
        except OSError as error:
            if isinstance(error, Unavailable):
                raise
            raise protocol.unavailable(self.address, error.strerror or str(error)) from error

    def _line(self, until: float | None = None) -> bytes:
        """Return the next line, before `until` (`time.monotonic`) or without a limit."""
        parts = [self._rest]
        size = 0
        while b"\n" not in parts[-1]:
            if until is not None:
                left_s = until - monotonic()
                if left_s <= 0:
                    raise TimeoutError("timed out")
                self._socket.settimeout(left_s)
            part = self._socket.recv(65_536)
            size += len(part)
            if not part:
                raise ConnectionResetError("the connection ended before the answer")
            if size > protocol.REPLY_BYTES_MAX:
                raise protocol.not_a_reply("a line without an end")
            parts.append(part)
        line, _, self._rest = b"".join(parts).partition(b"\n")
        return line

    def close(self) -> None:
        """Close the connection. Idempotent."""
        self._socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _connected(sock: socket, address: Any, timeout_s: float) -> socket:
    try:
        sock.settimeout(timeout_s)
        sock.connect(address)
    except BaseException:
        sock.close()
        raise
    return sock


def _unpatched() -> tuple[type[socket], Any]:
    """Return `socket.socket` and `socket.getaddrinfo` as Python has them, also after gevent has replaced them.

    A signal handler may run in gevent's hub, where gevent's own sockets must not be used.
    """
    monkey = sys.modules.get("gevent.monkey")
    if monkey is None:
        return socket, getaddrinfo
    made: list[Any] = monkey.get_original("socket", ["socket", "getaddrinfo"])
    return made[0], made[1]
