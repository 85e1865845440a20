"""One peer's bytes, as requests and problems, in order. The guard against browsers and strangers is here.

How it works: `receive` splits into lines and keeps what is unfinished; `next` looks at one line at a time, so
that whoever is behind can stop. Total: any bytes give requests and problems, nothing else comes out.

The first of these applies to a line:
1. It begins with `{`: a JSON request.
2. It is an HTTP request line: refused in HTTP, and the end.
3. It is a bare line (`bare.py`): a request.
4. It begins with a letter and is printable: a mistyped bare line. It is the end if no valid request came before,
   since a program of another protocol begins with a line of that protocol.
5. Else it is of another protocol, and the end.

Must not know sockets or time.
"""

import re
from collections import deque
from dataclasses import dataclass
from enum import Enum

from regd.core.errors import Code, Refused
from regd.core.limits import DEFAULT, Limits
from regd.protocol.bare import Quit, understand
from regd.protocol.commands import Request
from regd.protocol.messages import HTTP_REFUSAL, decode

# telnet writes a carriage return as CR NUL (RFC 854), so that is a blank too, here and at the end of a line.
_BLANKS = re.compile(rb"(?:[ \t]++|\r\0?)*+")
_END_BYTES = len(b"\r\0\r")  # of a line's end, beyond the line and its line feed
# What Python keeps around a line in the queue; many short lines cost more than they are.
_LINE_OVERHEAD_BYTES = 56
# Printable, then a line's end. Possessive (`*+`): a long run of blanks would be tried at every split of it.
_TEXT = re.compile(rb"([!-~][ -~\t]*+)(?:[ \t]|\r\0?)*+")
_HTTP = re.compile(rb"[!-~]+[ \t]+[!-~]+[ \t]+HTTP/[!-~]*[ \t]*")  # RFC 9112, section 3
_HTTP_BEGUN = re.compile(rb"[!-~]+[ \t]+[!-~]")
_SEEN_BYTES = 60  # of a stranger's line, for the log


class _Mark(Enum):
    """What stands in the queue for a line that was not kept."""

    TOO_LARGE = "too large"


@dataclass(frozen=True, slots=True)
class _ForeignProtocol:
    """Stands in the queue for the first line that is not of this protocol."""

    seen: bytes
    http: bool = False


@dataclass(frozen=True, slots=True)
class Problem:
    """A line that gets an error. After a fatal one nothing of this peer is looked at.

    `seen` is how the line of a stranger begins, raw: not for a terminal as it is. `reply` is what the peer gets
    in place of an error line, if it speaks another protocol.
    """

    refusal: Refused
    fatal: bool = False
    seen: bytes = b""
    reply: bytes = b""


Item = Request | Problem | Quit


