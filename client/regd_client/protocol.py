"""The client side of the protocol: parse addresses, encode requests, decode and check replies and events.

The daemon does not share this code; the transcripts in PROTOCOL.md test both sides. `regctl` imports this module
whenever it starts, so this module imports little.
"""

from __future__ import annotations

import functools
import json
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from regd_client import project, replies
from regd_client.errors import BadArgument, RegdError, Unavailable, from_reply
from regd_client.version import VERSION

__all__ = [
    "DEFAULT_ADDRESS",
    "LINE_BYTES_MAX",
    "NOT_REGD",
    "REPLY_BYTES_MAX",
    "Address",
    "AddressFinder",
    "autostart_wanted",
    "cached_reply",
    "cached_request",
    "check_result",
    "connectable",
    "decode_line",
    "encode_request",
    "find_address",
    "host_port",
    "not_a_reply",
    "own_host",
    "parse_address",
    "refusal",
    "refused",
    "split_reply",
    "unavailable",
    "unsupported",
    "unsupported_part",
]

DEFAULT_ADDRESS = "tcp://127.0.0.1:7343"
LINE_BYTES_MAX = 65_536  # of a request; the daemon refuses longer ones
# The following limits are far above the daemon's own. A program that exceeds them is not regd.
REPLY_BYTES_MAX = 4 * 1_048_576
INSTANCES_MAX = 400_000  # in all pages of a reply, or in a snapshot
PAGES_MAX = 10_000  # of one reply
NOT_REGD = "not_regd"  # code of the error if another program answers
_LOOPBACK = ("127.0.0.1", "::1", "localhost")  # the hosts on which regd listens
_YES = ("1", "true", "yes", "on")  # values of REGD_AUTOSTART, in lower case
_NO = ("", "0", "false", "no", "off")
_SOCKET_PATH_BYTES_MAX = 107  # sockaddr_un without its final NUL (unix(7))
_warned: set[tuple[str, tuple[str, ...]]] = set()  # warnings that have been logged, with their values
_encode = json.JSONEncoder(separators=(",", ":"), allow_nan=False).encode


# Addresses.


class Address:
    """The address of a daemon: the `path` of a Unix socket, or `host` and `port`.

    `project` is the folder of the project registry at this address, or "" for every other address.
    """

    def __init__(self, host: str, port: int, path: str = "", project: str = "") -> None:
        self.host = host
        self.port = port
        self.path = path
        self.project = project

    def __repr__(self) -> str:
        return f"<Address {self}>"

    def __str__(self) -> str:
        if self.path:
            return f"unix://{self.path}"
        return f"tcp://{host_port(self.host, self.port)}"


def host_port(host: str, port: int) -> str:
    """Return HOST:PORT, with an IPv6 address in brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def parse_address(text: str) -> Address:
    """Parse `tcp://HOST:PORT`, `HOST:PORT` or `unix:///path`.

    Raises:
        BadArgument: the text has none of these forms.
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
    """Return whether the idna codec can encode the host; otherwise `getaddrinfo` would raise UnicodeError."""
    if host.isascii():  # without the codec, whose import takes a fifth of a command's time
        *labels, last = host.split(".")
        return all(0 < len(label) < 64 for label in labels) and len(last) < 64
    try:
        host.encode("idna")
    except UnicodeError:
        return False
    return True


def _bad_address(text: str) -> BadArgument:
    return BadArgument(
        f"{text!r} is not an address; write tcp://HOST:PORT, HOST:PORT or unix:///path",
        details={"field": "address"},
    )


def find_address(address: str | None = None) -> Address:
    """Return the address of the daemon.

    It is `address`, else $REGD_ADDRESS, else the project registry of the current folder, else
    tcp://127.0.0.1:7343.
    """
    if text := address or os.environ.get("REGD_ADDRESS"):
        return parse_address(text)
    search = project.search()
    for ignored in search.ignored:
        _warn_once("%s is ignored: %s; %s", *ignored, ignored.do)
    if search.folder is None:
        return parse_address(DEFAULT_ADDRESS)
    _warn_in_test(search.folder)
    return Address("", 0, project.socket_path(search.folder), search.folder)


def _warn_in_test(folder: str) -> None:
    """Warn once that a test uses a project registry.

    Only the process that runs the tests warns, the one with pytest loaded. The programs that a test starts
    inherit PYTEST_CURRENT_TEST too, and do not warn.
    """
    if "PYTEST_CURRENT_TEST" in os.environ and "pytest" in sys.modules:
        _warn_once("a test uses the project registry %s; the fixture `regd` has a private one", folder)


