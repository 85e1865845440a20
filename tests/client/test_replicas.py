"""`instance="auto"`: each copy gets its own number, and keeps it over a broken connection or a restart."""

import asyncio
import contextlib
import itertools
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Iterable, Iterator
from typing import Any

import pytest

import regd_client
from regd_client import registrar, replicas
from regd_client.arguments import RegistrationRequest
from regd_client.client import Client
from regd_client.process_registration import ProcessRegistration
from tests.client.relay import Relay
from tests.support.daemon import WAIT_S, DaemonProcess, InLoop, environment
from tests.support.polling import until

# The numbers to try, on values.


def entry(instance: str, port: int = 1, rev: int = 7, **more: Any) -> dict[str, Any]:
    return {"instance": instance, "host": "127.0.0.1", "port": port, "rev": rev, **more}


def first(count: int, entries: Iterable[dict[str, Any]], **more: Any) -> list[tuple[str, int]]:
    return list(itertools.islice(replicas.candidates(entries, ("127.0.0.1", 5), (42,), **more), count))


def test_the_lowest_free_number_comes_first() -> None:
    held = {"hold": True}
    assert first(2, []) == [("1", 0), ("2", 0)]
    assert first(2, [entry("1", **held), entry("3", **held)]) == [("2", 0), ("4", 0)]
    assert first(1, [entry("", **held), entry("a", **held), entry("01", **held), entry("0", **held)]) == [
        ("1", 0)
    ]


def test_only_numbers_of_owners_that_may_be_dead_are_tried() -> None:
    """A held entry may wait for its client after a restart, but a process may be gone unnoticed."""
    assert first(1, [entry("1", hold=True)]) == [("2", 0)]
    assert first(1, [entry("1", ttl=10)]) == [("2", 0)]
    assert first(2, [entry("1", pid=6, hold=True, rev=9)]) == [("1", 9), ("2", 0)]
    assert first(2, [entry("1", rev=9)]) == [("1", 9), ("2", 0)]  # a static entry, which has no owner


def test_a_number_of_the_same_process_is_not_tried() -> None:
    assert first(1, [entry("1", pid=42, hold=True)]) == [("2", 0)]


def test_number_of_the_same_address_is_the_only_candidate() -> None:
    """The workers of one server share a number."""
    assert first(3, [entry("1", 4), entry("2", 5, rev=8, pid=42), entry("10", 5)]) == [("2", 8)]


def test_previous_number_is_tried_first() -> None:
    assert first(2, [], previous="3") == [("3", 0), ("1", 0)]
    assert first(2, [entry("3", hold=True)], previous="3") == [("1", 0), ("2", 0)]


def test_address_that_had_another_number_before() -> None:
    def has_twin(*entries: dict[str, Any]) -> bool:
        return replicas.has_older_number(entries, ("127.0.0.1", 5), "1")

    assert has_twin(entry("1", 5, rev=9), entry("2", 5, rev=8))
    assert not has_twin(entry("1", 5, rev=9), entry("2", 5, rev=10))  # the second entry gives up its number
    assert not has_twin(entry("1", 5, rev=9), entry("2", 4, rev=8), entry("a", 5, rev=8))
    assert not has_twin()  # the registration has ended


@pytest.mark.parametrize("more", [{"static": True}, {"force": True}])
def test_auto_never_takes_the_number_of_a_live_owner(more: dict[str, Any]) -> None:
    with pytest.raises(regd_client.BadArgument, match="no living owner") as refused:
        RegistrationRequest("web", 1, instance="auto", **more)
    assert refused.value.details["field"] == "instance"


# With a daemon.


@pytest.fixture
async def client(relay: Relay) -> AsyncIterator[Client]:
    async with Client() as client:
        yield client


async def numbers(client: Client) -> dict[str, int]:
    return {each["instance"]: each["port"] for each in await client.instances("web")}


async def test_copies_in_one_process_get_different_numbers(client: Client) -> None:
    copies = [await client.register("web", port, instance="auto") for port in (1, 2)]
    alone = await regd_client.register("web", 3, instance="auto")
    assert [copy.instance for copy in (*copies, alone)] == ["1", "2", "3"]
    assert alone.endpoint.instance == "3"
    assert await numbers(client) == {"1": 1, "2": 2, "3": 3}
    await copies[0].deregister()
    assert (await client.register("web", 4, instance="auto")).instance == "1"
    await alone.deregister()


