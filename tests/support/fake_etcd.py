"""etcd as a dictionary, whose commits fail when a test says so."""

import asyncio
from collections.abc import Callable, Iterable, Mapping
from typing import cast

from regd.bridge.etcd.client import Etcd
from regd.bridge.etcd.errors import EtcdConflict
from regd.bridge.etcd.model import KeyEvent, Operation, Put, Record, Snapshot


class FakeEtcd:
    """A dictionary with the methods of `Etcd`.

    Attributes:
        trouble: errors of the next commits. With True, the commit takes effect before the error is raised.
        on_event: called with each change.
        flowing: while it is not set, commits wait.
        waiting: how many commits wait.
        conflicts: how many commits failed because a key of `only_if` had changed.
    """

    def __init__(self) -> None:
        self.revision = 1
        self.records: dict[bytes, Record] = {}
        self.trouble: list[tuple[Exception, bool]] = []
        self.on_event: Callable[[KeyEvent], None] = lambda event: None
        self.commits = 0
        self.flowing = asyncio.Event()
        self.flowing.set()
        self.waiting = 0
        self.conflicts = 0

    def as_etcd(self) -> Etcd:
        return cast(Etcd, self)

    async def read(self, prefix: bytes) -> Snapshot:
        records = {key: record for key, record in self.records.items() if key.startswith(prefix)}
        return Snapshot(self.revision, records)

    async def commit(self, operations: Iterable[Operation], only_if: Mapping[bytes, int] | None = None) -> int:
        expected = dict(only_if or {})
        self.waiting += 1
        await self.flowing.wait()
        self.waiting -= 1
        error, has_effect = self.trouble.pop(0) if self.trouble else (None, True)
        if error is not None and not has_effect:
            raise error
        for key, revision in expected.items():
            if self.revision_of(key) != revision:
                self.conflicts += 1
                raise EtcdConflict(f"{key!r} has changed")
        self.apply(operations)
        self.commits += 1
        if error is not None:
            raise error
        return self.revision

    def revision_of(self, key: bytes) -> int:
        record = self.records.get(key)
        return 0 if record is None else record.mod_revision

    def apply(self, operations: Iterable[Operation]) -> None:
        """Change keys, at one revision."""
        self.revision += 1
        for operation in operations:
            if isinstance(operation, Put):
                record = Record(operation.value, self.revision, operation.lease)
                self.records[operation.key] = record
                self.on_event(KeyEvent(operation.key, self.revision, record))
            elif self.records.pop(operation.key, None) is not None:
                self.on_event(KeyEvent(operation.key, self.revision, None))

    async def claim(self, key: bytes, value: bytes, lease: int) -> Record:
        record = self.records.get(key)
        if record is None or record.lease == lease:
            self.apply([Put(key, value, lease)])
        return self.records[key]
