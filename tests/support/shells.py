"""bash, zsh and fish, as commands and in a terminal, for the tests of completion."""

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

# regctl with a longer deadline for the daemon's reply, for a busy machine.
PATIENT = """#!{python}
import sys
import regd.cli.complete_names
regd.cli.complete_names._ANSWER_S = regd.cli.complete_names._END_S = 15.0
from regd.cli.regctl import main
sys.exit(main())
"""
PATH = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])  # has the installed regctl


def need(shell: str) -> str:
    if shutil.which(shell) is None:
        pytest.skip(f"no {shell} on this machine")
    return shell


def shell_environment(address: str, home: Path, patient: bool = True) -> dict[str, str]:
    """Return the environment of a user without shell settings, with REGD_ADDRESS set."""
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
    """An interactive shell in a pseudo-terminal."""

    def __init__(self, argv: Sequence[str], env: dict[str, str]) -> None:
        self._master, slave = pty.openpty()
        termios.tcsetwinsize(slave, (60, 200))
        self._shell = subprocess.Popen(
            argv, env=env, cwd=env["HOME"], stdin=slave, stdout=slave, stderr=slave, start_new_session=True
        )
        os.close(slave)

    def press(self, keys: str) -> None:
        os.write(self._master, keys.encode())

    def read_until(self, text: str) -> str:
        """Read the output until it contains `text`, and return it."""
        output = b""
        deadline = time.monotonic() + 2 * WAIT_S
        while text.encode() not in output:
            left_s = deadline - time.monotonic()
            if left_s <= 0 or not select.select([self._master], [], [], left_s)[0]:
                raise AssertionError(f"no {text!r} in {output!r}")
            output += os.read(self._master, 4_096)
        return output.decode(errors="replace")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.killpg(self._shell.pid, signal.SIGKILL)
        self._shell.wait(WAIT_S)
        os.close(self._master)
