"""The types of the registry, `Entry`, `Holder` and `Change`, and the rules for their values.

The `check_` functions take any value, for example one from JSON. They return it if it is valid, else they raise
`Invalid`.
"""

import ipaddress
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import NamedTuple

from regd.core.errors import Invalid
from regd.core.limits import DEFAULT

Key = tuple[str, str]
"""(name, instance). It identifies a registration, and lists are in order of it."""


def key_text(key: Key) -> str:
    """Return a key as NAME or NAME/INSTANCE, the form in `registry.json` and in `next` of a reply."""
    name, instance = key
    return f"{name}/{instance}" if instance else name


DEFAULT_HOST = "127.0.0.1"
MACHINE = "regd.machine"  # the label that a bridge gives to instances of other machines: the machine's name
# Memory, measured on CPython 3.11.
_ENTRY_BYTES = 1_024  # an entry, its cached reply, and what refers to it in all tables
_HOLDER_BYTES = 512  # a holder, and what refers to it in all tables
_PAIR_BYTES = 192  # a key and a value of `meta`, without their text


class State(StrEnum):
    """The state of an instance. Only `ready` instances are resolved."""

    STARTING = "starting"
    READY = "ready"
    DRAINING = "draining"


class Process(NamedTuple):
    """A process, identified by its number and the time of its start, since numbers are reused.

    `born` is the id of the boot and the start time in clock ticks, as one text that is only compared. It is empty
    if only the number is known.
    """

    pid: int
    born: str


@dataclass(frozen=True, slots=True)
class Holder:
    """One owner of a registration, and the conditions under which it keeps the registration alive.

    It may have several conditions, which must all be true: its connection is open (`hold`), its process runs
    (`process`), and its lease was renewed in the last `ttl_s` seconds.

    Attributes:
        id: a number that no other holder of the registry has.
        session: the connection that registered; None for a holder that was loaded at a start. A loaded holder
            with `hold` is unclaimed until its client registers again.
        withdrawn: it no longer keeps the registration alive, but can still deregister.
    """

    id: int
    session: int | None
    hold: bool = False
    process: Process | None = None
    ttl_s: float | None = None
    withdrawn: bool = False

    def is_same(self, other: "Holder") -> bool:
        """Whether `other` is the same owner."""
        if self.hold or other.hold:
            return self.hold and other.hold and self.session is not None and self.session == other.session
        return self.process == other.process

    @property
    def unclaimed(self) -> bool:
        """Whether this is a loaded `hold` that its client has not claimed since the start."""
        return self.hold and self.session is None

    def is_claimed_by(self, other: "Holder") -> bool:
        """Whether registering with `other` claims this holder."""
        return self.unclaimed and other.hold and self.process == other.process


