"""regctl in a pseudo-terminal: send keys, read the screen."""

import contextlib
import fcntl
import os
import pty
import select
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

import pyte

from tests.support.daemon import ROOT, environment

SEEN_S = 30.0  # until the screen shows a change, on a busy machine

# A session gets its controlling terminal when its leader opens the terminal.
_CODE = "import os, sys; os.close(os.open(os.ttyname(0), os.O_RDWR)); {before}; from regd.cli.regctl import main; sys.exit(main())"


def read_to_end(master: int) -> str:
    """Read a pseudo-terminal until its last process has closed it, and close it."""
    output = b""
    with open(master, "rb", buffering=0) as terminal, contextlib.suppress(OSError):  # on Linux, EIO at the end
        while part := terminal.read(4_096):
            output += part
    return output.decode()


class Terminal:
    """A pseudo-terminal with `regctl` in it.

    `before` is Python code that runs first; `raw` has every byte that the program wrote.
    """

    def __init__(
        self, *argv: str, before: str = "pass", width: int = 80, height: int = 24, **variables: str
    ) -> None:
        self._master, slave = pty.openpty()
        self._slave = slave
        self.screen = pyte.Screen(width, height)
        self._stream = pyte.ByteStream(self.screen)
        self.raw = b""
        self._size(width, height)
        self.modes = termios.tcgetattr(slave)
        self.process = subprocess.Popen(
            [sys.executable, "-c", _CODE.format(before=before), *argv], cwd=ROOT,
            env=environment(**{"TERM": "xterm", "COLUMNS": "33", **variables}),  # COLUMNS of another terminal
            stdin=slave, stdout=slave, stderr=slave, start_new_session=True,
        )  # fmt: skip

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._slave)
        os.close(self._master)

    def _size(self, width: int, height: int) -> None:
        fcntl.ioctl(self._master, termios.TIOCSWINSZ, struct.pack("HHHH", height, width, 0, 0))

    def resize(self, width: int, height: int) -> None:
        """Change the size. The kernel sends SIGWINCH to the program."""
        self.screen.resize(height, width)
        self._size(width, height)

    def type(self, keys: str) -> None:
        os.write(self._master, keys.encode())

    @property
    def lines(self) -> list[str]:
        return [line.rstrip() for line in self.screen.display]

    @property
    def text(self) -> str:
        return "\n".join(self.lines)

    def line(self, prefix: str) -> str:
        """Return the first line that starts with `prefix`, or an empty string."""
        return next((line for line in self.lines if line.startswith(prefix)), "")

    def _read(self, within_s: float) -> bool:
        if not select.select([self._master], [], [], within_s)[0]:
            return False
        output = os.read(self._master, 65_536)
        self.raw += output
        self._stream.feed(output)
        return True

    def wait_until(self, condition: Callable[[], Any]) -> None:
        """Read the program's output until `condition()` is true."""
        deadline = time.monotonic() + SEEN_S
        while not condition():
            left_s = deadline - time.monotonic()
            assert left_s > 0, f"the condition is still false; the screen is\n{self.text}"
            self._read(left_s)

    def wait_for(self, *texts: str) -> None:
        """Wait until the screen shows all texts."""
        self.wait_until(lambda: all(text in self.text for text in texts))

    def wait_for_exit(self) -> int:
        """Wait for the end of the program, and return its exit status."""
        deadline = time.monotonic() + SEEN_S
        while self.process.poll() is None:
            assert time.monotonic() < deadline, f"the program does not end; the screen is\n{self.text}"
            self._read(0.05)
        os.write(self._slave, b"\0")  # comes after the program's output, which may still be on its way
        self.wait_until(lambda: self.raw.endswith(b"\0"))
        return self.process.returncode

    @property
    def is_restored(self) -> bool:
        """True if the terminal's modes, the normal screen and the cursor are restored."""
        restored = all(self.raw.rfind(on) >= self.raw.rfind(off) for on, off in _ON_AND_OFF)
        return restored and termios.tcgetattr(self._slave) == self.modes


_ON_AND_OFF = ((b"\x1b[?1049l", b"\x1b[?1049h"), (b"\x1b[?25h", b"\x1b[?25l"), (b"\x1b[?2004l", b"\x1b[?2004h"))
