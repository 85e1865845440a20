"""The interface of a service manager: inherited sockets (sd_listen_fds(3)), and notifications about readiness,
liveness and stopping (sd_notify(3), sd_watchdog_enabled(3)).

The environment variables are systemd's; other service managers use the same. They are removed from the
environment, since they are meant for this process alone.
"""

import logging
import os
import re
import socket
from collections.abc import Callable, MutableMapping

from regd.system.clock import Clock, Timer
from regd.system.listener import InheritedSocket, ListenError

log = logging.getLogger("regd")

_FIRST_FILE = 3  # SD_LISTEN_FDS_START
_COUNT = re.compile(r"[0-9]{1,5}")
_PATIENCE_S = 1.0  # for a busy service manager to take a notification that is sent only once
_STATUS_S = 10.0  # between two updates of the status


def handed_over(environment: MutableMapping[str, str]) -> list[InheritedSocket]:
    """Take the sockets that were opened for this process, and keep children from inheriting them.

    Raises:
        ListenError: the environment is wrong about them.
    """
    environment.pop("LISTEN_PIDFDID", None)
    pid, count, names = (environment.pop(f"LISTEN_{name}", None) for name in ("PID", "FDS", "FDNAMES"))
    if pid != str(os.getpid()) or count in (None, "0"):
        return []
    if not _COUNT.fullmatch(count):
        raise ListenError(f"LISTEN_FDS is {count!a}, not the number of sockets; correct what starts regd")
    named = ["unknown"] * int(count) if names is None else names.split(":")
    if len(named) != int(count):
        raise ListenError(
            f"LISTEN_FDS is {count}, and LISTEN_FDNAMES has {len(named)} names; correct what starts regd"
        )
    handed = [InheritedSocket(file, name) for file, name in enumerate(named, _FIRST_FILE)]
    for inherited in handed:
        try:
            os.set_inheritable(inherited.file, False)
        except OSError as error:
            raise ListenError(
                f"LISTEN_FDS is {count}, and file {inherited.file} is not there ({error.strerror}); "
                "correct what starts regd"
            ) from None
    return handed


def watchdog_s(environment: MutableMapping[str, str]) -> float | None:
    """Take the watchdog's timeout; None if there is no watchdog."""
    every_us, pid = (environment.pop(f"WATCHDOG_{name}", None) for name in ("USEC", "PID"))
    if every_us is None or (pid is not None and pid != str(os.getpid())):
        return None
    if not every_us.isascii() or not every_us.isdigit() or not 0 < len(every_us.lstrip("0")) <= 20:
        log.warning("WATCHDOG_USEC is %a, no number of microseconds; there is no watchdog", every_us)
        return None
    return int(every_us) / 1e6


class Notifier:
    """Sends notifications to the service manager, if it wants any.

    A failure to send is logged once, and has no other effect.
    """

    def __init__(self, environment: MutableMapping[str, str]) -> None:
        self._address = environment.pop("NOTIFY_SOCKET", "")
        self._failing = False
        self._socket: socket.socket | None = None
        if not self._address:
            return
        if self._address[0] not in "/@":
            log.warning("cannot notify %a: it is no path and no @NAME", self._address)
            return
        # Kept open, so that the watchdog is fed even without free file descriptors.
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)

    @property
    def are_heard(self) -> bool:
        return self._socket is not None

    def tell(self, *lines: str, wait_s: float = 0.0) -> None:
        """Send lines of the form KEY=VALUE. Blocks for at most `wait_s`."""
        if self._socket is None:
            return
        address = f"\0{self._address[1:]}" if self._address[0] == "@" else self._address
        try:
            self._socket.settimeout(wait_s)
            self._socket.sendto("\n".join(lines).encode(), address)
        except OSError as error:
            if not self._failing:
                log.warning("cannot notify %a: %s", self._address, error.strerror or error)
            self._failing = True
        else:
            self._failing = False

    def close(self) -> None:
        """Close the socket. Idempotent."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None


class Watchdog:
    """Notifies the service manager that the daemon is ready, alive, of its status, and that it stops.

    It runs in the event loop, so that a blocked loop is not reported alive.
    """

    def __init__(
        self, notices: Notifier, clock: Clock, watchdog_s: float | None, status: Callable[[], str]
    ) -> None:
        self._notices = notices
        self._clock = clock
        self._status = status
        self._told = ""
        self._sign = () if watchdog_s is None else ("WATCHDOG=1",)
        self._every_s = _STATUS_S if watchdog_s is None else min(watchdog_s / 2, _STATUS_S)
        self._timer: Timer | None = None

    def start(self) -> None:
        """Notify that the daemon is ready. Call it when everything is open."""
        if self._notices.are_heard:
            self._told = self._status()
            self._notices.tell("READY=1", f"STATUS={self._told}", *self._sign, wait_s=_PATIENCE_S)
            self._go_on()

    def _go_on(self) -> None:
        self._timer = self._clock.call_at(self._clock.now() + self._every_s, self._beat)

    def _beat(self) -> None:
        lines = self._sign
        status = self._status()
        if status != self._told:
            self._told = status
            lines = (*lines, f"STATUS={status}")
        if lines:
            self._notices.tell(*lines)
        self._go_on()

    def stop(self) -> None:
        """Notify that the daemon stops. Call it before anything is closed. Idempotent."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
            self._notices.tell("STOPPING=1", "STATUS=stopping", wait_s=_PATIENCE_S)
        self._notices.close()
