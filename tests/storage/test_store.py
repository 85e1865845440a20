"""The steps of a commit and a checkpoint, their failures, edits by other programs, and the lock."""

import errno
import json
import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from regd.core.model import Change, Entry, Op, State
from regd.storage import journal_lines
from regd.storage.files import Files
from regd.storage.history_pages import Query
from regd.storage.store import StorageError, Store
from tests.support.files import BROKEN, FULL, RecordedFiles


def up(rev: int, name: str, port: int = 1) -> Change:
    return Change(rev, Op.UP, Entry(name, "", "127.0.0.1", port, {}, State.READY, rev, 0.0))


def down(rev: int, name: str) -> Change:
    return Change(rev, Op.DOWN, up(rev, name).entry, "deregistered")


class Shelf:
    """A store, its recorded files, and its warnings."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "deep" / "registry.json"
        self.files = RecordedFiles()
        self.warned: list[str] = []
        self.store = self.again()
        self.store.open(0.0)
        self.store.begin()
        self.files.told.clear()

    def again(self) -> Store:
        return Store(self.path, self.warned.append, self.files)

    def save(self, *changes: Change) -> None:
        self.store.commit(changes)
        self.store.checkpoint()

    def reopened(self) -> dict[str, int]:
        """Restart the store, and return its entries."""
        self.store.close()
        self.store = self.again()
        found = self.store.open(0.0)
        self.store.begin()
        return {entry.name: entry.port for entry in found.entries}

    def held(self) -> dict[str, int]:
        """Return the contents of `registry.json`."""
        data = json.loads(self.path.read_bytes())
        return {key: value.get("port", value.get("rev")) for key, value in data.items()}


@pytest.fixture
def shelf(tmp_path: Path) -> Shelf:
    return Shelf(tmp_path)


def test_missing_registry_is_created_with_its_folders(shelf: Shelf) -> None:
    assert shelf.held() == {"$regd": 0}
    for name in ("registry.json", "registry.journal"):
        assert shelf.path.with_name(name).stat().st_mode & 0o777 == 0o600
    assert shelf.path.parent.stat().st_mode & 0o777 == 0o700


def test_commit_is_one_write_and_one_sync_of_the_journal(shelf: Shelf) -> None:
    shelf.store.commit([up(1, "a"), up(2, "b")])
    assert shelf.files.told == ["write", "sync_data"]
    assert shelf.held() == {"$regd": 0}  # the checkpoint comes later
    assert shelf.reopened() == {"a": 1, "b": 1}


def test_checkpoint_is_write_sync_rename_sync(shelf: Shelf) -> None:
    shelf.store.commit([up(1, "a"), up(2, "b")])
    before = shelf.store.needs_checkpoint
    shelf.files.told.clear()
    shelf.store.checkpoint()
    assert (before, shelf.store.needs_checkpoint) == (True, False)
    assert shelf.held() == {"$regd": 2, "a": 1, "b": 1}
    steps = [step for step in shelf.files.told if step != "write"]
    assert steps == ["create registry.json.tmp", "sync", "rename registry.json.tmp registry.json", "sync_folder"]
    assert shelf.files.told.index("sync") > max(at for at, step in enumerate(shelf.files.told) if step == "write")
    assert shelf.path.stat().st_mode & 0o777 == 0o600
    assert "registry.json.tmp" not in os.listdir(shelf.path.parent)


def test_changed_line_keeps_its_position(shelf: Shelf) -> None:
    shelf.save(up(1, "b"), up(2, "a"))
    shelf.save(Change(3, Op.CHANGE, up(3, "b", 2).entry))
    assert list(shelf.held()) == ["$regd", "b", "a"]
    shelf.save(down(4, "b"))
    assert shelf.held() == {"$regd": 4, "a": 1}


@pytest.mark.parametrize("step", ["write", "sync_data"])
@pytest.mark.parametrize("number", [FULL, BROKEN, errno.EDQUOT])
def test_failed_commit_is_void_and_the_next_begins_a_segment(shelf: Shelf, step: str, number: int) -> None:
    shelf.store.commit([up(1, "a")])
    shelf.files.failing[step] = number
    with pytest.raises(OSError, match=re.escape(os.strerror(number))):
        shelf.store.commit([down(2, "a"), up(3, "b"), up(4, "a", 2)])
    shelf.files.failing.clear()
    shelf.files.told.clear()
    shelf.store.commit([up(5, "c")])
    renames = [told for told in shelf.files.told if told.startswith("rename")]
    assert renames == [
        "rename registry.journal.tmp registry.journal",
        "rename registry.json.tmp registry.json",
    ]
    assert shelf.files.told[-2:] == ["write", "sync_data"]  # the segment and the checkpoint came before
    assert shelf.warned == []
    assert shelf.reopened() == {"a": 1, "c": 1}


@pytest.mark.parametrize("step", ["create", "write", "sync", "rename", "fingerprint", "sync_folder"])
@pytest.mark.parametrize("number", [FULL, BROKEN, errno.EDQUOT])
def test_failed_checkpoint_loses_nothing_and_the_next_succeeds(shelf: Shelf, step: str, number: int) -> None:
    shelf.save(up(1, "a"))
    shelf.store.commit([up(2, "b")])
    shelf.files.failing[step] = number
    with pytest.raises(OSError, match=re.escape(os.strerror(number))):
        shelf.store.checkpoint()
    assert shelf.store.needs_checkpoint
    assert "registry.json.tmp" not in os.listdir(shelf.path.parent)
    shelf.files.failing.clear()
    shelf.store.commit([up(3, "c")])
    shelf.store.checkpoint()
    assert shelf.held() == {"$regd": 3, "a": 1, "b": 1, "c": 1}
    assert shelf.warned == []


def test_leftover_temporary_file_does_not_stop_a_commit(shelf: Shelf) -> None:
    (shelf.path.parent / "registry.json.tmp").write_text("half a fi")
    shelf.save(up(1, "a"))
    assert shelf.held() == {"$regd": 1, "a": 1}


def test_second_store_is_refused(shelf: Shelf) -> None:
    other = shelf.again()
    with pytest.raises(StorageError, match=rf"in use by another regd \(process {os.getpid()}\)"):
        other.open(0.0)
    other.close()
    shelf.store.close()
    shelf.store.close()
    other.open(0.0)
    other.close()


@pytest.mark.parametrize(
    ("written", "says"),
    [
        (
            lambda boot, space: f"4711\n{boot} {space} here\n",
            "in use by another regd (process 4711); stop that one",
        ),
        (lambda boot, space: "4711\n", "in use by another regd (process 4711); stop that one"),  # of an older one
        (lambda boot, space: "", "in use by another regd; stop that one"),
        (lambda boot, space: "what\nis this", "in use by another regd; stop that one"),
        (lambda boot, space: f"4711\n0-1-2 {space} alpha\x1b\n", "in use by a regd on the machine alpha; name"),
        (
            lambda boot, space: f"1\n{boot} pid:[1] c0ffee\n",
            "in use by a regd in another container, c0ffee; name",
        ),
    ],
)
def test_lock_holder_elsewhere_is_not_named_by_pid(
    shelf: Shelf, written: Callable[[str, str], str], says: str
) -> None:
    """If the folder is on NFS or shared by containers, the number is that of no process here."""
    lock = shelf.path.with_name("registry.json.lock")
    pid, boot, space, host = lock.read_text().split()
    assert (int(pid), host) == (os.getpid(), os.uname().nodename)
    lock.write_text(written(boot, space))
    with pytest.raises(StorageError) as caught:
        shelf.again().open(0.0)
    assert says in str(caught.value)
    assert ("4711" in str(caught.value)) is ("process" in says)


def test_symlink_to_the_registry_is_followed(shelf: Shelf, tmp_path: Path) -> None:
    link = tmp_path / "link.json"
    link.symlink_to(shelf.path)
    with pytest.raises(StorageError, match="in use"):
        Store(link, shelf.warned.append).open(0.0)
    shelf.store.close()
    store = Store(link, shelf.warned.append)
    store.open(0.0)
    store.begin()
    store.commit([up(1, "a")])
    store.checkpoint()
    assert link.is_symlink()
    assert shelf.held() == {"$regd": 1, "a": 1}
    store.close()


def by_renaming(path: Path) -> None:
    new = path.with_name("new")
    new.write_text('{"mine": {"port": 9}}')
    new.replace(path)


EDITS: dict[str, Callable[[Path], object]] = {
    "in place": lambda path: path.write_text('{"mine": {"port": 9}}'),
    "replaced": by_renaming,
    "broken": lambda path: path.write_text('{"mine'),
}


@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS)
def test_external_edit_is_backed_up(shelf: Shelf, edit: Callable[[Path], object]) -> None:
    shelf.save(up(1, "a"))
    edit(shelf.path)
    theirs = shelf.path.read_text()
    shelf.save(up(2, "b"))
    assert shelf.held() == {"$regd": 2, "a": 1, "b": 1}
    assert shelf.path.with_name("registry.json.aside-1").read_text() == theirs
    assert len(shelf.warned) == 1
    assert "aside-1" in shelf.warned[0]
    edit(shelf.path)
    shelf.save(up(3, "c"))
    assert shelf.path.with_name("registry.json.aside-2").read_text() == theirs


def test_edit_is_noticed_only_while_the_registry_is_locked(shelf: Shelf) -> None:
    shelf.save(up(1, "a"))
    assert not shelf.store.is_file_edited()
    shelf.path.unlink()
    assert shelf.store.is_file_edited()
    shelf.path.with_name("registry.json.lock").unlink()
    assert not shelf.store.is_file_edited()


def test_removed_registry_is_written_again(shelf: Shelf) -> None:
    shelf.save(up(1, "a"))
    shelf.path.unlink()
    shelf.save(up(2, "b"))
    assert shelf.held() == {"$regd": 2, "a": 1, "b": 1}
    assert "removed" in shelf.warned[0]


@pytest.mark.parametrize("data", [b"", b"\0" * 64, b'{"a": {"port": 1}', b"[]", b'{"a": {"port": 1, "x": 2}}'])
def test_damaged_registry_is_left_unchanged(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "registry.json"
    path.write_bytes(data)
    before = path.stat()
    store = Store(path, print)
    with pytest.raises(StorageError) as refusal:
        store.open(0.0)
    assert str(path) in str(refusal.value)
    assert "nothing was changed" in str(refusal.value)
    assert path.read_bytes() == data
    assert path.stat().st_mtime_ns == before.st_mtime_ns
    path.write_bytes(b"{}")
    store.open(0.0)  # the lock was released
    store.close()


def test_registry_path_that_is_a_folder_is_reported(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="not a regular file"):
        Store(tmp_path, print).open(0.0)


def test_full_disk_does_not_stop_the_start(shelf: Shelf) -> None:
    shelf.save(up(1, "a"))
    shelf.store.close()
    shelf.files.failing["create"] = FULL
    store = shelf.again()
    assert [entry.name for entry in store.open(0.0).entries] == ["a"]
    store.begin()
    assert "No space left" in shelf.warned[-1]
    with pytest.raises(OSError, match="No space"):
        store.commit([up(2, "b")])
    shelf.files.failing.clear()
    store.commit([up(2, "b")])
    store.close()
    assert shelf.reopened() == {"a": 1, "b": 1}


def test_start_in_a_folder_without_write_access_changes_nothing(shelf: Shelf) -> None:
    shelf.save(up(1, "a"))
    shelf.store.close()
    journal = shelf.path.with_name("registry.journal")
    before = journal.read_bytes()
    shelf.files.failing["create"] = errno.EACCES
    store = shelf.again()
    store.open(0.0)
    with pytest.raises(StorageError, match="Permission denied; give the rights on its folder to this user"):
        store.begin()
    store.close()
    assert journal.read_bytes() == before


def test_touch_leaves_no_copy(shelf: Shelf) -> None:
    shelf.save(up(1, "a"))
    for rev in range(2, 202):
        shelf.path.touch()
        shelf.save(up(rev, f"a{rev}"))
    assert [name for name in os.listdir(shelf.path.parent) if "aside" in name] == []
    assert shelf.warned == []


def test_failing_checkpoints_make_one_copy(shelf: Shelf) -> None:
    shelf.save(up(1, "a"))
    shelf.path.write_text("{}")
    shelf.files.failing["rename"] = BROKEN
    for rev in range(2, 5):
        with pytest.raises(OSError):
            shelf.save(up(rev, f"a{rev}"))
    shelf.files.failing.clear()
    shelf.store.checkpoint()
    assert [name for name in os.listdir(shelf.path.parent) if "aside" in name] == ["registry.json.aside-1"]
    assert shelf.held() == {"$regd": 4, "a": 1, "a2": 1, "a3": 1, "a4": 1}


def test_number_of_copies_of_edits_is_limited(shelf: Shelf) -> None:
    for rev in range(1, 12):
        shelf.path.write_text(f'{{"mine": {{"port": {rev}}}}}')
        shelf.save(up(rev, "a"))
    copies = {name for name in os.listdir(shelf.path.parent) if "aside" in name}
    assert copies == {f"registry.json.aside-{number}" for number in range(7, 12)}


def test_edit_that_keeps_size_and_mtime_is_noticed(shelf: Shelf) -> None:
    shelf.save(up(1, "a", 5050))
    before = shelf.path.stat()
    theirs = shelf.path.read_text().replace("5050", "5051")
    with shelf.path.open("r+") as file:
        file.write(theirs)
    os.utime(shelf.path, ns=(before.st_atime_ns, before.st_mtime_ns))
    shelf.save(up(2, "b"))
    assert shelf.path.with_name("registry.json.aside-1").read_text() == theirs


def test_line_removed_by_hand_is_written_again_before_a_repeated_ok(shelf: Shelf) -> None:
    shelf.save(up(1, "a"))
    shelf.path.write_text("{}")
    shelf.store.ensure_saved()
    assert shelf.held() == {"$regd": 1, "a": 1}
    assert shelf.reopened() == {"a": 1}


def test_second_daemon_after_the_lock_file_was_removed(shelf: Shelf) -> None:
    """The first daemon ends, and writes nothing more."""
    shelf.store.commit([up(1, "a")])
    shelf.path.with_name("registry.json.lock").unlink()
    other = shelf.again()
    assert [entry.name for entry in other.open(0.0).entries] == ["a"]
    other.begin()
    other.commit([up(2, "b")])
    before = {path.name: path.read_bytes() for path in shelf.path.parent.iterdir()}
    with pytest.raises(StorageError, match="another regd"):
        shelf.store.commit([up(2, "c")])
    with pytest.raises(StorageError, match="another regd"):
        shelf.store.ensure_saved()
    assert {path.name: path.read_bytes() for path in shelf.path.parent.iterdir()} == before
    other.commit([up(3, "d")])
    other.close()
    assert shelf.reopened() == {"a": 1, "b": 1, "d": 1}


def test_second_daemon_in_a_folder_made_again(shelf: Shelf) -> None:
    shelf.store.commit([up(1, "a")])
    shelf.path.parent.rename(shelf.path.parent.with_name("moved"))
    other = shelf.again()
    assert other.open(0.0).entries == []
    other.begin()
    with pytest.raises(StorageError, match="another regd"):
        shelf.store.commit([up(2, "c")])
    other.commit([up(1, "b")])
    other.close()
    assert shelf.reopened() == {"b": 1}


def test_daemon_that_cannot_lock_again_does_not_touch_the_journal_of_the_next(shelf: Shelf) -> None:
    shelf.path.with_name("registry.json.lock").unlink()
    shelf.files.failing["lock"] = errno.ENOSPC
    with pytest.raises(OSError, match="No space"):
        shelf.store.commit([up(1, "a")])
    shelf.files.failing.clear()
    other = shelf.again()
    other.open(0.0)
    other.begin()
    before = {path.name: path.read_bytes() for path in shelf.path.parent.iterdir()}
    with pytest.raises(StorageError, match="in use"):
        shelf.store.commit([up(1, "b")])
    assert {path.name: path.read_bytes() for path in shelf.path.parent.iterdir()} == before
    other.close()


def test_removed_lock_file_is_locked_again(shelf: Shelf) -> None:
    shelf.path.with_name("registry.json.lock").unlink()
    shelf.store.commit([up(1, "a")])
    assert "locks it again" in shelf.warned[0]
    with pytest.raises(StorageError, match="in use"):
        shelf.again().open(0.0)


def test_removed_journal_is_replaced_after_a_checkpoint(shelf: Shelf) -> None:
    shelf.store.commit([up(1, "a")])
    shelf.path.with_name("registry.journal").unlink()
    shelf.files.told.clear()
    shelf.store.commit([up(2, "b")])
    renames = [told for told in shelf.files.told if told.startswith("rename")]
    assert renames == ["rename registry.json.tmp registry.json", "rename registry.journal.tmp registry.journal"]
    assert shelf.reopened() == {"a": 1, "b": 1}


def test_folder_that_cannot_be_synced(shelf: Shelf) -> None:
    shelf.files.failing["sync_folder"] = errno.EINVAL
    shelf.save(up(1, "a"))
    assert shelf.reopened() == {"a": 1}


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.ENOSYS])
def test_first_start_where_no_folder_can_be_synced(tmp_path: Path, number: int) -> None:
    files = RecordedFiles()
    files.failing["sync_folder"] = number
    store = Store(tmp_path / "new" / "folder" / "registry.json", print, files)
    store.open(0.0)
    store.begin()
    store.commit([up(1, "a")])
    store.checkpoint()
    store.close()


def test_obstacle_is_reported_at_the_start(shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    shelf.store.close()
    monkeypatch.setattr(shelf.files, "obstacle", lambda path: "it is a mount point of its own")
    store = shelf.again()
    store.open(0.0)
    with pytest.raises(StorageError, match=r"cannot replace .*registry\.json: it is a mount point"):
        store.begin()
    store.close()


def test_journal_of_a_newer_version_is_set_aside_too(shelf: Shelf) -> None:
    shelf.save(up(1, "a"))
    shelf.store.close()
    journal = shelf.path.with_name("registry.journal")
    newer = journal_lines._finish('{"format":2,"line":1')
    journal.write_bytes(newer)
    shelf.path.write_text('{"mine": {"port": 9}}')
    assert shelf.reopened() == {"mine": 9}
    assert shelf.path.with_name("registry.journal.aside-1").read_bytes() == newer
    assert shelf.reopened() == {"mine": 9}


def test_mount_point_is_an_obstacle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "my registry.json"
    path.write_text("{}")
    assert Files().obstacle(path) == ""
    mounts = f"36 35 98:0 / {tmp_path}/my\\040registry.json rw - ext4 /dev/sda rw\n"
    monkeypatch.setattr(Path, "read_text", lambda path, **options: mounts)
    assert "mount its folder instead" in Files().obstacle(path)


def test_file_of_another_user_in_a_sticky_folder_is_an_obstacle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "registry.json"
    path.write_text("{}")
    monkeypatch.setattr(os, "geteuid", lambda: path.stat().st_uid + 1)
    assert Files().obstacle(path) == ""
    tmp_path.chmod(0o1777)
    assert "in a sticky folder" in Files().obstacle(path)


def test_pid_written_by_hand_without_born_is_kept(shelf: Shelf) -> None:
    shelf.store.close()
    shelf.path.write_text('{"mine": {"port": 9, "pid": 4242}}')
    assert shelf.reopened() == {"mine": 9}
    assert json.loads(shelf.path.read_bytes())["mine"]["pid"] == 4242
    assert shelf.reopened() == {"mine": 9}


def test_torn_batch_is_cut_off_at_the_start(shelf: Shelf) -> None:
    shelf.store.commit([up(1, "a")])
    shelf.store.close()
    journal = shelf.path.with_name("registry.journal")
    with journal.open("ab") as file:
        file.write(b'{"line":3,"batch":2,')
    assert shelf.reopened() == {"a": 1}
    assert all(journal_lines.number_of(line) for line in journal.read_bytes().splitlines()[1:])


def test_history_begins_after_damage(shelf: Shelf) -> None:
    shelf.save(up(1, "a"))
    shelf.save(up(2, "b"))
    shelf.save(up(3, "c"))
    shelf.store.close()
    journal = shelf.path.with_name("registry.journal")
    journal.write_bytes(journal.read_bytes().replace(b'"name":"b"', b'"name":"x"'))
    assert shelf.reopened() == {"a": 1, "b": 1, "c": 1}
    assert [change["rev"] for change in shelf.store.page(Query(rev=3, limit=100)).changes] == [3]


def test_journal_that_another_program_replaced_is_not_written(shelf: Shelf) -> None:
    journal = shelf.path.with_name("registry.journal")
    copy = journal.with_name("copy")
    copy.write_bytes(journal.read_bytes())
    copy.replace(journal)
    before = journal.read_bytes()
    with pytest.raises(StorageError, match="is not the file that this regd wrote"):
        shelf.store.commit([up(1, "a")])
    assert journal.read_bytes() == before


def test_start_without_a_lock_file_writes_the_segment_again(shelf: Shelf) -> None:
    """A daemon whose lock file was removed may still write to the old one."""
    shelf.save(up(1, "a"))
    shelf.store.close()
    shelf.path.with_name("registry.json.lock").unlink()
    before = shelf.path.with_name("registry.journal").stat().st_ino
    assert shelf.reopened() == {"a": 1}
    assert shelf.path.with_name("registry.journal").stat().st_ino != before
