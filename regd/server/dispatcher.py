"""Carries out the requests of one connection: reads, writes, watches, and `resolve` with `wait`.

A reply that is ready at once is returned. A late reply is passed to the conversation, which keeps replies in
order.
"""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from regd.core.errors import Code, Refused
from regd.core.limits import Limits
from regd.core.model import By, Entry
from regd.protocol import messages
from regd.protocol.commands import COMMANDS, Request
from regd.server.conversation import Conversation, ConversationState
from regd.server.counters import Counters
from regd.server.engine import Engine
from regd.server.event_log import EventLog
from regd.server.handlers import ClientIdentity, Handlers, IncrementalReply
from regd.server.history_reader import HistoryReader
from regd.server.quotas import LimitedConnection, Share
from regd.server.reaper import Reaper
from regd.server.waiting_resolves import WaitingResolve
from regd.server.watches import Watch, Watcher


@dataclass(frozen=True, slots=True)
class DaemonParts:
    """The parts of the daemon that carry out requests."""

    limits: Limits
    handlers: Handlers
    engine: Engine
    reaper: Reaper
    events: EventLog
    counters: Counters
    history: HistoryReader


class ClientConnection(Watcher, LimitedConnection, Protocol):
    """A connection, as its dispatcher uses it."""

    @property
    def address(self) -> str: ...

    def schedule(self, busy: bool = False) -> None: ...

    def send_late_replies(self) -> None: ...


