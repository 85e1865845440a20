"""`regctl top` on the whole screen, by prompt_toolkit: keys, sizes, and only what is different is sent.

Must not know what a frame says, nor what a key does.
"""

from __future__ import annotations

import asyncio
import time

from prompt_toolkit.application import Application
from prompt_toolkit.formatted_text import StyleAndTextTuples
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.keys import Keys
from prompt_toolkit.layout import FormattedTextControl, Layout, Window
from prompt_toolkit.styles import Style

from regd.cli.top.render import frame
from regd.cli.top.source import Source

# The terminal's own colours, so that light and dark are both readable.
_STYLE = Style.from_dict(
    {
        "title": "bold",
        "head": "bold",
        "key": "bold",
        "dim": "dim",
        "selected": "reverse",
        "away": "bold ansired",
        "gone": "ansired",
        "new": "ansigreen",
        "warn": "ansimagenta",
    }
)
_NAMES = {
    Keys.Up: "up",
    Keys.Down: "down",
    Keys.PageUp: "pageup",
    Keys.PageDown: "pagedown",
    Keys.Home: "home",
    Keys.End: "end",
    Keys.ControlM: "enter",
    Keys.ControlJ: "enter",
    Keys.Escape: "escape",
    Keys.ControlH: "backspace",
}
_PAUSE_S = 0.05  # between two frames at least, however much happens
_IDLE = 4  # times as long as a frame took
_INTERRUPTED = 130  # as shells say it
_ESCAPE_S = 0.05  # until a lone Esc is no beginning of another key


class _Screen:
    def __init__(self, feed: Source) -> None:
        self._feed = feed
        body = FormattedTextControl(self._text, show_cursor=False)
        self.app: Application[int] = Application(
            layout=Layout(Window(body, wrap_lines=False, always_hide_cursor=True)),
            style=_STYLE,
            key_bindings=self._bindings(),
            full_screen=True,
        )
        self.app.ttimeoutlen = _ESCAPE_S
        self._took_s = 0.0  # the last frame
        self._due: asyncio.TimerHandle | None = None

    def changed(self) -> None:
        """Draw soon."""
        if self._due is None:
            pause_s = max(_PAUSE_S, _IDLE * self._took_s)
            self._due = asyncio.get_running_loop().call_later(pause_s, self._draw)

    def _draw(self) -> None:
        self._due = None
        self.app.invalidate()

    def _text(self) -> StyleAndTextTuples:
        rows, columns = self.app.output.get_size()
        feed, began = self._feed, time.monotonic()
        lines = frame(feed.picture, feed.look, feed.daemon, (columns, rows), began, time.time())
        made: StyleAndTextTuples = []
        for line in lines:
            made += [(f"class:{style}" if style else "", text) for style, text in line]
            made.append(("", "\n"))
        self._took_s = time.monotonic() - began
        return made[:-1]

    def _bindings(self) -> KeyBindings:
        made = KeyBindings()
        for key in _NAMES:
            made.add(key)(self._named)
        made.add(Keys.Any)(self._character)
        made.add(Keys.BracketedPaste)(self._pasted)
        for key in (Keys.ControlC, Keys.SIGINT):
            made.add(key)(lambda event: self._end(_INTERRUPTED))
        made.add(Keys.ControlZ)(lambda event: event.app.suspend_to_background())
        made.add(Keys.ControlL)(lambda event: event.app.renderer.clear())
        return made

    def _named(self, event: KeyPressEvent) -> None:
        key = event.key_sequence[0].key
        self._press(_NAMES[Keys(key)])

    def _character(self, event: KeyPressEvent) -> None:
        self._press(event.data)

    def _pasted(self, event: KeyPressEvent) -> None:
        for each in event.data if self._feed.look.typing else "":  # a text is no row of commands
            self._press(each)

    def _end(self, status: int) -> None:
        if not self.app.is_done:
            self.app.exit(result=status)

    def _press(self, key: str) -> None:
        look = self._feed.look
        before = look.about, look.pane
        rows = self._feed.picture.shown(look.sort, look.reverse, look.words)
        if not look.press(key, rows):
            self._end(0)
        if look.pane == "why" and before != (look.about, look.pane):
            look.why = []
            self._feed.ask_now()


async def show(feed: Source) -> int:
    """Show it until `q` or Ctrl-C, leave the terminal as it was, and return the exit status."""
    screen = _Screen(feed)
    feed.changed = screen.changed
    return await screen.app.run_async()
