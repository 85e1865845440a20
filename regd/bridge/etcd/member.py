"""A connection to one member of a cluster: calls and streams, whose errors are those of `errors.py`."""

import asyncio
import contextlib
import os
import re
from collections.abc import Sequence
from typing import Any, Generic, TypeVar

from google.protobuf.message import Message

from regd.bridge.etcd.errors import (
    Compacted,
    DeadlineExceeded,
    EtcdError,
    EtcdRefused,
    EtcdUnavailable,
    LeaseNotFound,
    ResponseTooLarge,
    TokenExpired,
)
from regd.bridge.etcd.methods import RANGE, Method
from regd.bridge.etcd.model import Tls

# Errors are raised; what grpc writes to stderr says the same again. It reads the variable when it is imported.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")
import grpc

__all__ = ["CONNECT_S", "RESPONSE_BYTES_MAX", "Member", "Metadata", "Stream"]

Q = TypeVar("Q", bound=Message)
R = TypeVar("R", bound=Message)
Metadata = Sequence[tuple[str, str]]

CONNECT_S = 3.0
RESPONSE_BYTES_MAX = 16 * 1_048_576  # grpc's default, 4 MiB, is less than a page of large values
_PING_S = 6.0  # etcd closes connections that ping more often than every 5 s (--grpc-keepalive-min-time)
_PING_TIMEOUT_S = 2.0
_OPTIONS = (
    ("grpc.keepalive_time_ms", int(1_000 * _PING_S)),
    # A dead peer is noticed after `_PING_TIMEOUT_S` only if both are set: the second one is 60 s by default.
    ("grpc.keepalive_timeout_ms", int(1_000 * _PING_TIMEOUT_S)),
    ("grpc.http2.ping_timeout_ms", int(1_000 * _PING_TIMEOUT_S)),
    ("grpc.http2.max_pings_without_data", 0),  # no limit: a watch may be quiet for hours
    ("grpc.max_receive_message_length", RESPONSE_BYTES_MAX),
    ("grpc.use_local_subchannel_pool", 1),  # else a new connection waits for the back-off of the one before
    ("grpc.enable_http_proxy", 0),
)
_NOISE = re.compile(r"^[A-Z_]+: (ipv[46]:\S+: )?")  # before grpc's reason for a failed connection
# What etcd says about a token that has expired, or is older than the last change of users and roles.
_TOKEN_REASONS = ("invalid auth token", "revision of auth store is old", "auth: revision in header is old")
_REFUSED = {
    grpc.StatusCode.ALREADY_EXISTS,
    grpc.StatusCode.FAILED_PRECONDITION,
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.OUT_OF_RANGE,
    grpc.StatusCode.PERMISSION_DENIED,
    grpc.StatusCode.UNAUTHENTICATED,
    grpc.StatusCode.UNIMPLEMENTED,
}


def _credentials(tls: Tls) -> Any:
    """Read the files.

    Raises:
        EtcdUnavailable: a file cannot be read; perhaps it is being replaced.
    """
    try:
        cacert, cert, key = (None if path is None else path.read_bytes() for path in tls)
    except OSError as error:
        raise EtcdUnavailable(f"cannot read {error.filename}: {error.strerror}", False) from None
    return grpc.ssl_channel_credentials(cacert, key, cert)


def _translated(address: str, error: Any) -> EtcdError:
    """Return the error of this client for one of grpc."""
    code, details = error.code(), str(error.details())
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return DeadlineExceeded(f"etcd at {address} did not answer in time")
    text = f"etcd at {address}: {details.removeprefix('etcdserver: ')}"
    if "lease not found" in details:
        return LeaseNotFound(text)
    if "has been compacted" in details:
        return Compacted(0)
    if code is grpc.StatusCode.UNAUTHENTICATED or any(reason in details for reason in _TOKEN_REASONS):
        return TokenExpired(text)
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED and "larger than max" in details:
        return ResponseTooLarge(text)
    if code in _REFUSED:
        return EtcdRefused(text)
    # The first: a member without a leader refuses requests that say `hasleader`, before it looks at them.
    has_no_effect = details == "etcdserver: no leader" or "failed to connect" in details
    return EtcdUnavailable(text, may_have_effect=not has_no_effect)


