"""The format of `registry.json`: entries to lines, a file's bytes to entries.

One entry per line, defaults left out, so that `grep` and `diff` are useful. Reading is strict: fields that regd
does not know are refused, since the next commit would lose them.
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import count
from json.encoder import encode_basestring_ascii as _quoted
from typing import Any

from regd.core import model
from regd.core.errors import Invalid
from regd.core.limits import DEFAULT
from regd.core.model import DEFAULT_HOST, Entry, Holder, Process, State, key_text

FORMAT = 1
_HEAD = "$regd"
_REV_MAX = 2**62  # room for as many changes again, in 64 bits
_CHUNK_BYTES = 262_144  # a join keeps the interpreter lock, a write releases it
_encode = json.JSONEncoder(allow_nan=False).encode


class Unreadable(Exception):
    """The bytes are no registry. The text says where, and what is wrong there."""


@dataclass(frozen=True, slots=True)
class Document:
    """The contents of a registry file."""

    rev: int
    entries: list[Entry]


# Writing.


def line(entry: Entry) -> bytes:
    """Return an entry's line, without the comma and line feed between lines."""
    # An f-string is three times as fast as `json`. Only `meta` can hold characters that JSON must escape.
    fields = f'"{key_text(entry.key)}": {{"port": {entry.port}'
    if entry.host != DEFAULT_HOST:
        fields += f', "host": "{entry.host}"'
    if entry.meta:
        meta = ", ".join([f"{_quoted(key)}: {_quoted(text)}" for key, text in entry.meta.items()])
        fields += f', "meta": {{{meta}}}'
    if entry.state is not State.READY:
        fields += f', "state": "{entry.state}"'
    if entry.holders:
        holders = [_conditions(holder) for holder in entry.holders if not holder.withdrawn]
        if len(holders) == 1:
            fields += f", {_encode(holders[0])[1:-1]}"
        elif holders:
            fields += f', "holders": {_encode(holders)}'
    return f"{fields}}}".encode()


def _conditions(holder: Holder) -> dict[str, object]:
    fields: dict[str, object] = {}
    if holder.hold:
        fields["hold"] = True
    if holder.process is not None:
        fields["pid"] = holder.process.pid
        if holder.process.born:  # a file edited by hand may have the number alone
            fields["born"] = holder.process.born
    if holder.ttl_s is not None:
        fields["ttl"] = int(holder.ttl_s) if holder.ttl_s.is_integer() else holder.ttl_s
    return fields


def chunks(rev: int, lines: Iterable[bytes]) -> Iterator[bytes]:
    """Yield the whole file in pieces. Each of `lines` may be several lines that are joined already."""
    piece = [f'{{\n"{_HEAD}": {{"format": {FORMAT}, "rev": {rev}}}'.encode()]
    size = 0
    for each in lines:
        piece.append(each)
        size += len(each)
        if size > _CHUNK_BYTES:
            yield b",\n".join(piece)
            piece, size = [b""], 0
    yield b",\n".join(piece) + b"\n}\n"


# Reading.


def parse(data: bytes, registered_at: float) -> Document:
    """Parse a registry file. Every entry gets `registered_at`, which the file does not hold.

    Raises:
        Unreadable: it is no registry, or has fields that regd would lose.
    """
    text = _text(data)
    rev, marked = 0, False
    entries: dict[str, Entry] = {}
    ids = count(1)
    try:
        for key, fields in _members(text):
            if key in entries or (marked and key == _HEAD):
                raise _DuplicateKey(key)
            if key == _HEAD:
                rev, marked = _rev(fields), True
            else:
                entries[key] = _entry(key, fields, max(rev, 1), registered_at, ids)
    except json.JSONDecodeError as error:
        raise Unreadable(f"line {error.lineno}, column {error.colno}: {error.msg}") from None
    except Invalid as error:
        raise Unreadable(f"{_place(text, key)}: {error}") from None
    except _DuplicateKey as twice:
        first = text.find(twice.quoted)
        at = text.find(twice.quoted, first + 1)
        raise Unreadable(f"line {_line_of(text, at)}: duplicate key {twice.quoted}") from None
    except RecursionError:
        raise Unreadable(f"line {_line_of(text, _depth_end(text))}: nested too deeply") from None
    except ValueError:  # an integer of more digits than Python takes
        digits = re.search(r"[0-9]{4000}", text)
        raise Unreadable(
            f"line {_line_of(text, digits.start() if digits else 0)}: a number is too large"
        ) from None
    # `if: 0` means "only if it is not registered", so entries of a file without a revision are at revision 1. The
    # head of a file that was edited by hand may follow its entries.
    rev = max(rev, 1) if entries else rev
    return Document(rev, [entry if entry.rev == rev else replace(entry, rev=rev) for entry in entries.values()])


