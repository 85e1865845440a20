"""Daemons for `crash`. Some kill themselves at a chosen file operation, or fail a share of their operations."""

import errno
import os
import random
import signal
import subprocess
from pathlib import Path

from regd.server import daemon, engine
from regd.storage.files import Files
from tests.support.daemon import DaemonProcess, environment

_SMALL = (
    "import dataclasses, regd.core.limits as of; of.DEFAULT = dataclasses.replace("
    "of.DEFAULT, journal_segment_bytes_max=16_384, checkpoint_interval_s=0.02, reply_bytes_max=100_000); "
)


class Victim(DaemonProcess):
    """A daemon that will be killed. It writes checkpoints often, and begins a segment after some 60 changes.

    With a plan it has failing file operations.
    """

    def __init__(self, registry: Path, plan: str = "") -> None:
        super().__init__(registry, "--port", "0")
        self._plan = plan

    def command(self, *flags: str) -> list[str]:
        command = super().command(*flags)
        at = command.index("-c") + 1
        if self._plan:
            command[at] = f"from tests.long.victim import trouble; trouble({self._plan}); {command[at]}"
        command[at] = _SMALL + command[at]  # before any other module takes the limits
        return command

    def launch(self) -> None:
        self.process = subprocess.Popen(
            self.command(), env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def listens(self) -> bool:
        """Wait until it listens, and return True; False if it exits first."""
        assert self.process is not None
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        self.port = int(line.rpartition(":")[2] or 0)
        return bool(line)


def trouble(kill_at: int, fail_share: float, seed: int) -> None:
    """Called in the daemon's process: kill it at a file operation, or fail a share of its syncs."""
    vars(daemon)["Files"] = lambda: Troubled(kill_at, fail_share, seed)
    engine._REPAIR_AFTER_S = 0.01


class Troubled(Files):
    """`Files` whose operations fail or kill the process, also in the middle of a write."""

    def __init__(self, kill_at: int, fail_share: float, seed: int) -> None:
        self._count = 0
        self._kill_at = kill_at
        self._fail_share = fail_share
        self._random = random.Random(seed)

    def _step(self) -> None:
        self._count += 1
        if self._count == self._kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    def _fail(self, share: float) -> None:
        # The first operation makes the folder durable; without it the daemon would exit.
        if self._count > 1 and self._random.random() < share:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    def create(self, path: Path) -> int:
        self._step()
        return super().create(path)

    def write(self, fd: int, data: bytes) -> None:
        half = len(data) // 2
        super().write(fd, data[:half])
        self._step()
        self._fail(self._fail_share / 5)
        super().write(fd, data[half:])

    def append(self, path: Path) -> int:
        self._step()
        return super().append(path)

    def truncate(self, fd: int, size: int) -> None:
        self._step()
        super().truncate(fd, size)

    def sync(self, fd: int) -> None:
        self._step()
        super().sync(fd)

    def sync_data(self, fd: int) -> None:
        self._step()
        self._fail(self._fail_share)
        super().sync_data(fd)

    def link(self, source: Path, target: Path) -> None:
        self._step()
        self._fail(self._fail_share / 5)
        super().link(source, target)

    def remove(self, path: Path) -> None:
        self._step()
        super().remove(path)

    def rename(self, source: Path, target: Path) -> None:
        self._step()
        super().rename(source, target)

    def sync_folder(self, path: Path) -> None:
        self._step()
        self._fail(self._fail_share)
        super().sync_folder(path)
