"""Identify the user at the other end of a connection, and decide which users may write.

For a Unix socket, the kernel returns the peer's user with SO_PEERCRED (unix(7)). For a loopback TCP connection,
netlink returns the owner of the peer's socket in constant time (sock_diag(7), linux/inet_diag.h). Without
netlink, regd reads the text table /proc/net/tcp, which takes time in proportion to the number of sockets. In a
user namespace, all unmapped users have the same uid (user_namespaces(7)), which therefore identifies no user.
"""

import errno
import logging
import os
import select
import socket
import struct
import sys
from collections.abc import Callable, Collection, Sequence

from regd.system.listener import ListenError

log = logging.getLogger("regd")

ROOT = 0
ALL_USERS = 2**32 - 1  # the number of uids; as a uid it is invalid (-1)

_OVERFLOW_UID = 65_534  # the default of /proc/sys/kernel/overflowuid
_LINUX = sys.platform == "linux"

_NETLINK_SOCK_DIAG = 4
_SOCK_DIAG_BY_FAMILY = 20
_NLMSG_ERROR = 2
_NLM_F_REQUEST = 1
_TCP_LISTEN = 10
_ANY = 0xFFFF_FFFF  # as the states: all; as the cookie: none
_HEAD = struct.Struct("=IHHII")  # nlmsghdr: length, type, flags, sequence, port
_REQUEST = struct.Struct("=BBBBI")  # inet_diag_req_v2: family, protocol, extensions, padding, states
_PORTS = struct.Struct("!HH")  # inet_diag_sockid starts with the source and the destination port; …
_REST = struct.Struct("=III")  # … then come both addresses, of 16 bytes each, the interface and the cookie
_STATE_AT = _HEAD.size + 1  # in an inet_diag_msg: family, state, timer, retransmissions, and the sockid
_ID_AT = _HEAD.size + 4
_ID_BYTES = _PORTS.size + 32  # the part that identifies a connection
_OWNER = struct.Struct("=II")  # uid and inode
_OWNER_AT = _ID_AT + _ID_BYTES + _REST.size + 12  # 12: expiry and the lengths of two queues
_ANSWER_S = 1.0  # the kernel normally answers at once

End = tuple[str, int]  # an address and a port
Ask = Callable[[End, End], int | None]


def unmapped_uid() -> int | None:
    """Return the uid that all unmapped users have in this namespace; None if all users are mapped.

    Source: user_namespaces(7), "Unmapped user and group IDs".
    """
    try:
        with open(_UID_MAP, "rb") as file:
            mapped = sum(int(line.split()[2]) for line in file)
    except FileNotFoundError:
        # Without user namespaces, all users are mapped. Without /proc, nothing is known.
        mapped = ALL_USERS if not _LINUX or os.path.isdir("/proc/self") else 0
    except (OSError, ValueError, IndexError):
        mapped = 0
    if mapped >= ALL_USERS:
        return None
    try:
        with open(_OVERFLOW, "rb") as file:
            return int(file.read())
    except (OSError, ValueError):
        return _OVERFLOW_UID


