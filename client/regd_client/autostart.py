"""Start a daemon on demand: a client that finds no daemon starts one.

This happens for a project registry, and with REGD_AUTOSTART=1 for any other address on this machine.

If many clients start at once, a lock beside the registry lets one of them start the daemon; the others keep
trying to connect. If two daemons are started after all, the second one fails, since the first has the port and
the lock of the registry.

`Autostart` does not block: a caller with or without an event loop tries to connect, calls `step`, sleeps, and
repeats.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import sys
import time
import zlib
from collections.abc import Callable
from importlib.util import find_spec
from typing import TYPE_CHECKING, TypeVar

from regd_client import project, protocol
from regd_client.errors import RegdError, Unavailable

if TYPE_CHECKING:
    import subprocess

T = TypeVar("T")

__all__ = ["IDLE_EXIT_S", "LOG_MIB", "NOT_STARTED", "Autostart", "is_gone", "until_open"]

IDLE_EXIT_S = 300  # longer than it takes to restart all services by hand
LOG_MIB = 4  # the log is rotated at this size
NOT_STARTED = "not_started"  # code of the error for a daemon that could not be started
_DEFAULT_PORT = protocol.parse_address(protocol.DEFAULT_ADDRESS).port
_PAUSE_S = (0.02, 0.05)  # between attempts to connect: in the process that starts the daemon, and in the others
_STARTS_MAX = 3  # attempts, if the daemon starts but cannot be reached
_RETRY_S = 5.0  # after a failure, until the next attempt to start
_LOG_BYTES = 4_096  # read from the end of the log, to find its last line
_GONE = (errno.ECONNREFUSED, errno.ECONNRESET, errno.EPIPE, errno.ENOENT)
# Environment variables that are meant for this process, not for the daemon.
_NOT_INHERITED_PREFIXES = ("REGD_", "LISTEN_", "WATCHDOG_")
_NOT_INHERITED = ("NOTIFY_SOCKET", "STATE_DIRECTORY", "PYTHONWARNINGS", "PYTHONINSPECT")
_PYTHON = re.compile(r"(python|pypy)[0-9.]*[a-z]?(-[a-z0-9]+)?(\.exe)?", re.IGNORECASE)
_FROZEN_PREFIXES = ("_PYI_", "_MEIPASS")  # environment variables of PyInstaller
_LIBRARY_PATHS = ("LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "LIBPATH")  # PyInstaller changes these

_failures: dict[str, tuple[float, str]] = {}  # by address: the time of the next attempt, and the error message


def is_gone(error: OSError) -> bool:
    """Return whether the error means that no process listens, and not that a host is slow or unknown."""
    if isinstance(error, (TimeoutError, RegdError)):
        return False
    # errno is None if asyncio combined several errors, or if the other end closed the connection.
    return error.errno in _GONE or error.errno is None


def until_open(address: protocol.Address, timeout_s: float, connect: Callable[[], T]) -> T:
    """Start a daemon, call `connect` until it succeeds, and return its result.

    Raises:
        Unavailable: the daemon does not answer in time, or cannot be started.
        OSError: another program uses the address.
    """
    until = time.monotonic() + timeout_s
    autostart = Autostart(address)
    try:
        while True:
            pause_s = autostart.step()
            if time.monotonic() + pause_s >= until:
                raise protocol.unavailable(address, autostart.why)
            time.sleep(pause_s)
            try:
                return connect()
            except OSError as error:
                if not is_gone(error):
                    raise
    finally:
        autostart.close()


class Autostart:
    """A state machine that starts one daemon. `why` describes its state, for the error after a timeout."""

    def __init__(self, address: protocol.Address) -> None:
        self._address = address
        self._registry = self._log = ""
        self._program: list[str] = []  # the command without its flags
        self._lock: int | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._starts = 0
        self._tried_after_exit = False  # the caller has tried to connect since the process ended
        self._log_from = 0  # the offset in the log at which the process started
        self.why = "another process is starting it"

    def step(self) -> float:
        """Do the next step. Call it after each failed attempt to connect.

        Returns:
            The seconds until the next attempt to connect.

        Raises:
            Unavailable: the daemon cannot be started; `code` is `not_started`.
        """
        retry_at, failure = _failures.get(str(self._address), (0.0, ""))
        if time.monotonic() < retry_at:
            raise Unavailable(failure, NOT_STARTED)
        if not self._program:  # find the program before creating folders and files
            self._program = self._find_program()
            if self._address.project:
                self._check_project()
                self._registry = os.path.join(self._address.project, "registry.json")
                self._log = os.path.join(self._address.project, "regd.log")
            else:
                self._registry = os.path.join(self._folder(), _registry(self._address))
                self._log = self._registry.removesuffix(".json") + ".log"
            self.why = f"another process is starting it; its log is {self._log}"
        try:
            return self._step()
        except OSError as error:
            if isinstance(error, Unavailable):
                raise
            path = error.filename or self._registry
            other = (
                "run `regctl init` in another folder"
                if self._address.project
                else "name another folder in XDG_STATE_HOME"
            )
            advice = f"give this user write access, or {other}"
            raise self._failed(f"cannot use {path}: {error.strerror}; {advice}") from None

    def _check_project(self) -> None:
        """Check that the folder has not been removed or replaced since the search.

        Raises:
            Unavailable: the folder was removed or replaced; `code` is `not_started`.
        """
        folder = self._address.project
        why = project.fault(folder)
        if why is None:
            raise self._failed(f"{folder} was removed: run `regctl init` again")
        if why:
            raise self._failed(f"{folder} cannot be used: {why}; run `regctl init` again")

    def _step(self) -> float:
        if self._lock is None:
            if not self._address.project:  # do not create the folder of a removed project registry again
                os.makedirs(os.path.dirname(self._registry), mode=0o700, exist_ok=True)
            self._lock = _lock_file(self._registry + ".start")
            if self._lock is None:
                return _PAUSE_S[1]
            self.why = f"it is being started; its log is {self._log}"
            return 0.0  # the previous owner of the lock may have started a daemon
        if self._process is None:
            self._start()
            return _PAUSE_S[0]
        status = self._process.poll()
        if status is None:
            return _PAUSE_S[0]
        if not self._tried_after_exit:  # a daemon may listen by now: let the caller try once more
            self._tried_after_exit = True
            return 0.0
        if status != 0 or self._starts == _STARTS_MAX:
            raise self._failed(self._last_line() or f"it ended with status {status}")
        self._start()
        return _PAUSE_S[0]

    def _start(self) -> None:
        """Start `regd --background`. That process ends once its daemon listens or has failed."""
        import subprocess

        command, environment = self._command(), _daemon_environment()
        log = os.open(self._log, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            self._log_from = os.fstat(log).st_size
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd="/",
                env=environment,
                start_new_session=True,  # so that Ctrl-C in the terminal does not reach the daemon
            )
        finally:
            os.close(log)
        self._starts += 1
        self._tried_after_exit = False

    def _command(self) -> list[str]:
        if self._address.project:
            return [*self._program, "--project", self._address.project, "--background"]
        address = ["--port", str(self._address.port)]
        if self._address.path:
            address = ["--unix", self._address.path, "--port", "0"]
        files = ["--registry", self._registry, "--log", self._log, "--log-mib", str(LOG_MIB)]
        return [*self._program, *address, *files, "--background", "--idle-exit", str(IDLE_EXIT_S)]

    def _find_program(self) -> list[str]:
        interpreter = _interpreter()
        if interpreter is not None and _package_folder() is not None:
            return [interpreter, "-P", "-m", "regd"]
        import shutil  # slow to import

        program = shutil.which("regd")
        program = None if program is None else _absolute(program)
        if program is not None and not _is_this_program(program):
            return [program]
        if interpreter is not None:
            raise self._failed("this Python does not have the package regd, and PATH does not have `regd`")
        program = sys.executable or "this program"
        raise self._failed(
            f"{program} is not a Python interpreter, and PATH does not have `regd`; "
            "install regd, or start it yourself"
        )

    def _folder(self) -> str:
        """Return the state folder of this user's daemon. $STATE_DIRECTORY would be that of this process."""
        base = os.environ.get("XDG_STATE_HOME", "")
        if not os.path.isabs(base):
            home = os.environ.get("HOME") or _home()
            if not os.path.isabs(home):
                raise self._failed(
                    "it has no folder for its registry: HOME is not an absolute path, and this user has no home "
                    "folder; set HOME or XDG_STATE_HOME"
                )
            base = os.path.join(home, ".local", "state")
        return os.path.join(base, "regd")

    def _failed(self, why: str) -> Unavailable:
        log = f"; its log is {self._log}" if self._starts else ""
        message = f"regd at {self._address} cannot be started: {why}{log}"
        _failures[str(self._address)] = time.monotonic() + _RETRY_S, message
        return Unavailable(message, NOT_STARTED)

    def _last_line(self) -> str:
        with open(self._log, "rb") as log:
            size = os.fstat(log.fileno()).st_size
            begin = self._log_from if self._log_from <= size else 0  # the log is smaller after a rotation
            log.seek(max(begin, size - _LOG_BYTES))
            lines = log.read().decode(errors="replace").split("\n")
        return next((line.removeprefix("regd: ") for line in reversed(lines) if line.strip()), "")

    def close(self) -> None:
        """Release the lock. A process that was started continues."""
        if self._lock is not None:
            # While a forked child has the descriptor, close() does not unlock the file.
            fcntl.flock(self._lock, fcntl.LOCK_UN)
            os.close(self._lock)
            self._lock = None
        process, self._process = self._process, None
        if process is not None and process.poll() is None:
            import threading

            # Reap the process when it ends, so that it does not become a zombie.
            threading.Thread(target=process.wait, name="regd-client-started", daemon=True).start()


