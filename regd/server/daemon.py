"""From start to end: what is opened in which order, and closed in the other. The one place that puts the parts
together. Must not know signals or command lines, so that a test can start one in its own loop.
"""

import asyncio
import contextlib
import logging
import math
import os
import resource
import socket
from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from regd.core.errors import Refused
from regd.core.limits import DEFAULT, Limits
from regd.core.model import Change, Key, Process
from regd.core.registry import Registry
from regd.core.transaction import OwnershipLost
from regd.server.acceptor import Acceptor
from regd.server.connection import Connection
from regd.server.context import BufferQuota, Context, MemoryQuota, Sessions, Share, Slots
from regd.server.counters import Counters
from regd.server.engine import Engine, Write
from regd.server.event_log import EventLog
from regd.server.half_closed import HalfClosed
from regd.server.handlers import Handlers, identify
from regd.server.idle_exit import IdleExit
from regd.server.loop_monitor import LoopMonitor
from regd.server.pending_resolves import PendingResolves
from regd.server.reaper import Reaper
from regd.server.resolve_cache import ResolveCache
from regd.server.scheduler import READONLY_S, FairScheduler
from regd.server.stalls import Stalls
from regd.server.watches import Watches
from regd.storage.files import Files
from regd.storage.store import StorageError, Store
from regd.system.clock import Clock, LoopClock
from regd.system.listener import InheritedSocket, ListenError, Listeners, raise_open_files
from regd.system.peer_credentials import PeerCredentials
from regd.system.probes import ProbeResults

log = logging.getLogger("regd")

DEFAULT_GRACE_S = 30.0
DEFAULT_PORT = 7343  # "REGD" on a phone's keys
_CONNECTIONS_MIN = 16  # fewer are of no use
_GOODBYE_S = 2.0  # for replies to leave before the connections are cut


def default_registry(environment: Mapping[str, str]) -> Path:
    """Return where the registry is kept when nobody says: the service manager's place, or the user's.

    Raises:
        StorageError: the environment names no such place.
    """
    if folders := environment.get("STATE_DIRECTORY"):
        folder = folders.partition(":")[0]  # systemd.exec(5): may be several
        if not os.path.isabs(folder):
            raise StorageError(
                f"STATE_DIRECTORY is {folder!r}, not a path from / on; name a file with --registry"
            )
        return Path(folder) / "registry.json"
    base = environment.get("XDG_STATE_HOME", "")
    if os.path.isabs(base):  # else it is to be ignored (XDG Base Directory Specification)
        return Path(base) / "regd" / "registry.json"
    return _home() / ".local" / "state" / "regd" / "registry.json"


