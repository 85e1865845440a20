"""Registering a service whose server opens its port later, and withdrawing the name before that closes.

Servers run a service's start-up hook before they bind, and its shutdown hook when they listen no more: a name
that is registered and ended there is known without being reachable. Must not know any server or framework.
"""

import asyncio
import contextlib
import random
import sys
from collections.abc import AsyncIterator, Mapping
from types import TracebackType
from typing import Any, Self

from regd_client.client import Client
from regd_client.connector import Patience, pause, running_loop
from regd_client.errors import BadArgument, RegdError
from regd_client.logger import log
from regd_client.registration import Registration
from regd_client.server_hook import ListenHook
from regd_client.signals import held_until
from regd_client.wire import joined

DRAIN_S = 0.1
_PAUSE_S = 0.5  # at most, between tries to register
_MAKING_S = 1.0  # for a registration that is just being made, when the service is told to end
_NOBODY_S = 10.0  # until it is worth a word that nothing listens
_LOOK_S = (0.05, 1.0)  # between looks for a port that was opened elsewhere, the first and the longest
_ELSEWHERE_S = 1.0  # until the same under a server that may have opened it elsewhere
_ELSEWHERE = ("granian", "sanic")  # those that open their port outside of the event loop, or before `lifespan`


class ServiceLifecycle:
    """One life of a service: from its start-up hook to the end of its shutdown hook, within `async with`.

    `patient`: what is in the way of registering it is waited for, and not raised by `registration`.
    """

    def __init__(
        self, name: str, port: int | None, arguments: dict[str, Any], drain_s: float, patient: bool = True
    ) -> None:
        self._name = name
        self._arguments = arguments
        self._drain_s = drain_s
        self._patient = patient
        self._port = port
        self._said = False  # that no server has come
        self._troubled: type[RegdError] | None = None  # the last that was in the way of registering it
        self.tells = True  # when it is registered after all; `regctl run` says so itself
        self._door = ListenHook(port, self.opened, self.withdraw)
        self._hooks = contextlib.ExitStack()
        self._client = Client()
        self._registering: asyncio.Task[Registration] | None = None
        self._withdrawing: asyncio.Task[None] | None = None
        self._looking: asyncio.Task[None] | None = None
        self._opened: asyncio.Future[asyncio.Task[Registration]] = running_loop().create_future()

    async def registration(self) -> Registration:
        """Return the registration, once there is one."""
        return await asyncio.shield(await asyncio.shield(self._opened))

    def opened(self, host: str, port: int) -> None:
        """Register, from now on: the port is open. Only the first time counts."""
        if self._registering is not None:
            return
        self._registering = asyncio.create_task(self._register(host, port), name="regd-client-lifespan")
        self._registering.add_done_callback(lambda task: task.cancelled() or task.exception())
        self._opened.set_result(self._registering)

    async def _register(self, host: str, port: int) -> Registration:
        """Try until it succeeds: the service works meanwhile, and whoever has the name may leave."""
        arguments = {"host": host, **self._arguments}
        while True:
            try:
                registering = self._client.register(self._name, port, **arguments)
                if self._patient:
                    registering.patience = Patience.NONE  # the tries are made here
                made = await registering
            except BadArgument as error:
                if self._patient:
                    log.error(
                        "%s serves at %s, and cannot be registered: %s", self._name, joined(host, port), error
                    )
                raise
            except RegdError as trouble:
                if not self._patient:
                    raise
                if self._troubled is not type(trouble):
                    at = joined(host, port)
                    log.warning("%s serves at %s, not registered yet, still trying: %s", self._name, at, trouble)
                self._troubled = type(trouble)
            else:
                if self._troubled is not None and self.tells:
                    log.warning("%s is registered now, at %s", self._name, made.endpoint)
                return made
            await pause(random.uniform(0, _PAUSE_S))

    async def withdraw(self) -> None:
        """Take the name away, and give those who have just resolved it the time to connect. Twice is harmless."""
        if self._withdrawing is None:
            self._withdrawing = asyncio.create_task(self._withdraw(), name="regd-client-withdraw")
        await asyncio.shield(self._withdrawing)

    async def _withdraw(self) -> None:
        task = self._registering
        if task is None:
            return
        if not task.done():
            if not self._troubled:  # the answer is under way: what it registered is to be withdrawn
                await asyncio.wait((task,), timeout=_MAKING_S)
            task.cancel()
            await asyncio.wait((task,))
        if task.cancelled() or task.exception() is not None:
            return
        try:
            await task.result().deregister()
        except RegdError as trouble:
            log.warning("left %s registered: %s", self._name, trouble)
        await pause(self._drain_s)

    async def _look(self) -> None:
        """Find a port that is not opened on this event loop."""
        pause_s, longest_s = _LOOK_S
        while self._registering is None:
            await asyncio.sleep(pause_s)
            if self._registering is None and self._door.look():
                return
            pause_s = min(2 * pause_s, longest_s)

    def nobody(self, after_s: float) -> None:
        """Say that no server has come."""
        if not self._opened.done() and not self._said:
            self._said = True
            log.warning(
                "%s is not registered: no server has opened its port on this event loop for %g s%s",
                self._name,
                after_s,
                "" if self._port else f'; name the port: lifespan("{self._name}", PORT)',
            )

    async def __aenter__(self) -> Self:
        self._hooks.enter_context(self._door)
        self._hooks.enter_context(held_until(self.withdraw))
        if self._port is not None:
            self._looking = asyncio.create_task(self._look(), name="regd-client-look")
            self._hooks.callback(self._looking.cancel)
        return self

    async def __aexit__(self, *_: object) -> None:
        try:
            await self.withdraw()
        finally:
            self._hooks.close()
            self._opened.cancel()
            await self._client.close()


