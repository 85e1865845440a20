"""Keys of this machine, with a daemon in the test's loop and an etcd of one dictionary."""

import asyncio
import contextlib
import json
import os
import random
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from regd.bridge import records
from regd.bridge.claim import Claim, ClaimRefusal
from regd.bridge.etcd.errors import EtcdConflict, EtcdUnavailable, LeaseNotFound
from regd.bridge.etcd.model import Delete, KeyEvent, Put, Snapshot
from regd.bridge.local import Local, Session
from regd.bridge.publish import Publisher
from regd.bridge.reachability import _connect
from regd.system.processes import start_ticks
from tests.support.daemon import InLoop
from tests.support.fake_etcd import FakeEtcd
from tests.support.polling import until

PREFIX = "/regd/v1/default/"
CLAIM = records.claim_key(PREFIX, "a")


class Outgoing:
    """The outgoing half of a bridge."""

    def __init__(self, daemon: InLoop | str, advertise: str | None, etcd: FakeEtcd) -> None:
        address = daemon if isinstance(daemon, str) else f"127.0.0.1:{daemon.port}"
        self.local = Local(address, {"port": 9}, lambda key: self.publisher.changed(key))
        self.publisher = Publisher(PREFIX, "a", advertise, self.local)
        self.etcd = etcd
        etcd.on_event = self.publisher.seen
        self.claim = Claim(PREFIX, "a")

    async def publish(self, lease: int = 1) -> None:
        await self.publisher.run(self.etcd.as_etcd(), lease, self.claim)

    def actual(self) -> dict[str, dict[str, Any]]:
        return {
            key.decode().removeprefix(f"{PREFIX}a/"): json.loads(record.value)
            for key, record in self.etcd.records.items()
            if key != CLAIM
        }

    def wanted(self) -> dict[str, dict[str, Any]]:
        """Return what should be there, if all that is registered can be reached."""
        return {
            f"{name}/{instance}": {
                **{field: fields[field] for field in ("host", "port", "meta", "state", "rev")},
                "priority": fields.get("priority", 0),
                "epoch": self.local.epoch,
            }
            for (name, instance), fields in self.local.instances.items()
            if name != "regd.bridge"
        }


async def idle(session: Session) -> None:
    await asyncio.Event().wait()


@contextlib.asynccontextmanager
async def outgoing(
    daemon: InLoop | str, advertise: str | None = None, etcd: FakeEtcd | None = None
) -> AsyncIterator[Outgoing]:
    bridge = Outgoing(daemon, advertise, etcd or FakeEtcd())
    tasks = [asyncio.create_task(bridge.local.run(idle)), asyncio.create_task(bridge.publish())]
    try:
        yield bridge
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await bridge.publisher.close()
        await bridge.local.close()


async def test_the_keys_are_the_instances(daemon: InLoop) -> None:
    peer = await daemon.peer()
    await peer.ask(cmd="register", name="early", host="10.0.0.7", port=1)
    async with outgoing(daemon) as bridge:
        await until(lambda: bridge.actual() == bridge.wanted() != {})
        await peer.ask(
            cmd="register", name="web", host="10.0.0.7", port=1, hold=True, meta={"x": "1"}, priority=3
        )
        await peer.ask(cmd="register", name="web", instance="1", host="10.0.0.7", port=1, state="starting")
        await until(lambda: len(bridge.actual()) == 3 and bridge.actual() == bridge.wanted())
        await peer.ask(cmd="update", name="web", state="draining")
        await peer.ask(cmd="deregister", name="early")
        await until(lambda: len(bridge.actual()) == 2 and bridge.actual() == bridge.wanted())
        commits = bridge.etcd.commits
        await peer.ask(cmd="update", name="web", state="ready")
        await until(lambda: bridge.actual()["web/"]["state"] == "ready")
        assert bridge.etcd.commits == commits + 1  # a change is one round trip
        assert all(record.lease == 1 for record in bridge.etcd.records.values())
        assert bridge.publisher.differences(own(bridge)) == set()


