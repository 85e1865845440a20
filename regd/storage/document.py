"""The format of `registry.json`: encode entries, and parse a file.

Each entry is one line, without the fields that have their default, so that `grep` and `diff` are useful. Unknown
fields are refused, since the next checkpoint would lose them.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import count
from json.encoder import encode_basestring_ascii as _quoted
from typing import Any, NamedTuple
from zlib import crc32

from regd.core import model
from regd.core.errors import Invalid
from regd.core.limits import DEFAULT
from regd.core.model import DEFAULT_HOST, Entry, Holder, Process, State, key_text

FORMAT = 2
_HEAD = "$regd"
_EDIT_REV_MAX = 2**62  # the largest revision in a file edited by hand; later ones must fit into 64 bits too
_BETWEEN, _END = b",\n", b"\n}\n"
_CHUNK_BYTES = 262_144  # joining a chunk holds the interpreter lock, and writing it releases the lock
_INTEGER_MAX = 2**63 - 1
_WRITTEN_HEAD = re.compile(rb'\{\n"\$regd": \{[^\n{}]*"crc": "([0-9a-f]{8})"\},?\n')
_encode = json.JSONEncoder(allow_nan=False).encode


class Unreadable(Exception):
    """The bytes are not a registry. The text says where the error is, and what it is."""


@dataclass(frozen=True, slots=True)
class Position:
    """A position in the journal: the number of a line, and its epoch."""

    epoch: str
    line: int


@dataclass(frozen=True, slots=True)
class Document:
    """The contents of a registry file.

    Attributes:
        rev: its revision.
        entries: its registrations, in order of the file.
        position: the line of the journal up to which the file has all changes; None if the file does not say.
        edited: the file was written or edited by hand.
    """

    rev: int
    entries: list[Entry]
    position: Position | None = None
    edited: bool = False


# Writing.


def entry_line(entry: Entry) -> bytes:
    """Return an entry as a line, without the comma and the line feed that separate lines."""
    # An f-string is three times as fast as `json`. Only `meta` can contain characters that JSON must escape.
    fields = f'"{key_text(entry.key)}": {{"port": {entry.port}'
    if entry.host != DEFAULT_HOST:
        fields += f', "host": "{entry.host}"'
    if entry.meta:
        meta = ", ".join([f"{_quoted(key)}: {_quoted(text)}" for key, text in entry.meta.items()])
        fields += f', "meta": {{{meta}}}'
    if entry.state is not State.READY:
        fields += f', "state": "{entry.state}"'
    if entry.priority:
        fields += f', "priority": {entry.priority}'
    if entry.holders and (fields_of_holders := conditions(entry)):
        fields += f", {_encode(fields_of_holders)[1:-1]}"
    return f'{fields}, "rev": {entry.rev}, "registered_at": {entry.registered_at!r}}}'.encode()


def conditions(entry: Entry) -> dict[str, object]:
    """Return the stored fields of an entry's holders. A static entry has none."""
    holders = [_conditions(holder) for holder in entry.holders if not holder.withdrawn]
    if len(holders) > 1:
        return {"holders": holders}
    return holders[0] if holders else {}


def _conditions(holder: Holder) -> dict[str, object]:
    fields: dict[str, object] = {}
    if holder.hold:
        fields["hold"] = True
    if holder.process is not None:
        fields["pid"] = holder.process.pid
        if holder.process.born:  # a file edited by hand may lack it
            fields["born"] = holder.process.born
    if holder.ttl_s is not None:
        fields["ttl"] = int(holder.ttl_s) if holder.ttl_s.is_integer() else holder.ttl_s
    return fields


def file_chunks(rev: int, position: Position, blocks: Sequence[bytes]) -> Iterator[bytes]:
    """Yield the whole file in chunks. `blocks` are its lines, already joined in blocks."""
    crc = 0
    for block in blocks:
        crc = crc32(block, crc32(_BETWEEN, crc) if crc else 0)
    crc = crc32(_END, crc) if blocks else crc32(_END[1:], crc)
    head = {"format": FORMAT, "rev": rev, "epoch": position.epoch, "line": position.line, "crc": f"{crc:08x}"}
    yield f'{{\n"{_HEAD}": {_encode(head)}'.encode()
    piece, size = [b""], 0
    for block in blocks:
        piece.append(block)
        size += len(block)
        if size > _CHUNK_BYTES:
            yield _BETWEEN.join(piece)
            piece, size = [b""], 0
    yield _BETWEEN.join(piece) + _END


# Reading.


