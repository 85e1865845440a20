"""Pages of the history, read from segments in memory."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from regd.core.model import By, Change, Entry, Op, Reason, State
from regd.storage import history_pages, journal_lines
from regd.storage.history_pages import HistoryPage, Query, page
from regd.storage.journal import Journal
from regd.storage.journal_lines import Head, Start
from regd.testing.memory import MemoryFiles
from tests.support.length import examples

JOURNAL = Path("/r/registry.journal")


def up(rev: int, name: str, instance: str = "") -> Change:
    return Change(
        rev, Op.UP, Entry(name, instance, "127.0.0.1", rev, {}, State.READY, rev, 0.0), at=float(rev * 10)
    )


class Written:
    """A journal in memory, as a store writes it. `changes` are the changes in it."""

    def __init__(self) -> None:
        self.files = MemoryFiles()
        self.files.make_folder(JOURNAL.parent)
        self.journal = Journal(JOURNAL, self.files)
        self.journal.begin_segment(Head(1, 0, "", {}))
        self.changes: list[Change] = []
        self.rev = 0
        self.line = 0

    def start(self) -> None:
        self.line += 1
        self.journal.append(journal_lines.start(self.line, Start("e", True, self.rev, self.rev * 10.0)))

    def keep(self) -> None:
        self.line += 1
        self.journal.append(journal_lines.change(self.line, Change(self.rev, Op.KEEP, up(1, "a").entry), 1))

    def batch(self, *changes: Change) -> None:
        lines = [
            journal_lines.change(self.line + at, change, len(changes) if at == 1 else 0)
            for at, change in enumerate(changes, 1)
        ]
        self.journal.append(b"".join(lines))
        self.line += len(changes)
        self.rev = changes[-1].rev
        self.changes += changes

    def add(self, *names: str) -> None:
        self.batch(*[up(self.rev + at, *name.split("/")) for at, name in enumerate(names, 1)])

    def fail(self) -> None:
        """Write a line of a failed commit, and begin another segment, which makes that line void."""
        self.journal.append(journal_lines.change(self.line + 1, up(self.rev + 1, "failed"), 1))
        self.rotate()

    def rotate(self) -> None:
        self.journal.begin_segment(Head(self.line + 1, self.rev, "e", {}, self.rev * 10.0))

    def page(self, limit: int = 100, **query: Any) -> HistoryPage:
        rev = query.pop("rev", self.rev)
        return page(self.files, self.journal.segments, Query(rev=rev, limit=limit, **query))

    def damage(self, path: Path, number: int) -> None:
        """Change a byte of a line of a segment."""
        lines = self.files.read(path).splitlines(keepends=True)
        lines[number] = lines[number].replace(b'"state":"ready"', b'"state":"reedy"')
        fd = self.files.create(path)
        self.files.write(fd, b"".join(lines))
        self.files.close(fd)


def revs(found: HistoryPage) -> list[int]:
    return [change["rev"] for change in found.changes]


@pytest.fixture
def written() -> Written:
    """Nine changes in three segments of three. The second also has a void line."""
    journal = Written()
    journal.start()
    journal.add("a", "b")
    journal.keep()
    journal.add("a/1")
    journal.rotate()
    journal.add("b")
    journal.add("a", "c")
    journal.fail()
    journal.start()
    journal.add("a", "b", "c")
    return journal


def test_empty_journal(written: Written) -> None:
    empty = Written()
    assert empty.page() == empty.page(since=0) == empty.page(after=0.0) == empty.page(before=9) == ([], None)
    empty.start()
    empty.keep()
    assert empty.page() == empty.page(since=0) == ([], None)
    assert history_pages.page(empty.files, [], Query(rev=0, limit=1)) == ([], None)


def test_change_has_the_documented_fields(written: Written) -> None:
    entry = Entry("db", "1", "::1", 5432, {"zone": "a"}, State.STARTING, 10, 5.0)
    written.batch(Change(10, Op.DOWN, entry, Reason.EXITED, entry, 100.5, By(pid=7, uid=0, command="db")))
    assert written.page(1).changes == [
        {
            "rev": 10,
            "at": 100.5,
            "op": "down",
            "name": "db",
            "instance": "1",
            "host": "::1",
            "port": 5432,
            "state": "starting",
            "reason": "process exited",
            "by": {"pid": 7, "uid": 0, "command": "db"},
        }
    ]
    written.batch(Change(11, Op.UP, replace(entry, rev=11, priority=3), at=101.5))
    assert written.page(1).changes[0]["priority"] == 3
    assert "reason" not in written.page(before=2).changes[0]
    assert "by" not in written.page(before=2).changes[0]


@pytest.mark.parametrize(
    ("query", "found", "following"),
    [
        ({}, [1, 2, 3, 4, 5, 6, 7, 8, 9], None),
        ({"limit": 4}, [6, 7, 8, 9], 6),
        ({"limit": 4, "before": 6}, [2, 3, 4, 5], 2),
        ({"limit": 4, "before": 2}, [1], None),
        ({"limit": 3, "before": 4}, [1, 2, 3], None),
        ({"before": 1}, [], None),
        ({"before": 99, "limit": 1}, [9], 9),
        ({"since": 0, "limit": 4}, [1, 2, 3, 4], 4),
        ({"since": 4, "limit": 4}, [5, 6, 7, 8], 8),
        ({"since": 8, "limit": 4}, [9], None),
        ({"since": 5, "limit": 4}, [6, 7, 8, 9], None),
        ({"since": 9}, [], None),
        ({"since": 99}, [], None),
        ({"after": 30.0, "limit": 2}, [4, 5], 5),
        ({"after": 29.9, "limit": 2}, [3, 4], 4),
        ({"after": 90.0}, [], None),
        ({"name": "a"}, [1, 3, 5, 7], None),
        ({"name": "a", "instance": ""}, [1, 5, 7], None),
        ({"name": "a", "instance": "1"}, [3], None),
        ({"name": "none"}, [], None),
        ({"name": "a", "since": 1, "limit": 2}, [3, 5], 5),
        ({"rev": 7}, [1, 2, 3, 4, 5, 6, 7], None),
        ({"rev": 7, "since": 5}, [6, 7], None),
        ({"rev": 7, "before": 99, "limit": 2}, [6, 7], 6),
    ],
)
def test_page(written: Written, query: dict[str, Any], found: list[int], following: int | None) -> None:
    reply = written.page(**query)
    assert (revs(reply), reply.next) == (found, following)


def joined(written: Written, limit: int, *, forward: bool, **filters: Any) -> list[int]:
    """Return the revisions of all pages in order."""
    found: list[int] = []
    position: dict[str, Any] = {"since": 0} if forward else {}
    while True:
        reply = written.page(limit, **position, **filters)
        found = [*found, *revs(reply)] if forward else [*revs(reply), *found]
        if reply.next is None:
            return found
        position = {"since": reply.next} if forward else {"before": reply.next}


def test_segment_that_begins_between_two_pages(written: Written) -> None:
    first, latest = written.page(4, since=0), written.page(4)
    written.rotate()
    written.add("new")
    assert revs(written.page(since=first.next)) == [5, 6, 7, 8, 9, 10]
    assert revs(written.page(before=latest.next)) == [1, 2, 3, 4, 5]


def test_segment_that_is_renamed_or_deleted_before_it_is_read(written: Written) -> None:
    """A checkpoint may delete a segment after the list of segments was taken."""
    segments = list(written.journal.segments)
    query = Query(rev=9, limit=100)
    written.files.remove(segments[0].path)
    assert revs(page(written.files, segments, query)) == [4, 5, 6, 7, 8, 9]
    written.rotate()  # the last of `segments` is the same object, and has its new path
    assert revs(page(written.files, segments, query)) == [4, 5, 6, 7, 8, 9]


def test_deleted_segments(written: Written) -> None:
    written.journal.drop_old(written.line, 1)
    assert joined(written, 2, forward=True) == joined(written, 2, forward=False) == [7, 8, 9]
    assert written.page(before=7) == ([], None)
    assert revs(written.page(since=2)) == [7, 8, 9]


@pytest.mark.parametrize("limit", [1, 2, 100])
def test_damaged_line_is_left_out(written: Written, limit: int) -> None:
    written.damage(written.journal.segments[1].path, 2)
    expected = [1, 2, 3, 4, 6, 7, 8, 9]
    assert joined(written, limit, forward=True) == joined(written, limit, forward=False) == expected


@pytest.mark.parametrize("query", [{}, {"since": 0}, {"after": 0.0}, {"before": 99}])
def test_history_begins_at_its_first_line(written: Written, query: dict[str, Any]) -> None:
    lines = [json.loads(line) for line in written.files.read(written.journal.segments[1].path).splitlines()]
    first = next(line["line"] for line in lines if line["rev"] == 5)
    found = page(written.files, written.journal.segments, Query(rev=9, limit=100, **query), first)
    assert (revs(found), found.next) == ([5, 6, 7, 8, 9], None)


@pytest.mark.parametrize("damaged", [b'"rev":5x', b'"at":5.0.0', b'"at":e', b'"rev":' + b"9" * 5_000])
def test_damaged_number_does_not_stop_a_page(written: Written, damaged: bytes) -> None:
    path = written.journal.segments[1].path
    data = written.files.read(path)
    field = damaged.partition(b":")[0] + (b":5," if damaged.startswith(b'"rev"') else b":50.0,")
    assert field in data
    fd = written.files.create(path)
    written.files.write(fd, data.replace(field, damaged + b","))
    written.files.close(fd)
    assert joined(written, 2, forward=True) == joined(written, 2, forward=False) == [1, 2, 3, 4, 6, 7, 8, 9]
    assert revs(written.page(after=0.0)) == [1, 2, 3, 4, 6, 7, 8, 9]


@pytest.mark.parametrize("forward", [True, False])
def test_work_for_a_page_is_bounded(written: Written, monkeypatch: pytest.MonkeyPatch, forward: bool) -> None:
    """With a filter, a page may be empty and not be the last."""
    monkeypatch.setattr(history_pages, "_SCAN_MAX", 2)
    position: dict[str, Any] = {"since": 3} if forward else {"before": 5}
    reply = written.page(name="none", **position)
    assert (reply.changes, reply.next) == ([], 5 if forward else 3)
    assert joined(written, 100, forward=forward, name="c") == [6, 9]


@pytest.mark.parametrize("forward", [True, False])
def test_page_is_bounded_in_bytes(written: Written, monkeypatch: pytest.MonkeyPatch, forward: bool) -> None:
    monkeypatch.setattr(history_pages, "_PAGE_BYTES_MAX", 400)
    assert 1 <= len(written.page(since=0).changes) < 4
    assert joined(written, 100, forward=forward) == [1, 2, 3, 4, 5, 6, 7, 8, 9]


STEPS = st.lists(
    st.one_of(
        st.lists(st.sampled_from(["a", "b", "a/1"]), min_size=1, max_size=4),
        st.sampled_from(["start", "keep", "rotate", "fail"]),
    ),
    max_size=12,
)


@settings(max_examples=examples(300))
@given(STEPS, st.integers(1, 5), st.integers(0, 40), st.sampled_from([None, "a", "b"]))
def test_pages_of_a_random_history(
    steps: Iterable[Sequence[str] | str], limit: int, point: int, name: str | None
) -> None:
    written = Written()
    for step in steps:
        if isinstance(step, str):
            getattr(written, step)()
        else:
            written.add(*step)
    every = [change.rev for change in written.changes if name in (None, change.entry.name)]
    for forward in (True, False):
        assert joined(written, limit, forward=forward, name=name) == every
    assert revs(written.page(since=point, name=name)) == [rev for rev in every if rev > point]
    assert revs(written.page(before=point, name=name)) == [rev for rev in every if rev < point]
    after = written.page(limit, after=point * 5.0, name=name)
    assert revs(after) == [rev for rev in every if rev * 10 > point * 5][:limit]


def test_segment_with_a_line_that_no_checkpoint_covers_is_kept(written: Written) -> None:
    written.journal.drop_old(written.journal.segments[1].line - 2, 1)
    assert len(written.journal.segments) == 3
    written.journal.drop_old(written.journal.segments[1].line - 1, 1)
    assert len(written.journal.segments) == 2
