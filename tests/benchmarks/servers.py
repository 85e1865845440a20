"""Servers as child processes, each pinned to the server's core and with a folder of its own."""

import contextlib
import itertools
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import ClassVar, Self

from tests.benchmarks.machine import SERVER_CORE, on_core, resident_bytes
from tests.support.daemon import environment
from tests.support.ports import free_port

_START_S, _END_S = 30.0, 20.0
_TRY_S = 0.02
_CHANGES = 1_000_000  # more than a run makes


class Server:
    """A server. With `durable` it must answer a write only when it is on disk; otherwise it need not save anything."""

    label: ClassVar[str]
    protocol: ClassVar[str]
    program: ClassVar[str]
    held = False  # a name ends with the connection that registered it
    connections_max = 10_000
    names_max = 1_000_000
    says_where = False  # it chooses a free port and prints it

    def __init__(self, folder: Path, *, durable: bool = False) -> None:
        self.folder = folder
        self.durable = durable
        self.port = free_port()
        self.process: subprocess.Popen[bytes] | None = None
        self.changes = itertools.count(_CHANGES, _CHANGES)  # each run writes different values
        self.holders: list[subprocess.Popen[str]] = []  # they end at the end of their stdin

    @classmethod
    def missing(cls) -> str:
        """Return the name of what is not installed, or an empty string."""
        return "" if shutil.which(cls.program) else cls.program

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    @property
    def resident_bytes(self) -> int:
        return resident_bytes(self.pid)

    def command(self) -> list[str]:
        raise NotImplementedError

    def answers(self) -> bool:
        """True if it serves requests. May raise `OSError`."""
        raise NotImplementedError

    def prepare(self) -> None:
        """Prepare the server once, before its use."""

    def start(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        with on_core(SERVER_CORE), (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen(
                self.command(),
                cwd=self.folder,
                env=environment(),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE if self.says_where else log,
                stderr=log,
            )
        self.wait()
        self.prepare()

    def wait(self) -> None:
        end = time.monotonic() + _START_S
        while time.monotonic() < end:
            assert self.process is not None
            assert self.process.poll() is None, f"{self.label} ended with {self.process.returncode}"
            with contextlib.suppress(OSError):
                if self.answers():
                    return
            time.sleep(_TRY_S)
        raise AssertionError(f"{self.label} does not answer")

    def end(self) -> None:
        if self.process is None:
            return
        self.process.terminate()
        try:
            self.process.communicate(timeout=_END_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.communicate()
        self.process = None
        for holder in self.holders:
            holder.communicate()

    def ask(self, request: bytes, until: bytes) -> bytes:
        """Send bytes on a new connection, and return what is received up to `until`."""
        reply = b""
        with socket.create_connection(("127.0.0.1", self.port), timeout=5) as peer:
            peer.sendall(request)
            while until not in reply and (some := peer.recv(65_536)):
                reply += some
        return reply

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.end()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end()


class SaysWhere(Server):
    says_where = True

    def wait(self) -> None:
        assert self.process is not None
        assert self.process.stdout is not None
        line = self.process.stdout.readline().decode()
        assert line.startswith("listening "), f"{self.label} did not start"
        self.port = int(line.rpartition(":")[2])


class Regd(SaysWhere):
    """regd on asyncio's own loop."""

    label, protocol, program = "regd", "regd", sys.executable
    hide = "import sys; sys.modules['uvloop'] = None; "

    def command(self) -> list[str]:
        start = f"{self.hide}from regd.cli.regd import main; raise SystemExit(main())"
        return [sys.executable, "-c", start, "--port", "0", "--registry", str(self.registry)]

    @property
    def registry(self) -> Path:
        return self.folder / "registry.json"


class RegdFast(Regd):
    """regd on uvloop, which the extra `fast` installs."""

    label, hide = "regd, fast", ""


class Floor(SaysWhere):
    """A server in C that answers every request with the same line."""

    label, protocol, program = "floor", "floor", "cc"
    binary: ClassVar[Path]

    def command(self) -> list[str]:
        return [str(self.binary)]
