"""The order of one peer's requests and replies, on values: no socket, no event loop, no clock.

Bytes go in with `receive`; `next` returns the request to carry out now. A reply that is ready at once is the
caller's to send; one that comes later goes in with `committed` or `resolved`, and out with `take_replies`.

1. A write may follow a write. Any other request waits until all writes before it are committed, so that a peer
   sees its own writes and replies need no sorting.
2. A pending `resolve` (with `wait`) is answered when there is an answer; its id tells the peer which one it is.
   Without an id it blocks: no later request is answered before it.
3. Nothing behind `quit` is read. All requests before it are answered, pending ones too.
"""

from enum import Enum

from regd.core.limits import Limits
from regd.protocol.bare import Quit
from regd.protocol.commands import COMMANDS, Request
from regd.protocol.parser import Item, Problem, RequestParser

_SPLIT_BYTES = 16_384  # at a time: asyncio reads up to 256 KiB, and to split them holds the loop for too long


class ConversationState(Enum):
    OPEN = "requests are read and answered"
    BLOCKED = "a `resolve` without id is pending, and later requests wait for it"
    QUITTING = "`quit` was read; only replies are still to come"
    ENDED = "nothing is read or answered any more"


class Conversation:
    __slots__ = (
        "_deferred",
        "_limits",
        "_replies",
        "_unsplit",
        "in_flight",
        "input_ended",
        "parser",
        "pending",
        "state",
    )

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._deferred: Item | None = None  # the next request, not to be answered yet
        self._replies: list[bytes] = []  # of requests that were answered late, in order
        self._unsplit = b""  # received, and not split into lines yet
        self.parser = RequestParser(limits)
        self.state = ConversationState.OPEN
        self.input_ended = False  # the peer has closed its sending side
        self.in_flight = 0  # writes that are submitted and not committed
        self.pending = 0  # `resolve`s that wait for an instance

    # Input.

    def receive(self, data: bytes) -> None:
        """Take bytes from the peer. `next` splits them into lines, 16 KiB at a time."""
        self._unsplit += data

    def end_input(self) -> None:
        """The peer has closed its sending side: an unfinished line counts as a line."""
        self.input_ended = True
        if not self._unsplit:
            self.parser.end()

    def next(self) -> Request | Problem | None:
        """Return what to answer now; None if there is nothing or it must wait. Call again while `has_unsplit`."""
        if self._unsplit and not self.parser.has_lines:
            self._split()
        if self.state is not ConversationState.OPEN:
            return None
        item = self._deferred or self.parser.next()
        self._deferred = None
        if item is None:
            return None
        if self.in_flight and not self._may_follow_writes(item):
            self._deferred = item
            return None
        if isinstance(item, Quit):
            self.state = ConversationState.QUITTING
            self.parser.close()
            return None
        return item

    def _split(self) -> None:
        data, self._unsplit = self._unsplit[:_SPLIT_BYTES], self._unsplit[_SPLIT_BYTES:]
        self.parser.receive(data)
        if self.input_ended and not self._unsplit:
            self.parser.end()

    def _may_follow_writes(self, item: Item) -> bool:
        is_write = isinstance(item, Request) and COMMANDS[item.cmd].writes
        return is_write and self.in_flight < self._limits.requests_in_flight_max

    # Replies.

    def defer(self, request: Request) -> None:
        """Put a request back: `next` returns it again."""
        self._deferred = request

    def submit(self) -> None:
        """A write waits for its commit."""
        self.in_flight += 1

    def committed(self, reply: bytes) -> None:
        """A write has its reply. Writes get their replies in the order in which they were submitted."""
        self.in_flight -= 1
        self._reply(reply)

    def suspend(self, request: Request) -> None:
        """A `resolve` is pending."""
        self.pending += 1
        if request.id is None:
            self.state = ConversationState.BLOCKED

    def resolved(self, request: Request, reply: bytes) -> None:
        """A pending `resolve` has its reply."""
        self.pending -= 1
        if request.id is None and self.state is ConversationState.BLOCKED:
            self.state = ConversationState.OPEN
        self._reply(reply)

    def _reply(self, reply: bytes) -> None:
        if self.state is not ConversationState.ENDED:
            self._replies.append(reply)

    def take_replies(self) -> list[bytes]:
        """Return the late replies that are ready, in order. They go before the reply to the `next` request."""
        replies, self._replies = self._replies, []
        return replies

    def end(self) -> None:
        """Read and answer nothing any more. Idempotent."""
        self.state = ConversationState.ENDED
        self.parser.close()
        self._deferred = None
        self._unsplit = b""
        self._replies.clear()
        self.in_flight = self.pending = 0

    # What the connection needs to know.

    @property
    def is_deferred(self) -> bool:
        return self._deferred is not None

    @property
    def has_input(self) -> bool:
        """Whether there may be something for `next`, or the end of the input has to be handled."""
        return bool(self._unsplit) or self._deferred is not None or self.parser.has_lines or self.input_ended

    @property
    def has_unsplit(self) -> bool:
        """Whether `next` has more bytes to split, and nothing that it has to wait for."""
        return bool(self._unsplit) and self.state is ConversationState.OPEN and self._deferred is None

    @property
    def is_within_line(self) -> bool:
        """Whether the peer has begun a line and not ended it."""
        return self.parser.has_partial_line and not self._unsplit

    @property
    def is_caught_up(self) -> bool:
        """Whether all input was answered, or submitted: the next byte begins a line that can be answered now."""
        is_empty = self.parser.is_empty and not self._unsplit and not self.input_ended
        return self.state is ConversationState.OPEN and self._deferred is None and is_empty

    @property
    def waiting_bytes(self) -> int:
        """The bytes that were received and not answered."""
        return self.parser.waiting_bytes + len(self._unsplit)

    @property
    def owes_replies(self) -> bool:
        """Whether a reply is to be sent before any reply to new input."""
        return bool(self.in_flight or self._replies)

    @property
    def wants_input(self) -> bool:
        """Whether to read on. A blocked peer is read, up to a line, so that its end is noticed."""
        if self.state is ConversationState.BLOCKED:
            return self.waiting_bytes < self._limits.line_bytes_max
        return self._deferred is None and not (self.parser.has_lines or self._unsplit)

    @property
    def is_drained(self) -> bool:
        """Whether the input has ended and all of it is answered, except for pending `resolve`s."""
        return self.input_ended and self.wants_input and not self.owes_replies

    @property
    def is_finished(self) -> bool:
        """Whether all requests before `quit` are answered."""
        return self.state is ConversationState.QUITTING and not (self.pending or self.owes_replies)
