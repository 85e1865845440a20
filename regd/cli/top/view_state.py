"""The state of the view of `regctl top` (order, filter, selection, pane), and how keys change it.

The functions do no I/O.
"""

from __future__ import annotations

from collections.abc import Sequence

from regd.cli.top.model import SORTS, Key, Row

_ORDER_KEYS = {"N": "name", "A": "age", "S": "state", "H": "holders"}
_MOVES = {"up": -1, "k": -1, "down": 1, "j": 1}
_FAR = {"home": -1, "g": -1, "end": 1, "G": 1}
_ALL = 1 << 30

HELP = (
    ("q  Ctrl-C", "quit"),
    ("↑ ↓  k j", "select; also PgUp PgDn Home End"),
    ("w  Enter", "why: owners, last probe, recent departures"),
    ("s", "next order: name, age, state, holders"),
    ("N A S H", "order by name, age, state, holders"),
    ("r", "reverse the order"),
    ("/", "filter by words, in all columns; Enter keeps it"),
    ("Esc", "back; clears the filter"),
)


class ViewState:
    """The user's choices: the order, the filter, the selection.

    The renderer sets `page`, the number of visible rows.
    """

    def __init__(self) -> None:
        self.sort = SORTS[0]
        self.reverse = False
        self.words = ""
        self.typing = False  # a filter is being typed
        self.pane = ""  # "why", "help", or "" for none
        self.why: list[str] = []  # the reply to `why`, as lines
        self.about: Key | None = None  # the instance that the pane `why` shows, even if it has ended
        self.selected: Key | None = None
        self.first = 0  # the first visible row
        self.page = 1
        self._at = 0  # the row of the selected instance, or its last row after it has ended

    def keep_in_range(self, rows: Sequence[Row]) -> None:
        """Keep the selection and the visible rows in range.

        The selection follows its instance. If the instance has ended, the selection stays in its row.
        """
        if self.selected is not None:
            self._at = next((at for at, row in enumerate(rows) if row.key == self.selected), self._at)
            self._at = max(0, min(self._at, len(rows) - 1))
            self.selected = rows[self._at].key if rows else self.selected
            self.first = min(max(self.first, self._at - self.page + 1), self._at)
        self.first = max(0, min(self.first, len(rows) - self.page))

    def press(self, key: str, rows: Sequence[Row]) -> bool:
        """Handle a key: a character, or a name such as "up". Return False if the user quits."""
        if self.typing:
            self._type(key)
        elif key == "q":
            return False
        elif key in _MOVES:
            self._move(_MOVES[key], rows)
        elif key in ("pageup", "pagedown"):
            self._move(-self.page if key == "pageup" else self.page, rows)
        elif key in _FAR:
            self._move(_FAR[key] * _ALL, rows)
        else:
            self._choose(key, rows)
        return True

    def _choose(self, key: str, rows: Sequence[Row]) -> None:
        if key == "s":
            self.sort = SORTS[(SORTS.index(self.sort) + 1) % len(SORTS)]
        elif key in _ORDER_KEYS:
            self.sort = _ORDER_KEYS[key]
        elif key == "r":
            self.reverse = not self.reverse
        elif key == "/":
            self.typing = True
        elif key == "?":
            self.pane = "" if self.pane == "help" else "help"
        elif key in ("w", "enter") and rows:
            self._move(0, rows)
            self.pane = "" if self.pane == "why" else "why"
        elif key == "escape":
            self._back()

    def _back(self) -> None:
        if self.pane:
            self.pane = ""
        elif self.words:
            self.words = ""
        else:
            self.selected = None

    def _type(self, key: str) -> None:
        if key == "enter":
            self.typing = False
        elif key == "escape":
            self.typing, self.words = False, ""
        elif key == "backspace":
            self.words = self.words[:-1]
        elif len(key) == 1 and key.isprintable():
            self.words += key

    def _move(self, by: int, rows: Sequence[Row]) -> None:
        if not rows:
            return
        if self.selected is None:
            at = len(rows) - 1 if by == _ALL else min(self.first, len(rows) - 1)
        else:
            self.keep_in_range(rows)
            at = max(0, min(self._at + by, len(rows) - 1))
        self.selected = self.about = rows[at].key
        self.keep_in_range(rows)
