"""A registration that was made here, and what is said of it on the connection that holds it.

Whether it stands is decided by the holdings. Must not know when the connection breaks or is opened.
"""

import asyncio
import os
import time
import warnings
from collections.abc import Coroutine, Generator, Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any

from regd_client.arguments import check_seconds, check_text, labels
from regd_client.connection import Connection, Heard
from regd_client.connector import Patience, joined, running_loop
from regd_client.errors import Conflict, NotFound, RegdError, Unavailable
from regd_client.logger import log
from regd_client.watches import Endpoint, Key, endpoint

if TYPE_CHECKING:
    from regd_client.client import Client
    from regd_client.holding import Holdings

_ENDS_S = 1.0  # for a daemon that is stopping to close the connection
_LEAVE_S = 2.0  # for the daemon to confirm that it has ended
_LEAVE_AWAY_S = 0.2  # the same, from when the connection broke: the daemon may be back in a moment


class Registration:
    """A registration that was made here. `lost` is set when somebody took it; `lost_reason` says how."""

    def __init__(
        self,
        client: "Client",
        arguments: dict[str, Any],
        static: bool,
        process: int | None,
        timeout_s: float | None = None,
        patience: Patience = Patience.TOLD,
    ) -> None:
        self._client = client
        self._holdings: Holdings = client._keeper.holdings
        self._pid = os.getpid()
        self._rev = 0
        self.endpoint: Endpoint
        self.lost = asyncio.Event()
        self.lost_reason = ""
        self.key: Key = (arguments["name"], arguments["instance"] or "")
        # For the holdings.
        self.arguments = arguments
        self.static = static
        self.process = process  # that it lasts as long as, instead of this one
        self.timeout_s = timeout_s  # to connect, the first time
        self.patience = patience
        self.began = time.monotonic()
        self.left_at = 0.0
        self.place: tuple[str, ...] = ()  # the daemon's address, name and instance
        self.on: Connection | None = None  # the last connection that held it
        self.over = ""  # why it is no more
        self.making: asyncio.Task[Registration] | None = None
        self.leaving: asyncio.Task[None] | None = None
        self.trouble = ""  # what was in the way of registering it again
        self.moved = asyncio.Event()  # `on` or `over` is another

    @property
    def kept(self) -> bool:
        """Whether the caller wants it, and has it. A child that was forked does not: it is the parent's."""
        return not self.over and self.leaving is None and self._pid == os.getpid()

    @property
    def where(self) -> tuple[str, int]:
        """The host and port, as the caller wants them to be known."""
        return self.arguments["host"] or "127.0.0.1", self.arguments["port"]

    def made_on(self, connection: Connection, reply: Mapping[str, Any]) -> None:
        """Take the reply to `register`."""
        self.on = connection
        self.trouble = ""
        self._rev = reply["rev"]
        self.endpoint = endpoint({**reply, "meta": self.arguments["meta"] or {}})
        self.moved.set()

    def is_at(self, reply: Mapping[str, Any]) -> bool:
        return (self.endpoint.host, self.endpoint.port) == (reply["host"], reply["port"])

    def finish(self, why: str) -> None:
        """It is no more; the first reason stays."""
        self.over = self.over or why
        self.moved.set()

    def _altered(self, meta: dict[str, str] | None, state: str | None) -> None:
        """Remember what is to be registered again after a break."""
        if meta is not None:
            self.arguments["meta"] = meta
            self.endpoint = endpoint({**_fields(self.endpoint), "meta": meta})
        if state is not None:
            self.arguments["state"] = state

    async def update(
        self,
        meta: Mapping[str, str] | None = None,
        *,
        state: str | None = None,
        timeout: float | None = None,
    ) -> None:
        """Replace its meta as a whole, set its state (`starting`, `ready`, `draining`), or both.

        After a break it waits until it is registered again, for 5 s or `timeout` seconds.

        Raises:
            NotFound: it has ended, or is somebody else's now.
            Unavailable: no daemon comes back in time.
        """
        check_text("state", state)
        await self._client._within(timeout, "update", self._update(labels(meta), state, timeout))

    async def _update(self, given: dict[str, str] | None, state: str | None, timeout: float | None) -> None:
        def altered(reply: Mapping[str, Any]) -> None:
            self._altered(given, state)

        while True:
            connection = await (
                self._client._connected() if self.static else self._holdings.holder(self, timeout)
            )
            try:
                if await self.while_ours(connection, "update", altered, meta=given, state=state):
                    return
            except Unavailable:  # it broke, or the daemon is stopping; the same once more does no harm
                await asyncio.wait((connection.closed,), timeout=_ENDS_S)
                if self.static or connection.usable:
                    raise
            else:
                raise self.gone()

    async def deregister(self, *, timeout: float | None = None) -> None:
        """End it: first `draining`, then gone. Harmless when it has ended; what is somebody else's now stays.

        It waits for `timeout` seconds, else for 2 s at most, and 0.2 s without a daemon. What is not confirmed by
        then goes on in the background, as long as the event loop lives.
        """
        check_seconds("timeout", timeout)
        if self._pid != os.getpid() or self.over:
            return  # the parent's, or nobody's
        if self.static:
            await self.end_on(await self._client._connected())
            return
        leaving = self._holdings.leave(self)
        await self._have_patience(leaving, timeout)
        if not leaving.done():
            log.warning("the registry has not confirmed yet that %s ended", self.endpoint.name)
        elif not leaving.cancelled():
            await joined(leaving)

    async def _have_patience(self, leaving: "asyncio.Task[None]", timeout: float | None) -> None:
        if timeout is not None:
            await asyncio.wait((leaving,), timeout=timeout)
            return
        on = self.on
        if on is None:
            return
        if on.usable:
            await asyncio.wait((leaving, on.closed), timeout=_LEAVE_S, return_when=asyncio.FIRST_COMPLETED)
        if on.ended_at is not None:
            left_s = on.ended_at + _LEAVE_AWAY_S - time.monotonic()
            await asyncio.wait((leaving,), timeout=max(0.0, left_s))

    def gone(self) -> NotFound:
        """Return the error of one who wants to alter it, and may not."""
        why = self.over or ("left" if self.leaving else "it is the parent process's")
        return NotFound(f"the registration of {self.key[0]!r} is over: {why}", "not_found")

    # On the connection that holds it.

    async def end_on(self, connection: Connection) -> None:
        if await self.while_ours(connection, "update", state="draining"):
            await self.while_ours(connection, "deregister")

    async def while_ours(
        self, connection: Connection, cmd: str, heard: Heard | None = None, **arguments: Any
    ) -> bool:
        """Do something to it, if it still is at our address, whatever else changed. Returns whether it is."""
        name, instance = self.key
        while not self.over:
            asked = {"name": name, "instance": instance, **arguments, "if": self._rev}
            try:
                self._rev = (await connection.ask(cmd, asked, heard))["rev"]
            except NotFound:
                return False
            except Conflict:
                known = await self.known(connection)
                if known is None:
                    return False
                self._rev = known["rev"]
            else:
                return True
        return False

    async def known(self, connection: Connection) -> dict[str, Any] | None:
        """Return what the daemon tells of what stands at our address, None where nothing does."""
        name, instance = self.key
        try:
            found = (await connection.ask("why", {"name": name, "instance": instance}))["instances"]
        except NotFound:
            return None
        here: dict[str, Any] = found[0] if found else {"host": None, "port": None}
        return here if (here["host"], here["port"]) == (self.endpoint.host, self.endpoint.port) else None


