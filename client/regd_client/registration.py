"""A registration that was made here, and how it is made and ended.

What keeps it, over breaks, is the client. Must not know how a request travels.
"""

import asyncio
import contextlib
import logging
import os
from collections.abc import Coroutine, Generator, Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any

from regd_client.connection import Connection
from regd_client.errors import Conflict, NotFound, RegdError, Unavailable
from regd_client.following import Endpoint, endpoint

if TYPE_CHECKING:
    from regd_client.client import Client

log = logging.getLogger("regd_client")

_ONCE_S = 0.2  # to deregister where the daemon is away


class Registration:
    """A registration that was made here. `lost` is set when somebody took it; `lost_reason` says how."""

    def __init__(self, client: "Client", arguments: dict[str, Any], static: bool) -> None:
        self._client = client
        self._static = static
        self._pid = os.getpid()
        self._rev = 0
        self.arguments = arguments
        self.key = (arguments["name"], arguments["instance"] or "")
        self.on: Connection | None = None  # the connection that holds it
        self.endpoint: Endpoint
        self.lost = asyncio.Event()
        self.lost_reason = ""

    def made_on(self, connection: Connection, reply: Mapping[str, Any]) -> None:
        self.on = connection
        self._rev = reply["rev"]
        self.endpoint = endpoint({**reply, "meta": self.arguments["meta"] or {}})

    def altered(self, meta: dict[str, str] | None, state: str | None) -> None:
        """Remember what is to be registered again after a break."""
        if meta is not None:
            self.arguments["meta"] = meta
            self.endpoint = endpoint({**_fields(self.endpoint), "meta": meta})
        if state is not None:
            self.arguments["state"] = state

    async def update(self, meta: Mapping[str, str] | None = None, *, state: str | None = None) -> None:
        """Replace its meta as a whole, set its state (`starting`, `ready`, `draining`), or both.

        Raises:
            NotFound: it has ended, or is somebody else's now.
        """
        given = None if meta is None else dict(meta)
        if not await self._while_ours("update", meta=given, state=state):
            raise NotFound(f"no registration of {self.key[0]!r} at our address", "not_found")
        self.altered(given, state)

    async def deregister(self) -> None:
        """End it: first `draining`, then gone. Harmless when it has ended; what is somebody else's now stays."""
        if self._pid != os.getpid():
            return  # the parent's
        self._client._registrations.pop(self.key, None)
        if not self._static and (self.on is None or not self.on.usable):
            await self._deregister_once()
            return
        await self._while_ours("update", state="draining")
        await self._while_ours("deregister")

    async def _deregister_once(self) -> None:
        """The daemon is away: what the connection held ends without us, unless it came back just now."""
        with contextlib.suppress(Unavailable):
            await self._client._connected(0.2)
            await self._while_ours("deregister")

    async def _while_ours(self, cmd: str, **arguments: Any) -> bool:
        """Do something to the registration, if it is still at our address, whatever else changed."""
        name, instance = self.key
        while True:
            try:
                reply = await self._client._ask(
                    cmd, name=name, instance=instance, **arguments, **{"if": self._rev}
                )
                self._rev = reply["rev"]
                return True
            except NotFound:
                return False
            except Conflict:
                known = await self._client.why(name, instance)
                found = known["instances"]
                own = self.endpoint
                if not found or (found[0]["host"], found[0]["port"]) != (own.host, own.port):
                    return False
                self._rev = found[0]["rev"]


def _fields(found: Endpoint) -> dict[str, Any]:
    return {"name": found.name, "instance": found.instance, "host": found.host, "port": found.port}


class Registering(Coroutine[Any, Any, Registration]):
    """What `register` returns: a coroutine that gives a `Registration`, or the `async with` around its life."""

    def __init__(self, client: "Client", arguments: dict[str, Any], static: bool, own: bool = False) -> None:
        self._client = client
        self._arguments = arguments
        self._static = static
        self._own = own  # the client was made for this registration, and ends with it
        self._made: Registration | None = None
        self._running: Coroutine[Any, Any, Registration] | None = None

    # A coroutine, so that a task can be made of it.

    def __await__(self) -> Generator[Any, None, Registration]:
        return self._register().__await__()

    def _run(self) -> "Coroutine[Any, Any, Registration]":
        if self._running is None:
            self._running = self._register()
        return self._running

    def send(self, value: Any) -> Any:
        return self._run().send(value)

    def throw(self, *args: Any) -> Any:
        return self._run().throw(*args)

    def close(self) -> None:
        if self._running is not None:
            self._running.close()

    # Around the life of a service.

    async def __aenter__(self) -> Registration:
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
        finally:
            if self._own:
                await self._client.close()

    async def _register(self) -> Registration:
        client = self._client
        registration = (OwnRegistration if self._own else Registration)(client, self._arguments, self._static)
        try:
            connection = await client._connected()
            conditions = {} if self._static else await client._hold(connection)
            asked = asyncio.ensure_future(connection.ask("register", {**self._arguments, **conditions}))
            try:
                reply = await asyncio.shield(asked)
            except asyncio.CancelledError:
                if not self._static:
                    asked.add_done_callback(lambda done: self._undo(connection, done))
                raise
        except BaseException:
            if self._own:
                await client.close()
            raise
        registration.made_on(connection, reply)
        if self._static:
            if self._own:
                await client.close()
        else:
            client._registrations[registration.key] = registration
            client._keep()
        return registration

    def _undo(self, connection: Connection, asked: "asyncio.Future[dict[str, Any]]") -> None:
        """Nobody waits for it any more: if it was made all the same, end it."""
        if not asked.cancelled() and asked.exception() is None:
            reply = asked.result()
            arguments = {"name": reply["name"], "instance": reply["instance"], "if": reply["rev"]}
            connection.post("deregister", arguments)


class OwnRegistration(Registration):
    """One that was made by the function `register`, with a connection of its own."""

    async def deregister(self) -> None:
        try:
            await super().deregister()
        finally:
            await self._client.close()
