"""What a caller passes, checked before anything is sent. The daemon has the rules for names, hosts and sizes."""

from __future__ import annotations

from regd_client.errors import BadArgument

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

WAIT_S_MAX = 3_600.0
TIMEOUT_S_MAX = 86_400.0


def _bad(field: str, message: str) -> BadArgument:
    return BadArgument(message, "bad_argument", {"field": field})


def check_text(field: str, value: object, *, required: bool = False) -> None:
    """Raise `BadArgument` for what is neither a string nor, where it may be left out, None."""
    if not isinstance(value, str) and (required or value is not None):
        raise _bad(field, f"{field} must be a string, not {value!r:.80}")


def check_whole(field: str, value: object, *, required: bool = False) -> None:
    """Raise `BadArgument` for what is no whole number; True is none."""
    if (isinstance(value, bool) or not isinstance(value, int)) and (required or value is not None):
        raise _bad(field, f"{field} must be a whole number, not {value!r:.80}")


def check_flag(field: str, value: object) -> None:
    if not isinstance(value, bool):
        raise _bad(field, f"{field} must be True or False, not {value!r:.80}")


def check_seconds(field: str, value: object, most: float = TIMEOUT_S_MAX) -> None:
    """Raise `BadArgument` for what is neither None nor 0 to `most` seconds; NaN and True are none."""
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= most:
        raise _bad(field, f"{field} must be 0 to {most:g} seconds, not {value!r:.80}")


def labels(meta: Mapping[str, str] | None) -> dict[str, str] | None:
    """Return a copy of `meta`.

    Raises:
        BadArgument: it is no mapping of strings to strings.
    """
    if meta is None:
        return None
    try:
        made: dict[Any, Any] = dict(meta)
    except (TypeError, ValueError):
        raise _bad("meta", f"meta must be a mapping of strings to strings, not {meta!r:.80}") from None
    for key, value in made.items():
        if not isinstance(key, str):
            raise _bad("meta", f"the keys of meta must be strings, not {key!r:.80}")
        if not isinstance(value, str):
            raise _bad("meta", f"{key!r:.80} must be a string, not {value!r:.80}")
    return made


def check_service(name: object, instance: object = None) -> None:
    """Raise `BadArgument` for a name or an instance that is no string."""
    check_text("name", name, required=True)
    check_text("instance", instance)


def check_registration(
    name: object, port: object, host: object, instance: object, state: object = None, pid: object = None
) -> None:
    """Raise `BadArgument` for an argument of `register` that is of the wrong type."""
    check_service(name, instance)
    check_whole("port", port, required=True)
    check_text("host", host)
    check_text("state", state)
    check_whole("pid", pid)
