"""What a client has registered and follows is the truth: after a break this task makes it so again.

It lives as long as there is something to keep. Must not know what becomes of a registration, or of a picture.
"""

import asyncio
import contextlib
import random
import time

from regd_client.connection import Connection
from regd_client.connector import Connector, Patience, pause
from regd_client.errors import RegdError
from regd_client.holding import Holdings
from regd_client.logger import log
from regd_client.watches import WatchState

_PAUSE_S = (0.02, 0.5)  # at most, before the first try to make all good, and before others
_AGAIN_S = 1.0  # between two tries to register again what the daemon could not take
_QUIET_S = 5.0  # a daemon that is silent for so long is asked whether it is there


class Registrar:
    """`holdings` are the registrations."""

    def __init__(self, link: Connector) -> None:
        self._link = link
        self.holdings = Holdings(link, self._keep)
        self._follows: dict[WatchState, None] = {}
        self._task: asyncio.Task[None] | None = None
        self._idle = asyncio.Event()  # there is nothing to keep any more

    def following(self, follow: WatchState) -> "_Following":
        """Follow, over breaks, until the end of the `async with`."""
        return _Following(self, follow)

    async def begin(self, follow: WatchState) -> None:
        """Follow from now on.

        Raises:
            RegdError: the daemon is away, or does not take the pattern.
        """
        connection = await self._link.connected(patience=Patience.NONE)
        try:
            await self._follow(connection, follow)
        except BaseException:
            self.stop(follow)
            raise
        self._follows[follow] = None
        self._keep()

    def stop(self, follow: WatchState) -> None:
        """Follow no more."""
        self._follows.pop(follow, None)
        if isinstance(follow.on, Connection):
            follow.on.forget(follow.take)  # the watch is that connection's, and no other's
        follow.end()
        self._keep()

    async def _follow(self, connection: Connection, follow: WatchState) -> None:
        try:
            await connection.ask("watch", follow.begin(connection), follow.take)
        except RegdError:
            follow.pause()
            raise

    def end(self) -> None:
        """Keep nothing more; who follows is told."""
        follows, self._follows = self._follows, {}
        for follow in follows:
            follow.end()
        if self._task is not None:
            task, self._task = self._task, None
            task.cancel()

    # The task.

    @property
    def _wanted(self) -> bool:
        return bool(self.holdings or self._follows)

    def _keep(self) -> None:
        if not self._wanted:
            self._idle.set()
        elif self._task is None or self._task.done():
            self._task = asyncio.create_task(self._run(), name="regd-client-keep")
            _TASKS.add(self._task)
            self._task.add_done_callback(self._over)

    def _over(self, task: "asyncio.Task[None]") -> None:
        _TASKS.discard(task)
        if task.cancelled():
            if self._task is task and self._link.connection is not None:
                self._link.connection.abort("the event loop ended")  # and nobody else will close it
        elif (bug := task.exception()) is not None:
            log.error("what was registered is not kept any more", exc_info=bug)

    async def _run(self) -> None:
        told = False
        while self._wanted:
            try:
                connection = await self._link.connected()
                whole = await self._restore(connection)
            except RegdError as trouble:
                if not told:
                    log.warning("the registry is away, still trying: %s", trouble)
                    told = True
                await pause(random.uniform(0, _PAUSE_S[1]))
                continue
            if told:
                log.warning("the registry is back")
                told = False
            await self._while_it_lasts(connection, None if whole else _AGAIN_S)
            if not connection.usable:
                await pause(random.uniform(0, _PAUSE_S[0]))  # not all clients of a daemon at once

    async def _restore(self, connection: Connection) -> bool:
        """Register again and follow again what this connection does not know. Returns whether all is done."""
        whole = await self.holdings.restore(connection)
        for follow in list(self._follows):
            if follow.on is not connection and not follow.ended:
                await self._follow(connection, follow)
        return whole

    async def _while_it_lasts(self, connection: Connection, again_s: float | None) -> None:
        """Wait until the connection breaks, or something is to be done. One that says nothing is asked."""
        while connection.usable and self._wanted:
            self._idle.clear()
            quiet_s = time.monotonic() - connection.heard_at
            idle = asyncio.ensure_future(self._idle.wait())
            try:
                await asyncio.wait(
                    (connection.closed, idle),
                    timeout=max(0.0, _QUIET_S - quiet_s) if again_s is None else again_s,
                    return_when=asyncio.FIRST_COMPLETED,
                )
            finally:
                idle.cancel()
            if again_s is not None:
                return
            if connection.usable and time.monotonic() - connection.heard_at >= _QUIET_S:
                with contextlib.suppress(RegdError):
                    await connection.ask("ping", {})


class _Following:
    """No generator: at its end an event loop closes all that are left at once, and one within another breaks."""

    def __init__(self, keeper: Registrar, follow: WatchState) -> None:
        self._keeper = keeper
        self._follow = follow

    async def __aenter__(self) -> None:
        await self._keeper.begin(self._follow)

    async def __aexit__(self, *_: object) -> None:
        self._keeper.stop(self._follow)


_TASKS: set["asyncio.Task[None]"] = set()  # a loop keeps its tasks weakly
