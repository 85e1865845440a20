"""`regctl bridge`: its tasks, its status, and the order of its end."""

import asyncio
import contextlib
import logging
import signal
import socket
import time
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

import regd
from regd.bridge import records
from regd.bridge.claim import Claim, ClaimRefusal
from regd.bridge.etcd.client import Etcd
from regd.bridge.etcd.errors import Compacted, EtcdError, EtcdUnavailable, LeaseNotFound
from regd.bridge.etcd.lease import Lease
from regd.bridge.etcd.model import EventBatch, Snapshot, Tls, User
from regd.bridge.foreign import Foreign
from regd.bridge.http_server import HttpServer
from regd.bridge.local import Local, LocalRefusal, Session
from regd.bridge.publish import Publisher, own_records
from regd.gateways.listeners import bind_loopback
from regd.gateways.readers import Readers
from regd.system.listener import ListenError
from regd_client.errors import RegdError, Unavailable
from regd_client.event_loop import random_s
from regd_client.models import Key
from regd_client.protocol import find_address

__all__ = ["Bridge", "BridgeError", "Options", "bridge"]

log = logging.getLogger("regd.bridge")

TTL_S = 10  # of the lease
_CATCH_UP_S = 10.0  # for the watch, before a comparison
_SURE_S = 3.0  # between two comparisons; what differs in both is not a change under way
_AGE_S = 0.5  # between two checks of how long etcd and the daemon have been away
_PAUSE_S = 0.5  # the longest pause between two attempts; the client of etcd repeats calls by itself
_LOST_S = 0.05  # the longest pause before another lease is requested
_REFUSED_S = 5.0  # the longest pause after etcd has refused
_CLAIM_S = 25.0  # the longest wait for the lease of a bridge that ran here before the machine was restarted
_SHOWN_MAX = 1_000  # instances, and machines, in the status
_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class BridgeError(Exception):
    """The bridge cannot run, and a restart would not help. The message is one line."""


@dataclass(frozen=True)
class Options:
    """The options of `regctl bridge`.

    `address` is that of the daemon, None for the default. `advertise` is that of this machine for others.
    """

    endpoints: tuple[str, ...]
    machine: str
    advertise: str | None = None
    prefix: str = "/regd/v1/default/"
    address: str | None = None
    tls: Tls | None = None
    user: User | None = None
    stale_s: float = 60.0
    compare_s: float = 60.0


def bridge(options: Options, say: Callable[[str], None]) -> None:
    """Connect the local daemon with those of other machines, until SIGTERM or Ctrl-C.

    Args:
        say: called with a line that has the address of the metrics, once it listens.

    Raises:
        BridgeError: another bridge has the machine's name or serves the daemon, or no port is free.
        BadArgument: the address is invalid.
    """
    try:
        asyncio.run(_run_until_signal(options, say))
    except ListenError as error:
        raise BridgeError(str(error)) from None


async def _run_until_signal(options: Options, say: Callable[[str], None]) -> None:
    running = asyncio.create_task(Bridge(options).run(say))
    for number in _SIGNALS:
        asyncio.get_running_loop().add_signal_handler(number, running.cancel)
    with contextlib.suppress(asyncio.CancelledError):
        await running


