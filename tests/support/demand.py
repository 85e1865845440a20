"""A state folder and an address for autostarted daemons. The daemons are killed at the end of the test."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from tests.support.daemon import WAIT_S, environment

SLOW_S = 40.0  # for many processes that start at once on a busy machine


class Demand:
    """A state folder, and an address on which nothing listens yet. Daemons are found by the folder's path."""

    def __init__(self, place: Path, address: str) -> None:
        self.place = place
        self.address = address
        self.folder = place / "state" / "regd"

    def environment(self, **extra: str) -> dict[str, str]:
        here = {"HOME": str(self.place), "XDG_STATE_HOME": str(self.place / "state")}
        return environment(**here, REGD_ADDRESS=self.address, REGD_AUTOSTART="1") | extra

    def program(self, code: str, **extra: str) -> "subprocess.Popen[str]":
        """Start a Python program with pipes to its stdin and stdout."""
        return subprocess.Popen(
            [sys.executable, "-W", "error", "-c", code], env=self.environment(**extra), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    def regctl(self, *arguments: str, **extra: str) -> tuple[int, str, str]:
        command = [sys.executable, "-m", "regd.cli.regctl", *arguments]
        done = subprocess.run(
            command, env=self.environment(**extra), capture_output=True, text=True, timeout=SLOW_S, check=False
        )
        assert "Traceback" not in done.stderr
        return done.returncode, done.stdout, done.stderr

    @property
    def log(self) -> str:
        """The logs of all daemons in this folder."""
        return "".join(path.read_text() for path in sorted(self.place.rglob("registry*.log")))

    @property
    def starts(self) -> int:
        """How many daemons have listened. A daemon says so before it can be reached, unlike the lines of its log."""
        return self.log.count(f"listening {self.address}\n")

    def daemons(self) -> set[int]:
        """Return the pids of the daemons in this folder, including those that are starting.

        A process that has started its daemon, and has not ended yet, is not one of them.
        """
        parents: dict[int, int] = {}
        for path in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if self.is_daemon((path / "cmdline").read_bytes().split(b"\0")):
                    parents[int(path.name)] = int(stat(int(path.name))["parent"])
        return parents.keys() - parents.values()

    def is_daemon(self, words: list[bytes]) -> bool:
        """Return whether a command line is that of a daemon in this folder."""
        return b"--registry" in words and any(word.startswith(os.fsencode(self.place)) for word in words)

    def end(self) -> None:
        """Kill all daemons in this folder, and wait for their end."""
        deadline = time.monotonic() + WAIT_S
        while pids := self.daemons():
            assert time.monotonic() < deadline, f"still running: {pids}"
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.01)


@contextlib.contextmanager
def demand(place: Path, tcp: bool = False) -> Iterator[Demand]:
    """Yield a state folder with the address of a Unix socket in it, or of a reserved TCP port."""
    with contextlib.ExitStack() as stack:
        address = f"unix://{place}/s"
        if tcp:
            address = f"tcp://127.0.0.1:{stack.enter_context(reserved_port())}"
        demand = Demand(place, address)
        stack.callback(demand.end)
        yield demand


@contextlib.contextmanager
def reserved_port() -> Iterator[int]:
    """Reserve a port with bound sockets that do not listen. regd can still listen on it: both set SO_REUSEADDR."""
    with socket.socket() as ipv4, socket.socket(socket.AF_INET6) as ipv6:
        for sock in (ipv4, ipv6):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        ipv6.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        ipv6.bind(("::1", 0))
        ipv4.bind(("127.0.0.1", ipv6.getsockname()[1]))
        yield int(ipv4.getsockname()[1])


def stat(pid: int) -> Mapping[str, str]:
    """Return the state, parent pid and session of a process (proc(5))."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return {"state": fields[0], "parent": fields[1], "session": fields[3]}
