"""The async client against a daemon in the same loop: its verbs, its errors, one connection for many tasks."""

import asyncio
import gc
import json
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

import regd_client
from regd_client.client import Client
from tests.support.daemon import WAIT_S, DaemonProcess, InLoop

pytestmark = pytest.mark.socket


@pytest.fixture(autouse=True)
def address(daemon: InLoop, monkeypatch: pytest.MonkeyPatch) -> str:
    found = f"tcp://127.0.0.1:{daemon.port}"
    monkeypatch.setenv("REGD_ADDRESS", found)
    return found


async def test_the_ten_lines(daemon: InLoop) -> None:
    reg = await regd_client.register("runner", 5050)
    found = await regd_client.resolve("runner")
    assert (found.name, found.instance, found.host, found.port, found.meta) == (
        "runner",
        "",
        "127.0.0.1",
        5050,
        {},
    )
    assert str(found) == "127.0.0.1:5050"
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
        while daemon.server.connections:  # nothing stays open behind the functions
            await asyncio.sleep(0)


async def test_a_static_registration_stays(daemon: InLoop) -> None:
    async with regd_client.register("a", 1, static=True):
        pass
    await regd_client.deregister("a")


async def test_leaving_spares_what_another_registered_meanwhile() -> None:
    async with regd_client.register("a", 1):
        await regd_client.register("a", 2)
    assert (await regd_client.resolve("a")).port == 2


async def test_leaving_takes_what_another_only_labelled() -> None:
    async with Client() as client:
        async with regd_client.register("a", 1):
            await client.update("a", {"k": "v"})
        with pytest.raises(regd_client.NotFound):
            await client.resolve("a")


@pytest.mark.parametrize(
    ("call", "error", "builtin"),
    [
        (lambda c: c.resolve("nobody"), regd_client.NotFound, LookupError),
        (lambda c: c.resolve("BAD"), regd_client.BadArgument, ValueError),
        (lambda c: c.register("a", 0)._register(), regd_client.BadArgument, ValueError),
        (lambda c: c.update("a", {"k": "v" * 70_000}), regd_client.BadArgument, ValueError),
        (
            lambda c: c._ask("register", name="a", port=1, **{"if": 3}),
            regd_client.Conflict,
            regd_client.RegdError,
        ),
        (lambda c: c._ask("nonsense"), regd_client.RegdError, regd_client.RegdError),
    ],
)
async def test_errors_are_also_builtin(
    call: Callable[[Client], Awaitable[object]], error: type[Exception], builtin: type[Exception]
) -> None:
    async with Client() as client:
        with pytest.raises(error) as raised:
            await call(client)
        assert isinstance(raised.value, builtin)
        await client.ping()  # the connection is as good as before


async def test_many_tasks_share_one_connection_and_get_their_own_answers(daemon: InLoop) -> None:
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


async def test_a_cancelled_call_harms_no_other(daemon: InLoop) -> None:
    async with Client() as client:
        for n in range(20):
            await client.register(f"n{n}", 1 + n)
        for turns in range(6):
            tasks = [asyncio.create_task(client.resolve(f"n{n}")) for n in range(20)]
            for _ in range(turns):
                await asyncio.sleep(0)
            for task in tasks[::2]:
                task.cancel()
            results = await asyncio.gather(*tasks, return_exceptions=True)
            for n, result in enumerate(results):
                if n % 2 or not isinstance(result, asyncio.CancelledError):
                    assert isinstance(result, regd_client.Endpoint)
                    assert result.port == 1 + n


async def test_cancelling_who_connects_harms_no_other() -> None:
    client = Client()
    first, second = asyncio.create_task(client.ping()), asyncio.create_task(client.ping())
    await asyncio.sleep(0)
    first.cancel()
    await second
    with pytest.raises(asyncio.CancelledError):
        await first
    await client.close()


async def test_a_broken_connection_is_told_and_the_next_call_has_another(daemon: InLoop) -> None:
    async with Client() as client:
        await client.ping()
        waiting = asyncio.create_task(client.ping())
        await asyncio.sleep(0)
        for connection in list(daemon.server.connections):
            connection.cut()
        with pytest.raises(regd_client.Unavailable, match="broke before the answer"):
            await waiting
        await client.ping()


async def test_no_daemon_is_unavailable_in_time(tmp_path: Path) -> None:
    with pytest.raises(ConnectionError, match="start one with `regd`") as raised:
        await Client(f"unix://{tmp_path}/none", connect_timeout_s=0.05).ping()
    assert isinstance(raised.value, regd_client.Unavailable)
    assert "unix://" in str(raised.value)


async def test_who_is_no_regd_is_told() -> None:
    async def web(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        writer.close()

    async with await asyncio.start_server(web, "127.0.0.1", 0) as server:
        with pytest.raises(regd_client.RegdError, match="not a regd reply"):
            await Client(f"127.0.0.1:{server.sockets[0].getsockname()[1]}").ping()


async def test_a_reply_goes_to_whoever_asked_whatever_the_order() -> None:
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
        found = await asyncio.gather(*(client.resolve(f"a{port}") for port in (1, 2, 3)))
    assert [(endpoint.name, endpoint.port) for endpoint in found] == [("a1", 1), ("a2", 2), ("a3", 3)]


async def test_a_list_of_several_pages_is_whole(daemon: InLoop) -> None:
    async with Client() as client:
        async with asyncio.TaskGroup() as group:
            for n in range(1_050):
                group.create_task(client.register("w", 1 + n, instance=f"{n:04}")._register())
        assert [endpoint.port for endpoint in await client.resolve_all("w")] == list(range(1, 1_051))
        assert len(await client.instances("w*")) == 1_050


def test_several_event_loops_one_after_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with DaemonProcess(tmp_path / "own.json") as process:
        process.start()
        monkeypatch.setenv("REGD_ADDRESS", process.addresses[0])

        async def once(n: int) -> int:
            await regd_client.register("a", 1 + n)
            return (await regd_client.resolve("a")).port

        assert [asyncio.run(once(n)) for n in range(3)] == [1, 2, 3]
    gc.collect()  # a socket left open would warn, and a warning is an error


async def test_the_daemon_comes_a_moment_later(tmp_path: Path) -> None:
    path = tmp_path / "late"
    client = Client(f"unix://{path}", connect_timeout_s=WAIT_S)
    asked = asyncio.create_task(client.ping())
    await asyncio.sleep(0)
    async with InLoop(tmp_path / "late.json", unix=path):
        await asked
        await client.close()
