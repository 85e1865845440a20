"""Those who wait until an instance is ready and accepts connections.

A wait looks at its name whenever that changes, and at the probes of its instances. The answer is the first in
turn that accepts, once those before it are known not to. Must not know connections or lines.
"""

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence

from regd.core.errors import Code, Refused
from regd.core.instances import Search
from regd.core.limits import Limits
from regd.core.model import Change, Entry
from regd.core.registry import Registry
from regd.server.loop_monitor import LoopMonitor
from regd.system.clock import Clock, Timer
from regd.system.probes import Address, ProbeResults, Probes, may_probe

_SLICE = 128  # looks in one turn of the loop
_TURN_S = 0.02  # for those whose turn it is to be found accepting before others are taken
_AT_ONCE_S = 0.25  # for the one attempt of `wait` 0
_SLICE_S = 0.002  # for looking, before the loop turns


def _nobody(entry: Entry | None) -> None:
    pass


class PendingResolve:
    """One request that is parked. `done` is called once, with the instance or None when the time is over."""

    __slots__ = (
        "addresses",
        "after",
        "began",
        "done",
        "instance",
        "meta",
        "name",
        "once",
        "over",
        "search",
        "soon",
        "timer",
    )

    timer: Timer

    def __init__(
        self,
        name: str,
        instance: str | None,
        meta: Mapping[str, str],
        began: int,
        once: bool,
        done: Callable[[Entry | None], None],
    ) -> None:
        self.name = name
        self.instance = instance
        self.meta = meta
        self.began = began  # the number of the last finding before
        self.once = once
        self.done = done
        self.addresses: dict[Address, None] = {}  # that are probed for it, in turn
        self.search: Search | None = None  # that takes more than one turn of the loop
        self.after: str | None = None  # of very many instances those behind this one are probed
        self.soon: Timer | None = None
        self.over = False


