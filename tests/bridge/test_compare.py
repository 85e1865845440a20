"""The comparison of everything finds what the bridge has missed, and repairs it."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import pytest

from regd.bridge.bridge import Bridge, Options
from regd.bridge.etcd.errors import EtcdRefused
from regd.bridge.etcd.model import Snapshot
from regd.bridge.local import Session
from regd_client.errors import Unavailable
from tests.support.daemon import InLoop
from tests.support.etcd import EtcdCluster
from tests.support.polling import until

PREFIX = b"/regd/v1/default/"
KEY = "/regd/v1/default/b/web/"
VALUE = '{"host":"10.0.0.9","port":80}'


@contextlib.asynccontextmanager
async def running(daemon: InLoop, etcd: EtcdCluster, **options: Any) -> AsyncIterator[Bridge]:
    bridge = Bridge(Options(tuple(etcd.addresses), "a", address=f"127.0.0.1:{daemon.port}", **options))
    task = asyncio.create_task(bridge.run(lambda line: None))
    try:
        await until(lambda: bridge._local.session and bridge._publisher.is_active and bridge._foreign.is_current)
        yield bridge
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def test_nothing_to_repair(daemon: InLoop, etcd: EtcdCluster) -> None:
    peer = await daemon.peer()
    await peer.ask(cmd="register", name="db", host="10.0.0.7", port=1)
    await asyncio.to_thread(etcd.ctl, "put", KEY, VALUE)
    async with running(daemon, etcd) as bridge:
        await until(lambda: bridge._publisher.count == 1 and ("web", "b") in bridge._local.instances)
        assert await bridge.compare() == 0
        assert bridge.status()["counts"]["comparisons"] == 1


async def test_what_was_missed_is_repaired(
    daemon: InLoop, etcd: EtcdCluster, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("regd.bridge.bridge._SURE_S", 0.1)
    peer = await daemon.peer()
    await peer.ask(cmd="register", name="db", host="10.0.0.7", port=1)
    async with running(daemon, etcd) as bridge:
        await until(lambda: bridge._publisher.count == 1)
        # A lost event: another machine's key.
        with monkeypatch.context() as patch:
            patch.setattr(bridge._foreign, "apply", lambda event: None)
            await asyncio.to_thread(etcd.ctl, "put", KEY, VALUE)
            await bridge._catch_up()
        assert await bridge.compare() == 1
        await until(lambda: ("web", "b") in bridge._local.instances)
        assert await bridge.compare() == 0
        # A lost event: the end of this machine's own key.
        with monkeypatch.context() as patch:
            patch.setattr(bridge._publisher, "seen", lambda event: None)
            await asyncio.to_thread(etcd.ctl, "del", "/regd/v1/default/a/db/")
            await bridge._catch_up()
        assert await bridge.compare() > 0
        await until(lambda: "db" in etcd.ctl("get", "--prefix", "/regd/v1/default/a/", "--keys-only"))
        assert await bridge.compare() == 0
        # A change of the daemon that was not looked at.
        with monkeypatch.context() as patch:
            patch.setattr(bridge._local, "_on_change", lambda key: None)
            await peer.ask(cmd="register", name="late", host="10.0.0.7", port=1)
            await until(lambda: ("late", "") in bridge._local.instances)
        assert await bridge.compare() > 0
        await until(lambda: bridge._publisher.count == 2)
        assert await bridge.compare() == 0
    assert caplog.text.count("differences between what is and what should be") == 3


async def test_no_comparison_while_something_is_away(
    daemon: InLoop, etcd: EtcdCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running(daemon, etcd) as bridge:
        list_all = Session.list_all

        async def list_and_break(session: Session) -> Any:
            listed = await list_all(session)
            session._connections[0].abort("cut by the test")
            await until(lambda: bridge._local.session not in (None, session))
            return listed

        with monkeypatch.context() as patch:  # it comes back before the end
            patch.setattr(Session, "list_all", list_and_break)
            with pytest.raises(Unavailable):
                await bridge.compare()
        bridge._foreign.withdraw()
        with pytest.raises(Unavailable):
            await bridge.compare()
        assert bridge.status()["counts"]["comparisons"] == 0


async def test_status_as_soon_as_etcd_is_lost(
    daemon: InLoop, etcd: EtcdCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It agrees with the log, and does not wait until etcd has been silent for some time."""
    async with running(daemon, etcd) as bridge:
        monkeypatch.setattr("regd.bridge.bridge.TTL_S", 1_000)
        assert bridge.status()["etcd"]["connected"]
        for member in etcd.members:
            member.kill()
        await until(lambda: not bridge.status()["etcd"]["connected"])
        status = bridge.status()
        assert status["etcd"]["failure"]
        assert status["foreign"]["stale_s"] == status["etcd"]["silent_s"] > 0


async def test_an_etcd_that_refuses_to_be_read(
    daemon: InLoop, etcd: EtcdCluster, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It answers, but nobody knows any longer what the other machines have."""
    monkeypatch.setattr("regd.bridge.bridge._REFUSED_S", 0.1)
    await asyncio.to_thread(etcd.ctl, "put", KEY, VALUE)
    async with running(daemon, etcd, stale_s=1.0) as bridge:
        await until(lambda: ("web", "b") in bridge._local.instances)

        read = bridge._etcd.read

        async def refuse(prefix: bytes) -> Snapshot:
            if prefix == PREFIX:
                raise EtcdRefused("permission denied")
            return await read(prefix)

        with monkeypatch.context() as patch:
            patch.setattr(bridge._etcd, "read", refuse)
            bridge._must_read.set()
            await until(lambda: bridge.status()["etcd"]["refuses"] and bridge.status()["foreign"]["stale_s"])
            await until(lambda: ("web", "b") not in bridge._local.instances)
            assert bridge.status()["foreign"]["stale_s"] > 1
        await until(lambda: ("web", "b") in bridge._local.instances)
        assert bridge.status()["foreign"]["stale_s"] == 0
    assert caplog.text.count("etcd refuses to be read for 1 s: other machines' instances are withdrawn") == 1


async def test_an_etcd_that_was_restored(daemon: InLoop, etcd: EtcdCluster) -> None:
    """Its revisions are lower than those that were seen, and it has the lease, but not the last changes."""
    peer = await daemon.peer()
    await peer.ask(cmd="register", name="db", host="10.0.0.7", port=1)
    async with running(daemon, etcd) as bridge:
        await until(lambda: bridge._publisher.count == 1)
        await bridge._catch_up()
        commits = bridge._publisher.commits
        bridge._take(Snapshot(1, {}))
        await until(lambda: bridge._publisher.commits > commits)
