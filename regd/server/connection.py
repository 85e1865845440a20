"""One socket: chunks to the reader, requests to the answers or the engine, replies back, in order.

Order comes from one rule: writes may follow writes, anything else waits until the connection's writes have
landed. So a peer sees its own writes, and replies never need sorting. A peer that does not read is not read.
Must not know what a command does.
"""

import asyncio
import select
import socket
from collections.abc import Callable
from typing import cast

from regd.core.errors import Code, Refused
from regd.core.model import Entry
from regd.protocol import messages
from regd.protocol.bare import Quit
from regd.protocol.commands import COMMANDS, Request
from regd.protocol.parser import Item, Problem, RequestParser
from regd.server.context import Context, peer_text
from regd.server.handlers import Caller, IncrementalReply
from regd.server.pending_resolves import PendingResolve
from regd.server.watches import Watch
from regd.system.clock import Timer
from regd.system.namespaces import elsewhere

_SLICE = 128  # requests of one connection before others get a turn
_TURN_S = 0.001  # and so long, where requests are dear
_REPLY_S = 0.000_01  # about what sending one takes
_CHUNK_BYTES = 65_536  # replies are gathered up to here and sent as one
_LINGERING_MAX = 32  # refused connections that are listened to for a while, so that the reason arrives for sure
_LINGERING_READONLY_MAX = 16  # as many, while only so many are
_LATE_S = 0.25
_LOOK_S = 0.05
_HUNG_UP = getattr(select, "POLLRDHUP", 0) | select.POLLHUP | select.POLLERR  # POLLRDHUP: Linux, poll(2)


