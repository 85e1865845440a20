"""The parser of a peer's bytes: requests and problems, in order. It also guards against browsers.

`receive` splits the bytes into lines and keeps an unfinished one; `next` parses one line at a time, so that the
caller can pause between two. The parser is total: any bytes give requests and problems, and no other exception.

The first rule that applies to a line decides:
1. It begins with `{`: a JSON request.
2. It is an HTTP request line: fatal, and answered in HTTP.
3. It is a bare line (`bare.py`): a request.
4. It begins with a letter and is printable: a mistyped bare line. It is fatal if no valid request came before,
   since a client of another protocol begins with a line of that protocol.
5. Any other line is of another protocol: fatal.
"""

import re
from collections import deque
from dataclasses import dataclass

from regd.core.errors import Code, Refused
from regd.core.limits import DEFAULT, Limits
from regd.protocol.bare import Quit, understand
from regd.protocol.commands import Request
from regd.protocol.messages import HTTP_REFUSAL, decode

# telnet sends a carriage return as CR NUL (RFC 854), which counts as white space before and after a line.
_BLANKS = re.compile(rb"(?:[ \t]++|\r\0?)*+")
_END_BYTES = len(b"\r\0\r")  # of a line's end, besides the line feed
# The memory of a `bytes` object in the queue, besides its bytes.
_LINE_OVERHEAD_BYTES = 56
# Printable text, then a line's end. Possessive (`*+`), or a long run of blanks would take quadratic time.
_TEXT = re.compile(rb"([!-~][ -~\t]*+)(?:[ \t]|\r\0?)*+")
_HTTP = re.compile(rb"[!-~]+[ \t]+[!-~]+[ \t]+HTTP/[!-~]*[ \t]*")  # RFC 9112, section 3
_HTTP_BEGUN = re.compile(rb"[!-~]+[ \t]+[!-~]")
_SEEN_BYTES = 60  # of a line of another protocol, for the log


@dataclass(frozen=True, slots=True)
class Problem:
    """A line that is answered with an error. After a fatal problem the rest of the peer's bytes is ignored.

    `seen` is the beginning of a line of another protocol, as raw bytes: escape it for a terminal. `reply`
    replaces the error line for a peer of another protocol.
    """

    refusal: Refused
    fatal: bool = False
    seen: bytes = b""
    reply: bytes = b""


Item = Request | Problem | Quit


