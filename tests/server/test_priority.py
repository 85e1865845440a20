"""Priorities in the protocol: values that are accepted, the instance that is resolved, and restarts."""

import asyncio
import json
import socket
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from regd.core.limits import Limits
from tests.support.daemon import WAIT_S, InLoop, Peer

pytestmark = pytest.mark.socket


async def register(peer: Peer, instance: str, port: int = 1, **arguments: Any) -> dict[str, Any]:
    reply = await peer.ask(cmd="register", name="db", instance=instance, port=port, **arguments)
    assert reply["ok"], reply
    return reply


async def resolved(peer: Peer, count: int = 6, **arguments: Any) -> list[str]:
    """Return the instances in successive replies, or their error codes."""
    replies = [await peer.ask(cmd="resolve", name="db", **arguments) for _ in range(count)]
    return [reply["instance"] if reply["ok"] else reply["error"] for reply in replies]


async def step_until(daemon: InLoop, done: Callable[[], bool]) -> None:
    async with asyncio.timeout(WAIT_S):
        while not done():
            daemon.clock.advance(0.01)
            await asyncio.sleep(0)


@pytest.mark.parametrize("priority", [1, 10, 256, 65_535])
async def test_priority_is_shown_unless_it_is_0(daemon: InLoop, priority: int) -> None:
    peer = await daemon.peer()
    reply = await register(peer, "a", priority=priority)
    assert "priority" not in reply
    await register(peer, "b", priority=0)
    await register(peer, "c")
    for cmd in ("list", "resolve"):
        arguments = {"all": True} if cmd == "resolve" else {}
        instances = (await peer.ask(cmd=cmd, name="db", **arguments))["instances"]
        assert {each["instance"]: each.get("priority") for each in instances} == {
            "a": priority, "b": None, "c": None,
        }  # fmt: skip
    known = (await peer.ask(cmd="why", name="db"))["instances"]
    assert [each.get("priority") for each in known] == [priority, None, None]
    changes = (await peer.ask(cmd="history", name="db"))["changes"]
    assert [each.get("priority") for each in changes] == [priority, None, None]


@pytest.mark.parametrize("cmd", ["register", "update"])
@pytest.mark.parametrize("priority", [-1, 65_536, 2**70, 1.0, 0.5, True, False, "1", "", None, [1], {}])
async def test_other_values_are_refused(daemon: InLoop, cmd: str, priority: object) -> None:
    peer = await daemon.peer()
    await register(peer, "")
    arguments = {"port": 1} if cmd == "register" else {}
    refusal = await peer.ask(cmd=cmd, name="db", priority=priority, **arguments)
    assert (refusal["error"], refusal["field"]) == ("bad_argument", "priority")
    assert (await peer.ask(cmd="hello"))["rev"] == 1


async def test_other_commands_take_no_priority(daemon: InLoop) -> None:
    peer = await daemon.peer()
    for cmd in ("resolve", "list", "deregister", "watch", "why"):
        refusal = await peer.ask(cmd=cmd, name="db", priority=1)
        assert (refusal["error"], refusal["field"]) == ("bad_argument", "priority")


async def test_hello_and_help_mention_priority(daemon: InLoop) -> None:
    peer = await daemon.peer()
    assert "priority" in (await peer.ask(cmd="hello"))["features"]
    commands = (await peer.ask(cmd="help"))["commands"]
    assert {name for name, command in commands.items() if "priority" in command["args"]} == {"register", "update"}


async def test_round_robin_within_the_best_priority(daemon: InLoop) -> None:
    peer = await daemon.peer()
    for instance, priority in (("a", 2), ("b", 1), ("c", 3), ("d", 1), ("e", 2)):
        await register(peer, instance, priority=priority)
    assert await resolved(peer) == ["b", "d"] * 3
    await peer.ask(cmd="update", name="db", instance="b", state="draining")
    assert await resolved(peer, 3) == ["d"] * 3
    await peer.ask(cmd="deregister", name="db", instance="d")
    assert await resolved(peer) == ["a", "e"] * 3 or await resolved(peer) == ["e", "a"] * 3
    await peer.ask(cmd="update", name="db", instance="b", state="ready")
    assert await resolved(peer, 3) == ["b"] * 3
    for instance in "abe":
        await peer.ask(cmd="update", name="db", instance=instance, state="starting")
    assert await resolved(peer, 2) == ["c"] * 2
    await peer.ask(cmd="deregister", name="db", instance="c")
    assert await resolved(peer, 1) == ["not_found"]


