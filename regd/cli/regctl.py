"""The command `regctl`: the registry for a person at a terminal, and for scripts.

Exit status: 0 done, 1 not found or not in time, 2 bad usage, 3 no daemon answers, 4 refused otherwise. It sits in
start-up scripts, so it imports neither asyncio nor the daemon, and for a plain line no argparse.
"""

from __future__ import annotations

import io
import os
import sys
import time

from regd_client.blocking import BlockingConnection
from regd_client.errors import BadArgument, RegdError, Unavailable
from regd_client.wire import joined

TYPE_CHECKING = False  # as in typing, whose import takes longer than many a command
if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Iterable, Mapping, Sequence
    from typing import Any, NoReturn

NOT_FOUND, USAGE, NO_DAEMON, REFUSED = 1, 2, 3, 4
_STATUSES = {"not_found": NOT_FOUND, "timeout": NOT_FOUND, "bad_argument": USAGE, "shutting_down": NO_DAEMON}
_PLAIN = {"resolve": 1, "deregister": 1, "why": 1, "ping": 0, "stats": 0}  # commands, with how many names
_PASSING = ("shutting_down", "busy")  # refusals after which it is worth to try again


# What can be said to it.


def _given(argv: Sequence[str]) -> dict[str, Any]:
    """Return what the command line says. A plain one is read without argparse, which takes as long as all
    the rest.
    """
    command, *names = argv or ("",)
    if _PLAIN.get(command) == len(names) and not any(name.startswith("-") for name in names):
        return {"command": command, **({"name": names[0]} if names else {})}
    return vars(_parser().parse_args(argv))


