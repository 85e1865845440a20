"""A crash at every operation: the old or the new state loads, and nothing acknowledged is lost.

A real store works on a real folder, through `Files` that reports to a model of a disk. The model says what a power
cut after each operation may leave. A new store starts on each of these states, in memory.
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


class Held(NamedTuple):
    """What a registry says."""

    rev: int = 0
    ports: frozenset[tuple[str, int]] = frozenset()


NOTHING = Held()


def held(document: Document | Recovery) -> Held:
    return Held(document.rev, frozenset((key_text(entry.key), entry.port) for entry in document.entries))


@dataclass(frozen=True)
class Promise:
    """What a crash may leave at one moment, and what another hand wrote that must be somewhere."""

    settled: Held = NOTHING
    asked: tuple[Held, ...] = ()
    spared: tuple[bytes, ...] = ()


@dataclass
class Workload:
    """A store and its disk; `promises` has what was promised from which moment until which."""

    root: Path
    promises: list[tuple[int, int, Promise]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.disk = Disk(self.root)
        self.files = DiskFiles(self.disk)
        self.path = self.root / FILE
        self.now = NOTHING  # what is in effect
        self.saved = NOTHING  # the same without what is owed to the disk
        self.store: Store | None = None
        self._starts = 0
        self._written = 0
        self._promise = Promise()
        self._hidden: tuple[Held, ...] = ()  # asked and refused, before another hand wrote the file
        self._since = 0

    def _promised(self, promise: Promise, *, from_next: bool = False) -> None:
        """Both the last promise and this one hold now, between two operations; but not with `from_next`."""
        now = len(self.disk.moments)
        self.promises.append((self._since, now, self._promise))
        self._promise, self._since = promise, now if from_next else now - 1

    def settle(self, state: Held) -> None:
        """From here on it is this state, and no other."""
        self.now = self.saved = state
        self._hidden = ()
        self._promised(replace(self._promise, settled=state, asked=()))

    def ask(self, state: Held) -> None:
        """From here on it may be this state too."""
        self._promised(replace(self._promise, asked=(*self._promise.asked, state)))

    def ask_to_replace_theirs(self) -> None:
        """From here on a checkpoint may take the place of what another hand wrote.

        Lines that were refused before may still be in the journal, and fit that checkpoint.
        """
        for state in (self.saved, *self._hidden):
            self.ask(state)

    # What may happen.

    def start(self) -> None:
        """Open a store, as after a restart; what it serves from then on is as good as acknowledged."""
        if self.store is not None:
            self.store.close()
        self._starts += 1
        self.store = Store(self.path, lambda line: None, self.files, epoch=f"e{self._starts}")
        opened = held(self.store.open(LOADED_AT))
        assert opened in (self._promise.settled, *self._promise.asked)
        self._forget_theirs()  # what another hand wrote is the registry now
        self.store.begin()
        self.now = self.saved = opened
        if self.store._journal.is_open:  # else a power cut may still take what was found
            self.settle(opened)

    def commit(self, changes: Sequence[Change], after: Held) -> None:
        assert self.store is not None
        if self.is_foreign:
            self.ask_to_replace_theirs()  # a checkpoint may come first
        self.ask(after)
        self.store.commit(changes)
        self.now = self.saved = after
        if not self.is_foreign:
            self.settle(after)

    def checkpoint(self) -> None:
        assert self.store is not None
        self.ask_to_replace_theirs()
        self.store.checkpoint()
        if self.store._journal.is_open:  # else a failed line may still be on disk
            self._hidden = ()
            self._promised(replace(self._promise, settled=self.saved, asked=()))

    def confirm(self) -> None:
        """A request that changes nothing is answered `ok`."""
        assert self.store is not None
        self.ask(self.now)
        self.store.ensure_saved()
        self.settle(self.now)

    @property
    def is_foreign(self) -> bool:
        """Whether the file is of another hand, or missing: that is what a start would find."""
        return not self.path.exists() or self.path.read_bytes().startswith(b'{"theirs"')

    def owe(self, changes: Sequence[Change], after: Held) -> None:
        assert self.store is not None
        self.store.apply_unsaved(changes)
        self.now = after

    def hand(self, how: str) -> None:
        """Another hand puts a registry of its own in the place, or none."""
        if not self.path.parent.is_dir():
            return
        self._forget_theirs()
        self._hidden += self._promise.asked
        if how == "removed":
            self.path.unlink(missing_ok=True)
            self._promised(Promise(spared=self._promise.spared), from_next=True)
            self.disk.put(self.path, None)
            return
        self._written += 1
        data = b'{"theirs": {"port": %d}}' % self._written + b" " * self._written
        target = self.path if how == "in place" else self.path.with_name("their.new")
        target.write_bytes(data)
        os.utime(target, ns=(self._written, self._written))  # two edits in one tick are not told apart
        target.replace(self.path)
        theirs = Held(1, frozenset([("theirs", self._written)]))
        self._promised(Promise(theirs, (), (*self._promise.spared, data)), from_next=True)
        self.disk.put(self.path, data)

    def _forget_theirs(self) -> None:
        there = self.path.read_bytes() if self.path.exists() else None
        spared = tuple(data for data in self._promise.spared if data != there)
        self._promised(replace(self._promise, spared=spared))

    def close(self) -> None:
        if self.store is not None:
            self.store.close()

    def promised(self, first: int) -> Iterator[tuple[Moment, Promise]]:
        """Yield every moment from the first on with every promise that was in force at it."""
        for begin, end, promise in (*self.promises, (self._since, len(self.disk.moments), self._promise)):
            for moment in self.disk.moments[max(begin, first) : end]:
                yield moment, promise


# What a store is asked for.

Step = Callable[[Workload], None]


def changed(state: Held, *wanted: tuple[str, int]) -> tuple[list[Change], Held]:
    """Return the changes that give these names these ports, 0 for none, and the state behind them."""
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
    return changes, Held(rev, frozenset(ports.items()))


def batch(*wanted: tuple[str, int]) -> Step:
    """As the engine does it."""

    def step(work: Workload) -> None:
        changes, after = changed(work.now, *wanted)
        assert work.store is not None
        if changes or work.store.has_unsaved:
            work.commit(changes, after)
        else:
            work.confirm()

    return step


def owed(*wanted: tuple[str, int]) -> Step:
    def step(work: Workload) -> None:
        assert work.store is not None
        # As the engine does it: above the revisions of lines that may be on disk.
        state = Held(max(work.now.rev, work.store.rev_written), work.now.ports)
        changes, after = changed(state, *wanted)
        if changes:
            work.owe(changes, after)

    return step


def kept(work: Workload) -> None:
    """Other holders: the file's line changes, no revision, and here nothing that is looked at."""
    for name, port in sorted(work.now.ports)[:1]:
        entry = Entry(name, "", "127.0.0.1", port, {}, State.READY, 1, 0.0, (Holder(1, None, hold=True),))
        work.commit([Change(work.now.rev, Op.KEEP, entry)], work.now)


