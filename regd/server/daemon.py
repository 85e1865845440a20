"""The daemon: connects its parts, opens them in order, serves, and closes them in reverse order.

`regd.cli.regd` handles signals, process-wide settings and the command line, so that a test can run a daemon in
its own event loop.
"""

import asyncio
import contextlib
import logging
import math
import os
import socket
from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from regd.core.errors import Refused
from regd.core.history import History
from regd.core.limits import DEFAULT, Limits
from regd.core.model import Change, Entry, Holder, Key, Process
from regd.core.registry import Registry
from regd.core.transaction import OwnershipLost
from regd.server.acceptor import Acceptor
from regd.server.checkpointer import Checkpointer
from regd.server.connection import Connection, Connections
from regd.server.counters import Counters
from regd.server.daemon_info import DaemonInfo
from regd.server.dispatcher import DaemonParts
from regd.server.engine import Engine, Write
from regd.server.event_log import EventLog
from regd.server.explain import Explainer
from regd.server.handlers import Handlers
from regd.server.history_reader import HistoryReader
from regd.server.idle_exit import IdleExit
from regd.server.loop_monitor import LoopMonitor
from regd.server.quotas import BufferQuota, MemoryQuota, Share, Slots
from regd.server.reaper import Reaper
from regd.server.resolve_cache import ResolveCache
from regd.server.scheduler import READONLY_S, FairScheduler
from regd.server.sessions import Sessions
from regd.server.stalls import Stalls
from regd.server.waiting_resolves import WaitingResolves
from regd.server.watches import Watches
from regd.storage.files import Files
from regd.storage.store import StorageError, Store
from regd.system.clock import Clock, LoopClock
from regd.system.listener import InheritedSocket, Listeners
from regd.system.peer_credentials import PeerCredentials
from regd.system.probes import ProbeResults

log = logging.getLogger("regd")

DEFAULT_GRACE_S = 30.0
DEFAULT_PORT = 7343  # "REGD" on a telephone keypad
_LAST_REPLIES_S = 2.0  # for clients to read the last replies before their connections are cut
_PROJECT_CHECK_S = 1.0  # how often to check that the socket of a project registry exists


def default_registry(environment: Mapping[str, str]) -> Path:
    """Return the registry file's default path: in the service manager's state directory, else in the user's.

    Raises:
        StorageError: the environment names no usable directory.
    """
    if folders := environment.get("STATE_DIRECTORY"):
        folder = folders.partition(":")[0]  # systemd.exec(5): may be several
        if not os.path.isabs(folder):
            raise StorageError(
                f"STATE_DIRECTORY is {folder!r}, not a path from / on; name a file with --registry"
            )
        return Path(folder) / "registry.json"
    base = environment.get("XDG_STATE_HOME", "")
    if os.path.isabs(base):  # the XDG Base Directory Specification says to ignore a relative path
        return Path(base) / "regd" / "registry.json"
    return _home() / ".local" / "state" / "regd" / "registry.json"


def _home() -> Path:
    """Return this user's home folder.

    Raises:
        StorageError: HOME is not an existing folder, or is not set and the user has no home in the user database.
    """
    text = os.environ.get("HOME")
    try:
        home = Path(text) if text is not None else Path.home()
    except RuntimeError:
        raise StorageError("this user has no home to keep the registry in; name a file with --registry") from None
    if not home.is_absolute() or not home.is_dir():
        shown = repr(str(text)) if text is not None else str(home)
        raise StorageError(
            f"the home folder of this user, {shown}, is not there to keep the registry in; "
            "correct HOME, or name a file with --registry"
        )
    return home


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """The settings of a daemon."""

    registry: Path
    port: int | None = DEFAULT_PORT  # None: no TCP
    unix: Path | None = None
    inherited: Sequence[InheritedSocket | socket.socket] = ()  # listening sockets, in place of `port` and `unix`
    grace_s: float = DEFAULT_GRACE_S  # after a start: for clients to reconnect and claim what they held
    allowed_uids: Collection[int] = ()  # users who may write, besides root and the daemon's user
    allow_any_user: bool = False  # every user may write
    idle_exit_s: float | None = None  # exit after being unused for this time; None: never
    project: Path | None = None  # the folder of a project registry, which has `unix` and `registry` in it
    log: Path | None = None  # the log file, for `stats`; None: stderr
    limits: Limits = DEFAULT


