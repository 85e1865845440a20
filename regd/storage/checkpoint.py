"""`Checkpoint`: the file `registry.json`, which is replaced as a whole.

A new file is written under a temporary name, synced and renamed, and then the folder is synced. So there is a
complete file at any moment. If another program has changed the file, it is copied before it is replaced.
"""

import contextlib
import errno
from collections.abc import Callable, Mapping
from pathlib import Path
from zlib import crc32

from regd.core.model import Entry, Key, key_text
from regd.storage.document import Position, entry_line, file_chunks
from regd.storage.files import Files, Fingerprint
from regd.storage.line_blocks import LineBlocks

_COPIES_MAX = 5  # copies of changed files that are kept


class Checkpoint:
    """The file of a running daemon.

    Args:
        path: the path of the file.
        files: the file system.
        warn: is called with a message for the log, in the thread that writes.
    """

    def __init__(self, path: Path, files: Files, warn: Callable[[str], None]) -> None:
        self.path = path
        self._files = files
        self._warn = warn
        self._temporary = path.with_name(path.name + ".tmp")
        self._lines = LineBlocks()  # the lines of the next file
        # The fingerprint of the file when it was last read or written here, and the CRC-32 of its bytes.
        self._fingerprint: Fingerprint | None = None
        self._crc = 0

    @property
    def exists(self) -> bool:
        """Whether the file existed when it was last read or written here."""
        return self._fingerprint is not None

    def read(self) -> bytes | None:
        """Return the file's contents; None if the file does not exist.

        Raises:
            FileExistsError: there is a folder or a device in its place.
        """
        self._fingerprint = self._files.fingerprint(self.path)
        if self._fingerprint is None:
            return None
        self._check_regular(self._fingerprint)
        data = self._files.read(self.path)
        self._crc = crc32(data)
        return data

    def is_edited(self) -> bool:
        """Whether another program has changed or removed the file since it was last read or written here."""
        return self._files.fingerprint(self.path) != self._fingerprint

    def write(
        self, changed: Mapping[Key, Entry | None], rev: int, position: Position, sync_folder: Callable[[], None]
    ) -> None:
        """Replace the file by the state at a position of the journal.

        If this fails, the next call includes its changes.

        Args:
            changed: the entries that have changed since the last call; None for an entry that has ended.
            rev: the revision at the position.
            position: the line of the journal up to which the file will have all changes.
            sync_folder: makes the names in the folder durable.

        Raises:
            OSError: the file could not be written.
        """
        for key, entry in changed.items():
            if entry is None:
                self._lines.remove(key_text(key))
            else:
                self._lines.set(key_text(key), entry_line(entry))
        files, crc = self._files, 0
        fd = files.create(self._temporary)
        try:
            try:
                for chunk in file_chunks(rev, position, list(self._lines)):
                    files.write(fd, chunk)
                    crc = crc32(chunk, crc)
                files.sync(fd)
                ours = files.fingerprint(fd)
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
        # The rename has changed `ctime_ns`. If other fields differ, another program has changed the file since.
        renamed = files.fingerprint(self.path)
        is_ours = renamed is not None and ours is not None and renamed[:3] == ours[:3]
        self._fingerprint = renamed if is_ours else ours
        sync_folder()

    def check_writable(self) -> None:
        """Raise `OSError` if a file cannot be created in the folder."""
        self._files.close(self._files.create(self._temporary))
        self._files.remove(self._temporary)

    def _copy_edit(self, sync_folder: Callable[[], None]) -> None:
        """Copy a file that another program has changed. Renaming it instead would leave no file for a moment."""
        files = self._files
        fingerprint = files.fingerprint(self.path)
        if fingerprint is None:
            self._warn(f"{self.path} was removed by another program; regd writes it again")
            return
        self._check_regular(fingerprint)
        data = files.read(self.path)
        if crc32(data) == self._crc:
            self._fingerprint = fingerprint  # it was only touched
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
            sync_folder()  # otherwise a crash could keep the following rename, and lose the copy
        except BaseException:
            with contextlib.suppress(OSError):
                files.remove(copy)
            raise
        self._fingerprint = fingerprint  # the file needs no second copy, even if this checkpoint fails
        for number in sorted(numbers)[: max(len(numbers) + 1 - _COPIES_MAX, 0)]:
            with contextlib.suppress(OSError):
                files.remove(self.path.with_name(f"{self.path.name}.aside-{number}"))
        self._warn(
            f"{self.path} was changed by another program: its content is kept as {copy}, and regd writes its "
            "own. To edit the file, stop regd first"
        )

    def _check_regular(self, fingerprint: Fingerprint) -> None:
        if not fingerprint.is_regular:
            raise OSError(errno.EEXIST, "it is not a regular file", str(self.path))
