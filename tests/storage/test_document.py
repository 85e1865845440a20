"""A written file loads to the same entries, and any other file is refused with the position of the error."""

import json
from dataclasses import replace
from itertools import count
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from regd.core.model import Entry, Holder, Process, State
from regd.storage.document import Document, Position, Unreadable, entry_line, file_chunks, parse
from tests.support.documents import blocks
from tests.support.length import examples

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=10)
labels = st.from_regex(r"[a-z0-9_]{1,3}", fullmatch=True)
holders = st.builds(
    Holder,
    id=st.just(0),
    session=st.none(),
    hold=st.booleans(),
    process=st.none() | st.builds(Process, st.integers(1, 2**31 - 1), st.just("boot/12")),
    ttl_s=st.none() | st.sampled_from([1.0, 1.5, 86_400.0]),
).filter(lambda holder: bool(holder.hold or holder.process or holder.ttl_s))
entries = st.builds(
    Entry,
    name=st.lists(labels, min_size=1, max_size=3).map(".".join),
    instance=st.from_regex(r"[A-Za-z0-9._-]{0,4}", fullmatch=True),
    host=st.sampled_from(["127.0.0.1", "::1", "localhost"]),
    port=st.integers(1, 65_535),
    meta=st.dictionaries(texts, texts, max_size=3),
    state=st.sampled_from(State),
    rev=st.just(9),
    registered_at=st.just(5.0),
    holders=st.lists(holders, max_size=3).map(tuple),
    priority=st.sampled_from([0, 0, 1, 65_535]),
)


PROTOCOL = Path(__file__).parents[2] / "regd" / "PROTOCOL.md"
POSITION = Position("5eed5eed5eed5eed", 57)


def numbered(found: list[Entry]) -> list[Entry]:
    """Return entries with the ids of holders that `parse` assigns."""
    ids = count(1)
    return [replace(e, holders=tuple(replace(holder, id=next(ids)) for holder in e.holders)) for e in found]


def whole(rev: int, found: list[Entry]) -> bytes:
    return b"".join(file_chunks(rev, POSITION, [entry_line(entry) for entry in found]))


@given(st.lists(entries, unique_by=lambda entry: entry.key))
@example([])
def test_written_file_loads_equal(found: list[Entry]) -> None:
    data = whole(9, found)
    assert data.isascii()
    assert parse(data, 5.0) == Document(9, numbered(found), POSITION, edited=False)
    assert whole(9, parse(data, 5.0).entries) == data
    assert len(data.splitlines()) == len(found) + 3
    assert json.loads(data).keys() - {"$regd"} == {
        f"{e.name}/{e.instance}".rstrip("/") if not e.instance else f"{e.name}/{e.instance}" for e in found
    }


def test_file_shown_in_the_documentation() -> None:
    (text,) = blocks(PROTOCOL, "json")
    document = parse(text.encode(), 5.0)
    assert (document.position, document.edited) == (POSITION, False)
    assert whole(42, document.entries).decode() == text
    assert json.loads(text)["runner"]["port"] == 5050
    assert parse(text.replace("5050", "5051").encode(), 5.0).edited


@pytest.mark.parametrize("part", [' "epoch": "5eed5eed5eed5eed",', ' "line": 57,'])
def test_half_of_a_position_is_none(part: str) -> None:
    document = parse(whole(42, []).replace(part.encode(), b""), 5.0)
    assert (document.rev, document.position) == (42, None)


@pytest.mark.parametrize(
    "text",
    [
        '{"runner": {"port": 5050}}',
        '{\n  "runner": {\n    "port": 5050\n  }\n}\n',
        '\ufeff{"runner": {"port": 5050}}'[1:],
    ],
)
def test_handwritten_file(text: str) -> None:
    document = parse(text.encode(), 5.0)
    assert document == Document(1, [Entry("runner", "", "127.0.0.1", 5050, {}, State.READY, 1, 5.0)], edited=True)


def test_handwritten_file_round_trips() -> None:
    """A process without `born`, which only a person writes, was once written in a form that `parse` refuses."""
    document = parse(b'{"runner": {"port": 5050, "pid": 7}}', 5.0)
    assert parse(whole(document.rev, document.entries), 5.0).entries == document.entries


def test_priority_is_left_out_if_it_is_0() -> None:
    entry = Entry("a", "", "127.0.0.1", 1, {}, State.READY, 9, 5.0)
    assert "priority" not in entry_line(entry).decode()
    assert '"priority": 3, ' in entry_line(replace(entry, priority=3)).decode()
    assert parse(b'{"a": {"port": 1, "priority": 0}}', 5.0).entries[0].priority == 0


