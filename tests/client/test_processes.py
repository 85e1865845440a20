"""What is registered for another process lasts as long as that one, whoever registered it."""

import asyncio
import subprocess
from collections.abc import Iterator

import pytest

import regd_client
from regd.core.errors import Code, Refused
from regd.core.model import Process
from regd.system.processes import Processes
from regd_client.client import Client
from regd_client.registrar import _LINGERING, _NEWEST
from tests.client.relay import Relay
from tests.client.test_leaving import gone, stopped
from tests.support.daemon import InLoop
from tests.support.polling import until

pytestmark = pytest.mark.socket


@pytest.fixture
def child() -> Iterator[subprocess.Popen[bytes]]:
    """A process that does nothing until its end."""
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL) as process:
        yield process
        process.kill()


async def shown(client: Client, name: str) -> list[tuple[object, object]]:
    return [(instance.get("pid"), instance.get("hold")) for instance in await client.instances(name)]


async def test_it_outlives_who_registered_it_and_ends_with_the_process(
    relay: Relay, child: subprocess.Popen[bytes]
) -> None:
    async with Client() as other:
        async with Client() as client:
            await client.register("a", 1, pid=child.pid)
        assert await shown(other, "a") == [(child.pid, None)]
        child.kill()
        child.wait()
        await gone(other, "a")


async def test_it_ends_when_it_is_deregistered(relay: Relay, child: subprocess.Popen[bytes]) -> None:
    async with Client() as other:
        async with regd_client.register("a", 1, pid=child.pid):
            assert await shown(other, "a") == [(child.pid, None)]
        assert await shown(other, "a") == []


async def test_it_is_there_again_in_a_registry_that_never_knew_it(
    relay: Relay, daemon: InLoop, child: subprocess.Popen[bytes]
) -> None:
    async with Client() as client:
        registration = await client.register("a", 1, pid=child.pid)
        await daemon.server.stop()
        relay.refuse()
        relay.cut()
        daemon.server = InLoop(daemon.registry.with_name("other.json")).server
        await daemon.server.start()
        relay.to = daemon.port
        await relay.accept()
        await registration.update({"zone": "a"})  # waits until it is registered again
        assert await shown(client, "a") == [(child.pid, None)]


async def test_it_is_left_at_a_daemon_that_was_restarted(
    relay: Relay, daemon: InLoop, child: subprocess.Popen[bytes]
) -> None:
    async with Client() as client:
        registration = await client.register("a", 1, pid=child.pid)
        leaving: asyncio.Task[None]
        async with stopped(relay, daemon):
            leaving = asyncio.create_task(registration.deregister())
        await leaving
        await gone(client, "a")


async def test_where_the_daemon_sees_other_processes_it_lasts_as_long_as_the_connection(
    relay: Relay, child: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("regd_client.protocol.own_host", lambda: {"boot": "another", "pid_namespace": "another"})
    async with Client() as other:
        async with Client() as client:
            await client.register("a", 1, pid=child.pid)
            assert await shown(other, "a") == [(None, True)]
        await gone(other, "a")


async def test_what_was_left_without_a_daemon_and_registered_again_stays(
    relay: Relay, daemon: InLoop, child: subprocess.Popen[bytes]
) -> None:
    """No connection holds it, so whoever withdraws it late ends the newer one, if it does not look."""
    left = await regd_client.register("a", 1, pid=child.pid)
    await daemon.server.stop()
    relay.refuse()
    relay.cut()
    await left.deregister()
    assert _LINGERING
    daemon.server = InLoop(daemon.registry, epoch="another").server
    await daemon.server.start()
    async with Client(f"127.0.0.1:{daemon.port}") as client:
        # Both find the same daemon, at two addresses: the place of the newer one is made to be the older one's.
        _NEWEST[left._place] = await client.register("a", 1, pid=child.pid)
        relay.to = daemon.port
        await relay.accept()
        await until(lambda: not _LINGERING)
        assert await shown(client, "a") == [(child.pid, None)]


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("answer", ["unsupported", "bad_argument"])
async def test_a_process_that_the_daemon_cannot_see_lasts_as_long_as_the_connection(
    relay: Relay,
    daemon: InLoop,
    child: subprocess.Popen[bytes],
    monkeypatch: pytest.MonkeyPatch,
    answer: str,
    own: bool,
) -> None:
    """Without pidfd, or with a hidden /proc; older daemons say then that there is no such process."""

    def find(self: Processes, pid: int, uid: int | None) -> Process:
        raise Refused(
            Code.UNSUPPORTED if answer == "unsupported" else Code.BAD_ARGUMENT,
            f"pid {pid}: not seen",
            **({"field": "pid"} if answer == "bad_argument" else {}),
        )

    monkeypatch.setattr(Processes, "find", find)
    async with Client() as other:
        async with Client() as client:
            await client.register("a", 1, pid=None if own else child.pid)
            await client.register("b", 1)
            assert await shown(other, "a") == await shown(other, "b") == [(None, True)]
        await gone(other, "a")


async def test_a_process_that_is_not_there_is_a_mistake(relay: Relay, child: subprocess.Popen[bytes]) -> None:
    child.kill()
    child.wait()
    async with Client() as client:
        for pid in (child.pid, 2**31 - 1):
            with pytest.raises(regd_client.BadArgument) as refused:
                await client.register("a", 1, pid=pid)
            assert refused.value.details["field"] == "pid"


async def test_what_outlives_every_process_is_bound_to_none(relay: Relay) -> None:
    with pytest.raises(regd_client.BadArgument) as refused:
        await regd_client.register("a", 1, static=True, pid=1)
    assert refused.value.details["field"] == "pid"