class Stream(Generic[Q, R]):
    """A stream of requests and one of responses."""

    def __init__(self, address: str, call: Any) -> None:
        self._address = address
        self._call = call

    async def send(self, request: Q) -> None:
        """Send a request. If the stream has broken, `receive` says why."""
        with contextlib.suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
            await self._call.write(request)

    async def receive(self) -> R:
        """Receive the next response. Cancelling this ends the stream.

        Raises:
            EtcdError: the stream has ended.
        """
        try:
            response = await self._call.read()
        except grpc.aio.AioRpcError as error:
            raise _translated(self._address, error) from None
        if response is grpc.aio.EOF:
            raise EtcdUnavailable(f"etcd at {self._address} closed the stream")
        received: R = response
        return received

    def close(self) -> None:
        """End the stream, and what it holds in etcd. Idempotent."""
        self._call.cancel()


class Member:
    """A connection to the member at an address, HOST:PORT.

    Attributes:
        given_up: done when the connection is used no longer. Streams on it should move to another member.
        users: how many calls and streams use it. `Members` counts them, and closes it after the last one.
    """

    def __init__(self, address: str, tls: Tls | None) -> None:
        self.address = address
        self.given_up: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.users = 0
        self._channel = (
            grpc.aio.insecure_channel(address, _OPTIONS)
            if tls is None
            else grpc.aio.secure_channel(address, _credentials(tls), _OPTIONS)
        )

    @property
    def is_connected(self) -> bool:
        return self._channel.get_state() is grpc.ChannelConnectivity.READY

    async def connect(self) -> None:
        """Connect, and shake hands with TLS.

        Raises:
            EtcdUnavailable: with the reason.
        """
        state = self._channel.get_state(try_to_connect=True)
        try:
            async with asyncio.timeout(CONNECT_S):
                while state is not grpc.ChannelConnectivity.READY:
                    if state is grpc.ChannelConnectivity.TRANSIENT_FAILURE:
                        raise EtcdUnavailable(await self._why_not_connected(), may_have_effect=False)
                    await self._channel.wait_for_state_change(state)
                    state = self._channel.get_state()
        except grpc.aio.UsageError:
            raise EtcdUnavailable(f"the connection to etcd at {self.address} was closed", False) from None
        except TimeoutError:
            message = f"cannot connect to etcd at {self.address} within {CONNECT_S:g} s"
            raise EtcdUnavailable(message, may_have_effect=False) from None

    async def _why_not_connected(self) -> str:
        """Return the reason, which only a call gets."""
        try:
            await self.ask(RANGE, RANGE.request(key=b"\0"), (), CONNECT_S)
        except EtcdError as error:
            *_, reason = str(error).removeprefix(f"etcd at {self.address}: ").rpartition("last error: ")
            return f"cannot connect to etcd at {self.address}: {_NOISE.sub('', reason)}"
        return f"cannot connect to etcd at {self.address} at the first attempt"

    async def ask(self, method: Method[Q, R], request: Q, metadata: Metadata, timeout_s: float) -> R:
        """Call a method that has one request and one response.

        Raises:
            EtcdError: it failed, or took longer than `timeout_s`.
        """
        call = self._channel.unary_unary(
            method.path,
            request_serializer=method.request.SerializeToString,
            response_deserializer=method.response.FromString,
        )
        try:
            response: R = await call(request, timeout=timeout_s, metadata=metadata)
        except grpc.aio.AioRpcError as error:
            raise _translated(self.address, error) from None
        return response

    def stream(self, method: Method[Q, R], metadata: Metadata) -> Stream[Q, R]:
        """Call a method that has a stream of requests and one of responses."""
        call = self._channel.stream_stream(
            method.path,
            request_serializer=method.request.SerializeToString,
            response_deserializer=method.response.FromString,
        )
        return Stream(self.address, call(metadata=metadata))

    async def close(self) -> None:
        """Close the connection. Calls and streams that still use it are cancelled."""
        await self._channel.close()
