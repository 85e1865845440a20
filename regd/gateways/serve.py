"""`regctl serve`: opens the sockets, starts the servers, and stops them in order."""

import asyncio
import contextlib
import logging
import signal
import socket
from collections.abc import Awaitable, Callable, Sequence

from regd.gateways import dns_server, http_server
from regd.gateways.address_file import AddressFile
from regd.gateways.daemon_connections import DaemonClient
from regd.gateways.dns_server import AnswerCache, DnsServer
from regd.gateways.http_server import HttpServer
from regd.gateways.listeners import BACKLOG, bind_at_one, bound_addresses
from regd.gateways.name_watch import NameWatch
from regd.gateways.readers import Readers
from regd.gateways.routes import Gateway
from regd.system.listener import ListenError
from regd.system.open_files import raise_open_files
from regd_client.protocol import autostart_wanted, find_address

__all__ = ["serve"]

log = logging.getLogger("regd.gateways")
_FILE_CHECK_S = 1.0
_FILES_PER_CONNECTION = 3  # per HTTP connection: its own, one of a refused connection, and one to the daemon
# For DNS connections, for connections that are closed right after `accept`, for connections to the daemon, and
# for listeners.
_OTHER_FILES = dns_server.CONNECTIONS_MAX + 4 * BACKLOG + 16
_CONNECTIONS_MIN = 16
_SIGNALS = (signal.SIGTERM, signal.SIGINT)


def serve(
    address: str | None, http_ports: Sequence[int], dns_ports: Sequence[int], say: Callable[[str], None]
) -> None:
    """Serve HTTP and DNS until SIGTERM or Ctrl-C.

    Args:
        address: the daemon's address; None for the default.
        http_ports, dns_ports: the ports to try in order; 0 picks a free one. Without ports, the server is off.
        say: called with a line for each address, once all sockets listen.

    Raises:
        ListenError: a port is taken, or the process may open too few files. No socket is left open.
        BadArgument: the address is invalid.
    """
    asyncio.run(_serve(address, http_ports, dns_ports, say))


async def _serve(
    address: str | None, http_ports: Sequence[int], dns_ports: Sequence[int], say: Callable[[str], None]
) -> None:
    connections_max = _connections_max()
    stopping = asyncio.Event()
    for number in _SIGNALS:
        asyncio.get_running_loop().add_signal_handler(number, stopping.set)
    daemon = DaemonClient(find_address(address))
    async with contextlib.AsyncExitStack() as stack:
        http = _bind(stack, http_ports, (socket.SOCK_STREAM,), "--http")
        dns = _bind(stack, dns_ports, (socket.SOCK_DGRAM, socket.SOCK_STREAM), "--dns")
        readers = Readers(restricted=bool(daemon.address.path))
        stack.callback(readers.close)
        readers.open([sock for sock in (*http, *dns) if sock.type == socket.SOCK_STREAM])
        server = HttpServer(Gateway(daemon, readers), connections_max)
        names = NameWatch(address, lambda: cache.clear())
        cache = AnswerCache(names.state)
        resolver = DnsServer(cache, readers)
        serving = asyncio.create_task(server.serve(http)) if http else None
        try:
            names.start()
            await resolver.start(dns)
            if autostart_wanted(daemon.address):
                # Wait for the start of the daemon, so that the first requests find it.
                await _first_of(stopping.wait(), names.first_attempt.wait())
            if not stopping.is_set():
                addresses = [*bound_addresses("http", http), *bound_addresses("dns", dns)]
                if daemon.address.project:
                    _keep_addresses(stack, daemon.address.project, addresses)
                for line in addresses:
                    say(f"listening {line}")
            # The HTTP server ends before `stopping` only if it fails.
            await _first_of(stopping.wait(), *([serving] if serving else []))
        finally:
            server.should_exit = True
            # All at the same time, since each may wait for a client, and the process must end within two seconds.
            await asyncio.gather(*([serving] if serving else []), names.close(), resolver.close())
            daemon.close()


def _connections_max() -> int:
    """Return the number of HTTP connections for which this process may open files.

    Without this limit, the process could run out of files. asyncio would then try to accept a connection a
    thousand times a second, and log each failure.
    """
    files = raise_open_files(_FILES_PER_CONNECTION * http_server.CONNECTIONS_MAX + _OTHER_FILES)
    connections_max = (files - _OTHER_FILES) // _FILES_PER_CONNECTION
    if connections_max < _CONNECTIONS_MIN:
        raise ListenError(
            "this process may open too few files; "
            "raise the limit to 1024 or more (ulimit -Hn; LimitNOFILE= in a unit)"
        )
    return connections_max


def _bind(
    stack: contextlib.AsyncExitStack, ports: Sequence[int], types: tuple[socket.SocketKind, ...], option: str
) -> list[socket.socket]:
    """Return the bound sockets of a server. `stack` closes them."""
    sockets = bind_at_one(ports, types, option) if ports else []
    for sock in sockets:
        stack.callback(sock.close)
    return sockets


def _keep_addresses(stack: contextlib.AsyncExitStack, folder: str, addresses: Sequence[str]) -> None:
    """Keep the addresses in the project's file until `stack` is closed."""
    file = AddressFile(folder)
    stack.callback(file.close)
    if why := file.write(addresses):
        log.warning("%s", why)
    task = asyncio.create_task(_rewrite(file, addresses), name="regd-gateway-address-file")
    stack.callback(task.cancel)


async def _rewrite(file: AddressFile, addresses: Sequence[str]) -> None:
    """Write the file again if it was removed, or once another gateway of the project no longer has it."""
    while True:
        await asyncio.sleep(_FILE_CHECK_S)
        file.write(addresses)


async def _first_of(*awaitables: Awaitable[object]) -> None:
    """Wait until one of the awaitables is done, then cancel those that were passed as coroutines."""
    tasks = {asyncio.ensure_future(awaitable): awaitable for awaitable in awaitables}
    await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    for task, awaitable in tasks.items():
        if task is not awaitable:
            task.cancel()
