"""A daemon on demand: with REGD_AUTOSTART=1, who finds none on this machine starts one.

However many ask at once, one starts it: under a lock in the state folder it looks again, starts, and waits until
that listens; the others look on until they reach it. Whoever comes by another way is refused by the daemon's own
rules, a taken port or a locked registry, and finds the one that was quicker. Nothing here waits: a caller looks,
calls `step`, and pauses, with an event loop or without. Imported only where no daemon answered.
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

from regd_client import protocol
from regd_client.errors import RegdError, Unavailable

if TYPE_CHECKING:
    import subprocess

T = TypeVar("T")

IDLE_EXIT_S = 300  # long enough for who stops and starts all services by hand; then nothing is lost with it
NOT_STARTED = "not_started"  # the code of an error: it was tried
_DEFAULT_PORT = protocol.parse_address(protocol.DEFAULT_ADDRESS).port
_PAUSE_S = (0.02, 0.05)  # between two looks: of who starts it, and of the others
_STARTS_MAX = 3  # of daemons that listened and were not found
_REST_S = 5.0  # after a failure; until then it is told again
_LOG_BYTES = 4_096  # looked at for its last line
_GONE = (errno.ECONNREFUSED, errno.ECONNRESET, errno.EPIPE, errno.ENOENT)
_NOT_ITS = ("REGD_", "LISTEN_", "WATCHDOG_")  # variables that mean the starter, and systemd's to it
_NOR_THESE = ("NOTIFY_SOCKET", "STATE_DIRECTORY", "PYTHONWARNINGS", "PYTHONINSPECT")
_PYTHON = re.compile(r"(python|pypy)[0-9.]*[a-z]?(-[a-z0-9]+)?(\.exe)?", re.IGNORECASE)
_FROZEN = ("_PYI_", "_MEIPASS")  # variables of PyInstaller, which has more for a program that it starts again
_LIBRARIES = ("LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "LIBPATH")  # a frozen program has others

_failures: dict[str, tuple[float, str]] = {}  # by address: until when it rests, and what was in the way


def is_gone(error: OSError) -> bool:
    """Whether nobody is there: not for one that does not answer, nor for what cannot be found."""
    if isinstance(error, (TimeoutError, RegdError)):
        return False
    return error.errno in _GONE or error.errno is None  # None: it ended before the answer, or several in one


def until_open(address: protocol.Address, timeout_s: float, connect: Callable[[], T]) -> T:
    """Start a daemon and return what `connect` does once it can.

    Raises:
        Unavailable: there is none in time, or it cannot be started.
        OSError: whoever is there is not to be replaced.
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
    """One caller's part in it. `why` tells how far it is, for the error of who cannot wait any longer."""

    def __init__(self, address: protocol.Address) -> None:
        self._address = address
        self._registry = self._log = ""
        self._base: list[str] = []  # the command, without its flags
        self._lock: int | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._starts = 0
        self._looked = False  # since the process has ended
        self._said_from = 0  # where its part of the log begins
        self.why = "another process is starting it"

    def step(self) -> float:
        """Do what is next when nobody was there just now; return how many seconds later to look again.

        Raises:
            Unavailable: it cannot be started; `code` is `not_started`.
        """
        rests_until, failure = _failures.get(str(self._address), (0.0, ""))
        if time.monotonic() < rests_until:
            raise Unavailable(failure, NOT_STARTED)
        if not self._base:  # nothing is made before that is clear
            self._base = self._program()
            self._registry = os.path.join(self._folder(), _registry(self._address))
            self._log = self._registry.removesuffix(".json") + ".log"
            self.why = f"another process is starting it; its log is {self._log}"
        try:
            return self._step()
        except OSError as error:
            if isinstance(error, Unavailable):
                raise
            where = error.filename or self._registry
            mend = "give its rights to this user, or name another folder in XDG_STATE_HOME"
            raise self._failed(f"cannot use {where}: {error.strerror}; {mend}") from None

    def _step(self) -> float:
        if self._lock is None:
            self._lock = _locked(self._registry + ".start")
            return _PAUSE_S[1] if self._lock is None else 0.0  # whoever had it before may have started one
        if self._process is None:
            self._start()
            return _PAUSE_S[0]
        status = self._process.poll()
        if status is None:
            return _PAUSE_S[0]
        if not self._looked:  # it may have come to listen, or somebody else's, since the caller looked
            self._looked = True
            return 0.0
        if status != 0 or self._starts == _STARTS_MAX:
            raise self._failed(self._last_line() or f"it ended with status {status}")
        self._start()
        return _PAUSE_S[0]

    def _start(self) -> None:
        """Start a process that goes on in the background, and ends here once that listens or has failed."""
        import subprocess

        command, environment = self._command(), _environment()
        log = os.open(self._log, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            self._said_from = os.fstat(log).st_size
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd="/",
                env=environment,
                start_new_session=True,  # the terminal's Ctrl-C is not for it
            )
        finally:
            os.close(log)
        self._starts += 1
        self._looked = False
        self.why = f"it is being started; its log is {self._log}"

    def _command(self) -> list[str]:
        where = ["--port", str(self._address.port)]
        if self._address.path:
            where = ["--unix", self._address.path, "--port", "0"]
        kept = ["--registry", self._registry, "--log", self._log]
        return [*self._base, *where, *kept, "--background", "--idle-exit", str(IDLE_EXIT_S)]

    def _program(self) -> list[str]:
        interpreter = _interpreter()
        if interpreter is not None and _package() is not None:
            return [interpreter, "-P", "-m", "regd"]
        found = shutil.which("regd")
        found = None if found is None else _absolute(found)
        if found is not None and not _is_this_program(found):
            return [found]
        if interpreter is not None:
            raise self._failed("there is none to start: this Python has no package regd, and PATH no `regd`")
        program = sys.executable or "this program"
        raise self._failed(
            f"there is none to start: {program} is no Python interpreter, and PATH has no `regd`; "
            "install regd, or start it yourself"
        )

    def _folder(self) -> str:
        """Return where the daemon of this user keeps its registry. $STATE_DIRECTORY is the starter's own."""
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
        told = f"; its log is {self._log}" if self._starts else ""
        message = f"regd at {self._address} cannot be started: {why}{told}"
        _failures[str(self._address)] = time.monotonic() + _REST_S, message
        return Unavailable(message, NOT_STARTED)

    def _last_line(self) -> str:
        with open(self._log, "rb") as log:
            size = os.fstat(log.fileno()).st_size
            log.seek(max(self._said_from, size - _LOG_BYTES))
            lines = log.read().decode(errors="replace").split("\n")
        return next((line.removeprefix("regd: ") for line in reversed(lines) if line.strip()), "")

    def close(self) -> None:
        """Let others have their turn. What was started goes on."""
        if self._lock is not None:
            fcntl.flock(self._lock, fcntl.LOCK_UN)  # not by closing alone: a child that was forked has it, too
            os.close(self._lock)
            self._lock = None
        process, self._process = self._process, None
        if process is not None and process.poll() is None:
            import threading

            # Else it would stay behind as a zombie when it has ended.
            threading.Thread(target=process.wait, name="regd-client-started", daemon=True).start()


