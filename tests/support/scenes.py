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
    """`folder` is empty. What is logged is in `log`, what is patched is undone at the end of the test."""

    def __init__(
        self,
        folder: Path,
        patch: pytest.MonkeyPatch,
        log: pytest.LogCaptureFixture,
        shown: pytest.CaptureFixture[str],
    ) -> None:
        self.folder = folder
        self.registry = folder / "registry.json"
        self.patch = patch
        log.set_level("INFO", "regd")
        self._log = log
        self._shown = shown

    @asynccontextmanager
    async def daemon(self, **how: Any) -> AsyncIterator[InLoop]:
        """Have a daemon in this loop, where clients find it. Time in it is moved by hand."""
        async with InLoop(self.registry, **how) as running:
            self.at(running.port)
            yield running

    def at(self, port: int) -> None:
        self.patch.setenv("REGD_ADDRESS", f"tcp://127.0.0.1:{port}")

    async def regd(self, *flags: str, status: int, before: Sequence[str] = ()) -> str:
        """Return what the command says that does not start, without its name before it."""
        return await self._run("regd", DaemonProcess(self.registry, before=before).command(*flags), status)

    async def regctl(self, *arguments: str, status: int, prefix: str = "regctl") -> str:
        """Return what a command says that fails with this status. It runs here, in a thread."""

        def run() -> int:
            try:
                return regctl.main(arguments)
            except SystemExit as end:
                assert isinstance(end.code, int)
                return end.code

        assert await asyncio.to_thread(run) == status
        return _said(prefix, self.told())

    async def process(self, module: str, *arguments: str, status: int) -> str:
        """Return what a command says that fails with this status, as a process, for what cannot run in a thread."""
        return await self._run(module.rpartition(".")[2], [sys.executable, "-m", module, *arguments], status)

    async def shell(self, name: str, line: str, status: int) -> str:
        """Return what a command says that fails with this status, as a line of a shell."""
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
        return _said(name, done.stderr)

    def told(self) -> str:
        """Return what stands on stderr since the last time."""
        return self._shown.readouterr().err

    async def logged(self, words: str) -> str:
        """Return the one line of the log that has these words, once it is there."""
        await until(lambda: any(words in line for line in self._log.messages))
        [line] = [line for line in self._log.messages if words in line]
        return line


def _said(prefix: str, errors: str) -> str:
    assert errors.startswith(f"{prefix}: "), errors
    assert errors.count("\n") == 1, errors
    return errors.removeprefix(f"{prefix}: ").rstrip("\n")


async def refused(kind: type[RegdError], asked: Awaitable[object]) -> str:
    """Return the text of the exception that a call raises."""
    with pytest.raises(kind) as caught:
        await asked
    assert type(caught.value) is kind
    return str(caught.value)


Produce = Callable[[Scene], Awaitable[str]]


class Producers(dict[str, Produce]):
    """Who brings a message about, by the message; … stands for what varies in it."""

    def __call__(self, message: str) -> Callable[[Produce], Produce]:
        def take(produce: Produce) -> Produce:
            assert message not in self, message
            self[message] = produce
            return produce

        return take
