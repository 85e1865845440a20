"""`regctl names`: the names of services for shell completion, within 0.2 s or not at all."""

from __future__ import annotations

import time
from signal import ITIMER_REAL, SIG_DFL, SIGALRM, setitimer, signal
from typing import Any

from regd_client.blocking_connection import BlockingConnection
from regd_client.errors import RegdError

_ANSWER_S = 0.2
_END_S = 0.5  # after which SIGALRM ends the process, for example if a name server does not answer
_LETTERS = frozenset("abcdefghijklmnopqrstuvwxyz0123456789-_.")


def names(address: str | None, pattern: str | None) -> list[str] | None:
    """Return the matching names, sorted and without duplicates; None if no daemon answers in time.

    The list is complete or None, because from an incomplete list a shell could complete a prefix that not all
    names share.
    """
    signal(SIGALRM, SIG_DFL)
    setitimer(ITIMER_REAL, _END_S)
    until = time.monotonic() + _ANSWER_S
    try:
        with BlockingConnection(address, _ANSWER_S, autostart=False) as connection:
            return _all(connection, pattern, until)
    # A reply of another program than regd can raise KeyError, TypeError or AttributeError.
    except (RegdError, KeyError, TypeError, AttributeError):
        return None
    finally:
        setitimer(ITIMER_REAL, 0.0)


def _all(connection: BlockingConnection, pattern: str | None, until: float) -> list[str] | None:
    names: dict[str, None] = {}
    after = None
    while True:
        reply = connection.ask("list", name=pattern, after=after)
        if not reply["ok"]:
            return []  # the pattern is invalid, so no name matches
        names.update(dict.fromkeys(_name(entry) for entry in reply["instances"]))
        after = reply.get("next")
        if after is None:
            return [name for name in names if name]
        if time.monotonic() > until:
            return None


def _name(entry: dict[str, Any]) -> str:
    """Return the name of an instance, or "" if it is unsafe in a shell, since the reply may not be from regd."""
    name = entry["name"]
    return name if type(name) is str and _LETTERS.issuperset(name) and not name.startswith("-") else ""
