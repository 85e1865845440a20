"""Starting a daemon on demand: a client that finds no daemon for its project registry starts one, and with
REGD_AUTOSTART=1 also at another address of this machine.

However many clients ask at once, one starts the daemon: under a lock in the state folder it looks again, starts,
and waits until the daemon listens; the others wait until they reach it. A daemon that is started twice all the
same is refused by the daemon's own rules: the port is taken, or the registry locked. Nothing here blocks: a
caller looks, calls `step`, and pauses, with an event loop or without.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import shutil
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

IDLE_EXIT_S = 300  # longer than a restart of all services by hand
LOG_MIB = 4  # then the log begins anew; the previous one is kept
NOT_STARTED = "not_started"  # code of the error for a daemon that could not be started
_DEFAULT_PORT = protocol.parse_address(protocol.DEFAULT_ADDRESS).port
_PAUSE_S = (0.02, 0.05)  # between two looks: of the process that starts it, and of the others
_STARTS_MAX = 3  # of daemons that listened and could not be reached
_REST_S = 5.0  # after a failure, until the next attempt
_LOG_BYTES = 4_096  # read from the end of the log for its last line
_GONE = (errno.ECONNREFUSED, errno.ECONNRESET, errno.EPIPE, errno.ENOENT)
_NOT_INHERITED = ("REGD_", "LISTEN_", "WATCHDOG_")  # variables for this process, from its user and from systemd
_NOT_INHERITED_EITHER = ("NOTIFY_SOCKET", "STATE_DIRECTORY", "PYTHONWARNINGS", "PYTHONINSPECT")
_PYTHON = re.compile(r"(python|pypy)[0-9.]*[a-z]?(-[a-z0-9]+)?(\.exe)?", re.IGNORECASE)
_FROZEN = ("_PYI_", "_MEIPASS")  # variables of PyInstaller
_LIBRARIES = ("LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "LIBPATH")  # a frozen program changes them

_failures: dict[str, tuple[float, str]] = {}  # by address: the end of the rest, and the message


def is_gone(error: OSError) -> bool:
    """Return whether the error says that nobody listens: not a peer that does not answer, nor an unknown host."""
    if isinstance(error, (TimeoutError, RegdError)):
        return False
    return error.errno in _GONE or error.errno is None  # None: several errors in one, or the peer closed


def until_open(address: protocol.Address, timeout_s: float, connect: Callable[[], T]) -> T:
    """Start a daemon and return what `connect` does once it can.

    Raises:
        Unavailable: the daemon does not answer in time, or cannot be started.
        OSError: another program is there, which must not be replaced.
    """
    until = time.monotonic() + timeout_s
    start = Autostart(address)
    try:
        while True:
            pause_s = start.step()
            if time.monotonic() + pause_s >= until:
                raise protocol.unavailable(address, start.why)
            time.sleep(pause_s)
            try:
                return connect()
            except OSError as error:
                if not is_gone(error):
                    raise
    finally:
        start.close()


class Autostart:
    """One caller's part in starting the daemon. `why` is the current state, for the error of a timeout."""

    def __init__(self, address: protocol.Address) -> None:
        self._address = address
        self._registry = self._log = ""
        self._base: list[str] = []  # the command, without its flags
        self._lock: int | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._starts = 0
        self._looked = False  # again, since the process has ended
        self._log_from = 0  # where its part of the log begins
        self.why = "another process is starting it"

    def step(self) -> float:
        """Do the next step, after an attempt to connect found nobody. Returns the seconds until the next attempt.

        Raises:
            Unavailable: the daemon cannot be started; `code` is `not_started`.
        """
        rests_until, failure = _failures.get(str(self._address), (0.0, ""))
        if time.monotonic() < rests_until:
            raise Unavailable(failure, NOT_STARTED)
        if not self._base:  # no folder or file is made before there is a program
            self._base = self._program()
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
            where = error.filename or self._registry
            other = (
                "run `regctl init` in another folder"
                if self._address.project
                else "name another folder in XDG_STATE_HOME"
            )
            mend = f"give its rights to this user, or {other}"
            raise self._failed(f"cannot use {where}: {error.strerror}; {mend}") from None

    def _check_project(self) -> None:
        """Check that the folder was not removed, or replaced, since it was found."""
        folder = self._address.project
        why = project.fault(folder)
        if why is None:
            raise self._failed(f"{folder} was removed: run `regctl init` again")
        if why:
            raise self._failed(f"{folder} cannot be used: {why}; run `regctl init` again")

    def _step(self) -> float:
        if self._lock is None:
            if not self._address.project:  # one that was removed stays removed
                os.makedirs(os.path.dirname(self._registry), mode=0o700, exist_ok=True)
            self._lock = _locked(self._registry + ".start")
            return _PAUSE_S[1] if self._lock is None else 0.0  # the previous owner may have started a daemon
        if self._process is None:
            self._start()
            return _PAUSE_S[0]
        status = self._process.poll()
        if status is None:
            return _PAUSE_S[0]
        if not self._looked:  # it, or another daemon, may listen since the caller looked
            self._looked = True
            return 0.0
        if status != 0 or self._starts == _STARTS_MAX:
            raise self._failed(self._last_line() or f"it ended with status {status}")
        self._start()
        return _PAUSE_S[0]

    def _start(self) -> None:
        """Start `regd --background`. The process ends when its daemon listens or has failed."""
        import subprocess

        command, environment = self._command(), _environment()
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
                start_new_session=True,  # Ctrl-C in the terminal does not reach it
            )
        finally:
            os.close(log)
        self._starts += 1
        self._looked = False
        self.why = f"it is being started; its log is {self._log}"

    def _command(self) -> list[str]:
        if self._address.project:
            return [*self._base, "--project", self._address.project, "--background"]
        address = ["--port", str(self._address.port)]
        if self._address.path:
            address = ["--unix", self._address.path, "--port", "0"]
        files = ["--registry", self._registry, "--log", self._log, "--log-mib", str(LOG_MIB)]
        return [*self._base, *address, *files, "--background", "--idle-exit", str(IDLE_EXIT_S)]

    def _program(self) -> list[str]:
        interpreter = _interpreter()
        if interpreter is not None and _package() is not None:
            return [interpreter, "-P", "-m", "regd"]
        program = shutil.which("regd")
        program = None if program is None else _absolute(program)
        if program is not None and not _is_this_program(program):
            return [program]
        if interpreter is not None:
            raise self._failed("there is none to start: this Python has no package regd, and PATH no `regd`")
        program = sys.executable or "this program"
        raise self._failed(
            f"there is none to start: {program} is no Python interpreter, and PATH has no `regd`; "
            "install regd, or start it yourself"
        )

    def _folder(self) -> str:
        """Return the state folder of this user's daemon. $STATE_DIRECTORY is this process's, not the daemon's."""
        base = os.environ.get("XDG_STATE_HOME", "")
        if not os.path.isabs(base):
            home = os.environ.get("HOME") or _home()
            if not os.path.isabs(home):
                raise self._failed(
                    "there is no folder for its registry: HOME is no absolute path, and this user has no home "
                    "folder; set HOME or XDG_STATE_HOME"
                )
            base = os.path.join(home, ".local", "state")
        return os.path.join(base, "regd")

    def _failed(self, why: str) -> Unavailable:
        log = f"; its log is {self._log}" if self._starts else ""
        message = f"regd at {self._address} cannot be started: {why}{log}"
        _failures[str(self._address)] = time.monotonic() + _REST_S, message
        return Unavailable(message, NOT_STARTED)

    def _last_line(self) -> str:
        with open(self._log, "rb") as log:
            size = os.fstat(log.fileno()).st_size
            begin = self._log_from if self._log_from <= size else 0  # it may have begun anew
            log.seek(max(begin, size - _LOG_BYTES))
            lines = log.read().decode(errors="replace").split("\n")
        return next((line.removeprefix("regd: ") for line in reversed(lines) if line.strip()), "")

    def close(self) -> None:
        """Unlock. A process that was started continues."""
        if self._lock is not None:
            fcntl.flock(
                self._lock, fcntl.LOCK_UN
            )  # closing is not enough: a forked child has the descriptor, too
            os.close(self._lock)
            self._lock = None
        process, self._process = self._process, None
        if process is not None and process.poll() is None:
            import threading

            # Reap the process when it ends.
            threading.Thread(target=process.wait, name="regd-client-started", daemon=True).start()


