"""Probes the services of this machine at the address that other machines use.

A service that was registered on loopback may listen only there. So the bridge connects to it, and tries again
with back-off for as long as it is registered.
"""

import asyncio
import contextlib
import socket
from collections.abc import Callable, Iterable
from typing import Any

from regd.system.probes import met_itself
from regd_client.event_loop import random_s
from regd_client.models import Key
from regd_client.protocol import host_port

__all__ = ["Reachability"]

_PAUSE_S = (0.1, 30.0)  # the first and the longest pause between two attempts
_CONNECT_S = 2.0  # for one attempt
_CONNECTS_MAX = 64  # at a time
_REFUSED = "connection refused"


class _Port:
    def __init__(self, why: str) -> None:
        self.keys: set[Key] = set()
        self.why = why  # why the port is unreachable; "" if it accepts connections
        self.task: asyncio.Task[None] | None = None


class Reachability:
    """The results of the probes, by port.

    Args:
        host: the address of this machine for others.
        on_result: called with the services at a port when its result has changed.
    """

    def __init__(self, host: str, on_result: Callable[[Iterable[Key]], None]) -> None:
        self.host = host
        self._on_result = on_result
        self._ports: dict[int, _Port] = {}
        self._port_of: dict[Key, int] = {}
        self._connecting = asyncio.Semaphore(_CONNECTS_MAX)

    def reason(self, key: Key, port: int, was_reachable: Callable[[], bool]) -> str:
        """Return why a service is not reachable at a port; "" if it is. The first call starts the probes.

        Args:
            was_reachable: whether an earlier bridge has found it reachable, which counts until the first result.
        """
        if self._port_of.get(key) != port:
            self.forget(key)
            self._port_of[key] = port
            if port not in self._ports:
                self._ports[port] = _Port("" if was_reachable() else "it has not been tried yet")
            self._ports[port].keys.add(key)
            self._try(port)
        why = self._ports[port].why
        return why and f"it accepts no connection at {host_port(self.host, port)}: {why}"

    def again(self, key: Key) -> None:
        """Probe the port of a service again, which has changed. Until the result, the last one counts."""
        if key in self._port_of:
            self._try(self._port_of[key])

    def forget(self, key: Key) -> None:
        """Stop probing the port of a service, unless another service has it too. Idempotent."""
        number = self._port_of.pop(key, None)
        if number is None:
            return
        port = self._ports[number]
        port.keys.remove(key)
        if not port.keys:
            if port.task is not None:
                port.task.cancel()
            del self._ports[number]

    def _try(self, number: int) -> None:
        port = self._ports[number]
        if port.task is not None:
            port.task.cancel()
        port.task = asyncio.create_task(self._until_accepted(number, port), name="regd-bridge-probe")

    async def _until_accepted(self, number: int, port: _Port) -> None:
        pause_s, longest_s = _PAUSE_S
        while True:
            async with self._connecting:
                why = await _connect(self.host, number)
            if not port.why and why != _REFUSED:
                why = ""  # a service that is blocked does not answer, and still listens
            if why != port.why:
                port.why = why
                self._on_result(tuple(port.keys))
            if not why:
                return
            await asyncio.sleep(random_s(pause_s / 2, pause_s))
            pause_s = min(2 * pause_s, longest_s)

    async def close(self) -> None:
        """Stop all probes."""
        tasks = [port.task for port in self._ports.values() if port.task is not None]
        self._ports.clear()
        self._port_of.clear()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _connect(host: str, port: int) -> str:
    """Connect to any address of the host, and close the connection. Return why that failed; "" if it did not."""
    why = ""
    try:
        async with asyncio.timeout(_CONNECT_S):
            loop = asyncio.get_running_loop()
            for family, _, _, _, address in await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM):
                why = await _connect_to(family, address)
                if not why:
                    break
    except TimeoutError:
        return "no answer"
    except OSError as error:  # of the look-up
        return (error.strerror or str(error)).lower()
    return why


async def _connect_to(family: int, address: Any) -> str:
    try:
        with contextlib.closing(socket.socket(family, socket.SOCK_STREAM)) as probe:
            probe.setblocking(False)
            await asyncio.get_running_loop().sock_connect(probe, address)
            return _REFUSED if met_itself(probe) else ""
    except ConnectionRefusedError:
        return _REFUSED
    except OSError as error:
        return "no answer" if isinstance(error, TimeoutError) else (error.strerror or str(error)).lower()
