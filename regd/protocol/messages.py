"""Decode requests from JSON lines, and encode replies and events.

For any bytes, `decode` returns a `Request` or raises `Refused`, and nothing else. It is stricter than `json`,
which accepts duplicate keys, NaN, infinities and lone surrogates.
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from json.encoder import encode_basestring_ascii as _quoted
from typing import Any, NoReturn

from regd.core.errors import Code, Refused
from regd.core.limits import DEFAULT
from regd.core.model import Entry
from regd.protocol.commands import Request, check_request


class _NotStrict(ValueError):
    """Text that `json` accepts and regd does not."""


def _strict_pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) != len(pairs):
        raise _NotStrict("duplicate key in an object")
    return members


def _no_constant(word: str) -> NoReturn:
    raise _NotStrict(f"{word} is not JSON")


def _finite(digits: str) -> float:
    number = float(digits)
    if not math.isfinite(number):
        raise _NotStrict("a number is too large")
    return number


_BLANKS = " \t\r\n"
_decoder = json.JSONDecoder(object_pairs_hook=_strict_pairs, parse_constant=_no_constant, parse_float=_finite)
# The output is ASCII, so that no control sequence reaches a terminal.
_encode = json.JSONEncoder(separators=(",", ":"), allow_nan=False).encode


def decode(line: bytes) -> Request:
    """Turn a line that begins with `{` into a request.

    Raises:
        Refused: `bad_json`, `bad_request`, `unknown_command` or `bad_argument`. If the line has a valid `id`, it
            is in `details`, so that the reply has it too.
    """
    fields = parse_object(line)
    has_id = "id" in fields
    id = fields.pop("id", None)
    if type(id) is str:
        if len(id) > DEFAULT.id_chars_max:
            raise Refused(Code.BAD_REQUEST, f"id must be at most {DEFAULT.id_chars_max} characters")
    elif has_id and type(id) is not int:
        raise Refused(Code.BAD_REQUEST, "id must be a string or a whole number")
    try:
        cmd = fields.pop("cmd", None)
        if type(cmd) is not str:
            raise Refused(Code.BAD_REQUEST, 'a request needs "cmd", a string, such as {"cmd":"help"}')
        return check_request(cmd, id, fields)
    except Refused as refusal:
        if id is not None:
            refusal.details["id"] = id
        raise


def parse_object(line: bytes) -> dict[str, Any]:
    """Parse a line that is one JSON object.

    Raises:
        Refused: `bad_json`.
    """
    try:
        text = line.decode("utf-8").lstrip(_BLANKS)  # not `json.loads(line)`, which accepts encoded surrogates
        fields, end = _decoder.raw_decode(text)
        if end != len(text) and text[end:].strip(_BLANKS):
            raise json.JSONDecodeError("Extra data", text, end)
        if b"\\u" in line or b"\\U" in line:
            _encode_utf8(fields)
    except UnicodeDecodeError as error:
        raise Refused(Code.BAD_JSON, f"not UTF-8 at byte {error.start + 1}") from None
    except UnicodeEncodeError:
        raise Refused(Code.BAD_JSON, "it contains half of a surrogate pair") from None
    except json.JSONDecodeError as error:
        raise Refused(Code.BAD_JSON, f"not JSON at character {error.pos + 1}: {error.msg}") from None
    except _NotStrict as error:
        raise Refused(Code.BAD_JSON, str(error)) from None
    except RecursionError:
        raise Refused(Code.BAD_JSON, "nested too deeply") from None
    except ValueError:  # an integer with more digits than Python converts
        raise Refused(Code.BAD_JSON, "a number is too large") from None
    if type(fields) is not dict:  # pragma: no branch - the callers pass lines that begin with `{`
        raise Refused(Code.BAD_JSON, "not a JSON object")
    return fields


def _encode_utf8(fields: object) -> None:
    """Raise `UnicodeEncodeError` for a lone surrogate. Only a line with a \\u escape can have one."""
    json.dumps(fields, ensure_ascii=False).encode("utf-8")


# Replies.


def ok(id: str | int | None, result: Mapping[str, object]) -> bytes:
    """Return an `ok` reply with the fields of `result`."""
    head: dict[str, object] = {"ok": True} if id is None else {"ok": True, "id": id}
    return _encode({**head, **result}).encode() + b"\n"


def error(refusal: Refused, id: str | int | None = None) -> bytes:
    """Return an error reply. If the refusal's details have an `id`, it is used instead of the argument."""
    fields: dict[str, object] = {"ok": False}
    details = dict(refusal.details)
    id = details.pop("id", id)  # type: ignore[assignment]  # `decode` has checked it
    if id is not None:
        fields["id"] = id
    fields |= {"error": refusal.code, "message": refusal.message, **details}
    return _encode(fields).encode() + b"\n"


