"""A program in a pseudo-terminal: send keys, read the screen."""

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

SEEN_S = 30.0  # for what is to be seen, on a busy machine

# A terminal is that of a session once the leader of the session opens it.
_CODE = "import os, sys; os.close(os.open(os.ttyname(0), os.O_RDWR)); {before}; from regd.cli.regctl import main; sys.exit(main())"


class Terminal:
    """`regctl` in it. `before` is Python that runs first; `raw` is all that was written."""

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
            env=environment(**{"TERM": "xterm", "COLUMNS": "33", **variables}),  # as of another terminal
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
        """Have another size; the terminal tells the program."""
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

    def line(self, begins: str) -> str:
        """Return the first line that begins so, or nothing."""
        return next((line for line in self.lines if line.startswith(begins)), "")

    def _take(self, within_s: float) -> bool:
        if not select.select([self._master], [], [], within_s)[0]:
            return False
        part = os.read(self._master, 65_536)
        self.raw += part
        self._stream.feed(part)
        return True

    def see(self, true: Callable[[], Any]) -> None:
        """Wait until something is to be seen."""
        late = time.monotonic() + SEEN_S
        while not true():
            left_s = late - time.monotonic()
            assert left_s > 0, f"not seen; the screen is\n{self.text}"
            self._take(left_s)

    def shows(self, *words: str) -> None:
        self.see(lambda: all(each in self.text for each in words))

    def ended(self) -> int:
        """Wait for the end, and return the exit status."""
        late = time.monotonic() + SEEN_S
        while self.process.poll() is None:
            assert time.monotonic() < late, f"it does not end; the screen is\n{self.text}"
            self._take(0.05)
        while self._take(0.0):
            pass
        return self.process.returncode

    @property
    def is_restored(self) -> bool:
        """Whether the terminal's modes are as before, and what was hidden is back."""
        back = all(self.raw.rfind(on) >= self.raw.rfind(off) for on, off in _PAIRS)
        return back and termios.tcgetattr(self._slave) == self.modes


_PAIRS = ((b"\x1b[?1049l", b"\x1b[?1049h"), (b"\x1b[?25h", b"\x1b[?25l"), (b"\x1b[?2004l", b"\x1b[?2004h"))