class Dispatcher:
    """Carries out the requests of one connection.

    Attributes:
        holds: a request had `hold`, so that registrations may end with this connection.
        waiting: the `resolve`s with `wait` that have no reply yet, each with its request.
        watches: the watches of the connection, by number.
    """

    __slots__ = (
        "_client",
        "_connection",
        "_conversation",
        "_page",
        "_parts",
        "_share",
        "_slow_reply",
        "_stated_pid",
        "_watch_count",
        "holds",
        "waiting",
        "watches",
    )

    def __init__(
        self,
        parts: DaemonParts,
        share: Share,
        client: ClientIdentity,
        connection: ClientConnection,
        conversation: Conversation,
    ) -> None:
        self._parts = parts
        self._share = share
        self._client = client
        self._connection = connection
        self._conversation = conversation
        self._slow_reply: IncrementalReply | None = None  # to the request that is deferred
        self._page: asyncio.Future[bytes | Refused] | None = None  # the reply to a deferred `history`
        self._stated_pid: int | None = None  # the last `pid` that the client named
        self._watch_count = 0
        self.watches: dict[int, Watch] = {}
        self.waiting: dict[WaitingResolve, Request] = {}
        self.holds = False

    def answer(self, request: Request) -> bytes | None:
        """Carry out a request and return its reply; None if the reply comes late or the request was deferred."""
        parts, conversation = self._parts, self._conversation
        try:
            reply = self._perform(request)
        except Refused as refusal:
            if conversation.in_flight:  # a write was refused at once, but the writes before it have no reply yet
                conversation.defer(request)
                return None
            parts.events.refused(self._connection.address, self._client.uid, request, refusal)
            reply = self.error(refusal, request.id)
        if conversation.is_deferred:
            return None
        if parts.events.logs_requests:
            parts.events.request(self._connection.address, self._client.uid, request)
        parts.counters.requests[request.cmd] += 1
        return reply

    def error(self, refusal: Refused, id: str | int | None = None) -> bytes:
        """Return the error line of a refusal, and count it."""
        self._parts.counters.errors[refusal.code] += 1
        return messages.error(refusal, id)

    def refuse_waiting(self, refusal: Refused) -> list[bytes]:
        """Return an error line for each `resolve` that waits."""
        return [self.error(refusal, request.id) for request in self.waiting.values()]

    def release_holds(self) -> None:
        """End the registrations that this connection holds. Idempotent."""
        if self.holds:
            self.holds = False
            self._parts.reaper.connection_ended(self._client.session)

    def drop_slow_reply(self) -> None:
        """Give up the slot and the unfinished reply, which the deferred request starts anew. Idempotent."""
        self._slow_reply = self._page = None
        self._share.slow_replies.release(self._connection)

    def close(self) -> None:
        """End all that belongs to the connection: holds, watches, and `resolve`s that wait. Idempotent."""
        self.drop_slow_reply()
        self.release_holds()
        for watch in self.watches.values():
            self._share.watches.stop(watch)
            self._share.memory.release(watch.pending_bytes)
        self.watches.clear()
        for wait, request in self.waiting.items():
            self._share.waiting_resolves.cancel(wait)
            self._share.memory.release(_wait_bytes(request))
        self.waiting.clear()

    def _perform(self, request: Request) -> bytes | None:
        command = COMMANDS[request.cmd]
        if command.needs_write_access and self._client.is_readonly:
            raise _denied(self._client.uid)
        if command.waits_for_commit:
            self._submit(request)
            return None
        if request.cmd == "watch":
            return self._watch(request)
        if request.cmd == "unwatch":
            return self._unwatch(request)
        if request.cmd == "history":
            return self._history(request)
        return self._wait(request) if "wait" in request.arguments else self._read(request)

    def _submit(self, request: Request) -> None:
        parts, size = self._parts, request.weight_bytes
        self._share.memory.check(size)
        self._stated_pid = request.arguments.get("pid", self._stated_pid)
        by = self._client.by or By(pid=self._stated_pid, uid=self._client.uid)
        write = parts.handlers.write(request, self._client)
        parts.engine.submit(write, self._make_done(request, size), by)
        self._share.memory.take(size)
        self._conversation.count_write()
        self.holds = self.holds or request.arguments.get("hold", False)

    def _make_done(self, request: Request, size: int) -> Callable[[bytes | Refused], None]:
        """Return the function that the engine calls with the reply to a write."""

        def done(outcome: bytes | Refused) -> None:
            parts = self._parts
            self._share.memory.release(size)
            if isinstance(outcome, Refused):
                parts.events.refused(self._connection.address, self._client.uid, request, outcome)
            if self._conversation.state is ConversationState.ENDED:
                return
            if isinstance(outcome, Refused):
                parts.handlers.explain(request, outcome)
                outcome = self.error(outcome, request.id)
            self._conversation.add_write_reply(outcome)
            self._connection.send_late_replies()

        return done

    def _read(self, request: Request) -> bytes | None:
        """Answer at once, or in several time slices, with the request deferred until the reply is complete."""
        if self._slow_reply is None:
            reply = self._parts.handlers.read(request, self._client)
            if isinstance(reply, bytes):
                return reply
            self._slow_reply = reply
        if not self._share.slow_replies.acquire(self._connection):
            self._conversation.defer(request)
            return None
        complete: bytes | None = b""
        try:
            complete = next(self._slow_reply)
        finally:
            if complete is None:
                self._conversation.defer(request)
                self._connection.schedule(busy=True)
            else:
                self.drop_slow_reply()
        return complete

    def _history(self, request: Request) -> bytes | None:
        """Answer with a page that a thread reads. The request is deferred until the page was read."""
        if self._page is None:
            if self._share.slow_replies.acquire(self._connection):
                self._page = self._parts.history.read(request, is_readonly=self._client.is_readonly)
                self._page.add_done_callback(lambda page: self._connection.schedule())
            self._conversation.defer(request)
            return None
        if not self._page.done():
            self._conversation.defer(request)
            return None
        reply = self._page.result()
        self.drop_slow_reply()
        if isinstance(reply, Refused):
            raise reply
        return reply

    def _watch(self, request: Request) -> bytes:
        arguments = request.arguments
        if ("epoch" in arguments) is not ("since" in arguments):
            field = "since" if "epoch" in arguments else "epoch"
            raise Refused(Code.BAD_ARGUMENT, "epoch and since go together", field=field)
        if len(self.watches) >= self._parts.limits.watches_max:
            raise Refused(Code.BUSY, f"this connection has {len(self.watches)} watches already")
        since = (arguments["epoch"], arguments["since"]) if "epoch" in arguments else None
        number, size = self._watch_count + 1, request.weight_bytes
        self._share.memory.check(size)
        watch = self._share.watches.start(
            self._connection, number, arguments.get("name", "*"), arguments.get("meta", {}), since
        )
        self._share.memory.take(size)
        self._watch_count = number
        self.watches[number] = watch
        watch.pending_bytes = size
        return messages.ok(request.id, {"watch": number, **self._parts.handlers.position()})

    def _unwatch(self, request: Request) -> bytes:
        watch = self.watches.pop(request.arguments["watch"], None)
        if watch is None:
            raise Refused(Code.NOT_FOUND, f"this connection has no watch {request.arguments['watch']}")
        self._share.watches.stop(watch)
        self._share.memory.release(watch.pending_bytes)
        return messages.ok(request.id, {})

    def _wait(self, request: Request) -> bytes | None:
        """Answer a `resolve` with `wait`: at once, or once an instance accepts or the time is over."""
        arguments = request.arguments
        if len(self.waiting) >= self._parts.limits.parked_max:
            raise Refused(Code.BUSY, f"{len(self.waiting)} requests of this connection wait already")
        size = _wait_bytes(request)
        self._share.memory.check(size)
        wait: WaitingResolve | None = None
        at_once: list[bytes] = []

        def done(entry: Entry | None) -> None:
            try:
                reply = self._parts.handlers.waited(request, entry)
            except Refused as refusal:
                reply = self.error(refusal, request.id)
            if wait is None:
                at_once.append(reply)
                return
            del self.waiting[wait]
            self._share.memory.release(size)
            self._conversation.add_waiting_reply(request, reply)
            self._connection.schedule()

        wait = self._share.waiting_resolves.add(
            arguments["name"], arguments.get("instance"), arguments.get("meta", {}), arguments["wait"], done
        )
        if at_once:
            return at_once[0]
        self.waiting[wait] = request
        self._share.memory.take(size)
        self._conversation.add_waiting(request)
        return None


def _wait_bytes(request: Request) -> int:
    return 2 * request.weight_bytes  # a `WaitingResolve` takes about as much memory as its request


def _denied(uid: int | None) -> Refused:
    """Return the error for a write by a read-only user. Its message suggests a registry of the user's own."""
    own = "run a regd of your own, `regd --port off --unix PATH`, and set REGD_ADDRESS=unix://PATH"
    if uid is None:
        return Refused(
            Code.DENIED, f"the system does not tell regd which user you are, so you may only read; {own}"
        )
    return Refused(
        Code.DENIED, f"user {uid} may only read here; {own}; or have this one started with --allow-uid {uid}"
    )
