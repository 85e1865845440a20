"""A crash after every operation: a start finds the old or the new state, and no acknowledged change is lost.

A store works on a real folder, and its `Files` reports each operation to a model of a disk. The model computes
every state of the disk that a power cut after an operation may leave. A new store starts on each of these states,
in memory.
"""

import errno
import itertools
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from regd.core.model import Change, Entry, Holder, Op, State, key_text
from regd.storage import journal_lines
from regd.storage.document import Document, parse
from regd.storage.files import Files
from regd.storage.recovery import Recovery
from regd.storage.store import StorageError, Store, peek
from regd.testing.memory import MemoryFiles
from tests.support.disk import Choices, Disk, DiskFiles, Found, Killed, Moment, QuickFiles, Trouble, outcomes
from tests.support.length import examples

FILE = Path("deep/down/registry.json")
LOADED_AT = 0.0


class Contents(NamedTuple):
    """The contents of a registry: its revision, and the names and ports of its entries."""

    rev: int = 0
    ports: frozenset[tuple[str, int]] = frozenset()


EMPTY = Contents()


def state_of(document: Document | Recovery) -> Contents:
    return Contents(document.rev, frozenset((key_text(entry.key), entry.port) for entry in document.entries))


@dataclass(frozen=True)
class Promise:
    """What a start after a crash may find.

    Attributes:
        committed: the state of the last acknowledged change.
        possible: other states, of changes that were not acknowledged.
        foreign: files that other programs have written; each must still be somewhere.
    """

    committed: Contents = EMPTY
    possible: tuple[Contents, ...] = ()
    foreign: tuple[bytes, ...] = ()