class PeerCredentials:
    """Identifies the users at the other ends of connections.

    Root, the daemon's own user and the users in `allowed` may write; with `anyone`, all users may.
    """

    def __init__(self, allowed: Collection[int] = (), *, anyone: bool = False) -> None:
        self._unmapped: int | None = None  # the uid of all unmapped users
        self._may_write = {ROOT, os.geteuid(), *allowed} - {ALL_USERS}
        self._anyone = anyone
        self._cannot_identify = False  # this is a system other than Linux, which does not identify TCP peers
        self._ask: Ask | None = None
        self._netlink: socket.socket | None = None

    def open(self, listeners: Sequence[socket.socket]) -> None:
        """Find out which users are mapped, and how to query the kernel. `listeners` serve to try the queries.

        Raises:
            ListenError: on Linux, the kernel does not identify TCP peers, and not every user may write.
        """
        self._unmapped = unmapped_uid()
        self._may_write -= {self._unmapped}
        if self._anyone:
            log.warning("every user of this machine may write (--allow-any-user)")
        elif os.geteuid() == self._unmapped:
            log.warning(
                "the user that regd runs as is not mapped in this user namespace (%s), so its programs may only "
                "read; map it, as `unshare --map-root-user` does",
                _UID_MAP,
            )
        tcp = [listener for listener in listeners if listener.family != socket.AF_UNIX]
        if not tcp:
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
        if is_in_table(here):
            self._ask = by_table
        elif not _LINUX:
            self._cannot_identify = True
            if not self._anyone:
                log.warning("this system cannot identify TCP peers: any user of this machine may write")
        elif not self._anyone:
            raise ListenError(
                "cannot tell which user is at the other end of a TCP connection: this process has neither "
                "AF_NETLINK nor /proc/net/tcp; listen on a Unix socket alone with --port off --unix PATH, "
                "or let every user of this machine write with --allow-any-user"
            )

    def close(self) -> None:
        """Stop identifying TCP peers. Idempotent."""
        self._ask = None
        if self._netlink is not None:
            self._netlink.close()
            self._netlink = None

    def uid_of(self, connection: socket.socket) -> int | None:
        """Return the user at the other end; None if it is unknown."""
        if connection.family == socket.AF_UNIX:
            return self._known(_unix_uid(connection))
        try:
            return self.uid_of_tcp_peer(connection.getpeername()[:2], connection.getsockname()[:2])
        except OSError:
            return None  # the peer has closed the connection

    def uid_of_tcp_peer(self, peer: End, own: End) -> int | None:
        """Return the user whose socket at `peer` is connected to the one at `own`; None if it is unknown."""
        if self._ask is None:
            return None
        try:
            return self._known(self._ask(peer, own))
        except OSError:
            return None

    def uid_of_udp_peer(self, peer: End, own: End) -> int | None:
        """Return the user whose socket at `peer` gets datagrams from `own`; None if it is unknown.

        The kernel looks the socket up as for a datagram that is sent from `own` to `peer`.
        """
        if self._netlink is None:
            return None
        try:
            row = self._row(own, peer, socket.IPPROTO_UDP)
        except OSError:
            return None
        return self._known(owner(row)) if has_source_port(row, peer[1]) else None

    def _known(self, uid: int | None) -> int | None:
        return None if uid in (self._unmapped, ALL_USERS) else uid

    def is_gone(self, connection: socket.socket) -> bool:
        """Return whether no process has the other end open; False if that is unknown.

        From this end, a TCP peer that has closed its socket looks like one that has only stopped sending. So the
        kernel is asked for the peer's socket: if no process has it open, it has no inode, or does not exist.
        """
        if connection.fileno() < 0:
            return True
        poll = select.poll()
        # poll() always reports POLLHUP (both sides are closed) and POLLERR (the connection was reset).
        poll.register(connection.fileno(), 0)
        if poll.poll(0):
            return True
        if connection.family == socket.AF_UNIX:
            return False
        try:
            peer, own = connection.getpeername()[:2], connection.getsockname()[:2]
            if self._netlink is not None:
                row = self._row(peer, own)
                return not (is_connection(row, peer, own) and _OWNER.unpack_from(row, _OWNER_AT)[1])
            return self._ask is by_table and by_table(peer, own) is None
        except OSError:
            return False  # unknown

    def may_write(self, uid: int | None) -> bool:
        """Return whether this user may write. An unknown user may write only if no user can be identified."""
        return self._anyone or uid in self._may_write or (uid is None and self._cannot_identify)

    # Netlink.

    def _by_netlink(self, peer: End, own: End) -> int | None:
        row = self._row(peer, own)
        # If there is no such connection, the answer is a listener on that port.
        if not is_connection(row, peer, own):
            return None
        return owner(row)

    def _row(self, source: End, destination: End, protocol: int = socket.IPPROTO_TCP) -> bytes:
        """Return the kernel's reply about one socket; b"" if there is no such socket."""
        assert self._netlink is not None
        self._netlink.send(question(source, destination, protocol))
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


