"""Queries that need more than one request: all pages of a reply, and waiting for a service."""

from __future__ import annotations

import itertools
import time
from typing import Any

from regd.cli.output import priority_of
from regd_client import protocol
from regd_client.blocking_connection import BlockingConnection
from regd_client.errors import Unavailable

TRANSIENT = ("shutting_down", "busy")  # errors after which a command tries again
_PAUSE_S = 0.1  # between two attempts
_HTTP_PAUSE_S = 0.2  # between two attempts by HTTP
_TRY_S_MIN = 0.5  # an attempt by HTTP has at least this time, even after `until`


def ask(connection: BlockingConnection, command: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """Send a request and return its reply, with the instances of all pages.

    Raises:
        Unavailable: the pages have no end.
    """
    reply = connection.ask(command, **arguments)
    if reply.pop("more", False):
        everything = ask(connection, "list", {"name": arguments["name"], "meta": arguments.get("meta")})
        if not everything["ok"]:
            return everything
        ready = [entry for entry in everything["instances"] if entry["state"] == "ready"]
        reply["instances"] = sorted(ready, key=priority_of)  # replies are in order of instance
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
    """Wait for a daemon, and until a service accepts connections. Return the reply to `resolve`.

    `until` is a value of `time.monotonic`.

    Raises:
        Unavailable: no daemon answers in time, or none can be started on demand.
    """
    daemon = protocol.find_address(address)
    while True:
        left_s = max(0.0, until - time.monotonic())
        try:
            with BlockingConnection(daemon) as connection:
                reply = connection.ask("resolve", name=name, wait=left_s)
            if reply.get("error") not in TRANSIENT or time.monotonic() >= until:
                return reply
        except Unavailable as error:
            if error.code == "not_started" or time.monotonic() >= until:
                raise
        time.sleep(min(_PAUSE_S, left_s))


def wait_for_http(address: str | None, name: str, path: str, until: float) -> dict[str, Any]:
    """Wait until a service answers a GET request with 2xx, and return the reply to `resolve`.

    Each attempt asks the registry again, because the service may have moved. `until` is a value of
    `time.monotonic`.

    Raises:
        Unavailable: no daemon answers in time, or none can be started on demand.
    """
    wait_s = until - time.monotonic()
    import asyncio

    from regd.cli.http_probe import TRY_S, why_not_ready

    while True:
        reply = wait_for(address, name, until)
        if not reply["ok"]:
            return reply
        try_s = min(TRY_S, max(until - time.monotonic(), _TRY_S_MIN))
        why = asyncio.run(why_not_ready(reply["host"], reply["port"], path, try_s))
        if not why:
            return reply
        if time.monotonic() >= until:
            url = f"http://{protocol.host_port(reply['host'], reply['port'])}{path}"
            message = f"waited {max(0.0, round(wait_s, 1)):g} s: {url}: {why}"
            return {"ok": False, "error": "timeout", "message": message}
        time.sleep(min(_HTTP_PAUSE_S, max(until - time.monotonic(), 0.0)))
