"""Daemons for tests, in the test's loop or in a process, and a peer that sends and reads lines."""

import asyncio
import contextlib
import json
import os
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from regd.core.limits import DEFAULT, Limits
from regd.server.daemon import Config, Daemon
from regd.storage.files import Files
from regd.system.peer_credentials import PeerCredentials
from tests.support.clock import HandClock

ROOT = Path(__file__).resolve().parents[2]
EPOCH = "5eed5eed5eed5eed"
# For a program in development mode: on a busy machine asyncio would warn of slow callbacks.
QUIET_ASYNCIO = "import logging; logging.getLogger('asyncio').setLevel(logging.ERROR)\n"
WAIT_S = 15.0  # for a step that takes milliseconds on an idle machine


class Peer:
    """A connection that sends requests and reads reply lines."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    def send(self, *requests: bytes | str | dict[str, Any]) -> None:
        """Send requests: a dict as JSON, a str as a line, bytes unchanged and without a newline."""
        for request in requests:
            if isinstance(request, dict):
                request = json.dumps(request)
            self.writer.write(request if isinstance(request, bytes) else request.encode() + b"\n")

    async def line(self) -> bytes:
        async with asyncio.timeout(WAIT_S):
            return await self.reader.readline()

    async def reply(self) -> dict[str, Any]:
        line = await self.line()
        assert line.endswith(b"\n"), f"the connection ended: {line!r}"
        assert line.isascii()
        fields = json.loads(line)
        assert isinstance(fields, dict)
        return fields

    async def ask(self, *request: bytes | str | dict[str, Any], **fields: Any) -> dict[str, Any]:
        self.send(*request or ({"cmd": fields.pop("cmd"), **fields},))
        return await self.reply()

    async def rest(self) -> bytes:
        """Read until the connection ends, and return the bytes."""
        async with asyncio.timeout(WAIT_S):
            return await self.reader.read()

    async def reset(self) -> None:
        """Reset the connection with a TCP RST, which the daemon sees at once."""
        sock = self.writer.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        await self.close()

    async def close(self) -> None:
        self.writer.close()
        with contextlib.suppress(ConnectionError):
            await self.writer.wait_closed()


class InLoop:
    """A daemon in the running loop. Its time is moved by hand, through `clock`."""

    def __init__(
        self,
        registry: Path,
        *,
        limits: Limits = DEFAULT,
        files: Files | None = None,
        unix: Path | None = None,
        epoch: str = EPOCH,
        peers: PeerCredentials | None = None,
        idle_exit_s: float | None = None,
    ) -> None:
        self.clock = HandClock()
        self.config = Config(registry=registry, port=0, limits=limits, unix=unix, idle_exit_s=idle_exit_s)
        self.server = Daemon(self.config, clock=self.clock, files=files, epoch=epoch, peers=peers)
        self.peers: list[Peer] = []

    @property
    def port(self) -> int:
        return int(self.server.addresses[0].rpartition(":")[2])

    @property
    def registry(self) -> Path:
        return self.config.registry

    async def __aenter__(self) -> Self:
        await self.server.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for peer in self.peers:
            await peer.close()
        await self.server.stop()

    async def peer(self, host: str = "127.0.0.1") -> Peer:
        peer = Peer(*await asyncio.open_connection(host, self.port, limit=2 * 1_048_576))
        self.peers.append(peer)
        return peer


class DaemonProcess:
    """A daemon in a process of its own, on a free port.

    Between its end and its next start, its port is reserved. `stock` keeps it on asyncio's own loop; `before` is the
    command line to run it under, such as `unshare`.
    """

    def __init__(self, registry: Path, *flags: str, stock: bool = True, before: Sequence[str] = ()) -> None:
        self.registry = registry
        self._before = before
        self._flags = flags
        self._stock = stock
        self.process: subprocess.Popen[str] | None = None
        self.addresses: list[str] = []
        self.port = 0
        self._reserved = contextlib.ExitStack()  # sockets

    def command(self, *flags: str) -> list[str]:
        hide = "import sys; sys.modules['uvloop'] = None; " if self._stock else ""
        start = f"{hide}from regd.cli.regd import main; raise SystemExit(main())"
        return [
            *self._before,
            sys.executable,
            "-c",
            start,
            "--registry",
            str(self.registry),
            *self._flags,
            *flags,
        ]

    def start(self) -> None:
        """Start the daemon and wait until it listens. After a restart it has the same port."""
        self.process = subprocess.Popen(
            self.command("--port", str(self.port)),
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line.startswith("listening "):
            _, errors = self.process.communicate(timeout=WAIT_S)
            raise AssertionError(f"regd did not start: {errors}")
        self._reserved.close()
        self.addresses = [line.split()[1]]
        self.port = int(line.rpartition(":")[2])

    def end(self, number: int = signal.SIGTERM) -> tuple[int, str]:
        """Send a signal, wait for the exit, and return the exit status and the log."""
        assert self.process is not None
        self.process.send_signal(number)
        _, errors = self.process.communicate(timeout=WAIT_S)
        status, self.process = self.process.returncode, None
        for family, host in ((socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")):
            with contextlib.suppress(OSError):
                sock = self._reserved.enter_context(socket.socket(family))
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # regd sets it too, and so can listen
                sock.bind((host, self.port))
        return status, errors

    def close(self) -> None:
        """Kill the daemon if it runs, and release its port."""
        if self.process is not None:
            self.end(signal.SIGKILL)
        self._reserved.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def environment(**extra: str) -> dict[str, str]:
    """Return an environment for a child process: with the project's packages, without this one's REGD_ variables."""
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("REGD_")}
    inherited.pop("PORT", None)  # `regctl run` would take it for its command
    return inherited | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "client")])} | extra
