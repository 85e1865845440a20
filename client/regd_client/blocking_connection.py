"""A blocking connection without asyncio, which sends one request after another. `regctl` uses it.

The module imports little, so that commands start quickly.
"""

from __future__ import annotations

import contextlib
import socket as socket_module
import sys
from collections.abc import Iterator

# Bound here, so that a test that patches these names in their modules does not affect the client.
from socket import AF_UNIX, SOCK_STREAM, SOL_SOCKET, getaddrinfo, socket
from time import monotonic
from typing import Any, Self

from regd_client import protocol
from regd_client.errors import Unavailable

__all__ = ["BlockingConnection"]

_EVENTS_MAX = 10_000  # the most events that may arrive before a reply


class BlockingConnection:
    """A blocking connection, which sends one request after another. It does not reconnect.

        with BlockingConnection() as connection:
            reply = connection.ask("resolve", name="db")

    Args:
        address: `tcp://HOST:PORT`, `HOST:PORT` or `unix:///path`; by default $REGD_ADDRESS, else
            the project registry of the current folder, else `tcp://127.0.0.1:7343`.
        timeout_s: seconds to connect, and to wait for each reply.
        autostart: if False, never start a daemon.

    Raises:
        Unavailable: no daemon answers.
        BadArgument: the address has none of these forms.
    """

    def __init__(
        self, address: str | protocol.Address | None = None, timeout_s: float = 5.0, *, autostart: bool = True
    ) -> None:
        self.address = address if isinstance(address, protocol.Address) else protocol.find_address(address)
        self._input = b""  # received, and not yet decoded
        self._events: list[dict[str, Any]] = []  # events that arrived before a reply
        self._timeout_s = timeout_s
        with self._os_errors_as_unavailable():
            self._open(autostart and protocol.autostart_wanted(self.address))

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
        """Connect, and check that the daemon answers a ping.

        A daemon that is about to exit because it was idle still accepts connections, but answers nothing.
        """
        self._socket = self._connect(self._timeout_s)
        try:
            self._socket.sendall(protocol.encode_request("ping", None, {}))
            reply = protocol.check_result(
                "ping", {}, protocol.decode_line(self._read_line(monotonic() + self._timeout_s))
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
                return _connect(make_socket(AF_UNIX, SOCK_STREAM), path, timeout_s)
        # Pass an ASCII host as bytes: for a string, Python would import the idna codec, which takes longer than
        # the rest.
        host = self.address.host
        last_error = OSError("no address")
        for family, *_, address in resolve(
            host.encode() if host.isascii() else host, self.address.port, type=SOCK_STREAM
        ):
            try:
                return _connect(make_socket(family, SOCK_STREAM), address, timeout_s)
            except OSError as error:
                last_error = error
        raise last_error

    def ask(self, cmd: str, **arguments: Any) -> dict[str, Any]:
        """Send a request and return the reply, also if the daemon refuses the request (`ok` is False).

            reply = connection.ask("register", name="db", port=5432)

        Args:
            cmd: a command of the protocol (PROTOCOL.md).
            arguments: the command's arguments; those that are None are not sent.

        Returns:
            The reply as a dictionary. All its values are validated.

        Raises:
            Unavailable: the connection broke, the reply took longer than `timeout_s`, or what answers is not
                regd.
            BadArgument: an argument is not a JSON value, or the request is too long.
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
        with self._os_errors_as_unavailable():
            self._socket.settimeout(timeout_s)
            self._socket.sendall(line)
            while "event" in (fields := protocol.decode_line(self._read_line(until))):
                self._events.append(fields)
                if len(self._events) > _EVENTS_MAX:
                    raise protocol.not_a_reply(f"to {cmd}: only events")
        return protocol.check_result(cmd, arguments, fields)

    @property
    def peer_pid(self) -> int | None:
        """The id of the process that opened the daemon's Unix socket, from the kernel (unix(7)), or None."""
        try:  # struct ucred: pid, uid, gid
            credentials = self._socket.getsockopt(SOL_SOCKET, socket_module.SO_PEERCRED, 12)
        except (OSError, AttributeError):
            return None
        return int.from_bytes(credentials[:4], sys.byteorder, signed=True) or None

    def events(self) -> Iterator[dict[str, Any]]:
        """Yield the events of a `watch`, without end.

        If the daemon ends the watch, it sends an error reply before it closes the connection; that reply is
        yielded too.

        Raises:
            Unavailable: the connection broke, or the program at the address is not regd.
        """
        while self._events:
            yield self._events.pop(0)
        with self._os_errors_as_unavailable():
            self._socket.settimeout(None)
            while True:
                fields = protocol.decode_line(self._read_line())
                if fields.get("ok"):
                    raise protocol.not_a_reply("a reply without a request")
                yield fields

    @contextlib.contextmanager
    def _os_errors_as_unavailable(self) -> Iterator[None]:
        try:
            yield
        except Unavailable:
            raise
        except OSError as error:
            raise protocol.unavailable(self.address, error.strerror or str(error)) from error

    def _read_line(self, until: float | None = None) -> bytes:
        """Return the next line. Raise `OSError` if it has not arrived by `until`, a time of `time.monotonic`."""
        parts = [self._input]
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
        line, _, self._input = b"".join(parts).partition(b"\n")
        return line

    def close(self) -> None:
        """Close the connection. Idempotent."""
        self._socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _connect(sock: socket, address: Any, timeout_s: float) -> socket:
    """Connect a socket and return it. Close it if that fails."""
    try:
        sock.settimeout(timeout_s)
        sock.connect(address)
    except BaseException:
        sock.close()
        raise
    return sock


def _unpatched() -> tuple[type[socket], Any]:
    """Return Python's own `socket.socket` and `socket.getaddrinfo`, even if gevent has patched them.

    A signal handler may run in gevent's hub, where gevent's sockets cannot be used.
    """
    monkey = sys.modules.get("gevent.monkey")
    if monkey is None:
        return socket, getaddrinfo
    originals: list[Any] = monkey.get_original("socket", ["socket", "getaddrinfo"])
    return originals[0], originals[1]
