"""What is asked again and again, and answered alike: the line of a question is written once, the reply read once.

That saves the JSON encoder and decoder, half of what a resolve costs here. Both are remembered by the text that
they depend on and by nothing else, so many of them, and none that is long. Must not know who asks.
"""

import functools
from typing import Any

from regd_client import wire

_KEPT = 1_024  # questions, and replies
_NAME_CHARS_MAX = 253  # longer ones are no names
_REPLY_BYTES_MAX = 1_024  # with more than a few labels: read every time
_DIGITS_MAX = 18  # far beyond what is ever asked
_OK = b'{"ok":true,"id":'  # as the daemon begins a reply


def request(cmd: str, id: int, arguments: dict[str, Any]) -> bytes:
    """Return a request's line, as `wire.request` does."""
    if len(arguments) == 1 and type(name := arguments.get("name")) is str and len(name) <= _NAME_CHARS_MAX:
        return _question(cmd, name) % id
    return wire.request(cmd, id, arguments)


@functools.lru_cache(_KEPT)
def _question(cmd: str, name: str) -> bytes:
    line = wire.request(cmd, 0, {"name": name})
    return line.replace(b"%", b"%%").replace(b'"id":0', b'"id":%d', 1)


def parts(line: bytes) -> tuple[int, bytes]:
    """Return the number of a reply that is `ok` and what it says; 0 where it is not in the daemon's own form."""
    if line.startswith(_OK):
        number, _, said = line[len(_OK) :].partition(b",")
        if number.isdigit() and len(number) <= _DIGITS_MAX:
            return int(number), said
    return 0, b""


def reply(said: bytes) -> dict[str, Any]:
    """Return the checked reply to `resolve`, without its number. It belongs to everybody: never change it."""
    return _known(said) if len(said) <= _REPLY_BYTES_MAX else _read(said)


def _read(said: bytes) -> dict[str, Any]:
    return wire.checked("resolve", {}, wire.reply(b'{"ok":true,' + said))


_known = functools.lru_cache(_KEPT)(_read)
