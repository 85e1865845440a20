"""Project registries for tests, with daemons that start on demand. The daemons are killed at the end of the test."""

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from regd_client import project
from tests.support.daemon import environment
from tests.support.demand import SLOW_S, Demand


class Project(Demand):
    """A project registry in a folder, whose programs find it by their current folder."""

    def __init__(self, home: Path, parent: Path) -> None:
        parent.mkdir(parents=True, exist_ok=True)
        super().__init__(parent, "")
        self.home = home
        self.folder = Path(project.init(str(parent))[0])
        self.socket = self.folder / "regd.sock"
        self.address = f"unix://{self.socket}"

    def environment(self, **extra: str) -> dict[str, str]:
        return environment(HOME=str(self.home), **extra)

    def program(self, code: str, **extra: str) -> "subprocess.Popen[str]":
        return subprocess.Popen(
            [sys.executable, "-W", "error", "-c", code], cwd=self.place, env=self.environment(**extra), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    def regctl(self, *arguments: str, **extra: str) -> tuple[int, str, str]:
        """Run regctl in the project's folder, or in `cwd`."""
        cwd = extra.pop("cwd", str(self.place))
        done = subprocess.run(
            [sys.executable, "-m", "regd.cli.regctl", *arguments], cwd=cwd, env=self.environment(**extra), capture_output=True, text=True, timeout=SLOW_S, check=False,
        )  # fmt: skip
        assert "Traceback" not in done.stderr
        return done.returncode, done.stdout, done.stderr

    def prints(self, *arguments: str, **extra: str) -> str:
        """Run a command of regctl that must succeed without a message, and return what it prints."""
        status, out, errors = self.regctl(*arguments, **extra)
        assert (status, errors) == (0, ""), errors
        return out

    @property
    def log(self) -> str:
        path = self.folder / "regd.log"
        return path.read_text() if path.exists() else ""

    def is_daemon(self, words: list[bytes]) -> bool:
        return b"--project" in words and os.fsencode(self.folder) in words


@contextlib.contextmanager
def project_registry(home: Path, parent: Path | None = None) -> Iterator[Project]:
    """Make a project registry in a folder, by default in the home folder."""
    made = Project(home, parent or home)
    try:
        yield made
    finally:
        made.end()
