"""`regctl run --ready-http` and `--ready-command`: find out when the command is ready.

The probe runs again and again, from when the command accepts connections until it succeeds once.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import Awaitable, Callable, Collection, Mapping
from typing import Self

from regd.cli.http_probe import TRY_S, why_not_ready
from regd_client.protocol import host_port

_PAUSE_S = (0.05, 0.5)  # the first and the longest pause between two attempts
_POLL_S = 0.02  # between two checks whether the probe's process has ended
_SILENT_S = 10.0  # after this time, a warning says why the command is not ready
_DEVNULL = (
    (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDWR, 0),
    (os.POSIX_SPAWN_DUP2, 0, 1),
    (os.POSIX_SPAWN_DUP2, 0, 2),
)

Probe = Callable[[], Awaitable[str]]
"""Returns why the command is not ready, "" if it is."""


def http_probe(host: str, port: int, path: str) -> Probe:
    """Return a probe that sends a GET request."""

    async def probe() -> str:
        why = await why_not_ready(host, port, path)
        return why and f"http://{host_port(host, port)}{path}: {why}"

    return probe


def command_probe(command: str, environment: Mapping[str, str], mask: Collection[int]) -> Probe:
    """Return a probe that runs a command in a shell, with this environment and signal mask."""

    async def probe() -> str:
        with _Process(command, {**os.environ, **environment}, mask) as process:
            until = time.monotonic() + TRY_S
            while (code := process.exit_code()) is None:
                if time.monotonic() >= until:
                    return f"`{command}` has not ended within {TRY_S:g} s"
                await asyncio.sleep(_POLL_S)
        if code == 0:
            return ""
        return f"`{command}` ended with " + (f"status {code}" if code > 0 else f"signal {-code}")

    return probe


class _Process:
    """A shell that runs a command, in a process group of its own. The end of the `with` kills the group.

    asyncio does not start the shell, because the shell would then inherit the signal mask of asyncio's thread,
    which blocks all signals.
    """

    def __init__(self, command: str, environment: Mapping[str, str], mask: Collection[int]) -> None:
        self._code: int | None = None
        self._pid = os.posix_spawnp(
            "sh",
            ["sh", "-c", command],
            environment,
            file_actions=_DEVNULL,
            setpgroup=0,
            setsigmask=mask,
            setsigdef=(signal.SIGPIPE, signal.SIGXFSZ),  # Python ignores these signals
        )

    def exit_code(self) -> int | None:
        """Return the exit code, negative after a signal; None while the process runs."""
        if self._code is None:
            pid, status = os.waitpid(self._pid, os.WNOHANG)
            if pid:
                self._code = os.waitstatus_to_exitcode(status)
        return self._code

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.exit_code() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._pid, signal.SIGKILL)
            os.waitpid(self._pid, 0)


async def until_ready(probe: Probe, report: Callable[[str], None]) -> None:
    """Wait until the probe succeeds. After 10 s, report why the command is not ready."""
    pause_s, longest_s = _PAUSE_S
    warn_at = time.monotonic() + _SILENT_S
    while why := await probe():
        if time.monotonic() >= warn_at:
            warn_at = float("inf")
            report(why)
        await asyncio.sleep(pause_s)
        pause_s = min(1.5 * pause_s, longest_s)
