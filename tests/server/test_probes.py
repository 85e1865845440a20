"""What counts as a refused connection, which alone ends a registration whose process lives."""

import asyncio
import errno
import os
import socket

import pytest

from regd.system import probes

pytestmark = pytest.mark.socket


async def connect_to(
    monkeypatch: pytest.MonkeyPatch, v4: int | None, v6: int | None, host: str = "localhost"
) -> str:
    """Connect to two loopback addresses that fail with these errors; None means no answer."""

    async def sock_connect(probe: socket.socket, address: tuple[str, int]) -> None:
        number = v6 if ":" in address[0] else v4
        if number is None:
            await asyncio.Event().wait()
            return
        raise OSError(number, os.strerror(number))  # raises ConnectionRefusedError and other subclasses

    monkeypatch.setattr(asyncio.get_running_loop(), "sock_connect", sock_connect, raising=False)
    try:
        return await probes._connect((host, 1), 0.05)
    finally:
        monkeypatch.undo()


REFUSED = errno.ECONNREFUSED


@pytest.mark.parametrize(
    ("v4", "v6", "why"),
    [
        (REFUSED, REFUSED, "connection refused"),
        (REFUSED, errno.EADDRNOTAVAIL, "connection refused"),  # the machine has no ::1
        (errno.EADDRNOTAVAIL, REFUSED, "connection refused"),
        (None, REFUSED, "no answer"),  # the backlog of one of the two is full
        (REFUSED, None, "no answer"),
        (REFUSED, errno.EPERM, os.strerror(errno.EPERM).lower()),  # a packet filter
        (errno.EMFILE, REFUSED, os.strerror(errno.EMFILE).lower()),
        (errno.EADDRNOTAVAIL, errno.EADDRNOTAVAIL, "no such address"),
    ],
)
async def test_refused_if_every_address_refuses(
    v4: int | None, v6: int | None, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    try:
        result = await connect_to(monkeypatch, v4, v6)
    except (AttributeError, TypeError):
        pytest.skip("this loop's methods cannot be replaced")
    assert result == why
    assert probes.ProbeResult(1, 0.0, result).refused is (why == "connection refused")


async def test_full_backlog_is_not_a_refusal() -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        address = listener.getsockname()
        waiting = [socket.socket() for _ in range(4)]
        try:
            for task in waiting:
                task.setblocking(False)
                task.connect_ex(address)
            assert await probes._connect(address, 0.2) == "no answer"
        finally:
            for task in waiting:
                task.close()