def own(bridge: Outgoing) -> dict[bytes, Any]:
    return {key: record for key, record in bridge.etcd.records.items() if key != CLAIM}


@pytest.mark.parametrize("seed", range(4))
async def test_a_random_history(daemon: InLoop, seed: int) -> None:
    rng = random.Random(seed)
    peer = await daemon.peer()
    errors = (EtcdUnavailable("no answer"), EtcdConflict("changed"))
    async with outgoing(daemon) as bridge:
        await until(lambda: bridge.publisher.is_active)
        for _ in range(100):
            name, key = rng.choice("xyz"), f"{PREFIX}a/{rng.choice('xyz')}/".encode()
            match rng.randrange(10):
                case 0 | 1 | 2 | 3 | 4:
                    await peer.ask(cmd="register", name=name, host="10.0.0.7", port=rng.randrange(1, 4))
                case 5:
                    await peer.ask(cmd="deregister", name=name)
                case 6:
                    bridge.etcd.apply([Delete(key)])
                case 7:
                    bridge.etcd.apply([Put(key, b"[]"), Put(key + b"/junk", b"1")])
                case 8:
                    bridge.etcd.trouble.append((rng.choice(errors), rng.random() < 0.5))
                case 9 if bridge.local.session is not None:
                    bridge.local.session._connections[0].abort("cut by the test")
            if rng.random() < 0.3:
                await asyncio.sleep(0.002)
        await until(lambda: bridge.actual() == bridge.wanted() and bridge.local.session)
        assert bridge.publisher.differences(own(bridge)) == set()


async def test_a_late_write_has_no_effect(daemon: InLoop) -> None:
    """After an unclear commit the claim is made again, so that the commit fails if it comes later."""
    peer = await daemon.peer()
    async with outgoing(daemon) as bridge:
        await until(lambda: bridge.publisher.is_active)
        before = bridge.etcd.revision_of(CLAIM)
        bridge.etcd.trouble.append((EtcdUnavailable("no answer"), False))
        await peer.ask(cmd="register", name="web", host="10.0.0.7", port=1)
        await until(lambda: bridge.actual() == bridge.wanted() != {})
        assert bridge.etcd.revision_of(CLAIM) > before
        with pytest.raises(EtcdConflict):
            await bridge.etcd.commit([Delete(f"{PREFIX}a/web/".encode())], only_if={CLAIM: before})


async def test_a_claim_that_was_deleted_is_made_again(daemon: InLoop) -> None:
    """Also while there is nothing to publish: else a second bridge could take the name."""
    async with outgoing(daemon) as bridge:
        await until(lambda: bridge.publisher.is_active)
        bridge.etcd.apply([Delete(CLAIM)])
        await until(lambda: CLAIM in bridge.etcd.records)


async def test_a_late_event_of_an_earlier_claim(daemon: InLoop) -> None:
    """A watch that lags may show the end of an earlier claim after this bridge has made its own."""
    async with outgoing(daemon) as bridge:
        await until(lambda: bridge.publisher.is_active)
        claim = bridge.etcd.records[CLAIM]
        bridge.publisher.seen(KeyEvent(CLAIM, claim.mod_revision - 1, None))
        await (await daemon.peer()).ask(cmd="register", name="web", host="192.0.2.1", port=80)
        await until(lambda: f"{PREFIX}a/web/".encode() in bridge.etcd.records)
        assert bridge.etcd.records[CLAIM] == claim


async def test_another_lease(daemon: InLoop) -> None:
    """Keys of an ended lease, or of a bridge that has ended, get the new lease."""
    peer = await daemon.peer()
    await peer.ask(cmd="register", name="web", host="10.0.0.7", port=1)
    async with outgoing(daemon) as bridge:
        await until(lambda: bridge.actual() == bridge.wanted() != {})
        second = asyncio.create_task(bridge.publish(2))
        await until(lambda: all(record.lease == 2 for record in bridge.etcd.records.values()))
        second.cancel()
        await asyncio.gather(second, return_exceptions=True)


