"""Writes to stdout and stderr, and formats replies as text. Used by both commands.

Writing never raises, so that a command does its work even if its messages cannot be written. All text goes
through `visible`, since other programs choose names and labels, and the reply may not be from regd.
"""

from __future__ import annotations

import errno
import os
import sys
import time
from collections.abc import Iterable, Mapping
from typing import Any, TextIO

from regd_client.protocol import host_port

_MACHINE = "regd.machine"  # the label of an instance that a bridge has registered
EMPTY = "-"  # for a column without a value, since programs that split at blanks would skip an empty column


class Output:
    """Writes to stdout. `failure` is the error after which nothing can be written; later text is discarded."""

    failure: OSError | None = None

    @classmethod
    def write(cls, text: str, flush: bool = False) -> None:
        """Write text; with `flush`, also flush the buffer."""
        try:
            sys.stdout.write(text)
            if flush:
                sys.stdout.flush()
        except OSError as error:
            cls.failure = error
            _discard(sys.stdout)


def finish(program: str) -> bool:
    """Flush both streams. If stdout could not be written, report that on stderr and return False.

    A pipe that its reader has closed is not an error: the reader wants no more.
    """
    Output.write("", flush=True)
    try:
        sys.stderr.flush()  # the logging module may have written to it
    except (OSError, ValueError):
        _discard(sys.stderr)
    if Output.failure is None or Output.failure.errno == errno.EPIPE:
        return True
    complain(f"{program}: cannot write to stdout: {Output.failure.strerror}")
    return False


def _discard(stream: TextIO) -> None:
    """Redirect a broken stream to /dev/null, so that the flush at exit does not fail again."""
    null = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(null, stream.fileno())
    except (OSError, ValueError):
        return  # the stream has no descriptor, so nothing is flushed at exit
    finally:
        os.close(null)


def open_standard_streams() -> None:
    """Open /dev/null for each of the descriptors 0, 1 and 2 that is closed. Call it first.

    Otherwise the next file or socket would get one of these numbers, and messages for stderr would be written
    to it. The descriptors are inheritable, so that child processes have them too.
    """
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # open(2) uses the lowest free number
    if sys.stdout is None:
        sys.stdout = os.fdopen(1, "w", errors="backslashreplace", closefd=False)
    if sys.stderr is None:
        sys.stderr = os.fdopen(2, "w", errors="backslashreplace", closefd=False)


def say(line: str, flush: bool = False) -> None:
    """Write a line to stdout."""
    Output.write("\t".join(map(visible, line.split("\t"))) + "\n", flush)


def say_json(fields: dict[str, Any]) -> None:
    """Write a JSON object to stdout, as one line."""
    import json

    Output.write(json.dumps(fields) + "\n", flush=True)


def complain(text: str) -> None:
    """Write a line to stderr, or discard it if stderr cannot be written."""
    if sys.stderr is None:
        return
    try:
        sys.stderr.write(text + "\n")
        sys.stderr.flush()
    except (OSError, ValueError):
        _discard(sys.stderr)


def visible(text: str) -> str:
    """Escape control characters, which could move the cursor, set colours or change the direction of the text."""
    if text.isprintable():
        return text
    return "".join(
        letter if letter.isprintable() else letter.encode("unicode_escape").decode() for letter in text
    )


# Replies and events.


def lines(command: str, reply: dict[str, Any]) -> Iterable[str]:
    """Return the text of a reply to a command."""
    match command:
        case "resolve" if "instances" in reply:
            return [address_of(entry) for entry in reply["instances"]]
        case "resolve" | "register":
            return [address_of(reply)]
        case "list":
            return _list(reply["instances"])
        case "ping":
            return ["regd answers"]
        case "stats":
            return _tree(reply)
        case "why":
            return _reasons(reply)
        case "deregister" | "update":
            return []
        case _:
            raise NotImplementedError(f"no text for the reply to {command}")


def address_of(entry: Mapping[str, Any]) -> str:
    """Return HOST:PORT of an instance."""
    return host_port(entry["host"], entry["port"])


def priority_of(entry: Mapping[str, Any]) -> int:
    """Return the priority of an instance. Replies leave it out if it is 0."""
    return int(entry.get("priority", 0))


def event_line(event: Mapping[str, Any]) -> str:
    """Return the line that `regctl watch` prints for an event of an instance; "" for other events."""
    match event.get("event"):
        case "up" | "change" as kind:
            priority = (str(priority_of(event)),) if priority_of(event) else ()
            return "\t".join((kind, *_row(event), *priority))
        case "down":
            return "\t".join(("down", event["name"], event["instance"] or EMPTY, event["reason"]))
        case _:
            return ""