async def test_one_instance_is_resolved_whatever_its_priority(daemon: InLoop) -> None:
    peer = await daemon.peer()
    await register(peer, "a")
    await register(peer, "b", priority=9)
    assert await resolved(peer, 2, instance="b") == ["b", "b"]
    assert await resolved(peer, 2, instance="a") == ["a", "a"]


async def test_filter_has_its_own_best_priority(daemon: InLoop) -> None:
    peer = await daemon.peer()
    await register(peer, "a", meta={"zone": "x"})
    await register(peer, "b", meta={"zone": "y"}, priority=5)
    await register(peer, "c", meta={"zone": "y", "role": "r"}, priority=5)
    await register(peer, "d", meta={"zone": "y"}, priority=6)
    assert await resolved(peer, 2) == ["a", "a"]
    assert await resolved(peer, 4, meta={"zone": "y"}) == ["b", "c"] * 2
    assert await resolved(peer, 2, meta={"zone": "y", "role": "r"}) == ["c", "c"]
    for instance in "bc":
        await peer.ask(cmd="deregister", name="db", instance=instance)
    assert await resolved(peer, 2, meta={"zone": "y"}) == ["d", "d"]


async def test_all_has_the_best_priority_first(tmp_path: Path) -> None:
    limits = Limits(reply_instances_max=3)
    async with InLoop(tmp_path / "registry.json", limits=limits) as daemon:
        peer = await daemon.peer()
        for instance, priority in (("a", 2), ("b", 0), ("c", 1), ("d", 0), ("e", 0)):
            await register(peer, instance, priority=priority)
        await peer.ask(cmd="update", name="db", instance="d", state="draining")
        reply = await peer.ask(cmd="resolve", name="db", all=True)
        assert [each["instance"] for each in reply["instances"]] == ["b", "e", "c"]
        assert reply["more"] is True
        await peer.ask(cmd="update", name="db", instance="c", state="draining")
        reply = await peer.ask(cmd="resolve", name="db", all=True)
        assert [each["instance"] for each in reply["instances"]] == ["b", "e", "a"]
        assert "more" not in reply
        listed: list[str] = []
        page: dict[str, Any] = {"next": None}
        while "next" in page:
            page = await peer.ask(cmd="list", name="db", **({"after": page["next"]} if listed else {}))
            listed += [each["instance"] for each in page["instances"]]
        assert listed == list("abcde")  # in order of instance, whatever the priority


async def test_same_address_with_another_priority_is_one_change_for_all_holders(daemon: InLoop) -> None:
    one, two, watcher = await daemon.peer(), await daemon.peer(), await daemon.peer()
    await watcher.ask(cmd="watch")
    await register(one, "", hold=True, priority=3)
    assert (await register(two, "", hold=True, priority=3))["rev"] == 1
    assert (await register(two, "", hold=True, priority=4))["rev"] == 2
    assert (await register(one, "", hold=True))["rev"] == 3
    assert (await one.ask(cmd="update", name="db", priority=0))["rev"] == 3
    await one.ask(cmd="deregister", name="db")
    await two.ask(cmd="deregister", name="db")
    events = [await watcher.reply() for _ in range(5)]
    assert [(each["event"], each["rev"], each.get("priority")) for each in events] == [
        ("sync", 0, None),
        ("up", 1, 3),
        ("change", 2, 4),
        ("change", 3, None),
        ("down", 4, None),
    ]


async def test_priority_decides_no_conflict(daemon: InLoop) -> None:
    one, two = await daemon.peer(), await daemon.peer()
    await register(one, "", hold=True, priority=9)
    reply = await two.ask(cmd="register", name="db", port=2, hold=True, priority=0)
    assert (reply["error"], reply["rev"]) == ("conflict", 1)
    reply = await two.ask(cmd="register", name="db", port=2, force=True)
    assert (reply["replaced"], reply["rev"]) == (True, 3)
    assert "priority" not in await two.ask(cmd="resolve", name="db")


