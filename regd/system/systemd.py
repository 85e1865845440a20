"""The interface to systemd: inherited sockets and notifications.

See sd_listen_fds(3), sd_notify(3) and sd_watchdog_enabled(3). Other service managers use the same interface. The
environment variables are removed after reading, since they are meant for this process, not for its children.
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
_CORRECT = "correct the program that starts regd"
_COUNT = re.compile(r"[0-9]{1,5}")
_SEND_S = 1.0  # how long to wait for a busy service manager, for a notification that is sent only once
_STATUS_S = 10.0  # between two updates of the status


def take_inherited_sockets(environment: MutableMapping[str, str]) -> list[InheritedSocket]:
    """Return the sockets that the service manager has passed, and make them non-inheritable.

    An empty list if there are none, or if they are meant for another process.

    Raises:
        ListenError: the environment variables do not describe open sockets.
    """
    environment.pop("LISTEN_PIDFDID", None)
    pid, count, names = (environment.pop(f"LISTEN_{name}", None) for name in ("PID", "FDS", "FDNAMES"))
    if pid != str(os.getpid()) or count in (None, "0"):
        return []
    if not _COUNT.fullmatch(count):
        raise ListenError(f"LISTEN_FDS is {count!a}, not the number of sockets; {_CORRECT}")
    named = ["unknown"] * int(count) if names is None else names.split(":")
    if len(named) != int(count):
        raise ListenError(f"LISTEN_FDS is {count}, and LISTEN_FDNAMES has {len(named)} names; {_CORRECT}")
    sockets = [InheritedSocket(file, name) for file, name in enumerate(named, _FIRST_FILE)]
    for inherited in sockets:
        try:
            os.set_inheritable(inherited.file, False)
        except OSError as error:
            raise ListenError(
                f"LISTEN_FDS is {count}, but file descriptor {inherited.file} is not open ({error.strerror}); "
                f"{_CORRECT}"
            ) from None
    return sockets


def watchdog_s(environment: MutableMapping[str, str]) -> float | None:
    """Return the watchdog's timeout in seconds; None if there is no watchdog."""
    every_us, pid = (environment.pop(f"WATCHDOG_{name}", None) for name in ("USEC", "PID"))
    if every_us is None or (pid is not None and pid != str(os.getpid())):
        return None
    if not every_us.isascii() or not every_us.isdigit() or not 0 < len(every_us.lstrip("0")) <= 20:
        log.warning("WATCHDOG_USEC is %a, not a number of microseconds; the watchdog is off", every_us)
        return None
    return int(every_us) / 1e6


class Notifier:
    """Sends notifications to the service manager, if NOTIFY_SOCKET is set.

    A failure to send is logged once, and has no other effect.
    """

    def __init__(self, environment: MutableMapping[str, str]) -> None:
        self._address = environment.pop("NOTIFY_SOCKET", "")
        self._failing = False
        self._socket: socket.socket | None = None
        if not self._address:
            return
        if self._address[0] not in "/@":
            log.warning("cannot notify %a: it is neither a path nor @NAME", self._address)
            return
        # Keep the socket open, so that the watchdog works even when no file descriptor is free.
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)

    @property
    def is_enabled(self) -> bool:
        return self._socket is not None

    def send(self, *lines: str, wait_s: float = 0.0) -> None:
        """Send lines of the form KEY=VALUE. Block for at most `wait_s`."""
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
    """Notifies the service manager that the daemon is ready, is alive or stops, and of its status.

    It runs in the event loop, so that the notifications stop if the loop is blocked.
    """

    def __init__(
        self, notifier: Notifier, clock: Clock, watchdog_s: float | None, status: Callable[[], str]
    ) -> None:
        self._notifier = notifier
        self._clock = clock
        self._status = status
        self._sent_status = ""
        self._alive = () if watchdog_s is None else ("WATCHDOG=1",)
        self._every_s = _STATUS_S if watchdog_s is None else min(watchdog_s / 2, _STATUS_S)
        self._timer: Timer | None = None

    def start(self) -> None:
        """Notify that the daemon is ready. Call it once the daemon listens."""
        if self._notifier.is_enabled:
            self._sent_status = self._status()
            self._notifier.send("READY=1", f"STATUS={self._sent_status}", *self._alive, wait_s=_SEND_S)
            self._schedule()

    def _schedule(self) -> None:
        self._timer = self._clock.call_at(self._clock.now() + self._every_s, self._beat)

    def _beat(self) -> None:
        lines = self._alive
        status = self._status()
        if status != self._sent_status:
            self._sent_status = status
            lines = (*lines, f"STATUS={status}")
        if lines:
            self._notifier.send(*lines)
        self._schedule()

    def stop(self) -> None:
        """Notify that the daemon stops. Call it before closing anything. Idempotent."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
            self._notifier.send("STOPPING=1", "STATUS=stopping", wait_s=_SEND_S)
        self._notifier.close()