def _members(text: str) -> Iterator[tuple[str, Any]]:
    """Yield the members of a JSON object one by one, which takes half the memory of decoding all of it."""
    at = _skip(text, 0)
    if text[at : at + 1] != "{":
        json.loads(text)  # raises if it is no JSON
        raise Unreadable("line 1: a registry is a JSON object, such as {}")
    at = _skip(text, at + 1)
    more = text[at : at + 1] != "}"
    while more:
        key, at = _key(text, at)
        value, at = _decoder.raw_decode(text, at)
        yield key, value
        at = _skip(text, at)
        more = text[at : at + 1] == ","
        if more:
            at = _skip(text, at + 1)
        elif text[at : at + 1] != "}":
            raise json.JSONDecodeError("Expecting ',' delimiter", text, at)
    at = _skip(text, at + 1)
    if at != len(text):
        raise json.JSONDecodeError("Extra data", text, at)


def _key(text: str, at: int) -> tuple[str, int]:
    """Return the key at offset `at`, and the offset of its value."""
    plain = _PLAIN_KEY.match(text, at)
    if plain is not None:  # as regd writes it
        return plain[1], plain.end()
    if text[at : at + 1] != '"':
        raise json.JSONDecodeError("Expecting property name enclosed in double quotes", text, at)
    key, at = _decoder.raw_decode(text, at)
    at = _skip(text, at)
    if text[at : at + 1] != ":":
        raise json.JSONDecodeError("Expecting ':' delimiter", text, at)
    return key, _skip(text, at + 1)


def _skip(text: str, at: int) -> int:
    """Return the offset behind the white space at `at`."""
    return _BLANKS.match(text, at).end()  # type: ignore[union-attr]  # it matches the empty string


def _text(data: bytes) -> str:
    if not data.strip():
        raise Unreadable("the file is empty; a registry without entries is {}")
    if not data.strip(b"\0"):
        raise Unreadable("the file holds nothing but NUL bytes, as after a power cut")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        at = data.count(b"\n", 0, error.start) + 1
        raise Unreadable(f"line {at}: not UTF-8") from None


class _DuplicateKey(Exception):
    def __init__(self, key: str) -> None:
        super().__init__(key)
        self.quoted = json.dumps(key)


def _line_of(text: str, at: int) -> int:
    return text.count("\n", 0, max(at, 0)) + 1


def _depth_end(text: str) -> int:
    """Return the offset at which more than 100 brackets are open."""
    depth = 0
    for found in re.finditer(r'"(?:[^"\\]|\\.)*"|[\[{\]}]', text):
        if found[0] in "[{":
            depth += 1
        elif found[0] in "]}":
            depth -= 1
        if depth > 100:
            return found.start()
    return 0


def _pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        seen: set[str] = set()
        raise _DuplicateKey(next(key for key, _ in pairs if key in seen or seen.add(key)))  # type: ignore[func-returns-value]
    return made


_decoder = json.JSONDecoder(object_pairs_hook=_pairs)
_PLAIN_KEY = re.compile(r'"([^"\\\x00-\x1f]*)": ')
_BLANKS = re.compile(r"[ \t\r\n]*")


def _place(text: str, key: str) -> str:
    quoted = json.dumps(key)
    at = text.find(quoted)
    return f"line {_line_of(text, at)}, {quoted}" if at >= 0 else f"entry {quoted}"