def parse(data: bytes, registered_at: float) -> Document:
    """Parse a registry file.

    Args:
        data: the contents of the file.
        registered_at: the time of registration of entries that do not have one, in Unix seconds.

    Raises:
        Unreadable: the file is not a registry, or has fields that regd would lose.
    """
    text = _text(data)
    # Checks take longer than decoding. So a file that regd has written is not checked: its keys are different and
    # its values valid.
    edited = _is_edited(data)
    decoder = _decoder if edited else _fast_decoder
    head: _Head | None = None
    entries: dict[str, Entry] = {}
    ids = count(1)
    try:
        for key, fields in _members(text, decoder):
            if key in entries or (head is not None and key == _HEAD):
                raise _DuplicateKey(key)
            if key == _HEAD:
                head = _head(fields)
            elif edited or not _is_plain(fields):
                entries[key] = _member(key, fields, registered_at, ids)
            else:
                entries[key] = _plain(key, fields, registered_at)
    except json.JSONDecodeError as error:
        raise Unreadable(f"line {error.lineno}, column {error.colno}: {error.msg}") from None
    except Invalid as error:
        raise Unreadable(f"{_where(text, key)}: {error}") from None
    except _DuplicateKey as error:
        first = text.find(error.quoted)
        at = text.find(error.quoted, first + 1)
        raise Unreadable(f"line {_line_of(text, at)}: duplicate key {error.quoted}") from None
    except RecursionError:
        raise Unreadable(f"line {_line_of(text, _depth_end(text))}: nested too deeply") from None
    except ValueError:  # an integer with more digits than Python converts
        digits = re.search(r"[0-9]{4000}", text)
        raise Unreadable(
            f"line {_line_of(text, digits.start() if digits else 0)}: a number is too large"
        ) from None
    return _document(head or _Head(0), entries, edited)


def _document(head: "_Head", entries: Mapping[str, Entry], edited: bool) -> Document:
    # Entries without a revision get the file's, or 1, but not 0: in `if`, 0 means that there is no registration.
    # This is done last, since in a file edited by hand, the head may come after the entries.
    rev = max(head.rev, 1 if entries else 0, *(entry.rev for entry in entries.values()))
    if edited and rev > _EDIT_REV_MAX:
        raise Unreadable(
            f"revision {rev} is too large; regd takes up to {_EDIT_REV_MAX} from a file edited by hand"
        )
    with_rev = [entry if entry.rev else replace(entry, rev=rev) for entry in entries.values()]
    return Document(rev, with_rev, head.position, edited)


def _is_edited(data: bytes) -> bool:
    """Whether a file was written or edited by hand: the checksum in its first lines is missing or wrong."""
    head = _WRITTEN_HEAD.match(data)
    return head is None or crc32(memoryview(data)[head.end() :]) != int(head[1], 16)


def _members(text: str, decoder: json.JSONDecoder) -> Iterator[tuple[str, Any]]:
    """Yield the members of a JSON object one by one, which takes half the memory of decoding it as a whole."""
    at = _skip(text, 0)
    if text[at : at + 1] != "{":
        json.loads(text)  # if it is not JSON, this says where
        raise Unreadable("line 1: a registry is a JSON object, such as {}")
    at = _skip(text, at + 1)
    more = text[at : at + 1] != "}"
    while more:
        key, at = _key(text, at)
        value, at = decoder.raw_decode(text, at)
        yield key, value
        while (plain := _NEXT_KEY.match(text, at)) is not None:  # the usual case
            value, at = decoder.raw_decode(text, plain.end())
            yield plain[1], value
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
    if text[at : at + 1] != '"':
        raise json.JSONDecodeError("Expecting property name enclosed in double quotes", text, at)
    key, at = _decoder.raw_decode(text, at)
    at = _skip(text, at)
    if text[at : at + 1] != ":":
        raise json.JSONDecodeError("Expecting ':' delimiter", text, at)
    return key, _skip(text, at + 1)


def _skip(text: str, at: int) -> int:
    """Return the offset after the white space at `at`."""
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
    """Return the offset at which more than 100 brackets are open, for a message."""
    depth = 0
    for match in re.finditer(r'"(?:[^"\\]|\\.)*"|[\[{\]}]', text):
        if match[0] in "[{":
            depth += 1
        elif match[0] in "]}":
            depth -= 1
        if depth > 100:
            return match.start()
    return 0


def _pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) != len(pairs):
        seen: set[str] = set()
        raise _DuplicateKey(next(key for key, _ in pairs if key in seen or seen.add(key)))  # type: ignore[func-returns-value]
    return members


_decoder = json.JSONDecoder(object_pairs_hook=_pairs)
_fast_decoder = json.JSONDecoder()
_NEXT_KEY = re.compile(r',\n"([^"\\\x00-\x1f]*)": ')
_BLANKS = re.compile(r"[ \t\r\n]*")


def _where(text: str, key: str) -> str:
    quoted = json.dumps(key)
    at = text.find(quoted)
    return f"line {_line_of(text, at)}, {quoted}" if at >= 0 else f"entry {quoted}"


class _Head(NamedTuple):
    rev: int
    position: Position | None = None


