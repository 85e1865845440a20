"""Splits operations into transactions within etcd's limits."""

from collections.abc import Iterable, Iterator, Mapping

from regd.bridge.etcd.model import Operation, Put
from regd.bridge.etcd.stubs import rpc_pb2 as rpc

__all__ = ["BYTES_MAX", "OPERATIONS_MAX", "claim", "transactions"]

OPERATIONS_MAX = 128  # etcd's --max-txn-ops
BYTES_MAX = 1_000_000  # etcd's --max-request-bytes is 1.5 MiB, which includes what etcd adds
_FIELD_BYTES_MAX = 8  # for the tag and the length of a field in the transaction


def transactions(operations: Iterable[Operation], only_if: Mapping[bytes, int]) -> Iterator[rpc.TxnRequest]:
    """Yield transactions that perform the operations in order, each transaction only if `only_if` holds.

    etcd allows a transaction to change a key only once.
    """
    compare = [_unchanged(key, mod_revision) for key, mod_revision in only_if.items()]
    empty_bytes = rpc.TxnRequest(compare=compare).ByteSize()
    batch: list[rpc.RequestOp] = []
    keys: set[bytes] = set()
    size = empty_bytes
    for operation in operations:
        request = _request(operation)
        request_bytes = request.ByteSize() + _FIELD_BYTES_MAX
        is_full = len(batch) == OPERATIONS_MAX or size + request_bytes > BYTES_MAX or operation.key in keys
        if batch and is_full:
            yield rpc.TxnRequest(compare=compare, success=batch)
            batch, keys, size = [], set(), empty_bytes
        batch.append(request)
        keys.add(operation.key)
        size += request_bytes
    if batch:
        yield rpc.TxnRequest(compare=compare, success=batch)


def claim(put: Put) -> rpc.TxnRequest:
    """Return a transaction that puts a key if it is absent or has the same lease, and reads it otherwise."""
    puts = [_request(put)]
    reads = [rpc.RequestOp(request_range=rpc.RangeRequest(key=put.key))]
    has_our_lease = rpc.Compare(key=put.key, target=rpc.Compare.LEASE, lease=put.lease)
    if_ours = rpc.TxnRequest(compare=[has_our_lease], success=puts, failure=reads)
    return rpc.TxnRequest(
        compare=[_unchanged(put.key, 0)], success=puts, failure=[rpc.RequestOp(request_txn=if_ours)]
    )


def _unchanged(key: bytes, mod_revision: int) -> rpc.Compare:
    return rpc.Compare(key=key, target=rpc.Compare.MOD, mod_revision=mod_revision)


def _request(operation: Operation) -> rpc.RequestOp:
    if isinstance(operation, Put):
        put = rpc.PutRequest(key=operation.key, value=operation.value, lease=operation.lease)
        return rpc.RequestOp(request_put=put)
    return rpc.RequestOp(request_delete_range=rpc.DeleteRangeRequest(key=operation.key))
