"""How long the verbs of the client retry without a daemon, and what they log."""

import asyncio
import io
import logging
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import regd_client
from regd_client import Client, Timeout, Unavailable, blocking, blocking_connection
from regd_client.blocking import BlockingConnection
from regd_client.registrar import _NEWEST
from tests.client.relay import Relay
from tests.client.test_arguments import VERBS
from tests.client.test_leaving import REPLACED
from tests.support.daemon import WAIT_S, InLoop
from tests.support.polling import until

pytestmark = pytest.mark.socket
READS = [
    lambda client: client.ping(),
    lambda client: client.hello(),
    lambda client: client.stats(),
    lambda client: client.why("a"),
    lambda client: client.resolve("a"),
    lambda client: client.resolve_all("a"),
    lambda client: client.instances(),
    lambda client: anext(client.watch()),
    lambda client: client.mirror().__aenter__(),
    lambda client: client.__aenter__(),
    lambda client: client.deregister("a"),
]


@pytest.fixture
def nowhere(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of a reserved port on which nothing listens."""
    with socket.socket() as kept:
        kept.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{kept.getsockname()[1]}"
        monkeypatch.setenv("REGD_ADDRESS", address)
        yield address


@pytest.fixture
def one_try(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail the test if a second attempt is made."""

    async def pause(seconds: float) -> None:
        raise AssertionError("it tries again")

    monkeypatch.setattr("regd_client.connector.CONNECT_S", WAIT_S)
    monkeypatch.setattr("regd_client.connector.pause", pause)


def told(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Return the client's log messages, without the messages of asyncio about slow callbacks."""
    return [record.getMessage() for record in caplog.records if record.name == "regd_client"]


async def test_both_clients_give_the_same_reason(nowhere: str) -> None:
    with pytest.raises(Unavailable, match=r"\(Connection refused\)") as error:
        await regd_client.resolve("a")
    with pytest.raises(Unavailable) as blocked:
        BlockingConnection().ask("ping")
    assert str(error.value) == str(blocked.value)


@pytest.mark.parametrize("call", READS)
@pytest.mark.parametrize("kind", ["tcp", "unix", "localhost"])
async def test_reads_fail_at_once_if_the_connection_is_refused(
    call: Callable[[Client], Any], kind: str, nowhere: str, tmp_path: Path
) -> None:
    address = {
        "tcp": nowhere,
        "unix": f"unix://{tmp_path}/none",
        "localhost": nowhere.replace("127.0.0.1", "localhost"),
    }[kind]
    client = Client(address)
    client._connector.timeout_s = 2 * WAIT_S
    async with asyncio.timeout(WAIT_S):
        with pytest.raises(Unavailable, match="no regd at"):
            await call(client)
    assert client._connector._connecting is None
    await client.close()


async def test_wait_includes_connecting(tmp_path: Path) -> None:
    path = tmp_path / "late"
    client = Client(f"unix://{path}")
    waiting = asyncio.create_task(client.resolve("a", wait=WAIT_S))
    refused = asyncio.create_task(client.resolve("a"))
    with pytest.raises(Unavailable):
        await refused
    server = await asyncio.start_server(lambda reader, writer: writer.close(), "127.0.0.1", 0)
    async with server, InLoop(tmp_path / "late.json", unix=path), Client(f"unix://{path}") as other:
        await other.register("a", server.sockets[0].getsockname()[1])
        assert (await waiting).name == "a"
        await client.close()


async def test_register_retries_and_logs_at_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "late"
    monkeypatch.setenv("REGD_ADDRESS", f"unix://{path}")
    registering = asyncio.ensure_future(regd_client.register("a", 1, timeout=WAIT_S))
    listening = asyncio.ensure_future(regd_client.listen("b", timeout=WAIT_S).__aenter__())
    await until(lambda: len(told(caplog)) == 2)
    assert all(message.startswith(f"no regd at unix://{path} (") for message in told(caplog))
    assert all(message.endswith("; still trying") for message in told(caplog))
    async with InLoop(tmp_path / "late.json", unix=path):
        registration = await registering
        await (await listening).close()
        await registration.deregister()
    assert told(caplog)[2:4] == [f"connected to regd at unix://{path}"] * 2


async def test_late_registration_is_logged_at_once_and_on_success(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "late"
    monkeypatch.setenv("REGD_ADDRESS", f"unix://{path}")
    async with (
        regd_client.lifespan("web") as service,
        await asyncio.start_server(lambda reader, writer: None, "127.0.0.1", 0),
    ):
        await until(lambda: told(caplog))
        async with InLoop(tmp_path / "late.json", unix=path):
            registration = await service.registration()
            assert len(told(caplog)) == 2, told(caplog)
            assert "not registered yet, still trying: no regd at" in told(caplog)[0]
            assert told(caplog)[1] == f"web is registered now, at {registration.endpoint}"
            await service.withdraw()


@pytest.mark.sample(4)
@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("kind", ["nobody", "silence"])
async def test_timeout_bounds_every_verb(
    verb: Callable[[Client, Any], Any], kind: str, nowhere: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("regd_client.connection.HANGS_S", 2 * WAIT_S)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = nowhere if kind == "nobody" else f"127.0.0.1:{silent.getsockname()[1]}"
        monkeypatch.setenv("REGD_ADDRESS", address)
        client = Client(address, connect_timeout_s=2 * WAIT_S)
        async with asyncio.timeout(WAIT_S):
            with pytest.raises(Unavailable if kind == "nobody" else (Timeout, Unavailable)):
                await verb(client, 0.05)
        await client.close()


def test_timeout_bounds_the_blocking_verbs(nowhere: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        client = blocking.Client(f"127.0.0.1:{silent.getsockname()[1]}")
        client._thread.call(client._client._connect())  # on a busy machine, this may take longer than 0.05 s
        for call in (
            client.ping,
            client.stats,
            client.instances,
            client.hello,
            lambda timeout: client.resolve("a", timeout=timeout),
        ):
            with pytest.raises(Timeout, match=r"was not answered within 0\.05 s"):
                call(timeout=0.05)
        client.close()
    with pytest.raises(Unavailable):
        blocking.register("a", 1, timeout=0.05)


def test_timeout_bounds_a_reply_that_arrives_byte_by_byte(monkeypatch: pytest.MonkeyPatch) -> None:
    class Dripping:
        """A socket that returns one byte per second, forever."""

        now = 0.0

        def __getattr__(self, name: str) -> Callable[..., None]:
            return lambda *args: None

        def recv(self, most: int) -> bytes:
            Dripping.now += 1.0
            return b"{"

    monkeypatch.setattr(BlockingConnection, "_connect", lambda self, timeout_s: Dripping())
    monkeypatch.setattr(blocking_connection, "monotonic", lambda: Dripping.now)
    with BlockingConnection(timeout_s=5.0) as connection, pytest.raises(Unavailable, match="timed out"):
        connection.ask("ping")
    assert 5.0 <= Dripping.now <= 6.0


class Raising(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        raise ZeroDivisionError


@pytest.mark.parametrize("broken", ["handler", "closed", "none", "full"])
async def test_broken_log_handler_changes_nothing(
    relay: Relay, daemon: InLoop, broken: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A lost registration is reported and another survives a restart, although logging fails."""
    log = logging.getLogger("regd_client")
    closed = io.StringIO()
    closed.close()
    full = open("/dev/full", "w")  # noqa: SIM115, ASYNC230
    stream = {"handler": None, "closed": closed, "none": None, "full": full}[broken]
    handler = Raising() if broken == "handler" else logging.StreamHandler(stream or closed)
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr(log, "handlers", [handler])
    monkeypatch.setattr(log, "propagate", False)
    monkeypatch.setattr(logging, "raiseExceptions", True)
    async with Client() as client, Client(f"127.0.0.1:{daemon.port}") as other:
        first = await client.register("a", 1)
        kept = await client.register("b", 1)
        connection = await client._connect()
        await other.register("a", 2, force=True)
        await first.lost.wait()
        await client.ping()
        assert (first._over, client._connector.usable) == ("replaced", connection)
        client._connector.timeout_s = 0.01
        relay.refuse()
        relay.cut()
        await until(lambda: kept._connection is not None and not kept._connection.usable)
        relay.accept()
        client._connector.timeout_s = WAIT_S
        await kept.update({"k": "v"})
        assert (await other.resolve("b")).meta == {"k": "v"}
    monkeypatch.undo()
    try:
        full.close()
    except OSError:
        pass


async def test_two_clients_in_one_process_register_one_name(
    relay: Relay, caplog: pytest.LogCaptureFixture
) -> None:
    async with Client() as one, Client() as two:
        first = await one.register("shop", 8000)
        second = await two.register("shop", 8001)
        async with asyncio.timeout(WAIT_S):
            await first.lost.wait()
        assert (first.lost_reason, second.lost.is_set()) == (REPLACED, False)
        assert told(caplog) == [
            f"lost the registration of shop: {REPLACED}: it was at 127.0.0.1:8000, the newer one is at "
            "127.0.0.1:8001; to keep both, give each its own instance="
        ]
        relay.cut()
        await second.update({"k": "v"})
        await one.ping()
        assert (await two.resolve("shop")).port == 8001


async def test_reconnected_older_client_does_not_replace_the_newer_registration(
    relay: Relay, daemon: InLoop
) -> None:
    """The older client's connection broke before it could learn of the newer registration."""
    async with Client() as one, Client(f"127.0.0.1:{daemon.port}") as two:
        first = await one.register("shop", 8000)
        relay.refuse()
        relay.cut()
        await until(lambda: first._connection is not None and not first._connection.usable)
        # The two clients reach one daemon at two addresses. Give the newer registration the older one's address.
        second = await two.register("shop", 8001)
        _NEWEST[first._global_key] = second
        relay.accept()
        async with asyncio.timeout(WAIT_S):
            await first.lost.wait()
        assert first.lost_reason == REPLACED
        assert (await two.resolve("shop")).port == 8001
        assert not second.lost.is_set()


async def test_caller_without_patience_makes_its_own_attempt(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another caller's attempt may have failed before the daemon started."""
    began = asyncio.Event()
    tries: list[asyncio.Future[Any]] = []

    async def open(address: object, lost: object) -> Any:
        tries.append(asyncio.get_running_loop().create_future())
        began.set()
        return await tries[-1]

    monkeypatch.setattr("regd_client.connection.Connection.open", open)
    client = Client()
    patient = asyncio.create_task(client.resolve("a", wait=WAIT_S))
    await began.wait()
    late = asyncio.create_task(client.ping())
    await asyncio.sleep(0)
    began.clear()
    tries[0].set_exception(ConnectionRefusedError())
    await began.wait()
    assert not late.done()
    tries[1].set_exception(ConnectionRefusedError())
    with pytest.raises(Unavailable):
        await late
    patient.cancel()
    await asyncio.gather(patient, return_exceptions=True)
    await client.close()
