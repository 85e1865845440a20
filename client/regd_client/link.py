"""The connection of a client: opened when it is needed, once for all who ask meanwhile, and again after a break.

Must not know what goes over it.
"""

import asyncio
import random
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

from regd_client import wire
from regd_client.connection import Connection, Lost
from regd_client.errors import RegdError, Unavailable
from regd_client.wire import Address

_BACKOFF_S = (0.02, 0.5)  # the first and the longest pause between tries to connect

T = TypeVar("T")

Opener = Callable[[Address, Lost], Awaitable[Connection]]
opener: Opener = Connection.open  # `regd_client.testing` puts its own here


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
        until = time.monotonic() + self.timeout_s
        pause_s, longest_s = _BACKOFF_S
        while True:
            try:
                async with asyncio.timeout(max(0.0, until - time.monotonic())):
                    made = await open(address, self.lost)
                self._opener = open
                return made
            except Unavailable:
                raise  # whoever says so itself knows that trying on is no use
            except TimeoutError:
                self._why = "no answer in time"
            except OSError as error:
                self._why = error.strerror or str(error)
            if time.monotonic() + pause_s >= until:  # no time for another try
                raise self.away()
            await asyncio.sleep(pause_s * random.uniform(0.5, 1.0))
            pause_s = min(2 * pause_s, longest_s)

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
