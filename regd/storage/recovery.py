"""What a start finds: the registry file and the segments of the journal, to the state that they hold. Pure.

The file is a checkpoint: its position says up to which line of the journal it has all changes. The lines after it
are applied. A line sets or removes its entry, whatever was there before, so that edits by hand stay.

Damage is judged by what could be lost. The last batch may be torn: nobody had an answer to it. Damage before the
position costs history alone. Any other damage is refused, for a person to look at.
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
    """A file of the journal, as it was found: its first line, and a function that reads all of it.

    The last segment is the one that was written to.
    """

    path: Path
    first: bytes
    read: Callable[[], bytes]


@dataclass
class Recovery:
    """The state at the start, and what to do before anything is written."""

    entries: list[Entry]
    rev: int
    keeps_journal: bool = False  # else it is set aside, if there is one
    is_edited: bool = False  # the file is not as regd wrote it
    is_covered: bool = False  # the file has all changes, as regd wrote it
    line: int = 0  # the last line of the journal
    epoch: str = ""  # of that line
    epochs: dict[str, tuple[int, int]] = field(default_factory=dict)  # ended, with valid positions
    history: list[Change] = field(default_factory=list)  # the latest changes, without a gap, for watchers
    history_rev: int = 0  # the revision before the first of them
    size: int | None = None  # of the last segment, without a torn batch; None: begin a new segment
    valid: bool = False  # the positions of earlier epochs
    notes: list[str] = field(default_factory=list)  # for the log

    def start_epoch(self, start: Start, number: int) -> None:
        """Begin an epoch at a line."""
        if not start.valid:
            self.rev = max(self.rev, start.rev)
            self.break_history()
        elif self.epoch:
            self.epochs[self.epoch] = (self.rev, number - 1)
        self.epoch = start.epoch

    def break_history(self) -> None:
        """Let history begin here."""
        self.epochs.clear()
        self.history.clear()
        self.history_rev = self.rev


class _Batch(NamedTuple):
    """A whole batch of lines."""

    first: int
    lines: list[bytes]
    line: int  # where it begins in the segment, counted from 0
    end: int  # the offset behind the last line


def recover(document: Document | None, segments: Sequence[Segment], file: Path, history_max: int) -> Recovery:
    """Return the state that a registry file and its journal hold.

    `document` is None if there is no file. `history_max` is how many of the latest lines are wanted as history.

    Raises:
        Unreadable: the journal is damaged where changes could be lost, or is of a newer version.
    """
    entries, rev = ([], 0) if document is None else (document.entries, document.rev)
    alone = Recovery(entries, rev, history_rev=rev, is_edited=document is not None and document.edited)
    if document is None or document.position is None:
        if segments:
            what = "is missing" if document is None else "names no line of the journal"
            alone.notes.append(f"{file} {what}, so the journal is set aside")
        return alone
    if not segments:
        alone.notes.append(f"the journal of {file} is missing; the file counts as it is")
        return alone
    found = _read(document.position, segments, history_max)
    if found is None:
        alone.notes.append(f"the journal beside {file} does not have the line that it names, and is set aside")
        return alone
    return _replay(document, found, history_max)


# Reading.


@dataclass
class _Found:
    """The lines that are needed, without a gap, and what is known of those before."""

    head: Head  # of the segment in which `lines` begin; a guess if they begin behind a gap
    lines: list[bytes] = field(default_factory=list)
    size: int | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def next(self) -> int:
        return self.head.line + len(self.lines)

    def add(self, segment: Segment, data: bytes, following: Head | None, covered: int) -> None:
        """Add the whole batches of a segment. From the first line of the following segment on, lines are void."""
        self.size = data.find(b"\n") + 1
        for batch in _batches(data):
            if following is not None and batch.first >= following.line:
                break
            if batch.first != self.next:
                _check_gap(segment, batch.line, self, batch.first, covered)
                self.notes = _notes_of_gap(segment, self)
                self.head, self.lines = _guess(batch.first), []
            self.lines += batch.lines
            self.size = batch.end


def _read(position: Position, segments: Sequence[Segment], history_max: int) -> _Found | None:
    """Return the lines from the position on, and some before it. None if they do not have the position."""
    heads = [_head_of(segment) for segment in segments]
    last, data = heads[-1], segments[-1].read()
    if last is None:
        raise _unreadable(segments[-1], 0, "is damaged")
    found: _Found | None = None
    for index in range(
        _first_wanted(heads, position.line, last.line + data.count(b"\n"), history_max), len(heads)
    ):
        segment, head = segments[index], heads[index]
        following = heads[index + 1] if head is not last else None
        if head is None:
            if following is None or following.line > position.line + 1:
                raise _unreadable(segment, 0, "is damaged")
            continue
        if found is None or found.next != head.line:
            _check_gap(segment, 0, found, head.line, position.line)
            found = _Found(head, notes=_notes_of_gap(segment, found))
        found.add(segment, data if head is last else segment.read(), following, position.line)
    assert found is not None  # the last head is not None
    if found.size is not None and found.size < len(data):
        note = f"{segments[-1].path} ends in a batch that was not written whole: cut off at byte {found.size}"
        found.notes.append(note)
        if position.line >= found.next:
            return _Found(_guess(position.line + 1), notes=found.notes)
    if not found.head.line - 1 <= position.line < found.next:
        return None
    return found if _epoch_at(found, position.line) in ("", position.epoch) else None


def _guess(line: int) -> Head:
    """Return a head for the lines behind a gap: no revision or epoch is known there."""
    return Head(line, 0, "", {}, is_guess=True)


def _head_of(segment: Segment) -> Head | None:
    """Return the head of a segment, None if it is damaged."""
    try:
        return journal_lines.parse_head(segment.first)
    except Damaged as error:
        raise _unreadable(segment, 0, str(error)) from None


def _first_wanted(heads: Sequence[Head | None], covered: int, newest: int, history_max: int) -> int:
    """Return the index of the first segment to read. `newest` is about the last line of all."""
    for index in range(len(heads) - 1, 0, -1):
        head = heads[index]
        if head is not None and head.line <= covered + 1 and newest - head.line >= history_max:
            return index
    return 0


def _batches(data: bytes) -> Iterator[_Batch]:
    """Yield the whole batches of a segment; what is damaged is left out."""
    lines = data.split(b"\n")
    del lines[-1]  # behind the last line feed: nothing, or a torn line
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


def _check_gap(segment: Segment, index: int, found: _Found | None, first: int, covered: int) -> None:
    """Raise if lines before `first` are missing that the file does not cover."""
    if found is not None and (first > covered + 1 or first < found.next):
        raise _unreadable(segment, index, f"line {found.next} of the journal should be here, not line {first}")


def _notes_of_gap(segment: Segment, found: _Found | None) -> list[str]:
    if found is None:
        return []
    return [*found.notes, f"{segment.path} is damaged, and {_FILE} has what was lost; history begins behind it"]


def _unreadable(segment: Segment, index: int, what: str) -> Unreadable:
    return Unreadable(f"{segment.path}: line {index + 1}: {what}; {_NEXT_STEP}")


# Replay.


def _epoch_at(found: _Found, line: int) -> str:
    """Return the epoch of a line, or of the line before the first one; "" if it is not known."""
    epoch = found.head.epoch
    for data in found.lines[: max(line + 1 - found.head.line, 0)]:
        if (start := _start(data)) is not None:
            epoch = start.epoch
    return epoch


def _start(data: bytes) -> Start | None:
    """Return what a line says if a daemon wrote it at its start."""
    if b'"epoch":"' not in data:
        return None
    line = _parsed(data, 0, count(1))
    return line if isinstance(line, Start) else None


def _parsed(data: bytes, rev: int, ids: "count[int]") -> Start | Change:
    try:
        return journal_lines.parse(data, rev, ids)
    except Damaged as error:
        raise Unreadable(f"the journal: {error} in {data[:80]!r}; {_NEXT_STEP}") from None


def _replay(document: Document, found: _Found, history_max: int) -> Recovery:
    """Apply the lines after the position, and collect the latest as history."""
    assert document.position is not None
    head, covered = found.head, document.position.line
    made = Recovery(
        [],
        head.rev,
        keeps_journal=True,
        is_edited=document.edited,
        line=found.next - 1,
        epoch=head.epoch,
        epochs=dict(head.epochs),
        history_rev=head.rev,
        size=found.size,
        notes=found.notes,
    )
    state: dict[Key, Entry] = {entry.key: entry for entry in document.entries}
    ids = count(max((holder.id for entry in document.entries for holder in entry.holders), default=0) + 1)
    wanted = min(found.next - history_max, covered + 1)  # the first line that must be read
    for number, data in enumerate(found.lines, head.line):
        if number < wanted:
            if (start := _start(data)) is not None:
                made.start_epoch(start, number)
            elif (rev := journal_lines.rev_of(data)) is not None:
                made.rev = made.history_rev = rev
            continue
        line = _parsed(data, max(made.rev, document.rev, 1), ids)
        if isinstance(line, Start):
            made.start_epoch(line, number)
            continue
        if line.op is not Op.KEEP:
            made.rev = max(made.rev, line.rev)
            made.history.append(line)
        if number > covered:
            _apply(state, line)
    if head.is_guess and made.history:  # it has no revision: what came before the first change is not known
        made.history_rev = made.history.pop(0).rev
    last_rev = made.history[-1].rev if made.history else made.history_rev
    made.rev = max(made.rev, document.rev)
    made.valid = not document.edited and made.rev == last_rev
    if not made.valid:  # watchers do not know of edits, nor of changes that the journal lacks
        made.break_history()
    made.epoch = made.epoch or document.position.epoch
    made.is_covered = covered == made.line and not document.edited
    made.entries = list(state.values())
    return made


def _apply(state: dict[Key, Entry], change: Change) -> None:
    entry = change.entry
    if change.op is Op.DOWN:
        state.pop(entry.key, None)
    elif change.op is Op.KEEP and (before := state.get(entry.key)) is not None:
        state[entry.key] = replace(entry, rev=before.rev)
    else:
        state[entry.key] = entry
