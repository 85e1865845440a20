"""A member of etcd with scripted answers, for what a real one does rarely, or not in this version."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import grpc

from regd.bridge.etcd.model import Tls
from regd.bridge.etcd.stubs import kv_pb2 as kv
from regd.bridge.etcd.stubs import rpc_pb2 as rpc

WATCH_ID = 7

Failure = tuple[grpc.StatusCode, str]  # a status and its details


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
    """Report a put of `key`, by default "/k" and the revision, at each revision."""
    events = [
        kv.Event(kv=kv.KeyValue(key=key or b"/k%d" % revision, value=b"v", mod_revision=revision))
        for revision in revisions
    ]
    last = store or revisions[-1]
    return rpc.WatchResponse(header=header(last), watch_id=WATCH_ID, events=events, fragment=fragment)


async def _fail(failures: list[Failure | None], context: Any) -> None:
    """Fail with the next failure, if there is one."""
    if failures:
        failure = failures.pop(0)
        if failure is None:
            await asyncio.Event().wait()
        else:
            await context.abort(*failure)


def _unary(handler: Any, request: Any, response: Any) -> Any:
    return grpc.unary_unary_rpc_method_handler(handler, request.FromString, response.SerializeToString)


class ScriptedEtcd:
    """Each stream of a watch gets the next list of `streams` and then breaks. The last stream stays open.

    Attributes:
        streams: responses.
        starts: the `start_revision` of each watch that was created.
        metadata: of each stream.
        progress_requests: number of progress requests.
        breaks: how streams break; None: all stay open.
        answers_progress: whether progress requests are answered, with `revision`.
        failures: of the next reads and writes; None for no answer.
        authentication_failures: likewise, of the next authentications.
        expired: tokens ("token 1" and so on) that are refused.
        deadlines_s: of each read and write.
        passwords: of each authentication.
        revision: in responses.
    """

    def __init__(self, *streams: list[rpc.WatchResponse]) -> None:
        self.streams = list(streams)
        self.starts: list[int] = []
        self.metadata: list[dict[str, str]] = []
        self.progress_requests = 0
        self.breaks: Failure | None = (grpc.StatusCode.UNAVAILABLE, "the stream breaks")
        self.answers_progress = True
        self.failures: list[Failure | None] = []
        self.authentication_failures: list[Failure | None] = []
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
                await context.abort(*self.breaks)

    async def _range(self, request: rpc.RangeRequest, context: Any) -> rpc.RangeResponse:
        await self._check(context)
        return rpc.RangeResponse(header=header(self.revision))

    async def _txn(self, request: rpc.TxnRequest, context: Any) -> rpc.TxnResponse:
        await self._check(context)
        return rpc.TxnResponse(header=header(self.revision), succeeded=True)

    async def _check(self, context: Any) -> None:
        self.deadlines_s.append(context.time_remaining())
        if dict(context.invocation_metadata()).get("token") in self.expired:
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, "etcdserver: invalid auth token")
        await _fail(self.failures, context)

    async def _authenticate(self, request: rpc.AuthenticateRequest, context: Any) -> rpc.AuthenticateResponse:
        self.passwords.append(request.password)
        number = len(self.passwords)
        await _fail(self.authentication_failures, context)
        return rpc.AuthenticateResponse(token=f"token {number}")

    @contextlib.asynccontextmanager
    async def serve(self, host: str = "127.0.0.1", tls: Tls | None = None) -> AsyncIterator["ScriptedEtcd"]:
        """Listen at a free port of `host` during the block, with TLS or without."""
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
        self.address = f"{host}:{_add_port(server, f'{host}:0', tls)}"
        await server.start()
        try:
            yield self
        finally:
            await server.stop(None)


def _add_port(server: Any, address: str, tls: Tls | None) -> int:
    if tls is None:
        return int(server.add_insecure_port(address))
    assert tls.cert is not None
    assert tls.key is not None
    credentials = grpc.ssl_server_credentials([(tls.key.read_bytes(), tls.cert.read_bytes())])
    return int(server.add_secure_port(address, credentials))