class AddressFinder:
    """Finds the address of a client's daemon, for each new connection.

    It reads $REGD_ADDRESS each time. It searches for the project registry once, when the client is made, so that
    a later `chdir` changes nothing.
    """

    def __init__(self, address: str | None) -> None:
        self._address = address
        self._found = None if address or os.environ.get("REGD_ADDRESS") else find_address()

    def find(self) -> Address:
        """Return the address, as `find_address` does.

        Raises:
            BadArgument: `address` or $REGD_ADDRESS is not an address.
        """
        if self._address or os.environ.get("REGD_ADDRESS"):
            return find_address(self._address)
        if self._found is None:
            self._found = find_address()
        if self._found.project:
            _warn_in_test(self._found.project)
        return self._found


@contextmanager
def connectable(path: str) -> Iterator[str]:
    """Yield a path with which to connect to a Unix socket.

    If `path` is too long for a socket address, the result goes through a descriptor of its folder.
    """
    if len(os.fsencode(path)) <= _SOCKET_PATH_BYTES_MAX:
        yield path
        return
    folder, name = os.path.split(path)
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{descriptor}/{name}"
    finally:
        os.close(descriptor)


def autostart_wanted(address: Address) -> bool:
    """Return whether a daemon may be started.

    For a project registry, a client may start one unless $REGD_AUTOSTART is off. For another address,
    $REGD_AUTOSTART must be on, and the address must be on this machine.

    An invalid value means off, and is logged once.
    """
    value = os.environ.get("REGD_AUTOSTART", "")
    if value.lower() not in (*_YES, *_NO):
        _warn_once("REGD_AUTOSTART is %r, which is neither yes nor no: no daemon is started; write 1 or 0", value)
    if address.project and not value:
        return True
    return value.lower() in _YES and (bool(address.path) or address.host in _LOOPBACK)


def _warn_once(text: str, *values: str) -> None:
    if (text, values) not in _warned:
        _warned.add((text, values))
        import logging  # slow to import, and rarely needed

        logging.getLogger("regd_client").warning(text, *values)


def own_host() -> dict[str, str | None]:
    """Return this process's boot id and PID namespace, to compare with `host` in the daemon's `hello`."""
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            boot = file.read().strip()
        return {"boot": boot, "pid_namespace": os.readlink("/proc/self/ns/pid")}
    except OSError:
        return {"boot": None, "pid_namespace": None}


# Requests.


