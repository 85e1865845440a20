"""`regctl history`: past changes as a table, and with --follow also new changes."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from typing import Any

from regd.cli.output import (
    EMPTY,
    Output,
    address_of,
    complain,
    instance_name,
    priority_of,
    say,
    say_json,
    table,
    visible,
)
from regd.cli.queries import TRANSIENT
from regd.cli.watch import PAUSE_S, is_reader_gone
from regd_client import protocol
from regd_client.blocking_connection import BlockingConnection
from regd_client.errors import Unavailable

_LATEST = 100  # changes that are shown without --since
_HEADER = ("TIME", "CHANGE", "SERVICE", "ADDRESS", "WHY", "BY")


def show(
    address: str | None, of: Mapping[str, Any], point: Mapping[str, float], *, follow: bool, as_json: bool
) -> dict[str, Any] | None:
    """Print the changes after a point, or the latest changes. Return the daemon's error reply, or None.

    Raises:
        Unavailable: no daemon answers.
    """
    daemon = protocol.find_address(address)  # once, so that every connection is to the same registry
    with BlockingConnection(daemon) as connection:
        rev = connection.ask("hello")["rev"] if follow else 0
        changes: list[dict[str, Any]] = []
        for page in _pages(connection, of, point) if point else [_latest(connection, of)]:
            if not page["ok"]:
                return page
            changes += page["changes"]
    if as_json and not follow:
        say_json({"ok": True, "changes": changes})
        return None
    _print(changes, as_json)
    if not follow:
        return None
    return _follow(daemon, _Follower(of, max(rev, changes[-1]["rev"] if changes else 0), as_json))


def _latest(connection: BlockingConnection, of: Mapping[str, Any]) -> dict[str, Any]:
    """Return a page with the latest changes. The daemon's page may have few changes of one service, or none."""
    page = connection.ask("history", **of, limit=_LATEST)
    changes: list[dict[str, Any]] = []
    while page["ok"]:
        changes = page["changes"] + changes
        before = page.get("next", 0)
        if not before or len(changes) >= _LATEST:
            return {"ok": True, "changes": changes}
        page = connection.ask("history", **of, limit=_LATEST - len(changes), before=before)
        if page.get("next", 0) >= before:
            raise ValueError(f"next is {page['next']} before {before}")
    return page


def _pages(
    connection: BlockingConnection, of: Mapping[str, Any], point: Mapping[str, float]
) -> Iterator[dict[str, Any]]:
    """Yield the pages of changes after a point."""
    page = connection.ask("history", **of, **point)
    yield page
    last = -1
    while page["ok"] and "next" in page:
        if page["next"] <= last:
            raise ValueError(f"next is {page['next']} after {last}")
        last = page["next"]
        page = connection.ask("history", **of, since=last)
        yield page


class _Follower:
    """Prints the changes after a revision as they are made."""

    def __init__(self, of: Mapping[str, Any], rev: int, as_json: bool) -> None:
        self._of = of
        self._rev = rev
        self._as_json = as_json
        self._is_away = False

    def follow(self, address: protocol.Address) -> dict[str, Any] | None:
        """Print changes until the connection ends. Return the daemon's error reply; None if nobody reads stdout.

        Raises:
            Unavailable: the connection broke.
        """
        with (
            BlockingConnection(address, autostart=False) as watching,
            BlockingConnection(address, autostart=False) as asking,
        ):
            reply = watching.ask("watch", name=self._of["name"])
            if not reply["ok"]:
                return reply
            if self._is_away:
                complain("regctl: the registry is back")
                self._is_away = False
            for event in watching.events():
                if "event" not in event:
                    return event
                is_new = event["event"] in ("sync", "progress") or event["rev"] > self._rev
                refusal = self._print_new(asking) if is_new else None
                if refusal is not None or Output.failure is not None or is_reader_gone(0):
                    return refusal
        return None

    def _print_new(self, connection: BlockingConnection) -> dict[str, Any] | None:
        for page in _pages(connection, self._of, {"since": self._rev}):
            if not page["ok"]:
                return page
            _print(page["changes"], self._as_json, header=None)
            self._rev = max([self._rev, page.get("next", 0), *(change["rev"] for change in page["changes"])])
        return None

    def report_away(self, reason: str) -> None:
        if not self._is_away:
            complain(f"regctl: the registry is away, still trying: {visible(reason)}")
            self._is_away = True


def _follow(address: protocol.Address, follower: _Follower) -> dict[str, Any] | None:
    """Follow over restarts of the daemon. Return the daemon's error reply, or None if nobody reads stdout."""
    while True:
        try:
            refusal = follower.follow(address)
            if refusal is None or refusal["error"] not in TRANSIENT:
                return refusal
            follower.report_away(str(refusal["message"]))
        except Unavailable as error:
            if error.code == "not_regd":
                raise
            follower.report_away(str(error))
        if is_reader_gone(PAUSE_S):
            return None


def _print(changes: list[dict[str, Any]], as_json: bool, header: tuple[str, ...] | None = _HEADER) -> None:
    if as_json:
        for change in changes:
            say_json(change)
    else:
        for line in table(header, [_row(change) for change in changes], "nothing has changed"):
            say(line, flush=True)


def _row(change: Mapping[str, Any]) -> tuple[str, ...]:
    when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(change["at"]))
    name = instance_name(change["name"], change["instance"])
    columns = (when, change["op"], name, address_of(change), _why(change), _who(change.get("by", {})))
    return tuple(visible(column) or EMPTY for column in columns)


def _why(change: Mapping[str, Any]) -> str:
    """Return the reason of a `down`; for another event, the new state and priority of the instance.

    The state `ready` of an `up` is left out, and so is the priority 0, since they are usual.
    """
    if change["op"] == "down":
        return str(change.get("reason", ""))
    parts = [change["state"]] if change["op"] == "change" or change["state"] != "ready" else []
    if priority_of(change):
        parts.append(f"priority {priority_of(change)}")
    return ", ".join(parts)


def _who(by: Mapping[str, Any]) -> str:
    """Return who made a change: the program, its process and its user, as far as they are known."""
    parts = [f"{word} {by[field]}" for word, field in (("process", "pid"), ("user", "uid")) if field in by]
    if "command" in by:
        parts.insert(0, by["command"])
    return ", ".join(parts)
