"""What the commands take: the rules of names and values, as the protocol page has them.

Written apart from the daemon's on purpose, and held to it by the same tests. Must not know what a command does.
"""

import ipaddress
import math
import re
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from typing import Any

META_KEYS_MAX, META_BYTES_MAX = 64, 4_096
PAGE_MAX = 1_000  # instances in a reply
_REVISION_MAX = 2**63 - 1

_NAME = re.compile(
    r"(?!.{254})[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?(?:\.[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?)*"
)
_PREFIX = re.compile(r"[a-z0-9_.-]{0,253}\*")
_INSTANCE = re.compile(r"[A-Za-z0-9._-]{0,63}")
_HOST = re.compile(
    r"[A-Za-z0-9_](?:[A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?(?:\.[A-Za-z0-9_](?:[A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?)*"
)
_SCOPE = re.compile(r"[0-9A-Za-z_.-]{1,15}")
_NUMBER = re.compile(r"[0-9]+|0[xX][0-9A-Fa-f]*")  # as the last label: an IPv4 address to who connects

Check = Callable[[Any], Any]


class Refused(Exception):
    """A request that is answered with an error: `code`, the message, and `details` for further fields."""

    def __init__(self, code: str, message: str, **details: object) -> None:
        super().__init__(message)
        self.code = code
        self.details = details


class _Wrong(ValueError):
    """Completes the sentence "ARGUMENT …"."""


def _matching(pattern: re.Pattern[str], rule: str) -> Check:
    def check(value: Any) -> str:
        if type(value) is not str or not pattern.fullmatch(value):
            raise _Wrong(f"must be {rule}")
        return value

    return check


_name = _matching(_NAME, "labels of a-z 0-9 - _, 63 long at most, joined by dots, 253 in all")
_prefix = _matching(_PREFIX, "a name, or the beginning of one followed by *")
_instance = _matching(_INSTANCE, "0 to 63 of A-Z a-z 0-9 . _ -")
_state = _matching(re.compile("starting|ready|draining"), "starting, ready or draining")
_epoch = _matching(re.compile(r"(?s).{1,64}"), "a string, as `watch` or `hello` gave it")


def _pattern(value: Any) -> str:
    check = _prefix if type(value) is str and value.endswith("*") else _name
    return str(check(value))


def _place(value: Any) -> tuple[str, str]:
    if type(value) is not str:
        raise _Wrong("must be a string, as `next` gave it")
    name, _, instance = value.partition("/")
    return _name(name), _instance(instance)


def _flag(value: Any) -> bool:
    if type(value) is not bool:
        raise _Wrong("must be true or false")
    return value


def _whole(least: int, most: int) -> Check:
    def check(value: Any) -> int:
        if type(value) is not int or not least <= value <= most:
            raise _Wrong(f"must be a whole number, {least} to {most}")
        return value

    return check


def _seconds(least: float, most: float) -> Check:
    def check(value: Any) -> float:
        if type(value) not in (int, float) or not math.isfinite(value) or not least <= value <= most:
            raise _Wrong(f"must be a number of seconds, {least:g} to {most:g}")
        return float(value)

    return check


def _host(value: Any) -> str:
    if type(value) is not str or not 1 <= len(value) <= 253:
        raise _Wrong("must be an IP address or a host name, 253 characters at most")
    try:
        address = ipaddress.ip_address(value)
    except ValueError:
        if not _HOST.fullmatch(value) or _NUMBER.fullmatch(value.rpartition(".")[2]):
            raise _Wrong("must be an IP address (IPv6 without brackets) or a host name") from None
        return value
    mapped = address
    if isinstance(address, ipaddress.IPv6Address):
        if not _SCOPE.fullmatch(address.scope_id or "0"):
            raise _Wrong("must name an interface behind the %")
        mapped = address.ipv4_mapped or address
    if address.is_unspecified or mapped.is_unspecified:
        raise _Wrong("is nothing to call: it means every address here")
    return value


def _meta(value: Any) -> dict[str, str]:
    if type(value) is not dict or not all(type(each) is str for each in [*value, *value.values()]):
        raise _Wrong("must be an object of strings")
    if len(value) > META_KEYS_MAX:
        raise _Wrong(f"must have at most {META_KEYS_MAX} keys")
    if len("".join([*value, *value.values()]).encode()) > META_BYTES_MAX:
        raise _Wrong(f"must be at most {META_BYTES_MAX} bytes, keys and values together")
    return value


_IF = {"if": _whole(0, _REVISION_MAX)}
_KEY = {"name": _name, "instance": _instance}
COMMANDS: Mapping[str, tuple[Mapping[str, Check], tuple[str, ...]]] = {  # the arguments, and those that must be
    "ping": ({}, ()),
    "hello": ({}, ()),
    "help": ({"topic": str}, ()),
    "register": (
        {
            **_KEY,
            "port": _whole(1, 65_535),
            "host": _host,
            "meta": _meta,
            "state": _state,
            "hold": _flag,
            "pid": _whole(1, 2**31 - 1),
            "ttl": _seconds(1, 86_400),
            **_IF,
            "force": _flag,
        },
        ("name", "port"),
    ),
    "deregister": ({**_KEY, **_IF}, ("name",)),
    "resolve": ({**_KEY, "meta": _meta, "all": _flag, "wait": _seconds(0, 3_600)}, ("name",)),
    "list": ({"name": _pattern, "meta": _meta, "after": _place, "limit": _whole(1, PAGE_MAX)}, ()),
    "update": ({**_KEY, "meta": _meta, "state": _state, **_IF}, ("name",)),
    "renew": ({**_KEY, "ttl": _seconds(1, 86_400)}, ("name",)),
    "watch": ({"name": _pattern, "meta": _meta, "epoch": _epoch, "since": _whole(0, _REVISION_MAX)}, ()),
    "unwatch": ({"watch": _whole(1, _REVISION_MAX)}, ("watch",)),
    "why": (_KEY, ("name",)),
    "stats": ({}, ()),
}


def checked(cmd: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a command, each held against its rule.

    Raises:
        Refused: `unknown_command`, or `bad_argument` with `field`.
    """
    if cmd not in COMMANDS:
        near = get_close_matches(cmd[:64], COMMANDS, n=1)
        raise Refused("unknown_command", f"no command {cmd[:64]!r}", near=near)
    checks, required = COMMANDS[cmd]
    taken = {}
    for name, value in given.items():
        if name not in checks:
            near = get_close_matches(name[:64], checks, n=1)
            raise Refused("bad_argument", f"{cmd} has no argument {name[:64]!r}", field=name[:64], near=near)
        try:
            taken[name] = checks[name](value)
        except _Wrong as wrong:
            raise Refused("bad_argument", f"{name} {wrong}", field=name) from None
    for name in required:
        if name not in taken:
            raise Refused("bad_argument", f"{cmd} needs {name}", field=name)
    return taken