async def test_a_lease_that_has_ended_is_reported(daemon: InLoop) -> None:
    etcd = FakeEtcd()
    bridge = Outgoing(daemon, None, etcd)
    running = asyncio.create_task(bridge.local.run(idle))
    publishing = asyncio.create_task(bridge.publish())
    await until(lambda: bridge.publisher.is_active and bridge.local.session)
    etcd.trouble.append((LeaseNotFound("the lease has ended"), False))
    await (await daemon.peer()).ask(cmd="register", name="web", host="10.0.0.7", port=1)
    with pytest.raises(LeaseNotFound):
        await publishing
    assert not bridge.publisher.is_active
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    await bridge.local.close()


async def test_nothing_is_published_while_withdrawn(daemon: InLoop) -> None:
    peer = await daemon.peer()
    await peer.ask(cmd="register", name="web", host="10.0.0.7", port=1)
    async with outgoing(daemon) as bridge:
        await until(lambda: bridge.actual() == bridge.wanted() != {})
        assert bridge.publisher.withdraw(True)
        assert not bridge.publisher.withdraw(True)
        await until(lambda: bridge.actual() == {})
        assert bridge.publisher.withdraw(False)
        await until(lambda: bridge.actual() == bridge.wanted() != {})


async def test_nothing_is_withdrawn_before_the_daemon_is_known(daemon: InLoop) -> None:
    """The keys of a bridge that was killed stay until its successor knows what is registered."""
    etcd = FakeEtcd()
    key = f"{PREFIX}a/web/".encode()
    etcd.apply([Put(key, b"{}", 1)])
    bridge = Outgoing(daemon, None, etcd)
    publishing = asyncio.create_task(bridge.publish())
    await until(lambda: bridge.publisher.is_active)
    for _ in range(50):
        await asyncio.sleep(0)
    assert key in etcd.records
    running = asyncio.create_task(bridge.local.run(idle))
    await until(lambda: key not in etcd.records)
    for task in (publishing, running):
        task.cancel()
    await asyncio.gather(publishing, running, return_exceptions=True)
    await bridge.local.close()


async def test_a_commit_under_way_is_no_difference(daemon: InLoop) -> None:
    """It may take long, at a member of etcd that is frozen, while the comparison uses another one."""
    peer = await daemon.peer()
    async with outgoing(daemon) as bridge:
        await until(lambda: bridge.publisher.is_active and bridge.local.session)
        bridge.etcd.flowing.clear()
        await peer.ask(cmd="register", name="web", host="10.0.0.7", port=1)
        await until(lambda: bridge.etcd.waiting)
        assert bridge.publisher.differences(own(bridge)) == set()
        bridge.etcd.trouble.append((EtcdUnavailable("no answer"), False))
        bridge.etcd.flowing.set()
        await until(lambda: not bridge.publisher.is_active)
        assert bridge.publisher.differences(own(bridge)) == set()
        await until(lambda: bridge.actual() == bridge.wanted() != {})
        assert bridge.publisher.differences(own(bridge)) == set()


async def test_a_comparison_disturbs_no_commit(daemon: InLoop) -> None:
    peer = await daemon.peer()
    async with outgoing(daemon) as bridge:
        await until(lambda: bridge.publisher.is_active and bridge.local.session)
        bridge.etcd.flowing.clear()
        await peer.ask(cmd="register", name="web", host="10.0.0.7", port=1)
        await until(lambda: bridge.etcd.waiting)
        marking = asyncio.create_task(bridge.publisher.mark())
        for _ in range(50):
            await asyncio.sleep(0)
        bridge.etcd.flowing.set()
        assert await marking == bridge.etcd.revision_of(CLAIM)
        await until(lambda: bridge.actual() == bridge.wanted() != {})
        assert bridge.etcd.conflicts == 0