def unsynced(work: Workload) -> None:
    """A commit of a daemon that is killed before the sync: its line is in the kernel's memory alone."""
    assert work.store is not None
    [change], after = changed(work.now, ("unsynced", 1))
    fd = work.store._journal._fd
    if fd is not None:
        work.ask(after)
        work.files.write(fd, journal_lines.change(work.store._position.line + 1, change, 1))


def repaired(work: Workload) -> None:
    work.commit([], work.now)


def checkpointed(work: Workload) -> None:
    work.checkpoint()


def rotated(work: Workload) -> None:
    """The next commit begins another segment, as after a checkpoint of a large one."""
    assert work.store is not None
    work.store._must_rotate = True


def restarted(work: Workload) -> None:
    work.start()


def hand(how: str) -> Step:
    return partial(Workload.hand, how=how)


def run(root: Path, steps: Iterable[tuple[Step, Trouble | None, int]]) -> Workload:
    """Do the steps, each with the trouble that befalls its operation of that number."""
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
                if step is restarted:
                    work.start()
    finally:
        work.files.expect(None, 0)
        work.close()
    return work


# What must hold after a crash.


@dataclass(frozen=True)
class Start:
    """What a start finds on what a crash left, and the contents of the files before and after it."""

    opened: Held
    registry: bytes | None  # the registry file that it found
    before: frozenset[bytes]
    after: frozenset[bytes]

    def check(self, promise: Promise, did: str) -> None:
        assert self.before.issuperset(promise.spared), f"after {did}: what another hand wrote is lost"
        assert self.opened in (promise.settled, *promise.asked), f"after {did}"
        assert self.after.issuperset(set(promise.spared) - {self.registry}), f"lost by a start after {did}"


class Crashes:
    """Starts on what crashes leave, on each state once: lives have much in common."""

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
                self._starts[state] = started(state)
            except BaseException as error:
                error.add_note(f"after {did}, with {sorted(state)}")
                raise
        return self._starts[state]


