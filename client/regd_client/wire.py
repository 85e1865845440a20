"""The client's half of the protocol: addresses, and lines to and from dictionaries.

Written apart from the daemon's on purpose, and held to it by the same transcripts. Imports next to nothing:
`regctl` starts with this. Must not know how a line travels.
"""

from __future__ import annotations

import os

from regd_client import notation, replies
from regd_client.errors import BadArgument, RegdError, Unavailable, from_reply

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

DEFAULT_ADDRESS = "tcp://127.0.0.1:7343"
_LOOPBACK = ("127.0.0.1", "::1", "localhost")  # where regd listens
_YES = ("1", "true", "yes", "on")  # of REGD_AUTOSTART, in any case
_NO = ("", "0", "false", "no", "off")
_warned: set[str] = set()
LINE_BYTES_MAX = 65_536  # of a request; the daemon skips longer ones
NOT_REGD = "not_regd"  # the code of the error that says so
REPLY_BYTES_MAX = 4 * 1_048_576  # far beyond what the daemon promises; more is another program
INSTANCES_MAX = 400_000  # in all pages, or in a snapshot: twice what the daemon registers
PAGES_MAX = 10_000  # three times as many as that takes at most


class Address:
    """Where a daemon listens: a Unix socket's `path`, or `host` and `port`."""

    def __init__(self, host: str, port: int, path: str = "") -> None:
        self.host = host
        self.port = port
        self.path = path

    def __str__(self) -> str:
        if self.path:
            return f"unix://{self.path}"
        return f"tcp://{joined(self.host, self.port)}"


def joined(host: str, port: int) -> str:
    """Return HOST:PORT, an IPv6 address in brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def parse_address(text: str) -> Address:
    """Read `tcp://HOST:PORT`, `HOST:PORT` or `unix:///path`.

    Raises:
        BadArgument: it is none of them.
    """
    if text.startswith("unix://"):
        path = text[len("unix://") :]
        if path.startswith("/"):
            return Address("", 0, path)
        raise _bad_address(text)
    host, colon, port = text.removeprefix("tcp://").rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        colon = ""
    number = int(port) if port.isascii() and port.isdigit() and len(port) <= 5 else 0
    if not colon or not host or "/" in host or not 1 <= number <= 65_535:
        raise _bad_address(text)
    if not _is_encodable(host):
        raise _bad_address(text)
    return Address(host, number)


def _is_encodable(host: str) -> bool:
    """Whether idna takes it, as connecting does, with an error that is none of the network's."""
    if host.isascii():  # the same rule, without the codec, whose import takes a fifth of a command's time
        *labels, last = host.split(".")
        return all(0 < len(label) < 64 for label in labels) and len(last) < 64
    try:
        host.encode("idna")
    except UnicodeError:
        return False
    return True


def _bad_address(text: str) -> BadArgument:
    return BadArgument(
        f"{text!r} is no address; write tcp://HOST:PORT, HOST:PORT or unix:///path",
        details={"field": "address"},
    )


def find_address(given: str | None = None) -> Address:
    """Return the daemon's address: the one given, else $REGD_ADDRESS, else tcp://127.0.0.1:7343."""
    return parse_address(given or os.environ.get("REGD_ADDRESS") or DEFAULT_ADDRESS)


def autostarts(address: Address) -> bool:
    """Return whether to start a daemon when none answers there: $REGD_AUTOSTART says yes, and it is this machine.

    Any other value than a yes or a no is logged once, and counts as no.
    """
    value = os.environ.get("REGD_AUTOSTART", "")
    if value.lower() not in (*_YES, *_NO) and value not in _warned:
        _warned.add(value)
        import logging  # which takes longer than many a command

        logging.getLogger("regd_client").warning(
            "REGD_AUTOSTART is %r, which is neither yes nor no: no daemon is started; write 1 or 0", value
        )
    return value.lower() in _YES and (bool(address.path) or address.host in _LOOPBACK)


def request(cmd: str, id: int | None, arguments: dict[str, Any]) -> bytes:
    """Return a request's line; arguments that are None are left out.

    Raises:
        BadArgument: it is no JSON, or too long to send.
    """
    fields: dict[str, Any] = {"cmd": cmd}
    if id is not None:
        fields["id"] = id
    fields |= {key: value for key, value in arguments.items() if value is not None}
    try:
        line = notation.write(fields)
    except (TypeError, ValueError, RecursionError) as error:
        raise BadArgument(f"{cmd} takes JSON values only: {error}") from None
    meta = fields.get("meta")
    if meta and not all(type(key) is str for key in meta):
        raise BadArgument(f"{cmd}: the keys of meta must be strings", details={"field": "meta"})
    if len(line) > LINE_BYTES_MAX:
        raise BadArgument(f"{cmd}: the request is {len(line)} bytes, {LINE_BYTES_MAX} at most")
    return line.encode() + b"\n"


def reply(line: bytes) -> dict[str, Any]:
    """Read a line from a daemon: an event, a refusal, or a reply that is `ok`, whose result `checked` checks.

    Raises:
        Unavailable: it is not from a regd.
    """
    try:
        fields = notation.read(line.decode())
        why = replies.fault(fields)
    except (ValueError, RecursionError):
        why = "it is no JSON"
    if why:
        raise not_a_reply(why, line)
    return fields  # type: ignore[no-any-return]


def checked(cmd: str, arguments: Mapping[str, Any], fields: dict[str, Any]) -> dict[str, Any]:
    """Return the reply to a command, when it is a refusal or has the result that the command gives.

    Raises:
        Unavailable: it is not from a regd.
    """
    if "ok" not in fields:
        raise not_a_reply("it is an event", str(fields["event"]))
    if fields["ok"] and (why := replies.result_fault(cmd, arguments, fields)):
        raise not_a_reply(f"to {cmd}: {why}")
    return fields


def add_page(instances: list[dict[str, Any]], page: dict[str, Any], number: int) -> None:
    """Add the instances of a page, the `number`th of a reply.

    Raises:
        Unavailable: there are more than a regd has, or further pages than it needs.
    """
    instances += page["instances"]
    if len(instances) > INSTANCES_MAX or (number >= PAGES_MAX and "next" in page):
        raise not_a_reply(f"to list: {len(instances)} instances in {number} pages, and no end")


def not_a_reply(why: str, line: bytes | str = "") -> Unavailable:
    """Return the error of a peer that does not speak the protocol."""
    shown = f": {line[:60]!r}" if line else ""
    return Unavailable(f"not a regd reply ({why}){shown}; see which program listens there", NOT_REGD)


def refusal(fields: dict[str, Any], address: Address) -> RegdError:
    """Return the error of a reply that is not `ok`."""
    return refused(address, fields) if fields.get("error") == "shutting_down" else from_reply(fields)


def refused(address: Address, fields: dict[str, Any]) -> Unavailable:
    """Return the error of a daemon that ends the conversation: `busy`, `shutting_down`, …"""
    refusal = from_reply(fields)
    return Unavailable(str(unavailable(address, str(refusal))), refusal.code, refusal.details)


def own_host() -> dict[str, str | None]:
    """Return the boot and the namespace of process numbers, as a daemon's `hello` has its own."""
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            boot = file.read().strip()
        return {"boot": boot, "pid_namespace": os.readlink("/proc/self/ns/pid")}
    except OSError:
        return {"boot": None, "pid_namespace": None}


def unavailable(address: Address, why: str) -> Unavailable:
    return Unavailable(
        f"no regd at {address} ({why}); start one with `regd`, or `python3 -m regd`, "
        "or name another address in REGD_ADDRESS"
    )
