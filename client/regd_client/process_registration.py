"""Registers a server process without an event loop, and withdraws the name on SIGTERM and SIGINT.

The process that owns the port may fork workers. So registering leaves no thread in the process, and no connection
if the daemon can see the process. This module must not use asyncio or functions that gevent patches, because
signal handlers may run in gevent's hub.
"""

from __future__ import annotations

import itertools
import os
import signal
import time
from dataclasses import replace
from types import FrameType
from typing import Any

from regd_client import protocol, replicas
from regd_client.arguments import AUTO, RegistrationRequest
from regd_client.blocking_connection import BlockingConnection
from regd_client.errors import BadArgument, RegdError
from regd_client.logger import log
from regd_client.signals import ProcessSignals, set_handler

__all__ = ["ProcessRegistration"]

_REGISTER_S = 5.0  # the timeout of the first attempt to register
_RETRY_S = 1.0  # the timeout of later attempts
_PAUSE_S = 1.0  # between attempts
_WITHDRAW_S = 2.0  # the longest wait for the daemon's reply before the server gets the signal


class ProcessRegistration:
    """A registration of this process."""

    def __init__(self, request: RegistrationRequest, drain_s: float) -> None:
        self._request = request
        self._drain_s = drain_s
        self._address_finder = protocol.AddressFinder(None)
        self._address: tuple[object, object] = (None, None)  # host and port in the daemon's reply
        self._binding: dict[str, Any] | None = None  # `pid` or `hold`, once the daemon has registered the name
        self._connection: BlockingConnection | None = None  # kept open if the daemon cannot see this process
        self._logged: type[RegdError] | None = None  # the kind of the last error in the log
        self._pid = os.getpid()
        self._signals = ProcessSignals(self.withdraw)  # set up before registering, which a signal may interrupt

    @property
    def _at(self) -> str:
        return protocol.host_port(self._request.host or "127.0.0.1", self._request.port or 0)

    def register(self) -> None:
        """Register now; if that fails, try again every second.

        Raises:
            BadArgument: the daemon refuses an argument.
            RegdError: registering failed and cannot be retried: SIGALRM is in use, or this is not the main
                thread.
        """
        try:
            self._try(_REGISTER_S, autostart=True)
        except RegdError as error:
            if isinstance(error, BadArgument) or not self._try_later(error):
                self._signals.release()
                raise
        self._signals.begin()

    def _try(self, timeout_s: float, autostart: bool) -> None:
        connection = BlockingConnection(self._address_finder.find(), timeout_s, autostart=autostart)
        try:
            binding = _binding(connection)
            reply = self._ask_to_register(connection, binding)
            if reply.get("error") == "unsupported" and "pid" in binding:
                binding = {"hold": True}
                reply = self._ask_to_register(connection, binding)
            if not reply.get("ok"):
                raise protocol.refusal(reply, connection.address)
            self._request = replace(self._request, instance=reply["instance"])
            self._address = reply.get("host"), reply.get("port")
            self._binding = binding
            if "hold" in binding:
                self._connection = connection
        finally:
            if self._connection is not connection:
                connection.close()

    def _ask_to_register(self, connection: BlockingConnection, binding: dict[str, Any]) -> dict[str, Any]:
        """Send `register` and return the reply. For `auto`, use the lowest number that no live owner holds."""
        fields = {**self._request.fields, **binding}
        if self._request.instance != AUTO:
            return connection.ask("register", **fields)
        address = self._request.host or "127.0.0.1", self._request.port
        while True:
            entries = _list(connection, self._request.name)
            for instance, rev in replicas.candidates(entries, address, (os.getpid(),)):
                reply = connection.ask("register", **{**fields, "instance": instance, "if": rev})
                if reply.get("error") != "conflict":
                    return reply
                if not replicas.is_taken(reply):
                    break  # the registration has changed, so list the instances again

    def _try_later(self, error: RegdError) -> bool:
        """Schedule the next attempt, by SIGALRM. Return False if the program uses SIGALRM itself."""
        if signal.getsignal(signal.SIGALRM) not in (signal.SIG_DFL, self._again):
            return False
        if not set_handler(signal.SIGALRM, self._again):
            return False
        if self._logged is not type(error):
            self._logged = type(error)
            log.warning(
                "%s serves at %s, not registered yet, still trying: %s", self._request.name, self._at, error
            )
        signal.setitimer(signal.ITIMER_REAL, _PAUSE_S)
        return True

    def _again(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._pid:
            return
        try:
            self._try(_RETRY_S, autostart=False)
        except RegdError as error:
            self._try_later(error)
        else:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            log.warning("%s is registered now, at %s", self._request.name, self._at)

    def withdraw(self) -> None:
        """Deregister the name, then wait, so that clients that have just resolved it can connect."""
        if signal.getsignal(signal.SIGALRM) == self._again:
            signal.setitimer(signal.ITIMER_REAL, 0.0)
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
        if self._binding is None:
            return
        try:
            with self._connection or BlockingConnection(
                self._address_finder.find(), _WITHDRAW_S, autostart=False
            ) as connection:
                self._end(connection, self._binding)
        except RegdError as error:
            log.warning("left %s registered: %s", self._request.name, error)
        self._binding = self._connection = None
        _pause(self._drain_s)

    def _end(self, connection: BlockingConnection, binding: dict[str, Any]) -> None:
        """End only this process's hold, since a new server on the same socket may also hold the registration."""
        while (entry := self._current(connection)) is not None:
            # If a holder registers again, as `draining`, the daemon removes only that holder.
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
        """Return the entry of this registration in `why`; None if the name is free or has another address."""
        for entry in connection.ask("why", **self._key).get("instances", ()):
            if (entry["host"], entry["port"]) == self._address:
                return dict(entry)
        return None


def _binding(connection: BlockingConnection) -> dict[str, Any]:
    """Return `pid` if the daemon can see this process, else `hold`, which binds to the connection."""
    host = protocol.own_host()
    is_shared = None not in host.values() and connection.ask("hello").get("host") == host
    return {"pid": os.getpid()} if is_shared else {"hold": True}


def _list(connection: BlockingConnection, name: str) -> list[dict[str, Any]]:
    """Return all instances of a service."""
    entries: list[dict[str, Any]] = []
    after = None
    for number in itertools.count(1):
        reply = connection.ask("list", name=name, after=after)
        if not reply["ok"]:
            raise protocol.refusal(reply, connection.address)
        protocol.add_page(entries, reply, number)
        after = reply.get("next")
        if after is None:
            break
    return entries


def _pause(seconds: float) -> None:
    """Sleep without `time.sleep`, since gevent's version cannot be used in a signal handler in gevent's hub."""
    if hasattr(signal, "sigtimedwait"):
        signal.sigtimedwait((), max(seconds, 0.0))
    else:
        time.sleep(max(seconds, 0.0))
