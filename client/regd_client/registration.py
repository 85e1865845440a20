"""A registration of this client, and the commands that update and end it.

The registrar decides whether the registration still exists, and restores it after a reconnect.
"""

import asyncio
import os
import time
import warnings
from collections.abc import Coroutine, Generator, Mapping
from dataclasses import replace
from typing import Any, Protocol, TypeVar

from regd_client.arguments import (
    AUTO,
    RegistrationRequest,
    check_integer,
    check_seconds,
    check_text,
    copy_meta,
)
from regd_client.connection import Connection, OnFields
from regd_client.errors import Conflict, NotFound, RegdError, Unavailable
from regd_client.event_loop import running_loop, wait_shared
from regd_client.logger import log
from regd_client.models import Endpoint, Key, State, endpoint_of

__all__ = ["Registration", "RegistrationContext", "warn_not_awaited"]

_CLOSING_S = 1.0  # time for a stopping daemon to close the connection
_WITHDRAW_S = 2.0  # time for the daemon to confirm the end of the registration
_WITHDRAW_AWAY_S = 0.2  # the same, if the connection is lost; counted from the loss

T = TypeVar("T")


class _Registrar(Protocol):
    """The methods of `Registrar` that a registration uses. Importing the class would be circular."""

    async def register(self, registration: "Registration") -> "Registration": ...
    async def holder(self, registration: "Registration", timeout_s: float | None) -> Connection: ...
    def withdraw(self, registration: "Registration") -> "asyncio.Task[None]": ...


class _Client(Protocol):
    """The methods of `Client` that a registration uses."""

    @property
    def _registrar(self) -> _Registrar: ...
    def _check_fork(self) -> None: ...
    async def _connect(self) -> Connection: ...
    async def _within(self, timeout: float | None, what: str, work: Coroutine[Any, Any, T]) -> T: ...
    async def close(self) -> None: ...


