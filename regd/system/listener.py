"""Listening sockets: loopback TCP, a Unix socket, or sockets that were opened before regd started.

Other addresses are refused: regd has no authentication and TLS, so only this machine may reach it.
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
    """A socket that the parent process has opened: its file descriptor, and its name in LISTEN_FDNAMES."""

    file: int
    name: str


@dataclass(slots=True)
class Listeners:
    """The listening sockets. `notes` has messages for the log."""

    sockets: list[socket.socket] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    _unix: Path | None = None
    _unix_inode: int = 0
    _unix_lock: int | None = None

    @property
    def addresses(self) -> list[str]:
        return [_address(listener, self._unix) for listener in self.sockets]

    def is_in_place(self) -> bool:
        """Return whether the Unix socket that this process has opened is still at its path."""
        try:
            return self._unix is not None and os.stat(self._unix).st_ino == self._unix_inode
        except OSError:
            return False

    def open_tcp(self, port: int) -> None:
        """Listen on 127.0.0.1 and ::1, on the same port; 0 picks a port that is free on both.

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
        """Listen on a Unix socket that only this user may connect to. Replace the socket file of a crashed regd.

        Raises:
            ListenError: the path cannot be used.
        """
        try:
            # Take a lock, so that two daemons do not race to remove a stale socket.
            self._unix_lock = files.lock(path.with_name(path.name + ".lock"))
            self._clear(path)
            self.sockets.append(_unix(path))
            self._unix_inode = os.stat(path).st_ino
        except AlreadyLocked as error:
            do = "name" if error.elsewhere else "stop that one, or name"
            raise ListenError(f"{path} is in use by another regd{error}; {do} another with --unix") from None
        except OSError as error:
            why = error.strerror or str(error)  # a path that is too long has no errno
            raise ListenError(f"cannot listen on {path}: {why}; name another with --unix") from None
        self._unix = path

    def inherit(self, handed: Sequence[InheritedSocket | socket.socket]) -> None:
        """Use inherited sockets. `close` does not remove the file of a Unix socket.

        Raises:
            ListenError: regd cannot use one of them.
        """
        for entry in handed:
            self.sockets.append(_inherited(entry) if isinstance(entry, InheritedSocket) else entry)

    @staticmethod
    def _clear(path: Path) -> None:
        if not path.is_socket():
            if path.exists():
                raise ListenError(f"{path} is there and is no socket; name another with --unix")
            return
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe, _short(path) as short:
            try:
                probe.connect(short)
            except ConnectionRefusedError:
                path.unlink()
                return
        raise ListenError(f"{path} is in use by another program; name another with --unix")

    def close(self, files: Files) -> None:
        for listener in self.sockets:
            listener.close()
        if self._unix is not None:
            with contextlib.suppress(OSError):
                if self.is_in_place():  # else another regd may listen at this path now
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
    """Yield a path that fits into a socket address: through a descriptor of its folder if `path` is too long."""
    if len(os.fsencode(path)) <= _UNIX_PATH_BYTES_MAX or not os.path.isdir(_DESCRIPTORS):
        yield os.fspath(path)
        return
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"{_DESCRIPTORS}/{folder}/{path.name}"
    finally:
        os.close(folder)


def _inherited(handed: InheritedSocket) -> socket.socket:
    what = f"the inherited socket {handed.file} ({handed.name!a})"
    try:
        listener = socket.socket(fileno=handed.file)
    except OSError as error:
        raise ListenError(f"{what} cannot be used: {error.strerror}; correct what starts regd") from None
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
    """Return why regd cannot use an inherited socket, and the fix in a .socket unit; None if it can."""
    if listener.family not in (socket.AF_INET, socket.AF_INET6, socket.AF_UNIX):
        return "is neither TCP nor Unix; give ListenStream= an address of loopback, or a path"
    if listener.type != socket.SOCK_STREAM or listener.proto not in (0, socket.IPPROTO_TCP):
        return "is no TCP and no Unix stream socket; use ListenStream="
    if not listener.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
        return "does not listen; use ListenStream= and Accept=no"
    name = listener.getsockname()
    if listener.family == socket.AF_UNIX:
        if isinstance(name, bytes) or not os.path.isabs(name):
            return "has no path that a client could be given; use ListenStream=/PATH"
    elif not (name[0] == "::1" or name[0].startswith("127.")):
        return f"listens on {name[0]}, and regd on loopback alone; use ListenStream=127.0.0.1:{name[1]}"
    return None


def _address(listener: socket.socket, unix: Path | None) -> str:
    """Return the address of a listener. `unix` is the path of the Unix socket that regd has opened itself."""
    name = listener.getsockname()
    if listener.family == socket.AF_UNIX:
        return f"unix://{unix or name}"  # the name may go through a descriptor
    host = f"[{name[0]}]" if listener.family == socket.AF_INET6 else name[0]
    return f"tcp://{host}:{name[1]}"
