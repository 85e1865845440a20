"""Project registries: the folder `.regd` of a checkout, with a registry for all programs that are started in it.

Two checkouts, or two CI jobs, use the same names without meeting. The folder is trusted only if this user's
`regctl init` made it at this place: one that came with a repository, or with a copied tree, does not count.
"""

from __future__ import annotations

import os
import socket
import stat
import tempfile
from contextlib import suppress
from typing import NamedTuple

__all__ = ["FOLDER", "Ignored", "ProjectError", "Search", "fault", "init", "search", "socket_path"]

FOLDER = ".regd"
_ID = "id"
_SOCKET = "regd.sock"
_KEPT = ("id", ".gitignore")  # of a folder that is begun again; all else is set aside
_SET_ASIDE = "set-aside"


class Ignored(NamedTuple):
    """A folder that looks like a project registry and is not used."""

    folder: str
    why: str


class Search(NamedTuple):
    """What a search for a project registry found: its folder, if any, and those that were passed over."""

    folder: str | None
    ignored: tuple[Ignored, ...] = ()


class ProjectError(Exception):
    """A project registry cannot be made there. The message is one line: what happened, where, what to do."""


def socket_path(folder: str) -> str:
    """Return the path of the socket of a project registry."""
    return os.path.join(folder, _SOCKET)


def search(start: str | None = None) -> Search:
    """Look for a project registry in a folder and its parents; by default in the current folder.

    The search ends at the home folder and at the root of a mount, both included.
    """
    try:
        at = os.getcwd() if start is None else os.path.realpath(start)
        device = os.stat(at).st_dev
    except OSError:  # the current folder was removed
        return Search(None)
    home = os.path.realpath(os.environ.get("HOME") or "/")
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
    """Return why a folder is no project registry to use; "" if it is one, None if there is nothing."""
    try:
        found = os.lstat(folder)
    except FileNotFoundError:
        return None
    except OSError as error:
        return f"it cannot be read: {error.strerror}"
    if not stat.S_ISDIR(found.st_mode):
        return "it is a link" if stat.S_ISLNK(found.st_mode) else "it is no folder"
    if found.st_uid != os.geteuid():
        return f"it belongs to user {found.st_uid}, and this program runs as user {os.geteuid()}"
    if found.st_mode & 0o777 != 0o700:
        return f"its mode is {found.st_mode & 0o777:04o} and must be 0700: run `regctl init` there"
    try:
        known = _read_id(folder)
    except FileNotFoundError:
        return "it was not made by `regctl init`: run that there"
    except (OSError, ValueError) as error:
        return f"its file `{_ID}` cannot be read ({error}): run `regctl init` there"
    inode, device, path = known
    # The inode and one of the others: a move changes the path, and a restart may change the number of a device.
    if inode != found.st_ino or (device != found.st_dev and path != folder):
        return "it was copied or moved from elsewhere: run `regctl init` there"
    return ""


def _read_id(folder: str) -> tuple[int, int, str]:
    """Return the inode, the device and the path that a folder had when it was made."""
    file = os.open(os.path.join(folder, _ID), os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        text = os.read(file, 8_192).decode("utf-8", "surrogateescape")
    finally:
        os.close(file)
    inode, device, path = text.removesuffix("\n").split(" ", 2)
    return int(inode), int(device), path


def init(parent: str) -> tuple[str, str | None]:
    """Make the project registry of a folder.

    Returns:
        Its folder `.regd`, and the folder into which files that were there were moved, None if there were none.

    Raises:
        ProjectError: it cannot be made there.
    """
    folder = os.path.join(os.path.realpath(parent), FOLDER)
    try:
        with suppress(FileExistsError):
            os.mkdir(folder, 0o700)
        found = os.lstat(folder)
        if not stat.S_ISDIR(found.st_mode):
            kind = "a link" if stat.S_ISLNK(found.st_mode) else "no folder"
            raise ProjectError(f"{folder} is {kind}; move it away, then run `regctl init` again")
        if found.st_uid != os.geteuid():
            raise ProjectError(
                f"{folder} belongs to user {found.st_uid}; remove it, or run `regctl init` as that user"
            )
        os.chmod(folder, 0o700)
        if fault(folder) == "":
            return folder, None
        set_aside = _set_aside(folder)
        _check_sockets(folder)
        _write(folder, ".gitignore", "*\n")
        _write(folder, _ID, f"{found.st_ino} {found.st_dev} {folder}\n")  # last: from now on it counts
    except OSError as error:
        raise ProjectError(
            f"cannot make {folder}: {error.strerror}; run `regctl init` in a folder of yours"
        ) from None
    return folder, set_aside


def _set_aside(folder: str) -> str | None:
    """Move what is in a folder into a new one inside it, and return that; None if there is nothing."""
    names = [name for name in os.listdir(folder) if name not in _KEPT and not name.startswith(_SET_ASIDE)]
    if not names:
        return None
    to = tempfile.mkdtemp(prefix=f"{_SET_ASIDE}-", dir=folder)
    for name in names:
        os.rename(os.path.join(folder, name), os.path.join(to, name))
    return to


def _check_sockets(folder: str) -> None:
    """Raise if the file system has no Unix sockets, as some network and FUSE file systems."""
    name = f"try-{os.getpid()}.sock"
    place = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as tried:
            tried.bind(
                f"/proc/self/fd/{place}/{name}" if os.path.isdir("/proc/self/fd") else os.path.join(folder, name)
            )
        os.unlink(name, dir_fd=place)
    except OSError as error:
        raise ProjectError(
            f"{folder} is on a file system without Unix sockets ({error.strerror or error}); "
            "use a checkout on a local disk, or run `regd` and set REGD_ADDRESS"
        ) from None
    finally:
        os.close(place)


def _write(folder: str, name: str, text: str) -> None:
    """Write a file whole, or not at all."""
    new = os.path.join(folder, f"{name}.new")
    file = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        os.write(file, text.encode("utf-8", "surrogateescape"))
    finally:
        os.close(file)
    os.replace(new, os.path.join(folder, name))
