"""`regctl run`: a command under a name, from when it accepts connections until it has ended.

The main thread waits for the command; the name is kept by the client, in a thread of its own. Must not know the
protocol, nor how a process is started.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import errno
import json
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from regd.cli.child import NotStarted, passed_on, signals, start, until_ended
from regd.cli.env_vars import variables
from regd.cli.output import complain, visible
from regd.cli.port_owner import is_of, listener
from regd.cli.queries import wait_for
from regd_client.blocking import BlockingConnection
from regd_client.errors import RegdError, Unavailable
from regd_client.service import ServiceLifecycle
from regd_client.thread import client_thread
from regd_client.wire import joined

NOT_FOUND, USAGE, NO_DAEMON, REFUSED = 1, 2, 3, 4
_PAUSE_S = (0.01, 0.2)  # the first and the longest, between two looks whether the command accepts
_LOOK_S = 1.0  # for one look
_SILENT_S = 10.0  # until it is worth a word that the command accepts nothing
_LEAVE_S = 3.0  # for the name to go


class _Stop(Exception):
    """The command is not started: what to say, and the exit status."""

    def __init__(self, status: int, error: str, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.error = error


@dataclass(frozen=True, slots=True)
class _Told:
    """Says what happens, on stderr: stdout is the command's."""

    as_json: bool

    def say(self, event: str, text: str, **fields: object) -> None:
        if self.as_json:
            line = json.dumps({"event": event, **fields, "message": text})
        else:
            line = f"regctl: {visible(text)}"
        complain(line)


def run(address: str | None, as_json: bool, given: Mapping[str, Any]) -> int:
    """Run the command, and return its exit status; where a signal ended it, this process ends by that, too."""
    told = _Told(as_json)
    try:
        environment = _environment(address, given)
        with contextlib.ExitStack() as stack:
            held = stack.enter_context(_port(given["port"], given["socket"]))
            environment["PORT"] = str(held.getsockname()[1] if held is not None else given["port"])
            return _run(given, told, environment, held)
    except NotStarted as trouble:
        told.say("refused", str(trouble), error="cannot_run")
        return trouble.status
    except _Stop as stop:
        told.say("refused", str(stop), error=stop.error)
        return stop.status


# Before the command.


def _environment(address: str | None, given: Mapping[str, Any]) -> dict[str, str]:
    """Return what the command's environment has more, once all that is waited for accepts connections."""
    if address is not None:
        os.environ["REGD_ADDRESS"] = address  # for the client, and for the command
    _check(given)
    until = time.monotonic() + given["timeout"]
    found = []
    for name in given["wait"]:
        try:
            reply = wait_for(None, name, until)
        except RegdError as error:
            raise _Stop(NO_DAEMON, "unavailable", str(error)) from None
        if not reply["ok"]:
            status = {"bad_argument": USAGE, "timeout": NOT_FOUND}.get(reply["error"], REFUSED)
            raise _Stop(status, reply["error"], f"{name}: {reply['message']}")
        found.append(reply)
    return variables(found)[0]


def _check(given: Mapping[str, Any]) -> None:
    """Have the daemon look at the name before the command is started, where there is one."""
    about = {key: given[key] for key in ("name", "instance", "meta") if given[key] is not None}
    try:
        with BlockingConnection() as connection:
            reply = connection.ask("resolve", **about)
    except Unavailable:
        return
    except RegdError as error:
        raise _Stop(USAGE, "bad_argument", str(error)) from None
    if reply.get("error") == "bad_argument":
        raise _Stop(USAGE, "bad_argument", reply["message"])


@contextlib.contextmanager
def _port(port: int | None, listening: bool) -> Iterator[socket.socket | None]:
    """Yield a socket that listens for the command, or that keeps a free port for it; None for a port of its own.

    What keeps a port is bound and does not listen: nobody else is given it, and a program that sets SO_REUSEADDR,
    as servers do, may listen on it.
    """
    try:
        made = socket.create_server(("127.0.0.1", port or 0)) if listening else _bound(port or 0)
    except OSError as error:
        if port is not None and not listening and error.errno != errno.EADDRINUSE:
            yield None  # as the command may have rights that we have not
            return
        where = f"port {port}" if port else "a free port"
        raise _Stop(REFUSED, "port_taken", f"cannot have {where}: {error.strerror}; name another") from None
    with made:
        if port is None or listening:
            yield made
            return
        made.close()  # it was free: that is all there is to know
        yield None


def _bound(port: int) -> socket.socket:
    family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET
    made = socket.socket(family)
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)  # of both families
        made.bind(("", port))
    except BaseException:
        made.close()
        raise
    return made


# The command.


def _run(given: Mapping[str, Any], told: _Told, environment: dict[str, str], held: socket.socket | None) -> int:
    log = logging.getLogger("regd_client")
    log.addHandler(_Heard(told))
    log.setLevel(logging.INFO)  # what went wrong, and that it is over
    waited_for = signals()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, waited_for)  # of the client's thread, too
    try:
        listening = held if given["socket"] else None
        child = start(given["argv"], environment, listening, given["name"], before)
        if listening is not None:
            listening.close()  # the command's now: it closes when the command says so
        name = _Name(given, told, child, int(environment["PORT"]))
        name.begin(accepts=listening is not None)
        try:
            status = until_ended(child, waited_for, name, lambda text: told.say("refused", text))
        finally:
            name.withdraw()
            name.is_gone(_LEAVE_S)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return passed_on(status)


