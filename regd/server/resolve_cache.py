"""Replies that need no work: a plain `resolve` of a name with one instance, once it was answered.

What is remembered of a name is forgotten in the moment when anything about the name changes: a change lands, a
holder is known to be gone. So what is said from here is what the registry would say now.
Must not know connections, nor why something changed.
"""

import re

from regd.core.model import Entry
from regd.protocol import messages

# The request as clients write it, with an id in one place or the other. All else is left to the decoder.
_ID = rb'"id": ?([1-9][0-9]{0,17})'
_USUAL = re.compile(
    rb'\{"cmd": ?"resolve",(?: ?' + _ID + rb',)? ?"name": ?"([a-z0-9_.-]+)"(?:, ?' + _ID + rb")?\}\r?\n"
)
_CMD_BYTES = len('{"cmd": "resolve"')
_CHUNK_BYTES_MAX = 4_096  # what is answered at once, so that others have their turn
_REPLY_BYTES_MAX = 65_536  # and with what: the peer may read none of it


class ResolveCache:
    """`known` has the replies by line, as it stands, with its line feed; `count` is how many were given."""

    def __init__(self, *, remembers: bool = True) -> None:
        self._remembers = remembers
        self.count = 0
        self.invalidate_all()

    def lookup(self, data: bytes) -> bytes | None:
        """Return the replies to a chunk of the peer's bytes, None unless all of it is lines that need no work."""
        if len(data) > _CHUNK_BYTES_MAX or b"resolve" not in data[:_CMD_BYTES]:
            return None
        lines = data.splitlines(keepends=True)
        try:
            reply = b"".join(map(self._known, lines))  # no Python runs for each line
        except KeyError:
            replies = [self.known.get(line) or self._unusual(line) for line in lines]
            if None in replies:
                return None
            reply = b"".join(replies)  # type: ignore[arg-type]  # none of them is None
        if len(reply) > _REPLY_BYTES_MAX:
            return None
        self.count += len(lines)
        return reply

    def _unusual(self, line: bytes) -> bytes | None:
        """Answer what is known in other words: with an id, or with blanks."""
        found = _USUAL.fullmatch(line)
        if found is None:
            return None
        before, name, behind = found.groups()
        reply = self.known.get(_line(name))
        if reply is None or (before and behind):  # an id twice is an error
            return None
        id = before or behind
        return messages.with_id(id, reply) if id else reply

    def put(self, entry: Entry) -> None:
        """Say the same again of this one's name, until it is forgotten."""
        if self._remembers:
            self.known[_line(entry.name.encode())] = messages.resolved(None, entry)

    def invalidate(self, name: str) -> None:
        """What was said of a name may not be true any more."""
        self.known.pop(_line(name.encode()), None)

    def invalidate_all(self) -> None:
        """Forget what was said of every name."""
        self.known: dict[bytes, bytes] = {}
        self._known = self.known.__getitem__


def _line(name: bytes) -> bytes:
    return b'{"cmd":"resolve","name":"' + name + b'"}\n'
