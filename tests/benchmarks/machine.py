"""The machine: its hardware, the cores that processes are pinned to, and its other load."""

import contextlib
import os
import platform
import subprocess
from collections.abc import Iterator
from pathlib import Path

CORES = sorted(os.sched_getaffinity(0))
SERVER_CORE, LOAD_CORE = CORES[0], CORES[-1]
_TICKS_A_SECOND = os.sysconf("SC_CLK_TCK")


@contextlib.contextmanager
def on_core(core: int) -> Iterator[None]:
    """Pin processes that are started within the block, and all their threads, to this core."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {core})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def resident_bytes(pid: int) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1_024
    raise AssertionError("no VmRSS")


def _processes() -> Iterator[tuple[int, int, float]]:
    """Yield the pid, parent and processor seconds of each process, including those of ended children."""
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = path.read_text().rpartition(")")[2].split()
            yield int(path.parent.name), int(fields[1]), sum(map(int, fields[11:15])) / _TICKS_A_SECOND


def others_s() -> float:
    """Return the processor seconds so far of all processes except this one, its parents, its children and the kernel."""
    processes = {pid: (parent, seconds) for pid, parent, seconds in _processes()}
    above = set()
    at = os.getpid()
    while at in processes:
        above.add(at)
        at = processes[at][0]
    total = 0.0
    for pid, (_, seconds) in processes.items():
        line, at = {pid}, pid
        while at in processes and at != os.getpid():
            at = processes[at][0]
            line.add(at)
        if os.getpid() not in line and pid not in above and 2 not in line:
            total += seconds
    return total + _stolen_s()


def _stolen_s() -> float:
    """Return the seconds taken by other virtual machines on the host."""
    return int(Path("/proc/stat").read_text().split()[8]) / _TICKS_A_SECOND


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def file_system(folder: Path) -> str:
    command = ["findmnt", "--noheadings", "--output", "FSTYPE", "--target", str(folder)]
    with contextlib.suppress(OSError):
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or "unknown"
    return "unknown"


def facts(folder: Path) -> dict[str, str]:
    return {
        "processor": f"{_processor()}, {os.cpu_count()} cores",
        "kernel": f"{platform.system()} {'.'.join(platform.release().split('.')[:2])}",
        "file system": file_system(folder),
        "Python": platform.python_version(),
    }
