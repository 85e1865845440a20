"""Queries that take more than one request: all pages of a reply, and waiting for a service."""

from __future__ import annotations

import itertools
import time
from typing import Any

from regd_client import protocol
from regd_client.blocking_connection import BlockingConnection
from regd_client.errors import Unavailable

TRANSIENT = ("shutting_down", "busy")  # errors after which to try again
_PAUSE_S = 0.1  # between two tries


def ask(connection: BlockingConnection, command: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """Send a request and return its reply, with the instances of all pages.

    Raises:
        Unavailable: the pages have no end.
    """
    reply = connection.ask(command, **arguments)
    if reply.pop("more", False):
        listed = ask(connection, "list", {"name": arguments["name"], "meta": arguments.get("meta")})
        if not listed["ok"]:
            return listed
        reply["instances"] = [entry for entry in listed["instances"] if entry["state"] == "ready"]
    if "next" not in reply:
        return reply
    page = reply
    instances: list[dict[str, Any]] = []
    for number in itertools.count(1):
        protocol.add_page(instances, page, number)
        if "next" not in page:
            break
        page = connection.ask(command, **{**arguments, "after": page["next"]})
        if not page["ok"]:
            return page
    return {**page, "instances": instances}


def wait_for(address: str | None, name: str, until: float) -> dict[str, Any]:
    """Wait until a service accepts connections, and return the reply to `resolve`. Waits for the daemon too.

    `until` is a time of time.monotonic.

    Raises:
        Unavailable: no daemon answers by then, or it cannot be started on demand.
    """
    at = protocol.find_address(address)
    while True:
        left_s = max(0.0, until - time.monotonic())
        try:
            with BlockingConnection(at) as connection:
                reply = connection.ask("resolve", name=name, wait=left_s)
            if reply.get("error") not in TRANSIENT or time.monotonic() >= until:
                return reply
        except Unavailable as error:
            if error.code == "not_started" or time.monotonic() >= until:
                raise
        time.sleep(min(_PAUSE_S, left_s))
