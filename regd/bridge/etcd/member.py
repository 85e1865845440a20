"""A connection to one member of a cluster: calls and streams. It raises the errors of `errors.py`."""

import asyncio
import contextlib
import os
import re
from collections.abc import Callable, Sequence
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

# Errors are raised, so grpc need not write them to stderr too. It reads the variable when it is imported.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")
import grpc

__all__ = ["CONNECT_S", "RESPONSE_BYTES_MAX", "Member", "Metadata", "Stream"]

Q = TypeVar("Q", bound=Message)
R = TypeVar("R", bound=Message)
Metadata = Sequence[tuple[str, str]]

CONNECT_S = 3.0
RESPONSE_BYTES_MAX = 16 * 1_048_576  # a page of large values exceeds grpc's default, 4 MiB
_PING_S = 6.0  # etcd closes connections that ping more often than every 5 s (--grpc-keepalive-min-time)
_PING_TIMEOUT_S = 2.0
_OPTIONS = (
    ("grpc.keepalive_time_ms", int(1_000 * _PING_S)),
    # Both timeouts are needed to notice a dead peer: the default of the second one is 60 s.
    ("grpc.keepalive_timeout_ms", int(1_000 * _PING_TIMEOUT_S)),
    ("grpc.http2.ping_timeout_ms", int(1_000 * _PING_TIMEOUT_S)),
    ("grpc.http2.max_pings_without_data", 0),  # no limit: a watch may be quiet for hours
    ("grpc.max_receive_message_length", RESPONSE_BYTES_MAX),
    ("grpc.use_local_subchannel_pool", 1),  # else a new channel waits for the back-off of the previous one
    ("grpc.enable_http_proxy", 0),
)
_NOISE = re.compile(r"^[A-Z_]+: (ipv[46]:\S+: )?")  # what precedes grpc's reason for a failed connection
# What etcd says about a token that has expired, or was issued before the last change of users and roles.
_TOKEN_REASONS = (
    "invalid auth token",
    "revision of auth store is old",
    "auth: revision in header is old",
    "user name is empty",  # without a token, after authentication was enabled
)
_REFUSED = {
    grpc.StatusCode.ALREADY_EXISTS,
    grpc.StatusCode.FAILED_PRECONDITION,
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.OUT_OF_RANGE,
    grpc.StatusCode.PERMISSION_DENIED,
    grpc.StatusCode.UNAUTHENTICATED,
}


def _credentials(tls: Tls) -> Any:
    """Read the TLS files.

    Raises:
        EtcdUnavailable: a file cannot be read, perhaps because it is being replaced.
    """
    try:
        cacert, cert, key = (None if path is None else path.read_bytes() for path in tls)
    except OSError as error:
        raise EtcdUnavailable(f"cannot read {error.filename}: {error.strerror}", may_have_effect=False) from None
    return grpc.ssl_channel_credentials(cacert, key, cert)


def _translated(address: str, error: Any) -> EtcdError:
    """Return the error of this client for an error of grpc."""
    code, details = error.code(), str(error.details())
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return DeadlineExceeded(f"etcd at {address} did not answer in time")
    is_unknown = code is grpc.StatusCode.UNIMPLEMENTED
    if is_unknown or details.startswith("Received http2 header"):  # another server, or a proxy without etcd
        return EtcdUnavailable(f"no etcd at {address}: {details}", may_have_effect=not is_unknown)
    text = f"etcd at {address}: {details.removeprefix('etcdserver: ')}"
    if "lease not found" in details:
        return LeaseNotFound(text)
    if "has been compacted" in details:
        return Compacted(text)
    if code is grpc.StatusCode.UNAUTHENTICATED or any(reason in details for reason in _TOKEN_REASONS):
        return TokenExpired(text)
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED and "larger than max" in details:
        return ResponseTooLarge(text)
    # Some errors of users and passwords have no code in etcd, so grpc reports them as unknown.
    if code in _REFUSED or "database space exceeded" in details or details.startswith("auth: "):
        return EtcdRefused(text)
    # A member without a leader refuses a request with `hasleader` before it looks at the request itself.
    has_no_effect = details == "etcdserver: no leader" or "failed to connect" in details
    return EtcdUnavailable(text, may_have_effect=not has_no_effect)