def labels(entry: Mapping[str, Any]) -> str:
    """Return the labels of an instance."""
    return " ".join(f"{key}={value}" for key, value in entry["meta"].items())


def instance_name(name: str, instance: str) -> str:
    """Return NAME/INSTANCE, or NAME if the instance has no name."""
    return f"{name}/{instance}" if instance else name


def _list(entries: list[dict[str, Any]]) -> Iterable[str]:
    """Return a table of instances.

    The table has a column of priorities only if a priority is not 0, and a column of machines only if an instance
    is of another machine.
    """
    header: tuple[str, ...] = ("NAME", "INSTANCE", "ADDRESS", "STATE", "META")
    rows = [_row(entry) for entry in entries]
    if any(map(priority_of, entries)):
        header = (*header, "PRIORITY")
        rows = [(*row, str(priority_of(entry))) for row, entry in zip(rows, entries, strict=True)]
    if any(_MACHINE in entry["meta"] for entry in entries):
        header = (*header, "MACHINE")
        machines = [visible(entry["meta"].get(_MACHINE, "")) or EMPTY for entry in entries]
        rows = [(*row, machine) for row, machine in zip(rows, machines, strict=True)]
    return table(header, rows, "nothing is registered")


def _row(entry: Mapping[str, Any]) -> tuple[str, ...]:
    columns = (entry["name"], entry["instance"], address_of(entry), entry["state"], labels(entry))
    return tuple(visible(column) or EMPTY for column in columns)


def table(header: tuple[str, ...] | None, rows: list[tuple[str, ...]], nothing: str) -> Iterable[str]:
    """Return the rows as aligned columns for a terminal, or separated by tabs for a pipe.

    Only a terminal gets the header or, if there are no rows, the text `nothing` in its place.
    """
    if not sys.stdout.isatty():
        return ["\t".join(row) for row in rows]
    if not rows:
        return [nothing] if header else []
    rows = [header, *rows] if header else rows
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]


def _reasons(reply: dict[str, Any]) -> Iterable[str]:
    for entry in reply["instances"]:
        name = instance_name(reply["name"], entry["instance"])
        priority = f", priority {priority_of(entry)}" if priority_of(entry) else ""
        gone = "" if entry["alive"] else ", and gone"
        yield f"{name} at {address_of(entry)}: {entry['state']}{priority}{gone}"
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(entry["since"]))
        yield f"  since {since}, at revision {entry['rev']}"
        for owner in entry["owners"]:
            owner_text = ", ".join(f"{key} {value}" for key, value in owner.items())
            yield "  static: has no owner" if owner.get("static") else f"  held by {owner_text}"
        if probe := entry["probe"]:
            result = "accepted" if probe["accepted"] else probe["why"]
            yield f"  last probe {probe['age_s']:.1f} s ago: {result}"
    for departure in reply["departures"]:
        name = instance_name(reply["name"], departure["instance"])
        yield f"{name} left {departure['age_s']:.1f} s ago: {departure['reason']}"


def _tree(fields: Mapping[str, Any], indent: str = "") -> Iterable[str]:
    for key, value in fields.items():
        if isinstance(value, dict):
            yield f"{indent}{key}"
            yield from _tree(value, indent + "  ")
        elif key != "ok" and value is not None:
            yield f"{indent}{key}  {value}"


# Environment variables.


def variable_prefix(name: str) -> str:
    """Return the prefix of a service's environment variables: `SHOP_DB` for `shop.db`."""
    prefix = "".join(letter.upper() if letter.isascii() and letter.isalnum() else "_" for letter in name)
    return f"_{prefix}" if prefix[:1].isdigit() else prefix


def environment_variables(instances: Iterable[Mapping[str, Any]]) -> tuple[dict[str, str], list[str]]:
    """Return PREFIX_HOST, PREFIX_PORT and PREFIX_ADDRESS for the first instance of each service.

    Also return the names that are left out because an earlier service has the same prefix.
    """
    variables: dict[str, str] = {}
    names: dict[str, str] = {}  # by prefix
    hidden: list[str] = []
    for entry in instances:
        name = entry["name"]
        prefix = variable_prefix(name)
        if prefix not in names:
            names[prefix] = name
            variables[f"{prefix}_HOST"] = entry["host"]
            variables[f"{prefix}_PORT"] = str(entry["port"])
            variables[f"{prefix}_ADDRESS"] = address_of(entry)
        elif names[prefix] != name and name not in hidden:
            hidden.append(name)
    return variables, hidden
