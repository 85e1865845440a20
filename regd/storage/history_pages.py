"""Read pages of the history from the segments of the journal."""

import contextlib
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple

from regd.storage import journal_lines
from regd.storage.files import Files
from regd.storage.journal import SegmentFile

_SCAN_MAX = 2_000  # changes that are looked at for one page
_PAGE_BYTES_MAX = 524_288  # of the lines in one page
_FIELDS = ("rev", "at", "op", "name", "instance", "host", "port", "state", "priority", "reason", "by")
_CHANGE = re.compile(
    rb'^\{"line":([0-9]{1,19})(?:,"batch":[0-9]+)?,"rev":([0-9]{1,19}),'
    rb'"at":(-?[0-9]+(?:\.[0-9]+)?(?:e[+-]?[0-9]+)?),"op":.*$',
    re.MULTILINE,
)


@dataclass(frozen=True, slots=True)
class Query:
    """Which changes a page should have. At most one of `since`, `after` and `before` is not None.

    Attributes:
        rev: the current revision; later changes in the journal are not in effect yet.
        limit: the most changes in the page.
        name: only changes of this name.
        instance: only changes of this instance.
        since: only changes after this revision, the oldest first.
        after: only changes after this time in Unix seconds, the oldest first.
        before: only changes before this revision, the latest first.
    """

    rev: int
    limit: int
    name: str | None = None
    instance: str | None = None
    since: int | None = None
    after: float | None = None
    before: int | None = None

    def fits(self, change: dict[str, Any]) -> bool:
        return self.name in (None, change["name"]) and self.instance in (None, change["instance"])


class HistoryPage(NamedTuple):
    """Changes, the oldest first, and the revision at which the next page begins; None after the last page."""

    changes: list[dict[str, Any]]
    next: int | None


class _Line(NamedTuple):
    rev: int
    data: bytes


def page(files: Files, segments: Sequence[SegmentFile], query: Query, first: int = 0) -> HistoryPage:
    """Return the page for a query. Without `since`, `after` and `before`, it has the latest changes.

    `first` is the number of the line with which the history begins.
    """
    forward = query.since is not None or query.after is not None
    lines = (_forward if forward else _backward)(files, segments, query, first)
    changes: list[dict[str, Any]] = []
    size, last = 0, 0
    for line in islice(lines, _SCAN_MAX):
        if changes and (len(changes) == query.limit or size + len(line.data) > _PAGE_BYTES_MAX):
            return HistoryPage(changes if forward else changes[::-1], last)
        last = line.rev
        change = _fields(line.data)
        if change is not None and query.fits(change):
            changes.append({field: change[field] for field in _FIELDS if field in change})
            size += len(line.data)
    more = next(lines, None) is not None
    return HistoryPage(changes if forward else changes[::-1], last if more else None)


def _fields(line: bytes) -> dict[str, Any] | None:
    """Decode a change; None if its line is damaged. A page leaves such a change out."""
    with contextlib.suppress(ValueError, RecursionError):
        if journal_lines.number_of(line) is not None:
            fields: dict[str, Any] = json.loads(line)
            return fields if "name" in fields and "instance" in fields else None
    return None


def _forward(files: Files, segments: Sequence[SegmentFile], query: Query, first: int) -> Iterator[_Line]:
    """Yield the changes after `since` or `after`, the oldest first."""
    point: float
    if query.since is not None:
        point, index = query.since, _last_with([segment.rev for segment in segments], query.since)
        is_after: Callable[[re.Match[bytes]], bool] = (  # noqa: E731
            lambda match: int(match[2]) > point and int(match[1]) >= first
        )
    else:
        assert query.after is not None
        point, index = query.after, _last_with([segment.at for segment in segments], query.after)
        is_after = lambda match: float(match[3]) > point and int(match[1]) >= first  # noqa: E731
    for at in range(index, len(segments)):
        data, end = _read(files, segments, at)
        for match in _CHANGE.finditer(data, _offset(data, is_after)):
            if int(match[1]) >= end:
                break
            if int(match[2]) > query.rev:
                return
            yield _Line(int(match[2]), match[0])


def _backward(files: Files, segments: Sequence[SegmentFile], query: Query, first: int) -> Iterator[_Line]:
    """Yield the changes before `before`, the latest first."""
    before = query.rev + 1 if query.before is None else min(query.before, query.rev + 1)
    for at in reversed(range(len(segments))):
        if segments[at].rev + 1 >= before:
            continue  # all of its changes are later
        data, end = _read(files, segments, at)
        stop = _offset(data, lambda match, end=end: int(match[2]) >= before or int(match[1]) >= end)  # type: ignore[misc]
        while stop:
            start = data.rfind(b"\n", 0, stop - 1) + 1
            match = _CHANGE.match(data, start, stop - 1)
            if match is not None:
                if int(match[1]) < first:
                    return
                yield _Line(int(match[2]), match[0])
            stop = start


def _last_with(points: Sequence[float], point: float) -> int:
    """Return the index of the last segment that began at or before a point; 0 if none did."""
    return max((index for index, began in enumerate(points) if began <= point), default=0)


def _read(files: Files, segments: Sequence[SegmentFile], index: int) -> tuple[bytes, float]:
    """Return a segment's contents, and the number from which on its lines are void. Empty if it was deleted."""
    segment = segments[index]
    end = segments[index + 1].line if index + 1 < len(segments) else float("inf")
    for _ in range(2):  # it may be renamed while it is opened
        try:
            data = files.read(segment.path)
        except FileNotFoundError:
            continue
        head = journal_lines.parse_head(data.partition(b"\n")[0])
        if head is None or head.line == segment.line:
            return data, end
    return b"", end


def _offset(data: bytes, is_after: Callable[[re.Match[bytes]], bool]) -> int:
    """Return the offset of the first change for which `is_after` is true, by binary search."""
    low, high = 0, len(data)
    while low < high:
        start = data.rfind(b"\n", low, (low + high) // 2) + 1 or low
        match = _CHANGE.search(data, start, high)
        if match is None or is_after(match):
            high = start
        else:
            low = match.end() + 1
    return low
