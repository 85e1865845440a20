"""The command `regctl`: the registry for a person at a terminal, and for scripts.

Exit status: 0 done, 1 not found or not in time, 2 bad usage, 3 no daemon answers, 4 refused otherwise. It sits in
start-up scripts, so it imports neither asyncio nor the daemon, and for a plain line no argparse.
"""

from __future__ import annotations

import io
import os
import sys
import time

from regd.cli.output import (
    Output,
    address_of,
    complain,
    finish,
    lines,
    open_standard_streams,
    say,
    say_json,
    visible,
)
from regd.cli.queries import ask, wait_for
from regd_client.blocking import BlockingConnection
from regd_client.errors import BadArgument, RegdError, Unavailable

TYPE_CHECKING = False  # as in typing, whose import takes longer than many a command
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import Any

NOT_FOUND, USAGE, NO_DAEMON, REFUSED = 1, 2, 3, 4
_NAMED = 5  # instances, in a message
# What handling a reply raises when it has another shape than regd's: whoever answers may be another program.
_MALFORMED = (LookupError, TypeError, AttributeError, ValueError, ArithmeticError, RecursionError)
_STATUSES = {"not_found": NOT_FOUND, "timeout": NOT_FOUND, "bad_argument": USAGE, "shutting_down": NO_DAEMON}
_PLAIN = {
    "resolve": 1,
    "deregister": 1,
    "drain": 1,
    "why": 1,
    "ping": 0,
    "stats": 0,
    "names": 1,
}  # commands, with how many names


