"""Run the commands of services/WORKTREES.md in two clones side by side."""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.daemon import ROOT, environment
from tests.support.demand import SLOW_S
from tests.support.documents import fits
from tests.support.polling import block_until

PAGE = ROOT / "services" / "WORKTREES.md"
STEP = re.compile(r"^```(python|sh|text)(?: (\w+))?\n(.*?)^```", re.MULTILINE | re.DOTALL)


class Shell:
    """Runs commands as a reader does, in the folder of the page. What they start ends with the test."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        identity = {
            f"GIT_{who}_{what}": "reader@example.org"
            for who in ("AUTHOR", "COMMITTER")
            for what in ("NAME", "EMAIL")
        }
        self.environment = environment(HOME=str(folder), PATH=path, PYTHONWARNINGS="error", **identity)
        self._sessions: list[int] = []

    def run(self, commands: str, under: str = "") -> str:
        """Run commands in a session of their own, as a terminal does, and return what they print."""
        output = self.folder.parent / "output"
        with output.open("w") as file:
            shell = subprocess.Popen(
                ["bash", "-ec", commands], cwd=self.folder / under, env=self.environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
        self._sessions.append(shell.pid)
        assert shell.wait(SLOW_S) == 0, output.read_text()
        return output.read_text()

    def daemons(self) -> list[int]:
        pids = []
        for path in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                words = (path / "cmdline").read_bytes().split(b"\0")
                if b"--project" in words and any(word.startswith(os.fsencode(self.folder)) for word in words):
                    pids.append(int(path.name))
        return pids

    def end(self) -> None:
        for session in self._sessions:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(session, signal.SIGKILL)
        for pid in self.daemons():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


@pytest.fixture
def shell(tmp_path: Path) -> Iterator[Shell]:
    if shutil.which("git") is None:
        pytest.skip("no git on this machine")
    (tmp_path / "work").mkdir()
    shell = Shell(tmp_path / "work")
    try:
        yield shell
    finally:
        shell.end()


@pytest.mark.long
def test_page_with_two_clones_side_by_side(shell: Shell) -> None:
    steps = STEP.findall(PAGE.read_text())
    repository = shell.folder / "shop"
    repository.mkdir()
    for kind, _, text in steps:
        if kind == "python":
            (repository / text.partition("\n")[0].removeprefix("# ")).write_text(text)
    shell.run("git init -q && git add -A && git commit -qm shop", "shop")
    printed, count = "", 0
    for kind, under, text in steps:
        if kind == "sh":
            printed = shell.run(text, under)
            count += 1
        elif kind == "text":
            lines = printed.splitlines()
            for expected in text.splitlines():
                assert any(fits(expected, line) for line in lines), f"no {expected!r} in\n{printed}"
                while not fits(expected, lines.pop(0)):
                    pass
    assert count >= 7
    block_until(lambda: len(shell.daemons()) == 3)  # of main, later and inner: fix was removed
    assert not (shell.folder / "fix").exists()
