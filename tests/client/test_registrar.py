"""What the caller has registered and follows is the truth, whatever breaks."""

import asyncio
import errno
import os
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
async def telling(client: Client, pattern: str = "*") -> AsyncIterator[list[str]]:
    """Collect what a watch through the client tells, as text."""
    told: list[str] = []

    async def listen() -> None:
        async for event in client.watch(pattern):
            told.append(f"{event.kind} {event.endpoint or ''} {event.reason}".strip())  # noqa: PERF401 - as it comes

    task = asyncio.create_task(listen())
    try:
        yield told
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def cut(daemon: InLoop) -> None:
    for connection in list(daemon.server.connections):
        connection.cut()


async def test_a_registration_is_held_and_bound_to_the_process(daemon: InLoop) -> None:
    async with Client() as other:
        async with regd_client.register("a", 1, meta={"k": "v"}) as registration:
            [known] = (await other.why("a"))["instances"]
            assert known["owners"][0]["pid"] == os.getpid()
            assert known["owners"][0]["connection"]
            assert registration.endpoint.meta == {"k": "v"}
        assert [departure["reason"] for departure in (await other.why("a"))["departures"]] == ["deregistered"]


async def test_it_goes_with_the_connection(daemon: InLoop) -> None:
    async with Client() as other:
        async with Client() as client:
            await client.register("a", 1)
        async with asyncio.timeout(WAIT_S):
            while await other.instances("a"):
                await asyncio.sleep(0)


async def test_after_a_cut_it_is_registered_again(daemon: InLoop) -> None:
    async with Client() as client:
        registration = await client.register("a", 1, meta={"k": "1"})
        await registration.update({"k": "2"}, state="draining")
        await registration.update(state="ready")
        cut(daemon)
        async with Client() as other:
            async with asyncio.timeout(WAIT_S):
                while True:
                    found = await other.instances("a")
                    if found and found[0]["rev"] > 3:
                        break
                    await asyncio.sleep(0.001)
            assert (found[0]["meta"], found[0]["state"]) == ({"k": "2"}, "ready")
        assert not registration.lost.is_set()
        await registration.deregister()


