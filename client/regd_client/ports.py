"""Chooses the port of a service that names none: its last port, else a free port that is likely to stay free.

The free port is outside the ephemeral range, from which the system takes a port for a program that asks for any
port. So it is likely to be free again when the service starts the next time.
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

_SEARCH_S = 0.5  # time to read the pages of a long history
_PORT_MIN = 10_000  # lower ports are the usual ports of well-known servers
_TRIES = 100
_RANGE = "/proc/sys/net/ipv4/ip_local_port_range"
_IANA_RANGE = (49_152, 65_535)  # RFC 6335, section 6
_random = random.SystemRandom()  # a program that has seeded `random` keeps its sequence


class LastPorts:
    """The ports that a service had last, found by requests to the daemon.

        last = LastPorts("web", None)
        while last.request is not None:
            last.add(connection.ask(*last.request))

    Attributes:
        request: the next command to send and its arguments; None when no further reply is needed.
    """

    def __init__(self, name: str, instance: str | None) -> None:
        self._name = name
        self._instance = None if instance == AUTO else instance or ""
        self._ports: dict[str, int] = {}  # by instance, from the history
        self._static: dict[str, int] = {}  # by instance, from registrations, which may be older than the history
        self._held: set[int] = set()  # ports to leave to their live owners, even if no owner listens right now
        self._until = time.monotonic() + _SEARCH_S
        self._before: int | None = None
        self.request: tuple[str, dict[str, Any]] | None = ("list", {"name": name})

    def add(self, reply: Mapping[str, Any]) -> None:
        """Process the reply to `request`, and set the next one."""
        if "instances" in reply:
            for entry in reply["instances"]:
                if {"hold", "pid", "ttl"} & entry.keys():
                    self._held.add(entry["port"])
                elif self._is_wanted(entry):
                    self._static[entry["instance"]] = entry["port"]
            self.request = self._history()
            return
        for change in reversed(reply["changes"]):
            if self._is_wanted(change):
                self._ports.setdefault(change["instance"], change["port"])
        before = reply.get("next")
        is_end = before is None or before == self._before or time.monotonic() > self._until
        self._before = before
        self.request = None if self._ports or is_end else self._history()

    def _history(self) -> tuple[str, dict[str, Any]]:
        limit = None if self._instance is None else 1
        return "history", {
            "name": self._name,
            "instance": self._instance,
            "before": self._before,
            "limit": limit,
        }

    def _is_wanted(self, entry: Mapping[str, Any]) -> bool:
        return self._instance is None or self._instance == entry["instance"]

    @property
    def ports(self) -> list[int]:
        """The ports to try: that of the instance; for `auto`, those of all copies in order of their numbers."""
        ports = self._static | self._ports
        if self._instance is None:
            numbers = sorted(int(instance) for instance in ports if is_number(instance))
            ports = {str(number): ports[str(number)] for number in numbers}
        return [port for port in ports.values() if port not in self._held]


def ephemeral_range() -> tuple[int, int]:
    """Return the first and the last port that the system gives to programs that ask for any port."""
    try:
        with open(_RANGE) as file:
            first, last = map(int, file.read().split())
    except (OSError, ValueError):
        return _IANA_RANGE
    return first, last


def free_ports(chooser: random.Random = _random) -> list[int]:
    """Return ports outside the ephemeral range, in random order; [] if there are none."""
    first, last = ephemeral_range()
    ports = [*range(_PORT_MIN, first), *range(max(last + 1, _PORT_MIN), 65_536)]
    return chooser.sample(ports, min(_TRIES, len(ports)))


def bind_alone(sock: socket.socket, address: tuple[str, int]) -> None:
    """Bind a socket to an address that no other socket is bound to. Set SO_REUSEADDR only afterwards.

    With SO_REUSEADDR from the beginning, the port could be one that `regctl run` reserves, because sockets with
    the option share a port until one of them listens (socket(7)).

    Raises:
        OSError: the address is in use, or was used by connections that ended within the last minute.
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
    """Return a socket that listens on the first free port of `ports`, else on one outside the ephemeral range.

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
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)  # as `socket.create_server` does
            bind_alone(sock, (host, port))
            sock.listen(backlog)
            stack.pop_all()
            return sock
    return listening_socket(host, 0, backlog)
