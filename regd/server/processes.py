"""Processes that hold registrations: which one a number means now, and when it ends.

Linux tells by a pidfd (pidfd_open(2)): the descriptor is of that process for ever, whoever has its number later.
The start time (proc_pid_stat(5), field 22) and the boot tell whether a number in the file means the same one.
Must not know what they hold.
"""

import asyncio
import errno
import logging
import os
import select
from collections.abc import Callable

from regd.core.errors import Code, Refused
from regd.core.limits import Limits
from regd.core.model import Process

log = logging.getLogger("regd")


def boot_id() -> str | None:
    """Return what tells this boot from others, None where the system does not say (random(4))."""
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            return file.read().strip()
    except OSError:
        return None


class Processes:
    """`ended` is called with each process that ends while it is watched."""

    def __init__(self, limits: Limits, ended: Callable[[Process], None]) -> None:
        self._limits = limits
        self._ended = ended
        self._boot = boot_id()
        self._files: dict[Process, int] = {}
        self.unwatched: set[Process] = set()  # that hold something, and could not be watched
        self._found: list[Process] = []  # since the last `settle`

    def __len__(self) -> int:
        return len(self._files)

    def find(self, pid: int, uid: int | None = None) -> Process:
        """Return the process that has this number now, and watch it until `release`, or a `settle` without it.

        With `uid` it must belong to that user.

        Raises:
            Refused: `bad_argument` when none has it, `denied` when it is another user's, `unsupported` where the
                system cannot watch, `busy`.
        """
        if self._boot is None or not hasattr(os, "pidfd_open"):
            raise Refused(Code.UNSUPPORTED, "this system cannot watch a process; use hold or ttl")
        try:
            file = os.pidfd_open(pid)
        except ProcessLookupError:
            raise _no_process(pid) from None
        except OSError as error:
            if error.errno in (errno.EINVAL, errno.ENOENT):  # the number of a thread
                raise _no_process(pid) from None
            code = Code.UNSUPPORTED if error.errno == errno.ENOSYS else Code.BUSY  # or too many open files
            raise Refused(code, f"process {pid} cannot be watched: {error.strerror}") from None
        try:
            process = Process(pid, f"{self._boot}/{_start_ticks(pid)}")
            users = _uids(pid) if uid is not None else ()
            if has_ended(file):  # what was read may be of another one
                raise _no_process(pid)
            if uid is not None and uid not in users:
                raise Refused(
                    Code.DENIED, f"process {pid} is of user {users[0]}, and you are user {uid}", field="pid"
                )
            if process in self._files:
                os.close(file)
                return process
            if len(self._files) >= self._limits.processes_max:
                raise Refused(Code.BUSY, f"{len(self._files)} processes are watched; try again later")
        except BaseException:
            os.close(file)
            raise
        self._files[process] = file
        self._found.append(process)
        asyncio.get_running_loop().add_reader(file, self._end, process)
        return process

    def watch(self, process: Process) -> bool:
        """Watch the process that a number once meant. False when it has ended.

        One that cannot be watched now is `unwatched`, and `retry` tells of its end.
        """
        try:
            return self.find(process.pid) == process
        except Refused as refusal:
            if refusal.code is Code.BAD_ARGUMENT or self._is_over(process):
                return False
            log.warning("%s; looking at it now and then instead", refusal.message)
            self.unwatched.add(process)
            return True

    def retry(self) -> list[Process]:
        """Look at those that could not be watched, and return which have ended."""
        ended = [process for process in self.unwatched if self._is_over(process)]
        self.unwatched.difference_update(ended)
        return ended

    def _is_over(self, process: Process) -> bool:
        try:
            return process.born != f"{self._boot}/{_start_ticks(process.pid)}"
        except Refused:
            return True

    def settle(self, is_used: Callable[[Process], bool]) -> None:
        """Let go of what was found, and is of no use after all."""
        for process in self._found:
            if not is_used(process):
                self.release(process)
        self._found.clear()

    def is_gone(self, process: Process) -> bool:
        """Whether the kernel knows it to have ended, told already or not."""
        if process in self.unwatched:
            return self._is_over(process)
        file = self._files.get(process)
        return file is None or has_ended(file)

    def release(self, process: Process) -> None:
        self.unwatched.discard(process)
        file = self._files.pop(process, None)
        if file is not None:
            asyncio.get_running_loop().remove_reader(file)
            os.close(file)

    def close(self) -> None:
        for process in list(self._files):
            self.release(process)

    def _end(self, process: Process) -> None:
        self.release(process)
        self._ended(process)


def has_ended(file: int) -> bool:
    poll = select.poll()
    poll.register(file, select.POLLIN)
    return bool(poll.poll(0))


def _start_ticks(pid: int) -> str:
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            # The name may hold blanks and parentheses; behind its last one stand the fields from the third on.
            return file.read().rpartition(b")")[2].split()[19].decode("ascii")
    except (OSError, IndexError):
        raise _no_process(pid) from None


def _uids(pid: int) -> tuple[int, ...]:
    """Return the users that a process runs as: real, effective, saved, and for files (proc_pid_status(5))."""
    try:
        with open(f"/proc/{pid}/status", "rb") as file:
            [found] = [line for line in file if line.startswith(b"Uid:")]
    except (OSError, ValueError):
        raise _no_process(pid) from None
    return tuple(int(each) for each in found.split()[1:])


def _no_process(pid: int) -> Refused:
    return Refused(Code.BAD_ARGUMENT, f"pid {pid}: there is no such process", field="pid")
