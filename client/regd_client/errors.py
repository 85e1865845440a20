"""What can go wrong, as exceptions that are also the built-in ones they resemble.

RegdError
├── NotFound     also a LookupError
├── Conflict
├── Denied       also a PermissionError: this user may not write there
├── BadArgument  also a ValueError
├── Timeout      also a TimeoutError
└── Unavailable  also a ConnectionError: no daemon answers, or it went away

Every other code of the daemon (`busy`, `storage_failed`, …) is a plain RegdError that carries it.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


class RegdError(Exception):
    """An error of the registry.

    `code` is the protocol's word for it, "" where the daemon did not say one. `details` are the further fields
    of the daemon's reply, such as `near` and `last` of `not_found`.
    """

    def __init__(self, message: str, code: str = "", details: dict[str, Any] | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.details = details or {}


class NotFound(RegdError, LookupError):
    """No ready instance has that name, or there is nothing to deregister."""


class Conflict(RegdError):
    """The registration is not as the caller thought, or another owner lives."""


class Denied(RegdError, PermissionError):
    """This user may not do that; the daemon serves another one."""


class BadArgument(RegdError, ValueError):
    """The daemon does not take an argument; `details["field"]` says which."""


class Timeout(RegdError, TimeoutError):
    """It took longer than the caller wanted to wait."""


class Unavailable(RegdError, ConnectionError):
    """No daemon answers at the address, or the connection broke before the answer came."""


_CLASSES: dict[str, type[RegdError]] = {
    "not_found": NotFound,
    "conflict": Conflict,
    "denied": Denied,
    "bad_argument": BadArgument,
    "timeout": Timeout,
    "shutting_down": Unavailable,
}


def from_reply(reply: dict[str, Any]) -> RegdError:
    """Return the exception for a reply that says `"ok": false`."""
    code = str(reply.get("error", ""))
    details = {key: value for key, value in reply.items() if key not in ("ok", "id", "error", "message")}
    return _CLASSES.get(code, RegdError)(_printable(str(reply.get("message", code))), code, details)


def _printable(text: str) -> str:
    """Escape what a peer could move a terminal's cursor with, or begin another line of a log."""
    if text.isprintable():
        return text
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in text)
