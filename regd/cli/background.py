"""A daemon that nobody sits before: its log in a file, and itself behind whoever started it.

Must not know what it serves.
"""

import os
import signal
import sys
from pathlib import Path
from typing import IO

_STANDARD = (0, 1, 2)


class LogError(Exception):
    """The log cannot be written. Its text is one line: which, why, what to do."""


def open_log(path: Path) -> IO[str]:
    """Open a file to append to, for this user alone where it is new.

    Raises:
        LogError: it cannot be had.
    """
    try:
        fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise LogError(f"cannot write the log {path}: {error.strerror}; name another with --log") from None
    return os.fdopen(fd, "w", buffering=1, encoding="utf-8", errors="backslashreplace")


def is_stderr(log: IO[str]) -> bool:
    """Whether stderr leads to the same file already."""
    try:
        return sys.stderr is not None and os.path.samestat(os.fstat(log.fileno()), os.fstat(sys.stderr.fileno()))
    except (OSError, ValueError):
        return False


class Foreground:
    """What the starter waits for; here it is the daemon itself."""

    def leave(self) -> None:
        """It listens: nobody needs to wait any more."""


class Background(Foreground):
    """The rest of this program in a child of its own session; the parent waits until that listens, or has failed.

    To be made before there is a thread, an event loop or anything else that a child has no use for.
    """

    def __init__(self, log: IO[str]) -> None:
        self._log = log
        heard, self._told = os.pipe()
        if os.fork():
            os.close(self._told)
            listens = os.read(heard, 1)  # empty: the child has ended, and said why
            os._exit(0 if listens else 1)
        os.close(heard)
        os.setsid()
        signal.pthread_sigmask(signal.SIG_SETMASK, ())  # a thread that starts it may hold signals back
        os.chdir("/")  # else its folder could not be unmounted

    def leave(self) -> None:
        nowhere = os.open(os.devnull, os.O_RDWR)
        for number, target in zip(_STANDARD, (nowhere, nowhere, self._log.fileno()), strict=True):
            os.dup2(target, number)
        if nowhere not in _STANDARD:
            os.close(nowhere)
        os.write(self._told, b"!")
        os.close(self._told)
