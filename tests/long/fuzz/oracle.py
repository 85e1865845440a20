"""A second parser, written from PROTOCOL.md: it says which lines are requests, with what arguments, or errors.

The two parsers are compared, so this one must not import `regd.protocol`. It is simple and slow.
"""

import ipaddress
import json
import math
import re
import string
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

BARE_BYTES_MAX = 512  # of a bare line, including typed blanks
DEPTH_MAX = 100  # deeper JSON is refused with one of two codes

# The kinds of lines, beside the codes of errors.
STRANGER, HTTP, QUIT, REQUEST, UNSURE = "stranger", "http", "quit", "request", "unsure"

WRITES = ("register", "deregister", "update")


@dataclass(frozen=True)
class Said:
    """A line: its kind or error code, and for a request its command, arguments and id.

    `ends` is true if the rest of the input is ignored; None if that depends on an earlier line that is UNSURE.
    """

    kind: str
    cmd: str = ""
    id: str | int | None = None
    arguments: Mapping[str, Any] | None = None
    ends: bool | None = False


class Bad(Exception):
    """The line is refused with this error."""

    def __init__(self, code: str, id: str | int | None = None) -> None:
        super().__init__(code)
        self.code = code
        self.id = id


def understood(stream: bytes, line_bytes_max: int, ended: bool = True) -> Iterator[Said]:
    """Return what each line is, up to one that ends the input. With `ended`, unfinished text counts as a line."""
    valid: bool | None = False  # a valid request came before
    *lines, rest = stream.split(b"\n")
    for raw in lines + [rest] * ended:
        line = _without_blanks(_without_end(raw))
        if not line:
            continue
        said = _line(line, line_bytes_max, valid)
        yield said
        if said.ends:
            return
        if said.kind == REQUEST:
            valid = True
        elif said.kind == UNSURE:
            valid = valid or None


def _without_end(line: bytes) -> bytes:
    """Strip a final CR, or the CR NUL that telnet sends if its input is a pipe."""
    for end in (b"\r\0\r", b"\r\0", b"\r"):
        if line.endswith(end):
            return line[: -len(end)]
    return line


def _without_blanks(line: bytes) -> bytes:
    at = 0
    while at < len(line) and line[at] in b" \t\r":
        at += 2 if line[at : at + 2] == b"\r\0" else 1
    return line[at:]


def _line(line: bytes, line_bytes_max: int, valid: bool | None) -> Said:
    """Judge a line by the rows of the table in PROTOCOL.md, in order."""
    if line.startswith(b"{"):
        if len(line) > line_bytes_max:
            return Said("too_large")
        try:
            return judged(line)
        except Bad as bad:
            return Said(bad.code, id=bad.id)
    text = _text(line)
    short = len(line) <= min(line_bytes_max, BARE_BYTES_MAX)
    if text is not None and len(line) <= line_bytes_max and _is_http(text, line_bytes_max):
        return Said(HTTP, ends=True)
    if text is None or not short or text[0] not in string.ascii_letters:
        return Said(STRANGER, ends=True)
    said = _bare(*re.split("[ \t]+", text.strip(" \t")))
    if said.kind in (REQUEST, QUIT):
        return said
    return Said(said.kind, ends=None if valid is None else not valid)


def _text(line: bytes) -> str | None:
    """Return a line as text if it is printable. CR is allowed at the end only."""
    while line.endswith((b"\r", b"\r\0", b" ", b"\t")):
        line = line[: -2 if line.endswith(b"\0") else -1]
    printable = all(0x20 <= byte < 0x7F or byte == 0x09 for byte in line)
    return line.decode() if line and printable else None


def _is_http(text: str, line_bytes_max: int) -> bool:
    """True for a word, a target and `HTTP/…`. The target must begin within the length of a bare line."""
    words = re.split("[ \t]+", text)
    begins = len(text) - len(text.split(maxsplit=1)[-1])
    return len(words) == 3 and words[2].startswith("HTTP/") and begins < min(line_bytes_max, BARE_BYTES_MAX)


def _bare(word: str, *given: str) -> Said:
    cmd = word.lower()
    match cmd, given:
        case "quit", ():
            return Said(QUIT, ends=True)
        case "help", ():
            return Said(REQUEST, "help", arguments={"short": True})
        case (("ping" | "stats" | "list" | "watch" | "history"), ()):
            return Said(REQUEST, cmd, arguments={})
        case (("list" | "watch"), (name,)) if _pattern(name):
            return Said(REQUEST, cmd, arguments={"name": name})
        case (("resolve" | "deregister" | "why" | "history"), (name,)) if _name(name):
            return Said(REQUEST, cmd, arguments={"name": name})
        case "register", (name, address):
            return _registration(name, address)
    return Said("bad_argument" if cmd in BARE else "unknown_command")


