"""Opens a client's connection when a call needs one. All callers that wait share one attempt to connect."""

import asyncio
import errno
import os
import time
from enum import Enum

from regd_client import autostart, protocol
from regd_client.connection import Connection, OnLost
from regd_client.errors import Unavailable
from regd_client.event_loop import pause, random_s, running_loop, wait_shared
from regd_client.logger import log
from regd_client.protocol import AddressFinder

__all__ = ["Connector", "Patience", "is_refused"]

CONNECT_S = 5.0  # default time to connect
_RESTART_S = 1.0  # after a loss, autostart waits so long: a service manager may restart the daemon
_BACKOFF_S = (0.02, 0.5)  # the first and the longest pause between attempts to connect


class Patience(Enum):
    """What a call does while no daemon listens at the address."""

    NONE = "fail as soon as the connection is refused"
    SILENT = "try again"
    LOGGED = "try again, and log the first failure"


class Connector:
    """Opens a client's connections.

    Attributes:
        timeout_s: seconds for which each call tries to connect; by default (None) 5 s, except that a call with
            `Patience.NONE` fails at the first refusal.
        connection: the last connection, usable or not.
        on_lost: called with each `lost` event of a connection.
    """

    def __init__(self, addresses: AddressFinder, timeout_s: float | None) -> None:
        self.timeout_s = CONNECT_S if timeout_s is None else timeout_s
        self.connection: Connection | None = None
        self.on_lost: OnLost = lambda connection, event: None
        self.addresses = addresses
        self._always_patient = timeout_s is not None
        self._connecting: asyncio.Task[Connection] | None = None
        # The waiting callers, each with a future that is done when the connection is refused.
        self._callers: dict[asyncio.Future[None], Patience] = {}
        self._why = "no answer in time"  # why the last attempt to connect failed

    @property
    def usable(self) -> Connection | None:
        """The connection if it is usable now, else None. A forked child has none."""
        return self.connection if self.connection is not None and self.connection.usable else None

    async def connect(self, timeout_s: float | None = None, patience: Patience = Patience.SILENT) -> Connection:
        """Return a usable connection.

        Raises:
            Unavailable: connecting took longer than `timeout_s`, the connection was refused and the caller has no
                patience, or the client was closed.
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
        """Remove a caller. If no caller is left, stop connecting."""
        self._callers.pop(refused, None)
        refused.cancel()
        if not self._callers and self._connecting is connecting and not connecting.done():
            self._connecting = None
            connecting.cancel()

    def unavailable(self) -> Unavailable:
        """Return the error for the last failed attempt."""
        return protocol.unavailable(self.addresses.find(), self._why)

    async def _connect(self) -> Connection:
        """Try to connect until a daemon answers. Each caller decides how long it waits for that."""
        address = self.addresses.find()
        pause_s, longest_s = _BACKOFF_S
        start_at = time.monotonic() + (_RESTART_S if self.connection is not None else 0.0)
        may_start = protocol.autostart_wanted(address)
        starter = autostart.Autostart(address)
        logged = False
        try:
            while True:
                wait_s = random_s(pause_s / 2, pause_s)
                callers = list(self._callers)  # callers that come later get the result of the next attempt
                try:
                    connection = await self._open(address, ping=may_start)
                    if logged:
                        log.warning("connected to regd at %s", address)
                    return connection
                except Unavailable:
                    raise  # the daemon refused, so another attempt would fail too
                except TimeoutError:
                    self._why = "no answer in time"
                except OSError as error:
                    self._why = _text(error)
                    if may_start and time.monotonic() >= start_at and autostart.is_gone(error):
                        wait_s = starter.step()
                        self._why = starter.why
                    elif not may_start and is_refused(error):
                        self._refuse(callers)
                if not logged and Patience.LOGGED in self._callers.values():
                    logged = True
                    log.warning("%s; still trying", self.unavailable())
                await pause(wait_s)
                pause_s = min(2 * pause_s, longest_s)
        finally:
            starter.close()

    async def _open(self, address: protocol.Address, ping: bool) -> Connection:
        async with asyncio.timeout(self.timeout_s):
            connection = await Connection.open(address, self.on_lost)
            if ping:
                await _check_answer(connection)
            return connection

    def _refuse(self, callers: "list[asyncio.Future[None]]") -> None:
        """Fail the callers with `Patience.NONE`."""
        for refused in callers:
            if self._callers.get(refused) is Patience.NONE and not refused.done():
                refused.set_result(None)

    def _done(self, task: "asyncio.Task[Connection]") -> None:
        if self._connecting is task:
            self._connecting = None
            if not task.cancelled() and task.exception() is None:
                self.connection = task.result()
        elif not task.cancelled() and task.exception() is None:
            task.result().abort("all callers have given up")

    def end(self) -> None:
        """Close the connection, and cancel an attempt to connect, without waiting."""
        connecting, self._connecting = self._connecting, None
        if connecting is not None:
            connecting.cancel()
        if self.connection is not None:
            self.connection.end()

    async def close(self) -> None:
        """Close the connection, and cancel an attempt to connect. Wait until the sockets are closed."""
        connecting = self._connecting
        self.end()
        if self.connection is not None:
            await self.connection.close()
        if connecting is not None:
            await asyncio.wait((connecting,))


def is_refused(error: OSError) -> bool:
    """Return whether the error means that no process listens at the address."""
    return isinstance(error, ConnectionRefusedError | FileNotFoundError) or (
        # For a host with several addresses, asyncio raises one error with all texts.
        error.errno is None and f"[Errno {errno.ECONNREFUSED}]" in str(error)
    )


def _text(error: OSError) -> str:
    # asyncio's own text for a refused connection is "Connect call failed ('127.0.0.1', 7343)".
    return os.strerror(error.errno) if error.errno and error.errno > 0 else error.strerror or str(error)


async def _check_answer(connection: Connection) -> None:
    """Check that the daemon answers a ping.

        A daemon that is about to exit because it was idle still accepts connections, but answers nothing.

    Raises:
        OSError: the daemon closed the connection before it sent anything.
        Unavailable: the program at the address is not regd, or the daemon has too many connections.
    """
    try:
        await connection.ask("ping", {})
    except BaseException as error:
        connection.abort("it did not answer a ping")
        if isinstance(error, Unavailable) and not connection.received:
            raise ConnectionResetError("it closed the connection before the reply") from None
        raise
