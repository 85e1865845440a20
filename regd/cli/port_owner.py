"""Finds out whether a listening socket belongs to the command of `regctl run`.

Any user of this machine could listen on the port before the command does. The kernel identifies the owner of the
socket: by netlink (sock_diag(7)), else in the table /proc/net/tcp.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from regd.system.peer_credentials import question

_NETLINK_SOCK_DIAG = 4
_HEAD = struct.Struct("=IHHII")  # nlmsghdr: length, type, flags, sequence, port
_SOCK_DIAG_BY_FAMILY, _NLMSG_ERROR = 20, 2
_LISTEN = 10  # TCP_LISTEN, 0A in the table
_STATE_AT = _HEAD.size + 1
_OWNER = struct.Struct("=II")  # uid and inode
_OWNER_AT = _HEAD.size + 4 + 48 + 12  # in an inet_diag_msg: after sockid, expiry and two queue lengths
_ANSWER_S = 1.0  # the kernel normally answers at once
_ROOT = 0
_OVERFLOW = 65_534  # the uid that the kernel reports for every user that a user namespace does not map
_ALL_USERS = 2**32 - 1


@dataclass(frozen=True, slots=True)
class Listener:
    """A listening socket: the user that created it, and its inode, which identifies it in /proc/PID/fd."""

    uid: int
    inode: int


def listener(host: str, port: int) -> Listener | None:
    """Return the socket that accepts connections to a port of 127.0.0.1 or ::1; None if there is none.

    Raises:
        OSError: the kernel does not answer.
    """
    try:
        return _by_netlink(host, port)
    except (OSError, AttributeError):  # AttributeError: not Linux
        return _by_table(host, port)


def _by_netlink(host: str, port: int) -> Listener | None:
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _NETLINK_SOCK_DIAG) as netlink:
        netlink.settimeout(_ANSWER_S)
        netlink.send(question((host, port), (host, 0)))
        answer = netlink.recv(8_192)
    kind = _HEAD.unpack_from(answer)[1]
    if kind == _SOCK_DIAG_BY_FAMILY and len(answer) >= _OWNER_AT + _OWNER.size:
        return Listener(*_OWNER.unpack_from(answer, _OWNER_AT)) if answer[_STATE_AT] == _LISTEN else None
    if kind == _NLMSG_ERROR:
        [number] = struct.unpack_from("=i", answer, _HEAD.size)
        if number == -2:  # ENOENT
            return None
        raise OSError(-number, os.strerror(-number))
    raise OSError(f"unexpected netlink message {kind}")


def _by_table(host: str, port: int) -> Listener | None:
    """Return the socket from the text table ("proc_net_tcp" in the kernel's documentation); None if not there."""
    listeners: dict[str, Listener] = {}
    for name in ("tcp", "tcp6"):
        for row in Path("/proc/net", name).read_text("ascii").splitlines()[1:]:
            fields = row.split()
            if int(fields[3], 16) == _LISTEN:
                listeners[fields[1]] = Listener(int(fields[7]), int(fields[9]))
    closest_first = ("::1", "::") if ":" in host else (host, f"::ffff:{host}", "0.0.0.0", "::")
    addresses = (_hex(address, port) for address in closest_first)
    return next((listeners[address] for address in addresses if address in listeners), None)


def _hex(host: str, port: int) -> str:
    """Return an address in the format of the table: words of four bytes in native byte order."""
    packed = socket.inet_pton(socket.AF_INET6 if ":" in host else socket.AF_INET, host)
    words = struct.unpack(f"={len(packed) // 4}I", packed)
    return "".join(f"{word:08X}" for word in words) + f":{port:04X}"


def is_of(command: int, at: Listener) -> bool:
    """Return whether a socket may belong to a command; `command` is its process id.

    The socket may belong to it if a process of the command has the socket open, or if the owner of the socket is
    root, this user, or a user as whom a process of the command runs (`sudo`). The owner alone is enough, because
    the socket of a container's port or of a daemonized program is not open in a process of the command, and
    because root and this user control the command anyway.
    """
    trusted = {_ROOT, os.geteuid()}
    if at.uid != _OVERFLOW or _all_users_are_mapped():
        if at.uid in trusted:
            return True
        if any(at.uid in _users(process) for process in _processes(command)):
            return True
    return any(at.inode in _inodes(process) for process in _processes(command))


def _all_users_are_mapped() -> bool:
    try:
        rows = Path("/proc/self/uid_map").read_text("ascii").splitlines()
    except OSError:
        return False
    return sum(int(row.split()[2]) for row in rows) >= _ALL_USERS


def _processes(command: int) -> Iterator[int]:
    """Yield the process ids of the command and its descendants."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                stat = (entry / "stat").read_bytes()
            except OSError:
                continue  # the process has ended
            parent = int(stat.rpartition(b")")[2].split()[1])  # after the name, which may contain blanks
            children.setdefault(parent, []).append(int(entry.name))
    rest = [command]
    while rest:
        process = rest.pop()
        yield process
        rest.extend(children.get(process, ()))


def _users(process: int) -> set[int]:
    """Return the real, effective, saved and file-system uid of a process."""
    try:
        status = Path(f"/proc/{process}/status").read_text(errors="replace")
    except OSError:
        return set()
    [ids] = [line for line in status.splitlines() if line.startswith("Uid:")]
    return set(map(int, ids.split()[1:]))


def _inodes(process: int) -> set[int]:
    """Return the inodes of a process's open sockets; none if this user may not see them."""
    inodes: set[int] = set()
    try:
        entries = os.listdir(f"/proc/{process}/fd")
    except OSError:
        return inodes
    for entry in entries:
        with contextlib.suppress(OSError):  # the process has closed it
            target = os.readlink(f"/proc/{process}/fd/{entry}")
            if target.startswith("socket:["):
                inodes.add(int(target[8:-1]))
    return inodes
