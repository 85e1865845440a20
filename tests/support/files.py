"""`Files` that records its operations and fails on request."""

import errno
import os
import threading
from pathlib import Path

from regd.storage.files import Files, Fingerprint


class RecordedFiles(Files):
    """`told` has every operation in order; an operation named in `failing` raises that errno.

    While `gate` is not set, `sync_data` waits: a disk as slow as the test wants.
    """

    def __init__(self) -> None:
        self.told: list[str] = []
        self.failing: dict[str, int] = {}
        self.gate = threading.Event()
        self.gate.set()
        self.syncing = threading.Event()

    def _tell(self, operation: str, detail: object = "") -> None:
        self.told.append(f"{operation} {detail}".strip())
        if operation in self.failing:
            number = self.failing[operation]
            raise OSError(number, os.strerror(number))

    def create(self, path: Path) -> int:
        self._tell("create", path.name)
        return super().create(path)

    def write(self, fd: int, data: bytes) -> None:
        self._tell("write")
        super().write(fd, data)

    def sync(self, fd: int) -> None:
        self._tell("sync")
        super().sync(fd)

    def sync_data(self, fd: int) -> None:
        self.syncing.set()
        assert self.gate.wait(20), "the test never opened the gate"
        self._tell("sync_data")
        super().sync_data(fd)

    def rename(self, source: Path, target: Path) -> None:
        self._tell("rename", f"{source.name} {target.name}")
        super().rename(source, target)

    def lock(self, path: Path) -> int:
        self._tell("lock", path.name)
        return super().lock(path)

    def link(self, source: Path, target: Path) -> None:
        self._tell("link", f"{source.name} {target.name}")
        super().link(source, target)

    def sync_folder(self, path: Path) -> None:
        self._tell("sync_folder")
        super().sync_folder(path)

    def fingerprint(self, file: Path | int) -> Fingerprint | None:
        if "fingerprint" in self.failing:
            self._tell("fingerprint")
        return super().fingerprint(file)


FULL = errno.ENOSPC
BROKEN = errno.EIO
