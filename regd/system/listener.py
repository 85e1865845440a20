"""Listening sockets: loopback TCP, a Unix socket, or sockets inherited from the process that started regd.

Other addresses are refused, since regd has neither authentication nor TLS: only this machine may connect.
"""

import contextlib
import errno
import os
import socket
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from regd.storage.files import AlreadyLocked, Files

_BACKLOG = 4_096  # many clients may connect at once; the kernel may lower the value
_PORT_TRIES = 32
_UNIX_PATH_BYTES_MAX = 107  # sockaddr_un without its final NUL (unix(7))
_DESCRIPTORS = "/proc/self/fd"


class ListenError(Exception):
    """regd cannot listen on an address. The message is one line: which address, why, and what to do."""


class InheritedSocket(NamedTuple):
    """A socket that the parent process has opened: its file descriptor, and its name from LISTEN_FDNAMES."""

    file: int
    name: str


@dataclass(slots=True)
class Listeners:
    """The listening sockets of a daemon. Call the `open_` methods or `inherit`, and in the end `close`.

    Attributes:
        sockets: the sockets; `open_tcp` adds one for each address family.
        notes: messages for the log.
    """

    sockets: list[socket.socket] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    _unix: Path | None = None
    _unix_inode: int = 0
    _unix_lock: int | None = None

    @property
    def addresses(self) -> list[str]:
        """The addresses of the sockets, in the form that clients take."""
        return [_address(listener, self._unix) for listener in self.sockets]

    def is_in_place(self) -> bool:
        """Return whether the Unix socket that this process has opened is still at its path."""
        try:
            return self._unix is not None and os.stat(self._unix).st_ino == self._unix_inode
        except OSError:
            return False

    def open_tcp(self, port: int) -> None:
        """Listen on 127.0.0.1 and ::1. Port 0 picks a port that is free on both.

        If this machine has no ::1, listen on 127.0.0.1 only, and add a note.

        Raises:
            ListenError: the port cannot be used.
        """
        for _ in range(_PORT_TRIES):
            four = _tcp(socket.AF_INET, "127.0.0.1", port)
            try:
                six = _tcp(socket.AF_INET6, "::1", four.getsockname()[1])
            except ListenError:
                four.close()
                if port:
                    raise
                continue
            except OSError as error:
                self.notes.append(f"no ::1 here ({error.strerror}); listening on 127.0.0.1 alone")
                self.sockets.append(four)
                return
            self.sockets += [four, six]
            return
        raise ListenError("found no port that is free on 127.0.0.1 and ::1; name one with --port")

    def open_unix(self, path: Path, files: Files) -> None:
        """Listen on a Unix socket to which only this user can connect.

        The socket file of a regd that has crashed is replaced.

        Raises:
            ListenError: the path cannot be used.
        """
        try:
            # The lock prevents two daemons from replacing a stale socket at the same time.
            self._unix_lock = files.lock(path.with_name(path.name + ".lock"))
            self._clear(path)
            self.sockets.append(_unix(path))
            self._unix_inode = os.stat(path).st_ino
        except AlreadyLocked as error:
            do = "name" if error.elsewhere else "stop that one, or name"
            raise ListenError(f"{path} is in use by another regd{error}; {do} another with --unix") from None
        except OSError as error:
            why = error.strerror or str(error)  # the error for a path that is too long has no errno
            raise ListenError(f"cannot listen on {path}: {why}; name another with --unix") from None
        self._unix = path

    def inherit(self, inherited: Sequence[InheritedSocket | socket.socket]) -> None:
        """Use inherited sockets. `close` does not remove the file of a Unix socket.

        Raises:
            ListenError: regd cannot use one of them.
        """
        for item in inherited:
            self.sockets.append(_open_inherited(item) if isinstance(item, InheritedSocket) else item)

    @staticmethod
    def _clear(path: Path) -> None:
        """Remove the socket file of a process that no longer listens.

        Raises:
            ListenError: a program listens on it, or the file is not a socket.
        """
        if not path.is_socket():
            if path.exists():
                raise ListenError(f"{path} exists and is not a socket; name another with --unix")
            return
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe, _short(path) as short:
            try:
                probe.connect(short)
            except ConnectionRefusedError:
                path.unlink()
                return
        raise ListenError(f"{path} is in use by another program; name another with --unix")

    def close(self, files: Files) -> None:
        """Close the sockets, remove the Unix socket that `open_unix` has created, and release its lock."""
        for listener in self.sockets:
            listener.close()
        if self._unix is not None:
            with contextlib.suppress(OSError):
                if self.is_in_place():  # otherwise another regd may listen on this path
                    self._unix.unlink()
            self._unix = None
        if self._unix_lock is not None:
            files.unlock(self._unix_lock)
            self._unix_lock = None


