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
_STOPS = (signal.SIGTSTP, signal.SIGTTIN, signal.SIGTTOU)  # job control, setpgid(2)
# Not passed on: what cannot be caught, and what this process causes by itself.
_OWN = {
    signal.SIGKILL, signal.SIGSTOP, signal.SIGCHLD, signal.SIGPIPE, signal.SIGXFSZ,
    signal.SIGABRT, signal.SIGBUS, signal.SIGFPE, signal.SIGILL, signal.SIGSEGV, signal.SIGSYS, signal.SIGTRAP,
}  # fmt: skip
_TO_LEADER = (signal.SIGHUP, signal.SIGCONT)  # of a terminal that hangs up, to the leader of its session alone
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
    """Return the signals to wait for: SIGCHLD, and every signal to pass on: all but faults, as tini(1) does.

    SIGCHLD gets its default action, as in timeout(1): a parent that ignores it would hide the command's end.
    """
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    return {signal.SIGCHLD, *(signal.valid_signals() - _OWN)}


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
    except (OSError, ValueError) as error:  # ValueError: a NUL byte in the environment
        os.write(writing, b"%d" % (getattr(error, "errno", None) or errno.EINVAL))
    finally:
        os._exit(CANNOT_RUN)


def until_ended(child: int, waited_for: Collection[int], name: Name, complain: Callable[[str], None]) -> int:
    """Pass signals on until the command has ended, and return its wait status.

    The first signal that ends the command is held back until the name is gone and `DRAIN_S` has passed, so that
    whoever has just resolved the name can still connect. A second one ends that wait.
    """
    held = _HeldBack(child, name, complain)
    while True:
        came = held.next(waited_for)
        if came is None:
            continue
        if came.si_signo == signal.SIGCHLD:
            number, status = os.waitpid(child, os.WNOHANG)
            if number == child:
                return status
            continue
        from_terminal = is_from_terminal(came, child)
        if came.si_signo in _ENDS and signal.getsignal(came.si_signo) != signal.SIG_IGN:  # else it ends nothing
            held.release()
            if name.withdraw() and not from_terminal:
                held.hold(came.si_signo)
                continue
        if not from_terminal:
            pass_on(child, came.si_signo, complain)
        if came.si_signo in _STOPS:
            _stop(came.si_signo)


class _HeldBack:
    """The signal that is held back from the command, if any, and until when."""

    def __init__(self, child: int, name: Name, complain: Callable[[str], None]) -> None:
        self._child = child
        self._name = name
        self._complain = complain
        self._number: int | None = None
        self._until = 0.0  # by time.monotonic

    def hold(self, number: int) -> None:
        self._number = number
        self._until = time.monotonic() + _LEAVE_S

    def release(self) -> None:
        """Pass it on now."""
        if self._number is not None:
            number, self._number = self._number, None
            pass_on(self._child, number, self._complain)

    def next(self, waited_for: Collection[int]) -> signal.struct_siginfo | None:
        """Return the next signal, None for none yet; release what has been held for long enough."""
        if self._number is None:
            return signal.sigwaitinfo(waited_for)
        if self._name.is_gone():
            self._until = min(self._until, time.monotonic() + DRAIN_S)
        if time.monotonic() >= self._until:
            self.release()
        return signal.sigtimedwait(waited_for, _LOOK_S)


def is_from_terminal(came: signal.struct_siginfo, child: int) -> bool:
    """Return whether the terminal has sent a signal to the child, too."""
    if came.si_signo in _TO_LEADER and os.getsid(0) == os.getpid():
        return False
    return came.si_code == _FROM_TERMINAL and os.getpgid(child) == os.getpgrp()


def pass_on(child: int, number: int, complain: Callable[[str], None]) -> None:
    """Send a signal to a child that is not reaped yet."""
    try:
        os.kill(child, number)
    except PermissionError:
        complain(f"cannot pass {_name(number)} on to process {child}: it belongs to another user")


def _name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # a real-time signal
        return f"signal {number}"


def _stop(number: int) -> None:
    """Take the default action of SIGTSTP, SIGTTIN or SIGTTOU: stop, unless nobody could resume this process."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {number})
    os.kill(os.getpid(), number)  # returns once this process is resumed
    signal.pthread_sigmask(signal.SIG_BLOCK, {number})


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
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {-code})  # whoever started this process may have blocked it
    os.kill(os.getpid(), -code)
    return 128 - code  # it did not end us: as shells say it
