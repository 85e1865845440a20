"""One connection as an asyncio protocol: reading and writing, flow control, time limits, and closing.

`conversation.py` decides which request is answered next, and `dispatcher.py` answers it. While a client does not
read its replies, its requests are not read either.
"""

import asyncio
import logging
import select
import socket
from typing import cast

from regd.core.errors import Code, Refused
from regd.protocol.commands import Request
from regd.protocol.parser import Problem
from regd.server.conversation import Conversation, ConversationState
from regd.server.dispatcher import DaemonParts, Dispatcher
from regd.server.half_closed import HalfClosed
from regd.server.handlers import ClientIdentity
from regd.server.loop_monitor import LoopMonitor
from regd.server.quotas import Share
from regd.server.resolve_cache import ResolveCache
from regd.server.sessions import Sessions
from regd.system.clock import Clock, Timer
from regd.system.namespaces import HERE, elsewhere
from regd.system.peer_credentials import PeerCredentials
from regd.system.peer_process import peer_process

log = logging.getLogger("regd")

_SLICE_REQUESTS = 128  # per time slice of one connection
_SLICE_S = 0.001  # length of a connection's time slice
_SEND_S = 0.000_01  # sending late replies takes about so long
_CHUNK_BYTES = 65_536  # replies are collected up to this size and sent in one write
# While at most so many refused connections are open, another refused client has time to read the error line
# before its connection is closed. The lower limit is for users who may only read.
_LINGERING_MAX = 32
_LINGERING_READONLY_MAX = 16
_LATE_S = 0.25
_HANG_UP_CHECK_S = 0.05  # between two checks whether a client that is not read has hung up
_HUNG_UP = getattr(select, "POLLRDHUP", 0) | select.POLLHUP | select.POLLERR  # POLLRDHUP: Linux, poll(2)
_FOREIGN_LOG_S = 10.0  # between two log lines about clients that speak another protocol


class Connections:
    """The open connections of a daemon, and what they share.

    Attributes:
        parts: the parts of the daemon that carry out requests.
        writers: the quotas and time of users who may write.
        readers: the same for users who may only read.
    """

    def __init__(
        self,
        parts: DaemonParts,
        sessions: Sessions,
        writers: Share,
        readers: Share,
        *,
        cache: ResolveCache,
        credentials: PeerCredentials,
        clock: Clock,
        monitor: LoopMonitor,
    ) -> None:
        self.parts = parts
        self.sessions = sessions
        self.writers = writers
        self.readers = readers
        self.cache = cache
        self.credentials = credentials
        self.clock = clock
        self.monitor = monitor
        self.half_closed = HalfClosed(clock)
        self.open: set[Connection] = set()  # refused connections too, until they are closed
        self.all_closed = asyncio.Event()  # set when the last connection closes
        self._foreign_logged_at = float("-inf")

    def create(self) -> "Connection":
        """Return the protocol of a new connection."""
        return Connection(self)

    def add(self, connection: "Connection") -> None:
        self.open.add(connection)
        self.all_closed.clear()

    def remove(self, connection: "Connection") -> None:
        self.open.remove(connection)
        if not self.open:
            self.all_closed.set()

    def log_foreign(self, address: str, seen: bytes) -> None:
        """Count a client that speaks another protocol, and log it unless another was logged in the last 10 s."""
        self.parts.counters.bad_protocol += 1
        now = self.clock.now()
        if now - self._foreign_logged_at >= _FOREIGN_LOG_S:
            self._foreign_logged_at = now
            # `%r` escapes control characters, which could change the terminal.
            log.warning("refused %s, which does not speak regd: %r…", address, seen)


