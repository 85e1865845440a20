"""One asyncio connection that many tasks share: requests out, replies to who asked, events to who follows.

Every request has a number, and a reply goes to the request of its number, so that a caller who was cancelled
harms nobody. What many tasks write in one turn of the loop is sent as one. Must not know what a command means.
"""

import asyncio
import os
import socket
import struct
import time
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple, cast

from regd_client import repeated, replies, wire
from regd_client.errors import RegdError, Unavailable
from regd_client.wire import Address

HANGS_S = 9.0  # a daemon that says nothing for so long, while it is asked, hangs
_AGAIN_S = 0.25  # until the second look: a loop that was held up hears first what came meanwhile
_FAREWELL_S = 1.0  # for what is still to be sent at the end
_RESET = struct.pack("ii", 1, 0)  # on closing: linger on, for no time (socket(7))
_CHUNK_BYTES = 16_384  # read at once, at most

Heard = Callable[[dict[str, Any]], None]


class _Asked(NamedTuple):
    """A request without its reply: who waits, from when it is late, whether it is asked again and again."""

    answer: "asyncio.Future[dict[str, Any]]"
    late_from: float
    again: bool
    cmd: str
    arguments: dict[str, Any]


class Connection(asyncio.BufferedProtocol):
    """Use `Connection.open`; `closed` is done once the socket is gone. `lost` hears of what it does not hold now.

    `heard_at` is when the daemon last said anything, `ended_at` when this broke, or when a daemon that hangs was
    last heard, both by `time.monotonic`.
    """

    def __init__(self, address: Address, lost: "Lost") -> None:
        self.address = address
        self.heard_at = time.monotonic()
        self.ended_at: float | None = None
        self._lost = lost
        self.shares_processes: bool | None = None  # whether the daemon sees the same processes; None: not asked
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._waiting: dict[int, _Asked] = {}  # by number
        self._hearing: dict[int, Heard | None] = {}  # who hears a reply first; None: who did has gone
        self._watches: dict[int, Heard] = {}
        self._number = 0
        self._out: list[bytes] = []
        self._alone = False  # what was sent last was all that somebody waited for
        # All that is read goes through this. Else asyncio makes 256 KiB for each chunk, which many a process gets
        # from the kernel and gives back every time: 20 of the 90 µs of a question and its answer.
        self._chunk = memoryview(bytearray(_CHUNK_BYTES))
        self._rest = bytearray()
        self._broken: RegdError | None = None
        self._dog: asyncio.TimerHandle | None = None
        self._suspicious = False
        self.closed: asyncio.Future[None] = self._loop.create_future()

    @classmethod
    async def open(cls, address: Address, lost: "Lost") -> "Connection":
        """Connect once.

        Raises:
            OSError: nobody listens there.
        """
        loop = asyncio.get_running_loop()
        if address.path:
            _, made = await loop.create_unix_connection(lambda: cls(address, lost), address.path)
        else:
            _, made = await loop.create_connection(lambda: cls(address, lost), address.host, address.port)
        return made

    @property
    def usable(self) -> bool:
        return self._broken is None and self._transport is not None and not self._transport.is_closing()

    def ask(
        self, cmd: str, arguments: dict[str, Any], heard: Heard | None = None, again: bool = False
    ) -> "asyncio.Future[dict[str, Any]]":
        """Send a request; what is returned is to be awaited, for the reply when that is `ok`.

        `heard` hears such a reply in its place among all that the daemon says, even when the caller has gone, and
        behind the reply to `watch` every event. The reply to what is asked `again` and again is read once and
        given to all who have the same: nobody may change it, and it has no `id`.

        Raises:
            RegdError: what the daemon says, or `Unavailable` when the connection breaks before it says anything.
        """
        if self._broken is not None:
            raise _copy(self._broken)
        self._number += 1
        number = self._number
        line = repeated.request(cmd, number, arguments)
        answer = self._loop.create_future()
        late_from = time.monotonic() + (arguments.get("wait") or 0.0)
        self._waiting[number] = _Asked(answer, late_from, again, cmd, arguments)
        if heard is not None:
            self._hearing[number] = heard
        if self._dog is None:
            self._dog = self._loop.call_later(HANGS_S, self._look)
        self._out.append(line)
        if self._alone and len(self._waiting) == 1:
            self._flush()  # one task alone: nothing to send together, and a turn of the loop less to wait
        elif len(self._out) == 1:
            self._loop.call_soon(self._flush)
        return answer

    def post(self, cmd: str, arguments: dict[str, Any]) -> None:
        """Send a request whose reply nobody waits for."""
        if self.usable:
            self.ask(cmd, arguments).add_done_callback(lambda answer: answer.cancelled() or answer.exception())

    def forget(self, heard: Heard) -> None:
        """End the watch that this one hears, or will hear once the daemon has taken it."""
        for number, each in self._hearing.items():
            if each == heard:
                self._hearing[number] = None
        for watch in [watch for watch, each in self._watches.items() if each == heard]:
            del self._watches[watch]
            self.post("unwatch", {"watch": watch})

    def abort(self, why: str, ended_at: float | None = None) -> None:
        """Break it, because of `why`."""
        self._break(wire.unavailable(self.address, why), ended_at)
        if self._transport is not None:
            self._transport.abort()

    def end(self) -> None:
        """Close it from here; what was asked is still sent."""
        self._flush()
        self._drop_waits()
        self._break(Unavailable(f"the connection to regd at {self.address} was closed here"))

    async def close(self) -> None:
        """Close, and wait until it is, but not for a daemon that reads nothing. Twice is harmless."""
        self.end()
        if self._transport is None:
            return
        try:
            async with asyncio.timeout(_FAREWELL_S):
                await asyncio.shield(self.closed)
        except TimeoutError:
            pass
        finally:
            self._transport.abort()
        await asyncio.shield(self.closed)

    def _drop_waits(self) -> None:
        """Have the daemon forget what waits there, when that is all that is under way.

        It answers who closes only one side, and cannot tell whether both are closed. A reset tells it.
        """
        now = time.monotonic()
        if not self.usable or not self._waiting or any(each.late_from <= now for each in self._waiting.values()):
            return
        assert self._transport is not None
        found = self._transport.get_extra_info("socket")
        if self._transport.get_write_buffer_size() == 0 and found.family != socket.AF_UNIX:
            found.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)

    def _flush(self) -> None:
        self._alone = len(self._waiting) == 1
        if self._out and self.usable:
            assert self._transport is not None
            self._transport.write(b"".join(self._out))
        self._out.clear()

    def _look(self) -> None:
        """Look whether the daemon has said anything for as long as it was asked, and had to answer."""
        self._dog = None
        if not self._waiting or self._broken is not None:
            return
        silent_since = max(self.heard_at, min(each.late_from for each in self._waiting.values()))
        left_s = silent_since + HANGS_S - time.monotonic()
        if left_s <= 0 and self._suspicious:
            self.abort(f"no answer for {HANGS_S:g} s", self.heard_at)
            return
        self._suspicious = left_s <= 0
        self._dog = self._loop.call_later(min(left_s, HANGS_S) if left_s > 0 else _AGAIN_S, self._look)

    # What asyncio calls.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        _OPEN.add(self)

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._chunk

    def buffer_updated(self, nbytes: int) -> None:
        first, *lines = bytes(self._chunk[:nbytes]).split(b"\n")
        if not lines:
            if not self._rest:  # a line that goes on and on is no answer
                self.heard_at = time.monotonic()
            self._rest += first
            if len(self._rest) > wire.REPLY_BYTES_MAX:
                self._break(wire.not_a_reply("a line without an end"))
            return
        last = lines.pop()
        if self._rest:
            first = bytes(self._rest) + first
        self._rest[:] = last
        self._answer(first)
        for line in lines:
            self._answer(line)

    def _answer(self, line: bytes) -> None:
        if self._broken is not None:
            return
        number, said = repeated.parts(line)
        asked = self._waiting.get(number)
        try:
            if asked is not None and asked.again:
                self._take(number, asked, repeated.reply(said))
                return
            fields = wire.reply(line)
            if "event" in fields:
                self._tell(fields)
            elif "id" in fields:
                number = fields["id"]
                if type(number) is not int or (asked := self._waiting.get(number)) is None:
                    raise wire.not_a_reply(f"nobody asked with id {number!r:.40}")
                self._take(number, asked, wire.checked(asked.cmd, asked.arguments, fields))
            elif fields["ok"]:
                raise wire.not_a_reply("id is missing", line)
            else:
                self._break(wire.refused(self.address, fields))
        except Unavailable as error:
            self._break(error)

    def _take(self, number: int, asked: "_Asked", reply: dict[str, Any]) -> None:
        self.heard_at = time.monotonic()
        del self._waiting[number]
        if number in self._hearing:
            self._hear(asked.cmd, self._hearing.pop(number), reply)
        if asked.answer.done():  # its caller was cancelled
            return
        if reply["ok"]:
            asked.answer.set_result(reply)
        else:
            asked.answer.set_exception(wire.refusal(reply, self.address))

    def _tell(self, event: dict[str, Any]) -> None:
        kind = event["event"]
        if kind == "lost":
            self._lost(self, event)
        elif replies.is_known_event(kind):
            heard = self._watches.get(event["watch"])
            if heard is not None:  # events that nobody asked for are no answer either
                self.heard_at = time.monotonic()
                heard(event)

    def _hear(self, cmd: str, heard: Heard | None, reply: dict[str, Any]) -> None:
        if not reply["ok"]:
            return
        if heard is None:
            if cmd == "watch":
                self.post("unwatch", {"watch": reply["watch"]})
            return
        if cmd == "watch":
            self._watches[reply["watch"]] = heard
        heard(reply)

    def eof_received(self) -> None:
        self._broke()  # at once, and not when the socket has gone

    def connection_lost(self, exc: Exception | None) -> None:
        _OPEN.discard(self)
        self._broke()
        if not self.closed.done():
            self.closed.set_result(None)

    def _broke(self) -> None:
        why = "the connection broke before the answer came; a change may have been made or not"
        self._break(wire.unavailable(self.address, why))

    def _break(self, error: RegdError, ended_at: float | None = None) -> None:
        """Tell everybody who waits, and take no more. Only the first time counts."""
        if self._broken is None:
            self._broken = error
            self.ended_at = time.monotonic() if ended_at is None else ended_at
        waiting, self._waiting = self._waiting, {}
        self._watches.clear()
        self._hearing.clear()
        for asked in waiting.values():
            if not asked.answer.done():
                asked.answer.set_exception(_copy(error))
        if self._dog is not None:
            self._dog.cancel()
            self._dog = None
        if self._transport is not None:
            self._transport.close()

    def _forked(self) -> None:
        """Let go of the parent's socket in a child, without a word to the daemon and without its event loop."""
        self._broken = Unavailable("this process was forked from the one that had the connection")
        self.ended_at = time.monotonic()
        found = self._transport.get_extra_info("socket") if self._transport is not None else None
        if found is not None and found.fileno() >= 0:
            # The number stays with the transport that owns it; the socket behind it is the parent's alone again.
            nowhere = os.open(os.devnull, os.O_RDWR)
            os.dup2(nowhere, found.fileno(), inheritable=False)
            os.close(nowhere)


Lost = Callable[[Connection, dict[str, Any]], None]
_OPEN: "weakref.WeakSet[Connection]" = weakref.WeakSet()


async def abort_all(why: str) -> None:
    """Break every connection of this event loop, and wait until their sockets have gone."""
    ours = [each for each in _OPEN if each._loop is asyncio.get_running_loop()]
    for each in ours:
        each.abort(why)
    await asyncio.gather(*(asyncio.shield(each.closed) for each in ours))


def _let_go_in_child() -> None:
    for connection in list(_OPEN):
        connection._forked()
    _OPEN.clear()


os.register_at_fork(after_in_child=_let_go_in_child)


def _copy(error: RegdError) -> RegdError:
    """One exception object for each waiter: raising the same one twice would mix their tracebacks."""
    return type(error)(str(error), error.code, error.details)
