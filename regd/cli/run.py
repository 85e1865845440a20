"""`regctl run`: run a command, and register it from when it accepts connections until it exits.

The main thread forwards signals and waits for the command; the client registers the name in a background thread.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import errno
import functools
import json
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from regd.cli.child import NotRun, awaited_signals, exit_status, start, wait_and_forward
from regd.cli.commands import NO_DAEMON, NOT_FOUND, REFUSED, USAGE
from regd.cli.output import complain, environment_variables, visible
from regd.cli.port_owner import is_of, listener
from regd.cli.queries import wait_for
from regd_client.arguments import RegistrationRequest
from regd_client.blocking import client_thread
from regd_client.blocking_connection import BlockingConnection
from regd_client.errors import RegdError, Unavailable
from regd_client.lifespans import ServiceLifecycle
from regd_client.protocol import host_port

_PROBE_PAUSE_S = (0.01, 0.2)  # the first and the longest pause between two probes of the port
_PROBE_S = 1.0  # the timeout of a probe
_SILENT_S = 10.0  # after so long without a listener, print a warning
_DEREGISTER_S = 3.0  # for the name to be deregistered

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
        environment = _environment(address, arguments)
        with _reserved_port(arguments["port"], arguments["socket"]) as reserved:
            environment["PORT"] = str(reserved.getsockname()[1] if reserved is not None else arguments["port"])
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
    """Let the daemon check name, instance and labels before the command starts, if there is a daemon."""
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


@contextlib.contextmanager
def _reserved_port(port: int | None, listening: bool) -> Iterator[socket.socket | None]:
    """Yield a socket that listens for the command, or one that reserves a free port, or None with a given port.

    A socket that is bound, but does not listen, reserves its port: the kernel assigns it to no other program, and
    the command can still listen on it if it sets SO_REUSEADDR, as servers do.
    """
    try:
        reserved = socket.create_server(("127.0.0.1", port or 0)) if listening else _bound(port or 0)
    except OSError as error:
        if port is not None and not listening and error.errno != errno.EADDRINUSE:
            yield None  # the command may have permissions that regctl does not have
            return
        what = f"port {port}" if port else "a free port"
        raise NotRun(
            REFUSED, "port_taken", f"cannot bind {what}: {error.strerror}; choose another with --port"
        ) from None
    with reserved:
        if port is None or listening:
            yield reserved
            return
        reserved.close()  # it has shown that the port is free
        yield None


def _bound(port: int) -> socket.socket:
    """Return a socket that is bound to the port on IPv4 and IPv6."""
    dual = socket.has_dualstack_ipv6()
    bound = socket.socket(socket.AF_INET6 if dual else socket.AF_INET)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if dual:
            bound.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        bound.bind(("", port))
    except BaseException:
        bound.close()
        raise
    return bound


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
        name = _Name(arguments, report, child, int(environment["PORT"]))
        name.begin(accepts=listening is not None)
        try:
            status = wait_and_forward(child, awaited, name, functools.partial(report, "refused"))
        finally:
            name.withdraw()
            name.is_gone(_DEREGISTER_S)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    return exit_status(status)


class _Name:
    """The command's registration, which the client keeps in its background thread."""

    def __init__(self, arguments: Mapping[str, Any], report: Report, child: int, port: int) -> None:
        self._name = arguments["name"]
        self._report = functools.partial(report, name=self._name)
        self._child = child
        self._port = port
        self._arguments = {key: arguments[key] for key in ("instance", "meta") if arguments[key] is not None}
        self._thread = client_thread()
        self._withdrawn = asyncio.Event()
        self._task: concurrent.futures.Future[None]

    def begin(self, accepts: bool) -> None:
        """Register the name as soon as the command accepts connections; with `accepts`, at once."""
        self._task = self._thread.begin(self._keep(accepts))

    def withdraw(self) -> bool:
        """Start to deregister the name. Return False if that was started before."""
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
        async with ServiceLifecycle(request, drain_s=0.0) as service:
            service.logs_success = False
            service.opened(host, self._port)
            with contextlib.suppress(RegdError):  # the client has logged it
                registration = await service.registration()
                at = str(registration.endpoint)
                self._report("registered", f"{self._name} is registered at {at}", address=at)
                await registration.lost.wait()
                why = registration.lost_reason
                self._report("lost", f"lost the registration of {self._name}: {why}")
            await withdrawn

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
            if (
                obstacle and obstacle == previous != reported
            ):  # twice in a row, so the listener is not just closing
                reported = obstacle
                self._report("taken", f"{self._name} is not registered: {obstacle}")
            if not obstacle and time.monotonic() > warn_at:
                warn_at = float("inf")
                self._report("silent", f"{self._name} is not registered: {self._silence()}")
            previous = obstacle
            await asyncio.sleep(_PROBE_S if obstacle else pause_s)
            pause_s = min(1.5 * pause_s, longest_pause_s)

    def _silence(self) -> str:
        return (
            f"nothing has accepted connections at {host_port('127.0.0.1', self._port)} for {_SILENT_S:g} s; "
            f"the command must listen on port {self._port} ($PORT)"
        )

    def _obstacle(self, host: str) -> str:
        """Return why the listener on this host is not considered the command's; "" if it is."""
        at = host_port(host, self._port)
        try:
            listening = listener(host, self._port)
        except OSError as error:
            if sys.platform != "linux":
                return ""  # there is no way to find out, and the daemon lets every user write
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
    """Return the `pid` to bind the registration to: the command's, or None if it runs as another user."""
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
