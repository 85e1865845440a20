"""Keeps the state for DNS up to date, with a watch that resumes after a restart of the daemon."""

import asyncio
import logging
from collections.abc import Callable

from regd.gateways.name_index import NameIndex
from regd_client.autostart import NOT_STARTED
from regd_client.connector import Connector
from regd_client.errors import RegdError
from regd_client.models import Event
from regd_client.protocol import AddressFinder
from regd_client.registrar import Registrar
from regd_client.watches import WatchState

__all__ = ["STALE_S_MAX", "NameWatch"]

log = logging.getLogger("regd.gateways")
# Without a daemon, DNS answers from the last known state for this time. A restart of the daemon takes about 1 s.
STALE_S_MAX = 60.0
_PAUSE_S = 0.5  # between two attempts to start the watch


class NameWatch:
    """A watch of all names.

    In a project, the watch also starts the daemon if none runs. A daemon does not exit for being idle while the
    watch is connected.

    Args:
        address: the daemon's address; None for the default.
        on_change: called after every change of the state.

    Attributes:
        first_attempt: set once the first attempt to reach the daemon has succeeded or failed.
    """

    def __init__(self, address: str | None, on_change: Callable[[], None] = lambda: None) -> None:
        self._index = NameIndex()
        self._on_change = on_change
        self._is_complete = False
        self._watch = WatchState("*", None, self._take)
        self._connector = Connector(AddressFinder(address), None)
        self._registrar = Registrar(self._connector)
        self._starting: asyncio.Task[None] | None = None
        self._reported = ""
        self.first_attempt = asyncio.Event()

    def state(self) -> NameIndex | None:
        """Return the current state; None if the state is not complete yet, or too old."""
        return self._index if self._is_complete and self._watch.stale_s <= STALE_S_MAX else None

    def start(self) -> None:
        """Start a task that starts the watch as soon as a daemon answers."""
        self._starting = asyncio.create_task(self._start(), name="regd-gateway-watch")

    async def close(self) -> None:
        """End the watch, and close its connection. Idempotent."""
        if self._starting is not None:
            self._starting.cancel()
            await asyncio.gather(self._starting, return_exceptions=True)
        self._registrar.unwatch(self._watch)
        self._registrar.stop()
        await self._connector.close()

    async def _start(self) -> None:
        """Start the watch, as soon as a daemon answers. The registrar resumes it from then on."""
        while True:
            try:
                await self._registrar.watch(self._watch)
                return
            except RegdError as error:
                self._report(error)
            finally:
                self.first_attempt.set()
            await asyncio.sleep(_PAUSE_S)

    def _report(self, error: RegdError) -> None:
        """Log why a daemon cannot be started. Log nothing if the only problem is that none runs."""
        if error.code == NOT_STARTED and str(error) != self._reported:
            self._reported = str(error)
            log.warning("%s", error)

    def _take(self, event: Event) -> None:
        if event.endpoint is None:
            self._is_complete = True
        else:
            key = (event.endpoint.name, event.endpoint.instance)
            if event.kind == "down":
                self._index.remove(*key)
            else:
                self._index.put(self._watch.instances[key])
        self._on_change()
