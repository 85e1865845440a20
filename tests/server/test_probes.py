"""What counts as a refused connection: only that ends a registration whose process lives."""

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
    """Connect where the two loopback addresses fail so; None: no answer."""

    async def sock_connect(probe: socket.socket, address: tuple[str, int]) -> None:
        number = v6 if ":" in address[0] else v4
        if number is None:
            await asyncio.Event().wait()
            return
        raise OSError(number, os.strerror(number))  # becomes ConnectionRefusedError and the like

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
        (REFUSED, errno.EADDRNOTAVAIL, "connection refused"),  # a machine without ::1
        (errno.EADDRNOTAVAIL, REFUSED, "connection refused"),
        (None, REFUSED, "no answer"),  # a full queue on one of the two
        (REFUSED, None, "no answer"),
        (REFUSED, errno.EPERM, os.strerror(errno.EPERM).lower()),  # a filter: nobody knows
        (errno.EMFILE, REFUSED, os.strerror(errno.EMFILE).lower()),
        (errno.EADDRNOTAVAIL, errno.EADDRNOTAVAIL, "no such address"),
    ],
)
async def test_a_connection_is_refused_when_every_address_refuses_it(
    v4: int | None, v6: int | None, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    try:
        found = await connect_to(monkeypatch, v4, v6)
    except (AttributeError, TypeError):
        pytest.skip("this loop's methods cannot be replaced")
    assert found == why
    assert probes.ProbeResult(1, 0.0, found).refused is (why == "connection refused")


async def test_a_full_queue_is_no_answer() -> None:
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
