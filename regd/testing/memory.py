"""`MemoryFiles`: a replacement of `Files` in memory. It raises the same errors as a disk."""

import errno
import itertools
import os
from dataclasses import dataclass, field
from pathlib import Path

from regd.storage.document import Unreadable, entry_line
from regd.storage.files import AlreadyLocked, Files, Fingerprint
from regd.storage.store import peek

IN_MEMORY = Path("/in-memory/registry.json")  # the path of a registry in `MemoryFiles`
_LINES_MAX = 200  # in an excerpt


@dataclass(slots=True)
class _Kept:
    inode: int
    data: bytearray = field(default_factory=bytearray)
    changes: int = 0  # takes the place of the modification time

    def fingerprint(self) -> Fingerprint:
        return Fingerprint(self.inode, len(self.data), self.changes, self.changes, is_regular=True)


class MemoryFiles(Files):
    """Files in memory. Other threads may read while one thread writes."""

    def __init__(self) -> None:
        self._numbers = itertools.count(1)
        self._folders = {Path("/"), IN_MEMORY.parent}
        self._files: dict[Path, _Kept] = {}
        self._open: dict[int, _Kept] = {}
        self._locks: dict[int, Path] = {}

    def make_folder(self, path: Path) -> bool:
        is_new = path not in self._folders
        self._folders |= {path, *path.parents}
        return is_new

    def names(self, folder: Path) -> list[str]:
        return [path.name for path in list(self._files) if path.parent == folder]

    def read(self, path: Path, most: int = -1) -> bytes:
        data = bytes(self._kept(path).data)
        return data if most < 0 else data[:most]

    def create(self, path: Path) -> int:
        self._in_folder(path)
        fd = next(self._numbers)
        self._files[path] = self._open[fd] = _Kept(inode=fd)
        return fd

    def append(self, path: Path) -> int:
        fd = next(self._numbers)
        self._open[fd] = self._kept(path)
        return fd

    def truncate(self, fd: int, size: int) -> None:
        del self._opened(fd).data[size:]

    def write(self, fd: int, data: bytes) -> None:
        kept = self._opened(fd)
        kept.data += data
        kept.changes += 1

    def sync(self, fd: int) -> None:
        self._opened(fd)

    sync_data = sync

    def close(self, fd: int) -> None:
        self._opened(fd)
        del self._open[fd]

    def rename(self, source: Path, target: Path) -> None:
        kept = self._kept(source)
        self._in_folder(target)
        del self._files[source]
        self._files[target] = kept

    def link(self, source: Path, target: Path) -> None:
        kept = self._kept(source)
        self._in_folder(target)
        if target in self._files:
            raise _error(errno.EEXIST, target)
        self._files[target] = kept

    def sync_folder(self, path: Path) -> None:
        if path not in self._folders:
            raise _error(errno.ENOENT, path)

    def remove(self, path: Path) -> None:
        self._kept(path)
        del self._files[path]

    def fingerprint(self, file: Path | int) -> Fingerprint | None:
        if isinstance(file, int):
            return (
                self._kept(self._locks[file]).fingerprint()
                if file in self._locks
                else self._opened(file).fingerprint()
            )
        kept = self._files.get(file)
        return kept.fingerprint() if kept else None

    def obstacle(self, path: Path) -> str:
        return ""

    def lock(self, path: Path) -> int:
        self._in_folder(path)
        if path in self._locks.values():
            raise AlreadyLocked(f" (process {os.getpid()})")
        if path not in self._files:
            self._files[path] = _Kept(inode=next(self._numbers))
        fd = next(self._numbers)
        self._locks[fd] = path
        return fd

    def unlock(self, fd: int) -> None:
        if self._locks.pop(fd, None) is None:
            raise _error(errno.EBADF)

    def _kept(self, path: Path) -> _Kept:
        if path not in self._files:
            raise _error(errno.ENOENT, path)
        return self._files[path]

    def _opened(self, fd: int) -> _Kept:
        if fd not in self._open:
            raise _error(errno.EBADF)
        return self._open[fd]

    def _in_folder(self, path: Path) -> None:
        if path.parent not in self._folders:
            raise _error(errno.ENOENT, path)


def excerpt(files: Files, path: Path) -> list[str]:
    """Return the stored entries of a registry as lines of text, or a line that says why they cannot be read."""
    try:
        lines = [entry_line(entry).decode() for entry in peek(path, files).entries]
    except (OSError, Unreadable) as error:
        return [f"cannot read {path}: {error}"]
    if len(lines) > _LINES_MAX:
        lines[_LINES_MAX:] = [f"… and {len(lines) - _LINES_MAX} more lines"]
    return lines


def _error(number: int, path: Path | None = None) -> OSError:
    return OSError(number, os.strerror(number), *([str(path)] if path else []))