def _home() -> str:
    """Return this user's home folder as the system knows it, "" where it does not."""
    import pwd

    try:
        return pwd.getpwuid(os.getuid()).pw_dir
    except KeyError:
        return ""


def _registry(address: protocol.Address) -> str:
    """Return the registry's file: that of a plain `regd`, and one for each other port or path."""
    if address.path:
        return f"registry-unix-{zlib.crc32(os.fsencode(address.path)):08x}.json"
    return "registry.json" if address.port == _DEFAULT_PORT else f"registry-{address.port}.json"


def _locked(path: str) -> int | None:
    """Lock a file, or return None where another process has it."""
    os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
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
    """Return the Python that runs this program, None where it is embedded or frozen and there is none beside it.

    A frozen program is its own `sys.executable`; an embedding one too, or the interpreter has none at all.
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
    """Return an absolute path, None for a relative one where the current folder has been deleted."""
    try:
        return os.path.abspath(path)
    except OSError:
        return None


def _package() -> str | None:
    """Return the folder in which this interpreter finds the package regd, None where it does not."""
    try:
        found = find_spec("regd")
    except (ImportError, ValueError):
        return None
    if found is None or found.origin is None:  # None: a folder of that name, and no package
        return None
    origin = _absolute(found.origin)
    return None if origin is None else os.path.dirname(os.path.dirname(origin))


def _environment() -> dict[str, str]:
    """Return the daemon's: without what is the starter's own, and with its way to the package."""
    kept = {
        key: value for key, value in os.environ.items() if not key.startswith(_NOT_ITS) and key not in _NOR_THESE
    }
    # Relative to our current folder, and not to the daemon's.
    folders = [_absolute(each) for each in kept.pop("PYTHONPATH", "").split(os.pathsep) if each]
    if getattr(sys, "frozen", False):
        for name in _LIBRARIES:
            kept.pop(name, None)
            if (before := kept.pop(f"{name}_ORIG", None)) is not None:
                kept[name] = before
        kept = {key: value for key, value in kept.items() if not key.startswith(_FROZEN)}
    else:
        package = _package()
        if package is not None and os.path.basename(package) not in ("site-packages", "dist-packages"):
            folders.insert(0, package)
    if any(folders):
        kept["PYTHONPATH"] = os.pathsep.join(filter(None, folders))
    return kept
