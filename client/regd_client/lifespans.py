"""Register a service once its server has opened the port, and withdraw it before the server closes the port.

Servers run start-up hooks before they open the port, and shutdown hooks after they have closed it. If these hooks
registered and withdrew the name, clients could resolve it while the port is closed.
"""

import asyncio
import contextlib
import socket
import sys
import time
from collections.abc import AsyncIterator, Generator, Mapping
from dataclasses import replace
from typing import Any, Self

from regd_client.arguments import RegistrationRequest, check_integer, check_seconds, check_text
from regd_client.client import Client
from regd_client.connector import Patience
from regd_client.errors import BadArgument, RegdError, Unavailable
from regd_client.event_loop import pause, random_s, running_loop
from regd_client.logger import log
from regd_client.models import Endpoint, State
from regd_client.ports import LastPorts, listening_socket, listening_socket_at_one
from regd_client.protocol import host_port
from regd_client.readiness import Ready, check_ready, discard, mark_ready, until_ready
from regd_client.registration import Registration, RegistrationContext, warn_not_awaited
from regd_client.server_hook import ListenHook, addresses
from regd_client.signals import held_until

__all__ = [
    "DRAIN_S",
    "LifespanContext",
    "ListenContext",
    "RegisteredSocket",
    "ServiceLifecycle",
    "lifespan",
    "listen",
]

BACKLOG = 128
DRAIN_S = 0.1
_PAUSE_S = 0.5  # maximum random pause between attempts to register
_REGISTERING_S = 1.0  # when the service is withdrawn, wait so long for the reply to a `register`
_WARN_S = 10.0  # after this time, log a warning that no server has opened a port
_POLL_S = (0.05, 1.0)  # the first and the longest pause between searches for the open port
# These servers open their port outside of the event loop, or before the lifespan, so the warning is logged early.
_UNSEEN_SERVERS = ("granian", "sanic")
_WARN_UNSEEN_S = 1.0


