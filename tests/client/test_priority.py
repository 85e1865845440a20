"""Priorities in the client: registering and changing them, and mirrors that resolve in the daemon's order."""

import asyncio
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import regd_client
from regd.core.limits import DEFAULT, Limits
from regd.core.model import Entry, State
from regd.core.registry import Registry as CoreRegistry
from regd.core.transaction import Transaction
from regd_client import Client, blocking, replies
from regd_client.mirrors import Mirror
from regd_client.models import Endpoint, Event, endpoint_of
from regd_client.watches import differences
from tests.support.daemon import DaemonProcess, InLoop
from tests.support.length import examples
from tests.support.polling import until
from tests.support.registries import Registry


async def listed(client: Client, name: str = "w") -> dict[str, int | None]:
    return {each["instance"]: each.get("priority") for each in await client.instances(name)}


@pytest.mark.socket
async def test_registered_resolved_and_listed(client: Client, other: Client) -> None:
    plain = await client.register("w", 1, instance="a")
    standby = await client.register("w", 2, instance="b", priority=7)
    assert (plain.endpoint.priority, standby.endpoint.priority) == (0, 7)
    assert await listed(other) == {"a": None, "b": 7}
    assert [await other.resolve("w") for _ in range(3)] == [plain.endpoint] * 3
    assert await other.resolve_all("w") == [plain.endpoint, standby.endpoint]
    await plain.deregister()
    endpoint = await other.resolve("w")
    assert (endpoint, endpoint.priority) == (standby.endpoint, 7)
    assert (await other.why("w"))["instances"][0]["priority"] == 7
    assert [change.get("priority") for change in (await other.history("w", "b"))["changes"]] == [7]


@pytest.mark.socket
async def test_update_of_own_and_of_other_registrations(client: Client, other: Client) -> None:
    own = await client.register("w", 1, instance="a", meta={"k": "v"}, priority=1)
    await own.update(priority=5)
    assert (own.endpoint.priority, own.endpoint.meta) == (5, {"k": "v"})
    await client.update("w", priority=6, instance="a")  # its own registration
    assert own.endpoint.priority == 6
    await other.update("w", priority=8, instance="a")
    assert await listed(other) == {"a": 8}
    await own.update({"k": "w"}, state="draining", priority=0)
    [entry] = await other.instances("w")
    assert (entry["meta"], entry["state"], entry.get("priority")) == ({"k": "w"}, "draining", None)
    with pytest.raises(regd_client.BadArgument) as refusal:
        await own.update(priority=65_536)
    assert refusal.value.details["field"] == "priority"


@pytest.mark.socket
async def test_priority_is_restored_after_a_break(registry: Registry, client: Client) -> None:
    own = await client.register("w", 1, priority=1)
    await own.update(priority=9)
    connection = own._connection
    registry.cut()
    await until(lambda: own._connection is not connection)
    async with Client() as other:
        assert await listed(other) == {"": 9}
    async with registry.away():
        pass
    await own.update(state="ready")
    async with Client() as other:
        assert await listed(other) == {"": 9}


@pytest.mark.socket
async def test_all_is_in_order_of_priority_even_in_several_pages(tmp_path: Path) -> None:
    limits = Limits(reply_instances_max=2)
    async with (
        InLoop(tmp_path / "registry.json", limits=limits) as daemon,
        Client(f"127.0.0.1:{daemon.port}") as client,
    ):
        for instance, priority in (("a", 2), ("b", 0), ("c", 1), ("d", 0), ("e", 1)):
            await client.register("w", 1, instance=instance, priority=priority)
        endpoints = await client.resolve_all("w")
    assert [endpoint.instance for endpoint in endpoints] == ["b", "d", "c", "e", "a"]


@pytest.mark.socket
async def test_lifespan_and_listen_have_a_priority(registry: Registry, other: Client) -> None:
    async with regd_client.listen("w", 0, priority=3) as listening:
        assert listening.endpoint.priority == 3
        assert await listed(other) == {"": 3}
    async with (
        regd_client.lifespan("w", priority=4) as service,
        await asyncio.start_server(lambda reader, writer: writer.close(), "127.0.0.1", 0),
    ):
        assert (await service.registration()).endpoint.priority == 4
        assert await listed(other) == {"": 4}
    async with regd_client.register("w", 1, priority=5) as registration:
        await registration.update(priority=6)
        assert await listed(other) == {"": 6}


