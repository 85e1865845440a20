"""`regctl doctor`: looks at the usual troubles, one after the other, and says what to do.

It changes nothing. What is beyond its reach, such as the files of a daemon in another container, it leaves alone
and says so. Must not know how findings are shown.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import regd
from regd.cli import local_probe
from regd_client import protocol
from regd_client.blocking_connection import BlockingConnection
from regd_client.errors import BadArgument, RegdError, Unavailable

ANSWER_S = 3.0  # a daemon answers within milliseconds
_NEAR = 0.8  # of a limit
_LAG_S = 0.5  # at the last beat; everybody waits that long
_SPARE_BYTES = 1_048_576
_SERVICES = 256  # are tried, within _TRY_S
_TRY_S = 3.0
_NAMED = 5
_GAUGES = {
    "registrations": ("registrations_max", "deregister what is not needed: `regctl list` shows all of them"),
    "registry_bytes": ("registry_bytes_max", "register less `meta`, or fewer instances"),
    "connections": ("connections_max", "let programs keep one connection each; raise `ulimit -n` of regd"),
    "readonly_connections": (
        "readonly_connections_max",
        "another user's programs connect too often; let them run a regd of their own, named in REGD_ADDRESS",
    ),
    "watches": ("watches_total_max", "let programs keep one watch, and end those that are not read"),
    "waiting": ("parked_total_max", "many programs wait for services that do not come: `regctl why NAME`"),
    "processes": ("processes_max", "register fewer instances with `pid`; `hold` needs none"),
}
_NOBODY = "regd-doctor"  # a name that nobody need have: with `if`, deregistering it changes nothing


class Finding(NamedTuple):
    """`do` is what to do, "" where nothing is wrong."""

    check: str
    found: str
    do: str = ""

    @property
    def ok(self) -> bool:
        return not self.do

    def as_json(self) -> dict[str, Any]:
        return {"check": self.check, "ok": self.ok, "found": self.found, "do": self.do}


class _Daemon:
    """A daemon that answers, and what it says of itself."""

    def __init__(self, connection: BlockingConnection, hello: Mapping[str, Any]) -> None:
        self.connection = connection
        self.hello = hello
        self.stats = connection.ask("stats")
        self.is_here = all(hello["host"].get(key) == own for key, own in protocol.own_host().items())
        self.pid: int = self.stats["pid"]
        self.is_in_another_network = self.is_here and local_probe.is_in_another_network(self.pid)

    def number(self, name: str) -> float:
        value = self.stats.get(name, 0)
        return value if isinstance(value, int | float) else 0


def examine(address: str | None) -> Iterator[Finding]:
    """Yield what is found, in order; without a daemon only what there is to say of addresses."""
    source = "--address" if address else "$REGD_ADDRESS" if os.environ.get("REGD_ADDRESS") else "the default"
    try:
        at = protocol.find_address(address)
    except BadArgument as error:
        yield Finding("address", f"{source}: {error}", "write it in one of these ways")
        return
    yield Finding("address", f"{at}, from {source}")
    with ExitStack() as stack:
        try:
            daemon, found = _reached(stack, at)
            yield found
            yield from _elsewhere(at, daemon)
            if daemon is not None:
                for check in _CHECKS:
                    yield from check(daemon)
        except (RegdError, LookupError, TypeError, AttributeError, ValueError) as error:
            yield Finding("daemon", f"its answers broke off: {error!r}", "look into the log of regd")


def _reached(stack: ExitStack, at: protocol.Address) -> tuple[_Daemon | None, Finding]:
    try:
        connection = stack.enter_context(BlockingConnection(str(at), ANSWER_S, autostart=False))
    except Unavailable as error:
        return None, _not_connected(at, error.__cause__)
    try:
        hello = connection.ask("hello")
    except Unavailable as error:
        if isinstance(error.__cause__, TimeoutError):
            found = f"something listens at {at} and does not answer within {ANSWER_S:g} s"
            return None, Finding(
                "daemon", found, f"see who it is: {local_probe.who(at)}; a regd that hangs: restart it"
            )
        return None, _other(at)
    if hello.get("server") == "regd":
        daemon = _Daemon(connection, hello)
        return daemon, Finding("daemon", f"regd {hello['version']} answers at {at}")
    if hello["ok"] is False and hello.get("error") in ("busy", "shutting_down"):
        found = f"the regd at {at} takes no connection: {hello.get('message')}"
        return None, Finding(
            "daemon", found, "try again in a moment; if it stays so, end what connects too often"
        )
    return None, _other(at)


def _not_connected(at: protocol.Address, why: BaseException | None) -> Finding:
    if isinstance(why, ConnectionRefusedError | FileNotFoundError):
        return Finding("daemon", f"nobody listens at {at}", "start one with `regd`, or name another address")
    if isinstance(why, TimeoutError):
        return Finding("daemon", f"{at} takes no connection within {ANSWER_S:g} s", "restart the regd there")
    if isinstance(why, PermissionError):
        return Finding("daemon", f"{at} is another user's", "ask that one, or start a regd of your own")
    reason = why.strerror if isinstance(why, OSError) and why.strerror else str(why)
    return Finding("daemon", f"{at} cannot be reached: {reason}", "name another address in REGD_ADDRESS")


def _other(at: protocol.Address) -> Finding:
    found = f"something that is no regd listens at {at}"
    return Finding(
        "daemon", found, f"see who it is: {local_probe.who(at)}; or name another address in REGD_ADDRESS"
    )


def _elsewhere(at: protocol.Address, daemon: _Daemon | None) -> Iterator[Finding]:
    """Look for another daemon: two that are taken for one are found out late."""
    epoch = None if daemon is None else daemon.hello["epoch"]
    seen: set[object] = set() if daemon is None else {daemon.pid}
    others: dict[Any, tuple[protocol.Address, Any]] = {}
    for each in local_probe.addresses(at):
        try:
            with BlockingConnection(str(each), ANSWER_S / 10, autostart=False) as connection:
                hello, stats = connection.ask("hello"), connection.ask("stats")
        except RegdError:
            continue
        if hello.get("server") == "regd" and hello.get("epoch") != epoch:
            others.setdefault(hello.get("epoch"), (each, stats.get("registry")))
            seen.add(stats.get("pid"))
    for other, (each, registry) in others.items():
        found = f"{'another' if epoch else 'a'} regd answers at {each}: registry {registry}, epoch {other}"
        use = f"set REGD_ADDRESS={each} everywhere"
        yield Finding("elsewhere", found, f"end one of the two, or {use}" if epoch else use)
    beyond = [
        pid for pid, _ in local_probe.daemons() if pid not in seen and local_probe.is_in_another_network(pid)
    ]
    for pid in beyond:
        found = f"process {pid} is a regd in another network namespace: its 127.0.0.1 is not the one of this side"
        do = "start that regd with --unix PATH and set REGD_ADDRESS=unix://PATH, or start a regd on this side too"
        yield Finding("elsewhere", found, "" if epoch else do)
    if not others and not beyond:
        yield Finding("elsewhere", "no other regd is seen")


def _rights(daemon: _Daemon) -> Iterator[Finding]:
    reply = daemon.connection.ask("deregister", **{"name": _NOBODY, "if": 0})
    if reply.get("error") == "denied":
        do = "run a regd of your own (--port off --unix PATH) and set REGD_ADDRESS=unix://PATH; "
        do += f"or have that one started with --allow-uid {os.geteuid()}"
        yield Finding("rights", "this user may only read", do)
    else:
        yield Finding("rights", "this user may read and write")


def _versions(daemon: _Daemon) -> Iterator[Finding]:
    theirs, ours = daemon.hello["version"], regd.__version__
    if theirs != ours:
        do = "install the same version, and restart the daemon"
        yield Finding("version", f"the daemon is {theirs}, this is {ours}", do)
    else:
        yield Finding("version", f"daemon and regctl are {ours}")


def _host(daemon: _Daemon) -> Iterator[Finding]:
    if daemon.is_in_another_network:
        found = (
            f"the daemon, process {daemon.pid}, is in another network namespace: its 127.0.0.1 is not this one"
        )
        yield Finding("host", found, "start a regd on this side too, for what listens on loopback here")
    elif daemon.is_here:
        yield Finding("host", "the daemon shares boot and process numbers")
    else:
        do = "start a regd on this side too; or register with `hold` or `ttl` there, and no `pid`"
        yield Finding("host", "the daemon runs in another container or on another machine", do)


def _file(daemon: _Daemon) -> Iterator[Finding]:
    path = Path(daemon.stats["registry"])
    if not daemon.is_here:
        yield Finding("file", f"{path} is not on this side")
        return
    try:
        yield from _room(path, daemon)
        yield _content(path, daemon)
    except PermissionError:
        yield Finding("file", f"{path} is another user's, and not for this one to see")
    except FileNotFoundError:
        if path.parent.is_dir():
            yield Finding("file", f"{path} is not written yet, as nothing was registered")
        else:
            do = "make the folder again, as the user that regd runs as: no change is taken before"
            yield Finding("file", f"the folder {path.parent} is gone", do)


def _room(path: Path, daemon: _Daemon) -> Iterator[Finding]:
    """Where it cannot be written. Of a daemon of another user only the room is known."""
    disk = os.statvfs(path.parent)
    size = path.stat().st_size if path.exists() else 0
    if disk.f_bavail * disk.f_frsize < 2 * size + _SPARE_BYTES or (disk.f_files and not disk.f_favail):
        yield Finding(
            "file", f"the disk of {path.parent} is full", "make room: the file is written anew each time"
        )
    if disk.f_flag & os.ST_RDONLY or not (
        os.access(path.parent, os.W_OK) or not local_probe.is_ours(daemon.stats["pid"])
    ):
        yield Finding("file", f"{path.parent} cannot be written", "give it back to the user that regd runs as")


def _content(path: Path, daemon: _Daemon) -> Finding:
    before = daemon.number("rev")
    if not path.exists() and before > 0 and path.parent.is_dir():
        return Finding("file", f"{path} is gone", "change any registration: it is written again then")
    rev = local_probe.revision(path)
    if rev is None and daemon.number("commits") == 0:
        return Finding("file", f"{path} was written by hand; regd writes its own with the next change")
    if rev is None or rev < before:
        do = "make the disk writable: regd writes it with the next change; its log says what was in the way"
        return Finding("file", f"{path} is behind what is registered: revision {rev} and not {before:g}", do)
    return Finding("file", f"{path} is written, at revision {rev}")


def _limits(daemon: _Daemon) -> Iterator[Finding]:
    limits, near = daemon.stats["limits"], False
    for gauge, (limit, do) in _GAUGES.items():
        used, most = daemon.number(gauge), limits.get(limit, 0)
        if most and used >= _NEAR * most:
            near = True
            yield Finding("limits", f"{gauge} {used:,g} of {most:,g}", do)
    if not near:
        yield Finding("limits", f"all are below {_NEAR:.0%}")


def _lag(daemon: _Daemon) -> Iterator[Finding]:
    lag_s, most_s, slowest = daemon.number("lag_s"), daemon.number("lag_max_s"), daemon.stats.get("slowest")
    found = f"the event loop was {lag_s:.3f} s late, at most {most_s:.3f} s since it began"
    if lag_s < _LAG_S:
        yield Finding("lag", found)
        return
    if slowest:
        found += (
            f"; longest it was held by {slowest['what']}, {slowest['took_s']:.3f} s, {slowest['age_s']:.0f} s ago"
        )
    yield Finding("lag", found, "see what keeps the machine busy (`top`); if nothing does, it is a bug in regd")


def _services(daemon: _Daemon) -> Iterator[Finding]:
    if not daemon.is_here or daemon.is_in_another_network:
        yield Finding("services", "not tried: their loopback is not on this side")
        return
    instances = daemon.connection.ask("list", limit=1_000)["instances"]
    ready = [each for each in instances if each["state"] == "ready" and local_probe.is_loopback(each["host"])]
    until = time.monotonic() + _TRY_S
    tried, silent = 0, []
    for each in ready[:_SERVICES]:
        if time.monotonic() > until:
            break
        tried += 1
        if not local_probe.accepts(each["host"], each["port"]):
            silent.append(f"{each['name']} ({protocol.host_port(each['host'], each['port'])})")
    if silent:
        more = f" and {len(silent) - _NAMED} more" if len(silent) > _NAMED else ""
        found = f"{len(silent)} of {tried} accept no connection: {', '.join(silent[:_NAMED])}{more}"
        yield Finding(
            "services", found, "start them, or `regctl deregister NAME`; `regctl why NAME` says whose it is"
        )
    else:
        yield Finding("services", f"all of {tried} that were tried accept connections")


_CHECKS = (_rights, _versions, _host, _file, _limits, _lag, _services)
