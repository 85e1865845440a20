"""Probe loopback addresses: try to connect until an address accepts connections.

All requests that wait for an address share one probe. It repeats its attempts, with increasing pauses, until no
request waits any more. Addresses of other machines are never probed.
"""

import asyncio
import contextlib
import errno
import ipaddress
import socket
from collections.abc import Callable
from dataclasses import dataclass

from regd.core.limits import Limits
from regd.system.clock import Clock, Timer

_PAUSE_S = (0.02, 0.5)  # the first and the longest pause between two attempts

_REFUSED = "connection refused"
# Errors for an address that this machine does not have, for example ::1 without IPv6.
_NO_SUCH_ADDRESS = (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT, errno.ENETUNREACH)

Address = tuple[str, int]


def may_probe(host: str) -> bool:
    """Return whether a host is a loopback address or `localhost`. Other hosts are never probed or looked up."""
    return bool(_targets(host))


def _targets(host: str) -> list[str]:
    if host.lower().rstrip(".") == "localhost":
        return ["127.0.0.1", "::1"]
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return []
    if isinstance(address, ipaddress.IPv6Address):
        if address.scope_id is not None:
            return []
        if address.ipv4_mapped is not None:
            return [str(address.ipv4_mapped)] if address.ipv4_mapped.is_loopback else []
    return [host] if address.is_loopback else []


@dataclass(frozen=True, slots=True)
class ProbeResult:
    """The result of one attempt to connect."""

    number: int  # the number of the attempt, over all addresses
    at: float  # monotonic seconds
    why: str  # why the attempt failed; "" if the connection was accepted

    @property
    def accepted(self) -> bool:
        return not self.why

    @property
    def refused(self) -> bool:
        """Whether it is certain that no process listens there."""
        return self.why == _REFUSED


class _Probe:
    def __init__(self) -> None:
        self.waiters = 0
        self.pause_s = _PAUSE_S[0]
        self.task: asyncio.Task[None] | None = None
        self.timer: Timer | None = None


class ProbeResults:
    """The last result for each of up to `addresses_max` addresses. `count` is the number of all attempts."""

    def __init__(self, addresses_max: int) -> None:
        self._addresses_max = addresses_max
        self._last: dict[Address, ProbeResult] = {}
        self.count = 0

    def add(self, address: Address, at: float, why: str) -> ProbeResult:
        self.count += 1
        self._last.pop(address, None)
        result = self._last[address] = ProbeResult(self.count, at, why)
        if len(self._last) > self._addresses_max:
            del self._last[next(iter(self._last))]
        return result

    def last(self, address: Address) -> ProbeResult | None:
        return self._last.get(address)


class Probes:
    """The running probes. After each attempt, its result is added to `results`, and `probed` is called."""

    def __init__(
        self, clock: Clock, limits: Limits, results: ProbeResults, probed: Callable[[Address], None]
    ) -> None:
        self._clock = clock
        self._limits = limits
        self._results = results
        self._probed = probed
        self._probes: dict[Address, _Probe] = {}
        self._callbacks: dict[Address, list[Callable[[ProbeResult], None]]] = {}  # of `probe_once`
        self._queue: dict[Address, _Probe] = {}  # probes beyond `probes_max`, in order
        self._running = 0

    def acquire(self, address: Address) -> None:
        """Probe an address repeatedly, until `release` was called as often as `acquire`."""
        probe = self._probes.setdefault(address, _Probe())
        probe.waiters += 1
        self.probe_now(address)

    def release(self, address: Address) -> None:
        """Undo one call of `acquire`."""
        probe = self._probes[address]
        probe.waiters -= 1
        if not probe.waiters:
            self._end(address)

    def probe_once(self, address: Address, on_result: Callable[[ProbeResult], None]) -> None:
        """Probe an address once, and call `on_result` with the result."""
        self._callbacks.setdefault(address, []).append(on_result)
        self.acquire(address)

    def _end(self, address: Address) -> None:
        probe = self._probes.pop(address)
        self._queue.pop(address, None)
        if probe.task is not None:
            probe.task.cancel()
        if probe.timer is not None:
            probe.timer.cancel()

    def close(self) -> None:
        self._callbacks.clear()
        for address in list(self._probes):
            self._end(address)

    def probe_now(self, address: Address) -> None:
        """Make an attempt now, and begin again with short pauses. Does nothing if the address is not probed."""
        probe = self._probes.get(address)
        if probe is not None and probe.task is None:
            if probe.timer is not None:
                probe.timer.cancel()
            probe.pause_s = _PAUSE_S[0]
            self._try_now(address, probe)

    def _try_now(self, address: Address, probe: _Probe) -> None:
        probe.timer = None
        if self._running >= self._limits.probes_max:
            self._queue[address] = probe
            return
        self._running += 1
        probe.task = asyncio.create_task(self._try(address, probe), name="regd-probe")
        probe.task.add_done_callback(self._tried)

    def _tried(self, task: asyncio.Task[None]) -> None:
        self._running -= 1
        if self._queue:
            address = next(iter(self._queue))
            self._try_now(address, self._queue.pop(address))

    async def _try(self, address: Address, probe: _Probe) -> None:
        why = await _connect(address, self._limits.probe_s_max)
        result = self._results.add(address, self._clock.now(), why)
        probe.task = None
        next_at = self._clock.now() + probe.pause_s
        probe.timer = self._clock.call_at(next_at, lambda: self._try_now(address, probe))
        probe.pause_s = min(2 * probe.pause_s, _PAUSE_S[1])
        self._probed(address)
        for on_result in self._callbacks.pop(address, ()):
            self.release(address)
            on_result(result)


async def _connect(address: Address, timeout_s: float) -> str:
    """Connect and disconnect. Return why connecting failed; "" if it succeeded.

    If a host has several addresses, the result is "connection refused" only if all of them refuse.
    """
    reasons: list[str] = []
    for host in _targets(address[0]):
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            with contextlib.closing(socket.socket(family, socket.SOCK_STREAM)) as probe:
                probe.setblocking(False)
                async with asyncio.timeout(timeout_s):
                    await asyncio.get_running_loop().sock_connect(probe, (host, address[1]))
                if not met_itself(probe):
                    return ""
                reasons.append(_REFUSED)
        except TimeoutError:
            reasons.append("no answer")
        except ConnectionRefusedError:
            reasons.append(_REFUSED)
        except OSError as error:
            if error.errno not in _NO_SUCH_ADDRESS:
                reasons.append((error.strerror or str(error)).lower())
    return next((why for why in reasons if why != _REFUSED), _REFUSED if reasons else "no such address")


def met_itself(probe: socket.socket) -> bool:
    """Return whether a socket is connected to itself: the kernel may assign it the port that it connects to."""
    return bool(probe.getsockname()[:2] == probe.getpeername()[:2])
