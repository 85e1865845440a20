"""The signals that end a server, held back until the names of its services are withdrawn.

A server that is told to end turns away new connections at once, so the names must be withdrawn before. The
handlers of the program and of its event loop get the first signal afterwards. The second signal gives them both
at once, also while the event loop is blocked.
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

from regd_client.server_hook import Withdraw

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
        self._loop.add_reader(self._reading, self._pass_on)
        self._wakes = signal.set_wakeup_fd(self._written.fileno(), warn_on_full_buffer=False)
        self._run_forever = self._loop.run_forever
        vars(self._loop)["run_forever"] = self._run_again
        self._handlers: dict[int, Callable[[int, FrameType | None], Any]] = {}
        self._others: set[int] = set()  # those that have another handler since
        for number in _ENDS:
            handler = signal.getsignal(number)
            if callable(handler):  # else it is ignored, or ends the process: nothing is held then
                self._handlers[number] = handler
                signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        """Hold the first signal. The second is not left to the event loop, which may be blocked."""
        self._waiting.append(number)
        running = self._loop.is_running()
        if running and len(self._waiting) == 1:
            self._loop.call_soon_threadsafe(self._begin)
            return
        if running:
            self._loop.call_soon_threadsafe(self.release)
        self._let_go()

    def _run_again(self) -> None:
        """Run the event loop. uvloop has itself woken anew in every run."""
        self._loop.call_soon(self._stand_before)
        self._run_forever()

    def _stand_before(self) -> None:
        if self._released:
            return
        wakes = signal.set_wakeup_fd(self._written.fileno())
        if wakes != self._written.fileno():
            self._wakes = wakes
        self._others = {number for number in self._handlers if signal.getsignal(number) != self._handle}

    def _begin(self) -> None:
        if not self._released and self._task is None:
            self._task = asyncio.create_task(self._withdraw(), name="regd-client-signal")

    def _pass_on(self) -> None:
        """Tell the event loop of the signals that are not held."""
        with contextlib.suppress(OSError):  # nothing more, or the event loop is closed
            for number in self._reading.recv(4_096):
                held = number in self._handlers and number not in self._others
                if not held and self._wakes >= 0:
                    os.write(self._wakes, bytes((number,)))

    async def _withdraw(self) -> None:
        try:
            await asyncio.gather(*(each() for each in self.withdraws))
        finally:
            self.release()

    def _let_go(self) -> None:
        """Stand aside, and raise what was held. A signal may come, and call this, at any point of it."""
        for number, handler in self._handlers.items():
            if signal.getsignal(number) == self._handle:
                signal.signal(number, handler)
        # Another one's since, where the event loop was run anew: uvloop closes that of the run before.
        wakes = signal.set_wakeup_fd(-1)
        with contextlib.suppress(OSError, ValueError):
            signal.set_wakeup_fd(self._wakes if wakes == self._written.fileno() else wakes)
        while self._waiting:
            signal.raise_signal(self._waiting.pop(0))

    def release(self) -> None:
        """Hold nothing more, and let go what was held."""
        global _held
        if self._released:
            return
        self._released = True
        _held = None
        self._loop.remove_reader(self._reading)
        vars(self._loop).pop("run_forever", None)
        try:
            self._let_go()
        finally:
            self._pass_on()
            self._reading.close()
            self._written.close()


_held: _Held | None = None
