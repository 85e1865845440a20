"""Runs regd in the background: forks, closes inherited files, and unblocks inherited signals."""

import contextlib
import os
import signal
from collections.abc import Callable, Collection

_STANDARD = (0, 1, 2)
_FILES_MAX = 65_536  # the descriptors to close, if the system cannot list the open ones
_FOLDERS = ("/proc/self/fd", "/dev/fd")


def close_inherited_files(keep: Collection[int]) -> None:
    """Close all files from 3 up, except `keep`: another process may wait for the end of an inherited pipe."""
    numbers: Collection[int] = range(3, min(os.sysconf("SC_OPEN_MAX"), _FILES_MAX))
    for folder in _FOLDERS:
        with contextlib.suppress(OSError):
            numbers = [int(name) for name in os.listdir(folder)]
            break
    for number in numbers:
        if number not in _STANDARD and number not in keep:
            with contextlib.suppress(OSError):  # `listdir` also lists its own descriptor, closed by now
                os.close(number)


def fork_to_background(log: int) -> Callable[[], None]:
    """Fork: the child continues in its own session, and the parent exits once the child listens or has failed.

    Call it before starting any thread or event loop.

    Returns:
        A function that the child calls once it listens. It detaches the child from the terminal, replaces stderr
        by `log`, and lets the parent exit.
    """
    reading, writing = os.pipe()
    if os.fork():
        os.close(writing)
        listens = os.read(reading, 1)  # empty if the child has ended
        os._exit(0 if listens else 1)
    os.close(reading)
    os.setsid()
    os.chdir("/")  # so that the file system of the current folder can be unmounted

    def detach() -> None:
        null = os.open(os.devnull, os.O_RDWR)
        for number, target in zip(_STANDARD, (null, null, log), strict=True):
            os.dup2(target, number)
        if null not in _STANDARD:
            os.close(null)
        with contextlib.suppress(OSError):  # the parent may have been killed
            os.write(writing, b"!")
        os.close(writing)

    return detach


def unblock_signals() -> None:
    """Unblock all signals, since the parent may have blocked them before it started this program."""
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
