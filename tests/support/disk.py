"""A model of a disk after a power cut, and a `Files` that reports every operation to it.

The model is as strict as POSIX permits. Until `sync`, any write to a file may be missing, torn, or zeros. Until
`sync_folder`, each name in the folder may refer to any of its earlier files. A real folder has the files as a process
sees them.
"""

import errno
import itertools
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from enum import Enum
from functools import cache
from pathlib import Path
from typing import NamedTuple

from regd.storage.files import Files, Fingerprint

FOLDER = -1
Name = int | None  # what a name refers to: the number of a file, FOLDER, or None if it does not exist


@dataclass(frozen=True)
class Data:
    """A file's content: the durable bytes, then the writes that are not durable yet."""

    safe: bytes = b""
    pending: tuple[bytes, ...] = ()
    lost: bool = False  # after a failed sync the kernel does not write these writes again (fsync(2))


@cache
def _contents(file: Data) -> frozenset[bytes]:
    """Return every content that a file may have after a crash."""
    contents = {file.safe}
    variants = [(data, bytes(len(data))) for data in file.pending]
    for count in range(len(variants)):
        # Every combination of the last three writes only; of all of them there would be too many.
        for recent in itertools.product(*variants[:count][-3:]):
            start = b"".join((file.safe, *file.pending[: max(count - 3, 0)], *recent))
            for last in variants[count]:
                contents |= {start + last[:cut] for cut in (1, len(last) // 2, len(last) - 1, len(last))}
    return frozenset(contents)


Found = tuple[str, bytes | None]  # a path and the file's content, or None for a folder


class Moment(NamedTuple):
    """The state of the disk after an operation."""

    did: str
    names: Mapping[str, tuple[Name, ...]]  # the first is durable, the last is what a process sees
    files: Mapping[int, Data]

    def choices(self) -> "Choices":
        """Return for each name what it may refer to after a crash at this moment."""
        return frozenset((path, frozenset(self._found(path, names))) for path, names in self.names.items())

    def _found(self, path: str, names: Iterable[Name]) -> Iterator[Found | None]:
        for name in names:
            if name is None:
                yield None
            elif name == FOLDER:
                yield (path, None)
            elif path.endswith(".tmp"):  # nobody reads it: one content stands for all
                yield (path, b"{")
            else:
                yield from ((path, data) for data in _contents(self.files[name]))


Choices = frozenset[tuple[str, frozenset[Found | None]]]


def outcomes(choices: Choices) -> Iterator[dict[str, bytes | None]]:
    """Yield every state of the disk that a crash may leave. A lost folder takes its files along."""
    for state in itertools.product(*(candidates for _, candidates in choices)):
        existing = dict(found for found in state if found is not None)
        lost = [path + "/" for (path, _), found in zip(choices, state, strict=True) if found is None]
        yield {path: data for path, data in existing.items() if not path.startswith(tuple(lost))}


class Disk:
    """The disk below `root`, which is durable. `moments` has its state after every operation, in order."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._names: dict[str, tuple[Name, ...]] = {}  # by path from the root
        self._files: dict[int, Data] = {}
        self.moments: list[Moment] = [Moment("begin", {}, {})]

    def _record(self, operation: str) -> None:
        self.moments.append(Moment(operation, dict(self._names), dict(self._files)))

    def _key(self, path: Path) -> str:
        return os.path.relpath(path, self.root)

    def knows(self, path: Path) -> bool:
        """True if a process sees a file or folder at `path`."""
        return self._names.get(self._key(path), (None,))[-1] is not None

    def new_file(self, path: Path) -> int:
        number = len(self._files)
        self._files[number] = Data()
        self.name(path, number)
        return number

    def _point(self, path: Path, name: Name) -> None:
        key = self._key(path)
        self._names[key] = (*self._names.get(key, (None,)), name)

    def name(self, path: Path, name: Name) -> None:
        self._point(path, name)
        self._record(f"{path.name} is {'a folder' if name == FOLDER else name}")

    def rename(self, source: Path, target: Path) -> None:
        self._point(target, self._names[self._key(source)][-1])
        self._point(source, None)
        self._record(f"rename {source.name} {target.name}")

    def write(self, number: int, data: bytes) -> None:
        file = self._files[number]
        self._files[number] = replace(file, pending=(*file.pending, data))
        self._record(f"write {number}")

    def sync(self, number: int) -> None:
        file = self._files[number]
        if not file.lost:
            self._files[number] = Data(file.safe + b"".join(file.pending))
        self._record(f"sync {number}")

    def fail_sync(self, number: int) -> None:
        self._files[number] = replace(self._files[number], lost=True)
        self._record(f"sync {number} failed")

    def sync_folder(self, folder: Path) -> None:
        parent = self._key(folder)
        for key, names in self._names.items():
            if (os.path.dirname(key) or ".") == parent:
                self._names[key] = names[-1:]
        self._record(f"sync folder {folder.name}")

    def truncate(self, number: int, size: int) -> None:
        """Cut a file off. Whether that is durable makes no difference: what is cut off does not count."""
        before = self._files[number]
        data = (before.safe + b"".join(before.pending))[:size]
        self._files[number] = Data(
            data[: len(before.safe)], (data[len(before.safe) :],) * (size > len(before.safe))
        )
        self._record(f"truncate {number}")

    def number(self, path: Path) -> int:
        """Return the number of the file that a process sees at a path."""
        name = self._names[self._key(path)][-1]
        assert name is not None
        return name

    def put(self, path: Path, data: bytes | None) -> None:
        """Create a durable file as another program would, or with None remove it."""
        name = None
        if data is not None:
            name = len(self._files)
            self._files[name] = Data(data)
        self._names[self._key(path)] = (name,)
        self.sync_folder(path.parent)


class Trouble(Enum):
    """How an operation fails."""

    BEFORE = "it fails without an effect"
    AFTER = "it fails after it took effect"
    HALF = "a write fails after half its bytes; any other operation as AFTER"
    KILL = "the process is killed before it"


class Killed(BaseException):
    """The process was killed. Raised by every later operation, too."""


class DiskFiles(Files):
    """`Files` on the real disk that reports every operation to `disk`, and fails one of them (see `expect`)."""

    def __init__(self, disk: Disk) -> None:
        self.disk = disk
        self.count = 0
        self.befell = False  # the operation chosen by `expect` has failed
        self.befell_at = 0  # the number of the last moment before it
        self._due = -1
        self._trouble: Trouble | None = None
        self._is_killed = False
        self._numbers: dict[int, int] = {}

    def expect(self, trouble: Trouble | None, due: int) -> None:
        """Fail the operation that is `due` operations from now; with None, no operation. Undoes a kill."""
        self._trouble, self._due, self._is_killed = trouble, self.count + due, False
        self.befell = self.befell and trouble is None

    def _befalls(self) -> Trouble | None:
        """Count an operation and return how it fails. Raises the error if it fails without an effect."""
        if self._is_killed:
            raise Killed
        self.count += 1
        if self._trouble is None or self.count - 1 != self._due:
            return None
        self.befell, self.befell_at = True, len(self.disk.moments) - 1
        if self._trouble is Trouble.KILL:
            self._is_killed = True
            raise Killed
        if self._trouble is Trouble.BEFORE:
            self._fail()
        return self._trouble

    @staticmethod
    def _fail() -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    def make_folder(self, path: Path) -> bool:
        trouble = self._befalls()
        is_new = super().make_folder(path)
        self._find_folders(path.parent)
        if trouble:
            self._fail()
        return is_new

    def _find_folders(self, folder: Path) -> None:
        """Report folders that were made without an operation of `Files`."""
        for path in folder.iterdir() if folder.is_relative_to(self.disk.root) else ():
            if path.is_dir() and not self.disk.knows(path):
                self.disk.name(path, FOLDER)

    def names(self, folder: Path) -> list[str]:
        if self._befalls():
            self._fail()
        return super().names(folder)

    def read(self, path: Path, most: int = -1) -> bytes:
        if self._befalls():
            self._fail()
        return super().read(path, most)

    def append(self, path: Path) -> int:
        if self._befalls():
            self._fail()
        fd = super().append(path)
        self._numbers[fd] = self.disk.number(path)
        return fd

    def truncate(self, fd: int, size: int) -> None:
        trouble = self._befalls()
        super().truncate(fd, size)
        self.disk.truncate(self._numbers[fd], size)
        if trouble:
            self._fail()

    def create(self, path: Path) -> int:
        trouble = self._befalls()
        fd = super().create(path)
        if self.disk.knows(path):
            self.disk.name(path, None)
        self._numbers[fd] = self.disk.new_file(path)
        if trouble:
            os.close(fd)
            self._fail()
        return fd

    def write(self, fd: int, data: bytes) -> None:
        trouble = self._befalls()
        if trouble is Trouble.HALF:
            data = data[: len(data) // 2]
        super().write(fd, data)
        self.disk.write(self._numbers[fd], data)
        if trouble:
            self._fail()

    def sync(self, fd: int) -> None:
        try:
            trouble = self._befalls()
        except OSError:
            self.disk.fail_sync(self._numbers[fd])
            raise
        self.disk.sync(self._numbers[fd])
        if trouble:
            self._fail()

    sync_data = sync

    def close(self, fd: int) -> None:
        os.close(fd)  # even if killed: the kernel closes the files of a process
        if self._befalls():
            self._fail()

    def rename(self, source: Path, target: Path) -> None:
        trouble = self._befalls()
        super().rename(source, target)
        self.disk.rename(source, target)
        if trouble:
            self._fail()

    def link(self, source: Path, target: Path) -> None:
        trouble = self._befalls()
        super().link(source, target)
        self.disk.name(target, self.disk.number(source))
        if trouble:
            self._fail()

    def sync_folder(self, path: Path) -> None:
        self._find_folders(path)
        trouble = self._befalls()
        self.disk.sync_folder(path)
        if trouble:
            self._fail()

    def remove(self, path: Path) -> None:
        trouble = self._befalls()
        super().remove(path)
        self.disk.name(path, None)
        if trouble:
            self._fail()

    def fingerprint(self, file: Path | int) -> Fingerprint | None:
        if self._befalls():
            self._fail()
        return super().fingerprint(file)


class QuickFiles(Files):
    """`Files` without syncs, for tests that cut no power."""

    def sync(self, fd: int) -> None:
        pass

    sync_data = sync

    def sync_folder(self, path: Path) -> None:
        pass
