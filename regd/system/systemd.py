"""What a service manager hands over, and what it is told: sockets that listen already (sd_listen_fds(3)); that it
is ready, that it lives, and that it stops (sd_notify(3), sd_watchdog_enabled(3)).

All of it comes by the environment and is taken out of it, since it is meant for this process alone. The variables
are systemd's; others speak the same. Must not know what is served.
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
_PATIENCE_S = 1.0  # for a busy service manager to take what is told once
_STATUS_S = 10.0  # until people see a change


def handed_over(environment: MutableMapping[str, str]) -> list[InheritedSocket]:
    """Take what was opened for this process; nothing when it is another's. No child will inherit it.

    Raises:
        ListenError: what the environment says is not so.
    """
    environment.pop("LISTEN_PIDFDID", None)
    pid, count, names = (environment.pop(f"LISTEN_{each}", None) for each in ("PID", "FDS", "FDNAMES"))
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
    for each in handed:
        try:
            os.set_inheritable(each.file, False)
        except OSError as error:
            raise ListenError(
                f"LISTEN_FDS is {count}, and file {each.file} is not there ({error.strerror}); "
                "correct what starts regd"
            ) from None
    return handed


def watchdog_s(environment: MutableMapping[str, str]) -> float | None:
    """Take how long the service manager waits for a sign of life; None when it does not."""
    every_us, pid = (environment.pop(f"WATCHDOG_{each}", None) for each in ("USEC", "PID"))
    if every_us is None or (pid is not None and pid != str(os.getpid())):
        return None
    if not every_us.isascii() or not every_us.isdigit() or not 0 < len(every_us.lstrip("0")) <= 20:
        log.warning("WATCHDOG_USEC is %a, no number of microseconds; there is no watchdog", every_us)
        return None
    return int(every_us) / 1e6


class Notifier:
    """The way to the service manager; nowhere when it wants to hear nothing.

    What cannot be told is told to the log, once, and ends nothing.
    """

    def __init__(self, environment: MutableMapping[str, str]) -> None:
        self._address = environment.pop("NOTIFY_SOCKET", "")
        self._failing = False
        self._socket: socket.socket | None = None
        if not self._address:
            return
        if self._address[0] not in "/@":
            log.warning("cannot tell %a anything: it is no path and no @NAME", self._address)
            return
        # One for all: when there are no more files, the watchdog is to be fed all the same.
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)

    @property
    def are_heard(self) -> bool:
        return self._socket is not None

    def tell(self, *lines: str, wait_s: float = 0.0) -> None:
        """Send lines of the form KEY=VALUE, and hold the loop for `wait_s` at most."""
        if self._socket is None:
            return
        address = f"\0{self._address[1:]}" if self._address[0] == "@" else self._address
        try:
            self._socket.settimeout(wait_s)
            self._socket.sendto("\n".join(lines).encode(), address)
        except OSError as error:
            if not self._failing:
                log.warning("cannot tell %a anything: %s", self._address, error.strerror or error)
            self._failing = True
        else:
            self._failing = False

    def close(self) -> None:
        """Twice is harmless."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None


class Watchdog:
    """Tells that the service is ready, from then on that it lives and how it is, and at last that it stops.

    It beats in the event loop, so that it stands still when the loop does.
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
        """To be called when everything is open, and never before."""
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
        """To be called before anything is closed. Twice is harmless."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
            self._notices.tell("STOPPING=1", "STATUS=stopping", wait_s=_PATIENCE_S)
        self._notices.close()