class ServiceLifecycle:
    """Registers a service when its server opens the port, and withdraws it at the end of the `async with`.

    `request.port` is the port that the server will open; None means the first port that any server opens. With
    `retry`, attempts to register are repeated until one succeeds; without it, `registration` raises the error of
    the first attempt. `logs_success` says whether a success after failures is logged; `regctl run` turns it off,
    since it reports the success itself. With `ready`, the registration is `starting` until the service is ready.
    """

    def __init__(
        self, request: RegistrationRequest, drain_s: float, retry: bool = True, ready: Ready | None = None
    ) -> None:
        self._request = request
        self._name = request.name
        self._drain_s = drain_s
        self._retry = retry
        self._ready = ready
        self._becoming_ready: asyncio.Task[bool] | None = None
        self._warned = False  # the warning that no server has opened a port was logged
        self._error_kind: type[RegdError] | None = (
            None  # the kind of the error, if the last attempt to register failed
        )
        self.logs_success = True
        self._hook = ListenHook(request.port, self.opened, self.withdraw)
        self._exit_stack = contextlib.ExitStack()
        self._client = Client()
        self._registering: asyncio.Task[Registration] | None = None
        self._withdrawing: asyncio.Task[None] | None = None
        self._polling: asyncio.Task[None] | None = None
        self._opened: asyncio.Future[asyncio.Task[Registration]] = running_loop().create_future()

    def __repr__(self) -> str:
        state = "withdrawn" if self._withdrawing else "port open" if self._registering else "no port open yet"
        return f"<{type(self).__name__} {self._name}, {state}>"

    async def registration(self) -> Registration:
        """Wait until the service is registered, and return the registration."""
        return await asyncio.shield(await asyncio.shield(self._opened))

    async def ready(self) -> bool:
        """Wait until the service is registered as ready. Return False if the registration has ended before."""
        registering = await asyncio.shield(self._opened)
        if self._becoming_ready is None:
            await asyncio.shield(registering)
            return True
        return await asyncio.shield(self._becoming_ready)

    def opened(self, host: str, port: int) -> None:
        """Start registering. Call it once the port is open; later calls have no effect."""
        if self._registering is not None:
            return
        if self._request.host is not None:
            host = self._request.host
        request = replace(self._request, host=host, port=port)
        self._registering = asyncio.create_task(self._register(request), name="regd-client-lifespan")
        self._registering.add_done_callback(lambda task: task.cancelled() or task.exception())
        if self._ready is not None:
            self._becoming_ready = asyncio.create_task(self._become_ready(self._ready), name="regd-client-ready")
            self._becoming_ready.add_done_callback(lambda task: task.cancelled() or task.exception())
        self._opened.set_result(self._registering)

    async def _become_ready(self, ready: Ready) -> bool:
        await until_ready(self._name, ready)  # even while there is no daemon
        return await mark_ready(await self.registration())

    async def _first_state(self, request: RegistrationRequest) -> State | None:
        """Return the state to register with: `starting`, or None (`ready`).

        It is None without `ready`, and also if another worker of this server is ready already.
        """
        if self._ready is None:
            return None
        for other in await self._client.instances(self._name):
            if (other["host"], other["port"]) == (request.host, request.port) and other["state"] == "ready":
                return None
        return "starting"

    async def _register(self, request: RegistrationRequest) -> Registration:
        """Register. With `retry`, repeat it until it succeeds, since another owner may release the name."""
        at = host_port(str(request.host), request.port or 0)
        while True:
            try:
                request = replace(request, state=await self._first_state(request))
                registration = await RegistrationContext(self._client, request, patient=not self._retry)
            except BadArgument as error:
                if self._retry:
                    log.error("%s serves at %s, and cannot be registered: %s", self._name, at, error)
                raise
            except RegdError as error:
                if not self._retry:
                    raise
                if self._error_kind is not type(error):
                    log.warning("%s serves at %s, not registered yet, still trying: %s", self._name, at, error)
                self._error_kind = type(error)
            else:
                if self._error_kind is not None and self.logs_success:
                    log.warning("%s is registered now, at %s", self._name, registration.endpoint)
                return registration
            await pause(random_s(0, _PAUSE_S))

    async def withdraw(self) -> None:
        """Deregister the name, then wait, so that clients that have just resolved it can connect. Idempotent."""
        if self._withdrawing is None:
            self._withdrawing = asyncio.create_task(self._withdraw(), name="regd-client-withdraw")
        await asyncio.shield(self._withdrawing)

    async def _withdraw(self) -> None:
        task = self._registering
        if task is None:
            discard(self._ready)
            return
        if self._becoming_ready is not None:
            self._becoming_ready.cancel()
            await asyncio.wait((self._becoming_ready,), timeout=_REGISTERING_S)
        if not task.done():
            if not self._error_kind:  # the daemon may have registered the name, so wait for its reply
                await asyncio.wait((task,), timeout=_REGISTERING_S)
            task.cancel()
            await asyncio.wait((task,))
        if task.cancelled() or task.exception() is not None:
            return
        try:
            await task.result().deregister()
        except RegdError as error:
            log.warning("left %s registered: %s", self._name, error)
        await pause(self._drain_s)

    async def _poll(self) -> None:
        """Search for the open port again and again: not every server opens it on this event loop."""
        pause_s, longest_s = _POLL_S
        while self._registering is None:
            await asyncio.sleep(pause_s)
            if self._registering is None and self._hook.find_open_port():
                return
            pause_s = min(2 * pause_s, longest_s)

    def warn_unopened(self, after_s: float) -> None:
        """Log once that no server has opened a port."""
        if not self._opened.done() and not self._warned:
            self._warned = True
            log.warning(
                "%s is not registered: no server has opened its port on this event loop for %g s%s",
                self._name,
                after_s,
                "" if self._request.port else f'; name the port: lifespan("{self._name}", PORT)',
            )

    async def __aenter__(self) -> Self:
        self._exit_stack.enter_context(self._hook)
        self._exit_stack.enter_context(held_until(self.withdraw))
        if self._request.port is not None:
            self._polling = asyncio.create_task(self._poll(), name="regd-client-poll")
            self._exit_stack.callback(self._polling.cancel)
        return self

    async def __aexit__(self, *_: object) -> None:
        try:
            await self.withdraw()
        finally:
            self._exit_stack.close()
            self._opened.cancel()
            await self._client.close()


# lifespan.


class _Lifespan(contextlib.AbstractAsyncContextManager[None]):
    """The context manager that a framework enters at start-up and leaves at shutdown.

    It is also an async iterator that yields once, for aiohttp before 3.14.
    """

    def __init__(self, lifecycle: contextlib.AbstractAsyncContextManager[ServiceLifecycle]) -> None:
        self._lifecycle = lifecycle

    async def __aenter__(self) -> None:
        await self._lifecycle.__aenter__()

    async def __aexit__(self, *exc_info: Any) -> None:
        await self._lifecycle.__aexit__(*exc_info)

    async def __aiter__(self) -> AsyncIterator[None]:
        async with self:
            yield


