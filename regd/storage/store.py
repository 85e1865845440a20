"""`Store`: the registry on disk. Changes go to the journal, and `registry.json` is its checkpoint.

A change is "in effect" if readers see it. Usually that means that it is committed. But the end of a holder takes
effect even while the disk fails, and a line of a failed commit may be on disk without being in effect.
"""

import contextlib
import errno
import os
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

from regd.core.limits import DEFAULT, Limits
from regd.core.model import Change, Entry, Key, Op
from regd.storage import history_pages, journal_lines
from regd.storage.checkpoint import Checkpoint
from regd.storage.document import Document, Position, Unreadable, entry_line, parse
from regd.storage.files import AlreadyLocked, Files
from regd.storage.history_pages import HistoryPage, Query
from regd.storage.journal import Journal
from regd.storage.journal_lines import Head, Start
from regd.storage.recovery import Recovery, recover

_EPOCHS_MAX = 1_000  # ended epochs whose positions are kept, so that watches can resume after so many restarts
_NO_RIGHTS = (errno.EACCES, errno.EPERM, errno.EROFS)


class StorageError(Exception):
    """The registry cannot be used. The message is one line: what happened, where, and what to do."""


class Store:
    """The journal and `registry.json` of one daemon.

    Call `open`, then `begin`, then the other methods. All of them block. `commit`, `apply_unsaved` and
    `ensure_saved` must not overlap; `checkpoint` and `page` may be called in other threads at the same time.

        store = Store(path, print)
        recovery = store.open(time.time())
        store.begin()
        store.commit([Change(...)])
        store.close()

    Args:
        path: the path of `registry.json`. The journal and the lock file are beside it.
        warn: is called with a message for the log, in the thread of the call that has something to report.
        files: the file system; tests pass another one.
        limits: the limits in use.
        epoch: the epoch of this daemon; by default a random one.
        relocks: if the lock file is removed, lock it again. If false, `commit` raises `StorageError` instead,
            since the folder may belong to another registry by now.

    Attributes:
        path: the real path of `registry.json`.
        epoch: the epoch of this daemon.
        epochs: the ended epochs whose positions are valid, each with its last revision and line.
        created_folder: `open` has created the folder.
        rev_written: the highest revision that may be on disk, in effect or not.
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
        self.path = Path(os.path.realpath(path))  # so that a rename does not replace a symbolic link
        self.epoch = epoch or os.urandom(8).hex()
        self.epochs: dict[str, tuple[int, int]] = {}
        self.created_folder = False
        self.rev_written = 0
        self._warn = warn
        self._files = files = files or Files()
        self._limits = limits
        self._checkpoint = Checkpoint(self.path, files, warn)
        self._journal = Journal(journal_path(self.path), files)
        self._lock_path = self.path.with_name(self.path.name + ".lock")
        self._lock: int | None = None
        self._lock_inode: int | None = None
        # The lock file existed before `open`. If it did not, another daemon, whose lock file was removed, may
        # still write to the last segment.
        self._had_lock = False
        self._recovery = Recovery([], 0)
        self._start: Start | None = None  # the line that begins this epoch, until it is on disk
        self._unsaved: list[Change] = []  # changes in effect that the journal does not have yet
        # What to do before the next segment begins: set aside the journal that was found; or copy so many bytes
        # of its last segment; or write a checkpoint first, since the journal was removed.
        self._must_set_aside = False
        self._rewrite_bytes: int | None = None
        self._journal_lost = False
        self._must_rotate = False  # the next commit begins another segment, because the present one is large
        self._is_taken_over = False  # another daemon has the registry, so nothing is written any more
        self._checkpointing = threading.Lock()  # held while a checkpoint is written
        # What the journal has on disk. `_mutex` guards the fields that `checkpoint` reads in another thread.
        self._mutex = threading.Lock()
        self._rev = 0
        self._at = 0.0  # the time of the last change, in Unix seconds
        self._history_line = 0  # the number of the line with which the history begins
        self._position = Position("", 0)
        self._checkpointed = Position("", 0)
        self._changed: dict[Key, Entry | None] = {}  # entries changed since the last checkpoint; at first all
        self._owes_checkpoint = False  # the last checkpoint has failed

    # Start.

    def open(self, at: float) -> Recovery:
        """Create the folder, lock the registry and read it. A missing file is an empty registry.

        Except for the folder and the lock file, nothing is written.

        Args:
            at: the present time, in Unix seconds.

        Returns:
            The state of the registry.

        Raises:
            StorageError: another regd has locked the registry, or it cannot be read.
        """
        try:
            self.created_folder = self._files.make_folder(self.path.parent)
            self._had_lock = self._files.fingerprint(self._lock_path) is not None
            self._take_lock()
        except OSError as error:
            raise StorageError(
                f"cannot use the folder {self.path.parent}: {error.strerror}; "
                "give its rights to this user, or name another file with --registry"
            ) from error
        try:
            self._recovery = recovery = self._load(at)
        except BaseException:
            self.close()
            raise
        self._must_set_aside, self._rewrite_bytes = not recovery.keeps_journal, recovery.size
        self._start = Start(self.epoch, recovery.keeps_journal and recovery.valid, recovery.rev, at)
        self.epochs = dict(recovery.epochs)
        if self._start.valid and recovery.epoch:
            self.epochs[recovery.epoch] = (recovery.rev, recovery.line)
        self._rev = self.rev_written = recovery.rev
        self._at = at
        self._history_line = recovery.history_line
        self._position = self._checkpointed = Position(recovery.epoch, recovery.line)
        return recovery

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
        fingerprint = self._files.fingerprint(self._lock)
        self._lock_inode = fingerprint.inode if fingerprint else None

    def begin(self) -> None:
        """Prepare for commits: write the start of this epoch, and unless the last stop was clean, a checkpoint.

        If the file exists and the disk is full or fails, that is only a warning: the daemon can serve reads, and
        the next commit tries again.

        Raises:
            StorageError: the registry cannot be written.
        """
        exists, recovery, journal = self._checkpoint.exists, self._recovery, self._journal
        self._changed = {entry.key: entry for entry in recovery.entries}
        try:
            if exists and (obstacle := self._files.obstacle(self.path)):
                raise StorageError(
                    f"cannot replace {self.path}: {obstacle}, or name another file with --registry"
                )
            for note in recovery.notes:
                self._warn(note)
            is_clean = recovery.is_covered and self._had_lock
            if is_clean and recovery.size is not None and journal.segments[-1].path == journal.path:
                self._checkpoint.check_writable()  # first, so that a refused start changes nothing
                journal.resume(recovery.size)
                self._rewrite_bytes = None
                self._write_start()
                journal.sync_folder()  # the previous daemon may have been killed before it did
            else:
                self._begin_segment()
                self._write_start()
                self.checkpoint()
        except OSError as error:
            journal.close()
            if exists and error.errno not in _NO_RIGHTS:
                self._warn(f"cannot write in {self.path.parent}: {error.strerror}")
                return
            raise StorageError(
                f"cannot write {self.path}: {error.strerror}; give the rights on its folder to this user, "
                "or name another file with --registry"
            ) from error
        finally:
            self._recovery = Recovery([], 0)  # frees the memory of its lists

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
        """Whether there are changes in effect that the journal does not have."""
        return bool(self._unsaved)

    @property
    def needs_repair(self) -> bool:
        """Whether the disk may differ from what is in effect. A commit repairs that, even one without changes."""
        return self.has_unsaved or not self._journal.is_open or self._lock is None

    def commit(self, changes: Sequence[Change]) -> None:
        """Append changes to the journal, in one batch with those of earlier calls of `apply_unsaved`.

        When it returns, the changes are on disk. When it raises, they must not take effect. Their lines may be on
        disk all the same, so the next commit begins a segment that makes them void.

        Raises:
            OSError: the changes could not be written.
            StorageError: another regd has taken over the registry; this one must end.
        """
        stored = [change for change in (*self._unsaved, *changes) if not _changes_nothing(change)]
        if not stored and not self.needs_repair:
            return
        if not stored:
            self._ensure_segment()
            return
        self._append(stored)
        if not self._journal.is_open:  # it was removed while the lines were written
            self._append(stored)
        if not self._journal.is_open:
            raise FileNotFoundError(errno.ENOENT, "the journal was removed", str(self._journal.path))
        self._unsaved.clear()
        with self._mutex:
            self._at = stored[-1].at
            self._rev = max(self._rev, *(change.rev for change in stored if change.op is not Op.KEEP), 0)
            self._position = Position(self._position.epoch, self._position.line + len(stored))
            for change in stored:
                self._changed[change.entry.key] = None if change.op is Op.DOWN else change.entry

    def _append(self, changes: Sequence[Change]) -> None:
        """Append changes to the journal, and then check that this daemon still owns it."""
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
            journal.close()  # the lines are on disk, but not in effect
            raise

    def apply_unsaved(self, changes: Sequence[Change]) -> None:
        """Record changes that are in effect, but not on disk. The next commit writes them first."""
        self._unsaved += changes

    def ensure_saved(self) -> None:
        """Ensure that the disk has everything that is in effect.

        If another program has edited `registry.json`, it is written again. Call this before `ok` is sent for a
        request that changes nothing, since `ok` promises the same as after a commit.

        Raises:
            OSError: the registry could not be written.
            StorageError: another regd has taken over the registry; this one must end.
        """
        self._check_owner()
        if not self._journal.is_open:
            self._ensure_segment()
        elif self._checkpoint.is_edited():
            self.checkpoint()

    def _check_owner(self) -> None:
        """Check that the lock file and the journal at their paths are those of this daemon.

        If the lock file was removed, lock it again. If the journal was removed, close it.

        Raises:
            StorageError: another regd has taken over the registry.
        """
        fingerprint = self._files.fingerprint(self._lock_path)
        if fingerprint is None or fingerprint.inode != self._lock_inode:
            if not self._relocks:
                self._is_taken_over = True
                raise StorageError(f"{self._lock_path} was removed: this regd ends, and writes nothing more")
            self._warn(f"{self._lock_path} was removed by another program; regd locks it again")
            if self._lock is not None:
                self._files.unlock(self._lock)
                self._lock = self._lock_inode = None  # the kernel may use the number for another file
            self._is_taken_over = True  # unless `_take_lock` succeeds
            self._take_lock()
            self._is_taken_over = False
        in_place = self._journal.is_in_place()
        if in_place is None:
            self._warn(f"{self._journal.path} was removed by another program; regd begins a new one")
            self._journal.forget_segment()
            self._journal_lost, self._rewrite_bytes = True, None
        elif not in_place:
            self._is_taken_over = True
            raise StorageError(
                f"{self._journal.path} is not the file that this regd wrote: another regd was started on this "
                "registry; this one ends, and writes nothing more"
            )

    def _ensure_segment(self) -> None:
        """Open a segment for writing, if none is open or another one is due."""
        if self._journal.is_open and not self._must_rotate and self._lock is not None:
            return
        self._check_owner()
        if self._journal.is_open:
            if self._must_rotate:
                self._rotate()
            return
        was_lost = self._journal_lost
        if was_lost:
            self.checkpoint()  # before all else, since the changes that only the journal had are not on disk
        self._begin_segment()
        self._journal_lost = False
        self._write_start()
        if not was_lost:
            self.checkpoint()

    def _rotate(self) -> None:
        """Begin another segment. If that fails, continue with the present one."""
        try:
            self._begin_segment()
        except OSError as error:
            if not self._journal.is_open:
                raise
            self._warn(f"cannot begin another segment of {self._journal.path}: {error.strerror}")
        self._must_rotate = False

    def _begin_segment(self) -> None:
        """Begin a segment. The first one after a crash is a copy of the last segment."""
        if self._must_set_aside and self._journal.segments:
            for path in self._journal.set_aside():
                self._warn(f"kept as {path}")
        self._must_set_aside = False
        if self._rewrite_bytes is not None:
            self._journal.rewrite(self._rewrite_bytes)
            self._rewrite_bytes = None
            return
        epochs = dict(list(self.epochs.items())[-_EPOCHS_MAX:])
        head = Head(self._position.line + 1, self._rev, self._position.epoch, epochs, self._at)
        self._journal.begin_segment(head)

    # The checkpoint.

    @property
    def needs_checkpoint(self) -> bool:
        """Whether the journal has changes that `registry.json` lacks."""
        return not self._is_taken_over and (self._position != self._checkpointed or self._owes_checkpoint)

    def is_file_edited(self) -> bool:
        """Whether another program has changed or removed the file while this daemon has it locked."""
        with contextlib.suppress(OSError):
            lock = self._files.fingerprint(self._lock_path)
            is_owner = not self._is_taken_over and lock is not None and lock.inode == self._lock_inode
            return is_owner and self._checkpoint.is_edited()
        return False

    def checkpoint(self) -> None:
        """Write the present state to `registry.json`, and delete the oldest segments beyond the limits.

        Raises:
            OSError: the file could not be written. The journal still has all changes.
        """
        with self._checkpointing:
            lock = self._files.fingerprint(self._lock_path)
            if lock is None or lock.inode != self._lock_inode:  # the next commit finds out why
                raise FileNotFoundError(errno.ENOENT, "the lock file was removed", str(self._lock_path))
            with self._mutex:
                changed, self._changed = self._changed, {}
                rev, position = self._rev, self._position
                self._owes_checkpoint = True
            self._checkpoint.write(changed, rev, position, self._journal.sync_folder)
            self._checkpointed, self._owes_checkpoint = position, False
            self._must_rotate = self._journal.size >= self._limits.journal_segment_bytes_max
            self._journal.drop_old(position.line, self._limits.journal_bytes_max)

    # History.

    def page(self, query: Query) -> HistoryPage:
        """Return a page of the history from the journal.

        Raises:
            OSError: the journal could not be read.
        """
        return history_pages.page(self._files, self._journal.segments, query, self._history_line)

    def close(self) -> None:
        """Close the journal and release the lock. Idempotent."""
        self._journal.close()
        if self._lock is not None:
            self._files.unlock(self._lock)
            self._lock = None


def peek(path: Path, files: Files) -> Recovery:
    """Return the state of a registry on disk without locking it.

    A running daemon may write meanwhile, so the result may be old, or the call may fail.

    Raises:
        OSError: the registry cannot be read.
        Unreadable: it is damaged.
    """
    data = Checkpoint(path, files, lambda line: None).read()
    document = None if data is None else parse(data, 0.0)
    segments = Journal(journal_path(path), files).find()
    return recover(document, segments, path, DEFAULT.history_changes_max)


def journal_path(path: Path) -> Path:
    """Return the path of the journal of a registry file."""
    return path.with_name(f"{path.name.removesuffix('.json')}.journal")


def _parse(path: Path, data: bytes, at: float) -> Document:
    try:
        return parse(data, at)
    except Unreadable as error:
        raise Unreadable(
            f"{path}: {error}; nothing was changed: correct the file, or move it away to start empty"
        ) from None


def _changes_nothing(change: Change) -> bool:
    """Whether a change alters only what is not stored, for example the session of a holder."""
    return (
        change.op is Op.KEEP
        and change.previous is not None
        and entry_line(change.entry) == entry_line(change.previous)
    )
