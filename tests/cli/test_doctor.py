"""`regctl doctor` finds each problem and says what to do. Most of the problems are real, not simulated."""

import asyncio
import contextlib
import errno
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from regd.cli import doctor, doctor_files, local_probe
from regd.cli.doctor import examine
from regd.cli.findings import Finding
from regd.core.limits import DEFAULT
from regd.core.model import Change, Entry, Op, Reason, State
from regd.storage import journal_lines
from regd.storage.files import Files
from regd.storage.recovery import Recovery
from regd_client import protocol
from regd_client.blocking import BlockingConnection
from tests.support.daemon import WAIT_S, DaemonProcess, InLoop, environment
from tests.support.http_service import HttpHandler, http_service
from tests.support.peers import FakeCredentials
from tests.support.ports import free_port


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hide other daemons of this machine."""
    monkeypatch.delenv("REGD_ADDRESS", raising=False)
    monkeypatch.setattr(protocol, "DEFAULT_ADDRESS", "tcp://127.0.0.1:1")
    monkeypatch.setattr(local_probe, "daemons", lambda: iter(()))
    monkeypatch.setattr(doctor, "ANSWER_S", 10 * WAIT_S)  # a tenth of this time for other daemons
    monkeypatch.setattr(doctor_files, "PAUSE_S", 0.02)


def wrong(address: str) -> dict[str, Finding]:
    return {finding.check: finding for finding in examine(address) if not finding.ok}


async def wrong_of(daemon: InLoop) -> dict[str, Finding]:
    async with asyncio.timeout(2 * WAIT_S):
        return await asyncio.to_thread(wrong, f"127.0.0.1:{daemon.port}")


def test_all_checks_pass(process: DaemonProcess) -> None:
    with BlockingConnection(process.addresses[0]) as peer, socket.create_server(("127.0.0.1", 0)) as server:
        peer.ask("register", name="web", port=server.getsockname()[1])
        found = [
            finding for finding in examine(process.addresses[0]) if finding.check != "lag"
        ]  # of a busy machine
        assert [finding.check for finding in found] == ["address", "daemon", "elsewhere", "rights", "version", "host", "file", "limits", "services"]  # fmt: skip
        assert all(finding.ok for finding in found), found
        assert found[0].found == f"{process.addresses[0]}, from --address"
        assert f"{process.registry} and its journal are up to date, at revision 1" in found[6].found
        assert peer.ask("stats")["commits"] == 1  # `doctor` has changed nothing


def test_doctor_command_prints_lines_or_json(process: DaemonProcess, tmp_path: Path) -> None:
    def ran(*arguments: str, address: str) -> tuple[int, str, str]:
        done = subprocess.run(
            [sys.executable, "-m", "regd.cli.regctl", "doctor", *arguments],
            env=environment(REGD_ADDRESS=address), capture_output=True, text=True, timeout=30, check=False,
        )  # fmt: skip
        return done.returncode, done.stdout, done.stderr

    status, out, errors = ran(address=f"unix://{tmp_path}/none")
    assert (status, errors) == (1, "")
    assert out.splitlines()[:2] == [
        f"ok     address    unix://{tmp_path}/none, from $REGD_ADDRESS",
        f"wrong  daemon     no program listens at unix://{tmp_path}/none; start one with `regd`, or name another address",
    ]
    status, out, errors = ran("--json", address=process.addresses[0])
    said = json.loads(out)
    assert errors == ""
    assert said["ok"] is (status == 0) is all(finding["ok"] for finding in said["findings"])
    assert set(said["findings"][0]) == {"check", "ok", "found", "do"}
    assert said["findings"][1]["check"] == "daemon"
    assert said["findings"][1]["ok"]


# The address, and the program that listens there.


@pytest.mark.parametrize("address", ["nonsense", "unix://relative", "127.0.0.1:0"])
def test_malformed_address(address: str) -> None:
    assert set(wrong(address)) == {"address"}


def test_source_of_the_address(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert next(examine(None)).found.endswith("from the default")
    monkeypatch.setenv("REGD_ADDRESS", f"unix://{tmp_path}/none")
    assert next(examine(None)).found.endswith("from $REGD_ADDRESS")
    assert next(examine("127.0.0.1:5")).found == "tcp://127.0.0.1:5, from --address"


def test_no_listener() -> None:
    found = wrong(f"127.0.0.1:{free_port()}")["daemon"]
    assert "no program listens" in found.found
    assert "start one with `regd`" in found.do


def test_listener_that_never_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "ANSWER_S", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as server:
        found = wrong(f"127.0.0.1:{server.getsockname()[1]}")["daemon"]
    assert "does not answer within 0.2 s" in found.found
    assert "ss -ltnp" in found.do


def test_web_server_at_the_address() -> None:
    with http_service(HttpHandler) as port:
        found = wrong(f"127.0.0.1:{port}")["daemon"]
    assert "a program other than regd listens" in found.found


async def test_daemon_with_too_many_connections(tmp_path: Path) -> None:
    async with InLoop(tmp_path / "registry.json", limits=replace(DEFAULT, connections_max=1)) as daemon:
        assert (await (await daemon.peer()).ask("ping"))["ok"]
        assert "accepts no connection" in (await wrong_of(daemon))["daemon"].found


def test_another_daemon_is_found(process: DaemonProcess, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with DaemonProcess(tmp_path / "other" / "registry.json") as other:
        other.start()
        monkeypatch.setenv("REGD_ADDRESS", other.addresses[0])
        found = wrong(process.addresses[0])["elsewhere"]
        with BlockingConnection(other.addresses[0]) as peer:
            epoch = peer.ask("hello")["epoch"]
        assert (
            found.found
            == f"another regd answers at {other.addresses[0]}: registry {other.registry}, epoch {epoch}"
        )
        assert f"REGD_ADDRESS={other.addresses[0]}" in found.do
        found = wrong(f"127.0.0.1:{free_port()}")["elsewhere"]  # no daemon at the address, but one elsewhere
        assert found.do == f"set REGD_ADDRESS={other.addresses[0]} everywhere"


def test_daemon_with_two_addresses_is_counted_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with DaemonProcess(tmp_path / "registry.json", "--unix", f"{tmp_path}/socket") as daemon:
        daemon.start()
        monkeypatch.setenv("REGD_ADDRESS", f"unix://{tmp_path}/socket")
        assert "elsewhere" not in wrong(daemon.addresses[0])


@pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="no /proc on this system")
@pytest.mark.parametrize(
    "how", ["-m regd", "-P -m regd", "-X dev -Pm regd", "-Wignore -mregd.cli.regd", "script"]
)
def test_running_daemon_is_found_by_its_command_line(
    how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    script = tmp_path / "regd"
    script.write_text("from regd.cli.regd import main\nraise SystemExit(main())\n")
    program = [str(script)] if how == "script" else how.split()
    flags = ["--port", "0", "--unix=socket", "--registry", f"{tmp_path}/r"]
    with subprocess.Popen(
        [sys.executable, *program, *flags],
        env=environment(), cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
    ) as running:  # fmt: skip
        try:
            assert running.stdout is not None
            assert running.stdout.readline().startswith(b"listening")
            assert f"unix://{tmp_path}/socket" in set(local_probe._from_command_lines())
            assert running.pid in {pid for pid, _ in local_probe.daemons()}
        finally:
            running.kill()


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("regd --port 5 --unix /a", ["127.0.0.1:5", "unix:///a"]),
        ("/usr/bin/regd --port=5", ["127.0.0.1:5"]),
        ("python -m regd --port=5 --log-level info", ["127.0.0.1:5"]),
        ("/v/bin/python3.12 -P -m regd --port 5", ["127.0.0.1:5"]),
        ("python -X dev -W error -I -m regd --port 5", ["127.0.0.1:5"]),
        ("python -Xdev -bbPm regd --port 5", ["127.0.0.1:5"]),
        ("python -PX dev -mregd --port 5", ["127.0.0.1:5"]),
        ("python --check-hash-based-pycs always -m regd.cli.regd --port 5", ["127.0.0.1:5"]),
        ("pypy3 -u /v/bin/regd --port 5", ["127.0.0.1:5"]),
        ("regd --port 0", []),
        ("regd", []),
        ("uv run regd --port 5", None),  # only its child is a daemon
        ("python -m regdoc --port 5", None),
        ("python -c regd --port 5", None),
        ("python -cm regd --port 5", None),
        ("python client.py -m regd --port 5", None),
        ("python -X regd --port 5", None),
        ("python", None),
        ("python -m", None),
        ("python -X", None),
        ("less regd --port 5", None),
        ("", None),
    ],
)
def test_addresses_in_a_command_line(line: str, told: list[str] | None) -> None:
    flags = local_probe._flags(line.split(" "))
    assert (None if flags is None else list(local_probe._addresses_in(flags))) == told


def test_relative_socket_path_is_resolved_in_the_daemons_folder(tmp_path: Path) -> None:
    os.symlink(tmp_path, tmp_path / "cwd")
    assert list(local_probe._addresses_in(["--unix", "s"], f"{tmp_path}/cwd")) == [f"unix://{tmp_path}/s"]
    assert list(local_probe._addresses_in(["--unix", "s"], f"{tmp_path}/gone")) == []


# Another network namespace.


def in_a_network_of_its_own(*command: str) -> list[str]:
    """Return the command line that runs a command in a new network namespace, with unshare(1)."""
    for how in (["unshare", "--net"], ["unshare", "--user", "--map-root-user", "--net"]):
        if (
            shutil.which("unshare")
            and subprocess.run([*how, "true"], capture_output=True, check=False).returncode == 0
        ):
            return [*how, *command]
    pytest.skip("no network namespace can be made here")


@contextlib.contextmanager
def beyond(folder: Path) -> Iterator[int]:
    """Run a daemon in another network namespace, with a socket `s` in the folder; yield its process id."""
    command = in_a_network_of_its_own(
        "sh", "-c", 'ip link set lo up 2>/dev/null; exec "$@"', "sh",
        sys.executable, "-m", "regd", "--port", "7343", "--unix", f"{folder}/s", "--registry", f"{folder}/r.json",
    )  # fmt: skip
    with subprocess.Popen(
        command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as running:
        try:
            assert running.stdout is not None
            line = running.stdout.readline()
            if not line.startswith("listening"):
                pytest.skip(f"no daemon in a network namespace of its own: {running.communicate(timeout=WAIT_S)}")
            yield running.pid
        finally:
            running.kill()


def test_daemon_in_another_network_namespace(
    process: DaemonProcess, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder := tmp_path / "beyond").mkdir()
    with beyond(folder) as pid:
        monkeypatch.setattr(local_probe, "daemons", lambda: iter([(pid, ["--port", "7343"])]))
        assert list(local_probe._from_command_lines()) == []  # its 127.0.0.1:7343 is not ours
        found = wrong(f"127.0.0.1:{free_port()}")["elsewhere"]
        assert found.found.startswith(f"process {pid} is a regd in another network namespace")
        assert "--unix" in found.do
        [found] = [finding for finding in examine(process.addresses[0]) if finding.check == "elsewhere"]
        assert found.ok  # there is a daemon in this network namespace
        assert str(pid) in found.found
        by_socket = {finding.check: finding for finding in examine(f"unix://{folder}/s")}
        assert by_socket["host"].found.startswith(f"the daemon, process {pid}, is in another network namespace")
        assert by_socket["services"].found.startswith("not checked")
        assert by_socket["elsewhere"].found == "no other regd found"


# What a daemon replies.


async def test_user_with_read_access_only(tmp_path: Path) -> None:
    async with InLoop(tmp_path / "registry.json", peers=FakeCredentials()) as daemon:
        found = await wrong_of(daemon)
        assert set(found) == {"rights"}
        do = found["rights"].do
        assert do.index("--unix") < do.index("REGD_ADDRESS") < do.index("--allow-uid")


async def test_check_of_rights_changes_nothing(daemon: InLoop) -> None:
    peer = await daemon.peer()
    await peer.ask(cmd="register", name=doctor._UNUSED_NAME, port=1, host="far.example")  # even if there is one
    assert await wrong_of(daemon) == {}
    assert (await peer.ask(cmd="stats"))["rev"] == 1


async def test_limits_used_to_80_percent(tmp_path: Path) -> None:
    limits = replace(DEFAULT, registrations_max=5, watches_total_max=5)
    async with InLoop(tmp_path / "registry.json", limits=limits) as daemon:
        peer = await daemon.peer()
        for number in range(3):
            await peer.ask(cmd="register", name=f"n{number}", port=5, host="far.example")
        assert "limits" not in await wrong_of(daemon)
        await peer.ask(cmd="register", name="n3", port=5, host="far.example")
        found = (await wrong_of(daemon))["limits"]
        assert found.found == "registrations 4 of 5"
        assert "deregister" in found.do


async def test_lagging_event_loop(daemon: InLoop) -> None:
    daemon.clock.advance(1.0)
    assert "lag" not in await wrong_of(daemon)
    daemon.clock.stop(1.75)
    found = (await wrong_of(daemon))["lag"]
    assert "0.750 s late" in found.found
    assert "top" in found.do


async def test_services_that_accept_no_connection(daemon: InLoop) -> None:
    peer = await daemon.peer()
    with socket.create_server(("127.0.0.1", 0)) as server:
        await peer.ask(cmd="register", name="here", port=server.getsockname()[1])
        await peer.ask(cmd="register", name="gone", port=free_port())
        await peer.ask(cmd="register", name="soon", port=1, state="starting")
        await peer.ask(cmd="register", name="far", port=1, host="far.example")
        found = (await wrong_of(daemon))["services"]
    assert found.found.startswith("1 of 2 services accept no connection: gone (127.0.0.1:")
    assert "regctl deregister" in found.do


# The daemon's files.


async def test_missing_registry_folder(tmp_path: Path) -> None:
    async with InLoop(tmp_path / "folder" / "registry.json") as daemon:
        await (await daemon.peer()).ask(cmd="register", name="db", port=1, host="far.example")
        shutil.rmtree(tmp_path / "folder")
        found = (await wrong_of(daemon))["file"]
        assert found.found == f"the folder {tmp_path}/folder is gone"
        assert "create it again" in found.do


async def registered(daemon: InLoop, *ports: int, checkpoint: bool = True) -> None:
    """Register `db` at each port. With `checkpoint`, wait until registry.json has the changes."""
    peer = await daemon.peer()
    for port in ports:
        await peer.ask(cmd="register", name="db", port=port, host="far.example")
    if checkpoint:
        await asyncio.to_thread(daemon.server._store.checkpoint)
    await peer.close()


async def findings_of(daemon: InLoop, check: str) -> list[Finding]:
    async with asyncio.timeout(2 * WAIT_S):
        findings = await asyncio.to_thread(lambda: list(examine(f"127.0.0.1:{daemon.port}")))
    return [finding for finding in findings if finding.check == check]


async def test_file_that_lags_has_its_changes_in_the_journal(daemon: InLoop) -> None:
    await registered(daemon, 1)
    before = daemon.registry.read_bytes()
    await registered(daemon, 2, checkpoint=False)
    daemon.registry.write_bytes(before)  # older than the daemon, and as regd wrote it
    assert await wrong_of(daemon) == {}
    [found] = await findings_of(daemon, "file")
    assert found.found.endswith("and its journal are up to date, at revision 3")


async def test_file_that_is_not_written_any_more(daemon: InLoop) -> None:
    await registered(daemon, 1)
    before = daemon.registry.read_bytes()
    await registered(daemon, 2)
    daemon.registry.write_bytes(before)
    os.utime(daemon.registry, (1.0, 1.0))
    found = (await wrong_of(daemon))["file"]
    assert found.found == f"{daemon.registry} has not been written for a minute; the journal has later changes"


async def test_missing_files(daemon: InLoop) -> None:
    await registered(daemon, 1)
    journal = daemon.registry.with_suffix(".journal")
    moved = journal.rename(journal.with_name("moved"))
    assert (await wrong_of(daemon))["journal"].found == f"{journal} is gone"
    moved.rename(journal)
    assert await wrong_of(daemon) == {}
    daemon.registry.unlink()
    assert (await wrong_of(daemon))["file"].found == f"{daemon.registry} is gone"


async def test_files_that_lack_changes(daemon: InLoop) -> None:
    await registered(daemon, 1)
    journal = daemon.registry.with_suffix(".journal")
    file, lines = daemon.registry.read_bytes(), journal.read_bytes()
    await registered(daemon, 2)
    daemon.registry.write_bytes(file)
    journal.write_bytes(lines)
    found = (await wrong_of(daemon))["file"]
    assert found.found == f"out of date: {daemon.registry} and its journal have revision 1, regd 3"


async def test_registry_written_by_hand_passes(tmp_path: Path) -> None:
    (path := tmp_path / "registry.json").write_text('{"runner": {"port": 5050, "host": "far.example"}}')
    async with InLoop(path) as daemon:
        assert await wrong_of(daemon) == {}


async def test_edit_while_the_daemon_runs(daemon: InLoop) -> None:
    await registered(daemon, 1)
    daemon.registry.write_text(daemon.registry.read_text().replace('"port": 1', '"port": 7'))
    found = (await wrong_of(daemon))["file"]
    assert found.found == f"{daemon.registry} was edited by hand, and the edit is not in effect"
    assert found.do.startswith("stop regd, edit the file, start regd")
    daemon.registry.write_text("{nonsense")
    found = (await wrong_of(daemon))["file"]
    assert found.found.startswith(f"{daemon.registry}: line 1, column 2")
    assert "its next start fails" in found.do
    await registered(daemon, 3)  # what the finding says to do
    assert await wrong_of(daemon) == {}
    [kept] = await findings_of(daemon, "kept")
    assert kept.ok
    assert kept.found == (
        f"1 file set aside in {daemon.registry.parent}: registry.json.aside-1; delete those that nobody needs"
    )


async def test_damaged_journal(daemon: InLoop) -> None:
    """The next start would be refused, unless the file has all changes of the damaged part."""
    await registered(daemon, 1)
    before = daemon.registry.read_bytes()
    await registered(daemon, 2, 3, 4, checkpoint=False)
    daemon.registry.write_bytes(before)
    journal = daemon.registry.with_suffix(".journal")
    lines = journal.read_bytes().split(b"\n")
    lines[4] = lines[4].replace(b"db", b"bd")
    with journal.open("r+b") as file:  # the same inode
        file.write(b"\n".join(lines))
    found = (await wrong_of(daemon))["journal"]
    assert found.found.startswith(f"{journal}: line ")
    assert "its next start fails" in found.do
    await registered(daemon, 5)
    found = (await wrong_of(daemon))["journal"]
    assert "registry.json has what was lost" in found.found


async def test_changes_that_are_not_in_effect(daemon: InLoop) -> None:
    """They come from a flush whose result is not known yet, or from a segment that is not written any more."""
    await registered(daemon, 1)
    journal = daemon.registry.with_suffix(".journal")
    whole = journal.read_bytes()
    with journal.open("ab") as file:
        file.write(b'{"line":9,"batch":1,"rev":9')
    found = (await wrong_of(daemon))["journal"]
    assert "ends in a batch that was not written whole" in found.found
    change = Change(2, Op.DOWN, Entry("db", "", "far.example", 1, {}, State.READY, 2, 5.0), Reason.DEREGISTERED)
    journal.write_bytes(whole + journal_lines.change(3, change, batch=1))
    found = (await wrong_of(daemon))["journal"]
    assert found.found == f"{journal} has revision 2 and regd 1: a write failed, or takes long"
    assert "new segment" in found.do


def test_files_are_read_again_after_a_segment_was_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks = []

    def peek(path: Path, files: Files) -> Recovery:
        looks.append(path)
        if len(looks) < 3:
            raise FileNotFoundError(2, "gone")
        return Recovery([], 7)

    path = tmp_path / "registry.json"
    path.write_text("{}")
    path.with_suffix(".journal").touch()
    monkeypatch.setattr(doctor_files, "peek", peek)
    assert [finding.ok for finding in doctor_files.examine(path, lambda: 7, is_ours=True)] == [True]
    assert len(looks) == 3
    looks[:] = []
    monkeypatch.setattr(doctor_files, "_LOOKS", 2)
    [found] = doctor_files.examine(path, lambda: 7, is_ours=True)
    assert "was removed while it was read" in found.found


def test_many_files_set_aside(tmp_path: Path) -> None:
    path = tmp_path / "registry.json"
    for number in range(1, 8):
        path.with_name(f"registry.journal.{number}.aside-1").touch()
    path.with_name("registry.journal.9").touch()
    path.with_name("registry.json.aside-1").touch()
    [found] = [each for each in doctor_files.examine(path, lambda: 0, is_ours=True) if each.check == "kept"]
    assert found.found.startswith(f"8 files set aside in {tmp_path}: registry.journal.1.aside-1, ")
    assert found.found.endswith(" and 3 more; delete those that nobody needs")


async def test_folder_that_cannot_be_synced(daemon: InLoop, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Files, path: Path) -> None:
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    monkeypatch.setattr(Files, "sync_folder", refuse)
    found = (await wrong_of(daemon))["folder"]
    assert "cannot sync the folder" in found.found
    assert "local disk" in found.do


@pytest.mark.parametrize(("number", "found"), [(errno.EACCES, "not checked: "), (errno.EIO, "cannot be read")])
async def test_files_that_cannot_be_read(
    number: int, found: str, daemon: InLoop, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: Files, path: Path, most: int = -1) -> bytes:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(Files, "read", refuse)
    [finding] = await findings_of(daemon, "file")
    assert found in finding.found


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
async def test_read_only_registry_folder(daemon: InLoop) -> None:
    daemon.registry.parent.chmod(0o500)
    try:
        assert "cannot be written" in (await wrong_of(daemon))["file"].found
    finally:
        daemon.registry.parent.chmod(0o700)


async def test_full_disk(daemon: InLoop, monkeypatch: pytest.MonkeyPatch) -> None:
    full = list(os.statvfs(daemon.registry.parent))
    full[4] = 1  # f_bavail
    monkeypatch.setattr(os, "statvfs", lambda path: os.statvfs_result(full))
    assert "is full" in (await wrong_of(daemon))["file"].found


# A simulated daemon that repeats the replies of a real daemon, with a few changes.


@contextlib.contextmanager
def another(process: DaemonProcess, change: Callable[[dict[str, Any]], object]) -> Iterator[str]:
    with BlockingConnection(process.addresses[0]) as peer, socket.create_server(("127.0.0.1", 0)) as server:

        def answer() -> None:
            accepted, _ = server.accept()
            with accepted, accepted.makefile("rb") as lines:
                for line in lines:
                    asked = json.loads(line)
                    reply = peer.ask(asked.pop("cmd"), **asked)
                    change(reply)
                    accepted.sendall(json.dumps(reply).encode() + b"\n")

        answering = threading.Thread(target=answer)
        answering.start()
        yield f"127.0.0.1:{server.getsockname()[1]}"
        answering.join(WAIT_S)
        assert not answering.is_alive()


def test_version_mismatch(process: DaemonProcess) -> None:
    with another(process, lambda reply: reply.update(version="0.0.1")) as address:
        found = wrong(address)["version"]
    assert "0.0.1" in found.found
    assert "same version" in found.do


def test_daemon_in_another_container(process: DaemonProcess) -> None:
    with another(process, lambda reply: reply.get("host", {}).update(pid_namespace="pid:[1]")) as address:
        found = list(examine(address))
    by_check = {finding.check: finding for finding in found}
    assert "another container" in by_check["host"].found
    assert by_check["file"].found.startswith("not checked")
    assert by_check["services"].found.startswith("not checked")


def test_incomplete_replies(process: DaemonProcess) -> None:
    with another(process, lambda reply: reply.pop("registry", None)) as address:
        found = wrong(address)["daemon"]
    assert "its replies are incomplete" in found.found