async def test_a_change_by_another_hand_before_it_is_active(daemon: InLoop) -> None:
    """The watch shows it before the answer to the read, which does not have it yet."""
    peer = await daemon.peer()
    await peer.ask(cmd="register", name="web", host="10.0.0.7", port=1)
    async with outgoing(daemon) as bridge:
        await until(lambda: bridge.actual() == bridge.wanted() != {})
        read, key = bridge.etcd.read, f"{PREFIX}a/web/".encode()
        is_deleted = asyncio.Event()

        async def read_slowly(prefix: bytes) -> Snapshot:
            snapshot = await read(prefix)
            if not is_deleted.is_set():
                bridge.etcd.apply([Delete(key)])
                is_deleted.set()
            return snapshot

        bridge.etcd.read = read_slowly  # type: ignore[method-assign]
        bridge.etcd.trouble.append((EtcdUnavailable("no answer"), True))
        await peer.ask(cmd="register", name="db", host="10.0.0.7", port=1)
        await is_deleted.wait()
        await until(lambda: bridge.actual() == bridge.wanted())


async def test_a_host_with_several_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    server = socket.create_server(("127.0.0.6", 0))
    port = server.getsockname()[1]
    addresses: list[Any] = []

    async def look_up(*_: Any, **__: Any) -> list[Any]:
        return [(socket.AF_INET, socket.SOCK_STREAM, 0, "", (address, port)) for address in addresses]

    monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", look_up)
    for addresses[:], why in (
        (["127.0.0.5"], "connection refused"), (["127.0.0.5", "127.0.0.6"], ""), (["127.0.0.6", "127.0.0.5"], ""),
    ):  # fmt: skip
        assert await _connect("several", port) == why
    server.close()


