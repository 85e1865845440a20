"""What can be seen of daemons and services from outside, on this machine: processes, sockets, files.

Must not know what it means. Looks are bounded in number and time.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

from regd_client import protocol
from regd_client.errors import BadArgument

_OTHERS = 16  # addresses
_CONNECT_S = 0.25  # on loopback it takes microseconds
_HEAD_BYTES = 4_096
_MODULES = ("regd", "regd.cli.regd")
_PYTHON_FLAGS = "-bBdEhiIOPqsSuvVx?"  # python(1): options of one letter without a value
_LONG_WITH_VALUE = ("--check-hash-based-pycs",)


def addresses(but: protocol.Address) -> list[protocol.Address]:
    """Return where else a daemon may be: the default, $REGD_ADDRESS, and what running daemons were told."""
    found: dict[str, protocol.Address] = {}
    for text in (protocol.DEFAULT_ADDRESS, os.environ.get("REGD_ADDRESS", ""), *_told()):
        try:
            each = protocol.parse_address(text)
        except BadArgument:
            continue
        if str(each) != str(but):
            found.setdefault(str(each), each)
    return list(found.values())[:_OTHERS]


def _told() -> Iterator[str]:
    """Yield the addresses in the command lines of daemons that run, as far as they lead there from here."""
    for pid, flags in daemons():
        yield from _listens(flags, f"/proc/{pid}/cwd", tcp=not is_in_another_network(pid))


def daemons() -> Iterator[tuple[int, list[str]]]:
    """Yield the processes that run a daemon, with the flags of each."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().decode(errors="replace").rstrip("\0").split("\0")
        except OSError:
            continue  # it ended
        flags = _flags(words)
        if flags is not None:
            yield int(path.parent.name), flags


def _flags(words: list[str]) -> list[str] | None:
    """Return the flags in the command line of a daemon, None where it is one of another program.

    A daemon is `regd …`, `python … -m regd …` or `python … /path/of/regd …`; a launcher such as `uv run` has one
    of these as its child.
    """
    program, *rest = words
    if os.path.basename(program) == "regd":
        return rest
    if not os.path.basename(program).startswith(("python", "pypy")):
        return None
    while rest and rest[0].startswith("-"):
        word = rest.pop(0)
        if word in _LONG_WITH_VALUE:
            del rest[:1]
        option = "" if word.startswith("--") else word.lstrip(_PYTHON_FLAGS)
        if option[:1] in ("m", "c", "X", "W"):  # its value is the rest of the word, or the next one
            value = option[1:] or "".join(rest[:1])
            if not option[1:]:
                del rest[:1]
            if option[0] in "mc":
                return rest if option[0] == "m" and value in _MODULES else None
    return rest[1:] if rest and os.path.basename(rest[0]) == "regd" else None


def _listens(flags: list[str], folder: str = "/", tcp: bool = True) -> Iterator[str]:
    told = [part for word in flags for part in (word.split("=", 1) if word.startswith("--") else [word])]
    for flag, value in pairwise(told):
        if flag == "--port" and value != "0" and tcp:
            yield f"127.0.0.1:{value}"
        elif flag == "--unix" and value.startswith("/"):
            yield f"unix://{value}"
        elif flag == "--unix":
            with contextlib.suppress(OSError):
                yield f"unix://{os.readlink(folder)}/{value}"


def is_in_another_network(pid: int) -> bool:
    """Return whether that process has another loopback than this one, as far as can be seen."""
    try:
        return os.readlink(f"/proc/{pid}/ns/net") != os.readlink("/proc/self/ns/net")
    except OSError:
        return False  # another user's, or gone


def who(at: protocol.Address) -> str:
    """Return the command that tells who listens there."""
    return f"`lsof {at.path}`" if at.path else f"`ss -ltnp 'sport = :{at.port}'`"


def is_ours(pid: int) -> bool:
    """Return whether that process is this user's."""
    try:
        return os.stat(f"/proc/{pid}").st_uid == os.geteuid()
    except OSError:
        return False


def revision(registry: Path) -> int | None:
    """Return the revision that a registry's file says it has; None where it says none, as one written by hand.

    Raises:
        OSError: it cannot be read.
    """
    with registry.open("rb") as file:
        head = file.read(_HEAD_BYTES).decode(errors="replace").splitlines()
    for line in head:
        if line.startswith('"$regd":'):
            try:
                rev = json.loads("{" + line.rstrip(",") + "}")["$regd"]["rev"]
            except (ValueError, KeyError, TypeError):
                return None
            return rev if type(rev) is int else None
    return None


def is_loopback(host: str) -> bool:
    return host in ("localhost", "::1") or host.startswith("127.")


def accepts(host: str, port: int) -> bool:
    """Return whether something accepts a connection there, and closes it at once."""
    try:
        with socket.create_connection((host, port), _CONNECT_S) as made:
            return bool(made.getsockname() != made.getpeername())
    except OSError:
        return False