def _rev(head: object) -> int:
    if type(head) is not dict or type(head.get("format")) is not int:
        raise Unreadable(f'"{_HEAD}" must be an object with "format" and "rev"')
    if head["format"] != FORMAT:
        raise Unreadable(
            f'"{_HEAD}": format {head["format"]} is of another version of regd; this one reads {FORMAT}'
        )
    rev = head.get("rev", 0)
    if type(rev) is not int or not 0 <= rev <= _REV_MAX or head.keys() - {"format", "rev"}:
        raise Unreadable(f'"{_HEAD}" must be {{"format": {FORMAT}, "rev": N}}, N from 0 to {_REV_MAX}')
    return rev


def _entry(key: str, fields: object, rev: int, registered_at: float, ids: Iterator[int]) -> Entry:
    """Return the entry that a member of the file describes."""
    name, slash, instance = key.partition("/")
    if slash and not instance:
        raise Invalid("an instance must follow the /")
    _named("the name", model.check_name, name)
    if instance:
        _named("the instance", model.check_instance, instance)
    if type(fields) is not dict:
        raise Invalid('must be an object, such as {"port": 5050}')
    if "port" not in fields:
        raise Invalid('"port" is missing')
    values = {field: _named(field, rule, fields[field]) for field, rule in _CHECKS.items() if field in fields}
    holders: tuple[Holder, ...] = ()
    if len(values) < len(fields):
        holders = _holders({field: value for field, value in fields.items() if field not in values}, ids)
    host, meta, state = values.get("host", DEFAULT_HOST), values.get("meta", {}), values.get("state", State.READY)
    return Entry(name, instance, host, values["port"], meta, state, rev, registered_at, holders)


def _holders(fields: Mapping[str, object], ids: Iterator[int]) -> tuple[Holder, ...]:
    """Return the holders, from the fields of a member that peers do not see."""
    conditions = {field: value for field, value in fields.items() if field in _CONDITIONS}
    several: list[object] = [conditions]
    if "holders" in fields:
        if type(fields["holders"]) is not list or conditions:
            raise Invalid('"holders" must be a list, and hold all of hold, pid, born and ttl')
        several = fields["holders"]
    for field in fields:
        if field not in _CONDITIONS and field != "holders":
            raise _unknown(field)
    return tuple([holder for each in several if (holder := _holder(each, ids)) is not None])


def _holder(fields: object, ids: Iterator[int]) -> Holder | None:
    """Return an unclaimed holder; None if it has no condition."""
    if type(fields) is not dict:
        raise Invalid('a holder must be an object, such as {"pid": 4242}')
    values: dict[str, Any] = {}
    for field, value in fields.items():
        if field not in _CONDITIONS:
            raise _unknown(field)
        values[field] = _named(field, _CONDITIONS[field], value)
    process = Process(values["pid"], values.get("born", "")) if "pid" in values else None
    hold, ttl_s = values.get("hold", False), values.get("ttl")
    if not hold and process is None and ttl_s is None:
        return None
    return Holder(next(ids), None, hold, process, ttl_s)


def _unknown(field: str) -> Invalid:
    return Invalid(f"unknown field {json.dumps(field)}; an entry has {', '.join((*_CHECKS, *_CONDITIONS))}")


def _check_born(value: object) -> str:
    if type(value) is not str or not 1 <= len(value) <= 64 or not value.isascii():
        raise Invalid("must be as regd wrote it")
    return value


_CHECKS: Mapping[str, Callable[[object], Any]] = {
    "port": model.check_port,
    "host": model.check_host,
    "meta": model.check_meta,
    "state": model.check_state,
}
_CONDITIONS: Mapping[str, Callable[[object], Any]] = {
    "hold": model.check_flag,
    "pid": lambda value: model.check_whole(value, 1, 2**31 - 1),
    "born": _check_born,
    "ttl": lambda value: model.check_seconds(value, DEFAULT.ttl_s_min, DEFAULT.ttl_s_max),
}


def _named(what: str, check: Callable[[object], Any], value: object) -> Any:
    try:
        return check(value)
    except Invalid as error:
        what = what if " " in what else f'"{what}"'
        raise Invalid(f"{what} {error}") from None
