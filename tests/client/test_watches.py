"""A watch or mirror never reports a false state, even if connections break and calls are cancelled."""

import asyncio
import itertools
import json
import os
import random
import time

import pytest

import regd_client
from regd_client import client as client_module
from regd_client.client import Client
from regd_client.mirrors import Mirror
from regd_client.models import Endpoint, Event
from regd_client.watches import EventQueue, WatchState
from tests.client.relay import Relay
from tests.support.daemon import WAIT_S, InLoop
from tests.support.polling import until

pytestmark = pytest.mark.socket


async def listen(client: Client, kinds: list[str]) -> None:
    async for event in client.watch("x"):
        kinds.append(event.kind)  # noqa: PERF401


@pytest.mark.parametrize("iterations", range(8))
async def test_cancelled_watch_is_ended_at_the_daemon(relay: Relay, iterations: int) -> None:
    """The daemon allows a connection 256 watches."""
    async with Client() as client:
        for _ in range(3):
            task = asyncio.create_task(listen(client, []))
            for _ in range(iterations):
                await asyncio.sleep(0)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        await client.ping()  # sent after the requests about the watches
        await client.ping()  # sent after their replies
        assert (await client.stats())["watches"] == 0


async def test_ending_one_watch_after_a_reconnect_keeps_the_others(
    relay: Relay, daemon: InLoop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The ids of watches start at 1 on each connection."""
    peer = await daemon.peer()
    await peer.ask(cmd="register", name="w", port=1)
    monkeypatch.setattr(
        random, "uniform", lambda low, high: 0.5
    )  # the existing watch is requested again after the new one
    async with Client() as client:
        old = client.mirror("w")
        await old.__aenter__()
        relay.cut()
        await until(lambda: not client._connector.connection.usable)  # type: ignore[union-attr]
        async with client.mirror("w") as mirror:
            await old.__aexit__(None, None, None)
            await client.ping()
            await peer.ask(cmd="register", name="w", port=2)
            await until(lambda: mirror.resolve("w").port == 2)


async def test_second_break_during_the_recovery(relay: Relay, daemon: InLoop) -> None:
    peer = await daemon.peer()
    await peer.ask(cmd="register", name="w", port=1)
    async with Client() as client, client.mirror("w") as one, client.mirror("w", stale_s_max=0.0) as two:
        assert (one.live, two.live) == (True, True)

        def second(said: dict[str, object]) -> bool:
            if relay.count("watch") == 4:
                relay.refuse()
            return relay.count("watch") == 4

        relay.cut_at = second
        relay.cut()
        await until(lambda: relay.count("watch") == 4 and not client._connector.connection.usable)  # type: ignore[union-attr]
        assert (one.live, two.live) == (False, False)
        assert one.resolve("w").stale_s > 0.0
        with pytest.raises(regd_client.Unavailable):
            two.resolve("w")
        relay.cut_at = lambda said: False
        relay.accept()
        await until(lambda: one.live and two.live)


@pytest.mark.parametrize("ending", ["close", "leave"])
async def test_closed_mirror_is_not_live(relay: Relay, daemon: InLoop, ending: str) -> None:
    peer = await daemon.peer()
    await peer.ask(cmd="register", name="w", port=1)
    async with Client() as client:
        async with client.mirror("w", stale_s_max=0.0) as strict, client.mirror("w") as mirror:
            assert mirror.resolve("w").stale_s == strict.resolve("w").stale_s == 0.0
            if ending == "close":
                await client.close()
                assert not mirror.live
        await peer.ask(cmd="deregister", name="w")
        await client.ping()
        assert not mirror.live
        assert mirror.resolve("w").stale_s > 0.0
        with pytest.raises(regd_client.Unavailable, match="stale_s_max"):
            strict.resolve("w")


async def test_mirror_in_a_forked_child_is_not_live(relay: Relay, daemon: InLoop) -> None:
    peer = await daemon.peer()
    await peer.ask(cmd="register", name="w", port=1)
    async with Client() as client, client.mirror("w") as mirror:
        read, write = os.pipe()
        child = os.fork()
        if not child:
            try:
                os.write(write, f"{mirror.live} {mirror.resolve('w').stale_s > 0.0}".encode())
            finally:
                os._exit(0)
        os.close(write)
        await asyncio.to_thread(os.waitpid, child, 0)
        assert os.read(read, 100) == b"False True"
        os.close(read)
        assert mirror.live


async def test_close_ends_watches_and_waiting_mirrors(relay: Relay) -> None:
    async with Client() as client:
        told: list[str] = []
        listening = asyncio.create_task(listen(client, told))
        await until(lambda: told == ["sync"])
        relay.flowing.clear()
        mirror = client.mirror("*")
        begun = asyncio.create_task(mirror.__aenter__())
        await until(lambda: relay.count("watch") == 2)
        await client.close()
        async with asyncio.timeout(WAIT_S):
            await listening
        with pytest.raises(regd_client.Unavailable, match="closed"):
            await begun


async def test_timeout_of_the_first_snapshot(monkeypatch: pytest.MonkeyPatch) -> None:
    async def reticent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        request = json.loads(await reader.readline())
        writer.write(b'{"ok":true,"id":%d,"watch":1,"epoch":"e","rev":1}\n' % request["id"])
        await reader.read()
        writer.close()

    monkeypatch.setattr(client_module, "_SYNC_S", 0.1)
    server = await asyncio.start_server(reticent, "127.0.0.1", 0)
    async with server, Client(f"127.0.0.1:{server.sockets[0].getsockname()[1]}") as client:
        with pytest.raises(regd_client.Unavailable, match="did not send all instances"):
            async with client.mirror("*"):
                pass


class Source:
    """The part of a connection that a watch uses."""

    usable = True
    ended_at: float | None = None


def up(name: str, rev: int) -> dict[str, object]:
    return {
        "event": "up", "name": name, "instance": "", "host": "h", "port": 1, "meta": {}, "state": "ready", "rev": rev
    }  # fmt: skip


def test_sync_is_delivered_once() -> None:
    """Even if the daemon is restarted before the caller has read the first `sync`."""
    told: list[Event] = []
    follow = WatchState("*", None, told.append)
    for epoch in ("one", "two"):
        follow.begin(Source())
        for line in ({"ok": True, "epoch": epoch}, {"event": "reset", "rev": 1}, {"event": "sync", "rev": 1}):
            follow.take(line)
    assert [event.kind for event in told] == ["sync"]


def test_age_limit_of_a_mirror(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    mirror, source = Mirror("*", None, None), Source()
    follow = mirror._watch

    def after(seconds: float) -> tuple[bool, float]:
        clock[0] += seconds
        return mirror.live, round(mirror.stale_s, 6)

    assert after(1) == (False, 1.0)  # no snapshot yet
    follow.begin(source)
    follow.take({"ok": True, "epoch": "e"})
    assert after(1) == (False, 2.0)
    follow.take({"event": "sync", "rev": 1})
    assert after(50) == (True, 0.0)
    follow.take({"event": "reset", "rev": 1})  # the age counts from here
    assert after(1) == (False, 1.0)
    follow.take({"event": "sync", "rev": 1})
    assert after(50) == (True, 0.0)
    source.usable, source.ended_at = False, clock[0] - 14.0  # the last message is 14 s old
    assert after(1) == (False, 15.0)
    follow.begin(another := Source())  # breaks without a message, and so does not change the age
    another.usable, another.ended_at = False, clock[0]
    assert after(1) == (False, 16.0)
    follow.begin(Source())
    follow.take({"event": "progress", "rev": 1})
    assert after(50) == (True, 0.0)
    follow.end()
    assert after(1) == (False, 1.0)


def test_mirror_forgets_removed_names() -> None:
    mirror = Mirror("*", None, None)
    follow = mirror._watch
    follow.begin(Source())
    follow.take({"event": "sync", "rev": 0})
    revs = itertools.count(1)
    for n in range(10):
        for instance in "ab":
            follow.take({**up(f"n{n}", next(revs)), "instance": instance})
        mirror.resolve(f"n{n}")
        for instance in "ab":
            gone = {"event": "down", "name": f"n{n}", "instance": instance, "reason": "deregistered"}
            follow.take({**gone, "rev": next(revs)})
    assert not any(value for key, value in vars(mirror).items() if isinstance(value, dict)), vars(mirror)


def test_slow_listener_gets_the_differences() -> None:
    backlog = EventQueue(events_max=10)
    here, there = Endpoint("a", "", "h", 1, {}), Endpoint("b", "", "h", 2, {})
    backlog.add(Event("up", here, "ready"))
    assert backlog.take().kind == "up"
    for _ in range(50):
        backlog.add(Event("up", there, "ready"))
        backlog.add(Event("down", there, "ready", "deregistered"))
    backlog.add(Event("change", here, "draining"))
    told = []
    while len(backlog):
        event = backlog.take()
        told.append((event.kind, str(event.endpoint)))
    assert len(told) <= 12
    assert told[-1] == ("change", "h:1")
    assert hash(here) != hash(there)


def test_position_stays_in_its_epoch_until_an_event() -> None:
    """If the connection breaks before a new daemon has sent an event, the old position is sent again."""
    told: list[Event] = []
    follow = WatchState("*", None, told.append)
    for line in ({"ok": True, "epoch": "one"}, up("a", 2), {"event": "sync", "rev": 2}):
        follow.take(line)
    assert position(follow) == ("one", 2)
    follow.take({"ok": True, "epoch": "two"})
    assert position(follow) == ("one", 2)
    reset = ({"ok": True, "epoch": "three"}, {"event": "reset", "rev": 9})
    for line in reset:
        follow.take(line)
    assert position(follow) == (None, None)
    for line in (*reset, up("a", 9), {"event": "sync", "rev": 9}):
        follow.take(line)
    assert position(follow) == ("three", 9)
    assert [event.kind for event in told] == ["up", "sync"]
    assert follow.instances["a", ""]["rev"] == 9


def position(state: WatchState) -> tuple[str | None, int | None]:
    """Return the position from which a watch resumes."""
    arguments = state.begin(Source())
    return arguments.get("epoch"), arguments.get("since")


def test_watch_resumed_in_a_new_epoch_gets_the_missed_events() -> None:
    told: list[Event] = []
    follow = WatchState("*", None, told.append)
    for line in ({"ok": True, "epoch": "one"}, up("a", 2), {"event": "sync", "rev": 2}):
        follow.take(line)
    assert position(follow) == ("one", 2)
    assert follow.stale_s > 0.0
    for line in ({"ok": True, "epoch": "two"}, up("b", 3), {"event": "progress", "rev": 3}):
        follow.take(line)
    assert follow.live
    assert [(event.kind, event.endpoint and event.endpoint.name) for event in told] == [
        ("up", "a"),
        ("sync", None),
        ("up", "b"),
    ]
    assert position(follow) == ("two", 3)
