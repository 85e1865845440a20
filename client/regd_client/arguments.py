"""Checks of the types of a caller's arguments, before a request is sent. The daemon checks their values."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from regd_client.errors import BadArgument

__all__ = [
    "AUTO",
    "WAIT_S_MAX",
    "RegistrationRequest",
    "check_flag",
    "check_integer",
    "check_seconds",
    "check_service",
    "check_text",
    "copy_meta",
]

AUTO = "auto"  # the instance name with which a copy of a service gets a number
WAIT_S_MAX = 3_600.0
_TIMEOUT_S_MAX = 86_400.0


def _bad(field: str, message: str) -> BadArgument:
    return BadArgument(message, "bad_argument", {"field": field})


def check_text(field: str, value: object, *, required: bool = False) -> None:
    """Raise `BadArgument` unless the value is a string. None is valid too if the value is not `required`."""
    if not isinstance(value, str) and (required or value is not None):
        raise _bad(field, f"{field} must be a string, not {value!r:.80}")


def check_integer(field: str, value: object, *, required: bool = False) -> None:
    """Raise `BadArgument` unless the value is an int, not a bool. None is valid too if not `required`."""
    if (isinstance(value, bool) or not isinstance(value, int)) and (required or value is not None):
        raise _bad(field, f"{field} must be a whole number, not {value!r:.80}")


def check_flag(field: str, value: object) -> None:
    """Raise `BadArgument` unless the value is a bool."""
    if not isinstance(value, bool):
        raise _bad(field, f"{field} must be True or False, not {value!r:.80}")


def check_seconds(field: str, value: object, seconds_max: float = _TIMEOUT_S_MAX) -> None:
    """Raise `BadArgument` unless the value is None or a number from 0 to `seconds_max`."""
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= seconds_max:
        raise _bad(field, f"{field} must be 0 to {seconds_max:g} seconds, not {value!r:.80}")


def copy_meta(meta: Mapping[str, str] | None) -> dict[str, str] | None:
    """Return a copy of `meta`; None if it is None.

    Raises:
        BadArgument: `meta` is not a mapping of strings to strings.
    """
    if meta is None:
        return None
    try:
        copied: dict[Any, Any] = dict(meta)
    except (TypeError, ValueError):
        raise _bad("meta", f"meta must be a mapping of strings to strings, not {meta!r:.80}") from None
    for key, value in copied.items():
        if not isinstance(key, str):
            raise _bad("meta", f"the keys of meta must be strings, not {key!r:.80}")
        if not isinstance(value, str):
            raise _bad("meta", f"{key!r:.80} must be a string, not {value!r:.80}")
    return copied


def check_service(name: object, instance: object = None) -> None:
    """Raise `BadArgument` unless the name is a string, and the instance a string or None."""
    check_text("name", name, required=True)
    check_text("instance", instance)


@dataclass(frozen=True, slots=True)
class RegistrationRequest:
    """The arguments of `register`, with their types checked.

    `port` is None if the service's server has not opened its port yet. `pid` is the process to bind the
    registration to; None means this process. `timeout_s` limits the whole call.
    """

    name: str
    port: int | None
    host: str | None = None
    instance: str | None = None
    meta: Mapping[str, str] | None = None
    state: Literal["starting", "ready", "draining"] | None = None
    priority: int | None = None
    static: bool = False
    force: bool = False
    pid: int | None = None
    timeout_s: float | None = None

    def __post_init__(self) -> None:
        check_service(self.name, self.instance)
        check_integer("port", self.port)
        check_text("host", self.host)
        check_text("state", self.state)
        check_integer("priority", self.priority)
        check_integer("pid", self.pid)
        object.__setattr__(self, "meta", copy_meta(self.meta))
        check_flag("static", self.static)
        check_flag("force", self.force)
        check_seconds("timeout", self.timeout_s)
        if self.static and self.pid is not None:
            raise BadArgument(
                "a static registration outlives every process: leave out `pid`", details={"field": "pid"}
            )
        if self.instance == AUTO and (self.static or self.force):
            raise _bad(
                "instance",
                "instance='auto' takes a number that no living owner holds: leave out static and force",
            )

    @property
    def fields(self) -> dict[str, Any]:
        """The fields of the `register` request that do not depend on the connection."""
        return {
            "name": self.name,
            "port": self.port,
            "host": self.host,
            "instance": self.instance,
            "meta": self.meta,
            "state": self.state,
            "priority": self.priority,
            "force": self.force or None,
        }
