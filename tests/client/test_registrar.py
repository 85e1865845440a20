"""Registrations, watches and mirrors of a client stay correct over broken connections and restarts."""

import asyncio
import errno
import os
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

import regd_client
from regd_client.client import Client
from regd_client.connection import Connection
from regd_client.registration import Registration
from tests.client.relay import Relay
from tests.support.daemon import WAIT_S, DaemonProcess, InLoop
from tests.support.polling import until

pytestmark = pytest.mark.socket


@pytest.fixture(autouse=True)
def address(daemon: InLoop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REGD_ADDRESS", f"tcp://127.0.0.1:{daemon.port}")


@asynccontextmanager
async def watching(client: Client, pattern: str = "*") -> AsyncIterator[list[str]]:
    """Collect the events of a watch of the client as text."""
    events: list[str] = []

    async def listen() -> None:
        async for event in client.watch(pattern):
            events.append(f"{event.kind} {event.endpoint or ''} {event.reason}".strip())  # noqa: PERF401

    task = asyncio.create_task(listen())
    try:
        yield events
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def cut(daemon: InLoop) -> None:
    for connection in list(daemon.server.connections):
        connection.cut()


async def test_registration_is_held_by_connection_and_process(daemon: InLoop) -> None:
    async with Client() as other:
        async with regd_client.register("a", 1, meta={"k": "v"}) as registration:
            [known] = (await other.why("a"))["instances"]
            assert known["owners"][0]["pid"] == os.getpid()
            assert known["owners"][0]["connection"]
            assert registration.endpoint.meta == {"k": "v"}
        assert [departure["reason"] for departure in (await other.why("a"))["departures"]] == ["deregistered"]


async def test_registration_returns_after_a_broken_connection(daemon: InLoop) -> None:
    async with Client() as client:
        registration = await client.register("a", 1, meta={"k": "1"})
        await registration.update({"k": "2"}, state="draining")
        await registration.update(state="ready")
        cut(daemon)
        async with Client() as other:
            async with asyncio.timeout(WAIT_S):
                while True:
                    instances = await other.instances("a")
                    if instances and instances[0]["rev"] > 3:
                        break
                    await asyncio.sleep(0.001)
            assert (instances[0]["meta"], instances[0]["state"]) == ({"k": "2"}, "ready")
        assert not registration.lost.is_set()
        await registration.deregister()


async def test_deregister_during_the_re_registration(daemon: InLoop, monkeypatch: pytest.MonkeyPatch) -> None:
    requested, answered = asyncio.Event(), asyncio.Event()
    async with Client() as client:
        registration = await client.register("a", 1)

        async def hold(connection: Connection, each: Registration) -> dict[str, bool]:
            requested.set()
            await answered.wait()
            return {"hold": True}

        monkeypatch.setattr(client._registrar, "_binding", hold)
        cut(daemon)
        async with asyncio.timeout(WAIT_S):
            await requested.wait()
        await registration.deregister()
        answered.set()
        marker = await client.register("b", 1)
        await until(lambda: marker._connection is client._connector.connection)
        async with asyncio.timeout(WAIT_S):
            while [instance["name"] for instance in await client.instances()] != ["b"]:
                pass


async def test_lost_registration_is_reported_and_not_taken_back(daemon: InLoop) -> None:
    peer = await daemon.peer()
    async with Client() as client:
        registration = await client.register("a", 1)
        refused = await peer.ask(cmd="register", name="a", port=2, hold=True)
        assert refused["owner"]["pid"] == os.getpid()
        assert (await peer.ask(cmd="register", name="a", port=2, hold=True, force=True))["ok"]
        async with asyncio.timeout(WAIT_S):
            await registration.lost.wait()
        assert registration.lost_reason == "replaced"
        await registration.deregister()
        with pytest.raises(regd_client.Conflict) as conflict:
            await client.register("a", 1)
        assert "127.0.0.1" in conflict.value.details["owner"]["connection"]
        assert (await client.resolve("a")).port == 2
        assert (await client.register("a", 3, force=True)).endpoint.port == 3
        assert (await peer.reply())["event"] == "lost"


async def test_update_does_not_reach_a_new_owner(daemon: InLoop) -> None:
    peer = await daemon.peer()
    async with Client() as client:
        registration = await client.register("a", 1)
        await peer.ask(cmd="register", name="a", port=2, meta={"k": "theirs"}, force=True)
        with pytest.raises(regd_client.NotFound):
            await registration.update({"k": "ours"})
        assert (await client.resolve("a")).meta == {"k": "theirs"}


async def test_new_owner_keeps_the_name_after_a_reconnect(daemon: InLoop) -> None:
    async with Client() as client:
        registration = await client.register("a", 1)
        peer = await daemon.peer()
        peer.send({"cmd": "register", "name": "a", "port": 2, "ttl": 50, "force": True})
        [held] = [connection for connection in daemon.server.connections if connection._dispatcher.holds]
        held.cut()
        async with asyncio.timeout(WAIT_S):
            await registration.lost.wait()
        assert (await client.resolve("a")).port == 2


async def test_watch_continues_after_a_broken_connection(daemon: InLoop) -> None:
    peer = await daemon.peer()
    async with Client() as client, watching(client, "w*") as events:
        await peer.ask(cmd="register", name="w", port=1)
        await until(lambda: events == ["sync", "up 127.0.0.1:1"] or events == ["up 127.0.0.1:1", "sync"])
        [watcher] = [connection for connection in daemon.server.connections if connection._dispatcher.watches]
        watcher.cut()
        await peer.ask(cmd="register", name="w", port=2)
        await peer.ask(cmd="deregister", name="w")
        await until(lambda: len(events) == 5)
        assert events[2:] == ["down 127.0.0.1:1 replaced", "up 127.0.0.1:2", "down 127.0.0.1:2 deregistered"]


async def test_mirror_age(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with DaemonProcess(tmp_path / "own.json") as process:
        process.start()
        monkeypatch.setenv("REGD_ADDRESS", process.addresses[0])
        async with Client() as client:
            await client.register("w", 1, static=True)
            async with client.mirror("w*") as mirror, client.mirror("w*", stale_s_max=0.0) as strict:
                process.end(9)
                await until(lambda: not mirror.live)
                assert mirror.resolve("w").stale_s > 0.0
                assert mirror.resolve_all("w")[0].stale_s > 0.0
                with pytest.raises(regd_client.Unavailable, match="stale_s_max"):
                    strict.resolve("w")
                process.start()
                await until(lambda: mirror.live and strict.live)
                assert mirror.resolve("w").stale_s == strict.resolve("w").stale_s == 0.0


@pytest.mark.long
async def test_200_registrations_return_after_a_kill(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All registrations return, and a client's watch reports no event."""
    with DaemonProcess(tmp_path / "own.json") as process:
        process.start()
        monkeypatch.setenv("REGD_ADDRESS", process.addresses[0])
        async with Client() as one, Client() as two, Client() as watcher, watching(watcher, "w*") as events:
            registrations = [
                await client.register("w", 1 + n, instance=str(n)) for n, client in enumerate([one, two] * 100)
            ]
            await until(lambda: len(events) == 201)
            for number in (9, 15):
                old = {client._connection for client in registrations}
                process.end(number)
                process.start()
                await until(lambda old=old: not old & {client._connection for client in registrations})  # type: ignore[misc]
                async with asyncio.timeout(WAIT_S):
                    while len(await watcher.instances("w")) < 200:
                        await asyncio.sleep(0.01)
                marker = await one.register("w.marker", 1)
                await until(lambda: events[-1] == "up 127.0.0.1:1")
                await marker.deregister()
                await until(lambda: events[-1].startswith("down"))
                assert len(events) == 201 + 3
                del events[201:]


async def test_resolve_waits_for_the_daemon_and_for_the_service(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = await asyncio.start_server(lambda reader, writer: writer.close(), "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    path = tmp_path / "s"
    monkeypatch.setenv("REGD_ADDRESS", f"unix://{path}")
    waiting = asyncio.create_task(regd_client.resolve("late", wait=WAIT_S))
    await asyncio.sleep(0)
    async with server, InLoop(tmp_path / "own.json", unix=path) as other:
        await until(lambda: other.server.waiting)
        async with regd_client.register("late", port):
            assert (await waiting).port == port
        with pytest.raises(regd_client.Timeout, match="deregistered"):
            await regd_client.resolve("late", wait=0)


async def test_register_makes_a_task() -> None:
    async with Client() as client, asyncio.TaskGroup() as group:
        task = group.create_task(client.register("a", 1))
        registrations = await asyncio.gather(client.register("b", 1), client.register("c", 1))
    assert task.result().endpoint.name == "a"
    assert [registration.endpoint.name for registration in registrations] == ["b", "c"]


@pytest.mark.parametrize("iterations", range(12))
async def test_cancelled_register_leaves_no_registration(daemon: InLoop, iterations: int) -> None:
    async with Client() as other, Client() as shared:
        for register in (regd_client.register, shared.register):
            task = asyncio.ensure_future(register("a", 1))
            for _ in range(iterations * 3):
                await asyncio.sleep(0)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            if not task.cancelled():
                await task.result().deregister()
            async with asyncio.timeout(WAIT_S):
                while await other.instances("a"):
                    await asyncio.sleep(0.001)
        await shared.ping()


async def test_invalid_value_does_not_affect_other_callers() -> None:
    async with Client() as client:
        for meta in ({"k": "\ud800"}, {1: "a", "1": "b"}, {"k": 1}):
            ping = asyncio.create_task(client.ping())
            with pytest.raises(regd_client.BadArgument):
                await client.register("a", 1, meta=meta)  # type: ignore[arg-type]
            with pytest.raises(regd_client.BadArgument):
                await client.resolve("\ud800")
            await ping


async def test_close_fails_the_calls_that_wait_for_a_connection(tmp_path: Path) -> None:
    client = Client(f"unix://{tmp_path}/none")
    waiting = asyncio.create_task(client.ping())
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    await client.close()
    with pytest.raises(regd_client.Unavailable):
        await waiting


async def test_forked_child_does_not_share_the_client(daemon: InLoop) -> None:
    async with Client() as client, Client() as other:
        registration = await client.register("a", 1)
        read, write = os.pipe()
        child = os.fork()
        if not child:
            try:
                usable = registration._connection is not None and registration._connection.usable
                os.write(write, b"usable" if usable else b"nothing")
            finally:
                os._exit(0)
        os.close(write)
        await asyncio.to_thread(os.waitpid, child, 0)
        assert os.read(read, 20) == b"nothing"
        os.close(read)
        await client.ping()
        assert (await other.resolve("a")).port == 1
        assert not registration.lost.is_set()


async def test_no_pid_is_sent_across_pid_namespaces(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a container, for example, pids differ from the daemon's."""
    monkeypatch.setattr("regd_client.protocol.own_host", lambda: {"boot": "this", "pid_namespace": "another"})
    async with Client() as client, regd_client.register("a", 1):
        [known] = (await client.why("a"))["instances"]
        assert "pid" not in known["owners"][0]
        assert known["owners"][0]["connection"]


async def test_without_pidfd_an_entry_is_held_by_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(pid: int, flags: int = 0) -> int:
        raise OSError(errno.ENOSYS, "no such call")

    monkeypatch.setattr(os, "pidfd_open", unknown)
    async with Client() as client:
        for name in ("a", "b"):
            await client.register(name, 1)
            [known] = (await client.why(name))["instances"]
            assert "pid" not in known["owners"][0]
            assert known["owners"][0]["connection"]


@pytest.mark.parametrize("iterations", range(0, 60, 5))
@pytest.mark.parametrize("by", ["registration", "client"])
async def test_update_after_a_broken_connection_is_not_undone(
    relay: Relay, daemon: InLoop, iterations: int, by: str
) -> None:
    async with Client() as client, Client(f"127.0.0.1:{daemon.port}") as other:
        registration = await client.register("a", 1, meta={"v": "1"})
        relay.cut()
        for _ in range(iterations):
            await asyncio.sleep(0)
        if by == "registration":
            await registration.update({"v": "2"})
        else:
            await client.update("a", {"v": "2"})
        for _ in range(3):  # until the entry has been registered again
            await client.ping()
            [instance] = await other.instances("a")
            assert instance["meta"] == registration.endpoint.meta == {"v": "2"}


async def test_update_without_a_daemon_fails_in_time(relay: Relay) -> None:
    async with Client(connect_timeout_s=0.2) as client:
        registration = await client.register("a", 1, meta={"v": "1"})
        relay.refuse()
        relay.cut()
        with pytest.raises(regd_client.Unavailable):
            await registration.update({"v": "2"})
        relay.accept()
        await until(lambda: registration._connection is not None and registration._connection.usable)
        await registration.update({"v": "3"})
        assert registration.endpoint.meta == {"v": "3"}


async def test_seeded_program_keeps_its_random_numbers(relay: Relay) -> None:
    before = random.getstate()
    async with Client() as client:
        registration = await client.register("a", 1)
        relay.refuse()
        relay.cut()
        with pytest.raises(regd_client.Unavailable):
            await Client(connect_timeout_s=0.05).ping()
        relay.accept()
        await until(lambda: registration._connection is not None and registration._connection.usable)
    assert random.getstate() == before
