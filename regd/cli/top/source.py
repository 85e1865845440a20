"""Where `regctl top` hears: one watch that goes on over breaks, `stats` at intervals, and `why` of one instance.

Must not know how anything is shown.
"""

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
from regd.cli.top.render import DaemonInfo
from regd.cli.top.view_state import ViewState
from regd_client import protocol
from regd_client.connector import Connector
from regd_client.errors import NotFound, RegdError, Unavailable
from regd_client.models import Event
from regd_client.registrar import Registrar
from regd_client.watches import WatchState

_CONNECT_S = 1.0  # for a try; the next one follows
_PAUSE_S = 0.1  # between two questions about an instance, however much happens to it
_PICTURE_S = 15.0  # for the first picture


class Source:
    """`changed` is called when there is something else to see. `daemon` is how it is at the other end."""

    def __init__(self, address: str | None, pattern: str | None, look: ViewState, interval_s: float) -> None:
        self.picture = Table()
        self.look = look
        self.changed: Callable[[], None] = lambda: None
        self.stats: dict[str, Any] = {}
        self._interval_s = interval_s
        self.address = str(protocol.find_address(address))
        self._title = f"regd at {self.address.removeprefix('tcp://')}" + (f"  {pattern}" if pattern else "")
        self._link = Connector(address, _CONNECT_S)
        self._keeper = Registrar(self._link)
        self._rates = Rates()
        self._complete = asyncio.Event()
        self._follow = WatchState(pattern or "*", None, self._heard, self._complete.set)
        self._asked = asyncio.Event()  # for a `why`

    @property
    def daemon(self) -> DaemonInfo:
        return DaemonInfo(self._title, self._rates.figures, self._follow.stale_s)

    @property
    def instances(self) -> list[dict[str, Any]]:
        """All that is there, as the daemon says it."""
        found = sorted(self._follow.picture.items())
        return [{name: fields[name] for name in fields if name not in ("event", "watch")} for _, fields in found]

    @contextlib.asynccontextmanager
    async def following(self) -> AsyncIterator[None]:
        """Hear, from the first picture to the end of the `async with`.

        Raises:
            Unavailable: there is no daemon, or it tells too little.
            RegdError: it does not take the pattern.
        """
        logging.getLogger("regd_client").addHandler(logging.NullHandler())  # the frame says what there is to say
        try:
            async with contextlib.AsyncExitStack() as stack:
                try:
                    async with asyncio.timeout(_PICTURE_S):
                        await stack.enter_async_context(self._keeper.watching(self._follow))
                        await self._complete.wait()
                        await self._ask_stats()
                except TimeoutError as error:
                    if isinstance(error, RegdError):
                        raise
                    raise Unavailable(
                        f"the daemon at {self.address} told too little in {_PICTURE_S:g} s"
                    ) from None
                yield
        finally:
            self._keeper.stop()
            await self._link.close()

    async def ask(self) -> None:
        """Ask for figures at intervals, and for a `why` that somebody wants to see, until cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._ask_again(self._ask_stats, self.ask_now, self._interval_s))
            group.create_task(self._ask_again(self._ask_why, lambda: None, _PAUSE_S))

    async def _ask_again(
        self, ask: Callable[[], Awaitable[None]], then: Callable[[], None], pause_s: float
    ) -> None:
        while True:
            with contextlib.suppress(RegdError):  # it is away: the frame says so
                await ask()
            then()
            self.changed()
            await asyncio.sleep(pause_s)

    def ask_now(self) -> None:
        """Ask for the `why` that is to be seen, as something is different."""
        self._asked.set()

    def _heard(self, event: Event) -> None:
        found = event.endpoint
        key: Key = ("", "") if found is None else (found.name, found.instance)
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
        look, asked = self.look, self.look.about
        if look.pane != "why" or asked is None:
            return
        name, instance = asked
        try:
            reply = await (await self._link.connect()).ask("why", {"name": name, "instance": instance})
            told = list(lines("why", reply))
        except NotFound as nothing:
            told = [str(nothing)]
        if look.about == asked:
            look.why = told
