"""Type the tutorial into real terminals, in a new folder and environment."""

import contextlib
import os
import re
import select
import shutil
import signal
import socket
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from tests.support.daemon import ROOT
from tests.support.documents import fits

TUTORIAL = ROOT / "services" / "TUTORIAL.md"
STEP = re.compile(
    r"^```(\w+)(?: terminal (\d))?(?: with (\w+))?\n(.*?)^```|Ctrl-C in terminal (\d)", re.MULTILINE | re.DOTALL
)
PROMPT = "~> "
STEP_S = 120.0  # for one command; the slowest is the installation
DEFAULT_PORTS = ("7343", "7380", "7353", "9090")
FLAGS = {
    "regd": "--port {0}",
    "regctl serve": "--http {1} --dns {2}",
    "prometheus": "--web.listen-address 127.0.0.1:{3}",
}


class Terminal:
    """An interactive shell in a pseudo-terminal."""

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        pid, self._file = os.forkpty()
        if pid == 0:
            os.chdir(folder)
            os.execve("/bin/bash", ["bash", "--norc", "--noprofile", "-i"], environment)
        self._pid = pid
        self.shown = ""
        self._seen = 0  # the length of `shown` before the last command's output

    def type(self, line: str) -> None:
        """Type a line at the prompt."""
        self._until(lambda output: PROMPT in output, "a prompt")  # a background process may print after it
        self._seen = len(self.shown)
        os.write(self._file, line.encode() + b"\n")
        self._until(lambda output: "\n" in output, "the line itself")
        self._seen += self.shown[self._seen :].index("\n") + 1

    def press_ctrl_c(self) -> None:
        """End the command in the foreground, and wait for the prompt: a service drains before it ends."""
        os.write(self._file, b"\x03")
        self._until(lambda said: PROMPT in said, "a prompt")

    def sees(self, expected: str) -> None:
        """Wait until the last command has printed these lines, in order, with any lines between them."""

        def has_lines(output: str) -> bool:
            # What a program in the background prints may be behind the prompt.
            lines = (line.rpartition(PROMPT)[2] for line in output.splitlines())
            return all(any(fits(pattern, line) for line in lines) for pattern in expected.splitlines())

        self._until(has_lines, expected)

    def _until(self, condition: Callable[[str], bool], what: str) -> None:
        deadline = time.monotonic() + STEP_S
        while not condition(self.shown[self._seen :].replace("\r", "")):
            if not select.select([self._file], [], [], max(0.0, deadline - time.monotonic()))[0]:
                raise AssertionError(f"no {what!r} in\n{self.shown}")
            self.shown += os.read(self._file, 65_536).decode(errors="replace").replace("\r\n", "\n")
            if "No matching distribution" in self.shown and "CI" not in os.environ:
                pytest.skip("no package registry can be reached")

    def end(self) -> None:
        """End the shell and its jobs. Each background job is a process group of its own."""
        with contextlib.suppress(OSError):
            os.write(self._file, b"\x03\nkill -9 $(jobs -p) 2>/dev/null; exit\n")
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline and select.select([self._file], [], [], 0.2)[0]:
            try:
                if not os.read(self._file, 65_536):
                    break
            except OSError:
                break  # the last process has ended
        os.kill(self._pid, signal.SIGKILL)
        os.waitpid(self._pid, 0)
        os.close(self._file)


def free_ports(*defaults: str) -> dict[str, str]:
    """Return a free port for each default port, at which a program may run already."""
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in defaults]
        return {default: str(probe.getsockname()[1]) for default, probe in zip(defaults, probes, strict=True)}


def with_ports(text: str, ports: Mapping[str, str]) -> str:
    """Replace the default ports in a line or an output, and add them to the commands that use them."""
    for default, port in ports.items():
        text = text.replace(default, port)
    for command, flags in FLAGS.items():
        text = re.sub(rf"^{command}\b", f"{command} {flags.format(*ports.values())}", text)
    return text


@pytest.mark.long
@pytest.mark.timeout(600)
def test_tutorial(tmp_path: Path) -> None:
    ports = free_ports(*DEFAULT_PORTS)
    port = ports["7343"]
    (tmp_path / "regd").symlink_to(ROOT)
    inherited = {
        key: value for key, value in os.environ.items() if not key.startswith(("REGD_", "PYTHON", "VIRTUAL"))
    }
    path = os.pathsep.join([str(Path(sys.base_prefix) / "bin"), os.environ["PATH"]])
    environment = inherited | {"REGD_ADDRESS": f"127.0.0.1:{port}", "PS1": PROMPT, "TERM": "dumb", "PATH": path}
    terminals: dict[str, Terminal] = {}
    last, steps = "", 0
    try:
        for kind, number, needed, text, interrupted in STEP.findall(TUTORIAL.read_text()):
            steps += 1
            if needed and shutil.which(needed) is None:
                continue
            if interrupted:
                terminals[interrupted].press_ctrl_c()
            elif kind in ("python", "yaml"):
                name = text.partition("\n")[0].removeprefix("# ")
                (tmp_path / "shop" / name).write_text(with_ports(text, ports))
            elif kind == "text":
                terminals[number or last].sees(with_ports(text, ports))
            else:
                last = number
                if number not in terminals:
                    terminals[number] = Terminal(tmp_path, environment)
                for line in text.splitlines():
                    terminals[number].type(with_ports(line, ports))
    finally:
        for terminal in terminals.values():
            terminal.end()
    assert steps > 35
