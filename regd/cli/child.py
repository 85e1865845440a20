"""One command as a child process: started with what it is handed, told what this process is told, and waited for.

Must not know what is registered.
"""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import signal
import socket
import sys
import time
from collections.abc import Callable, Collection, Mapping
from typing import NoReturn, Protocol

from regd_client.service import DRAIN_S

CANNOT_RUN, NO_COMMAND = 126, 127  # as shells say it
_ENDS = (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT)
_PASSED = (*_ENDS, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
_FROM_TERMINAL = 128  # SI_KERNEL (sigaction(2)): the terminal told the whole group
_LISTEN_FD = 3  # sd_listen_fds(3)
_LOOK_S = 0.01  # between two looks whether the name is gone
_LEAVE_S = 3.0  # for the name to go


class NotStarted(Exception):
    """The command could not be started. `status` is what a shell would end with."""

    def __init__(self, status: int, why: str) -> None:
        super().__init__(why)
        self.status = status


class Name(Protocol):
    """What goes before the command is told to end."""

    def withdraw(self) -> bool:
        """Take it away. Returns whether that was still to do."""

    def is_gone(self, within_s: float = 0.0) -> bool: ...


def signals() -> set[int]:
    """Return the signals to wait for: the command's end, and what is passed on unless this process ignores it."""
    return {signal.SIGCHLD, *(each for each in _PASSED if signal.getsignal(each) != signal.SIG_IGN)}


def start(
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
    status = NO_COMMAND if number in (errno.ENOENT, errno.ENOTDIR) else CANNOT_RUN
    raise NotStarted(status, f"{argv[0]}: {os.strerror(number)}")


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
        os._exit(CANNOT_RUN)


def until_ended(child: int, waited_for: Collection[int], name: Name, complain: Callable[[str], None]) -> int:
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
                complain(f"cannot pass {signal.Signals(came.si_signo).name} on: it is another user's")


def _hold_back(waited_for: Collection[int], name: Name) -> None:
    """Wait until the name is gone, and give those who have just resolved it the time to connect.

    Whatever comes meanwhile ends it.
    """
    until = time.monotonic() + _LEAVE_S
    came = None
    while came is None and time.monotonic() < until and not name.is_gone():
        came = signal.sigtimedwait(waited_for, _LOOK_S)
    came = came or signal.sigtimedwait(waited_for, DRAIN_S)
    if came is not None:
        os.kill(os.getpid(), came.si_signo)  # blocked: it is taken in its turn


def passed_on(status: int) -> int:
    """Return the exit status, or end as the command was ended."""
    code = os.waitstatus_to_exitcode(status)
    if code >= 0:
        return code
    for each in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            each.flush()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # one core is enough
    with contextlib.suppress(OSError):
        signal.signal(-code, signal.SIG_DFL)
    os.kill(os.getpid(), -code)
    return 128 - code  # it did not end us: as shells say it