class LifespanContext:
    """The result of `lifespan`. A framework calls it; without a framework, use it with `async with`."""

    def __init__(self, request: RegistrationRequest, drain_s: float, ready: Ready | None = None) -> None:
        self._request = request
        self._drain_s = drain_s
        self._ready = ready
        self._entered: contextlib.AbstractAsyncContextManager[ServiceLifecycle] | None = None

    def __repr__(self) -> str:
        port = "" if self._request.port is None else f", {self._request.port}"
        return f"<lifespan({self._request.name!r}{port})>"

    def __call__(self, app: object) -> _Lifespan:
        """Return the lifespan of an application. Starlette and aiohttp call this."""
        return _Lifespan(self._lifecycle())

    @contextlib.asynccontextmanager
    async def _lifecycle(self) -> AsyncIterator[ServiceLifecycle]:
        async with ServiceLifecycle(self._request, self._drain_s, ready=self._ready) as service:
            is_unseen = self._request.port is None and any(name in sys.modules for name in _UNSEEN_SERVERS)
            after_s = _WARN_UNSEEN_S if is_unseen else _WARN_S
            warning = asyncio.get_running_loop().call_later(after_s, service.warn_unopened, after_s)
            try:
                yield service
            finally:
                warning.cancel()

    async def __aenter__(self) -> ServiceLifecycle:
        self._entered = self._lifecycle()
        return await self._entered.__aenter__()

    async def __aexit__(self, *exc_info: Any) -> None:
        assert self._entered is not None
        await self._entered.__aexit__(*exc_info)


def lifespan(
    name: str,
    port: int | None = None,
    *,
    host: str | None = None,
    instance: str | None = None,
    meta: Mapping[str, str] | None = None,
    priority: int | None = None,
    drain_s: float = DRAIN_S,
    ready: Ready | None = None,
) -> LifespanContext:
    """Register a service once its server has opened its port, and withdraw the name before the server closes it.

        app = FastAPI(lifespan=regd_client.lifespan("gateway"))

        async with regd_client.lifespan("gateway"):
            server = await asyncio.start_server(answer, "127.0.0.1", 0)

    With `port`, the client registers the server that opens this port; without, the first server that opens a TCP
    port on this event loop within the lifespan. granian and Sanic do not open their port that way, so they need
    `port`.

    If no daemon answers, or another owner has the name, the service starts anyway, and the client tries
    to register until it succeeds. Before the server receives SIGTERM or Ctrl-C, or closes its listener, the
    client withdraws the name and waits `drain_s`, so that clients that have just resolved the name can still
    connect.

    Args:
        name: the service's name: labels of a-z, 0-9, `-` and `_`, joined by dots.
        port: the port that the server will open; by default the first port that any server opens.
        host: the address at which others reach the service; by default the server's address.
        instance: a name for this instance, if the service has several; `auto` for a free number.
        meta: labels that `resolve` can filter by.
        priority: 0 to 65535, lower is preferred: others resolve this instance only while no ready instance has a
            lower number; by default 0.
        drain_s: seconds between withdrawing the name and closing the port.
        ready: a coroutine function, another function that returns an awaitable, or an awaitable. The client
            awaits it once the port is open. Until it is done, the service is registered as `starting`, and nobody
            resolves the service. If a function returns False or raises, the client calls it again 0.5 s later.

    Returns:
        A lifespan for FastAPI, Starlette, aiohttp's `cleanup_ctx` and others. It is also an async context
        manager.

    Raises:
        BadArgument: an argument has the wrong type. If the daemon refuses a value, the client logs that.
    """
    check_seconds("drain_s", drain_s)
    check_ready(ready)
    if "daphne.cli" in sys.modules:  # daphne calls no start-up hooks
        log.warning(
            "%s is not registered: daphne does not run the lifespan of an application; start it with "
            "`regctl run %s -- sh -c 'exec daphne -p \"$PORT\" APPLICATION'`",
            name,
            name,
        )
    request = RegistrationRequest(name, port, host, instance, meta, priority=priority)
    return LifespanContext(request, drain_s, ready)


# listen.


class RegisteredSocket:
    """A registered listening socket, from `listen`.

    Attributes:
        socket: the socket, for a server: `asyncio.start_server(answer, sock=registered.socket)`.
        registration: the `Registration`.
    """

    def __init__(self, sock: socket.socket, registration: Registration, stack: contextlib.AsyncExitStack) -> None:
        self.socket = sock
        self.registration = registration
        self._stack = stack

    def __repr__(self) -> str:
        state = "closed" if self.socket.fileno() < 0 else "listening"
        return f"<RegisteredSocket {self.endpoint.name} at {self.endpoint}, {state}>"

    @property
    def endpoint(self) -> Endpoint:
        """Where the service is registered."""
        return self.registration.endpoint

    @property
    def port(self) -> int:
        """The port of the socket."""
        return self.endpoint.port

    async def close(self) -> None:
        """Withdraw the name, and close the socket `drain_s` later. Idempotent."""
        await self._stack.aclose()


