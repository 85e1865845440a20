"""Watch processes: identify the process with a given id, and notice when it ends.

A pidfd (pidfd_open(2), Linux) refers to one process, even if its id is reused. The boot id and the start time
(proc_pid_stat(5), field 22) show whether a stored process id still refers to the same process.
"""

import asyncio
import errno
import logging
import os
import select
from collections.abc import Callable
from itertools import islice

from regd.core.errors import Code, Refused
from regd.core.limits import Limits
from regd.core.model import Process

log = logging.getLogger("regd")

# Errors of pidfd_open(2) if there is no such process. EINVAL and ENOENT: the id is that of a thread.
_NO_PROCESS = (errno.ESRCH, errno.EINVAL, errno.ENOENT)
# Errors for a lack of resources. All others, such as EPERM from a container's seccomp filter, are permanent.
_NO_ROOM = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EAGAIN)
_ROOT = 0
_CHECKS_MAX = 256  # of unwatched processes, in one call of `retry`


def boot_id() -> str | None:
    """Return the id of this boot (random(4)); None if the system does not provide it."""
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            return file.read().strip()
    except OSError:
        return None


class Processes:
    """The watched processes. `ended` is called with each process that ends while it is watched."""

    def __init__(self, limits: Limits, ended: Callable[[Process], None]) -> None:
        self._limits = limits
        self._ended = ended
        self._boot: str | None = None  # None: no process can be identified
        self._files: dict[Process, int] = {}
        self.unwatched: dict[Process, None] = {}  # `retry` checks these, since they cannot be watched
        self._new: list[Process] = []  # watched by `find` since the last `release_unused`

    def __len__(self) -> int:
        return len(self._files)

    def open(self) -> None:
        """Find out whether /proc can identify processes. Call it before `find`."""
        self._boot = boot_id() if _sees_own_namespace() else None

    def find(self, pid: int, uid: int | None = None) -> Process:
        """Return the process with this id, and watch it until `release`.

        If no registration has it by the next call of `release_unused`, it is released then. With `uid`, the
        process must belong to that user, unless the user is root.

        Raises:
            Refused: `bad_argument`: there is no such process. `denied`: it belongs to another user.
                `unsupported`: regd cannot see or watch it. `busy`: too many processes are watched.
        """
        if self._boot is None or not hasattr(os, "pidfd_open"):
            raise _unsupported(pid, "this system shows regd no processes")
        try:
            file = os.pidfd_open(pid)
        except OSError as error:
            if error.errno in _NO_PROCESS:
                raise _no_process(pid) from None
            if error.errno in _NO_ROOM:
                why = f"process {pid} cannot be watched now: {error.strerror}; try again later"
                raise Refused(Code.BUSY, why) from None
            raise _unsupported(pid, error.strerror or "unknown error") from None
        try:
            process = self._identify(pid, file, uid)
            if process in self._files:
                os.close(file)
                return process
            if len(self._files) >= self._limits.processes_max:
                raise Refused(Code.BUSY, f"{len(self._files)} processes are watched; try again later")
        except BaseException:
            os.close(file)
            raise
        self._files[process] = file
        self._new.append(process)
        asyncio.get_running_loop().add_reader(file, self._end, process)
        return process

    def _identify(self, pid: int, file: int, uid: int | None) -> Process:
        """Return the process of a pidfd, identified by means of /proc."""
        checks_user = uid is not None and uid != _ROOT
        try:
            process = Process(pid, f"{self._boot}/{start_ticks(pid)}")
            users = _uids(pid) if checks_user else ()
        except OSError as error:
            if has_ended(file):
                raise _no_process(pid) from None
            # /proc may be mounted with hidepid (proc(5)).
            raise _unsupported(pid, f"/proc/{pid}: {error.strerror}") from None
        if has_ended(file):  # its id may have been reused before /proc was read
            raise _no_process(pid)
        if checks_user and uid not in users:
            raise Refused(
                Code.DENIED, f"process {pid} is of user {users[0]}, and you are user {uid}", field="pid"
            )
        return process

    def identify(self, process: Process) -> Process:
        """Fill in `born` if only the number of a process is known, as from a file edited by hand."""
        if process.born:
            return process
        try:
            return self.find(process.pid)
        except Refused:
            return process

    def watch(self, process: Process) -> bool:
        """Watch a stored process. Return False if it has ended.

        A process that cannot be watched is added to `unwatched`, so that `retry` notices when it ends.
        """
        try:
            return self.find(process.pid) == process
        except Refused as refusal:
            if refusal.code is Code.BAD_ARGUMENT or self._has_certainly_ended(process):
                return False
            if not self.unwatched:
                log.warning("%s; regd checks it, and others like it, at intervals instead", refusal.message)
            self.unwatched[process] = None
            return True

    def retry(self) -> list[Process]:
        """Check up to 256 of the unwatched processes, and return those that have ended."""
        ended = []
        for process in list(islice(self.unwatched, _CHECKS_MAX)):
            del self.unwatched[process]
            if self._has_certainly_ended(process):
                ended.append(process)
            else:
                self.unwatched[process] = None  # at the end of the queue
        return ended

    def _has_certainly_ended(self, process: Process) -> bool:
        """Return whether it is certain that a process has ended. Without /proc, only see if its id is in use."""
        try:
            if self._boot is not None:
                return process.born != f"{self._boot}/{start_ticks(process.pid)}"
        except OSError:
            if process.born.rpartition("/")[0] != self._boot:
                return True
        return not _is_in_use(process.pid)

    def release_unused(self, is_used: Callable[[Process], bool]) -> None:
        """Release the processes that `find` has watched since the last call, unless they are used."""
        for process in self._new:
            if not is_used(process):
                self.release(process)
        self._new.clear()

    def is_gone(self, process: Process) -> bool:
        """Return whether a process has ended, according to the kernel."""
        if process in self.unwatched:
            return self._has_certainly_ended(process)
        file = self._files.get(process)
        return file is None or has_ended(file)

    def release(self, process: Process) -> None:
        """Stop watching a process. Idempotent."""
        self.unwatched.pop(process, None)
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
    """Return whether the process of a pidfd has ended."""
    poll = select.poll()
    poll.register(file, select.POLLIN)
    return bool(poll.poll(0))


