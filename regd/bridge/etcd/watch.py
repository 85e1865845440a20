"""A watch of a prefix. When its stream breaks, it resumes at another member, after the last change seen."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator
from typing import Any

from regd.bridge.etcd.backoff import Backoff
from regd.bridge.etcd.calls import Calls, metadata
from regd.bridge.etcd.errors import Compacted, EtcdRefused, EtcdUnavailable, TokenExpired
from regd.bridge.etcd.member import Member, Stream
from regd.bridge.etcd.methods import RANGE, WATCH
from regd.bridge.etcd.model import EventBatch, KeyEvent, Record, key_range
from regd.bridge.etcd.stubs import kv_pb2 as kv
from regd.bridge.etcd.stubs import rpc_pb2 as rpc

__all__ = ["Position", "Watch"]

QUIET_S = 5.0  # without a response, before the member is asked for one
_QUIET_MAX = 3  # periods of QUIET_S without a response, before a stream counts as broken
_PAUSE_S_MAX = 1.0  # so that a bridge soon sees the others when etcd is back

_WatchStream = Stream[rpc.WatchRequest, rpc.WatchResponse]


class Position:
    """The revision up to which a watch has reported all changes, and none after it.

    Only changes advance it. The header of a response has the revision of the store, which is later than the last
    change in the response while a watch catches up. In etcd 3.4, the answer to a progress request may overtake
    changes.
    """

    def __init__(self, revision: int) -> None:
        self.revision = revision
        self._incomplete: list[KeyEvent] = []

    def take(self, response: rpc.WatchResponse) -> EventBatch | None:
        """Return the new changes, in whole revisions. The last revision of a fragment waits for the next one."""
        events = self._incomplete + [
            _event(event) for event in response.events if event.kv.mod_revision > self.revision
        ]
        self._incomplete = []
        if response.fragment and events:
            last = events[-1].revision
            self._incomplete = [event for event in events if event.revision == last]
            events = [event for event in events if event.revision < last]
        if not events:
            return None
        self.revision = events[-1].revision
        return EventBatch(self.revision, events)

    def begin_stream(self) -> None:
        """Forget an incomplete revision: the new stream sends it again."""
        self._incomplete = []


def _event(event: kv.Event) -> KeyEvent:
    stored = event.kv
    record = None
    if event.type == kv.Event.PUT:
        record = Record(stored.value, stored.mod_revision, stored.lease)
    return KeyEvent(stored.key, stored.mod_revision, record)


class Watch:
    """A watch of all keys with a prefix, for the changes after a revision."""

    def __init__(self, calls: Calls, prefix: bytes, after_revision: int) -> None:
        self._calls = calls
        self._prefix = prefix
        self._position = Position(after_revision)
        self._backoff = Backoff(_PAUSE_S_MAX)
        self._token = ""
        self._has_new_token = False  # since the last stream that etcd accepted

    async def batches(self) -> AsyncGenerator[EventBatch, None]:
        """Yield the changes as they happen.

        Raises:
            Compacted: etcd no longer has the next changes.
            EtcdRefused: the user may not read the prefix.
            EtcdError: the client is closed.
        """
        while True:
            try:
                async with (
                    self._calls.members.use() as member,
                    contextlib.aclosing(self._follow(member)) as batches,
                ):
                    async for batch in batches:
                        yield batch
            except TokenExpired as error:
                self._replace_token(error)
            except EtcdUnavailable:
                await self._backoff.pause()

    async def _follow(self, member: Member) -> AsyncGenerator[EventBatch, None]:
        """Yield the changes that a member reports."""
        self._position.begin_stream()
        self._token = await self._calls.token(member)
        stream = member.stream(WATCH, metadata(self._token))
        try:
            await stream.send(self._request())
            while True:
                response = await self._next(member, stream)
                if response.compact_revision:
                    raise Compacted(f"etcd has compacted revision {response.compact_revision}")
                if response.canceled and response.created:
                    # etcd 3.4 gives the same reason for an expired token and for a user who may not read.
                    raise TokenExpired(response.cancel_reason.rpartition("etcdserver: ")[2])
                if response.canceled:
                    raise EtcdUnavailable(f"etcd has canceled a watch: {response.cancel_reason}")
                if response.created:
                    self._has_new_token = False
                    if response.header.revision < self._position.revision:
                        await self._check_revision()
                else:
                    self._backoff.reset()
                    if batch := self._position.take(response):
                        yield batch
        finally:
            stream.close()

    def _request(self) -> rpc.WatchRequest:
        """Return the request. It begins with the last revision seen, not with the next one.

        etcd answers a progress request only when the watch has reached its first revision, so a watch that begins
        in the future would look dead.
        """
        key, range_end = key_range(self._prefix)
        create = rpc.WatchCreateRequest(
            key=key,
            range_end=range_end,
            start_revision=max(1, self._position.revision),
            fragment=True,  # or a response may exceed RESPONSE_BYTES_MAX
        )
        return rpc.WatchRequest(create_request=create)

    async def _next(self, member: Member, stream: _WatchStream) -> rpc.WatchResponse:
        """Receive the next response. Ask the member for one when it is quiet.

        Raises:
            EtcdUnavailable: the stream broke, the member stays quiet, or another call has given it up.
        """
        receiving = asyncio.create_task(stream.receive())
        either: list[asyncio.Future[Any]] = [receiving, member.given_up]
        try:
            for _ in range(_QUIET_MAX):
                await asyncio.wait(either, timeout=QUIET_S, return_when=asyncio.FIRST_COMPLETED)
                if receiving.done():
                    return receiving.result()
                if member.given_up.done():
                    raise EtcdUnavailable(f"the connection to etcd at {member.address} was given up")
                await stream.send(rpc.WatchRequest(progress_request=rpc.WatchProgressRequest()))
            raise EtcdUnavailable(f"etcd at {member.address} does not answer on a watch stream")
        finally:
            receiving.cancel()
            await asyncio.gather(receiving, return_exceptions=True)

    def _replace_token(self, error: TokenExpired) -> None:
        """Forget the token, so that the next stream has a new one.

        Raises:
            EtcdRefused: there is no user, or the new token is not accepted either.
        """
        if self._has_new_token or not self._calls.forget_token(self._token):
            raise EtcdRefused(f"etcd refuses to watch {self._prefix!r}: {error}") from None
        self._has_new_token = True

    async def _check_revision(self) -> None:
        """Ask the cluster whether a member with an earlier revision is only behind.

        Raises:
            Compacted: the cluster has lost revisions, for example because it was restored from a backup.
        """
        key, _ = key_range(self._prefix)
        response = await self._calls.call(RANGE, rpc.RangeRequest(key=key), repeatable=True)
        if response.header.revision < self._position.revision:
            raise Compacted("etcd has lost revisions")
