"""The port of the command of `regctl run`: how it is chosen, and kept free until the command listens.

Without --port, the port is $PORT if that is set, else the last port of the name, else a free port that the name
can keep.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import socket
import sys
from collections.abc import Iterable, Iterator, Mapping

from regd.cli.arguments import integer
from regd.cli.child import NotRun
from regd.cli.commands import REFUSED, USAGE
from regd_client.ports import bind_alone, free_ports

RUN_PORT = "REGD_RUN_PORT"  # set together with $PORT, so that an inner `regctl run` ignores $PORT
_FOREMAN = re.compile(r"[A-Za-z0-9_-]+\.[0-9]+")  # foreman's $PS, such as web.1
_Reserved = tuple[int, socket.socket | None]


def port_in(environment: Mapping[str, str]) -> int | None:
    """Return the port that the user has set in $PORT; None if the user has not set it.

    A $PORT that was set by an outer `regctl run` or by a process manager does not count. A process manager sets
    $PORT for each of its processes, counting from 5000.

    Raises:
        NotRun: $PORT is not a port number.
    """
    text = environment.get("PORT", "")
    if text in ("", "0", environment.get(RUN_PORT)) or _is_of_process_manager(environment):
        return None
    port = integer(text, 1, 65_535)
    if port is None:
        raise NotRun(
            USAGE, "bad_argument", f"PORT is {text!r}, which is no port from 1 to 65535; unset it, or use --port"
        )
    return port


def _is_of_process_manager(environment: Mapping[str, str]) -> bool:
    return (
        "HONCHO_PROCESS_NAME" in environment
        or "FOREMAN_WORKER_NAME" in environment
        or _FOREMAN.fullmatch(environment.get("PS", "")) is not None
        # overmind runs each process in its own tmux, whose socket has this name.
        or os.path.basename(environment.get("TMUX", "").partition(",")[0]).startswith("overmind-")
    )


@contextlib.contextmanager
def reserved_port(port: int | None, last: Iterable[int], listening: bool) -> Iterator[_Reserved]:
    """Yield the command's port, and a socket that listens there for the command or reserves the port.

    Without `port`, the command's port is the first free port of `last`, else a free port that the service can
    keep. With `port` and without `listening`, the socket is None: the command opens that port itself.

    A socket that is bound but does not listen reserves a port: the kernel gives the port to no other program,
    but the command can listen on it if it sets SO_REUSEADDR, as servers do.
    """
    with contextlib.ExitStack() as stack:
        if port is None:
            reserved = _first_free(stack, last, listening)
            yield reserved.getsockname()[1], reserved
            return
        try:
            reserved = stack.enter_context(_listening(port) if listening else _bound(port))
        except OSError as error:
            if not listening and error.errno != errno.EADDRINUSE:
                yield port, None  # the command may have rights that regctl lacks
                return
            raise _taken(f"port {port}", error) from None
        if listening:
            yield port, reserved
            return
        reserved.close()  # the port is free, so the command can open it
        yield port, None


def _first_free(stack: contextlib.ExitStack, last: Iterable[int], listening: bool) -> socket.socket:
    """Return a socket bound to the first free port of `last`, else to a free port that the service can keep."""
    for port in last:
        with contextlib.suppress(OSError):
            _lock(stack, port)
            return stack.enter_context(_listening(port) if listening else _bound(port))
    for port in free_ports():
        with contextlib.suppress(OSError):
            _lock(stack, port)
            with _bound(port, alone=True) as reserved:  # fails if another program has reserved the port
                if not listening:
                    return stack.enter_context(reserved.dup())
            return stack.enter_context(_listening(port))
    try:
        return stack.enter_context(_listening(0) if listening else _bound(0))
    except OSError as error:
        raise _taken("a free port", error) from None


def _taken(wanted: str, error: OSError) -> NotRun:
    return NotRun(REFUSED, "port_taken", f"cannot bind {wanted}: {error.strerror}; choose another with --port")


def _lock(stack: contextlib.ExitStack, port: int) -> None:
    """Lock the port against other processes of `regctl run`, even those that start at the same time.

    Binding a socket is not enough, because with SO_REUSEADDR several sockets can be bound to a port; the option
    is needed for a minute after a server has ended. So the lock is an abstract Unix address: it belongs to the
    network namespace, as ports do, and the kernel releases it when the process ends.

    Raises:
        OSError: another `regctl run` has locked the port.
    """
    if sys.platform == "linux":
        lock = stack.enter_context(socket.socket(socket.AF_UNIX))
        lock.bind(f"\0regctl-run-port-{port}")


def _listening(port: int) -> socket.socket:
    return socket.create_server(("127.0.0.1", port))


def _bound(port: int, alone: bool = False) -> socket.socket:
    """Return a socket bound to a port of IPv4 and IPv6. With `alone`, fail if another socket is bound to it."""
    dual = socket.has_dualstack_ipv6()
    bound = socket.socket(socket.AF_INET6 if dual else socket.AF_INET)
    try:
        if dual:
            bound.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        if alone:
            bind_alone(bound, ("", port))
        else:
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            bound.bind(("", port))
    except BaseException:
        bound.close()
        raise
    return bound
