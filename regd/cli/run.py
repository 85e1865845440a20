"""`regctl run`: run a command, and register it from when it accepts connections until it exits.

The main thread forwards signals and waits for the command; the client registers the name in a background thread.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import functools
import json
import logging
import os
import re
import signal
import socket
import sys
import time
from collections.abc import Callable, Collection, Mapping
from typing import Any

from regd.cli.child import NotRun, awaited_signals, exit_status, start, wait_and_forward
from regd.cli.command_port import RUN_PORT, port_in, reserved_port
from regd.cli.commands import NO_DAEMON, NOT_FOUND, REFUSED, USAGE
from regd.cli.output import complain, environment_variables, visible
from regd.cli.port_owner import is_of, listener
from regd.cli.queries import wait_for
from regd.cli.run_readiness import Probe, command_probe, http_probe, until_ready
from regd_client.arguments import AUTO, RegistrationRequest
from regd_client.blocking import client_thread
from regd_client.blocking_connection import BlockingConnection
from regd_client.errors import RegdError, Unavailable
from regd_client.lifespans import ServiceLifecycle
from regd_client.ports import LastPorts
from regd_client.protocol import host_port
from regd_client.registration import Registration

_PROBE_PAUSE_S = (0.01, 0.2)  # the first and the longest pause between two probes of the port
_PROBE_S = 1.0  # the timeout of a probe
_SILENT_S = 10.0  # without a listener for this time, print a warning
_HISTORY_S = 1.0  # the timeout of each request for the last port of the service
_DEREGISTER_S = 3.0  # the longest wait until the name is deregistered

Report = Callable[..., None]  # called with the name of an event, its text, and more fields for JSON


def _report(as_json: bool, event: str, text: str, **fields: object) -> None:
    """Report an event on stderr, since stdout belongs to the command."""
    if as_json:
        complain(json.dumps({"event": event, **fields, "message": text}))
    else:
        complain(f"regctl: {visible(text)}")


def run(address: str | None, as_json: bool, arguments: Mapping[str, Any]) -> int:
    """Run the command and return its exit status. If a signal ends the command, regctl ends by it too."""
    report = functools.partial(_report, as_json)
    try:
        port = port_in(os.environ) if arguments["port"] is None else arguments["port"]
        environment = _environment(address, arguments)
        if port in (None, AUTO):
            port, last = None, _last_ports(arguments["name"], arguments["instance"])
        else:
            last = []
        with reserved_port(port, last, arguments["socket"]) as (number, reserved):
            environment["PORT"] = environment[RUN_PORT] = str(number)
            return _run(arguments, report, environment, reserved)
    except NotRun as failure:
        report("refused", str(failure), error=failure.error)
        return failure.status


# Before the command starts.


def _environment(address: str | None, arguments: Mapping[str, Any]) -> dict[str, str]:
    """Wait for the services of --wait, and return their addresses as environment variables."""
    if address is not None:
        os.environ["REGD_ADDRESS"] = address  # for the client and for the command
    _check(arguments)
    until = time.monotonic() + arguments["timeout"]
    instances = []
    for name in arguments["wait"]:
        try:
            reply = wait_for(None, name, until)
        except RegdError as error:
            raise NotRun(NO_DAEMON, "unavailable", str(error)) from None
        if not reply["ok"]:
            status = {"bad_argument": USAGE, "timeout": NOT_FOUND}.get(reply["error"], REFUSED)
            raise NotRun(status, reply["error"], f"{name}: {reply['message']}")
        instances.append(reply)
    return environment_variables(instances)[0]


def _check(arguments: Mapping[str, Any]) -> None:
    """Let the daemon check name, instance and labels before the command starts. Without a daemon, do nothing."""
    checked = {key: arguments[key] for key in ("name", "instance", "meta") if arguments[key] is not None}
    try:
        with BlockingConnection() as connection:
            reply = connection.ask("resolve", **checked)
    except Unavailable:
        return
    except RegdError as error:
        raise NotRun(USAGE, "bad_argument", str(error)) from None
    if reply.get("error") == "bad_argument":
        raise NotRun(USAGE, "bad_argument", reply["message"])


def _last_ports(name: str, instance: str | None) -> list[int]:
    """Return the ports that the service had last; [] without a daemon, or if the daemon keeps no history."""
    last = LastPorts(name, instance)
    try:
        with BlockingConnection(timeout_s=_HISTORY_S) as connection:
            while last.request is not None:
                command, query = last.request
                reply = connection.ask(command, **query)
                if not reply["ok"]:
                    break
                last.add(reply)
    except RegdError:
        return []
    return last.ports


# While the command runs.


def _run(
    arguments: Mapping[str, Any], report: Report, environment: dict[str, str], reserved: socket.socket | None
) -> int:
    log = logging.getLogger("regd_client")
    log.addHandler(_ClientMessages(report))
    log.setLevel(logging.INFO)
    awaited = awaited_signals()
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, awaited)  # before the client starts its thread
    try:
        listening = reserved if arguments["socket"] else None
        child = start(arguments["argv"], environment, listening, arguments["name"], mask)
        if listening is not None:
            listening.close()  # the command has inherited it
        name = _Name(arguments, report, child, int(environment["PORT"]), _prober(arguments, environment, mask))
        name.begin(accepts=listening is not None)
        try:
            status = wait_and_forward(child, awaited, name, functools.partial(report, "refused"))
        finally:
            name.withdraw()
            name.is_gone(_DEREGISTER_S)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    return exit_status(status)


def _prober(
    arguments: Mapping[str, Any], environment: Mapping[str, str], mask: Collection[int]
) -> Callable[[str, int], Probe] | None:
    """Return a function that makes the readiness probe; None if the command is ready once it accepts."""
    path, command = arguments["ready_http"], arguments["ready_command"]
    if path is not None:
        return lambda host, port: http_probe(host, port, path)
    if command is not None:
        return lambda host, port: command_probe(command, environment, mask)
    return None


class _Name:
    """The command's registration, which the client keeps in its background thread.

    `prober` makes a probe for the command at a host and port. Without `prober`, the command is ready once it
    accepts connections.
    """

    def __init__(
        self,
        arguments: Mapping[str, Any],
        report: Report,
        child: int,
        port: int,
        prober: Callable[[str, int], Probe] | None = None,
    ) -> None:
        self._name = arguments["name"]
        self._report = functools.partial(report, name=self._name)
        self._child = child
        self._port = port
        self._prober = prober
        self._argv = arguments.get("argv", ())
        passed_on = ("instance", "meta", "priority")
        self._arguments = {key: arguments[key] for key in passed_on if arguments.get(key) is not None}
        self._thread = client_thread()
        self._withdrawn = asyncio.Event()
        self._task: concurrent.futures.Future[None]

    def begin(self, accepts: bool) -> None:
        """Register the name as soon as the command accepts connections, or at once with `accepts`."""
        self._task = self._thread.begin(self._keep(accepts))

    def withdraw(self) -> bool:
        """Start to deregister the name. Return False if that was already started."""
        first = not self._withdrawn.is_set()
        self._thread.call_function(self._withdrawn.set)
        return first

    def is_gone(self, within_s: float = 0.0) -> bool:
        with contextlib.suppress(TimeoutError):
            self._task.result(within_s)
        return self._task.done()

    async def _keep(self, accepts: bool) -> None:
        """Register the name, and deregister it after `withdraw`."""
        withdrawn = asyncio.ensure_future(self._withdrawn.wait())
        registered = asyncio.ensure_future(self._stay_registered(accepts, withdrawn))
        try:
            await asyncio.wait((withdrawn, registered), return_when=asyncio.FIRST_COMPLETED)
        finally:
            withdrawn.cancel()
            registered.cancel()
            await asyncio.wait((registered,))

    async def _stay_registered(self, accepts: bool, withdrawn: asyncio.Future[Any]) -> None:
        """Wait until the command accepts connections, register it, and stay registered until `withdrawn`."""
        host = "127.0.0.1" if accepts else await self._accepting_host()
        request = RegistrationRequest(self._name, None, **self._arguments, pid=_bound_to(self._child))
        ready = (
            None if self._prober is None else functools.partial(self._until_ready, self._prober(host, self._port))
        )
        async with ServiceLifecycle(request, drain_s=0.0, ready=ready) as service:
            service.logs_success = False
            service.opened(host, self._port)
            with contextlib.suppress(RegdError):  # the client has logged it
                registration = await service.registration()
                self._report_registered(registration, is_starting=ready is not None)
                reporting = asyncio.ensure_future(self._report_ready(service, ready))
                try:
                    await registration.lost.wait()
                finally:
                    reporting.cancel()
                why = registration.lost_reason
                self._report("lost", f"lost the registration of {self._name}: {why}")
            await withdrawn

    def _report_registered(self, registration: Registration, is_starting: bool) -> None:
        text = f"{self._name} is registered at {registration.endpoint}"
        if self._arguments.get("instance") == AUTO:
            text += f" as instance {registration.instance}"
        if is_starting:
            text += ", and starting"
        self._report("registered", text, address=str(registration.endpoint), instance=registration.instance)

    async def _report_ready(self, service: ServiceLifecycle, ready: object) -> None:
        if ready is not None and await service.ready():
            self._report("ready", f"{self._name} is ready")

    async def _until_ready(self, probe: Probe) -> None:
        await until_ready(probe, lambda why: self._report("unready", f"{self._name} is not ready: {why}"))

    async def _accepting_host(self) -> str:
        """Wait until the command accepts connections, and return the host on which it does."""
        pause_s, longest_pause_s = _PROBE_PAUSE_S
        warn_at = time.monotonic() + _SILENT_S
        previous, reported = "", ""
        while True:
            obstacle = ""
            for host in ("127.0.0.1", "::1"):
                if await _accepts(host, self._port):
                    obstacle = self._obstacle(host)
                    if not obstacle:
                        return host
            # Report an obstacle only when it is found again, since a listener may be about to close.
            if obstacle and obstacle == previous != reported:
                reported = obstacle
                self._report("taken", f"{self._name} is not registered: {obstacle}")
            if not obstacle and time.monotonic() > warn_at:
                warn_at = float("inf")
                self._report("silent", f"{self._name} is not registered: {self._silence()}")
            previous = obstacle
            await asyncio.sleep(_PROBE_S if obstacle else pause_s)
            pause_s = min(1.5 * pause_s, longest_pause_s)

    def _silence(self) -> str:
        text = (
            f"nothing has accepted connections at {host_port('127.0.0.1', self._port)} for {_SILENT_S:g} s; "
            f"the command must listen on port {self._port} ($PORT)"
        )
        outer = os.environ.get("PORT", "")  # set by a process manager
        if outer and any(outer in re.findall("[0-9]+", argument) for argument in self._argv):
            text += f", not {outer}, with which a shell replaced $PORT; use sh -c '… \"$PORT\"' in single quotes"
        return text

    def _obstacle(self, host: str) -> str:
        """Return why the listener on this host does not count as the command's; "" if it does."""
        at = host_port(host, self._port)
        try:
            listening = listener(host, self._port)
        except OSError as error:
            if sys.platform != "linux":
                return ""  # only Linux says which process has opened a socket
            return f"the kernel does not say who listens at {at} ({error}); use --socket"
        if listening is None:
            return f"connections to {at} are accepted, but no socket of this machine listens there"
        if is_of(self._child, listening):
            return ""
        return f"user {listening.uid} listens at {at}, not the command; stop that program, or use --socket"


class _ClientMessages(logging.Handler):
    """Reports the client's log messages."""

    def __init__(self, report: Report) -> None:
        super().__init__(logging.INFO)
        self._report = report

    def emit(self, record: logging.LogRecord) -> None:
        event = "trouble" if record.levelno >= logging.WARNING else "info"
        self._report(event, record.getMessage())


def _bound_to(child: int) -> int | None:
    """Return the process to bind the registration to: the command; None (regctl) if it runs as another user."""
    try:
        return child if os.stat(f"/proc/{child}").st_uid == os.geteuid() else None
    except OSError:
        return None


async def _accepts(host: str, port: int) -> bool:
    try:
        async with asyncio.timeout(_PROBE_S):
            _, writer = await asyncio.open_connection(host, port)
    except (OSError, TimeoutError):
        return False
    to_itself = writer.get_extra_info("sockname") == writer.get_extra_info("peername")
    writer.transport.abort()
    return not to_itself