class Registration:
    """A registration of this client, from `register`.

    Attributes:
        endpoint: the registered address.
        lost: an `asyncio.Event`, set when another process or client has taken the name.
        lost_reason: why the registration was lost; "" until then.
    """

    def __init__(
        self, client: _Client, request: RegistrationRequest, *, standalone: bool = False, patient: bool = True
    ) -> None:
        self._client = client
        self._registrar = client._registrar
        self._pid = os.getpid()
        self._rev = 0
        self.endpoint: Endpoint
        self.lost = asyncio.Event()
        self.lost_reason = ""
        self._standalone = standalone  # the client was created for this registration, and is closed with it
        # Used by the registrar.
        self._request = request
        self._key: Key = (request.name, request.instance or "")
        self._is_copy = request.instance == AUTO  # the instance is a number, which may change after a reconnect
        self._patient = patient  # wait for a daemon that is away, and log that
        self._began = time.monotonic()
        self._withdrawn_at = 0.0
        self._global_key: tuple[str, ...] = ()  # the daemon's address, name and instance
        self._connection: Connection | None = None  # the connection on which it was registered last
        self._over = ""  # why the registration has ended; "" until then
        self._registering: asyncio.Task[Registration] | None = None
        self._withdrawing: asyncio.Task[None] | None = None
        self._restore_error = ""  # why the last attempt to restore it failed
        self._moved = asyncio.Event()  # set when `_connection` or `_over` changes

    def __repr__(self) -> str:
        name = "/".join(filter(None, self._key))
        at = f" at {self.endpoint}" if hasattr(self, "endpoint") else ""
        state = self._over or ("leaving" if self._withdrawing else "registered" if at else "not registered yet")
        return f"<{type(self).__name__} {name}{at}, {state}>"

    @property
    def instance(self) -> str:
        """The instance's name, "" without one; with `instance="auto"` the number that this copy has."""
        return self._key[1]

    def _take_instance(self, instance: str) -> None:
        """Set the number of a copy."""
        self._request = replace(self._request, instance=instance)
        self._key = (self._key[0], instance)
        self._global_key = (*self._global_key[:-1], instance)

    @property
    def _is_active(self) -> bool:
        """Whether the registration has not ended, is not being withdrawn, and belongs to this process."""
        return not self._over and self._withdrawing is None and self._pid == os.getpid()

    @property
    def _requested_address(self) -> tuple[str, int | None]:
        """The host and port that the caller passed."""
        return self._request.host or "127.0.0.1", self._request.port

    def _registered_on(self, connection: Connection, reply: Mapping[str, Any]) -> None:
        """Record that the registration is on this connection, with the reply to its `register`."""
        self._connection = connection
        self._restore_error = ""
        self._rev = reply["rev"]
        request = self._request
        self.endpoint = endpoint_of({**reply, "meta": request.meta or {}, "priority": request.priority or 0})
        self._moved.set()

    def _is_at(self, reply: Mapping[str, Any]) -> bool:
        return self.endpoint.address == (reply["host"], reply["port"])

    def _finish(self, why: str) -> None:
        """Mark the registration as ended. Idempotent: the first reason counts."""
        self._over = self._over or why
        self._moved.set()

    def _updated(self, meta: dict[str, str] | None, state: State | None, priority: int | None) -> None:
        """Record new values, which the registrar uses to restore the registration."""
        if meta is not None:
            self._request = replace(self._request, meta=meta)
            self.endpoint = replace(self.endpoint, meta={**meta})
        if state is not None:
            self._request = replace(self._request, state=state)
        if priority is not None:
            self._request = replace(self._request, priority=priority)
            self.endpoint = replace(self.endpoint, priority=priority)

    async def update(
        self,
        meta: Mapping[str, str] | None = None,
        *,
        state: State | None = None,
        priority: int | None = None,
        timeout: float | None = None,
    ) -> None:
        """Replace the labels, or set the state or priority. Wait for the reconnect if needed.

            await registration.update({"zone": "b"}, state="ready")

        Args:
            meta: the new labels, which replace all previous ones; None leaves them as they are.
            state: `starting`, `ready` or `draining`; None leaves it as it is.
            priority: 0 to 65535, lower is preferred; None leaves it as it is.
            timeout: seconds for the whole call; by default it waits up to 5 s for a daemon.

        Raises:
            NotFound: the registration has ended, or another owner has the name.
            Unavailable: no daemon answers in time.
            Timeout: the daemon did not reply within `timeout`.
            BadArgument: an argument has the wrong type or an invalid value.
        """
        check_text("state", state)
        check_integer("priority", priority)
        try:
            work = self._update(copy_meta(meta), state, priority, timeout)
            await self._client._within(timeout, "update", work)
        finally:
            if self._standalone and self._request.static:
                await self._client.close()

    async def _update(
        self, meta: dict[str, str] | None, state: State | None, priority: int | None, timeout: float | None
    ) -> None:
        arguments = {"meta": meta, "state": state, "priority": priority}

        def on_reply(reply: Mapping[str, Any]) -> None:
            self._updated(meta, state, priority)

        static = self._request.static
        while True:
            connection = await (self._client._connect() if static else self._registrar.holder(self, timeout))
            try:
                if await self._if_ours(connection, "update", on_reply, **arguments):
                    return
            except Unavailable:  # the connection broke, or the daemon is stopping: repeat the update
                await asyncio.wait((connection.closed,), timeout=_CLOSING_S)
                if static or connection.usable:
                    raise
            else:
                raise self._gone()

    async def deregister(self, *, timeout: float | None = None) -> None:
        """End the registration: set it `draining`, then remove it. Idempotent.

        If the daemon does not confirm in time, the client keeps trying in the background while the event loop
        runs. If another owner has taken the name, the other owner's registration stays.

        Args:
            timeout: seconds to wait for the daemon's confirmation; by default 2 s, or 0.2 s without a daemon.

        Raises:
            Unavailable: the registration is static, and no daemon answers.
            RegdError: the daemon refuses.
        """
        try:
            await self._deregister(timeout)
        finally:
            if self._standalone:
                await self._client.close()

    async def _deregister(self, timeout: float | None) -> None:
        check_seconds("timeout", timeout)
        if self._pid != os.getpid() or self._over:
            return
        if self._request.static:
            await self._end_on(await self._client._connect())
            return
        withdrawing = self._registrar.withdraw(self)
        await self._wait_for_confirmation(withdrawing, timeout)
        if not withdrawing.done():
            log.warning("the registry has not confirmed yet that %s ended", self.endpoint.name)
        elif not withdrawing.cancelled():
            await wait_shared(withdrawing)

    async def _wait_for_confirmation(self, withdrawing: "asyncio.Task[None]", timeout: float | None) -> None:
        if timeout is not None:
            await asyncio.wait((withdrawing,), timeout=timeout)
            return
        connection = self._connection
        if connection is None:
            return
        if connection.usable:
            tasks = (withdrawing, connection.closed)
            await asyncio.wait(tasks, timeout=_WITHDRAW_S, return_when=asyncio.FIRST_COMPLETED)
        if connection.ended_at is not None:
            left_s = connection.ended_at + _WITHDRAW_AWAY_S - time.monotonic()
            await asyncio.wait((withdrawing,), timeout=max(0.0, left_s))

    def _gone(self) -> NotFound:
        """Return the error for a change of a registration that has ended."""
        why = self._over or ("it was deregistered" if self._withdrawing else "it belongs to the parent process")
        return NotFound(f"the registration of {self._key[0]!r} is over: {why}", "not_found")

    async def _end_on(self, connection: Connection) -> None:
        if await self._if_ours(connection, "update", state="draining"):
            await self._if_ours(connection, "deregister")

    async def _if_ours(
        self, connection: Connection, cmd: str, on_reply: OnFields | None = None, **arguments: Any
    ) -> bool:
        """Send a command for our entry. Return False if the entry is not ours, that is, has another address."""
        name, instance = self._key
        while not self._over:
            condition = {"name": name, "instance": instance, **arguments, "if": self._rev}
            try:
                self._rev = (await connection.ask(cmd, condition, on_reply))["rev"]
            except NotFound:
                return False
            except Conflict:
                current = await self._current(connection)
                if current is None:
                    return False
                self._rev = current["rev"]
            except RegdError as error:
                raise await connection.explained(error, cmd, condition) from None
            else:
                return True
        return False

    async def _current(self, connection: Connection) -> dict[str, Any] | None:
        """Return the entry of this registration in `why`; None if the name is free or has another address."""
        name, instance = self._key
        try:
            instances = (await connection.ask("why", {"name": name, "instance": instance}))["instances"]
        except NotFound:
            return None
        return instances[0] if instances and self._is_at(instances[0]) else None


