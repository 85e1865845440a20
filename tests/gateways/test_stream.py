"""The event stream on values: lines of a watch become events, with ids from which a reader can resume."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as some

from regd.gateways.stream import EventEncoder, parse_position

REPLY = {"ok": True, "watch": 1, "epoch": "5eed", "rev": 40}


def line(event: str, rev: int, **fields: Any) -> bytes:
    return json.dumps({"event": event, "watch": 1, "rev": rev, **fields}, separators=(",", ":")).encode() + b"\n"


def events(stream: bytes) -> list[tuple[str, str | None, str]]:
    """Parse a stream according to the HTML standard, and return each event's kind, last event id and data."""
    found: list[tuple[str, str | None, str]] = []
    for block in stream.decode().split("\n\n")[:-1]:
        fields: dict[str, str] = {}
        for text in block.split("\n"):
            key, _, value = text.partition(": ")
            fields[key] = value
        if "data" in fields:
            found.append((fields["event"], fields.get("id"), fields["data"]))
    return found


UP, SYNC, CHANGE, DOWN = line("up", 39, name="a"), line("sync", 42), line("change", 43), line("down", 44)


def test_stream_from_the_beginning() -> None:
    encoder = EventEncoder(REPLY, resumes=False)
    assert encoder.head() == b"retry: 1000\n\nevent: reset\nid: \ndata: {}\n\n"
    assert encoder.encode(UP + SYNC) == (
        b'event: up\ndata: {"event":"up","watch":1,"rev":39,"name":"a"}\n\n'
        b'event: sync\nid: 5eed-42\ndata: {"event":"sync","watch":1,"rev":42}\n\n'
    )
    assert events(encoder.encode(CHANGE + DOWN)) == [
        ("change", "5eed-43", CHANGE.decode().rstrip()),
        ("down", "5eed-44", DOWN.decode().rstrip()),
    ]


def test_resumed_stream_has_ids_from_the_start() -> None:
    encoder = EventEncoder(REPLY, resumes=True)
    assert encoder.head() == b"retry: 1000\n\n"
    found = events(encoder.encode(CHANGE + line("progress", 43)))
    assert [event[:2] for event in found] == [("change", "5eed-43"), ("progress", "5eed-43")]


@pytest.mark.parametrize("resumes", [True, False])
def test_events_from_reset_to_sync_have_no_position(resumes: bool) -> None:
    encoder = EventEncoder(REPLY, resumes=resumes)
    encoder.encode(SYNC)
    found = events(encoder.encode(line("reset", 50) + UP + line("sync", 51) + line("up", 52)))
    assert [event[:2] for event in found] == [("reset", ""), ("up", None), ("sync", "5eed-51"), ("up", "5eed-52")]


@given(some.lists(some.integers(1, 200), max_size=8))
def test_input_in_any_pieces_gives_the_same_stream(lengths: list[int]) -> None:
    data = UP + SYNC + CHANGE + DOWN
    pieces, at = [], 0
    for length in lengths:
        pieces.append(data[at : at + length])
        at += length
    pieces.append(data[at:])
    encoder = EventEncoder(REPLY, resumes=False)
    assert b"".join(map(encoder.encode, pieces)) == EventEncoder(REPLY, resumes=False).encode(data)


@pytest.mark.parametrize(
    "data",
    [b"HTTP/1.1 400\n", b"[]\n", b'{"ok":false}\n', b'{"event":"a\\nid: 1","rev":1}\n', b'{"event":"up","rev":"1"}\n',
     b'{"event":"up",\r"rev":1}\n', b'{"event":1,"rev":1}\n', b"x" * 100_000, b"[" * 50_000 + b"\n", b"\xff\n"],
)  # fmt: skip
def test_invalid_input_is_refused(data: bytes) -> None:
    with pytest.raises(ValueError):
        EventEncoder(REPLY, resumes=False).encode(data)


@pytest.mark.parametrize(
    ("text", "position"),
    [
        ("5eed5eed-42", {"epoch": "5eed5eed", "since": 42}),
        ("a-b-0", {"epoch": "a-b", "since": 0}),
        ("5eed-9223372036854775807", {"epoch": "5eed", "since": 2**63 - 1}),
        ("5eed-9223372036854775808", None),
        ("5eed-", None), ("-1", None), ("42", None), ("", None), ("5eed--", None), ("5eed-+1", None), ("5eed- 1", None),
        ("x" * 65 + "-1", None), ("5eed-1.0", None), ("x" * 65_536, None), ("5eed-\u0661", None),
    ],
)  # fmt: skip
def test_position(text: str, position: dict[str, Any] | None) -> None:
    assert parse_position(text) == position