def _given(argv: Sequence[str]) -> dict[str, Any]:
    """Return what the command line says. A plain one is read without argparse, which takes as long as all
    the rest.
    """
    command, *names = argv or ("",)
    if _PLAIN.get(command) == len(names) and not any(name.startswith("-") for name in names):
        return {"command": command, **({"name": names[0]} if names else {})}
    from regd.cli import commands

    return commands.read(argv, visible)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status."""
    if argv is None and os.getpid() == 1:
        from regd.cli import pid1

        status = pid1.exit_status()
        if status is not None:
            return status
    open_standard_streams()
    Output.begin()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # what a terminal cannot show is no reason to fail
    try:
        try:
            status = _run(_given(sys.argv[1:] if argv is None else argv))
        except SystemExit as end:  # help or a usage error, already said
            status = int(end.code or 0)
        finish()
    except KeyboardInterrupt:
        return 130
    if Output.failure is None or isinstance(Output.failure, BrokenPipeError):
        return status  # who closes the pipe has seen enough
    complain(f"regctl: cannot write to stdout: {Output.failure.strerror}")
    return REFUSED


def _run(given: dict[str, Any]) -> int:
    command, as_json, address = given.pop("command"), given.pop("json", False), given.pop("address", None)
    if given.get("meta") is not None:
        given["meta"] = dict(given["meta"])
    try:
        if command in _ALONE:
            return _ALONE[command](address, as_json, given)
        with BlockingConnection(address) as connection:
            if command == "env":
                return _env(connection, given["names"], given["format"], as_json)
            return _ask(connection, command, given, as_json)
    except RegdError as error:
        reply = {**error.details, "ok": False, "error": _code(error), "message": str(error)}
        status = _refused(reply, as_json)
        return NO_DAEMON if isinstance(error, Unavailable) else status
    except _MALFORMED as error:
        missing = " is missing" if isinstance(error, KeyError) else ""
        message = f"this is no answer of regd: {error}{missing}; name another address in REGD_ADDRESS"
        _refused({"ok": False, "error": "unavailable", "message": message}, as_json)
        return NO_DAEMON


def _ask(connection: BlockingConnection, command: str, given: dict[str, Any], as_json: bool) -> int:
    """Ask one thing, and show the reply."""
    with_limits = given.pop("limits", False)
    if command == "drain":
        command, given = "update", {**given, "state": "draining"}
    reply = ask(connection, command, {key: value for key, value in given.items() if value is not False})
    if not reply["ok"]:
        return _refused(_with_instances(connection, command, given, reply), as_json)
    if command == "stats" and not (with_limits or as_json):
        reply.pop("limits", None)
    shown = list(lines(command, reply))  # all of it, before any is written: it may be no reply of regd
    if as_json:
        say_json(reply)
        return 0
    for line in shown:
        say(line)
    return 0


def _with_instances(
    connection: BlockingConnection, command: str, given: Mapping[str, Any], reply: dict[str, Any]
) -> dict[str, Any]:
    """Return a `not_found` that names the instances which are there, and how to choose one."""
    instance = given.get("instance")
    if reply["error"] != "not_found" or (command in ("resolve", "why") and instance is None):
        return reply
    try:
        listed = connection.ask("list", name=given["name"], limit=_NAMED + 1)
    except RegdError:
        return reply
    others = [each["instance"] for each in listed.get("instances", ()) if each["instance"] != (instance or "")]
    if not others:
        return reply
    found = ", ".join(f"{given['name']}/{each}" if each else given["name"] for each in others[:_NAMED])
    there = f"there {'is' if len(others) == 1 else 'are'} {found}{', …' if len(others) > _NAMED else ''}"
    choose = f"`--instance {others[0]}`" if others[0] else "leave out --instance"
    return {**reply, "message": f"{reply['message']}; {there}: {choose}"}


def _run_under_a_name(address: str | None, as_json: bool, given: dict[str, Any]) -> int:
    from regd.cli import run

    return run.run(address, as_json, given)


def _top(address: str | None, as_json: bool, given: dict[str, Any]) -> int:
    from regd.cli.top import main as top

    return top.run(address, as_json, given)


def _names(address: str | None, as_json: bool, given: dict[str, Any]) -> int:
    from regd.cli.complete_names import names

    found = names(address, given.get("name"))
    if found is None:
        return NO_DAEMON
    if as_json:
        say_json({"ok": True, "names": found})
    else:
        Output.write("".join(f"{name}\n" for name in found))
    return 0


def _completion(address: str | None, as_json: bool, given: dict[str, Any]) -> int:
    from regd.cli import completion

    Output.write(completion.script(given["shell"]))
    return 0


def _help(address: str | None, as_json: bool, given: dict[str, Any]) -> int:
    from regd.cli import commands

    topic = given["topic"]
    if topic is None or topic in commands.COMMANDS or topic in commands.ALIASES:
        commands.read(["--help"] if topic is None else [topic, "--help"], visible)  # which ends the program
    return _refused({"ok": False, "error": "bad_argument", "message": commands.unknown(topic)}, as_json)


def _doctor(address: str | None, as_json: bool, given: dict[str, Any]) -> int:
    from regd.cli import doctor

    all_well = True
    told = []
    for each in doctor.examine(address):
        all_well &= each.ok
        if as_json:
            told.append({"check": each.check, "ok": each.ok, "found": each.found, "do": each.do})
        else:
            mark, do = ("ok", "") if each.ok else ("wrong", f"; {each.do}")
            say(f"{mark:5}  {each.check:9}  {each.found}{do}", flush=True)
    if as_json:
        say_json({"ok": all_well, "findings": told})
    return 0 if all_well else 1


def _manual(address: str | None, as_json: bool, given: dict[str, Any]) -> int:
    from regd.cli import manual

    Output.write(manual.page(given["page"]))
    return 0


def _watch(address: str | None, as_json: bool, given: dict[str, Any]) -> int:
    from regd.cli import watch

    ended = watch.watch(address, given.get("name"), given.get("meta"), as_json)
    return 0 if ended is None else _refused(ended, as_json)


def _wait(address: str | None, as_json: bool, given: dict[str, Any]) -> int:
    """Wait for one after the other; a daemon that is not there yet is waited for too."""
    until = time.monotonic() + given["timeout"]
    for name in given["names"]:
        reply = wait_for(address, name, until)
        if not reply["ok"]:
            return _refused(reply, as_json, f"{name}: ")
        at = address_of(reply)
        if as_json:
            say_json(reply)
        else:
            say(f"{name} accepts connections at {at}", flush=True)
    return 0


def _env(connection: BlockingConnection, names: Sequence[str], form: str, as_json: bool) -> int:
    """All or nothing: what is half set is found out late."""
    from regd.cli.env_vars import variables

    found: list[dict[str, Any]] = []
    for name in names:
        reply = connection.ask("resolve", name=name)
        if not reply["ok"]:
            return _refused(reply, as_json)
        found.append(reply)
    if not names:
        reply = ask(connection, "list", {})
        if not reply["ok"]:
            return _refused(reply, as_json)
        found = [each for each in reply["instances"] if each["state"] == "ready"]
    made, hidden = variables(found)
    for key, value in made.items():
        if not value.isprintable():  # in either format a line feed would begin another variable
            raise ValueError(f"{key} is {value!r}")
    for name in hidden:
        complain(f"regctl: {visible(name)} is left out: another service has its variables")
    if as_json:
        say_json(made)
    else:
        for key, value in made.items():
            say(f"{key}={_quoted(value) if form == 'shell' else value}")
    return 0


def _quoted(value: str) -> str:
    """Return a value as one word for a shell. As shlex.quote, whose import takes longer."""
    if value and all(each.isascii() and (each.isalnum() or each in "-_.:") for each in value):
        return value
    return "'" + value.replace("'", "'\"'\"'") + "'"


# What makes its own connections, or none.
_ALONE = {
    "run": _run_under_a_name,
    "top": _top,
    "wait": _wait,
    "watch": _watch,
    "names": _names,
    "completion": _completion,
    "help": _help,
    "manual": _manual,
    "doctor": _doctor,
}


def _code(error: RegdError) -> str:
    """Return the protocol's word, or regctl's own where no daemon said one."""
    if isinstance(error, Unavailable):
        return error.code or "unavailable"
    return error.code or ("bad_argument" if isinstance(error, BadArgument) else "refused")


def _refused(reply: Mapping[str, Any], as_json: bool, about: str = "") -> int:
    """Tell what is in the way, and return the exit status."""
    status, text = _STATUSES.get(reply["error"], REFUSED), visible(about + reply["message"])
    if as_json:
        say_json(dict(reply))
    else:
        complain(f"regctl: {text}")
    return status


if __name__ == "__main__":
    sys.exit(main())
