"""`resolve` with `wait`: answered when an instance accepts connections; the timeout says why none did."""

import asyncio
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from regd.system import probes
from tests.support.daemon import WAIT_S, InLoop

pytestmark = pytest.mark.socket


@contextmanager
def service(host: str = "127.0.0.1") -> Iterator[int]:
    """A port whose connections the kernel accepts, up to 128 of them."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.create_server((host, 0), family=family) as server:
        yield server.getsockname()[1]


@pytest.fixture
def refusing() -> Iterator[int]:
    """A port that refuses connections. It is bound, so that no other process listens there meanwhile."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        yield bound.getsockname()[1]


async def step_until(daemon: InLoop, done: Callable[[], bool]) -> None:
    """Advance the clock in small steps until a condition is true."""
    async with asyncio.timeout(WAIT_S):
        while not done():
            daemon.clock.advance(0.01)
            await asyncio.sleep(0)


async def test_accepting_instance_is_returned_at_once(daemon: InLoop) -> None:
    peer = await daemon.peer()
    for host in ("127.0.0.1", "::1"):
        with service(host) as port:
            await peer.ask(cmd="register", name="a", port=port, host=host, force=True)
            assert (await peer.ask(cmd="resolve", name="a", wait=5))["port"] == port
            assert (await peer.ask(cmd="resolve", name="a", wait=0))["port"] == port
            assert (await peer.ask(cmd="resolve", name="a", wait=5, all=True))["instances"][0]["port"] == port


async def test_localhost_is_probed_and_other_hosts_are_not(daemon: InLoop) -> None:
    peer = await daemon.peer()
    with service("::1") as port:
        await peer.ask(cmd="register", name="a", port=port, host="localhost")
        assert (await peer.ask(cmd="resolve", name="a", wait=5))["ok"]
    for host in ("192.0.2.1", "db.example", "2001:db8::1", "::ffff:192.0.2.1"):
        await peer.ask(cmd="register", name="b", port=1, host=host)
        assert (await peer.ask(cmd="resolve", name="b", wait=5))["host"] == host


async def test_wait_for_the_registration_and_for_the_port(daemon: InLoop) -> None:
    one, two = await daemon.peer(), await daemon.peer()
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
        one.send({"cmd": "resolve", "name": "a", "wait": 3_600})
        await two.ask(cmd="register", name="a", port=port, state="starting")
        await two.ask(cmd="update", name="a", state="ready")
        answer = asyncio.create_task(one.reply())
        await step_until(daemon, lambda: daemon.server.probed > 2)
        assert not answer.done()
        server.listen()
        await step_until(daemon, answer.done)
    assert answer.result()["port"] == port


async def test_wait_with_an_id_is_overtaken(daemon: InLoop) -> None:
    peer = await daemon.peer()
    peer.send({"cmd": "resolve", "name": "a", "wait": 1, "id": 1}, {"cmd": "ping", "id": 2}, "ping")
    assert [(await peer.reply()).get("id") for _ in range(2)] == [2, None]
    peer.send({"cmd": "resolve", "name": "a", "wait": 2}, {"cmd": "ping", "id": 3}, "quit")
    await asyncio.sleep(0)
    async with asyncio.timeout(WAIT_S):
        while daemon.server.waiting < 2:
            await asyncio.sleep(0)
    daemon.clock.advance(2)
    assert [(await peer.reply()).get("id") for _ in range(3)] == [1, None, 3]
    assert await peer.rest() == b""


async def test_timeout_has_the_reason(daemon: InLoop, refusing: int) -> None:
    peer = await daemon.peer()
    await peer.ask(cmd="register", name="refusing", port=refusing)
    await peer.ask(cmd="register", name="starting", port=1, state="starting")
    await peer.ask(cmd="register", name="left", port=1)
    await peer.ask(cmd="deregister", name="left")
    daemon.clock.advance(1.2)
    for name, why in {
        "refusing": "connection refused",
        "starting": "none is ready",
        "left": "left 1.2 s ago: deregistered",
        "nobody": "never registered",
    }.items():
        reply = await peer.ask(cmd="resolve", name=name, wait=0)
        assert reply["error"] == "timeout"
        assert why in reply["message"]