class RequestParser:
    """Splits a peer's bytes into lines and parses them."""

    __slots__ = ("_closed", "_limits", "_lines", "_rest", "_skipping", "_waiting_bytes", "valid")

    def __init__(self, limits: Limits = DEFAULT) -> None:
        self.valid = False  # the peer has sent a valid request
        self._limits = limits
        self._lines: deque[bytes | Problem] = deque()  # a problem in place of a line that was not kept
        self._rest = bytearray()  # the unfinished line
        self._skipping = False  # the unfinished line is too long: skip it up to its end
        self._closed = False
        self._waiting_bytes = 0  # of complete lines

    @property
    def waiting_bytes(self) -> int:
        """The bytes kept of lines that `next` has not returned."""
        return self._waiting_bytes + len(self._rest)

    @property
    def pending(self) -> bool:
        """Whether `next` would return an item."""
        return bool(self._lines)

    @property
    def empty(self) -> bool:
        """Whether nothing is kept, so that the next byte begins a line."""
        return not (self._lines or self._rest or self._skipping or self._closed)

    @property
    def unfinished(self) -> bool:
        """Whether an incomplete line is kept."""
        return self._skipping or (bool(self._rest) and self._rest != b"\r")

    def receive(self, data: bytes) -> None:
        """Take bytes of the peer."""
        if self._closed:
            return
        first, *lines = data.split(b"\n")
        if not lines:
            self._more(first)
            return
        last = lines.pop()
        if self._skipping:
            self._skipping = False
        elif self._rest:
            self._rest += first
            self._line(bytes(self._rest))
        else:
            self._line(first)
        self._rest.clear()
        for line in lines:
            if line:
                self._line(line)
        if last and not self._closed:
            self._more(last)

    def parse_single(self, data: bytes) -> Request | Problem | None:
        """Parse bytes that are exactly one JSON line, while nothing is kept. Returns None if they are not."""
        is_line = data.startswith(b"{") and data.endswith(b"}\n") and data.find(b"\n") == len(data) - 1
        return self._json(data[:-1]) if is_line and len(data) <= self._limits.line_bytes_max else None

    def end(self) -> None:
        """The peer sends no more: an unfinished line is complete."""
        if self._rest and not self._closed:
            self._line(bytes(self._rest))
        self._rest.clear()
        self._skipping = False

    def close(self) -> None:
        """Drop what is kept, and ignore further bytes."""
        self._closed = True
        self._lines.clear()
        self._rest.clear()
        self._skipping = False
        self._waiting_bytes = 0

    def _line(self, line: bytes) -> None:
        """Queue a complete line without leading blanks. An empty line is ignored."""
        if line.endswith((b"\r", b"\0")):
            line = line.removesuffix(b"\r").removesuffix(b"\r\0")
        if not line.startswith(b"{"):
            line = line[_leading(line) :]
        if len(line) > self._most(line):
            self._lines.append(self._too_large() if line.startswith(b"{") else self._too_long(line))
        elif line:
            self._lines.append(line)
            self._waiting_bytes += len(line) + _LINE_OVERHEAD_BYTES

    def _too_long(self, line: bytes) -> Problem:
        """Classify a line that is too long for a bare line. An HTTP request line may be so long."""
        http = len(line) <= self._limits.line_bytes_max and self._may_be_http(line) and _is_http(line)
        return _foreign(line, http)

    def _too_large(self) -> Problem:
        most = self._limits.line_bytes_max
        return Problem(Refused(Code.TOO_LARGE, f"a line is at most {most} bytes; this one was skipped"))

    def _may_be_http(self, line: bytes | bytearray) -> bool:
        return _HTTP_BEGUN.match(line, 0, self._most(line)) is not None

    def _more(self, data: bytes) -> None:
        """Append to the unfinished line, as long as it can still become a valid line."""
        if self._skipping:
            return
        self._rest += data
        if not self._rest.startswith(b"{"):
            blanks = _leading(self._rest)
            # A carriage return at the very end stays: a NUL may follow.
            del self._rest[: blanks - (blanks == len(self._rest) and self._rest.endswith(b"\r"))]
            if not self.unfinished:
                return
        if not self._rest.startswith(b"{"):
            if not self._may_be_text():
                # Do not wait for its end: a TLS hello may hold no line feed.
                self._lines.append(_foreign(self._rest, False))
                self._rest.clear()
                self._closed = True
        elif len(self._rest) > self._limits.line_bytes_max + _END_BYTES:
            self._lines.append(self._too_large())
            self._rest.clear()
            self._skipping = True

    def _may_be_text(self) -> bool:
        """Whether the unfinished line can still become a bare line, or an HTTP request line."""
        size = len(self._rest)
        if size <= self._most(self._rest) + _END_BYTES:
            return _TEXT.fullmatch(self._rest) is not None
        return size <= self._limits.line_bytes_max + _END_BYTES and self._may_be_http(self._rest)

    def _most(self, line: bytes | bytearray) -> int:
        """Return how long a line with this beginning may be."""
        most = self._limits.line_bytes_max
        return most if line.startswith(b"{") else min(most, self._limits.bare_line_bytes_max)

    def next(self) -> Item | None:
        """Parse the next line; None if there is none."""
        if not self._lines:
            return None
        line = self._lines.popleft()
        if isinstance(line, Problem):
            if line.fatal:
                self.close()
            return line
        self._waiting_bytes -= len(line) + _LINE_OVERHEAD_BYTES
        return self._json(line) if line.startswith(b"{") else self._text(line)

    def _json(self, line: bytes) -> Request | Problem:
        try:
            request = decode(line)
        except Refused as refusal:
            return Problem(refusal.without_traceback())
        self.valid = True
        return request

    def _text(self, line: bytes) -> Item:
        text = _TEXT.fullmatch(line)
        http = _is_http(line)
        if text is None or http or not line[:1].isalpha():
            self.close()
            return _foreign(line, http)
        try:
            item = understand(text[1].decode())
        except Refused as refusal:
            if self.valid:
                return Problem(refusal.without_traceback())
            self.close()
            refusal.message += " (closed: no valid request came before)"
            return Problem(refusal.without_traceback(), fatal=True, seen=line[:_SEEN_BYTES])
        self.valid = self.valid or isinstance(item, Request)
        return item


def _foreign(line: bytes | bytearray, http: bool) -> Problem:
    """Return the problem of a line of another protocol."""
    return Problem(
        Refused(
            Code.BAD_REQUEST,
            'this is regd: one JSON object a line, such as {"cmd":"help"}, or a bare line such as help, list '
            "or resolve NAME",
        ),
        fatal=True,
        seen=bytes(line[:_SEEN_BYTES]),
        reply=HTTP_REFUSAL if http else b"",
    )


def _is_http(line: bytes) -> bool:
    text = _TEXT.fullmatch(line)
    return text is not None and _HTTP.fullmatch(text[1]) is not None


def _leading(line: bytes | bytearray) -> int:
    """Return the number of leading blanks."""
    blanks = _BLANKS.match(line)
    return blanks.end() if blanks else 0
