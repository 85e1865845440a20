"""The registration of a server process without an event loop, which is withdrawn when the process is told to end.

It belongs to the process that owns the port, which may fork workers. So nothing stays behind in that process: no
thread, and no connection if the daemon can see the process. asyncio and what gevent replaces must not be used
here: a signal may be handled in gevent's hub.
"""

from __future__ import annotations

import os
import signal
import time
from types import FrameType
from typing import Any

from regd_client import protocol
from regd_client.arguments import RegistrationRequest
from regd_client.blocking_connection import BlockingConnection
from regd_client.errors import BadArgument, RegdError
from regd_client.logger import log
from regd_client.signals import ProcessSignals, set_handler

__all__ = ["ProcessRegistration"]

_WITHDRAW_S = 2.0  # for the daemon to reply, before the server is told to end all the same
_RETRY_S = 1.0  # the same, in a later attempt to register
_PAUSE_S = 1.0  # between attempts to register


class ProcessRegistration:
    """A registration that lasts as long as this process."""

    def __init__(self, request: RegistrationRequest, drain_s: float) -> None:
        self._request = request
        self._drain_s = drain_s
        self._daemon = protocol.AddressFinder(None)
        self._address: tuple[object, object] = (None, None)  # as the daemon has it
        self._binding: dict[str, Any] | None = None  # what it lasts as long as, once it is registered
        self._connection: BlockingConnection | None = None  # kept open if the daemon cannot see this process
        self._logged: type[RegdError] | None = None  # the last error in the log
        self._pid = os.getpid()
        self._signals = ProcessSignals(self.withdraw)  # first: a server may be told to end while it still starts

    @property
    def _at(self) -> str:
        return protocol.host_port(self._request.host or "127.0.0.1", self._request.port or 0)

    def register(self) -> None:
        """Register, now or as soon as possible.

        Raises:
            BadArgument: the daemon refuses an argument.
            RegdError: registering failed and cannot be tried again: SIGALRM is in use, or this is not the main
                thread.
        """
        try:
            self._try(5.0, autostart=True)
        except BadArgument:
            self._signals.release()
            raise
        except RegdError as trouble:
            if not self._try_later(trouble):
                self._signals.release()
                raise
        self._signals.begin()

    def _try(self, timeout_s: float, autostart: bool) -> None:
        connection = BlockingConnection(self._daemon.find(), timeout_s, autostart=autostart)
        try:
            binding = _binding(connection)
            reply = connection.ask("register", **self._request.fields, **binding)
            if reply.get("error") == "unsupported" and "pid" in binding:
                binding = {"hold": True}
                reply = connection.ask("register", **self._request.fields, **binding)
            if not reply.get("ok"):
                raise protocol.refusal(reply, connection.address)
            self._address = reply.get("host"), reply.get("port")
            self._binding = binding
            if "hold" in binding:
                self._connection = connection
        finally:
            if self._connection is not connection:
                connection.close()

    def _try_later(self, trouble: RegdError) -> bool:
        """Try again in a second, by SIGALRM. Returns whether that is possible."""
        if signal.getsignal(signal.SIGALRM) not in (signal.SIG_DFL, self._again):
            return False
        if not set_handler(signal.SIGALRM, self._again):
            return False
        if self._logged is not type(trouble):
            self._logged = type(trouble)
            log.warning(
                "%s serves at %s, not registered yet, still trying: %s", self._request.name, self._at, trouble
            )
        signal.setitimer(signal.ITIMER_REAL, _PAUSE_S)
        return True

    def _again(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._pid:
            return
        try:
            self._try(_RETRY_S, autostart=False)
        except RegdError as trouble:
            self._try_later(trouble)
        else:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            log.warning("%s is registered now, at %s", self._request.name, self._at)

    # Withdrawn.

    def withdraw(self) -> None:
        """Withdraw the name, and wait so that callers that have just resolved it can connect."""
        if signal.getsignal(signal.SIGALRM) == self._again:
            signal.setitimer(signal.ITIMER_REAL, 0.0)
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
        if self._binding is None:
            return
        try:
            with self._connection or BlockingConnection(
                self._daemon.find(), _WITHDRAW_S, autostart=False
            ) as connection:
                self._end(connection, self._binding)
        except RegdError as trouble:
            log.warning("left %s registered: %s", self._request.name, trouble)
        self._binding = self._connection = None
        _pause(self._drain_s)

    def _end(self, connection: BlockingConnection, binding: dict[str, Any]) -> None:
        """End the registration, but not for another process that holds it, as a new server on the same socket."""
        while (entry := self._current(connection)) is not None:
            # A holder that registers as `draining` withdraws itself alone.
            fields = {**self._request.fields, **binding, "state": "draining", "if": entry["rev"]}
            reply = connection.ask("register", **fields)
            if reply.get("ok"):
                entry = self._current(connection)
                if entry is not None and entry["state"] == "draining":
                    connection.ask("deregister", **self._key, **{"if": entry["rev"]})
                return
            if reply.get("error") != "conflict":
                raise protocol.refusal(reply, connection.address)

    @property
    def _key(self) -> dict[str, str]:
        return {"name": self._request.name, "instance": self._request.instance or ""}

    def _current(self, connection: BlockingConnection) -> dict[str, Any] | None:
        """Return what `why` says of the registration, None if it does not exist or has another address."""
        for entry in connection.ask("why", **self._key).get("instances", ()):
            if (entry["host"], entry["port"]) == self._address:
                return dict(entry)
        return None


def _binding(connection: BlockingConnection) -> dict[str, Any]:
    """Bind the registration to this process if the daemon can see it, else to the connection."""
    host = protocol.own_host()
    is_shared = None not in host.values() and connection.ask("hello").get("host") == host
    return {"pid": os.getpid()} if is_shared else {"hold": True}


def _pause(seconds: float) -> None:
    """Sleep, also in a signal handler in gevent's hub, where gevent's own `time.sleep` must not be used."""
    if hasattr(signal, "sigtimedwait"):
        signal.sigtimedwait((), max(seconds, 0.0))
    else:
        time.sleep(max(seconds, 0.0))