class PendingResolves:
    """Pending resolves of one class of users: `readonly` ones are kept apart, so that they delay no others."""

    def __init__(
        self,
        registry: Registry,
        clock: Clock,
        limits: Limits,
        pulse: LoopMonitor,
        findings: ProbeResults,
        *,
        readonly: bool = False,
    ) -> None:
        self._registry = registry
        self._clock = clock
        self._limits = limits
        self._pulse = pulse
        self._findings = findings
        self._readonly = readonly
        self._named: dict[str, dict[PendingResolve, None]] = {}
        self._probing: dict[Address, dict[PendingResolve, None]] = {}
        self._to_look: OrderedDict[PendingResolve, None] = OrderedDict()
        self._looking = False
        self._count = 0
        self.probes = Probes(clock, limits, findings, self._probed)

    def __len__(self) -> int:
        return self._count

    def park(
        self,
        name: str,
        instance: str | None,
        meta: Mapping[str, str],
        wait_s: float,
        done: Callable[[Entry | None], None],
    ) -> PendingResolve:
        """Wait for an instance. `done` may be called before this returns.

        Raises:
            Refused: `busy`, too many wait.
        """
        if self._count >= self._limits.parked_total_max:
            raise Refused(Code.BUSY, f"{self._count} requests wait; try again later")
        wait = PendingResolve(name, instance, meta, self._findings.count, not wait_s, done)
        self._named.setdefault(name, {})[wait] = None
        self._count += 1
        deadline = self._clock.now() + (wait_s or _AT_ONCE_S)
        wait.timer = self._clock.call_at(deadline, lambda: self._end(wait, None))
        self._look(wait)
        return wait

    def cancel(self, wait: PendingResolve) -> None:
        """Nobody wants the answer any more. Twice is harmless."""
        wait.done = _nobody
        self._end(wait, None)

    def close(self) -> None:
        for wait in [wait for waits in self._named.values() for wait in waits]:
            self.cancel(wait)
        self.probes.close()

    def landed(self, changes: Sequence[Change]) -> None:
        """Look again where something changed."""
        if not self._count:
            return
        for change in changes:
            self.probes.again((change.entry.host, change.entry.port))
        for name in {change.entry.name for change in changes}:
            for wait in self._named.get(name, ()):
                wait.search = wait.after = None
                self._look_soon(wait)

    def _probed(self, address: Address) -> None:
        for wait in self._probing.get(address, ()):
            self._look_soon(wait)

    def _look_soon(self, wait: PendingResolve) -> None:
        self._to_look[wait] = None
        if not self._looking:
            self._looking = True
            asyncio.get_running_loop().call_soon(self._look_some)

    def _look_some(self) -> None:
        """Look for one after another, and let the loop turn in between: very many may wait for one name."""
        self._looking = False
        began = self._clock.now()
        for _ in range(min(len(self._to_look), _SLICE)):
            wait = next(iter(self._to_look))
            del self._to_look[wait]
            self._look(wait)
            if self._clock.now() > began + _SLICE_S:
                break
        self._pulse.took("waits", began)
        if self._to_look:
            self._look_soon(next(iter(self._to_look)))

    def _look(self, wait: PendingResolve) -> None:
        """Answer, or have probed what could become the answer."""
        if wait.over:
            return
        entries = self._candidates(wait)
        if entries is None:
            self._look_soon(wait)
            self._to_look.move_to_end(wait, last=False)  # so that no other search has to be kept meanwhile
            return
        self._probe(wait, [(each.host, each.port) for each in entries if may_probe(each.host)])
        undecided = False
        for entry in entries:
            address = (entry.host, entry.port)
            found = self._found(wait, address) if address in wait.addresses else True
            if found and undecided:
                self._look_later(wait)  # those before it may be only a little slower
                return
            if found:
                self._end(wait, entry)  # of another machine: as good as it gets
                return
            undecided = undecided or found is None
        if not undecided and len(entries) == self._limits.probed_instances_max:
            wait.after = entries[-1].instance  # none of these; next time others
        if wait.once and not undecided:
            self._end(wait, None)

    def _candidates(self, wait: PendingResolve) -> list[Entry] | None:
        """Return the instances in turn, of very many some; None while they are not all looked at."""
        if wait.search is None:
            most = self._limits.probed_instances_max
            wait.search = self._registry.search_in_turn(
                wait.name, wait.instance, wait.meta, most, wait.after, readonly=self._readonly
            )
        search = wait.search
        if not search.go_on(self._limits.search_step_max):
            return None
        wait.search = None
        return search.found

    def _found(self, wait: PendingResolve, address: Address) -> bool | None:
        """Return whether an address accepts, None while that is not known."""
        finding = self._findings.last(address)
        if finding is None or finding.number <= wait.began:
            return None
        return finding.accepted

    def _look_later(self, wait: PendingResolve) -> None:
        if wait.soon is None:
            wait.soon = self._clock.call_at(self._clock.now() + _TURN_S, lambda: self._take_any(wait))

    def _take_any(self, wait: PendingResolve) -> None:
        """Those whose turn it was have not answered in time: take whoever accepts."""
        wait.soon = None
        entries = self._candidates(wait)
        wait.search = None
        for entry in entries or ():
            if not wait.over and self._found(wait, (entry.host, entry.port)):
                self._end(wait, entry)

    def _probe(self, wait: PendingResolve, addresses: Sequence[Address]) -> None:
        before, wait.addresses = wait.addresses, dict.fromkeys(addresses)
        for address in wait.addresses:
            if address not in before:
                self._probing.setdefault(address, {})[wait] = None
                self.probes.want(address)
        for address in before:
            if address not in wait.addresses:
                self._leave(wait, address)

    def _leave(self, wait: PendingResolve, address: Address) -> None:
        waits = self._probing[address]
        del waits[wait]
        if not waits:
            del self._probing[address]
        self.probes.unwant(address)

    def _end(self, wait: PendingResolve, entry: Entry | None) -> None:
        if wait.over:
            return
        wait.over = True
        wait.timer.cancel()
        self._to_look.pop(wait, None)
        self._probe(wait, ())
        if wait.soon is not None:
            wait.soon.cancel()
        waits = self._named[wait.name]
        del waits[wait]
        if not waits:
            del self._named[wait.name]
        self._count -= 1
        if entry is not None:
            self._registry.mark_served(entry, wait.meta, readonly=self._readonly)
        done, wait.done = wait.done, _nobody  # which knows the wait: no cycle is left for the collector
        done(entry)
