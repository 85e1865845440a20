"""What can be seen of daemons and services from outside, on this machine: processes, sockets, files.

Must not know what it means. Looks are bounded in number and time.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

from regd_client import wire
from regd_client.errors import BadArgument

_OTHERS = 16  # addresses
_CONNECT_S = 0.25  # on loopback it takes microseconds
_HEAD_BYTES = 4_096


def addresses(but: wire.Address) -> list[wire.Address]:
    """Return where else a daemon may be: the default, $REGD_ADDRESS, and what processes `regd` were told."""
    found: dict[str, wire.Address] = {}
    for text in (wire.DEFAULT_ADDRESS, os.environ.get("REGD_ADDRESS", ""), *_told()):
        try:
            each = wire.parse_address(text)
        except BadArgument:
            continue
        if str(each) != str(but):
            found.setdefault(str(each), each)
    return list(found.values())[:_OTHERS]


def _told() -> Iterator[str]:
    """Yield the addresses in the command lines of daemons that run."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().decode(errors="replace").split("\0")
        except OSError:
            continue  # it ended
        if "regd" in (os.path.basename(word) for word in words[:3]):
            yield from _listens(words)


def _listens(words: list[str]) -> Iterator[str]:
    told = [part for word in words for part in (word.split("=", 1) if word.startswith("--") else [word])]
    for flag, value in pairwise(told):
        if flag == "--port" and value != "0":
            yield f"127.0.0.1:{value}"
        elif flag == "--unix":
            yield f"unix://{value}"


def who(at: wire.Address) -> str:
    """Return the command that tells who listens there."""
    return f"`lsof {at.path}`" if at.path else f"`ss -ltnp 'sport = :{at.port}'`"


def is_ours(pid: int) -> bool:
    """Return whether that process is this user's."""
    try:
        return os.stat(f"/proc/{pid}").st_uid == os.geteuid()
    except OSError:
        return False


def revision(registry: Path) -> int | None:
    """Return the revision that a registry's file says it has, or None.

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
