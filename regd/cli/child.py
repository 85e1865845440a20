"""Run a child process: start it, forward signals to it, and wait for it. Used by `regctl run` and process 1."""

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
from pathlib import Path
from typing import Protocol

from regd.cli.output import complain

CANNOT_RUN, NO_COMMAND = 126, 127  # exit statuses, the same as a shell's
_ENDING = (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT)
_STOPPING = (signal.SIGTSTP, signal.SIGTTIN, signal.SIGTTOU)  # job control, setpgid(2)
# Not forwarded: signals that cannot be caught, and those that this process causes itself.
_OWN = {
    signal.SIGKILL, signal.SIGSTOP, signal.SIGCHLD, signal.SIGPIPE, signal.SIGXFSZ,
    signal.SIGABRT, signal.SIGBUS, signal.SIGFPE, signal.SIGILL, signal.SIGSEGV, signal.SIGSYS, signal.SIGTRAP,
}  # fmt: skip
_TO_LEADER = (signal.SIGHUP, signal.SIGCONT)  # a terminal that hangs up sends these to the session leader alone
_GROUP_MANAGERS = (b"honcho", b"overmind")  # these signal the process group of each line of a Procfile
_SI_KERNEL = 128  # sigaction(2): the terminal sent the signal, to the whole process group
_LISTEN_FD = 3  # sd_listen_fds(3)
_POLL_S = 0.01  # between checks whether the name is deregistered
_DEREGISTER_S = 3.0  # the longest wait until the name is deregistered
_DRAIN_S = 0.1  # before the signal, so that clients that have just resolved the name can connect


class NotRun(Exception):
    """The command was not started. `status` is regctl's exit status, `error` the error code for JSON."""

    def __init__(self, status: int, error: str, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.error = error


class Name(Protocol):
    """The command's registration, which ends before the command receives a signal to end."""

    def withdraw(self) -> bool:
        """Start to deregister the name. Return False if that was already started."""

    def is_gone(self, within_s: float = 0.0) -> bool: ...


def awaited_signals() -> set[int]:
    """Return SIGCHLD and the signals to forward: all except faults, as in tini(1).

    Also reset SIGCHLD to its default action, as timeout(1) does: if the parent ignored it, wait() would fail.
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

    The command inherits the socket `listening` as file descriptor 3, with the name `name`.

    This uses fork and exec, since subprocess cannot set $LISTEN_PID to the command's own process id.

    Raises:
        NotRun: the command cannot be run.
    """
    reading, writing = os.pipe()  # exec closes `writing`; if exec fails, the child writes the error number there
    child = os.fork()
    if child == 0:
        try:
            os.environ.update(environment)
            for variable in ("LISTEN_FDS", "LISTEN_PID", "LISTEN_FDNAMES"):
                os.environ.pop(variable, None)  # these variables were meant for regctl
            if listening is not None:
                if writing == _LISTEN_FD:
                    writing = os.dup(writing)
                os.dup2(listening.fileno(), _LISTEN_FD)
                os.set_inheritable(_LISTEN_FD, True)
                os.environ.update(LISTEN_FDS="1", LISTEN_PID=str(os.getpid()), LISTEN_FDNAMES=name)
            for ignored in (signal.SIGPIPE, signal.SIGXFSZ):
                signal.signal(ignored, signal.SIG_DFL)  # Python ignores it, and the command would inherit that
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
    """Forward signals until the command has ended, and return its wait status.

    The first signal that asks the command to end is delayed until 0.1 s after the name was deregistered. A
    second such signal ends the delay. A signal that was sent to the whole process group is not forwarded.
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
        is_shared = _is_from_terminal(received, child) or _is_from_manager(received, child)
        if received.si_signo in _ENDING and signal.getsignal(received.si_signo) != signal.SIG_IGN:
            delayed.send()
            if name.withdraw() and not is_shared:
                delayed.set(received.si_signo)
                continue
        if not is_shared:
            _send(child, received.si_signo, report)
        if received.si_signo in _STOPPING:
            _stop(received.si_signo)


class _DelayedSignal:
    """A signal for the command that is delayed until its name is deregistered."""

    def __init__(self, child: int, name: Name, report: Callable[[str], None]) -> None:
        self._child = child
        self._name = name
        self._report = report
        self._number: int | None = None
        self._send_at = 0.0  # `time.monotonic`

    def set(self, number: int) -> None:
        self._number = number
        self._send_at = time.monotonic() + _DEREGISTER_S

    def send(self) -> None:
        """Send the delayed signal now, if there is one."""
        if self._number is not None:
            number, self._number = self._number, None
            _send(self._child, number, self._report)

    def wait(self, awaited: Collection[int]) -> signal.struct_siginfo | None:
        """Wait for a signal and return it. While a signal is delayed, return None after 10 ms at most."""
        if self._number is None:
            return signal.sigwaitinfo(awaited)
        if self._name.is_gone():
            self._send_at = min(self._send_at, time.monotonic() + _DRAIN_S)
        if time.monotonic() >= self._send_at:
            self.send()
        return signal.sigtimedwait(awaited, _POLL_S)


def _is_from_terminal(received: signal.struct_siginfo, child: int) -> bool:
    """Return whether the terminal sent this signal, so that the child has received it too."""
    if received.si_signo in _TO_LEADER and os.getsid(0) == os.getpid():
        return False
    return received.si_code == _SI_KERNEL and os.getpgid(child) == os.getpgrp()


def _is_from_manager(received: signal.struct_siginfo, child: int) -> bool:
    """Return whether a process manager sent this signal to the process group, and so to the child too.

    The child must not get the signal twice, because that would interrupt its cleanup: uvicorn ends at once on a
    second SIGINT.
    """
    try:
        words = Path(f"/proc/{received.si_pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return False
    program = words[: 3 if b"python" in os.path.basename(words[0]) else 1]  # python honcho, python -m honcho
    is_manager = any(os.path.basename(word) in _GROUP_MANAGERS for word in program)
    return is_manager and os.getpgid(child) == os.getpgrp()


def _send(child: int, number: int, report: Callable[[str], None]) -> None:
    """Send a signal to a child that has not been reaped yet."""
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
    """Perform the default action of SIGTSTP, SIGTTIN or SIGTTOU: stop, unless the process group is orphaned."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {number})
    os.kill(os.getpid(), number)  # returns once this process is resumed
    signal.pthread_sigmask(signal.SIG_BLOCK, {number})


def exit_status(status: int) -> int:
    """Return the exit status for a wait status. If a signal ended the command, end this process by it too."""
    code = os.waitstatus_to_exitcode(status)
    if code >= 0:
        return code
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # the command has dumped core, and one core dump is enough
    with contextlib.suppress(OSError):
        signal.signal(-code, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {-code})  # the parent may have blocked it
    os.kill(os.getpid(), -code)
    return 128 - code  # the signal had no effect


def run_as_init() -> int | None:
    """Fork, and return None in the child. In the parent, return the child's exit status once it has ended.

    Process 1 of a container is its init process: signals have no default action for it, and every orphan becomes
    its child. So the parent forwards signals and reaps children, as dumb-init and tini do.
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
    """Reap all children that have ended. Return the exit status of `child` if it is one of them, else None."""
    while True:
        number, status = os.waitpid(-1, os.WNOHANG)
        if number == 0:
            return None
        if number == child:
            code = os.waitstatus_to_exitcode(status)
            return code if code >= 0 else 128 - code