def _home() -> Path:
    """Return this user's home folder, which is there.

    Raises:
        StorageError: HOME is no such folder, or is not set and the system knows none.
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
    registry: Path
    port: int | None = DEFAULT_PORT  # None: no TCP
    unix: Path | None = None
    inherited: Sequence[
        InheritedSocket | socket.socket
    ] = ()  # sockets that listen already, in place of `port` and `unix`
    grace_s: float = DEFAULT_GRACE_S  # for clients to come back and claim what they held
    allowed_uids: Collection[int] = ()  # that may write, besides root and the daemon's own
    allow_any_user: bool = False  # every user may write
    idle_exit_s: float | None = None  # until it ends by itself when nobody needs it; None: it stays
    log: Path | None = None  # where the log goes, for `stats`; None: to stderr
    limits: Limits = DEFAULT
    raise_open_files: bool = True  # as the limits need; not in a process that is somebody else's


class Daemon:
    """A daemon in the running loop: `await start()`, and `await stop()`.

    `clock`, `files`, `epoch` and `peers` are for tests.
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
        self._clock = clock or LoopClock()
        self._files = files or Files()
        self._epoch = epoch or os.urandom(8).hex()
        self._pulse = LoopMonitor(self._clock)
        self._peers = peers or PeerCredentials(config.allowed_uids, anyone=config.allow_any_user)
        self._listeners = Listeners()
        self._acceptor: Acceptor | None = None
        self._store = Store(config.registry, log.warning, self._files)
        self._registry: Registry | None = None
        self._engine: Engine | None = None
        self._findings: ProbeResults | None = None
        self._context: Context | None = None
        self._engine_task: asyncio.Task[None] | None = None
        self._events: EventLog | None = None
        self._idle: IdleExit | None = None
        self._idled = asyncio.Event()

    @property
    def addresses(self) -> list[str]:
        """Return where it listens, as `tcp://HOST:PORT` and `unix:///path`."""
        return self._listeners.addresses

    @property
    def status(self) -> str:
        """Return how it is, in a line for people."""
        if self._registry is None:
            return "starting"
        count, rev = len(self._registry), self._registry.rev
        return f"{count} registrations at revision {rev}, {len(self.connections)} connections"

    @property
    def connections(self) -> "set[Connection]":
        return self._context.connections if self._context else set()

    @property
    def sockets(self) -> list[socket.socket]:
        """Return those that listen, and those of connections."""
        found = [each.socket for each in self.connections]
        return [*self._listeners.sockets, *(each for each in found if each is not None)]

    @property
    def waiting_bytes(self) -> int:
        """What is kept of lines that are unfinished or unanswered."""
        return sum(share.input.total for share in self._shares)

    @property
    def unsent_bytes(self) -> int:
        """What waits for peers that do not read."""
        return sum(share.output.total for share in self._shares)

    @property
    def kept_bytes(self) -> int:
        """What is kept of requests that wait for the disk, are parked or watch."""
        return sum(share.kept.total for share in self._shares)

    @property
    def parked(self) -> int:
        """How many requests wait for somebody to accept."""
        return sum(len(share.waits) for share in self._shares)

    @property
    def probed(self) -> int:
        """How many attempts to connect were made."""
        return self._findings.count if self._findings else 0

    @property
    def _shares(self) -> "list[Share]":
        return [self._context.writers, self._context.readers] if self._context else []

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
        limits = _within_open_files(config.limits) if config.raise_open_files else config.limits
        # 1. Addresses first: a second regd must end here, before it touches a file.
        self._listen(config)
        # 2. The registry: locked, read, and made where it is missing.
        document = self._store.open(self._clock.wall())
        if self._store.made_folder:
            log.info("made the folder %s, which was not there", self._store.path.parent)
        self._store.ensure_writable()
        # 3. The parts.
        clock, tally, sessions, pulse = self._clock, Counters(), Sessions(), self._pulse
        registry = Registry(document.entries, document.rev, limits, now=clock.now(), claim_s=config.grace_s)
        self._registry = registry
        self._events = events = EventLog(clock, sessions.peer_of)
        replies = ResolveCache(
            remembers=not events.logs_requests
        )  # what is remembered is answered without a request
        registry.on_entry_changed, registry.on_any_changed = replies.invalidate, replies.invalidate_all
        findings = self._findings = ProbeResults(limits.departures_max)

        shares = self._made_shares(registry, limits, findings)
        writers, readers = shares
        stalls = Stalls(clock, registry.lifetimes)
        reaper = Reaper(registry, clock, limits, stalls, writers.waits.probes, sessions.is_cut)

        def landed(changes: Sequence[Change]) -> None:
            for each in shares:
                each.watches.landed(changes)
                each.waits.landed(changes)
            events.changes(changes)

        def settled(lost: Sequence[OwnershipLost], free: set[Process]) -> None:
            reaper.settled(free)
            for each in lost:
                sessions.tell(each)

        self._engine = reaper.engine = Engine(
            registry, self._store, clock, tally, pulse, limits, stalls, reaper.is_gone, landed, settled
        )

        def gauges() -> dict[str, object]:
            return {
                "watches": sum(len(each.watches) for each in shares),
                "waiting": sum(len(each.waits) for each in shares),
                "processes": len(reaper.processes),
                **pulse.described(),
            }

        identity = identify(
            self._epoch,
            _loop_name(),
            str(self._store.path),
            None if config.log is None else str(config.log),
            clock.now(),
        )
        self._context = Context(
            limits=limits,
            engine=self._engine,
            answers=Handlers(
                registry,
                identity,
                clock,
                tally,
                limits,
                stalls,
                reaper.processes,
                findings,
                replies,
                sessions.peer_of,
                gauges,
            ),
            replies=replies,
            reaper=reaper,
            peers=self._peers,
            clock=clock,
            tally=tally,
            pulse=pulse,
            writers=writers,
            readers=readers,
            half_closed=HalfClosed(clock),
            events=events,
            sessions=sessions,
        )
        reaper.start()
        pulse.start()
        self._engine_task = asyncio.create_task(self._engine.run(), name="regd-engine")
        # 4. Serve.
        context = self._context
        acceptor = self._acceptor = Acceptor(lambda: Connection(context))
        for each in self._listeners.sockets:
            acceptor.listen(each)
        if config.idle_exit_s is not None:
            self._idle = IdleExit(
                clock, config.idle_exit_s, lambda: _quiet(registry, context, acceptor), self._idle_out
            )
            self._idle.start()
        for note in self._listeners.notes:
            log.warning("%s", note)
        log.info("%d registrations at revision %d from %s", len(registry), registry.rev, self._store.path)

    def _made_shares(self, registry: Registry, limits: Limits, findings: ProbeResults) -> tuple[Share, Share]:
        """Return what those who may write share, and what those who may only read do."""

        def share(limits: Limits, turns: FairScheduler, slow_max: float, *, readonly: bool = False) -> Share:
            return Share(
                turns=turns,
                watches=Watches(registry, self._clock, limits, self._pulse, self._epoch),
                waits=PendingResolves(registry, self._clock, limits, self._pulse, findings, readonly=readonly),
                input=BufferQuota(limits.input_bytes_total_max),
                output=BufferQuota(limits.output_bytes_total_max),
                kept=MemoryQuota(limits.pending_bytes_max),
                slow=Slots(slow_max),
            )

        return (
            share(limits, FairScheduler(), math.inf),
            share(
                limits.of_readers(),
                FairScheduler(READONLY_S, READONLY_S),
                limits.readonly_slow_replies_max,
                readonly=True,
            ),
        )

    def _listen(self, config: Config) -> None:
        if config.inherited:
            self._listeners.inherit(config.inherited)
        elif config.port is not None:
            self._listeners.open_tcp(config.port)
        self._peers.open(self._listeners.sockets)
        if config.unix is not None and not config.inherited:
            self._listeners.open_unix(config.unix, self._files)

    def keys(self) -> list[Key]:
        """Return what is registered."""
        return self._registry.keys() if self._registry is not None else []

    async def write(self, write: Write) -> bytes:
        """Have the engine judge and land a write that no peer has asked for, and return its reply.

        Raises:
            Refused: it is refused.
        """
        assert self._engine is not None
        assert self._engine_task is not None
        landed: asyncio.Future[bytes | Refused] = asyncio.get_running_loop().create_future()
        self._engine.submit(write, landed.set_result)
        await asyncio.wait((landed, self._engine_task), return_when=asyncio.FIRST_COMPLETED)
        if not landed.done():
            await self._engine_task  # which raises what ended it
        if isinstance(outcome := landed.result(), Refused):
            raise outcome
        return outcome

    async def failed(self) -> None:
        """Wait for ever, or raise what ended the engine: a bug, and the end of the process."""
        assert self._engine_task is not None
        await asyncio.shield(self._engine_task)

    async def idled(self) -> None:
        """Wait until nobody has needed it for `idle_exit_s`: it takes no more callers, and is to be stopped."""
        await self._idled.wait()

    def _idle_out(self) -> None:
        # In the turn that has found nobody: whoever connects now was never accepted, and is reset without a word.
        assert self._acceptor is not None
        self._acceptor.stop()
        log.info("nothing was registered and nobody connected for %g s: leaving", self._config.idle_exit_s)
        self._idled.set()

    async def stop(self) -> None:
        """Leave in order, with the last commit on disk. Twice is harmless."""
        # 1. Let nobody in.
        if self._idle is not None:
            self._idle.close()
        if self._acceptor is not None:
            self._acceptor.stop()
            await self._acceptor.started()
        # 2. Take no more writes; those that wait still land, and are answered.
        if self._engine is not None and self._engine_task is not None:
            self._engine.close()
            await asyncio.gather(self._engine_task, return_exceptions=True)
        # 3. Let the replies out, and cut who does not take them.
        if self._context is not None:
            await self._say_goodbye(self._context)
            for share in self._shares:
                share.watches.close()
                share.waits.close()
            self._context.half_closed.close()
            self._context.reaper.close()
            self._pulse.close()
        if self._events is not None:
            self._events.close()
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
        self._peers.close()
        self._store.close()


