"""The client: the verbs of the registry on one connection that is opened when needed, and again when it broke.

The functions at the end are the same verbs for one call each, from whatever event loop runs. Must not know how
a request is written.
"""

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable, Generator, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self, TypeVar

from regd_client import wire
from regd_client.connection import Connection
from regd_client.errors import Conflict, NotFound, RegdError

log = logging.getLogger("regd_client")

CONNECT_TIMEOUT_S = 5.0
_BACKOFF_S = (0.02, 0.5)  # the first and the longest pause between tries to connect

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where an instance of a service listens. `str()` is HOST:PORT, an IPv6 host in brackets."""

    name: str
    instance: str
    host: str
    port: int
    meta: Mapping[str, str]

    def __str__(self) -> str:
        return wire.joined(self.host, self.port)


def _endpoint(fields: Mapping[str, Any]) -> Endpoint:
    return Endpoint(fields["name"], fields["instance"], fields["host"], fields["port"], fields["meta"])


class Client:
    """The registry at one address. Any number of tasks may use it at once; they share its connection.

        async with Client() as client:
            found = await client.resolve("runner")

    `address` is `tcp://HOST:PORT`, `HOST:PORT` or `unix:///path`; left out, $REGD_ADDRESS is read at each new
    connection, and without it tcp://127.0.0.1:7343 is taken. Where nobody answers, connecting is tried again for
    `connect_timeout_s` seconds. It belongs to the event loop that first uses it.

    Every verb raises `Unavailable` when no daemon answers, `BadArgument` for what the daemon does not take, and
    `RegdError` for its other refusals.
    """

    def __init__(self, address: str | None = None, *, connect_timeout_s: float = CONNECT_TIMEOUT_S) -> None:
        self._given = address
        self._connect_timeout_s = connect_timeout_s
        self._connection: Connection | None = None
        self._connecting: asyncio.Task[Connection] | None = None

    async def __aenter__(self) -> Self:
        await self._connected()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connection. The next call opens another. Twice is harmless."""
        if self._connecting is not None:
            self._connecting.cancel()
            await asyncio.gather(self._connecting, return_exceptions=True)
            self._connecting = None
        if self._connection is not None:
            connection, self._connection = self._connection, None
            await connection.close()

    # The verbs.

    async def ping(self) -> None:
        """Ask whether a daemon answers."""
        await self._ask("ping")

    async def hello(self) -> dict[str, Any]:
        """Return who answers: `server`, `version`, `protocol`, `epoch`, `rev`, `features`, `limits`, …"""
        return await self._ask("hello")

    async def stats(self) -> dict[str, Any]:
        """Return the daemon's counters, gauges and limits."""
        return await self._ask("stats")

    def register(
        self,
        name: str,
        port: int,
        *,
        host: str | None = None,
        instance: str | None = None,
        meta: Mapping[str, str] | None = None,
        static: bool = False,
    ) -> "Registering":
        """Register a service; `await` it for a `Registration`, or use it with `async with`.

        `static`: do not deregister on leaving the `async with`.

        Raises:
            Conflict: another owner has the name.
        """
        arguments = {
            "name": name,
            "port": port,
            "host": host,
            "instance": instance,
            "meta": None if meta is None else dict(meta),
        }
        return Registering(self, arguments, static)

    async def deregister(self, name: str, instance: str | None = None) -> None:
        """End a registration, whoever made it.

        Raises:
            NotFound: there is none.
        """
        await self._ask("deregister", name=name, instance=instance)

    async def update(self, name: str, meta: Mapping[str, str], *, instance: str | None = None) -> None:
        """Replace the meta of a registration as a whole.

        Raises:
            NotFound: there is none.
        """
        await self._ask("update", name=name, instance=instance, meta=dict(meta))

    async def resolve(
        self, name: str, *, instance: str | None = None, meta: Mapping[str, str] | None = None
    ) -> Endpoint:
        """Return a ready instance, taking turns among those that carry all of `meta`.

        Raises:
            NotFound: there is none; `details` may name some that are `near`.
        """
        wanted = None if meta is None else dict(meta)
        return _endpoint(await self._ask("resolve", name=name, instance=instance, meta=wanted))

    async def resolve_all(self, name: str, *, meta: Mapping[str, str] | None = None) -> list[Endpoint]:
        """Return all ready instances that carry all of `meta`, in order of instance.

        Raises:
            NotFound: there is none.
        """
        wanted = None if meta is None else dict(meta)
        reply = await self._ask("resolve", name=name, all=True, meta=wanted)
        if not reply.get("more"):
            return [_endpoint(fields) for fields in reply["instances"]]
        listed = await self.instances(name, meta=meta)
        return [_endpoint(fields) for fields in listed if fields["state"] == "ready"]

    async def instances(
        self, pattern: str = "*", *, meta: Mapping[str, str] | None = None
    ) -> list[dict[str, Any]]:
        """Return every registration whose name is `pattern`, or begins with it before a `*`, as the wire has it.

        They come in pages; a registration that is there throughout is in the list once.
        """
        found: list[dict[str, Any]] = []
        after = None
        while True:
            wanted = None if meta is None else dict(meta)
            reply = await self._ask("list", name=pattern, meta=wanted, after=after)
            found += reply["instances"]
            after = reply.get("next")
            if after is None:
                return found

    # The connection.

    async def _ask(self, cmd: str, **arguments: Any) -> dict[str, Any]:
        connection = self._connection
        if connection is None or not connection.usable:
            connection = await self._connected()
        return await connection.ask(cmd, arguments)

    async def _connected(self) -> Connection:
        """Return the connection, opening it once for all who ask meanwhile, whoever of them is cancelled."""
        if self._connection is not None and self._connection.usable:
            return self._connection
        if self._connecting is None:
            self._connecting = asyncio.create_task(self._connect(), name="regd-client-connect")
            self._connecting.add_done_callback(self._connect_done)
        return await asyncio.shield(self._connecting)

    def _connect_done(self, task: "asyncio.Task[Connection]") -> None:
        if self._connecting is task:
            self._connecting = None
        if not task.cancelled() and task.exception() is None:
            self._connection = task.result()

    async def _connect(self) -> Connection:
        address = wire.find_address(self._given)
        pause_s, longest_s = _BACKOFF_S
        why = "no answer in time"
        try:
            async with asyncio.timeout(self._connect_timeout_s):
                while True:
                    try:
                        return await Connection.open(address)
                    except OSError as error:
                        why = error.strerror or str(error)
                    await asyncio.sleep(pause_s * random.uniform(0.5, 1.0))
                    pause_s = min(2 * pause_s, longest_s)
        except TimeoutError:
            raise wire.unavailable(address, why) from None