class _Lifespan(contextlib.AbstractAsyncContextManager[None]):
    """What a framework enters when it starts the application, and leaves when it stops it.

    aiohttp before 3.14 takes no such thing, but an iterator that yields once.
    """

    def __init__(self, life: contextlib.AbstractAsyncContextManager[ServiceLifecycle]) -> None:
        self._life = life

    async def __aenter__(self) -> None:
        await self._life.__aenter__()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._life.__aexit__(kind, error, trace)

    async def __aiter__(self) -> AsyncIterator[None]:
        async with self:
            yield


class LifespanContext:
    """What `lifespan` returns: a lifespan for frameworks that take one, or the `async with` around a server."""

    def __init__(self, name: str, port: int | None, arguments: dict[str, Any], drain_s: float) -> None:
        self._name = name
        self._port = port
        self._arguments = arguments
        self._drain_s = drain_s
        self._entered: contextlib.AbstractAsyncContextManager[ServiceLifecycle] | None = None

    def __call__(self, app: object) -> _Lifespan:
        return _Lifespan(self._life())

    @contextlib.asynccontextmanager
    async def _life(self) -> AsyncIterator[ServiceLifecycle]:
        async with ServiceLifecycle(self._name, self._port, self._arguments, self._drain_s) as service:
            elsewhere = self._port is None and any(each in sys.modules for each in _ELSEWHERE)
            after_s = _ELSEWHERE_S if elsewhere else _NOBODY_S
            waiting = asyncio.get_running_loop().call_later(after_s, service.nobody, after_s)
            try:
                yield service
            finally:
                waiting.cancel()

    async def __aenter__(self) -> ServiceLifecycle:
        self._entered = self._life()
        return await self._entered.__aenter__()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._entered is not None
        await self._entered.__aexit__(kind, error, trace)


def lifespan(
    name: str,
    port: int | None = None,
    *,
    host: str | None = None,
    instance: str | None = None,
    meta: Mapping[str, str] | None = None,
    drain_s: float = DRAIN_S,
) -> LifespanContext:
    """Register a service once its server has opened its port, and withdraw it before that server closes it.

        app = FastAPI(lifespan=regd_client.lifespan("gateway"))

        async with regd_client.lifespan("gateway"):
            server = await asyncio.start_server(answer, "127.0.0.1", 0)

    The server is the first that opens a TCP port on this event loop from then on, or the one that opens `port`. A
    server that opens its port elsewhere in this process is found by `port` alone.
    Without a daemon, or while somebody else has the name, the service works and registering is tried on. Before
    the server is told to end, by SIGTERM or Ctrl-C, or closes its listener, the name is withdrawn, and `drain_s`
    passes: whoever has just resolved it still finds it open. `host` is what others are told, by default where the
    server listens.
    """
    if "daphne.cli" in sys.modules:  # it calls no start-up hook
        log.warning(
            "%s is not registered: daphne does not run the lifespan of an application; start it with "
            "`regctl run %s -- sh -c 'exec daphne -p \"$PORT\" APPLICATION'`",
            name,
            name,
        )
    given = {"instance": instance, "meta": meta} | ({} if host is None else {"host": host})
    return LifespanContext(name, port, given, drain_s)
