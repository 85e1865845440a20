"""Detect whether the peer of a Unix socket is in another network or pid namespace (namespaces(7)).

There, loopback addresses and process ids have another meaning. A TCP peer is in the daemon's network namespace,
since it has reached a loopback address. Its pid namespace is unknown, so `hello` returns the daemon's, for the
client to compare.
"""

import os
import socket
import struct
from dataclasses import dataclass

_SO_NETNS_COOKIE = 71  # asm-generic/socket.h, since Linux 5.14; for a Unix socket, the peer's namespace


@dataclass(frozen=True, slots=True)
class Elsewhere:
    """Which namespaces of a peer differ from those of this process. False may also mean that it is unknown."""

    network: bool = False
    pid: bool = False


HERE = Elsewhere()


def elsewhere(connection: socket.socket) -> Elsewhere:
    """Return which namespaces of the peer differ from those of this process."""
    if connection.family != socket.AF_UNIX:
        return HERE
    return Elsewhere(network=_network(connection), pid=_pid(connection))


def own_pid_namespace() -> str | None:
    """Return an identifier of this process's pid namespace; None if the system does not provide it."""
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return None


def _network(connection: socket.socket) -> bool:
    try:
        with socket.socket(socket.AF_UNIX) as own:
            return _cookie(connection) != _cookie(own)
    except OSError:
        return False


def _cookie(sock: socket.socket) -> int:
    [cookie] = struct.unpack("=Q", sock.getsockopt(socket.SOL_SOCKET, _SO_NETNS_COOKIE, 8))
    return int(cookie)


def _pid(connection: socket.socket) -> bool:
    try:
        credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
        [pid, _, _] = struct.unpack("=iII", credentials)
        # 0: the peer has no process id in this namespace.
        return pid == 0 or os.readlink(f"/proc/{pid}/ns/pid") != os.readlink("/proc/self/ns/pid")
    except (OSError, AttributeError, struct.error):
        return False