def warn_of(call: str, source: object) -> None:
    """Warn of what was made and never awaited, as Python does of a coroutine."""
    warnings.warn(f"{call} was never awaited", RuntimeWarning, stacklevel=3, source=source)


def _fields(found: Endpoint) -> dict[str, Any]:
    return {"name": found.name, "instance": found.instance, "host": found.host, "port": found.port}


class StandaloneRegistration(Registration):
    """One that was made by the function `register`, with a client of its own."""

    async def update(
        self,
        meta: Mapping[str, str] | None = None,
        *,
        state: str | None = None,
        timeout: float | None = None,
    ) -> None:
        try:
            await super().update(meta, state=state, timeout=timeout)
        finally:
            if self.static:
                await self._client.close()

    async def deregister(self, *, timeout: float | None = None) -> None:
        try:
            await super().deregister(timeout=timeout)
        finally:
            await self._client.close()


class RegistrationContext(Coroutine[Any, Any, Registration]):
    """What `register` returns: a coroutine that gives a `Registration`, or the `async with` around its life."""

    def __init__(
        self,
        client: "Client",
        arguments: dict[str, Any],
        static: bool,
        process: int | None = None,
        timeout: float | None = None,
    ) -> None:
        self._awaited = False
        self._client = client
        self._timeout = timeout
        self.patience = Patience.TOLD
        self._arguments = arguments
        self._static = static
        self._process = process
        self._own = False  # the client was made for this registration, and ends with it
        self._made: Registration | None = None
        self._running: Coroutine[Any, Any, Registration] | None = None

    # A coroutine, so that a task can be made of it.

    def __await__(self) -> Generator[Any, None, Registration]:
        self._awaited = True
        return self._register().__await__()

    def _run(self) -> "Coroutine[Any, Any, Registration]":
        self._awaited = True
        if self._running is None:
            self._running = self._register()
        return self._running

    def send(self, value: Any) -> Any:
        return self._run().send(value)

    def throw(self, *args: Any) -> Any:
        return self._run().throw(*args)

    def close(self) -> None:
        self._awaited = True
        if self._running is not None:
            self._running.close()

    def __del__(self) -> None:
        if not self._awaited:
            warn_of(f"register({self._arguments['name']!r})", self)

    # Around the life of a service.

    async def __aenter__(self) -> Registration:
        self._awaited = True
        self._made = await self._register()
        return self._made

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._made is not None
        try:
            if not self._static:
                await self._made.deregister()
        except RegdError as trouble:
            log.warning("left %s registered: %s", self._made.endpoint.name, trouble)

    async def _register(self) -> Registration:
        self._awaited = True
        running_loop()
        self._client._check_fork()
        kind = StandaloneRegistration if self._own else Registration
        wanted = kind(self._client, self._arguments, self._static, self._process, self._timeout, self.patience)
        over = self._own
        try:
            work = self._client._keeper.holdings.register(wanted)
            made = await self._client._within(self._timeout, "register", work)
            over = over and self._static
        finally:
            if over:
                await self._client.close()
        return made
