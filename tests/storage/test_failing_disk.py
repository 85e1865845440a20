"""A disk that fails at any operation, with every errno of a full or broken disk.

No acknowledged change is lost, no failed change is in effect, and after a failed write or sync, a segment is
never written again. `test_crash.py` tests the same with power cuts.
"""

import errno
import itertools
import os
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

from regd.core.limits import Limits
from regd.core.model import Change, Entry, Op, State
from regd.storage.files import Fingerprint
from regd.storage.store import Store, peek
from regd.testing.memory import MemoryFiles

PATH = Path("/r/registry.json")
JOURNAL = PATH.with_name("registry.journal")
ERRORS = [errno.ENOSPC, errno.EIO, errno.EDQUOT]


class FailingFiles(MemoryFiles):
    """Fails operation number `due`; with `lasting`, all later ones too. A failed write writes half its bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.error = 0
        self.due = self.count = 0
        self.lasting = False
        self.befell = ""
        self.failed: set[int] = set()  # descriptors
        self.written_after: list[int] = []  # failed descriptors that were written again

    def expect(self, error: int, due: int, *, lasting: bool) -> None:
        self.error, self.due, self.lasting, self.count = error, due, lasting, 0

    def _fail(self, operation: str, fd: int | None = None) -> None:
        self.count += 1
        if self.error and (self.count > self.due if self.lasting else self.count == self.due + 1):
            self.befell = self.befell or operation
            if fd is not None:
                self.failed.add(fd)
            raise OSError(self.error, os.strerror(self.error))

    def create(self, path: Path) -> int:
        self._fail("create")
        return super().create(path)

    def append(self, path: Path) -> int:
        self._fail("append")
        return super().append(path)

    def truncate(self, fd: int, size: int) -> None:
        self._fail("truncate", fd)
        super().truncate(fd, size)

    def write(self, fd: int, data: bytes) -> None:
        if fd in self.failed:
            self.written_after.append(fd)
        try:
            self._fail("write", fd)
        except OSError:
            super().write(fd, data[: len(data) // 2])
            raise
        super().write(fd, data)

    def sync(self, fd: int) -> None:
        self._fail("sync", fd)

    def sync_data(self, fd: int) -> None:
        self._fail("sync_data", fd)

    def rename(self, source: Path, target: Path) -> None:
        self._fail(f"rename {source.name}")
        super().rename(source, target)

    def link(self, source: Path, target: Path) -> None:
        self._fail("link")
        super().link(source, target)

    def remove(self, path: Path) -> None:
        self._fail("remove")
        super().remove(path)

    def sync_folder(self, path: Path) -> None:
        self._fail("sync_folder")
        super().sync_folder(path)

    def fingerprint(self, file: Path | int) -> Fingerprint | None:
        self._fail("fingerprint")
        return super().fingerprint(file)


class Disk:
    """A store on a disk that fails. `acknowledged` has the ports of the registrations that were committed."""

    def __init__(self, limits: Limits) -> None:
        self.files = FailingFiles()
        self.files.make_folder(PATH.parent)
        self.limits = limits
        self.warned: list[str] = []
        self.acknowledged: dict[str, int] = {}
        self.rev = 0
        self.start()

    def start(self) -> None:
        self.store = Store(PATH, self.warned.append, self.files, self.limits)
        found = self.store.open(0.0)
        self.store.begin()
        assert ports(found.entries) == self.acknowledged
        self.rev = found.rev

    def commit(self, name: str) -> bool:
        entry = Entry(name, "", "127.0.0.1", self.rev + 1, {}, State.READY, self.rev + 1, 0.0)
        try:
            self.store.commit([Change(self.rev + 1, Op.UP, entry)])
        except OSError:
            return False
        self.rev += 1
        self.acknowledged[name] = self.rev
        return True

    def checkpoint(self) -> bool:
        try:
            self.store.checkpoint()
        except OSError:
            return False
        return True


def ports(entries: Iterable[Entry]) -> dict[str, int]:
    return {entry.name: entry.port for entry in entries}


def append(disk: Disk) -> None:
    disk.commit("b")
    disk.commit("c")


def rotate(disk: Disk) -> None:
    disk.checkpoint()
    disk.commit("b")  # begins a segment
    disk.checkpoint()  # and deletes the one before
    disk.commit("c")


def edited(disk: Disk) -> None:
    """A checkpoint that copies a file that another program wrote."""
    disk.checkpoint()
    disk.files._files[PATH].data[:] = b'{"theirs": {"port": 1}}'
    disk.files._files[PATH].changes += 1
    disk.checkpoint()


WORK: dict[str, tuple[Limits, Callable[[Disk], object]]] = {
    "append": (Limits(), append),
    "rotate": (Limits(journal_segment_bytes_max=1, journal_bytes_max=1), rotate),
    "checkpoint": (Limits(), lambda disk: disk.checkpoint()),
    "edited": (Limits(), edited),
}


@pytest.mark.parametrize("error", ERRORS, ids=errno.errorcode.get)
@pytest.mark.parametrize("lasting", [False, True], ids=["once", "until it is repaired"])
@pytest.mark.parametrize("work", WORK)
def test_failure_at_each_step(work: str, lasting: bool, error: int) -> None:
    limits, does = WORK[work]
    failures = set()
    for due in itertools.count():
        disk, files = Disk(limits), None
        files = disk.files
        disk.commit("a")
        files.expect(error, due, lasting=lasting)
        does(disk)
        files.error = 0
        assert disk.commit("later")
        assert disk.checkpoint()
        assert disk.commit("last")
        assert files.written_after == []
        assert ports(peek(PATH, files).entries) == disk.acknowledged
        disk.store.close()
        disk.start()
        disk.store.close()
        if not files.befell:
            break
        failures.add(files.befell.split(" ")[0])
    assert failures >= {"write", "fingerprint"} | (
        {"sync_data"} if work in ("append", "rotate") else {"sync", "rename"}
    )


@pytest.mark.parametrize("error", ERRORS, ids=errno.errorcode.get)
@pytest.mark.parametrize("lasting", [False, True], ids=["once", "until it is repaired"])
@pytest.mark.parametrize("was", ["stopped", "killed", "torn"])
def test_failure_at_each_step_of_a_start(was: str, lasting: bool, error: int) -> None:
    """A start succeeds on a full disk: the acknowledged state is served, and the next commit begins a segment."""
    for due in itertools.count():
        disk = Disk(Limits())
        files = disk.files
        disk.commit("a")
        if was == "stopped":
            disk.checkpoint()
        if was == "torn":
            files._files[JOURNAL].data += b'{"line":3,"batch":2,'
        disk.store.close()
        disk.store = Store(PATH, disk.warned.append, files)
        assert ports(disk.store.open(0.0).entries) == {"a": 1}
        files.expect(error, due, lasting=lasting)
        disk.store.begin()
        if files.befell:
            assert "cannot write" in disk.warned[-1]
        disk.commit("b")
        files.error = 0
        assert disk.commit("later")
        assert files.written_after == []
        assert ports(peek(PATH, files).entries) == disk.acknowledged
        disk.store.close()
        disk.start()
        disk.store.close()
        if not files.befell:
            break


@pytest.mark.parametrize("error", ERRORS, ids=errno.errorcode.get)
def test_journal_is_set_aside_even_if_the_disk_fails_at_the_start(error: int) -> None:
    """The journal is renamed, at the start or before the first segment begins, and never deleted."""
    disk = Disk(Limits(journal_segment_bytes_max=1))
    disk.commit("a")
    disk.checkpoint()
    disk.commit("b")
    disk.store.close()
    files = disk.files
    before = [files.read(PATH.with_name(name)) for name in files.names(PATH.parent) if "journal" in name]
    assert len(before) == 3
    files._files[PATH].data[:] = b"{}"
    kept, journals = dict(files._files), {path: bytes(kept.data) for path, kept in files._files.items()}
    for due in itertools.count():
        files._files = dict(kept)
        for path, data in journals.items():
            files._files[path].data[:] = data
        files.befell = ""
        disk.store = Store(PATH, disk.warned.append, files)
        assert disk.store.open(0.0).entries == []
        files.expect(error, due, lasting=False)
        disk.store.begin()
        files.error = 0
        disk.acknowledged, disk.rev = {}, 0
        assert disk.commit("c")
        assert not [line for line in disk.warned if "was removed" in line]
        names = [name for name in files.names(PATH.parent) if ".aside-" in name]
        assert sorted(before) == sorted(files.read(PATH.with_name(name)) for name in names)
        disk.store.close()
        disk.start()
        disk.store.close()
        if not files.befell:
            break
