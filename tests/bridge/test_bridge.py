"""Two machines with real daemons, bridges and etcd: what crosses, and what happens at the start and at the end."""

import asyncio
import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from regd.cli import bridge as bridge_command
from regd.cli import commands
from regd_client import NotFound
from tests.support.certificates import Authority
from tests.support.daemon import WAIT_S, environment
from tests.support.etcd import EtcdCluster, cluster
from tests.support.machines import BridgeProcess, Machine, listener, until_agreed
from tests.support.polling import block_until, until

Make = Callable[..., Machine]


async def gone(machine: Machine, name: str) -> bool:
    async with machine.client() as client:
        try:
            await client.resolve(name)
        except NotFound:
            return True
        return False


async def until_gone(machine: Machine, name: str) -> None:
    async with asyncio.timeout(WAIT_S):
        while not await gone(machine, name):
            await asyncio.sleep(0.01)


async def test_a_service_on_another_machine(make_machine: Make) -> None:
    a, b = make_machine(), make_machine()
    a.start()
    b.start()
    async with a.client() as client, b.client() as other, listener(a.advertise) as port:
        async with client.register("web", port, meta={"zone": "x"}, priority=7) as registration:
            endpoint = await other.resolve("web", wait=WAIT_S)
            assert (endpoint.instance, endpoint.host, endpoint.port) == ("a", a.advertise, port)
            assert endpoint.meta == {"zone": "x", "regd.machine": "a"}
            assert endpoint.priority == 107
            await registration.update({"zone": "y"}, state="draining")
            await until_gone(b, "web")
            await registration.update(state="ready")
            assert (await other.resolve("web", wait=WAIT_S)).meta == {"zone": "y", "regd.machine": "a"}
            await until_agreed([a, b])
            # A local instance is preferred, whatever its priority is below 100.
            async with other.register("web", 1, priority=99):
                assert (await other.resolve("web")).port == 1
                assert (await other.resolve("web", meta={"regd.machine": "a"})).port == port
            assert (await other.resolve("web")).port == port
        await until_gone(b, "web")
    await until_agreed([a, b])


@pytest.mark.long
async def test_start_without_daemon_and_etcd(make_machine: Make, etcd: EtcdCluster) -> None:
    a, b = make_machine(), make_machine()
    b.start()
    [member] = etcd.members
    member.kill()
    a.bridge.start()
    a.daemon.start()
    async with a.client() as client, listener(a.advertise) as port, client.register("web", port):
        etcd.start()
        async with b.client() as other:
            await other.resolve("web", wait=WAIT_S)
        await until_agreed([a, b])
    log = a.bridge.text()
    assert log.count("no member of etcd answers") == log.count("etcd answers again") == 1, log
    assert log.count("the daemon at") == 1, log
    assert log.count("connected to the daemon") == 1, log


async def test_the_end_withdraws_everything_at_once(make_machine: Make, etcd: EtcdCluster) -> None:
    a, b = make_machine(), make_machine()
    a.start()
    b.start()
    async with a.client() as client, b.client() as other, listener(a.advertise) as port:
        await client.register("web", port)
        await other.register("far", 9, host="10.0.0.9")
        await other.resolve("web", wait=WAIT_S)
        await client.resolve("far", wait=WAIT_S)
        began = asyncio.get_running_loop().time()
        assert a.bridge.end(signal.SIGTERM) == 0
        await until_gone(a, "far")
        await until_gone(b, "web")
        assert asyncio.get_running_loop().time() - began < 8  # the lease would take 10 s
    assert etcd.ctl("get", "--prefix", "/regd/v1/default/a/") == ""


def test_end_before_anything_is_there(tmp_path: Path) -> None:
    for number in (signal.SIGTERM, signal.SIGINT):
        bridge = BridgeProcess(tmp_path / "log", "--etcd", "127.0.0.1:1", "--machine", "a", address="127.0.0.1:1")
        bridge.start()
        assert bridge.end(number) == 0


