"""The only door to the operating system's files; tests put a recording or failing one in its place.

One method, one system call where it can be: what is durable when is decided by who calls them.
Must not know what is in a file.
"""

import contextlib
import errno
import fcntl
import os
import stat
from pathlib import Path
from typing import NamedTuple

# Where a folder above cannot be synced for one of these, it was not we who made something in it.
_NEVER_OURS = (errno.EACCES, errno.EPERM, errno.EROFS, errno.EINVAL)


_HOLDER_BYTES = 512


class Fingerprint(NamedTuple):
    """What tells whether a file is still the one that we wrote."""

    inode: int
    size: int
    mtime_ns: int
    is_regular: bool


class AlreadyLocked(Exception):
    """Another process has the lock. Its text says which, as far as that is known, or is empty.

    `elsewhere`: that process runs on another machine or in another container, so its number means nothing here.
    """

    def __init__(self, who: str = "", *, elsewhere: bool = False) -> None:
        super().__init__(who)
        self.elsewhere = elsewhere


class Files:
    """The real thing. Every method may raise `OSError`."""

    def make_folder(self, path: Path) -> bool:
        """Make a folder and those above it that are missing, durably: a file is no safer than its folder.

        One that is there may be left by a process that was killed before it was durable.

        Returns:
            Whether it was missing.
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
        self.sync_folder(path.parent)
        return True

    def read(self, path: Path) -> bytes:
        return path.read_bytes()

    def create(self, path: Path) -> int:
        """Open a new file for writing, for this user alone. What a crash left there is removed first."""
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
        try:
            return os.open(path, flags, 0o600)
        except FileExistsError:
            os.unlink(path)
            return os.open(path, flags, 0o600)

    def write(self, fd: int, data: bytes) -> None:
        view = memoryview(data)
        while view:
            view = view[os.write(fd, view) :]

    def sync(self, fd: int) -> None:
        os.fsync(fd)

    def close(self, fd: int) -> None:
        os.close(fd)

    def rename(self, source: Path, target: Path) -> None:
        os.replace(source, target)

    def sync_folder(self, path: Path) -> None:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    def remove(self, path: Path) -> None:
        os.unlink(path)

    def print(self, file: Path | int) -> Fingerprint | None:
        """Return the print of a path or an open file, None where there is no file."""
        try:
            found = os.stat(file)
        except FileNotFoundError:
            return None
        return Fingerprint(found.st_ino, found.st_size, found.st_mtime_ns, stat.S_ISREG(found.st_mode))

    def lock(self, path: Path) -> int:
        """Lock a file until `unlock` or the end of this process, and return what `unlock` takes.

        Raises:
            Held: another process has it.
        """
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with contextlib.suppress(OSError):  # the words are a courtesy, also on a full disk
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


def _place() -> list[str]:
    """Return what tells where process numbers mean the same: this boot of a machine, and the pid namespace."""
    boot, namespace = os.uname().nodename, "-"
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    with contextlib.suppress(OSError):
        namespace = os.readlink("/proc/self/ns/pid")
    return [boot, namespace]


def _held(text: str) -> AlreadyLocked:
    """Make the exception from what the holder wrote into its lock file."""
    pid, _, rest = text.partition("\n")
    words, place = rest.split(), _place()
    if len(words) == 3 and words[:2] != place:
        host = "".join(each for each in words[2] if each.isprintable())
        where = f"on the machine {host}" if words[0] != place[0] else f"in another container, {host}"
        return AlreadyLocked(f" {where}", elsewhere=True)
    return AlreadyLocked(f" (process {pid})" if pid.isdecimal() and len(pid) <= 10 else "")