async def test_round_robin_skips_instances_that_do_not_accept(daemon: InLoop, refusing: int) -> None:
    peer = await daemon.peer()
    with service() as first, service() as second:
        for port in (first, refusing, second):
            await peer.ask(cmd="register", name="a", port=port, instance=str(port))
        ports = [(await peer.ask(cmd="resolve", name="a", wait=5))["port"] for _ in range(4)]
    assert sorted(ports) == sorted([first, second] * 2)
    assert ports[:2] == ports[2:]


async def test_no_probe_without_a_waiting_request(daemon: InLoop, refusing: int) -> None:
    peer = await daemon.peer()
    await peer.ask(cmd="register", name="a", port=refusing)
    peer.send({"cmd": "resolve", "name": "a", "wait": 3_600})
    await step_until(daemon, lambda: daemon.server.probed > 3)
    await peer.reset()
    async with asyncio.timeout(WAIT_S):
        while daemon.server.waiting:
            await asyncio.sleep(0)
    before = daemon.server.probed
    for _ in range(100):
        daemon.clock.advance(0.5)
        await asyncio.sleep(0)
    assert daemon.server.probed == before


async def test_probe_connected_to_itself_fails() -> None:
    """The kernel connects a socket to itself if its own port is the port that it connects to."""
    loop = asyncio.get_running_loop()
    with socket.socket() as own:
        own.bind(("127.0.0.1", 0))
        own.setblocking(False)
        await loop.sock_connect(own, own.getsockname())
        assert probes.met_itself(own)


@pytest.mark.parametrize(
    ("host", "may"),
    [
        ("127.0.0.1", True),
        ("127.9.9.9", True),
        ("::1", True),
        ("localhost", True),
        ("LOCALHOST.", True),
        ("::ffff:127.0.0.1", True),
        ("10.0.0.1", False),
        ("localhost.example", False),
        ("::ffff:10.0.0.1", False),
        ("fe80::1", False),
    ],
)
def test_only_this_machine_is_probed(host: str, may: bool) -> None:
    assert probes.may_probe(host) is may


async def test_why(daemon: InLoop) -> None:
    peer, other = await daemon.peer(), await daemon.peer()
    with service() as port:
        await peer.ask(cmd="register", name="a", port=port, hold=True)
        await peer.ask(cmd="resolve", name="a", wait=1)
        await peer.ask(cmd="register", name="a", port=1, instance="s", state="starting")
        await peer.ask(cmd="register", name="a", port=1, instance="t", ttl=3)
        await peer.ask(cmd="deregister", name="a", instance="t")
        known = await other.ask(cmd="why", name="a")
    first, second = known["instances"]
    assert first["probe"] == {"accepted": True, "age_s": 0.0}
    assert first["owners"][0]["connection"].startswith("127.0.0.1 port")
    assert (second["state"], second["owners"], second["probe"]) == ("starting", [{"static": True}], None)
    assert known["departures"] == [{"instance": "t", "reason": "deregistered", "age_s": 0.0}]
    assert (await other.ask(cmd="why", name="a", instance="t"))["instances"] == []
    assert (await other.ask(cmd="why", name="zzz"))["error"] == "not_found"


async def test_immediate_replies_are_in_order(daemon: InLoop) -> None:
    peer = await daemon.peer()
    await peer.ask(cmd="register", name="remote", port=1, host="db.example")
    peer.send(
        {"cmd": "resolve", "name": "remote", "wait": 5},
        {"cmd": "ping"},
        {"cmd": "resolve", "name": "no", "wait": 0},
    )
    peer.send({"cmd": "hello"})
    lines = [await peer.reply() for _ in range(4)]
    assert ["host" in lines[0], len(lines[1]), lines[2].get("error"), "epoch" in lines[3]] == [
        True,
        1,
        "timeout",
        True,
    ]


async def test_silent_instance_does_not_delay_a_wait(daemon: InLoop) -> None:
    """A service with a full backlog does not answer, and the next instance is returned."""
    peer = await daemon.peer()
    with socket.socket() as full:
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        fillers = [socket.socket() for _ in range(4)]
        for sock in fillers:
            sock.setblocking(False)
            sock.connect_ex(full.getsockname())
        with service() as port:
            await peer.ask(cmd="register", name="a", port=full.getsockname()[1], instance="1")
            await peer.ask(cmd="register", name="a", port=port, instance="2")
            answer = asyncio.create_task(peer.ask(cmd="resolve", name="a", wait=3_600))
            await step_until(daemon, answer.done)
        for sock in fillers:
            sock.close()
    assert answer.result()["port"] == port
