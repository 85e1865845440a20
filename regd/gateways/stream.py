"""The event stream: the lines of a `watch` as `text/event-stream`, with ids from which a reader can resume.

See "Server-sent events" in the HTML standard.
"""

import json
import re
from collections.abc import Mapping
from typing import Any

__all__ = ["EventEncoder", "parse_position"]

_RETRY = b"retry: 1000\n\n"
_REVISION = re.compile(r"[0-9]{1,19}")
_REVISION_MAX = 2**63 - 1  # the daemon refuses larger ones
_EPOCH_CHARS_MAX = 64  # the daemon refuses longer ones
_LINE_BYTES_MAX = 65_536  # of an event; the longest one of the daemon has half as many

COMMENT = b":\n\n"  # keeps a silent stream open


def parse_position(last_event_id: str) -> dict[str, Any] | None:
    """Return the arguments of `watch` for a `Last-Event-ID` of the form EPOCH-REV; None for any other text."""
    epoch, _, rev = last_event_id.rpartition("-")
    if not 1 <= len(epoch) <= _EPOCH_CHARS_MAX or not _REVISION.fullmatch(rev) or int(rev) > _REVISION_MAX:
        return None
    return {"epoch": epoch, "since": int(rev)}


class EventEncoder:
    """Encodes the events of one watch.

    Events have an id from `sync` on, or from the start if the watch resumes, because a watch can resume only from
    the revision of such an event. `reset` has an empty id, so that a reader that reconnects during the snapshot
    starts anew.

    Args:
        reply: the reply to `watch`.
        resumes: whether the watch was asked to resume.

    Raises:
        ValueError: the reply is not from regd.
    """

    def __init__(self, reply: Mapping[str, Any], *, resumes: bool) -> None:
        self._epoch = str(reply["epoch"])
        if not self._epoch.isprintable():
            raise ValueError("not the epoch of a daemon")
        self._has_positions = resumes
        self._rest = b""  # the incomplete line at the end of the input

    def head(self) -> bytes:
        """Return the beginning of the stream, which is `reset` if the stream does not resume."""
        return _RETRY if self._has_positions else _RETRY + _event("reset", "", b"{}")

    def encode(self, data: bytes) -> bytes:
        """Encode the events that this input from the daemon completes.

        Raises:
            ValueError: the input is not from regd.
        """
        *lines, self._rest = (self._rest + data).split(b"\n")
        if len(self._rest) > _LINE_BYTES_MAX:
            raise ValueError("not an event: the line is too long")
        return b"".join(map(self._encode, lines))

    def _encode(self, line: bytes) -> bytes:
        try:
            fields = json.loads(line)
            kind, rev = fields["event"], fields["rev"]
        except (ValueError, LookupError, TypeError, RecursionError):
            kind, rev = "", 0
        if not (type(kind) is str and kind.isalpha() and type(rev) is int and b"\r" not in line):
            raise ValueError(f"not an event: {line[:60]!r}")
        if kind in ("reset", "sync"):
            self._has_positions = kind == "sync"
        if kind == "reset":
            return _event(kind, "", line)
        return _event(kind, f"{self._epoch}-{rev}" if self._has_positions else None, line)


def _event(kind: str, id: str | None, line: bytes) -> bytes:
    head = f"event: {kind}\n" if id is None else f"event: {kind}\nid: {id}\n"
    return head.encode() + b"data: " + line + b"\n\n"
