"""The registry's file for the life of a daemon: locked, loaded once, replaced whole at every commit.

A commit is a temporary file, fsync, rename, fsync of the folder. When it returns, the file holds the changes;
when it raises, they are not in effect, and the next commit writes the file anew from what was. Blocking: the
floor above calls `commit` in a thread, one at a time. Must not know who waits for it.
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
    """The registry cannot be used. Its text is one line: what happened, where, what to do."""


class Store:
    """`warn` is called with one line for a person, from whichever thread commits."""

    def __init__(self, path: Path, warn: Callable[[str], None], files: Files | None = None) -> None:
        self.path = Path(os.path.realpath(path))  # a rename must not turn a link into a file
        self.dirty = False  # the file may hold what is not in effect, or be gone: it must be written again
        self.made_folder = False  # by `open`
        self._warn = warn
        self._files = files or Files()
        self._temporary = self.path.with_name(self.path.name + ".tmp")
        self._lines = LineBlocks()  # as in the file, encoded once when they change
        self._unwritten: list[Entry] = []  # what was loaded, and is not in the lines yet
        self._rev = 0
        self._print: Fingerprint | None = None  # of the file as we last read or wrote it
        self._lock: int | None = None

    def open(self, registered_at: float) -> Document:
        """Lock and read the registry; a missing one is an empty one, not yet made.

        Raises:
            StorageError: another regd has it, it cannot be read, or may not be.
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
            raise StorageError(f"cannot read {self.path}: {error.strerror}; mend its rights") from error
        except Unreadable as error:
            raise StorageError(
                f"{self.path}: {error}; nothing was changed: mend the file, or move it away to start empty"
            ) from error
        self._rev = document.rev
        self._unwritten = document.entries
        return document

    def prepare(self) -> None:
        """Make the lines of what was loaded, ahead of the first commit. Twice is harmless."""
        entries, self._unwritten = self._unwritten, []
        for entry in entries:
            self._lines.set(key_text(entry.key), line(entry))

    def ensure_writable(self) -> None:
        """Make the file where it is missing; where it is there, see that it can be replaced.

        Raises:
            StorageError: it cannot be written. A full disk is no reason to refuse an existing one: reads go on.
        """
        try:
            if self._print is None:
                self._replace()
            else:
                # The daemon before this one may have been killed before it did so, and what is read is relied on.
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
        """Make the file hold these changes. Without any, write it again as it was.

        Raises:
            OSError: it does not, and they are not in effect.
        """
        self.prepare()
        undo = self._stage(changes)
        if undo is None and not self.dirty and changes:
            return  # the file reads just so already
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
        """Take changes that are in effect although the file could not be written; the next commit writes them."""
        self.prepare()
        self._stage(changes)
        self._rev = changes[-1].rev
        self.dirty = True

    def _stage(self, changes: Sequence[Change]) -> list[tuple[str, bytes | None]] | None:
        """Change the lines, and return what they were, or None where all are the same."""
        undo: list[tuple[str, bytes | None]] = []
        last = {key_text(change.entry.key): change for change in changes}  # only what it is in the end
        same = all(change.op is Op.KEEP for change in changes)
        for key, change in last.items():
            before = self._lines.get(key)
            undo.append((key, before))
            if change.op is Op.DOWN:
                self._lines.remove(key)  # it may have come and gone in one batch
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
            self.dirty = True  # from here on the new file may be seen, whatever follows
            files.rename(self._temporary, self.path)
        except BaseException:
            with contextlib.suppress(OSError):
                files.remove(self._temporary)
            raise
        self._print = ours
        files.sync_folder(self.path.parent)
        self.dirty = False

    def _back_up_external_edit(self) -> None:
        """Keep a copy of a file that another hand changed since we last wrote it.

        A copy, not a rename: at no moment is there no registry.
        """
        files = self._files
        found = files.print(self.path)
        if found == self._print:
            return
        if found is None:
            self._warn(f"{self.path} was removed by another hand; regd writes it anew")
            return
        if not found.is_regular:
            raise OSError(errno.EEXIST, "something that is no file was put in its place")
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
            files.sync_folder(aside.parent)  # else a crash may keep the rename that follows, and not the copy
        except BaseException:
            with contextlib.suppress(OSError):
                files.remove(aside)
            raise
        self._print = found  # whatever becomes of this commit, that one is safe
        self._warn(
            f"{self.path} was changed by another hand: a copy of that is {aside}, and regd writes its own. "
            "To edit the file, stop regd first"
        )

    def close(self) -> None:
        """Give the lock back. Twice is harmless."""
        if self._lock is not None:
            self._files.unlock(self._lock)
            self._lock = None
