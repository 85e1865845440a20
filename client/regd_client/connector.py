"""The connection of a client: opened when it is needed, once for all who ask meanwhile, and again after a break.

Must not know what goes over it.
"""

import asyncio
import errno
import os
import random
import time
from enum import Enum
from types import BuiltinFunctionType
from typing import TYPE_CHECKING, TypeVar

from regd_client import wire
from regd_client.connection import Connection, Lost
from regd_client.errors import RegdError, Unavailable
from regd_client.logger import log
from regd_client.wire import Address

if TYPE_CHECKING:
    from regd_client.autostart import Autostart

TRY_S = 5.0  # to connect, where the caller says nothing
_RESTART_S = 1.0  # for a daemon that was here to come back by itself, before another is started
_BACKOFF_S = (0.02, 0.5)  # the first and the longest pause between tries to connect

T = TypeVar("T")


class Patience(Enum):
    """What to do while nobody listens at the address."""

    NONE = "fail as soon as the system refuses the connection"
    SILENT = "try again"
    TOLD = "try again, and log it at once"


def running_loop() -> asyncio.AbstractEventLoop:
    """Return the running event loop.

    Raises:
        RegdError: asyncio runs none here.
    """
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        raise RegdError(
            "regd_client needs asyncio, and no asyncio event loop runs here: under trio, or without a loop, use "
            "regd_client.blocking (in a thread)"
        ) from None


async def pause(seconds: float) -> None:
    """Sleep, also while a test has stopped the clock that the event loop reads, as freezegun does."""
    if isinstance(time.monotonic, BuiltinFunctionType):  # else it was replaced, perhaps by one that stands still
        await asyncio.sleep(seconds)
    else:
        await asyncio.to_thread(time.sleep, seconds)


