"""A client's connection: opened on demand, once for all callers that wait for it, and again after a break."""

import asyncio
import errno
import os
import random
import time
from enum import Enum
from typing import TYPE_CHECKING

from regd_client import protocol
from regd_client.connection import Connection, OnLost
from regd_client.errors import Unavailable
from regd_client.event_loop import pause, running_loop, wait_shared
from regd_client.logger import log
from regd_client.protocol import Address, AddressFinder

if TYPE_CHECKING:
    from regd_client.autostart import Autostart

__all__ = ["Connector", "Patience", "is_refused"]

CONNECT_S = 5.0  # to connect, by default
_RESTART_S = 1.0  # for a daemon that was there to come back by itself, before autostart starts another
_BACKOFF_S = (0.02, 0.5)  # the first and the longest pause between attempts to connect


class Patience(Enum):
    """What a caller does while nobody listens at the address."""

    NONE = "fail as soon as the system refuses the connection"
    SILENT = "try again"
    LOGGED = "try again, and log it at once"


class Connector:
    """Opens a client's connections.

    Attributes:
        timeout_s: seconds for which each call tries to connect. By default (None) 5 s, and a call without
            patience fails at the first refusal.
        connection: the last connection, usable or not.
        on_lost: called with the event for a registration that a connection no longer holds.
    """

    def __init__(self, addresses: AddressFinder, timeout_s: float | None) -> None:
        self.timeout_s = CONNECT_S if timeout_s is None else timeout_s
        self.connection: Connection | None = None
        self.on_lost: OnLost = lambda connection, event: None
        self.addresses = addresses
        self._always_patient = timeout_s is not None
        self._connecting: asyncio.Task[Connection] | None = None
        self._callers: dict[asyncio.Future[None], Patience] = {}  # done when the connection was refused
        self._why = "no answer in time"  # the last attempt failed

    @property
    def usable(self) -> Connection | None:
        """The connection if it is usable now, else None. A forked child has none."""
        return self.connection if self.connection is not None and self.connection.usable else None

    async def connect(self, timeout_s: float | None = None, patience: Patience = Patience.SILENT) -> Connection:
        """Return a usable connection.

        Raises:
            Unavailable: there is none within `timeout_s`, nobody listens and the caller has no patience, or the
                client was closed.
        """
        if (usable := self.usable) is not None:
            return usable
        loop = running_loop()
        if self._always_patient and patience is Patience.NONE:
            patience = Patience.SILENT
        if self._connecting is None:
            self._connecting = loop.create_task(self._connect(), name="regd-client-connect")
            self._connecting.add_done_callback(self._done)
        connecting = self._connecting
        refused = loop.create_future()
        self._callers[refused] = patience
        try:
            async with asyncio.timeout(self.timeout_s if timeout_s is None else timeout_s):
                await asyncio.wait((connecting, refused), return_when=asyncio.FIRST_COMPLETED)
                if not connecting.done():
                    raise self.unavailable()
                return await wait_shared(connecting)
        except TimeoutError:
            raise self.unavailable() from None
        finally:
            self._leave(connecting, refused)

    def _leave(self, connecting: "asyncio.Task[Connection]", refused: "asyncio.Future[None]") -> None:
        """Remove a caller, and stop the attempts after the last one."""
        self._callers.pop(refused, None)
        refused.cancel()
        if not self._callers and self._connecting is connecting and not connecting.done():
            self._connecting = None
            connecting.cancel()

    def unavailable(self) -> Unavailable:
        """Return the error for a daemon that cannot be reached."""
        return protocol.unavailable(self.addresses.find(), self._why)

    async def _connect(self) -> Connection:
        """Try until a daemon answers. The callers decide how long they wait."""
        address = self.addresses.find()
        pause_s, longest_s = _BACKOFF_S
        began = time.monotonic()
        on_demand = _OnDemand(address, began + _RESTART_S if self.connection is not None else began)
        logged = False
        try:
            while True:
                wait_s = pause_s * random.uniform(0.5, 1.0)
                callers = list(self._callers)  # a later caller gets the result of the next attempt
                try:
                    async with asyncio.timeout(self.timeout_s):
                        connection = await on_demand.check(await Connection.open(address, self.on_lost))
                    if logged:
                        log.warning("connected to regd at %s", address)
                    return connection
                except Unavailable:
                    raise  # the daemon refused: another attempt is no use
                except TimeoutError:
                    self._why = "no answer in time"
                except OSError as error:
                    self._why, wait_s = on_demand.after(error, wait_s)
                    if not on_demand.wanted and is_refused(error):
                        self._refuse(callers)
                if not logged and Patience.LOGGED in self._callers.values():
                    logged = True
                    log.warning("%s; still trying", self.unavailable())
                await pause(wait_s)
                pause_s = min(2 * pause_s, longest_s)
        finally:
            on_demand.close()

    def _refuse(self, callers: "list[asyncio.Future[None]]") -> None:
        """Fail the callers that have no patience."""
        for refused in callers:
            if self._callers.get(refused) is Patience.NONE and not refused.done():
                refused.set_result(None)

    def _done(self, task: "asyncio.Task[Connection]") -> None:
        if self._connecting is task:
            self._connecting = None
            if not task.cancelled() and task.exception() is None:
                self.connection = task.result()
        elif not task.cancelled() and task.exception() is None:
            task.result().abort("no caller waits any more")

    def end(self) -> None:
        """Close the connection, and the one that is being opened, without waiting."""
        connecting, self._connecting = self._connecting, None
        if connecting is not None:
            connecting.cancel()
        if self.connection is not None:
            self.connection.end()

    async def close(self) -> None:
        """Close the connection, and the one that is being opened, and wait until the sockets are closed."""
        connecting = self._connecting
        self.end()
        if self.connection is not None:
            await self.connection.close()
        if connecting is not None:
            await asyncio.wait((connecting,))


