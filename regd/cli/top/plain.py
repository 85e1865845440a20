"""`regctl top` without a library: a table that is drawn again and again, one frame for a pipe, and one as JSON.

Of escape sequences it uses only those to go home and to clear. Must not know a daemon.
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
_KEYS = "qsrNASH"  # those that need no selection
_PAUSE_S = 0.05  # between two frames at least
_IDLE = 4  # times as long as a frame took


def text_of(line: Line) -> str:
    return "".join(text for _, text in line).rstrip()


def once(feed: Source, as_json: bool) -> None:
    """Print one frame."""
    if as_json:
        say_json({"address": feed.address, "stats": feed.stats, "instances": feed.instances})
        return
    for line in whole(feed.picture, feed.look, feed.daemon, time.monotonic(), time.time()):
        say(text_of(line))


async def show(feed: Source, hint: str) -> int:
    """Draw until `q`, Ctrl-C, or a signal to end; the last line ends with the hint. Returns the exit status."""
    again = asyncio.Event()
    loop = asyncio.get_running_loop()
    feed.changed = again.set
    loop.add_signal_handler(signal.SIGWINCH, again.set)
    over = asyncio.Event()

    def pressed() -> None:
        typed = b""
        with contextlib.suppress(OSError):
            typed = os.read(sys.stdin.fileno(), 1_024)
        for key in typed.decode(errors="replace") or "q":  # nothing: it hung up
            if key in _KEYS and not feed.look.press(key, []):
                over.set()
        again.set()

    with _keys() as there:
        if there:
            loop.add_reader(sys.stdin, pressed)
        while not over.is_set():
            again.clear()
            began = time.monotonic()
            _draw(feed, ("q quit  s sort  r reverse  " if there else "Ctrl-C quit  ") + hint)
            await asyncio.sleep(max(_PAUSE_S, _IDLE * (time.monotonic() - began)))
            await again.wait()
    return 0


def _draw(feed: Source, keys: str) -> None:
    width, height = os.get_terminal_size(sys.stdout.fileno())  # and not $COLUMNS, which does not follow
    if not width or not height:
        width, height = 80, 24  # a terminal that nobody has told its size
    size = max(1, width - 1), height  # a full last column would move some terminals on
    lines = frame(feed.picture, feed.look, feed.daemon, size, time.monotonic(), time.time())
    lines[-1] = cut([("", keys)], size[0])
    body = "\r\n".join(text_of(line) + _CLEAR_LINE for line in lines)
    sys.stdout.write(_HOME + body + _CLEAR_BELOW)
    sys.stdout.flush()


@contextlib.contextmanager
def _keys() -> Iterator[bool]:
    """Have keys one by one, where they come from a terminal."""
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