@pytest.mark.parametrize(
    "frozen",
    [
        pytest.param("etcd", marks=pytest.mark.long), pytest.param("daemon", marks=pytest.mark.long),
        "etcd and daemon",
    ],
)  # fmt: skip
def test_end_while_something_is_frozen(make_machine: Make, etcd: EtcdCluster, frozen: str) -> None:
    a = make_machine()
    a.start()
    block_until(lambda: a.bridge.status()["etcd"]["lease"] and a.bridge.status()["daemon"]["connected"])
    assert a.daemon.process is not None
    try:
        if "etcd" in frozen:
            etcd.members[0].freeze()
        if "daemon" in frozen:
            a.daemon.process.send_signal(signal.SIGSTOP)
        began = time.monotonic()
        assert a.bridge.end(signal.SIGTERM) == 0
        assert time.monotonic() - began < 20  # 2 s for etcd, and 1 s for the daemon
    finally:
        etcd.members[0].thaw()
        a.daemon.process.send_signal(signal.SIGCONT)


@pytest.mark.parametrize("step", [pytest.param(step, marks=pytest.mark.long) for step in range(12)])
def test_end_at_any_moment(make_machine: Make, etcd: EtcdCluster, step: int) -> None:
    a = make_machine()
    a.daemon.start()
    etcd.ctl("put", "/regd/v1/default/z/web/", '{"host":"10.0.0.9","port":81}')
    a.bridge.launch()
    time.sleep(0.1 * step)  # the moment is what is tested
    status = a.bridge.end(signal.SIGTERM)
    assert status in (0, -signal.SIGTERM)  # the latter before it listens to signals
    assert "Traceback" not in a.bridge.text()
    block_until(lambda: asyncio.run(a.instances()) == {})  # the bridge waits for the daemon for a second only
    if status == 0:
        assert etcd.ctl("get", "--prefix", "/regd/v1/default/a/") == ""


def why(status: dict[str, Any], name: str) -> str:
    """Return why a service is not published; "" if it is, or is not known yet."""
    return "".join(entry["why"] for entry in status["not_published"] if entry["name"] == name)


async def test_what_is_not_published_and_why(make_machine: Make) -> None:
    a, b = make_machine(), make_machine()
    a.start()
    b.start()
    async with a.client() as client, listener("127.0.0.1") as port, listener(a.advertise) as other_port:
        await client.register("here", port, static=True)
        await client.register("secret", 1, host="10.0.0.7", meta={"regd.publish": "no"}, static=True)
        await client.register("full", 1, host="10.0.0.7", meta={str(n): "" for n in range(64)}, static=True)
        await client.register("fine", other_port, static=True)
        await client.register("starting", 1, host="10.0.0.7", state="starting", static=True)
        async with b.client() as other:
            assert (await other.resolve("fine", wait=WAIT_S)).host == a.advertise
        await a.bridge.until(
            lambda status: len(status["not_published"]) == 3 and "refused" in why(status, "here")
        )
        reasons = {entry["name"]: entry["why"] for entry in a.bridge.status()["not_published"]}
        assert "regd.publish=no" in reasons["secret"]
        assert "no room for regd.machine" in reasons["full"]
        assert reasons["here"] == f"it accepts no connection at {a.advertise}:{port}: connection refused"
        await a.bridge.until(lambda status: status["published"] == 2)
        await b.bridge.until(lambda status: status["foreign"]["count"] == 2)
        assert {name for name, _ in await b.instances()} <= {"fine", "starting"}
        # It is tried again, with back-off, and published once it listens there.
        async with listener(a.advertise, port):
            await a.bridge.until(lambda status: status["published"] == 3)
        # A change makes the bridge look again: it no longer listens there.
        await client.update("here", {"x": "1"})
        await a.bridge.until(lambda status: status["published"] == 2)


async def test_without_an_address_for_others(etcd: EtcdCluster, tmp_path: Path) -> None:
    with Machine("a", tmp_path / "a", "10.0.0.1", etcd.addresses) as a:
        a.bridge = BridgeProcess(
            tmp_path / "log", "--etcd", etcd.addresses[0], "--machine", "a", address=a.address
        )
        a.start()
        try:
            async with a.client() as client:
                await client.register("web", 80, static=True)
                await client.register("far", 80, host="10.0.0.7", static=True)
            await a.bridge.until(lambda status: status["published"] == 1 and status["not_published"])
            [entry] = a.bridge.status()["not_published"]
            assert (entry["name"], "--advertise" in entry["why"]) == ("web", True)
        finally:
            a.bridge.end(signal.SIGKILL)