class Daemon:
    """A daemon for the running event loop: `await start()`, and later `await stop()`.

    The constructor connects the parts. It opens nothing and starts nothing. `clock`, `files`, `epoch` and `peers`
    are for tests.
    """

    def __init__(
        self,
        config: Config,
        *,
        clock: Clock | None = None,
        files: Files | None = None,
        epoch: str | None = None,
        peers: PeerCredentials | None = None,
    ) -> None:
        self._config = config
        self._clock = clock = clock or LoopClock()
        self._files = files or Files()
        self._listeners = Listeners()
        self._peers = peers or PeerCredentials(config.allowed_uids, anyone=config.allow_any_user)
        relocks = config.project is None
        self._store = Store(config.registry, log.warning, self._files, config.limits, epoch, relocks=relocks)
        self._epoch = self._store.epoch
        self._checkpointer = Checkpointer(self._store, clock, config.limits.checkpoint_interval_s)
        self._registry = registry = Registry(limits=config.limits, claim_s=config.grace_s)
        self._counters = Counters()
        self._monitor = LoopMonitor(clock)
        self._findings = ProbeResults(config.limits.departures_max)
        self._sessions = Sessions()
        self._events = EventLog(clock, self._sessions.address_of)
        # A request that is answered from the cache is never parsed, and so could not be logged.
        self._replies = replies = ResolveCache(is_enabled=not self._events.logs_requests)
        registry.on_entry_changed, registry.on_any_changed = replies.invalidate, replies.invalidate_all
        self._shares = self._build_shares()
        self._stalls = Stalls(clock, registry.holder_index)
        self._engine = self._build_engine()
        self._reaper = self._build_reaper()
        self._info = DaemonInfo(
            registry, clock, self._counters, replies, self._gauges, self._epoch, self._store.path, config.log
        )
        self._history = HistoryReader(self._store, registry, clock)
        self._connections = self._build_connections()
        self._acceptor = Acceptor(self._connections.create)
        self._ended = asyncio.Event()
        self._idle = self._build_idle_exit()
        self._engine_task: asyncio.Task[None] | None = None

    # Connecting the parts.

    def _build_shares(self) -> tuple[Share, Share]:
        """Return the share of users who may write, and that of users who may only read."""

        def build(limits: Limits, scheduler: FairScheduler, slow_max: float, *, readonly: bool = False) -> Share:
            registry, clock, monitor = self._registry, self._clock, self._monitor
            return Share(
                scheduler=scheduler,
                watches=Watches(registry, clock, limits, monitor),
                waiting_resolves=WaitingResolves(
                    registry, clock, limits, monitor, self._findings, readonly=readonly
                ),
                input=BufferQuota(limits.input_bytes_total_max),
                output=BufferQuota(limits.output_bytes_total_max),
                memory=MemoryQuota(limits.pending_bytes_max),
                slow_replies=Slots(slow_max),
            )

        limits = self._config.limits
        readonly = limits.for_readonly_users()
        return (
            build(limits, FairScheduler(), math.inf),
            build(
                readonly,
                FairScheduler(READONLY_S, READONLY_S),
                limits.readonly_slow_replies_max,
                readonly=True,
            ),
        )

    def _build_engine(self) -> Engine:
        return Engine(
            self._registry,
            self._store,
            self._clock,
            self._counters,
            self._monitor,
            self._config.limits,
            self._stalls,
            is_gone=self._is_gone,
            on_flush=self._checkpointer.on_change,
            on_commit=self._on_commit,
            on_batch_end=self._on_batch_end,
        )

    def _build_reaper(self) -> Reaper:
        return Reaper(
            self._registry,
            self._clock,
            self._config.limits,
            self._stalls,
            self._shares[0].waiting_resolves.probes,
            has_client_hung_up=self._sessions.has_client_hung_up,
            ended=self._engine.end,
        )

    def _build_connections(self) -> Connections:
        explainer = Explainer(self._registry, self._clock, self._findings, self._sessions.address_of)
        handlers = Handlers(
            self._registry, self._info, explainer, self._stalls, self._reaper.processes, self._replies
        )
        parts = DaemonParts(
            self._config.limits,
            handlers,
            self._engine,
            self._reaper,
            self._events,
            self._counters,
            self._history,
        )
        writers, readers = self._shares
        return Connections(
            parts,
            self._sessions,
            writers,
            readers,
            cache=self._replies,
            credentials=self._peers,
            clock=self._clock,
            monitor=self._monitor,
        )

    def _build_idle_exit(self) -> IdleExit | None:
        if self._config.idle_exit_s is None:
            return None
        return IdleExit(self._clock, self._config.idle_exit_s, self._unused_mark, self._exit_idle)

    # Called by the parts.

    def _is_gone(self, holder: Holder) -> bool:
        return self._reaper.is_gone(holder)

    def _on_commit(self, changes: Sequence[Change]) -> None:
        for share in self._shares:
            share.watches.on_changes(changes)
            share.waiting_resolves.on_changes(changes)
        self._events.changes(changes)

    def _on_batch_end(self, losses: Sequence[OwnershipLost], without_registrations: set[Process]) -> None:
        self._reaper.on_batch_end(without_registrations)
        for lost in losses:
            self._sessions.push_lost(lost)

    def _gauges(self) -> dict[str, object]:
        return {
            "watches": sum(len(share.watches) for share in self._shares),
            "waiting": self.waiting,
            "processes": len(self._reaper.processes),
            **self._monitor.stats(),
        }

    def _unused_mark(self) -> Hashable | None:
        """Return None while the daemon is in use, else a value that differs if it was used since the last call.

        The daemon of a project registry may exit with static registrations: clients start it again, and it loads
        them from disk.
        """
        if self.connections or self._acceptor.starting:
            return None
        registry = self._registry
        if not registry.holder_index.is_empty or (len(registry) and self._config.project is None):
            return None
        counters = self._counters
        return self._registry.rev, counters.connections_accepted, counters.connections_refused

    def _exit_idle(self) -> None:
        # Called in the same loop iteration as `_unused_mark`, so no connection is accepted in between.
        self._acceptor.stop()
        unused = "nothing was registered" if self._config.project is None else "nothing had an owner"
        log.info("%s and nobody connected for %g s: leaving", unused, self._config.idle_exit_s)
        self._ended.set()

    def _check_project(self) -> None:
        """End the daemon once the socket of its project registry was removed, since no client can find it."""
        if self._ended.is_set():
            return
        if self._listeners.is_in_place():
            self._clock.call_at(self._clock.now() + _PROJECT_CHECK_S, self._check_project)
            return
        log.warning("%s was removed: leaving", self._config.unix)
        self._acceptor.stop()
        self._ended.set()

    # For the process that runs the daemon, and for tests.

    @property
    def addresses(self) -> list[str]:
        """The addresses that the daemon listens on, as `tcp://HOST:PORT` and `unix:///path`."""
        return self._listeners.addresses

    @property
    def status(self) -> str:
        """The state of the daemon as one line of text."""
        if self._engine_task is None:
            return "starting"
        count, rev = len(self._registry), self._registry.rev
        return f"{count} registrations at revision {rev}, {len(self.connections)} connections"

    @property
    def connections(self) -> "set[Connection]":
        return self._connections.open

    @property
    def sockets(self) -> list[socket.socket]:
        """The listening sockets, and the sockets of connections."""
        connected = [connection.socket for connection in self.connections]
        return [*self._listeners.sockets, *(sock for sock in connected if sock is not None)]

    @property
    def waiting_bytes(self) -> int:
        """The number of bytes in unfinished and unanswered lines."""
        return sum(share.input.total for share in self._shares)

    @property
    def unsent_bytes(self) -> int:
        """The number of buffered bytes that clients have not read."""
        return sum(share.output.total for share in self._shares)

    @property
    def pending_bytes(self) -> int:
        """The memory, in bytes, of writes that wait for the disk, of `resolve`s that wait, and of watches."""
        return sum(share.memory.total for share in self._shares)

    @property
    def waiting(self) -> int:
        """The number of `resolve` requests that wait for an instance."""
        return sum(len(share.waiting_resolves) for share in self._shares)

    @property
    def probed(self) -> int:
        """The number of probes that were made."""
        return self._findings.count

    def keys(self) -> list[Key]:
        """Return the keys of all registrations, in order."""
        return self._registry.keys()

    # Start, work, stop.

    async def start(self) -> None:
        """Open everything and serve, or leave nothing open.

        Raises:
            ListenError: an address cannot be used; no file was touched.
            StorageError: the registry cannot be used; it was not changed.
        """
        try:
            self._open()
            self._serve()
        except BaseException:
            self._close_files()
            raise

    def _open(self) -> None:
        # 1. Addresses first: a second regd must end here, before it touches a file.
        config = self._config
        if config.inherited:
            self._listeners.inherit(config.inherited)
        elif config.port is not None:
            self._listeners.open_tcp(config.port)
        self._peers.open(self._listeners.sockets)
        if config.unix is not None and not config.inherited:
            self._listeners.open_unix(config.unix, self._files)
        # 2. The registry: lock it, read it, and create it if it is missing.
        now, wall = self._clock.now(), self._clock.wall()
        loaded = self._store.open(wall)
        if self._store.created_folder:
            log.info("made the folder %s, which was not there", self._store.path.parent)
        self._reaper.processes.open()
        loaded.entries[:] = map(self._identified, loaded.entries)
        self._store.begin()
        history = History(
            loaded.history_rev,
            config.limits,
            changes=loaded.history,
            epoch=self._epoch,
            epochs={epoch: rev for epoch, (rev, _) in self._store.epochs.items()},
        )
        self._registry.load(loaded.entries, loaded.rev, now, history, wall)
        self._info.open()

    def _identified(self, entry: Entry) -> Entry:
        """Add the start time of each process whose pid was written into the file by hand.

        It tells the process from a later one with the same pid. A process that cannot be seen is left unchanged.
        """
        if all(holder.process is None or holder.process.born for holder in entry.holders):
            return entry
        identify = self._reaper.processes.identify
        return replace(
            entry,
            holders=tuple(
                holder if holder.process is None else replace(holder, process=identify(holder.process))
                for holder in entry.holders
            ),
        )

    def _serve(self) -> None:
        self._stalls.start()
        self._reaper.start()
        self._monitor.start()
        self._engine_task = asyncio.create_task(self._engine.run(), name="regd-engine")
        for listener in self._listeners.sockets:
            self._acceptor.listen(listener)
        if self._idle is not None:
            self._idle.start()
        if self._config.project is not None:
            self._check_project()
        for note in self._listeners.notes:
            log.warning("%s", note)
        registry = self._registry
        log.info("%d registrations at revision %d from %s", len(registry), registry.rev, self._store.path)

    async def write(self, write: Write) -> bytes:
        """Have the engine commit a write that no client has requested, and return its reply.

        Raises:
            Refused: the write is refused. If the engine ends before it answers, its error is raised.
        """
        assert self._engine_task is not None
        done: asyncio.Future[bytes | Refused] = asyncio.get_running_loop().create_future()
        self._engine.submit(write, done.set_result)
        await asyncio.wait((done, self._engine_task), return_when=asyncio.FIRST_COMPLETED)
        if not done.done():
            await self._engine_task  # raises the engine's error
        if isinstance(outcome := done.result(), Refused):
            raise outcome
        return outcome

    async def failed(self) -> None:
        """Wait until the engine ends, and raise its error, after which the process must end.

        Raises:
            StorageError: another regd has taken over the registry. Any other exception is a bug.
        """
        assert self._engine_task is not None
        await asyncio.shield(self._engine_task)

    async def ended(self) -> None:
        """Wait until the daemon was idle for `idle_exit_s`, or its project registry was removed.

        The daemon then accepts no more connections, and the caller should stop it.
        """
        await self._ended.wait()

    async def stop(self) -> None:
        """Commit and answer the writes that wait, then close everything, in order. Idempotent."""
        # 1. Accept no more connections.
        self._ended.set()
        if self._idle is not None:
            self._idle.close()
        self._acceptor.stop()
        await self._acceptor.started()
        # 2. Accept no more writes. The writes that wait are committed and answered.
        if self._engine_task is not None:
            self._engine.close()
            await asyncio.gather(self._engine_task, return_exceptions=True)
            await self._checkpointer.close()
        # 3. Send the last replies, and cut the connections of clients that do not read them.
        await self._close_connections()
        for share in self._shares:
            share.watches.close()
            share.waiting_resolves.close()
        self._connections.half_closed.close()
        self._reaper.close()
        self._monitor.close()
        self._events.close()
        self._history.close()
        # 4. Release the addresses and the lock.
        self._close_files()

    async def _close_connections(self) -> None:
        await asyncio.sleep(0)  # replies to the last commit are sent in the loop's next iteration
        connections = self._connections
        for connection in list(connections.open):
            connection.close()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_LAST_REPLIES_S if connections.open else 0):
                await connections.all_closed.wait()
        for connection in list(connections.open):
            connection.cut()
        await asyncio.sleep(0)

    def _close_files(self) -> None:
        self._listeners.close(self._files)
        self._peers.close()
        self._store.close()
