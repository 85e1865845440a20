"""regctl as process 1 of a container: a child does the work, and process 1 does what an init process must.

A signal whose action is the default one does nothing to process 1, and every orphan of the container becomes its
child. So it passes signals on to the one child that does the work, and reaps, as dumb-init and tini do.
"""

from __future__ import annotations

import os
import signal

from regd.cli.child import is_from_terminal, pass_on, signals
from regd.cli.output import complain


def exit_status() -> int | None:
    """Fork. Return None in the child, which goes on as usual, and here, once it has ended, its exit status."""
    waited_for = signals()
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, waited_for)
    child = os.fork()
    if child == 0:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        return None
    while True:
        came = signal.sigwaitinfo(waited_for)
        if came.si_signo == signal.SIGCHLD:
            status = _reap(child)
            if status is not None:
                return status
        elif not is_from_terminal(came, child):
            pass_on(child, came.si_signo, lambda text: complain(f"regctl: {text}"))


def _reap(child: int) -> int | None:
    """Reap all that have ended, and return the exit status of `child` if it is among them."""
    found = None
    while found is None:
        number, status = os.waitpid(-1, os.WNOHANG)
        if number == 0:
            return None
        if number == child:
            code = os.waitstatus_to_exitcode(status)
            found = code if code >= 0 else 128 - code  # as shells say it
    return found