class Connector:
    """`connection` is the last one, usable or not. `lost` hears of what a connection holds no more.

    `timeout_s` is how long it tries to connect, whoever calls; None: 5 s, if the caller has the patience.
    """

    def __init__(self, address: str | None, timeout_s: float | None) -> None:
        self.timeout_s = TRY_S if timeout_s is None else timeout_s
        self._always_patient = timeout_s is not None
        self.connection: Connection | None = None
        self.lost: Lost = lambda connection, event: None
        self.address = address
        self._connecting: asyncio.Task[Connection] | None = None
        self._waiting: dict[asyncio.Future[None], Patience] = {}  # done when the connection was refused
        self._why = "no answer in time"  # the last try failed

    @property
    def usable(self) -> Connection | None:
        """The connection, where there is nothing to wait for. In a child that was forked there is none."""
        return self.connection if self.connection is not None and self.connection.usable else None

    async def connected(self, within_s: float | None = None, patience: Patience = Patience.SILENT) -> Connection:
        """Return a connection that is usable, within the time that is left to the caller.

        Raises:
            Unavailable: there is none in time, nobody listens and there is no patience, or the client was closed.
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
        self._waiting[refused] = patience
        try:
            async with asyncio.timeout(self.timeout_s if within_s is None else within_s):
                await asyncio.wait((connecting, refused), return_when=asyncio.FIRST_COMPLETED)
                if not connecting.done():
                    raise self.away()
                return await joined(connecting)
        except TimeoutError:
            raise self.away() from None
        finally:
            self._forget(connecting, refused)

    def _forget(self, connecting: "asyncio.Task[Connection]", refused: "asyncio.Future[None]") -> None:
        """End the tries when the last who waits for them has gone."""
        self._waiting.pop(refused, None)
        refused.cancel()
        if not self._waiting and self._connecting is connecting and not connecting.done():
            self._connecting = None
            connecting.cancel()

    def away(self) -> Unavailable:
        """Return the error of a daemon that cannot be reached."""
        return wire.unavailable(wire.find_address(self.address), self._why)

    async def _connect(self) -> Connection:
        """Try until somebody answers; whoever waits decides how long."""
        address = wire.find_address(self.address)
        pause_s, longest_s = _BACKOFF_S
        began = time.monotonic()
        demand = _OnDemand(address, began + _RESTART_S if self.connection is not None else began)
        told = False
        try:
            while True:
                wait_s = pause_s * random.uniform(0.5, 1.0)
                asking = list(self._waiting)  # who came later has the next try
                try:
                    async with asyncio.timeout(self.timeout_s):
                        made = await demand.met(await Connection.open(address, self.lost))
                    if told:
                        log.warning("connected to regd at %s", address)
                    return made
                except Unavailable:
                    raise  # whoever says so itself knows that trying again is no use
                except TimeoutError:
                    self._why = "no answer in time"
                except OSError as error:
                    self._why, wait_s = demand.after(error, wait_s)
                    if not demand.starts and is_refused(error):
                        self._refused(asking)
                if not told and Patience.TOLD in self._waiting.values():
                    told = True
                    log.warning("%s; still trying", self.away())
                await pause(wait_s)
                pause_s = min(2 * pause_s, longest_s)
        finally:
            demand.close()

    def _refused(self, asking: "list[asyncio.Future[None]]") -> None:
        """Tell those who have no patience that they were refused."""
        for refused in asking:
            if self._waiting.get(refused) is Patience.NONE and not refused.done():
                refused.set_result(None)

    def _done(self, task: "asyncio.Task[Connection]") -> None:
        if self._connecting is task:
            self._connecting = None
            if not task.cancelled() and task.exception() is None:
                self.connection = task.result()
        elif not task.cancelled() and task.exception() is None:
            task.result().abort("nobody wants it any more")

    def end(self) -> None:
        """Let go of the connection, and of the one that is being opened."""
        connecting, self._connecting = self._connecting, None
        if connecting is not None:
            connecting.cancel()
        if self.connection is not None:
            self.connection.end()

    async def close(self) -> None:
        """End it, and wait until the socket has gone."""
        connecting = self._connecting
        self.end()
        if self.connection is not None:
            await self.connection.close()
        if connecting is not None:
            await asyncio.wait((connecting,))


def is_refused(error: OSError) -> bool:
    """Return whether the system says that nobody listens there."""
    return isinstance(error, ConnectionRefusedError | FileNotFoundError) or (
        # Of a host with several addresses asyncio gives all the errors as one text.
        error.errno is None and f"[Errno {errno.ECONNREFUSED}]" in str(error)
    )


class _OnDemand:
    """Starts a daemon where none is there and one may be, from a moment on (monotonic seconds)."""

    def __init__(self, address: Address, due_at: float) -> None:
        self._address = address
        self.starts = wire.autostarts(address)
        self._due_at = due_at
        self._start: Autostart | None = None

    async def met(self, made: Connection) -> Connection:
        """See that the daemon is there: one that just ends for want of work takes nobody any more.

        Raises:
            OSError: it ended before it said anything.
            Unavailable: whoever is there is no regd, or has no room.
        """
        if not self.starts:
            return made
        silent_since = made.heard_at
        try:
            await made.ask("ping", {})
        except BaseException as error:
            made.abort("it was not met")
            if isinstance(error, Unavailable) and made.heard_at == silent_since:
                raise ConnectionResetError("it ended before the answer") from None
            raise
        return made

    def after(self, error: OSError, pause_s: float) -> tuple[str, float]:
        """Return what is in the way, and how long to wait until the next try.

        Raises:
            Unavailable: it cannot be started.
        """
        # asyncio's own text for a refused connection is "Connect call failed ('127.0.0.1', 7343)".
        why = os.strerror(error.errno) if error.errno and error.errno > 0 else error.strerror or str(error)
        if not self.starts or time.monotonic() < self._due_at:
            return why, pause_s
        from regd_client import autostart

        if not autostart.is_gone(error):
            return why, pause_s
        if self._start is None:
            self._start = autostart.Autostart(self._address)
        pause_s = self._start.step()
        return self._start.why, pause_s

    def close(self) -> None:
        if self._start is not None:
            self._start.close()


async def joined(task: "asyncio.Task[T]") -> T:
    """Wait for what others wait for, too: it goes on when this caller is cancelled.

    Raises:
        Unavailable: it was cancelled itself, because the client was closed.
    """
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        if task.cancelled():
            raise Unavailable("the client was closed meanwhile") from None
        raise
    except RegdError as error:
        raise type(error)(str(error), error.code, error.details) from error
