"""Finds gone holders: closed connections, ended processes, expired leases.

A gone holder is marked in the registry at once; its end is then committed by the engine.
"""

from collections.abc import Callable
from functools import partial

from regd.core.holders import HolderGone
from regd.core.limits import Limits
from regd.core.model import Entry, Holder, Key, Process, Reason
from regd.core.registry import Registry
from regd.server.stalls import LOOK_S, Stalls
from regd.system.clock import Clock
from regd.system.probes import ProbeResult, Probes, may_probe
from regd.system.processes import Processes

_SLICE = 256  # leases and probes in one loop iteration
_STALLED_LOOK_S = 0.1
_PROBE_EVERY_S = 30.0  # the address of an unclaimed registration whose process is alive


class Reaper:
    """`is_cut` asks the kernel whether a session's connection has ended; `ended` receives each gone holder."""

    def __init__(
        self,
        registry: Registry,
        clock: Clock,
        limits: Limits,
        stalls: Stalls,
        probes: Probes,
        is_cut: Callable[[int], bool],
        ended: Callable[[HolderGone], None],
    ) -> None:
        self.processes = Processes(limits, self._process_ended)
        self._registry = registry
        self._clock = clock
        self._stalls = stalls
        self._probes = probes
        self._is_cut = is_cut
        self._ended = ended
        self._beating = False
        self._closed = False
        self._probing = 0
        self._probing_max = max(1, limits.probes_max // 4)  # the rest is for requests that wait

    def is_gone(self, holder: Holder) -> bool:
        """Ask the operating system whether a holder is gone."""
        if holder.hold and holder.session is not None and self._is_cut(holder.session):
            return True
        return holder.process is not None and self.processes.is_gone(holder.process)

    def connection_ended(self, session: int) -> None:
        """The connection of a session has ended."""
        self._end(HolderGone(Reason.CLOSED, session=session))

    def _process_ended(self, process: Process) -> None:
        self._end(HolderGone(Reason.EXITED, process=process))

    def _end(self, ending: HolderGone) -> None:
        self._registry.mark_dead(ending)
        self._ended(ending)

    def settled(self, free: set[Process]) -> None:
        """After a batch: release processes that hold nothing, and run the timer while there are deadlines."""
        for process in free:
            self.processes.release(process)
        self.processes.release_unused(self._registry.holders.has_process)
        self._beat_on()

    def _beat_on(self) -> None:
        wanted = self._registry.holders.next_deadline() is not None or self.processes.unwatched
        if wanted and not self._beating and not self._closed:
            self._beating = True
            self._clock.call_at(self._next(), self._beat)

    def start(self) -> None:
        """Watch the processes of loaded registrations; those that have ended are gone at once."""
        for process in self._registry.holders.processes:
            if not self.processes.watch(process):
                self._process_ended(process)
        self.settled(set())

    def close(self) -> None:
        self._closed = True
        self.processes.close()

    def _next(self) -> float:
        now = self._clock.now()
        if self._stalls.time_stands_still:  # no deadline comes nearer
            return now + _STALLED_LOOK_S
        deadline = self._registry.holders.next_deadline()
        return now + LOOK_S if deadline is None else max(now, min(now + LOOK_S, deadline))

    def _beat(self) -> None:
        self._beating = False
        if self._closed:
            return
        for ending in self._registry.expire(self._stalls.now(), _SLICE):
            self._ended(ending)
        self._probe_unclaimed()
        for process in self.processes.retry():
            self._process_ended(process)
        self._beat_on()

    # Unclaimed registrations whose process is alive.

    def _probe_unclaimed(self) -> None:
        unclaimed = self._registry.holders.unclaimed
        for _ in range(min(_SLICE, len(unclaimed))):
            if self._probing >= self._probing_max:
                return
            key, holder_id = unclaimed.popleft()
            entry = self._entry_held_by(key, holder_id)
            if entry is not None and may_probe(entry.host):  # else it stays as long as its process
                self._probing += 1
                self._probes.probe_once((entry.host, entry.port), partial(self._probed, key, holder_id))

    def _entry_held_by(self, key: Key, holder_id: int) -> Entry | None:
        """Return the entry of a holder, None once the holder was claimed or has ended."""
        entry = self._registry.get(key)
        if entry is None or all(holder.id != holder_id for holder in entry.holders):
            return None
        return entry

    def _probed(self, key: Key, holder_id: int, result: ProbeResult) -> None:
        self._probing -= 1
        if not result.refused:  # accepted, or no answer: the process may be blocked
            self._registry.holders.probe_at(key, holder_id, self._stalls.now() + _PROBE_EVERY_S)
        elif self._entry_held_by(key, holder_id) is not None:
            self._end(HolderGone(Reason.CLOSED, holder=(key, holder_id)))
        self._probe_unclaimed()
        self._beat_on()