def _tcp(family: socket.AddressFamily, host: str, port: int) -> socket.socket:
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        listener.bind((host, port))
        listener.listen(_BACKLOG)
        listener.setblocking(False)
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            raise ListenError(
                f"port {port} on {host} is taken by another program, or by a regd that runs already; "
                "stop that one, or name another with --port"
            ) from None
        if error.errno == errno.EACCES:
            raise ListenError(
                f"this user may not listen on port {port}; name one from 1024 up with --port"
            ) from None
        raise
    return listener


def _unix(path: Path) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    previous = os.umask(0o177)
    try:
        with _short(path) as short:
            listener.bind(short)
        listener.listen(_BACKLOG)
    except BaseException:
        listener.close()
        raise
    finally:
        os.umask(previous)
    return listener


@contextlib.contextmanager
def _short(path: Path) -> Iterator[str]:
    """Yield a path that fits into a socket address, if need be through a descriptor of its folder."""
    if len(os.fsencode(path)) <= _UNIX_PATH_BYTES_MAX or not os.path.isdir(_DESCRIPTORS):
        yield os.fspath(path)
        return
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"{_DESCRIPTORS}/{folder}/{path.name}"
    finally:
        os.close(folder)


def _open_inherited(inherited: InheritedSocket) -> socket.socket:
    what = f"the inherited socket {inherited.file} ({inherited.name!a})"
    try:
        listener = socket.socket(fileno=inherited.file)
    except OSError as error:
        do = "correct the program that starts regd"
        raise ListenError(f"{what} cannot be used: {error.strerror}; {do}") from None
    try:
        fault = _fault(listener)
        if fault is not None:
            raise ListenError(f"{what} {fault}")
        listener.setblocking(False)
    except BaseException:
        listener.close()
        raise
    return listener


def _fault(listener: socket.socket) -> str | None:
    """Return why regd cannot use an inherited socket, and how to correct the .socket unit; None if it can."""
    if listener.family not in (socket.AF_INET, socket.AF_INET6, socket.AF_UNIX):
        return "is neither TCP nor Unix; give ListenStream= an address of loopback, or a path"
    if listener.type != socket.SOCK_STREAM or listener.proto not in (0, socket.IPPROTO_TCP):
        return "is neither a TCP nor a Unix stream socket; use ListenStream="
    if not listener.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
        return "does not listen; use ListenStream= and Accept=no"
    name = listener.getsockname()
    if listener.family == socket.AF_UNIX:
        if isinstance(name, bytes) or not os.path.isabs(name):
            return "has no path by which clients can reach it; use ListenStream=/PATH"
    elif not (name[0] == "::1" or name[0].startswith("127.")):
        do = f"use ListenStream=127.0.0.1:{name[1]}"
        return f"listens on {name[0]}, but regd takes loopback addresses only; {do}"
    return None


def _address(listener: socket.socket, unix: Path | None) -> str:
    """Return the address of a listener. `unix` is the path of a Unix socket that `open_unix` has opened."""
    name = listener.getsockname()
    if listener.family == socket.AF_UNIX:
        return f"unix://{unix or name}"  # its name may contain the number of a descriptor
    host = f"[{name[0]}]" if listener.family == socket.AF_INET6 else name[0]
    return f"tcp://{host}:{name[1]}"
