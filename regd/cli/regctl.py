"""The command `regctl`: the registry for a person at a terminal, and for scripts.

Exit status: 0 done, 1 not found or not in time, 2 bad usage, 3 no daemon answers, 4 refused otherwise. It sits in
start-up scripts, so it imports neither asyncio nor the daemon, and for a plain line no argparse.
"""

from __future__ import annotations

import io
import os
import sys
import time

from regd.cli.asking import ask, wait_for
from regd.cli.showing import address_of, lines, news, say, say_json, visible
from regd_client.blocking import BlockingConnection
from regd_client.errors import BadArgument, RegdError, Unavailable

TYPE_CHECKING = False  # as in typing, whose import takes longer than many a command
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import Any

NOT_FOUND, USAGE, NO_DAEMON, REFUSED = 1, 2, 3, 4
_STATUSES = {"not_found": NOT_FOUND, "timeout": NOT_FOUND, "bad_argument": USAGE, "shutting_down": NO_DAEMON}
_PLAIN = {
    "resolve": 1,
    "deregister": 1,
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
        if command in _ALONE:
            return _ALONE[command](address, as_json, given)
        with BlockingConnection(address) as connection:
            if command == "watch":
                return _watch(connection, given, as_json)
            if command == "env":
                return _env(connection, given["names"], as_json)
            reply = ask(connection, command, {key: value for key, value in given.items() if value is not False})
    except RegdError as error:
        reply = {**error.details, "ok": False, "error": _code(error), "message": str(error)}
        status = _refused(reply, as_json)
        return NO_DAEMON if isinstance(error, Unavailable) else status
    if not reply["ok"]:
        return _refused(reply, as_json)
    if as_json:
        say_json(reply)
        return 0
    for line in lines(command, reply):
        say(line)
    return 0


def _run_under_a_name(address: str | None, as_json: bool, given: dict[str, Any]) -> int:
    from regd.cli import run

    return run.run(address, as_json, given)


def _top(address: str | None, as_json: bool, given: dict[str, Any]) -> int:
    from regd.cli.top import main as top

    return top.run(address, as_json, given)


def _names(address: str | None, as_json: bool, given: dict[str, Any]) -> int:
    from regd.cli.names import names

    found = names(address, given.get("name"))
    if found is None:
        return NO_DAEMON
    if as_json:
        say_json({"ok": True, "names": found})
    else:
        sys.stdout.write("".join(f"{name}\n" for name in found))
    return 0


def _completion(address: str | None, as_json: bool, given: dict[str, Any]) -> int:
    from regd.cli import completion

    sys.stdout.write(completion.script(given["shell"]))
    return 0


def _help(address: str | None, as_json: bool, given: dict[str, Any]) -> int:
    from regd.cli import commands

    topic = given["topic"]
    if topic is None or topic in commands.COMMANDS:
        commands.read(["--help"] if topic is None else [topic, "--help"], visible)  # which ends the program
    return _refused({"error": "bad_argument", "message": commands.unknown(topic)}, as_json)


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

    sys.stdout.write(manual.page(given["page"]))
    return 0


def _watch(connection: BlockingConnection, given: dict[str, Any], as_json: bool) -> int:
    reply = connection.ask("watch", **given)
    if not reply["ok"]:
        return _refused(reply, as_json)
    for event in connection.events():
        if "event" not in event:  # the daemon ends it, and says why
            return _refused(event, as_json)
        if as_json:
            say_json(event)
        elif line := news(event):
            say(line, flush=True)
    return 0


def _wait(address: str | None, as_json: bool, given: dict[str, Any]) -> int:
    """Wait for one after the other; a daemon that is not there yet is waited for too."""
    until = time.monotonic() + given["timeout"]
    for name in given["names"]:
        reply = wait_for(address, name, until)
        if not reply["ok"]:
            return _refused(reply, as_json, f"{name}: ")
        if as_json:
            say_json(reply)
        else:
            say(f"{name} accepts connections at {address_of(reply)}", flush=True)
    return 0


def _env(connection: BlockingConnection, names: Sequence[str], as_json: bool) -> int:
    """All or nothing: what is half set is found out late."""
    from regd.cli.variables import variables

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
    for name in hidden:
        print(f"regctl: {name} is left out: another service has its variables", file=sys.stderr)
    if as_json:
        say_json(made)
    else:
        for key, value in made.items():
            say(f"{key}={value}")
    return 0


# What makes its own connections, or none.
_ALONE = {
    "run": _run_under_a_name,
    "top": _top,
    "wait": _wait,
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
    if as_json:
        say_json(dict(reply))
    else:
        print(f"regctl: {visible(about + reply['message'])}", file=sys.stderr)
    return _STATUSES.get(reply["error"], REFUSED)


if __name__ == "__main__":
    sys.exit(main())