def _is_in_use(pid: int) -> bool:
    """Return whether there is a process with this id (kill(2): EPERM means that there is)."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass
    return True


def _sees_own_namespace() -> bool:
    """Return whether /proc belongs to this process's pid namespace (pid_namespaces(7))."""
    try:
        return os.readlink("/proc/self") == str(os.getpid())
    except OSError:
        return False


def start_ticks(pid: int) -> str:
    """Return when a process started, in clock ticks since boot. Raise OSError if /proc does not show it."""
    with open(f"/proc/{pid}/stat", "rb") as file:
        # The second field, the name, may contain blanks and parentheses. The third follows the last parenthesis.
        fields = file.read().rpartition(b")")[2].split()
    if len(fields) < 20:
        raise ProcessLookupError(errno.ESRCH, os.strerror(errno.ESRCH))
    return fields[19].decode("ascii")


def _uids(pid: int) -> tuple[int, ...]:
    """Return the real, effective, saved and file-system uid of a process (proc_pid_status(5)).

    Raise OSError if /proc does not show it.
    """
    with open(f"/proc/{pid}/status", "rb") as file:
        lines = [line for line in file if line.startswith(b"Uid:")]
    if not lines:
        raise ProcessLookupError(errno.ESRCH, os.strerror(errno.ESRCH))
    return tuple(int(uid) for uid in lines[0].split()[1:])


def _no_process(pid: int) -> Refused:
    return Refused(Code.BAD_ARGUMENT, f"pid {pid}: there is no such process", field="pid")


def _unsupported(pid: int, why: str) -> Refused:
    return Refused(Code.UNSUPPORTED, f"regd cannot watch process {pid}: {why}; use hold or ttl", field="pid")
