"""A state folder and an address for autostarted daemons; ends all daemons that use them."""

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

SLOW_S = 40.0  # for many processes that start together on a busy machine


class Demand:
    """A state folder, and an address at which nobody is. All processes that name the folder are its daemons."""

    def __init__(self, place: Path, address: str) -> None:
        self.place = place
        self.address = address
        self.folder = place / "state" / "regd"

    def environment(self, **extra: str) -> dict[str, str]:
        here = {"HOME": str(self.place), "XDG_STATE_HOME": str(self.place / "state")}
        return environment(**here, REGD_ADDRESS=self.address, REGD_AUTOSTART="1") | extra

    def program(self, code: str, **extra: str) -> "subprocess.Popen[str]":
        """Start a Python program that may ask, with its stdin and stdout here."""
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
        """What all daemons here have logged."""
        return "".join(path.read_text() for path in sorted(self.place.rglob("registry*.log")))

    def daemons(self) -> set[int]:
        """Return the processes of daemons here, those that just start among them."""
        found = set()
        for path in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                words = (path / "cmdline").read_bytes().split(b"\0")
                if b"--registry" in words and any(word.startswith(os.fsencode(self.place)) for word in words):
                    found.add(int(path.name))
        return found

    def end(self) -> None:
        """End all daemons here, and wait until they have."""
        late = time.monotonic() + WAIT_S
        while left := self.daemons():
            assert time.monotonic() < late, f"still there: {left}"
            for pid in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.01)


@contextlib.contextmanager
def demand(place: Path, tcp: bool = False) -> Iterator[Demand]:
    """Yield such a place, on a Unix socket, or on a TCP port that nobody else is given meanwhile."""
    with contextlib.ExitStack() as stack:
        address = f"unix://{place}/s"
        if tcp:
            address = f"tcp://127.0.0.1:{stack.enter_context(kept_port())}"
        made = Demand(place, address)
        stack.callback(made.end)
        yield made


@contextlib.contextmanager
def kept_port() -> Iterator[int]:
    """Keep a port by sockets that do not listen: regd may, since it sets SO_REUSEADDR, too."""
    with socket.socket() as four, socket.socket(socket.AF_INET6) as six:
        for each in (four, six):
            each.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        six.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        six.bind(("::1", 0))
        four.bind(("127.0.0.1", six.getsockname()[1]))
        yield int(four.getsockname()[1])


def stat(pid: int) -> Mapping[str, str]:
    """Return what the system says of a process (proc(5))."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return {"state": fields[0], "parent": fields[1], "session": fields[3]}
