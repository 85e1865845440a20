"""`regctl init`, `where` and `stop`: project registries and their daemons."""

from __future__ import annotations

import os
import select
import signal
from collections.abc import Iterator
from typing import Any

import regd
from regd.cli.output import complain, say, say_json, visible
from regd.gateways.address_file import read_addresses
from regd_client import project, protocol
from regd_client.blocking_connection import BlockingConnection
from regd_client.errors import RegdError, Unavailable

_ANSWER_S = 2.0
_END_S = 10.0  # for the daemon to commit the remaining writes, and exit


def init(folder: str, as_json: bool) -> None:
    """Create a project registry in a folder.

    Raises:
        RegdError: it cannot be created.
    """
    try:
        made, set_aside = project.init(folder)
    except project.ProjectError as error:
        raise RegdError(str(error), "refused") from None
    if as_json:
        say_json({"ok": True, "project": made, "set_aside": set_aside})
        return
    say(f"{made} is the registry of all programs that are started in {os.path.dirname(made)} and below")
    if set_aside is not None:
        complain(f"regctl: {made} was not made here: its files are now in {visible(set_aside)}")
    if chosen := os.environ.get("REGD_ADDRESS"):
        complain(
            f"regctl: REGD_ADDRESS is {visible(chosen)}, and comes first: unset it to use the project registry"
        )


def where(address: str | None, as_json: bool) -> None:
    """Print which registry is used and why, and the registries that are not used.

    Raises:
        BadArgument: `address` or $REGD_ADDRESS is not an address.
    """
    at = protocol.find_address(address)
    search = project.search()
    source = _source(address, at)
    daemon, trouble = _daemon(at)
    serving = read_addresses(at.project) if at.project else []
    if as_json:
        say_json(
            {
                "ok": True,
                "address": str(at),
                "source": source,
                "project": at.project or None,
                "daemon": daemon,
                **({"serve": serving} if serving else {}),
                "version": regd.__version__,
                "ignored": [{**ignored._asdict(), "do": ignored.do} for ignored in search.ignored],
            }
        )
        return
    say(str(at))
    say(f"  why     {_REASONS[source].format(os.path.dirname(at.project))}")
    if daemon is not None:
        say(f"  daemon  regd {daemon['version']}, process {daemon['pid'] or 'unknown'}")
    elif trouble:
        say(f"  daemon  none: {trouble}")
    else:
        demand = "; it is started when a program needs it" if protocol.autostart_wanted(at) else ""
        say(f"  daemon  none answers{demand}")
    for url in serving:
        say(f"  serve   {url}")
    say(f"  regctl  {regd.__version__}")
    for line in _others(address, source, search):
        say(f"  not     {line}")


_REASONS = {
    "argument": "--address",
    "variable": "REGD_ADDRESS",
    "project": "the project registry of {}",
    "default": "the default",
}


def _source(address: str | None, at: protocol.Address) -> str:
    if address:
        return "argument"
    if os.environ.get("REGD_ADDRESS"):
        return "variable"
    return "project" if at.project else "default"


def _others(address: str | None, source: str, search: project.Search) -> Iterator[str]:
    """Yield a line for each registry that is not used, with the reason, in the order of precedence."""
    if source != "argument":
        yield "--address: it is not given"
    if source != "variable":
        chosen = os.environ.get("REGD_ADDRESS")
        yield (
            f"REGD_ADDRESS, which is {chosen}: --address comes first" if chosen else "REGD_ADDRESS: it is not set"
        )
    for ignored in search.ignored:
        yield f"{ignored.folder}: {ignored.why}; {ignored.do}"
    if source != "project":
        first = _REASONS.get(source)
        yield (
            f"{search.folder}: {first} comes first" if search.folder else "a project registry: there is none here"
        )
    if source != "default":
        yield f"{protocol.DEFAULT_ADDRESS}, the default"


def _daemon(at: protocol.Address) -> tuple[dict[str, Any] | None, str]:
    """Return the version and the process of the daemon at an address.

    Without a daemon, return None and what is wrong there; "" if nothing listens.
    """
    replies = []
    try:
        with BlockingConnection(at, _ANSWER_S, autostart=False) as connection:
            for cmd in ("hello", "stats"):
                replies.append(connection.ask(cmd))
                if not replies[-1]["ok"]:
                    raise protocol.refusal(replies[-1], at)
    except RegdError as error:
        return None, "" if _is_nobody(error) else str(error)
    hello, stats = replies
    return {"version": hello["version"], "pid": stats.get("pid")}, ""


def _is_nobody(error: RegdError) -> bool:
    return isinstance(error.__cause__, ConnectionRefusedError | FileNotFoundError)


def stop(address: str | None, as_json: bool) -> None:
    """Stop the daemon at a Unix socket.

    The process id comes from the kernel, since another program at the socket could state any process id.

    Raises:
        RegdError: the daemon cannot be stopped in this way.
    """
    at = protocol.find_address(address)
    if not at.path:
        raise RegdError(
            f"regctl stop works over Unix sockets only, not for {at}: end that regd with Ctrl-C in its terminal, "
            "with `systemctl --user stop regd`, or with `kill` and the number that `regctl where` shows",
            "unsupported",
        )
    try:
        connection = BlockingConnection(at, _ANSWER_S, autostart=False)
    except Unavailable as error:
        if _is_nobody(error):
            _say_stopped(at, None, as_json)
            return
        raise
    with connection:
        pid = _process(connection)
        try:
            process = os.pidfd_open(pid)
        except (AttributeError, OSError) as error:
            raise RegdError(
                f"process {pid} cannot be watched ({error}): end it with `kill {pid}`", "unsupported"
            ) from None
        try:
            connection.ask("ping")  # if the daemon answers, the process id still belongs to it
            signal.pidfd_send_signal(process, signal.SIGTERM)
            connection.close()  # the daemon waits for open connections
            _wait(process, pid)
        except PermissionError:
            raise RegdError(f"process {pid} is of another user, who must end it", "denied") from None
        finally:
            os.close(process)
    _say_stopped(at, pid, as_json)


def _process(connection: BlockingConnection) -> int:
    """Return the daemon's process id from the kernel.

    Raises:
        RegdError: the kernel does not know the process, or another process has opened the socket.
    """
    reply = connection.ask("stats")
    if not reply["ok"]:
        raise protocol.refusal(reply, connection.address)
    stated = reply.get("pid")
    pid = connection.peer_pid
    if pid is None:
        raise RegdError(
            "the kernel does not say which process this regd is: it runs in another container, or this is not "
            "Linux; end it where it was started",
            "unsupported",
        )
    if pid != stated:
        raise RegdError(
            f"process {pid} has opened the socket, not regd (process {stated}): end regd where it was started, "
            "such as with `systemctl --user stop regd.socket regd`",
            "unsupported",
        )
    return pid


def _wait(process: int, pid: int) -> None:
    poll = select.poll()
    poll.register(process, select.POLLIN)
    if not poll.poll(_END_S * 1_000):
        raise RegdError(f"regd, process {pid}, has not ended within {_END_S:g} s; see its log", "timeout")


def _say_stopped(at: protocol.Address, pid: int | None, as_json: bool) -> None:
    if as_json:
        say_json({"ok": True, "address": str(at), "pid": pid})
    else:
        say(f"regd at {at} has ended (process {pid})" if pid is not None else f"no regd runs at {at}")