@dataclass(slots=True)
class Entry:
    """A registration as of revision `rev`. A change creates a new entry and never modifies an old one.

    The class is not `frozen`, because that would make a `register` 50% slower; a test checks the source code
    instead.

    Attributes:
        registered_at: Unix seconds, for display.
        holders: its owners. Without any, the registration is static: it stays until it is deregistered.
        priority: lower is preferred, as in RFC 2782.
    """

    name: str
    instance: str
    host: str
    port: int
    meta: Mapping[str, str]
    state: State
    rev: int
    registered_at: float
    holders: tuple[Holder, ...] = ()
    priority: int = 0
    # Caches of what is computed from the fields above; None and 0 until it is needed. Only `protocol.messages`
    # sets `encoded`.
    encoded: bytes | None = field(default=None, init=False, compare=False, repr=False)
    _weight_bytes: int = field(default=0, init=False, compare=False, repr=False)

    @property
    def key(self) -> Key:
        return (self.name, self.instance)

    @property
    def hold(self) -> bool:
        return any(holder.hold for holder in self.holders)

    @property
    def pid(self) -> int | None:
        """The process of the first holder that has one."""
        return next((holder.process.pid for holder in self.holders if holder.process), None)

    @property
    def ttl_s(self) -> float | None:
        """The lease of the first holder that has one."""
        return next((holder.ttl_s for holder in self.holders if holder.ttl_s is not None), None)

    def looks_like(self, other: "Entry") -> bool:
        """Whether clients see no difference from `other`, which has the same key. Then there is no event."""
        if (self.meta, self.state, self.host, self.port) != (other.meta, other.state, other.host, other.port):
            return False
        if self.priority != other.priority:
            return False
        if self.holders == other.holders:
            return True
        return (self.hold, self.pid, self.ttl_s) == (other.hold, other.pid, other.ttl_s)

    @property
    def weight_bytes(self) -> int:
        """The memory of the entry by estimate, for `registry_bytes_max`.

        Texts count three times: in the entry, in its line of `registry.json`, and in its cached reply.
        """
        if not self._weight_bytes:
            size = _ENTRY_BYTES + _HOLDER_BYTES * len(self.holders)
            size += 3 * (len(self.name) + len(self.instance) + len(self.host))
            for key, value in self.meta.items():
                size += _PAIR_BYTES + 3 * (_written(key) + _written(value))
            self._weight_bytes = size
        return self._weight_bytes

    @property
    def is_remote(self) -> bool:
        """Whether this is an instance of another machine. A local instance of the same key replaces it."""
        return MACHINE in self.meta

    def carries(self, meta: Mapping[str, str]) -> bool:
        """Whether the entry has all of these labels."""
        if not meta:
            return True
        own = self.meta
        return all(own.get(key) == value for key, value in meta.items())


class Op(StrEnum):
    """What a change does to an entry."""

    UP = "up"
    CHANGE = "change"
    DOWN = "down"
    KEEP = "keep"  # only the holders change; clients see no difference, so it has no revision and no event


class Reason(StrEnum):
    """Why an instance is down."""

    DEREGISTERED = "deregistered"
    CLOSED = "connection closed"
    EXITED = "process exited"
    EXPIRED = "ttl expired"
    REPLACED = "replaced"
    FILTERED = "filtered"  # only in events: the instance is up, but no longer has the labels of the watch


class By(NamedTuple):
    """The client that made a change. A field is None if the operating system does not tell."""

    pid: int | None = None
    uid: int | None = None
    command: str | None = None  # the name of the program, without its arguments


class Change(NamedTuple):
    """A change of one registration.

    Attributes:
        entry: the new entry; for `down`, the entry that ends.
        reason: why it ends; "" if it does not.
        previous: the entry before the change; None for `up`.
        at: Unix seconds.
    """

    rev: int
    op: Op
    entry: Entry
    reason: str = ""
    previous: Entry | None = None
    at: float = 0.0
    by: By | None = None


def _written(text: str) -> int:
    """Return the length of a text as ASCII JSON, by estimate: six bytes a character if one needs an escape."""
    return len(text) if text.isascii() and text.isprintable() else 6 * len(text)


def _meta_bytes(meta: Mapping[str, str]) -> int:
    text = "".join([*meta, *meta.values()])
    return len(text) if text.isascii() else len(text.encode())


_LABEL = rf"[a-z0-9_](?:[a-z0-9_-]{{0,{DEFAULT.label_chars_max - 2}}}[a-z0-9_])?"
_NAME = re.compile(rf"{_LABEL}(?:\.{_LABEL})*")
_PREFIX = re.compile(rf"[a-z0-9_.-]{{0,{DEFAULT.name_chars_max}}}\*")
_INSTANCE = re.compile(rf"[A-Za-z0-9._-]{{0,{DEFAULT.instance_chars_max}}}")
_HOST_LABEL = r"[A-Za-z0-9_](?:[A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?"
_HOST = re.compile(rf"{_HOST_LABEL}(?:\.{_HOST_LABEL})*")
_SCOPE = re.compile(r"[0-9A-Za-z_.-]{1,15}")  # the interface in fe80::1%eth0; `ipaddress` accepts any text there
# With a last label such as 1 or 0x7f, programs take a host name for an address ("ends in a number", WHATWG URL).
_NUMBER = re.compile(r"[0-9]+|0[xX][0-9A-Fa-f]*")