def test_empty_registry() -> None:
    assert parse(b"{}", 0.0) == Document(0, [], edited=True)
    assert parse(b'{"$regd": {"format": 1, "rev": 7}}', 0.0) == Document(7, [], edited=True)


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "empty"),
        (b" \n\n", "empty"),
        (b"\0" * 4_096, "NUL"),
        (b'{"a": {"port": 1}}' + b"\0" * 100, "line 1, column 19"),
        (b'{\n"a": {"port": 1},\n', "line 3"),
        (b'{\n"a": {"port": 1}\n"b": {"port": 2}\n}', "line 3, column 1"),
        (b"[]", "object"),
        (b"5050", "object"),
        (b'"x"', "object"),
        (b'{\n"a": {"port": 1},\n"b": \xff}', "line 3: not UTF-8"),
        (b'{"a": {"port": 1}, "a": {"port": 2}}', 'duplicate key "a"'),
        (b'{"a": {"port": 1, "port": 2}}', 'duplicate key "port"'),
        (b'{\n"A": {"port": 1}}', 'line 2, "A": the name must'),
        (b'{"a/": {"port": 1}}', "instance"),
        (b'{"a/b/c": {"port": 1}}', "instance"),
        (b'{"": {"port": 1}}', "name"),
        (b'{"a": 5050}', '{"port": 5050}'),
        (b'{"a": {}}', '"port" is missing'),
        (b'{\n"b": {"port": 1},\n"a": {"port": 0}\n}', 'line 3, "a": "port" must be 1 to 65535'),
        (b'{"a": {"port": true}}', '"port" must'),
        (b'{"a": {"port": NaN}}', '"port" must'),
        (b'{"a": {"port": 1, "comment": "x"}}', 'unknown field "comment"'),
        (b'{"a": {"port": 1, "host": "::"}}', '"host" is nothing to call'),
        (b'{"a": {"port": 1, "meta": {"k": 1}}}', '"meta" must'),
        (b'{"a": {"port": 1, "meta": {"k": "\\ud800"}}}', "surrogate"),
        (b'{"a": {"port": 1, "state": "up"}}', '"state" must'),
        (b'{"a": {"port": 1, "priority": -1}}', '"priority" must be 0 to 65535'),
        (b'{"a": {"port": 1, "priority": 65536}}', '"priority" must be 0 to 65535'),
        (b'{"a": {"port": 1, "priority": true}}', '"priority" must be a whole number'),
        (b'{"a": {"port": 1, "ttl": 0}}', '"ttl" must'),
        (b'{"a": {"port": 1, "pid": 0}}', '"pid" must'),
        (b'{"a": {"port": 1, "hold": 1}}', '"hold" must'),
        (b'{"$regd": 1}', "$regd"),
        (b'{"$regd": {"rev": 1}}', "format"),
        (b'{"$regd": {"format": 3, "rev": 1}}', "format 3 is of another version of regd"),
        (b'{"$regd": {"format": 1, "rev": -1}}', "rev"),
        (b'{"$regd": {"format": 1, "rev": 1, "x": 1}}', "$regd"),
        (b"[" * 100_000, ""),
        (b'{"a": {"port": ' + b"9" * 5_000 + b"}}", ""),
    ],
)
def test_invalid_file_is_refused_with_the_position(data: bytes, says: str) -> None:
    with pytest.raises(Unreadable) as refusal:
        parse(data, 0.0)
    assert says in str(refusal.value)
    assert "\n" not in str(refusal.value)


@given(
    st.lists(entries, unique_by=lambda entry: entry.key, max_size=3),
    st.integers(0, 400),
    st.binary(max_size=3),
    st.integers(0, 3),
)
@settings(max_examples=examples(300))
def test_damaged_file_loads_or_is_refused(found: list[Entry], at: int, instead: bytes, drop: int) -> None:
    data = whole(9, found)
    damaged = data[:at] + instead + data[at + drop :]
    try:
        parse(damaged, 0.0)
    except Unreadable:
        pass


@given(st.lists(entries, unique_by=lambda entry: entry.key, max_size=3), st.data())
def test_truncated_file_is_refused(found: list[Entry], draw: st.DataObject) -> None:
    data = whole(9, found)
    cut = draw.draw(st.integers(0, len(data) - 2))
    with pytest.raises(Unreadable):
        parse(data[:cut], 0.0)


def test_revision_limit_of_an_edited_file() -> None:
    """Larger revisions are refused: after further changes they would exceed 64 bits, and regd could not load them."""
    for data in (
        b'{"$regd": {"format": 2, "rev": %d}, "a": {"port": 1}}',
        b'{"a": {"port": 1, "rev": %d}}',
    ):
        assert parse(data % 2**62, 0.0).rev == 2**62
        with pytest.raises(Unreadable, match=f"revision {2**62 + 1} is too large"):
            parse(data % (2**62 + 1), 0.0)
    document = parse(b'{"a": {"port": 1, "rev": %d}}' % 2**62, 0.0)
    later = replace(document.entries[0], rev=2**62 + 1)
    written = b"".join(file_chunks(2**62 + 1, Position("e", 2), [entry_line(later)]))
    assert parse(written, 0.0) == Document(2**62 + 1, [later], Position("e", 2))


@pytest.mark.parametrize(
    ("member", "why"),
    [
        (b'"a": {}', '"port" is missing'),
        (b'"a": {"rev": 1}', '"port" is missing'),
        (b'"a": 5', "must be an object"),
        (b'"a": {"port": 1, "color": "red"}', "unknown field"),
        (b'"a": {"port": 1, "state": "gone"}', '"state" must be one of'),
    ],
)
def test_file_of_a_newer_regd_is_refused(member: bytes, why: str) -> None:
    """If the checksum is right, most values are not checked. But fields that regd would lose are detected."""
    with pytest.raises(Unreadable, match=why):
        parse(b"".join(file_chunks(1, POSITION, [member])), 5.0)
