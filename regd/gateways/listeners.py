"""The sockets of the gateway, on the loopback addresses only."""

import contextlib
import errno
import random
import socket
from collections.abc import Sequence

from regd.system.listener import ListenError
from regd_client.ports import free_ports

__all__ = ["BACKLOG", "bind_at_one", "bind_loopback", "bound_addresses", "ports_to_try"]

_HOSTS = ((socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1"))
BACKLOG = 128  # connections that wait for `accept`; asyncio accepts this many at once
# The kernel's send buffer of a connection. By default it grows to 4 MB for a client that does not read.
_UNSENT_BYTES = 262_144
# The receive buffer for datagrams; the system may permit less. The default has room for about 270 queries. That
# is not enough for a proxy that asks for all addresses at once: nginx sends 400 queries for 200 instances, and
# waits 5 s if one is lost.
_RECEIVE_BYTES = 1_048_576
_PORT_TRIES = 32  # attempts to find a port that is free on all addresses


def ports_to_try(option: int | str | None, default: int, project: str) -> list[int]:
    """Return the ports that a server should try, in order; [] if the server is turned off.

    The order of a project's ports depends only on its path. So the project has the same port at every start,
    unless another program has taken it, and bookmarks stay valid.

    Args:
        option: the value of the option: a port, "off", or None if it is not given.
        default: the port if there is no project.
        project: the folder of the project registry, or "".
    """
    if option == "off":
        return []
    if isinstance(option, int):
        return [option]
    return [*free_ports(random.Random(f"{project} {default}")), 0] if project else [default]


def bind_at_one(ports: Sequence[int], types: Sequence[socket.SocketKind], option: str) -> list[socket.socket]:
    """Return sockets bound to the first free port of `ports`. See `bind_loopback`.

    Raises:
        ListenError: no port of `ports` is free.
    """
    for port in ports[:-1]:
        with contextlib.suppress(ListenError):
            return bind_loopback(port, types, option)
    return bind_loopback(ports[-1], types, option)


def bind_loopback(port: int, types: Sequence[socket.SocketKind], option: str) -> list[socket.socket]:
    """Return sockets of each type bound to one port on 127.0.0.1 and ::1. TCP sockets listen.

    Args:
        port: 0 picks a port that is free on all addresses.
        types: `SOCK_STREAM`, `SOCK_DGRAM`.
        option: the command-line option that sets the port, for the error message.

    Raises:
        ListenError: the port is taken.
    """
    for _ in range(1 if port else _PORT_TRIES):
        try:
            return _bind_all(port, types)
        except OSError as error:
            if error.errno == errno.EADDRINUSE and not port:
                continue
            why = "is taken by another program" if error.errno == errno.EADDRINUSE else f"cannot be used: {error}"
            raise ListenError(
                f"port {port} {why}; name another with {option}, or turn it off: {option} off"
            ) from None
    raise ListenError(f"found no port that is free on 127.0.0.1 and ::1; name one with {option}")


def _bind_all(port: int, types: Sequence[socket.SocketKind]) -> list[socket.socket]:
    sockets: list[socket.socket] = []
    try:
        for family, host in _HOSTS:
            for type in types:
                try:
                    sockets.append(_bind(family, host, port, type))
                except OSError as error:
                    if family == socket.AF_INET6 and error.errno in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                        continue  # this machine has no ::1
                    raise
                port = sockets[0].getsockname()[1]
    except BaseException:
        for sock in sockets:
            sock.close()
        raise
    return sockets


def _bind(family: socket.AddressFamily, host: str, port: int, type: socket.SocketKind) -> socket.socket:
    # asyncio turns Nagle's algorithm off only if the protocol is named. With Nagle, a response takes 40 ms.
    sock = socket.socket(family, type, socket.IPPROTO_TCP if type == socket.SOCK_STREAM else socket.IPPROTO_UDP)
    try:
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        if type == socket.SOCK_STREAM:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _UNSENT_BYTES)  # connections inherit it
        else:
            with contextlib.suppress(OSError):  # a smaller buffer works too
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _RECEIVE_BYTES)
        sock.bind((host, port))
        if type == socket.SOCK_STREAM:
            sock.listen(BACKLOG)
        sock.setblocking(False)
    except BaseException:
        sock.close()
        raise
    return sock


def bound_addresses(scheme: str, sockets: Sequence[socket.socket]) -> list[str]:
    """Return the addresses of the sockets as URLs, without duplicates."""
    names = [sock.getsockname() for sock in sockets]
    urls = [
        f"{scheme}://[{name[0]}]:{name[1]}" if ":" in name[0] else f"{scheme}://{name[0]}:{name[1]}"
        for name in names
    ]
    return list(dict.fromkeys(urls))