def _label(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not equals:
        raise _wrong(f"must be KEY=VALUE, not {text!r}")
    return key, value


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds <= 3_600:
        raise _wrong(f"must be 0 to 3600 seconds, not {text!r}")
    return seconds


def _wrong(why: str) -> Exception:
    import argparse

    return argparse.ArgumentTypeError(why)


def _parser() -> argparse.ArgumentParser:
    import argparse

    import regd

    class Parser(argparse.ArgumentParser):
        def error(self, message: str) -> NoReturn:
            self.exit(USAGE, f"{self.prog}: {_visible(message)} (see {self.prog} --help)\n")

    common = Parser(add_help=False)
    common.add_argument(
        "--address",
        default=argparse.SUPPRESS,
        help="tcp://HOST:PORT, HOST:PORT or unix:///path (default: $REGD_ADDRESS, else tcp://127.0.0.1:7343)",
    )
    common.add_argument(
        "--json", action="store_true", default=argparse.SUPPRESS, help="print the daemon's reply, one JSON object"
    )
    parser = Parser(
        prog="regctl",
        description="Ask and change the service registry of this machine.",
        epilog="Exit status: 0 done, 1 not found or not in time, 2 bad usage, 3 no daemon, 4 refused otherwise.",
        parents=[common],
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"regctl {regd.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=Parser)

    def add(name: str, text: str) -> argparse.ArgumentParser:
        return commands.add_parser(name, help=text, description=text, parents=[common], allow_abbrev=False)

    _add_commands(add)
    return parser


def _add_commands(add: Callable[[str, str], argparse.ArgumentParser]) -> None:
    def labels(command: argparse.ArgumentParser, text: str) -> None:
        command.add_argument(
            "--meta", type=_label, action="append", metavar="KEY=VALUE", help=f"{text}; may be repeated"
        )

    each = add("list", "List registrations.")
    each.add_argument("name", nargs="?", metavar="NAME", help="only this, or what begins with it: 'work*'")
    labels(each, "only those that carry it")

    each = add("resolve", "Print the address of a ready instance.")
    each.add_argument("name", metavar="NAME")
    each.add_argument("--all", action="store_true", help="of all ready instances")
    each.add_argument("--instance", help="only this instance (default: any)")
    labels(each, "only those that carry it")

    each = add("register", "Register a service; it stays until it is deregistered.")
    each.add_argument("name", metavar="NAME")
    each.add_argument("port", metavar="PORT", type=int)
    each.add_argument("--host", help="where it listens (default: 127.0.0.1)")
    each.add_argument("--instance", help='which instance (default: "")')
    labels(each, "a label")

    each = add("deregister", "End a registration.")
    each.add_argument("name", metavar="NAME")
    each.add_argument("--instance", help='which instance (default: "")')

    each = add("watch", "Show what is there, and then every change, until Ctrl-C.")
    each.add_argument("name", nargs="?", metavar="NAME", help="only this, or what begins with it: 'work*'")
    labels(each, "only those that carry it")

    each = add("wait", "Wait until each of the services accepts connections.")
    each.add_argument("names", nargs="+", metavar="NAME")
    each.add_argument(
        "--timeout", type=_seconds, default=30.0, metavar="SECONDS", help="for all of them (default: 30)"
    )

    each = add("why", "Tell what is known of a service: owners, last probe, who left and why.")
    each.add_argument("name", metavar="NAME")
    each.add_argument("--instance", help="only this instance (default: any)")

    add("ping", "Ask whether a daemon answers.")
    add("stats", "Show the daemon's counters and limits.")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status."""
    if sys.stdout is None:  # the shell closed it: `>&-`
        sys.stdout = os.fdopen(os.open(os.devnull, os.O_WRONLY), "w")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # what a terminal cannot show is no reason to fail
    try:
        status = _run(_given(sys.argv[1:] if argv is None else argv))
        sys.stdout.flush()
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # whoever read our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    return status


def _run(given: dict[str, Any]) -> int:
    command, as_json, address = given.pop("command"), given.pop("json", False), given.pop("address", None)
    if given.get("meta") is not None:
        given["meta"] = dict(given["meta"])
    try:
        if command == "wait":
            return _wait(address, given["names"], given["timeout"], as_json)
        with BlockingConnection(address) as connection:
            if command == "watch":
                return _watch(connection, given, as_json)
            reply = _ask(connection, command, {key: value for key, value in given.items() if value is not False})
    except Unavailable as error:
        return _fail(NO_DAEMON, str(error))
    except BadArgument as error:
        return _fail(USAGE, str(error))
    except RegdError as error:
        return _fail(REFUSED, str(error))
    if as_json:
        _say_json(reply)
        return 0 if reply["ok"] else _status(reply)
    if not reply["ok"]:
        return _fail(_status(reply), reply["message"])
    for line in _lines(command, reply):
        _say(line)
    return 0


def _ask(connection: BlockingConnection, command: str, given: dict[str, Any]) -> dict[str, Any]:
    """Ask, and where the reply is one page of several, for the rest too."""
    reply = connection.ask(command, **given)
    if reply.pop("more", False):
        listed = _ask(connection, "list", {"name": given["name"], "meta": given.get("meta")})
        if not listed["ok"]:
            return listed
        reply["instances"] = [each for each in listed["instances"] if each["state"] == "ready"]
    while "next" in reply:
        page = connection.ask(command, **{**given, "after": reply.pop("next")})
        if not page["ok"]:
            return page
        reply = {**page, "instances": reply["instances"] + page["instances"]}
    return reply


def _watch(connection: BlockingConnection, given: dict[str, Any], as_json: bool) -> int:
    reply = connection.ask("watch", **given)
    if not reply["ok"]:
        return _fail(_status(reply), reply["message"])
    for event in connection.events():
        if as_json:
            _say_json(event)
        elif line := _news(event):
            _say(line, flush=True)
        if "event" not in event:  # the daemon ends it, and says why
            return _status(event) if as_json else _fail(_status(event), event["message"])
    return 0


def _wait(address: str | None, names: Sequence[str], timeout_s: float, as_json: bool) -> int:
    """Wait for one after the other; a daemon that is not there yet is waited for too."""
    until = time.monotonic() + timeout_s
    for name in names:
        reply = _wait_for(address, name, until)
        if as_json:
            _say_json(reply)
        elif reply["ok"]:
            _say(f"{name} accepts connections at {_address(reply)}", flush=True)
        if not reply["ok"]:
            return _status(reply) if as_json else _fail(_status(reply), f"{name}: {reply['message']}")
    return 0


def _wait_for(address: str | None, name: str, until: float) -> dict[str, Any]:
    while True:
        left_s = max(0.0, until - time.monotonic())
        try:
            with BlockingConnection(address) as connection:
                reply = connection.ask("resolve", name=name, wait=left_s)
            if reply.get("error") not in _PASSING or time.monotonic() >= until:
                return reply
        except Unavailable:
            if time.monotonic() >= until:
                raise
        time.sleep(min(0.1, left_s))


def _status(reply: Mapping[str, Any]) -> int:
    return _STATUSES.get(reply["error"], REFUSED)


def _fail(status: int, message: str) -> int:
    print(f"regctl: {_visible(message)}", file=sys.stderr)
    return status


# What people see. All of it goes through `_visible`: peers chose these texts, and whoever answers may be no regd.


def _say(line: str, flush: bool = False) -> None:
    print("\t".join(map(_visible, line.split("\t"))), flush=flush)


def _say_json(fields: dict[str, Any]) -> None:
    import json

    print(json.dumps(fields), flush=True)


def _lines(command: str, reply: dict[str, Any]) -> Iterable[str]:
    match command:
        case "resolve" if "instances" in reply:
            return [_address(each) for each in reply["instances"]]
        case "resolve" | "register":
            return [_address(reply)]
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


def _address(each: Mapping[str, Any]) -> str:
    return joined(each["host"], each["port"])


def _news(event: Mapping[str, Any]) -> str:
    match event.get("event"):
        case "up" | "change" as kind:
            return "\t".join((kind, *_row(event)))
        case "down":
            return "\t".join(("down", event["name"], event["instance"], event["reason"]))
        case "reset":
            return "reset"
        case _:
            return ""


def _row(each: Mapping[str, Any]) -> tuple[str, ...]:
    meta = " ".join(f"{key}={value}" for key, value in each["meta"].items())
    return tuple(map(_visible, (each["name"], each["instance"], _address(each), each["state"], meta)))


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
        yield f"{named} at {_address(each)}: {each['state']}" + ("" if each["alive"] else ", and gone")
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
        elif key != "ok":
            yield f"{indent}{key}  {value}"


def _visible(text: str) -> str:
    """Escape what could move a terminal's cursor, set its colour, or turn the direction of reading."""
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in text)


if __name__ == "__main__":
    sys.exit(main())