def _text(value: object) -> str:
    if type(value) is not str:
        raise Invalid("must be a string")
    return value


def check_name(value: object) -> str:
    name = _text(value)
    if len(name) > DEFAULT.name_chars_max:
        raise Invalid(f"must be at most {DEFAULT.name_chars_max} characters")
    if not _NAME.fullmatch(name):
        raise Invalid(
            "must be labels of a-z 0-9 - _, 1 to 63 long, beginning and ending with a letter, digit or _, "
            "joined by dots"
        )
    return name


def check_pattern(value: object) -> str:
    """Check a name, or a prefix of names followed by `*`."""
    pattern = _text(value)
    if not pattern.endswith("*"):
        return check_name(pattern)
    if not _PREFIX.fullmatch(pattern):
        raise Invalid("must be a name, or the beginning of one followed by *")
    return pattern


def check_instance(value: object) -> str:
    instance = _text(value)
    if not _INSTANCE.fullmatch(instance):
        raise Invalid(f"must be 0 to {DEFAULT.instance_chars_max} of A-Z a-z 0-9 . _ -")
    return instance


def check_whole(value: object, least: int, most: int) -> int:
    if type(value) is not int:  # `isinstance` would accept a bool
        raise Invalid("must be a whole number")
    if not least <= value <= most:
        raise Invalid(f"must be {least} to {most}")
    return value


def check_port(value: object) -> int:
    return check_whole(value, 1, 65_535)


def check_priority(value: object) -> int:
    return check_whole(value, 0, 65_535)


def check_seconds(value: object, least: float, most: float) -> float:
    if type(value) is not int and type(value) is not float:
        raise Invalid("must be a number of seconds")
    if not (least <= value <= most and math.isfinite(value)):
        raise Invalid(f"must be {least:g} to {most:g} seconds")
    return float(value)


def check_flag(value: object) -> bool:
    if type(value) is not bool:
        raise Invalid("must be true or false")
    return value


def check_host(value: object) -> str:
    """Check an IP address or a host name that a client can connect to."""
    host = _text(value)
    if host == DEFAULT_HOST:
        return host
    if not 1 <= len(host) <= DEFAULT.host_chars_max:
        raise Invalid(f"must be 1 to {DEFAULT.host_chars_max} characters")
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        if not _HOST.fullmatch(host) or _NUMBER.fullmatch(host.rpartition(".")[2]):
            raise Invalid("must be an IP address (IPv6 without brackets) or a host name") from None
        return host
    if isinstance(address, ipaddress.IPv6Address) and not _SCOPE.fullmatch(address.scope_id or "0"):
        raise Invalid("must name an interface after the %, as in fe80::1%eth0")
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    if address.is_unspecified or (mapped is not None and mapped.is_unspecified):
        raise Invalid(f"is nothing to call: {host} means every address here; give one, such as 127.0.0.1")
    return host


def check_meta(value: object) -> dict[str, str]:
    if type(value) is not dict:
        raise Invalid("must be an object of strings")
    if len(value) > DEFAULT.meta_keys_max:
        raise Invalid(f"must have at most {DEFAULT.meta_keys_max} keys")
    for key, text in value.items():
        if type(key) is not str or type(text) is not str:
            raise Invalid(f"must be an object of strings; the value of {key!r:.64} is not a string")
    try:
        size = _meta_bytes(value)
    except UnicodeEncodeError:
        raise Invalid("must be text; it contains half of a surrogate pair") from None
    if size > DEFAULT.meta_bytes_max:
        raise Invalid(f"must be at most {DEFAULT.meta_bytes_max} bytes, keys and values together")
    return value


def check_state(value: object) -> State:
    try:
        return State(_text(value))
    except ValueError:
        raise Invalid(f"must be one of {', '.join(State)}") from None