@dataclass
class Workload:
    """A store and its disk. `promises` has each promise with the range of moments at which it holds."""

    root: Path
    promises: list[tuple[int, int, Promise]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.disk = Disk(self.root)
        self.files = DiskFiles(self.disk)
        self.path = self.root / FILE
        self.now = EMPTY  # the state in effect
        self.saved = EMPTY  # the same without changes that are not on disk
        self.store: Store | None = None
        self._starts = 0
        self._written = 0
        self._promise = Promise()
        self._hidden: tuple[Contents, ...] = ()  # possible states before another program wrote the file
        self._since = 0

    def _promised(self, promise: Promise, *, from_next: bool = False) -> None:
        """Replace the promise. At the present moment both hold; with `from_next`, only the old one does."""
        now = len(self.disk.moments)
        self.promises.append((self._since, now, self._promise))
        self._promise, self._since = promise, now if from_next else now - 1

    def set_committed(self, state: Contents) -> None:
        """From now on only this state may be found."""
        self.now = self.saved = state
        self._hidden = ()
        self._promised(replace(self._promise, committed=state, possible=()))

    def allow(self, state: Contents) -> None:
        """From now on this state may be found too."""
        self._promised(replace(self._promise, possible=(*self._promise.possible, state)))

    def allow_overwrite(self) -> None:
        """From now on a checkpoint may replace the file that another program wrote.

        Lines of failed commits may still be in the journal, after the position of that checkpoint.
        """
        for state in (self.saved, *self._hidden):
            self.allow(state)

    # Operations.

    def start(self) -> None:
        """Open a store, as after a restart. Clients see its state, so the state counts as acknowledged."""
        if self.store is not None:
            self.store.close()
        self._starts += 1
        self.store = Store(self.path, lambda line: None, self.files, epoch=f"e{self._starts}")
        opened = state_of(self.store.open(LOADED_AT))
        assert opened in (self._promise.committed, *self._promise.possible)
        self._forget_present_file()  # a file of another program is the registry now
        self.store.begin()
        self.now = self.saved = opened
        if self.store._journal.is_open:  # otherwise the state that was found may not be durable
            self.set_committed(opened)

    def commit(self, changes: Sequence[Change], after: Contents) -> None:
        assert self.store is not None
        if self.is_edited:
            self.allow_overwrite()  # a checkpoint may come first
        self.allow(after)
        self.store.commit(changes)
        self.now = self.saved = after
        if not self.is_edited:
            self.set_committed(after)

    def checkpoint(self) -> None:
        assert self.store is not None
        self.allow_overwrite()
        self.store.checkpoint()
        if self.store._journal.is_open:  # else a failed line may still be on disk
            self._hidden = ()
            self._promised(replace(self._promise, committed=self.saved, possible=()))

    def confirm(self) -> None:
        """Answer `ok` to a request that changes nothing."""
        assert self.store is not None
        self.allow(self.now)
        self.store.ensure_saved()
        self.set_committed(self.now)

    @property
    def is_edited(self) -> bool:
        """Whether another program wrote or removed the file, so that a start finds that instead."""
        return not self.path.exists() or self.path.read_bytes().startswith(b'{"theirs"')

    def apply_unsaved(self, changes: Sequence[Change], after: Contents) -> None:
        assert self.store is not None
        self.store.apply_unsaved(changes)
        self.now = after

    def edit(self, how: str) -> None:
        """Write or remove the file, as another program."""
        if not self.path.parent.is_dir():
            return
        self._forget_present_file()
        self._hidden += self._promise.possible
        if how == "removed":
            self.path.unlink(missing_ok=True)
            self._promised(Promise(foreign=self._promise.foreign), from_next=True)
            self.disk.put(self.path, None)
            return
        self._written += 1
        data = b'{"theirs": {"port": %d}}' % self._written + b" " * self._written
        target = self.path if how == "in place" else self.path.with_name("their.new")
        target.write_bytes(data)
        # Without this, two edits in one tick of the clock would have equal times.
        os.utime(target, ns=(self._written, self._written))
        target.replace(self.path)
        theirs = Contents(1, frozenset([("theirs", self._written)]))
        self._promised(Promise(theirs, (), (*self._promise.foreign, data)), from_next=True)
        self.disk.put(self.path, data)

    def _forget_present_file(self) -> None:
        """No longer require a copy of the file that another program has written, if it is the present one."""
        there = self.path.read_bytes() if self.path.exists() else None
        foreign = tuple(data for data in self._promise.foreign if data != there)
        self._promised(replace(self._promise, foreign=foreign))

    def close(self) -> None:
        if self.store is not None:
            self.store.close()

    def promised(self, first: int) -> Iterator[tuple[Moment, Promise]]:
        """Yield each moment from `first` on with each promise that holds at it."""
        for begin, end, promise in (*self.promises, (self._since, len(self.disk.moments), self._promise)):
            for moment in self.disk.moments[max(begin, first) : end]:
                yield moment, promise


# Steps of a scenario.

Step = Callable[[Workload], None]


def changes_to(state: Contents, *wanted: tuple[str, int]) -> tuple[list[Change], Contents]:
    """Return the changes that give these names these ports, and the state after them. Port 0 removes a name."""
    rev, ports = state.rev, dict(state.ports)
    changes = []
    for name, port in wanted:
        before = ports.get(name, 0)
        if before == port:
            continue
        rev += 1
        op = Op.CHANGE if before and port else Op.UP if port else Op.DOWN
        changes.append(Change(rev, op, Entry(name, "", "127.0.0.1", port or before, {}, State.READY, rev, 0.0)))
        ports[name] = port
        ports = {name: port for name, port in ports.items() if port}
    return changes, Contents(rev, frozenset(ports.items()))


def batch(*wanted: tuple[str, int]) -> Step:
    """Commit a batch as the engine does."""

    def step(work: Workload) -> None:
        changes, after = changes_to(work.now, *wanted)
        assert work.store is not None
        if changes or work.store.has_unsaved:
            work.commit(changes, after)
        else:
            work.confirm()

    return step


def apply_unsaved(*wanted: tuple[str, int]) -> Step:
    def step(work: Workload) -> None:
        assert work.store is not None
        # As in the engine, the revisions are above those of lines that may be on disk.
        state = Contents(max(work.now.rev, work.store.rev_written), work.now.ports)
        changes, after = changes_to(state, *wanted)
        if changes:
            work.apply_unsaved(changes, after)

    return step


def change_holders(work: Workload) -> None:
    """Commit a change of holders: the line of the file changes, but not the revision or the port."""
    for name, port in sorted(work.now.ports)[:1]:
        entry = Entry(name, "", "127.0.0.1", port, {}, State.READY, 1, 0.0, (Holder(1, None, hold=True),))
        work.commit([Change(work.now.rev, Op.KEEP, entry)], work.now)


def write_unsynced(work: Workload) -> None:
    """Write a line like a daemon that is killed before the sync: the line is only in the kernel's memory."""
    assert work.store is not None
    [change], after = changes_to(work.now, ("unsynced", 1))
    fd = work.store._journal._fd
    if fd is not None:
        work.allow(after)
        work.files.write(fd, journal_lines.change(work.store._position.line + 1, change, 1))


def repair(work: Workload) -> None:
    work.commit([], work.now)


def checkpoint(work: Workload) -> None:
    work.checkpoint()


def rotate(work: Workload) -> None:
    """Make the next commit begin another segment, as after a checkpoint of a large one."""
    assert work.store is not None
    work.store._must_rotate = True


def restart(work: Workload) -> None:
    work.start()


def edit(how: str) -> Step:
    return partial(Workload.edit, how=how)


def run(root: Path, steps: Iterable[tuple[Step, Trouble | None, int]]) -> Workload:
    """Run steps. In each, the operation with the given number fails in the given way."""
    work = Workload(root)
    try:
        for step, trouble, due in steps:
            work.files.expect(trouble, due)
            try:
                step(work)
            except Killed:
                work.files.expect(None, 0)
                work.start()
            except (OSError, StorageError):
                work.files.expect(None, 0)
                if step is restart:
                    work.start()
    finally:
        work.files.expect(None, 0)
        work.close()
    return work


# Starts after a crash.


@dataclass(frozen=True)
class Start:
    """A start on a state of the disk, and the contents of all files before and after it."""

    opened: Contents
    registry: bytes | None  # the registry file that it found
    before: frozenset[bytes]
    after: frozenset[bytes]

    def check(self, promise: Promise, did: str) -> None:
        assert self.before.issuperset(promise.foreign), f"after {did}: a file of another program is lost"
        assert self.opened in (promise.committed, *promise.possible), f"after {did}"
        assert self.after.issuperset(set(promise.foreign) - {self.registry}), f"lost by a start after {did}"


class Crashes:
    """Starts on states of the disk, each state once, since the scenarios have many states in common."""

    def __init__(self) -> None:
        self._starts: dict[frozenset[Found], Start] = {}
        self._outcomes: dict[Choices, list[Start]] = {}
        self._good: set[tuple[Choices, Promise]] = set()

    def check(self, work: Workload, begin: int = 0) -> None:
        """Check every moment from `begin` on."""
        for moment, promise in work.promised(begin):
            choices = moment.choices()
            if (choices, promise) not in self._good:
                if choices not in self._outcomes:
                    states = {frozenset(left.items()) for left in outcomes(choices)}
                    self._outcomes[choices] = [self._start(state, moment.did) for state in states]
                for start in self._outcomes[choices]:
                    start.check(promise, moment.did)
                self._good.add((choices, promise))

    def _start(self, state: frozenset[Found], did: str) -> Start:
        if state not in self._starts:
            try:
                self._starts[state] = start_on(state)
            except BaseException as error:
                error.add_note(f"after {did}, with {sorted(state)}")
                raise
        return self._starts[state]


def start_on(left: Iterable[Found]) -> Start:
    """Start on a state of the disk, and commit a change."""
    files, path = MemoryFiles(), Path("/") / FILE
    for name, data in sorted(left):
        if data is None:
            files.make_folder(Path("/") / name)
        else:
            fd = files.create(Path("/") / name)
            files.write(fd, data)
            files.close(fd)
    before, registry = contents(files, path.parent), dict(left).get(str(FILE))
    store = Store(path, lambda line: None, files, epoch="after")
    opened = state_of(store.open(LOADED_AT))
    store.begin()
    changes, after = changes_to(opened, ("after", 1))
    store.commit(changes)
    assert state_of(peek(path, files)) == after
    store.checkpoint()
    store.close()
    assert state_of(parse(files.read(path), LOADED_AT)) == after
    assert not [name for name in files.names(path.parent) if name.endswith(".tmp")]
    return Start(opened, registry, before, contents(files, path.parent))


def contents(files: Files, folder: Path) -> frozenset[bytes]:
    return frozenset(files.read(folder / name) for name in files.names(folder))


SCENARIOS: Mapping[str, Sequence[Step]] = {
    "the first start": [restart, batch(("a", 1))],
    "changes": [restart, batch(("a", 1), ("b", 2)), batch(("a", 3), ("b", 0)), batch(("a", 3))],
    "other holders": [restart, batch(("a", 1)), change_holders, change_holders],
    "a repeated registration": [restart, batch(("a", 1)), batch(("b", 2)), batch(("a", 1)), batch(("b", 2))],
    "a restart": [restart, batch(("a", 1)), restart, batch(("a", 1)), batch(("a", 0))],
    "checkpoints": [restart, batch(("a", 1)), checkpoint, batch(("b", 2)), checkpoint, restart],
    "a checkpoint that is old": [restart, batch(("a", 1)), checkpoint, batch(("b", 2)), restart],
    "another segment": [restart, batch(("a", 1)), checkpoint, rotate, batch(("b", 2)), batch(("a", 0))],
    "segments and restarts": [restart, batch(("a", 1)), rotate, batch(("b", 2)), restart, batch(("b", 0))],
    "a killed commit": [restart, batch(("a", 1)), write_unsynced, restart, batch(("b", 2))],
    "an edit": [restart, batch(("a", 1)), edit("replaced"), batch(("b", 1)), checkpoint],
    "two edits": [restart, edit("in place"), checkpoint, edit("in place"), batch(("b", 1))],
    "a removed file": [restart, batch(("a", 1)), edit("removed"), batch(("b", 1)), checkpoint],
    "an edit, and a repeated registration": [restart, batch(("a", 1)), edit("in place"), batch(("a", 1))],
    "an edit, and a later change": [restart, batch(("a", 1)), edit("in place"), batch(("a", 0)), checkpoint],
    "an end on a failing disk": [restart, batch(("a", 1)), apply_unsaved(("a", 0)), repair],
}


@pytest.fixture(scope="module")
def crashes() -> Crashes:
    return Crashes()


@pytest.mark.parametrize("steps", SCENARIOS.values(), ids=SCENARIOS)
def test_crash_at_every_operation(tmp_path: Path, crashes: Crashes, steps: Sequence[Step]) -> None:
    (root := tmp_path / "disk").mkdir()
    crashes.check(run(root, [(step, None, 0) for step in steps]))


@pytest.mark.sample(30)
@pytest.mark.parametrize("trouble", Trouble)
@pytest.mark.parametrize("steps", SCENARIOS.values(), ids=SCENARIOS)
def test_crash_at_every_operation_after_a_failure(
    tmp_path: Path, crashes: Crashes, steps: Sequence[Step], trouble: Trouble
) -> None:
    """The daemon continues after the failure: it repairs the disk, or starts again if it was killed."""
    for troubled in range(len(steps)):
        for due in itertools.count():
            (root := tmp_path / f"{troubled}-{due}").mkdir()
            plan = [(step, trouble if at == troubled else None, due) for at, step in enumerate(steps)]
            work = run(root, plan)
            if not work.files.befell:
                break
            crashes.check(work, work.files.befell_at)


NAMES = st.sampled_from(["a", "b", "c"])
WANTED = st.lists(st.tuples(NAMES, st.integers(0, 3)), min_size=1, max_size=4)
STEPS = st.one_of(
    WANTED.map(lambda wanted: batch(*wanted)),
    WANTED.map(lambda wanted: batch(*wanted)),
    WANTED.map(lambda wanted: apply_unsaved(*wanted)),
    st.sampled_from([change_holders, repair, checkpoint, rotate, restart]),
    st.sampled_from([checkpoint, restart, edit("in place"), edit("replaced"), edit("removed")]),
)
TROUBLED = st.tuples(STEPS, st.none() | st.sampled_from(Trouble), st.integers(0, 12))


@settings(max_examples=examples(100), deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(TROUBLED, min_size=1, max_size=8))
def test_crash_in_a_random_history(crashes: Crashes, steps: list[tuple[Step, Trouble | None, int]]) -> None:
    with tempfile.TemporaryDirectory() as root:
        crashes.check(run(Path(root), [(restart, None, 0), *steps]))


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS, errno.EINVAL])
def test_unsyncable_parent_folder_does_not_stop_the_start(tmp_path: Path, number: int) -> None:
    """The parent may belong to root, or be on a read-only file system, or on one that cannot sync folders."""

    class Above(QuickFiles):
        def sync_folder(self, path: Path) -> None:
            if path == tmp_path.parent:
                raise OSError(number, os.strerror(number))

    store = Store(tmp_path / "registry.json", lambda line: None, Above())
    store.open(LOADED_AT)
    store.begin()
    store.close()
