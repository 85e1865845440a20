"""The storage's only access to files; tests replace it by one that records, fails or keeps files in memory.

One method is one system call where possible. The caller decides when something must be durable.
"""

import contextlib
import errno
import fcntl
import os
import re
import stat
from pathlib import Path
from typing import NamedTuple

UNSUPPORTED = (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS)  # folders cannot be synced: some FUSE and CIFS
# If a parent folder cannot be synced for one of these reasons, regd created nothing in it.
_NEVER_OURS = (errno.EACCES, errno.EPERM, errno.EROFS, *UNSUPPORTED)


_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK)
_HOLDER_BYTES = 512


class Fingerprint(NamedTuple):
    """What tells whether a file is still the one that regd wrote."""

    inode: int
    size: int
    mtime_ns: int
    ctime_ns: int  # no program can set it back
    is_regular: bool


class AlreadyLocked(Exception):
    """Another process has the lock. The text names it, as far as that is known, or is empty.

    `elsewhere`: that process runs on another machine or in another container, so its number means nothing here.
    """

    def __init__(self, who: str = "", *, elsewhere: bool = False) -> None:
        super().__init__(who)
        self.elsewhere = elsewhere


class Files:
    """The files of the operating system. Every method may raise `OSError`."""

    def make_folder(self, path: Path) -> bool:
        """Create a folder and its missing parents, and make them durable: a file is no safer than its folder.

        An existing folder is synced too, since a process may have been killed between creating and syncing it.

        Returns:
            Whether the folder was missing.
        """
        if path.is_dir():
            try:
                self.sync_folder(path.parent)
            except OSError as error:
                if error.errno not in _NEVER_OURS:
                    raise
            return False
        self.make_folder(path.parent)
        with contextlib.suppress(FileExistsError):
            path.mkdir(mode=0o700)
        try:
            self.sync_folder(path.parent)
        except OSError as error:
            if error.errno not in UNSUPPORTED:
                raise
        return True

    def names(self, folder: Path) -> list[str]:
        return os.listdir(folder)

    def read(self, path: Path, most: int = -1) -> bytes:
        """Return the contents of a file, or its first `most` bytes."""
        with path.open("rb", buffering=0) as file:
            return file.read(most) or b""

    def create(self, path: Path) -> int:
        """Create a file for writing that only this user may read. A file that a crash left there is replaced."""
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
        try:
            return os.open(path, flags, 0o600)
        except FileExistsError:
            os.unlink(path)
            return os.open(path, flags, 0o600)

    def append(self, path: Path) -> int:
        """Open a file for writing at its end."""
        return os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW)

    def truncate(self, fd: int, size: int) -> None:
        os.ftruncate(fd, size)

    def write(self, fd: int, data: bytes) -> None:
        view = memoryview(data)
        while view:
            view = view[os.write(fd, view) :]

    def sync(self, fd: int) -> None:
        os.fsync(fd)

    def sync_data(self, fd: int) -> None:
        """Make what was written durable. The time of change, for one, need not be."""
        _sync_data(fd)

    def close(self, fd: int) -> None:
        os.close(fd)

    def rename(self, source: Path, target: Path) -> None:
        os.replace(source, target)

    def link(self, source: Path, target: Path) -> None:
        """Give a file a second name. Where the file system has none, rename it."""
        try:
            os.link(source, target, follow_symlinks=False)
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            os.rename(source, target)

    def sync_folder(self, path: Path) -> None:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    def remove(self, path: Path) -> None:
        os.unlink(path)

    def print(self, file: Path | int) -> Fingerprint | None:
        """Return the fingerprint of a path or an open file, None if there is no file."""
        try:
            found = os.stat(file)
        except FileNotFoundError:
            return None
        is_regular = stat.S_ISREG(found.st_mode)
        return Fingerprint(found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns, is_regular)

    def obstacle(self, path: Path) -> str:
        """Return why this user cannot replace an existing file, as far as that shows; "" if nothing does."""
        with contextlib.suppress(OSError):
            mounts = Path("/proc/self/mountinfo").read_text(errors="surrogateescape").splitlines()
            if any(_unescaped(line.split(" ")[4]) == str(path) for line in mounts):
                return "it is a mount point of its own; mount its folder instead"
        found, folder = os.stat(path), os.stat(path.parent)
        if folder.st_mode & stat.S_ISVTX and os.geteuid() not in (0, found.st_uid, folder.st_uid):
            return f"it belongs to user {found.st_uid} in a sticky folder; move it to a folder of this user"
        return ""

    def lock(self, path: Path) -> int:
        """Lock a file until `unlock` or the end of this process, and return what `unlock` takes.

        Raises:
            AlreadyLocked: another process has the lock.
        """
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with contextlib.suppress(OSError):  # the text is only for messages, and may fail on a full disk
                os.ftruncate(fd, 0)
                os.write(fd, f"{os.getpid()}\n{' '.join(_place())} {os.uname().nodename}\n".encode())
        except BlockingIOError:
            text = os.read(fd, _HOLDER_BYTES).decode(errors="replace")
            os.close(fd)
            raise _held(text) from None
        except BaseException:
            os.close(fd)
            raise
        return fd

    def unlock(self, fd: int) -> None:
        os.close(fd)


_sync_data = getattr(os, "fdatasync", os.fsync)  # macOS has no fdatasync


def _unescaped(text: str) -> str:
    """Return a path of /proc/self/mountinfo, which has blanks and the like as octal numbers (proc(5))."""
    return re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), text)


def _place() -> list[str]:
    """Return the boot and the pid namespace: process numbers mean the same only where both are equal."""
    boot, namespace = os.uname().nodename, "-"
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    with contextlib.suppress(OSError):
        namespace = os.readlink("/proc/self/ns/pid")
    return [boot, namespace]


def _held(text: str) -> AlreadyLocked:
    """Return the exception, from what the holder of the lock wrote into the lock file."""
    pid, _, rest = text.partition("\n")
    words, place = rest.split(), _place()
    if len(words) == 3 and words[:2] != place:
        host = "".join(each for each in words[2] if each.isprintable())
        where = f"on the machine {host}" if words[0] != place[0] else f"in another container, {host}"
        return AlreadyLocked(f" {where}", elsewhere=True)
    return AlreadyLocked(f" (process {pid})" if pid.isdecimal() and len(pid) <= 10 else "")
