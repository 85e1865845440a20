"""What somebody leaves ends, and nothing else does, whatever breaks or is cancelled on the way."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

import pytest

import regd_client
from regd_client import registration as registration_module
from regd_client.client import Client
from regd_client.registrar import _LINGERING
from tests.client.relay import Relay
from tests.support.daemon import WAIT_S, InLoop
from tests.support.polling import until

pytestmark = pytest.mark.socket
REPLACED = "replaced by a newer registration of this process"


@pytest.fixture
async def other(daemon: InLoop) -> AsyncIterator[Client]:
    """Somebody else, whose connection does not break."""
    async with Client(f"127.0.0.1:{daemon.port}") as client:
        yield client


@asynccontextmanager
async def stopped(relay: Relay, daemon: InLoop) -> AsyncIterator[None]:
    """Stop the daemon, which ends nobody's registration; behind it another one has its file and its place."""
    await daemon.server.stop()
    relay.refuse()
    relay.cut()
    yield
    daemon.server = InLoop(daemon.registry, epoch="another").server
    await daemon.server.start()
    relay.to = daemon.port
    await relay.accept()


async def gone(client: Client, name: str) -> None:
    async with asyncio.timeout(WAIT_S):
        while await client.instances(name):
            await asyncio.sleep(0.001)


@pytest.mark.parametrize("turns", range(1, 6))
@pytest.mark.parametrize("connecting", [False, True])
async def test_a_close_that_is_cancelled_has_closed(
    relay: Relay, daemon: InLoop, other: Client, turns: int, connecting: bool
) -> None:
    client = Client()
    if not connecting:
        await client.register("a", 1)
    asked = asyncio.create_task(client.ping())
    await asyncio.sleep(0)
    closing = asyncio.create_task(client.close())
    for _ in range(turns):
        await asyncio.sleep(0)
    closing.cancel()
    await asyncio.gather(closing, asked, return_exceptions=True)
    await gone(other, "a")
    await until(lambda: len(daemon.server.connections) == 1)


@pytest.mark.parametrize("turns", range(0, 60, 3))
async def test_leaving_after_a_break(relay: Relay, other: Client, turns: int) -> None:
    """It ends, whatever was under way to make it again, and what other workers of that server have does not."""
    async with Client() as client:
        shared, alone = await client.register("shared", 1), await client.register("alone", 1)
        others = await other.register("shared", 1)
        relay.cut()
        for _ in range(turns):
            await asyncio.sleep(0)
        await asyncio.gather(shared.deregister(), alone.deregister())
        await gone(other, "alone")
        await client.ping()
        async with asyncio.timeout(WAIT_S):  # deregister() returns unconfirmed when reconnecting takes 0.2 s
            while len((await other.why("shared"))["instances"][0]["owners"]) > 1:
                await asyncio.sleep(0.001)
        assert not await other.instances("alone")
    assert not others.lost.is_set()
    assert (await other.resolve("shared")).port == 1


@pytest.mark.parametrize("turns", range(0, 60, 6))
@pytest.mark.parametrize("ending", ["deregister", "close"])
async def test_leaving_after_a_restart(relay: Relay, daemon: InLoop, ending: str, turns: int) -> None:
    """A daemon that was restarted keeps it for as long as its process lives, unless its client says otherwise."""
    async with Client() as client:
        registration = await client.register("a", 1)
        async with stopped(relay, daemon):
            pass
        for _ in range(turns):
            await asyncio.sleep(0)
        await (registration.deregister() if ending == "deregister" else client.close())
        async with Client() as other:
            await gone(other, "a")
            await client.ping()
            assert not await other.instances("a")


async def test_leaving_after_a_restart_leaves_the_other_workers(relay: Relay, daemon: InLoop) -> None:
    async with Client() as client, Client() as other:
        registration, others = await client.register("a", 1), await other.register("a", 1)
        async with stopped(relay, daemon):
            pass
        await registration.deregister()
        await until(lambda: registration._over and others._connection is not None and others._connection.usable)
        [known] = (await other.why("a"))["instances"]
        assert [owner["connection"] is not None for owner in known["owners"]] == [True]
        assert not others.lost.is_set()


@pytest.mark.parametrize("count", [1, 20])
async def test_leaving_without_a_daemon_is_quick(
    relay: Relay, daemon: InLoop, caplog: pytest.LogCaptureFixture, count: int
) -> None:
    """And when the daemon is back, what was left ends."""
    async with Client() as client:
        async with AsyncExitStack() as stack:
            for n in range(count):
                await stack.enter_async_context(client.register("a", 1, instance=str(n)))
            async with stopped(relay, daemon):
                began = time.monotonic()
                await stack.aclose()
                assert time.monotonic() - began < 1.0
        assert client._connector.timeout_s == Client()._connector.timeout_s
        await gone(client, "a")
    assert not [message for message in caplog.messages if message.startswith("left")]


@pytest.mark.parametrize("how", ["listen", "register", "client"])
async def test_what_is_left_without_a_daemon_ends_when_the_daemon_is_back(
    relay: Relay, daemon: InLoop, caplog: pytest.LogCaptureFixture, how: str
) -> None:
    """Its client is closed by then: it is withdrawn in the background, for as long as the event loop lives."""
    async with AsyncExitStack() as stack:
        if how == "listen":
            await stack.enter_async_context(regd_client.listen("job", drain_s=0.0))
        elif how == "register":
            await stack.enter_async_context(regd_client.register("job", 1))
        else:
            client = await stack.enter_async_context(Client())
            await client.register("job", 1)
        async with stopped(relay, daemon):
            if how == "client":
                await until(lambda: client._connector.usable is None)
            await stack.aclose()
            assert _LINGERING
    async with Client() as other:
        assert await other.instances("job") or not _LINGERING
        await gone(other, "job")
    await until(lambda: not _LINGERING)
    await until(lambda: not daemon.server.connections)


