"""`regctl watch`: every change, over restarts of the daemon, until it is interrupted or nobody reads any more.

Must not know how a line is read from the command line.
"""

from __future__ import annotations

import select
from collections.abc import Mapping
from typing import Any

from regd.cli.output import Output, complain, event_line, say, say_json, visible
from regd_client.blocking_connection import BlockingConnection
from regd_client.errors import Unavailable
from regd_client.models import Event
from regd_client.watches import WatchState

_PASSING = ("shutting_down", "busy")  # refusals after which to connect again
_PAUSE_S = 0.2  # between tries to connect
_KINDS = ("up", "change", "down", "sync", "progress", "reset")


class _Connected:
    """The source of events, as far as a picture wants to know it."""

    usable = True
    ended_at = None


class _Watch:
    """One watch over several connections. After a break it shows only what is different."""

    def __init__(self, pattern: str | None, meta: Mapping[str, str] | None, as_json: bool) -> None:
        self.synced = False  # the first picture is complete
        self._away = False
        self._as_json = as_json
        self._raw: dict[str, Any] = {}  # the event that is being taken
        self._follow = WatchState(pattern or "*", meta, self._changed)

    def follow(self, connection: BlockingConnection) -> dict[str, Any] | None:
        """Show the events of one connection. Returns a refusal by the daemon, or None when stdout is broken.

        Raises:
            Unavailable: the connection broke.
        """
        self._follow.pause()
        reply = connection.ask("watch", **self._follow.begin(_Connected()))
        if not reply["ok"]:
            return reply
        if self._away:
            complain("regctl: the registry is back")
            self._away = False
        self._follow.take(reply)
        for event in connection.events():
            if "event" not in event:
                return event
            self._take(event)
            if Output.failure is not None:
                return None
        return None

    def lose(self, why: str) -> None:
        """Say once that the daemon is away."""
        if not self._away:
            complain(f"regctl: the registry is away, still trying: {visible(why)}")
            self._away = True

    def _take(self, event: dict[str, Any]) -> None:
        kind = event["event"]
        if kind not in _KINDS:
            return
        self._raw = event
        self._follow.take(event)
        self.synced |= kind == "sync"
        if self._as_json and kind in ("sync", "progress"):
            say_json(event)

    def _changed(self, event: Event) -> None:
        found = event.endpoint
        if found is None:
            return
        key = (found.name, found.instance)
        if event.kind == "down":
            fields = {**self._raw, "name": key[0], "instance": key[1], "reason": event.reason}
        else:
            fields = self._follow.picture[key]
        fields = {**fields, "event": event.kind}
        if self._as_json:
            say_json(fields)
        else:
            say(event_line(fields), flush=True)


def _nobody_reads(within_s: float) -> bool:
    """Return whether the reader of stdout has closed the pipe; waits so long for that, and only for that."""
    poll = select.poll()
    poll.register(1, 0)
    return bool(poll.poll(1_000 * within_s))


def watch(
    address: str | None, pattern: str | None, meta: Mapping[str, str] | None, as_json: bool
) -> dict[str, Any] | None:
    """Watch until the daemon refuses, and return its refusal; None when nobody reads stdout any more.

    Raises:
        Unavailable: there is no daemon at the beginning, or its address is another program's now.
    """
    watching = _Watch(pattern, meta, as_json)
    while True:
        try:
            with BlockingConnection(address, autostart=not watching.synced) as connection:
                refusal = watching.follow(connection)
            if refusal is None or not watching.synced or refusal["error"] not in _PASSING:
                return refusal
            watching.lose(str(refusal["message"]))
        except Unavailable as error:
            if not watching.synced or error.code == "not_regd":
                raise
            watching.lose(str(error))
        if _nobody_reads(_PAUSE_S):
            return None
