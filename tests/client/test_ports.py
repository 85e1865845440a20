"""The port that `listen` chooses if it is called without a port."""

import asyncio
import socket
from collections.abc import AsyncIterator
from typing import Any

import pytest

import regd_client
from regd_client import blocking, ports
from regd_client.client import Client
from regd_client.ports import LastPorts
from tests.client.relay import Relay
from tests.support.daemon import InLoop

# The ports to try, on values.


def entry(instance: str, port: int, **more: Any) -> dict[str, Any]:
    return {"instance": instance, "port": port, **more}


def history(
    before: int | None = None, instance: str | None = "", limit: int | None = 1
) -> tuple[str, dict[str, Any]]:
    return "history", {"name": "web", "instance": instance, "before": before, "limit": limit}


def search(instance: str | None, *entries: dict[str, Any]) -> LastPorts:
    """Begin a search in a registry that has these entries."""
    last = LastPorts("web", instance)
    assert last.request == ("list", {"name": "web"})
    last.add({"instances": entries})
    return last


def is_over(last: LastPorts) -> bool:
    return last.request is None


def test_last_port_is_that_of_the_latest_change() -> None:
    last = search(None)
    assert last.request == history()
    last.add({"changes": [entry("", 5)], "next": 9})
    assert (is_over(last), last.ports) == (True, [5])


def test_later_pages_are_requested() -> None:
    """An empty page may be followed by another page."""
    last = search("a")
    last.add({"changes": [], "next": 9})
    assert last.request == history(9, "a")
    last.add({"changes": [entry("a", 6)], "next": 3})
    assert (is_over(last), last.ports) == (True, [6])


def test_static_registration_may_be_older_than_the_history() -> None:
    last = search("a", entry("", 4), entry("a", 6))
    last.add({"changes": []})
    assert (last.request, last.ports) == (None, [6])
    last = search("a", entry("a", 6))
    last.add({"changes": [entry("a", 7)]})
    assert last.ports == [7]


@pytest.mark.parametrize("held", [{"hold": True}, {"pid": 4}, {"ttl": 10}])
def test_port_of_a_live_owner_is_not_taken(held: dict[str, Any]) -> None:
    """The owner may not be listening at this moment. With the same port, both would share one registration."""
    last = search(None, entry("", 5, **held))
    last.add({"changes": [entry("", 5)]})
    assert last.ports == []


def test_search_for_the_last_port_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """It ends if the daemon repeats a page, and when the time is over."""
    last = search(None)
    for _ in range(2):
        last.add({"changes": [], "next": 9})
    assert (last.request, last.ports) == (None, [])
    monkeypatch.setattr(ports, "_SEARCH_S", -1.0)
    last = search(None)
    last.add({"changes": [], "next": 9})
    assert (last.request, last.ports) == (None, [])


def test_copies_try_the_ports_of_all_numbers() -> None:
    last = search("auto", entry("1", 9, hold=True), entry("4", 4))
    assert last.request == history(None, None, None)
    last.add({"changes": [entry("2", 1), entry("10", 3), entry("2", 5), entry("", 7), entry("1", 9)]})
    assert last.ports == [5, 4, 3]


@pytest.mark.parametrize(
    ("text", "first", "last"),
    [
        ("32768\t60999\n", 32_768, 60_999),
        ("1024 65535\n", 1_024, 65_535),
        ("", 49_152, 65_535),
        (None, 49_152, 65_535),
    ],
)
def test_free_ports_are_outside_the_ephemeral_range(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch, text: str | None, first: int, last: int
) -> None:
    if text is not None:
        (tmp_path / "range").write_text(text)
    monkeypatch.setattr(ports, "_RANGE", str(tmp_path / "range"))
    assert ports.ephemeral_range() == (first, last)
    tries = ports.free_ports()
    assert len(set(tries)) == (0 if first == 1_024 else ports._TRIES)
    assert not [port for port in tries if first <= port <= last or not 10_000 <= port <= 65_535]


# Sockets.


def test_port_that_another_program_reserves_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """`regctl run` reserves a port with a socket that has SO_REUSEADDR and does not listen."""
    with socket.socket() as reserved:
        reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        reserved.bind(("127.0.0.1", 0))
        port = reserved.getsockname()[1]
        monkeypatch.setattr(ports, "free_ports", lambda: [port])
        with ports.listening_socket_at_one("127.0.0.1", [], 1) as opened:
            assert opened.getsockname()[1] != port
        with ports.listening_socket_at_one(
            "127.0.0.1", [port], 1
        ) as opened:  # the service's own last port, perhaps reserved by its parent
            assert opened.getsockname()[1] == port


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_port_is_taken_again_after_connections(host: str) -> None:
    """Closed connections of the server occupy the port for a minute, for a bind without SO_REUSEADDR."""
    with ports.listening_socket_at_one(host, [], 1) as opened:
        port = opened.getsockname()[1]
        with socket.create_connection((host, port)) as caller:
            opened.accept()[0].close()
            assert caller.recv(1) == b""
    with ports.listening_socket_at_one(host, [port], 1) as opened:
        assert opened.getsockname()[1] == port