class Connection(asyncio.BufferedProtocol):
    __slots__ = (
        "_accepted",
        "_asker",
        "_blocked",
        "_context",
        "_counted",
        "_deadline",
        "_deferred",
        "_ending",
        "_eof",
        "_fast_path_ok",
        "_in_flight",
        "_is_readonly",
        "_landed",
        "_looking",
        "_may_hold",
        "_parked",
        "_paused",
        "_queued",
        "_quitting",
        "_reader",
        "_reading",
        "_replies",
        "_scheduled",
        "_share",
        "_slow",
        "_timer",
        "_transport",
        "_unsplit",
        "_watch_count",
        "_watches",
    )

    _transport: asyncio.Transport

    def __init__(self, context: Context) -> None:
        self._context = context
        self._replies = context.replies
        self._reader = RequestParser(context.limits)
        self._unsplit = b""  # received, and not given to the reader yet: many short lines take it milliseconds
        self._deferred: Item | None = None  # the next item, waiting until the writes before it have landed
        self._slow: IncrementalReply | None = None  # or until this reply to it is there
        self._queued = False  # for a slot to make that reply in
        self._accepted = False  # within `connections_max`
        self._is_readonly = False  # may only read
        self._share = context.writers  # of the daemon: what it takes is counted there
        self._counted = False  # bytes of its requests wait, and are counted
        self._in_flight = 0  # writes submitted and not answered
        self._landed: list[bytes] = []  # their replies, gathered for one send
        self._scheduled = False  # `run` will be called
        self._paused = False  # the peer does not read
        self._reading = True
        self._fast_path_ok = (
            False  # nothing is under way: what comes next may be answered at once; never if read-only
        )
        self._eof = False  # the peer has closed its sending side
        self._ending = False  # nothing more is looked at; what is sent is sent
        self._timer: Timer | None = None
        self._deadline = 0.0  # of an unfinished line
        self._parked: dict[PendingResolve, Request] = {}
        self._quitting = False  # `quit` was said; the parked are still to be answered
        self._looking = False  # whether the peer is there still, while it is not read
        self._blocked = False  # a request without id is parked: the replies of those behind it must wait
        self._may_hold = False  # it has asked for `hold`
        self._watches: dict[int, Watch] = {}
        self._watch_count = 0
        self._asker = Caller(0, None)

    # What asyncio calls.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        try:
            self._begin()
        except BaseException:
            self._transport.abort()  # asyncio would leave it open
            raise

    def _begin(self) -> None:
        context = self._context
        self._transport.set_write_buffer_limits(high=context.limits.output_bytes_max, low=0)
        context.connections.add(self)
        context.alone.clear()
        connection = self._transport.get_extra_info("socket")
        uid = context.peers.uid_of(connection)
        self._is_readonly = not context.peers.may_write(uid)
        if self._is_readonly:
            self._share = context.readers
        tally, limits = context.tally, context.limits
        full = tally.connections >= limits.connections_max
        if not full and not (self._is_readonly and tally.readonly_connections >= limits.readonly_connections_max):
            self._accepted = True
            self._asker = Caller(context.sessions.add(self), uid, elsewhere(connection), self._is_readonly)
            tally.connections += 1
            tally.readonly_connections += self._is_readonly
            tally.connections_accepted += 1
            self._fast_path_ok = not self._is_readonly
            return
        tally.connections_refused += 1
        count = (
            f"connections ({tally.connections:,})"
            if full
            else f"read-only connections ({tally.readonly_connections:,})"
        )
        refusal = Refused(Code.BUSY, f"too many {count}; close some or try again later")
        most = _LINGERING_READONLY_MAX if self._is_readonly else _LINGERING_MAX
        if len(context.connections) - tally.connections <= most:
            self._refuse(refusal)
        else:
            self._ending = True
            self._transport.write(self._error(refusal))
            self._transport.close()

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._context.received

    def buffer_updated(self, nbytes: int) -> None:
        self.data_received(bytes(self._context.received[:nbytes]))

    def data_received(self, data: bytes) -> None:
        if self._fast_path_ok:
            # What is known needs no reader, no turn, no account: this is a tenth of the way of other requests.
            replies = self._replies
            reply = replies.known.get(data)
            if reply is None:
                reply = replies.lookup(data)
            else:
                replies.count += 1
            if reply is not None:
                self._reader.valid = True
                self._transport.write(reply)
                return
            self._fast_path_ok = False
        if self._ending:
            return
        self._unsplit += data
        self._work_or_wait()

    def eof_received(self) -> bool:
        self._eof = True
        if self._ending:
            self._transport.close()
        else:
            if not self._unsplit:
                self._reader.end()
            self._work_or_wait()
        return True  # the sending side stays open for the replies

    def pause_writing(self) -> None:
        self._paused = True
        self._fast_path_ok = False
        if self._slow is not None:  # it begins anew when the peer reads: others have the slot meanwhile
            self._slow = None
            self._share.slow.give(self)
        self._account_output()

    def resume_writing(self) -> None:
        self._paused = False
        self._account_output()
        self._share.watches.resume(list(self._watches.values()))
        self.schedule()

    def connection_lost(self, exc: Exception | None) -> None:
        context = self._context
        self._ending, self._fast_path_ok = True, False
        self._reader.close()
        self._unsplit = b""
        self._deferred = self._slow = None
        self._share.slow.give(self)
        self._landed.clear()
        self._let_go()
        context.half_closed.discard(self)
        context.sessions.remove(self._asker.session)
        context.connections.discard(self)
        if not context.connections:
            context.alone.set()
        context.tally.connections -= self._accepted
        context.tally.readonly_connections -= self._accepted and self._is_readonly
        self._share.input.hold(self, 0)
        self._share.output.hold(self, 0)
        if self._timer is not None:
            self._timer.cancel()

    # The work.

    def _work_or_wait(self) -> None:
        if self._share.turns.has_time and not self._scheduled:
            self._work()
        else:
            self.schedule()
            self._update_flow()

    def _work(self) -> None:
        """Answer requests until there are none, something holds them up, or others should have a turn."""
        replies, self._landed = self._landed, []  # what has landed was asked before what is taken now
        size = 0
        pulse = self._context.pulse
        began = now = self._context.clock.now()
        if self._unsplit:
            data, self._unsplit = self._unsplit, b""
            self._reader.receive(data)
            if self._eof:
                self._reader.end()
        for _ in range(_SLICE):
            item = self._take()
            if item is None:
                break
            reply = self._answer(item)
            now = pulse.took(item.cmd if isinstance(item, Request) else "a bad line", now)
            if self._deferred is not None:
                break
            if reply is not None:
                replies.append(reply)
                size += len(reply)
                if size > _CHUNK_BYTES:
                    self._transport.write(b"".join(replies))
                    replies.clear()
                    size = 0
            if now > began + _TURN_S:
                self.schedule(busy=True)
                break
        else:
            self.schedule(busy=True)
        if replies:
            self._transport.write(b"".join(replies))
        self._update_flow()
        self._share.turns.spent(self._context.clock.now() - began)

    def _take(self) -> Item | None:
        if self._paused or self._ending or self._blocked:
            return None
        item = self._deferred or self._reader.next()
        self._deferred = None
        if isinstance(item, Quit) and self._parked:
            self._quitting = True
            self._reader.close()  # nothing behind it counts, but the end of the peer must be seen
            return None
        if item is not None and self._in_flight:
            writes = isinstance(item, Request) and COMMANDS[item.cmd].writes
            if not writes or self._in_flight >= self._context.limits.requests_in_flight_max:
                self._deferred = item
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
            elif context.events.logs_requests:
                context.events.bad_line(self.peer, self._asker.uid, item.refusal)
            line = self._error(item.refusal)
            return item.reply or line
        try:
            reply = self._do(item)
        except Refused as refusal:
            if self._in_flight:  # the engine takes no more, and replies before this one are not out yet
                self._deferred = item
                return None
            context.events.refused(self.peer, self._asker.uid, item, refusal)
            reply = self._error(refusal, item.id)
        if context.events.logs_requests and self._deferred is None:
            context.events.request(self.peer, self._asker.uid, item)
        context.tally.requests[item.cmd] += self._deferred is None
        return reply

    def _do(self, request: Request) -> bytes | None:
        """Return the reply, None where it comes later."""
        context, command = self._context, COMMANDS[request.cmd]
        if command.guarded and self._is_readonly:
            raise context.denied(self._asker.uid)
        if command.writes:
            size = request.weight_bytes
            self._share.kept.check(size)
            context.engine.submit(context.answers.write(request, self._asker), self._done(request, size))
            self._share.kept.take(size)
            self._in_flight += 1
            self._may_hold = self._may_hold or request.arguments.get("hold", False)
            return None
        if request.cmd in ("watch", "unwatch"):
            return self._watch(request) if request.cmd == "watch" else self._unwatch(request)
        return self._park(request) if "wait" in request.arguments else self._read(request)

    def _read(self, request: Request) -> bytes | None:
        """Answer, or hold the request up until there is an answer: others have a turn meanwhile."""
        if self._slow is None:
            reply = self._context.answers.read(request, self._asker)
            if isinstance(reply, bytes):
                return reply
            self._slow = reply
        if not self._share.slow.take(self):
            self._deferred, self._queued = request, True
            return None
        if self._queued:
            self._queued = False
            if self.is_gone():  # it was not read meanwhile: make no reply for nobody
                self.cut()
                return None
        now: bytes | None = b""
        try:
            now = next(self._slow)
        finally:
            if now is None:
                self._deferred = request
                self.schedule(busy=True)
            else:
                self._slow = None
                self._share.slow.give(self)
        return now

    def _watch(self, request: Request) -> bytes:
        context, given = self._context, request.arguments
        if ("epoch" in given) is not ("since" in given):
            field = "since" if "epoch" in given else "epoch"
            raise Refused(Code.BAD_ARGUMENT, "epoch and since go together", field=field)
        if len(self._watches) >= context.limits.watches_max:
            raise Refused(Code.BUSY, f"this connection has {len(self._watches)} watches already")
        since = (given["epoch"], given["since"]) if "epoch" in given else None
        number, size = self._watch_count + 1, request.weight_bytes
        self._share.kept.check(size)
        watch = self._share.watches.start(self, number, given.get("name", "*"), given.get("meta", {}), since)
        self._share.kept.take(size)
        self._watch_count = number
        self._watches[number] = watch
        watch.kept_bytes = size
        return messages.ok(request.id, {"watch": number, **context.answers.position()})

    def _unwatch(self, request: Request) -> bytes:
        watch = self._watches.pop(request.arguments["watch"], None)
        if watch is None:
            raise Refused(Code.NOT_FOUND, f"this connection has no watch {request.arguments['watch']}")
        self._share.watches.stop(watch)
        self._share.kept.give(watch.kept_bytes)
        return messages.ok(request.id, {})

    def _park(self, request: Request) -> bytes | None:
        """Answer when there is something to answer with; what has no id is answered before all behind it."""
        context, given = self._context, request.arguments
        if len(self._parked) >= context.limits.parked_max:
            raise Refused(Code.BUSY, f"{len(self._parked)} requests of this connection wait already")
        size = 2 * request.weight_bytes  # a wait is as much again
        self._share.kept.check(size)
        wait: PendingResolve | None = None
        at_once: list[bytes] = []

        def done(entry: Entry | None) -> None:
            try:
                reply = context.answers.waited(request, entry)
            except Refused as refusal:
                reply = self._error(refusal, request.id)
            if wait is None:
                at_once.append(reply)
                return
            if self._parked.pop(wait, None) is not None:
                self._share.kept.give(size)
            self._blocked = self._blocked and request.id is not None
            if not self._ending:
                self._landed.append(reply)
                self.schedule()

        wait = self._share.waits.park(
            given["name"], given.get("instance"), given.get("meta", {}), given["wait"], done
        )
        if at_once:
            return at_once[0]
        self._parked[wait] = request
        self._share.kept.take(size)
        self._blocked = request.id is None
        return None

    def _error(self, refusal: Refused, id: str | int | None = None) -> bytes:
        self._context.tally.errors[refusal.code] += 1
        return messages.error(refusal, id)

    def _done(self, request: Request, size: int) -> Callable[[bytes | Refused], None]:
        def done(outcome: bytes | Refused) -> None:
            self._in_flight -= 1
            self._share.kept.give(size)
            if isinstance(outcome, Refused):
                self._context.events.refused(self.peer, self._asker.uid, request, outcome)
            if self._ending or self._transport.is_closing():
                return
            if isinstance(outcome, Refused):
                self._context.answers.explain(request, outcome)
                self._landed.append(self._error(outcome, request.id))
            else:
                self._landed.append(outcome)
            self.schedule()

        return done

    def schedule(self, busy: bool = False) -> None:
        if not self._scheduled:
            self._scheduled = True
            self._share.turns.schedule(self, busy)

    def run(self) -> None:
        """Do what there is to do: it is this one's turn."""
        self._scheduled = False
        if self._ending or self._transport.is_closing():
            return
        if self._deferred is None and not self._reader.pending and not self._unsplit and not self._eof:
            landed, self._landed = self._landed, []
            if landed:
                self._transport.write(b"".join(landed))
            self._update_flow()
            self._share.turns.spent(_REPLY_S)
            return
        self._work()

    @property
    def can_take(self) -> bool:
        return not (self._paused or self._ending or self._transport.is_closing())

    def push(self, data: bytes) -> None:
        """Send an event."""
        if not self._ending and not self._transport.is_closing():
            self._transport.write(data)
            if self._paused:
                self._account_output()

    @property
    def socket(self) -> "socket.socket | None":
        found: socket.socket | None = self._transport.get_extra_info("socket")
        return found

    @property
    def peer(self) -> str:
        return peer_text(self._transport.get_extra_info("peername"))

    def is_cut(self) -> bool:
        """Whether the peer has closed its side, as far as the kernel knows."""
        found = self.socket
        if self._eof or self._ending or found is None or found.fileno() < 0:
            return True
        poll = select.poll()
        poll.register(found.fileno(), _HUNG_UP)
        return bool(poll.poll(0))

    @property
    def is_waiting(self) -> bool:
        """Whether a reply or events are to come, and the end of the peer would not be seen."""
        unseen = self._eof or not self._reading
        return unseen and not self._ending and bool(self._parked or self._watches)

    def is_gone(self) -> bool:
        """Whether nobody has the peer's end open any more."""
        found = self._transport.get_extra_info("socket")
        return found is None or self._context.peers.is_gone(found)

    # Holding back, and ending.

    def _update_flow(self) -> None:
        """After some work: read on or not, watch an unfinished line, keep the books, close when all is done."""
        transport, context, reader = self._transport, self._context, self._reader
        if self._ending or transport.is_closing():
            return
        self._fast_path_ok = False
        if reader.empty and not self._unsplit and not self._is_held_back:
            self._fast_path_ok = not (self._in_flight or self._landed or self._scheduled or self._is_readonly)
            if self._reading and not self._counted:  # mostly there is nothing more to do
                return
        idle = self._deferred is None and not reader.pending
        if self._blocked:  # the end of the peer must be seen, so it is read for a while
            idle = reader.waiting_bytes < context.limits.line_bytes_max
        idle = idle and not self._paused and not self._unsplit
        if self._quitting and not self._parked and not self._in_flight and not self._landed:
            self._end()
            return
        if idle and self._eof and self._finish():
            return
        self._listen(idle)
        self._look_out()
        if reader.unfinished:
            self._deadline = context.clock.now() + context.limits.line_idle_s_max
            if self._timer is None:
                self._timer = context.clock.call_at(self._deadline, self._line_idle)
        if self._paused:
            self._account_output()
        self._account_input()

    @property
    def _is_held_back(self) -> bool:
        return self._deferred is not None or self._paused or self._blocked or self._quitting or self._eof

    def _listen(self, on: bool) -> None:
        """Read on, or not for now."""
        if on is not self._reading and not self._eof:
            self._reading = on
            if on:
                self._transport.resume_reading()
            else:
                self._transport.pause_reading()

    def _look_out(self) -> None:
        """While a peer that holds something or waits is not read, its end would not be seen: ask the kernel."""
        if self.is_waiting:
            self._context.half_closed.add(self)
        if self._may_hold and not self._reading and not self._looking:
            self._looking = True
            clock = self._context.clock
            clock.call_at(clock.now() + _LOOK_S, self._look)

    def _look(self) -> None:
        self._looking = False
        if not self._ending and not self._reading and self.is_cut() and not self._in_flight:
            self._release()
        self._look_out()

    def _finish(self) -> bool:
        """The peer sends no more: close, unless something is still to be sent. Returns whether that is so."""
        if self._in_flight or self._landed:
            return False
        self._release()
        if self._parked or self._watches:
            return False
        self._transport.close()
        return True

    def _line_idle(self) -> None:
        self._timer = None
        if self._ending or not self._reader.unfinished:
            return
        context = self._context
        late = (
            context.clock.now() - self._deadline > _LATE_S
        )  # as after SIGSTOP: what came meanwhile is not read yet
        if not self._reading or self._in_flight or late:  # ours is the delay
            self._deadline = context.clock.now() + context.limits.line_idle_s_max
        if context.clock.now() < self._deadline:
            self._timer = context.clock.call_at(self._deadline, self._line_idle)
            return
        idle = context.limits.line_idle_s_max
        self._refuse(Refused(Code.TIMEOUT, f"a line was begun, and no byte of it came for {idle:g} s"))

    def _account_input(self) -> None:
        context, size = self._context, self._reader.waiting_bytes + len(self._unsplit)
        self._counted = size > 0
        for each in self._share.input.hold(self, size):
            context.tally.dropped += 1
            each._refuse(Refused(Code.BUSY, "too many bytes wait in regd, yours among them; try again later"))

    def _account_output(self) -> None:
        context = self._context
        size = self._transport.get_write_buffer_size() if self._paused else 0
        too_much = self._share.output.hold(self, size)
        for each in too_much:
            context.tally.dropped += 1
            each.cut()

    def _refuse(self, refusal: Refused) -> None:
        """Say why, and end. Where replies are still to come, the reason cannot stand before them: just end."""
        if self._in_flight or self._landed:
            self.cut()
            return
        self._end()
        self._transport.write(self._error(refusal))

    def _end(self) -> None:
        """Look at nothing more, send what is to be sent, and close once the peer has, or soon."""
        self._ending, self._fast_path_ok = True, False
        self._reader.close()
        self._unsplit = b""
        self._deferred = self._slow = None
        self._share.slow.give(self)
        self._let_go()
        self._share.input.hold(self, 0)
        asyncio.get_running_loop().call_soon(self._half_close)

    def _let_go(self) -> None:
        """End what goes with the connection: what it holds, its watches, what it waits for."""
        self._release()
        for watch in self._watches.values():
            self._share.watches.stop(watch)
            self._share.kept.give(watch.kept_bytes)
        self._watches.clear()
        for wait, request in self._parked.items():
            self._share.waits.cancel(wait)
            self._share.kept.give(2 * request.weight_bytes)
        self._parked.clear()

    def _release(self) -> None:
        if self._may_hold:
            self._may_hold = False
            self._context.reaper.connection_ended(self._asker.session)

    def _half_close(self) -> None:
        if self._transport.is_closing():
            return
        if self._eof:
            self._transport.close()
            return
        if self._transport.can_write_eof():
            try:
                self._transport.write_eof()  # behind what is buffered
            except OSError:  # the peer has reset the connection, and asyncio has not seen it yet
                self._transport.abort()
                return
        if not self._reading:
            self._reading = True
            self._transport.resume_reading()  # and discard: a reset for unread input would eat the last line
        if self._timer is not None:
            self._timer.cancel()
        self._wait_for_peer()

    def _wait_for_peer(self) -> None:
        clock = self._context.clock
        self._timer = clock.call_at(clock.now() + self._context.limits.close_linger_s_max, self._give_up)

    def _give_up(self) -> None:
        self._timer = None
        if self._transport.get_write_buffer_size():
            self._wait_for_peer()  # it still takes what it asked for; `output_bytes_total_max` bounds that
        else:
            self._transport.abort()

    def cut(self) -> None:
        """End at once; what was not sent is lost."""
        self._ending, self._fast_path_ok = True, False
        self._share.output.hold(self, 0)
        self._transport.abort()

    def close(self) -> None:
        """The daemon is stopping: send what is to be sent, and close."""
        if not self._ending:
            for request in self._parked.values():
                refusal = Refused(Code.SHUTTING_DOWN, "regd is stopping; connect again in a moment")
                self._landed.append(self._error(refusal, request.id))
        if self._landed and not self._transport.is_closing():
            self._transport.write(b"".join(self._landed))
            self._landed.clear()
        self._ending, self._fast_path_ok = True, False
        self._transport.close()
