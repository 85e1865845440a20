"""`regctl watch`: print every change, also after a restart of the daemon, until Ctrl-C or stdout is closed."""

from __future__ import annotations

import select
from collections.abc import Mapping
from typing import Any

from regd.cli.output import Output, complain, event_line, say, say_json, visible
from regd.cli.queries import TRANSIENT
from regd_client import protocol
from regd_client.blocking_connection import BlockingConnection
from regd_client.errors import Unavailable
from regd_client.models import Event
from regd_client.watches import WatchState

PAUSE_S = 0.2  # between two attempts to connect
_KINDS = ("up", "change", "down", "sync", "progress", "reset")


class _Printer:
    """Prints the events of one watch over several connections; after a reconnect, only the differences."""

    def __init__(self, pattern: str | None, meta: Mapping[str, str] | None, as_json: bool) -> None:
        self.synced = False  # all registrations that existed at the start have been printed
        self._away = False
        self._as_json = as_json
        self._event: dict[str, Any] = {}  # the event that is being handled
        self._state = WatchState(pattern or "*", meta, self._print)

    def print_events(self, connection: BlockingConnection) -> dict[str, Any] | None:
        """Print events until the connection ends. Return the daemon's error reply; None if nobody reads stdout.

        Raises:
            Unavailable: the connection broke.
        """
        self._state.pause()
        reply = connection.ask("watch", **self._state.begin(None))
        if not reply["ok"]:
            return reply
        if self._away:
            complain("regctl: the registry is back")
            self._away = False
        self._state.take(reply)
        for event in connection.events():
            if "event" not in event:
                return event
            self._handle(event)
            if Output.failure is not None or is_reader_gone(0):  # noticed at the next `progress` at the latest
                return None
        return None

    def report_away(self, reason: str) -> None:
        """Report once that the daemon is away."""
        if not self._away:
            complain(f"regctl: the registry is away, still trying: {visible(reason)}")
            self._away = True

    def _handle(self, event: dict[str, Any]) -> None:
        kind = event["event"]
        if kind not in _KINDS:
            return
        self._event = event
        self._state.take(event)
        self.synced |= kind == "sync"
        if self._as_json and kind in ("sync", "progress"):
            say_json(event)

    def _print(self, event: Event) -> None:
        if event.endpoint is None:
            return
        key = (event.endpoint.name, event.endpoint.instance)
        if event.kind == "down":
            fields = {**self._event, "name": key[0], "instance": key[1], "reason": event.reason}
        else:
            fields = self._state.instances[key]
        fields = {**fields, "event": event.kind}
        if self._as_json:
            say_json(fields)
        else:
            say(event_line(fields), flush=True)


def is_reader_gone(within_s: float) -> bool:
    """Wait for the reader of stdout to close the pipe. Return whether it was closed in time."""
    poll = select.poll()
    poll.register(1, 0)
    return bool(poll.poll(1_000 * within_s))


def watch(
    address: str | None, pattern: str | None, meta: Mapping[str, str] | None, as_json: bool
) -> dict[str, Any] | None:
    """Watch until the daemon refuses the request or stdout is closed. Return the daemon's error reply, or None.

    Raises:
        Unavailable: no daemon answers at the start, or another program listens at its address.
    """
    printer = _Printer(pattern, meta, as_json)
    daemon = protocol.find_address(address)  # once, so that every connection is to the same registry
    while True:
        try:
            with BlockingConnection(daemon, autostart=not printer.synced) as connection:
                refusal = printer.print_events(connection)
            if refusal is None or not printer.synced or refusal["error"] not in TRANSIENT:
                return refusal
            printer.report_away(str(refusal["message"]))
        except Unavailable as error:
            if not printer.synced or error.code == "not_regd":
                raise
            printer.report_away(str(error))
        if is_reader_gone(PAUSE_S):
            return None