def test_without_a_port_outside_the_range_any_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ports, "free_ports", list)
    with ports.listening_socket_at_one("127.0.0.1", [], 1) as opened:
        assert opened.getsockname()[1]


def test_address_of_another_machine() -> None:
    with pytest.raises(OSError, match="assign"):
        ports.listening_socket_at_one("192.0.2.1", [1], 1)


# With a daemon.


@pytest.fixture
async def client(relay: Relay) -> AsyncIterator[Client]:
    async with Client() as client:
        yield client


def is_ephemeral(port: int) -> bool:
    first, last = ports.ephemeral_range()
    return first <= port <= last


async def test_listen_takes_the_port_that_the_name_had(client: Client) -> None:
    async with regd_client.listen("web") as first, regd_client.listen("web", instance="a") as other:
        assert not is_ephemeral(first.port)
        assert first.port != other.port
    async with regd_client.listen("web") as again, regd_client.listen("web", instance="a") as other_again:
        assert (again.port, other_again.port) == (first.port, other.port)
    with await asyncio.to_thread(blocking.listen, "web") as in_thread:
        assert in_thread.port == first.port
        async with regd_client.listen("web", instance="b") as new:
            assert new.port != first.port
        await asyncio.to_thread(in_thread.close)


async def test_explicit_ports_are_as_given(client: Client) -> None:
    async with regd_client.listen("web") as first:
        pass
    async with regd_client.listen("web", 0) as any_port:
        assert is_ephemeral(any_port.port)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        number = free.getsockname()[1]
    async with regd_client.listen("web", number) as given:
        assert given.port == number != first.port
    async with regd_client.listen("web") as last:
        assert last.port == number


async def test_taken_port_is_left_to_its_owner(client: Client) -> None:
    async with regd_client.listen("web") as first:
        pass
    with socket.create_server(("127.0.0.1", first.port)):
        async with regd_client.listen("web") as second:
            assert second.port != first.port
            assert not is_ephemeral(second.port)


async def test_simultaneous_listens_never_share_a_port(client: Client) -> None:
    async with regd_client.listen("web") as first:
        pass

    async def opened() -> socket.socket:
        listening = regd_client.listen("web")
        listening._awaited = True
        return (await listening._open())[0]

    socks = await asyncio.gather(*(opened() for _ in range(3)))
    assert len({sock.getsockname()[1] for sock in socks}) == 3
    assert first.port in {sock.getsockname()[1] for sock in socks}
    for sock in socks:
        sock.close()


async def test_copies_take_the_ports_that_copies_had(client: Client) -> None:
    async def run(count: int) -> set[int]:
        made = await asyncio.gather(*(regd_client.listen("web", instance="auto") for _ in range(count)))
        found = {each.port for each in made}
        await asyncio.gather(*(each.close() for each in made))
        return found

    before = await run(3)
    assert len(before) == 3
    assert await run(3) == before
    assert await run(1) < before


async def test_port_of_a_registration_written_by_hand_is_found(daemon: InLoop, client: Client) -> None:
    """The registration was written by hand, so it is not in the history."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    await daemon.server.stop()
    daemon.registry.write_text(f'{{"web": {{"port": {port}}}}}')
    daemon.registry.with_suffix(".journal").unlink(missing_ok=True)
    daemon.server = InLoop(daemon.registry).server
    await daemon.server.start()
    async with Client(f"tcp://127.0.0.1:{daemon.port}") as direct:
        assert (await direct.history("web"))["changes"] == []
        last = LastPorts("web", None)
        connection = await direct._connect()
        while last.request is not None:
            last.add(await connection.ask(*last.request))
    assert last.ports == [port]


async def test_daemon_without_history(relay: Relay, client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    """An older daemon refuses the command, and a free port is used."""
    monkeypatch.setattr(LastPorts, "_history", lambda self: ("nonsense", {}))
    async with regd_client.listen("web") as listening:
        assert not is_ephemeral(listening.port)
    assert relay.count("nonsense") == 1


async def test_timeout_bounds_both_requests(relay: Relay) -> None:
    relay.flowing.clear()
    with pytest.raises(regd_client.Timeout, match="listen was not answered within 1 s"):
        await regd_client.listen("web", timeout=1)


async def test_invalid_name_is_refused_by_register(client: Client) -> None:
    with pytest.raises(regd_client.BadArgument):
        await regd_client.listen("no name")
