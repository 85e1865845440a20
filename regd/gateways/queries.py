"""Converts a URL's query string to a request for the daemon, and the daemon's reply to an HTTP status and body.

The gateway keeps no state for this: it passes each HTTP request to the daemon, and the body of the response is
the daemon's reply, byte for byte.
"""

import json
import re
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from typing import Any, NamedTuple
from urllib.parse import unquote_to_bytes

__all__ = [
    "COMMANDS",
    "NOT_REGD",
    "TARGETS",
    "TRAEFIK",
    "WAIT_S_MAX",
    "BadQuery",
    "Body",
    "body_of",
    "failure",
    "parse_own_query",
    "parse_query",
]

WAIT_S_MAX = 60  # of `wait`; the daemon allows an hour, but no HTTP client waits so long
_PARAMETERS_MAX = 100  # more than all arguments and 64 labels
_INTEGER = re.compile(r"-?[0-9]{1,19}")
_DECIMAL = re.compile(r"[0-9]{1,10}(\.[0-9]{1,9})?")
_OK = b'{"ok":true'
_STATUSES = {
    "bad_argument": 400,
    "bad_request": 400,
    "unknown_command": 400,
    "denied": 403,
    "not_found": 404,
    "timeout": 504,
    "busy": 503,
    "shutting_down": 503,
    "unavailable": 503,  # the gateway's own: no daemon answers
}
_OTHER_STATUS = 502


# Values. If a text is not a value of its type, the gateway sends the text as it is, and the daemon refuses it
# with a reason.


def _integer(text: str) -> object:
    return int(text) if _INTEGER.fullmatch(text) else text


def _decimal(text: str) -> object:
    return float(text) if _DECIMAL.fullmatch(text) else text


def _flag(text: str) -> object:
    return {"true": True, "false": False}.get(text, text)


Read = Callable[[str], object]
_NAME: dict[str, Read] = {"name": str}
_ONE: dict[str, Read] = {"name": str, "instance": str}
# Each command that HTTP may run, with its arguments; `meta` is read by `parse_query` itself.
COMMANDS: Mapping[str, Mapping[str, Read]] = {
    "list": {**_NAME, "meta": str, "after": str, "limit": _integer},
    "resolve": {**_ONE, "meta": str, "all": _flag, "wait": _decimal},
    "why": _ONE,
    "history": {**_ONE, "since": _integer, "before": _integer, "age_s": _decimal, "limit": _integer},
    "hello": {},
    "stats": {},
    "help": {"topic": str},
    "watch": {**_NAME, "meta": str, "epoch": str, "since": _integer},
}
# The arguments of the paths that are not commands: `/v1/prometheus/targets` and `/v1/traefik`.
TARGETS: Mapping[str, Read] = {**_NAME, "meta": str, "all": _flag}
TRAEFIK: Mapping[str, Read] = {**_NAME, "meta": str}
_ENVELOPE = ("cmd", "id")  # members of a request that are not arguments


class BadQuery(Exception):
    """A query string that cannot become a request."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(message)
        self.field = field[:64]


def parse_query(query: bytes, parameters: Mapping[str, Read]) -> dict[str, Any]:
    """Return the arguments in a query string. An unknown argument stays a string, and the daemon refuses it.

    Raises:
        BadQuery: an argument is repeated or not UTF-8, or there are too many.
    """
    arguments: dict[str, Any] = {}
    pairs = [pair for pair in query.split(b"&") if pair]
    if len(pairs) > _PARAMETERS_MAX:
        raise BadQuery("", f"{len(pairs)} arguments, {_PARAMETERS_MAX} at most")
    for pair in pairs:
        key, _, value = pair.partition(b"=")
        name, text = _decode(key), _decode(value)
        if name in _ENVELOPE:
            raise BadQuery(name, f"{name} is no argument: the path names the command")
        if name == "meta" and "meta" in parameters:
            _add_label(arguments.setdefault("meta", {}), text)
            continue
        if name in arguments:
            raise BadQuery(name, f"{name[:64]!a} is repeated; give it once")
        arguments[name] = parameters.get(name, str)(text)
    if isinstance(wait_s := arguments.get("wait"), float) and wait_s > WAIT_S_MAX:
        raise BadQuery("wait", f"wait must be {WAIT_S_MAX} seconds at most")
    return arguments


def parse_own_query(query: bytes, parameters: Mapping[str, Read]) -> dict[str, Any]:
    """Return the checked arguments in the query string of a path that is not a command of the daemon.

    Raises:
        BadQuery: as in `parse_query`, or an argument is unknown, or a flag is not a boolean.
    """
    arguments = parse_query(query, parameters)
    for name in arguments:
        if name not in parameters:
            near = get_close_matches(name[:64], parameters, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"it takes {', '.join(parameters)}"
            raise BadQuery(name, f"no argument {name[:64]!a}; {hint}")
    if type(arguments.get("all", False)) is not bool:
        raise BadQuery("all", "all must be true or false")
    return arguments


def _add_label(labels: dict[str, str], text: str) -> None:
    key, equals, value = text.partition("=")
    if not equals:
        raise BadQuery("meta", f"meta must be KEY=VALUE, not {text[:64]!a}")
    if key in labels:
        raise BadQuery("meta", f"the label {key[:64]!a} is repeated; give it once")
    labels[key] = value


def _decode(text: bytes) -> str:
    try:
        return unquote_to_bytes(text.replace(b"+", b" ")).decode()
    except UnicodeDecodeError:
        raise BadQuery("", "the query string must be UTF-8") from None


class Body(NamedTuple):
    """The answer to an HTTP request: a status, and a line of JSON."""

    status: int
    line: bytes

    @property
    def message(self) -> str:
        """The message of a refusal, for people."""
        return str(json.loads(self.line)["message"])


def body_of(line: bytes) -> Body:
    """Return the HTTP answer for a reply of the daemon."""
    if line.startswith(_OK):
        return Body(200, line)
    try:
        fields = json.loads(line)
        if isinstance(fields["message"], str):
            return Body(_STATUSES.get(fields["error"], _OTHER_STATUS), line)
    except (ValueError, LookupError, TypeError, RecursionError):
        pass
    return NOT_REGD


def failure(code: str, message: str, **details: object) -> Body:
    """Return an error of the gateway in the same form as the daemon's errors."""
    fields = {"ok": False, "error": code, "message": message, **details}
    return Body(_STATUSES[code], json.dumps(fields, separators=(",", ":")).encode() + b"\n")


NOT_REGD = failure("unavailable", "the program at the daemon's address is not regd; see which one listens there")
