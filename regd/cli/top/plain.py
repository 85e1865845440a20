"""The view of `regctl top` without prompt_toolkit: a table that is redrawn, or one frame as text or JSON.

Uses only the escape sequences to move the cursor home and to clear.
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
from regd.cli.top.render import Line, cut, frame, whole
from regd.cli.top.source import Source

_HOME, _CLEAR_LINE, _CLEAR_BELOW = "\x1b[H", "\x1b[K", "\x1b[J"
_KEYS = "qsrNASH"  # the keys that need no selection
_PAUSE_S = 0.05  # between two frames, at least
_IDLE = 4  # the pause is at least this many times the time of a frame


def text_of(line: Line) -> str:
    """Return a line without styles or trailing blanks."""
    return "".join(text for _, text in line).rstrip()


def once(feed: Source, as_json: bool) -> None:
    """Print one frame, as text or as JSON."""
    if as_json:
        say_json({"address": feed.address, "stats": feed.stats, "instances": feed.instances})
        return
    for line in whole(feed.picture, feed.look, feed.daemon, time.monotonic(), time.time()):
        say(text_of(line))


async def show(feed: Source, hint: str) -> int:
    """Redraw the table until `q` or cancellation; `hint` ends the last line. Return the exit status."""
    changed = asyncio.Event()
    loop = asyncio.get_running_loop()
    feed.changed = changed.set
    loop.add_signal_handler(signal.SIGWINCH, changed.set)
    quitting = asyncio.Event()

    def read_keys() -> None:
        typed = b""
        with contextlib.suppress(OSError):
            typed = os.read(sys.stdin.fileno(), 1_024)
        for key in typed.decode(errors="replace") or "q":  # empty: the terminal has hung up
            if key in _KEYS and not feed.look.press(key, []):
                quitting.set()
        changed.set()

    with _single_keys() as has_keys:
        if has_keys:
            loop.add_reader(sys.stdin, read_keys)
        while not quitting.is_set():
            changed.clear()
            began = time.monotonic()
            _draw(feed, ("q quit  s sort  r reverse  " if has_keys else "Ctrl-C quit  ") + hint)
            await asyncio.sleep(max(_PAUSE_S, _IDLE * (time.monotonic() - began)))
            await changed.wait()
    return 0


def _draw(feed: Source, keys: str) -> None:
    width, height = os.get_terminal_size(sys.stdout.fileno())  # not $COLUMNS, which is not updated
    if not width or not height:
        width, height = 80, 24  # a terminal of unknown size
    size = max(1, width - 1), height  # some terminals wrap after the last column
    lines = frame(feed.picture, feed.look, feed.daemon, size, time.monotonic(), time.time())
    lines[-1] = cut([("", keys)], size[0])
    body = "\r\n".join(text_of(line) + _CLEAR_LINE for line in lines)
    sys.stdout.write(_HOME + body + _CLEAR_BELOW)
    sys.stdout.flush()


@contextlib.contextmanager
def _single_keys() -> Iterator[bool]:
    """Make a terminal deliver each key at once. Yield False if stdin is no terminal."""
    if not sys.stdin or not sys.stdin.isatty():
        yield False
        return
    before = termios.tcgetattr(sys.stdin)
    try:
        tty.setcbreak(sys.stdin)
        yield True
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)
        print()
