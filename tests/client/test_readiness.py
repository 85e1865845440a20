"""`lifespan(..., ready=…)`: registered as `starting` until the service says that it is ready."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest

import regd_client
from regd_client import readiness
from regd_client.client import Client
from tests.client.relay import Relay
from tests.support.polling import until


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readiness, "_PAUSE_S", 0.01)


@pytest.fixture
async def client(relay: Relay) -> AsyncIterator[Client]:
    async with Client() as client:
        yield client


async def server(port: int = 0) -> asyncio.AbstractServer:
    return await asyncio.get_running_loop().create_server(asyncio.Protocol, "127.0.0.1", port, reuse_port=True)


async def states(client: Client) -> list[str]:
    return [instance["state"] for instance in await client.instances("web")]


def function(event: asyncio.Event) -> Callable[[], Awaitable[object]]:
    return event.wait


def coroutine(event: asyncio.Event) -> Awaitable[object]:
    return event.wait()


@pytest.mark.parametrize("ready", [function, coroutine])
async def test_service_is_starting_until_it_is_ready(
    client: Client, ready: Callable[[asyncio.Event], readiness.Ready]
) -> None:
    event = asyncio.Event()
    async with regd_client.lifespan("web", ready=ready(event)) as service, await server():
        await service.registration()
        assert await states(client) == ["starting"]
        with pytest.raises(regd_client.NotFound):
            await client.resolve("web")
        event.set()
        assert await service.ready()
        assert await states(client) == ["ready"]
    assert await states(client) == []


async def test_registration_ends_with_a_service_that_never_was_ready(client: Client) -> None:
    ended = asyncio.Event()

    async def never() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    async with regd_client.lifespan("web", ready=never, drain_s=0) as service, await server():
        await service.registration()
    assert ended.is_set()
    assert await states(client) == []


async def test_coroutine_of_a_service_without_a_port_is_closed(client: Client) -> None:
    """Otherwise Python would warn that it was never awaited."""
    async with regd_client.lifespan("web", ready=asyncio.Event().wait()):
        pass


async def test_function_that_fails_or_returns_false_is_called_again(
    client: Client, caplog: pytest.LogCaptureFixture
) -> None:
    answers: list[object] = [OSError("no database"), OSError("no database"), False, None]

    async def ready() -> object:
        answer = answers.pop(0)
        if isinstance(answer, OSError):
            raise answer
        return answer

    async with regd_client.lifespan("web", ready=ready, drain_s=0) as service, await server():
        assert await service.ready()
        assert await states(client) == ["ready"]
    assert answers == []
    assert caplog.text.count("web is not ready yet, asking again: OSError: no database") == 1
    assert "asking again: ready returned False" in caplog.text


async def test_awaitable_that_fails_leaves_it_starting(client: Client, caplog: pytest.LogCaptureFixture) -> None:
    async def fail() -> None:
        raise OSError("no database")

    async with regd_client.lifespan("web", ready=fail(), drain_s=0) as service, await server():
        await until(lambda: "web stays `starting`: OSError: no database" in caplog.text)
        await service.registration()
        assert await states(client) == ["starting"]


async def test_ready_is_awaited_without_a_daemon(relay: Relay) -> None:
    event = asyncio.Event()

    async def ready() -> None:
        event.set()

    relay.refuse()
    async with regd_client.lifespan("web", ready=ready, drain_s=0) as service, await server():
        await event.wait()
        relay.accept()
        assert await service.ready()
    assert [request["state"] for request in relay.requests if "state" in request][:2] == ["starting", "ready"]


async def test_service_becomes_ready_after_a_reconnect(relay: Relay, client: Client) -> None:
    event = asyncio.Event()
    async with regd_client.lifespan("web", ready=event.wait, drain_s=0) as service, await server():
        await service.registration()
        relay.refuse()
        relay.cut()
        event.set()
        await asyncio.sleep(0.05)
        relay.accept()
        assert await service.ready()
        async with Client() as other:
            assert await states(other) == ["ready"]


async def test_lost_registration_never_becomes_ready(client: Client) -> None:
    event = asyncio.Event()
    async with regd_client.lifespan("web", ready=event.wait, drain_s=0) as service, await server():
        registration = await service.registration()
        await (await client.register("web", 1, force=True)).deregister()
        await registration.lost.wait()
        event.set()
        assert not await service.ready()
        assert await states(client) == []


async def test_worker_that_starts_later_does_not_make_its_server_unready(client: Client) -> None:
    async with contextlib.AsyncExitStack() as stack:
        first = await stack.enter_async_context(regd_client.lifespan("web", drain_s=0))
        port = (await stack.enter_async_context(await server())).sockets[0].getsockname()[1]  # type: ignore[attr-defined]
        await first.registration()
        second = await stack.enter_async_context(
            regd_client.lifespan("web", ready=asyncio.Event().wait, drain_s=0)
        )
        await stack.enter_async_context(await server(port))
        await second.registration()
        assert await states(client) == ["ready"]


async def test_without_ready_the_service_is_registered_as_ready(client: Client) -> None:
    async with regd_client.lifespan("web", drain_s=0) as service, await server():
        assert await service.ready()
        assert await states(client) == ["ready"]


def test_ready_must_be_awaitable() -> None:
    with pytest.raises(regd_client.BadArgument, match="ready must be a function") as refused:
        regd_client.lifespan("web", ready=True)  # type: ignore[arg-type]
    assert refused.value.details == {"field": "ready"}
