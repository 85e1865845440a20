"""Descriptors that a caller hands down, and the way into the background.

Must not know what the daemon serves.
"""

import contextlib
import os
import signal
import sys
from collections.abc import Collection

_STANDARD = (0, 1, 2)
_FILES_MAX = 65_536  # looked at where the system does not list them
_FOLDERS = ("/proc/self/fd", "/dev/fd")


def open_standard_files() -> None:
    """Open those of 0, 1 and 2 that are closed on /dev/null. Call it first thing.

    Else the next file or socket gets the number, and what is meant for stderr is written into it.
    """
    for number in _STANDARD:
        try:
            os.fstat(number)
        except OSError:
            opened = os.open(os.devnull, os.O_RDWR)
            if opened != number:
                os.dup2(opened, number)
                os.close(opened)
    # None when it was closed: `print` then takes stdout for stderr.
    if sys.stdout is None:
        sys.stdout = os.fdopen(1, "w", encoding="utf-8", closefd=False)
    if sys.stderr is None:
        sys.stderr = os.fdopen(2, "w", encoding="utf-8", errors="backslashreplace", closefd=False)


def close_inherited_files(keep: Collection[int]) -> None:
    """Close all files from 3 up but those to keep: they are the caller's, who may wait for their end."""
    numbers: Collection[int] = range(3, min(os.sysconf("SC_OPEN_MAX"), _FILES_MAX))
    for folder in _FOLDERS:
        with contextlib.suppress(OSError):
            numbers = [int(name) for name in os.listdir(folder)]
            break
    for number in numbers:
        if number not in _STANDARD and number not in keep:
            with contextlib.suppress(OSError):  # the list itself was open, too
                os.close(number)


class Foreground:
    """What the starter waits for; here it is the daemon itself."""

    def leave(self) -> None:
        """It listens: nobody needs to wait any more."""


class Background(Foreground):
    """The rest of this program in a child of its own session; the parent waits until that listens, or has failed.

    To be made before there is a thread, an event loop or anything else that a child has no use for. `log` is the
    descriptor that takes the place of stderr.
    """

    def __init__(self, log: int) -> None:
        self._log = log
        heard, self._told = os.pipe()
        if os.fork():
            os.close(self._told)
            listens = os.read(heard, 1)  # empty: the child has ended, and said why
            os._exit(0 if listens else 1)
        os.close(heard)
        os.setsid()
        os.chdir("/")  # else its folder could not be unmounted

    def leave(self) -> None:
        nowhere = os.open(os.devnull, os.O_RDWR)
        for number, target in zip(_STANDARD, (nowhere, nowhere, self._log), strict=True):
            os.dup2(target, number)
        if nowhere not in _STANDARD:
            os.close(nowhere)
        with contextlib.suppress(OSError):  # the starter may have been killed
            os.write(self._told, b"!")
        os.close(self._told)


def take_signals() -> None:
    """Let signals arrive that the caller has blocked: a thread that starts a program may hold them back."""
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
