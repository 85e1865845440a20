"""One asyncio connection that many tasks share: requests out, replies to who asked, events to who follows.

Every request has a number, and a reply goes to the request of its number, so that a caller who was cancelled
harms nobody. What the tasks of one turn of the loop write is sent as one. Must not know what a command means.
"""

import asyncio
import os
import weakref
from collections.abc import Callable
from typing import Any, cast

from regd_client import wire
from regd_client.errors import RegdError, Unavailable
from regd_client.wire import Address

_PATIENCE_S = 5.0  # a daemon that says nothing for twice as long, while it is asked, hangs

Events = Callable[[dict[str, Any]], None]


class Connection(asyncio.Protocol):
    """Use `Connection.open`; `closed` is done once the socket is gone. `lost` hears events of no watch."""

    def __init__(self, address: Address, lost: Events) -> None:
        self.address = address
        self.heard = 0  # chunks, ever
        self._lost = lost
        self.shares_processes: bool | None = None  # whether the daemon sees the same processes; None: not asked
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._waiting: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._parked: dict[int, asyncio.TimerHandle] = {}  # those of the waiting that may take long, until then
        self._starting: dict[int, Events] = {}  # watches whose number is not known yet
        self._watches: dict[int, Events] = {}
        self._number = 0
        self._out: list[bytes] = []
        self._rest = bytearray()
        self._broken: RegdError | None = None
        self._dog: asyncio.TimerHandle | None = None
        self.closed: asyncio.Future[None] = self._loop.create_future()

    @classmethod
    async def open(cls, address: Address, lost: Events) -> "Connection":
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

    async def ask(self, cmd: str, arguments: dict[str, Any], events: Events | None = None) -> dict[str, Any]:
        """Send a request and return its reply, when that is `ok`. `events` hears a `watch`, its reply first.

        Raises:
            RegdError: what the daemon says, or `Unavailable` when the connection breaks before it says anything.
        """
        return wire.result(await self._send(cmd, arguments, events), self.address)

    def post(self, cmd: str, arguments: dict[str, Any]) -> None:
        """Send a request whose reply nobody waits for."""
        if self.usable:
            self._send(cmd, arguments, None).add_done_callback(
                lambda answer: answer.cancelled() or answer.exception()
            )

    def forget(self, watch: int) -> None:
        """Hear no more of a watch."""
        if self._watches.pop(watch, None) is not None:
            self.post("unwatch", {"watch": watch})

    def _send(
        self, cmd: str, arguments: dict[str, Any], events: Events | None
    ) -> "asyncio.Future[dict[str, Any]]":
        if self._broken is not None:
            raise _copy(self._broken)
        self._number += 1
        number = self._number
        line = wire.request(cmd, number, arguments)
        answer = self._loop.create_future()
        self._waiting[number] = answer
        if events is not None:
            self._starting[number] = events
        if (wait_s := arguments.get("wait")) is not None:
            self._parked[number] = self._loop.call_later(wait_s, self._overdue, number)
        elif self._dog is None:
            self._watch_out(self.heard, number)
        if not self._out:
            self._loop.call_soon(self._flush)
        self._out.append(line)
        return answer

    def abort(self, why: str) -> None:
        """Break it, because of `why`."""
        self._break(wire.unavailable(self.address, why))
        if self._transport is not None:
            self._transport.abort()

    async def close(self) -> None:
        """Close, and wait until it is. Twice is harmless."""
        if self._transport is not None:
            self._break(Unavailable(f"the connection to regd at {self.address} was closed here"))
            await asyncio.shield(self.closed)

    def _flush(self) -> None:
        if self.usable:
            assert self._transport is not None
            self._transport.write(b"".join(self._out))
        self._out.clear()

    def _watch_out(self, heard: int, number: int) -> None:
        """Look later whether anything was heard since, while this request, or an older one, waits."""

        def look() -> None:
            self._dog = None
            urgent = [each for each in self._waiting if each not in self._parked]
            if not urgent or self._broken is not None:
                return
            if self.heard == heard and urgent[0] <= number:
                self.abort(f"no answer for {2 * _PATIENCE_S:g} s")
            else:
                self._watch_out(self.heard, urgent[0])

        self._dog = self._loop.call_later(2 * _PATIENCE_S if heard == self.heard else _PATIENCE_S, look)

    def _overdue(self, number: int) -> None:
        """The time that this one waits for is over: it is urgent as others are."""
        del self._parked[number]
        if self._dog is None:
            self._watch_out(self.heard, number)

    # What asyncio calls.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        _OPEN.add(self)

    def data_received(self, data: bytes) -> None:
        self.heard += 1
        first, *lines = data.split(b"\n")
        if not lines:
            self._rest += first
            if len(self._rest) > wire.REPLY_BYTES_MAX:
                self._break(Unavailable(f"whoever answers at {self.address} is no regd: a line without an end"))
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
        try:
            fields = wire.reply(line)
        except RegdError as error:
            self._break(error)
            return
        if "event" in fields:
            self._watches.get(fields.get("watch", 0), self._lost)(fields)
            return
        number = fields.get("id")
        if number is None:
            self._break(wire.refused(self.address, fields))
            return
        answer = self._waiting.pop(number, None)
        if parked := self._parked.pop(number, None):
            parked.cancel()
        events = self._starting.pop(number, None)
        if events is not None and fields["ok"]:
            self._watches[fields["watch"]] = events
            events(fields)
        if answer is not None and not answer.done():  # done: its caller was cancelled
            answer.set_result(fields)

    def connection_lost(self, exc: Exception | None) -> None:
        _OPEN.discard(self)
        if self._broken is None:
            why = "the connection broke before the answer came; a change may have been made or not"
            self._break(wire.unavailable(self.address, why))
        if not self.closed.done():
            self.closed.set_result(None)

    def _break(self, error: RegdError) -> None:
        """Tell everybody who waits, and take no more."""
        if self._broken is None:
            self._broken = error
        waiting, self._waiting = self._waiting, {}
        self._watches.clear()
        for answer in waiting.values():
            if not answer.done():
                answer.set_exception(_copy(error))
        for timer in (*self._parked.values(), self._dog):
            if timer is not None:
                timer.cancel()
        self._parked.clear()
        self._dog = None
        if self._transport is not None:
            self._transport.close()

    def _forked(self) -> None:
        """Let go of the parent's socket in a child, without a word to the daemon and without its event loop."""
        self._broken = Unavailable("this process was forked from the one that had the connection")
        found = self._transport.get_extra_info("socket") if self._transport is not None else None
        if found is not None and found.fileno() >= 0:
            # The number stays with the transport that owns it; the socket behind it is the parent's alone again.
            nowhere = os.open(os.devnull, os.O_RDWR)
            os.dup2(nowhere, found.fileno(), inheritable=False)
            os.close(nowhere)


_OPEN: "weakref.WeakSet[Connection]" = weakref.WeakSet()


def _let_go_in_child() -> None:
    for connection in list(_OPEN):
        connection._forked()
    _OPEN.clear()


os.register_at_fork(after_in_child=_let_go_in_child)


def _copy(error: RegdError) -> RegdError:
    """One exception object for each waiter: raising the same one twice would mix their tracebacks."""
    return type(error)(str(error), error.code, error.details)
