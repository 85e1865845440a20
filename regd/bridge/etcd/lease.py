"""A lease, refreshed on one stream after a third of its TTL."""

import asyncio
import time

from regd.bridge.etcd.backoff import Backoff
from regd.bridge.etcd.calls import Calls, metadata
from regd.bridge.etcd.errors import EtcdError, EtcdUnavailable, LeaseNotFound, TokenExpired
from regd.bridge.etcd.member import Stream
from regd.bridge.etcd.methods import KEEP_ALIVE
from regd.bridge.etcd.stubs import rpc_pb2 as rpc

__all__ = ["Lease"]

# In TTLs. If the member does not answer, half of the TTL is left to connect to another one.
_REFRESH_AFTER = 1 / 3
_RESPONSE_WITHIN = 1 / 6

_KeepAlive = Stream[rpc.LeaseKeepAliveRequest, rpc.LeaseKeepAliveResponse]


class Lease:
    """A lease of etcd, which `keep` keeps alive.

    The TTL is a minimum: after a change of leader, etcd counts it from the start. So a lease has ended only when
    etcd says so, not when the TTL has passed here.

    Attributes:
        id: for `Put`.
        ttl_s: as etcd granted it, which may be more than requested.
        lost: set when etcd has ended the lease, and deleted its keys.
    """

    def __init__(self, calls: Calls, lease_id: int, ttl_s: int, granted_at: float) -> None:
        self.id = lease_id
        self.ttl_s = ttl_s
        self.lost = asyncio.Event()
        self._calls = calls
        self._backoff = Backoff(ttl_s / 10)
        self._refreshed_at = granted_at  # when the last successful request was sent

    @property
    def remaining_s(self) -> float:
        """Seconds for which the lease surely exists; 0 if etcd may have ended it."""
        if self.lost.is_set():
            return 0.0
        return max(0.0, self._refreshed_at + self.ttl_s - time.monotonic())

    async def keep(self) -> None:
        """Keep the lease alive until it is lost or this task is cancelled."""
        while True:
            try:
                await self._keep_at_member()
            except LeaseNotFound:
                self.lost.set()
                return
            except EtcdError:
                await self._backoff.pause()

    async def _keep_at_member(self) -> None:
        """Keep the lease alive on a stream of one member, until that member is given up."""
        async with self._calls.members.use() as member:
            token = await self._calls.token(member)
            stream = member.stream(KEEP_ALIVE, metadata(token))
            try:
                while not member.given_up.done():
                    await self._refresh(stream)
                    pause_s = self._refreshed_at + self.ttl_s * _REFRESH_AFTER - time.monotonic()
                    await asyncio.wait([member.given_up], timeout=max(0.0, pause_s))
            except TokenExpired:
                self._calls.forget_token(token)
                raise
            except TimeoutError:
                raise EtcdUnavailable(f"etcd at {member.address} did not refresh a lease in time") from None
            finally:
                stream.close()

    async def _refresh(self, stream: _KeepAlive) -> None:
        sent_at = time.monotonic()
        async with asyncio.timeout(self.ttl_s * _RESPONSE_WITHIN):
            await stream.send(rpc.LeaseKeepAliveRequest(ID=self.id))
            response = await stream.receive()
        if response.TTL <= 0:
            raise LeaseNotFound("the lease has ended")
        self._refreshed_at = sent_at
        self._backoff.reset()
