"""`regctl bridge`: start a bridge, or show the state of the one that runs."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from regd.cli.output import EMPTY, complain, instance_name, say, say_json, table, visible
from regd_client.blocking_connection import BlockingConnection
from regd_client.errors import Unavailable

_ANSWER_S = 3.0  # for the status
_STATUS_BYTES_MAX = 16 * 1_048_576
_SHOWN_MAX = 20  # instances that are not published
_EXCEPTIONS = {
    "refused": "refused by the daemon, see the log",
    "shadowed": "with the name of a local instance, which wins",
    "ignored": "keys in etcd ignored, see the log",
}


class CannotStart(Exception):
    """The bridge cannot start. `is_usage`: because of an option, or a missing extra."""

    def __init__(self, message: str, *, is_usage: bool) -> None:
        super().__init__(message)
        self.is_usage = is_usage


def run(address: str | None, arguments: Mapping[str, Any]) -> None:
    """Run a bridge until SIGTERM or Ctrl-C.

    Raises:
        CannotStart: an option is wrong, the extra is missing, or another bridge is in the way.
    """
    try:
        from regd.bridge.bridge import BridgeError, bridge
    except ModuleNotFoundError as error:
        message = f"regctl bridge needs the extra `etcd`, and {error.name} is missing: pip install 'regd[etcd]'"
        raise CannotStart(message, is_usage=True) from None
    from regd.cli.log_output import LogOutput

    options = _options(address, arguments)
    log = LogOutput(None, "text")
    log.start("info")
    try:
        bridge(options, lambda line: say(line, flush=True))
    except BridgeError as error:
        raise CannotStart(str(error), is_usage=False) from None
    finally:
        log.close()


def _options(address: str | None, arguments: Mapping[str, Any]) -> Any:
    """Return the options of the bridge, checked.

    Raises:
        CannotStart: one is invalid.
    """
    from regd.bridge import records
    from regd.bridge.bridge import Options
    from regd.bridge.etcd.model import Tls
    from regd.core.errors import Invalid

    machine = _host_name() if arguments["machine"] is None else arguments["machine"]
    checks: dict[str, tuple[Callable[[str], Any], str | None]] = {
        "--machine": (records.check_machine, machine),
        "--prefix": (records.check_prefix, arguments["prefix"]),
        "--advertise": (records.check_advertise, arguments["advertise"]),
    }
    for option, (check, value) in checks.items():
        try:
            if value is not None:
                check(value)
        except Invalid as error:
            message = f"{option} {value!r} {error}"
            if option == "--machine" and arguments["machine"] is None:
                message += "; the host name is no such name: choose one with --machine"
            raise CannotStart(message, is_usage=True) from None
    files = [_readable(option, arguments[option.strip("-")]) for option in ("--cacert", "--cert", "--key")]
    return Options(
        endpoints=arguments["etcd"],
        machine=machine,
        advertise=arguments["advertise"],
        prefix=arguments["prefix"],
        address=address,
        tls=Tls(*files) if any(files) else None,
        user=_user(arguments),
        stale_s=arguments["stale_s"],
        compare_s=arguments["compare_s"],
    )


def _host_name() -> str:
    return socket.gethostname().partition(".")[0].lower()


def _readable(option: str, name: str | None) -> Path | None:
    """Return the path of a file, which can be read now. The client of etcd reads it for each connection."""
    if name is None:
        return None
    try:
        Path(name).read_text()
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not text"
        raise CannotStart(f"cannot read {name}: {why}; name another file with {option}", is_usage=False) from None
    return Path(name)


def _user(arguments: Mapping[str, Any]) -> Any:
    from regd.bridge.etcd.model import User

    file = _readable("--password-file", arguments["password_file"])
    if file is None:
        return None
    if not file.read_text().partition("\n")[0].rstrip("\r"):
        raise CannotStart(f"the first line of {file} is empty; write the password there", is_usage=False)
    return User(arguments["user"], file)


# The status.


def status(address: str | None, as_json: bool) -> int:
    """Print the state of the bridge that serves the daemon, and return the exit status."""
    from regd.cli.commands import NOT_FOUND

    with BlockingConnection(address) as connection:
        fields = fetch_status(connection)
    if fields is None:
        message = "no bridge is registered with this daemon; start one with `regctl bridge --etcd HOST:PORT`"
        if as_json:
            say_json({"ok": False, "error": "not_found", "message": message})
        else:
            complain(f"regctl: {message}")
        return NOT_FOUND
    if as_json:
        say_json({"ok": True, **fields})
    else:
        for line in list(_lines(fields)):
            say(line)
    return 0


def fetch_status(connection: BlockingConnection) -> dict[str, Any] | None:
    """Return the status of the bridge that is registered with a daemon; None if there is none.

    Raises:
        Unavailable: it does not answer, or is another program.
    """
    import http.client
    import json

    reply = connection.ask("resolve", name="regd.bridge", instance="")
    if not reply["ok"]:
        return None
    peer = http.client.HTTPConnection(reply["host"], reply["port"], timeout=_ANSWER_S)
    try:
        peer.request("GET", "/status")
        response = peer.getresponse()
        body = response.read(_STATUS_BYTES_MAX)
        if response.status != 200:
            raise ValueError(body.decode(errors="replace").strip()[:200])
        fields = json.loads(body)
        if type(fields) is not dict:
            raise ValueError("its status is no object")
        return fields
    except (OSError, ValueError, http.client.HTTPException, RecursionError) as error:
        raise Unavailable(f"the bridge at port {reply['port']} does not tell its status: {error}") from None
    finally:
        peer.close()


def silence(etcd: Mapping[str, Any]) -> str:
    """Return since when etcd does not answer, and why."""
    why = f": {visible(etcd['failure'])}" if etcd["failure"] else ""
    return f"etcd has not answered for {etcd['silent_s']:.0f} s{why}"


def _lines(fields: Mapping[str, Any]) -> Iterator[str]:
    etcd, daemon, foreign, lag = (fields[name] for name in ("etcd", "daemon", "foreign", "lag"))
    yield f"machine {fields['machine']}, prefix {fields['prefix']}, address {fields['advertise'] or EMPTY}"
    if etcd["connected"]:
        yield f"etcd at {etcd['member']}, lease {etcd['lease'] or EMPTY}, {etcd['lease_remaining_s']:.0f} s left"
    elif etcd["failure"] or not etcd["refuses"]:
        yield silence(etcd)
    for refusal in etcd["refuses"]:
        yield f"etcd refuses {refusal}"
    if daemon["connected"]:
        yield f"daemon at {daemon['address']}, revision {daemon['rev']}"
    else:
        yield f"the daemon at {daemon['address']} has been away for {daemon['stale_s']:.0f} s"
    yield f"published {fields['published']}, not published {fields['not_published_count']}"
    for entry in fields["not_published"][:_SHOWN_MAX]:
        yield f"  {instance_name(entry['name'], entry['instance'])}: {entry['why']}"
    if fields["not_published_count"] > _SHOWN_MAX:
        yield f"  and {fields['not_published_count'] - _SHOWN_MAX} more: see `regctl bridge --status --json`"
    stale = f", as of {foreign['stale_s']:.0f} s ago" if foreign["stale_s"] else ""
    yield f"from other machines {foreign['count']}{stale}"
    for what, explanation in _EXCEPTIONS.items():
        if foreign[what]:
            yield f"  {foreign[what]} {explanation}"
    yield f"lag: publish {lag['publish_s']:.3f} s, register {lag['register_s']:.3f} s"
    yield f"differences repaired {fields['counts']['differences']}"
    rows: list[tuple[str, ...]] = [
        (visible(peer["machine"]), visible(peer["host"]) or EMPTY, str(peer["instances"]))
        for peer in fields["peers"]
    ]
    if rows:
        yield from table(("MACHINE", "HOST", "INSTANCES"), rows, "")
