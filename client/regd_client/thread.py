"""The async client in a thread of its own, for programs without an event loop.

What is registered is kept by the client itself, also while the program does something else, or nothing. Must not
know the protocol: every verb is the client's.
"""

import asyncio
import atexit
import concurrent.futures
import os
import threading
from collections.abc import Coroutine, Mapping
from types import TracebackType
from typing import Any, Self, TypeVar

from regd_client import listening, registration
from regd_client.connection import abort_all
from regd_client.following import Endpoint

T = TypeVar("T")

_FAREWELL_S = 1.0


class ClientThread:
    """An event loop that runs until the process ends."""

    def __init__(self) -> None:
        self.pid = os.getpid()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="regd-client", daemon=True)
        self._thread.start()
        atexit.register(self._end)

    def call(self, work: Coroutine[Any, Any, T]) -> T:
        """Run it there, and wait for what it returns or raises. Whoever is interrupted here has cancelled it."""
        asked = self.begin(work)
        try:
            return asked.result()
        finally:
            asked.cancel()

    def begin(self, work: Coroutine[Any, Any, T]) -> "concurrent.futures.Future[T]":
        """Run it there, and go on here."""
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def _end(self) -> None:
        """Leave nothing half done at the end of the process; the names go with it."""
        if self.pid != os.getpid():
            return
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(_FAREWELL_S)
        if not self._thread.is_alive():
            self._loop.run_until_complete(_end_all())
            self._loop.close()


async def _end_all() -> None:
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)
    await abort_all("the program ended")


_threads: list[ClientThread] = []  # the last is ours; those before it, of the processes that we were forked from
_starting = threading.Lock()


def client_thread() -> ClientThread:
    """Return this process's thread; a child that was forked has none of its parent's."""
    with _starting:
        if not _threads or _threads[-1].pid != os.getpid():
            _threads.append(ClientThread())
        return _threads[-1]


def _lock_anew() -> None:
    global _starting
    _starting = threading.Lock()


os.register_at_fork(after_in_child=_lock_anew)


class Registration:
    """A registration that was made here; deregistered on leaving the `with`."""

    def __init__(self, made: registration.Registration, thread: ClientThread) -> None:
        self._made = made
        self._thread = thread

    @property
    def endpoint(self) -> Endpoint:
        return self._made.endpoint

    @property
    def lost(self) -> bool:
        """Whether somebody took it; `lost_reason` says how."""
        return self._made.lost.is_set()

    @property
    def lost_reason(self) -> str:
        return self._made.lost_reason

    def update(self, meta: Mapping[str, str] | None = None, *, state: str | None = None) -> None:
        """Replace its meta as a whole, set its state, or both, as the async one does."""
        self._thread.call(self._made.update(meta, state=state))

    def deregister(self) -> None:
        """End it, as the async one does. Harmless when it has ended, and in a child that was forked."""
        if self._thread.pid == os.getpid():
            self._thread.call(self._made.deregister())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._made.static:
            self.deregister()


class Listening:
    """A socket that listens and is registered; `close`, or leaving the `with`, ends both."""

    def __init__(self, made: listening.Listening, thread: ClientThread) -> None:
        self._made = made
        self._thread = thread
        made.socket.setblocking(True)
        self.socket = made.socket
        self.endpoint = made.endpoint
        self.port = made.port

    def close(self) -> None:
        """Withdraw the name, and then close the socket. Twice is harmless."""
        self._thread.call(self._made.close())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
