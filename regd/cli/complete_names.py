"""`regctl names`: the names of services for a shell that completes a line, at once or not at all."""

from __future__ import annotations

import time
from signal import ITIMER_REAL, SIG_DFL, SIGALRM, setitimer, signal
from typing import Any

from regd_client.blocking_connection import BlockingConnection
from regd_client.errors import RegdError

_ANSWER_S = 0.2
_END_S = 0.5  # of this process, even if it hangs in a name server
_LETTERS = frozenset("abcdefghijklmnopqrstuvwxyz0123456789-_.")


def names(address: str | None, pattern: str | None) -> list[str] | None:
    """Return the matching names, sorted and without duplicates; None if no daemon answers in time.

    Never returns a part of them: a shell would complete their common prefix as if there were no others.
    """
    signal(SIGALRM, SIG_DFL)
    setitimer(ITIMER_REAL, _END_S)
    until = time.monotonic() + _ANSWER_S
    try:
        with BlockingConnection(address, _ANSWER_S, autostart=False) as connection:
            return _all(connection, pattern, until)
    except (RegdError, KeyError, TypeError, AttributeError):  # the last three: a reply that is not regd's
        return None
    finally:
        setitimer(ITIMER_REAL, 0.0)


def _all(connection: BlockingConnection, pattern: str | None, until: float) -> list[str] | None:
    found: dict[str, None] = {}
    after = None
    while True:
        reply = connection.ask("list", name=pattern, after=after)
        if not reply["ok"]:
            return []  # an invalid pattern: no name begins so
        found.update(dict.fromkeys(_name(entry) for entry in reply["instances"]))
        after = reply.get("next")
        if after is None:
            return [name for name in found if name]
        if time.monotonic() > until:
            return None


def _name(entry: dict[str, Any]) -> str:
    """Return the name of an instance, or "" if a shell could misread it: the peer may be an impostor."""
    name = entry["name"]
    return name if type(name) is str and _LETTERS.issuperset(name) and not name.startswith("-") else ""
