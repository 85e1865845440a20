"""Instances of other machines, with a daemon in the test's loop: it has the fold of the keys in etcd."""

import asyncio
import contextlib
import json
import random
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from regd.bridge.etcd.model import KeyEvent, Record
from regd.bridge.foreign import Foreign
from regd.bridge.local import Local, LocalRefusal, Session
from regd.bridge.records import Place, arrival, arrival_key, key_of, published
from regd.core.limits import DEFAULT, Limits
from regd_client.models import Key
from tests.support.daemon import WAIT_S, InLoop, Peer
from tests.support.polling import until

PREFIX = "/regd/v1/default/"
Arrivals = dict[Key, dict[str, Any]]


class Incoming:
    """The incoming half of a bridge, fed by hand."""

    def __init__(self, address: str, arrivals_max: int) -> None:
        own = {"port": 9, "meta": {"regd.publish": "no"}}
        self.local = Local(address, own, lambda key: self.foreign.changed(key))
        self.foreign = Foreign(PREFIX, "a", self.local, loopback=False, arrivals_max=arrivals_max)
        self.records: dict[bytes, Record] = {}
        self.revision = 1

    def put(self, place: Place, port: int = 80, **fields: Any) -> None:
        value = json.dumps({"host": "10.0.0.7", "port": port, **fields}).encode()
        self.revision += 1
        key = key_of(PREFIX, place)
        self.records[key] = Record(value, self.revision, 1)
        self.foreign.apply(KeyEvent(key, self.revision, self.records[key]))

    def delete(self, place: Place) -> None:
        self.revision += 1
        key = key_of(PREFIX, place)
        if self.records.pop(key, None) is not None:
            self.foreign.apply(KeyEvent(key, self.revision, None))

    def wanted(self) -> Arrivals:
        fold = {}
        for key, record in self.records.items():
            place = Place(*key.decode().removeprefix(PREFIX).split("/"))
            fold[arrival_key(place)] = arrival(place, published(record.value), loopback=False)
        return fold

    def actual(self) -> Arrivals:
        names = ("host", "port", "meta", "state")
        return {
            key: {**{name: instance[name] for name in names}, "priority": instance.get("priority", 0)}
            for key, instance in self.local.instances.items()
            if "regd.machine" in instance["meta"]
        }


@contextlib.asynccontextmanager
async def incoming(daemon: InLoop | str, arrivals_max: int = 50_000) -> AsyncIterator[Incoming]:
    bridge = Incoming(daemon if isinstance(daemon, str) else f"127.0.0.1:{daemon.port}", arrivals_max)
    running = asyncio.create_task(bridge.local.run(bridge.foreign.run))
    try:
        yield bridge
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        await bridge.local.close()


@contextlib.asynccontextmanager
async def limited(registry: Path, **limits: int) -> AsyncIterator[InLoop]:
    changed: Limits = replace(DEFAULT, **limits)
    async with InLoop(registry, limits=changed) as daemon:
        yield daemon


async def test_the_daemon_has_the_fold_of_the_keys(daemon: InLoop) -> None:
    async with incoming(daemon) as bridge:
        bridge.put(Place("b", "web", ""))
        bridge.put(Place("b", "web", "1"), meta={"x": "y"}, state="draining", priority=65_500)
        bridge.put(Place("c", "cache", "x" * 63))
        await until(lambda: bridge.local.session)
        assert bridge.actual() == {}  # nothing is known yet
        bridge.foreign.replace(bridge.records)
        await until(lambda: bridge.actual() == bridge.wanted())
        assert len(bridge.actual()) == 3
        bridge.put(Place("b", "web", ""), port=81)  # another address
        bridge.put(Place("b", "web", "1"))  # other labels, state and priority
        bridge.delete(Place("c", "cache", "x" * 63))
        await until(lambda: bridge.actual() == bridge.wanted())
    peer = await daemon.peer()
    async with asyncio.timeout(WAIT_S):
        while (await peer.ask(cmd="list"))["instances"]:  # all ended with their connection
            await asyncio.sleep(0)