async def test_update_sets_only_its_arguments(daemon: InLoop) -> None:
    peer = await daemon.peer()
    await register(peer, "", meta={"k": "v"}, state="starting")
    assert (await peer.ask(cmd="update", name="db", priority=7, **{"if": 2}))["error"] == "conflict"
    assert (await peer.ask(cmd="update", name="db", priority=7, **{"if": 1}))["rev"] == 2
    assert (await peer.ask(cmd="update", name="db", state="ready"))["rev"] == 3
    assert (await peer.ask(cmd="update", name="db", meta={}))["rev"] == 4
    [entry] = (await peer.ask(cmd="list"))["instances"]
    assert (entry["meta"], entry["state"], entry["priority"]) == ({}, "ready", 7)
    assert (await peer.ask(cmd="update", name="db"))["error"] == "bad_argument"
    assert (await peer.ask(cmd="update", name="no", priority=1))["error"] == "not_found"


async def test_withdrawal_sets_the_priority_for_other_holders(daemon: InLoop) -> None:
    one, two = await daemon.peer(), await daemon.peer()
    await register(one, "", hold=True)
    await register(two, "", hold=True)
    await one.ask(cmd="update", name="db", state="draining", priority=8)
    reply = await two.ask(cmd="resolve", name="db")
    assert (reply["state"], reply["priority"]) == ("ready", 8)


# `wait`.


def listening(stack: ExitStack, count: int) -> list[int]:
    """Return ports that accept connections."""
    sockets = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
    return [int(each.getsockname()[1]) for each in sockets]


def closed(count: int) -> list[int]:
    """Return ports that refuse connections."""
    with ExitStack() as stack:
        return listening(stack, count)


async def test_wait_takes_the_best_priority_that_accepts(daemon: InLoop) -> None:
    peer = await daemon.peer()
    with ExitStack() as stack:
        ports = listening(stack, 4)
        for instance, port, priority in zip("abcd", ports, (2, 1, 1, 0), strict=True):
            await register(peer, instance, port, priority=priority)
        assert await resolved(peer, 2, wait=5) == ["d", "d"]
        await register(peer, "d", *closed(1), priority=0)
        assert await resolved(peer, 4, wait=5) == ["b", "c"] * 2
        assert await resolved(peer, 4) == ["d"] * 4  # without `wait`, no instance is probed


async def test_wait_prefers_an_instance_of_another_machine_by_its_priority(daemon: InLoop) -> None:
    peer = await daemon.peer()
    with ExitStack() as stack:
        [port] = listening(stack, 1)
        await register(peer, "far", host="db.example", priority=1)
        await register(peer, "near", port, priority=2)
        assert await resolved(peer, 2, wait=5) == ["far", "far"]
        await peer.ask(cmd="update", name="db", instance="near", priority=0)
        assert await resolved(peer, 2, wait=5) == ["near", "near"]


async def test_wait_finds_a_standby_after_many_instances_that_refuse(tmp_path: Path) -> None:
    limits = Limits(probed_instances_max=4)
    async with InLoop(tmp_path / "registry.json", limits=limits) as daemon:
        peer = await daemon.peer()
        with ExitStack() as stack:
            [port] = listening(stack, 1)
            for n, refusing in enumerate(closed(10)):
                await register(peer, f"{n}", refusing)
            await resolved(peer, 5)  # so that round robin continues in the middle
            await register(peer, "standby", port, priority=1)
            answer = asyncio.create_task(peer.ask(cmd="resolve", name="db", wait=3_600))
            await step_until(daemon, answer.done)
    assert answer.result()["instance"] == "standby"


