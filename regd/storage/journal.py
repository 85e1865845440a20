"""The journal's files: `registry.journal`, which is written, and older segments, `registry.journal.N`.

N is the number of a segment's first line. A segment that a write or sync has failed on is never written again.
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

_HEAD_BYTES = 262_144  # the head of a segment has at most so many
_SEGMENTS_MAX = 256  # crashes, and a disk that fails now and then, leave many small ones


@dataclass(slots=True)
class SegmentFile:
    """A segment on disk. Its lines are from `line` on, and their revisions are above `rev`."""

    path: Path
    line: int
    rev: int
    at: float  # Unix seconds: when it began
    size: int


class Journal:
    """The segments of the journal, the oldest first. While `is_open`, lines are appended to the last one."""

    def __init__(self, path: Path, files: Files) -> None:
        self.path = path
        self.segments: list[SegmentFile] = []
        self._files = files
        self._fd: int | None = None
        self._inode: int | None = None  # of the segment that is or was written to
        self._mutex = threading.Lock()  # for `segments`, which the thread that writes checkpoints shortens

    @property
    def is_open(self) -> bool:
        return self._fd is not None

    @property
    def size(self) -> int:
        return self.segments[-1].size if self.segments else 0

    def find(self) -> list[Segment]:
        """Return the segments on disk, oldest first."""
        files, folder = self._files, self.path.parent
        older = re.compile(re.escape(self.path.name) + r"\.([1-9][0-9]{0,18})")
        names = files.names(folder)
        numbers = sorted(int(found[1]) for name in names if (found := older.fullmatch(name)))
        paths = [self.path.with_name(f"{self.path.name}.{number}") for number in numbers]
        if self.path.name in names:
            paths.append(self.path)
        segments = [self._segment(path) for path in paths]
        for segment, number in zip(segments, [*numbers, 0], strict=False):
            head = None
            with contextlib.suppress(Damaged):  # `recover` refuses it, or it is set aside
                head = journal_lines.parse_head(segment.first)
            print_ = files.print(segment.path)
            line, rev, at = (head.line, head.rev, head.at) if head is not None else (number, 0, 0.0)
            self.segments.append(SegmentFile(segment.path, line, rev, at, print_.size if print_ else 0))
            if segment.path == self.path and print_ is not None:
                self._inode = print_.inode
        return segments

    def _segment(self, path: Path) -> Segment:
        found = self._files.print(path)
        if found is not None and not found.is_regular:  # opening a pipe would wait for its other end
            raise OSError(errno.EEXIST, "there is something else than a file in its place", str(path))
        first = self._files.read(path, _HEAD_BYTES).partition(b"\n")[0]
        return Segment(path, first, lambda: self._files.read(path))

    def resume(self, size: int) -> None:
        """Go on writing to the last segment, of which the first `size` bytes count."""
        files, last = self._files, self.segments[-1]
        fd = files.append(self.path)
        try:
            if last.size > size:
                files.truncate(fd, size)
                files.sync(fd)
            found = files.print(fd)
        except BaseException:
            files.close(fd)
            raise
        last.size = size
        self._fd, self._inode = fd, found.inode if found else None

    def rewrite(self, size: int) -> None:
        """Write the last segment again, of which the first `size` bytes count, and go on from there.

        Lines of a killed daemon may be in the kernel's memory alone. Syncing the file would not help: if its sync
        failed, the next one succeeds without those lines (fsync(2)).
        """
        last = self.segments[-1]
        self._begin(last.line, last.rev, last.at, self._files.read(last.path)[:size])

    def begin_segment(self, head: Head) -> None:
        """Begin a new segment; lines of older ones that are not before its first line are void from now on."""
        self._begin(head.line, head.rev, head.at, journal_lines.head(head))

    def _begin(self, line: int, rev: int, at: float, data: bytes) -> None:
        files = self._files
        temporary = self.path.with_name(self.path.name + ".tmp")
        fd = files.create(temporary)
        try:
            files.write(fd, data)
            files.sync(fd)
            found = files.print(fd)
            last = self.segments[-1] if self.segments else None
            if last is not None and last.path == self.path and last.line < line and files.print(self.path):
                self._give_number(last)
            self._inode = None  # a rename that fails may have taken effect
            files.rename(temporary, self.path)
            self.sync_folder()
        except BaseException:
            files.close(fd)
            with contextlib.suppress(OSError):
                files.remove(temporary)
            if self._inode is None:
                self.poison()
            raise
        self.poison()
        self._fd, self._inode = fd, found.inode if found else None
        void = [segment for segment in self.segments if segment.line >= line]
        older = [segment for segment in self.segments if segment.line < line and segment.path != self.path]
        with self._mutex:
            self.segments = [*older, SegmentFile(self.path, line, rev, at, len(data))]
        for segment in void:
            if segment.path != self.path:
                with contextlib.suppress(OSError):
                    files.remove(segment.path)

    def _give_number(self, segment: SegmentFile) -> None:
        """Give the current segment its lasting name. It has both names for a moment, so that it is never lost."""
        files, path = self._files, self.path.with_name(f"{self.path.name}.{segment.line}")
        if files.print(path) is not None:  # from an attempt that failed
            files.remove(path)
        self._inode = None  # from here on the segment is not written any more
        files.link(self.path, path)
        segment.path = path
        self.sync_folder()

    def append(self, data: bytes) -> None:
        """Write lines and make them durable.

        Raises:
            OSError: the lines do not count, once another segment has begun at their first line.
        """
        assert self._fd is not None
        try:
            self._files.write(self._fd, data)
            self._files.sync_data(self._fd)
        except BaseException:
            self.poison()
            raise
        self.segments[-1].size += len(data)

    def poison(self) -> None:
        """Never write to the current segment again. Idempotent."""
        if self._fd is not None:
            fd, self._fd = self._fd, None
            with contextlib.suppress(OSError):
                self._files.close(fd)

    close = poison

    def is_in_place(self) -> bool | None:
        """Whether the segment that is written to is still at its path; None if there is no file at all."""
        if self._inode is None:
            return True
        found = self._files.print(self.path)
        return None if found is None else found.inode == self._inode

    def forget_segment(self) -> None:
        """Go on without the segment that was written to: it was removed."""
        self.poison()
        self._inode = None
        with self._mutex:
            self.segments = self.segments[:-1]

    def set_aside(self) -> list[Path]:
        """Rename all segments, so that a new journal can begin. Return their new paths."""
        names = set(self._files.names(self.path.parent))
        count = 1
        while any(f"{segment.path.name}.aside-{count}" in names for segment in self.segments):
            count += 1
        made = []
        self._inode = None
        while self.segments:
            path = self.segments[-1].path
            made.append(path.with_name(f"{path.name}.aside-{count}"))
            self._files.rename(path, made[-1])
            self.segments.pop()
        self.sync_folder()
        return made

    def drop_old(self, covered: int, bytes_max: int) -> None:
        """Delete the oldest segments beyond `bytes_max` or of too many, but none with a line after `covered`."""
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
        """Make names in the folder durable, where the file system can do that: some FUSE and CIFS cannot."""
        try:
            self._files.sync_folder(self.path.parent)
        except OSError as error:
            if error.errno not in UNSUPPORTED:
                raise
