"""Build the load generators in C, and run them on their own core. The head of each C file describes it."""

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

from tests.benchmarks.machine import LOAD_CORE, on_core
from tests.benchmarks.servers import Server

SOURCES = Path(__file__).parent / "native"
COMPILER = shutil.which("cc")
FLAGS = (
    "-std=gnu11",
    "-O2",
    "-D_GNU_SOURCE",
    "-Wall",
    "-Wextra",
    "-Wconversion",
    "-Wno-sign-conversion",
    "-Werror",
)
SHARED = ("cards.c", "dial.c", "protocols.c", "lines.c", "nats.c", "zookeeper.c", "etcd.c", "epmd.c")
PROGRAMS = {name: (f"{name}.c", *SHARED) for name in ("load", "follow", "floor", "bare")}
_LEAVE_S = 240.0

Measured = dict[str, float]


class WrongReply(Exception):
    """A server sent a wrong reply."""


def build(folder: Path) -> None:
    """Compile the programs into a folder, with warnings as errors."""
    assert COMPILER is not None, "the benchmark needs a C compiler"
    for name, sources in PROGRAMS.items():
        paths = [str(SOURCES / source) for source in sources]
        subprocess.run([COMPILER, *FLAGS, "-o", str(folder / name), *paths], check=True)


class Generator:
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def run(self, server: Server, program: str = "load", **options: Any) -> Measured:
        """Run a program against a server, and return its measurements."""
        if options.get("work") == "write":
            options["count_from"] = next(server.changes)
        words = self.command(server, program, **options)
        with on_core(LOAD_CORE):
            done = subprocess.run(words, capture_output=True, text=True, timeout=_LEAVE_S, check=False)
        if done.returncode != 0:
            raise WrongReply(f"{server.label}: {done.stderr}")
        measured: Measured = json.loads(done.stdout)
        return measured

    def command(self, server: Server, program: str = "load", **options: Any) -> list[str]:
        words = [str(self.folder / program), server.protocol, f"--port={server.port}", f"--server={server.pid}"]
        for key, value in options.items():
            flag = f"--{key.replace('_', '-')}"
            words.append(flag if value is True else f"{flag}={value}")
        return words

    def fill(self, server: Server, names: int) -> None:
        """Register `count` names at a server."""
        if server.held:
            self.hold(server, names, "create")
            return
        connections = next(count for count in (50, 20, 10, 1) if names % count == 0)
        depth = min(32, names // connections)
        self.run(server, work="create", once=True, names=names, connections=connections, depth=depth)

    def hold(self, server: Server, names: int, work: str = "read") -> None:
        """Open connections, send a request on each, and keep them open until the server ends."""
        command = self.command(server, work=work, once=True, names=names, connections=names, hold=True)
        holder = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        server.holders.append(holder)
        assert holder.stdout is not None
        if not holder.stdout.readline():
            raise WrongReply(f"{server.label} does not take {names} connections")
