"""Which user is at the other end of a connection, and who may write.

A Unix socket knows its peer (unix(7), SO_PEERCRED). Of a loopback TCP connection the kernel is asked for the
peer's own end, by netlink (sock_diag(7), linux/inet_diag.h): one question and one answer, where the text table
would cost time in proportion to all sockets. Where there is no such netlink, the text table it is.
Must not know lines.
"""

import errno
import logging
import os
import socket
import struct
from collections.abc import Callable, Collection, Sequence

log = logging.getLogger("regd")

ROOT = 0

_NETLINK_SOCK_DIAG = 4
_SOCK_DIAG_BY_FAMILY = 20
_NLMSG_ERROR = 2
_NLM_F_REQUEST = 1
_TCP_LISTEN = 10
_ANY = 0xFFFF_FFFF  # any state; and no cookie
_HEAD = struct.Struct("=IHHII")  # nlmsghdr: length, type, flags, sequence, port
_ASKED = struct.Struct("=BBBBI")  # inet_diag_req_v2: family, protocol, extensions, padding, states
_PORTS = struct.Struct("!HH")  # inet_diag_sockid begins: source, destination, then both addresses in 16 bytes
_REST = struct.Struct("=III")  # … and ends: interface, cookie
_STATE_AT = _HEAD.size + 1  # in an inet_diag_msg: family, state, timer, retransmissions, and the sockid
_ID_AT = _HEAD.size + 4
_ID_BYTES = _PORTS.size + 32  # as far as it tells connections apart
_OWNER = struct.Struct("=II")  # uid and inode
_OWNER_AT = _ID_AT + _ID_BYTES + _REST.size + 12  # behind expiry and the two queues
_ANSWER_S = 1.0  # the kernel answers within the call

End = tuple[str, int]  # an address and a port
Ask = Callable[[End, End], int | None]


class Peers:
    """`allowed` are the users that may write, besides root and the daemon's own."""

    def __init__(self, allowed: Collection[int] = ()) -> None:
        self._may_write = {ROOT, os.geteuid(), *allowed}
        self._ask: Ask | None = None
        self._netlink: socket.socket | None = None

    def open(self, listeners: Sequence[socket.socket]) -> None:
        """Find out how the system can be asked, by asking for a socket that is known to be there."""
        tcp = [each for each in listeners if each.family != socket.AF_UNIX]
        if not tcp:  # a Unix socket knows its peer
            return
        here: End = tcp[0].getsockname()[:2]
        try:
            self._netlink = socket.socket(
                socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _NETLINK_SOCK_DIAG
            )
            self._netlink.settimeout(_ANSWER_S)
            if owner(self._row(here, (here[0], 0))) is not None:
                self._ask = self._by_netlink
                return
        except (OSError, AttributeError):  # AttributeError: not Linux
            pass
        self.close()
        if any(os.path.exists(table) for table in _TABLES):
            self._ask = by_table
            return
        log.warning("this system does not tell whose a connection is: any user of this machine may write")

    def close(self) -> None:
        """Twice is harmless."""
        self._ask = None
        if self._netlink is not None:
            self._netlink.close()
            self._netlink = None

    def uid_of(self, connection: socket.socket) -> int | None:
        """Return the user at the other end, None where nobody can tell."""
        if connection.family == socket.AF_UNIX:
            return _unix_uid(connection)
        if self._ask is None:
            return None
        try:
            return self._ask(connection.getpeername()[:2], connection.getsockname()[:2])
        except OSError:
            return None  # the peer has gone already

    def may_write(self, uid: int | None) -> bool:
        """Whether this user may write; one that is unknown may where the system tells of nobody."""
        return uid in self._may_write or (uid is None and self._ask is None)

    # Netlink.

    def _by_netlink(self, theirs: End, ours: End) -> int | None:
        row = self._row(theirs, ours)
        # The answer may be another socket: where no connection fits, a listener on that port does.
        if not is_connection(row, theirs, ours):
            return None
        return owner(row)

    def _row(self, source: End, destination: End) -> bytes:
        """Return what the kernel says of one socket, empty when there is none."""
        assert self._netlink is not None
        self._netlink.send(question(source, destination))
        while True:
            answer = self._netlink.recv(8_192)
            length, kind, *_ = _HEAD.unpack_from(answer)
            if kind == _SOCK_DIAG_BY_FAMILY:
                return answer[:length]
            if kind == _NLMSG_ERROR:
                [number] = struct.unpack_from("=i", answer, _HEAD.size)
                if -number != errno.ENOENT:
                    raise OSError(-number, os.strerror(-number))
                return b""


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET


def _id(source: End, destination: End) -> bytes:
    packed = (socket.inet_pton(_family(host), host).ljust(16, b"\0") for host, _ in (source, destination))
    return _PORTS.pack(source[1], destination[1]) + b"".join(packed)


def question(source: End, destination: End) -> bytes:
    """Return the netlink message that asks for the TCP socket from `source` to `destination`."""
    asked = _ASKED.pack(_family(source[0]), socket.IPPROTO_TCP, 0, 0, _ANY)
    body = asked + _id(source, destination) + _REST.pack(0, _ANY, _ANY)
    return _HEAD.pack(_HEAD.size + len(body), _SOCK_DIAG_BY_FAMILY, _NLM_F_REQUEST, 0, 0) + body


def is_connection(row: bytes, source: End, destination: End) -> bool:
    """Whether a row is of just this connection, also of a peer that calls itself ::ffff:127.0.0.1."""
    if len(row) < _OWNER_AT + _OWNER.size or row[_STATE_AT] == _TCP_LISTEN:
        return False
    found = row[_ID_AT : _ID_AT + _ID_BYTES]
    ids = [_id(source, destination)]
    if _family(source[0]) == socket.AF_INET:
        ids.append(_id(*((f"::ffff:{host}", port) for host, port in (source, destination))))
    return found in ids


def owner(row: bytes) -> int | None:
    """Return the user whose socket it is. None without an inode: nobody has it open, and it may show root."""
    if len(row) < _OWNER_AT + _OWNER.size:
        return None
    uid, inode = _OWNER.unpack_from(row, _OWNER_AT)
    return int(uid) if inode else None


def _unix_uid(connection: socket.socket) -> int | None:
    try:
        credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
    except (OSError, AttributeError):  # not Linux: the socket's mode has to do
        return os.geteuid()
    return int(struct.unpack("=iII", credentials)[1])


# The text table (proc_net_tcp in the kernel's documentation).

_TABLES = ("/proc/net/tcp", "/proc/net/tcp6")


def by_table(theirs: End, ours: End) -> int | None:
    """Return the owner of the connection from `theirs` to `ours`. A mapped peer stands in the second table."""
    for table in _TABLES:
        try:
            with open(table, encoding="ascii") as file:
                rows = file.read().splitlines()[1:]
        except OSError:
            continue
        for mapped in ("", "::ffff:") if table == _TABLES[1] else ("",):
            if mapped and _family(theirs[0]) == socket.AF_INET6:
                continue
            wanted = [_hex(mapped + host, port) for host, port in (theirs, ours)]
            for row in rows:
                fields = row.split()
                if fields[1:3] == wanted and int(fields[3], 16) != _TCP_LISTEN:
                    return int(fields[7]) if int(fields[9]) else None
    return None


def _hex(host: str, port: int) -> str:
    """Write an end as the table does: words of four bytes in the machine's order."""
    packed = socket.inet_pton(_family(host), host)
    words = struct.unpack(f"={len(packed) // 4}I", packed)
    return "".join(f"{word:08X}" for word in words) + f":{port:04X}"