@pytest.mark.parametrize("seed", range(4))
async def test_a_random_history(daemon: InLoop, seed: int) -> None:
    rng = random.Random(seed)
    places = [Place(m, name, instance) for m in "bc" for name in ("web", "db") for instance in ("", "1", "2")]
    peer = await daemon.peer()
    async with incoming(daemon) as bridge:
        bridge.foreign.replace({})
        for _ in range(150):
            place = rng.choice(places)
            name, instance = arrival_key(place)
            match rng.randrange(9):
                case 0 | 1 | 2 | 3:
                    bridge.put(place, rng.randrange(1, 4), meta=rng.choice([{}, {"x": "1"}]))
                case 4:
                    bridge.delete(place)
                case 5:
                    await peer.ask(cmd="deregister", name=name, instance=instance)
                case 6:
                    await peer.ask(cmd="update", name=name, instance=instance, meta={"y": "2"})
                case 7:
                    bridge.foreign.withdraw()
                    await asyncio.sleep(0)
                    bridge.foreign.replace(bridge.records)
                case 8 if bridge.local.session is not None:
                    rng.choice(bridge.local.session._connections).abort("cut by the test")
            if rng.random() < 0.3:
                await asyncio.sleep(0.002)
        await until(lambda: bridge.actual() == bridge.wanted() and bridge.local.session)
        assert bridge.local.session is not None
        listed = await bridge.local.session.list_all()
        assert bridge.foreign.unregistered(listed) == set()
        assert bridge.local.differences(listed) == set()
        assert bridge.foreign.differences(bridge.records) == set()


async def register(peer: Peer, port: int, **fields: Any) -> dict[str, Any]:
    return await peer.ask(cmd="register", name="web", instance="b", port=port, **fields)


@pytest.mark.parametrize("fields", [{}, {"hold": True}])
async def test_a_local_registration_is_never_touched(daemon: InLoop, fields: dict[str, Any]) -> None:
    service = await daemon.peer()
    async with incoming(daemon) as bridge:
        bridge.foreign.replace({})
        await until(lambda: bridge.local.session)
        local = await register(service, 1, **fields)
        bridge.put(Place("b", "web", ""))
        bridge.put(Place("b", "other", ""))
        await until(lambda: ("other", "b") in bridge.actual())
        assert bridge.foreign.shadowed == {("web", "b")}
        assert (await service.ask(cmd="resolve", name="web"))["rev"] == local["rev"]
        await service.ask(cmd="deregister", name="web", instance="b")
        await until(lambda: ("web", "b") in bridge.actual())
        assert bridge.foreign.shadowed == set()
        # It takes the name from what came in, and keeps it.
        assert (await register(service, 2, **fields))["replaced"]
        bridge.put(Place("b", "web", ""), port=81)
        bridge.put(Place("b", "other", ""), port=81)
        await until(lambda: bridge.actual().get(("other", "b"), {}).get("port") == 81)
        assert (await service.ask(cmd="resolve", name="web"))["port"] == 2
        bridge.delete(Place("b", "web", ""))
        await until(lambda: not bridge.foreign.shadowed)
        assert (await service.ask(cmd="resolve", name="web"))["port"] == 2


async def test_a_local_registration_at_the_very_address(daemon: InLoop) -> None:
    service = await daemon.peer()
    async with incoming(daemon) as bridge:
        bridge.put(Place("b", "web", ""))
        bridge.foreign.replace(bridge.records)
        await until(lambda: ("web", "b") in bridge.actual())
        await register(service, 80, host="10.0.0.7", hold=True)
        await until(lambda: bridge.local.session and ("web", "b") not in bridge.local.session.held)
        owners = (await service.ask(cmd="why", name="web"))["instances"][0]["owners"]
        assert len(owners) == 1
        await service.close()
        await until(lambda: ("web", "b") in bridge.actual())


