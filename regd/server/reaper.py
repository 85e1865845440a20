"""Who went: a connection, a process, a lease. Tells the registry at once, and the engine to land it.

Time that the daemon did not run does not count: who could not be heard gets the full time again.
Must not know the protocol.
"""

import logging
from collections.abc import Callable

from regd.core.lifetimes import Ending
from regd.core.limits import Limits
from regd.core.model import Holder, Process, Reason
from regd.core.registry import Registry
from regd.server.clock import Clock
from regd.server.engine import Engine
from regd.server.processes import Processes

log = logging.getLogger("regd")

_BEAT_S = 0.5
_SLICE = 256  # leases that run out before others get a turn
_LATE_S = 0.25  # a beat that is later: the daemon was stopped, or the loop was busy for too long


class Reaper:
    """`is_cut` says of a session whether the kernel knows its connection to have ended."""

    def __init__(self, registry: Registry, clock: Clock, limits: Limits, is_cut: Callable[[int], bool]) -> None:
        self.processes = Processes(limits, self._process_ended)
        self.engine: Engine | None = None  # set once, when there is one
        self._registry = registry
        self._clock = clock
        self._is_cut = is_cut
        self._beating = False
        self._closed = False
        self._deaf = False  # the disk holds up what may be renewals

    def is_gone(self, holder: Holder) -> bool:
        """Look once more, with the system's eyes."""
        if holder.hold and holder.session is not None and self._is_cut(holder.session):
            return True
        return holder.process is not None and self.processes.is_gone(holder.process)

    def connection_ended(self, session: int) -> None:
        self._end(Ending(Reason.CLOSED, session=session))

    def _process_ended(self, process: Process) -> None:
        self._end(Ending(Reason.EXITED, process=process))

    def _end(self, ending: Ending) -> None:
        assert self.engine is not None
        self._registry.gone(ending)
        self.engine.end(ending)

    def settled(self, free: set[Process]) -> None:
        """Watch no process of which nothing is held, and look at the time while there are deadlines."""
        for process in free:
            self.processes.release(process)
        self.processes.settle(self._registry.lifetimes.knows)
        wanted = self._registry.lifetimes.next_deadline() is not None or self.processes.unwatched
        if wanted and not self._beating and not self._closed:
            self._beating = True
            self._beat_at(self._next())

    def start(self) -> None:
        """Watch the processes that were loaded; those that ended meanwhile, or are others now, end at once."""
        for process in self._registry.lifetimes.processes:
            if not self.processes.watch(process):
                self._process_ended(process)
        self.settled(set())

    def close(self) -> None:
        self._closed = True
        self.processes.close()

    def _next(self) -> float:
        deadline = self._registry.lifetimes.next_deadline()
        beat = self._clock.now() + _BEAT_S
        if deadline is None or self._deaf:
            return beat
        return max(self._clock.now(), min(beat, deadline))

    def _beat_at(self, due: float) -> None:
        self._clock.call_at(due, lambda: self._beat(due))

    def _beat(self, due: float) -> None:
        if self._closed:
            return
        assert self.engine is not None
        now = self._clock.now()
        lifetimes = self._registry.lifetimes
        flushing_since = self.engine.flushing_since
        if flushing_since is not None and now - flushing_since > _LATE_S:
            self._deaf = True  # a renewal behind a write waits for the disk with it
        elif self._deaf or now - due > _LATE_S:
            log.info("could not hear everybody for a while: every ttl begins anew")
            lifetimes.refresh(now)
            self._deaf = False
        if not self._deaf:
            for ending in self._registry.expire(now, _SLICE):
                self.engine.end(ending)
        for process in self.processes.retry():
            self._process_ended(process)
        if lifetimes.next_deadline() is None and not self.processes.unwatched:
            self._beating = False
        else:
            self._beat_at(self._next())