def _head(fields: object) -> _Head:
    if type(fields) is not dict or type(fields.get("format")) is not int:
        raise Unreadable(f'"{_HEAD}" must be an object with "format" and "rev"')
    if not 1 <= fields["format"] <= FORMAT:
        raise Unreadable(
            f'"{_HEAD}": format {fields["format"]} is of another version of regd; this one reads up to {FORMAT}'
        )
    rev, line = fields.get("rev", 0), fields.get("line", 0)
    epoch, crc = fields.get("epoch", ""), fields.get("crc", "")
    if fields.keys() - {"format", "rev", "epoch", "line", "crc"} or not (
        type(rev) is type(line) is int
        and type(epoch) is type(crc) is str
        and 0 <= rev <= _INTEGER_MAX
        and 0 <= line <= _INTEGER_MAX
    ):
        raise Unreadable(
            f'"{_HEAD}" must be as regd writes it, or {{"format": {FORMAT}, "rev": N}}, '
            f"N from 0 to {_EDIT_REV_MAX}"
        )
    return _Head(rev, Position(epoch, line) if epoch and line else None)


def _member(key: str, fields: object, registered_at: float, ids: "count[int]") -> Entry:
    """Return the entry of a member of the file. Its `rev` is 0 if the member has none."""
    name, slash, instance = key.partition("/")
    if slash and not instance:
        raise Invalid("an instance must follow the /")
    if type(fields) is not dict:
        raise Invalid('must be an object, such as {"port": 5050}')
    return parse_entry(name, instance, fields, 0, registered_at, ids)


def _is_plain(fields: object) -> bool:
    """Whether a member is a ready, static entry, for which `_plain` is faster than `_member`. Most are."""
    return type(fields) is dict and "port" in fields and _PLAIN.issuperset(fields)


def _plain(key: str, fields: Mapping[str, Any], registered_at: float) -> Entry:
    """Return the entry of a member for which `_is_plain` is true, without checks: regd has written it."""
    name, _, instance = key.partition("/")
    return Entry(
        name,
        instance,
        fields.get("host", DEFAULT_HOST),
        fields["port"],
        fields.get("meta", {}),
        State.READY,
        fields.get("rev", 0),
        fields.get("registered_at", registered_at),
    )


def parse_entry(
    name: object, instance: object, fields: Mapping[str, Any], rev: int, registered_at: float, ids: "count[int]"
) -> Entry:
    """Return an entry from its stored fields.

    Args:
        fields: the fields, without the name and the instance.
        rev: the revision if the fields have none.
        registered_at: the time of registration if the fields have none, in Unix seconds.
        ids: the source of the holders' ids.

    Raises:
        Invalid: a field is unknown, missing or not valid.
    """
    checked_name = _named("the name", model.check_name, name)
    checked_instance = _named("the instance", model.check_instance, instance) if instance != "" else ""
    if "port" not in fields:
        raise Invalid('"port" is missing')
    values: dict[str, Any] = {}
    try:
        for field, value in fields.items():
            if (check := _CHECKS.get(field)) is not None:
                values[field] = check(value)
    except Invalid as error:
        raise Invalid(f'"{field}" {error}') from None
    holders: tuple[Holder, ...] = ()
    if len(values) < len(fields):
        holders = _holders({field: value for field, value in fields.items() if field not in values}, ids)
    return Entry(
        checked_name,
        checked_instance,
        values.get("host", DEFAULT_HOST),
        values["port"],
        values.get("meta", {}),
        values.get("state", State.READY),
        values.get("rev", rev),
        values.get("registered_at", registered_at),
        holders,
        values.get("priority", 0),
    )


def _holders(fields: Mapping[str, object], ids: "count[int]") -> tuple[Holder, ...]:
    """Return the holders that these fields of an entry describe. They are unclaimed."""
    conditions = {field: value for field, value in fields.items() if field in _CONDITIONS}
    several: list[object] = [conditions]
    if "holders" in fields:
        if type(fields["holders"]) is not list or conditions:
            raise Invalid('"holders" must be a list, and hold all of hold, pid, born and ttl')
        several = fields["holders"]
    for field in fields:
        if field not in _CONDITIONS and field != "holders":
            raise _unknown(field)
    return tuple([holder for item in several if (holder := _holder(item, ids)) is not None])


def _holder(fields: object, ids: "count[int]") -> Holder | None:
    """Return an unclaimed holder; None if no condition is set."""
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


def checked_meta(value: object) -> dict[str, str]:
    """Return stored `meta` if it is valid, else raise `Invalid`."""
    meta: dict[str, str] = _named("meta", model.check_meta, value)
    return meta


def _check_time(value: object) -> float:
    if type(value) is not int and type(value) is not float:
        raise Invalid("must be a number of Unix seconds")
    if not 0 <= value < 1e12:  # false for infinities and NaN too
        raise Invalid("must be in Unix seconds")
    return value


def _check_born(value: object) -> str:
    if type(value) is not str or not 1 <= len(value) <= 64 or not value.isascii():
        raise Invalid("must be as regd wrote it")
    return value


_CHECKS: Mapping[str, Callable[[object], Any]] = {
    "port": model.check_port,
    "host": model.check_host,
    "meta": model.check_meta,
    "state": model.check_state,
    "priority": model.check_priority,
    "rev": lambda value: model.check_whole(value, 1, _INTEGER_MAX),
    "registered_at": _check_time,
}
_PLAIN = frozenset(("port", "host", "meta", "rev", "registered_at"))
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
