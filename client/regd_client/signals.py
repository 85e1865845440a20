"""The signals that end a server, held back until the names of its services are withdrawn.

A server that is told to end turns away at once who has just connected, so the names must go before it is told.
Whoever waits for the signal, with `signal.signal` or on the event loop, gets it later, and a second one at once.
Must not know what is registered.
"""

import asyncio
import contextlib
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

from regd_client.opening import Withdraw

_ENDS = (signal.SIGTERM, signal.SIGINT)


@contextlib.contextmanager
def held_until(withdraw: Withdraw) -> Iterator[None]:
    """Hold them until `withdraw` has been awaited on this event loop. Only the main thread's can do so."""
    global _held
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    held = _held = _held or _Held()
    held.withdraws.append(withdraw)
    try:
        yield
    finally:
        held.withdraws.remove(withdraw)
        if not held.withdraws:
            held.release()


class _Held:
    """Stands before all handlers: the handlers of Python, and the event loop that is woken by a file."""

    def __init__(self) -> None:
        self.withdraws: list[Withdraw] = []
        self._loop = asyncio.get_running_loop()
        self._waiting: list[int] = []
        self._task: asyncio.Task[None] | None = None
        self._released = False
        self._reading, self._written = socket.socketpair()
        self._reading.setblocking(False)
        self._written.setblocking(False)
        self._loop.add_reader(self._reading, self._woken)
        self._wakes = signal.set_wakeup_fd(self._written.fileno(), warn_on_full_buffer=False)
        self._handlers: dict[int, Callable[[int, FrameType | None], Any]] = {}
        for number in _ENDS:
            handler = signal.getsignal(number)
            if callable(handler):  # else it is ignored, or ends the process: nothing is held then
                self._handlers[number] = handler
                signal.signal(number, _later)

    def _woken(self) -> None:
        self._sort()
        if len(self._waiting) > 1:
            self.release()
        elif self._waiting and self._task is None:
            self._task = asyncio.create_task(self._withdraw(), name="regd-client-signal")

    def _sort(self) -> None:
        """Keep what is held, and pass the rest on to the event loop."""
        with contextlib.suppress(BlockingIOError):
            for number in self._reading.recv(4_096):
                if number in self._handlers:
                    self._waiting.append(number)
                elif self._wakes >= 0:
                    os.write(self._wakes, bytes((number,)))

    async def _withdraw(self) -> None:
        try:
            await asyncio.gather(*(each() for each in self.withdraws))
        finally:
            self.release()

    def release(self) -> None:
        """Stand aside, and let go on what was held."""
        global _held
        if self._released:
            return
        self._released = True
        _held = None
        self._loop.remove_reader(self._reading)
        if (wakes := signal.set_wakeup_fd(self._wakes)) != self._written.fileno():
            signal.set_wakeup_fd(wakes)  # another one's since
        self._sort()
        for number, handler in self._handlers.items():
            if signal.getsignal(number) is _later:
                signal.signal(number, handler)
        self._reading.close()
        self._written.close()
        for number in self._waiting:
            signal.raise_signal(number)


_held: _Held | None = None


def _later(number: int, frame: FrameType | None) -> None:
    """Handle a signal by name only: the event loop reads of it."""