@pytest.mark.parametrize("port", [1, 2])
@pytest.mark.parametrize("turns", [0, 1, 20])
async def test_what_is_registered_again_is_not_withdrawn(
    relay: Relay, daemon: InLoop, port: int, turns: int
) -> None:
    """A process that left a name while the daemon was away, and registers it again, has it."""
    left = await regd_client.register("job", 1)
    async with Client() as client:
        async with stopped(relay, daemon):
            await left.deregister()
            assert _LINGERING
            again = asyncio.ensure_future(client.register("job", port))
            for _ in range(turns):
                await asyncio.sleep(0)
        registration = await again
        await until(lambda: not _LINGERING)
        await client.ping()
        assert [instance["port"] for instance in await client.instances("job")] == [port]
        assert not registration.lost.is_set()


async def test_leaving_what_has_a_client_of_its_own_is_quick(relay: Relay, daemon: InLoop) -> None:
    async with regd_client.register("a", 1):
        relay.refuse()
        relay.cut()
        began = time.monotonic()
    assert time.monotonic() - began < 1.0


async def test_leaving_a_daemon_that_hangs_is_quick_too(
    relay: Relay, other: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registration_module, "_WITHDRAW_S", 0.1)
    async with Client() as client:
        async with client.register("a", 1):
            relay.flowing.clear()
            began = time.monotonic()
        assert time.monotonic() - began < 1.0
        relay.flowing.set()
        await gone(other, "a")


async def test_what_was_lost_is_somebody_elses(relay: Relay, other: Client) -> None:
    async with Client() as client:
        registration = await client.register("a", 1, meta={"of": "one"})
        taken = await other.register("a", 2, meta={"of": "other"}, force=True)
        await registration.lost.wait()
        with pytest.raises(regd_client.NotFound, match="replaced"):
            await registration.update({"of": "one"}, state="draining")
        [found] = await other.instances("a")
        assert (found["meta"], found["state"]) == ({"of": "other"}, "ready")
        again = await client.register("a", 1, force=True)
        await taken.lost.wait()
        await registration.deregister()  # is of the first, and not of what stands now
        assert (await other.resolve("a")).port == 1
        assert not again.lost.is_set()
        relay.cut()
        await again.update({"of": "one"})
        assert (await other.resolve("a")).meta == {"of": "one"}


async def test_what_is_taken_before_its_owner_knows_that_it_has_it_is_lost(relay: Relay, other: Client) -> None:
    async with Client() as client:
        await client.register("b", 1)
        relay.flowing.clear()
        asked = asyncio.ensure_future(client.register("a", 1))
        async with asyncio.timeout(WAIT_S):
            while not await other.instances("a"):
                await asyncio.sleep(0.001)
        await other.register("a", 2, force=True)
        relay.flowing.set()
        registration = await asked
        async with asyncio.timeout(WAIT_S):
            await registration.lost.wait()
        assert (await other.resolve("a")).port == 2


@pytest.mark.parametrize("doing", ["deregister", "update"])
async def test_what_was_taken_and_not_heard_of_yet_is_spared(relay: Relay, other: Client, doing: str) -> None:
    async with Client() as client:
        registration = await client.register("a", 1, meta={"of": "one"})
        relay.flowing.clear()
        await other.register("a", 2, meta={"of": "other"}, force=True)
        changes = (await other.stats())["changes"]
        begun = registration.deregister() if doing == "deregister" else registration.update({"of": "one"})
        done = asyncio.create_task(begun)
        await until(lambda: relay.count("update") == 1)
        relay.flowing.set()
        await asyncio.gather(done, return_exceptions=True)
        assert registration.lost.is_set() == (doing == "update")
        assert (await other.stats())["changes"] == changes
        assert (await other.resolve("a")).meta == {"of": "other"}


async def test_one_client_has_a_name_once(relay: Relay, other: Client) -> None:
    async with Client() as client:
        first = await client.register("a", 1, meta={"k": "1"})
        assert await client.register("a", 1, meta={"k": "2"}) is first
        assert first.endpoint.meta == {"k": "2"}
        second = await client.register("a", 2)
        assert (first.lost.is_set(), first.lost_reason, second.lost.is_set()) == (True, REPLACED, False)
        await first.deregister()
        assert (await other.resolve("a")).port == 2
        static = await client.register("a", 2, static=True)
        assert second.lost.is_set()
        await second.deregister()
        await static.update({"k": "3"})
    assert (await other.resolve("a")).meta == {"k": "3"}
    await static.deregister()
    assert not await other.instances("a")
    await client.close()


@pytest.mark.parametrize("turns", range(12))
async def test_who_is_cancelled_and_tries_again_has_it(relay: Relay, other: Client, turns: int) -> None:
    async with Client() as client:
        for _ in range(2):
            asked = asyncio.ensure_future(client.register("a", 1))
            for _ in range(turns):
                await asyncio.sleep(0)
            asked.cancel()
            registration = await client.register("a", 1)
            await asyncio.gather(asked, return_exceptions=True)
            await client.ping()
            assert registration._kept
            assert (await other.resolve("a")).port == 1
            await registration.deregister()
