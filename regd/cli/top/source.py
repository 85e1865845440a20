"""The data of `regctl top`: a watch that reconnects, `stats` at intervals, and `why` for one instance."""

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
from regd.cli.top.render import DaemonStatus, Line, frame
from regd.cli.top.view_state import ViewState
from regd_client import protocol
from regd_client.connector import Connector
from regd_client.errors import NotFound, RegdError, Unavailable
from regd_client.models import Event
from regd_client.registrar import Registrar
from regd_client.watches import WatchState

_CONNECT_S = 1.0  # the timeout of one attempt to connect
_WHY_PAUSE_S = 0.1  # minimum time between two `why` requests
_SNAPSHOT_S = 15.0  # time for the first snapshot
_FRAME_PAUSE_S = 0.05  # minimum time between two frames
_IDLE_FACTOR = 4  # the pause is at least so many times as long as rendering the last frame took


def frame_pause_s(render_s: float) -> float:
    """Return the seconds until the next frame, so that rendering uses at most a fifth of the CPU time."""
    return max(_FRAME_PAUSE_S, _IDLE_FACTOR * render_s)


class Source:
    """Keeps a table of the registry up to date, and calls `changed` after every update."""

    def __init__(self, address: str | None, pattern: str | None, view: ViewState, interval_s: float) -> None:
        self.table = Table()
        self.view = view
        self.changed: Callable[[], None] = lambda: None
        self.stats: dict[str, Any] = {}
        self._interval_s = interval_s
        addresses = protocol.AddressFinder(address)
        self.address = str(addresses.find())
        self._title = f"regd at {self.address.removeprefix('tcp://')}" + (f"  {pattern}" if pattern else "")
        self._connector = Connector(addresses, _CONNECT_S)
        self._registrar = Registrar(self._connector)
        self._rates = Rates()
        self._complete = asyncio.Event()
        self._watch = WatchState(pattern or "*", None, self._on_event, self._complete.set)
        self._why_is_due = asyncio.Event()

    @property
    def daemon(self) -> DaemonStatus:
        return DaemonStatus(self._title, self._rates.figures, self._watch.stale_s)

    @property
    def instances(self) -> list[dict[str, Any]]:
        """The instances as dictionaries with the fields of the protocol."""
        entries = sorted(self._watch.instances.items())
        return [
            {name: fields[name] for name in fields if name not in ("event", "watch")} for _, fields in entries
        ]

    def frame(self, columns: int, rows: int) -> list[Line]:
        """Render the view for a terminal of this size."""
        return frame(self.table, self.view, self.daemon, (columns, rows), time.monotonic(), time.time())

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Wait for the first snapshot, and keep the table up to date until the end of the `async with`.

        Raises:
            Unavailable: no daemon answers, or the daemon is too slow.
            RegdError: the daemon refuses the pattern.
        """
        logging.getLogger("regd_client").addHandler(logging.NullHandler())  # the frame shows what the client logs
        try:
            try:
                async with asyncio.timeout(_SNAPSHOT_S):
                    await self._registrar.watch(self._watch)
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
            self._registrar.unwatch(self._watch)
            self._registrar.stop()
            await self._connector.close()

    async def poll(self) -> None:
        """Request `stats` at intervals, and `why` for the selected instance, until cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._repeat(self._ask_stats, self.refresh_why, self._interval_s))
            group.create_task(self._repeat(self._ask_why, lambda: None, _WHY_PAUSE_S))

    async def _repeat(
        self, ask: Callable[[], Awaitable[None]], afterwards: Callable[[], None], pause_s: float
    ) -> None:
        while True:
            with contextlib.suppress(RegdError):  # the frame shows that the daemon is away
                await ask()
            afterwards()
            self.changed()
            await asyncio.sleep(pause_s)

    def refresh_why(self) -> None:
        """Request `why` for the selected instance again."""
        self._why_is_due.set()

    def _on_event(self, event: Event) -> None:
        endpoint = event.endpoint
        key: Key = ("", "") if endpoint is None else (endpoint.name, endpoint.instance)
        fields = self._watch.instances.get(key) if event.kind != "down" else None
        self.table.take(event.kind, key, fields, time.monotonic(), event.reason)
        if event.kind == "sync":
            self._complete.set()
        elif key == self.view.about:
            self.refresh_why()
        self.changed()

    async def _ask_stats(self) -> None:
        reply = await (await self._connector.connect()).ask("stats", {})
        self.stats = {name: reply[name] for name in reply if name not in ("ok", "id")}
        self._rates.take(self.stats)

    async def _ask_why(self) -> None:
        await self._why_is_due.wait()
        self._why_is_due.clear()
        view, key = self.view, self.view.about
        if view.pane != "why" or key is None:
            return
        name, instance = key
        try:
            reply = await (await self._connector.connect()).ask("why", {"name": name, "instance": instance})
            text = list(lines("why", reply))
        except NotFound as error:
            text = [str(error)]
        if view.about == key:
            view.why = text
