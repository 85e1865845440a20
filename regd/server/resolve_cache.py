"""Cached replies to plain `resolve` requests.

A reply is cached if a ready instance is the only one of its name, or the only one with the best priority. It is
invalidated as soon as anything about the name changes: a change is committed, or a holder is marked as gone. So a
cached reply is always the reply that the registry would give.
"""

import re

from regd.core.model import Entry
from regd.protocol import messages

# A plain `resolve` as clients write it, with or without an id. The parser handles any other way to write it.
_ID = rb'"id": ?([1-9][0-9]{0,17})'
_USUAL = re.compile(
    rb'\{"cmd": ?"resolve",(?: ?' + _ID + rb',)? ?"name": ?"([a-z0-9_.-]+)"(?:, ?' + _ID + rb")?\}\r?\n"
)
_CMD_BYTES = len('{"cmd": "resolve"')
_CHUNK_BYTES_MAX = 4_096  # a longer chunk is answered in time slices, so that other connections do not wait
_REPLY_BYTES_MAX = 65_536  # longer replies are sent in parts, since the client may not read them


class ResolveCache:
    """`known` maps request lines, each with its line feed, to replies.

    `count` is the number of requests answered from the cache. A cache that is not enabled is always empty.
    """

    def __init__(self, *, is_enabled: bool = True) -> None:
        self._is_enabled = is_enabled
        self.count = 0
        self.invalidate_all()

    def lookup(self, data: bytes) -> bytes | None:
        """Return the replies to the lines in `data`; None unless all lines are whole and have cached replies."""
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
        id_before, name, id_after = match.groups()
        reply = self.known.get(_line(name))
        if reply is None or (id_before and id_after):  # two ids are an error
            return None
        id = id_before or id_after
        return messages.add_encoded_id(id, reply) if id else reply

    def put(self, entry: Entry) -> None:
        """Cache the reply for an entry's name, until it is invalidated."""
        if self._is_enabled:
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
