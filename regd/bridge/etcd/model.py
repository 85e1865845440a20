"""Arguments and results of the client. Keys and values are bytes, and a lease is a number (0: none)."""

from pathlib import Path
from typing import NamedTuple

__all__ = [
    "Delete",
    "EventBatch",
    "KeyEvent",
    "Operation",
    "Put",
    "Record",
    "Snapshot",
    "Tls",
    "User",
    "key_range",
]


class Record(NamedTuple):
    """The value stored at a key."""

    value: bytes
    mod_revision: int  # of the last put
    lease: int


class Snapshot(NamedTuple):
    """All keys of a prefix at one revision, in order."""

    revision: int
    records: dict[bytes, Record]


class Put(NamedTuple):
    """Store a value. With a lease, the key is deleted when the lease ends."""

    key: bytes
    value: bytes
    lease: int = 0


class Delete(NamedTuple):
    """Delete a key. Without effect if it does not exist."""

    key: bytes


Operation = Put | Delete


class KeyEvent(NamedTuple):
    """A change of a key."""

    key: bytes
    revision: int
    record: Record | None  # None if it was deleted


class EventBatch(NamedTuple):
    """Changes in order, in whole revisions. A watch after `revision` continues with the next one."""

    revision: int  # of the last change
    events: list[KeyEvent]


class Tls(NamedTuple):
    """Files in PEM format. They are read for every connection, so renewed certificates need no restart."""

    cacert: Path | None = None  # None: the authorities included in grpc
    cert: Path | None = None  # of this client; with `key`, or neither
    key: Path | None = None


class User(NamedTuple):
    """A user of etcd. The password is the file's first line, which is read at every authentication."""

    name: str
    password_file: Path


def key_range(prefix: bytes) -> tuple[bytes, bytes]:
    """Return `key` and `range_end` of a request for all keys with a prefix. The end "\\0" means no end."""
    stem = prefix.rstrip(b"\xff")
    return prefix or b"\0", stem[:-1] + bytes([stem[-1] + 1]) if stem else b"\0"