def _home() -> str:
    """Return this user's home folder from the password database, "" if it has none."""
    import pwd

    try:
        return pwd.getpwuid(os.getuid()).pw_dir
    except KeyError:
        return ""


def _registry(address: protocol.Address) -> str:
    """Return the name of the registry's file: a plain `regd`'s, or one for each other port or path."""
    if address.path:
        return f"registry-unix-{zlib.crc32(os.fsencode(address.path)):08x}.json"
    return "registry.json" if address.port == _DEFAULT_PORT else f"registry-{address.port}.json"


def _locked(path: str) -> int | None:
    """Lock a file and return its descriptor, None if another process has locked it."""
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
    """Return the Python that runs this program, or one beside it. None if Python is frozen or embedded.

    `sys.executable` is then the program itself, or empty.
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
    """Return an absolute path, None for a relative one if the current folder has been deleted."""
    try:
        return os.path.abspath(path)
    except OSError:
        return None


def _package() -> str | None:
    """Return the folder in which this interpreter finds the package regd, None if it finds none."""
    try:
        spec = find_spec("regd")
    except (ImportError, ValueError):
        return None
    if spec is None or spec.origin is None:  # None: a folder of that name, which is no package
        return None
    origin = _absolute(spec.origin)
    return None if origin is None else os.path.dirname(os.path.dirname(origin))


def _environment() -> dict[str, str]:
    """Return the daemon's environment: without this process's own variables, and with the path of the package."""
    kept = {
        key: value
        for key, value in os.environ.items()
        if not key.startswith(_NOT_INHERITED) and key not in _NOT_INHERITED_EITHER
    }
    # The daemon has another current folder.
    folders = [_absolute(folder) for folder in kept.pop("PYTHONPATH", "").split(os.pathsep) if folder]
    if getattr(sys, "frozen", False):
        for name in _LIBRARIES:
            kept.pop(name, None)
            if (original := kept.pop(f"{name}_ORIG", None)) is not None:
                kept[name] = original
        kept = {key: value for key, value in kept.items() if not key.startswith(_FROZEN)}
    else:
        package = _package()
        if package is not None and os.path.basename(package) not in ("site-packages", "dist-packages"):
            folders.insert(0, package)
    if any(folders):
        kept["PYTHONPATH"] = os.pathsep.join(filter(None, folders))
    return kept
