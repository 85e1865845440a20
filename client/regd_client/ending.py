"""The name of a server process without an event loop: registered once, withdrawn when the process is told to end.

It belongs to the process that owns the port, which may fork workers. So nothing stays behind in that process: no
thread, and no connection where the daemon can see the process. It must be quick to import, and must not use what
gevent replaces: a signal may be handled in gevent's own event loop.
"""

from __future__ import annotations

import logging
import os
import signal
from _socket import socketpair

from regd_client import wire
from regd_client.blocking import BlockingConnection
from regd_client.errors import BadArgument, RegdError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from types import FrameType
    from typing import Any

log = logging.getLogger("regd_client")

_ENDS = (signal.SIGTERM, signal.SIGINT)
_WITHDRAW_S = 2.0  # for the daemon to answer, before the server is told all the same
_TRY_S = 1.0  # the same, in a later try to register
_PAUSE_S = 1.0  # between tries to register


class Ending:
    """Handles SIGTERM and SIGINT from now on: `withdraw` is called before the handlers of the program.

    A second signal comes at once, and so does every signal in a child that was forked. A signal that comes before
    `begin` waits for it.
    """

    def __init__(self, withdraw: Callable[[], None]) -> None:
        self._withdraw = withdraw
        self._pid = os.getpid()
        self._begun = False
        self._asked: int | None = None
        self._handlers: dict[int, Callable[[int, FrameType | None], Any]] = {}
        for number in _ENDS:
            handler = signal.getsignal(number)
            # Else it is ignored, or ends the process, or this is not the main thread: nothing is held then.
            if callable(handler) and _handles(number, self._handle):
                self._handlers[number] = handler

    def begin(self) -> None:
        self._begun = True
        if self._asked is not None:
            self._end(self._asked, None)

    def give_up(self) -> None:
        """Nothing is registered: hold nothing."""
        self._begun = True
        for number, handler in self._handlers.items():
            if signal.getsignal(number) == self._handle:
                signal.signal(number, handler)
        if self._asked is not None:
            signal.raise_signal(self._asked)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._asked is not None or os.getpid() != self._pid:
            self._handlers[number](number, frame)
            return
        self._asked = number
        if self._begun:
            self._end(number, frame)

    def _end(self, number: int, frame: FrameType | None) -> None:
        try:
            self._withdraw()
        finally:
            self._handlers[number](number, frame)


class ProcessName:
    """A registration that lasts as long as this process."""

    def __init__(self, name: str, port: int, arguments: dict[str, Any], drain_s: float) -> None:
        self._entry = {"name": name, "port": port, **arguments}
        self._drain_s = drain_s
        self._where: tuple[object, object] = (None, None)
        self._lasts: dict[str, Any] | None = None  # the conditions under which it is registered
        self._connection: BlockingConnection | None = None  # open where the daemon cannot see this process
        self._said: type[RegdError] | None = None
        self._pid = os.getpid()
        self._ending = Ending(self.withdraw)  # first: a server may be told to end while it still starts

    @property
    def _at(self) -> str:
        return wire.joined(self._entry.get("host") or "127.0.0.1", self._entry["port"])

    def register(self) -> None:
        """Register it, now or as soon as possible.

        Raises:
            BadArgument: the daemon does not take it.
            RegdError: what is in the way now, in a process that uses SIGALRM for something else, or not in the
                main thread.
        """
        try:
            self._try(5.0, starts=True)
        except BadArgument:
            self._ending.give_up()
            raise
        except RegdError as trouble:
            if not self._try_later(trouble):
                self._ending.give_up()
                raise
        self._ending.begin()

    def _try(self, timeout_s: float, starts: bool) -> None:
        connection = BlockingConnection(timeout_s=timeout_s, starts=starts)
        try:
            lasts = _lasts(connection)
            reply = connection.ask("register", **self._entry, **lasts)
            if reply.get("error") == "unsupported" and "pid" in lasts:
                lasts = {"hold": True}
                reply = connection.ask("register", **self._entry, **lasts)
            if not reply.get("ok"):
                raise wire.refusal(reply, connection.address)
            self._where = reply.get("host"), reply.get("port")
            self._lasts = lasts
            if "hold" in lasts:
                self._connection = connection
        finally:
            if self._connection is not connection:
                connection.close()

    def _try_later(self, trouble: RegdError) -> bool:
        """Have the system call again in a moment. Returns whether that can be."""
        if signal.getsignal(signal.SIGALRM) not in (signal.SIG_DFL, self._again):
            return False
        if not _handles(signal.SIGALRM, self._again):
            return False
        if self._said is not type(trouble):
            self._said = type(trouble)
            log.warning(
                "%s serves at %s, not registered yet, still trying: %s", self._entry["name"], self._at, trouble
            )
        signal.setitimer(signal.ITIMER_REAL, _PAUSE_S)
        return True

    def _again(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._pid:
            return
        try:
            self._try(_TRY_S, starts=False)
        except RegdError as trouble:
            self._try_later(trouble)
        else:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            log.warning("%s is registered now, at %s", self._entry["name"], self._at)

    # Withdrawn.

    def withdraw(self) -> None:
        """Take the name away, and give those who have just resolved it the time to connect."""
        if signal.getsignal(signal.SIGALRM) == self._again:
            signal.setitimer(signal.ITIMER_REAL, 0.0)
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
        if self._lasts is None:
            return
        try:
            with self._connection or BlockingConnection(timeout_s=_WITHDRAW_S, starts=False) as connection:
                self._give_up(connection, self._lasts)
        except RegdError as trouble:
            log.warning("left %s registered: %s", self._entry["name"], trouble)
        self._lasts = self._connection = None
        _pause(self._drain_s)

    def _give_up(self, connection: BlockingConnection, lasts: dict[str, Any]) -> None:
        """End it, but not for other processes that hold it: the next server on the same socket, for example."""
        while (entry := self._found(connection)) is not None:
            # Draining by one of several holders withdraws that one alone.
            asked = {**self._entry, **lasts, "state": "draining", "if": entry["rev"]}
            reply = connection.ask("register", **asked)
            if reply.get("ok"):
                entry = self._found(connection)
                if entry is not None and entry["state"] == "draining":
                    connection.ask("deregister", **self._key, **{"if": entry["rev"]})
                return
            if reply.get("error") != "conflict":
                raise wire.refusal(reply, connection.address)

    @property
    def _key(self) -> dict[str, str]:
        return {"name": self._entry["name"], "instance": self._entry["instance"] or ""}

    def _found(self, connection: BlockingConnection) -> dict[str, Any] | None:
        """Return what is registered under the name, if it is at our address."""
        for each in connection.ask("why", **self._key).get("instances", ()):
            if (each["host"], each["port"]) == self._where:
                return dict(each)
        return None


def _lasts(connection: BlockingConnection) -> dict[str, Any]:
    """Return how long it lasts: as this process, where the daemon sees the same ones as we do."""
    here = wire.own_host()
    shared = None not in here.values() and connection.ask("hello").get("host") == here
    return {"pid": os.getpid()} if shared else {"hold": True}


def _handles(number: int, handler: Callable[[int, FrameType | None], Any]) -> bool:
    """Have a signal handled. Returns whether it is; only the main thread may say so."""
    try:
        signal.signal(number, handler)
    except ValueError:
        return False
    return True


def _pause(seconds: float) -> None:
    """Wait, as nothing of gevent does."""
    one, other = socketpair()
    try:
        one.settimeout(max(seconds, 0.001))
        one.recv(1)
    except TimeoutError:
        pass
    finally:
        one.close()
        other.close()