async def test_what_was_left_while_it_was_being_registered_again_is_not(
    daemon: InLoop, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, answered = asyncio.Event(), asyncio.Event()
    async with Client() as client:
        registration = await client.register("a", 1)

        async def hold(connection: Connection, each: Registration) -> dict[str, bool]:
            asked.set()
            await answered.wait()
            return {"hold": True}

        monkeypatch.setattr(client._registrar, "_binding", hold)
        cut(daemon)
        async with asyncio.timeout(WAIT_S):
            await asked.wait()
        await registration.deregister()
        answered.set()
        marker = await client.register("b", 1)
        await until(lambda: marker._connection is client._connector.connection)
        async with asyncio.timeout(WAIT_S):
            while [instance["name"] for instance in await client.instances()] != ["b"]:
                pass


async def test_lost_is_told_and_not_fought(daemon: InLoop) -> None:
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


async def test_who_took_the_name_is_not_updated_by_who_had_it(daemon: InLoop) -> None:
    peer = await daemon.peer()
    async with Client() as client:
        registration = await client.register("a", 1)
        await peer.ask(cmd="register", name="a", port=2, meta={"k": "theirs"}, force=True)
        with pytest.raises(regd_client.NotFound):
            await registration.update({"k": "ours"})
        assert (await client.resolve("a")).meta == {"k": "theirs"}


async def test_who_took_the_name_meanwhile_keeps_it(daemon: InLoop) -> None:
    async with Client() as client:
        registration = await client.register("a", 1)
        peer = await daemon.peer()
        peer.send({"cmd": "register", "name": "a", "port": 2, "ttl": 50, "force": True})
        [held] = [connection for connection in daemon.server.connections if connection._dispatcher.holds]
        held.cut()
        async with asyncio.timeout(WAIT_S):
            await registration.lost.wait()
        assert (await client.resolve("a")).port == 2


async def test_a_watch_goes_on_after_a_cut_without_losing_or_repeating(daemon: InLoop) -> None:
    peer = await daemon.peer()
    async with Client() as client, telling(client, "w*") as told:
        await peer.ask(cmd="register", name="w", port=1)
        await until(lambda: told == ["sync", "up 127.0.0.1:1"] or told == ["up 127.0.0.1:1", "sync"])
        [watcher] = [connection for connection in daemon.server.connections if connection._dispatcher.watches]
        watcher.cut()
        await peer.ask(cmd="register", name="w", port=2)
        await peer.ask(cmd="deregister", name="w")
        await until(lambda: len(told) == 5)
        assert told[2:] == ["down 127.0.0.1:1 replaced", "up 127.0.0.1:2", "down 127.0.0.1:2 deregistered"]


async def test_a_mirror(daemon: InLoop) -> None:
    peer = await daemon.peer()
    for n in (1, 2):
        await peer.ask(cmd="register", name="w", port=n, instance=str(n), meta={"zone": "ab"[n - 1]})
    async with regd_client.mirror("w*") as mirror:
        assert [mirror.resolve("w").port for _ in range(4)] == [1, 2, 1, 2]
        assert [mirror.resolve("w", meta={"zone": "b"}).port for _ in range(2)] == [2, 2]
        assert [str(endpoint) for endpoint in mirror.resolve_all("w")] == ["127.0.0.1:1", "127.0.0.1:2"]
        assert mirror.live
        assert mirror.resolve("w").stale_s == 0.0
        with pytest.raises(regd_client.NotFound):
            mirror.resolve("w3")
        await peer.ask(cmd="update", name="w", instance="1", state="draining")
        await until(lambda: {mirror.resolve("w").port for _ in range(3)} == {2})
        await peer.ask(cmd="deregister", name="w", instance="2")
        with pytest.raises(regd_client.NotFound):
            await until(lambda: mirror.resolve("w") is None)


async def test_a_mirror_says_how_old_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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


async def test_the_daemon_is_killed_under_200_registrations(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All are back, and who watches through the client hears nothing of it."""
    with DaemonProcess(tmp_path / "own.json") as process:
        process.start()
        monkeypatch.setenv("REGD_ADDRESS", process.addresses[0])
        async with Client() as one, Client() as two, Client() as watcher, telling(watcher, "w*") as told:
            made = [
                await client.register("w", 1 + n, instance=str(n)) for n, client in enumerate([one, two] * 100)
            ]
            await until(lambda: len(told) == 201)
            for number in (9, 15):
                old = {client._connection for client in made}
                process.end(number)
                process.start()
                await until(lambda old=old: not old & {client._connection for client in made})  # type: ignore[misc]
                async with asyncio.timeout(WAIT_S):
                    while len(await watcher.instances("w")) < 200:
                        await asyncio.sleep(0.01)
                marker = await one.register("w.marker", 1)
                await until(lambda: told[-1] == "up 127.0.0.1:1")
                await marker.deregister()
                await until(lambda: told[-1].startswith("down"))
                assert len(told) == 201 + 3
                del told[201:]


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
        await until(lambda: other.server.parked)
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


@pytest.mark.parametrize("turns", range(12))
async def test_a_cancelled_registration_is_none(daemon: InLoop, turns: int) -> None:
    async with Client() as other, Client() as shared:
        for register in (regd_client.register, shared.register):
            task = asyncio.ensure_future(register("a", 1))
            for _ in range(turns * 3):
                await asyncio.sleep(0)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            if not task.cancelled():
                await task.result().deregister()
            async with asyncio.timeout(WAIT_S):
                while await other.instances("a"):
                    await asyncio.sleep(0.001)
        await shared.ping()


async def test_one_callers_bad_value_harms_no_other() -> None:
    async with Client() as client:
        for meta in ({"k": "\ud800"}, {1: "a", "1": "b"}, {"k": 1}):
            ping = asyncio.create_task(client.ping())
            with pytest.raises(regd_client.BadArgument):
                await client.register("a", 1, meta=meta)  # type: ignore[arg-type]
            with pytest.raises(regd_client.BadArgument):
                await client.resolve("\ud800")
            await ping


async def test_closing_is_told_to_those_who_wait_for_the_connection(tmp_path: Path) -> None:
    client = Client(f"unix://{tmp_path}/none")
    waiting = asyncio.create_task(client.ping())
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    await client.close()
    with pytest.raises(regd_client.Unavailable):
        await waiting


async def test_a_child_that_was_forked_has_nothing_of_it(daemon: InLoop) -> None:
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


async def test_no_process_is_named_to_a_daemon_that_sees_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a container: its process numbers are not the daemon's."""
    monkeypatch.setattr("regd_client.protocol.own_host", lambda: {"boot": "this", "pid_namespace": "another"})
    async with Client() as client, regd_client.register("a", 1):
        [known] = (await client.why("a"))["instances"]
        assert "pid" not in known["owners"][0]
        assert known["owners"][0]["connection"]


async def test_without_pidfds_it_is_held_by_the_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(pid: int, flags: int = 0) -> int:
        raise OSError(errno.ENOSYS, "no such call")

    monkeypatch.setattr(os, "pidfd_open", unknown)
    async with Client() as client:
        for name in ("a", "b"):
            await client.register(name, 1)
            [known] = (await client.why(name))["instances"]
            assert "pid" not in known["owners"][0]
            assert known["owners"][0]["connection"]


@pytest.mark.parametrize("turns", range(0, 60, 5))
@pytest.mark.parametrize("by", ["registration", "client"])
async def test_an_update_after_a_break_is_not_undone(relay: Relay, daemon: InLoop, turns: int, by: str) -> None:
    async with Client() as client, Client(f"127.0.0.1:{daemon.port}") as other:
        registration = await client.register("a", 1, meta={"v": "1"})
        relay.cut()
        for _ in range(turns):
            await asyncio.sleep(0)
        if by == "registration":
            await registration.update({"v": "2"})
        else:
            await client.update("a", {"v": "2"})
        for _ in range(3):  # the keeper has been there meanwhile
            await client.ping()
            [found] = await other.instances("a")
            assert found["meta"] == registration.endpoint.meta == {"v": "2"}


async def test_an_update_without_a_daemon_is_refused_in_time(relay: Relay) -> None:
    async with Client(connect_timeout_s=0.2) as client:
        registration = await client.register("a", 1, meta={"v": "1"})
        relay.refuse()
        relay.cut()
        with pytest.raises(regd_client.Unavailable):
            await registration.update({"v": "2"})
        await relay.accept()
        await until(lambda: registration._connection is not None and registration._connection.usable)
        await registration.update({"v": "3"})
        assert registration.endpoint.meta == {"v": "3"}
