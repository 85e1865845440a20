"""The port of a service that names none: the one that it had last, else a free one that stays free.

Such a port is outside the ephemeral range, from which the system serves programs that ask for any port. So it is
free again when the service starts the next time.
"""

from __future__ import annotations

import contextlib
import random
import socket
import time
from collections.abc import Iterable, Mapping
from typing import Any

from regd_client.arguments import AUTO
from regd_client.replicas import is_number

__all__ = [
    "LastPorts",
    "bind_alone",
    "ephemeral_range",
    "free_ports",
    "listening_socket",
    "listening_socket_at_one",
]

_SEARCH_S = 0.5  # for the pages of a long history
_PORT_MIN = 10_000  # below are the usual ports of well-known servers
_TRIES = 100
_RANGE = "/proc/sys/net/ipv4/ip_local_port_range"
_IANA_RANGE = (49_152, 65_535)  # RFC 6335, section 6
_random = random.Random()  # a program may have seeded the module's own


class LastPorts:
    """The ports that a service had last, found by requests to the daemon.

        last = LastPorts("web", None)
        while last.request is not None:
            last.add(connection.ask(*last.request))

    Attributes:
        request: the next command and its arguments, None at the end.
    """

    def __init__(self, name: str, instance: str | None) -> None:
        self._name = name
        self._instance = None if instance == AUTO else instance or ""
        self._ports: dict[str, int] = {}  # by instance
        self._until = time.monotonic() + _SEARCH_S
        self._before: int | None = None
        self.request: tuple[str, dict[str, Any]] | None = self._history()

    def _history(self) -> tuple[str, dict[str, Any]]:
        limit = 1 if self._instance is not None else None
        return "history", {"name": self._name, "instance": self._instance, "before": self._before, "limit": limit}

    def add(self, reply: Mapping[str, Any]) -> None:
        """Take the reply to the request."""
        assert self.request is not None
        if self.request[0] == "list":
            self._take(reply["instances"])
            self.request = None
            return
        self._take(reversed(reply["changes"]))
        before = reply.get("next")
        if self._ports:
            self.request = None
        elif before is None or before == self._before or time.monotonic() > self._until:
            # A registration may be older than the history.
            self.request = "list", {"name": self._name}
        else:
            self._before = before
            self.request = self._history()

    def _take(self, entries: Iterable[Mapping[str, Any]]) -> None:
        for entry in entries:
            if self._instance in (None, entry["instance"]):
                self._ports.setdefault(entry["instance"], entry["port"])

    @property
    def ports(self) -> list[int]:
        """The ports to try: that of the instance; for `auto` those of all copies, the lowest number first."""
        if self._instance is not None:
            return list(self._ports.values())
        numbers = sorted(int(instance) for instance in self._ports if is_number(instance))
        return [self._ports[str(number)] for number in numbers]


def ephemeral_range() -> tuple[int, int]:
    """Return the first and the last port that the system gives to programs that ask for any port."""
    try:
        with open(_RANGE) as file:
            first, last = map(int, file.read().split())
    except (OSError, ValueError):
        return _IANA_RANGE
    return first, last


def free_ports() -> list[int]:
    """Return ports outside the ephemeral range, in random order, for a caller to try; [] if it leaves none."""
    first, last = ephemeral_range()
    ports = [*range(_PORT_MIN, first), *range(max(last + 1, _PORT_MIN), 65_536)]
    return _random.sample(ports, min(_TRIES, len(ports)))


def bind_alone(sock: socket.socket, address: tuple[str, int]) -> None:
    """Bind to an address that no other socket is bound to. From then on sockets with SO_REUSEADDR may share it.

    With SO_REUSEADDR from the beginning, it could be a port that `regctl run` reserves: sockets that
    have the option share a port until one of them listens (socket(7)).

    Raises:
        OSError: the address is in use, also by connections that ended a minute ago.
    """
    sock.bind(address)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)


def listening_socket(host: str, port: int, backlog: int) -> socket.socket:
    """Return a socket that listens at an IP address; port 0 is any free one.

    Raises:
        OSError: the address is in use, not this machine's, or not allowed.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    return socket.create_server((host, port), family=family, backlog=backlog)


def listening_socket_at_one(host: str, ports: Iterable[int], backlog: int) -> socket.socket:
    """Return a socket that listens at the first of these ports that is free, else at one that stays free.

    Raises:
        OSError: the address is not this machine's, or no port is free.
    """
    for port in ports:
        with contextlib.suppress(OSError):
            return listening_socket(host, port, backlog)
    for port in free_ports():
        with contextlib.ExitStack() as stack, contextlib.suppress(OSError):
            sock = stack.enter_context(socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET))
            if ":" in host:
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)  # as create_server does
            bind_alone(sock, (host, port))
            sock.listen(backlog)
            stack.pop_all()
            return sock
    return listening_socket(host, 0, backlog)
