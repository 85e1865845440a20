"""What people see of the registry. All of it goes through `visible`: peers chose these texts, and whoever answers
may be no regd. Must not know how anything is asked.

Writing never raises: what a command does and its exit status do not depend on whether anyone reads its messages.
"""

from __future__ import annotations

import os
import sys
import time

from regd_client.wire import joined

TYPE_CHECKING = False  # as in typing, whose import takes longer than many a command
if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from typing import Any, TextIO

EMPTY = "-"  # a column without a value; programs that split at blanks would skip it


class Output:
    """stdout. `failure` is why it could not be written; from then on all text goes to /dev/null."""

    failure: OSError | None = None

    @classmethod
    def begin(cls) -> None:
        """Forget what was written before."""
        cls.failure = None

    @classmethod
    def write(cls, text: str, flush: bool = False) -> None:
        """Write text, and with `flush` all that waits in the buffer too."""
        try:
            sys.stdout.write(text)
            if flush:
                sys.stdout.flush()
        except OSError as error:
            cls.failure = error
            _discard(sys.stdout)


def finish() -> None:
    """Write what the buffers of both streams hold."""
    Output.write("", flush=True)
    try:
        sys.stderr.flush()  # of the logging module
    except (OSError, ValueError):
        _discard(sys.stderr)


def _discard(stream: TextIO) -> None:
    """Send what the buffer of a broken stream still holds to /dev/null: else writing it fails again at exit."""
    null = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(null, stream.fileno())
    except (OSError, ValueError):
        return  # no file: it has no buffer that anyone flushes
    finally:
        os.close(null)


def open_standard_streams() -> None:
    """Open what is closed of descriptors 0 to 2 on /dev/null, for children too: else the next socket or file gets
    the number, and text meant for the terminal.
    """
    if sys.stdin is None or sys.stdout is None or sys.stderr is None:
        while (number := os.open(os.devnull, os.O_RDWR)) <= 2:
            os.set_inheritable(number, True)
        os.close(number)
    if sys.stdout is None:
        sys.stdout = os.fdopen(1, "w")
    if sys.stderr is None:
        sys.stderr = os.fdopen(2, "w")


def say(line: str, flush: bool = False) -> None:
    Output.write("\t".join(map(visible, line.split("\t"))) + "\n", flush)


def say_json(fields: dict[str, Any]) -> None:
    import json

    Output.write(json.dumps(fields) + "\n", flush=True)


def complain(text: str) -> None:
    """Write a line to stderr, or drop it where stderr cannot be written."""
    if sys.stderr is None:
        return  # print() would take stdout instead
    try:
        sys.stderr.write(text + "\n")
        sys.stderr.flush()
    except (OSError, ValueError):
        _discard(sys.stderr)


def lines(command: str, reply: dict[str, Any]) -> Iterable[str]:
    match command:
        case "resolve" if "instances" in reply:
            return [address_of(each) for each in reply["instances"]]
        case "resolve" | "register":
            return [address_of(reply)]
        case "list":
            return _table([_row(each) for each in reply["instances"]])
        case "ping":
            return ["regd answers"]
        case "stats":
            return _tree(reply)
        case "why":
            return _reasons(reply)
        case _:
            return []


def address_of(each: Mapping[str, Any]) -> str:
    return joined(each["host"], each["port"])


def news(event: Mapping[str, Any]) -> str:
    match event.get("event"):
        case "up" | "change" as kind:
            return "\t".join((kind, *_row(event)))
        case "down":
            return "\t".join(("down", event["name"], event["instance"] or EMPTY, event["reason"]))
        case _:
            return ""


def _row(each: Mapping[str, Any]) -> tuple[str, ...]:
    meta = " ".join(f"{key}={value}" for key, value in each["meta"].items())
    columns = (each["name"], each["instance"], address_of(each), each["state"], meta)
    return tuple(visible(column) or EMPTY for column in columns)


def _table(rows: list[tuple[str, ...]]) -> Iterable[str]:
    """Columns with a head for a person; for a pipe only the rows, tabs between."""
    if not sys.stdout.isatty():
        return ["\t".join(row) for row in rows]
    if not rows:
        return ["nothing is registered"]
    rows = [("NAME", "INSTANCE", "ADDRESS", "STATE", "META"), *rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]


def _reasons(reply: dict[str, Any]) -> Iterable[str]:
    for each in reply["instances"]:
        named = f"{reply['name']}/{each['instance']}" if each["instance"] else reply["name"]
        yield f"{named} at {address_of(each)}: {each['state']}" + ("" if each["alive"] else ", and gone")
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(each["since"]))
        yield f"  since {since}, at revision {each['rev']}"
        for owner in each["owners"]:
            held = ", ".join(f"{key} {value}" for key, value in owner.items())
            yield "  static: nobody holds it" if owner.get("static") else f"  held by {held}"
        if probe := each["probe"]:
            found = "accepted" if probe["accepted"] else probe["why"]
            yield f"  last probe {probe['age_s']:.1f} s ago: {found}"
    for each in reply["departures"]:
        named = f"{reply['name']}/{each['instance']}" if each["instance"] else reply["name"]
        yield f"{named} left {each['age_s']:.1f} s ago: {each['reason']}"


def _tree(fields: Mapping[str, Any], indent: str = "") -> Iterable[str]:
    for key, value in fields.items():
        if isinstance(value, dict):
            yield f"{indent}{key}"
            yield from _tree(value, indent + "  ")
        elif key != "ok" and value is not None:
            yield f"{indent}{key}  {value}"


def visible(text: str) -> str:
    """Escape what could move a terminal's cursor, set its colour, or turn the direction of reading."""
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in text)
