"""The real bash, zsh and fish: ask for completions by function and by TAB in a terminal."""

import os
import pty
import select
import shutil
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import pytest

from tests.support.daemon import WAIT_S, environment

# regctl as it is, but that it waits for an answer as long as a busy machine takes.
PATIENT = """#!{python}
import sys
import regd.cli.complete_names
regd.cli.complete_names._ANSWER_S = regd.cli.complete_names._END_S = 15.0
from regd.cli.regctl import main
sys.exit(main())
"""
PATH = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])  # regctl as users have it is in it


def need(shell: str) -> str:
    if shutil.which(shell) is None:
        pytest.skip(f"no {shell} on this machine")
    return shell


def shell_environment(address: str, home: Path, patient: bool = True) -> dict[str, str]:
    """Return an environment of a person without settings, whose daemon is at `address`."""
    path = PATH
    if patient:
        folder = home / ".bin"
        folder.mkdir(exist_ok=True)
        command = folder / "regctl"
        command.write_text(PATIENT.format(python=sys.executable))
        command.chmod(0o755)
        path = f"{folder}{os.pathsep}{PATH}"
    return environment(
        REGD_ADDRESS=address, PATH=path, HOME=str(home), XDG_CONFIG_HOME=str(home), XDG_DATA_HOME=str(home),
        TERM="dumb", LC_ALL="C.UTF-8",
    )  # fmt: skip


def ran(argv: Sequence[str], env: dict[str, str]) -> str:
    done = subprocess.run(argv, env=env, cwd=env["HOME"], capture_output=True, text=True, timeout=30, check=False)
    assert (done.returncode, done.stderr) == (0, ""), done
    return done.stdout


class Terminal:
    """A shell that a person sits at."""

    def __init__(self, argv: Sequence[str], env: dict[str, str]) -> None:
        self._mine, theirs = pty.openpty()
        termios.tcsetwinsize(theirs, (60, 200))
        self._shell = subprocess.Popen(
            argv, env=env, cwd=env["HOME"], stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True
        )
        os.close(theirs)

    def press(self, keys: str) -> None:
        os.write(self._mine, keys.encode())

    def seen(self, text: str) -> str:
        """Return what is shown up to `text`, which must come."""
        shown = b""
        until = time.monotonic() + 2 * WAIT_S
        while text.encode() not in shown:
            left_s = until - time.monotonic()
            if left_s <= 0 or not select.select([self._mine], [], [], left_s)[0]:
                raise AssertionError(f"no {text!r} in {shown!r}")
            shown += os.read(self._mine, 4_096)
        return shown.decode(errors="replace")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.killpg(self._shell.pid, signal.SIGKILL)
        self._shell.wait(WAIT_S)
        os.close(self._mine)
