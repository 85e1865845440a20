"""The sockets of the gateway: one port on both loopback addresses, or none."""

import asyncio
import socket

import pytest

from regd.gateways.listeners import bind_loopback, bound_addresses
from regd.system.listener import ListenError

BOTH = (socket.SOCK_DGRAM, socket.SOCK_STREAM)


def test_one_port_for_both_families_and_protocols() -> None:
    sockets = bind_loopback(0, BOTH, "--dns")
    [port] = {sock.getsockname()[1] for sock in sockets}
    assert [(sock.getsockname()[0], sock.type) for sock in sockets] == [
        ("127.0.0.1", socket.SOCK_DGRAM),
        ("127.0.0.1", socket.SOCK_STREAM),
        ("::1", socket.SOCK_DGRAM),
        ("::1", socket.SOCK_STREAM),
    ]
    assert bound_addresses("dns", sockets) == [f"dns://127.0.0.1:{port}", f"dns://[::1]:{port}"]
    with pytest.raises(ListenError, match=f"port {port} is taken"):
        bind_loopback(port, BOTH, "--dns")
    for sock in sockets:
        sock.close()
    for sock in bind_loopback(port, BOTH, "--dns"):  # fails if a socket was left open
        sock.close()


def test_400_queries_at_once_are_not_lost() -> None:
    """nginx sends as many for 200 instances, and waits 5 s for what is lost."""
    for sock in bind_loopback(0, (socket.SOCK_DGRAM,), "--dns"):
        with sock, socket.socket(sock.family, socket.SOCK_DGRAM) as client:
            for _ in range(400):
                client.sendto(b"x" * 60, sock.getsockname())
            assert [len(sock.recv(100)) for _ in range(400)] == [60] * 400


async def test_connections_send_without_delay() -> None:
    [four, six] = bind_loopback(0, (socket.SOCK_STREAM,), "--http")
    six.close()
    found: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        accepted = writer.get_extra_info("socket")
        found.set_result(accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
        assert accepted.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) <= 2 * 262_144
        writer.close()

    async with await asyncio.start_server(accept, sock=four):
        _, writer = await asyncio.open_connection(*four.getsockname())
        assert await found
        writer.close()
