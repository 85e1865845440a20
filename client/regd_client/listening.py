"""A listening socket and its name as one act: no gap in which another process takes the port.

Must not know what is served on it.
"""

import contextlib
import socket
from collections.abc import Generator, Mapping
from types import TracebackType
from typing import Any

from regd_client.arguments import check_seconds, check_service, check_text, check_whole, labels
from regd_client.connector import running_loop
from regd_client.registration import Registration, warn_of
from regd_client.server_hook import addresses
from regd_client.service import DRAIN_S, ServiceLifecycle
from regd_client.watches import Endpoint

BACKLOG = 128


class RegisteredSocket:
    """A socket that listens and is registered. Others reach it at `endpoint`; `close` ends both."""

    def __init__(self, made: socket.socket, registration: Registration, end: contextlib.AsyncExitStack) -> None:
        self.socket = made
        self.registration = registration
        self._end = end

    @property
    def endpoint(self) -> Endpoint:
        return self.registration.endpoint

    @property
    def port(self) -> int:
        return self.endpoint.port

    async def close(self) -> None:
        """Withdraw the name, and then close the socket. Twice is harmless."""
        await self._end.aclose()


class ListenContext:
    """What `listen` returns: to be awaited for a `RegisteredSocket`, or the `async with` around it."""

    def __init__(
        self,
        name: str,
        host: str,
        port: int,
        arguments: dict[str, Any],
        backlog: int,
        drain_s: float,
    ) -> None:
        self._awaited = False
        self._name = name
        self._where = host, port
        self._arguments = arguments
        self._backlog = backlog
        self._drain_s = drain_s
        self._made: RegisteredSocket | None = None

    def __await__(self) -> Generator[Any, None, RegisteredSocket]:
        self._awaited = True
        return self._listen().__await__()

    def __del__(self) -> None:
        if not self._awaited:
            warn_of(f"listen({self._name!r})", self)

    async def __aenter__(self) -> RegisteredSocket:
        self._awaited = True
        self._made = await self._listen()
        return self._made

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._made is not None
        await self._made.close()

    async def _listen(self) -> RegisteredSocket:
        running_loop()
        async with contextlib.AsyncExitStack() as stack:
            made = stack.enter_context(listening_socket(*self._where, self._backlog))
            made.setblocking(False)
            [(host, port)] = addresses([made])
            service = ServiceLifecycle(self._name, port, self._arguments, self._drain_s, patient=False)
            await stack.enter_async_context(service)
            service.opened(host, port)
            return RegisteredSocket(made, await service.registration(), stack.pop_all())


def listening_socket(host: str, port: int, backlog: int) -> socket.socket:
    """Return a socket that listens at an IP address; port 0 is a free one.

    Raises:
        OSError: it cannot be had.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    return socket.create_server((host, port), family=family, backlog=backlog)


def listen(
    name: str,
    port: int = 0,
    *,
    host: str = "127.0.0.1",
    instance: str | None = None,
    meta: Mapping[str, str] | None = None,
    backlog: int = BACKLOG,
    drain_s: float = DRAIN_S,
    timeout: float | None = None,
) -> ListenContext:
    """Listen at `host`, on a free port or on `port`, and register it.

        async with regd_client.listen("runner") as listening:
            server = await asyncio.start_server(answer, sock=listening.socket)

    From then on connections are accepted by the system, and wait for the server. On leaving, and before a server
    on this event loop closes the socket, the name is withdrawn; `drain_s` later the socket closes.

    Without a daemon it tries to register for 5 s, or for `timeout` seconds.

    Raises:
        OSError: the port cannot be had.
        Conflict: another owner has the name, and lives.
        Unavailable: no daemon answers.
    """
    check_service(name, instance)
    check_whole("port", port, required=True)
    check_text("host", host, required=True)
    check_whole("backlog", backlog, required=True)
    check_seconds("drain_s", drain_s)
    check_seconds("timeout", timeout)
    arguments = {"instance": instance, "meta": labels(meta), "timeout": timeout}
    return ListenContext(name, host, port, arguments, backlog, drain_s)
