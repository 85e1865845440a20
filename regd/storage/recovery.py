"""Compute the state at a start from `registry.json` and the segments of the journal. Nothing is written.

The file is a checkpoint: its position is the line of the journal up to which it has all changes. The later lines
are applied to it. A line sets or removes its entry, whether the entry exists or not, so edits by hand of other
entries stay.

Damage is tolerated where no change can be lost. The last batch may be torn, since no client got a reply to it.
Damage before the position costs only history. Any other damage is refused, so that a person decides what to do.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path
from typing import NamedTuple

from regd.core.model import Change, Entry, Key, Op
from regd.storage import journal_lines
from regd.storage.document import Document, Position, Unreadable
from regd.storage.journal_lines import Damaged, Head, Start

_FILE = "registry.json"
_NEXT_STEP = "restore the file, or move the journal away to go on from registry.json alone; nothing was changed"


class Segment(NamedTuple):
    """A file of the journal on disk: its first line, and a function that reads all of it."""

    path: Path
    first: bytes
    read: Callable[[], bytes]


@dataclass
class Recovery:
    """The state at a start, and what `Store` must do before it writes.

    Attributes:
        entries: the registrations.
        rev: their revision.
        keeps_journal: the journal belongs to the file. Otherwise it is set aside, if it exists.
        is_edited: the file was edited by hand.
        is_covered: the file has all changes, and was not edited.
        line: the number of the last line of the journal.
        epoch: the epoch of that line.
        epochs: the ended epochs whose positions are valid, each with its last revision and line.
        history: the latest changes, without a gap.
        history_rev: the revision before the first of them.
        history_line: the number of the line after the last damage, with which the history on disk begins.
        size: the bytes of the last segment that count, without a torn batch; None if a new segment must begin.
        valid: positions of earlier epochs stay valid.
        notes: messages for the log.
    """

    entries: list[Entry]
    rev: int
    keeps_journal: bool = False
    is_edited: bool = False
    is_covered: bool = False
    line: int = 0
    epoch: str = ""
    epochs: dict[str, tuple[int, int]] = field(default_factory=dict)
    history: list[Change] = field(default_factory=list)
    history_rev: int = 0
    history_line: int = 0
    size: int | None = None
    valid: bool = False
    notes: list[str] = field(default_factory=list)

    def start_epoch(self, start: Start, number: int) -> None:
        """Begin a new epoch: line `number` records the start of a daemon."""
        if not start.valid:
            self.rev = max(self.rev, start.rev)
            self.clear_history()
        elif self.epoch:
            self.epochs[self.epoch] = (self.rev, number - 1)
        self.epoch = start.epoch

    def clear_history(self) -> None:
        """Make history begin at the present revision. Earlier positions are no longer valid."""
        self.epochs.clear()
        self.history.clear()
        self.history_rev = self.rev


class _Batch(NamedTuple):
    """A complete batch of lines in a segment."""

    first: int  # the number of its first line in the journal
    lines: list[bytes]
    line: int  # the index of its first line in the segment
    end: int  # the offset of the end of its last line


def recover(document: Document | None, segments: Sequence[Segment], file: Path, history_max: int) -> Recovery:
    """Return the state that a registry file and its journal contain.

    Args:
        document: the contents of the file, None if it does not exist.
        segments: the segments of the journal, the oldest first.
        file: the path of the file, for messages.
        history_max: how many of the latest lines to return as history.

    Raises:
        Unreadable: the journal is damaged where changes could be lost, or belongs to a newer version of regd.
    """
    entries, rev = ([], 0) if document is None else (document.entries, document.rev)
    from_file = Recovery(entries, rev, history_rev=rev, is_edited=document is not None and document.edited)
    if document is None or document.position is None:
        if segments:
            what = "is missing" if document is None else "names no line of the journal"
            from_file.notes.append(f"{file} {what}, so the journal is set aside")
        return from_file
    if not segments:
        from_file.notes.append(f"the journal of {file} is missing; the file counts as it is")
        return from_file
    journal = _read(document.position, segments, history_max)
    if journal is None:
        note = f"the journal beside {file} does not have the line that the file names, so it is set aside"
        from_file.notes.append(note)
        return from_file
    return _replay(document, journal, history_max)


# Reading.


@dataclass
class _JournalLines:
    """The latest lines of the journal, without a gap, as far back as they are needed."""

    head: Head  # the state before the first line; a guess if there is a gap before it
    lines: list[bytes] = field(default_factory=list)
    size: int | None = None  # the bytes of the last segment that count
    notes: list[str] = field(default_factory=list)
    follows_gap: bool = False  # lines before the first one are missing

    @property
    def next(self) -> int:
        """The number of the line after the last one."""
        return self.head.line + len(self.lines)

    def add(self, segment: Segment, data: bytes, following: Head | None, covered: int) -> None:
        """Add the complete batches of a segment, up to the first line of the following segment.

        `covered` is the last line that the file has.
        """
        self.size = data.find(b"\n") + 1
        for batch in _batches(data):
            if following is not None and batch.first >= following.line:
                break
            if batch.first != self.next:
                _check_gap(segment, batch.line, self, batch.first, covered)
                self.notes = _notes_of_gap(segment, self)
                self.head, self.lines, self.follows_gap = _head_after_gap(batch.first), [], True
            self.lines += batch.lines
            self.size = batch.end


def _read(position: Position, segments: Sequence[Segment], history_max: int) -> _JournalLines | None:
    """Return the lines after a position, and earlier ones for history. None if the journal lacks the position."""
    heads = [_head_of(segment) for segment in segments]
    last, data = heads[-1], segments[-1].read()
    if last is None:
        raise _unreadable(segments[-1], 0, "is damaged")
    journal: _JournalLines | None = None
    damaged: Segment | None = None
    for index in range(
        _first_needed(heads, position.line, last.line + data.count(b"\n"), history_max), len(heads)
    ):
        segment, head = segments[index], heads[index]
        following = heads[index + 1] if head is not last else None
        if head is None:
            if following is None or following.line > position.line + 1:
                raise _unreadable(segment, 0, "is damaged")
            damaged = segment
            continue
        if journal is None or journal.next != head.line:
            _check_gap(segment, 0, journal, head.line, position.line)
            follows_gap = journal is not None or damaged is not None
            notes = _notes_of_gap(damaged or segment, journal) if follows_gap else []
            journal = _JournalLines(head, notes=notes, follows_gap=follows_gap)
            damaged = None
        journal.add(segment, data if head is last else segment.read(), following, position.line)
    assert journal is not None  # the last head is not None
    if journal.size is not None and journal.size < len(data):
        note = f"{segments[-1].path} ends in a batch that was not written whole: cut off at byte {journal.size}"
        journal.notes.append(note)
        if position.line >= journal.next:
            head = _head_after_gap(position.line + 1)
            return _JournalLines(head, notes=journal.notes, follows_gap=True)
    if not journal.head.line - 1 <= position.line < journal.next:
        return None
    return journal if _epoch_at(journal, position.line) in ("", position.epoch) else None


def _head_after_gap(line: int) -> Head:
    """Return a head for the lines after a gap. Their epoch and the revision before them are not known."""
    return Head(line, 0, "", {}, is_guess=True)


def _head_of(segment: Segment) -> Head | None:
    """Return the head of a segment, None if it is damaged."""
    try:
        return journal_lines.parse_head(segment.first)
    except Damaged as error:
        raise _unreadable(segment, 0, str(error)) from None


def _first_needed(heads: Sequence[Head | None], covered: int, newest: int, history_max: int) -> int:
    """Return the index of the first segment to read. `newest` is roughly the number of the last line."""
    for index in range(len(heads) - 1, 0, -1):
        head = heads[index]
        if head is not None and head.line <= covered + 1 and newest - head.line >= history_max:
            return index
    return 0


def _batches(data: bytes) -> Iterator[_Batch]:
    """Yield the complete batches of a segment. Damaged lines, and batches with such lines, are left out."""
    lines = data.split(b"\n")
    del lines[-1]  # empty, or a torn line
    numbers = [journal_lines.number_of(line) for line in lines]
    index, offset = 1, len(lines[0]) + 1 if lines else 0
    while index < len(lines):
        number = numbers[index]
        length = number[1] if number is not None else 0
        is_whole = number is not None and length > 0 and index + length <= len(lines)
        for at in range(1, length if is_whole else 0):
            is_whole = is_whole and numbers[index + at] == (number[0] + at, 0)  # type: ignore[index]
        taken = length if is_whole else 1
        offset += sum(map(len, lines[index : index + taken])) + taken
        if is_whole and number is not None:
            yield _Batch(number[0], lines[index : index + taken], index, offset)
        index += taken


def _check_gap(segment: Segment, index: int, journal: _JournalLines | None, first: int, covered: int) -> None:
    """Raise `Unreadable` if there is a gap before line `first`, and the file lacks a change in it."""
    if journal is not None and (first > covered + 1 or first < journal.next):
        raise _unreadable(segment, index, f"line {journal.next} of the journal should be here, not line {first}")


def _notes_of_gap(segment: Segment, journal: _JournalLines | None) -> list[str]:
    note = f"{segment.path} is damaged, and {_FILE} has what was lost; history begins after the damage"
    return [*([] if journal is None else journal.notes), note]


def _unreadable(segment: Segment, index: int, what: str) -> Unreadable:
    return Unreadable(f"{segment.path}: line {index + 1}: {what}; {_NEXT_STEP}")


# Replay.


def _epoch_at(journal: _JournalLines, line: int) -> str:
    """Return the epoch of a line; "" if it is not known. `line` may be the number before the first line."""
    epoch = journal.head.epoch
    for data in journal.lines[: max(line + 1 - journal.head.line, 0)]:
        if (start := _parse_start(data)) is not None:
            epoch = start.epoch
    return epoch


def _parse_start(data: bytes) -> Start | None:
    """Parse a line if it is the one that a daemon writes at its start, else return None."""
    if b'"epoch":"' not in data:
        return None
    line = _parse(data, 0, count(1))
    return line if isinstance(line, Start) else None


def _parse(data: bytes, rev: int, ids: "count[int]") -> Start | Change:
    try:
        return journal_lines.parse(data, rev, ids)
    except Damaged as error:
        raise Unreadable(f"the journal: {error} in {data[:80]!r}; {_NEXT_STEP}") from None


def _replay(document: Document, journal: _JournalLines, history_max: int) -> Recovery:
    """Apply the lines after the document's position to it, and collect the latest lines as history."""
    assert document.position is not None
    head, covered = journal.head, document.position.line
    recovery = Recovery(
        [],
        head.rev,
        keeps_journal=True,
        is_edited=document.edited,
        line=journal.next - 1,
        epoch=head.epoch,
        epochs=dict(head.epochs),
        history_rev=head.rev,
        history_line=head.line if journal.follows_gap else 0,
        size=journal.size,
        notes=journal.notes,
    )
    state: dict[Key, Entry] = {entry.key: entry for entry in document.entries}
    ids = count(max((holder.id for entry in document.entries for holder in entry.holders), default=0) + 1)
    first_parsed = min(journal.next - history_max, covered + 1)  # of earlier lines, only the revision is read
    for number, data in enumerate(journal.lines, head.line):
        if number < first_parsed:
            if (start := _parse_start(data)) is not None:
                recovery.start_epoch(start, number)
            elif (rev := journal_lines.rev_of(data)) is not None:
                recovery.rev = recovery.history_rev = rev
            continue
        line = _parse(data, max(recovery.rev, document.rev, 1), ids)
        if isinstance(line, Start):
            recovery.start_epoch(line, number)
            continue
        if line.op is not Op.KEEP:
            recovery.rev = max(recovery.rev, line.rev)
            recovery.history.append(line)
        if number > covered:
            _apply(state, line)
    if head.is_guess and recovery.history:  # the revision before the first change is not known
        recovery.history_rev = recovery.history.pop(0).rev
    last_rev = recovery.history[-1].rev if recovery.history else recovery.history_rev
    recovery.rev = max(recovery.rev, document.rev)
    recovery.valid = not document.edited and recovery.rev == last_rev
    if not recovery.valid:  # the history lacks an edit, or a change that only the file has
        recovery.clear_history()
    recovery.epoch = recovery.epoch or document.position.epoch
    recovery.is_covered = covered == recovery.line and not document.edited
    recovery.entries = list(state.values())
    return recovery


def _apply(state: dict[Key, Entry], change: Change) -> None:
    entry = change.entry
    if change.op is Op.DOWN:
        state.pop(entry.key, None)
    elif change.op is Op.KEEP and (previous := state.get(entry.key)) is not None:
        state[entry.key] = replace(entry, rev=previous.rev)
    else:
        state[entry.key] = entry
