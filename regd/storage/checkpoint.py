"""The checkpoint of the journal: the readable file `registry.json`, replaced as a whole.

Temporary file, fsync, rename, fsync of the folder: there is a whole file at any moment. A file that another
program changed is copied before it is replaced.
"""

import contextlib
import errno
from collections.abc import Callable, Mapping
from pathlib import Path
from zlib import crc32

from regd.core.model import Entry, Key, key_text
from regd.storage.document import Position, chunks, line
from regd.storage.files import Files, Fingerprint
from regd.storage.line_blocks import LineBlocks

_COPIES_MAX = 5  # of files that other programs changed


class Checkpoint:
    """The file of a running daemon. `warn` is called with one line for people, in the thread that writes."""

    def __init__(self, path: Path, files: Files, warn: Callable[[str], None]) -> None:
        self.path = path
        self._files = files
        self._warn = warn
        self._temporary = path.with_name(path.name + ".tmp")
        self._lines = LineBlocks()  # as in the file that is written next
        self._print: Fingerprint | None = None  # of the file as last read or written here
        self._crc = 0  # of all of its bytes

    @property
    def exists(self) -> bool:
        """Whether there was a file when it was last read or written here."""
        return self._print is not None

    def read(self) -> bytes | None:
        """Return the file's contents, None if there is none.

        Raises:
            IsADirectoryError: there is something else than a file in its place.
        """
        self._print = self._files.print(self.path)
        if self._print is None:
            return None
        self._check_regular(self._print)
        data = self._files.read(self.path)
        self._crc = crc32(data)
        return data

    def is_edited(self) -> bool:
        """Whether another program changed or removed the file since it was last read or written here."""
        return self._files.print(self.path) != self._print

    def write(
        self, changed: Mapping[Key, Entry | None], rev: int, position: Position, sync_folder: Callable[[], None]
    ) -> None:
        """Replace the file by the state at a position. `changed` has the entries that changed; None: it ended.

        If it fails, the next call writes the changes of this one too.
        """
        for key, entry in changed.items():
            if entry is None:
                self._lines.remove(key_text(key))
            else:
                self._lines.set(key_text(key), line(entry))
        files, crc = self._files, 0
        fd = files.create(self._temporary)
        try:
            try:
                for chunk in chunks(rev, position, list(self._lines)):
                    files.write(fd, chunk)
                    crc = crc32(chunk, crc)
                files.sync(fd)
                ours = files.print(fd)
            finally:
                files.close(fd)
            if self.is_edited():
                self._copy_edit(sync_folder)
            files.rename(self._temporary, self.path)
        except BaseException:
            with contextlib.suppress(OSError):
                files.remove(self._temporary)
            raise
        self._crc = crc
        # Renaming changes the time of change.
        renamed = files.print(self.path)
        is_ours = renamed is not None and ours is not None and renamed[:3] == ours[:3]
        self._print = renamed if is_ours else ours
        sync_folder()

    def check_writable(self) -> None:
        """Raise `OSError` if a file cannot be created in the folder."""
        self._files.close(self._files.create(self._temporary))
        self._files.remove(self._temporary)

    def _copy_edit(self, sync_folder: Callable[[], None]) -> None:
        """Copy a file that another program changed. It is not renamed, so that there is a file at any moment."""
        files = self._files
        found = files.print(self.path)
        if found is None:
            self._warn(f"{self.path} was removed by another program; regd writes it again")
            return
        self._check_regular(found)
        data = files.read(self.path)
        if crc32(data) == self._crc:
            self._print = found  # it was only touched
            return
        numbers = [
            int(name[len(prefix) :])
            for name in files.names(self.path.parent)
            if name.startswith(prefix := f"{self.path.name}.aside-") and name[len(prefix) :].isdecimal()
        ]
        copy = self.path.with_name(f"{self.path.name}.aside-{max(numbers, default=0) + 1}")
        fd = files.create(copy)
        try:
            try:
                files.write(fd, data)
                files.sync(fd)
            finally:
                files.close(fd)
            sync_folder()  # else a crash may keep the following rename and lose the copy
        except BaseException:
            with contextlib.suppress(OSError):
                files.remove(copy)
            raise
        self._print = found  # even if this checkpoint fails, there is a copy of it
        for number in sorted(numbers)[: max(len(numbers) + 1 - _COPIES_MAX, 0)]:
            with contextlib.suppress(OSError):
                files.remove(self.path.with_name(f"{self.path.name}.aside-{number}"))
        self._warn(
            f"{self.path} was changed by another program: its content is kept as {copy}, and regd writes its "
            "own. To edit the file, stop regd first"
        )

    def _check_regular(self, found: Fingerprint) -> None:
        if not found.is_regular:
            raise OSError(errno.EEXIST, "there is something else than a file in its place", str(self.path))