class Connection(asyncio.Protocol):
    __slots__ = (
        "_cache",
        "_client",
        "_connections",
        "_conversation",
        "_counted",
        "_deadline",
        "_dispatcher",
        "_fast_path_ok",
        "_hang_up_timer",
        "_parser",
        "_parts",
        "_paused",
        "_reading",
        "_scheduled",
        "_share",
        "_timer",
        "_transport",
    )

    # Set by `connection_made`.
    _transport: asyncio.Transport
    _client: ClientIdentity
    _share: Share
    _dispatcher: Dispatcher

    def __init__(self, connections: Connections) -> None:
        self._connections = connections
        self._parts = connections.parts
        self._conversation = Conversation(connections.parts.limits)
        self._cache = connections.cache  # this and the parser save attribute lookups in the fast path
        self._parser = self._conversation.parser
        # Whether a `resolve` may be answered from the cache: no earlier request is unanswered. `data_received`
        # clears it for any other request, and `_update_flow` sets it again, after a write once that is committed.
        self._fast_path_ok = False
        self._paused = False  # the client does not read its replies
        self._reading = True
        self._scheduled = False  # `run` will be called
        self._counted = False  # the input quota includes bytes of this connection
        self._timer: Timer | None = None  # for an unfinished line, or while closing
        self._deadline = 0.0  # for an unfinished line
        self._hang_up_timer: Timer | None = None

    # Callbacks of asyncio.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        try:
            self._begin()
        except BaseException:
            self._transport.abort()  # asyncio would leave it open
            raise

    def _begin(self) -> None:
        connections, parts = self._connections, self._parts
        self._transport.set_write_buffer_limits(high=parts.limits.output_bytes_max, low=0)
        connection = self._transport.get_extra_info("socket")
        uid = connections.credentials.uid_of(connection)
        is_readonly = not connections.credentials.may_write(uid)
        self._share = connections.readers if is_readonly else connections.writers
        refusal = self._refusal(is_readonly)
        where = HERE if refusal else elsewhere(connection)
        session = 0 if refusal else connections.sessions.add(self)
        by = None if is_readonly else peer_process(connection)
        self._client = ClientIdentity(session, uid, where, is_readonly, by)
        self._dispatcher = Dispatcher(parts, self._share, self._client, self, self._conversation)
        connections.add(self)
        if refusal is not None:
            self._turn_away(refusal)
            return
        parts.counters.connections += 1
        parts.counters.readonly_connections += is_readonly
        parts.counters.connections_accepted += 1
        self._fast_path_ok = not is_readonly

    def _refusal(self, is_readonly: bool) -> Refused | None:
        """Return the error if there are too many connections already."""
        limits, counters = self._parts.limits, self._parts.counters
        if counters.connections >= limits.connections_max:
            count = f"connections ({counters.connections:,})"
        elif is_readonly and counters.readonly_connections >= limits.readonly_connections_max:
            count = f"read-only connections ({counters.readonly_connections:,})"
        else:
            return None
        return Refused(Code.BUSY, f"too many {count}; close some or try again later")

    def _turn_away(self, refusal: Refused) -> None:
        """Send an error and close. If too many refused connections linger, close at once.

        In that case, a reset may reach the client before it has read the error.
        """
        counters = self._parts.counters
        counters.connections_refused += 1
        lingering_max = _LINGERING_READONLY_MAX if self._client.is_readonly else _LINGERING_MAX
        if len(self._connections.open) - counters.connections <= lingering_max:
            self.refuse(refusal)
        else:
            self._conversation.end()
            self._transport.write(self._dispatcher.error(refusal))
            self._transport.close()

    def data_received(self, data: bytes) -> None:
        if self._fast_path_ok:
            # A cached reply needs no parser, time slice or quota: a tenth of the work of other requests.
            cache = self._cache
            reply = cache.known.get(data)
            if reply is None:
                reply = cache.lookup(data)
            else:
                cache.count += 1
            if reply is not None:
                self._parser.had_valid_request = True
                self._transport.write(reply)
                return
            self._fast_path_ok = False
            if self._share.scheduler.has_time and not self._scheduled:
                item = self._parser.parse_single(data)
                if item is not None:
                    self._answer_single(item)
                    return
        if self._conversation.state is ConversationState.ENDED:
            return
        self._conversation.receive(data)
        self._work_or_schedule()

    def eof_received(self) -> bool:
        if self._conversation.state is ConversationState.ENDED:
            self._conversation.input_ended = True
            self._transport.close()
        else:
            self._conversation.end_input()
            self._work_or_schedule()
        return True  # keep the sending side open for the replies

    def pause_writing(self) -> None:
        self._paused = True
        self._fast_path_ok = False
        self._dispatcher.drop_slow_reply()  # so that another connection gets the slot
        self._record_output()

    def resume_writing(self) -> None:
        self._paused = False
        self._record_output()
        self._share.watches.resume(list(self._dispatcher.watches.values()))
        self.schedule()

    def connection_lost(self, exc: Exception | None) -> None:
        connections, counters = self._connections, self._parts.counters
        self._fast_path_ok = False
        if self not in connections.open:  # `connection_made` failed
            return
        self._conversation.end()
        self._dispatcher.close()
        del self._dispatcher  # it refers to this connection, and only the garbage collector would free the cycle
        connections.half_closed.discard(self)
        connections.sessions.remove(self._client.session)
        connections.remove(self)
        if self._client.session:  # a refused connection has none and was not counted
            counters.connections -= 1
            counters.readonly_connections -= self._client.is_readonly
        self._share.input.record(self, 0)
        self._share.output.record(self, 0)
        for timer in (self._timer, self._hang_up_timer):
            if timer is not None:
                timer.cancel()

    # Requests and replies.

    def _work_or_schedule(self) -> None:
        if self._share.scheduler.has_time and not self._scheduled:
            self._work()
        else:
            self.schedule()
            self._update_flow()

    def _answer_single(self, item: Request | Problem) -> None:
        """Answer a request that was received alone, as most are, without the queues of `_work`."""
        began = self._connections.clock.now()
        reply = self._answer(item)
        if reply is not None:
            self._transport.write(reply)
        if not self._conversation.in_flight:  # after a write, `send_late_replies` does it
            self._update_flow()
        self._share.scheduler.spent(self._record_time(item, began) - began)

    def _answer(self, item: Request | Problem) -> bytes | None:
        return self._dispatcher.answer(item) if isinstance(item, Request) else self._answer_problem(item)

    def _record_time(self, item: Request | Problem, began: float) -> float:
        """Record how long an answer held the event loop. Return the time now."""
        return self._connections.monitor.record(item.cmd if isinstance(item, Request) else "a bad line", began)

    def _work(self) -> None:
        """Answer requests until none is left, the next one is deferred, or the time slice is used up."""
        conversation = self._conversation
        replies = conversation.take_replies()
        size = 0
        began = now = self._connections.clock.now()
        for _ in range(_SLICE_REQUESTS):
            item = None if self._paused else conversation.next()
            if item is None:
                if conversation.has_unsplit and not self._paused:
                    self.schedule(busy=True)
                break
            reply = self._answer(item)
            now = self._record_time(item, now)
            if conversation.is_deferred:
                break
            if reply is not None:
                replies.append(reply)
                size += len(reply)
                if size > _CHUNK_BYTES:
                    self._transport.write(b"".join(replies))
                    replies.clear()
                    size = 0
            if now > began + _SLICE_S:
                self.schedule(busy=True)
                break
        else:
            self.schedule(busy=True)
        if replies:
            self._transport.write(b"".join(replies))
        self._update_flow()
        self._share.scheduler.spent(self._connections.clock.now() - began)

    def _answer_problem(self, problem: Problem) -> bytes:
        """Return the error for a line that is not a valid request. Stop reading if it is of another protocol."""
        events = self._parts.events
        if problem.fatal:
            self._connections.log_foreign(self.address, problem.seen)
            self._end()
        elif events.logs_requests:
            events.bad_line(self.address, self._client.uid, problem.refusal)
        line = self._dispatcher.error(problem.refusal)
        return problem.reply or line

    def send_late_replies(self) -> None:
        """Send the replies to committed writes: at once, unless another reply could be sent with them soon."""
        conversation = self._conversation
        if conversation.in_flight or self._scheduled or not conversation.is_caught_up or self._has_ended:
            self.schedule()
            return
        self._transport.write(b"".join(conversation.take_replies()))
        self._update_flow()

    def schedule(self, busy: bool = False) -> None:
        """Have `run` called in a later iteration of the event loop."""
        if not self._scheduled:
            self._scheduled = True
            self._share.scheduler.schedule(self, busy)

    def run(self) -> None:
        """Use a time slice."""
        self._scheduled = False
        if self._has_ended:
            return
        if self._conversation.has_input:
            self._work()
            return
        replies = self._conversation.take_replies()
        if replies:
            self._transport.write(b"".join(replies))
        self._update_flow()
        self._share.scheduler.spent(_SEND_S)

    def slot_granted(self) -> None:
        if self.is_gone():  # nothing was read while the connection waited, so its end went unnoticed
            self.cut()
        else:
            self.schedule(busy=True)

    @property
    def can_take(self) -> bool:
        return not (self._paused or self._has_ended)

    def push(self, data: bytes) -> None:
        """Send an event."""
        if not self._has_ended:
            self._transport.write(data)
            if self._paused:
                self._record_output()

    # The client.

    @property
    def socket(self) -> "socket.socket | None":
        sock: socket.socket | None = self._transport.get_extra_info("socket")
        return sock

    @property
    def address(self) -> str:
        """The client's address, for people."""
        name = self._transport.get_extra_info("peername")
        return f"{name[0]} port {name[1]}" if isinstance(name, tuple) else "a peer on the Unix socket"

    def has_client_hung_up(self) -> bool:
        """Return whether the client has closed its sending side, as far as the kernel knows."""
        sock, conversation = self.socket, self._conversation
        if (
            conversation.input_ended
            or conversation.state is ConversationState.ENDED
            or sock is None
            or sock.fileno() < 0
        ):
            return True
        poll = select.poll()
        poll.register(sock.fileno(), _HUNG_UP)
        return bool(poll.poll(0))

    @property
    def is_waiting(self) -> bool:
        """Whether the client waits for replies or events, and its end would go unnoticed."""
        if self._conversation.state is ConversationState.ENDED:
            return False
        is_end_unnoticed = self._conversation.input_ended or not self._reading
        return is_end_unnoticed and bool(self._dispatcher.waiting or self._dispatcher.watches)

    def is_gone(self) -> bool:
        """Return whether no process has the client's end of the connection open any more."""
        sock = self.socket
        return sock is None or self._connections.credentials.is_gone(sock)

    # Flow control.

    @property
    def _has_ended(self) -> bool:
        return self._conversation.state is ConversationState.ENDED or self._transport.is_closing()

    def _update_flow(self) -> None:
        """Allow or forbid the fast path, read on or pause, set timers and quotas, and close when all is done."""
        conversation = self._conversation
        if self._has_ended:
            return
        self._fast_path_ok = False
        if conversation.is_caught_up and not self._paused:
            self._fast_path_ok = not (conversation.owes_replies or self._scheduled or self._client.is_readonly)
            if self._reading and not self._counted:  # the usual case
                return
        if conversation.is_finished:
            self._end()
            return
        wants_input = conversation.wants_input and not self._paused
        if wants_input and conversation.is_drained and self._close_if_done():
            return
        self._set_reading(wants_input)
        self._check_for_hang_up()
        if conversation.is_within_line:
            clock = self._connections.clock
            self._deadline = clock.now() + self._parts.limits.line_idle_s_max
            if self._timer is None:
                self._timer = clock.call_at(self._deadline, self._line_idle)
        if self._paused:
            self._record_output()
        self._record_input()

    def _set_reading(self, on: bool) -> None:
        if on is not self._reading and not self._conversation.input_ended:
            self._reading = on
            if on:
                self._transport.resume_reading()
            else:
                self._transport.pause_reading()

    def _check_for_hang_up(self) -> None:
        """Schedule checks whether the client has hung up, if it holds or waits and its end would go unnoticed."""
        if self.is_waiting:
            self._connections.half_closed.add(self)
        if self._dispatcher.holds and not self._reading and self._hang_up_timer is None:
            clock = self._connections.clock
            self._hang_up_timer = clock.call_at(clock.now() + _HANG_UP_CHECK_S, self._hang_up_check)

    def _hang_up_check(self) -> None:
        self._hang_up_timer = None
        if self._conversation.state is ConversationState.ENDED:
            return
        if not self._reading and self.has_client_hung_up() and not self._conversation.in_flight:
            self._dispatcher.release_holds()
        self._check_for_hang_up()

    def _close_if_done(self) -> bool:
        """End what the client holds, since it has closed its sending side. Close unless it waits for something.

        Returns:
            Whether the connection was closed. If not, replies or events are still to come.
        """
        self._dispatcher.release_holds()
        if self._dispatcher.waiting or self._dispatcher.watches:
            return False
        self._transport.close()
        return True

    def _line_idle(self) -> None:
        self._timer = None
        if self._conversation.state is ConversationState.ENDED or not self._conversation.is_within_line:
            return
        clock, idle_s = self._connections.clock, self._parts.limits.line_idle_s_max
        # After a late call, for instance after SIGSTOP, the rest of the line may have arrived unread.
        is_late = clock.now() - self._deadline > _LATE_S
        if not self._reading or self._conversation.in_flight or is_late:  # the daemon caused the delay
            self._deadline = clock.now() + idle_s
        if clock.now() < self._deadline:
            self._timer = clock.call_at(self._deadline, self._line_idle)
            return
        self.refuse(Refused(Code.TIMEOUT, f"a line was begun, and no byte of it came for {idle_s:g} s"))

    def _record_input(self) -> None:
        size = self._conversation.waiting_bytes
        self._counted = size > 0
        for connection in self._share.input.record(self, size):
            self._parts.counters.dropped += 1
            connection.refuse(
                Refused(Code.BUSY, "too many bytes wait in regd, yours among them; try again later")
            )

    def _record_output(self) -> None:
        size = self._transport.get_write_buffer_size() if self._paused else 0
        for connection in self._share.output.record(self, size):
            self._parts.counters.dropped += 1
            connection.cut()

    # Closing.

    def refuse(self, refusal: Refused) -> None:
        """Send an error and close. If earlier requests have no reply yet, close without the error."""
        if self._conversation.owes_replies:
            self.cut()
            return
        self._end()
        self._transport.write(self._dispatcher.error(refusal))

    def _end(self) -> None:
        """Answer nothing more, send what is buffered, and close when the client does, or after a short time."""
        self._fast_path_ok = False
        self._conversation.end()
        self._dispatcher.close()
        self._share.input.record(self, 0)
        asyncio.get_running_loop().call_soon(self._half_close)

    def _half_close(self) -> None:
        if self._transport.is_closing():
            return
        if self._conversation.input_ended:
            self._transport.close()
            return
        if self._transport.can_write_eof():
            try:
                self._transport.write_eof()  # after the buffered bytes
            except OSError:  # the client has reset the connection, and asyncio has not noticed yet
                self._transport.abort()
                return
        if not self._reading:
            self._reading = True
            # Read and discard: closing with unread input would reset the connection, and the last line be lost.
            self._transport.resume_reading()
        if self._timer is not None:
            self._timer.cancel()
        self._linger()

    def _linger(self) -> None:
        clock = self._connections.clock
        self._timer = clock.call_at(clock.now() + self._parts.limits.close_linger_s_max, self._linger_over)

    def _linger_over(self) -> None:
        self._timer = None
        if self._transport.get_write_buffer_size():
            self._linger()  # the client still reads its replies, which `output_bytes_total_max` limits
        else:
            self._transport.abort()

    def cut(self) -> None:
        """Close at once; unsent bytes are lost."""
        self._fast_path_ok = False
        self._conversation.end()
        self._share.output.record(self, 0)
        self._transport.abort()

    def close(self) -> None:
        """Send the replies that are ready, refuse the requests that wait, and close: the daemon is stopping."""
        replies = self._conversation.take_replies()
        if self._conversation.state is not ConversationState.ENDED:
            refusal = Refused(Code.SHUTTING_DOWN, "regd is stopping; connect again in a moment")
            replies += self._dispatcher.refuse_waiting(refusal)
        if replies and not self._transport.is_closing():
            self._transport.write(b"".join(replies))
        self._fast_path_ok = False
        self._conversation.end()
        self._transport.close()