class Bridge:
    """The tasks of a bridge and their state."""

    def __init__(self, options: Options) -> None:
        self._options = options
        self._sockets = bind_loopback(0, (socket.SOCK_STREAM,), "--metrics")
        self._port = self._sockets[0].getsockname()[1]
        own = {"port": self._port, "meta": {"metrics": "/metrics", records.PUBLISH: "no"}}
        self._local = Local(options.address, own, self._changed)
        self._publisher = Publisher(options.prefix, options.machine, options.advertise, self._local)
        has_loopback = options.advertise is not None and records.is_loopback(options.advertise)
        self._foreign = Foreign(options.prefix, options.machine, self._local, loopback=has_loopback)
        self._claim = Claim(options.prefix, options.machine)
        self._own_prefix = records.machine_prefix(options.prefix, options.machine)
        self._etcd = Etcd(options.endpoints, options.tls, options.user)
        self._lease: Lease | None = None
        self._refusals: dict[str, str] = {}  # by "read" or "write": why etcd refuses it
        self._unread_at = 0.0  # when etcd began to refuse to be read
        self._started_at = time.time()
        self._followed = 0  # the revision of the last event
        self._has_followed = asyncio.Event()
        self._must_read = asyncio.Event()  # set to read all keys again
        self._counts = {"leases_lost": 0, "comparisons": 0, "differences": 0}

    async def run(self, say: Callable[[str], None]) -> None:
        """Run until cancelled, then withdraw everything, first from etcd.

        Raises:
            BridgeError: another bridge has the machine's name or serves the daemon.
        """
        readers = Readers(restricted=bool(find_address(self._options.address).path))
        server = HttpServer(self.status, readers)
        tasks: list[asyncio.Task[Any]] = []
        try:
            readers.open(self._sockets)
            await server.start(self._sockets)
            say(f"metrics http://127.0.0.1:{self._port}/metrics")
            work: dict[str, Coroutine[Any, Any, Any]] = {
                "publish": self._publish(),
                "local": self._local.run(self._foreign.run),
                "follow": self._follow(),
                "compare": self._compare(),
                "age": self._age(),
            }
            tasks += [asyncio.create_task(job, name=f"regd-bridge-{name}") for name, job in work.items()]
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        except (LocalRefusal, ClaimRefusal) as refusal:
            raise BridgeError(str(refusal)) from None
        finally:
            server.close()
            await self._end(tasks)
            readers.close()
            for sock in self._sockets:
                sock.close()

    async def _end(self, tasks: list[asyncio.Task[Any]]) -> None:
        """End the tasks in order.

        The first one revokes the lease, so that others stop calling this machine's services.
        """
        for task in tasks:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        await self._publisher.close()
        await self._local.close()
        await self._etcd.__aexit__(None, None, None)

    def _changed(self, key: Key | None) -> None:
        self._publisher.changed(key)
        self._foreign.changed(key)

    # etcd.

    async def _publish(self) -> NoReturn:
        """Keep a lease, and publish with it."""
        refused_at, is_logged = 0.0, False
        while True:
            pause_s = _PAUSE_S
            try:
                async with self._etcd.lease(TTL_S) as lease:
                    self._lease = lease
                    publishing = self._publisher.run(self._etcd, lease.id, self._claim)
                    await _first(publishing, lease.lost.wait())
                self._note_lost_lease()
                pause_s = _LOST_S
            except LeaseNotFound:
                self._note_lost_lease()
                pause_s = _LOST_S
            except ClaimRefusal as refusal:
                refused_at = refused_at or time.monotonic()
                if not refusal.may_end or time.monotonic() - refused_at > _CLAIM_S:
                    raise
                if not is_logged:
                    log.warning("waiting for a lease of this machine from before its restart: %s", refusal)
                    is_logged = True
            except EtcdUnavailable:
                pass
            except EtcdError as error:
                self._note_refusal("write", error)
                pause_s = _REFUSED_S
            finally:
                self._lease = None
            await asyncio.sleep(random_s(pause_s / 2, pause_s))

    def _note_lost_lease(self) -> None:
        self._counts["leases_lost"] += 1
        log.warning("etcd has ended the lease of this machine; its instances are published again")

    def _note_refusal(self, what: str, error: EtcdError) -> None:
        if what == "read" and what not in self._refusals:
            self._unread_at = time.monotonic()
        if self._refusals.get(what) != str(error):
            self._refusals[what] = str(error)
            log.warning("etcd refuses to %s: %s; still trying", what, error)

    async def _follow(self) -> NoReturn:
        """Follow the keys in etcd. When that fails for too long, withdraw the instances of other machines."""
        while True:
            await _first(self._follow_while_fresh(), self._until_stale(), self._must_read.wait())
            if self._must_read.is_set():
                self._must_read.clear()
                continue
            what = "refuses to be read" if "read" in self._refusals else "is away"
            stale_s = self._options.stale_s
            log.warning("etcd %s for %g s: other machines' instances are withdrawn", what, stale_s)
            self._foreign.withdraw()

    @property
    def _stale_s(self) -> float:
        """For how many seconds other machines' instances may be out of date."""
        unread_s = time.monotonic() - self._unread_at if "read" in self._refusals else 0.0
        return max(self._etcd.silent_s, unread_s)

    async def _until_stale(self) -> None:
        """Wait until etcd has not answered, or has refused to be read, for too long.

        A silent etcd is asked in between, since it may have nothing to report.
        """
        stale_s = self._options.stale_s
        while True:
            await asyncio.sleep(min(_AGE_S, stale_s / 4))
            if self._etcd.silent_s > stale_s / 2:
                with contextlib.suppress(EtcdError, TimeoutError):
                    async with asyncio.timeout(max(_AGE_S, stale_s - self._etcd.silent_s)):
                        await self._etcd.read(self._claim.key)
            if self._foreign.is_current and self._stale_s > stale_s:
                return

    async def _follow_while_fresh(self) -> NoReturn:
        while True:
            pause_s = _PAUSE_S
            try:
                snapshot = await self._etcd.read(self._options.prefix.encode())
                self._take(snapshot)
                self._refusals.pop("read", None)
                batches = self._etcd.watch(self._options.prefix.encode(), snapshot.revision)
                async with contextlib.aclosing(batches):
                    async for batch in batches:
                        self._apply(batch)
            except Compacted:
                continue  # read again
            except EtcdUnavailable:
                pass
            except EtcdError as error:
                self._note_refusal("read", error)
                pause_s = _REFUSED_S
            await asyncio.sleep(random_s(pause_s / 2, pause_s))

    def _take(self, snapshot: Snapshot) -> None:
        is_restored = snapshot.revision < self._followed  # from a backup, or etcd has lost its data
        self._followed = snapshot.revision
        self._has_followed.set()
        own, others = self._split(snapshot)
        self._foreign.replace(others)
        if self._publisher.is_active:
            (self._publisher.replace if is_restored else self._publisher.repair)(own, snapshot.revision)

    def _split(self, snapshot: Snapshot) -> tuple[dict[bytes, Any], dict[bytes, Any]]:
        """Return the records of this machine, without its claim, and those of the others."""
        own = {key: record for key, record in snapshot.records.items() if key.startswith(self._own_prefix)}
        others = {key: record for key, record in snapshot.records.items() if key not in own}
        return own_records(Snapshot(snapshot.revision, own), self._claim.key), others

    def _apply(self, batch: EventBatch) -> None:
        self._followed = batch.revision
        self._has_followed.set()
        for event in batch.events:
            if not event.key.startswith(self._own_prefix):
                self._foreign.apply(event)
            else:
                self._publisher.seen(event)

    async def _age(self) -> NoReturn:
        """Publish nothing while the daemon is away for too long: nobody knows which services still run."""
        while True:
            await asyncio.sleep(_AGE_S)
            if self._publisher.is_active:
                self._refusals.pop("write", None)
            is_stale = self._local.is_complete and self._local.stale_s > self._options.stale_s
            if self._publisher.withdraw(is_stale) and is_stale:
                log.warning("the daemon is away for %g s: nothing is published", self._options.stale_s)

    # Whole comparisons.

    async def _compare(self) -> NoReturn:
        while True:
            await asyncio.sleep(self._options.compare_s)
            with contextlib.suppress(EtcdError, ClaimRefusal, RegdError, OSError, TimeoutError):
                await self.compare()

    async def compare(self) -> int:
        """Compare etcd and the daemon with what is known and wanted here, and repair the differences.

        Returns the number of differences that are the same after some time: others are changes under way.

        Raises:
            EtcdError, ClaimRefusal, RegdError, TimeoutError: the comparison could not be finished.
        """
        lasting = await self._differences()
        if lasting:
            await asyncio.sleep(_SURE_S)
            lasting &= await self._differences()
        count = len(lasting)
        self._counts["comparisons"] += 1
        self._counts["differences"] += count
        if lasting:
            log.error("%d differences between what is and what should be, repaired: %s", count, min(lasting))
            self._must_read.set()
            self._changed(None)
        return count

    async def _differences(self) -> set[str]:
        session = self._check_complete()
        await self._catch_up()
        own, others = self._split(await self._etcd.read(self._options.prefix.encode()))
        differences = self._publisher.differences(own) | self._foreign.differences(others)
        async with asyncio.timeout(_CATCH_UP_S):
            instances = await session.list_all()
        differences |= self._local.differences(instances) | self._foreign.unregistered(instances)
        if self._check_complete() is not session:
            raise Unavailable("the daemon was away meanwhile")
        return differences

    def _check_complete(self) -> Session:
        """Return the session with the daemon.

        Raises:
            Unavailable: the daemon or etcd is away, so that there is nothing to compare.
        """
        session = self._local.session
        if session is None or not self._foreign.is_current or not self._publisher.is_active:
            raise Unavailable("the daemon or etcd is away")
        return session

    async def _catch_up(self) -> None:
        """Wait until the watch has shown all changes up to now.

        Raises:
            TimeoutError: the watch did not catch up in time, for example because etcd was away.
        """
        revision = await self._publisher.mark()
        async with asyncio.timeout(_CATCH_UP_S):
            while self._followed < revision:
                self._has_followed.clear()
                await self._has_followed.wait()

    # Status.

    def status(self) -> Mapping[str, Any]:
        """Return what `regctl bridge --status` shows."""
        options, foreign, publisher, local = self._options, self._foreign, self._publisher, self._local
        lease = self._lease
        is_connected = foreign.is_known and not self._etcd.failure and self._etcd.silent_s < TTL_S
        is_current = is_connected and foreign.is_current and "read" not in self._refusals
        reasons = sorted(publisher.reasons.items())
        machines = foreign.machines()
        return {
            "version": regd.__version__,
            "machine": options.machine,
            "prefix": options.prefix,
            "started_at": self._started_at,
            "advertise": options.advertise,
            "etcd": {
                "connected": is_connected,
                "member": self._etcd.member,
                "silent_s": round(self._etcd.silent_s, 3),
                "failure": self._etcd.failure,
                "lease": None if lease is None else f"{lease.id:x}",
                "lease_remaining_s": 0.0 if lease is None else round(lease.remaining_s, 3),
                "refuses": [f"to {what}: {why}" for what, why in self._refusals.items()],
            },
            "daemon": {
                "connected": local.session is not None,
                "address": local.address,
                "rev": local.rev,
                "stale_s": round(local.stale_s, 3),
            },
            "published": publisher.count,
            "not_published_count": len(reasons),
            "not_published": [
                {"name": name, "instance": instance, "why": why} for (name, instance), why in reasons[:_SHOWN_MAX]
            ],
            "peers_count": len(machines),
            "peers": [
                {"machine": machine, "host": foreign.hosts.get(machine, ""), "instances": count}
                for machine, count in list(machines.items())[:_SHOWN_MAX]
            ],
            "foreign": {
                "count": foreign.count,
                "stale_s": 0.0 if is_current else round(self._stale_s, 3),
                "refused": len(foreign.refused),
                "shadowed": len(foreign.shadowed),
                "ignored": len(foreign.ignored),
            },
            "lag": {
                "publish_s": publisher.lag_s,
                "publish_max_s": publisher.lag_max_s,
                "register_s": foreign.lag_s,
                "register_max_s": foreign.lag_max_s,
            },
            "counts": {"commits": publisher.commits, "requests": foreign.requests, **self._counts},
        }


async def _first(*work: Coroutine[Any, Any, Any]) -> None:
    """Run coroutines until the first one ends, cancel the others, and raise its exception if it has one."""
    tasks = [asyncio.create_task(job) for job in work]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    for task in done:
        task.result()
