"""The host process, which runs the daemons of a test run.

The host is a process of its own, so that a test that blocks the interpreter, freezes time, forbids sockets or
forks does not affect the daemons. Their logs do not mix with the test's either. A request is a line of JSON on
stdin, and its answer is a line on stdout.

The host ends when stdin is closed. Since a child of the tests may keep the pipe open, it also gets pidfds of its
parents, and ends when one of them ends.
"""

import asyncio
import contextlib
import gc
import itertools
import json
import logging
import os
import socket
import sys
import traceback
from collections import deque
from collections.abc import Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import Any, NoReturn

from regd.core.limits import DEFAULT
from regd.server.daemon import Config, Daemon
from regd.storage.files import Files
from regd.storage.store import StorageError
from regd.system.listener import ListenError
from regd.system.open_files import fit_limits
from regd.testing.memory import IN_MEMORY, MemoryFiles, excerpt

_LOG_LINES_MAX = 50  # of each daemon
_numbers = itertools.count(1)  # of daemons

_logs: "list[deque[str]]" = []  # the logs of all running daemons
_log: ContextVar["deque[str]"] = ContextVar("_log")  # the log of the daemon that runs in this context


class _Log(logging.Handler):
    """Adds each message to its daemon's log, or to all logs if it is from a storage thread."""

    def emit(self, record: logging.LogRecord) -> None:
        own = _log.get(None)
        for log in _logs if own is None else [own]:
            log.append(self.format(record))


class HostedDaemon:
    """The daemon of one registry. While it is stopped, its port and its files are kept."""

    def __init__(self, path: Path | None) -> None:
        self._path = path or IN_MEMORY
        self._files = Files() if path else MemoryFiles()
        self._log: deque[str] = deque(maxlen=_LOG_LINES_MAX)
        self._port = 0
        self._server: Daemon | None = None
        self._failing: asyncio.Task[None] | None = None
        self._reserved: list[socket.socket] = []

    async def start(self) -> dict[str, object]:
        """Start the daemon. Idempotent."""
        if self._server is None:
            self._release_port()
            # A task has a context of its own, in which `_start` sets `_log`.
            self._server = await asyncio.create_task(self._start())
            self._port = int(self._server.addresses[0].rpartition(":")[2])
            self._failing = asyncio.create_task(_exit_on_failure(self._server))
            _logs.append(self._log)
        return {"address": self._server.addresses[0]}

    async def _start(self) -> Daemon:
        _log.set(self._log)
        config = Config(registry=self._path, port=self._port, limits=fit_limits(DEFAULT))
        server = Daemon(config, files=self._files)
        await server.start()
        return server

    async def stop(self) -> dict[str, object]:
        """Stop the daemon. Idempotent."""
        if self._server is not None and self._failing is not None:
            self._failing.cancel()
            await self._server.stop()
            self._server = None
            _logs[:] = [log for log in _logs if log is not self._log]
            self._reserve_port()
        return {}

    def _reserve_port(self) -> None:
        """Bind without listening, so that connections are refused, and the kernel does not reassign the port."""
        for family, host in ((socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")):
            with contextlib.suppress(OSError):
                reserved = socket.socket(family, socket.SOCK_STREAM)
                self._reserved.append(reserved)
                reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                reserved.bind((host, self._port))

    def _release_port(self) -> None:
        while self._reserved:
            self._reserved.pop().close()

    def show(self) -> dict[str, object]:
        """Return the lines of the registry file, and the last lines of the log."""
        running = self._server is not None
        return {"registry": excerpt(self._files, self._path), "log": list(self._log), "running": running}

    async def end(self) -> dict[str, object]:
        """Stop the daemon, and release its port."""
        await self.stop()
        self._release_port()
        return {}


async def _exit_on_failure(server: Daemon) -> None:
    """End the process if the daemon fails, as `regd` does."""
    try:
        await server.failed()
    except Exception:
        traceback.print_exc()
        os._exit(1)


async def _execute(request: dict[str, Any], daemons: dict[int, HostedDaemon]) -> dict[str, object]:
    """Execute a request, and return the answer.

    The requests are `open`, and `start`, `stop`, `show` and `end` with the number of a daemon.
    """
    if request["do"] == "open":
        daemon = HostedDaemon(Path(request["path"]) if request["path"] else None)
        answer = await daemon.start()
        number = next(_numbers)
        daemons[number] = daemon
        return {"daemon": number, **answer}
    daemon = daemons[request["daemon"]]
    match request["do"]:
        case "start":
            return await daemon.start()
        case "stop":
            return await daemon.stop()
        case "show":
            return daemon.show()
        case "end":
            del daemons[request["daemon"]]
            return await daemon.end()
    raise ValueError(f"unknown request: {request!r}")


async def _serve(parents: Sequence[int]) -> NoReturn:
    loop = asyncio.get_running_loop()
    for parent in parents:
        loop.add_reader(parent, os._exit, 0)
    requests = asyncio.StreamReader()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(requests), sys.stdin)
    # Write without blocking, so that a test that does not read cannot block the daemons.
    answers, _ = await loop.connect_write_pipe(asyncio.BaseProtocol, sys.stdout)
    daemons: dict[int, HostedDaemon] = {}
    gc.freeze()
    gc.enable()
    while line := await requests.readline():
        request = json.loads(line)
        try:
            answer = await _execute(request, daemons)
        except (ListenError, StorageError, OSError) as error:
            answer = {"error": str(error)}
        answers.write(json.dumps({"id": request["id"], **answer}).encode() + b"\n")
    os._exit(0)  # without stopping the daemons, since the test run is over


def main(parents: Sequence[int]) -> NoReturn:
    """Serve until stdin is closed, or one of the parents ends. `parents` are pidfds."""
    handler = _Log()
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    try:
        asyncio.run(_serve(parents))
    except BaseException:
        traceback.print_exc()
        sys.stdout.flush()
        os._exit(1)
