"""The file `serve` of a project registry: the addresses of its `regctl serve`, one per line.

A running gateway keeps the file locked. A file that is not locked was left by a killed gateway, and counts as
missing. If a project has two gateways, the file has the addresses of the first until that gateway ends.
"""

import fcntl
import os
import re
import stat
from collections.abc import Sequence

from regd_client import project

__all__ = ["AddressFile", "read_addresses"]

_NAME = "serve"
_BYTES_MAX = 1_024
_ADDRESS = re.compile(r"(http|dns)://(127\.0\.0\.1|\[::1\]):[1-9][0-9]{0,4}")
_TRIES = 5  # attempts to lock the file: another program may read or remove it at that moment
_FLAGS = os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK


class AddressFile:
    """Writes the addresses of this gateway to the file, and removes it.

    Args:
        folder: the folder of the project registry.
    """

    def __init__(self, folder: str) -> None:
        self._folder = folder
        self._path = os.path.join(folder, _NAME)
        self._file: int | None = None  # the locked descriptor; the file was at the path when last checked

    def write(self, addresses: Sequence[str]) -> str:
        """Write the addresses, unless that was done already or the file belongs to another gateway.

        Returns:
            The reason why the addresses were not written; "" if the file has them.
        """
        if self._file is not None and not _is_at(self._path, self._file):
            os.close(self._file)
            self._file = None
        if self._file is not None:
            return ""
        if why := project.fault(self._folder):  # None: the folder was removed
            return f"{self._folder} cannot be used: {why}"
        try:
            file = _open_locked(self._path)
            if file is None:
                return f"{self._path} names another `regctl serve` of this project, until that one ends"
            try:
                os.ftruncate(file, 0)
                os.pwrite(file, "".join(f"{address}\n" for address in addresses).encode(), 0)
            except BaseException:
                os.close(file)
                raise
        except OSError as error:
            return f"{self._path} cannot be written: {error.strerror}"
        self._file = file
        return ""

    def close(self) -> None:
        """Remove the file if it belongs to this gateway. Idempotent."""
        if self._file is None:
            return
        file, self._file = self._file, None
        try:
            if _is_at(self._path, file):
                os.unlink(self._path)
        except OSError:
            pass  # without a lock, the file counts as missing
        finally:
            os.close(file)


def _open_locked(path: str) -> int | None:
    """Open and lock the file, and return its descriptor; None if another gateway has it locked."""
    for _ in range(_TRIES):
        file = os.open(path, os.O_RDWR | os.O_CREAT | _FLAGS, 0o600)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_at(path, file):
                return file
            is_taken = False  # a gateway that is ending has just removed the file
        except BlockingIOError:
            is_taken = _is_locked(file)  # a reader has it locked only for a moment
        except BaseException:
            os.close(file)
            raise
        os.close(file)
        if is_taken:
            break
    return None


def _is_at(path: str, file: int) -> bool:
    """Return whether the open file is still the one at its path."""
    try:
        return os.path.samestat(os.lstat(path), os.fstat(file))
    except OSError:
        return False


def read_addresses(folder: str) -> list[str]:
    """Return the addresses of the gateway that runs for a project registry; [] if there is none."""
    try:
        file = os.open(os.path.join(folder, _NAME), os.O_RDONLY | _FLAGS)
    except OSError:
        return []
    try:
        if not stat.S_ISREG(os.fstat(file).st_mode) or not _is_locked(file):
            return []
        text = os.pread(file, _BYTES_MAX, 0).decode("ascii", "replace")
    except OSError:
        return []
    finally:
        os.close(file)
    return [line for line in text.splitlines() if _ADDRESS.fullmatch(line)]


def _is_locked(file: int) -> bool:
    """Return whether a gateway has the file locked."""
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    return False
