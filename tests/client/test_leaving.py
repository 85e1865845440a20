"""`deregister` and `close` end exactly their own registrations, whatever breaks or is cancelled."""

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
QUICK_S = 3.0  # for what takes 0.2 s, on a busy machine


@pytest.fixture
async def other(daemon: InLoop) -> AsyncIterator[Client]:
    """A client with a direct connection to the daemon, which the relay cannot break."""
    async with Client(f"127.0.0.1:{daemon.port}") as client:
        yield client


@asynccontextmanager
async def stopped(relay: Relay, daemon: InLoop) -> AsyncIterator[None]:
    """Stop the daemon during the block, and start another one on its file at the end. Registrations survive."""
    await daemon.server.stop()
    relay.refuse()
    relay.cut()
    yield
    daemon.server = InLoop(daemon.registry, epoch="another").server
    await daemon.server.start()
    relay.to = daemon.port
    relay.accept()


async def gone(client: Client, name: str) -> None:
    async with asyncio.timeout(WAIT_S):
        while await client.instances(name):
            await asyncio.sleep(0.001)


@pytest.mark.parametrize("iterations", range(1, 6))
@pytest.mark.parametrize("connecting", [False, True])
async def test_cancelled_close_has_closed(
    relay: Relay, daemon: InLoop, other: Client, iterations: int, connecting: bool
) -> None:
    client = Client()
    if not connecting:
        await client.register("a", 1)
    ping = asyncio.create_task(client.ping())
    await asyncio.sleep(0)
    closing = asyncio.create_task(client.close())
    for _ in range(iterations):
        await asyncio.sleep(0)
    closing.cancel()
    await asyncio.gather(closing, ping, return_exceptions=True)
    await gone(other, "a")
    await until(lambda: len(daemon.server.connections) == 1)


@pytest.mark.parametrize("iterations", range(0, 60, 3))
async def test_deregister_after_a_broken_connection(relay: Relay, other: Client, iterations: int) -> None:
    """This works during the re-registration, too. Registrations of other workers of the server stay."""
    async with Client() as client:
        shared, alone = await client.register("shared", 1), await client.register("alone", 1)
        others = await other.register("shared", 1)
        relay.cut()
        for _ in range(iterations):
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


@pytest.mark.parametrize("iterations", range(0, 60, 6))
@pytest.mark.parametrize("ending", ["deregister", "close"])
async def test_deregister_after_a_restart(relay: Relay, daemon: InLoop, ending: str, iterations: int) -> None:
    """A restarted daemon would keep the entry as long as its process lives."""
    async with Client() as client:
        registration = await client.register("a", 1)
        async with stopped(relay, daemon):
            pass
        for _ in range(iterations):
            await asyncio.sleep(0)
        await (registration.deregister() if ending == "deregister" else client.close())
        async with Client() as other:
            await gone(other, "a")
            await client.ping()
            assert not await other.instances("a")