class RequestParser:
    """The reading half of a conversation."""

    __slots__ = ("_closed", "_limits", "_lines", "_rest", "_skipping", "_waiting_bytes", "valid")

    def __init__(self, limits: Limits = DEFAULT) -> None:
        self.valid = False  # the peer has sent a valid request
        self._limits = limits
        self._lines: deque[bytes | _Mark | _ForeignProtocol] = deque()
        self._rest = bytearray()  # the unfinished line
        self._skipping = False  # the unfinished line is too long: forget it up to its end
        self._closed = False
        self._waiting_bytes = 0  # of whole lines

    @property
    def waiting_bytes(self) -> int:
        """What is kept of the peer's bytes."""
        return self._waiting_bytes + len(self._rest)

    @property
    def pending(self) -> bool:
        """Whether `next` has something to say."""
        return bool(self._lines)

    @property
    def empty(self) -> bool:
        """Whether what comes next is the beginning of a line, and stands behind nothing."""
        return not (self._lines or self._rest or self._skipping or self._closed)

    @property
    def unfinished(self) -> bool:
        """Whether the peer has begun a line and not ended it."""
        return self._skipping or (bool(self._rest) and self._rest != b"\r")

    def receive(self, data: bytes) -> None:
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

    def end(self) -> None:
        """The peer will send no more: what it left unfinished counts as a line."""
        if self._rest and not self._closed:
            self._line(bytes(self._rest))
        self._rest.clear()
        self._skipping = False

    def close(self) -> None:
        """Look at nothing more of this peer, and keep nothing."""
        self._closed = True
        self._lines.clear()
        self._rest.clear()
        self._skipping = False
        self._waiting_bytes = 0

    def _line(self, line: bytes) -> None:
        """Put a whole line into the queue; blanks in front do not count, and an empty one says nothing."""
        if line.endswith((b"\r", b"\0")):
            line = line.removesuffix(b"\r").removesuffix(b"\r\0")
        if not line.startswith(b"{"):
            line = line[_leading(line) :]
        if len(line) > self._most(line):
            self._lines.append(_Mark.TOO_LARGE if line.startswith(b"{") else self._too_long(line))
        elif line:
            self._lines.append(line)
            self._waiting_bytes += len(line) + _LINE_OVERHEAD_BYTES

    def _too_long(self, line: bytes) -> _ForeignProtocol:
        """Judge what is too long for a bare line: the target of an HTTP request may be as long as a line."""
        http = len(line) <= self._limits.line_bytes_max and self._may_be_http(line) and _is_http(line)
        return _ForeignProtocol(line[:_SEEN_BYTES], http)

    def _may_be_http(self, line: bytes | bytearray) -> bool:
        return _HTTP_BEGUN.match(line, 0, self._most(line)) is not None

    def _more(self, data: bytes) -> None:
        """Keep more of an unfinished line, while it can still become one."""
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
                # It has no end yet, and need not have one: a TLS hello may hold no line feed at all.
                self._lines.append(_ForeignProtocol(bytes(self._rest[:_SEEN_BYTES])))
                self._rest.clear()
                self._closed = True
        elif len(self._rest) > self._limits.line_bytes_max + _END_BYTES:
            self._lines.append(_Mark.TOO_LARGE)
            self._rest.clear()
            self._skipping = True

    def _may_be_text(self) -> bool:
        """Whether the unfinished line can still become a bare line, or an HTTP request line."""
        size = len(self._rest)
        if size <= self._most(self._rest) + _END_BYTES:
            return _TEXT.fullmatch(self._rest) is not None
        return size <= self._limits.line_bytes_max + _END_BYTES and self._may_be_http(self._rest)

    def _most(self, line: bytes | bytearray) -> int:
        """How long a line may be that begins like this one."""
        most = self._limits.line_bytes_max
        return most if line.startswith(b"{") else min(most, self._limits.bare_line_bytes_max)

    def next(self) -> Item | None:
        """Return what the next line says, or None when there is none."""
        if not self._lines:
            return None
        line = self._lines.popleft()
        if line is _Mark.TOO_LARGE:
            most = self._limits.line_bytes_max
            return Problem(Refused(Code.TOO_LARGE, f"a line is at most {most} bytes; this one was skipped"))
        if isinstance(line, _ForeignProtocol):
            return self._stranger(line)
        assert isinstance(line, bytes)
        self._waiting_bytes -= len(line) + _LINE_OVERHEAD_BYTES
        try:
            item = decode(line) if line.startswith(b"{") else self._text(line)
        except Refused as refusal:
            return Problem(refusal.bare())
        self.valid = self.valid or isinstance(item, Request)
        return item

    def _text(self, line: bytes) -> Item:
        text = _TEXT.fullmatch(line)
        http = _is_http(line)
        if text is None or http or not line[:1].isalpha():
            return self._stranger(_ForeignProtocol(line[:_SEEN_BYTES], http))
        try:
            return understand(text[1].decode())
        except Refused as refusal:
            if self.valid:
                raise
            self.close()
            refusal.message += " (closed: no valid request came before)"
            return Problem(refusal.bare(), fatal=True, seen=line[:_SEEN_BYTES])

    def _stranger(self, line: _ForeignProtocol) -> Problem:
        self.close()
        return Problem(
            Refused(
                Code.BAD_REQUEST,
                'this is regd: one JSON object a line, such as {"cmd":"help"}, or a bare line such as help, list '
                "or resolve NAME",
            ),
            fatal=True,
            seen=line.seen,
            reply=HTTP_REFUSAL if line.http else b"",
        )


def _is_http(line: bytes) -> bool:
    text = _TEXT.fullmatch(line)
    return text is not None and _HTTP.fullmatch(text[1]) is not None


def _leading(line: bytes | bytearray) -> int:
    """How many blanks a line begins with."""
    blanks = _BLANKS.match(line)
    return blanks.end() if blanks else 0
