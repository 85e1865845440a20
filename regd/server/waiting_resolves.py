"""`resolve` requests with `wait`: they wait until an instance is ready and accepts connections.

Such a request is evaluated when anything about its name changes, and when an instance was probed. The answer is
the first instance that accepts, in order of priority and, within a priority, in round-robin order. While an
earlier instance has not answered its probe, a later one that accepts becomes the answer only after `_GRACE_S`.
"""

from collections.abc import Callable, Mapping, Sequence
from operator import attrgetter

from regd.core.errors import Code, Refused
from regd.core.instances import Search, SearchPosition
from regd.core.limits import Limits
from regd.core.model import Change, Entry
from regd.core.registry import Registry
from regd.server.loop_monitor import LoopMonitor
from regd.server.work_queue import WorkQueue
from regd.system.clock import Clock, Timer
from regd.system.probes import Address, ProbeResults, Probes, may_probe

_GRACE_S = 0.02  # for earlier instances to accept, before a later one becomes the answer
_AT_ONCE_S = 0.25  # the time limit of `wait` 0, which probes each instance once
_SLICE_S = 0.002


def _ignore(entry: Entry | None) -> None:
    pass


def _ranked(entries: Sequence[Entry]) -> list[Entry]:
    """Return entries with the best priority first. A search that wraps around may find that priority last."""
    return sorted(entries, key=attrgetter("priority"))


class WaitingResolve:
    """One request that waits. `done` is called once, with the instance, or None when the time is over."""

    __slots__ = (
        "addresses",
        "after",
        "done",
        "grace_timer",
        "instance",
        "is_over",
        "meta",
        "name",
        "once",
        "probes_before",
        "search",
        "timer",
    )

    timer: Timer

    def __init__(
        self,
        name: str,
        instance: str | None,
        meta: Mapping[str, str],
        probes_before: int,
        once: bool,
        done: Callable[[Entry | None], None],
    ) -> None:
        self.name = name
        self.instance = instance
        self.meta = meta
        self.probes_before = probes_before  # probe results up to this number are older than the request
        self.once = once
        self.done = done
        self.addresses: dict[Address, None] = {}  # probed for this request, in round-robin order
        self.search: Search | None = None  # a search that takes more than one time slice
        self.after: SearchPosition | None = None  # the instances up to here do not accept; probe those after it
        self.grace_timer: Timer | None = None
        self.is_over = False


