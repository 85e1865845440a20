"""What is the fake's own: coming and going, what a test says at it, threads and loops that end."""

import asyncio
import contextlib
import logging
import threading
from collections.abc import Callable

import pytest

import regd_client
from regd_client import blocking, link, testing
from regd_client.client import Client
from regd_client.connection import Connection
from regd_client.testing import FakeRegistry
from tests.client.relay import until
from tests.support.daemon import WAIT_S

registry = pytest.fixture(testing.fixture)


@pytest.fixture(autouse=True)
def nobody_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let what goes to a daemon fail, loudly."""
    monkeypatch.setenv("REGD_ADDRESS", "unix:///dev/null/none")


def names(registry: FakeRegistry) -> list[str]:
    return [each["name"] for each in registry.instances()]


# Coming and going.


def test_it_is_in_place_for_its_time_alone() -> None:
    before = link.opener, blocking.opener
    with testing.fake() as registry:
        registry.register("db", 5432)
        assert blocking.resolve("db").port == 5432
    with pytest.raises(ZeroDivisionError), testing.fake():
        raise ZeroDivisionError
    assert (link.opener, blocking.opener) == before == (Connection.open, None)
    with testing.fake() as registry:
        assert registry.instances() == []


async def test_who_found_nobody_before_finds_it() -> None:
    client = Client(connect_timeout_s=0.01)
    with pytest.raises(regd_client.Unavailable, match="no regd at"):
        await client.ping()
    with testing.fake():
        await client.ping()
        await client.close()


def test_one_at_a_time(registry: FakeRegistry) -> None:
    with pytest.raises(RuntimeError, match="in place already"), testing.fake():
        raise AssertionError("two")
    registry.register("db", 1)
    assert blocking.resolve("db").port == 1  # the first is where it was


async def test_whoever_was_there_keeps_to_it(caplog: pytest.LogCaptureFixture) -> None:
    """What is held at its end is lost, and goes to no daemon, nor to the next fake."""
    async with contextlib.AsyncExitStack() as stack:
        with testing.fake():
            client, idle = [await stack.enter_async_context(Client()) for _ in range(2)]
            registration = await client.register("web", 80)
            async with client.mirror() as mirror:
                assert mirror.resolve("web").port == 80
        with testing.fake() as another:
            async with asyncio.timeout(WAIT_S):
                await registration.lost.wait()
            assert registration.lost_reason == "the fake registry ended"
            for each in (client, idle):
                with pytest.raises(regd_client.Unavailable, match="has ended; close the client"):
                    await each.ping()
            await registration.deregister()
            assert another.instances() == []
            await idle.close()
            await idle.ping()
    assert [each.levelno for each in caplog.records] == [logging.WARNING]


async def test_who_followed_to_the_end_and_beyond() -> None:
    client = Client()
    with testing.fake() as registry:
        registry.register("web", 80)
        events = client.watch()
        assert [(await anext(events)).kind, (await anext(events)).kind] == ["up", "sync"]
        held = client._link.connection
    assert held is not None
    await held.closed
    with testing.fake() as another:
        another.register("web", 81)
        await client.close()
        assert [each async for each in events] == []


def test_a_loop_that_ended_without_a_word_holds_nothing(registry: FakeRegistry) -> None:
    loop = asyncio.new_event_loop()
    client = Client()

    async def register() -> None:
        await (await client._connected()).ask("register", {"name": "web", "port": 80, "hold": True})

    loop.run_until_complete(register())
    loop.close()
    registry.register("db", 1)
    assert names(registry) == ["db"]


# What a test says.


def test_what_others_have_done(registry: FakeRegistry) -> None:
    assert str(registry.register("db", 5432, host="db.example")) == "db.example:5432"
    registry.register("web", 80, instance="a", meta={"zone": "a"}, state="starting")
    with pytest.raises(regd_client.NotFound):
        blocking.resolve("web")
    registry.update("web", state="ready", instance="a")
    assert blocking.resolve("web", meta={"zone": "a"}).port == 80
    registry.update("web", {}, instance="a")
    assert registry.instances("w*")[0]["meta"] == {}
    registry.deregister("db")
    assert names(registry) == ["web"]


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (lambda registry: registry.register("NO", 1), regd_client.BadArgument),
        (lambda registry: registry.instances("a*b"), regd_client.BadArgument),
        (lambda registry: registry.deregister("nobody"), regd_client.NotFound),
        (lambda registry: registry.update("nobody", {}), regd_client.NotFound),
        (lambda registry: registry.kill("nobody"), regd_client.NotFound),
        (lambda registry: registry.expire("nobody"), regd_client.NotFound),
    ],
)
def test_what_a_test_may_not_say(
    registry: FakeRegistry, call: Callable[[FakeRegistry], object], error: type[Exception]
) -> None:
    with pytest.raises(error):
        call(registry)


async def test_somebody_takes_a_name(registry: FakeRegistry) -> None:
    async with regd_client.register("web", 80) as registration:
        with pytest.raises(regd_client.Conflict):
            registry.register("web", 81)
        registry.register("web", 81, force=True)
        async with asyncio.timeout(WAIT_S):
            await registration.lost.wait()
        assert registration.lost_reason == "replaced"
    assert (await regd_client.resolve("web")).port == 81


async def test_a_process_dies_and_a_lease_ends(registry: FakeRegistry) -> None:
    registry.register("a", 1)
    async with Client() as client:
        await (await client._connected()).ask("register", {"name": "b", "port": 2, "ttl": 10})
        events = client.watch()
        while (await anext(events)).kind != "sync":
            pass
        registry.kill("a")
        registry.expire("b")
        reasons = [(await anext(events)).reason for _ in range(2)]
        await events.aclose()
        assert reasons == ["process exited", "ttl expired"]
        with pytest.raises(regd_client.NotFound) as raised:
            await client.resolve("a")
        assert raised.value.details["last"]["reason"] == "process exited"


async def test_away(registry: FakeRegistry) -> None:
    registry.register("db", 5432)
    async with Client(connect_timeout_s=600) as client, client.mirror() as mirror:
        registration = await client.register("web", 80)
        held = registration.on
        with registry.away():
            assert not mirror.live
            with pytest.raises(regd_client.Unavailable, match="away"):  # at once, and not after 600 s
                await client.resolve("db")
            with pytest.raises(regd_client.Unavailable, match="away"):
                blocking.BlockingConnection()
            with pytest.raises(RuntimeError, match="away: it cannot"), registry.away():
                raise AssertionError("twice")
            assert mirror.resolve("db").stale_s > 0
            registry.register("db", 5433)
        await until(lambda: mirror.live and registration.on is not held)
        assert mirror.resolve("db").port == (await client.resolve("db")).port == 5433
        registry.restart()
        await client.ping()  # the connection that broke is not asked
        registry.cut()
        await client.ping()
        await registration.deregister()


def test_away_for_a_socket(registry: FakeRegistry) -> None:
    with blocking.BlockingConnection() as connection:
        registry.restart()
        with pytest.raises(regd_client.Unavailable):
            connection.ask("ping")
    with blocking.BlockingConnection(timeout_s=0.01) as connection:
        connection.ask("watch")
        assert next(connection.events())["event"] == "sync"
        connection._socket.settimeout(0.0)
        with pytest.raises(TimeoutError):
            connection._line()


def test_it_ends_with_an_error_while_it_is_away() -> None:
    with pytest.raises(ZeroDivisionError), testing.fake() as registry, registry.away():
        raise ZeroDivisionError
    assert link.opener == Connection.open


async def test_what_it_does_not_know(registry: FakeRegistry) -> None:
    async with Client() as client:
        with pytest.raises(regd_client.RegdError) as raised:
            await client._ask("help")
        assert raised.value.code == "unsupported"
    with blocking.BlockingConnection() as connection:
        for line, code in (
            (b"{", "bad_json"),
            (b"[]", "bad_json"),
            (b"{}", "bad_request"),
            (b'{"id":1.5}', "bad_request"),
        ):
            connection._socket.sendall(line + b"\n")
            assert regd_client.wire.reply(connection._line())["error"] == code


def test_many_threads(registry: FakeRegistry) -> None:
    """Each on a loop of its own: all that they wrote is there, and each change was told once, in order."""
    threads, each_does = 6, 25
    told: list[int] = []

    async def follow() -> None:
        async with Client() as client:
            connection = await client._connected()
            all_told = asyncio.Event()

            def hear(event: dict[str, int]) -> None:
                if "event" in event:
                    told.append(event["rev"])
                    if event["rev"] == threads * each_does:
                        all_told.set()

            await connection.ask("watch", {}, hear)
            for thread in working:
                thread.start()
            async with asyncio.timeout(WAIT_S):
                await all_told.wait()

    async def work(number: int) -> None:
        async with Client() as client:
            for n in range(each_does):
                await client.register(f"s{number}", 1 + n, instance=str(n), static=True)

    working = [threading.Thread(target=lambda n=n: asyncio.run(work(n))) for n in range(threads)]
    asyncio.run(follow(), debug=True)
    for thread in working:
        thread.join(WAIT_S)
    assert told == list(range(threads * each_does + 1))
    assert len(registry.instances()) == threads * each_does
