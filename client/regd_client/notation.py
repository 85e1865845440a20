"""JSON, as far as lines need it: read by what `json` reads with, and written by hand where all is plain.

The module `json` imports re and enum, which takes half as long as Python's own start; nearly all that a command
says and hears needs neither. Must not know what is said.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any


class _Reading:
    """What a scanner asks a JSONDecoder for, with that one's answers."""

    strict = True
    object_hook = None
    object_pairs_hook = None
    parse_float = float
    parse_int = int
    parse_constant = float


try:
    from _json import make_scanner
except ImportError:  # a Python without it
    import json

    _scan: Callable[[str, int], tuple[Any, int]] = json.JSONDecoder().raw_decode
else:
    _scan = make_scanner(_Reading)  # type: ignore[arg-type]


def read(text: str) -> Any:
    """Return what a JSON text says.

    Raises:
        ValueError, RecursionError: it is none.
    """
    text = text.strip(" \t\r\n")
    try:
        value, end = _scan(text, 0)
    except StopIteration:
        end = -1
    if end != len(text):
        raise ValueError("this is no JSON text")
    return value


def write(fields: dict[str, Any]) -> str:
    """Return fields as a JSON object, compact and ASCII.

    Raises:
        TypeError, ValueError, RecursionError: they are no JSON, or no text.
    """
    if all(_is_plain(key) and (type(value) is int or _is_plain(value)) for key, value in fields.items()):
        said = (
            f'"{key}":{value}' if type(value) is int else f'"{key}":"{value}"' for key, value in fields.items()
        )
        return "{" + ",".join(said) + "}"
    import json

    line = json.dumps(fields, separators=(",", ":"), allow_nan=False)
    if "\\ud" in line:  # half a surrogate pair, perhaps, which the daemon does not take
        json.dumps(fields, ensure_ascii=False).encode()
    return line


def _is_plain(value: object) -> bool:
    return (
        type(value) is str and value.isascii() and value.isprintable() and '"' not in value and "\\" not in value
    )
