"""The view of `regctl top` without prompt_toolkit: a table that is redrawn, or one frame as text or JSON.

It uses only the escape sequences that move the cursor to the first line and clear the rest of a line or screen.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import termios
import time
import tty
from collections.abc import Iterator

from regd.cli.output import say, say_json
from regd.cli.top.render import Line, cut, whole
from regd.cli.top.source import Source, frame_pause_s

_HOME, _CLEAR_LINE, _CLEAR_BELOW = "\x1b[H", "\x1b[K", "\x1b[J"
_KEYS = "qsrNASH"  # the keys of the full-screen view that work without a selection


def text_of(line: Line) -> str:
    """Return a line without styles or trailing blanks."""
    return "".join(text for _, text in line).rstrip()


def once(source: Source, as_json: bool) -> None:
    """Print one frame, as text or as JSON."""
    if as_json:
        say_json({"address": source.address, "stats": source.stats, "instances": source.instances})
        return
    for line in whole(source.table, source.view, source.daemon, time.monotonic(), time.time()):
        say(text_of(line))


async def show(source: Source, hint: str) -> int:
    """Redraw the table until `q` or cancellation. `hint` ends the last line. Return the exit status."""
    changed = asyncio.Event()
    loop = asyncio.get_running_loop()
    source.changed = changed.set
    loop.add_signal_handler(signal.SIGWINCH, changed.set)
    quitting = asyncio.Event()

    def read_keys() -> None:
        typed = b""
        with contextlib.suppress(OSError):
            typed = os.read(sys.stdin.fileno(), 1_024)
        for key in typed.decode(errors="replace") or "q":  # without input, the terminal has hung up
            if key in _KEYS and not source.view.press(key, []):
                quitting.set()
        changed.set()

    with _single_keys() as has_keys:
        if has_keys:
            loop.add_reader(sys.stdin, read_keys)
        while not quitting.is_set():
            changed.clear()
            began = time.monotonic()
            _draw(source, ("q quit  s sort  r reverse  " if has_keys else "Ctrl-C quit  ") + hint)
            await asyncio.sleep(frame_pause_s(time.monotonic() - began))
            await changed.wait()
    return 0


def _draw(source: Source, keys: str) -> None:
    columns, rows = os.get_terminal_size(sys.stdout.fileno())  # $COLUMNS does not follow a resize
    if not columns or not rows:
        columns, rows = 80, 24  # the size is unknown
    columns = max(1, columns - 1)  # some terminals wrap after the last column
    lines = source.frame(columns, rows)
    lines[-1] = cut([("", keys)], columns)
    body = "\r\n".join(text_of(line) + _CLEAR_LINE for line in lines)
    sys.stdout.write(_HOME + body + _CLEAR_BELOW)
    sys.stdout.flush()


@contextlib.contextmanager
def _single_keys() -> Iterator[bool]:
    """Make the terminal deliver each key at once. Yield False if stdin is not a terminal."""
    if not sys.stdin or not sys.stdin.isatty():
        yield False
        return
    attributes = termios.tcgetattr(sys.stdin)
    try:
        tty.setcbreak(sys.stdin)
        yield True
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, attributes)
        print()
