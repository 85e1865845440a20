"""Delays SIGTERM and SIGINT until the names of a server's services are withdrawn.

A server that receives one of these signals refuses new connections at once, so its names must be withdrawn
first. Then the program's own handlers are called. A second signal is not delayed.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    # Not imported at run time, because asyncio imports ssl, which gevent must patch first.
    import asyncio

    from regd_client.server_hook import Withdraw

__all__ = ["ProcessSignals", "held_until", "set_handler"]

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


@contextlib.contextmanager
def held_until(withdraw: Withdraw) -> Iterator[None]:
    """Inside the `with`, await `withdraw` before the program's handlers get a signal. Only in the main thread."""
    global _delayed
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    delayed = _delayed = _delayed or _LoopSignals()
    delayed.withdraws.append(withdraw)
    try:
        yield
    finally:
        delayed.withdraws.remove(withdraw)
        if not delayed.withdraws:
            delayed.release()


class _LoopSignals:
    """Delays the signals of a program with an event loop.

    A program handles signals with `signal.signal`, or with `loop.add_signal_handler`, which uses the wakeup file
    descriptor. So this class replaces the handlers as well as the descriptor.
    """

    def __init__(self) -> None:
        self.withdraws: list[Withdraw] = []
        import asyncio

        self._loop = asyncio.get_running_loop()
        self._waiting: list[int] = []
        self._task: asyncio.Task[None] | None = None
        self._released = False
        self._reader, self._writer = socket.socketpair()
        self._reader.setblocking(False)
        self._writer.setblocking(False)
        self._loop.add_reader(self._reader, self._forward)
        self._wakeup_fd = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        self._run_forever = self._loop.run_forever
        vars(self._loop)["run_forever"] = self._run_again
        self._handlers: dict[int, Callable[[int, FrameType | None], Any]] = {}
        self._replaced: set[int] = set()  # signals whose handler the program has replaced in the meantime
        for number in _SIGNALS:
            handler = signal.getsignal(number)
            if callable(handler):  # not SIG_IGN or SIG_DFL
                self._handlers[number] = handler
                signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        """Hold the first signal. On the second, restore the handlers at once: the event loop may be blocked."""
        self._waiting.append(number)
        running = self._loop.is_running()
        if running and len(self._waiting) == 1:
            self._loop.call_soon_threadsafe(self._begin)
            return
        if running:
            self._loop.call_soon_threadsafe(self.release)
        self._restore()

    def _run_again(self) -> None:
        """Run the event loop, and replace its wakeup descriptor, which uvloop sets at the start of each run."""
        self._loop.call_soon(self._take_over)
        self._run_forever()

    def _take_over(self) -> None:
        if self._released:
            return
        wakes = signal.set_wakeup_fd(self._writer.fileno())
        if wakes != self._writer.fileno():
            self._wakeup_fd = wakes
        self._replaced = {number for number in self._handlers if signal.getsignal(number) != self._handle}

    def _begin(self) -> None:
        if not self._released and self._task is None:
            self._task = self._loop.create_task(self._withdraw(), name="regd-client-signal")

    def _forward(self) -> None:
        """Write the number of each signal that is not delayed to the event loop's own wakeup descriptor."""
        with contextlib.suppress(OSError):  # there is nothing to read, or the event loop is closed
            for number in self._reader.recv(4_096):
                is_held = number in self._handlers and number not in self._replaced
                if not is_held and self._wakeup_fd >= 0:
                    os.write(self._wakeup_fd, bytes((number,)))

    async def _withdraw(self) -> None:
        import asyncio

        try:
            await asyncio.gather(*(withdraw() for withdraw in self.withdraws))
        finally:
            self.release()

    def _restore(self) -> None:
        """Restore the handlers, and raise the held signals. Reentrant: a signal may arrive at any point."""
        for number, handler in self._handlers.items():
            if signal.getsignal(number) == self._handle:
                signal.signal(number, handler)
        # uvloop may have set a new descriptor in another run, and closed the old one.
        wakes = signal.set_wakeup_fd(-1)
        with contextlib.suppress(OSError, ValueError):
            signal.set_wakeup_fd(self._wakeup_fd if wakes == self._writer.fileno() else wakes)
        while self._waiting:
            signal.raise_signal(self._waiting.pop(0))

    def release(self) -> None:
        """Stop delaying signals, and raise those that are held."""
        global _delayed
        if self._released:
            return
        self._released = True
        _delayed = None
        self._loop.remove_reader(self._reader)
        vars(self._loop).pop("run_forever", None)
        try:
            self._restore()
        finally:
            self._forward()
            self._reader.close()
            self._writer.close()


_delayed: _LoopSignals | None = None


class ProcessSignals:
    """Delays the signals of a process without an event loop: calls `withdraw` before the program's handlers.

    A signal that arrives before `begin` is held until then. In a forked child, signals are not delayed.
    """

    def __init__(self, withdraw: Callable[[], None]) -> None:
        self._withdraw = withdraw
        self._pid = os.getpid()
        self._begun = False
        self._held: int | None = None
        self._handlers: dict[int, Callable[[int, FrameType | None], Any]] = {}
        for number in _SIGNALS:
            handler = signal.getsignal(number)
            if callable(handler) and set_handler(number, self._handle):  # not SIG_IGN or SIG_DFL
                self._handlers[number] = handler

    def begin(self) -> None:
        """Let signals withdraw the name from now on. Call this once the name is registered, or will be soon."""
        self._begun = True
        if self._held is not None:
            self._end(self._held, None)

    def release(self) -> None:
        """Stop delaying signals, and raise the one that is held. Call this if registering failed."""
        self._begun = True
        for number, handler in self._handlers.items():
            if signal.getsignal(number) == self._handle:
                signal.signal(number, handler)
        if self._held is not None:
            signal.raise_signal(self._held)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._held is not None or os.getpid() != self._pid:
            self._handlers[number](number, frame)
            return
        self._held = number
        if self._begun:
            self._end(number, frame)

    def _end(self, number: int, frame: FrameType | None) -> None:
        try:
            self._withdraw()
        finally:
            self._handlers[number](number, frame)


def set_handler(number: int, handler: Callable[[int, FrameType | None], Any]) -> bool:
    """Set the handler of a signal. Return whether that was possible: only the main thread may set handlers."""
    try:
        signal.signal(number, handler)
    except ValueError:
        return False
    return True