def _home() -> str:
    """Return this user's home folder from the password database, or "" if the user is not in it."""
    import pwd

    try:
        return pwd.getpwuid(os.getuid()).pw_dir
    except KeyError:
        return ""


def _registry(address: protocol.Address) -> str:
    """Return the name of the registry file: `registry.json` for the default port, else with the address in it."""
    if address.path:
        return f"registry-unix-{zlib.crc32(os.fsencode(address.path)):08x}.json"
    return "registry.json" if address.port == _DEFAULT_PORT else f"registry-{address.port}.json"


def _lock_file(path: str) -> int | None:
    """Lock a file and return its descriptor; None if another process has locked it."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        return None
    except BaseException:
        os.close(fd)
        raise
    return fd


def _interpreter() -> str | None:
    """Return the path of this program's Python interpreter; None if it has none.

    In a frozen or embedded Python, `sys.executable` is the program itself, or empty.
    """
    if getattr(sys, "frozen", False):
        return None
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    beside = os.path.join(sys.exec_prefix, "bin", f"python{version}")
    for path in (sys.executable, beside):
        if path and os.path.isabs(path) and os.access(path, os.X_OK) and not os.path.isdir(path):
            names = (os.path.basename(path), os.path.basename(os.path.realpath(path)))
            if any(_PYTHON.fullmatch(name) for name in names):
                return path
    return None


def _is_this_program(path: str) -> bool:
    try:
        return bool(sys.executable) and os.path.samefile(path, sys.executable)
    except OSError:
        return False


def _absolute(path: str) -> str | None:
    """Return the absolute path; None if the path is relative and the current folder has been deleted."""
    try:
        return os.path.abspath(path)
    except OSError:
        return None


def _package_folder() -> str | None:
    """Return the folder in which this interpreter finds the package regd; None if it does not find it."""
    try:
        spec = find_spec("regd")
    except (ImportError, ValueError):
        return None
    if spec is None or spec.origin is None:  # no origin: a folder named regd without an `__init__.py`
        return None
    origin = _absolute(spec.origin)
    return None if origin is None else os.path.dirname(os.path.dirname(origin))


def _daemon_environment() -> dict[str, str]:
    """Return the environment for the daemon: that of this process, without variables for this process alone."""
    environment = {
        key: value
        for key, value in os.environ.items()
        if not key.startswith(_NOT_INHERITED_PREFIXES) and key not in _NOT_INHERITED
    }
    # The daemon runs in another folder, so relative paths must become absolute.
    folders = [_absolute(folder) for folder in environment.pop("PYTHONPATH", "").split(os.pathsep) if folder]
    if getattr(sys, "frozen", False):
        for name in _LIBRARY_PATHS:
            environment.pop(name, None)
            if (original := environment.pop(f"{name}_ORIG", None)) is not None:
                environment[name] = original
        environment = {key: value for key, value in environment.items() if not key.startswith(_FROZEN_PREFIXES)}
    else:
        package = _package_folder()
        if package is not None and os.path.basename(package) not in ("site-packages", "dist-packages"):
            folders.insert(0, package)
    if any(folders):
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, folders))
    return environment
