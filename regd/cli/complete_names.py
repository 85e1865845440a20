"""The names of services for a shell that completes a line: at once, or not at all.

Must not know which shell asks. It runs at every TAB, so it imports next to nothing.
"""

from __future__ import annotations

import time
from signal import ITIMER_REAL, SIG_DFL, SIGALRM, setitimer, signal
from typing import Any

from regd_client.blocking_connection import BlockingConnection
from regd_client.errors import RegdError

_ANSWER_S = 0.2
_END_S = 0.5  # of this process, whatever it hangs in: a name server that is not asked for names of services
_LETTERS = frozenset("abcdefghijklmnopqrstuvwxyz0123456789-_.")


def names(address: str | None, pattern: str | None) -> list[str] | None:
    """Return the names that fit, each once, in order; None where nobody answers, or not in time.

    Some of them would be worse than none: a shell would take what they have in common for all that is possible.
    """
    signal(SIGALRM, SIG_DFL)
    setitimer(ITIMER_REAL, _END_S)
    until = time.monotonic() + _ANSWER_S
    try:
        with BlockingConnection(address, _ANSWER_S, autostart=False) as connection:
            return _all(connection, pattern, until)
    except (RegdError, KeyError, TypeError, AttributeError):  # the others: it answers, and is no regd
        return None
    finally:
        setitimer(ITIMER_REAL, 0.0)


def _all(connection: BlockingConnection, pattern: str | None, until: float) -> list[str] | None:
    found: dict[str, None] = {}
    after = None
    while True:
        reply = connection.ask("list", name=pattern, after=after)
        if not reply["ok"]:
            return []  # no name begins so
        found.update(dict.fromkeys(_name(each) for each in reply["instances"]))
        after = reply.get("next")
        if after is None:
            return [name for name in found if name]
        if time.monotonic() > until:
            return None


def _name(instance: dict[str, Any]) -> str:
    """Return a name that a shell may put into a line as it is: whoever answers may be no regd."""
    name = instance["name"]
    return name if type(name) is str and _LETTERS.issuperset(name) and not name.startswith("-") else ""
