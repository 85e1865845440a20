"""A model of what a power cut would leave on a disk, and `Files` that records every operation for it.

The model is as strict as POSIX permits. Until `sync`, any write to a file may be missing, torn, or zeros. Until
`sync_folder`, each name in the folder may refer to any of its earlier files. The files that a process sees, before
and after it was killed, are in a real folder.
"""

import errno
import itertools
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path
from typing import NamedTuple

from regd.storage.files import Files, Fingerprint

FOLDER = -1  # what a name may stand for, beside the number of a file, and None for nothing
Name = int | None


@dataclass(frozen=True)
class Data:
    """A file's bytes: those that are safe, and the writes behind them that are not."""

    safe: bytes = b""
    pending: tuple[bytes, ...] = ()
    lost: bool = False  # a sync has failed: the kernel has forgotten that these writes were to be written

    def outcomes(self) -> set[bytes]:
        """Return what may be found after a crash."""
        found = {self.safe}
        there = [(part, bytes(len(part))) for part in self.pending]
        for count in range(len(there)):
            for parts in itertools.product(
                *there[:count][-3:]
            ):  # the last ones in all ways: it must end some day
                before = b"".join((self.safe, *self.pending[: max(count - 3, 0)], *parts))
                for last in there[count]:
                    found |= {before + last[:cut] for cut in (1, len(last) // 2, len(last) - 1, len(last))}
        return found


Found = tuple[str, bytes | None]  # a name and a file's bytes, or None for a folder


class Moment(NamedTuple):
    """The disk between two operations."""

    did: str
    names: Mapping[str, tuple[Name, ...]]  # the first is safe, the last is what a process sees
    files: Mapping[int, Data]

    def choices(self) -> "Choices":
        """Return what each name may be after a crash at this moment."""
        return frozenset((path, frozenset(self._found(path, names))) for path, names in self.names.items())

    def _found(self, path: str, names: Iterable[Name]) -> Iterator[Found | None]:
        for name in names:
            if name is None:
                yield None
            elif name == FOLDER:
                yield (path, None)
            else:
                yield from ((path, data) for data in self.files[name].outcomes())


Choices = frozenset[tuple[str, frozenset[Found | None]]]


def outcomes(choices: Choices) -> Iterator[dict[str, bytes | None]]:
    """Yield every state that a crash may leave; what is in a folder goes with the folder."""
    for chosen in itertools.product(*(found for _, found in choices)):
        there = dict(found for found in chosen if found is not None)
        lost = [path + "/" for (path, _), found in zip(choices, chosen, strict=True) if found is None]
        yield {path: data for path, data in there.items() if not path.startswith(tuple(lost))}


class Disk:
    """`moments` has what was, from the beginning on, after every operation. `root` is there, and safe."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._names: dict[str, tuple[Name, ...]] = {}  # by path from the root
        self._files: dict[int, Data] = {}
        self.moments: list[Moment] = [Moment("begin", {}, {})]

    def _did(self, what: str) -> None:
        self.moments.append(Moment(what, dict(self._names), dict(self._files)))

    def _key(self, path: Path) -> str:
        return os.path.relpath(path, self.root)

    def knows(self, path: Path) -> bool:
        """Whether a process sees something there."""
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
        self._did(f"{path.name} is {'a folder' if name == FOLDER else name}")

    def rename(self, source: Path, target: Path) -> None:
        self._point(target, self._names[self._key(source)][-1])
        self._point(source, None)
        self._did(f"rename {source.name} {target.name}")

    def write(self, number: int, data: bytes) -> None:
        before = self._files[number]
        self._files[number] = replace(before, pending=(*before.pending, data))
        self._did(f"write {number}")

    def sync(self, number: int) -> None:
        before = self._files[number]
        if not before.lost:
            self._files[number] = Data(before.safe + b"".join(before.pending))
        self._did(f"sync {number}")

    def fail_sync(self, number: int) -> None:
        self._files[number] = replace(self._files[number], lost=True)
        self._did(f"sync {number} failed")

    def sync_folder(self, folder: Path) -> None:
        above = self._key(folder)
        for key, names in self._names.items():
            if (os.path.dirname(key) or ".") == above:
                self._names[key] = names[-1:]
        self._did(f"sync folder {folder.name}")

    def put(self, path: Path, data: bytes | None) -> None:
        """What another hand does, and makes safe itself: a file, or None for none."""
        name = None
        if data is not None:
            name = len(self._files)
            self._files[name] = Data(data)
        self._names[self._key(path)] = (name,)
        self.sync_folder(path.parent)


class Trouble(Enum):
    """What becomes of an operation that goes wrong."""

    BEFORE = "it fails, and nothing was done"
    AFTER = "it fails, and was done all the same"
    HALF = "a write fails half way; any other fails"
    KILL = "the process is killed instead"


class Killed(BaseException):
    """The process is gone: nothing of it runs from here on."""


class RecordedFiles(Files):
    """The real door, with every operation told to the disk. `trouble` befalls the operation `due` steps from now."""

    def __init__(self, disk: Disk) -> None:
        self.disk = disk
        self.count = 0
        self.befell = False  # the trouble that was expected last
        self._due = -1
        self._trouble: Trouble | None = None
        self._is_killed = False
        self._numbers: dict[int, int] = {}

    def expect(self, trouble: Trouble | None, due: int) -> None:
        """Have an operation go wrong, or with None none any more. Whoever was killed lives again."""
        self._trouble, self._due, self._is_killed = trouble, self.count + due, False
        self.befell = self.befell and trouble is None

    def _befalls(self) -> Trouble | None:
        """Count an operation, and say what befalls it. Raises what a failure before it raises."""
        if self._is_killed:
            raise Killed
        self.count += 1
        if self._trouble is None or self.count - 1 != self._due:
            return None
        self.befell = True
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
        self._look(path.parent)
        if trouble:
            self._fail()
        return is_new

    def _look(self, folder: Path) -> None:
        """Tell of folders that were made where no operation of the door told so."""
        for path in folder.iterdir() if folder.is_relative_to(self.disk.root) else ():
            if path.is_dir() and not self.disk.knows(path):
                self.disk.name(path, FOLDER)

    def read(self, path: Path) -> bytes:
        if self._befalls():
            self._fail()
        return super().read(path)

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

    def close(self, fd: int) -> None:
        os.close(fd)  # the end of the process does that too
        if self._befalls():
            self._fail()

    def rename(self, source: Path, target: Path) -> None:
        trouble = self._befalls()
        super().rename(source, target)
        self.disk.rename(source, target)
        if trouble:
            self._fail()

    def sync_folder(self, path: Path) -> None:
        self._look(path)
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

    def print(self, file: Path | int) -> Fingerprint | None:
        if self._befalls():
            self._fail()
        return super().print(file)


class QuickFiles(Files):
    """The real door, on a disk that nobody cuts the power of."""

    def sync(self, fd: int) -> None:
        pass

    def sync_folder(self, path: Path) -> None:
        pass
