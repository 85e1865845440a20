"""Project registries: the folder `.regd`, with a registry for all programs that are started in its parent folder.

With project registries, two checkouts or two CI jobs can use the same names. The folder is used only if this
user's `regctl init` made it at this place. A folder that came with a repository or a copied tree is ignored.
"""

from __future__ import annotations

import errno
import os
import stat
from contextlib import suppress
from typing import NamedTuple

__all__ = ["FOLDER", "Ignored", "ProjectError", "Search", "fault", "init", "search", "socket_path"]

FOLDER = ".regd"
_ID = "id"
_ID_BYTES_MAX = 8_192  # two numbers and a path
_IGNORE = ".gitignore"
_SOCKET = "regd.sock"
_TRIED = "try.sock"
# Files that `init` writes. It moves all other files away.
_OWN = (_ID, f"{_ID}.new", _IGNORE, f"{_IGNORE}.new", _TRIED)
_SET_ASIDE = "set-aside-"
# Errors of a full or read-only disk; any other error means that the file system has no Unix sockets.
_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


class Ignored(NamedTuple):
    """A folder named `.regd` that is not used, and why."""

    folder: str
    why: str

    @property
    def do(self) -> str:
        """What to do so that the folder is used."""
        return f"run `regctl init` in {os.path.dirname(self.folder)}, or remove it"


class Search(NamedTuple):
    """The result of a search: the folder of the project registry, or None, and the folders that were ignored."""

    folder: str | None
    ignored: tuple[Ignored, ...] = ()


class ProjectError(Exception):
    """A project registry cannot be created. The message is one line."""


def socket_path(folder: str) -> str:
    """Return the path of the socket of a project registry."""
    return os.path.join(folder, _SOCKET)


def search(start: str | None = None) -> Search:
    """Search a folder, by default the current one, and its parents for a project registry.

    The search ends at the home folder and at the root of a mount, both included.
    """
    try:
        at = os.getcwd() if start is None else os.path.realpath(start)
        device = os.stat(at).st_dev
    except OSError:  # the current folder was removed
        return Search(None)
    # Without HOME, for example in a cron job, `expanduser` uses the password database.
    home = os.path.realpath(os.path.expanduser("~"))
    ignored: list[Ignored] = []
    while True:
        folder = os.path.join(at, FOLDER)
        why = fault(folder)
        if why == "":
            return Search(folder, tuple(ignored))
        if why is not None:
            ignored.append(Ignored(folder, why))
        above = os.path.dirname(at)
        try:
            if at in (home, above) or os.stat(above).st_dev != device:
                return Search(None, tuple(ignored))
        except OSError:
            return Search(None, tuple(ignored))
        at = above


def fault(folder: str) -> str | None:
    """Return why a folder cannot be used as a project registry; "" if it can, None if it does not exist."""
    try:
        status = os.lstat(folder)
    except (FileNotFoundError, PermissionError):  # without permission, it is unknown whether it exists
        return None
    except OSError as error:
        return f"it cannot be read: {error.strerror}"
    if not stat.S_ISDIR(status.st_mode):
        return "it is a link" if stat.S_ISLNK(status.st_mode) else "it is no folder"
    if status.st_uid != os.geteuid():
        return f"it belongs to user {status.st_uid}, and this program runs as user {os.geteuid()}"
    if status.st_mode & 0o777 != 0o700:
        return f"its mode is {status.st_mode & 0o777:04o} and must be 0700"
    try:
        recorded = _read_id(folder)
    except FileNotFoundError:
        return "it was not made by `regctl init`"
    except (OSError, ValueError):
        return f"its file `{_ID}` is not as `regctl init` writes it"
    inode, device, path = recorded
    # The inode must match, and the path or the device: moving the folder changes its path, and a reboot may
    # change the device's number.
    if inode != status.st_ino or (device != status.st_dev and path != folder):
        return "it was copied or moved from elsewhere"
    return ""