class Member:
    """A connection to the member at an address, HOST:PORT.

    Args:
        answered: called after every response, also if it is an error of etcd.

    Attributes:
        given_up: done when the connection is no longer used. Streams on it must move to another member.
        users: number of calls and streams on it. `Members` counts them, and closes the connection after the last.
        authenticating: held by the call that authenticates here.
    """

    def __init__(self, address: str, tls: Tls | None, answered: Callable[[], None]) -> None:
        self.address = address
        self.given_up: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.users = 0
        self.authenticating = asyncio.Lock()
        self.answered = answered
        self._channel = (
            grpc.aio.insecure_channel(address, _OPTIONS)
            if tls is None
            else grpc.aio.secure_channel(address, _credentials(tls), _OPTIONS)
        )

    @property
    def is_connected(self) -> bool:
        return self._channel.get_state() is grpc.ChannelConnectivity.READY

    async def connect(self) -> None:
        """Connect, including the TLS handshake.

        Raises:
            EtcdUnavailable: the connection failed. The message has the reason.
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
            message = f"the connection to etcd at {self.address} was closed"
            raise EtcdUnavailable(message, may_have_effect=False) from None
        except TimeoutError:
            message = f"cannot connect to etcd at {self.address} within {CONNECT_S:g} s"
            raise EtcdUnavailable(message, may_have_effect=False) from None

    async def _why_not_connected(self) -> str:
        """Return the reason, which grpc tells only to a call."""
        try:
            await self.ask(RANGE, RANGE.request(key=b"\0"), (), CONNECT_S)
        except EtcdError as error:
            *_, reason = str(error).removeprefix(f"etcd at {self.address}: ").rpartition("last error: ")
            if "security handshaker" in reason:
                reason = (
                    "cannot use the TLS files: they must be in PEM format, and the key that of the certificate"
                )
            return f"cannot connect to etcd at {self.address}: {_NOISE.sub('', reason)}"
        return f"cannot connect to etcd at {self.address} at the first attempt"

    async def ask(self, method: Method[Q, R], request: Q, metadata: Metadata, timeout_s: float) -> R:
        """Call a method that has one request and one response.

        Raises:
            EtcdError: the call failed, or took longer than `timeout_s`.
        """
        call = self._channel.unary_unary(
            method.path,
            request_serializer=method.request.SerializeToString,
            response_deserializer=method.response.FromString,
        )
        try:
            response: R = await call(request, timeout=timeout_s, metadata=metadata)
        except grpc.aio.AioRpcError as error:
            raise self.translated(error) from None
        self.answered()
        return response

    def translated(self, error: Any) -> EtcdError:
        """Return the error of this client for an error of grpc on this connection."""
        translated = _translated(self.address, error)
        if not isinstance(translated, EtcdUnavailable):
            self.answered()
        return translated

    def stream(self, method: Method[Q, R], metadata: Metadata) -> "Stream[Q, R]":
        """Call a method that has a stream of requests and a stream of responses."""
        call = self._channel.stream_stream(
            method.path,
            request_serializer=method.request.SerializeToString,
            response_deserializer=method.response.FromString,
        )
        return Stream(self, call(metadata=metadata))

    async def close(self) -> None:
        """Close the connection. Calls and streams that still use it are cancelled."""
        await self._channel.close()


class Stream(Generic[Q, R]):
    """A stream of requests and a stream of responses."""

    def __init__(self, member: Member, call: Any) -> None:
        self._member = member
        self._call = call

    async def send(self, request: Q) -> None:
        """Send a request. If the stream is broken, `receive` raises the reason."""
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
            raise self._member.translated(error) from None
        if response is grpc.aio.EOF:
            raise EtcdUnavailable(f"etcd at {self._member.address} closed the stream")
        self._member.answered()
        received: R = response
        return received

    def close(self) -> None:
        """End the stream, and what it holds in etcd. Idempotent."""
        self._call.cancel()
