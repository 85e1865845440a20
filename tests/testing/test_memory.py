"""`MemoryFiles` answers and fails as real files do."""

from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from regd.storage.files import AlreadyLocked, Files, Fingerprint
from regd.storage.store import StorageError, Store
from regd.testing.memory import MemoryFiles
from tests.storage.test_store import down, up
from tests.support.length import examples
from tests.support.stored import stored

NAMES = ("a", "deep/b")
NO_FILE = 1_000_000  # is open nowhere
OPERATIONS = [
    "make_folder",
    "sync_folder",
    "read",
    "rename",
    "create",
    "write",
    "sync",
    "close",
    "remove",
    "fingerprint",
    "fingerprint of an open file",
]


class Shelf:
    """One of the two doors, asked in names and numbers that mean the same at both."""

    def __init__(self, files: Files, root: Path) -> None:
        self._files = files
        self._root = root
        self._open: list[int] = []
        files.make_folder(root)

    def do(self, step: tuple[str, str, str, int]) -> object:
        """Return what came back, or the kind and number of the error."""
        operation, name, other, number = step
        files, path, at = self._files, self._root / name, self._root / other
        fd = self._open[number] if number < len(self._open) else NO_FILE
        table: dict[str, Callable[[], object]] = {
            "make_folder": lambda: files.make_folder(at.parent),
            "sync_folder": lambda: files.sync_folder(path.parent),
            "read": lambda: files.read(path),
            "rename": lambda: files.rename(path, at),
            "create": lambda: self._open.append(files.create(path)),
            "write": lambda: files.write(fd, name.encode()),
            "sync": lambda: files.sync(fd),
            "close": lambda: files.close(fd) or self._open.remove(fd),  # type: ignore[func-returns-value]
            "remove": lambda: files.remove(path),
            "fingerprint": lambda: size(files.fingerprint(path)),
            "fingerprint of an open file": lambda: size(files.fingerprint(fd)),
        }
        try:
            return table[operation]()
        except OSError as error:
            return type(error), error.errno

    def close(self) -> None:
        for fd in self._open:
            self._files.close(fd)


def size(print: Fingerprint | None) -> object:
    return None if print is None else (print.size, print.is_regular)


STEPS = st.tuples(
    st.sampled_from(OPERATIONS),
    st.sampled_from(NAMES),
    st.sampled_from(NAMES),
    st.integers(0, 2),
)


@settings(deadline=None, max_examples=examples(200))
@given(steps=st.lists(STEPS, min_size=10, max_size=40))
def test_memory_files_answer_like_real_files(steps: list[tuple[str, str, str, int]]) -> None:
    with TemporaryDirectory() as folder:
        real, ours = Shelf(Files(), Path(folder)), Shelf(MemoryFiles(), Path(folder))
        try:
            for step in steps:
                assert ours.do(step) == real.do(step), step
        finally:
            real.close()


@pytest.mark.parametrize("make", [Files, MemoryFiles])
def test_fingerprint_changes_with_every_write(tmp_path: Path, make: Callable[[], Files]) -> None:
    files = make()
    files.make_folder(tmp_path)
    prints = []
    for data in (b"a", b"a", b"b"):
        fd = files.create(tmp_path / "new")
        files.write(fd, data)
        written = files.fingerprint(fd)
        files.close(fd)
        files.rename(tmp_path / "new", tmp_path / "file")
        renamed = files.fingerprint(tmp_path / "file")
        assert renamed is not None
        assert written is not None
        assert renamed[:3] == written[:3]  # a rename changes only the time of change
        prints.append(written)
    assert len(set(prints[1:])) == 2


@pytest.mark.parametrize("make", [Files, MemoryFiles])
def test_lock_is_exclusive(tmp_path: Path, make: Callable[[], Files]) -> None:
    files = make()
    files.make_folder(tmp_path)
    with pytest.raises(FileNotFoundError):
        files.lock(tmp_path / "none/lock")
    held = files.lock(tmp_path / "lock")
    with pytest.raises(AlreadyLocked, match=r"\(process \d+\)"):
        files.lock(tmp_path / "lock")
    files.unlock(held)
    with pytest.raises(OSError, match="Bad file"):
        files.unlock(held)
    files.unlock(files.lock(tmp_path / "lock"))


NAME = st.sampled_from(["a", "b", "c"])


@settings(deadline=None)
@given(wanted=st.lists(st.tuples(NAME, st.integers(0, 3)), max_size=20))
def test_store_loads_committed_entries(wanted: list[tuple[str, int]]) -> None:
    """load(commit(x)) = x, after each commit, and nothing of it is on a disk."""
    path, files, warned = Path("/in-memory/registry.json"), MemoryFiles(), list[str]()
    held: dict[str, int] = {}
    for rev, (name, port) in enumerate(wanted, 1):
        store = Store(path, warned.append, files)
        document = store.open(0.0)
        store.begin()
        assert {entry.name: entry.port for entry in document.entries} == held
        with pytest.raises(StorageError, match="in use by another regd"):
            Store(path, warned.append, files).open(0.0)
        store.commit([up(rev, name, port) if port else down(rev, name)])
        if port:
            held[name] = port
        else:
            held.pop(name, None)
        store.close()
    if wanted:
        assert {name: entry.port for name, entry in stored(path, files).items()} == held
    assert warned == []
    assert not path.parent.exists()