def seconds(value: float) -> float | int:
    """Return a whole number as an int, for a shorter text: 10 for 10.0."""
    return int(value) if value.is_integer() else value


def host_port(host: str, port: int) -> str:
    """Return HOST:PORT, with brackets around an IPv6 address."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


_OK = b'{"ok":true,'


def _flat(entry: Entry) -> bytes:
    """Return the reply to `resolve` without an id, and cache it in the entry."""
    if entry.encoded is None:
        # An f-string is three times as fast as `json`. Only `meta` can contain characters that JSON must escape.
        meta = ",".join([f"{_quoted(key)}:{_quoted(text)}" for key, text in entry.meta.items()])
        more = "" if entry.priority == 0 else f',"priority":{entry.priority}'
        if entry.holders:
            more += ',"hold":true' if entry.hold else ""
            more += "" if entry.pid is None else f',"pid":{entry.pid}'
            more += "" if entry.ttl_s is None else f',"ttl":{seconds(entry.ttl_s)!r}'
        entry.encoded = (
            f'{{"ok":true,"name":"{entry.name}","instance":"{entry.instance}","host":"{entry.host}",'
            f'"port":{entry.port},"meta":{{{meta}}},"state":"{entry.state}","rev":{entry.rev},'
            f'"registered_at":{entry.registered_at!r}{more}}}\n'
        ).encode()
    return entry.encoded


def resolved(id: str | int | None, entry: Entry) -> bytes:
    """Return the reply to `resolve` of one instance."""
    return add_id(id, _flat(entry))


def registered(id: str | int | None, entry: Entry, replaced: bool) -> bytes:
    """Return the reply to `register`."""
    more = ',"replaced":true' if replaced else ""
    return (
        f'{{"ok":true{_id(id)},"name":"{entry.name}","instance":"{entry.instance}","host":"{entry.host}",'
        f'"port":{entry.port},"rev":{entry.rev}{more}}}\n'
    ).encode()


def _id(id: str | int | None) -> str:
    return "" if id is None else f',"id":{_encode(id)}'


def add_encoded_id(id: bytes, reply: bytes) -> bytes:
    """Add an id, which is JSON already, to an `ok` reply without one."""
    return b'{"ok":true,"id":' + id + b"," + reply[len(_OK) :]


def add_id(id: str | int | None, reply: bytes) -> bytes:
    """Add an id, if it is not None, to an `ok` reply without one."""
    return reply if id is None else add_encoded_id(_encode(id).encode(), reply)


def instance(entry: Entry) -> bytes:
    """Return the JSON object of an instance."""
    return b"{" + _flat(entry)[len(_OK) : -1]


def count_fitting(entries: Sequence[Entry], bytes_max: int) -> int:
    """Return how many of the entries, from the first on, fit into `bytes_max`; at least one."""
    size = 0
    for count, entry in enumerate(entries):
        size += len(_flat(entry)) - len(_OK) + 1  # with the comma
        if size > bytes_max and count:
            return count
    return len(entries)


def instances(id: str | int | None, result: Mapping[str, object], entries: Iterable[Entry]) -> bytes:
    """Return an `ok` reply with the fields of `result`, and `instances`."""
    head = ok(id, result)
    return head[:-2] + b',"instances":[' + b",".join(map(instance, entries)) + b"]}\n"


_HTTP_TEXT = b"""\
This is regd, a service registry. This port does not speak HTTP: start `regctl serve` for that.
It takes one JSON object a line, or a bare line such as: help
From a shell: regctl list, or: printf 'help\\nquit\\n' | nc HOST PORT
"""

# The reply to an HTTP request. It repeats nothing of the request, and has no CORS header, so a web page cannot
# read it.
HTTP_REFUSAL = (
    b"HTTP/1.1 400 Bad Request\r\n"
    b"Connection: close\r\n"
    b"Content-Type: text/plain; charset=utf-8\r\n"
    b"Content-Length: %d\r\n"
    b"X-Content-Type-Options: nosniff\r\n"
    b"\r\n%s"
) % (len(_HTTP_TEXT), _HTTP_TEXT)


# Events. `watch` is the number of the watch on its connection.


def changed(watch: int, op: str, entry: Entry) -> bytes:
    """Return an `up` or `change` event."""
    return b'{"event":"%s","watch":%d,' % (op.encode(), watch) + _flat(entry)[len(_OK) :]


def down(watch: int, rev: int, entry: Entry, reason: str) -> bytes:
    """Return a `down` event."""
    return (
        f'{{"event":"down","watch":{watch},"name":"{entry.name}","instance":"{entry.instance}",'
        f'"reason":"{reason}","rev":{rev}}}\n'
    ).encode()


def event(kind: str, rev: int, **fields: object) -> bytes:
    """Return any other event."""
    return _encode({"event": kind, **fields, "rev": rev}).encode() + b"\n"
