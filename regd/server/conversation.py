"""Decides the order of one client's requests and replies. Uses no socket, event loop or clock.

`receive` takes the client's bytes, and `next` returns the request to carry out now. The connection sends a reply
at once if it is ready at once. A late reply is passed to `add_write_reply` or `add_waiting_reply`, and
`take_replies` returns it when it is to be sent. A request that arrives alone, while no earlier one is unanswered,
skips `receive` and `next`.

1. A write may follow a write. Any other request is deferred until all writes before it are committed, so that a
   client sees its own writes and replies need no sorting.
2. A `resolve` with `wait` and an `id` may be answered after later requests: the client recognizes the reply by
   the id. Without an id it blocks the conversation: later requests are answered after it.
3. Nothing after `quit` is read. All requests before `quit` are answered, also those that wait.
"""

from enum import Enum

from regd.core.limits import Limits
from regd.protocol.bare import Quit
from regd.protocol.commands import COMMANDS, Request
from regd.protocol.parser import Item, Problem, RequestParser

_SPLIT_BYTES = 16_384  # at a time: asyncio reads up to 256 KiB, and splitting so much would block the loop


class ConversationState(Enum):
    OPEN = "requests are read and answered"
    BLOCKED = "a `resolve` without id is waiting, and later requests are answered after it"
    QUITTING = "`quit` was read; only late replies are still to be sent"
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
        "state",
        "waiting",
    )

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._deferred: Item | None = None  # the next request, if it cannot be carried out yet
        self._replies: list[bytes] = []  # late replies that are ready, in order
        self._unsplit = b""  # received, but not yet split into lines
        self.parser = RequestParser(limits)
        self.state = ConversationState.OPEN
        self.input_ended = False  # the client has closed its sending side
        self.in_flight = 0  # writes that are submitted but not yet committed
        self.waiting = 0  # `resolve`s that wait for an instance

    # Input.

    def receive(self, data: bytes) -> None:
        """Add bytes received from the client. `next` splits them into lines, 16 KiB at a time."""
        self._unsplit += data

    def end_input(self) -> None:
        """Record that the client has closed its sending side. An unfinished line then counts as a line."""
        self.input_ended = True
        if not self._unsplit:
            self.parser.end()

    def next(self) -> Request | Problem | None:
        """Return the request or bad line to answer now. If it is None, call again while `has_unsplit` is true."""
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
        is_write = isinstance(item, Request) and COMMANDS[item.cmd].waits_for_commit
        return is_write and self.in_flight < self._limits.requests_in_flight_max

    # Replies.

    def defer(self, request: Request) -> None:
        """Put a request back: `next` returns it again."""
        self._deferred = request

    def count_write(self) -> None:
        """Record that a write was submitted and waits for its commit."""
        self.in_flight += 1

    def add_write_reply(self, reply: bytes) -> None:
        """Add the reply to a write. Call it in the order in which the writes were submitted."""
        self.in_flight -= 1
        self._reply(reply)

    def add_waiting(self, request: Request) -> None:
        """Record that a `resolve` waits for an instance."""
        self.waiting += 1
        if request.id is None:
            self.state = ConversationState.BLOCKED

    def add_waiting_reply(self, request: Request, reply: bytes) -> None:
        """Add the reply to a `resolve` that was waiting."""
        self.waiting -= 1
        if request.id is None and self.state is ConversationState.BLOCKED:
            self.state = ConversationState.OPEN
        self._reply(reply)

    def _reply(self, reply: bytes) -> None:
        if self.state is not ConversationState.ENDED:
            self._replies.append(reply)

    def take_replies(self) -> list[bytes]:
        """Return the late replies that are ready, in order. Send them before the reply to the `next` request."""
        replies, self._replies = self._replies, []
        return replies

    def end(self) -> None:
        """Drop all requests and late replies, and read no more. Idempotent."""
        self.state = ConversationState.ENDED
        self.parser.close()
        self._deferred = None
        self._unsplit = b""
        self._replies.clear()
        self.in_flight = self.waiting = 0

    # What the connection needs to know.

    @property
    def is_deferred(self) -> bool:
        return self._deferred is not None

    @property
    def has_input(self) -> bool:
        """Whether `next` may have a request to return, or the end of the input must be handled."""
        return bool(self._unsplit) or self._deferred is not None or self.parser.has_lines or self.input_ended

    @property
    def has_unsplit(self) -> bool:
        """Whether `next` has more bytes to split, and no earlier request must be answered first."""
        return bool(self._unsplit) and self.state is ConversationState.OPEN and self._deferred is None

    @property
    def is_within_line(self) -> bool:
        """Whether the client has sent only the beginning of a line."""
        return self.parser.has_partial_line and not self._unsplit

    @property
    def is_caught_up(self) -> bool:
        """Whether all input was answered or submitted, so that a new line can be answered at once."""
        is_empty = self.parser.is_empty and not self._unsplit and not self.input_ended
        return self.state is ConversationState.OPEN and self._deferred is None and is_empty

    @property
    def waiting_bytes(self) -> int:
        """The number of bytes that were received but not yet answered."""
        return self.parser.waiting_bytes + len(self._unsplit)

    @property
    def owes_replies(self) -> bool:
        """Whether late replies must be sent before any reply to new input."""
        return bool(self.in_flight or self._replies)

    @property
    def wants_input(self) -> bool:
        """Whether to read from the socket. While blocked, at most a line is read, to notice the client's end."""
        if self.state is ConversationState.BLOCKED:
            return self.waiting_bytes < self._limits.line_bytes_max
        return self._deferred is None and not (self.parser.has_lines or self._unsplit)

    @property
    def is_drained(self) -> bool:
        """Whether the input has ended and all of it is answered, except for `resolve`s that wait."""
        return self.input_ended and self.wants_input and not self.owes_replies

    @property
    def is_finished(self) -> bool:
        """Whether `quit` was read and all requests before it are answered."""
        return self.state is ConversationState.QUITTING and not (self.waiting or self.owes_replies)
