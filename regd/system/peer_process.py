"""Identify the process at the other end of a Unix socket (unix(7), SO_PEERCRED).

Call it when the connection is accepted: later, its process number may belong to another process.
"""

import socket
import struct
from pathlib import Path

from regd.core.model import By

_CREDENTIALS = struct.Struct("=iII")  # struct ucred: pid, uid, gid


def peer_process(connection: socket.socket) -> By | None:
    """Return the number, user and program name of the peer; None if the system does not provide them."""
    if connection.family != socket.AF_UNIX or not hasattr(socket, "SO_PEERCRED"):
        return None
    try:
        data = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
        pid, uid, _ = _CREDENTIALS.unpack(data)
    except (OSError, struct.error):
        return None
    # 0: the process is in another pid namespace, and has no number in this one.
    return By(pid=pid or None, uid=uid, command=_command(pid) if pid else None)


def _command(pid: int) -> str | None:
    """Return the name of a process's program, at most 15 characters (proc(5)); None if it has ended."""
    try:
        name = Path(f"/proc/{pid}/comm").read_bytes().rstrip(b"\n").decode(errors="replace")
    except OSError:
        return None
    return "".join(char if char.isprintable() else "?" for char in name) or None