class Registration:
    """A registration that was made here."""

    def __init__(
        self,
        call: "Callable[..., Awaitable[dict[str, Any]]]",
        reply: Mapping[str, Any],
        meta: Mapping[str, str],
    ) -> None:
        self._call = call
        self._rev: int = reply["rev"]
        self.endpoint = _endpoint({**reply, "meta": meta})

    async def deregister(self) -> None:
        """End it. Harmless when it has ended, or when somebody else has the name now: theirs stays."""
        own = self.endpoint
        key = {"name": own.name, "instance": own.instance}
        while True:
            try:
                await self._call("deregister", **key, **{"if": self._rev})
            except NotFound:
                return
            except Conflict:
                listed = await self._call("list", name=own.name)
                found = [each for each in listed["instances"] if each["instance"] == own.instance]
                if not found or (found[0]["host"], found[0]["port"]) != (own.host, own.port):
                    return
                self._rev = found[0]["rev"]  # still ours, with other meta
            else:
                return


class Registering:
    """What `register` returns: `await` it, or use it with `async with`."""

    def __init__(self, client: Client, arguments: dict[str, Any], static: bool, close: bool = False) -> None:
        self._client = client
        self._arguments = arguments
        self._static = static
        self._close = close  # the client is ours alone: no connection is kept between calls
        self._made: Registration | None = None

    def __await__(self) -> Generator[Any, None, Registration]:
        return self._register().__await__()

    async def __aenter__(self) -> Registration:
        self._made = await self._register()
        return self._made

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._static or self._made is None:
            return
        try:
            await self._made.deregister()
        except RegdError as trouble:
            log.warning("left %s registered: %s", self._made.endpoint.name, trouble)

    async def _register(self) -> Registration:
        reply = await self._call("register", **self._arguments)
        return Registration(self._call, reply, self._arguments["meta"] or {})

    async def _call(self, cmd: str, **arguments: Any) -> dict[str, Any]:
        try:
            return await self._client._ask(cmd, **arguments)
        finally:
            if self._close:
                await self._client.close()


# One call each, from any event loop. Nothing stays open behind them.


def register(
    name: str,
    port: int,
    *,
    host: str | None = None,
    instance: str | None = None,
    meta: Mapping[str, str] | None = None,
    static: bool = False,
) -> Registering:
    """Register a service, as `Client.register` does."""
    made = Client().register(name, port, host=host, instance=instance, meta=meta, static=static)
    made._close = True
    return made


async def deregister(name: str, instance: str | None = None) -> None:
    """End a registration, as `Client.deregister` does."""
    async with Client() as client:
        await client.deregister(name, instance)


async def resolve(name: str, *, instance: str | None = None, meta: Mapping[str, str] | None = None) -> Endpoint:
    """Return a ready instance, as `Client.resolve` does."""
    async with Client() as client:
        return await client.resolve(name, instance=instance, meta=meta)


async def resolve_all(name: str, *, meta: Mapping[str, str] | None = None) -> list[Endpoint]:
    """Return all ready instances, as `Client.resolve_all` does."""
    async with Client() as client:
        return await client.resolve_all(name, meta=meta)