def test_blocking_twins(process: DaemonProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REGD_ADDRESS", process.addresses[0])
    with blocking.register("w", 1, instance="a", priority=2) as registration:
        assert registration.endpoint.priority == blocking.resolve("w").priority == 2
        registration.update(priority=3)
        with blocking.Client() as client, client.register("w", 2, instance="b", priority=1):
            assert [endpoint.priority for endpoint in blocking.resolve_all("w")] == [1, 3]
            client.update("w", priority=0, instance="a")
            assert blocking.resolve("w").instance == "a"
            with client.mirror("w") as mirror:
                assert [mirror.resolve("w").instance for _ in range(3)] == ["a"] * 3
                assert [endpoint.instance for endpoint in mirror.resolve_all("w")] == ["a", "b"]
    with blocking.listen("w", 0, priority=8) as listening:
        assert listening.endpoint.priority == blocking.resolve("w").priority == 8


@pytest.mark.socket
async def test_mirror_follows_the_priorities(registry: Registry, client: Client, other: Client) -> None:
    async with other.mirror("w") as mirror:
        for instance, priority in (("a", 1), ("b", 0), ("c", 0), ("d", 1)):
            await client.register("w", 1, instance=instance, priority=priority)
        await until(lambda: len(mirror.resolve_all("w")) == 4)
        assert sorted(mirror.resolve("w").instance for _ in range(4)) == ["b", "b", "c", "c"]
        assert [endpoint.instance for endpoint in mirror.resolve_all("w")] == ["b", "c", "a", "d"]
        assert [endpoint.instance for endpoint in mirror] == ["a", "b", "c", "d"]
        seen = mirror.changes
        await client.update("w", priority=2, instance="b")
        await mirror.changed(seen)
        assert [mirror.resolve("w").instance for _ in range(2)] == ["c", "c"]
        await client.update("w", state="draining", instance="c")
        await until(lambda: len(mirror.resolve_all("w")) == 3)
        assert sorted(mirror.resolve("w").instance for _ in range(4)) == ["a", "a", "d", "d"]
        async with registry.away():
            await until(lambda: not mirror.live)
            endpoint = mirror.resolve("w")
            assert (endpoint.instance in "ad", endpoint.stale_s > 0, endpoint.priority) == (True, True, 1)


def test_mirror_continues_after_the_instance_returned_last() -> None:
    mirror = Mirror("w", None, None)

    def take(kind: str, instance: str, priority: int, state: str = "ready") -> None:
        endpoint = Endpoint("w", instance, "127.0.0.1", 1, {}, priority=priority)
        mirror._take(Event(kind, endpoint, state))  # type: ignore[arg-type]

    for instance in "acd":
        take("up", instance, 2)
    assert mirror.resolve("w").instance == "a"
    take("up", "b", 2)
    assert mirror.resolve("w").instance == "b"
    take("up", "x", 3)
    take("change", "c", 2, "draining")
    assert [mirror.resolve("w").instance for _ in range(3)] == ["d", "a", "b"]
    take("up", "y", 1)
    assert [mirror.resolve("w").instance for _ in range(2)] == ["y", "y"]
    take("change", "c", 2)
    take("down", "y", 1)
    assert [mirror.resolve("w").instance for _ in range(2)] == ["c", "d"]


def fields(entry: Entry) -> dict[str, Any]:
    shown: dict[str, Any] = {
        "name": entry.name,
        "instance": entry.instance,
        "host": entry.host,
        "port": entry.port,
        "meta": dict(entry.meta),
        "state": str(entry.state),
    }
    return shown | ({"priority": entry.priority} if entry.priority else {})


STEPS = st.one_of(
    st.tuples(
        st.sampled_from("abcd"),
        st.sampled_from([0, 0, 1, 2]),
        st.sampled_from([State.READY, State.READY, State.DRAINING]),
        st.sampled_from([{}, {"zone": "x"}]),
    ),
    st.sampled_from("abcd"),  # deregister this instance
    st.integers(1, 3),  # resolve so many times
)


@given(st.lists(STEPS, max_size=30))
@settings(max_examples=examples(200), deadline=None)
def test_mirror_resolves_by_the_rule_of_the_daemon(steps: list[Any]) -> None:
    """Both rotate through the same instances, whatever happens in between."""
    registry, mirror = CoreRegistry(), Mirror("w", None, None)
    for step in steps:
        transaction = Transaction(registry, 5.0)
        if isinstance(step, tuple):
            instance, priority, state, meta = step
            transaction.register(Entry("w", instance, "127.0.0.1", 1, meta, state, 0, 0.0, priority=priority))
        elif isinstance(step, str) and registry.get(("w", step)) is not None:
            transaction.deregister(("w", step))
        registry.apply(transaction.changes, 0.0)
        for change in transaction.changes:
            mirror._take(Event(change.op, endpoint_of(fields(change.entry)), str(change.entry.state)))  # type: ignore[arg-type]
        for meta in ({}, {"zone": "x"}):
            assert set(around(mirror, meta)) == set(around_daemon(registry, meta))
        if isinstance(step, int):
            for _ in range(step):
                around(mirror, {}, 1)
        search = registry.search("w", None, {}, 10)
        assert search.step(DEFAULT.search_step_max)
        assert mirror.resolve_all("w") == [endpoint_of(fields(entry)) for entry in search.found]
        best = around(mirror, {})
        assert around(mirror, {}) == best  # each instance once, in the same order
        assert len(set(best)) == len(best)


def around(mirror: Mirror, meta: dict[str, str], count: int | None = None) -> list[Endpoint]:
    """Resolve once for each instance that can be the result."""
    endpoints = mirror.resolve_all("w", meta=meta)
    best = [endpoint for endpoint in endpoints if endpoint.priority == endpoints[0].priority]
    return [mirror.resolve("w", meta=meta) for _ in best[:count]]


def around_daemon(registry: CoreRegistry, meta: dict[str, str]) -> list[Endpoint]:
    found: list[Endpoint] = []
    for _ in range(4):
        search = registry.search_round_robin("w", None, meta, 1)
        assert search.step(DEFAULT.search_step_max)
        for entry in search.found:
            registry.mark_served(entry, meta)
            found.append(endpoint_of(fields(entry)))
    return found


def test_difference_of_priority_is_a_change() -> None:
    old = {"name": "w", "instance": "", "host": "h", "port": 1, "meta": {}, "state": "ready"}
    key = ("w", "")
    [event] = differences({key: old}, {key: {**old, "priority": 1}})
    assert (event.kind, event.endpoint and event.endpoint.priority) == ("change", 1)
    [event] = differences({key: {**old, "priority": 1}}, {key: old})
    assert (event.kind, event.endpoint and event.endpoint.priority) == ("change", 0)
    assert differences({key: {**old, "priority": 1}}, {key: {**old, "priority": 1}}) == []


ENTRY = {"name": "w", "instance": "", "host": "h", "port": 1, "meta": {}, "state": "ready", "rev": 1}
KNOWN = {
    "instance": "", "host": "h", "port": 1, "state": "ready", "alive": True, "rev": 1, "since": 5.0,
    "owners": [], "probe": None,
}  # fmt: skip
PAST = {"rev": 1, "at": 5.0, "op": "up", "name": "w", "instance": "", "host": "h", "port": 1, "state": "ready"}


@pytest.mark.parametrize("value", [0, 1, 65_535, -1, 65_536, True, 1.0, "1", None, []])
def test_replies_are_checked(value: object) -> None:
    valid = type(value) is int and 0 <= value <= 65_535
    given = {"priority": value}
    for cmd, arguments, reply in (
        ("resolve", {}, {**ENTRY, **given}),
        ("resolve", {"all": True}, {"rev": 1, "instances": [{**ENTRY, **given}]}),
        ("list", {}, {"epoch": "e", "rev": 1, "instances": [{**ENTRY, **given}]}),
        ("why", {}, {"name": "w", "instances": [{**KNOWN, **given}], "departures": []}),
        ("history", {}, {"changes": [{**PAST, **given}]}),
    ):
        assert (replies.result_fault(cmd, arguments, {"ok": True, **reply}) == "") is valid, cmd
    for event in ("up", "change"):
        assert (replies.fault({"event": event, "watch": 1, **ENTRY, **given}) == "") is valid