async def test_wait_that_begins_again_prefers_the_best_priority(tmp_path: Path) -> None:
    """The next instances to probe are the last of the worst priority and the first of the best priority."""
    async with InLoop(tmp_path / "registry.json", limits=Limits(probed_instances_max=4)) as daemon:
        peer, other = await daemon.peer(), await daemon.peer()
        ports = closed(7)
        for n, port in enumerate(ports[:6]):
            await register(peer, f"{n}", port)
        await register(peer, "standby", ports[6], priority=1)
        answer = asyncio.create_task(other.ask(cmd="resolve", name="db", wait=3_600))
        async with asyncio.timeout(WAIT_S):
            while daemon.server.probed < 4:
                await asyncio.sleep(0)
        with socket.create_server(("127.0.0.1", ports[0])), socket.create_server(("127.0.0.1", ports[6])):
            await step_until(daemon, lambda: daemon.server.probed > 4)
            async with asyncio.timeout(WAIT_S):  # the clock is stopped, so all probes end before the grace time
                assert (await answer)["instance"] == "0"


async def test_waiting_request_gets_the_instance_that_becomes_ready(daemon: InLoop) -> None:
    peer, other = await daemon.peer(), await daemon.peer()
    with ExitStack() as stack:
        first, second = listening(stack, 2)
        await register(peer, "a", *closed(1))
        answer = asyncio.create_task(other.ask(cmd="resolve", name="db", wait=3_600))
        await step_until(daemon, lambda: daemon.server.waiting == 1)
        batch = [
            {"cmd": "register", "name": "db", "instance": "b", "port": first, "priority": 2},
            {"cmd": "register", "name": "db", "instance": "c", "port": second, "priority": 1},
        ]
        peer.send(*batch)
        await step_until(daemon, answer.done)
    assert answer.result()["instance"] in ("b", "c")


async def test_wait_with_all_has_the_best_priority_first(daemon: InLoop) -> None:
    peer = await daemon.peer()
    with ExitStack() as stack:
        first, second = listening(stack, 2)
        await register(peer, "a", first, priority=1)
        await register(peer, "b", second)
        reply = await peer.ask(cmd="resolve", name="db", wait=5, all=True)
    assert [each["instance"] for each in reply["instances"]] == ["b", "a"]


# Files.


@pytest.mark.parametrize("checkpoint", [True, False])
async def test_priority_survives_a_restart(tmp_path: Path, checkpoint: bool) -> None:
    """The start reads the priority from the checkpoint, or from the journal only."""
    path = tmp_path / "registry.json"
    path.write_text('{\n"$regd": {"format": 2, "rev": 0}\n}\n')
    before = path.read_bytes()
    async with InLoop(path) as daemon:
        start = path.read_bytes()
        peer = await daemon.peer()
        await register(peer, "a", priority=2)
        await register(peer, "b", priority=65_535)
        await register(peer, "c", priority=9)
        await peer.ask(cmd="update", name="db", instance="c", priority=0)
        listed = (await peer.ask(cmd="list"))["instances"]
    assert before != start
    lines = dict(json.loads(path.read_text()))
    assert {key: entry.get("priority") for key, entry in lines.items() if key != "$regd"} == {
        "db/a": 2, "db/b": 65_535, "db/c": None,
    }  # fmt: skip
    journal = path.with_suffix(".journal").read_text().splitlines()
    changes = [change for change in map(json.loads, journal) if "op" in change]
    assert [(each["instance"], each["op"], each.get("priority")) for each in changes] == [
        ("a", "up", 2),
        ("b", "up", 65_535),
        ("c", "up", 9),
        ("c", "change", None),
    ]
    if not checkpoint:
        path.write_bytes(start)  # the file as of the start, so that all changes are in the journal only
    async with InLoop(path, epoch="another") as daemon:
        peer = await daemon.peer()
        assert (await peer.ask(cmd="list"))["instances"] == listed
        assert await resolved(peer, 2) == ["c", "c"]
        history = (await peer.ask(cmd="history"))["changes"]
        assert [each.get("priority") for each in history] == [2, 65_535, 9, None]


async def test_file_by_hand_may_have_a_priority(tmp_path: Path) -> None:
    path = tmp_path / "registry.json"
    path.write_text('{"db/a": {"port": 1, "priority": 3}, "db/b": {"port": 2, "priority": 0}}')
    async with InLoop(path) as daemon:
        assert await resolved(await daemon.peer(), 2) == ["b", "b"]
