"""From start to end: what is opened in which order, and closed in the other. The one place that puts the parts
together. Must not know signals or command lines, so that a test can start one in its own loop.
"""

import asyncio
import contextlib
import logging
import os
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from regd.core.limits import DEFAULT, Limits
from regd.core.registry import Registry
from regd.server.answers import Answers, identify
from regd.server.clock import Clock, LoopClock
from regd.server.connection import Budget, Connection, Context
from regd.server.engine import Engine
from regd.server.listener import Listeners, raise_open_files
from regd.server.tally import Tally
from regd.storage.files import Files
from regd.storage.store import Store

log = logging.getLogger("regd")

DEFAULT_PORT = 7343  # "REGD" on a phone's keys
_GOODBYE_S = 2.0  # for replies to leave before the connections are cut


def default_registry(environment: Mapping[str, str]) -> Path:
    """Return where the registry is kept when nobody says: the service manager's place, or the user's."""
    if folder := environment.get("STATE_DIRECTORY"):
        return Path(folder.partition(":")[0]) / "registry.json"  # systemd.exec(5): may be several
    home = environment.get("XDG_STATE_HOME")
    base = Path(home) if home and os.path.isabs(home) else Path.home() / ".local" / "state"
    return base / "regd" / "registry.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    registry: Path
    port: int = DEFAULT_PORT
    unix: Path | None = None
    limits: Limits = DEFAULT


class Server:
    """A daemon in the running loop: `await start()`, and `await stop()`.

    `clock`, `files` and `epoch` are for tests.
    """

    def __init__(
        self,
        config: Config,
        *,
        clock: Clock | None = None,
        files: Files | None = None,
        epoch: str | None = None,
    ) -> None:
        self._config = config
        self._clock = clock or LoopClock()
        self._files = files or Files()
        self._epoch = epoch or secrets.token_hex(8)
        self._listeners = Listeners()
        self._servers: list[asyncio.Server] = []
        self._store = Store(config.registry, log.warning, self._files)
        self._engine: Engine | None = None
        self._context: Context | None = None
        self._engine_task: asyncio.Task[None] | None = None

    @property
    def addresses(self) -> list[str]:
        """Return where it listens, as `tcp://HOST:PORT` and `unix:///path`."""
        return self._listeners.addresses

    @property
    def connections(self) -> "set[Connection]":
        return self._context.connections if self._context else set()

    @property
    def waiting_bytes(self) -> int:
        """What is kept of lines that are unfinished or unanswered."""
        return self._context.input.total if self._context else 0

    @property
    def unsent_bytes(self) -> int:
        """What waits for peers that do not read."""
        return self._context.output.total if self._context else 0

    async def start(self) -> None:
        """Open everything, or leave nothing behind.

        Raises:
            ListenError: an address cannot be had; nothing was touched.
            StorageError: the registry cannot be used; it was not changed.
        """
        try:
            await self._start()
        except BaseException:
            self._close_files()
            raise

    async def _start(self) -> None:
        config = self._config
        limits = replace(config.limits, connections_max=raise_open_files(config.limits.connections_max))
        # 1. Addresses first: a second regd must end here, before it touches a file.
        self._listeners.open_tcp(config.port)
        # 2. The registry: locked, read, and made where it is missing.
        document = self._store.open(self._clock.wall())
        if config.unix is not None:
            self._listeners.open_unix(config.unix, self._files)
        self._store.make()
        registry = Registry(document.entries, document.rev, limits)
        # 3. The parts.
        tally = Tally()
        self._engine = Engine(registry, self._store, self._clock, tally, limits)
        identity = identify(self._epoch, _loop_name(), str(self._store.path), self._clock.now())
        self._context = Context(
            limits=limits,
            engine=self._engine,
            answers=Answers(registry, identity, self._clock, tally, limits),
            clock=self._clock,
            tally=tally,
            input=Budget(limits.input_bytes_total_max),
            output=Budget(limits.output_bytes_total_max),
        )
        self._engine_task = asyncio.create_task(self._engine.run(), name="regd-engine")
        # 4. Serve.
        context, loop = self._context, asyncio.get_running_loop()
        for each in self._listeners.sockets:
            create = loop.create_unix_server if each.family.name == "AF_UNIX" else loop.create_server
            self._servers.append(await create(lambda: Connection(context), sock=each, backlog=4_096))
        for note in self._listeners.notes:
            log.warning("%s", note)
        log.info("%d registrations at revision %d from %s", len(registry), registry.rev, self._store.path)

    async def failed(self) -> None:
        """Wait for ever, or raise what ended the engine: a bug, and the end of the process."""
        assert self._engine_task is not None
        await asyncio.shield(self._engine_task)

    async def stop(self) -> None:
        """Leave in order, with the last commit on disk. Twice is harmless."""
        # 1. Let nobody in.
        for server in self._servers:
            server.close()
        # 2. Take no more writes; those that wait still land, and are answered.
        if self._engine is not None and self._engine_task is not None:
            self._engine.close()
            await asyncio.gather(self._engine_task, return_exceptions=True)
        # 3. Let the replies out, and cut who does not take them.
        if self._context is not None:
            await self._say_goodbye(self._context)
        # 4. Addresses, lock.
        self._close_files()

    async def _say_goodbye(self, context: Context) -> None:
        await asyncio.sleep(0)  # what has just landed is sent in the loop's next turn
        for connection in list(context.connections):
            connection.close()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_GOODBYE_S if context.connections else 0):
                await context.alone.wait()
        for connection in list(context.connections):
            connection.cut()
        await asyncio.sleep(0)

    def _close_files(self) -> None:
        self._listeners.close(self._files)
        self._store.close()


def _loop_name() -> str:
    """Return which event loop runs: `asyncio`, or `uvloop`."""
    return type(asyncio.get_running_loop()).__module__.partition(".")[0]
