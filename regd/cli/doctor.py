"""`regctl doctor`: checks for common problems and says what to do. It changes nothing.

It reports as not checked what it cannot see, such as the files of a daemon in another container.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import regd
from regd.cli import bridge, doctor_files, local_probe
from regd.cli.findings import Finding
from regd_client import project, protocol
from regd_client.blocking_connection import BlockingConnection
from regd_client.errors import BadArgument, RegdError, Unavailable

ANSWER_S = 3.0  # the timeout of a request; a daemon answers within milliseconds
_NEAR = 0.8  # use of a limit is reported from this part of the limit
_LAG_S = 0.5  # a lag of the event loop is reported from this time
_SERVICES_MAX = 256  # services to connect to, within _TRY_S
_TRY_S = 3.0
_SHOWN_MAX = 5  # services named in a finding
_GAUGES = {
    "registrations": ("registrations_max", "deregister services that are not needed: `regctl list` shows all"),
    "registry_bytes": ("registry_bytes_max", "register less `meta`, or fewer instances"),
    "connections": ("connections_max", "have each program keep one connection; raise `ulimit -n` of regd"),
    "readonly_connections": (
        "readonly_connections_max",
        "programs of another user have too many connections; run a regd for them, and set their REGD_ADDRESS",
    ),
    "watches": ("watches_total_max", "have each program keep one watch, and end watches that are not read"),
    "waiting": ("parked_total_max", "many programs wait for services that do not start: see `regctl why NAME`"),
    "processes": ("processes_max", "register fewer instances with `pid`; `hold` needs none"),
}
_UNUSED_NAME = "regd-doctor"  # for a `deregister` that changes nothing, even if the name exists


class _Daemon:
    """A connection to a daemon, and its replies to `hello` and `stats`."""

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
    """Yield the findings in order. Without a daemon, yield only the findings about addresses."""
    source = "--address" if address else "$REGD_ADDRESS" if os.environ.get("REGD_ADDRESS") else "the default"
    try:
        at = protocol.find_address(address)
    except BadArgument as error:
        yield Finding("address", f"{source}: {error}", "write it in one of these forms")
        return
    ignored_folders = () if source.startswith(("-", "$")) else project.search().ignored
    if at.project:
        source = f"the project registry of {os.path.dirname(at.project)}"
    yield Finding("address", f"{at}, from {source}")
    for ignored in ignored_folders:
        yield Finding("project", f"{ignored.folder} is ignored: {ignored.why}", ignored.do)
    with ExitStack() as stack:
        try:
            daemon, finding = _reach(stack, at)
            yield finding
            yield from _other_daemons(at, daemon)
            if daemon is not None:
                for check in _CHECKS:
                    yield from check(daemon)
        except (RegdError, LookupError, TypeError, AttributeError, ValueError) as error:
            yield Finding("daemon", f"its replies are incomplete: {error!r}", "see the log of regd")


def _reach(stack: ExitStack, at: protocol.Address) -> tuple[_Daemon | None, Finding]:
    try:
        connection = stack.enter_context(BlockingConnection(at, ANSWER_S, autostart=False))
    except Unavailable as error:
        return None, _not_connected(at, error.__cause__)
    try:
        hello = connection.ask("hello")
    except Unavailable as error:
        if isinstance(error.__cause__, TimeoutError):
            text = f"something listens at {at} and does not answer within {ANSWER_S:g} s"
            return None, Finding(
                "daemon", text, f"see which program it is: {local_probe.who(at)}; if it is regd, restart it"
            )
        return None, _not_regd(at)
    if hello.get("server") == "regd":
        daemon = _Daemon(connection, hello)
        return daemon, Finding("daemon", f"regd {hello['version']} answers at {at}")
    if hello["ok"] is False and hello.get("error") in ("busy", "shutting_down"):
        text = f"the regd at {at} accepts no connection: {hello.get('message')}"
        return None, Finding(
            "daemon",
            text,
            "try again in a moment; if that does not help, end programs with too many connections",
        )
    return None, _not_regd(at)


def _not_connected(at: protocol.Address, why: BaseException | None) -> Finding:
    if isinstance(why, ConnectionRefusedError | FileNotFoundError):
        if at.project and protocol.autostart_wanted(at):
            return Finding("daemon", f"none runs at {at}; it is started when a program needs it")
        return Finding("daemon", f"no program listens at {at}", "start one with `regd`, or name another address")
    if isinstance(why, TimeoutError):
        return Finding("daemon", f"{at} accepts no connection within {ANSWER_S:g} s", "restart the regd there")
    if isinstance(why, PermissionError):
        return Finding("daemon", f"{at} belongs to another user", "ask that user, or start a regd of your own")
    reason = why.strerror if isinstance(why, OSError) and why.strerror else str(why)
    return Finding("daemon", f"{at} cannot be reached: {reason}", "name another address in REGD_ADDRESS")


def _not_regd(at: protocol.Address) -> Finding:
    text = f"a program other than regd listens at {at}"
    return Finding(
        "daemon",
        text,
        f"see which program it is: {local_probe.who(at)}; or name another address in REGD_ADDRESS",
    )


def _other_daemons(at: protocol.Address, daemon: _Daemon | None) -> Iterator[Finding]:
    """Look for other daemons, because a service registered with one daemon is missing in the other."""
    epoch = None if daemon is None else daemon.hello["epoch"]
    seen: set[object] = set() if daemon is None else {daemon.pid}
    others: dict[Any, tuple[protocol.Address, Any]] = {}
    for address in local_probe.addresses(at):
        try:
            with BlockingConnection(str(address), ANSWER_S / 10, autostart=False) as connection:
                hello, stats = connection.ask("hello"), connection.ask("stats")
        except RegdError:
            continue
        if hello.get("server") == "regd" and hello.get("epoch") != epoch:
            others.setdefault(hello.get("epoch"), (address, stats.get("registry")))
            seen.add(stats.get("pid"))
    for other, (address, registry) in others.items():
        text = f"{'another' if epoch else 'a'} regd answers at {address}: registry {registry}, epoch {other}"
        use = f"set REGD_ADDRESS={address} everywhere"
        if at.project:  # several project registries on one machine are no problem
            use = ""
        elif epoch:
            use = f"end one of the two, or {use}"
        yield Finding("elsewhere", text, use)
    beyond = [
        pid for pid, _ in local_probe.daemons() if pid not in seen and local_probe.is_in_another_network(pid)
    ]
    for pid in beyond:
        text = f"process {pid} is a regd in another network namespace: its 127.0.0.1 is not the one here"
        do = "start that regd with --unix PATH and set REGD_ADDRESS=unix://PATH, or start another regd here"
        yield Finding("elsewhere", text, "" if epoch or at.project else do)
    if not others and not beyond:
        yield Finding("elsewhere", "no other regd found")


def _rights(daemon: _Daemon) -> Iterator[Finding]:
    reply = daemon.connection.ask("deregister", **{"name": _UNUSED_NAME, "if": 0})
    if reply.get("error") == "denied":
        do = "run a regd of your own (--port off --unix PATH) and set REGD_ADDRESS=unix://PATH; "
        do += f"or start that one with --allow-uid {os.geteuid()}"
        yield Finding("rights", "this user has read access only", do)
    else:
        yield Finding("rights", "this user has read and write access")


def _versions(daemon: _Daemon) -> Iterator[Finding]:
    theirs, ours = daemon.hello["version"], regd.__version__
    if theirs != ours:
        do = "install the same version of both, and restart the daemon"
        yield Finding("version", f"the daemon has version {theirs}, regctl {ours}", do)
    else:
        yield Finding("version", f"daemon and regctl have version {ours}")


def _same_host(daemon: _Daemon) -> Iterator[Finding]:
    if daemon.is_in_another_network:
        text = f"the daemon, process {daemon.pid}, is in another network namespace, with its own 127.0.0.1"
        yield Finding(
            "host", text, "start another regd here, for services that listen on the loopback interface here"
        )
    elif daemon.is_here:
        yield Finding("host", "the daemon runs on this machine, with the same process ids")
    else:
        do = "start another regd here; or register with `hold` or `ttl` instead of `pid`"
        yield Finding("host", "the daemon runs in another container or on another machine", do)


def _files(daemon: _Daemon) -> Iterator[Finding]:
    path = Path(daemon.stats["registry"])
    if not daemon.is_here:
        yield Finding("file", f"not checked: {path} is not in this container")
    else:
        is_ours = local_probe.is_ours(daemon.pid)
        yield from doctor_files.examine(path, lambda: daemon.connection.ask("stats")["rev"], is_ours=is_ours)


def _limits(daemon: _Daemon) -> Iterator[Finding]:
    limits, near = daemon.stats["limits"], False
    for gauge, (limit, do) in _GAUGES.items():
        used, most = daemon.number(gauge), limits.get(limit, 0)
        if most and used >= _NEAR * most:
            near = True
            yield Finding("limits", f"{gauge} {used:,g} of {most:,g}", do)
    if not near:
        yield Finding("limits", f"all are used below {_NEAR:.0%}")


def _lag(daemon: _Daemon) -> Iterator[Finding]:
    lag_s, most_s, slowest = daemon.number("lag_s"), daemon.number("lag_max_s"), daemon.stats.get("slowest")
    text = f"the event loop was {lag_s:.3f} s late, at most {most_s:.3f} s since the daemon started"
    if lag_s < _LAG_S:
        yield Finding("lag", text)
        return
    if slowest:
        text += (
            f"; the slowest call was {slowest['what']}, {slowest['took_s']:.3f} s, {slowest['age_s']:.0f} s ago"
        )
    yield Finding(
        "lag", text, "see which program keeps the machine busy (`top`); if none does, it is a bug in regd"
    )


def _services(daemon: _Daemon) -> Iterator[Finding]:
    if not daemon.is_here or daemon.is_in_another_network:
        yield Finding("services", "not checked: their loopback interface is not the one here")
        return
    instances = daemon.connection.ask("list", limit=1_000)["instances"]
    ready = [entry for entry in instances if entry["state"] == "ready" and local_probe.is_loopback(entry["host"])]
    until = time.monotonic() + _TRY_S
    tried, silent = 0, []
    for entry in ready[:_SERVICES_MAX]:
        if time.monotonic() > until:
            break
        tried += 1
        if not local_probe.accepts(entry["host"], entry["port"]):
            silent.append(f"{entry['name']} ({protocol.host_port(entry['host'], entry['port'])})")
    if silent:
        more = f" and {len(silent) - _SHOWN_MAX} more" if len(silent) > _SHOWN_MAX else ""
        text = f"{len(silent)} of {tried} services accept no connection: {', '.join(silent[:_SHOWN_MAX])}{more}"
        yield Finding(
            "services", text, "start them, or `regctl deregister NAME`; `regctl why NAME` shows the owner"
        )
    else:
        yield Finding("services", f"all {tried} services tried accept connections")


def _bridge(daemon: _Daemon) -> Iterator[Finding]:
    """Check the bridge to other machines, if there is one."""
    if not daemon.is_here or daemon.is_in_another_network:
        return
    try:
        status = bridge.fetch_status(daemon.connection)
    except Unavailable as error:
        yield Finding("bridge", str(error), "see the log of `regctl bridge`, and restart it")
        return
    if status is None:
        return
    etcd, differences = status["etcd"], status["counts"]["differences"]
    if etcd["refuses"]:
        yield Finding(
            "bridge", f"etcd refuses {etcd['refuses'][0]}", "change the user, its roles or the certificates"
        )
    elif not etcd["connected"]:
        do = "start etcd, or correct --etcd and the options for TLS"
        yield Finding("bridge", bridge.silence(etcd), do)
    elif differences:
        do = "this is a bug in regd; please report the lines with `differences` in the log of `regctl bridge`"
        yield Finding("bridge", f"it found {differences} differences, and repaired them", do)
    else:
        text = f"machine {status['machine']}: {status['published']} published, "
        text += f"{status['foreign']['count']} from {status['peers_count']} other machines"
        if status["not_published_count"]:
            text += f"; {status['not_published_count']} not published, see `regctl bridge --status`"
        yield Finding("bridge", text)


_CHECKS = (_rights, _versions, _same_host, _files, _limits, _lag, _services, _bridge)
