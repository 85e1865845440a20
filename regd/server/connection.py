"""One socket: chunks to the reader, requests to the answers or the engine, replies back, in order.

Order comes from one rule: writes may follow writes, anything else waits until the connection's writes have
landed. So a peer sees its own writes, and replies never need sorting. A peer that does not read is not read.
Must not know what a command does.
"""

import asyncio
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import cast

from regd.core.errors import Code, Refused
from regd.core.limits import Limits
from regd.protocol import messages
from regd.protocol.commands import COMMANDS, Request
from regd.protocol.reader import Item, Problem, Quit, Reader
from regd.server.answers import Answers
from regd.server.clock import Clock, Timer
from regd.server.engine import Engine
from regd.server.tally import Tally

log = logging.getLogger("regd")

_SLICE = 128  # requests of one connection before others get a turn
_CHUNK_BYTES = 65_536  # replies are gathered up to here and sent as one
_LINGERING_MAX = 64  # refused connections that are still given the reason; more are just cut
_COMPLAIN_EVERY_S = 10.0


class Budget:
    """Bytes that wait, per connection and in all. Whoever has waited longest gives way."""

    def __init__(self, bytes_max: int) -> None:
        self._bytes_max = bytes_max
        self._held: dict[Connection, int] = {}  # in the order in which they began to wait
        self.total = 0

    def hold(self, connection: "Connection", size: int) -> "Connection | None":
        """Set what waits of a connection, and return the one that is too much for all, if any."""
        before = self._held.get(connection, 0)
        if size == before:
            return None
        self.total += size - before
        if size:
            self._held[connection] = size
        else:
            del self._held[connection]
        return next(iter(self._held)) if self.total > self._bytes_max else None


@dataclass(slots=True)
class Context:
    """What all connections of a daemon share."""

    limits: Limits
    engine: Engine
    answers: Answers
    clock: Clock
    tally: Tally
    input: Budget
    output: Budget
    connections: "set[Connection]" = field(default_factory=set)
    alone: asyncio.Event = field(default_factory=asyncio.Event)  # set when the last connection has gone
    complained_at: float = float("-inf")

    def complain(self, peer: object, seen: bytes) -> None:
        """Log a stranger, at most one in a while; `repr` keeps its bytes from the terminal."""
        self.tally.strangers += 1
        now = self.clock.now()
        if now - self.complained_at >= _COMPLAIN_EVERY_S:
            self.complained_at = now
            log.warning("refused %s, which does not speak regd: %r…", _peer_text(peer), seen)


def _peer_text(peer: object) -> str:
    return f"{peer[0]} port {peer[1]}" if isinstance(peer, tuple) else "a peer on the Unix socket"