async def test_a_machine_name_that_is_taken(make_machine: Make) -> None:
    a, again = make_machine(name="a"), make_machine(name="a")
    a.start()
    block_until(lambda: a.bridge.status()["etcd"]["lease"])
    again.daemon.start()
    again.bridge.launch()
    assert again.bridge.wait() == 4
    assert "has the machine name 'a'" in again.bridge.text()
    # A bridge that was killed does not keep the name from its successor.
    a.bridge.end(signal.SIGKILL)
    a.bridge.start()
    async with a.client() as client:
        await client.register("far", 80, host="10.0.0.7", static=True)
    block_until(lambda: a.bridge.status()["published"] == 1)


@pytest.mark.long
def test_text_of_strangers_in_the_status(make_machine: Make, etcd: EtcdCluster) -> None:
    a = make_machine()
    hostile = "\x1b[2J\u202e\n\t\r"
    etcd.ctl("put", "/regd/v1/default/z/.bridge", json.dumps({"host": hostile, "pid": hostile}))
    a.start()
    block_until(lambda: a.bridge.status()["peers"])
    shown = regctl(a, "bridge", "--status")
    assert shown.stdout.splitlines()[-1].startswith("z\t\\x1b[2J")
    assert shown.stdout.replace("\n", "").replace("\t", "").isprintable()
    assert "\x1b" not in regctl(a, "bridge", "--status", "--json").stdout + a.bridge.metrics() + a.bridge.text()
    # Such a claim keeps a bridge from starting, with one line.
    a.bridge.end()
    etcd.ctl("put", "/regd/v1/default/a/.bridge", json.dumps({"host": hostile + "x" * 10_000, "pid": [hostile]}))
    a.bridge.launch()
    assert a.bridge.wait() == 4
    last = a.bridge.text().splitlines()[-1]
    assert "has the machine name 'a'" in last
    assert last.isprintable()
    assert len(last) < 500


def test_the_machine_is_the_host_name(monkeypatch: pytest.MonkeyPatch) -> None:
    read = commands.read(["bridge", "--etcd", "127.0.0.1:1"])
    monkeypatch.setattr("socket.gethostname", lambda: "Node-7.example.org")
    assert bridge_command._options(None, read).machine == "node-7"
    monkeypatch.setattr("socket.gethostname", lambda: "a-name-of-more-than-20-characters")
    with pytest.raises(bridge_command.CannotStart, match="the host name is no such name"):
        bridge_command._options(None, read)


@pytest.mark.long
async def test_a_bridge_that_was_killed(make_machine: Make, etcd: EtcdCluster) -> None:
    """Others' instances end at once. Its own stay: the next bridge takes them over before the lease ends."""
    a, b = make_machine(), make_machine()
    a.start()
    b.start()
    kinds: list[str] = []

    async def watch() -> None:
        async with b.client() as watching:
            async for event in watching.watch("far"):
                kinds.append(event.kind)  # noqa: PERF401 - the test reads them meanwhile

    async with a.client() as client, b.client() as other:
        await client.register("far", 80, host="10.0.0.7", static=True)
        await other.register("near", 80, host="10.0.0.8", static=True)
        await until_agreed([a, b])
        watcher = asyncio.create_task(watch())
        await until(lambda: "sync" in kinds)
        a.bridge.end(signal.SIGKILL)
        await until_gone(a, "near")
        a.bridge.start()
        await a.bridge.until(lambda status: status["etcd"]["lease"] and status["published"] == 1)
        await until_agreed([a, b])
        lease = a.bridge.status()["etcd"]["lease"]

        def leases() -> set[str]:
            reply = json.loads(etcd.ctl("get", "--prefix", "/regd/v1/default/a/", "-w", "json"))
            return {f"{item['lease']:x}" for item in reply["kvs"]}

        await until(lambda: leases() == {lease})
        watcher.cancel()
        await asyncio.gather(watcher, return_exceptions=True)
    assert "down" not in kinds


@pytest.mark.long
def test_two_bridges_start_with_one_machine_name(make_machine: Make) -> None:
    both = [make_machine(name="a"), make_machine(name="a")]
    for machine in both:
        machine.daemon.start()
    for machine in both:
        machine.bridge.launch()
    block_until(lambda: any("has the machine name" in machine.bridge.text() for machine in both))
    loser, winner = sorted(
        both, key=lambda machine: "has the machine name" in machine.bridge.text(), reverse=True
    )
    assert loser.bridge.wait() == 4
    assert winner.bridge.end(signal.SIGTERM) == 0