def question(source: End, destination: End, protocol: int = socket.IPPROTO_TCP) -> bytes:
    """Return the netlink message that asks for the socket from `source` to `destination`."""
    request = _REQUEST.pack(_family(source[0]), protocol, 0, 0, _ANY)
    body = request + _id(source, destination) + _REST.pack(0, _ANY, _ANY)
    return _HEAD.pack(_HEAD.size + len(body), _SOCK_DIAG_BY_FAMILY, _NLM_F_REQUEST, 0, 0) + body


def is_connection(row: bytes, source: End, destination: End) -> bool:
    """Return whether a netlink reply is about this connection, whose addresses may be IPv4-mapped IPv6 ones."""
    if len(row) < _OWNER_AT + _OWNER.size or row[_STATE_AT] == _TCP_LISTEN:
        return False
    answered = row[_ID_AT : _ID_AT + _ID_BYTES]
    ids = [_id(source, destination)]
    if _family(source[0]) == socket.AF_INET:
        ids.append(_id(*((f"::ffff:{host}", port) for host, port in (source, destination))))
    return answered in ids


def has_source_port(row: bytes, port: int) -> bool:
    """Return whether a netlink reply is about a socket that is bound to this port."""
    return len(row) >= _OWNER_AT + _OWNER.size and _PORTS.unpack_from(row, _ID_AT)[0] == port


def owner(row: bytes) -> int | None:
    """Return the owner of a socket; None if no process has it open, since the owner is unreliable then."""
    if len(row) < _OWNER_AT + _OWNER.size:
        return None
    uid, inode = _OWNER.unpack_from(row, _OWNER_AT)
    return int(uid) if inode else None


def _unix_uid(connection: socket.socket) -> int | None:
    if not hasattr(socket, "SO_PEERCRED"):  # not Linux: the file mode of the socket excludes other users
        return os.geteuid()
    try:
        credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
        return int(struct.unpack("=iII", credentials)[1])
    except (OSError, struct.error):
        return None


# The text table ("proc_net_tcp" in the kernel's documentation).

_TABLES = ("/proc/net/tcp", "/proc/net/tcp6")
_UID_MAP = "/proc/self/uid_map"
_OVERFLOW = "/proc/sys/kernel/overflowuid"


def by_table(peer: End, own: End) -> int | None:
    """Return the owner of the socket of `peer` that is connected to `own`; None if there is no such socket."""
    for table in _TABLES:
        rows = _rows(table)
        for mapped in ("", "::ffff:") if table == _TABLES[1] else ("",):
            if mapped and _family(peer[0]) == socket.AF_INET6:
                continue
            addresses = [_hex(mapped + host, port) for host, port in (peer, own)]
            for fields in rows:
                if fields[1:3] == addresses and int(fields[3], 16) != _TCP_LISTEN:
                    return int(fields[7]) if int(fields[9]) else None
    return None


def is_in_table(listener: End) -> bool:
    """Return whether the text tables can be read, and contain this listening socket."""
    address = _hex(*listener)
    return any(
        fields[1] == address and int(fields[3], 16) == _TCP_LISTEN for table in _TABLES for fields in _rows(table)
    )


def _rows(table: str) -> list[list[str]]:
    try:
        with open(table, encoding="ascii") as file:
            return [row.split() for row in file.read().splitlines()[1:]]
    except OSError:
        return []


def _hex(host: str, port: int) -> str:
    """Return an address in the format of the table: words of four bytes in native byte order."""
    packed = socket.inet_pton(_family(host), host)
    words = struct.unpack(f"={len(packed) // 4}I", packed)
    return "".join(f"{word:08X}" for word in words) + f":{port:04X}"