class WaitingResolves:
    """The waiting requests of one class of users. Users who may only read (`readonly`) have their own probes."""

    def __init__(
        self,
        registry: Registry,
        clock: Clock,
        limits: Limits,
        monitor: LoopMonitor,
        results: ProbeResults,
        *,
        readonly: bool = False,
    ) -> None:
        self._registry = registry
        self._clock = clock
        self._limits = limits
        self._results = results
        self._readonly = readonly
        self._by_name: dict[str, dict[WaitingResolve, None]] = {}
        self._by_address: dict[Address, dict[WaitingResolve, None]] = {}  # of addresses that are probed
        self._to_evaluate = WorkQueue(self._evaluate, _SLICE_S, "waits", clock, monitor)
        self._count = 0
        self.probes = Probes(clock, limits, results, self._on_probed)

    def __len__(self) -> int:
        return self._count

    def add(
        self,
        name: str,
        instance: str | None,
        meta: Mapping[str, str],
        wait_s: float,
        done: Callable[[Entry | None], None],
    ) -> WaitingResolve:
        """Wait for an instance, at most `wait_s` seconds. `done` may be called before this returns.

        Raises:
            Refused: `busy`, too many requests wait.
        """
        if self._count >= self._limits.parked_total_max:
            raise Refused(Code.BUSY, f"{self._count} requests wait; try again later")
        wait = WaitingResolve(name, instance, meta, self._results.count, not wait_s, done)
        self._by_name.setdefault(name, {})[wait] = None
        self._count += 1
        deadline = self._clock.now() + (wait_s or _AT_ONCE_S)
        wait.timer = self._clock.call_at(deadline, lambda: self._end(wait, None))
        self._evaluate(wait)
        return wait

    def cancel(self, wait: WaitingResolve) -> None:
        """End a request without calling `done`. Idempotent."""
        wait.done = _ignore
        self._end(wait, None)

    def close(self) -> None:
        """Cancel all requests."""
        for wait in [wait for waits in self._by_name.values() for wait in waits]:
            self.cancel(wait)
        self.probes.close()

    def on_changes(self, changes: Sequence[Change]) -> None:
        """Probe the changed instances again, and evaluate the requests for their names."""
        if not self._count:
            return
        for change in changes:
            self.probes.probe_now((change.entry.host, change.entry.port))
        for name in {change.entry.name for change in changes}:
            for wait in self._by_name.get(name, ()):
                wait.search = wait.after = None
                self._to_evaluate.add(wait)

    def _on_probed(self, address: Address) -> None:
        for wait in self._by_address.get(address, ()):
            self._to_evaluate.add(wait)

    def _evaluate(self, wait: WaitingResolve) -> None:
        """Answer the request, or probe the instances that could become the answer."""
        if wait.is_over:
            return
        search = self._search(wait)
        if search is None:
            self._to_evaluate.add_first(wait)  # so that at most one unfinished search is in memory
            return
        entries = _ranked(search.found)
        self._probe(wait, [(entry.host, entry.port) for entry in entries if may_probe(entry.host)])
        undecided = False
        for entry in entries:
            address = (entry.host, entry.port)
            # An instance on another machine is not probed: it counts as accepting.
            accepts = self._accepts(wait, address) if address in wait.addresses else True
            if accepts and undecided:
                self._start_grace(wait)
                return
            if accepts:
                self._end(wait, entry)
                return
            undecided = undecided or accepts is None
        if not undecided and len(entries) == self._limits.probed_instances_max:
            wait.after = search.position
        if wait.once and not undecided:
            self._end(wait, None)

    def _search(self, wait: WaitingResolve) -> Search | None:
        """Return the completed search for the instances to probe, None while the search is not complete."""
        if wait.search is None:
            most = self._limits.probed_instances_max
            wait.search = self._registry.search_round_robin(
                wait.name, wait.instance, wait.meta, most, wait.after, readonly=self._readonly
            )
        search = wait.search
        if not search.step(self._limits.search_step_max):
            return None
        wait.search = None
        return search

    def _accepts(self, wait: WaitingResolve, address: Address) -> bool | None:
        """Return whether an address accepts connections, None until a probe has shown it."""
        result = self._results.last(address)
        if result is None or result.number <= wait.probes_before:
            return None
        return result.accepted

    def _start_grace(self, wait: WaitingResolve) -> None:
        if wait.grace_timer is None:
            wait.grace_timer = self._clock.call_at(self._clock.now() + _GRACE_S, lambda: self._take_any(wait))

    def _take_any(self, wait: WaitingResolve) -> None:
        """Answer with the first instance known to accept. Earlier instances have not answered in time."""
        wait.grace_timer = None
        search = self._search(wait)
        wait.search = None
        for entry in _ranked(search.found) if search is not None else ():
            if not wait.is_over and self._accepts(wait, (entry.host, entry.port)):
                self._end(wait, entry)

    def _probe(self, wait: WaitingResolve, addresses: Sequence[Address]) -> None:
        """Probe these addresses, and no others, for a request."""
        previous, wait.addresses = wait.addresses, dict.fromkeys(addresses)
        for address in wait.addresses:
            if address not in previous:
                self._by_address.setdefault(address, {})[wait] = None
                self.probes.acquire(address)
        for address in previous:
            if address not in wait.addresses:
                self._stop_probing(wait, address)

    def _stop_probing(self, wait: WaitingResolve, address: Address) -> None:
        waits = self._by_address[address]
        del waits[wait]
        if not waits:
            del self._by_address[address]
        self.probes.release(address)

    def _end(self, wait: WaitingResolve, entry: Entry | None) -> None:
        if wait.is_over:
            return
        wait.is_over = True
        wait.timer.cancel()
        self._to_evaluate.discard(wait)
        self._probe(wait, ())
        if wait.grace_timer is not None:
            wait.grace_timer.cancel()
        waits = self._by_name[wait.name]
        del waits[wait]
        if not waits:
            del self._by_name[wait.name]
        self._count -= 1
        if entry is not None:
            self._registry.mark_served(entry, wait.meta, readonly=self._readonly)
        done, wait.done = wait.done, _ignore  # `done` refers to `wait`, and the cycle would stay in memory
        done(entry)
