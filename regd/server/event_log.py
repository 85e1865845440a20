"""Log messages about registrations and requests, as text and as fields for JSON.

Every text is safe for a terminal: names and hosts were checked before they were stored, and all else is escaped.
"""

import asyncio
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from regd.core.errors import Code, Refused
from regd.core.model import DEFAULT_HOST, Change, Entry, Op, key_text
from regd.protocol import messages
from regd.protocol.commands import Request
from regd.system.clock import Clock, Timer

log = logging.getLogger("regd")

_THROTTLE_S = 1.0  # at most one conflict and one denial are logged in this time
_CLIENT_TEXT_CHARS_MAX = 500  # of the arguments of a request, and of the reason why a line is not a request

Row = tuple[str, dict[str, Any]]
AddressOf = Callable[[int], str | None]


class Message:
    """The message of one logger call: one or more lines, each with its text and its fields."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self.rows = rows

    def __str__(self) -> str:
        return "\n".join(text for text, _ in self.rows)


def _changes(changes: Sequence[Change], address_of: AddressOf) -> Iterator[Row]:
    for rev, op, entry, reason, *_ in changes:
        if op is Op.UP:
            terms = _holder_terms(entry, address_of)
            holder = ", ".join(f"{term} {value}" for term, value in terms.items()) or "static"
            text = (
                f"up {key_text(entry.key)} at {messages.host_port(entry.host, entry.port)}, rev {rev}, {holder}"
            )
            yield text, _fields(op, entry, rev) | terms
        elif op is Op.DOWN:
            text = (
                f"down {key_text(entry.key)} at {messages.host_port(entry.host, entry.port)}, rev {rev}: {reason}"
            )
            yield text, _fields(op, entry, rev) | {"reason": str(reason)}


def _holder_terms(entry: Entry, address_of: AddressOf) -> dict[str, Any]:
    """Return the process, connection and lease that keep a registration alive."""
    terms: dict[str, Any] = {}
    for holder in entry.holders[-1:]:
        if holder.process is not None:
            terms["pid"] = holder.process.pid
        if holder.hold and holder.session is not None:
            terms["connection"] = address_of(holder.session) or "closed"
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

    `address_of` returns the address of a session's connection, None if it has closed.
    """

    def __init__(self, clock: Clock, address_of: AddressOf) -> None:
        self._address_of = address_of
        self.logs_requests = log.isEnabledFor(logging.DEBUG)
        self._logs_events = log.isEnabledFor(logging.INFO)
        self._rows: list[Row] = []  # collected for the next call of the logger
        self._refusals = {code: _Throttle(clock) for code in (Code.CONFLICT, Code.DENIED)}

    def changes(self, changes: Sequence[Change]) -> None:
        """Log the instances that came and went. Since calling the logger is expensive, a batch is one call.

        The call is made two loop iterations later, so that usually the replies are sent before.
        """
        if self._logs_events and (rows := list(_changes(changes, self._address_of))):
            if not self._rows:
                loop = asyncio.get_running_loop()
                loop.call_soon(loop.call_soon, self._log_changes)
            self._rows += rows

    def _log_changes(self) -> None:
        rows, self._rows = self._rows, []
        if rows:
            log.info(Message(rows))

    def refused(self, address: str, uid: int | None, request: Request, refusal: Refused) -> None:
        """Log a refusal that is a conflict or a denial."""
        throttle = self._refusals.get(refusal.code)
        if throttle is not None and self._logs_events:
            throttle.log(lambda left_out: _refusal(address, uid, request, refusal, left_out))

    def request(self, address: str, uid: int | None, request: Request) -> None:
        """Log a request. Call it only if `logs_requests` is true."""
        arguments = _shortened(json.dumps(request.arguments, separators=(",", ":"), default=str))
        fields = {"event": "request", "peer": address, "uid": uid, "cmd": request.cmd, "arguments": arguments}
        log.debug(Message([(f"request {address} ({_user(uid)}): {request.cmd} {arguments}", fields)]))

    def bad_line(self, address: str, uid: int | None, refusal: Refused) -> None:
        """Log a line that is not a valid request. Call it only if `logs_requests` is true."""
        reason = _shortened(refusal.message)
        fields = {"event": "bad_line", "peer": address, "uid": uid, "error": str(refusal.code), "reason": reason}
        log.debug(Message([(f"{refusal.code} {address} ({_user(uid)}): {reason}", fields)]))

    def close(self) -> None:
        """Log all messages that were delayed. Idempotent."""
        self._log_changes()
        for throttle in self._refusals.values():
            throttle.close()


def _refusal(address: str, uid: int | None, request: Request, refusal: Refused, left_out: int) -> Message:
    arguments = request.arguments
    name, instance, port = arguments["name"], arguments.get("instance", ""), arguments.get("port")
    endpoint = "" if port is None else f" at {messages.host_port(arguments.get('host', DEFAULT_HOST), port)}"
    reason = refusal.message.partition("; ")[0]
    more = f" ({left_out} more left out)" if left_out else ""
    fields = {
        "event": str(refusal.code),
        "peer": address,
        "uid": uid,
        "cmd": request.cmd,
        "name": name,
        "instance": instance,
        "reason": reason,
        "left_out": left_out,
    }
    key = key_text((name, instance))
    text = f"{refusal.code} {address} ({_user(uid)}): {request.cmd} {key}{endpoint}: {reason}{more}"
    return Message([(text, fields)])


def _shortened(text: str) -> str:
    """Return a client's text in printable ASCII and of limited length."""
    if len(text) > _CLIENT_TEXT_CHARS_MAX:
        text = f"{text[:_CLIENT_TEXT_CHARS_MAX]}..."
    return text.encode("ascii", "backslashreplace").decode().replace("\x7f", "\\x7f")


def _user(uid: int | None) -> str:
    return "unknown user" if uid is None else f"user {uid}"


class _Throttle:
    """Logs at most one message a second: the first at once, then the latest, with the number left out."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._quiet_until = float("-inf")
        self._latest: Callable[[int], Message] | None = None  # makes the delayed message
        self._left_out = 0  # messages since the last one that was logged, except the latest
        self._timer: Timer | None = None

    def log(self, make: Callable[[int], Message]) -> None:
        """Log the message that `make` returns, now or within a second. Its argument is the number left out."""
        if self._timer is None and self._clock.now() >= self._quiet_until:
            self._log_now(make)
            return
        if self._latest is not None:
            self._left_out += 1
        self._latest = make
        if self._timer is None:
            self._timer = self._clock.call_at(self._quiet_until, self._log_latest)

    def _log_latest(self) -> None:
        self._timer = None
        if self._latest is not None:
            make, self._latest = self._latest, None
            self._log_now(make)

    def _log_now(self, make: Callable[[int], Message]) -> None:
        left_out, self._left_out = self._left_out, 0
        self._quiet_until = self._clock.now() + _THROTTLE_S
        log.info(make(left_out))

    def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._log_latest()