@pytest.mark.long
def test_a_second_bridge_at_one_daemon(make_machine: Make, etcd: EtcdCluster, tmp_path: Path) -> None:
    a = make_machine()
    a.start()
    block_until(lambda: a.bridge.status()["daemon"]["connected"])
    second = BridgeProcess(tmp_path / "log", "--etcd", etcd.addresses[0], "--machine", "z", address=a.address)
    second.launch()
    assert second.wait() == 4
    assert "another bridge serves the daemon" in second.text()
    assert "force" not in second.text()


async def test_a_local_instance_of_the_same_name_wins(make_machine: Make) -> None:
    a, b = make_machine(), make_machine()
    a.start()
    b.start()
    async with a.client() as client, b.client() as other, client.register("web", 80, host="10.0.0.7"):
        await other.resolve("web", instance="a", wait=WAIT_S)
        async with other.register("web", 81, host="10.0.0.8", instance="a"):
            assert (await other.resolve("web", instance="a")).port == 81
            await b.bridge.until(lambda status: status["foreign"]["shadowed"] == 1)
            await client.update("web", {"x": "1"})
            await client.resolve("web", instance="b.a", wait=WAIT_S)  # it is published itself
            assert (await other.resolve("web", instance="a")).port == 81
        await until_agreed([a, b])
        endpoint = await other.resolve("web", instance="a")
        assert (endpoint.port, endpoint.meta["x"]) == (80, "1")
    await until_agreed([a, b])


@pytest.mark.long
async def test_a_quiet_etcd_is_not_away(make_machine: Make) -> None:
    """With less time than between two refreshes of the lease, which is 3.3 s."""
    a = make_machine("--stale-s", "2")
    a.start()
    await a.bridge.until(lambda status: status["etcd"]["lease"])
    began = a.bridge.status()["etcd"]["lease_remaining_s"]
    refreshed = [began]
    while len(refreshed) < 3:  # until it was refreshed twice
        await asyncio.sleep(0.05)
        remaining = a.bridge.status()["etcd"]["lease_remaining_s"]
        if remaining > refreshed[-1]:
            refreshed.append(remaining)
        refreshed[-1] = remaining
    assert "etcd is away" not in a.bridge.text()


@pytest.mark.long
async def test_etcd_that_has_lost_its_data(make_machine: Make, etcd: EtcdCluster) -> None:
    """Its revisions begin again: everything is published again, and later changes are seen."""
    a, b = make_machine(), make_machine()
    a.start()
    b.start()
    async with a.client() as client, b.client() as other:
        for number in range(10):
            await client.register("web", 80, host="10.0.0.7", meta={"n": str(number)}, static=True)
        await other.register("db", 81, host="10.0.0.8", static=True)
        await until_agreed([a, b])
        [member] = etcd.members
        member.kill()
        shutil.rmtree(member.data)
        etcd.start()
        await client.register("late", 80, host="10.0.0.7", static=True)
        await other.deregister("db")
        await other.resolve("late", wait=4 * WAIT_S)
        await until_agreed([a, b])
        key = "/regd/v1/default/a/web/"
        etcd.ctl("del", key)
        await until(lambda: etcd.ctl("get", key))
    await until_agreed([a, b])


