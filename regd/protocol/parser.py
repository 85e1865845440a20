"""Parse the bytes of a client into requests, and recognize browsers and other protocols.

`receive` splits the bytes into lines and keeps an incomplete one. `next` parses one line at a time, so that the
caller can do other work in between. Any bytes give requests and problems, and raise nothing.

The first of these rules that applies to a line decides. After a fatal problem, the connection is closed.

1. It begins with `{`: a JSON request.
2. It is an HTTP request line: a fatal problem, answered in HTTP.
3. It is a bare line (see `bare.py`): a request.
4. It begins with a letter and is printable: a mistyped bare line. It is a fatal problem if the client has sent no
   valid request before, since a client of another protocol begins with a line of that protocol.
5. Any other line belongs to another protocol: a fatal problem.
"""

import re
from collections import deque
from dataclasses import dataclass

from regd.core.errors import Code, Refused
from regd.core.limits import DEFAULT, Limits
from regd.protocol.bare import Quit, parse_bare_line
from regd.protocol.commands import Request
from regd.protocol.messages import HTTP_REFUSAL, decode

# telnet sends a carriage return as CR NUL (RFC 854). Before and after a line, both count as white space.
_BLANKS = re.compile(rb"(?:[ \t]++|\r\0?)*+")
_END_BYTES = len(b"\r\0\r")  # the most bytes between a line and its line feed
_LINE_OVERHEAD_BYTES = 56  # the memory of a `bytes` object in the queue, without its bytes
# Printable text, and white space at its end. `*+` never backtracks; `*` would take quadratic time for many
# blanks.
_TEXT = re.compile(rb"([!-~][ -~\t]*+)(?:[ \t]|\r\0?)*+")
_HTTP = re.compile(rb"[!-~]+[ \t]+[!-~]+[ \t]+HTTP/[!-~]*[ \t]*")  # RFC 9112, section 3
_HTTP_BEGUN = re.compile(rb"[!-~]+[ \t]+[!-~]")
_EXCERPT_BYTES = 60  # of a line of another protocol, for the log


@dataclass(frozen=True, slots=True)
class Problem:
    """A line that is answered with an error.

    Attributes:
        refusal: the error.
        fatal: the client's further bytes are ignored, and the connection is closed.
        seen: the beginning of a line of another protocol. It may contain control sequences: escape it for the
            log.
        reply: the bytes to send instead of `refusal`, in the other protocol; empty if there are none.
    """

    refusal: Refused
    fatal: bool = False
    seen: bytes = b""
    reply: bytes = b""


Item = Request | Problem | Quit


