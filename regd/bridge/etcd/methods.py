"""The methods of etcd's API that the client calls."""

from typing import Generic, NamedTuple, TypeVar

from google.protobuf.message import Message

from regd.bridge.etcd.stubs import rpc_pb2 as rpc

__all__ = ["AUTHENTICATE", "KEEP_ALIVE", "LEASE_GRANT", "LEASE_REVOKE", "RANGE", "TXN", "WATCH", "Method"]

Q = TypeVar("Q", bound=Message)
R = TypeVar("R", bound=Message)


class Method(NamedTuple, Generic[Q, R]):
    """A method: its path, and the types of its requests and responses."""

    path: str
    request: type[Q]
    response: type[R]


AUTHENTICATE = Method("/etcdserverpb.Auth/Authenticate", rpc.AuthenticateRequest, rpc.AuthenticateResponse)
RANGE = Method("/etcdserverpb.KV/Range", rpc.RangeRequest, rpc.RangeResponse)
TXN = Method("/etcdserverpb.KV/Txn", rpc.TxnRequest, rpc.TxnResponse)
LEASE_GRANT = Method("/etcdserverpb.Lease/LeaseGrant", rpc.LeaseGrantRequest, rpc.LeaseGrantResponse)
LEASE_REVOKE = Method("/etcdserverpb.Lease/LeaseRevoke", rpc.LeaseRevokeRequest, rpc.LeaseRevokeResponse)
# Streams, in both directions.
KEEP_ALIVE = Method("/etcdserverpb.Lease/LeaseKeepAlive", rpc.LeaseKeepAliveRequest, rpc.LeaseKeepAliveResponse)
WATCH = Method("/etcdserverpb.Watch/Watch", rpc.WatchRequest, rpc.WatchResponse)