# Its name.


class _Name:
    """The registration of the command, kept in the client's thread."""

    def __init__(self, given: Mapping[str, Any], told: _Told, child: int, port: int) -> None:
        self._name = given["name"]
        self._told = told
        self._child = child
        self._port = port
        self._arguments = {key: given[key] for key in ("instance", "meta") if given[key] is not None}
        self._thread = client_thread()
        self._asked_to_leave = asyncio.Event()
        self._kept: concurrent.futures.Future[None]

    def begin(self, accepts: bool) -> None:
        """Register it as soon as the command accepts."""
        self._kept = self._thread.begin(self._keep(accepts))

    def withdraw(self) -> bool:
        """Take the name away. Returns whether that was still to do."""
        first = not self._asked_to_leave.is_set()
        self._thread.call(self._leave())
        return first

    def is_gone(self, within_s: float = 0.0) -> bool:
        with contextlib.suppress(TimeoutError):
            self._kept.result(within_s)
        return self._kept.done()

    async def _leave(self) -> None:
        self._asked_to_leave.set()

    async def _keep(self, accepts: bool) -> None:
        leaving = asyncio.ensure_future(self._asked_to_leave.wait())
        keeping = asyncio.ensure_future(self._registered(accepts, leaving))
        try:
            await asyncio.wait((leaving, keeping), return_when=asyncio.FIRST_COMPLETED)
        finally:
            leaving.cancel()
            keeping.cancel()
            await asyncio.wait((keeping,))

    async def _registered(self, accepts: bool, leaving: asyncio.Future[Any]) -> None:
        """Be registered from when the command accepts until it is told to leave."""
        host = "127.0.0.1" if accepts else await self._accepting()
        async with ServiceLifecycle(
            self._name, None, self._arguments | _bound_to(self._child), drain_s=0.0
        ) as service:
            service.tells = False
            service.opened(host, self._port)
            with contextlib.suppress(RegdError):  # the client has logged it
                registration = await service.registration()
                at = str(registration.endpoint)
                self._told.say("registered", f"{self._name} is registered at {at}", name=self._name, address=at)
                await registration.lost.wait()
                why = registration.lost_reason
                self._told.say("lost", f"lost the registration of {self._name}: {why}", name=self._name)
            await leaving

    async def _accepting(self) -> str:
        """Return the address of this machine at which the command accepts."""
        pause_s, longest_s = _PAUSE_S
        warn_at = time.monotonic() + _SILENT_S
        last, told = "", ""
        while True:
            why_not = ""
            for host in ("127.0.0.1", "::1"):
                if await _accepts(host, self._port):
                    why_not = self._why_not(host)
                    if not why_not:
                        return host
            if why_not and why_not == last != told:  # twice in a row: it is no listener that was just closing
                told = why_not
                self._not_registered("taken", why_not)
            if not why_not and time.monotonic() > warn_at:
                warn_at = float("inf")
                self._not_registered(
                    "silent",
                    f"for {_SILENT_S:g} s nothing accepts connections at {joined('127.0.0.1', self._port)}; "
                    f"the command must listen on port {self._port} ($PORT)",
                )
            last = why_not
            await asyncio.sleep(_LOOK_S if why_not else pause_s)
            pause_s = min(1.5 * pause_s, longest_s)

    def _why_not(self, host: str) -> str:
        """Return why what accepts connections there does not count as the command, empty if it does."""
        at = joined(host, self._port)
        try:
            found = listener(host, self._port)
        except OSError as error:
            if sys.platform != "linux":
                return ""  # no system call tells, and regd lets every user write
            return (
                f"the kernel does not tell who listens at {at} ({error}); hand the command its socket: --socket"
            )
        if found is None:
            return f"connections to {at} are accepted, but no socket of this machine listens there"
        if is_of(self._child, found):
            return ""
        return f"user {found.uid} listens at {at}, not the command; stop that program, or use --socket"

    def _not_registered(self, event: str, why: str) -> None:
        self._told.say(event, f"{self._name} is not registered: {why}", name=self._name)


class _Heard(logging.Handler):
    """What the client has to say is said as all the rest."""

    def __init__(self, told: _Told) -> None:
        super().__init__(logging.INFO)
        self._told = told

    def emit(self, record: logging.LogRecord) -> None:
        self._told.say("trouble" if record.levelno >= logging.WARNING else "info", record.getMessage())


def _bound_to(child: int) -> dict[str, int]:
    """Return how long the name lasts: as the command, where the daemon lets this user say so; else as we do."""
    try:
        return {"pid": child} if os.stat(f"/proc/{child}").st_uid == os.geteuid() else {}
    except OSError:
        return {}


async def _accepts(host: str, port: int) -> bool:
    try:
        async with asyncio.timeout(_LOOK_S):
            _, writer = await asyncio.open_connection(host, port)
    except (OSError, TimeoutError):
        return False
    itself = writer.get_extra_info("sockname") == writer.get_extra_info("peername")
    writer.transport.abort()
    return not itself
