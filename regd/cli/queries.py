"""Questions of more than one line: for all pages of a reply, and for a service that is waited for.

Must not know how the answer is shown.
"""

from __future__ import annotations

import itertools
import time

from regd_client import wire
from regd_client.blocking import BlockingConnection
from regd_client.errors import Unavailable

TYPE_CHECKING = False  # as in typing, whose import takes longer than many a command
if TYPE_CHECKING:
    from typing import Any

_PASSING = ("shutting_down", "busy")  # refusals after which it is worth to try again
_NOT_STARTED = "not_started"  # on demand, and it will not be any other in a moment
_PAUSE_S = 0.1  # between tries to connect


def ask(connection: BlockingConnection, command: str, given: dict[str, Any]) -> dict[str, Any]:
    """Ask, and where the reply is one page of several, for the rest too.

    Raises:
        Unavailable: there is no end of pages.
    """
    reply = connection.ask(command, **given)
    if reply.pop("more", False):
        listed = ask(connection, "list", {"name": given["name"], "meta": given.get("meta")})
        if not listed["ok"]:
            return listed
        reply["instances"] = [each for each in listed["instances"] if each["state"] == "ready"]
    if "next" not in reply:
        return reply
    page = reply
    instances: list[dict[str, Any]] = []
    for number in itertools.count(1):
        wire.add_page(instances, page, number)
        if "next" not in page:
            break
        page = connection.ask(command, **{**given, "after": page["next"]})
        if not page["ok"]:
            return page
    return {**page, "instances": instances}


def wait_for(address: str | None, name: str, until: float) -> dict[str, Any]:
    """Return the reply about an instance that accepts connections; a daemon that is not there yet is waited for.

    `until` is by time.monotonic.

    Raises:
        Unavailable: there is none by then.
    """
    while True:
        left_s = max(0.0, until - time.monotonic())
        try:
            with BlockingConnection(address) as connection:
                reply = connection.ask("resolve", name=name, wait=left_s)
            if reply.get("error") not in _PASSING or time.monotonic() >= until:
                return reply
        except Unavailable as error:
            if error.code == _NOT_STARTED or time.monotonic() >= until:
                raise
        time.sleep(min(_PAUSE_S, left_s))
