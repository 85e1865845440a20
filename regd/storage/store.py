"""The registry on disk: the journal, to which every change is appended, and its checkpoint `registry.json`.

When `commit` returns, the journal holds the changes on disk. When it raises, they are not in effect: before the
next commit a new segment makes their lines void. `commit` blocks: the engine calls it in a thread, one call at a
time. `checkpoint` and `page` may be called in other threads meanwhile.
"""

import errno
import os
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

from regd.core.limits import DEFAULT, Limits
from regd.core.model import Change, Entry, Key, Op
from regd.storage import history_pages, journal_lines
from regd.storage.checkpoint import Checkpoint
from regd.storage.document import Document, Position, Unreadable, line, parse
from regd.storage.files import AlreadyLocked, Files
from regd.storage.history_pages import HistoryPage, Query
from regd.storage.journal import Journal
from regd.storage.journal_lines import Head, Start
from regd.storage.recovery import Recovery, recover

_EPOCHS_MAX = 1_000  # restarts that watchers can resume over
_NO_RIGHTS = (errno.EACCES, errno.EPERM, errno.EROFS)


class StorageError(Exception):
    """The registry cannot be used. The text is one line: what happened, where, what to do."""


class Store:
    """`warn` is called with one line for people, in the thread that works.

    If the lock file is removed, the store locks it again. Without `relocks` it fails for good instead, since the
    folder may by now belong to another registry.
    """

    def __init__(
        self,
        path: Path,
        warn: Callable[[str], None],
        files: Files | None = None,
        limits: Limits = DEFAULT,
        epoch: str | None = None,
        *,
        relocks: bool = True,
    ) -> None:
        self._relocks = relocks
        self.path = Path(os.path.realpath(path))  # a rename must not replace a link by a file
        self.epoch = epoch or os.urandom(8).hex()
        self.epochs: dict[str, tuple[int, int]] = {}  # ended, with valid positions: the last revision and line
        self.made_folder = False  # by `open`
        self.rev_written = 0  # the highest revision that may be on disk, in effect or not
        self._warn = warn
        self._files = files = files or Files()
        self._limits = limits
        self._checkpoint = Checkpoint(self.path, files, warn)
        self._journal = Journal(journal_path(self.path), files)
        self._lock_path = self.path.with_name(self.path.name + ".lock")
        self._lock: int | None = None
        self._lock_inode: int | None = None
        self._had_lock = False  # else a daemon whose lock file was removed may still write to the last segment
        self._found = Recovery([], 0)
        self._start: Start | None = None  # of this daemon, while it is not on disk
        self._sets_aside = False  # the journal that was found, before the next segment begins
        self._rewrites: int | None = None  # so many bytes of the last segment found, before the next one begins
        self._unsaved: list[Change] = []  # in effect, and not on disk yet
        self._lost = False  # the journal was removed: the next checkpoint must come before the next segment
        self._rotates = False
        self._is_taken_over = False  # by another daemon: nothing is written any more
        # What the journal holds on disk. `_mutex` guards what the checkpoint takes.
        self._mutex = threading.Lock()
        self._checkpointing = threading.Lock()
        self._rev = 0
        self._at = 0.0  # Unix seconds: of the last change
        self._position = Position("", 0)
        self._checkpointed = Position("", 0)
        self._changed: dict[Key, Entry | None] = {}  # since the last checkpoint; at first all entries
        self._owes_checkpoint = False

    # Start.

    def open(self, at: float) -> Recovery:
        """Lock and read the registry, and change nothing. A missing file is an empty registry.

        `at` is the time in Unix seconds.

        Raises:
            StorageError: another regd has locked it, or it cannot be read.
        """
        try:
            self.made_folder = self._files.make_folder(self.path.parent)
            self._had_lock = self._files.print(self._lock_path) is not None
            self._take_lock()
        except OSError as error:
            raise StorageError(
                f"cannot use the folder {self.path.parent}: {error.strerror}; "
                "give its rights to this user, or name another file with --registry"
            ) from error
        try:
            self._found = found = self._load(at)
        except BaseException:
            self.close()
            raise
        self._sets_aside, self._rewrites = not found.keeps_journal, found.size
        self._start = Start(self.epoch, found.keeps_journal and found.valid, found.rev, at)
        self.epochs = dict(found.epochs)
        if self._start.valid and found.epoch:
            self.epochs[found.epoch] = (found.rev, found.line)
        self._rev = self.rev_written = found.rev
        self._at = at
        self._position = self._checkpointed = Position(found.epoch, found.line)
        return found

    def _load(self, at: float) -> Recovery:
        path = self.path
        try:
            data = self._checkpoint.read()
            path = self._journal.path
            segments = self._journal.find()
            document = None if data is None else _parse(self.path, data, at)
            return recover(document, segments, self.path, self._limits.history_changes_max)
        except FileExistsError as error:
            raise StorageError(f"{error.filename} is not a regular file; name another with --registry") from None
        except OSError as error:
            raise StorageError(
                f"cannot read {path}: {error.strerror}; give this user read access to it"
            ) from error
        except Unreadable as error:
            raise StorageError(str(error)) from error

    def _take_lock(self) -> None:
        try:
            self._lock = self._files.lock(self._lock_path)
        except AlreadyLocked as held:
            if held.elsewhere:
                raise StorageError(
                    f"{self.path} is in use by a regd{held}; name a file that only this one uses with --registry"
                ) from None
            raise StorageError(
                f"{self.path} is in use by another regd{held}; stop that one, or name another file "
                "with --registry"
            ) from None
        found = self._files.print(self._lock)
        self._lock_inode = found.inode if found else None

    def begin(self) -> None:
        """Make the registry ready for changes: cut off a torn batch, write the start of this epoch, and the file
        if it has no place in the journal.

        Raises:
            StorageError: it cannot be written. For an existing file a full disk is only a warning: reads go on.
        """
        exists, found, journal = self._checkpoint.exists, self._found, self._journal
        self._changed = {entry.key: entry for entry in found.entries}
        try:
            if exists and (obstacle := self._files.obstacle(self.path)):
                raise StorageError(
                    f"cannot replace {self.path}: {obstacle}, or name another file with --registry"
                )
            for note in found.notes:
                self._warn(note)
            is_clean = found.is_covered and self._had_lock
            if is_clean and found.size is not None and journal.segments[-1].path == journal.path:
                journal.resume(found.size)
                self._rewrites = None
                self._write_start()
                journal.sync_folder()  # the previous daemon may have been killed before it did that
                self._checkpoint.check_writable()
            else:
                self._begin_segment()
                self._write_start()
                self.checkpoint()
        except OSError as error:
            journal.poison()
            if exists and error.errno not in _NO_RIGHTS:
                self._warn(f"cannot write in {self.path.parent}: {error.strerror}")
                return
            raise StorageError(
                f"cannot write {self.path}: {error.strerror}; give the rights on its folder to this user, "
                "or name another file with --registry"
            ) from error
        finally:
            self._found = Recovery([], 0)  # its lists are the caller's now

    def _write_start(self) -> None:
        """Append the line that begins this daemon's epoch, if it is not on disk yet."""
        if self._start is None:
            return
        number = self._position.line + 1
        self._journal.append(journal_lines.start(number, self._start))
        self._position = Position(self.epoch, number)
        self._start = None

    # Changes.

    @property
    def has_unsaved(self) -> bool:
        """Whether changes are in effect that the journal does not have yet."""
        return bool(self._unsaved)

    @property
    def needs_repair(self) -> bool:
        """Whether the disk may show what is not in effect, or lack what is. The next commit mends that."""
        return self.has_unsaved or not self._journal.is_open or self._lock is None

    def commit(self, changes: Sequence[Change]) -> None:
        """Append changes to the journal, those of `apply_unsaved` first.

        Raises:
            OSError: they could not be written, and are not in effect.
            StorageError: another regd has taken over the registry; this one must end.
        """
        wanted = [change for change in (*self._unsaved, *changes) if not _changes_nothing(change)]
        if not wanted and not self.needs_repair:
            return
        if not wanted:
            self._ensure_segment()
            return
        self._append(wanted)
        if not self._journal.is_open:  # it was removed: the lines count in another segment
            self._append(wanted)
        if not self._journal.is_open:
            raise FileNotFoundError(errno.ENOENT, "the journal was removed", str(self._journal.path))
        self._unsaved.clear()
        with self._mutex:
            self._at = wanted[-1].at
            self._rev = max(self._rev, *(change.rev for change in wanted if change.op is not Op.KEEP), 0)
            self._position = Position(self._position.epoch, self._position.line + len(wanted))
            for change in wanted:
                self._changed[change.entry.key] = None if change.op is Op.DOWN else change.entry

    def _append(self, changes: Sequence[Change]) -> None:
        """Append changes to the journal, and see that it is still the one at its path."""
        self._ensure_segment()
        first, journal = self._position.line + 1, self._journal
        lines = [
            journal_lines.change(number, change, len(changes) if number == first else 0)
            for number, change in enumerate(changes, first)
        ]
        self.rev_written = max(self.rev_written, changes[-1].rev)
        journal.append(b"".join(lines))
        try:
            self._check_owner()
        except BaseException:
            journal.poison()  # the lines are on disk, and do not count
            raise

    def apply_unsaved(self, changes: Sequence[Change]) -> None:
        """Record changes that are in effect although they are not on disk. The next commit writes them first."""
        self._unsaved += changes

    def check_kept(self) -> None:
        """Make sure that the registry on disk has what is in effect, before a repeated request gets its `ok`.

        Another program may have edited the file: then it is written again.

        Raises:
            OSError: it could not be written.
        """
        self._check_owner()
        if not self._journal.is_open:
            self._ensure_segment()
        elif self._checkpoint.is_edited():
            self.checkpoint()

    def _check_owner(self) -> None:
        """Check that the lock and the journal at their paths are still those of this daemon.

        Raises:
            StorageError: another regd has taken over.
        """
        found = self._files.print(self._lock_path)
        if found is None or found.inode != self._lock_inode:
            if not self._relocks:
                self._is_taken_over = True
                raise StorageError(f"{self._lock_path} was removed: this regd ends, and writes nothing more")
            self._warn(f"{self._lock_path} was removed by another program; regd locks it again")
            if self._lock is not None:
                self._files.unlock(self._lock)
                self._lock = self._lock_inode = None  # another file may get that number now
            self._is_taken_over = True  # unless the lock is free
            self._take_lock()
            self._is_taken_over = False
        in_place = self._journal.is_in_place()
        if in_place is None:
            self._warn(f"{self._journal.path} was removed by another program; regd begins a new one")
            self._journal.forget_segment()
            self._lost, self._rewrites = True, None
        elif not in_place:
            self._is_taken_over = True
            raise StorageError(
                f"{self._journal.path} is not the file that this regd wrote: another regd was started on this "
                "registry; this one ends, and writes nothing more"
            )

    def _ensure_segment(self) -> None:
        """Have a segment that may be written to. Names in the folder change only while it is this daemon's."""
        if self._journal.is_open and not self._rotates and self._lock is not None:
            return
        self._check_owner()
        if self._journal.is_open:
            if self._rotates:
                self._rotate()
            return
        lost = self._lost
        if lost:
            self.checkpoint()  # first of all, since the journal no longer has what it had
        self._begin_segment()
        self._lost = False
        self._write_start()
        if not lost:
            self.checkpoint()

    def _rotate(self) -> None:
        """Begin another segment. If that fails, the present one becomes larger."""
        try:
            self._begin_segment()
        except OSError as error:
            if not self._journal.is_open:
                raise
            self._warn(f"cannot begin another segment of {self._journal.path}: {error.strerror}")
        self._rotates = False

    def _begin_segment(self) -> None:
        """Begin a segment; the first one is a copy of the last that was found, if its lines count."""
        if self._sets_aside and self._journal.segments:
            for path in self._journal.set_aside():
                self._warn(f"kept as {path}")
        self._sets_aside = False
        if self._rewrites is not None:
            self._journal.rewrite(self._rewrites)
            self._rewrites = None
            return
        epochs = dict(list(self.epochs.items())[-_EPOCHS_MAX:])
        head = Head(self._position.line + 1, self._rev, self._position.epoch, epochs, self._at)
        self._journal.begin_segment(head)

    # The checkpoint.

    @property
    def needs_checkpoint(self) -> bool:
        return not self._is_taken_over and (self._position != self._checkpointed or self._owes_checkpoint)

    def checkpoint(self) -> None:
        """Write the registry file as of now, and delete journal segments that are not kept any more.

        Raises:
            OSError: it could not be written; the journal has all changes.
        """
        with self._checkpointing:
            lock = self._files.print(self._lock_path)
            if lock is None or lock.inode != self._lock_inode:  # the next commit finds out what has happened
                raise FileNotFoundError(errno.ENOENT, "the lock file was removed", str(self._lock_path))
            with self._mutex:
                changed, self._changed = self._changed, {}
                rev, position = self._rev, self._position
                self._owes_checkpoint = True
            self._checkpoint.write(changed, rev, position, self._journal.sync_folder)
            self._checkpointed, self._owes_checkpoint = position, False
            self._rotates = self._journal.size >= self._limits.journal_segment_bytes_max
            self._journal.drop_old(position.line, self._limits.journal_bytes_max)

    # History.

    def page(self, query: Query) -> HistoryPage:
        """Return a page of the history on disk.

        Raises:
            OSError: it could not be read.
        """
        return history_pages.page(self._files, self._journal.segments, query)

    def close(self) -> None:
        """Close the journal, and release the lock. Idempotent."""
        self._journal.close()
        if self._lock is not None:
            self._files.unlock(self._lock)
            self._lock = None


def peek(path: Path, files: Files) -> Recovery:
    """Return what a registry holds, without locking it.

    Raises:
        OSError: it cannot be read.
        Unreadable: it is damaged.
    """
    data = Checkpoint(path, files, lambda line: None).read()
    document = None if data is None else parse(data, 0.0)
    segments = Journal(journal_path(path), files).find()
    return recover(document, segments, path, DEFAULT.history_changes_max)


def journal_path(path: Path) -> Path:
    return path.with_name(f"{path.name.removesuffix('.json')}.journal")


def _parse(path: Path, data: bytes, at: float) -> Document:
    try:
        return parse(data, at)
    except Unreadable as error:
        raise Unreadable(
            f"{path}: {error}; nothing was changed: correct the file, or move it away to start empty"
        ) from None


def _changes_nothing(change: Change) -> bool:
    """Whether a change is only of what is not stored, such as the connection of a holder."""
    return change.op is Op.KEEP and change.previous is not None and line(change.entry) == line(change.previous)
