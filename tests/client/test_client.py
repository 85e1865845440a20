"""The async client with a daemon in the same event loop: functions, the shared connection, broken connections."""

import asyncio
import gc
import json
from pathlib import Path

import pytest

import regd_client
from regd_client.client import Client
from tests.support.daemon import WAIT_S, DaemonProcess, InLoop

pytestmark = pytest.mark.socket


@pytest.fixture(autouse=True)
def address(daemon: InLoop, monkeypatch: pytest.MonkeyPatch) -> str:
    address = f"tcp://127.0.0.1:{daemon.port}"
    monkeypatch.setenv("REGD_ADDRESS", address)
    return address


async def test_functions(daemon: InLoop) -> None:
    reg = await regd_client.register("runner", 5050)
    runner = await regd_client.resolve("runner")
    assert (runner.name, runner.instance, runner.host, runner.port, runner.meta) == (
        "runner",
        "",
        "127.0.0.1",
        5050,
        {},
    )
    assert str(runner) == "127.0.0.1:5050"
    async with regd_client.register("worker", 1, host="::1", instance="a", meta={"zone": "a"}):
        many = await regd_client.resolve_all("worker", meta={"zone": "a"})
        assert [str(endpoint) for endpoint in many] == ["[::1]:1"]
    with pytest.raises(regd_client.NotFound):
        await regd_client.resolve("worker")
    await reg.deregister()
    await reg.deregister()
    with pytest.raises(LookupError):
        await regd_client.deregister("runner")
    async with asyncio.timeout(WAIT_S):
        while daemon.server.connections:  # the functions close their connections
            await asyncio.sleep(0)


async def test_a_static_registration_stays(daemon: InLoop) -> None:
    async with regd_client.register("a", 1, static=True):
        pass
    await regd_client.deregister("a")


async def test_deregister_does_not_end_a_newer_registration() -> None:
    async with regd_client.register("a", 1):
        await regd_client.register("a", 2)
    assert (await regd_client.resolve("a")).port == 2


async def test_deregister_after_another_client_updated_meta() -> None:
    async with Client() as client:
        async with regd_client.register("a", 1):
            await client.update("a", {"k": "v"})
        with pytest.raises(regd_client.NotFound):
            await client.resolve("a")


async def test_many_tasks_share_one_connection(daemon: InLoop) -> None:
    async with Client() as client:
        for n in range(50):
            await client.register(f"n{n}", 1 + n)

        async def ask(n: int) -> None:
            for _ in range(20):
                assert (await client.resolve(f"n{n}")).port == 1 + n

        async with asyncio.TaskGroup() as group:
            for n in range(50):
                group.create_task(ask(n))
        assert len(daemon.server.connections) == 1


async def test_cancelled_call_does_not_affect_others(daemon: InLoop) -> None:
    async with Client() as client:
        for n in range(20):
            await client.register(f"n{n}", 1 + n)
        for iterations in range(6):
            tasks = [asyncio.create_task(client.resolve(f"n{n}")) for n in range(20)]
            for _ in range(iterations):
                await asyncio.sleep(0)
            for task in tasks[::2]:
                task.cancel()
            results = await asyncio.gather(*tasks, return_exceptions=True)
            for n, result in enumerate(results):
                if n % 2 or not isinstance(result, asyncio.CancelledError):
                    assert isinstance(result, regd_client.Endpoint)
                    assert result.port == 1 + n


async def test_cancelled_connect_does_not_affect_others() -> None:
    client = Client()
    first, second = asyncio.create_task(client.ping()), asyncio.create_task(client.ping())
    await asyncio.sleep(0)
    first.cancel()
    await second
    with pytest.raises(asyncio.CancelledError):
        await first
    await client.close()


async def test_broken_connection_is_reported_and_replaced(daemon: InLoop) -> None:
    async with Client() as client:
        await client.ping()
        waiting = asyncio.create_task(client.ping())
        await asyncio.sleep(0)
        for connection in list(daemon.server.connections):
            connection.cut()
        with pytest.raises(regd_client.Unavailable, match="broke before the reply"):
            await waiting
        await client.ping()


async def test_no_daemon_is_unavailable_in_time(tmp_path: Path) -> None:
    with pytest.raises(ConnectionError, match="start one with `regd`") as raised:
        await Client(f"unix://{tmp_path}/none", connect_timeout_s=0.05).ping()
    assert isinstance(raised.value, regd_client.Unavailable)
    assert "unix://" in str(raised.value)


async def test_replies_out_of_order_reach_their_callers() -> None:
    async def backwards(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        lines = [json.loads(await reader.readline()) for _ in range(3)]
        for fields in reversed(lines):
            reply = {
                "ok": True,
                "id": fields["id"],
                "name": fields["name"],
                "instance": "",
                "host": "h",
                "meta": {},
                "state": "ready",
                "rev": 1,
            }
            writer.write(json.dumps(reply | {"port": int(fields["name"][1:])}).encode() + b"\n")
        writer.close()

    server = await asyncio.start_server(backwards, "127.0.0.1", 0)
    async with server, Client(f"127.0.0.1:{server.sockets[0].getsockname()[1]}") as client:
        endpoints = await asyncio.gather(*(client.resolve(f"a{port}") for port in (1, 2, 3)))
    assert [(endpoint.name, endpoint.port) for endpoint in endpoints] == [("a1", 1), ("a2", 2), ("a3", 3)]


async def test_list_of_several_pages_is_complete(daemon: InLoop) -> None:
    async with Client() as client:
        async with asyncio.TaskGroup() as group:
            for n in range(1_050):
                group.create_task(client.register("w", 1 + n, instance=f"{n:04}")._register())
        assert [endpoint.port for endpoint in await client.resolve_all("w")] == list(range(1, 1_051))
        assert len(await client.instances("w*")) == 1_050


def test_consecutive_event_loops(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with DaemonProcess(tmp_path / "own.json") as process:
        process.start()
        monkeypatch.setenv("REGD_ADDRESS", process.addresses[0])

        async def once(n: int) -> int:
            await regd_client.register("a", 1 + n)
            return (await regd_client.resolve("a")).port

        assert [asyncio.run(once(n)) for n in range(3)] == [1, 2, 3]
    gc.collect()  # an open socket would cause a ResourceWarning, which is an error


async def test_call_waits_for_a_daemon_that_starts_later(tmp_path: Path) -> None:
    path = tmp_path / "late"
    client = Client(f"unix://{path}", connect_timeout_s=WAIT_S)
    ping = asyncio.create_task(client.ping())
    await asyncio.sleep(0)
    async with InLoop(tmp_path / "late.json", unix=path):
        await ping
        await client.close()
