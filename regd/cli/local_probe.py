"""Finds daemons and services of this machine without a request to a daemon: by /proc, sockets and files."""

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

_ADDRESSES_MAX = 16
_CONNECT_S = 0.25  # to a loopback address, which normally takes microseconds
_HEAD_BYTES = 4_096
_MODULES = ("regd", "regd.cli.regd")
_PYTHON_FLAGS = "-bBdEhiIOPqsSuvVx?"  # python(1): one-letter options without a value
_LONG_WITH_VALUE = ("--check-hash-based-pycs",)


def addresses(other_than: protocol.Address) -> list[protocol.Address]:
    """Return further addresses of daemons: the default, $REGD_ADDRESS, and those of running daemons."""
    others: dict[str, protocol.Address] = {}
    for text in (protocol.DEFAULT_ADDRESS, os.environ.get("REGD_ADDRESS", ""), *_from_command_lines()):
        try:
            address = protocol.parse_address(text)
        except BadArgument:
            continue
        if str(address) != str(other_than):
            others.setdefault(str(address), address)
    return list(others.values())[:_ADDRESSES_MAX]


def _from_command_lines() -> Iterator[str]:
    """Yield the addresses in the command lines of running daemons that can be reached from here."""
    for pid, flags in daemons():
        yield from _addresses_in(flags, f"/proc/{pid}/cwd", tcp=not is_in_another_network(pid))


def daemons() -> Iterator[tuple[int, list[str]]]:
    """Yield the process ids of running daemons, with their flags."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().decode(errors="replace").rstrip("\0").split("\0")
        except OSError:
            continue  # the process has ended
        flags = _flags(words)
        if flags is not None:
            yield int(path.parent.name), flags


def _flags(words: list[str]) -> list[str] | None:
    """Return the flags in the command line of a daemon; None if it is another program's.

    A daemon is `regd …`, `python … -m regd …` or `python … /path/of/regd …`. A launcher such as `uv run`
    starts one of these as a child.
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
        if option[:1] in ("m", "c", "X", "W"):  # the value is the rest of the word, or the next word
            value = option[1:] or "".join(rest[:1])
            if not option[1:]:
                del rest[:1]
            if option[0] in "mc":
                return rest if option[0] == "m" and value in _MODULES else None
    return rest[1:] if rest and os.path.basename(rest[0]) == "regd" else None


def _addresses_in(flags: list[str], folder: str = "/", tcp: bool = True) -> Iterator[str]:
    """Yield the addresses in a daemon's flags; `folder` is its current folder."""
    words = [part for word in flags for part in (word.split("=", 1) if word.startswith("--") else [word])]
    for flag, value in pairwise(words):
        if flag == "--port" and value != "0" and tcp:
            yield f"127.0.0.1:{value}"
        elif flag == "--unix" and value.startswith("/"):
            yield f"unix://{value}"
        elif flag == "--unix":
            with contextlib.suppress(OSError):
                yield f"unix://{os.readlink(folder)}/{value}"


def is_in_another_network(pid: int) -> bool:
    """Return whether a process is in another network namespace; False also if this user may not know that."""
    try:
        return os.readlink(f"/proc/{pid}/ns/net") != os.readlink("/proc/self/ns/net")
    except OSError:
        return False  # the process belongs to another user, or has ended


def who(at: protocol.Address) -> str:
    """Return the shell command that shows which program listens at an address."""
    return f"`lsof {at.path}`" if at.path else f"`ss -ltnp 'sport = :{at.port}'`"


def is_ours(pid: int) -> bool:
    """Return whether a process belongs to this user."""
    try:
        return os.stat(f"/proc/{pid}").st_uid == os.geteuid()
    except OSError:
        return False


def revision(registry: Path) -> int | None:
    """Return the revision in a registry file; None if it has none, for example if it was written by hand.

    Raises:
        OSError: the file cannot be read.
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
    """Return whether a host is a loopback address."""
    return host in ("localhost", "::1") or host.startswith("127.")


def accepts(host: str, port: int) -> bool:
    """Return whether a program accepts connections. The connection is closed at once."""
    try:
        with socket.create_connection((host, port), _CONNECT_S) as connection:
            # TCP can connect a socket to itself.
            return bool(connection.getsockname() != connection.getpeername())
    except OSError:
        return False
