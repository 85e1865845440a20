"""Validation of everything that a daemon sends: the members of each reply and event, and each value.

Another, perhaps hostile, program may listen at the address, and its replies may end up in a shell, a terminal
or a connect(). So the client uses only replies that pass these checks. Unknown members are allowed.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Mapping
from typing import Any

__all__ = ["Shape", "fault", "is_host", "is_known_event", "is_name", "result_fault"]

Check = Callable[[Any], bool]

_LOWER = "abcdefghijklmnopqrstuvwxyz0123456789_-"
_LETTERS = _LOWER + "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_DIGITS = "0123456789"
_HEX = _DIGITS + "abcdefABCDEF"
_NAME_CHARS_MAX = 253
_LABEL_CHARS_MAX = 63
_META_KEYS_MAX = 64
_META_BYTES_MAX = 4_096
_ID_CHARS_MAX = 64
_WHOLE_MAX = 2**63 - 1
_NUMBER_MAX = 1e18  # far above any number that regd sends
_TIME_MAX = 253_402_300_800  # Unix seconds: the end of the year 9999, the last that `time.localtime` accepts
_DEPTH_MAX = 8  # levels of nesting in unknown members
_SHOWN_CHARS = 60  # of a value that an error message shows


# Values.


def _consists_of(text: str, characters: str) -> bool:
    return not text.strip(characters)


def _is_text(value: object) -> bool:
    """Return whether the value is a string without control characters and lone surrogates."""
    return type(value) is str and value.isprintable()


def _is_string(value: object) -> bool:
    return type(value) is str


def _is_flag(value: object) -> bool:
    return type(value) is bool


def _is_whole(value: object) -> bool:
    return type(value) is int and 0 <= value <= _WHOLE_MAX


def _is_positive(value: object) -> bool:
    return type(value) is int and 1 <= value <= _WHOLE_MAX


def _is_number(value: object) -> bool:
    return (type(value) is int or type(value) is float) and -_NUMBER_MAX < value < _NUMBER_MAX


def _is_priority(value: object) -> bool:
    return type(value) is int and 0 <= value <= 65_535


def _is_time(value: object) -> bool:
    return (type(value) is int or type(value) is float) and 0 <= value < _TIME_MAX


def is_name(value: object) -> bool:
    """Return whether the value is a service name."""
    return type(value) is str and len(value) <= _NAME_CHARS_MAX and all(map(_is_label, value.split(".")))


def _is_label(label: str) -> bool:
    return (
        1 <= len(label) <= _LABEL_CHARS_MAX
        and _consists_of(label, _LOWER)
        and label[0] != "-"
        and label[-1] != "-"
    )


def _is_instance(value: object) -> bool:
    return type(value) is str and len(value) <= _LABEL_CHARS_MAX and _consists_of(value, _LETTERS + ".")


def _is_port(value: object) -> bool:
    return type(value) is int and 1 <= value <= 65_535


def is_host(value: object) -> bool:
    """Return whether the value is an IP literal or a host name, and not a wildcard address."""
    if type(value) is not str or not 1 <= len(value) <= _NAME_CHARS_MAX:
        return False
    if ":" in value:
        return _is_ipv6(value)
    labels = value.split(".")
    last = labels[-1]
    if last and (_consists_of(last, _DIGITS) or (last[:2] in ("0x", "0X") and _consists_of(last[2:], _HEX))):
        return len(labels) == 4 and all(map(_is_octet, labels)) and value != "0.0.0.0"
    return all(
        1 <= len(label) <= _LABEL_CHARS_MAX and _consists_of(label, _LETTERS) and "-" not in (label[0], label[-1])
        for label in labels
    )


def _is_octet(text: str) -> bool:
    return (
        1 <= len(text) <= 3
        and _consists_of(text, _DIGITS)
        and int(text) <= 255
        and (text[0] != "0" or text == "0")
    )


def _is_ipv6(text: str) -> bool:
    address, percent, scope = text.partition("%")
    if percent and not (1 <= len(scope) <= 15 and _consists_of(scope, _LETTERS + ".")):
        return False
    try:
        packed = socket.inet_pton(socket.AF_INET6, address)
    except (OSError, ValueError):  # ValueError: a NUL or a lone surrogate
        return False
    return packed != bytes(16) and packed != bytes(10) + b"\xff\xff" + bytes(4)  # neither :: nor ::ffff:0.0.0.0


def _is_meta(value: object) -> bool:
    if type(value) is not dict or len(value) > _META_KEYS_MAX:
        return False
    if not value:
        return True
    try:
        text = "".join([*value, *value.values()])
        return (len(text) if text.isascii() else len(text.encode())) <= _META_BYTES_MAX
    except (TypeError, UnicodeEncodeError):  # the value is not a string, or has a lone surrogate
        return False


def _is_state(value: object) -> bool:
    return type(value) is str and value in ("starting", "ready", "draining")


def _is_key(value: object) -> bool:
    """Return whether the value is NAME or NAME/INSTANCE, the form of `next`."""
    if type(value) is not str:
        return False
    name, _, instance = value.partition("/")
    return is_name(name) and _is_instance(instance)


def _is_id(value: object) -> bool:
    return type(value) is int or (type(value) is str and len(value) <= _ID_CHARS_MAX)


def _is_shallow(value: object, depth: int = _DEPTH_MAX) -> bool:
    """Return whether the value is nested at most `depth` levels: `json.dumps` and `repr` are recursive."""
    if type(value) is dict:
        return depth > 0 and all(_is_shallow(member, depth - 1) for member in value.values())
    if type(value) is list:
        return depth > 0 and all(_is_shallow(item, depth - 1) for item in value)
    return True


def _or_null(check: Check) -> Check:
    return lambda value: value is None or check(value)


def _list_of(check: Check) -> Check:
    return lambda value: type(value) is list and all(map(check, value))


def _table_of(check: Check) -> Check:
    """Return a check for an object with printable keys, and values that pass `check`."""
    return lambda value: type(value) is dict and all(map(_is_text, value)) and all(map(check, value.values()))


# Objects.


class Shape:
    """The required and the optional members of an object, each with a check of its value."""

    def __init__(self, required: dict[str, Check], optional: dict[str, Check] | None = None) -> None:
        self.required = required
        self.optional = optional or {}
        self._known = required.keys() | self.optional.keys()

    def fault(self, fields: dict[str, Any]) -> str:
        """Return a description of the first error in an object; "" if it has this shape."""
        for name, check in self.required.items():
            if name not in fields:
                return f"{name} is missing"
            if not check(fields[name]):
                return f"{name} is {_shown(fields[name])}"
        if len(fields) > len(self.required):
            for name, check in self.optional.items():
                if name in fields and not check(fields[name]):
                    return f"{name} is {_shown(fields[name])}"
            for name in fields.keys() - self._known:
                if not _is_shallow(fields[name]):
                    return "it is nested too deeply"
        return ""

    def __call__(self, value: object) -> bool:
        """Return whether a value is an object of this shape, so that a shape can serve as a check."""
        return type(value) is dict and not self.fault(value)


def _shown(value: object) -> str:
    """Format a value for an error message. Lists and objects are left out, since `repr` fails on deep nesting."""
    if type(value) is list or type(value) is dict:
        return "a list" if type(value) is list else "an object"
    return repr(value)[:_SHOWN_CHARS]


_ENDPOINT: dict[str, Check] = {"name": is_name, "instance": _is_instance, "host": is_host, "port": _is_port}
_HELD: dict[str, Check] = {"hold": _is_flag, "pid": _is_positive, "ttl": _is_number}
_INSTANCE = Shape(
    {**_ENDPOINT, "meta": _is_meta, "state": _is_state, "rev": _is_whole},
    {"registered_at": _is_time, "priority": _is_priority, **_HELD},
)
_OWNER = Shape(
    {},
    {
        "connection": _or_null(_is_text),
        "pid": _is_positive,
        "ttl": _is_number,
        "static": _is_flag,
        "withdrawn": _is_flag,
    },
)
_REFUSING = Shape({"accepted": _is_flag, "age_s": _is_number, "why": _is_text})
_PROBE = Shape({"accepted": lambda value: value is True, "age_s": _is_number}, {"why": _is_text})
_KNOWN = Shape(
    {
        "instance": _is_instance,
        "host": is_host,
        "port": _is_port,
        "state": _is_state,
        "alive": _is_flag,
        "rev": _is_whole,
        "since": _is_time,
        "owners": _list_of(_OWNER),
        "probe": lambda value: value is None or _PROBE(value) or _REFUSING(value),
    },
    {"priority": _is_priority, "more_owners": _is_flag, "meta": _is_meta},
)
_PAST_CHANGE = Shape(
    {**_ENDPOINT, "rev": _is_whole, "at": _is_time, "op": _is_text, "state": _is_state},
    {
        "priority": _is_priority,
        "reason": _is_text,
        "by": Shape({}, {"pid": _is_positive, "uid": _is_whole, "command": _is_text}),
    },
)
_LIMITS = _table_of(_or_null(_is_number))
_NOTHING = Shape({})
_ALL = Shape({"instances": _list_of(_INSTANCE), "rev": _is_whole}, {"more": _is_flag})
_RESULTS = {
    "ping": _NOTHING,
    "unwatch": _NOTHING,
    "hello": Shape(
        {
            "server": lambda value: type(value) is str and value == "regd",
            "version": _is_text,
            "protocol": _is_whole,
            "epoch": _is_text,
            "rev": _is_whole,
            "features": _list_of(_is_text),
            "limits": _LIMITS,
            "host": Shape({"boot": _or_null(_is_text), "pid_namespace": _or_null(_is_text)}),
            "loop": _is_text,
        }
    ),
    "help": Shape(
        {"commands": _table_of(Shape({"doc": _is_text, "result": _is_text, "args": _table_of(_NOTHING)}))}
    ),
    "register": Shape({**_ENDPOINT, "rev": _is_whole}, {"replaced": _is_flag}),
    "deregister": Shape({"removed": _is_whole, "rev": _is_whole}),
    "resolve": _INSTANCE,
    "list": Shape({"epoch": _is_text, "rev": _is_whole, "instances": _list_of(_INSTANCE)}, {"next": _is_key}),
    "update": Shape({"rev": _is_whole}),
    "renew": Shape({"ttl": _is_number}),
    "watch": Shape({"watch": _is_positive, "epoch": _is_text, "rev": _is_whole}),
    "why": Shape(
        {
            "name": is_name,
            "instances": _list_of(_KNOWN),
            "departures": _list_of(Shape({"instance": _is_instance, "reason": _is_text, "age_s": _is_number})),
        },
        {"more": _is_flag},
    ),
    "history": Shape({"changes": _list_of(_PAST_CHANGE)}, {"next": _is_whole}),
    "stats": Shape(
        {
            "version": _is_text,
            "epoch": _is_text,
            "rev": _is_whole,
            "registrations": _is_whole,
            "uptime_s": _is_number,
            "connections": _is_whole,
            "watches": _is_whole,
            "waiting": _is_whole,
            "requests": _table_of(_is_whole),
            "errors": _table_of(_is_whole),
            "limits": _LIMITS,
        },
        {
            "pid": _is_positive,
            "loop": _is_text,
            "registry": _is_string,  # a path may contain unprintable characters
            "log": _or_null(_is_string),
            "lag_s": _is_number,
            "lag_max_s": _is_number,
            "slowest": _or_null(Shape({"what": _is_text, "took_s": _is_number, "age_s": _is_number})),
            "started_at": _is_time,
            **dict.fromkeys(
                (
                    "registry_bytes",
                    "processes",
                    "readonly_connections",
                    "connections_accepted",
                    "connections_refused",
                    "bad_protocol",
                    "dropped",
                    "commits",
                    "commits_failed",
                    "changes",
                ),
                _is_whole,
            ),
        },
    ),
}
_REFUSAL = Shape(
    {"error": lambda value: type(value) is str and _is_label(value), "message": _is_string},
    {
        "field": _is_string,
        "near": _list_of(_is_text),
        "last": Shape({"reason": _is_text, "age_s": _is_number}),
        "owner": _OWNER,
        "rev": _is_whole,
    },
)
_POSITION = Shape({"watch": _is_positive, "rev": _is_whole})
_CHANGED = Shape({"watch": _is_positive, **_INSTANCE.required}, _INSTANCE.optional)
_GONE: dict[str, Check] = {"name": is_name, "instance": _is_instance, "reason": _is_text, "rev": _is_whole}
_EVENTS = {
    "up": _CHANGED,
    "change": _CHANGED,
    "down": Shape({"watch": _is_positive, **_GONE}),
    "sync": _POSITION,
    "progress": _POSITION,
    "reset": _POSITION,
    "lost": Shape(_GONE),
}


def fault(fields: object) -> str:
    """Return a description of the first error in a line from a daemon; "" if it is valid.

    The result of a successful reply is not checked here; see `result_fault`.
    """
    if type(fields) is not dict:
        return "it is not a JSON object"
    if ("ok" in fields) is ("event" in fields):
        return "it has neither ok nor event" if "ok" not in fields else "it has both ok and event"
    if "event" in fields:
        kind = fields["event"]
        if not _is_text(kind):
            return f"event is {_shown(kind)}"
        return _EVENTS.get(kind, _NOTHING).fault(fields)
    if "id" in fields and not _is_id(fields["id"]):
        return f"id is {_shown(fields['id'])}"
    if fields["ok"] is False:
        return _REFUSAL.fault(fields)
    return "" if fields["ok"] is True else f"ok is {_shown(fields['ok'])}"


def result_fault(cmd: str, arguments: Mapping[str, Any], reply: dict[str, Any]) -> str:
    """Return a description of the first error in a successful reply to a command; "" if it is valid."""
    if cmd == "resolve" and arguments.get("all"):
        error = _ALL.fault(reply)
        if error:
            return error
        return next(filter(None, (_mismatch(arguments, instance) for instance in reply["instances"])), "")
    error = _RESULTS.get(cmd, _NOTHING).fault(reply)  # a later daemon may have commands that are not known here
    if not error and cmd in ("resolve", "register"):
        return _mismatch(arguments, reply)
    after = arguments.get("after")
    if not error and "next" in reply and after is not None and _key(reply["next"]) <= _key(after):
        return f"next is {_shown(reply['next'])}, which does not follow {_shown(after)}"
    return error


def _mismatch(arguments: Mapping[str, Any], instance: dict[str, Any]) -> str:
    """Return a description of the error if an instance is not the requested one; "" if it is.

    `regctl` derives the names of environment variables from the name, and programs trust some of these
    variables, such as DOCKER_HOST.
    """
    for field in ("name", "instance"):
        if arguments.get(field) not in (None, instance[field]):
            return f"{field} is {_shown(instance[field])} instead of {_shown(arguments[field])}"
    return ""


def is_known_event(kind: str) -> bool:
    return kind in _EVENTS


def _key(text: str) -> tuple[str, str]:
    name, _, instance = text.partition("/")
    return name, instance
