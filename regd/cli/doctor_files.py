"""`regctl doctor`: checks the files of a running daemon, as its next start would find them.

`registry.json` lags the daemon by up to a second and the journal has the changes since then, so both are read
together. The daemon may write them at the same time, so a fault is reported only if a second look finds it too.
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from regd.cli import local_probe
from regd.cli.findings import Finding
from regd.storage.document import Unreadable
from regd.storage.files import Files
from regd.storage.recovery import Recovery
from regd.storage.store import journal_path, peek

PAUSE_S = 0.5  # before the files are read again
_LOOKS = 4  # how often the files are read until nothing is wrong
_STALE_S = 60.0  # a registry file that has lacked changes for so long is reported
_SPARE_BYTES = 1_048_576  # free disk space needed in addition to the size of the registry file
_SHOWN_MAX = 5  # files named in a finding
_REWRITE = "change any registration: regd writes it again; its log has the reason if it cannot"


def examine(path: Path, revision: Callable[[], int], *, is_ours: bool) -> Iterator[Finding]:
    """Yield the findings about a registry file, its journal and its folder. Nothing is changed.

    `revision` is called to ask the daemon for its revision. `is_ours` is true if the daemon runs as this user.
    """
    try:
        yield from _room(path, is_ours=is_ours)
        yield from _content(path, revision)
        yield from _sync(path.parent)
        yield from _kept(path)
    except PermissionError:
        yield Finding("file", f"not checked: {path} belongs to another user")
    except FileNotFoundError:
        do = "create it again, as the user that runs regd; until then regd refuses all changes"
        yield Finding("file", f"the folder {path.parent} is gone", do)
    except OSError as error:
        yield Finding("file", f"{path} cannot be read: {error.strerror}", "check the disk")


def _room(path: Path, *, is_ours: bool) -> Iterator[Finding]:
    """Check whether the files can be written. For another user's daemon, check only the free space."""
    disk = os.statvfs(path.parent)
    size = path.stat().st_size if path.exists() else 0
    if disk.f_bavail * disk.f_frsize < 2 * size + _SPARE_BYTES or (disk.f_files and not disk.f_favail):
        text = f"the disk of {path.parent} is full"
        yield Finding("file", text, "free some space: regd appends to the journal, and rewrites the whole file")
    if disk.f_flag & os.ST_RDONLY or not (os.access(path.parent, os.W_OK) or not is_ours):
        yield Finding("file", f"{path.parent} cannot be written", "give the folder to the user that runs regd")


def _content(path: Path, revision: Callable[[], int]) -> Iterator[Finding]:
    """Compare the revision in the files with the daemon's."""
    for look in range(_LOOKS):
        if look:
            time.sleep(PAUSE_S)
        findings = list(_look(path, revision))
        if all(finding.ok for finding in findings):
            break
    yield from findings


def _look(path: Path, revision: Callable[[], int]) -> Iterator[Finding]:
    # The files must have at least the revision `needed`, since regd writes a change before it takes effect.
    journal, needed = journal_path(path), revision()
    if not path.exists() and path.parent.is_dir():
        yield Finding("file", f"{path} is gone", _REWRITE)
        return
    try:
        recovery = peek(path, Files())
    except FileNotFoundError:
        if not path.parent.is_dir():
            raise
        yield Finding("journal", f"a segment of {journal} was removed while it was read", "run doctor again")
        return
    except Unreadable as error:
        do = "change any registration, so that regd writes registry.json anew; else its next start fails"
        text = str(error).partition("; ")[0]  # leave out the advice, which is for a start that failed
        yield Finding("journal", text, do) if "journal" in text else Finding("file", f"{path}: {text}", do)
        return
    yield _judge_file(path, recovery, needed)
    yield from _judge_journal(journal, recovery, revision())


def _judge_file(path: Path, recovery: Recovery, needed: int) -> Finding:
    if recovery.is_edited:
        do = (
            "stop regd, edit the file, start regd; else the next change replaces the file, and keeps it as a copy"
        )
        return Finding("file", f"{path} was edited by hand, and the edit is not in effect", do)
    if recovery.rev < needed:
        held = f"{path} and its journal have revision {recovery.rev}, regd {needed}"
        return Finding("file", f"out of date: {held}", _REWRITE)
    if _is_stale(path, recovery.rev):
        do = "the log of regd says why it cannot write the file; free some space, or correct its rights"
        return Finding("file", f"{path} has not been written for a minute; the journal has later changes", do)
    return Finding("file", f"{path} and its journal are up to date, at revision {recovery.rev}")


def _judge_journal(journal: Path, recovery: Recovery, current: int) -> Iterator[Finding]:
    if not journal.exists():
        yield Finding("journal", f"{journal} is gone", _REWRITE)
    elif recovery.rev > current:
        what = f"{journal} has revision {recovery.rev} and regd {current}: a write failed, or takes long"
        yield Finding("journal", what, "see the log of regd; it begins a new segment once the disk works")
    else:
        for note in recovery.notes:
            yield Finding("journal", note, "see the log of regd, and check the disk")


def _is_stale(path: Path, rev: int) -> bool:
    """Return whether a file lacks changes for longer than writing it takes."""
    return (local_probe.revision(path) or 0) < rev and time.time() - path.stat().st_mtime > _STALE_S


def _sync(folder: Path) -> Iterator[Finding]:
    """Check whether the names in a folder can be made durable. Some FUSE and CIFS file systems cannot."""
    try:
        Files().sync_folder(folder)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.ENOENT):
            raise
        text = f"the file system cannot sync the folder {folder}: {error.strerror}"
        do = "keep the registry on a local disk: after a power failure, a file made just before may be missing"
        yield Finding("folder", text, do)


def _kept(path: Path) -> Iterator[Finding]:
    """Report the files that regd has set aside, since regd never deletes them."""
    beginnings = (f"{path.name}.aside-", f"{journal_path(path).name}.")
    names = sorted(
        name for name in Files().names(path.parent) if name.startswith(beginnings) and ".aside-" in name
    )
    if names:
        more = f" and {len(names) - _SHOWN_MAX} more" if len(names) > _SHOWN_MAX else ""
        count = "1 file" if len(names) == 1 else f"{len(names)} files"
        text = f"{count} set aside in {path.parent}: {', '.join(names[:_SHOWN_MAX])}{more}"
        yield Finding("kept", f"{text}; delete those that nobody needs")
