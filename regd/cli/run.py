"""`regctl run`: a command under a name, from when it accepts connections until it has ended.

The main thread starts the command, passes signals on and waits for its end; the name is kept by the client, in a
thread of its own. Must not know the protocol.
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
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from regd.cli.asking import wait_for
from regd.cli.showing import visible
from regd.cli.variables import variables
from regd_client.blocking import BlockingConnection
from regd_client.errors import RegdError, Unavailable
from regd_client.service import DRAIN_S, Service
from regd_client.thread import client_thread
from regd_client.wire import joined

NOT_FOUND, USAGE, NO_DAEMON, REFUSED = 1, 2, 3, 4
_CANNOT_RUN, _NO_COMMAND = 126, 127  # as shells say it
_ENDS = (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT)
_PASSED = (*_ENDS, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
_FROM_TERMINAL = 128  # SI_KERNEL (sigaction(2)): the terminal told the whole group
_LISTEN_FD = 3  # sd_listen_fds(3)
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
        print(line, file=sys.stderr, flush=True)


def run(address: str | None, as_json: bool, given: Mapping[str, Any]) -> int:
    """Run the command, and return its exit status; where a signal ended it, this process ends by that, too."""
    told = _Told(as_json)
    try:
        environment = _environment(address, given)
        with contextlib.ExitStack() as stack:
            held = stack.enter_context(_port(given["port"], given["socket"]))
            environment["PORT"] = str(held.getsockname()[1] if held is not None else given["port"])
            return _run(given, told, environment, held)
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
    waited_for = {signal.SIGCHLD, *(each for each in _PASSED if signal.getsignal(each) != signal.SIG_IGN)}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, waited_for)  # of the client's thread, too
    try:
        listening = held if given["socket"] else None
        child = _start(given["argv"], environment, listening, given["name"], before)
        if listening is not None:
            listening.close()  # the command's now: it closes when the command says so
        name = _Name(given, told, child, int(environment["PORT"]))
        name.begin(accepts=listening is not None)
        try:
            status = _until_ended(child, waited_for, name, told)
        finally:
            name.withdraw()
            name.is_gone(_LEAVE_S)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return _passed_on(status)


def _start(
    argv: list[str],
    environment: Mapping[str, str],
    listening: socket.socket | None,
    name: str,
    mask: Collection[int],
) -> int:
    """Start the command, and return its number.

    By hand: $LISTEN_PID is the number of the command itself, which nobody knows before it is there.
    """
    reading, writing = os.pipe()  # closed by a command that was started, written by one that was not
    child = os.fork()
    if child == 0:
        _become(argv, environment, listening, name, mask, writing)
    os.close(writing)
    with open(reading, "rb") as pipe:
        trouble = pipe.read()
    if not trouble:
        return child
    os.waitpid(child, 0)
    number = int(trouble)
    status = _NO_COMMAND if number in (errno.ENOENT, errno.ENOTDIR) else _CANNOT_RUN
    raise _Stop(status, "cannot_run", f"{argv[0]}: {os.strerror(number)}")


def _become(
    argv: list[str],
    environment: Mapping[str, str],
    listening: socket.socket | None,
    name: str,
    mask: Collection[int],
    writing: int,
) -> NoReturn:
    """In the child: become the command, or tell why not."""
    try:
        os.environ.update(environment)
        for variable in ("LISTEN_FDS", "LISTEN_PID", "LISTEN_FDNAMES"):
            os.environ.pop(variable, None)  # ours, if any
        if listening is not None:
            if writing == _LISTEN_FD:
                writing = os.dup(writing)
            os.dup2(listening.fileno(), _LISTEN_FD)
            os.set_inheritable(_LISTEN_FD, True)
            os.environ.update(LISTEN_FDS="1", LISTEN_PID=str(os.getpid()), LISTEN_FDNAMES=name)
        for each in (signal.SIGPIPE, signal.SIGXFSZ):
            signal.signal(each, signal.SIG_DFL)  # Python ignores them, and the command would go on so
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        os.execvp(argv[0], argv)
    except OSError as error:
        os.write(writing, b"%d" % (error.errno or 0))
    finally:
        os._exit(_CANNOT_RUN)


def _until_ended(child: int, waited_for: Collection[int], name: _Name, told: _Told) -> int:
    """Pass signals on until the command has ended, and return how. Before one that ends it, the name goes."""
    while True:
        came = signal.sigwaitinfo(waited_for)
        if came.si_signo == signal.SIGCHLD:
            number, status = os.waitpid(child, os.WNOHANG)
            if number == child:
                return status
            continue
        from_terminal = came.si_code == _FROM_TERMINAL and os.getpgid(child) == os.getpgrp()
        if came.si_signo in _ENDS and name.withdraw() and not from_terminal:
            _hold_back(waited_for, name)
        if not from_terminal:
            try:
                os.kill(child, came.si_signo)  # it is not reaped yet, so the number is its
            except PermissionError:
                told.say("refused", f"cannot pass {signal.Signals(came.si_signo).name} on: it is another user's")


def _hold_back(waited_for: Collection[int], name: _Name) -> None:
    """Wait until the name is gone, and give those who have just resolved it the time to connect.

    Whatever comes meanwhile ends it.
    """
    until = time.monotonic() + _LEAVE_S
    came = None
    while came is None and time.monotonic() < until and not name.is_gone():
        came = signal.sigtimedwait(waited_for, _PAUSE_S[0])
    came = came or signal.sigtimedwait(waited_for, DRAIN_S)
    if came is not None:
        os.kill(os.getpid(), came.si_signo)  # blocked: it is taken in its turn


def _passed_on(status: int) -> int:
    """Return the exit status, or end as the command was ended."""
    code = os.waitstatus_to_exitcode(status)
    if code >= 0:
        return code
    for each in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            each.flush()
    import resource

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # one core is enough
    with contextlib.suppress(OSError):
        signal.signal(-code, signal.SIG_DFL)
    os.kill(os.getpid(), -code)
    return 128 - code  # it did not end us: as shells say it


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
        logging.getLogger("regd_client").addHandler(_Heard(self._told))
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
        async with Service(self._name, None, self._arguments | _bound_to(self._child), drain_s=0.0) as service:
            service.opened(host, self._port)
            registration = asyncio.ensure_future(service.registration())
            await asyncio.wait((registration,))
            if registration.exception() is None:
                at = str(registration.result().endpoint)
                self._told.say("registered", f"{self._name} is registered at {at}", name=self._name, address=at)
                lost = registration.result().lost
                await lost.wait()
                why = registration.result().lost_reason
                self._told.say("lost", f"lost the registration of {self._name}: {why}", name=self._name)
            await leaving

    async def _accepting(self) -> str:
        """Return the address of this machine at which the command accepts."""
        pause_s, longest_s = _PAUSE_S
        warn_at = time.monotonic() + _SILENT_S
        while True:
            for host in ("127.0.0.1", "::1"):
                if await _accepts(host, self._port):
                    return host
            if time.monotonic() > warn_at:
                warn_at = float("inf")
                self._told.say(
                    "silent",
                    f"{self._name} is not registered: for {_SILENT_S:g} s nothing accepts connections at "
                    f"{joined('127.0.0.1', self._port)}; the command must listen on port {self._port} ($PORT)",
                    name=self._name,
                )
            await asyncio.sleep(pause_s)
            pause_s = min(1.5 * pause_s, longest_s)


class _Heard(logging.Handler):
    """What the client has to say is said as all the rest."""

    def __init__(self, told: _Told) -> None:
        super().__init__(logging.WARNING)
        self._told = told

    def emit(self, record: logging.LogRecord) -> None:
        self._told.say("trouble", record.getMessage())


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