async def test_deregister_after_a_restart_keeps_the_other_workers(relay: Relay, daemon: InLoop) -> None:
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
async def test_deregister_without_a_daemon_is_quick(
    relay: Relay, daemon: InLoop, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    """The entries end when the daemon is back."""
    monkeypatch.setattr(registration_module, "_WITHDRAW_S", WAIT_S)
    async with Client() as client:
        async with AsyncExitStack() as stack:
            for n in range(count):
                await stack.enter_async_context(client.register("a", 1, instance=str(n)))
            async with stopped(relay, daemon):
                began = time.monotonic()
                await stack.aclose()
                assert time.monotonic() - began < QUICK_S
        assert client._connector.timeout_s == Client()._connector.timeout_s
        await gone(client, "a")
    assert not [message for message in caplog.messages if message.startswith("left")]


@pytest.mark.parametrize("how", ["listen", "register", "client"])
async def test_deregister_without_a_daemon_takes_effect_later(
    relay: Relay, daemon: InLoop, caplog: pytest.LogCaptureFixture, how: str
) -> None:
    """After the client is closed, the entry is withdrawn in the background while the event loop runs."""
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


@pytest.mark.sample(3)
@pytest.mark.parametrize("port", [1, 2])
@pytest.mark.parametrize("iterations", [0, 1, 20])
async def test_late_withdrawal_does_not_end_a_new_registration(
    relay: Relay, daemon: InLoop, port: int, iterations: int
) -> None:
    """A process that deregisters a name without a daemon and registers it again keeps it."""
    left = await regd_client.register("job", 1)
    async with Client() as client:
        async with stopped(relay, daemon):
            await left.deregister()
            assert _LINGERING
            again = asyncio.ensure_future(client.register("job", port))
            for _ in range(iterations):
                await asyncio.sleep(0)
        registration = await again
        await until(lambda: not _LINGERING)
        await client.ping()
        assert [instance["port"] for instance in await client.instances("job")] == [port]
        assert not registration.lost.is_set()


async def test_deregister_of_a_function_is_quick_without_a_daemon(
    relay: Relay, daemon: InLoop, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registration_module, "_WITHDRAW_S", WAIT_S)
    async with regd_client.register("a", 1):
        relay.refuse()
        relay.cut()
        began = time.monotonic()
    assert time.monotonic() - began < QUICK_S


async def test_deregister_at_a_hanging_daemon_is_quick(
    relay: Relay, other: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registration_module, "_WITHDRAW_S", 0.1)
    async with Client() as client:
        async with client.register("a", 1):
            relay.flowing.clear()
            began = time.monotonic()
        assert time.monotonic() - began < QUICK_S
        relay.flowing.set()
        await gone(other, "a")


async def test_lost_registration_is_not_deregistered(relay: Relay, other: Client) -> None:
    async with Client() as client:
        registration = await client.register("a", 1, meta={"of": "one"})
        newer = await other.register("a", 2, meta={"of": "other"}, force=True)
        await registration.lost.wait()
        with pytest.raises(regd_client.NotFound, match="replaced"):
            await registration.update({"of": "one"}, state="draining")
        [instance] = await other.instances("a")
        assert (instance["meta"], instance["state"]) == ({"of": "other"}, "ready")
        again = await client.register("a", 1, force=True)
        await newer.lost.wait()
        await registration.deregister()  # ends the first registration only, not the present one
        assert (await other.resolve("a")).port == 1
        assert not again.lost.is_set()
        relay.cut()
        await again.update({"of": "one"})
        assert (await other.resolve("a")).meta == {"of": "one"}


async def test_takeover_before_the_reply_is_a_loss(relay: Relay, other: Client) -> None:
    async with Client() as client:
        await client.register("b", 1)
        relay.flowing.clear()
        registering = asyncio.ensure_future(client.register("a", 1))
        async with asyncio.timeout(WAIT_S):
            while not await other.instances("a"):
                await asyncio.sleep(0.001)
        await other.register("a", 2, force=True)
        relay.flowing.set()
        registration = await registering
        async with asyncio.timeout(WAIT_S):
            await registration.lost.wait()
        assert (await other.resolve("a")).port == 2


@pytest.mark.parametrize("doing", ["deregister", "update"])
async def test_unreported_new_owner_is_not_deregistered(relay: Relay, other: Client, doing: str) -> None:
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


async def test_second_registration_of_a_name_replaces_the_first(relay: Relay, other: Client) -> None:
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


@pytest.mark.parametrize("iterations", range(12))
async def test_register_again_after_a_cancelled_register(relay: Relay, other: Client, iterations: int) -> None:
    async with Client() as client:
        for _ in range(2):
            cancelled = asyncio.ensure_future(client.register("a", 1))
            for _ in range(iterations):
                await asyncio.sleep(0)
            cancelled.cancel()
            registration = await client.register("a", 1)
            await asyncio.gather(cancelled, return_exceptions=True)
            await client.ping()
            assert registration._is_active
            assert (await other.resolve("a")).port == 1
            await registration.deregister()
