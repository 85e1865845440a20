"""Publishes the instances of the local daemon that other machines can reach, as keys in etcd."""

import asyncio
import functools
import logging
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import NoReturn

from regd.bridge import records
from regd.bridge.claim import Claim
from regd.bridge.etcd.client import Etcd
from regd.bridge.etcd.errors import EtcdConflict, EtcdUnavailable
from regd.bridge.etcd.model import Delete, KeyEvent, Put, Record, Snapshot
from regd.bridge.local import Local
from regd.bridge.reachability import Reachability
from regd.bridge.reconcile import difference
from regd.bridge.records import Place
from regd.core.errors import Invalid
from regd_client.event_loop import random_s
from regd_client.models import Key

__all__ = ["Publisher"]

log = logging.getLogger("regd.bridge")

_COMMIT_MAX = 100  # keys in one transaction
_PAUSE_S = 0.5  # at most, before another attempt to claim

Leased = tuple[bytes, int]  # a value and its lease


class Publisher:
    """Keeps the keys of this machine equal to the instances that are published.

    Args:
        prefix: of all keys.
        machine: the name of this machine.
        advertise: the address at which other machines reach services on loopback; None if there is none.
        local: the daemon's registrations. It calls `changed` for each change.

    Attributes:
        is_active: whether it has the claim, and publishes.
        reasons: why instances are not published.
        commits: the number of transactions.
        lag_s, lag_max_s: from a change to its commit, the last one and the longest.
    """

    def __init__(self, prefix: str, machine: str, advertise: str | None, local: Local) -> None:
        self._prefix = prefix
        self._machine = machine
        self._local = local
        self._reachability = None if advertise is None else Reachability(advertise, self._mark_instances)
        self._actual: dict[bytes, Leased] = {}
        self._revisions: dict[bytes, int] = {}  # by key: the revision up to which `_actual` is known to be right
        self._dirty: dict[bytes, None] = {}
        self._dirty_at = 0.0
        self._in_progress: dict[bytes, None] = {}
        self._wake = asyncio.Event()
        self._is_withdrawn = False
        self._claim_key = records.claim_key(prefix, machine)
        self._put_claim: Callable[[], Awaitable[int]] | None = None
        self._has_claim = False
        self._fence: dict[bytes, int] = {}  # the claim and its revision, on which each commit depends
        self._committing = asyncio.Lock()
        self._skipped = 0  # the revision of the last event that came while not active
        self.is_active = False
        self.reasons: dict[Key, str] = {}
        self.commits = 0
        self.lag_s = self.lag_max_s = 0.0

    @property
    def count(self) -> int:
        """The number of keys of this machine in etcd, without the claim."""
        return len(self._actual)

    # The keys that should be there.

    def changed(self, key: Key | None) -> None:
        """Note that an instance has changed; None: any instance may have changed."""
        if key is None:
            self._mark_all()
            return
        instance = self._local.instances.get(key)
        if instance is not None and records.is_arrival(instance) and self._key(key) not in self._actual:
            return
        if self._reachability is not None:
            self._reachability.again(key)
        self._mark_instances([key])

    def withdraw(self, is_withdrawn: bool) -> bool:
        """Publish nothing, or everything again. Return whether that is a change."""
        if is_withdrawn == self._is_withdrawn:
            return False
        self._is_withdrawn = is_withdrawn
        self._mark_all()
        return True

    def _key(self, key: Key) -> bytes:
        return records.key_of(self._prefix, Place(self._machine, *key))

    def _mark_instances(self, keys: Iterable[Key]) -> None:
        self._mark(map(self._key, keys))

    def _mark(self, keys: Iterable[bytes]) -> None:
        if not self._dirty:
            self._dirty_at = time.monotonic()
        self._dirty.update(dict.fromkeys(keys))
        if self._local.is_complete:
            self._wake.set()

    def _mark_all(self) -> None:
        self._mark([*self._actual, *map(self._key, [*self._local.instances, *self.reasons])])

    def wanted(self, key: bytes) -> bytes | None:
        """Return the value that a key should have; None: it should not exist. Note the reason."""
        try:
            place = records.place_of(self._prefix, key)
        except Invalid:
            return None
        instance_key = (place.name, place.instance)
        instance = self._local.instances.get(instance_key)
        if instance is None or records.is_arrival(instance) or place.name == records.BRIDGE:
            self._forget(instance_key)
            return None
        host = instance["host"]
        reason = records.reason_not_to_publish(instance, self._machine)
        if reason or not records.is_loopback(host):
            self._forget(instance_key)
        elif self._reachability is None:
            reason = "it is registered on loopback, and the bridge has no --advertise"
        else:
            host = self._reachability.host
            port = instance["port"]
            reason = self._reachability.reason(instance_key, port, lambda: self._is_published_at(key, host, port))
        if reason:
            self.reasons[instance_key] = reason
            return None
        self.reasons.pop(instance_key, None)
        return None if self._is_withdrawn else records.value_of(instance, host, self._local.epoch)

    def _is_published_at(self, key: bytes, host: str, port: int) -> bool:
        try:
            fields = records.published(self._actual[key][0])
        except (KeyError, Invalid):
            return False
        return (fields["host"], fields["port"]) == (host, port)

    def _forget(self, key: Key) -> None:
        self.reasons.pop(key, None)
        if self._reachability is not None:
            self._reachability.forget(key)

    # The keys that are there.

    def seen(self, event: KeyEvent) -> None:
        """Apply an event of the watch. A change that this bridge has not made is undone."""
        if event.key == self._claim_key:
            if event.record is None and event.revision > self._fence.get(self._claim_key, 0):
                self._has_claim = False
                self._wake.set()
            return
        if not self.is_active:
            self._skipped = event.revision
            return
        if event.revision <= self._revisions.get(event.key, 0):
            return
        self._note(event.key, event.record, event.revision)
        self._mark([event.key])

    def _note(self, key: bytes, record: Record | None, revision: int) -> None:
        if record is None:
            self._actual.pop(key, None)
            self._revisions.pop(key, None)
        else:
            self._actual[key] = (record.value, record.lease)
            self._revisions[key] = revision

    def repair(self, own: Mapping[bytes, Record], revision: int) -> None:
        """Apply what etcd has of this machine, except for keys whose later commit is known."""
        for key in dict.fromkeys([*own, *self._actual]):
            if self._revisions.get(key, 0) < revision:
                record = own.get(key)
                self._note(key, record, revision if record is None else record.mod_revision)
        self._mark_all()

    def replace(self, own: Mapping[bytes, Record], revision: int) -> None:
        """Replace the known keys of this machine by what etcd has."""
        self._actual = {key: (record.value, record.lease) for key, record in own.items()}
        self._revisions = dict.fromkeys(own, revision)
        self._mark_all()

    def differences(self, own: Mapping[bytes, Record]) -> set[str]:
        """Return the keys in etcd that differ from the known ones, or from those that should be there."""
        there = {key: record.value for key, record in own.items()}
        known = {key: value for key, (value, _) in self._actual.items()}
        wanted = {}
        for key in map(self._key, self._local.instances):
            if (value := self.wanted(key)) is not None:
                wanted[key] = value
        actions = [*difference(known, there), *difference(wanted, there)]
        skipped = self._dirty.keys() | self._in_progress
        return {f"{key!r} {old!r:.300} {new!r:.300}" for key, old, new in actions if key not in skipped}

    async def run(self, etcd: Etcd, lease: int, claim: Claim) -> NoReturn:
        """Publish, with a lease.

        Raises:
            ClaimRefusal: another bridge has the machine's name.
            LeaseNotFound: the lease has ended.
            EtcdError: etcd refuses.
        """
        self._put_claim = functools.partial(claim.make, etcd, lease)
        while True:
            try:
                await self.mark()
                self._skipped = 0
                snapshot = await etcd.read(records.machine_prefix(self._prefix, self._machine))
                if snapshot.revision < self._skipped:
                    continue  # the watch has shown later changes, which were skipped: read again
                self.replace(own_records(snapshot, self._claim_key), snapshot.revision)
                self.is_active = True
                await self._publish(etcd, lease)
            except (EtcdUnavailable, EtcdConflict):
                pass
            finally:
                self.is_active = False
            await asyncio.sleep(random_s(0, _PAUSE_S))

    async def mark(self) -> int:
        """Write the claim, even if it exists, and return its revision.

        Once the watch has shown that revision, it has shown all earlier changes.

        Raises:
            ClaimRefusal: another bridge has the machine's name.
            EtcdError: etcd is away, or refuses.
        """
        assert self._put_claim is not None, "not running"
        async with self._committing:  # a commit under way would fail: the claim has another revision
            revision = await self._put_claim()
            self._has_claim = True
            self._fence = {self._claim_key: revision}
        return revision

    async def _publish(self, etcd: Etcd, lease: int) -> None:
        while True:
            await self._wake.wait()
            self._wake.clear()
            if not self._has_claim:
                raise EtcdConflict("the claim was deleted by someone else")
            keys, since = self._dirty, self._dirty_at
            self._in_progress, self._dirty = keys, {}  # after a failure, all keys are marked again
            wanted = {key: (value, lease) for key in keys if (value := self.wanted(key)) is not None}
            actions = difference(wanted, self._actual, keys)
            for start in range(0, len(actions), _COMMIT_MAX):
                part = actions[start : start + _COMMIT_MAX]
                operations = [
                    Delete(action.key) if action.new is None else Put(action.key, *action.new) for action in part
                ]
                async with self._committing:
                    revision = await etcd.commit(operations, only_if=self._fence)
                self.commits += 1
                for action in part:
                    self._acknowledge(action.key, action.new, revision)
            self._in_progress = {}
            if actions:
                self.lag_s = time.monotonic() - since
                self.lag_max_s = max(self.lag_s, self.lag_max_s)

    def _acknowledge(self, key: bytes, new: Leased | None, revision: int) -> None:
        if self._revisions.get(key, 0) < revision:  # else the watch was quicker
            self._note(key, None if new is None else Record(new[0], revision, new[1]), revision)

    async def close(self) -> None:
        """Stop probing services."""
        if self._reachability is not None:
            await self._reachability.close()


def own_records(snapshot: Snapshot, claim_key: bytes) -> dict[bytes, Record]:
    """Return the records of a snapshot without the machine's claim."""
    return {key: record for key, record in snapshot.records.items() if key != claim_key}
