"""Run a daemon, `regd` and `regctl` for the producers of messages, and collect what they print."""

import asyncio
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from regd.cli import regctl
from regd_client import RegdError
from tests.support.daemon import WAIT_S, DaemonProcess, InLoop, environment
from tests.support.polling import until


class Scene:
    """A folder, environment and log for one message. Patches end with the test; `folder` is empty at first."""

    def __init__(
        self,
        folder: Path,
        patch: pytest.MonkeyPatch,
        log: pytest.LogCaptureFixture,
        capture: pytest.CaptureFixture[str],
    ) -> None:
        self.folder = folder
        self.registry = folder / "registry.json"
        self.journal = folder / "registry.journal"
        self.patch = patch
        log.set_level("INFO", "regd")
        self._log = log
        self._capture = capture

    @asynccontextmanager
    async def daemon(self, **options: Any) -> AsyncIterator[InLoop]:
        """Run a daemon in this loop, at the address in REGD_ADDRESS. Its time is moved by hand."""
        async with InLoop(self.registry, **options) as daemon:
            self.at(daemon.port)
            yield daemon

    def at(self, port: int) -> None:
        """Set REGD_ADDRESS to a port of this machine."""
        self.patch.setenv("REGD_ADDRESS", f"tcp://127.0.0.1:{port}")

    async def regd(self, *flags: str, status: int, before: Sequence[str] = ()) -> str:
        """Run a regd that fails to start with this status. Return its message, without the prefix."""
        return await self._run("regd", DaemonProcess(self.registry, before=before).command(*flags), status)

    async def regctl(self, *arguments: str, status: int, prefix: str = "regctl") -> str:
        """Run a regctl command that fails with this status, in a thread. Return its message, without the prefix."""

        def run() -> int:
            try:
                return regctl.main(arguments)
            except SystemExit as end:
                assert isinstance(end.code, int)
                return end.code

        assert await asyncio.to_thread(run) == status
        return _message(prefix, self.stderr())

    async def process(self, module: str, *arguments: str, status: int) -> str:
        """Run a module that fails with this status, in a process. Return its message, without the prefix."""
        return await self._run(module.rpartition(".")[2], [sys.executable, "-m", module, *arguments], status)

    async def shell(self, name: str, line: str, status: int) -> str:
        """Run a shell command that fails with this status. Return its message, without the prefix."""
        return await self._run(name, ["sh", "-c", line], status)

    async def _run(self, name: str, command: list[str], status: int) -> str:
        done = await asyncio.to_thread(
            subprocess.run,
            command,
            env=environment(),
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=2 * WAIT_S,
        )
        assert (done.returncode, done.stdout) == (status, "")
        return _message(name, done.stderr)

    def stderr(self) -> str:
        """Return what this process has written to stderr since the last call."""
        return self._capture.readouterr().err

    async def logged(self, words: str) -> str:
        """Wait for a log message that contains `words`, and return it. It must be the only one."""
        await until(lambda: any(words in line for line in self._log.messages))
        [line] = [line for line in self._log.messages if words in line]
        return line


def _message(prefix: str, errors: str) -> str:
    assert errors.startswith(f"{prefix}: "), errors
    assert errors.count("\n") == 1, errors
    return errors.removeprefix(f"{prefix}: ").rstrip("\n")


async def refused(kind: type[RegdError], call: Awaitable[object]) -> str:
    """Return the text of the exception of exactly this class that a call raises."""
    with pytest.raises(kind) as caught:
        await call
    assert type(caught.value) is kind
    return str(caught.value)


Produce = Callable[[Scene], Awaitable[str]]


class Producers(dict[str, Produce]):
    """Functions that cause a message, by the message; an instance is the decorator that adds them.

    `…` in a message matches any text.
    """

    def __call__(self, message: str) -> Callable[[Produce], Produce]:
        def add(produce: Produce) -> Produce:
            assert message not in self, message
            self[message] = produce
            return produce

        return add
