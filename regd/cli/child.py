"""A child process: start it, pass signals on to it and wait for its end; for `regctl run` and process 1."""

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
from typing import Protocol

from regd.cli.output import complain

CANNOT_RUN, NO_COMMAND = 126, 127  # exit statuses, as of a shell
_ENDING = (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT)
_STOPPING = (signal.SIGTSTP, signal.SIGTTIN, signal.SIGTTOU)  # job control, setpgid(2)
# Not passed on: signals that cannot be caught, and those that this process causes itself.
_OWN = {
    signal.SIGKILL, signal.SIGSTOP, signal.SIGCHLD, signal.SIGPIPE, signal.SIGXFSZ,
    signal.SIGABRT, signal.SIGBUS, signal.SIGFPE, signal.SIGILL, signal.SIGSEGV, signal.SIGSYS, signal.SIGTRAP,
}  # fmt: skip
_TO_LEADER = (signal.SIGHUP, signal.SIGCONT)  # when a terminal hangs up, sent to the session leader only
_SI_KERNEL = 128  # sigaction(2): the terminal sent the signal, to the whole process group
_LISTEN_FD = 3  # sd_listen_fds(3)
_POLL_S = 0.01  # between two looks at whether the name is gone
_LEAVE_S = 3.0  # for the name to be deregistered
_DRAIN_S = 0.1  # from then to the signal: clients that have just resolved the name still connect


