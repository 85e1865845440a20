"""The error codes of the protocol, and the exceptions that carry them.

Clients may rely on the codes. The messages are for people and may change.
"""

from enum import StrEnum
from typing import Self


class Code(StrEnum):
    """The error codes. `meaning` is the text in PROTOCOL.md."""

    meaning: str

    def __new__(cls, value: str, meaning: str) -> "Code":
        member = str.__new__(cls, value)
        member._value_ = value
        member.meaning = meaning
        return member

    BAD_JSON = "bad_json", "the line begins with `{` but is not a JSON object that regd accepts"
    BAD_REQUEST = "bad_request", "no usable `cmd` or `id`, or not this protocol at all (then closed)"
    UNKNOWN_COMMAND = "unknown_command", "no command of that name; `near` may name one"
    BAD_ARGUMENT = (
        "bad_argument",
        "an argument is unknown, missing, of the wrong type or out of range; see `field`",
    )
    TOO_LARGE = "too_large", "the line is longer than `line_bytes_max`; it was skipped"
    NOT_FOUND = "not_found", "no `ready` instance, or nothing to deregister, update or renew"
    CONFLICT = "conflict", "another owner is alive (`owner`), or `if` names another revision than `rev`"
    TIMEOUT = "timeout", "`wait` was not long enough; or an unfinished line (then closed)"
    BUSY = "busy", "beyond a limit; try again later"
    DENIED = "denied", "this client may not do that"
    STORAGE_FAILED = "storage_failed", "the registry could not be written; the change is not in effect"
    UNSUPPORTED = "unsupported", "not supported on this system"
    SHUTTING_DOWN = "shutting_down", "the daemon is stopping; connect again in a moment"
    INTERNAL = "internal", "a bug in regd; its log says more"


class Refused(Exception):
    """A request is refused.

    `code`, `message` (one sentence for people) and `details` (further fields) become the error reply.
    """

    def __init__(self, code: Code, message: str, **details: object) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.details = details

    def without_traceback(self) -> Self:
        """Remove the traceback, which would keep the objects of the request alive, and return the exception."""
        self.__traceback__ = self.__context__ = None
        return self


class Invalid(ValueError):
    """A value is not valid. The message continues the argument's name: "must be 1 to 65535"."""