def encode_request(cmd: str, id: int | None, arguments: Mapping[str, Any]) -> bytes:
    """Encode a request as a line. Arguments that are None are left out.

    Raises:
        BadArgument: an argument is not a JSON value, or the line is too long.
    """
    fields: dict[str, Any] = {"cmd": cmd}
    if id is not None:
        fields["id"] = id
    fields |= {key: value for key, value in arguments.items() if value is not None}
    try:
        line = _encode(fields)
        if "\\ud" in line:  # maybe a lone surrogate, which the daemon refuses
            json.dumps(fields, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        text = error.object[error.start : error.end]
        raise BadArgument(f"{cmd}: {text!r} cannot be written in UTF-8; leave it out") from None
    except (TypeError, ValueError, RecursionError) as error:
        raise BadArgument(f"{cmd} takes JSON values only: {error}") from None
    meta = fields.get("meta")
    if meta and not all(type(key) is str for key in meta):
        raise BadArgument(f"{cmd}: the keys of meta must be strings", details={"field": "meta"})
    if len(line) > LINE_BYTES_MAX:
        raise BadArgument(f"{cmd}: the request is {len(line)} bytes, {LINE_BYTES_MAX} at most")
    return line.encode() + b"\n"


# Replies and events.


def decode_line(line: bytes) -> dict[str, Any]:
    """Decode and check a line from the daemon, and return its fields.

    The result of a successful reply is not checked yet: call `check_result`.

    Raises:
        Unavailable: the line is not from regd.
    """
    try:
        fields = json.loads(line.decode())
        fault = replies.fault(fields)
    except (ValueError, RecursionError):
        fault = "it is not JSON"
    if fault:
        raise not_a_reply(fault, line)
    return fields  # type: ignore[no-any-return]


def check_result(cmd: str, arguments: Mapping[str, Any], fields: dict[str, Any]) -> dict[str, Any]:
    """Check that `fields` are a reply to this command, with a valid result if it is successful. Return `fields`.

    Raises:
        Unavailable: the reply is not from regd.
    """
    if "ok" not in fields:
        raise not_a_reply("it is an event", str(fields["event"]))
    if fields["ok"] and (fault := replies.result_fault(cmd, arguments, fields)):
        raise not_a_reply(f"to {cmd}: {fault}")
    return fields


def not_a_reply(why: str, line: bytes | str = "") -> Unavailable:
    """Return the error for a program that does not speak the protocol."""
    shown = f": {line[:60]!r}" if line else ""
    return Unavailable(f"not a regd reply ({why}){shown}; see which program listens there", NOT_REGD)


def add_page(instances: list[Any], page: Mapping[str, Any], number: int) -> None:
    """Add the instances of page `number` of a reply.

    Raises:
        Unavailable: the reply has more instances or pages than a daemon can send.
    """
    instances += page["instances"]
    if len(instances) > INSTANCES_MAX or (number >= PAGES_MAX and "next" in page):
        raise not_a_reply(f"to list: {len(instances)} instances in {number} pages, without an end")


def refusal(fields: dict[str, Any], address: Address) -> RegdError:
    """Return the error for a reply with `"ok": false`."""
    return refused(address, fields) if fields.get("error") == "shutting_down" else from_reply(fields)


def refused(address: Address, fields: dict[str, Any]) -> Unavailable:
    """Return the error for a daemon that refuses the connection itself: `busy`, `shutting_down`, …"""
    error = from_reply(fields)
    return Unavailable(str(unavailable(address, str(error))), error.code, error.details)


def unavailable(address: Address, why: str) -> Unavailable:
    """Return the error for an address at which no daemon answers."""
    start = "`regd`, or `python3 -m regd`"
    if address.project:
        start = f"`regd --project {address.project}`"
        if not autostart_wanted(address):
            start += f" (REGD_AUTOSTART={os.environ['REGD_AUTOSTART']} keeps this program from starting it)"
    return Unavailable(
        f"no regd at {address} ({why}); start one with {start}, or name another address in REGD_ADDRESS"
    )


# A daemon that is older than this client.


def unsupported_part(cmd: str, arguments: Mapping[str, Any], refusal: Mapping[str, Any]) -> str | None:
    """Return the command or argument of a refused request that an older daemon may not know; else None."""
    if refusal.get("error") == "unknown_command":
        return cmd
    field = refusal.get("field")
    return field if refusal.get("error") == "bad_argument" and field in arguments else None


def unsupported(
    address: Address, cmd: str, part: str, hello: Mapping[str, Any], described: Mapping[str, Any]
) -> dict[str, Any] | None:
    """Return the error reply to report if the daemon is too old to know `part` of a request; else None.

    `hello` and `described` are the daemon's replies to `hello` and `help`.
    """
    version, commands = hello.get("version"), described.get("commands")
    if version in (None, VERSION) or commands is None:  # as new as this client, or commands not listed
        return None
    command = commands.get(cmd)
    if command is not None and (part == cmd or part in command["args"]):
        return None
    what = f"command {cmd}" if command is None else f"argument {part} of {cmd}"
    message = f"regd {version} at {address} has no {what}, and this client is {VERSION}; restart that regd"
    return {"ok": False, "error": "unsupported", "message": message}


# Caches for `resolve`, because without them JSON takes half of the client's time: requests for the same name are
# encoded once, and equal replies are decoded once. The number and the length of the entries are limited.

_CACHED_MAX = 1_024  # requests, and as many replies
_NAME_CHARS_MAX = 253  # the daemon refuses longer names
_CACHED_REPLY_BYTES_MAX = 1_024  # longer replies are not cached
_ID_DIGITS_MAX = 18  # the ids of this client are far shorter
_OK = b'{"ok":true,"id":'  # the beginning of each successful reply


def cached_request(cmd: str, id: int, arguments: Mapping[str, Any]) -> bytes:
    """Encode a request like `encode_request`, using the cache if its only argument is a name."""
    if len(arguments) == 1 and type(name := arguments.get("name")) is str and len(name) <= _NAME_CHARS_MAX:
        return _request_template(cmd, name) % id
    return encode_request(cmd, id, arguments)


@functools.lru_cache(_CACHED_MAX)
def _request_template(cmd: str, name: str) -> bytes:
    line = encode_request(cmd, 0, {"name": name})
    return line.replace(b"%", b"%%").replace(b'"id":0', b'"id":%d', 1)


def split_reply(line: bytes) -> tuple[int, bytes]:
    """Return the id of a successful reply and the text after it; (0, b"") for any other line."""
    if line.startswith(_OK):
        id, _, text = line[len(_OK) :].partition(b",")
        if id.isdigit() and len(id) <= _ID_DIGITS_MAX:
            return int(id), text
    return 0, b""


def cached_reply(text: bytes) -> dict[str, Any]:
    """Return the checked reply to a `resolve`, without its id. Callers share the dictionary: never modify it."""
    return _decode_cached(text) if len(text) <= _CACHED_REPLY_BYTES_MAX else _decode_resolve(text)


def _decode_resolve(text: bytes) -> dict[str, Any]:
    return check_result("resolve", {}, decode_line(b'{"ok":true,' + text))


_decode_cached = functools.lru_cache(_CACHED_MAX)(_decode_resolve)
