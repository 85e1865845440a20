"""Finds holders that are gone: closed connections, ended processes, expired leases.

The reaper marks a gone holder in the registry at once, and the engine then commits its end.
"""

from collections.abc import Callable
from functools import partial

from regd.core.holders import HolderEnd
from regd.core.limits import Limits
from regd.core.model import Entry, Holder, Key, Process, Reason
from regd.core.registry import Registry
from regd.server.stalls import CHECK_S, Stalls
from regd.system.clock import Clock
from regd.system.probes import ProbeResult, Probes, may_probe
from regd.system.processes import Processes

_SLICE = 256  # leases ended, and probes started, in one check
_STALLED_CHECK_S = 0.1
_PROBE_EVERY_S = 30.0  # between probes of an unclaimed registration whose process is alive


class Reaper:
    """Marks gone holders, and passes their ends on.

    Args:
        has_client_hung_up: asks the kernel whether the client of a session has closed its connection.
        ended: is called with the end of each holder that is marked.
    """

    def __init__(
        self,
        registry: Registry,
        clock: Clock,
        limits: Limits,
        stalls: Stalls,
        probes: Probes,
        has_client_hung_up: Callable[[int], bool],
        ended: Callable[[HolderEnd], None],
    ) -> None:
        self.processes = Processes(limits, self._process_ended)
        self._registry = registry
        self._clock = clock
        self._stalls = stalls
        self._probes = probes
        self._has_client_hung_up = has_client_hung_up
        self._ended = ended
        self._is_scheduled = False
        self._closed = False
        self._probing = 0
        self._probing_max = max(1, limits.probes_max // 4)  # the other probes are for requests that wait

    def is_gone(self, holder: Holder) -> bool:
        """Ask the operating system whether a holder is gone."""
        if holder.hold and holder.session is not None and self._has_client_hung_up(holder.session):
            return True
        return holder.process is not None and self.processes.is_gone(holder.process)

    def connection_ended(self, session: int) -> None:
        """End the holders that a session's connection kept alive."""
        self._end(HolderEnd(Reason.CLOSED, session=session))

    def _process_ended(self, process: Process) -> None:
        self._end(HolderEnd(Reason.EXITED, process=process))

    def _end(self, ending: HolderEnd) -> None:
        self._registry.mark_gone(ending)
        self._ended(ending)

    def on_batch_end(self, without_registrations: set[Process]) -> None:
        """Release processes that hold nothing, and schedule a check if there are deadlines."""
        for process in without_registrations:
            self.processes.release(process)
        self.processes.release_unused(self._registry.holder_index.has_process)
        self._schedule_check()

    def _schedule_check(self) -> None:
        is_needed = self._registry.holder_index.next_deadline() is not None or self.processes.unwatched
        if is_needed and not self._is_scheduled and not self._closed:
            self._is_scheduled = True
            self._clock.call_at(self._next_check(), self._check)

    def start(self) -> None:
        """Watch the processes of loaded registrations, and end the holders whose process has already ended."""
        for process in self._registry.holder_index.processes:
            if not self.processes.watch(process):
                self._process_ended(process)
        self.on_batch_end(set())

    def close(self) -> None:
        self._closed = True
        self.processes.close()

    def _next_check(self) -> float:
        now = self._clock.now()
        if self._stalls.is_flush_stalled:  # no deadline comes nearer until the flush ends
            return now + _STALLED_CHECK_S
        deadline = self._registry.holder_index.next_deadline()
        return now + CHECK_S if deadline is None else max(now, min(now + CHECK_S, deadline))

    def _check(self) -> None:
        self._is_scheduled = False
        if self._closed:
            return
        for ending in self._registry.expire(self._stalls.now_after_prolonging(), _SLICE):
            self._ended(ending)
        self._probe_unclaimed()
        for process in self.processes.retry():
            self._process_ended(process)
        self._schedule_check()

    # Unclaimed registrations whose process is alive: after a restart, no client has claimed them in time.

    def _probe_unclaimed(self) -> None:
        unclaimed = self._registry.holder_index.unclaimed
        for _ in range(min(_SLICE, len(unclaimed))):
            if self._probing >= self._probing_max:
                return
            key, holder_id = unclaimed.popleft()
            entry = self._entry_held_by(key, holder_id)
            if entry is not None and may_probe(entry.host):  # others stay until their process ends
                self._probing += 1
                self._probes.probe_once((entry.host, entry.port), partial(self._probed, key, holder_id))

    def _entry_held_by(self, key: Key, holder_id: int) -> Entry | None:
        """Return the entry of a holder, None if the holder was claimed or has ended."""
        entry = self._registry.get(key)
        if entry is None or all(holder.id != holder_id for holder in entry.holders):
            return None
        return entry

    def _probed(self, key: Key, holder_id: int, result: ProbeResult) -> None:
        self._probing -= 1
        if not result.refused:  # accepted, or not answered because the process is busy
            self._registry.holder_index.probe_at(
                key, holder_id, self._stalls.now_after_prolonging() + _PROBE_EVERY_S
            )
        elif self._entry_held_by(key, holder_id) is not None:
            self._end(HolderEnd(Reason.CLOSED, holder=(key, holder_id)))
        self._probe_unclaimed()
        self._schedule_check()
