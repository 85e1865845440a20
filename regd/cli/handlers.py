"""The handlers of regctl's commands.

Scripts call regctl often, so modules that only some commands need (asyncio, json, …) are imported when needed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from regd.cli import commands
from regd.cli.arguments import UsageError
from regd.cli.commands import NO_DAEMON, NOT_FOUND, REFUSED, USAGE
from regd.cli.output import (
    Output,
    address_of,
    complain,
    environment_variables,
    lines,
    priority_of,
    say,
    say_json,
    visible,
)
from regd.cli.queries import ask, wait_for, wait_for_http
from regd_client.blocking_connection import BlockingConnection
from regd_client.errors import BadArgument, RegdError, Unavailable
from regd_client.protocol import find_address

_STATUSES = {"not_found": NOT_FOUND, "timeout": NOT_FOUND, "bad_argument": USAGE, "shutting_down": NO_DAEMON}
_INSTANCES_SHOWN = 5  # in an error message
# Exceptions that occur if a reply has an unexpected form, because another program than regd has sent it.
_MALFORMED = (LookupError, TypeError, AttributeError, ValueError, ArithmeticError, RecursionError)


def run(argv: Sequence[str]) -> int:
    """Run the command of a command line and return its exit status."""
    try:
        arguments = commands.read(argv)
        command, as_json, address = (
            arguments.pop(name, default)
            for name, default in (("command", ""), ("json", False), ("address", None))
        )
        if arguments.get("meta") is not None:
            arguments["meta"] = dict(arguments["meta"])
        handler = _HANDLERS.get(command)
        try:
            if handler is not None:
                return handler(address, as_json, arguments)
            return _request(command, address, as_json, arguments)
        except RegdError as error:
            reply = {**error.details, "ok": False, "error": _code(error), "message": str(error)}
            status = _refused(reply, as_json)
            return NO_DAEMON if isinstance(error, Unavailable) else status
        except _MALFORMED as error:
            missing = " is missing" if isinstance(error, KeyError) else ""
            message = f"not a regd reply: {error}{missing}; name another address in REGD_ADDRESS"
            _refused({"ok": False, "error": "unavailable", "message": message}, as_json)
            return NO_DAEMON
    except UsageError as error:
        return _misused(argv, error)
    except SystemExit as end:  # after --help or --version
        return int(end.code or 0)


def _misused(argv: Sequence[str], error: UsageError) -> int:
    """Report a usage error, as JSON with --json. For `run`, write to stderr: stdout belongs to its command."""
    own = argv[: argv.index("--")] if "--" in argv else argv
    message = str(error)
    if "--json" not in own:
        complain(f"{error.prog}: {message}")
    elif error.prog == "regctl run":
        import json

        complain(json.dumps({"event": "refused", "error": "bad_argument", "message": message}))
    else:
        say_json({"ok": False, "error": "bad_argument", "message": message})
    return USAGE


def _request(command: str, address: str | None, as_json: bool, arguments: dict[str, Any]) -> int:
    """Send one request and print its reply."""
    with_limits = arguments.pop("limits", False)
    if command == "drain":
        command, arguments = "update", {**arguments, "state": "draining"}
    with BlockingConnection(address) as connection:
        reply = ask(connection, command, {key: value for key, value in arguments.items() if value is not False})
        if not reply["ok"]:
            return _refused(_with_instances(connection, command, arguments, reply), as_json)
    if command == "stats" and not (with_limits or as_json):
        reply.pop("limits", None)
    printed = list(lines(command, reply))  # format all lines before writing the first: the reply may be malformed
    if as_json:
        say_json(reply)
    else:
        for line in printed:
            say(line)
    return 0


def _with_instances(
    connection: BlockingConnection, command: str, arguments: Mapping[str, Any], reply: dict[str, Any]
) -> dict[str, Any]:
    """Add to the message of a `not_found` reply the instances that exist and how to choose one."""
    instance = arguments.get("instance")
    if reply["error"] != "not_found" or (command in ("resolve", "why") and instance is None):
        return reply
    try:
        page = connection.ask("list", name=arguments["name"], limit=_INSTANCES_SHOWN + 1)
    except RegdError:
        return reply
    others = [entry["instance"] for entry in page.get("instances", ()) if entry["instance"] != (instance or "")]
    if not others:
        return reply
    name = arguments["name"]
    shown = ", ".join(f"{name}/{other}" if other else name for other in others[:_INSTANCES_SHOWN])
    there = (
        f"there {'is' if len(others) == 1 else 'are'} {shown}{', …' if len(others) > _INSTANCES_SHOWN else ''}"
    )
    choose = f"`--instance {others[0]}`" if others[0] else "leave out --instance"
    return {**reply, "message": f"{reply['message']}; {there}: {choose}"}


def _run(address: str | None, as_json: bool, arguments: dict[str, Any]) -> int:
    from regd.cli.run import run

    return run(address, as_json, arguments)


def _top(address: str | None, as_json: bool, arguments: dict[str, Any]) -> int:
    from regd.cli.top import main as top

    return top.run(address, as_json, arguments)


def _serve(address: str | None, as_json: bool, arguments: dict[str, Any]) -> int:
    try:
        from regd.gateways.listeners import ports_to_try
        from regd.gateways.serve import serve
        from regd.system.listener import ListenError
    except ModuleNotFoundError as error:
        message = f"regctl serve needs the extra `serve`, and {error.name} is missing: pip install 'regd[serve]'"
        return _refused({"ok": False, "error": "bad_argument", "message": message}, as_json)
    project = find_address(address).project
    http, dns = (
        ports_to_try(arguments[name], default, project)
        for name, default in (("http", commands.HTTP_PORT), ("dns", commands.DNS_PORT))
    )
    try:
        serve(address, http, dns, lambda line: say(line, flush=True))
    except ListenError as error:
        return _refused({"ok": False, "error": "refused", "message": str(error)}, as_json)
    return 0


def _bridge(address: str | None, as_json: bool, arguments: dict[str, Any]) -> int:
    from regd.cli import bridge

    if arguments["status"]:
        return bridge.status(address, as_json)
    try:
        bridge.run(address, arguments)
    except bridge.CannotStart as error:
        code = "bad_argument" if error.is_usage else "refused"
        return _refused({"ok": False, "error": code, "message": str(error)}, as_json)
    return 0


def _names(address: str | None, as_json: bool, arguments: dict[str, Any]) -> int:
    from regd.cli.complete_names import names

    matching = names(address, arguments.get("name"))
    if matching is None:
        return NO_DAEMON
    if as_json:
        say_json({"ok": True, "names": matching})
    else:
        Output.write("".join(f"{name}\n" for name in matching))
    return 0


def _completion(address: str | None, as_json: bool, arguments: dict[str, Any]) -> int:
    from regd.cli import completion

    Output.write(completion.script(arguments["shell"]))
    return 0


def _help(address: str | None, as_json: bool, arguments: dict[str, Any]) -> int:
    topic = arguments["topic"]
    if topic is None:
        commands.print_help()
    if topic in commands.COMMANDS or topic in commands.ALIASES:
        commands.print_help(topic)
    return _refused({"error": "bad_argument", "message": commands.unknown_command(topic), "ok": False}, as_json)


def _doctor(address: str | None, as_json: bool, arguments: dict[str, Any]) -> int:
    from regd.cli import doctor

    findings = []
    for finding in doctor.examine(address):
        findings.append(finding)
        if not as_json:
            mark, advice = ("ok", "") if finding.ok else ("wrong", f"; {finding.do}")
            say(f"{mark:5}  {finding.check:9}  {finding.found}{advice}", flush=True)
    all_ok = all(finding.ok for finding in findings)
    if as_json:
        say_json({"ok": all_ok, "findings": [finding.as_json() for finding in findings]})
    return 0 if all_ok else 1


def _init(address: str | None, as_json: bool, arguments: dict[str, Any]) -> int:
    from regd.cli import registries

    registries.init(arguments["folder"], as_json)
    return 0


def _where(address: str | None, as_json: bool, arguments: dict[str, Any]) -> int:
    from regd.cli import registries

    registries.where(address, as_json)
    return 0


def _stop(address: str | None, as_json: bool, arguments: dict[str, Any]) -> int:
    from regd.cli import registries

    registries.stop(address, as_json)
    return 0


def _manual(address: str | None, as_json: bool, arguments: dict[str, Any]) -> int:
    from regd.cli import manual

    Output.write(manual.page(arguments["page"]))
    return 0


def _watch(address: str | None, as_json: bool, arguments: dict[str, Any]) -> int:
    from regd.cli import watch

    refusal = watch.watch(address, arguments.get("name"), arguments.get("meta"), as_json)
    return 0 if refusal is None else _refused(refusal, as_json)


def _history(address: str | None, as_json: bool, arguments: dict[str, Any]) -> int:
    from regd.cli import history

    since = arguments["since"]
    refusal = history.show(
        address,
        {"name": arguments["name"], "instance": arguments["instance"]},
        {} if since is None else dict([since]),
        follow=arguments["follow"],
        as_json=as_json,
    )
    return 0 if refusal is None else _refused(refusal, as_json)


def _wait(address: str | None, as_json: bool, arguments: dict[str, Any]) -> int:
    until = time.monotonic() + arguments["timeout"]
    for name in arguments["names"]:
        path = arguments["http"]
        reply = wait_for(address, name, until) if path is None else wait_for_http(address, name, path, until)
        if not reply["ok"]:
            return _refused(reply, as_json, f"{name}: ")
        endpoint = address_of(reply)
        if as_json:
            say_json(reply)
        elif path is None:
            say(f"{name} accepts connections at {endpoint}", flush=True)
        else:
            say(f"{name} answers at http://{endpoint}{path}", flush=True)
    return 0


def _env(address: str | None, as_json: bool, arguments: dict[str, Any]) -> int:
    """Print the variables of all services, or an error: an incomplete environment would be hard to notice."""
    import shlex

    instances: list[dict[str, Any]] = []
    with BlockingConnection(address) as connection:
        for name in arguments["names"]:
            reply = connection.ask("resolve", name=name)
            if not reply["ok"]:
                return _refused(reply, as_json)
            instances.append(reply)
        if not instances:
            reply = ask(connection, "list", {})
            if not reply["ok"]:
                return _refused(reply, as_json)
            ready = [entry for entry in reply["instances"] if entry["state"] == "ready"]
            instances = sorted(ready, key=lambda entry: (entry["name"], priority_of(entry)))
    variables, hidden = environment_variables(instances)
    for key, value in variables.items():
        if not value.isprintable():  # a line feed would start another variable
            raise ValueError(f"{key} is {value!r}")
    for name in hidden:
        complain(f"regctl: {visible(name)} is left out: another service has the same variables")
    if as_json:
        say_json(variables)
    else:
        for key, value in variables.items():
            say(f"{key}={shlex.quote(value) if arguments['format'] == 'shell' else value}")
    return 0


_HANDLERS: dict[str, Callable[[str | None, bool, dict[str, Any]], int]] = {
    "bridge": _bridge,
    "completion": _completion,
    "doctor": _doctor,
    "env": _env,
    "help": _help,
    "init": _init,
    "history": _history,
    "manual": _manual,
    "names": _names,
    "serve": _serve,
    "run": _run,
    "stop": _stop,
    "top": _top,
    "wait": _wait,
    "watch": _watch,
    "where": _where,
}


def _code(error: RegdError) -> str:
    """Return the daemon's error code, or a code of regctl if the error is not from the daemon."""
    if isinstance(error, Unavailable):
        return error.code or "unavailable"
    return error.code or ("bad_argument" if isinstance(error, BadArgument) else "refused")


def _refused(reply: Mapping[str, Any], as_json: bool, prefix: str = "") -> int:
    """Print why a request was refused, and return the exit status."""
    status, text = _STATUSES.get(reply["error"], REFUSED), visible(prefix + reply["message"])
    if as_json:
        say_json(dict(reply))
    else:
        complain(f"regctl: {text}")
    return status
