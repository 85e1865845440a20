"""A member of etcd that answers as a test says, for what a real one does rarely or not in this version."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import grpc

from regd.bridge.etcd.stubs import kv_pb2 as kv
from regd.bridge.etcd.stubs import rpc_pb2 as rpc

WATCH_ID = 7


def header(revision: int) -> rpc.ResponseHeader:
    return rpc.ResponseHeader(revision=revision)


def created(revision: int = 9_999) -> rpc.WatchResponse:
    return rpc.WatchResponse(header=header(revision), watch_id=WATCH_ID, created=True)


def canceled(reason: str) -> rpc.WatchResponse:
    """Refuse to create a watch, as etcd does."""
    return rpc.WatchResponse(header=header(1), watch_id=-1, created=True, canceled=True, cancel_reason=reason)


def progress(revision: int) -> rpc.WatchResponse:
    """Answer a progress request."""
    return rpc.WatchResponse(header=header(revision), watch_id=-1)


def changes(*revisions: int, store: int = 0, fragment: bool = False, key: bytes = b"") -> rpc.WatchResponse:
    """Report a put of `key`, by default "/k" and the revision, at each of the revisions."""
    events = [
        kv.Event(kv=kv.KeyValue(key=key or b"/k%d" % revision, value=b"v", mod_revision=revision))
        for revision in revisions
    ]
    last = store or revisions[-1]
    return rpc.WatchResponse(header=header(last), watch_id=WATCH_ID, events=events, fragment=fragment)


def _unary(handler: Any, request: Any, response: Any) -> Any:
    return grpc.unary_unary_rpc_method_handler(handler, request.FromString, response.SerializeToString)


class ScriptedEtcd:
    """Each stream of a watch gets the next of `streams`; then it breaks, and the last one stays open.

    Attributes:
        streams: responses.
        starts: the `start_revision` of each watch that was created.
        metadata: of each stream.
        progress_requests: how many have come.
        breaks: whether streams break; otherwise all stay open.
        answers_progress: whether they are answered, at `revision`.
        failures: of the next reads and writes: a status and its details; None for no answer.
        expired: tokens, "token 1" and so on, that reads and writes are refused with.
        deadlines_s: of reads and writes, one for each that has come.
        passwords: of each authentication.
        revision: in answers.
    """

    def __init__(self, *streams: list[rpc.WatchResponse]) -> None:
        self.streams = list(streams)
        self.starts: list[int] = []
        self.metadata: list[dict[str, str]] = []
        self.progress_requests = 0
        self.breaks = True
        self.answers_progress = True
        self.failures: list[tuple[grpc.StatusCode, str] | None] = []
        self.expired: set[str] = set()
        self.deadlines_s: list[float] = []
        self.passwords: list[str] = []
        self.revision = 1
        self.address = ""

    async def _watch(self, requests: AsyncIterator[rpc.WatchRequest], context: Any) -> AsyncIterator[Any]:
        self.metadata.append(dict(context.invocation_metadata()))
        async for request in requests:
            if request.HasField("progress_request"):
                self.progress_requests += 1
                if self.answers_progress:
                    yield progress(self.revision)
                continue
            self.starts.append(request.create_request.start_revision)
            for response in self.streams.pop(0) if self.streams else []:
                yield response
            if self.streams and self.breaks:
                await context.abort(grpc.StatusCode.UNAVAILABLE, "the stream breaks")

    async def _range(self, request: rpc.RangeRequest, context: Any) -> rpc.RangeResponse:
        await self._fail(context)
        return rpc.RangeResponse(header=header(self.revision))

    async def _txn(self, request: rpc.TxnRequest, context: Any) -> rpc.TxnResponse:
        await self._fail(context)
        return rpc.TxnResponse(header=header(self.revision), succeeded=True)

    async def _fail(self, context: Any) -> None:
        self.deadlines_s.append(context.time_remaining())
        if dict(context.invocation_metadata()).get("token") in self.expired:
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, "etcdserver: invalid auth token")
        if self.failures:
            failure = self.failures.pop(0)
            if failure is None:
                await asyncio.Event().wait()
            else:
                await context.abort(*failure)

    async def _authenticate(self, request: rpc.AuthenticateRequest, context: Any) -> rpc.AuthenticateResponse:
        self.passwords.append(request.password)
        return rpc.AuthenticateResponse(token=f"token {len(self.passwords)}")

    @contextlib.asynccontextmanager
    async def serve(self) -> AsyncIterator["ScriptedEtcd"]:
        server = grpc.aio.server()
        watch = grpc.stream_stream_rpc_method_handler(
            self._watch, rpc.WatchRequest.FromString, rpc.WatchResponse.SerializeToString
        )
        services: dict[str, dict[str, Any]] = {
            "Watch": {"Watch": watch},
            "KV": {
                "Range": _unary(self._range, rpc.RangeRequest, rpc.RangeResponse),
                "Txn": _unary(self._txn, rpc.TxnRequest, rpc.TxnResponse),
            },
            "Auth": {
                "Authenticate": _unary(self._authenticate, rpc.AuthenticateRequest, rpc.AuthenticateResponse)
            },
        }
        server.add_generic_rpc_handlers(
            [
                grpc.method_handlers_generic_handler(f"etcdserverpb.{service}", methods)
                for service, methods in services.items()
            ]
        )
        self.address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
        await server.start()
        try:
            yield self
        finally:
            await server.stop(None)
