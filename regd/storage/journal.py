"""`Journal`: the files of the journal. Lines are appended to the last segment, `registry.journal`.

Older segments are `registry.journal.N`, where N is the number of the first line. After a failed write or sync, a
segment is never written again: fsync(2) reports an error only once, so a later sync would prove nothing.
"""

import contextlib
import errno
import re
import threading
from dataclasses import dataclass
from pathlib import Path

from regd.storage import journal_lines
from regd.storage.files import UNSUPPORTED, Files
from regd.storage.journal_lines import Damaged, Head
from regd.storage.recovery import Segment

_HEAD_BYTES_MAX = 262_144  # the length of a segment's first line
_SEGMENTS_MAX = 256  # `journal_bytes_max` is not enough: crashes and a failing disk leave many small segments


@dataclass(slots=True)
class SegmentFile:
    """A segment on disk.

    Attributes:
        path: its present path.
        line: the number of its first line.
        rev: the revision before that line.
        at: when it began, in Unix seconds.
        size: its length in bytes.
    """

    path: Path
    line: int
    rev: int
    at: float
    size: int


class Journal:
    """The segments of the journal on disk.

    At first no segment is open. `resume`, `rewrite` and `begin_segment` open one, to which `append` writes;
    `close` and a failure close it.

    Attributes:
        path: the path of the last segment.
        segments: the segments, the oldest first.
    """

    def __init__(self, path: Path, files: Files) -> None:
        self.path = path
        self.segments: list[SegmentFile] = []
        self._files = files
        self._fd: int | None = None
        self._inode: int | None = None  # of the last segment, when this daemon found or wrote it
        self._mutex = threading.Lock()  # guards `segments`: `drop_old` runs in the thread that writes checkpoints

    @property
    def is_open(self) -> bool:
        """Whether `append` can write."""
        return self._fd is not None

    @property
    def size(self) -> int:
        """The length of the last segment in bytes."""
        return self.segments[-1].size if self.segments else 0

    def find(self) -> list[Segment]:
        """Find the segments on disk, and return them, the oldest first.

        Raises:
            FileExistsError: there is a folder or a device in the place of a segment.
        """
        files, folder = self._files, self.path.parent
        older = re.compile(re.escape(self.path.name) + r"\.([1-9][0-9]{0,18})")
        names = files.names(folder)
        numbers = sorted(int(match[1]) for name in names if (match := older.fullmatch(name)))
        paths = [self.path.with_name(f"{self.path.name}.{number}") for number in numbers]
        if self.path.name in names:
            paths.append(self.path)
        segments = [self._segment(path) for path in paths]
        for segment, number in zip(segments, [*numbers, 0], strict=False):
            head = None
            with contextlib.suppress(Damaged):  # the caller refuses such a segment, or sets it aside
                head = journal_lines.parse_head(segment.first)
            fingerprint = files.fingerprint(segment.path)
            line, rev, at = (head.line, head.rev, head.at) if head is not None else (number, 0, 0.0)
            self.segments.append(SegmentFile(segment.path, line, rev, at, fingerprint.size if fingerprint else 0))
            if segment.path == self.path and fingerprint is not None:
                self._inode = fingerprint.inode
        return segments

    def _segment(self, path: Path) -> Segment:
        fingerprint = self._files.fingerprint(path)
        if fingerprint is not None and not fingerprint.is_regular:  # opening a pipe would wait for its other end
            raise OSError(errno.EEXIST, "it is not a regular file", str(path))
        first = self._files.read(path, _HEAD_BYTES_MAX).partition(b"\n")[0]
        return Segment(path, first, lambda: self._files.read(path))

    def resume(self, size: int) -> None:
        """Open the last segment to append to it, and cut off what is after its first `size` bytes."""
        files, last = self._files, self.segments[-1]
        fd = files.append(self.path)
        try:
            if last.size > size:
                files.truncate(fd, size)
                files.sync(fd)
            fingerprint = files.fingerprint(fd)
        except BaseException:
            files.close(fd)
            raise
        last.size = size
        self._fd, self._inode = fd, fingerprint.inode if fingerprint else None

    def rewrite(self, size: int) -> None:
        """Replace the last segment by a copy of its first `size` bytes, and open the copy.

        The lines of a killed daemon may be only in the kernel's memory. Syncing the file would not help: if an
        earlier sync has failed, the next one succeeds although those lines are not on disk (fsync(2)).
        """
        last = self.segments[-1]
        self._begin(last.line, last.rev, last.at, self._files.read(last.path)[:size])

    def begin_segment(self, head: Head) -> None:
        """Begin a new segment and open it. Lines of older segments from `head.line` on are void from now on."""
        self._begin(head.line, head.rev, head.at, journal_lines.head(head))

    def _begin(self, line: int, rev: int, at: float, data: bytes) -> None:
        files = self._files
        temporary = self.path.with_name(self.path.name + ".tmp")
        fd = files.create(temporary)
        try:
            files.write(fd, data)
            files.sync(fd)
            fingerprint = files.fingerprint(fd)
            last = self.segments[-1] if self.segments else None
            if last is not None and last.path == self.path and last.line < line and files.fingerprint(self.path):
                self._rename_current(last)
            self._inode = None  # even if the rename fails, it may have taken effect
            files.rename(temporary, self.path)
            self.sync_folder()
        except BaseException:
            files.close(fd)
            with contextlib.suppress(OSError):
                files.remove(temporary)
            if self._inode is None:
                self.close()
            raise
        self.close()
        self._fd, self._inode = fd, fingerprint.inode if fingerprint else None
        void = [segment for segment in self.segments if segment.line >= line]
        older = [segment for segment in self.segments if segment.line < line and segment.path != self.path]
        with self._mutex:
            self.segments = [*older, SegmentFile(self.path, line, rev, at, len(data))]
        for segment in void:
            if segment.path != self.path:
                with contextlib.suppress(OSError):
                    files.remove(segment.path)

    def _rename_current(self, segment: SegmentFile) -> None:
        """Rename the last segment to `registry.journal.N`. In between it has both names, so it is never lost."""
        files, path = self._files, self.path.with_name(f"{self.path.name}.{segment.line}")
        if files.fingerprint(path) is not None:  # left by an attempt that failed
            files.remove(path)
        self._inode = None  # if a step fails, `_begin` closes the segment
        files.link(self.path, path)
        segment.path = path
        self.sync_folder()

    def append(self, data: bytes) -> None:
        """Append lines, and make them durable.

        Raises:
            OSError: they may be on disk or not, and the segment is closed. The caller must begin another segment
                at the number of the first of these lines, which makes them void.
        """
        assert self._fd is not None
        try:
            self._files.write(self._fd, data)
            self._files.sync_data(self._fd)
        except BaseException:
            self.close()
            raise
        self.segments[-1].size += len(data)

    def close(self) -> None:
        """Close the open segment, which is never written again. Idempotent."""
        if self._fd is not None:
            fd, self._fd = self._fd, None
            with contextlib.suppress(OSError):
                self._files.close(fd)

    def is_in_place(self) -> bool | None:
        """Whether the file at `path` is the segment that this daemon found or wrote; None if there is no file.

        True if this daemon has neither found nor written one.
        """
        if self._inode is None:
            return True
        fingerprint = self._files.fingerprint(self.path)
        return None if fingerprint is None else fingerprint.inode == self._inode

    def forget_segment(self) -> None:
        """Close the last segment and remove it from `segments`, since another program has removed its file."""
        self.close()
        self._inode = None
        with self._mutex:
            self.segments = self.segments[:-1]

    def set_aside(self) -> list[Path]:
        """Rename all segments to names with `.aside-`, so that a new journal can begin. Return the new paths."""
        names = set(self._files.names(self.path.parent))
        count = 1
        while any(f"{segment.path.name}.aside-{count}" in names for segment in self.segments):
            count += 1
        renamed = []
        self._inode = None
        while self.segments:
            path = self.segments[-1].path
            renamed.append(path.with_name(f"{path.name}.aside-{count}"))
            self._files.rename(path, renamed[-1])
            self.segments.pop()
        self.sync_folder()
        return renamed

    def drop_old(self, covered: int, bytes_max: int) -> None:
        """Delete the oldest segments while all together have more than `bytes_max` bytes, or are too many.

        A segment with a line after `covered`, the position of the checkpoint on disk, is never deleted.
        """
        with self._mutex:
            segments = self.segments
            total = sum(segment.size for segment in segments)
            count = 0
            while (
                (total > bytes_max or len(segments) - count > _SEGMENTS_MAX)
                and count + 1 < len(segments)
                and segments[count + 1].line - 1 <= covered
            ):
                total -= segments[count].size
                count += 1
            self.segments = segments[count:]
        for segment in segments[:count]:
            with contextlib.suppress(FileNotFoundError):
                self._files.remove(segment.path)

    def sync_folder(self) -> None:
        """Make the names in the folder durable, if the file system supports that."""
        try:
            self._files.sync_folder(self.path.parent)
        except OSError as error:
            if error.errno not in UNSUPPORTED:
                raise
