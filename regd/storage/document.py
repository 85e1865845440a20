"""`registry.json`: entries to lines, a file's bytes to entries.

One entry a line, defaults left out, so that `grep` and `diff` serve. Reading is strict: what it cannot keep it
refuses, since the next commit would lose it. Must not know where the bytes are kept.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

from regd.core import model
from regd.core.errors import Invalid
from regd.core.limits import DEFAULT
from regd.core.model import DEFAULT_HOST, Entry, State, key_text

FORMAT = 1
_HEAD = "$regd"
_LINES_A_CHUNK = 2_048  # joined at a time: a join keeps the interpreter to itself, a write lets others run
_encode = json.JSONEncoder(allow_nan=False).encode


class Unreadable(Exception):
    """The bytes are no registry. Its text says where, and what is wrong there."""


@dataclass(frozen=True, slots=True)
class Document:
    """What a file says."""

    rev: int
    entries: list[Entry]


# Writing.


def line(entry: Entry) -> bytes:
    """Return an entry's line, without the comma and line feed between lines."""
    fields: dict[str, object] = {"port": entry.port}
    if entry.host != DEFAULT_HOST:
        fields["host"] = entry.host
    if entry.meta:
        fields["meta"] = entry.meta
    if entry.state is not State.READY:
        fields["state"] = entry.state
    if entry.hold:
        fields["hold"] = True
    if entry.pid is not None:
        fields["pid"] = entry.pid
    if entry.ttl_s is not None:
        fields["ttl"] = int(entry.ttl_s) if entry.ttl_s.is_integer() else entry.ttl_s
    return f'"{key_text(entry.key)}": {_encode(fields)}'.encode()


def chunks(rev: int, lines: Iterable[bytes]) -> Iterator[bytes]:
    """Return the whole file, in pieces."""
    yield f'{{\n"{_HEAD}": {{"format": {FORMAT}, "rev": {rev}}}'.encode()
    rest = iter(lines)
    while piece := list(islice(rest, _LINES_A_CHUNK)):
        yield b",\n" + b",\n".join(piece)
    yield b"\n}\n"


# Reading.


def parse(data: bytes, registered_at: float) -> Document:
    """Read a file. `registered_at` becomes that of every entry: the file does not hold it.

    Raises:
        Unreadable: it is not a registry, or holds what regd would lose.
    """
    text = _text(data)
    try:
        top = json.loads(text, object_pairs_hook=_pairs)
    except json.JSONDecodeError as error:
        raise Unreadable(f"line {error.lineno}, column {error.colno}: {error.msg}") from None
    except (ValueError, RecursionError) as error:
        raise Unreadable(str(error)) from None
    if type(top) is not dict:
        raise Unreadable("line 1: a registry is a JSON object, such as {}")
    marked = _HEAD in top
    rev = _rev(top.pop(_HEAD)) if marked else 0
    # `if: 0` means "only when there is none", so what a hand wrote stands at revision 1 at the least.
    rev = max(rev, 1) if top else rev
    entries = []
    for key, fields in top.items():
        try:
            entries.append(_entry(key, fields, rev, registered_at))
        except Invalid as error:
            raise Unreadable(f"{_place(text, key)}: {error}") from None
    return Document(rev, entries)


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


def _pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {json.dumps(twice)} stands twice")
    return made


def _place(text: str, key: str) -> str:
    quoted = json.dumps(key)
    at = text.find(quoted)
    return f"line {text.count(chr(10), 0, at) + 1}, {quoted}" if at >= 0 else f"entry {quoted}"


def _rev(head: object) -> int:
    if type(head) is not dict or type(head.get("format")) is not int:
        raise Unreadable(f'"{_HEAD}" must be an object with "format" and "rev"')
    if head["format"] != FORMAT:
        raise Unreadable(f'"{_HEAD}": format {head["format"]} is of another regd; this one reads {FORMAT}')
    rev = head.get("rev", 0)
    if type(rev) is not int or rev < 0 or head.keys() - {"format", "rev"}:
        raise Unreadable(f'"{_HEAD}" must be {{"format": {FORMAT}, "rev": N}}')
    return rev


def _entry(key: str, fields: object, rev: int, registered_at: float) -> Entry:
    name, slash, instance = key.partition("/")
    if slash and not instance:
        raise Invalid("an instance must follow the /")
    _named("the name", model.check_name, name)
    _named("the instance", model.check_instance, instance)
    if type(fields) is not dict:
        raise Invalid('must be an object, such as {"port": 5050}')
    if "port" not in fields:
        raise Invalid('"port" is missing')
    values: Mapping[str, Any] = {
        field: _named(f'"{field}"', _check_of(field), value) for field, value in fields.items()
    }
    return Entry(
        name=name,
        instance=instance,
        host=values.get("host", DEFAULT_HOST),
        port=values["port"],
        meta=values.get("meta", {}),
        state=values.get("state", State.READY),
        rev=rev,
        registered_at=registered_at,
        hold=values.get("hold", False),
        pid=values.get("pid"),
        ttl_s=values.get("ttl"),
    )


_CHECKS = {
    "port": model.check_port,
    "host": model.check_host,
    "meta": model.check_meta,
    "state": model.check_state,
    "hold": model.check_flag,
    "pid": lambda value: model.check_whole(value, 1, 2**31 - 1),
    "ttl": lambda value: model.check_seconds(value, DEFAULT.ttl_s_min, DEFAULT.ttl_s_max),
}


def _check_of(field: str) -> Any:
    check = _CHECKS.get(field)
    if check is None:
        raise Invalid(f"unknown field {json.dumps(field)}; an entry has {', '.join(_CHECKS)}")
    return check


def _named(what: str, check: Any, value: object) -> Any:
    try:
        return check(value)
    except Invalid as error:
        raise Invalid(f"{what} {error}") from None
