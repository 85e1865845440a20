"""The data source of `regctl top`: a watch that reconnects, `stats` at intervals, and `why` of one instance."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from regd.cli.output import lines
from regd.cli.top.model import Key, Table
from regd.cli.top.rates import Rates
from regd.cli.top.render import DaemonStatus
from regd.cli.top.view_state import ViewState
from regd_client import protocol
from regd_client.connector import Connector
from regd_client.errors import NotFound, RegdError, Unavailable
from regd_client.models import Event
from regd_client.registrar import Registrar
from regd_client.watches import WatchState

_CONNECT_S = 1.0  # the timeout of one try to connect
_PAUSE_S = 0.1  # between two `why`, at least
_SNAPSHOT_S = 15.0  # for the first snapshot


class Source:
    """Keeps a table of the registry up to date, and calls `changed` after every update."""

    def __init__(self, address: str | None, pattern: str | None, look: ViewState, interval_s: float) -> None:
        self.picture = Table()
        self.look = look
        self.changed: Callable[[], None] = lambda: None
        self.stats: dict[str, Any] = {}
        self._interval_s = interval_s
        addresses = protocol.AddressFinder(address)
        self.address = str(addresses.find())
        self._title = f"regd at {self.address.removeprefix('tcp://')}" + (f"  {pattern}" if pattern else "")
        self._link = Connector(addresses, _CONNECT_S)
        self._keeper = Registrar(self._link)
        self._rates = Rates()
        self._complete = asyncio.Event()
        self._follow = WatchState(pattern or "*", None, self._heard, self._complete.set)
        self._asked = asyncio.Event()  # for another `why`

    @property
    def daemon(self) -> DaemonStatus:
        return DaemonStatus(self._title, self._rates.figures, self._follow.stale_s)

    @property
    def instances(self) -> list[dict[str, Any]]:
        """The instances, with the fields of the protocol."""
        entries = sorted(self._follow.picture.items())
        return [
            {name: fields[name] for name in fields if name not in ("event", "watch")} for _, fields in entries
        ]

    @contextlib.asynccontextmanager
    async def following(self) -> AsyncIterator[None]:
        """Follow the registry, from the first snapshot to the end of the `async with`.

        Raises:
            Unavailable: no daemon answers, or it is too slow.
            RegdError: the daemon refuses the pattern.
        """
        logging.getLogger("regd_client").addHandler(logging.NullHandler())  # the frame shows all of it
        try:
            async with contextlib.AsyncExitStack() as stack:
                try:
                    async with asyncio.timeout(_SNAPSHOT_S):
                        await stack.enter_async_context(self._keeper.watching(self._follow))
                        await self._complete.wait()
                        await self._ask_stats()
                except TimeoutError as error:
                    if isinstance(error, RegdError):
                        raise
                    raise Unavailable(
                        f"the daemon at {self.address} did not send its registrations within {_SNAPSHOT_S:g} s"
                    ) from None
                yield
        finally:
            self._keeper.stop()
            await self._link.close()

    async def ask(self) -> None:
        """Request `stats` at intervals, and `why` of the selected instance, until cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._repeat(self._ask_stats, self.ask_now, self._interval_s))
            group.create_task(self._repeat(self._ask_why, lambda: None, _PAUSE_S))

    async def _repeat(
        self, ask: Callable[[], Awaitable[None]], afterwards: Callable[[], None], pause_s: float
    ) -> None:
        while True:
            with contextlib.suppress(RegdError):  # the frame shows that it is away
                await ask()
            afterwards()
            self.changed()
            await asyncio.sleep(pause_s)

    def ask_now(self) -> None:
        """Request `why` of the selected instance again, as it may have changed."""
        self._asked.set()

    def _heard(self, event: Event) -> None:
        endpoint = event.endpoint
        key: Key = ("", "") if endpoint is None else (endpoint.name, endpoint.instance)
        fields = self._follow.picture.get(key) if event.kind != "down" else None
        self.picture.take(event.kind, key, fields, time.monotonic(), event.reason)
        if event.kind == "sync":
            self._complete.set()
        elif key == self.look.about:
            self.ask_now()
        self.changed()

    async def _ask_stats(self) -> None:
        reply = await (await self._link.connect()).ask("stats", {})
        self.stats = {name: reply[name] for name in reply if name not in ("ok", "id")}
        self._rates.take(self.stats)

    async def _ask_why(self) -> None:
        await self._asked.wait()
        self._asked.clear()
        look, key = self.look, self.look.about
        if look.pane != "why" or key is None:
            return
        name, instance = key
        try:
            reply = await (await self._link.connect()).ask("why", {"name": name, "instance": instance})
            text = list(lines("why", reply))
        except NotFound as error:
            text = [str(error)]
        if look.about == key:
            look.why = text