async def test_copies_that_start_at_once_never_share_a_number(client: Client) -> None:
    async with Client() as other:
        made = await asyncio.gather(
            *(one.register("web", port, instance="auto") for port in range(1, 11) for one in (client, other))
        )
        places = {(copy.instance, copy.endpoint.port) for copy in made}
        assert {int(number) for number, _ in places} == {*range(1, 11)} == {port for _, port in places}
        assert await numbers(client) == dict(places)
        assert not any(copy.lost.is_set() for copy in made)


async def test_workers_of_one_server_share_a_number(daemon: InLoop, client: Client) -> None:
    async with Client() as one, Client() as two:
        await one.register("web", 1, instance="auto")
        workers = await asyncio.gather(*(each.register("web", 2, instance="auto") for each in (one, two)))
        assert [worker.instance for worker in workers] == ["2", "2"]
        await workers[0].deregister()
        assert await numbers(client) == {"1": 1, "2": 2}


async def test_workers_share_a_number_even_if_a_lower_number_becomes_free(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second lists the instances before the first is registered, and registers when number 1 is free."""
    candidates = replicas.candidates
    looks: Iterator[list[dict[str, Any]]] = iter([[]])
    other = await client.register("web", 9, instance="1")
    async with Client() as one, Client() as two:
        first = await one.register("web", 2, instance="auto")
        await other.deregister()
        monkeypatch.setattr(
            replicas, "candidates", lambda entries, *more: candidates(next(looks, entries), *more)
        )
        second = await two.register("web", 2, instance="auto")
        assert (first.instance, second.instance) == ("2", "2")
        assert await numbers(client) == {"2": 2}
        await first.deregister()
        assert await numbers(client) == {"2": 2}
        await second.update({"zone": "a"})
        await second.deregister()
        assert await numbers(client) == {}


async def test_live_owners_keep_their_numbers(daemon: InLoop, client: Client) -> None:
    peer = await daemon.peer()
    await peer.ask(cmd="register", name="web", port=1, instance="1", hold=True)
    await peer.ask(cmd="register", name="web", port=2, instance="2", pid=os.getppid())
    await peer.ask(cmd="register", name="web", port=3, instance="4", ttl=10)
    await peer.ask(cmd="register", name="web", port=4, instance="5", pid=os.getpid())
    made = [await client.register("web", port, instance="auto") for port in (5, 6)]
    assert [copy.instance for copy in made] == ["3", "6"]


async def test_number_taken_between_the_list_and_the_request(
    daemon: InLoop, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`if` fails, and the copy lists the instances again."""
    peer = await daemon.peer()
    candidates = replicas.candidates
    looks = 0

    def stale(entries: Any, *more: Any) -> Any:
        nonlocal looks
        looks += 1
        return candidates([] if looks == 1 else entries, *more)

    await peer.ask(cmd="register", name="web", port=1, instance="1", hold=True)
    monkeypatch.setattr(replicas, "candidates", stale)
    assert (await client.register("web", 2, instance="auto")).instance == "2"
    assert looks == 2
    assert await numbers(client) == {"1": 1, "2": 2}


async def test_copy_keeps_its_number_after_a_break(relay: Relay, client: Client) -> None:
    copies = [await client.register("web", port, instance="auto") for port in (1, 2, 3)]
    await copies[0].deregister()
    broken = client._connector.usable
    relay.cut()
    await until(lambda: all(each._connection not in (broken, None) for each in copies[1:]))
    assert [each.instance for each in copies[1:]] == ["2", "3"]
    assert await numbers(client) == {"2": 2, "3": 3}
    await copies[1].update({"zone": "a"})
    await copies[2].deregister()
    assert await numbers(client) == {"2": 2}


async def test_copy_whose_number_is_taken_while_disconnected_gets_another(
    daemon: InLoop, relay: Relay, client: Client, caplog: pytest.LogCaptureFixture
) -> None:
    copy = await client.register("web", 1, instance="auto")
    peer = await daemon.peer()
    relay.refuse()
    relay.cut()
    while (await peer.ask(cmd="list", name="web"))["instances"]:
        await asyncio.sleep(0)
    await peer.ask(cmd="register", name="web", port=9, instance="1", hold=True)
    relay.accept()
    await until(lambda: copy.endpoint.instance == "2")
    assert await numbers(client) == {"1": 9, "2": 1}
    assert copy.instance == "2"
    assert "web has instance 2 now: instance 1 was taken meanwhile" in caplog.text
    assert not copy.lost.is_set()
    await client.deregister("web", "2")
    assert await numbers(client) == {"1": 9}


async def test_new_copy_does_not_take_the_number_of_a_copy_that_is_reconnecting(
    daemon: InLoop, relay: Relay, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both copies are in this process, and the daemon knows neither."""
    may_come_back = asyncio.Event()

    async def pause(_: float) -> None:
        await may_come_back.wait()

    monkeypatch.setattr(registrar, "pause", pause)
    copy = await client.register("web", 1, instance="auto")
    peer = await daemon.peer()
    relay.cut()
    while (await peer.ask(cmd="list", name="web"))["instances"]:
        await asyncio.sleep(0)
    new = await regd_client.register("web", 2, instance="auto")
    assert new.instance == "2"
    may_come_back.set()
    await until(lambda: relay.count("register") == 3)
    assert await numbers(client) == {"1": 1, "2": 2}
    assert copy.instance == "1"
    await new.deregister()


async def test_lifespan_and_listen_take_a_number(client: Client) -> None:
    async with (
        regd_client.listen("web", instance="auto") as one,
        regd_client.listen("web", instance="auto") as two,
    ):
        assert (one.registration.instance, two.registration.instance) == ("1", "2")
        async with (
            regd_client.lifespan("web", instance="auto") as service,
            await asyncio.start_server(lambda reader, writer: None, "127.0.0.1", 0),
        ):
            assert (await service.registration()).instance == "3"
    assert await numbers(client) == {}


async def test_process_registration_takes_a_number(client: Client) -> None:
    def register(port: int) -> str:
        made = ProcessRegistration(RegistrationRequest("web", port, instance="auto"), drain_s=0.0)
        made._try(WAIT_S, autostart=False)
        assert made._request.instance is not None
        return made._request.instance

    await client.register("web", 1, instance="auto")
    assert await asyncio.to_thread(register, 2) == "2"
    assert await asyncio.to_thread(register, 3) == "3"
    assert await asyncio.to_thread(register, 3) == "3"  # the same server as before
    assert await numbers(client) == {"1": 1, "2": 2, "3": 3}


async def test_copy_keeps_its_number_after_a_restart_of_the_daemon(
    daemon: InLoop, relay: Relay, client: Client
) -> None:
    """Another copy starts before the first has reconnected. The entry of the first waits for its client."""
    copies = [await client.register("web", port, instance="auto") for port in (1, 2)]
    relay.refuse()
    await daemon.server.stop()
    daemon.server = InLoop(daemon.registry).server
    await daemon.server.start()
    relay.to = daemon.port
    async with Client(f"tcp://127.0.0.1:{daemon.port}") as other:
        assert (await other.register("web", 3, instance="auto")).instance == "3"
        relay.accept()
        await until(lambda: all(copy._connection is client._connector.usable for copy in copies))
        assert [copy.instance for copy in copies] == ["1", "2"]
        assert await numbers(other) == {"1": 1, "2": 2, "3": 3}


LISTENS = """
import sys
from regd_client import blocking
sys.stdin.readline()
with blocking.listen("web", instance="auto") as listening:
    print(listening.endpoint.instance, listening.port, flush=True)
    sys.stdin.readline()
"""


def test_processes_that_start_at_once_and_again(process: DaemonProcess) -> None:
    """Each copy has its own number. A copy that is killed and started again gets the same number and port."""

    def start() -> "subprocess.Popen[str]":
        return subprocess.Popen(
            [sys.executable, "-c", LISTENS], env=environment(REGD_ADDRESS=process.addresses[0]), text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip

    def say(copy: "subprocess.Popen[str]") -> None:
        assert copy.stdin is not None
        copy.stdin.write("\n")
        copy.stdin.flush()

    def place(copy: "subprocess.Popen[str]") -> tuple[int, int]:
        assert copy.stdout is not None
        number, port = copy.stdout.readline().split()
        return int(number), int(port)

    with contextlib.ExitStack() as stack:
        copies = [stack.enter_context(start()) for _ in range(4)]
        for copy in copies:
            stack.callback(copy.kill)
            say(copy)
        places = [place(copy) for copy in copies]
        assert sorted(number for number, _ in places) == [1, 2, 3, 4]
        assert len({port for _, port in places}) == 4
        copies[1].kill()  # the daemon had no time to notice, so it asks the kernel
        again = stack.enter_context(start())
        stack.callback(again.kill)
        say(again)
        assert place(again) == places[1]
