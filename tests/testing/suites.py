"""Run pytest on a folder of generated tests."""

import contextlib
import os
import select
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from tests.support.daemon import WAIT_S, environment

RUN_S = 60.0  # for a run of pytest, with workers too, on a machine that is busy
INI = """
[pytest]
asyncio_mode = auto
asyncio_default_fixture_loop_scope = function
addopts = -p no:cacheprovider --strict-config --strict-markers -W error
"""


def clean(**more: str) -> dict[str, str]:
    """Return the environment of a person who has this checkout, and runs no other pytest."""
    plain = environment(**more)
    return {key: value for key, value in plain.items() if not key.startswith("PYTEST_")}


class Suite:
    """`tests` is what is in its one module; more of them may be written."""

    def __init__(self, folder: Path, tests: str, ini: str = "") -> None:
        self.folder = folder / "suite"
        self.folder.mkdir()
        self.write("pytest.ini", INI + ini)
        self.write("test_it.py", tests)

    def write(self, name: str, text: str) -> None:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    def command(self, *flags: str) -> list[str]:
        basetemp = self.folder.with_name("basetemp")
        return [sys.executable, "-m", "pytest", "-rA", f"--basetemp={basetemp}", *flags]

    def run(self, *flags: str, **more: str) -> tuple[int, str]:
        """Return the exit status and all that was printed."""
        done = subprocess.run(
            self.command(*flags), cwd=self.folder, env=clean(**more), capture_output=True, text=True, timeout=RUN_S, check=False,
        )  # fmt: skip
        return done.returncode, done.stdout + done.stderr

    def passes(self, *flags: str, **more: str) -> str:
        status, shown = self.run(*flags, **more)
        assert status == 0, shown
        return shown

    @contextlib.contextmanager
    def started(self, *flags: str) -> Iterator["subprocess.Popen[str]"]:
        """Start it as the first of a group of processes, as a terminal does."""
        with subprocess.Popen(
            self.command(*flags), cwd=self.folder, env=clean(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
        ) as process:  # fmt: skip
            try:
                yield process
            finally:
                process.kill()

    def told(self, name: str = "told") -> list[str]:
        """Return the lines that the tests wrote."""
        return (self.folder / name).read_text().split("\n")[:-1]

    def told_soon(self, name: str = "told") -> list[str]:
        """Wait for a named pipe that a test opens, and return what it wrote there."""
        fd = os.open(self.folder / name, os.O_RDONLY | os.O_NONBLOCK)
        with open(fd) as pipe:
            poll = select.poll()
            poll.register(fd, select.POLLIN)
            assert poll.poll(RUN_S * 1000), "the test did not begin"
            return pipe.readline().split()


@contextlib.contextmanager
def watched(pid: int) -> Iterator[int]:
    """A pidfd of a process."""
    fd = os.pidfd_open(pid)
    try:
        yield fd
    finally:
        os.close(fd)


def has_ended(fd: int) -> bool:
    """Wait until the process of a pidfd has ended."""
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(WAIT_S * 1000))
