"""Log messages about registrations and requests, as text and as fields for JSON.

Every text is safe for a terminal: names and hosts are checked before they are stored, everything else is escaped.
"""

import asyncio
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from regd.core.errors import Code, Refused
from regd.core.model import Change, Entry, Op, key_text
from regd.protocol import messages
from regd.protocol.commands import Request
from regd.system.clock import Clock, Timer

log = logging.getLogger("regd")

_EVERY_S = 1.0  # at most one conflict and one denial in this time
_ARGUMENTS_CHARS_MAX = 500  # of a request

Row = tuple[str, dict[str, Any]]
PeerOf = Callable[[int], str | None]


class Message:
    """The message of one call of the logger: one or more lines, each a text with its fields."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self.rows = rows

    def __str__(self) -> str:
        return "\n".join(text for text, _ in self.rows)


def _changes(changes: Sequence[Change], peer_of: PeerOf) -> Iterator[Row]:
    for rev, op, entry, reason, *_ in changes:
        if op is Op.UP:
            terms = _terms(entry, peer_of)
            holder = ", ".join(f"{what} {value}" for what, value in terms.items()) or "static"
            text = (
                f"up {key_text(entry.key)} at {messages.host_port(entry.host, entry.port)}, rev {rev}, {holder}"
            )
            yield text, _fields(op, entry, rev) | terms
        elif op is Op.DOWN:
            text = (
                f"down {key_text(entry.key)} at {messages.host_port(entry.host, entry.port)}, rev {rev}: {reason}"
            )
            yield text, _fields(op, entry, rev) | {"reason": str(reason)}


def _terms(entry: Entry, peer_of: PeerOf) -> dict[str, Any]:
    """Return what keeps a registration alive: its process, connection and lease."""
    terms: dict[str, Any] = {}
    for holder in entry.holders[-1:]:
        if holder.process is not None:
            terms["pid"] = holder.process.pid
        if holder.hold and holder.session is not None:
            terms["connection"] = peer_of(holder.session) or "closed"
        if holder.ttl_s is not None:
            terms["ttl"] = messages.seconds(holder.ttl_s)
    return terms


def _fields(op: Op, entry: Entry, rev: int) -> dict[str, Any]:
    return {
        "event": str(op),
        "name": entry.name,
        "instance": entry.instance,
        "host": entry.host,
        "port": entry.port,
        "rev": rev,
    }


class EventLog:
    """Logs changes, conflicts and denials at `info`, requests at `debug`.

    `peer_of` describes a session's connection, None when it has ended.
    """

    def __init__(self, clock: Clock, peer_of: PeerOf) -> None:
        self._peer_of = peer_of
        self.logs_requests = log.isEnabledFor(logging.DEBUG)
        self._logs_events = log.isEnabledFor(logging.INFO)
        self._rows: list[Row] = []  # to be logged soon
        self._refusals = {code: _Throttle(clock) for code in (Code.CONFLICT, Code.DENIED)}

    def changes(self, changes: Sequence[Change]) -> None:
        """Log which instances came and went, one call of the logger for a batch, since a call is expensive.

        It comes after the replies, which the event loop sends in its next iteration.
        """
        if self._logs_events and (rows := list(_changes(changes, self._peer_of))):
            if not self._rows:
                loop = asyncio.get_running_loop()
                loop.call_soon(loop.call_soon, self._log_changes)
            self._rows += rows

    def _log_changes(self) -> None:
        rows, self._rows = self._rows, []
        if rows:
            log.info(Message(rows))

    def refused(self, peer: str, uid: int | None, request: Request, refusal: Refused) -> None:
        """Log a refusal that is a conflict or a denial."""
        throttle = self._refusals.get(refusal.code)
        if throttle is not None and self._logs_events:
            throttle.tell(lambda left_out: _refusal(peer, uid, request, refusal, left_out))

    def request(self, peer: str, uid: int | None, request: Request) -> None:
        """Log a request. Call it only if `logs_requests`."""
        arguments = _shortened(json.dumps(request.arguments, separators=(",", ":"), default=str))
        fields = {"event": "request", "peer": peer, "uid": uid, "cmd": request.cmd, "arguments": arguments}
        log.debug(Message([(f"request {peer} ({_user(uid)}): {request.cmd} {arguments}", fields)]))

    def bad_line(self, peer: str, uid: int | None, refusal: Refused) -> None:
        """Log a line that is no request. Call it only if `logs_requests`."""
        why = _shortened(refusal.message)
        fields = {"event": "bad_line", "peer": peer, "uid": uid, "error": str(refusal.code), "reason": why}
        log.debug(Message([(f"{refusal.code} {peer} ({_user(uid)}): {why}", fields)]))

    def close(self) -> None:
        """Log what was held back. Idempotent."""
        self._log_changes()
        for throttle in self._refusals.values():
            throttle.close()


def _refusal(peer: str, uid: int | None, request: Request, refusal: Refused, left_out: int) -> Message:
    given = request.arguments
    key = key_text((given["name"], given.get("instance", "")))
    address = (
        f" at {messages.host_port(given.get('host', '127.0.0.1'), given['port'])}" if "port" in given else ""
    )
    why = refusal.message.partition("; ")[0]
    more = f" ({left_out} more left out)" if left_out else ""
    fields = {
        "event": str(refusal.code),
        "peer": peer,
        "uid": uid,
        "cmd": request.cmd,
        "name": given["name"],
        "instance": given.get("instance", ""),
        "reason": why,
        "left_out": left_out,
    }
    text = f"{refusal.code} {peer} ({_user(uid)}): {request.cmd} {key}{address}: {why}{more}"
    return Message([(text, fields)])


def _shortened(text: str) -> str:
    """Return a peer's text in printable ASCII, of bounded length."""
    if len(text) > _ARGUMENTS_CHARS_MAX:
        text = f"{text[:_ARGUMENTS_CHARS_MAX]}..."
    return text.encode("ascii", "backslashreplace").decode().replace("\x7f", "\\x7f")


def _user(uid: int | None) -> str:
    return "unknown user" if uid is None else f"user {uid}"


class _Throttle:
    """Logs at most one message a second: the first at once, then the latest with the number of those left out."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._quiet_until = float("-inf")
        self._latest: Callable[[int], Message] | None = None  # held back
        self._left_out = 0  # before that
        self._timer: Timer | None = None

    def tell(self, make: Callable[[int], Message]) -> None:
        """Log what `make` returns, now or within a second. It is given the number of messages left out."""
        if self._timer is None and self._clock.now() >= self._quiet_until:
            self._log(make)
            return
        if self._latest is not None:
            self._left_out += 1
        self._latest = make
        if self._timer is None:
            self._timer = self._clock.call_at(self._quiet_until, self._tell_latest)

    def _tell_latest(self) -> None:
        self._timer = None
        if self._latest is not None:
            make, self._latest = self._latest, None
            self._log(make)

    def _log(self, make: Callable[[int], Message]) -> None:
        left_out, self._left_out = self._left_out, 0
        self._quiet_until = self._clock.now() + _EVERY_S
        log.info(make(left_out))

    def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._tell_latest()
