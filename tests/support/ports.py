"""A free port for a program that a test starts."""

import contextlib
import socket

from regd_client.ports import free_ports


def free_port() -> int:
    """Return a free port of 127.0.0.1, to which the system binds no program that asks for any port."""
    for port in free_ports():
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port
    with socket.create_server(("127.0.0.1", 0)) as any_port:  # this system keeps no ports apart
        return int(any_port.getsockname()[1])