class RequestParser:
    """Splits the bytes of a client into lines, and parses them."""

    __slots__ = ("_closed", "_limits", "_lines", "_partial", "_skipping", "_waiting_bytes", "had_valid_request")

    def __init__(self, limits: Limits = DEFAULT) -> None:
        self.had_valid_request = False  # decides whether a mistyped line is fatal
        self._limits = limits
        self._lines: deque[bytes | Problem] = deque()  # a problem replaces a line that is too long
        self._partial = bytearray()  # the incomplete line
        self._skipping = False  # the incomplete line is too long: discard it up to its end
        self._closed = False
        self._waiting_bytes = 0  # of complete lines

    @property
    def waiting_bytes(self) -> int:
        """The memory of the lines that `next` has not returned."""
        return self._waiting_bytes + len(self._partial)

    @property
    def has_lines(self) -> bool:
        """Whether `next` returns an item."""
        return bool(self._lines)

    @property
    def is_empty(self) -> bool:
        """Whether all bytes were parsed, so that the next byte begins a line."""
        return not (self._lines or self._partial or self._skipping or self._closed)

    @property
    def has_partial_line(self) -> bool:
        """Whether a line has begun and not ended. Leading white space does not count."""
        return self._skipping or (bool(self._partial) and self._partial != b"\r")

    def receive(self, data: bytes) -> None:
        """Split bytes of the client into lines."""
        if self._closed:
            return
        first, *lines = data.split(b"\n")
        if not lines:
            self._append(first)
            return
        last = lines.pop()
        if self._skipping:
            self._skipping = False
        elif self._partial:
            self._partial += first
            self._queue_line(bytes(self._partial))
        else:
            self._queue_line(first)
        self._partial.clear()
        for line in lines:
            if line:
                self._queue_line(line)
        if last and not self._closed:
            self._append(last)

    def parse_single(self, data: bytes) -> Request | Problem | None:
        """Parse bytes that are exactly one JSON line, without the queue. Return None if they are anything else.

        Call it only while `is_empty` is true. It is a shortcut for the usual case.
        """
        is_line = data.startswith(b"{") and data.endswith(b"}\n") and data.find(b"\n") == len(data) - 1
        return self._parse_json(data[:-1]) if is_line and len(data) <= self._limits.line_bytes_max else None

    def end(self) -> None:
        """Handle the end of the input: an incomplete line counts as complete."""
        if self._partial and not self._closed:
            self._queue_line(bytes(self._partial))
        self._partial.clear()
        self._skipping = False

    def close(self) -> None:
        """Discard all lines, and ignore further bytes."""
        self._closed = True
        self._lines.clear()
        self._partial.clear()
        self._skipping = False
        self._waiting_bytes = 0

    def _queue_line(self, line: bytes) -> None:
        """Queue a complete line without leading white space. Ignore an empty line."""
        if line.endswith((b"\r", b"\0")):
            line = line.removesuffix(b"\r").removesuffix(b"\r\0")
        if not line.startswith(b"{"):
            line = line[_count_blanks(line) :]
        if len(line) > self._bytes_max(line):
            self._lines.append(self._too_large() if line.startswith(b"{") else self._too_long(line))
        elif line:
            self._lines.append(line)
            self._waiting_bytes += len(line) + _LINE_OVERHEAD_BYTES

    def _too_long(self, line: bytes) -> Problem:
        """Return the problem of a line that is longer than a bare line may be. It may be an HTTP request line."""
        http = len(line) <= self._limits.line_bytes_max and self._may_be_http(line) and _is_http(line)
        return _other_protocol(line, http)

    def _too_large(self) -> Problem:
        most = self._limits.line_bytes_max
        return Problem(Refused(Code.TOO_LARGE, f"a line is at most {most} bytes; this one was skipped"))

    def _may_be_http(self, line: bytes | bytearray) -> bool:
        return _HTTP_BEGUN.match(line, 0, self._bytes_max(line)) is not None

    def _append(self, data: bytes) -> None:
        """Append to the incomplete line. If it can no longer become a valid line, queue a problem instead."""
        if self._skipping:
            return
        self._partial += data
        if not self._partial.startswith(b"{"):
            blanks = _count_blanks(self._partial)
            # Keep a carriage return at the end, since a NUL may follow.
            del self._partial[: blanks - (blanks == len(self._partial) and self._partial.endswith(b"\r"))]
            if not self.has_partial_line:
                return
        if not self._partial.startswith(b"{"):
            if not self._may_be_text():
                # Do not wait for the end of the line: a TLS hello may contain no line feed.
                self._lines.append(_other_protocol(self._partial, False))
                self._partial.clear()
                self._closed = True
        elif len(self._partial) > self._limits.line_bytes_max + _END_BYTES:
            self._lines.append(self._too_large())
            self._partial.clear()
            self._skipping = True

    def _may_be_text(self) -> bool:
        """Whether the incomplete line can still become a bare line or an HTTP request line."""
        size = len(self._partial)
        if size <= self._bytes_max(self._partial) + _END_BYTES:
            return _TEXT.fullmatch(self._partial) is not None
        return size <= self._limits.line_bytes_max + _END_BYTES and self._may_be_http(self._partial)

    def _bytes_max(self, line: bytes | bytearray) -> int:
        """Return the most bytes that a line with this beginning may have."""
        most = self._limits.line_bytes_max
        return most if line.startswith(b"{") else min(most, self._limits.bare_line_bytes_max)

    def next(self) -> Item | None:
        """Parse and return the next line; None if there is no complete one."""
        if not self._lines:
            return None
        line = self._lines.popleft()
        if isinstance(line, Problem):
            if line.fatal:
                self.close()
            return line
        self._waiting_bytes -= len(line) + _LINE_OVERHEAD_BYTES
        return self._parse_json(line) if line.startswith(b"{") else self._parse_text(line)

    def _parse_json(self, line: bytes) -> Request | Problem:
        try:
            request = decode(line)
        except Refused as refusal:
            return Problem(refusal.without_traceback())
        self.had_valid_request = True
        return request

    def _parse_text(self, line: bytes) -> Item:
        text = _TEXT.fullmatch(line)
        http = _is_http(line)
        if text is None or http or not line[:1].isalpha():
            self.close()
            return _other_protocol(line, http)
        try:
            item = parse_bare_line(text[1].decode())
        except Refused as refusal:
            if self.had_valid_request:
                return Problem(refusal.without_traceback())
            self.close()
            refusal.message += " (closed: no valid request came before)"
            return Problem(refusal.without_traceback(), fatal=True, seen=line[:_EXCERPT_BYTES])
        self.had_valid_request = self.had_valid_request or isinstance(item, Request)
        return item


def _other_protocol(line: bytes | bytearray, http: bool) -> Problem:
    """Return the problem of a line that belongs to another protocol. `http`: it is an HTTP request line."""
    return Problem(
        Refused(
            Code.BAD_REQUEST,
            'this is regd: one JSON object a line, such as {"cmd":"help"}, or a bare line such as help, list '
            "or resolve NAME",
        ),
        fatal=True,
        seen=bytes(line[:_EXCERPT_BYTES]),
        reply=HTTP_REFUSAL if http else b"",
    )


def _is_http(line: bytes) -> bool:
    text = _TEXT.fullmatch(line)
    return text is not None and _HTTP.fullmatch(text[1]) is not None


def _count_blanks(line: bytes | bytearray) -> int:
    """Return the number of bytes of leading white space."""
    blanks = _BLANKS.match(line)
    return blanks.end() if blanks else 0