def _registration(name: str, address: str) -> Said:
    host, colon, digits = address.rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
        if not host or "[" in host or "]" in host:
            return Said("bad_argument")
    elif ":" in host or "[" in host or "]" in host or (colon and not host):
        return Said("bad_argument")
    if not re.fullmatch("[0-9]{1,5}", digits) or not 1 <= int(digits) <= 65_535 or not _name(name):
        return Said("bad_argument")
    arguments: dict[str, Any] = {"name": name, "port": int(digits)}
    if not colon:
        return Said(REQUEST, "register", arguments=arguments)
    fits = _host(host)
    if fits is False:
        return Said("bad_argument")
    return Said(UNSURE if fits is None else REQUEST, "register", arguments={**arguments, "host": host})


def is_http_refusal(reply: bytes) -> bool:
    """True for a complete HTTP response that no page may read and no cache may store."""
    head, _, body = reply.partition(b"\r\n\r\n")
    status, *lines = head.split(b"\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(b":") for line in lines)}
    return (
        status == b"HTTP/1.1 400 Bad Request"
        and headers.keys() == {b"connection", b"content-type", b"content-length", b"x-content-type-options"}
        and headers[b"connection"] == b"close"
        and headers[b"content-type"].startswith(b"text/plain")
        and int(headers[b"content-length"]) == len(body)
        and headers[b"x-content-type-options"] == b"nosniff"
    )


# Strict JSON.


class _Pairs(list[tuple[str, Any]]):
    """An object's members in order, with duplicates."""


def _no_constant(word: str) -> Any:
    raise Bad("bad_json")


_json = json.JSONDecoder(object_pairs_hook=_Pairs, parse_constant=_no_constant)


def read(line: bytes) -> dict[str, Any]:
    """Decode an object, and refuse what Python accepts beyond JSON."""
    try:
        value = _json.decode(line.decode("utf-8", "strict"))
    except (ValueError, RecursionError):
        raise Bad("bad_json") from None
    plain = _plain(value, 0)
    if not isinstance(plain, dict):
        raise Bad("bad_json")
    return plain


def _plain(value: Any, depth: int) -> Any:
    kind = type(value)
    if kind is str:
        if not value.isascii() and re.search("[\ud800-\udfff]", value):
            raise Bad("bad_json")
    elif kind is float:
        if not math.isfinite(value):
            raise Bad("bad_json")
    elif depth > DEPTH_MAX:
        raise Bad(UNSURE)
    elif kind is _Pairs:
        if len({key for key, _ in value}) < len(value):
            raise Bad("bad_json")
        return {_plain(key, depth): _plain(item, depth + 1) for key, item in value}
    elif kind is list:
        return [_plain(item, depth + 1) for item in value]
    return value


def judged(line: bytes) -> Said:
    """Decode a request, and check it against the tables: first the line, then id, command and arguments."""
    fields = read(line)
    has_id = "id" in fields
    id = fields.pop("id", None)
    if has_id and not (_is_whole(id) or (isinstance(id, str) and len(id) <= 64)):
        raise Bad("bad_request")
    cmd = fields.pop("cmd", None)
    if not isinstance(cmd, str):
        raise Bad("bad_request", id)
    if cmd not in COMMANDS:
        raise Bad("unknown_command", id)
    needed, optional = COMMANDS[cmd]
    if not needed <= fields.keys() <= needed | optional:
        raise Bad("bad_argument", id)
    unsure = False
    for name, value in fields.items():
        verdict = CHECKS["pattern" if name == "name" and cmd in ("list", "watch") else name](value)
        if verdict is False:
            raise Bad("bad_argument", id)
        unsure = unsure or verdict is None
    return Said(UNSURE if unsure else REQUEST, cmd, id, fields)


# The tables of commands and of values. A check returns None if the contract does not say.

COMMANDS: dict[str, tuple[set[str], set[str]]] = {
    "ping": (set(), set()),
    "hello": (set(), set()),
    "help": (set(), {"topic"}),
    "register": (
        {"name", "port"},
        {"host", "instance", "meta", "state", "priority", "hold", "pid", "ttl", "if", "force"},
    ),
    "deregister": ({"name"}, {"instance", "if"}),
    "resolve": ({"name"}, {"instance", "meta", "all", "wait"}),
    "list": (set(), {"name", "meta", "after", "limit"}),
    "update": ({"name"}, {"instance", "state", "meta", "priority", "if"}),
    "renew": ({"name"}, {"instance", "ttl"}),
    "watch": (set(), {"name", "meta", "epoch", "since"}),
    "unwatch": ({"watch"}, set()),
    "why": ({"name"}, {"instance"}),
    "history": (set(), {"name", "instance", "since", "before", "age_s", "limit"}),
    "stats": (set(), set()),
}

BARE = (
    "quit", "help", "ping", "stats", "list", "watch", "resolve", "deregister", "why", "history", "register",
)  # fmt: skip
_LOWER = "abcdefghijklmnopqrstuvwxyz0123456789_"


def _is_whole(value: object, least: float = -math.inf, most: float = math.inf) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def _is_seconds(value: object, least: float, most: float) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and least <= value <= most


def _is_age(value: object) -> bool | None:
    if not _is_seconds(value, 0, math.inf):
        return False
    return _is_seconds(value, 0, 1e9) or None  # the contract names no limit


def _name(value: object) -> bool:
    if not isinstance(value, str) or len(value) > 253:
        return False
    return all(
        1 <= len(label) <= 63
        and label[0] in _LOWER
        and label[-1] in _LOWER
        and all(letter in _LOWER + "-" for letter in label)
        for label in value.split(".")
    )


def _pattern(value: object) -> bool:
    if not isinstance(value, str) or not value.endswith("*"):
        return _name(value)
    return len(value) <= 254 and all(letter in _LOWER + "-." for letter in value[:-1])


def _instance(value: object) -> bool:
    return isinstance(value, str) and len(value) <= 63 and all(
        letter in _LOWER + "ABCDEFGHIJKLMNOPQRSTUVWXYZ.-" for letter in value
    )  # fmt: skip


def _host(value: object) -> bool | None:
    if not isinstance(value, str) or not 1 <= len(value) <= 253 or not value.isascii():
        return False
    if "%" in value:
        return None  # has a scope id, which the contract does not mention
    try:
        address = ipaddress.ip_address(value)
        if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped:
            return None  # an IPv4-mapped address, which the contract does not mention
        return not address.is_unspecified
    except ValueError:
        pass
    *_, last = labels = value.split(".")
    if last.isdigit() or re.fullmatch("0[xX][0-9a-fA-F]*", last):
        return None  # a host name to some resolvers, a number to others
    return all(
        1 <= len(label) <= 63 and re.fullmatch("[A-Za-z0-9_-]+", label) and label[0] != "-" != label[-1]
        for label in labels
    )


def _meta(value: object) -> bool:
    if not isinstance(value, dict) or len(value) > 64:
        return False
    if not all(isinstance(item, str) for item in value.values()):
        return False
    return sum(len(key.encode()) + len(item.encode()) for key, item in value.items()) <= 4_096


def _after(value: object) -> bool:
    if not isinstance(value, str):
        return False
    name, _, instance = value.partition("/")
    return _name(name) and _instance(instance)


CHECKS: dict[str, Callable[[Any], bool | None]] = {
    "name": _name,
    "pattern": _pattern,
    "instance": _instance,
    "port": lambda value: _is_whole(value, 1, 65_535),
    "host": _host,
    "meta": _meta,
    "state": lambda value: isinstance(value, str) and value in ("starting", "ready", "draining"),
    "priority": lambda value: _is_whole(value, 0, 65_535),
    "hold": lambda value: isinstance(value, bool),
    "force": lambda value: isinstance(value, bool),
    "all": lambda value: isinstance(value, bool),
    "pid": lambda value: _is_whole(value, 1, 2**31 - 1),
    "ttl": lambda value: _is_seconds(value, 1, 86_400),
    "wait": lambda value: _is_seconds(value, 0, 3_600),
    "if": lambda value: _is_whole(value, 0, 2**63 - 1),
    "since": lambda value: _is_whole(value, 0, 2**63 - 1),
    "before": lambda value: _is_whole(value, 0, 2**63 - 1),
    "age_s": _is_age,
    "watch": lambda value: _is_whole(value, 1, 2**63 - 1),
    "limit": lambda value: _is_whole(value, 1, 1_000),
    "topic": lambda value: isinstance(value, str) and value in COMMANDS,
    "epoch": lambda value: isinstance(value, str) and 1 <= len(value) <= 64,
    "after": _after,
}
