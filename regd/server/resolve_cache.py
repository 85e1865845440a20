"""Cached replies to plain `resolve` requests, for names with one instance, or with one of the best priority.

A cached reply is invalidated as soon as its name changes: a change is committed, or a holder is marked gone. So a
cached reply is always what the registry would answer.
"""

import re

from regd.core.model import Entry
from regd.protocol import messages

# The request as clients write it, with an id in either place. Other requests are left to the parser.
_ID = rb'"id": ?([1-9][0-9]{0,17})'
_USUAL = re.compile(
    rb'\{"cmd": ?"resolve",(?: ?' + _ID + rb',)? ?"name": ?"([a-z0-9_.-]+)"(?:, ?' + _ID + rb")?\}\r?\n"
)
_CMD_BYTES = len('{"cmd": "resolve"')
_CHUNK_BYTES_MAX = 4_096  # answered at once, so that other connections do not wait
_REPLY_BYTES_MAX = 65_536  # sent at once, since the peer may not read it


class ResolveCache:
    """`known` has the replies by request line, including its line feed; `count` is the number of replies."""

    def __init__(self, *, remembers: bool = True) -> None:
        self._remembers = remembers
        self.count = 0
        self.invalidate_all()

    def lookup(self, data: bytes) -> bytes | None:
        """Return the replies to a chunk of a peer's bytes; None unless the chunk is lines with cached replies."""
        if len(data) > _CHUNK_BYTES_MAX or b"resolve" not in data[:_CMD_BYTES]:
            return None
        lines = data.splitlines(keepends=True)
        try:
            reply = b"".join(map(self._known, lines))  # a loop in C
        except KeyError:
            replies = [self.known.get(line) or self._variant(line) for line in lines]
            if None in replies:
                return None
            reply = b"".join(replies)  # type: ignore[arg-type]  # none of them is None
        if len(reply) > _REPLY_BYTES_MAX:
            return None
        self.count += len(lines)
        return reply

    def _variant(self, line: bytes) -> bytes | None:
        """Return the reply to a line that has an id or blanks."""
        match = _USUAL.fullmatch(line)
        if match is None:
            return None
        before, name, behind = match.groups()
        reply = self.known.get(_line(name))
        if reply is None or (before and behind):  # two ids are an error
            return None
        id = before or behind
        return messages.add_encoded_id(id, reply) if id else reply

    def put(self, entry: Entry) -> None:
        """Cache the reply for an entry's name, until it is invalidated."""
        if self._remembers:
            self.known[_line(entry.name.encode())] = messages.resolved(None, entry)

    def invalidate(self, name: str) -> None:
        """Drop the cached reply for a name."""
        self.known.pop(_line(name.encode()), None)

    def invalidate_all(self) -> None:
        """Drop all cached replies."""
        self.known: dict[bytes, bytes] = {}
        self._known = self.known.__getitem__


def _line(name: bytes) -> bytes:
    return b'{"cmd":"resolve","name":"' + name + b'"}\n'
