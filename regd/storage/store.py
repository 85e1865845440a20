"""The registry file of a running daemon: locked, loaded once, and replaced as a whole at every commit.

A commit writes a temporary file, then fsync, rename, fsync of the folder. When `commit` returns, the file holds
the changes. When it raises, they are not in effect, and the next commit writes the previous state again if
necessary. `commit` blocks: the engine calls it in a thread, one call at a time.
"""

import contextlib
import errno
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from regd.core.model import Change, Entry, Op, key_text
from regd.storage.document import Document, Unreadable, chunks, line, parse
from regd.storage.files import AlreadyLocked, Files, Fingerprint
from regd.storage.line_blocks import LineBlocks

_NO_RIGHTS = (errno.EACCES, errno.EPERM, errno.EROFS)


class StorageError(Exception):
    """The registry cannot be used. The text is one line: what happened, where, what to do."""


class Store:
    """`warn` is called with one line for people, in the thread that commits."""

    def __init__(self, path: Path, warn: Callable[[str], None], files: Files | None = None) -> None:
        self.path = Path(os.path.realpath(path))  # a rename must not replace a link by a file
        self.dirty = False  # the file is gone, or may hold changes that are not in effect: write it again
        self.made_folder = False  # by `open`
        self._warn = warn
        self._files = files or Files()
        self._temporary = self.path.with_name(self.path.name + ".tmp")
        self._lines = LineBlocks()  # as in the file
        self._unwritten: list[Entry] = []  # loaded entries that are not in `_lines` yet
        self._rev = 0
        self._print: Fingerprint | None = None  # of the file as last read or written here
        self._lock: int | None = None

    def open(self, registered_at: float) -> Document:
        """Lock and read the registry. A missing file is an empty registry; it is not created yet.

        Raises:
            StorageError: another regd has locked it, or it cannot be read.
        """
        try:
            self.made_folder = self._files.make_folder(self.path.parent)
            lock = self.path.with_name(self.path.name + ".lock")
            self._lock = self._files.lock(lock)
        except AlreadyLocked as held:
            if held.elsewhere:
                raise StorageError(
                    f"{self.path} is in use by a regd{held}; name a file that only this one uses with --registry"
                ) from None
            raise StorageError(
                f"{self.path} is in use by another regd{held}; stop that one, or name another file "
                "with --registry"
            ) from None
        except OSError as error:
            raise StorageError(
                f"cannot use the folder {self.path.parent}: {error.strerror}; "
                "give its rights to this user, or name another file with --registry"
            ) from error
        try:
            return self._load(registered_at)
        except BaseException:
            self.close()
            raise

    def _load(self, registered_at: float) -> Document:
        try:
            self._print = self._files.print(self.path)
            if self._print is None:
                return Document(0, [])
            if not self._print.is_regular:
                raise StorageError(f"{self.path} is not a regular file; name another with --registry")
            document = parse(self._files.read(self.path), registered_at)
        except OSError as error:
            raise StorageError(
                f"cannot read {self.path}: {error.strerror}; give this user read access to it"
            ) from error
        except Unreadable as error:
            raise StorageError(
                f"{self.path}: {error}; nothing was changed: correct the file, or move it away to start empty"
            ) from error
        self._rev = document.rev
        self._unwritten = document.entries
        return document

    def prepare(self) -> None:
        """Encode the loaded entries, ahead of the first commit. Idempotent."""
        entries, self._unwritten = self._unwritten, []
        for entry in entries:
            self._lines.set(key_text(entry.key), line(entry))

    def ensure_writable(self) -> None:
        """Create the file if it is missing; else check that it can be replaced.

        Raises:
            StorageError: it cannot be written. For an existing file a full disk is only a warning: reads go on.
        """
        try:
            if self._print is None:
                self._replace()
            else:
                # The previous daemon may have been killed before it synced the folder.
                self.dirty = True
                self._files.sync_folder(self.path.parent)
                self.dirty = False
                self._files.close(self._files.create(self._temporary))
                self._files.remove(self._temporary)
        except OSError as error:
            if self._print is not None and error.errno not in _NO_RIGHTS:
                self._warn(f"cannot write in {self.path.parent}: {error.strerror}")
                return
            raise StorageError(
                f"cannot write {self.path}: {error.strerror}; give the rights on its folder to this user, "
                "or name another file with --registry"
            ) from error

    def commit(self, changes: Sequence[Change]) -> None:
        """Write the changes to the file. Without changes, write the file again.

        Raises:
            OSError: the file could not be written, and the changes are not in effect.
        """
        self.prepare()
        undo = self._stage(changes)
        if undo is None and not self.dirty and changes:
            return  # the file would be the same
        rev, self._rev = self._rev, changes[-1].rev if changes else self._rev
        try:
            self._replace()
        except BaseException:
            self._rev = rev
            for key, before in reversed(undo or []):
                if before is None:
                    self._lines.remove(key)
                else:
                    self._lines.set(key, before)
            raise

    def apply_unsaved(self, changes: Sequence[Change]) -> None:
        """Record changes that are in effect although they are not in the file. The next commit writes them."""
        self.prepare()
        self._stage(changes)
        self._rev = changes[-1].rev
        self.dirty = True

    def _stage(self, changes: Sequence[Change]) -> list[tuple[str, bytes | None]] | None:
        """Change the lines, and return the previous ones for undoing, or None if no line differs."""
        undo: list[tuple[str, bytes | None]] = []
        last = {key_text(change.entry.key): change for change in changes}  # the last change of each key
        same = all(change.op is Op.KEEP for change in changes)
        for key, change in last.items():
            before = self._lines.get(key)
            undo.append((key, before))
            if change.op is Op.DOWN:
                self._lines.remove(key)  # it may have come and gone in the same batch
                same = same and before is None
            else:
                after = line(change.entry)
                if after != before:
                    self._lines.set(key, after)
                    same = False
        return None if same else undo

    def _replace(self) -> None:
        files = self._files
        try:
            fd = files.create(self._temporary)
        except FileNotFoundError:
            self.dirty = True  # the folder is gone, and the file with it
            raise
        try:
            try:
                for chunk in chunks(self._rev, self._lines):
                    files.write(fd, chunk)
                files.sync(fd)
                ours = files.print(fd)
            finally:
                files.close(fd)
            self._back_up_external_edit()
            self.dirty = True  # from here on the new file may be in place, even if an error follows
            files.rename(self._temporary, self.path)
        except BaseException:
            with contextlib.suppress(OSError):
                files.remove(self._temporary)
            raise
        self._print = ours
        files.sync_folder(self.path.parent)
        self.dirty = False

    def _back_up_external_edit(self) -> None:
        """Copy a file that another program changed since it was last written here.

        It is not renamed, so that there is a registry at any moment.
        """
        files = self._files
        found = files.print(self.path)
        if found == self._print:
            return
        if found is None:
            self._warn(f"{self.path} was removed by another program; regd writes it again")
            return
        if not found.is_regular:
            raise OSError(errno.EEXIST, "there is something else than a file in its place")
        foreign = files.read(self.path)
        count = 1
        while files.print(aside := self.path.with_name(f"{self.path.name}.aside-{count}")):
            count += 1
        fd = files.create(aside)
        try:
            try:
                files.write(fd, foreign)
                files.sync(fd)
            finally:
                files.close(fd)
            files.sync_folder(aside.parent)  # else a crash may keep the following rename and lose the copy
        except BaseException:
            with contextlib.suppress(OSError):
                files.remove(aside)
            raise
        self._print = found  # even if this commit fails, there is a copy of it
        self._warn(
            f"{self.path} was changed by another program: its content is kept as {aside}, and regd writes its "
            "own. To edit the file, stop regd first"
        )

    def close(self) -> None:
        """Release the lock. Idempotent."""
        if self._lock is not None:
            self._files.unlock(self._lock)
            self._lock = None
