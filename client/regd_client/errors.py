"""The exceptions of the client. Most of them also derive from a built-in exception.

RegdError
├── NotFound     also a LookupError
├── Conflict
├── Denied       also a PermissionError
├── BadArgument  also a ValueError
├── Timeout      also a TimeoutError
└── Unavailable  also a ConnectionError

The daemon's other error codes (`busy`, `storage_failed`, …) raise a plain RegdError with that `code`.
"""

from typing import Any

__all__ = ["BadArgument", "Conflict", "Denied", "NotFound", "RegdError", "Timeout", "Unavailable", "from_reply"]


class RegdError(Exception):
    """An error of the registry.

    Attributes:
        code: the daemon's error code. Of the client's own errors, a few have a code; the others have "".
        details: the other fields of the daemon's reply, such as `near` and `last` of `not_found`.
    """

    def __init__(self, message: str, code: str = "", details: dict[str, Any] | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.details = details or {}


class NotFound(RegdError, LookupError):
    """No ready instance has this name, or the registration to change does not exist."""


class Conflict(RegdError):
    """A live owner holds the name (`details["owner"]`), or the registration is not at the expected revision."""


class Denied(RegdError, PermissionError):
    """This user may only read, or the process of `pid` belongs to another user."""


class BadArgument(RegdError, ValueError):
    """An argument has the wrong type or an invalid value; `details["field"]` names the argument."""


class Timeout(RegdError, TimeoutError):
    """The call took longer than `timeout`, or no instance accepted a connection within `wait`."""


class Unavailable(RegdError, ConnectionError):
    """No daemon answers at the address, another program does, or the connection broke before the reply."""


_CLASSES: dict[str, type[RegdError]] = {
    "not_found": NotFound,
    "conflict": Conflict,
    "denied": Denied,
    "bad_argument": BadArgument,
    "timeout": Timeout,
    "shutting_down": Unavailable,
}


def from_reply(reply: dict[str, Any]) -> RegdError:
    """Return the exception for a reply with `"ok": false`."""
    code = str(reply.get("error", ""))
    details = {key: value for key, value in reply.items() if key not in ("ok", "id", "error", "message")}
    return _CLASSES.get(code, RegdError)(_printable(str(reply.get("message", code))), code, details)


def _printable(text: str) -> str:
    """Escape control characters, with which a reply could move a terminal's cursor or forge a log line."""
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)
