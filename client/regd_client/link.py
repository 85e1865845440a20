"""The connection of a client: opened when it is needed, once for all who ask meanwhile, and again after a break.

Must not know what goes over it.
"""

import asyncio
import random
import time
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, TypeVar

from regd_client import wire
from regd_client.connection import Connection, Lost
from regd_client.errors import RegdError, Unavailable
from regd_client.wire import Address

if TYPE_CHECKING:
    from regd_client.starting import Start

_RESTART_S = 1.0  # for a daemon that was here to come back by itself, before another is started
_BACKOFF_S = (0.02, 0.5)  # the first and the longest pause between tries to connect

T = TypeVar("T")

Opener = Callable[[Address, Lost], Awaitable[Connection]]
_real: Opener = Connection.open
opener: Opener = _real  # `regd_client.testing` puts its own here


class Link:
    """`connection` is the last one, usable or not. `lost` hears of what a connection holds no more.

    It goes back to where it was first: what was registered at a fake must not come to a daemon.
    """

    def __init__(self, address: str | None, timeout_s: float) -> None:
        self.timeout_s = timeout_s
        self.connection: Connection | None = None
        self.lost: Lost = lambda connection, event: None
        self._address = address
        self._opener: Opener | None = None
        self._connecting: asyncio.Task[Connection] | None = None
        self._why = "no answer in time"  # the last try failed

    @property
    def usable(self) -> Connection | None:
        """The connection, where there is nothing to wait for. In a child that was forked there is none."""
        return self.connection if self.connection is not None and self.connection.usable else None

    async def connected(self, within_s: float | None = None) -> Connection:
        """Return a connection that is usable, within the time that is left to the caller.

        Raises:
            Unavailable: there is none in time, or the client was closed.
        """
        if (usable := self.usable) is not None:
            return usable
        if self._connecting is None:
            self._connecting = asyncio.create_task(self._connect(), name="regd-client-connect")
            self._connecting.add_done_callback(self._done)
        try:
            async with asyncio.timeout(within_s):
                return await joined(self._connecting)
        except TimeoutError:
            raise self.away() from None

    def away(self) -> Unavailable:
        """Return the error of a daemon that cannot be reached."""
        return wire.unavailable(wire.find_address(self._address), self._why)

    async def _connect(self) -> Connection:
        address = wire.find_address(self._address)
        open = self._opener or opener
        began = time.monotonic()
        until = began + self.timeout_s
        pause_s, longest_s = _BACKOFF_S
        demand = _Demand(address, open, began + _RESTART_S if self.connection is not None else began)
        try:
            while True:
                wait_s = pause_s * random.uniform(0.5, 1.0)
                try:
                    async with asyncio.timeout(max(0.0, until - time.monotonic())):
                        made = await demand.met(await open(address, self.lost))
                    self._opener = open
                    return made
                except Unavailable:
                    raise  # whoever says so itself knows that trying on is no use
                except TimeoutError:
                    self._why = "no answer in time"
                except OSError as error:
                    self._why, wait_s = demand.after(error, wait_s)
                if time.monotonic() + wait_s >= until:  # no time for another try
                    raise self.away()
                await asyncio.sleep(wait_s)
                pause_s = min(2 * pause_s, longest_s)
        finally:
            demand.close()

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


class _Demand:
    """Starts a daemon where none is there and one may be, from a moment on (monotonic seconds)."""

    def __init__(self, address: Address, open: Opener, due_at: float) -> None:
        self._address = address
        self._may = open is _real and wire.autostarts(address)
        self._due_at = due_at
        self._start: Start | None = None

    async def met(self, made: Connection) -> Connection:
        """See that the daemon is there: one that just ends for want of work takes nobody any more.

        Raises:
            OSError: it ended before it said anything.
            Unavailable: whoever is there is no regd, or has no room.
        """
        if not self._may:
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
        why = error.strerror or str(error)
        if not self._may or time.monotonic() < self._due_at:
            return why, pause_s
        from regd_client import starting

        if not starting.is_gone(error):
            return why, pause_s
        if self._start is None:
            self._start = starting.Start(self._address)
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