async def test_reachability(daemon: InLoop) -> None:
    peer = await daemon.peer()
    accepted = 0

    def accept(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal accepted
        accepted += 1
        writer.close()

    server = await asyncio.start_server(accept, "127.0.0.5", 0)
    port = server.sockets[0].getsockname()[1]
    async with outgoing(daemon, "127.0.0.5") as bridge:
        await peer.ask(cmd="register", name="web", port=port)
        await peer.ask(cmd="register", name="web", instance="2", port=port, host="localhost")
        await until(lambda: len(bridge.actual()) == 2)
        assert {fields["host"] for fields in bridge.actual().values()} == {"127.0.0.5"}
        assert bridge.publisher.reasons == {}
        # Again whenever it changes. As it no longer listens, it is withdrawn, and tried with back-off.
        server.close()
        await peer.ask(cmd="update", name="web", meta={"x": "1"})
        await until(lambda: bridge.actual() == {})
        assert list(bridge.publisher.reasons.values()) == [
            f"it accepts no connection at 127.0.0.5:{port}: connection refused"
        ] * 2  # fmt: skip
        server = await asyncio.start_server(accept, "127.0.0.5", port)
        await until(lambda: len(bridge.actual()) == 2)
        # Another port is another question.
        await peer.ask(cmd="register", name="web", port=1)
        await until(lambda: len(bridge.actual()) == 1)
        await peer.ask(cmd="deregister", name="web")
        await until(lambda: bridge.publisher.reasons == {})
        await peer.ask(cmd="deregister", name="web", instance="2")
        await until(lambda: bridge.actual() == {})
        assert bridge.publisher._reachability is not None
        assert bridge.publisher._reachability._ports == {}
    assert accepted >= 3
    server.close()


async def test_what_an_earlier_bridge_has_published_stays(daemon: InLoop) -> None:
    """The successor of a killed bridge withdraws a service only after its own probe has failed."""
    peer = await daemon.peer()
    probes = 0

    def accept(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal probes
        probes += 1
        writer.close()

    server = await asyncio.start_server(accept, "127.0.0.5", 0)
    await peer.ask(cmd="register", name="web", port=server.sockets[0].getsockname()[1])
    key, etcd = f"{PREFIX}a/web/".encode(), FakeEtcd()
    async with outgoing(daemon, "127.0.0.5", etcd):
        await until(lambda: key in etcd.records)
    revision = etcd.revision_of(key)
    etcd.apply([Delete(CLAIM)])
    async with outgoing(daemon, "127.0.0.5", etcd):
        await until(lambda: probes == 2)
    assert etcd.revision_of(key) == revision
    # It is withdrawn if it no longer listens, or has another port there.
    server.close()
    etcd.apply([Delete(CLAIM)])
    async with outgoing(daemon, "127.0.0.5", etcd):
        await until(lambda: key not in etcd.records)
    etcd.apply([Delete(CLAIM), Put(key, b'{"host":"127.0.0.5","port":1}', 1)])
    commits = etcd.commits
    async with outgoing(daemon, "127.0.0.5", etcd):
        await until(lambda: key not in etcd.records)
    assert etcd.commits == commits + 1  # it was not published at its port first


async def test_another_epoch(tmp_path: Path) -> None:
    """After a restart of the daemon the values have its new epoch; the keys stay meanwhile."""
    unix, registry = tmp_path / "regd.sock", tmp_path / "registry.json"
    async with outgoing(f"unix://{unix}") as bridge:
        async with InLoop(registry, unix=unix) as daemon:
            await (await daemon.peer()).ask(cmd="register", name="web", host="10.0.0.7", port=1)
            await until(lambda: bridge.actual() == bridge.wanted() != {})
        await until(lambda: bridge.local.session is None)
        assert len(bridge.actual()) == 1
        async with InLoop(registry, unix=unix, epoch="another"):
            await until(lambda: bridge.actual()["web/"]["epoch"] == "another")
            assert bridge.actual() == bridge.wanted()


# The claim.


async def test_a_claim_of_another_bridge_is_refused() -> None:
    etcd = FakeEtcd()
    holder = {"host": "elsewhere\x1b", "pid": 7, "boot": "x", "pid_namespace": "y", "started": "1", "id": "z"}
    for value in (json.dumps(holder).encode(), b"junk", b"[]"):
        etcd.apply([Put(CLAIM, value, 5)])
        with pytest.raises(ClaimRefusal, match="has the machine name 'a'") as caught:
            await Claim(PREFIX, "a").make(etcd.as_etcd(), 1)
        assert not caught.value.may_end


@pytest.fixture
def child() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        yield process


async def test_a_claim_of_a_zombie_is_taken_over(child: subprocess.Popen[bytes]) -> None:
    etcd = FakeEtcd()
    claim = Claim(PREFIX, "a")
    holder = {**claim._own, "id": "x", "pid": child.pid, "started": start_ticks(child.pid)}
    etcd.apply([Put(CLAIM, json.dumps(holder).encode(), 5)])
    with pytest.raises(ClaimRefusal):
        await claim.make(etcd.as_etcd(), 1)
    child.kill()
    await asyncio.to_thread(os.waitid, os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert await claim.make(etcd.as_etcd(), 1) == etcd.revision_of(CLAIM)


async def test_a_claim_of_a_process_that_has_ended_is_taken_over() -> None:
    etcd = FakeEtcd()
    claim = Claim(PREFIX, "a")
    for change in ({"id": "x", "pid": 2**22 + 1}, {"id": "x", "started": "1"}, {}):
        etcd.apply([Put(CLAIM, json.dumps({**claim._own, **change}).encode(), 5)])
        assert await claim.make(etcd.as_etcd(), 1) == etcd.revision_of(CLAIM)
        assert etcd.records[CLAIM].lease == 1
    # One that lives is not.
    etcd.apply([Put(CLAIM, json.dumps({**claim._own, "id": "x"}).encode(), 5)])
    with pytest.raises(ClaimRefusal):
        await claim.make(etcd.as_etcd(), 1)
    # This machine was restarted since.
    etcd.apply([Put(CLAIM, json.dumps({**claim._own, "id": "x", "boot": "earlier"}).encode(), 5)])
    with pytest.raises(ClaimRefusal) as caught:
        await claim.make(etcd.as_etcd(), 1)
    assert caught.value.may_end