@pytest.mark.long
async def test_what_another_hand_does(make_machine: Make, etcd: EtcdCluster) -> None:
    a, b = make_machine(), make_machine()
    a.start()
    b.start()
    async with a.client() as client, b.client() as other:
        await client.register("web", 80, host="10.0.0.7", static=True)
        await other.resolve("web", wait=WAIT_S)
        key = "/regd/v1/default/a/web/"
        # To keys of a machine whose bridge runs: repaired.
        etcd.ctl("del", key)
        etcd.ctl("del", "/regd/v1/default/a/.bridge")
        etcd.ctl("put", "/regd/v1/default/a/nonsense/1", "{}")
        etcd.ctl("put", "/regd/v1/default/a/nonsense", "{}")
        await until(lambda: etcd.ctl("get", "--prefix", "/regd/v1/default/a/", "--keys-only").split() == [
            "/regd/v1/default/a/.bridge", key
        ])  # fmt: skip
        # To the daemon: repaired.
        await other.deregister("web", "a")
        await other.resolve("web", wait=WAIT_S)
        await other.update("web", {"regd.machine": "a", "x": "1"}, instance="a")
        await until_agreed([a, b])
        await other.update("web", {"x": "1"}, instance="a")
        await until_agreed([a, b])
        # Under the name of a machine that has no bridge: taken, or ignored with one line each.
        etcd.ctl("put", "/regd/v1/default/z/web/", '{"host":"10.0.0.9","port":81}')
        assert (await other.resolve("web", instance="z", wait=WAIT_S)).port == 81
        for value in ("x", '{"host":"\\u001b[2J","port":81}', '{"host":"10.0.0.9","port":0}'):
            etcd.ctl("put", "/regd/v1/default/z/web/", value)
        etcd.ctl("put", "/regd/v1/default/z/\x1b[2Jweb/", "{}")
        await until_gone_instance(b, "z")
        await b.bridge.until(lambda status: status["foreign"]["ignored"] == 2)
        etcd.ctl("del", "--prefix", "/regd/v1/default/z/")
        await b.bridge.until(lambda status: status["foreign"]["ignored"] == 0)
    await until_agreed([a, b])
    log = b.bridge.text()
    assert log.count("ignored the key") == 6
    assert "\x1b" not in log
    assert a.bridge.status()["counts"]["differences"] == 0


async def until_gone_instance(machine: Machine, instance: str) -> None:
    async with asyncio.timeout(WAIT_S):
        while any(key[1] == instance for key in await machine.instances()):
            await asyncio.sleep(0.01)


async def test_status_and_metrics(make_machine: Make) -> None:
    a, b = make_machine(), make_machine()
    a.start()
    b.start()
    async with a.client() as client, b.client() as other:
        await client.register("web", 80, host="10.0.0.7", static=True)
        await client.register("here", 1, static=True)
        await other.resolve("web", wait=WAIT_S)
        own = await other.resolve("regd.bridge")
        assert own.meta["metrics"] == "/metrics"
        assert b.bridge.url == f"http://127.0.0.1:{own.port}/metrics"
    await a.bridge.until(
        lambda status: "refused" in why(status, "here") and status["published"] and status["peers"]
    )
    metrics = a.bridge.metrics()
    for line in ("regd_bridge_etcd_up 1.0", "regd_bridge_published 1.0", "regd_bridge_not_published 1.0",
                 'regd_bridge_peer_instances{machine="b"} 0.0', "regd_bridge_differences_total 0.0"):  # fmt: skip
        assert line in metrics
    shown = regctl(a, "bridge", "--status")
    assert shown.returncode == 0
    assert "machine a, prefix /regd/v1/default/, address 127.0.0.2" in shown.stdout
    assert "  here: it accepts no connection at 127.0.0.2:1: connection refused" in shown.stdout
    as_json = json.loads(regctl(a, "bridge", "--status", "--json").stdout)
    assert (as_json["ok"], as_json["published"]) == (True, 1)
    listed = [line.split("\t") for line in regctl(b, "list").stdout.splitlines()]
    assert [(row[0], row[1], row[-2], row[-1]) for row in listed] == [
        ("regd.bridge", "-", "0", "-"), ("web", "a", "100", "a")
    ]  # fmt: skip
    assert "regd.machine" not in regctl(a, "list").stdout
    assert len(regctl(a, "list").stdout.splitlines()[0].split("\t")) == 5
    examined = json.loads(regctl(a, "doctor", "--json").stdout)["findings"]
    [found] = [finding for finding in examined if finding["check"] == "bridge"]
    assert (found["ok"], found["found"].startswith("machine a: 1 published, ")) == (True, True)
    a.bridge.end()
    nothing = regctl(a, "bridge", "--status")
    assert (nothing.returncode, nothing.stdout) == (1, "")
    assert "no bridge is registered" in nothing.stderr


def regctl(machine: Machine, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "regd.cli.regctl", *words], env=environment(REGD_ADDRESS=machine.address),
        capture_output=True, text=True, timeout=WAIT_S, check=False,
    )  # fmt: skip