def warn_not_awaited(call: str, source: object) -> None:
    """Warn about an awaitable that was never awaited, as Python does for coroutines."""
    warnings.warn(f"{call} was never awaited", RuntimeWarning, stacklevel=3, source=source)


class RegistrationContext(Coroutine[Any, Any, Registration]):
    """The result of `register`: `await` it for a `Registration`, or use it with `async with`.

    With `standalone`, the client was created for this registration, and is closed with it.
    """

    def __init__(
        self, client: _Client, request: RegistrationRequest, *, standalone: bool = False, patient: bool = True
    ) -> None:
        self._awaited = False
        self._client = client
        self._request = request
        self._standalone = standalone
        self._patient = patient
        self._registration: Registration | None = None
        self._coroutine: Coroutine[Any, Any, Registration] | None = None

    def __repr__(self) -> str:
        state = "awaited" if self._awaited else "not awaited yet"
        return f"<register({self._request.name!r}, {self._request.port}), {state}>"

    # The methods of a coroutine, since asyncio.create_task accepts no other awaitable.

    def __await__(self) -> Generator[Any, None, Registration]:
        self._awaited = True
        return self._register().__await__()

    def _run(self) -> "Coroutine[Any, Any, Registration]":
        self._awaited = True
        if self._coroutine is None:
            self._coroutine = self._register()
        return self._coroutine

    def send(self, value: Any) -> Any:
        return self._run().send(value)

    def throw(self, *args: Any) -> Any:
        return self._run().throw(*args)

    def close(self) -> None:
        self._awaited = True
        if self._coroutine is not None:
            self._coroutine.close()

    def __del__(self) -> None:
        if not self._awaited:
            warn_not_awaited(f"register({self._request.name!r})", self)

    # The methods of a context manager.

    async def __aenter__(self) -> Registration:
        self._awaited = True
        self._registration = await self._register()
        return self._registration

    async def __aexit__(self, *_: object) -> None:
        assert self._registration is not None
        try:
            if not self._request.static:
                await self._registration.deregister()
        except RegdError as error:
            log.warning("left %s registered: %s", self._registration.endpoint.name, error)

    async def _register(self) -> Registration:
        self._awaited = True
        running_loop()
        self._client._check_fork()
        registration = Registration(
            self._client, self._request, standalone=self._standalone, patient=self._patient
        )
        close = self._standalone
        try:
            work = self._client._registrar.register(registration)
            registration = await self._client._within(self._request.timeout_s, "register", work)
            close = close and self._request.static
        finally:
            if close:
                await self._client.close()
        return registration
