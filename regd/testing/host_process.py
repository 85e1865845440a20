"""Start and control the host process, which runs the registries of a test run.

The host starts when it is first needed, and ends with this process. Requests and answers are lines on pipes,
which work even if a test patches sockets, time or files.
"""

import atexit
import contextlib
import itertools
import json
import os
import select
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

_ANSWER_S = 30.0  # an answer takes milliseconds, unless the machine is overloaded
_END_S = 5.0
_ANSWER = b'{"id": '  # the beginning of each answer; any other line is an error message of Python

# The folder that has the package regd. The host adds it to `sys.path`, and needs no other package.
_FOLDER = str(Path(__file__).resolve().parents[2])
# The host ignores Ctrl-C, which is meant for pytest. It starts faster without garbage collection, and without
# ssl, which asyncio imports but does not need here.
_START = """
import gc, signal, sys
signal.signal(signal.SIGINT, signal.SIG_IGN)
gc.disable()
sys.path.append(sys.argv[1])
sys.modules["ssl"] = None
from regd.testing.host_server import main
main([int(parent) for parent in sys.argv[2:]])
"""


class HostError(RuntimeError):
    """A registry cannot be started, or does not answer. The message says what to do."""


class HostProcess:
    """The host process. Any thread may send requests."""

    def __init__(self) -> None:
        self.owner = os.getpid()  # a forked child must start its own host
        self._lock = threading.Lock()
        self._numbers = itertools.count(1)
        self._rest = b""
        self._messages: list[str] = []  # lines that are not answers, such as a traceback
        self._open: set[int] = set()
        self._process = _start_process()

    @property
    def is_used(self) -> bool:
        """Whether a registry is open in the process."""
        return bool(self._open)

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def has_ended(self) -> bool:
        return self._process.poll() is not None

    @property
    def was_killed(self) -> bool:
        return (self._process.poll() or 0) < 0

    def ask(self, do: str, **more: Any) -> dict[str, Any]:
        """Send a request, and return the answer.

        Raises:
            HostError: the answer is an error, or the process does not answer.
        """
        if self.owner != os.getpid():
            raise HostError("regd: this registry belongs to the parent process of this fork; use it there")
        with self._lock:
            number = next(self._numbers)
            self._send(json.dumps({"id": number, "do": do, **more}).encode() + b"\n")
            answer = self._answer(number)
        if "error" in answer:
            raise HostError(f"regd: {answer['error']}")
        if do == "open":
            self._open.add(answer["daemon"])
        elif do == "end":
            self._open.discard(more["daemon"])
        return answer

    def _send(self, line: bytes) -> None:
        assert self._process.stdin is not None
        view = memoryview(line)
        try:
            while view:
                view = view[self._process.stdin.write(view) or 0 :]
        except (OSError, ValueError):
            raise self._ended() from None

    def _answer(self, number: int) -> dict[str, Any]:
        while True:
            *lines, self._rest = self._rest.split(b"\n")
            for at, line in enumerate(lines):
                if not line.startswith(_ANSWER):
                    self._messages.append(line.decode(errors="replace"))
                    continue
                answer: dict[str, Any] = json.loads(line)
                # Drop the answer to an earlier request that Ctrl-C or a timeout has interrupted.
                if answer["id"] == number:
                    self._rest = b"\n".join((*lines[at + 1 :], self._rest))
                    return answer
            self._rest += self._read()

    def _read(self) -> bytes:
        assert self._process.stdout is not None
        poll = select.poll()
        poll.register(self._process.stdout, select.POLLIN)
        if not poll.poll(_ANSWER_S * 1000):
            raise HostError(
                f"regd: the process of the tests' registries ({self._process.pid}) has not answered for "
                f"{_ANSWER_S:g} s; is it stopped, or the machine overloaded?"
            )
        chunk = self._process.stdout.read(65_536)
        if not chunk:
            raise self._ended()
        return bytes(chunk)

    def _ended(self) -> HostError:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_END_S)
        why = "\n".join([f"with status {self._process.returncode}", *self._messages[-20:]])
        return HostError(f"regd: the process of the tests' registries ({self._process.pid}) has ended, {why}")

    def close(self) -> None:
        """End the process, and wait for it. Idempotent."""
        atexit.unregister(self.close)
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        try:
            self._process.wait(_END_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()

    def forget(self) -> None:
        """Close the pipes in a forked child. The process does not end, since it belongs to the parent."""
        atexit.unregister(self.close)
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()
        self._process.returncode = 0  # so that Popen does not warn about a running process


def _start_process() -> "subprocess.Popen[bytes]":
    if not sys.executable:
        raise HostError("regd: cannot start a Python for the tests' registry: sys.executable does not name one")
    flags = ["-I", "-S"]  # ignore the environment and site-packages
    flags += ["-B"] if sys.dont_write_bytecode else []
    flags += ["-X", f"pycache_prefix={sys.pycache_prefix}"] if sys.pycache_prefix else []
    parents = _parent_pidfds()
    try:
        return subprocess.Popen(
            [sys.executable, *flags, "-c", _START, _FOLDER, *map(str, parents)],
            bufsize=0,
            cwd="/",
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            pass_fds=parents,
        )
    except OSError as error:
        raise HostError(
            f"regd: cannot start {sys.executable} for the tests' registry: {error.strerror}"
        ) from error
    finally:
        for parent in parents:
            os.close(parent)


def _parent_pidfds() -> list[int]:
    """Return pidfds of the processes with which the host must end; [] if the system has no pidfds."""
    # A worker of pytest-xdist lives for some seconds after its controller has been killed.
    pids = [os.getpid(), *([os.getppid()] if "PYTEST_XDIST_WORKER" in os.environ else [])]
    pidfds: list[int] = []
    if hasattr(os, "pidfd_open"):
        for pid in pids:
            with contextlib.suppress(OSError):
                pidfds.append(os.pidfd_open(pid))
    return pidfds


_hosts: list[HostProcess] = []  # at most one is running; the others have ended
_starting = threading.Lock()


def host() -> HostProcess:
    """Return the host of this process. Start it if it is not running.

    Raises:
        HostError: the host cannot be started.
    """
    with _starting:
        for process in _hosts[:]:
            if not process.has_ended:
                return process
            process.close()
            _hosts.remove(process)
        process = HostProcess()
        atexit.register(process.close)
        _hosts.append(process)
        return process


def close_unused() -> None:
    """End the host, unless a registry is still open in it."""
    with _starting:
        for process in _hosts[:]:
            if not process.is_used:
                process.close()
                _hosts.remove(process)


def _forget_all() -> None:
    """Forget the parent's host, in a forked child."""
    global _starting
    _starting = threading.Lock()  # at the fork, another thread may have held it
    while _hosts:
        _hosts.pop().forget()


os.register_at_fork(after_in_child=_forget_all)