async def test_a_local_registration_that_comes_at_the_same_time(
    daemon: InLoop, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = await daemon.peer()
    register_arrival = Session.register

    async def register_late(session: Session, key: Key, fields: Any, if_rev: int) -> int:
        if not bridge.foreign.refused and key == ("web", "b"):
            await service.ask(cmd="register", name="web", instance="b", port=1)
        return await register_arrival(session, key, fields, if_rev)

    monkeypatch.setattr(Session, "register", register_late)
    async with incoming(daemon) as bridge:
        bridge.foreign.replace({})
        await until(lambda: bridge.local.session)
        bridge.put(Place("b", "web", ""))
        await until(lambda: bridge.foreign.shadowed == {("web", "b")})
        assert (await service.ask(cmd="resolve", name="web"))["port"] == 1


async def test_a_local_registration_that_comes_between_two_requests(
    daemon: InLoop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What to do is decided for many instances at once, and may be outdated when it is done."""
    service = await daemon.peer()
    deregister = Session.deregister

    async def deregister_and_wait(session: Session, key: Key, if_rev: int) -> int:
        rev = await deregister(session, key, if_rev)
        await register(service, 1)  # static, so that nobody would defend it
        await until(lambda: ("web", "b") in bridge.local.instances)
        return rev

    async with incoming(daemon) as bridge:
        bridge.put(Place("b", "old", ""))
        bridge.foreign.replace(bridge.records)
        await until(lambda: ("old", "b") in bridge.actual())
        monkeypatch.setattr(Session, "deregister", deregister_and_wait)
        bridge.delete(Place("b", "old", ""))
        bridge.put(Place("b", "web", ""))
        await until(lambda: bridge.foreign.shadowed == {("web", "b")})
        assert (await service.ask(cmd="resolve", name="web"))["port"] == 1


async def test_a_lost_event_that_comes_late(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It comes on another connection than the watch's, which may show the end and the next registration first."""
    late: list[Any] = []
    on_lost = Session.on_lost
    monkeypatch.setattr(Session, "on_lost", lambda *event: late.append(event))
    async with limited(tmp_path / "registry.json", held_max=2) as daemon, incoming(daemon) as bridge:
        for instance in "12":
            bridge.put(Place("b", "web", instance))
        bridge.foreign.replace(bridge.records)
        await until(lambda: bridge.actual() == bridge.wanted())
        session = bridge.local.session
        assert session is not None
        other, key = sorted(
            session.held, key=lambda key: session._connections.index(session.held[key].connection)
        )
        requests = bridge.foreign.requests
        await (await daemon.peer()).ask(cmd="deregister", name="web", instance=key[1])
        await until(lambda: late and bridge.foreign.requests > requests and bridge.actual() == bridge.wanted())
        on_lost(*late[0])
        assert key in session.held
        # The first connection has room again. Nevertheless the one that holds the instance is asked.
        bridge.delete(Place("b", "web", other[1].partition(".")[2]))
        await until(lambda: bridge.actual() == bridge.wanted())
        bridge.put(Place("b", "web", key[1].partition(".")[2]), port=81)
        await until(lambda: bridge.actual() == bridge.wanted())


@pytest.mark.parametrize("instance", ["", "c", "b-1", "bb"])
async def test_copied_labels_are_no_other_machine(daemon: InLoop, instance: str) -> None:
    """A proxy registers the labels of the service behind it. It has no process, as in a container."""
    service = await daemon.peer()
    copied = {"regd.machine": "b"}
    local = await service.ask(cmd="register", name="web", instance=instance, port=1, hold=True, meta=copied)
    async with incoming(daemon) as bridge:
        bridge.put(Place("b", "web", ""))
        bridge.foreign.replace(bridge.records)
        await until(lambda: ("web", "b") in bridge.actual())
        bridge.delete(Place("b", "web", ""))
        await until(lambda: ("web", "b") not in bridge.actual())
        assert (await service.ask(cmd="resolve", name="web"))["rev"] == local["rev"]


async def test_the_bridge_registers_itself_again(daemon: InLoop) -> None:
    service = await daemon.peer()
    async with incoming(daemon) as bridge:
        await until(lambda: ("regd.bridge", "") in bridge.local.instances)
        session, first = bridge.local.session, bridge.local.instances["regd.bridge", ""]
        await service.ask(cmd="deregister", name="regd.bridge")
        await until(lambda: bridge.local.instances.get(("regd.bridge", ""), first)["rev"] > first["rev"])
        assert bridge.local.session is session


async def test_what_is_held_is_claimed_after_a_restart_of_the_daemon(tmp_path: Path) -> None:
    unix, registry = tmp_path / "regd.sock", tmp_path / "registry.json"
    async with incoming(f"unix://{unix}") as bridge:
        bridge.put(Place("b", "web", ""))
        bridge.foreign.replace(bridge.records)
        async with InLoop(registry, unix=unix):
            await until(lambda: bridge.actual() == bridge.wanted())
        await until(lambda: bridge.local.session is None)
        async with InLoop(registry, unix=unix, epoch="another") as daemon:
            await until(lambda: bridge.local.session and bridge.local.session.held)
            daemon.clock.advance(31)  # the end of the time to claim
            bridge.put(Place("b", "mark", ""))
            await until(lambda: ("mark", "b") in bridge.actual())
            assert bridge.actual() == bridge.wanted()


async def test_many_instances_over_several_connections(tmp_path: Path) -> None:
    async with limited(tmp_path / "registry.json", held_max=10) as daemon, incoming(daemon) as bridge:
        for number in range(35):
            bridge.put(Place("b", "web", str(number)))
        bridge.foreign.replace(bridge.records)
        await until(lambda: bridge.actual() == bridge.wanted())
        assert bridge.local.session is not None
        assert len(bridge.local.session._connections) == 4  # the first one holds the bridge itself
        for number in range(35):
            bridge.put(Place("b", "web", str(number)), port=81)
        await until(lambda: bridge.actual() == bridge.wanted())
        for number in range(30):
            bridge.delete(Place("b", "web", str(number)))
        for number in range(30):
            bridge.put(Place("c", "web", str(number)))
        await until(lambda: bridge.actual() == bridge.wanted())
        assert len(bridge.local.session._connections) == 4
        # When one breaks, all begin again.
        bridge.local.session._connections[2].abort("cut by the test")
        await until(lambda: bridge.local.session is None)
        await until(lambda: bridge.local.session and bridge.actual() == bridge.wanted())


async def test_more_than_can_be_registered(daemon: InLoop, caplog: pytest.LogCaptureFixture) -> None:
    async with incoming(daemon, arrivals_max=5) as bridge:
        bridge.foreign.replace({})
        for number in range(4):
            bridge.put(Place("c", "web", str(number)))
            bridge.put(Place("d", "web", str(number)))
        machines = ["c"] * 4 + ["d"]
        await until(lambda: [fields["meta"]["regd.machine"] for fields in in_order(bridge)] == machines)
        bridge.put(Place("b", "web", "0"))  # an earlier machine takes the place of a later one
        bridge.put(Place("d", "web", "3"), port=81)
        await until(lambda: [fields["meta"]["regd.machine"] for fields in in_order(bridge)] == ["b"] + ["c"] * 4)
        bridge.delete(Place("b", "web", "0"))
        bridge.delete(Place("c", "web", "1"))
        bridge.delete(Place("c", "web", "2"))
        machines = ["c", "c", "d", "d", "d"]
        await until(lambda: [fields["meta"]["regd.machine"] for fields in in_order(bridge)] == machines)
        bridge.delete(Place("c", "web", "0"))
        await until(lambda: bridge.actual() == bridge.wanted())
        assert bridge.foreign.machines() == {"c": 1, "d": 4}
    assert caplog.text.count("instances too many") == 1


@pytest.mark.parametrize("seed", range(20))
def test_the_first_ones_are_chosen(seed: int) -> None:
    rng = random.Random(seed)
    places = [Place(machine, "web", str(number)) for machine in "bcd" for number in range(4)]
    bridge = Incoming("127.0.0.1:1", 5)
    for _ in range(300):
        place = rng.choice(places)
        if rng.random() < 0.5:
            bridge.put(place, rng.randrange(1, 4))
        else:
            bridge.delete(place)
        if rng.random() < 0.3:
            bridge.foreign._choose()
            present = sorted(Place(*key.decode().removeprefix(PREFIX).split("/")) for key in bridge.records)
            assert list(map(arrival_key, present[:5])) == sorted(bridge.foreign._wanted)
            wanted = bridge.wanted()
            assert all(wanted[key] == fields for key, fields in bridge.foreign._wanted.items())


def test_instances_that_are_left_out_cost_nothing() -> None:
    bridge = Incoming("127.0.0.1:1", 5)
    for number in range(6):
        bridge.put(Place("b", "web", str(number)))
    bridge.foreign._choose()
    bridge.put(Place("b", "web", "5"), port=81)
    bridge.put(Place("z", "web", ""))
    bridge.put(Place("b", "web", "4"), port=81)
    bridge.delete(Place("z", "web", ""))
    assert not bridge.foreign._must_choose


def in_order(bridge: Incoming) -> list[dict[str, Any]]:
    return [fields for _, fields in sorted(bridge.actual().items(), key=lambda item: item[0][1])]


async def test_a_daemon_that_refuses(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async with limited(tmp_path / "registry.json", registrations_max=3) as daemon, incoming(daemon) as bridge:
        for number in range(6):
            bridge.put(Place("b", "web", str(number)))
        bridge.foreign.replace(bridge.records)
        await until(lambda: len(bridge.foreign.refused) == 4)
        assert len(bridge.actual()) == 2
        for number in range(6):
            bridge.delete(Place("b", "web", str(number)))
        await until(lambda: not bridge.foreign.refused and not bridge.actual())
    assert caplog.text.count("the daemon refuses") == 1


async def test_refused_instances_are_tried_in_turn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("regd.bridge.foreign._REFUSED_S", 1_000)  # the test tries again by hand
    monkeypatch.setattr("regd.bridge.foreign._REFUSED_MAX", 2)
    asked: list[Key] = []
    register_arrival = Session.register

    async def note(session: Session, key: Key, fields: Any, if_rev: int) -> int:
        asked.append(key)
        return await register_arrival(session, key, fields, if_rev)

    monkeypatch.setattr(Session, "register", note)
    async with limited(tmp_path / "registry.json", registrations_max=2) as daemon, incoming(daemon) as bridge:
        for number in range(5):
            bridge.put(Place("b", "web", str(number)))
        bridge.foreign.replace(bridge.records)
        await until(lambda: len(bridge.foreign.refused) == 4)
        refused = list(bridge.foreign.refused)
        for expected in (refused[:2], refused[2:], refused[:2]):
            asked.clear()
            bridge.foreign._try_refused()
            await until(lambda: asked and not bridge.foreign._dirty and not bridge.foreign._in_progress)
            assert asked == expected
        # There is room again.
        for _, instance in list(bridge.actual()):
            bridge.delete(Place("b", "web", instance.partition(".")[2]))
        await until(lambda: not bridge.actual())
        bridge.foreign._try_refused()
        await until(lambda: list(bridge.actual()) == refused[2:3])


async def test_no_further_connection(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What does not fit on the connections that the daemon accepts is refused; the rest stays."""
    monkeypatch.setattr("regd.bridge.foreign._REFUSED_S", 0.01)
    limits = {"held_max": 10, "connections_max": 1}
    async with limited(tmp_path / "registry.json", **limits) as daemon, incoming(daemon) as bridge:
        for number in range(15):
            bridge.put(Place("b", "web", str(number)))
        bridge.foreign.replace(bridge.records)
        await until(lambda: len(bridge.foreign.refused) == 6 and len(bridge.actual()) == 9)
        assert all("cannot open another connection" in why for why in bridge.foreign.refused.values())
        session = bridge.local.session
        for _, instance in list(bridge.actual())[:5]:
            bridge.delete(Place("b", "web", instance.partition(".")[2]))
        await until(lambda: len(bridge.foreign.refused) == 1 and len(bridge.actual()) == 9)
        assert bridge.local.session is session


async def test_an_etcd_that_was_restored(daemon: InLoop) -> None:
    """Its revisions come again, with other values."""
    async with incoming(daemon) as bridge:
        bridge.put(Place("b", "web", ""))
        bridge.foreign.replace(bridge.records)
        await until(lambda: bridge.actual() == bridge.wanted())
        [(key, record)] = bridge.records.items()
        bridge.records[key] = record._replace(value=record.value.replace(b"80", b"81"))
        assert bridge.foreign.differences(bridge.records)
        bridge.foreign.replace(bridge.records)
        await until(lambda: bridge.actual() == bridge.wanted())


def test_a_snapshot_is_looked_at_whole() -> None:
    """Where the daemon's history does not reach back: an instance may have only another revision."""
    changes: list[Key | None] = []
    local = Local("127.0.0.1:1", {"port": 9}, changes.append)
    instance = {"watch": 1, "name": "web", "instance": "", "host": "10.0.0.7", "port": 1, "meta": {},
                "state": "ready", "registered_at": 1.0}  # fmt: skip
    local._watch.begin(None)
    local._watch.take({"ok": True, "watch": 1, "epoch": "e", "rev": 1})
    local._watch.take({"event": "up", "rev": 1, **instance})
    assert changes == []
    local._watch.take({"event": "sync", "watch": 1, "rev": 1})
    assert local.is_complete
    changes.clear()
    local._watch.take({"event": "reset", "watch": 1, "rev": 5})
    local._watch.take({"event": "up", "rev": 5, **instance})
    local._watch.take({"event": "sync", "watch": 1, "rev": 5})
    assert changes == [None]


async def test_nothing_is_applied_twice(daemon: InLoop) -> None:
    async with incoming(daemon) as bridge:
        bridge.put(Place("b", "web", ""))
        bridge.foreign.replace(bridge.records)
        await until(lambda: bridge.actual() == bridge.wanted())
        requests = bridge.foreign.requests
        bridge.foreign.replace(bridge.records)
        old = KeyEvent(key_of(PREFIX, Place("b", "web", "")), bridge.revision - 1, None)
        bridge.foreign.apply(old)
        bridge.put(Place("b", "mark", ""))
        await until(lambda: bridge.actual() == bridge.wanted())
        assert bridge.foreign.requests == requests + 1


async def test_a_key_that_no_longer_parses_is_withdrawn(daemon: InLoop, caplog: pytest.LogCaptureFixture) -> None:
    async with incoming(daemon) as bridge:
        bridge.put(Place("b", "web", ""))
        bridge.foreign.replace(bridge.records)
        await until(lambda: bridge.actual())
        for _ in range(3):
            bridge.put(Place("b", "web", ""), host="127.0.0.1")
        await until(lambda: not bridge.actual())
        bridge.foreign.replace(bridge.records)
        assert list(bridge.foreign.ignored.values()) == ["host 127.0.0.1 is not an address of another machine"]
        bridge.put(Place("b", "web", ""))
        await until(lambda: bridge.actual() == bridge.wanted())
        assert bridge.foreign.ignored == {}
    assert caplog.text.count("ignored the key '/regd/v1/default/b/web/' in etcd: host 127.0.0.1 is not") == 1


async def test_two_bridges_at_one_daemon(daemon: InLoop) -> None:
    async with incoming(daemon) as bridge:
        await until(lambda: bridge.local.session)
        second = Incoming(f"127.0.0.1:{daemon.port}", 10)
        second.local._own["port"] = 10
        with pytest.raises(LocalRefusal, match="another bridge serves the daemon"):
            await second.local.run(second.foreign.run)
        await second.local.close()