def is_refused(error: OSError) -> bool:
    """Return whether the error says that nobody listens at the address."""
    return isinstance(error, ConnectionRefusedError | FileNotFoundError) or (
        # For a host with several addresses, asyncio raises one error with all texts.
        error.errno is None and f"[Errno {errno.ECONNREFUSED}]" in str(error)
    )


class _OnDemand:
    """Starts a daemon if none answers and autostart is on, from `due_at` (`time.monotonic`) on."""

    def __init__(self, address: Address, due_at: float) -> None:
        self._address = address
        self.wanted = protocol.autostart_wanted(address)
        self._due_at = due_at
        self._autostart: Autostart | None = None

    async def check(self, connection: Connection) -> Connection:
        """Return the connection if the daemon answers on it. A daemon that is about to exit when idle does not.

        Raises:
            OSError: the daemon closed the connection before it sent anything.
            Unavailable: the peer is not a regd, or has no room.
        """
        if not self.wanted:
            return connection
        try:
            await connection.ask("ping", {})
        except BaseException as error:
            connection.abort("it did not answer a ping")
            if isinstance(error, Unavailable) and not connection.received:
                raise ConnectionResetError("it ended before the answer") from None
            raise
        return connection

    def after(self, error: OSError, pause_s: float) -> tuple[str, float]:
        """Return what is in the way, and the seconds until the next attempt.

        Raises:
            Unavailable: the daemon cannot be started.
        """
        # asyncio's own text for a refused connection is "Connect call failed ('127.0.0.1', 7343)".
        why = os.strerror(error.errno) if error.errno and error.errno > 0 else error.strerror or str(error)
        if not self.wanted or time.monotonic() < self._due_at:
            return why, pause_s
        from regd_client import autostart

        if not autostart.is_gone(error):
            return why, pause_s
        if self._autostart is None:
            self._autostart = autostart.Autostart(self._address)
        pause_s = self._autostart.step()
        return self._autostart.why, pause_s

    def close(self) -> None:
        if self._autostart is not None:
            self._autostart.close()
