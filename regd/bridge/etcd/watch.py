"""A watch of a prefix. When its stream breaks, it goes on at another member, after the last change seen."""

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

QUIET_S = 5.0  # after which the member is asked for a sign of life
_QUIET_MAX = 3  # times QUIET_S, after which a stream counts as broken
_PAUSE_S_MAX = 1.0  # a bridge should see the others at once when etcd is back

_WatchStream = Stream[rpc.WatchRequest, rpc.WatchResponse]


class Position:
    """What a watch has seen: changes up to a revision, and no change after it.

    It moves with changes only. The revision in a response's header is that of the store, which is later than the
    response's last change while etcd catches a watch up; and in etcd 3.4 the answer to a progress request may
    overtake changes.
    """

    def __init__(self, revision: int) -> None:
        self.revision = revision
        self._incomplete: list[KeyEvent] = []

    def take(self, response: rpc.WatchResponse) -> EventBatch | None:
        """Return the new changes, each revision whole: the rest of the last one may be in the next fragment."""
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

    def break_off(self) -> None:
        """Forget an incomplete revision: the next stream begins with it."""
        self._incomplete = []


def _event(event: kv.Event) -> KeyEvent:
    stored = event.kv
    record = None
    if event.type == kv.Event.PUT:
        record = Record(stored.value, stored.mod_revision, stored.lease)
    return KeyEvent(stored.key, stored.mod_revision, record)


class Watch:
    """A watch of all keys with a prefix, from the changes after a revision on."""

    def __init__(self, calls: Calls, prefix: bytes, after_revision: int) -> None:
        self._calls = calls
        self._prefix = prefix
        self._position = Position(after_revision)
        self._backoff = Backoff(_PAUSE_S_MAX)
        self._token = ""
        self._has_new_token = False  # since the last stream that etcd accepted

    async def batches(self) -> AsyncGenerator[EventBatch, None]:
        """Yield the changes, without an end.

        Raises:
            Compacted: etcd no longer keeps the next changes.
            EtcdRefused: the user may not read the prefix.
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
                self._position.break_off()
                await self._backoff.pause()

    async def _follow(self, member: Member) -> AsyncGenerator[EventBatch, None]:
        """Yield the changes that a member reports."""
        self._token = await self._calls.token(member)
        stream = member.stream(WATCH, metadata(self._token))
        try:
            await stream.send(self._request())
            while True:
                response = await self._next(member, stream)
                self._calls.members.answered()
                if response.compact_revision:
                    raise Compacted(response.compact_revision)
                if response.canceled and response.created:
                    # etcd 3.4 has one reason for an expired token and for a user who may not read the prefix.
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
        """Return the request. It begins with the last revision that was seen, not with the one after it.

        A watch that begins in the future gets no sign of life: etcd answers a progress request only for watches
        that it has caught up.
        """
        key, range_end = key_range(self._prefix)
        create = rpc.WatchCreateRequest(
            key=key,
            range_end=range_end,
            start_revision=max(1, self._position.revision),
            fragment=True,  # else a response may have more bytes than RESPONSE_BYTES_MAX
        )
        return rpc.WatchRequest(create_request=create)

    async def _next(self, member: Member, stream: _WatchStream) -> rpc.WatchResponse:
        """Receive the next response. A quiet member is asked for one.

        Raises:
            EtcdUnavailable: the stream broke, the member is quiet, or another call has given it up.
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
            raise EtcdUnavailable(f"etcd at {member.address} does not answer on the stream of a watch")
        finally:
            if not receiving.done():
                receiving.cancel()
                await asyncio.gather(receiving, return_exceptions=True)

    def _replace_token(self, error: TokenExpired) -> None:
        """Forget the token, so that the next stream has a new one.

        Raises:
            EtcdRefused: there is none, or the new one is not accepted either.
        """
        if not self._token or self._has_new_token:
            raise EtcdRefused(f"etcd refuses to watch {self._prefix!r}: {error}") from None
        self._has_new_token = True
        self._calls.forget_token(self._token)

    async def _check_revision(self) -> None:
        """Check that a member whose revision is too low is only late.

        Raises:
            Compacted: etcd has lost revisions, for example because it was restored from a backup.
        """
        key, _ = key_range(self._prefix)
        response = await self._calls.call(RANGE, rpc.RangeRequest(key=key), repeatable=True)
        if response.header.revision < self._position.revision:
            raise Compacted(0)
