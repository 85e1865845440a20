"""`Files`: the only access of the storage to the file system.

Tests replace it by a class that records calls, fails, or keeps files in memory. Where possible, a method is one
system call. The caller decides what must be durable, and when.
"""

import contextlib
import errno
import fcntl
import os
import re
import stat
from pathlib import Path
from typing import NamedTuple

# Errors of fsync(2) on a folder if the file system cannot sync folders: some FUSE and CIFS.
UNSUPPORTED = (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS)
# After one of these errors, an existing folder needs no sync: regd cannot have created anything in it, or folders
# cannot be synced.
_CANNOT_CREATE = (errno.EACCES, errno.EPERM, errno.EROFS, *UNSUPPORTED)
_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK)  # link(2): no hard links
_LOCK_BYTES_MAX = 512  # read from a lock file


class Fingerprint(NamedTuple):
    """The properties of a file that show whether another program has changed or replaced it."""

    inode: int
    size: int
    mtime_ns: int
    ctime_ns: int  # unlike `mtime_ns`, programs cannot set it
    is_regular: bool


class AlreadyLocked(Exception):
    """Another process has the lock. The text describes it, or is empty if nothing is known about it.

    `elsewhere`: it runs on another machine or in another container, so its number means nothing here.
    """

    def __init__(self, who: str = "", *, elsewhere: bool = False) -> None:
        super().__init__(who)
        self.elsewhere = elsewhere


class Files:
    """The files of the operating system. Every method may raise `OSError`."""

    def make_folder(self, path: Path) -> bool:
        """Create a folder and its missing parents durably. Return whether it was missing.

        The parent of an existing folder is synced too, since an earlier process may have been killed before it
        did so.
        """
        if path.is_dir():
            try:
                self.sync_folder(path.parent)
            except OSError as error:
                if error.errno not in _CANNOT_CREATE:
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
        """Return the names in a folder, in any order."""
        return os.listdir(folder)

    def read(self, path: Path, most: int = -1) -> bytes:
        """Return the contents of a file, or its first `most` bytes."""
        with path.open("rb", buffering=0) as file:
            return file.read(most) or b""

    def create(self, path: Path) -> int:
        """Create a file that only this user can read, and open it for writing. Replace an existing file."""
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
        try:
            return os.open(path, flags, 0o600)
        except FileExistsError:
            os.unlink(path)
            return os.open(path, flags, 0o600)

    def append(self, path: Path) -> int:
        """Open an existing file for writing at its end."""
        return os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW)

    def truncate(self, fd: int, size: int) -> None:
        os.ftruncate(fd, size)

    def write(self, fd: int, data: bytes) -> None:
        """Write all of `data`."""
        view = memoryview(data)
        while view:
            view = view[os.write(fd, view) :]

    def sync(self, fd: int) -> None:
        """Make the file's data and metadata durable."""
        os.fsync(fd)

    def sync_data(self, fd: int) -> None:
        """Make the file's data durable, but not all metadata, such as the modification time (fdatasync(2))."""
        _sync_data(fd)

    def close(self, fd: int) -> None:
        os.close(fd)

    def rename(self, source: Path, target: Path) -> None:
        os.replace(source, target)

    def link(self, source: Path, target: Path) -> None:
        """Give a file a second name. If the file system does not support that, rename it."""
        try:
            os.link(source, target, follow_symlinks=False)
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            os.rename(source, target)

    def sync_folder(self, path: Path) -> None:
        """Make the names in a folder durable."""
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    def remove(self, path: Path) -> None:
        os.unlink(path)

    def fingerprint(self, file: Path | int) -> Fingerprint | None:
        """Return the fingerprint of the file at a path, or of an open file; None if it does not exist."""
        try:
            status = os.stat(file)
        except FileNotFoundError:
            return None
        is_regular = stat.S_ISREG(status.st_mode)
        return Fingerprint(status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns, is_regular)

    def obstacle(self, path: Path) -> str:
        """Return a reason why this user cannot replace a file, and what to do; "" if none is known."""
        with contextlib.suppress(OSError):
            mounts = Path("/proc/self/mountinfo").read_text(errors="surrogateescape").splitlines()
            if any(_unescaped(line.split(" ")[4]) == str(path) for line in mounts):
                return "it is a mount point of its own; mount its folder instead"
        file, folder = os.stat(path), os.stat(path.parent)
        if folder.st_mode & stat.S_ISVTX and os.geteuid() not in (0, file.st_uid, folder.st_uid):
            return f"it belongs to user {file.st_uid} in a sticky folder; move it to a folder of this user"
        return ""

    def lock(self, path: Path) -> int:
        """Create a file if it does not exist, and lock it until `unlock` or the end of this process.

        Returns:
            The descriptor for `unlock`.

        Raises:
            AlreadyLocked: another process has the lock.
        """
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with contextlib.suppress(OSError):  # the text is only for messages, and may fail on a full disk
                os.ftruncate(fd, 0)
                os.write(fd, f"{os.getpid()}\n{' '.join(_boot_and_namespace())} {os.uname().nodename}\n".encode())
        except BlockingIOError:
            text = os.read(fd, _LOCK_BYTES_MAX).decode(errors="replace")
            os.close(fd)
            raise _already_locked(text) from None
        except BaseException:
            os.close(fd)
            raise
        return fd

    def unlock(self, fd: int) -> None:
        os.close(fd)


_sync_data = getattr(os, "fdatasync", os.fsync)  # macOS has no fdatasync


def _unescaped(text: str) -> str:
    """Decode a path in /proc/self/mountinfo, in which blanks and some other characters are octal (proc(5))."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), text)


def _boot_and_namespace() -> list[str]:
    """Return the boot and the pid namespace of this process.

    A process number means the same process only to processes that have both in common.
    """
    boot, namespace = os.uname().nodename, "-"
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    with contextlib.suppress(OSError):
        namespace = os.readlink("/proc/self/ns/pid")
    return [boot, namespace]


def _already_locked(text: str) -> AlreadyLocked:
    """Return the exception for a lock file with this text, which the process with the lock has written."""
    pid, _, rest = text.partition("\n")
    words, own = rest.split(), _boot_and_namespace()
    if len(words) == 3 and words[:2] != own:
        host = "".join(char for char in words[2] if char.isprintable())
        where = f"on the machine {host}" if words[0] != own[0] else f"in another container, {host}"
        return AlreadyLocked(f" {where}", elsewhere=True)
    return AlreadyLocked(f" (process {pid})" if pid.isdecimal() and len(pid) <= 10 else "")
