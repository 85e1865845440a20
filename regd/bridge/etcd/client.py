"""The client: reads, transactions, leases and watches of one cluster."""

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Mapping, Sequence
from types import TracebackType
from typing import Self

from regd.bridge.etcd.calls import Calls
from regd.bridge.etcd.errors import Compacted, EtcdConflict, EtcdError, ResponseTooLarge
from regd.bridge.etcd.lease import Lease
from regd.bridge.etcd.members import Members
from regd.bridge.etcd.methods import LEASE_GRANT, LEASE_REVOKE, RANGE, TXN
from regd.bridge.etcd.model import Delete, EventBatch, Operation, Put, Record, Snapshot, Tls, User, key_range
from regd.bridge.etcd.stubs import kv_pb2 as kv
from regd.bridge.etcd.stubs import rpc_pb2 as rpc
from regd.bridge.etcd.transactions import claim, transactions
from regd.bridge.etcd.watch import Watch

__all__ = ["Etcd"]

DEADLINE_S = 2.0  # a member whose leader has died does not answer until another one is elected
_PAGE_KEYS = 500
_REVOKE_S = 2.0
_NONE: Mapping[bytes, int] = {}


class Etcd:
    """A client of a cluster. It connects with the first call, and again whenever the connection fails.

    It logs one line when no member answers, and one when a member answers again.

    Args:
        addresses: HOST:PORT of the members.
        tls: for connections with TLS.
        user: to authenticate as.
        deadline_s: for one call at one member.

    Example:
        async with Etcd(["127.0.0.1:2379"]) as etcd, etcd.lease(10) as lease:
            await etcd.put(b"/greeting", b"hello", lease.id)
    """

    def __init__(
        self,
        addresses: Sequence[str],
        tls: Tls | None = None,
        user: User | None = None,
        deadline_s: float = DEADLINE_S,
    ) -> None:
        self._members = Members(addresses, tls)
        self._calls = Calls(self._members, user, deadline_s)

    @property
    def member(self) -> str:
        """The address of the member in use."""
        return self._members.address

    @property
    def silent_s(self) -> float:
        """Seconds since a member last answered. While a lease is kept, etcd answers every third of its TTL."""
        return time.monotonic() - self._members.answered_at

    @property
    def failure(self) -> str:
        """Why no member answers; "" if one does."""
        return self._members.failure

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._members.close()

    async def read(self, prefix: bytes) -> Snapshot:
        """Read all keys with a prefix, at one revision.

        Raises:
            EtcdUnavailable: no member answered in time.
            EtcdRefused: the user may not read the prefix.
        """
        while True:
            with contextlib.suppress(Compacted):  # between two pages: begin again
                return await self._read(prefix)

    async def _read(self, prefix: bytes) -> Snapshot:
        records: dict[bytes, Record] = {}
        key, range_end = key_range(prefix)
        request = rpc.RangeRequest(key=key, range_end=range_end, limit=_PAGE_KEYS)
        while True:
            try:
                page = await self._calls.call(RANGE, request, repeatable=True)
            except ResponseTooLarge:
                if request.limit == 1:
                    raise
                request.limit = max(1, request.limit // 8)
                continue
            records.update((item.key, _record(item)) for item in page.kvs)
            request.revision = request.revision or page.header.revision
            if not page.more:
                return Snapshot(request.revision, records)
            request.key = page.kvs[-1].key + b"\0"

    async def put(self, key: bytes, value: bytes, lease: int = 0) -> int:
        """Store a value. Returns the revision. Raises as `commit`."""
        return await self.commit([Put(key, value, lease)])

    async def delete(self, key: bytes) -> int:
        """Delete a key. Returns the revision. Raises as `commit`."""
        return await self.commit([Delete(key)])

    async def commit(self, operations: Iterable[Operation], only_if: Mapping[bytes, int] = _NONE) -> int:
        """Perform operations in order, in as few transactions as etcd's limits allow.

        After `EtcdUnavailable` the operations may be in effect. A frozen member may even perform them later,
        after newer ones. To prevent that, pass a claimed key in `only_if`, and claim it again after the error:
        its new revision makes late transactions fail.

        Args:
            only_if: keys and their `mod_revision` (0: absent). If one differs, the transaction has no effect.

        Returns:
            The revision of the last transaction; 0 without operations.

        Raises:
            EtcdUnavailable: no member answered in time.
            EtcdConflict: a key of `only_if` has another revision.
            LeaseNotFound: the lease of a `Put` has ended.
            EtcdRefused: the user may not write a key, or a value is too large.
        """
        revision = 0
        for transaction in transactions(operations, only_if):
            response = await self._calls.call(TXN, transaction, repeatable=False)
            if not response.succeeded:
                raise EtcdConflict(f"changed by someone else: {', '.join(map(repr, only_if))}")
            revision = response.header.revision
        return revision

    async def claim(self, key: bytes, value: bytes, lease: int) -> Record:
        """Put a key if it is absent or has this lease already, and return its record.

        The claim has succeeded if the record has this lease. Otherwise the key belongs to another lease, and is
        unchanged. The record's `mod_revision` is for `only_if`. Raises as `commit`, except `EtcdConflict`.
        """
        response = await self._calls.call(TXN, claim(Put(key, value, lease)), repeatable=True)
        [result] = response.responses
        while result.HasField("response_txn"):
            [result] = result.response_txn.responses
        if result.HasField("response_put"):
            return Record(value, response.header.revision, lease)
        [item] = result.response_range.kvs
        return _record(item)

    @contextlib.asynccontextmanager
    async def lease(self, ttl_s: int) -> AsyncIterator[Lease]:
        """Keep a lease alive during the block, and revoke it at the end, which deletes its keys.

        Raises:
            EtcdUnavailable: no member answered in time.
        """
        asked_at = time.monotonic()
        granted = await self._calls.call(LEASE_GRANT, rpc.LeaseGrantRequest(TTL=ttl_s), repeatable=True)
        lease = Lease(self._calls, granted.ID, granted.TTL, asked_at)
        keeping = asyncio.create_task(lease.keep(), name="regd-bridge-lease")
        try:
            yield lease
        finally:
            keeping.cancel()
            await asyncio.wait([keeping])
            if not lease.lost.is_set():
                await self._revoke(lease)
            if not keeping.cancelled():
                keeping.result()  # raises an unexpected exception

    async def _revoke(self, lease: Lease) -> None:
        """Revoke a lease. If that fails, the lease expires."""
        with contextlib.suppress(EtcdError, TimeoutError):
            async with asyncio.timeout(_REVOKE_S):
                await self._calls.call(LEASE_REVOKE, rpc.LeaseRevokeRequest(ID=lease.id), repeatable=True)

    def watch(self, prefix: bytes, after_revision: int) -> AsyncGenerator[EventBatch, None]:
        """Yield the changes of all keys with a prefix after a revision, in order, each change once.

        The watch reconnects by itself, to any member, and ends only with an error. To leave the loop early, use
        `async with contextlib.aclosing(etcd.watch(prefix, revision)) as batches`.

        Raises:
            Compacted: etcd no longer has the next changes. Read the prefix, and watch from its revision.
            EtcdRefused: the user may not read the prefix.
        """
        return Watch(self._calls, prefix, after_revision).batches()


def _record(item: kv.KeyValue) -> Record:
    return Record(item.value, item.mod_revision, item.lease)
