"""The state that a file and a journal give, computed from bytes in memory."""

from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from regd.core.model import Change, Entry, Op, State
from regd.storage import journal_lines
from regd.storage.document import Document, Position, Unreadable, entry_line, file_chunks, parse
from regd.storage.journal_lines import Head, Start
from regd.storage.recovery import Recovery, Segment, recover
from tests.support.length import examples

FILE = Path("/r/registry.json")
JOURNAL = Path("/r/registry.journal")
HEAD = journal_lines.head(Head(1, 0, "", {}))


def entry(name: str, port: int, rev: int) -> Entry:
    return Entry(name, "", "127.0.0.1", port, {}, State.READY, rev, 0.0)


def up(rev: int, name: str, port: int = 1) -> Change:
    return Change(rev, Op.UP, entry(name, port, rev))


def down(rev: int, name: str) -> Change:
    return Change(rev, Op.DOWN, entry(name, 1, rev))


def batch(number: int, *changes: Change) -> bytes:
    lines = [
        journal_lines.change(at, change, len(changes) if at == number else 0)
        for at, change in enumerate(changes, number)
    ]
    return b"".join(lines)


def start(number: int, epoch: str = "e1", rev: int = 0, *, valid: bool = False) -> bytes:
    return journal_lines.start(number, Start(epoch, valid, rev, 0.0))


def segments(*contents: bytes) -> list[Segment]:
    count = len(contents)
    return [
        Segment(
            JOURNAL if at == count else JOURNAL.with_name(f"registry.journal.{at}"),
            data.partition(b"\n")[0],
            lambda data=data: data,  # type: ignore[misc]
        )
        for at, data in enumerate(contents, 1)
    ]


def checkpoint(number: int, rev: int = 0, *entries: Entry, epoch: str = "e1") -> Document:
    return Document(rev, list(entries), Position(epoch, number))


def ports(found: Recovery) -> dict[str, int]:
    return {entry.name: entry.port for entry in found.entries}


def recovered(document: Document | None, *contents: bytes) -> Recovery:
    return recover(document, segments(*contents), FILE, 100)


WHOLE = HEAD + start(1) + batch(2, up(1, "a"), up(2, "b"))
LAST = batch(4, up(3, "c"), down(4, "a"), up(5, "d"))


def test_lines_after_the_position_are_applied() -> None:
    found = recovered(checkpoint(2, 1, entry("a", 1, 1)), WHOLE + LAST)
    assert (ports(found), found.rev, found.line, found.epoch) == ({"b": 1, "c": 1, "d": 1}, 5, 6, "e1")
    assert (found.keeps_journal, found.valid, found.size, found.notes) == (True, True, len(WHOLE + LAST), [])
    assert found.history_line == 0
    assert [change.rev for change in found.history] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("rest", [b"", b"\0" * 4], ids=["cut", "zeroed"])
def test_torn_last_batch_is_cut_off_whole(rest: bytes) -> None:
    for cut in range(len(LAST)):
        tail = LAST[:cut] + rest
        found = recovered(checkpoint(1), WHOLE + tail)
        assert (ports(found), found.rev, found.line, found.size) == ({"a": 1, "b": 1}, 2, 3, len(WHOLE)), cut
        assert len(found.notes) == (1 if tail else 0)


@pytest.mark.parametrize("at", [at - 10 for at in accumulate(map(len, LAST.splitlines(keepends=True)))])
def test_damaged_line_of_the_last_batch_voids_it(at: int) -> None:
    found = recovered(checkpoint(1), WHOLE + LAST[:at] + b"\0" + LAST[at + 1 :])
    assert (ports(found), found.size) == ({"a": 1, "b": 1}, len(WHOLE))


def test_damage_before_a_later_batch_is_refused() -> None:
    broken = WHOLE[:-20] + b"#" + WHOLE[-19:]
    with pytest.raises(Unreadable, match=r"registry\.journal: line 5: line 2 of the journal should be here"):
        recovered(checkpoint(1), broken + LAST)


