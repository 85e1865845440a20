"""The host process: runs the daemons of a test run outside of the process of the tests.

So a test that blocks the interpreter, freezes time, forbids sockets or forks disturbs no daemon, and no daemon
logs into a test. Requests are lines of JSON on stdin, each with an answer on stdout. The process ends when stdin
is closed, or one of the processes ends whose pidfds it was given, since a child of the tests may keep the pipe
open.
"""

import asyncio
import contextlib
import gc
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

_LOGGED_MAX = 50  # lines, of each daemon

_logs: "list[deque[str]]" = []  # of all running daemons
_log: ContextVar["deque[str]"] = ContextVar("_log")  # of the daemon that logs


class _Log(logging.Handler):
    """Adds messages to the log of their daemon, by context; a message of the commit thread goes to all logs."""

    def emit(self, record: logging.LogRecord) -> None:
        speaks = _log.get(None)
        for log in _logs if speaks is None else [speaks]:
            log.append(self.format(record))


class HostedDaemon:
    """A registry. It keeps its port and its file while it is stopped."""

    def __init__(self, path: Path | None) -> None:
        self._path = path or IN_MEMORY
        self._files = Files() if path else MemoryFiles()
        self._log: deque[str] = deque(maxlen=_LOGGED_MAX)
        self._port = 0
        self._server: Daemon | None = None
        self._failing: asyncio.Task[None] | None = None
        self._places: list[socket.socket] = []

    async def start(self) -> dict[str, object]:
        """Start the daemon. Idempotent."""
        if self._server is None:
            self._give_up_port()
            # In a task, which has its own context.
            self._server = await asyncio.create_task(self._start())
            self._port = int(self._server.addresses[0].rpartition(":")[2])
            self._failing = asyncio.create_task(_loudly(self._server))
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
            self._keep_port()
        return {}

    def _keep_port(self) -> None:
        """Bind without listening: connections are refused, and no other program is assigned the port."""
        for family, host in ((socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")):
            with contextlib.suppress(OSError):
                place = socket.socket(family, socket.SOCK_STREAM)
                self._places.append(place)
                place.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                place.bind((host, self._port))

    def _give_up_port(self) -> None:
        while self._places:
            self._places.pop().close()

    async def show(self) -> dict[str, object]:
        """Return the lines of the registry's file and the last lines of the log."""
        lines = excerpt(self._files, self._path)
        return {"registry": lines, "log": list(self._log), "running": self._server is not None}

    async def end(self) -> dict[str, object]:
        await self.stop()
        self._give_up_port()
        return {}


async def _loudly(server: Daemon) -> None:
    """End the process if the engine fails, as `regd` does."""
    try:
        await server.failed()
    except Exception:
        traceback.print_exc()
        os._exit(1)


class HostServer:
    """Carries out requests: `open`, and `start`, `stop`, `show`, `end` with the number of a daemon."""

    def __init__(self) -> None:
        self._count = 0
        self._daemons: dict[int, HostedDaemon] = {}

    async def answer(self, line: bytes) -> bytes:
        """Return the answer to a line, with its `id`."""
        asked = json.loads(line)
        try:
            answer = await self._do(asked)
        except (ListenError, StorageError, OSError) as error:
            answer = {"error": str(error)}
        return json.dumps({"id": asked["id"], **answer}).encode() + b"\n"

    async def _do(self, asked: dict[str, Any]) -> dict[str, object]:
        if asked["do"] == "open":
            daemon = HostedDaemon(Path(asked["path"]) if asked["path"] else None)
            answer = await daemon.start()
            self._count += 1
            self._daemons[self._count] = daemon
            return {"daemon": self._count, **answer}
        daemon = self._daemons[asked["daemon"]]
        match asked["do"]:
            case "start":
                return await daemon.start()
            case "stop":
                return await daemon.stop()
            case "show":
                return await daemon.show()
            case "end":
                del self._daemons[asked["daemon"]]
                return await daemon.end()
        raise ValueError(f"unknown request: {asked!r}")


async def _serve(parents: Sequence[int]) -> NoReturn:
    loop = asyncio.get_running_loop()
    for each in parents:
        loop.add_reader(each, os._exit, 0)
    asked = asyncio.StreamReader()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(asked), sys.stdin)
    # Not blocking: a test that stopped reading must not block the daemons.
    answers, _ = await loop.connect_write_pipe(asyncio.BaseProtocol, sys.stdout)
    host = HostServer()
    gc.freeze()
    gc.enable()
    while line := await asked.readline():
        answers.write(await host.answer(line))
    os._exit(0)  # at once: there are no more requests


def main(parents: Sequence[int]) -> NoReturn:
    """Serve until stdin is closed, or a process of one of these pidfds ends."""
    handler = _Log()
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    try:
        asyncio.run(_serve(parents))
    except BaseException:
        traceback.print_exc()
        sys.stdout.flush()
        os._exit(1)