class Connection(asyncio.Protocol):
    __slots__ = (
        "_accepted",
        "_context",
        "_deadline",
        "_ending",
        "_eof",
        "_held_up",
        "_in_flight",
        "_landed",
        "_paused",
        "_reader",
        "_reading",
        "_scheduled",
        "_timer",
        "_transport",
    )

    _transport: asyncio.Transport

    def __init__(self, context: Context) -> None:
        self._context = context
        self._reader = Reader(context.limits)
        self._held_up: Item | None = None  # the next item, waiting until the writes before it have landed
        self._accepted = False  # within `connections_max`
        self._in_flight = 0  # writes submitted and not answered
        self._landed: list[bytes] = []  # their replies, gathered for one send
        self._scheduled = False  # `_go_on` will be called
        self._paused = False  # the peer does not read
        self._reading = True
        self._eof = False  # the peer has closed its sending side
        self._ending = False  # nothing more is looked at; what is sent is sent
        self._timer: Timer | None = None
        self._deadline = 0.0  # of an unfinished line

    # What asyncio calls.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        context = self._context
        self._transport = cast(asyncio.Transport, transport)
        self._transport.set_write_buffer_limits(high=context.limits.output_bytes_max, low=0)
        tally = context.tally
        context.connections.add(self)
        context.alone.clear()
        if tally.connections < context.limits.connections_max:
            self._accepted = True
            tally.connections += 1
            tally.connections_accepted += 1
            return
        tally.connections_refused += 1
        if len(context.connections) - tally.connections > _LINGERING_MAX:
            self.cut()
            return
        self._refuse(
            Refused(
                Code.BUSY,
                f"{context.limits.connections_max} connections are open; close some, or try again later",
            )
        )

    def data_received(self, data: bytes) -> None:
        if self._ending:
            return
        self._reader.receive(data)
        self._work()

    def eof_received(self) -> bool:
        self._eof = True
        if self._ending:
            self._transport.close()
        else:
            self._reader.end()
            self._work()
        return True  # the sending side stays open for the replies

    def pause_writing(self) -> None:
        self._paused = True
        self._account_output()

    def resume_writing(self) -> None:
        self._paused = False
        self._account_output()
        self._schedule()

    def connection_lost(self, exc: Exception | None) -> None:
        context = self._context
        self._ending = True
        self._reader.close()
        self._held_up = None
        self._landed.clear()
        context.connections.discard(self)
        if not context.connections:
            context.alone.set()
        context.tally.connections -= self._accepted
        context.input.hold(self, 0)
        context.output.hold(self, 0)
        if self._timer is not None:
            self._timer.cancel()

    # The work.

    def _work(self) -> None:
        """Answer requests until there are none, something holds them up, or others should have a turn."""
        replies: list[bytes] = []
        size = 0
        for _ in range(_SLICE):
            item = self._take()
            if item is None:
                break
            reply = self._answer(item)
            if self._held_up is not None:
                break
            if reply is not None:
                replies.append(reply)
                size += len(reply)
                if size > _CHUNK_BYTES:
                    self._transport.write(b"".join(replies))
                    replies.clear()
                    size = 0
        else:
            self._schedule()
        if replies:
            self._transport.write(b"".join(replies))
        self._settle()

    def _take(self) -> Item | None:
        if self._paused or self._ending:
            return None
        item = self._held_up or self._reader.next()
        self._held_up = None
        if item is not None and self._in_flight:
            writes = isinstance(item, Request) and COMMANDS[item.cmd].writes
            if not writes or self._in_flight >= self._context.limits.requests_in_flight_max:
                self._held_up = item
                return None
        return item

    def _answer(self, item: Item) -> bytes | None:
        context = self._context
        if isinstance(item, Quit):
            self._end()
            return None
        if isinstance(item, Problem):
            if item.fatal:
                context.complain(self._transport.get_extra_info("peername"), item.seen)
                self._end()
            return self._error(item.refusal)
        try:
            if COMMANDS[item.cmd].writes:
                context.engine.submit(context.answers.write(item), self._done(item.id))
                self._in_flight += 1
                reply = None
            else:
                reply = context.answers.read(item)
        except Refused as refusal:
            if self._in_flight:  # the engine takes no more, and replies before this one are not out yet
                self._held_up = item
                return None
            reply = self._error(refusal, item.id)
        context.tally.requests[item.cmd] += 1
        return reply

    def _error(self, refusal: Refused, id: str | int | None = None) -> bytes:
        self._context.tally.errors[refusal.code] += 1
        return messages.error(refusal, id)

    def _done(self, id: str | int | None) -> Callable[[Mapping[str, object] | Refused], None]:
        def done(outcome: Mapping[str, object] | Refused) -> None:
            self._in_flight -= 1
            if self._ending or self._transport.is_closing():
                return
            if isinstance(outcome, Refused):
                self._landed.append(self._error(outcome, id))
            else:
                self._landed.append(messages.ok(id, outcome))
            self._schedule()

        return done

    def _schedule(self) -> None:
        if not self._scheduled:
            self._scheduled = True
            asyncio.get_running_loop().call_soon(self._go_on)

    def _go_on(self) -> None:
        self._scheduled = False
        if self._ending or self._transport.is_closing():
            return
        if self._landed:
            self._transport.write(b"".join(self._landed))
            self._landed.clear()
        self._work()

    # Holding back, and ending.

    def _settle(self) -> None:
        """After some work: read on or not, watch an unfinished line, keep the books, close when all is done."""
        transport, context = self._transport, self._context
        if transport.is_closing() or self._ending:
            return
        idle = self._held_up is None and not self._reader.pending and not self._paused
        if idle and self._eof and not self._in_flight and not self._landed:
            transport.close()
            return
        if idle is not self._reading and not self._eof:
            self._reading = idle
            if idle:
                transport.resume_reading()
            else:
                transport.pause_reading()
        if self._reader.unfinished:
            self._deadline = context.clock.now() + context.limits.line_idle_s_max
            if self._timer is None:
                self._timer = context.clock.call_at(self._deadline, self._line_idle)
        too_much = context.input.hold(self, self._reader.waiting_bytes)
        if self._paused:
            self._account_output()
        if too_much is not None:
            context.tally.cut += 1
            too_much._refuse(
                Refused(Code.BUSY, "too many bytes wait in regd, yours the longest; try again later")
            )

    def _line_idle(self) -> None:
        self._timer = None
        if self._ending or not self._reader.unfinished:
            return
        context = self._context
        if not self._reading or self._in_flight:  # ours is the delay
            self._deadline = context.clock.now() + context.limits.line_idle_s_max
        if context.clock.now() < self._deadline:
            self._timer = context.clock.call_at(self._deadline, self._line_idle)
            return
        idle = context.limits.line_idle_s_max
        self._refuse(Refused(Code.TIMEOUT, f"a line was begun, and no byte of it came for {idle:g} s"))

    def _account_output(self) -> None:
        context = self._context
        size = self._transport.get_write_buffer_size() if self._paused else 0
        too_much = context.output.hold(self, size)
        if too_much is not None:
            context.tally.cut += 1
            too_much.cut()

    def _refuse(self, refusal: Refused) -> None:
        """Say why, and end. Where replies are still to come, the reason cannot stand before them: just end."""
        if self._in_flight or self._landed:
            self.cut()
            return
        self._end()
        self._transport.write(self._error(refusal))

    def _end(self) -> None:
        """Look at nothing more, send what is to be sent, and close once the peer has, or soon."""
        self._ending = True
        self._reader.close()
        self._held_up = None
        self._context.input.hold(self, 0)
        asyncio.get_running_loop().call_soon(self._farewell)

    def _farewell(self) -> None:
        if self._transport.is_closing():
            return
        if self._eof:
            self._transport.close()
            return
        if self._transport.can_write_eof():
            self._transport.write_eof()  # behind what is buffered
        if not self._reading:
            self._reading = True
            self._transport.resume_reading()  # and discard: a reset for unread input would eat the last line
        if self._timer is not None:
            self._timer.cancel()
        self._wait_for_peer()

    def _wait_for_peer(self) -> None:
        clock = self._context.clock
        self._timer = clock.call_at(clock.now() + self._context.limits.farewell_s_max, self._give_up)

    def _give_up(self) -> None:
        self._timer = None
        if self._transport.get_write_buffer_size():
            self._wait_for_peer()  # it still takes what it asked for; `output_bytes_total_max` bounds that
        else:
            self._transport.abort()

    def cut(self) -> None:
        """End at once; what was not sent is lost."""
        self._ending = True
        self._transport.abort()

    def close(self) -> None:
        """The daemon is stopping: send what is to be sent, and close."""
        if self._landed and not self._transport.is_closing():
            self._transport.write(b"".join(self._landed))
            self._landed.clear()
        self._ending = True
        self._transport.close()