def test_damage_before_the_position_costs_history_alone() -> None:
    broken = WHOLE[:-20] + b"#" + WHOLE[-19:]
    found = recovered(checkpoint(4, 3, entry("b", 1, 2), entry("c", 1, 3)), broken + LAST)
    assert ports(found) == {"b": 1, "c": 1, "d": 1}
    assert [change.rev for change in found.history] == [4, 5]
    assert "history begins after the damage" in found.notes[0]
    assert (found.history_line, found.epochs) == (4, {})


def test_lines_of_a_poisoned_segment_are_void() -> None:
    following = journal_lines.head(Head(4, 2, "e1", {}))
    found = recovered(checkpoint(1), WHOLE + LAST, following + batch(4, up(6, "z")))
    assert (ports(found), found.rev, found.line) == ({"a": 1, "b": 1, "z": 1}, 6, 4)


def test_gap_between_segments() -> None:
    following = journal_lines.head(Head(5, 3, "e1", {})) + batch(5, up(4, "z"))
    with pytest.raises(Unreadable, match="line 4 of the journal should be here"):
        recovered(checkpoint(3, 2), WHOLE, following)
    found = recovered(checkpoint(4, 3, entry("c", 1, 3)), WHOLE, following)
    assert (ports(found), found.history_line) == ({"c": 1, "z": 1}, 5)


def test_damaged_head_of_a_segment() -> None:
    with pytest.raises(Unreadable, match=r"registry\.journal: line 1: is damaged"):
        recovered(checkpoint(3), b"#" + WHOLE)
    following = journal_lines.head(Head(4, 2, "e1", {})) + LAST
    with pytest.raises(Unreadable, match=r"registry\.journal\.1: line 1: is damaged"):
        recovered(checkpoint(2), b"#" + WHOLE, following)
    found = recovered(checkpoint(3, 2, entry("a", 1, 1)), b"#" + WHOLE, following)
    assert (ports(found), found.history_line) == ({"c": 1, "d": 1}, 4)
    assert len(found.notes) == 1
    assert found.notes[0].startswith("/r/registry.journal.1 is damaged")
    after_gap = journal_lines.head(Head(9, 7, "e1", {})) + batch(9, up(8, "z"))
    found = recovered(checkpoint(8, 7), b"#" + WHOLE, following, after_gap)
    assert [note.partition(" ")[0] for note in found.notes] == ["/r/registry.journal.1", "/r/registry.journal"]
    assert found.history_line == 9


@pytest.mark.parametrize("rev", [0, -1, 2**63])
def test_revision_of_no_change_is_refused(rev: int) -> None:
    with pytest.raises(Unreadable, match='"rev" must be'):
        recovered(checkpoint(3), WHOLE + batch(4, up(rev, "c")))


def test_revision_never_goes_back() -> None:
    found = recovered(checkpoint(3), WHOLE + batch(4, up(1, "c")))
    assert (found.rev, found.valid) == (2, False)


def test_keep_of_an_entry_removed_by_hand_has_a_revision() -> None:
    """Even after a gap, where the revision before the line is not known."""
    kept = journal_lines.change(5, Change(3, Op.KEEP, entry("a", 1, 1)), 1)
    following = journal_lines.head(Head(5, 0, "", {})) + kept
    [found] = recovered(checkpoint(4, 0), WHOLE, following).entries
    assert (found.name, found.rev) == ("a", 1)


def test_newer_format_is_refused() -> None:
    newer = journal_lines._finish('{"format":2,"line":1')
    with pytest.raises(Unreadable, match="format 2 is of another version"):
        recovered(checkpoint(0), newer)