class NotRun(Exception):
    """The command is not started. `status` is the exit status of regctl, `error` the code for JSON."""

    def __init__(self, status: int, error: str, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.error = error


class Name(Protocol):
    """The name that is deregistered before the command receives a signal to end."""

    def withdraw(self) -> bool:
        """Begin to deregister it. Return False if that had begun before."""

    def is_gone(self, within_s: float = 0.0) -> bool: ...


def awaited_signals() -> set[int]:
    """Return SIGCHLD and the signals to pass on: all but faults, as tini(1) does.

    Resets SIGCHLD to its default action, as timeout(1) does: where a parent ignores it, wait() finds no status.
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
    """Start a command with this signal mask and return its process id.

    `listening` is passed as file descriptor 3, under `name`.

    Uses fork and exec, since subprocess cannot set $LISTEN_PID, which is the command's own process id.

    Raises:
        NotRun: the command cannot be run.
    """
    reading, writing = os.pipe()  # closed by exec; holds the error number if that fails
    child = os.fork()
    if child == 0:
        try:  # replace this process by the command, or write the error number
            os.environ.update(environment)
            for variable in ("LISTEN_FDS", "LISTEN_PID", "LISTEN_FDNAMES"):
                os.environ.pop(variable, None)  # meant for regctl
            if listening is not None:
                if writing == _LISTEN_FD:
                    writing = os.dup(writing)
                os.dup2(listening.fileno(), _LISTEN_FD)
                os.set_inheritable(_LISTEN_FD, True)
                os.environ.update(LISTEN_FDS="1", LISTEN_PID=str(os.getpid()), LISTEN_FDNAMES=name)
            for ignored in (signal.SIGPIPE, signal.SIGXFSZ):
                signal.signal(ignored, signal.SIG_DFL)  # Python ignores them, and exec keeps that
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            os.execvp(argv[0], argv)
        except (OSError, ValueError) as error:  # ValueError: a NUL byte in the environment
            os.write(writing, b"%d" % (getattr(error, "errno", None) or errno.EINVAL))
        finally:
            os._exit(CANNOT_RUN)
    os.close(writing)
    with open(reading, "rb") as pipe:
        failure = pipe.read()
    if not failure:
        return child
    os.waitpid(child, 0)
    error_number = int(failure)
    status = NO_COMMAND if error_number in (errno.ENOENT, errno.ENOTDIR) else CANNOT_RUN
    raise NotRun(status, "cannot_run", f"{argv[0]}: {os.strerror(error_number)}")


def wait_and_forward(child: int, awaited: Collection[int], name: Name, report: Callable[[str], None]) -> int:
    """Pass signals on until the command has ended, and return its wait status.

    The first signal to end is held back until 0.1 s after the name is gone. A second one ends the delay.
    """
    delayed = _DelayedSignal(child, name, report)
    while True:
        received = delayed.wait(awaited)
        if received is None:
            continue
        if received.si_signo == signal.SIGCHLD:
            number, status = os.waitpid(child, os.WNOHANG)
            if number == child:
                return status
            continue
        from_terminal = _is_from_terminal(received, child)
        if received.si_signo in _ENDING and signal.getsignal(received.si_signo) != signal.SIG_IGN:
            delayed.send()
            if name.withdraw() and not from_terminal:
                delayed.hold(received.si_signo)
                continue
        if not from_terminal:
            _send(child, received.si_signo, report)
        if received.si_signo in _STOPPING:
            _stop(received.si_signo)


class _DelayedSignal:
    """The signal that is held back from the command, if any, and until when."""

    def __init__(self, child: int, name: Name, report: Callable[[str], None]) -> None:
        self._child = child
        self._name = name
        self._report = report
        self._number: int | None = None
        self._until = 0.0  # a time of time.monotonic

    def hold(self, number: int) -> None:
        self._number = number
        self._until = time.monotonic() + _LEAVE_S

    def send(self) -> None:
        """Send the signal now, if there is one."""
        if self._number is not None:
            number, self._number = self._number, None
            _send(self._child, number, self._report)

    def wait(self, awaited: Collection[int]) -> signal.struct_siginfo | None:
        """Return the next signal received, or None if there is none yet; send the delayed one when it is due."""
        if self._number is None:
            return signal.sigwaitinfo(awaited)
        if self._name.is_gone():
            self._until = min(self._until, time.monotonic() + _DRAIN_S)
        if time.monotonic() >= self._until:
            self.send()
        return signal.sigtimedwait(awaited, _POLL_S)


def _is_from_terminal(received: signal.struct_siginfo, child: int) -> bool:
    """Return whether the terminal has sent this signal to the child too."""
    if received.si_signo in _TO_LEADER and os.getsid(0) == os.getpid():
        return False
    return received.si_code == _SI_KERNEL and os.getpgid(child) == os.getpgrp()


def _send(child: int, number: int, report: Callable[[str], None]) -> None:
    """Send a signal to a child that is not reaped yet."""
    try:
        os.kill(child, number)
    except PermissionError:
        report(f"cannot send {_signal_name(number)} to process {child}: it belongs to another user")


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # a real-time signal
        return f"signal {number}"


def _stop(number: int) -> None:
    """Take the default action of SIGTSTP, SIGTTIN or SIGTTOU: stop, unless the process group is orphaned."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {number})
    os.kill(os.getpid(), number)  # returns when this process is resumed
    signal.pthread_sigmask(signal.SIG_BLOCK, {number})


def exit_status(status: int) -> int:
    """Return the exit status of a wait status; if a signal ended the command, end this process by the same."""
    code = os.waitstatus_to_exitcode(status)
    if code >= 0:
        return code
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # the command has dumped core already
    with contextlib.suppress(OSError):
        signal.signal(-code, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {-code})  # the parent may have blocked it
    os.kill(os.getpid(), -code)
    return 128 - code  # the signal had no effect


def run_as_init() -> int | None:
    """Fork. Return None in the child; in this process, return its exit status once it has ended.

    Process 1 of a container has the duties of an init process: signals have no default action for it, and every
    orphan becomes its child. So it passes signals on and reaps children, as dumb-init and tini do.
    """
    awaited = awaited_signals()
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, awaited)
    child = os.fork()
    if child == 0:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        return None
    while True:
        received = signal.sigwaitinfo(awaited)
        if received.si_signo == signal.SIGCHLD:
            status = _reap(child)
            if status is not None:
                return status
        elif not _is_from_terminal(received, child):
            _send(child, received.si_signo, lambda text: complain(f"regctl: {text}"))


def _reap(child: int) -> int | None:
    """Reap all children that have ended, and return the exit status of `child` if it is one of them."""
    while True:
        number, status = os.waitpid(-1, os.WNOHANG)
        if number == 0:
            return None
        if number == child:
            code = os.waitstatus_to_exitcode(status)
            return code if code >= 0 else 128 - code
