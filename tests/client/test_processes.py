"""An entry registered for another process (`pid=`) lives as long as that process."""

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
    """A process that sleeps until it is killed."""
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL) as process:
        yield process
        process.kill()


async def shown(client: Client, name: str) -> list[tuple[object, object]]:
    return [(instance.get("pid"), instance.get("hold")) for instance in await client.instances(name)]


async def test_entry_lives_as_long_as_its_process(relay: Relay, child: subprocess.Popen[bytes]) -> None:
    async with Client() as other:
        async with Client() as client:
            await client.register("a", 1, pid=child.pid)
        assert await shown(other, "a") == [(child.pid, None)]
        child.kill()
        child.wait()
        await gone(other, "a")


async def test_entry_of_a_process_is_deregistered(relay: Relay, child: subprocess.Popen[bytes]) -> None:
    async with Client() as other:
        async with regd_client.register("a", 1, pid=child.pid):
            assert await shown(other, "a") == [(child.pid, None)]
        assert await shown(other, "a") == []


async def test_entry_of_a_process_returns_in_an_empty_registry(
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
        relay.accept()
        await registration.update({"zone": "a"})  # waits until it is registered again
        assert await shown(client, "a") == [(child.pid, None)]


async def test_entry_of_a_process_is_deregistered_after_a_restart(
    relay: Relay, daemon: InLoop, child: subprocess.Popen[bytes]
) -> None:
    async with Client() as client:
        registration = await client.register("a", 1, pid=child.pid)
        leaving: asyncio.Task[None]
        async with stopped(relay, daemon):
            leaving = asyncio.create_task(registration.deregister())
        await leaving
        await gone(client, "a")


async def test_entry_is_held_by_connection_across_pid_namespaces(
    relay: Relay, child: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("regd_client.protocol.own_host", lambda: {"boot": "another", "pid_namespace": "another"})
    async with Client() as other:
        async with Client() as client:
            await client.register("a", 1, pid=child.pid)
            assert await shown(other, "a") == [(None, True)]
        await gone(other, "a")


async def test_late_withdrawal_does_not_end_a_new_entry_of_a_process(
    relay: Relay, daemon: InLoop, child: subprocess.Popen[bytes]
) -> None:
    """No connection holds the entry, so an unchecked late withdrawal would end the newer one."""
    left = await regd_client.register("a", 1, pid=child.pid)
    await daemon.server.stop()
    relay.refuse()
    relay.cut()
    await left.deregister()
    assert _LINGERING
    daemon.server = InLoop(daemon.registry, epoch="another").server
    await daemon.server.start()
    async with Client(f"127.0.0.1:{daemon.port}") as client:
        # The two clients reach one daemon at two addresses. Give the newer registration the older one's address.
        _NEWEST[left._global_key] = await client.register("a", 1, pid=child.pid)
        relay.to = daemon.port
        relay.accept()
        await until(lambda: not _LINGERING)
        assert await shown(client, "a") == [(child.pid, None)]


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("answer", ["unsupported", "bad_argument"])
async def test_unseen_process_is_held_by_connection(
    relay: Relay,
    daemon: InLoop,
    child: subprocess.Popen[bytes],
    monkeypatch: pytest.MonkeyPatch,
    answer: str,
    own: bool,
) -> None:
    """The daemon has no pidfds, or /proc is hidden. Older daemons answer that there is no such process."""

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


async def test_unknown_pid_raises(relay: Relay, child: subprocess.Popen[bytes]) -> None:
    child.kill()
    child.wait()
    async with Client() as client:
        for pid in (child.pid, 2**31 - 1):
            with pytest.raises(regd_client.BadArgument) as refused:
                await client.register("a", 1, pid=pid)
            assert refused.value.details["field"] == "pid"


async def test_static_with_pid_raises(relay: Relay) -> None:
    with pytest.raises(regd_client.BadArgument) as refused:
        await regd_client.register("a", 1, static=True, pid=1)
    assert refused.value.details["field"] == "pid"