def _quiet(registry: Registry, context: Context, acceptor: Acceptor) -> Hashable | None:
    """Return None while something is registered or somebody connected, else a mark of all that was before."""
    if len(registry) or context.connections or acceptor.starting:
        return None
    return registry.rev, context.tally.connections_accepted, context.tally.connections_refused


def _within_open_files(limits: Limits) -> Limits:
    """Raise how many files may be open, and share out what there is between connections and processes.

    Raises:
        ListenError: there are too few to be of use.
    """
    probes = limits.probes_max + limits.readonly_probes_max
    wanted = limits.connections_max + limits.processes_max + probes
    there = raise_open_files(wanted)
    if there >= wanted:
        return limits
    share = there / wanted
    connections, files = int(limits.connections_max * share), resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if connections < _CONNECTIONS_MIN:
        raise ListenError(
            f"this process may open {files} files, too few for {_CONNECTIONS_MIN} connections; "
            "raise the limit to 1024 or more (ulimit -Hn; LimitNOFILE= in a unit)"
        )
    log.warning(
        "this process may open %d files (ulimit -Hn): regd takes %d connections at a time, not %d",
        files,
        connections,
        limits.connections_max,
    )
    # Of the fewer connections users who may only read have the same part.
    return replace(
        limits,
        connections_max=connections,
        readonly_connections_max=max(1, int(limits.readonly_connections_max * share)),
        processes_max=max(1, int(limits.processes_max * share)),
        probes_max=max(1, int(limits.probes_max * share)),
        readonly_probes_max=max(1, int(limits.readonly_probes_max * share)),
    )


def _loop_name() -> str:
    """Return which event loop runs: `asyncio`, or `uvloop`."""
    return type(asyncio.get_running_loop()).__module__.partition(".")[0]
