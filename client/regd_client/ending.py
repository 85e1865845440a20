"""The signals that end a server without an event loop, held back until the name of its service is withdrawn.

It must be quick to import: a server may be told to end while it still starts. Must not know how a name is kept.
"""

from __future__ import annotations

import os
import signal
import threading

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from types import FrameType
    from typing import Any, Protocol

    class Registered(Protocol):
        def deregister(self) -> None: ...


_ENDS = (signal.SIGTERM, signal.SIGINT)
_MAKING_S = 1.0  # for a name that is just being registered, before the server is told all the same


class Ending:
    """Holds them from now on; then say what `withdraws`, or `give_up`.

    The server goes on meanwhile: whoever has just resolved the name is still answered. A second signal comes at
    once.
    """

    def __init__(self, drain_s: float) -> None:
        self._made: Registered | None = None
        self._settled = threading.Event()
        self._drained = threading.Event()
        self._drain_s = drain_s
        self._asked = False
        self._handlers: dict[int, Callable[[int, FrameType | None], Any]] = {}
        for number in _ENDS:
            handler = signal.getsignal(number)
            if callable(handler):  # else it is ignored, or ends the process: nothing is held then
                self._handlers[number] = handler
                signal.signal(number, self._handle)

    def withdraws(self, made: Registered) -> None:
        self._made = made
        self._settled.set()

    def give_up(self) -> None:
        """Nothing is registered: hold nothing."""
        self._settled.set()
        for number, handler in self._handlers.items():
            if signal.getsignal(number) == self._handle:
                signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._asked:
            self._handlers[number](number, frame)
            return
        self._asked = True
        threading.Thread(target=self._withdraw, args=(number,), name="regd-client-signal", daemon=True).start()

    def _withdraw(self, number: int) -> None:
        try:
            self._settled.wait(_MAKING_S)
            if self._made is not None:
                self._made.deregister()
                self._drained.wait(self._drain_s)
        finally:
            os.kill(os.getpid(), number)
