"""The file and the journal give the state, over random runs of a store with edits of the file between them."""

import json
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from regd.core.limits import Limits
from regd.core.model import Change, Entry, Op, State
from regd.storage.store import Store, peek
from regd.testing.memory import MemoryFiles
from tests.support.length import examples

PATH = Path("/r/registry.json")
NAMES = st.sampled_from("abcd")
BATCH = st.lists(st.tuples(NAMES, st.integers(0, 3)), min_size=1, max_size=3)
EDIT = st.lists(st.tuples(st.sampled_from("abcdx"), st.integers(0, 1).map(lambda up: 7 * up)), max_size=3)
LIFE = st.tuples(st.lists(BATCH | st.just("checkpoint"), max_size=6), st.booleans(), EDIT)


@settings(max_examples=examples(300))
@given(st.lists(LIFE, min_size=1, max_size=5), st.sampled_from([1, 8 * 1024**2]))
def test_checkpoint_and_journal_are_the_state(
    lives: list[tuple[list[list[tuple[str, int]] | str], bool, list[tuple[str, int]]]], segment_bytes: int
) -> None:
    """An edit of an entry counts, unless the journal has a later change of that entry than the checkpoint."""
    files = MemoryFiles()
    files.make_folder(PATH.parent)
    limits = Limits(journal_segment_bytes_max=segment_bytes)
    state: dict[str, int] = {}
    rev = 0
    for steps, is_clean, edit in lives:
        store = Store(PATH, lambda line: None, files, limits)
        found = store.open(0.0)
        assert {entry.name: entry.port for entry in found.entries} == state
        assert found.rev >= rev
        rev = found.rev
        store.begin()
        in_file, later = dict(state), dict[str, int]()
        for step in [*steps, *["checkpoint"] * is_clean]:
            if isinstance(step, str):
                store.checkpoint()
                in_file, later = dict(state), {}
                continue
            changes = []
            for name, port in step:
                rev += 1
                entry = Entry(name, "", "127.0.0.1", port or 1, {}, State.READY, rev, 0.0)
                changes.append(Change(rev, Op.UP if port else Op.DOWN, entry))
                later[name] = state[name] = port
            store.commit(changes)
            state = {name: port for name, port in state.items() if port}
        store.close()
        assert {entry.name: entry.port for entry in peek(PATH, files).entries} == state
        if edit:
            _edit(files, edit)
            state = {name: port for name, port in (in_file | dict(edit) | later).items() if port}


def _edit(files: MemoryFiles, edit: list[tuple[str, int]]) -> None:
    """Edit the file as a person would: give entries a port, or remove them."""
    document = json.loads(files.read(PATH))
    for name, port in edit:
        document.pop(name, None)
        if port:
            document[name] = {"port": port}
    fd = files.create(PATH)
    files.write(fd, json.dumps(document, indent=1).encode())
    files.close(fd)