@pytest.mark.parametrize(
    "document", [None, Document(3, [entry("x", 1, 1)]), checkpoint(9), checkpoint(3, epoch="e9")]
)
def test_journal_that_does_not_fit_the_file_is_set_aside(document: Document | None) -> None:
    found = recovered(document, WHOLE)
    assert not found.keeps_journal
    assert found.entries == ([] if document is None else document.entries)
    assert len(found.notes) == 1


def test_missing_journal_is_a_warning() -> None:
    found = recovered(checkpoint(3, 2, entry("a", 1, 1)))
    assert (ports(found), found.valid, found.keeps_journal) == ({"a": 1}, False, False)
    assert "missing" in found.notes[0]


def test_edit_by_hand_counts_and_later_lines_apply_on_top() -> None:
    position = Position("e1", 3)
    data = b"".join(file_chunks(2, position, [entry_line(entry("a", 1, 1)), entry_line(entry("b", 1, 2))]))
    edited = parse(data.replace(b'"b": {"port": 1,', b'"b": {"port": 7,'), 0.0)
    found = recovered(edited, WHOLE + LAST)
    assert ports(found) == {"b": 7, "c": 1, "d": 1}
    assert (found.valid, found.history, found.history_rev) == (False, [], 5)


def test_epochs_stay_while_positions_are_valid() -> None:
    data = WHOLE + start(4, "e2", 2, valid=True) + batch(5, up(3, "c"))
    found = recovered(checkpoint(1), data)
    assert (found.epoch, found.epochs) == ("e2", {"e1": (2, 3)})
    found = recovered(checkpoint(1), data + start(6, "e3", 8))
    assert (found.epoch, found.epochs, found.rev, found.history) == ("e3", {}, 8, [])


LIVES = st.lists(
    st.tuples(
        st.lists(
            st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 3)), min_size=1, max_size=3), max_size=4
        ),
        st.none() | st.dictionaries(st.sampled_from("abcx"), st.integers(4, 6)),
    ),
    min_size=1,
    max_size=4,
)
Batches = Sequence[Sequence[tuple[str, int]]]


@settings(max_examples=examples(200))
@given(LIVES, st.data())
def test_checkpoint_and_journal_are_the_state(
    lives: list[tuple[Batches, dict[str, int] | None]], draw: st.DataObject
) -> None:
    """For any position of the checkpoint, and with edits by hand between two runs."""
    journal, number, rev = HEAD, 1, 0
    state: dict[str, int] = {}
    for life, (batches, edit) in enumerate(lives):
        epoch = f"e{life}"
        journal += start(number, epoch, rev)
        points = [(number, rev, dict(state))]
        for wanted in batches:
            changes = []
            for name, port in wanted:
                rev += 1
                changes.append(up(rev, name, port) if port else down(rev, name))
                state[name] = port
                state = {name: port for name, port in state.items() if port}
            journal += batch(number + 1, *changes)
            number += len(changes)
            points.append((number, rev, dict(state)))
        at, rev_then, then = draw.draw(st.sampled_from(points))
        entries = [entry(name, port, rev_then) for name, port in then.items()]
        assert ports(recovered(checkpoint(at, rev_then, *entries, epoch=epoch), journal)) == state
        if edit is not None:  # after a clean stop: the file has everything
            mine = Document(
                rev, [entry(*each, rev) for each in edit.items()], Position(epoch, number), edited=True
            )
            found = recovered(mine, journal)
            assert (ports(found), found.valid) == (edit, False)
            state = dict(edit)
        number += 1


@settings(max_examples=examples(300))
@given(st.binary(max_size=200), st.integers(0, len(WHOLE + LAST)), st.integers(0, 60), st.integers(0, 7))
def test_any_bytes_are_recovered_or_refused(instead: bytes, at: int, drop: int, position: int) -> None:
    data = WHOLE + LAST
    for contents in ([instead], [data[:at] + instead + data[at + drop :]], [data, instead], [instead, data]):
        try:
            recovered(checkpoint(position), *contents)
        except Unreadable:
            pass