def _read_id(folder: str) -> tuple[int, int, str]:
    """Return the inode, the device and the path that a folder had when it was created."""
    file = os.open(os.path.join(folder, _ID), os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        text = os.read(file, _ID_BYTES_MAX).decode("utf-8", "surrogateescape")
    finally:
        os.close(file)
    inode, device, path = text.removesuffix("\n").split(" ", 2)
    return int(inode), int(device), path


def init(parent: str) -> tuple[str, str | None]:
    """Create a project registry in a folder.

    Returns:
        The path of its folder `.regd`, and the folder into which existing files were moved, or None if there were
        none.

    Raises:
        ProjectError: the registry cannot be created.
    """
    folder = os.path.join(parent, FOLDER)
    try:
        folder = os.path.join(os.path.realpath(parent), FOLDER)  # fails if the current folder was removed
        is_new = _make(folder)
        try:
            return folder, _init(folder)
        except BaseException:
            if is_new:
                _remove(folder)
            raise
    except OSError as error:
        raise ProjectError(
            f"cannot make {folder}: {error.strerror}; run `regctl init` in a folder of yours"
        ) from None


def _make(folder: str) -> bool:
    """Create a folder that only this user can access. Return whether it is new."""
    try:
        os.mkdir(folder, 0o700)
    except FileExistsError:
        is_new = False
    else:
        is_new = True
    status = os.lstat(folder)
    if not stat.S_ISDIR(status.st_mode):
        kind = "a link" if stat.S_ISLNK(status.st_mode) else "no folder"
        raise ProjectError(f"{folder} is {kind}; move it away, then run `regctl init` again")
    if status.st_uid != os.geteuid():
        raise ProjectError(
            f"{folder} belongs to user {status.st_uid}; remove it, or run `regctl init` as that user"
        )
    os.chmod(folder, 0o700)
    return is_new


def _init(folder: str) -> str | None:
    """Write the files of a project registry, and return the folder into which existing files were moved, if any.

    The file `id` is written last, because clients use the folder as soon as it exists.
    """
    import fcntl

    place = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        fcntl.flock(place, fcntl.LOCK_EX)  # if `init` runs twice at once, the second finds a complete folder
        if fault(folder) == "":
            return None
        _check_sockets(place, folder)
        set_aside = _set_aside(folder)
        status = os.fstat(place)
        _write(folder, _IGNORE, "*\n")
        _write(folder, _ID, f"{status.st_ino} {status.st_dev} {folder}\n")
        return set_aside
    finally:
        os.close(place)


def _remove(folder: str) -> None:
    """Remove a new folder and the files of `init` after an error, so that no client warns about the folder."""
    for name in _OWN:
        with suppress(OSError):
            os.unlink(os.path.join(folder, name))
    with suppress(OSError):
        os.rmdir(folder)


def _set_aside(folder: str) -> str | None:
    """Move the files of a folder into a new folder inside it. Return the path of that; None without files."""
    names = [
        entry.name
        for entry in os.scandir(folder)
        if not (entry.name in _OWN and entry.is_file(follow_symlinks=False))
        and not entry.name.startswith(_SET_ASIDE)
    ]
    if not names:
        return None
    import tempfile

    to = tempfile.mkdtemp(prefix=_SET_ASIDE, dir=folder)
    for name in names:
        os.rename(os.path.join(folder, name), os.path.join(to, name))
    return to


def _check_sockets(place: int, folder: str) -> None:
    """Check that the file system supports Unix sockets. Some network and FUSE file systems do not.

    `place` is a descriptor of the folder: a path through it is short enough for a socket address.

    Raises:
        ProjectError: the file system has no Unix sockets.
    """
    import socket

    short = f"/proc/self/fd/{place}" if os.path.isdir("/proc/self/fd") else folder
    with suppress(OSError):
        os.unlink(_TRIED, dir_fd=place)  # left by an `init` that was killed
    try:
        with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as peer:
            listener.bind(f"{short}/{_TRIED}")
            listener.listen()
            peer.connect(f"{short}/{_TRIED}")
        os.unlink(_TRIED, dir_fd=place)
    except OSError as error:
        if error.errno in _DISK:
            raise
        raise ProjectError(
            f"{folder} is on a file system without Unix sockets ({error.strerror or error}); "
            "use a checkout on a local disk, or run `regd` and set REGD_ADDRESS"
        ) from None


def _write(folder: str, name: str, text: str) -> None:
    """Write a file atomically."""
    new = os.path.join(folder, f"{name}.new")
    file = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        os.write(file, text.encode("utf-8", "surrogateescape"))
    finally:
        os.close(file)
    os.replace(new, os.path.join(folder, name))
