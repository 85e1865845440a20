"""The full-screen view of `regctl top`, with prompt_toolkit, which redraws only what has changed."""

from __future__ import annotations

import asyncio
import time

from prompt_toolkit.application import Application
from prompt_toolkit.formatted_text import StyleAndTextTuples
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.keys import Keys
from prompt_toolkit.layout import FormattedTextControl, Layout, Window
from prompt_toolkit.styles import Style

from regd.cli.top.source import Source, frame_pause_s

# The terminal's own colours, for light and dark backgrounds.
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
_INTERRUPTED = 130  # the exit status after Ctrl-C
_ESCAPE_S = 0.05  # after this time, an Esc is the key and not the start of an escape sequence


class _Screen:
    def __init__(self, source: Source) -> None:
        self._source = source
        body = FormattedTextControl(self._text, show_cursor=False)
        self.app: Application[int] = Application(
            layout=Layout(Window(body, wrap_lines=False, always_hide_cursor=True)),
            style=_STYLE,
            key_bindings=self._bindings(),
            full_screen=True,
        )
        self.app.ttimeoutlen = _ESCAPE_S
        self._render_s = 0.0  # the time that rendering the last frame took
        self._due: asyncio.TimerHandle | None = None

    def changed(self) -> None:
        """Redraw soon."""
        if self._due is None:
            self._due = asyncio.get_running_loop().call_later(frame_pause_s(self._render_s), self._draw)

    def _draw(self) -> None:
        self._due = None
        self.app.invalidate()

    def _text(self) -> StyleAndTextTuples:
        rows, columns = self.app.output.get_size()
        began = time.monotonic()
        spans: StyleAndTextTuples = []
        for line in self._source.frame(columns, rows):
            spans += [(f"class:{style}" if style else "", text) for style, text in line]
            spans.append(("", "\n"))
        self._render_s = time.monotonic() - began
        return spans[:-1]

    def _bindings(self) -> KeyBindings:
        bindings = KeyBindings()
        for key in _NAMES:
            bindings.add(key)(self._named)
        bindings.add(Keys.Any)(self._character)
        bindings.add(Keys.BracketedPaste)(self._pasted)
        for key in (Keys.ControlC, Keys.SIGINT):
            bindings.add(key)(lambda event: self._end(_INTERRUPTED))
        bindings.add(Keys.ControlZ)(lambda event: event.app.suspend_to_background())
        bindings.add(Keys.ControlL)(lambda event: event.app.renderer.clear())
        return bindings

    def _named(self, event: KeyPressEvent) -> None:
        key = event.key_sequence[0].key
        self._press(_NAMES[Keys(key)])

    def _character(self, event: KeyPressEvent) -> None:
        self._press(event.data)

    def _pasted(self, event: KeyPressEvent) -> None:
        for letter in event.data if self._source.view.typing else "":  # else pasted text would run commands
            self._press(letter)

    def _end(self, status: int) -> None:
        if not self.app.is_done:
            self.app.exit(result=status)

    def _press(self, key: str) -> None:
        view = self._source.view
        previous = view.about, view.pane
        rows = self._source.table.shown(view.sort, view.reverse, view.words)
        if not view.press(key, rows):
            self._end(0)
        if view.pane == "why" and previous != (view.about, view.pane):
            view.why = []
            self._source.refresh_why()


async def show(source: Source) -> int:
    """Show the view until `q` or Ctrl-C, restore the terminal, and return the exit status."""
    screen = _Screen(source)
    source.changed = screen.changed
    return await screen.app.run_async()