class ListenContext:
    """The result of `listen`: `await` it for a `RegisteredSocket`, or use it with `async with`."""

    def __init__(self, request: RegistrationRequest, backlog: int, drain_s: float) -> None:
        self._awaited = False
        self._request = request
        self._backlog = backlog
        self._drain_s = drain_s
        self._registered: RegisteredSocket | None = None

    def __repr__(self) -> str:
        state = "awaited" if self._awaited else "not awaited yet"
        port = "" if self._request.port is None else f", {self._request.port}"
        return f"<listen({self._request.name!r}{port}), {state}>"

    def __await__(self) -> Generator[object, None, RegisteredSocket]:
        self._awaited = True
        return self._listen().__await__()

    def __del__(self) -> None:
        if not self._awaited:
            warn_not_awaited(f"listen({self._request.name!r})", self)

    async def __aenter__(self) -> RegisteredSocket:
        self._awaited = True
        self._registered = await self._listen()
        return self._registered

    async def __aexit__(self, *_: object) -> None:
        assert self._registered is not None
        await self._registered.close()

    async def _listen(self) -> RegisteredSocket:
        running_loop()
        async with contextlib.AsyncExitStack() as stack:
            sock, timeout_s = await self._open()
            stack.enter_context(sock)
            sock.setblocking(False)
            [(host, port)] = addresses([sock])
            request = replace(self._request, host=host, port=port, timeout_s=timeout_s)
            service = await stack.enter_async_context(ServiceLifecycle(request, self._drain_s, retry=False))
            service.opened(host, port)
            return RegisteredSocket(sock, await service.registration(), stack.pop_all())

    async def _open(self) -> tuple[socket.socket, float | None]:
        """Return the listening socket, and the remaining seconds to register it."""
        host, port, timeout_s = self._request.host or "127.0.0.1", self._request.port, self._request.timeout_s
        if port is not None:
            return listening_socket(host, port, self._backlog), timeout_s
        began = time.monotonic()
        client = Client()
        try:
            ports = await client._within(timeout_s, "listen", _last_ports(client, self._request))
        finally:
            await client.close()
        left_s = None if timeout_s is None else max(0.0, began + timeout_s - time.monotonic())
        return listening_socket_at_one(host, ports, self._backlog), left_s


async def _last_ports(client: Client, request: RegistrationRequest) -> list[int]:
    """Return the ports that the service had last, as far as the daemon knows.

    Raises:
        Unavailable: no daemon answers.
    """
    last = LastPorts(request.name, request.instance)
    connection = await client._connect(request.timeout_s, Patience.LOGGED)
    try:
        while last.request is not None:
            last.add(await connection.ask(*last.request))
    except Unavailable:
        raise
    except RegdError:  # the daemon keeps no history, or refuses the name, which `register` reports
        return []
    return last.ports


def listen(
    name: str,
    port: int | None = None,
    *,
    host: str = "127.0.0.1",
    instance: str | None = None,
    meta: Mapping[str, str] | None = None,
    priority: int | None = None,
    backlog: int = BACKLOG,
    drain_s: float = DRAIN_S,
    timeout: float | None = None,
) -> ListenContext:
    """Open a listening socket and register it. `await` the result, or use it with `async with`.

        async with regd_client.listen("runner") as listening:
            server = await asyncio.start_server(answer, sock=listening.socket)

    No other process can take the port in between. Clients can connect at once; their connections wait until the
    server accepts them. At the end of the `async with`, or before a server on this event loop closes the socket,
    the client withdraws the name. The socket is closed `drain_s` later.

    Args:
        name: the service's name: labels of a-z, 0-9, `-` and `_`, joined by dots.
        port: 1 to 65535, or 0 for any free port. By default the port that this name and instance had last, if
            it is free, else a free port that the system gives to no other program, so that the service can have
            it again the next time.
        host: the IP address to listen on. For 0.0.0.0 and ::, the client registers the loopback address.
        instance: a name for this instance, if the service has several; `auto` for a free number.
        meta: labels that `resolve` can filter by.
        priority: 0 to 65535, lower is preferred: others resolve this instance only while no ready instance has a
            lower number; by default 0.
        backlog: connections that may wait to be accepted (listen(2)).
        drain_s: seconds between withdrawing the name and closing the socket.
        timeout: seconds to register; by default it waits up to 5 s for a daemon.

    Returns:
        A `ListenContext`; awaiting or entering it returns a `RegisteredSocket`.

    Raises:
        OSError: the port is in use, or not allowed.
        Conflict: a live owner holds the name.
        Denied: this user may not register.
        Unavailable: no daemon answers.
        Timeout: the daemon did not reply within `timeout`.
        BadArgument: an argument has the wrong type or an invalid value.
    """
    check_integer("port", port)
    check_text("host", host, required=True)
    check_integer("backlog", backlog, required=True)
    check_seconds("drain_s", drain_s)
    request = RegistrationRequest(name, port, host, instance, meta, priority=priority, timeout_s=timeout)
    return ListenContext(request, backlog, drain_s)