def started(left: Iterable[Found]) -> Start:
    """Start on what a crash left, and change something at once."""
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
    opened = held(store.open(LOADED_AT))
    store.begin()
    changes, after = changed(opened, ("after", 1))
    store.commit(changes)
    assert held(peek(path, files)) == after
    store.checkpoint()
    store.close()
    assert held(parse(files.read(path), LOADED_AT)) == after
    assert not [name for name in files.names(path.parent) if name.endswith(".tmp")]
    return Start(opened, registry, before, contents(files, path.parent))


def contents(files: Files, folder: Path) -> frozenset[bytes]:
    return frozenset(files.read(folder / name) for name in files.names(folder))


A_LIFE: Mapping[str, Sequence[Step]] = {
    "the first start": [restarted, batch(("a", 1))],
    "changes": [restarted, batch(("a", 1), ("b", 2)), batch(("a", 3), ("b", 0)), batch(("a", 3))],
    "other holders": [restarted, batch(("a", 1)), kept, kept],
    "a change that is none": [restarted, batch(("a", 1)), batch(("b", 2)), batch(("a", 1)), batch(("b", 2))],
    "a restart": [restarted, batch(("a", 1)), restarted, batch(("a", 1)), batch(("a", 0))],
    "checkpoints": [restarted, batch(("a", 1)), checkpointed, batch(("b", 2)), checkpointed, restarted],
    "a checkpoint that is old": [restarted, batch(("a", 1)), checkpointed, batch(("b", 2)), restarted],
    "another segment": [restarted, batch(("a", 1)), checkpointed, rotated, batch(("b", 2)), batch(("a", 0))],
    "segments and restarts": [restarted, batch(("a", 1)), rotated, batch(("b", 2)), restarted, batch(("b", 0))],
    "a killed commit": [restarted, batch(("a", 1)), unsynced, restarted, batch(("b", 2))],
    "another hand": [restarted, batch(("a", 1)), hand("replaced"), batch(("b", 1)), checkpointed],
    "another hand twice": [restarted, hand("in place"), checkpointed, hand("in place"), batch(("b", 1))],
    "another hand that takes away": [restarted, batch(("a", 1)), hand("removed"), batch(("b", 1)), checkpointed],
    "another hand, and an ok for what was there": [restarted, batch(("a", 1)), hand("in place"), batch(("a", 1))],
    "a failure, then another hand": [restarted, batch(("a", 1)), hand("in place"), batch(("a", 0)), checkpointed],
    "an end on a failing disk": [restarted, batch(("a", 1)), owed(("a", 0)), repaired],
}


@pytest.fixture(scope="module")
def crashes() -> Crashes:
    return Crashes()


@pytest.mark.parametrize("steps", A_LIFE.values(), ids=A_LIFE)
def test_crash_at_every_operation(tmp_path: Path, crashes: Crashes, steps: Sequence[Step]) -> None:
    (root := tmp_path / "disk").mkdir()
    crashes.check(run(root, [(step, None, 0) for step in steps]))


@pytest.mark.sample(5)
@pytest.mark.parametrize("trouble", Trouble)
@pytest.mark.parametrize("steps", A_LIFE.values(), ids=A_LIFE)
def test_crash_at_every_operation_after_a_failure(
    tmp_path: Path, crashes: Crashes, steps: Sequence[Step], trouble: Trouble
) -> None:
    """And the daemon goes on from there: with a repair, and after it was killed with a start."""
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
    WANTED.map(lambda wanted: owed(*wanted)),
    st.sampled_from([kept, repaired, checkpointed, rotated, restarted]),
    st.sampled_from([checkpointed, restarted, hand("in place"), hand("replaced"), hand("removed")]),
)
TROUBLED = st.tuples(STEPS, st.none() | st.sampled_from(Trouble), st.integers(0, 12))


@settings(max_examples=examples(100), deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(TROUBLED, min_size=1, max_size=8))
def test_crash_in_a_random_history(crashes: Crashes, steps: list[tuple[Step, Trouble | None, int]]) -> None:
    with tempfile.TemporaryDirectory() as root:
        crashes.check(run(Path(root), [(restarted, None, 0), *steps]))


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS, errno.EINVAL])
def test_unsyncable_parent_folder_does_not_stop_the_start(tmp_path: Path, number: int) -> None:
    """As where it is of root, or a read-only file system that knows no such thing."""

    class Above(QuickFiles):
        def sync_folder(self, path: Path) -> None:
            if path == tmp_path.parent:
                raise OSError(number, os.strerror(number))

    store = Store(tmp_path / "registry.json", lambda line: None, Above())
    store.open(LOADED_AT)
    store.begin()
    store.close()