@pytest.mark.long
async def test_tls(tmp_path: Path) -> None:
    authority = Authority(tmp_path / "authority")
    own, tls = authority.issue("server"), authority.issue("a")
    options = (
        "--client-cert-auth", "--trusted-ca-file", str(own.cacert), "--cert-file", str(own.cert),
        "--key-file", str(own.key),
    )  # fmt: skip
    flags = ("--cacert", str(tls.cacert), "--cert", str(tls.cert), "--key", str(tls.key))
    with (
        cluster(tmp_path, options=options, scheme="https") as etcd,
        Machine("a", tmp_path / "a", "127.0.0.2", etcd.addresses, *flags) as a,
        Machine("b", tmp_path / "b", "127.0.0.3", etcd.addresses, *flags[:2]) as b,
    ):
        a.start()
        async with a.client() as client:
            await client.register("far", 80, host="10.0.0.7", static=True)
        await a.bridge.until(lambda status: status["published"] == 1)
        b.start()  # without a certificate of its own
        block_until(lambda: "no member of etcd answers" in b.bridge.text())
        status = b.bridge.status()["etcd"]
        assert (status["lease"], status["failure"][:15]) == (None, "cannot connect ")
        assert f"s: {status['failure'][:15]}" in regctl(b, "bridge", "--status").stdout
        assert a.bridge.status()["etcd"]["failure"] == ""


@pytest.mark.parametrize("module", ["google", "grpc", "prometheus_client"])
def test_missing_extra(module: str, tmp_path: Path) -> None:
    bridge = BridgeProcess(
        tmp_path / "log", "--etcd", "127.0.0.1:1", address="127.0.0.1:1", hide=f"sys.modules[{module!r}] = None"
    )
    bridge.launch()
    assert bridge.wait() == 2
    assert "regd[etcd]" in bridge.text()
    assert bridge.text().count("\n") == 1


@pytest.mark.sample(4)
@pytest.mark.parametrize(
    "flags",
    [
        (), ("--etcd", "x"), ("--etcd", "127.0.0.1:1,"), ("--etcd", "http://127.0.0.1:1"), ("--etcd", "h:1", "--machine", "A"),
        ("--etcd", "h:1", "--machine", ""), ("--etcd", "h:1", "--prefix", "x"), ("--etcd", "h:1", "--prefix", "/"), ("--etcd", "h:1", "--advertise", ""),
        ("--etcd", "h:1", "--advertise", "0.0.0.0"), ("--etcd", "h:1", "--advertise", "fe80::1%eth0"),
        ("--etcd", "h:1", "--user", "u"), ("--etcd", "h:1", "--cert", "c"), ("--etcd", "h:1", "--stale-s", "0"),
    ],
)  # fmt: skip
def test_usage(flags: tuple[str, ...], tmp_path: Path) -> None:
    bridge = BridgeProcess(tmp_path / "log", *flags, address="127.0.0.1:1")
    bridge.launch()
    assert bridge.wait() == 2
    assert bridge.text().count("\n") == 1
    if flags and flags[-2] not in ("--user", "--cert"):  # there something is missing
        assert repr(flags[-1]) in bridge.text()


@pytest.mark.parametrize("option", ["--cacert", "--password-file"])
def test_a_file_that_cannot_be_read(option: str, tmp_path: Path) -> None:
    flags: Any = ("--user", "u") if option == "--password-file" else ()
    bridge = BridgeProcess(
        tmp_path / "log", "--etcd", "h:1", option, str(tmp_path / "none"), *flags, address="127.0.0.1:1"
    )
    bridge.launch()
    assert bridge.wait() == 4
    assert f"name another file with {option}" in bridge.text()


def test_an_empty_password(tmp_path: Path) -> None:
    (tmp_path / "password").write_text("\nsecret\n")
    flags = ("--etcd", "h:1", "--user", "u", "--password-file", str(tmp_path / "password"))
    bridge = BridgeProcess(tmp_path / "log", *flags, address="127.0.0.1:1")
    bridge.launch()
    assert bridge.wait() == 4
    assert "password is empty; write the password there" in bridge.text()


def test_the_daemon_and_the_client_import_nothing_of_the_extra() -> None:
    names = "google grpc prometheus_client"
    code = (
        "import sys, regd_client, regd.cli.handlers, regd.cli.commands, regd.cli.bridge, regd.server.daemon; "
        f"assert not set({names!r}.split()) & set(sys.modules); assert 'regd.bridge' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], env=environment(), check=True, timeout=WAIT_S)
