"""A disk that is full, read-only, gone or slow: writes are refused, reads go on, and the daemon recovers.

Uses real file systems where this user may mount one, and failing `Files` in a daemon in the loop.
"""

import asyncio
import contextlib
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from regd.core.limits import DEFAULT
from regd.storage.document import Unreadable
from tests.support.daemon import WAIT_S, DaemonProcess, InLoop, Peer
from tests.support.files import BROKEN, FULL, RecordedFiles
from tests.support.polling import until
from tests.support.stored import stored

COMMIT_STEPS = ("write", "sync_data", "fingerprint")
SEGMENT_STEPS = ("create", "write", "sync", "link", "rename", "sync_folder", "sync_data")
CHECKPOINT_STEPS = ("create", "sync", "rename", "sync_folder")
CHECKPOINT_S = 60.0  # a checkpoint that took 5 s on a busy machine is followed by a pause of 45 s
_FILE_SYSTEM_BYTES = 64 * 1_024


def held(path: Path) -> set[str] | None:
    """Return the names that the disk holds; None if a file was replaced meanwhile."""
    with contextlib.suppress(FileNotFoundError, Unreadable):
        return set(stored(path))
    return None


def in_file(path: Path) -> set[str]:
    """Return the names in the file, without the journal; none where there is no file."""
    return set(json.loads(path.read_bytes())) - {"$regd"} if path.exists() else set()


async def names(peer: Peer) -> set[str]:
    return {each["name"] for each in (await peer.ask("list"))["instances"]}


async def watching(peer: Peer) -> list[dict[str, Any]]:
    """Watch everything, and return what was there."""
    assert (await peer.ask("watch"))["ok"]
    there = []
    while (event := await peer.reply())["event"] != "sync":
        there.append(event)
    return there


async def all_are_refused(peer: Peer, why: str) -> None:
    """Ask for every kind of change to a registry that holds `old` alone; nothing of it is in effect."""
    for request in (
        {"cmd": "register", "name": "new", "port": 2},
        {"cmd": "register", "name": "old", "port": 3},
        {"cmd": "update", "name": "old", "meta": {"k": "v"}},
        {"cmd": "deregister", "name": "old"},
    ):
        reply = await peer.ask(request)
        assert reply["error"] == "storage_failed", request
        assert why in reply["message"]
    found = await peer.ask("resolve old")
    assert (found["port"], found["meta"], found["rev"]) == (1, {}, 1)
    assert (await peer.ask("resolve new"))["error"] == "not_found"
    assert await names(peer) == {"old"}


# Real file systems.


def mount(*arguments: str) -> None:
    done = subprocess.run(["mount", *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"this user may not mount: {done.stderr.strip()}")


def unmount(path: Path) -> None:
    subprocess.run(["umount", str(path)], check=True)


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, of some pages."""
    if shutil.which("mount") is None:
        pytest.skip("no mount on this machine")
    (path := tmp_path / "small").mkdir()
    mount("-t", "tmpfs", "-o", f"size={_FILE_SYSTEM_BYTES}", "tmpfs", str(path))
    yield path
    unmount(path)


@pytest.fixture
async def peers() -> AsyncIterator[Callable[[DaemonProcess], Any]]:
    made: list[Peer] = []

    async def connect(daemon: DaemonProcess) -> Peer:
        made.append(Peer(*await asyncio.open_connection("127.0.0.1", daemon.port)))
        return made[-1]

    yield connect
    for peer in made:
        await peer.close()


def fill(folder: Path) -> Path:
    """Take every byte that is left."""
    filler = folder / "filler"
    with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(512))
    assert shutil.disk_usage(folder).free == 0
    return filler


async def exhaust(peer: Peer) -> None:
    """Write more than the rest of the journal's last page, which the file system has given to it already."""
    reply = await peer.ask(cmd="register", name="large", port=1, meta={"k": "x" * 4_000})
    assert reply["error"] == "storage_failed"


async def test_full_disk(small: Path, peers: Callable[[DaemonProcess], Any]) -> None:
    with DaemonProcess(small / "registry.json") as daemon:
        daemon.start()
        peer, watcher = await peers(daemon), await peers(daemon)
        assert (await peer.ask(cmd="register", name="old", port=1))["ok"]
        assert len(await watching(watcher)) == 1
        # A later checkpoint would free a page.
        await until(lambda: in_file(daemon.registry) == {"old"}, CHECKPOINT_S)
        filler = fill(small)
        await exhaust(peer)
        await all_are_refused(peer, "No space left")
        daemon.end(signal.SIGKILL)

        daemon.start()  # on a disk that is full
        peer, watcher = await peers(daemon), await peers(daemon)
        assert [event["name"] for event in await watching(watcher)] == ["old"]
        await exhaust(peer)
        await all_are_refused(peer, "No space left")
        assert not any(
            name.endswith(".tmp") for name in os.listdir(small)
        )  # it would keep others from what is left
        filler.unlink()
        assert (await peer.ask(cmd="register", name="late", port=4))["rev"] == 2
        event = await watcher.reply()  # of what was refused it has heard nothing
        assert (event["event"], event["name"], event["rev"]) == ("up", "late", 2)
        assert held(daemon.registry) == {"old", "late"}
        assert daemon.end()[0] == 0
        assert in_file(daemon.registry) == {"old", "late"}
        names_left = {name.rstrip("0123456789") for name in os.listdir(small)}
        assert names_left == {"registry.json", "registry.json.lock", "registry.journal", "registry.journal."}


def idle() -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)


@pytest.mark.long
async def test_process_that_dies_on_a_full_disk_is_removed_from_the_file_later(
    small: Path, peers: Callable[[DaemonProcess], Any]
) -> None:
    with DaemonProcess(small / "registry.json") as daemon:
        daemon.start()
        peer, holder, watcher = [await peers(daemon) for _ in range(3)]
        with idle() as process:
            assert (await peer.ask(cmd="register", name="process", port=1, pid=process.pid))["ok"]
            assert (await holder.ask(cmd="register", name="connection", port=1, hold=True))["ok"]
            assert (await peer.ask(cmd="register", name="lease", port=1, ttl=CHECKPOINT_S))["ok"]
            await watching(watcher)
            await until(lambda: in_file(daemon.registry) == {"process", "connection", "lease"}, CHECKPOINT_S)
            assert (await peer.ask(cmd="renew", name="lease", ttl=3))["ok"]
            filler = fill(small)
            await exhaust(peer)
            await holder.reset()
            process.kill()
        downs = [await watcher.reply() for _ in range(3)]
        assert {(event["event"], event["name"], event["reason"]) for event in downs} == {
            ("down", "process", "process exited"),
            ("down", "connection", "connection closed"),
            ("down", "lease", "ttl expired"),
        }
        assert await names(peer) == set()
        assert held(daemon.registry) == {"process", "connection", "lease"}
        filler.unlink()
        await until(lambda: held(daemon.registry) == set())  # nobody asks for anything
        daemon.end(signal.SIGKILL)
        daemon.start()
        reply = await (await peers(daemon)).ask("list")
        # The refused change may be on disk as revision 4, so that the ends have later ones.
        assert (reply["instances"], reply["rev"]) == ([], 7)


@pytest.mark.long
async def test_read_only_folder_delays_the_file_alone(
    small: Path, tmp_path: Path, peers: Callable[[DaemonProcess], Any]
) -> None:
    """The journal is open for writing, and stays so below the read-only mount."""
    log = tmp_path / "log"
    with DaemonProcess(small / "registry.json", "--log", str(log)) as daemon:
        daemon.start()
        peer, watcher = await peers(daemon), await peers(daemon)
        assert (await peer.ask(cmd="register", name="old", port=1))["ok"]
        await watching(watcher)
        await until(lambda: in_file(daemon.registry) == {"old"}, CHECKPOINT_S)
        mount("--bind", str(small), str(small))
        try:
            mount("-o", "remount,bind,ro", str(small))
            assert (await peer.ask(cmd="register", name="late", port=4))["rev"] == 2
            assert (await watcher.reply())["name"] == "late"
            assert held(daemon.registry) == {"old", "late"}
            # The next checkpoint fails.
            await until(lambda: "Read-only file system" in log.read_text(), CHECKPOINT_S)
            assert in_file(daemon.registry) == {"old"}
        finally:
            unmount(small)
        await until(lambda: in_file(daemon.registry) == {"old", "late"}, CHECKPOINT_S)  # nobody asks for anything
        daemon.end()
        assert log.read_text().count("Read-only file system; the journal has all changes") == 1
        assert log.read_text().count("can be written again") == 1


@pytest.mark.long
async def test_registry_folder_disappears_and_returns(
    tmp_path: Path, peers: Callable[[DaemonProcess], Any]
) -> None:
    with DaemonProcess(tmp_path / "deep" / "registry.json") as daemon:
        daemon.start()
        peer, watcher = await peers(daemon), await peers(daemon)
        assert (await peer.ask(cmd="register", name="old", port=1))["ok"]
        await watching(watcher)
        await until(lambda: in_file(daemon.registry) == {"old"}, CHECKPOINT_S)
        shutil.rmtree(daemon.registry.parent)
        await all_are_refused(peer, "No such file")
        # What is there already changes nothing, but is not in the file: nobody is told that it is.
        assert (await peer.ask(cmd="register", name="old", port=1))["error"] == "storage_failed"
        daemon.registry.parent.mkdir()
        await until(lambda: in_file(daemon.registry) == {"old"}, CHECKPOINT_S)  # nobody asks for anything
        assert (await peer.ask(cmd="register", name="late", port=4))["rev"] == 2
        assert (await watcher.reply())["name"] == "late"
        daemon.end(signal.SIGKILL)
        daemon.start()
        assert await names(await peers(daemon)) == {"old", "late"}


async def test_file_that_is_a_mount_of_its_own_is_found_at_the_start(small: Path) -> None:
    """As of a container with `-v registry.json:/…/registry.json`: the file could never be replaced."""
    source, target = small / "source.json", small / "registry.json"
    source.write_text('{"db": {"port": 5432}}')
    target.write_text("")
    mount("--bind", str(source), str(target))
    try:
        with DaemonProcess(target) as daemon, pytest.raises(AssertionError, match="mount its folder instead"):
            daemon.start()
        assert target.read_text() == '{"db": {"port": 5432}}'
        assert "registry.journal" not in os.listdir(small)
    finally:
        unmount(target)


@pytest.mark.long
async def test_pipe_in_place_of_the_file_holds_up_nobody(
    tmp_path: Path, peers: Callable[[DaemonProcess], Any]
) -> None:
    log = tmp_path / "log"
    with DaemonProcess(tmp_path / "registry.json", "--log", str(log)) as daemon:
        daemon.start()
        peer = await peers(daemon)
        await until(daemon.registry.exists)
        daemon.registry.unlink()
        os.mkfifo(daemon.registry)  # opening it would wait for a reader or writer
        for port in range(1, 4):
            assert (await peer.ask(cmd="register", name=f"n{port}", port=port))["ok"]
            assert (await peer.ask("ping"))["ok"]
        # A checkpoint fails.
        await until(lambda: "it is not a regular file" in log.read_text(), CHECKPOINT_S)
        assert (await peer.ask("ping"))["ok"]
        daemon.registry.unlink()
        await until(lambda: in_file(daemon.registry) == {"n1", "n2", "n3"}, CHECKPOINT_S)
        assert daemon.end()[0] == 0
        assert log.read_text().count("it is not a regular file; the journal has all changes") == 1


@pytest.mark.parametrize("name", ["registry.json", "registry.journal", "registry.journal.1"])
async def test_pipe_is_refused_at_the_start(tmp_path: Path, name: str) -> None:
    with DaemonProcess(tmp_path / "registry.json") as daemon:
        daemon.start()
        daemon.end()
        path = daemon.registry.with_name(name)
        path.unlink(missing_ok=True)
        os.mkfifo(path)
        async with asyncio.timeout(WAIT_S):
            with pytest.raises(AssertionError, match=f"{path} is not a regular file"):
                await asyncio.to_thread(daemon.start)


@pytest.mark.long
async def test_full_log_pipe_holds_up_nobody(tmp_path: Path, peers: Callable[[DaemonProcess], Any]) -> None:
    """Nobody reads stderr, a pipe of 64 KiB."""
    with DaemonProcess(tmp_path / "registry.json", "--log-level", "debug") as daemon:
        daemon.start()
        peer = await peers(daemon)
        for count in range(20):
            peer.send(*({"cmd": "register", "name": f"n{port}", "port": count + 1} for port in range(1, 51)))
            for _ in range(50):
                assert (await peer.reply())["ok"]
        assert (await peer.ask("ping"))["ok"]
        await until(lambda: len(in_file(daemon.registry)) == 50, CHECKPOINT_S)
        status, log = daemon.end()
        assert status == 0
        assert len(log) > 65_536


# The faked door.


async def poison(files: RecordedFiles, peer: Peer) -> None:
    """Fail one sync, so that the next write begins a segment."""
    files.failing["sync_data"] = BROKEN
    assert (await peer.ask(cmd="deregister", name="old"))["error"] == "storage_failed"
    files.failing.clear()


async def repaired(daemon: InLoop) -> None:
    """Let time pass until the daemon has repaired its disk, without a request."""
    async with asyncio.timeout(WAIT_S):
        while daemon.server._store.needs_repair:
            daemon.clock.advance(1)
            await asyncio.sleep(0.01)


@pytest.mark.sample(6)
@pytest.mark.socket
@pytest.mark.parametrize("number", [FULL, BROKEN, errno.EDQUOT])
@pytest.mark.parametrize(
    ("is_poisoned", "step"),
    [*((False, step) for step in COMMIT_STEPS), *((True, step) for step in SEGMENT_STEPS)],
)
async def test_refused_write_is_not_applied_later(
    tmp_path: Path, is_poisoned: bool, step: str, number: int
) -> None:
    files = RecordedFiles()
    path = tmp_path / "registry.json"
    async with InLoop(path, files=files) as daemon:
        peer, watcher = await daemon.peer(), await daemon.peer()
        assert (await peer.ask(cmd="register", name="old", port=1))["ok"]
        await watching(watcher)
        if is_poisoned:
            await poison(files, peer)
        files.failing[step] = number
        await all_are_refused(peer, os.strerror(number))
        daemon.clock.advance(5)
        assert await names(peer) == {"old"}
        files.failing.clear()
        await repaired(daemon)
        assert held(path) == {"old"}
        assert stored(path)["old"].port == 1
        assert (await peer.ask(cmd="register", name="late", port=4))["rev"] == 2
        assert (await watcher.reply())["name"] == "late"
        assert held(path) == {"old", "late"}
    assert in_file(path) == {"old", "late"}
    async with InLoop(path) as daemon:
        peer = await daemon.peer()
        assert await names(peer) == {"old", "late"}
        assert (await peer.ask("resolve old"))["port"] == 1


@pytest.mark.socket
@pytest.mark.parametrize("step", [*COMMIT_STEPS, *SEGMENT_STEPS[:-1]])
async def test_holder_that_leaves_on_a_failed_disk_is_removed_from_the_disk_later(
    tmp_path: Path, step: str
) -> None:
    files = RecordedFiles()
    path = tmp_path / "registry.json"
    async with InLoop(path, files=files) as daemon:
        peer, holder, watcher = [await daemon.peer() for _ in range(3)]
        assert (await holder.ask(cmd="register", name="connection", port=1, hold=True))["ok"]
        assert (await peer.ask(cmd="register", name="lease", port=1, ttl=3))["ok"]
        assert (await peer.ask(cmd="register", name="old", port=1))["ok"]
        await watching(watcher)
        await poison(files, peer)
        files.failing[step] = BROKEN
        await holder.reset()
        assert (await watcher.reply())["reason"] == "connection closed"
        daemon.clock.advance(4)
        assert (await watcher.reply())["reason"] == "ttl expired"
        assert await names(peer) == {"old"}
        assert (await peer.ask(cmd="register", name="new", port=1))["error"] == "storage_failed"
        files.failing.clear()
        await repaired(daemon)
        assert held(path) == {"old"}
        last = (await peer.ask("list"))["rev"]
    assert json.loads(path.read_bytes())["$regd"]["rev"] == last
    async with InLoop(path) as daemon:
        assert await names(await daemon.peer()) == {"old"}


@pytest.mark.socket
@pytest.mark.parametrize("step", CHECKPOINT_STEPS)
async def test_failed_checkpoint_fails_no_request(
    tmp_path: Path, step: str, caplog: pytest.LogCaptureFixture
) -> None:
    files = RecordedFiles()
    path = tmp_path / "registry.json"
    async with InLoop(path, files=files) as daemon:
        peer = await daemon.peer()
        files.failing[step] = FULL
        for port in range(1, 4):
            assert (await peer.ask(cmd="register", name=f"n{port}", port=port))["ok"]
            daemon.clock.advance(2)
            await until(lambda: daemon.server._checkpointer._task is None)
        assert held(path) == {"n1", "n2", "n3"}
        assert sum("the journal has all changes" in line for line in caplog.messages) == 1
        files.failing.clear()
        daemon.clock.advance(2)
        await until(lambda: in_file(path) == {"n1", "n2", "n3"})  # nobody asks for anything


@pytest.mark.socket
@pytest.mark.parametrize("step", SEGMENT_STEPS[:-1])
async def test_failed_rotation_loses_nothing(tmp_path: Path, step: str) -> None:
    """Requests meanwhile may be refused, but none with `ok` is lost, and none refused is in effect."""
    files = RecordedFiles()
    path = tmp_path / "registry.json"
    limits = replace(DEFAULT, journal_segment_bytes_max=1)  # every checkpoint makes the next write rotate
    async with InLoop(path, files=files, limits=limits) as daemon:
        peer, watcher = await daemon.peer(), await daemon.peer()
        await watching(watcher)
        expected: set[str] = set()
        for port in range(1, 13):
            if port in (4, 9):
                files.failing[step] = FULL
            elif port in (7, 12):
                files.failing.clear()
                daemon.clock.advance(2)
            if (await peer.ask(cmd="register", name=f"n{port}", port=port))["ok"]:
                expected.add(f"n{port}")
                assert (await watcher.reply())["name"] == f"n{port}"
            daemon.clock.advance(2)
            await until(lambda: daemon.server._checkpointer._task is None)
            assert await names(peer) == expected
            assert held(path) == expected
        assert {"n1", "n2", "n3", "n7", "n8", "n12"} <= expected
        assert sum(name.startswith("registry.journal.") for name in os.listdir(tmp_path)) > 2
    async with InLoop(path) as daemon:
        assert await names(await daemon.peer()) == expected


@pytest.mark.socket
async def test_slow_flush_delays_only_replies_behind_it(tmp_path: Path) -> None:
    files = RecordedFiles()
    async with InLoop(tmp_path / "registry.json", files=files) as daemon:
        writer, other, holder, watcher = [await daemon.peer() for _ in range(4)]
        assert (await writer.ask(cmd="register", name="old", port=1))["ok"]
        assert (await holder.ask(cmd="register", name="held", port=1, hold=True))["ok"]
        await watching(watcher)
        files.gate.clear()
        files.syncing.clear()
        writer.send({"cmd": "register", "name": "new", "port": 2})
        await until(files.syncing.is_set)
        other.send({"cmd": "register", "name": "next", "port": 3})  # its own replies wait behind this one
        await holder.reset()
        for second in range(5):
            daemon.clock.advance(1)
            peer = await daemon.peer("::1" if second % 2 and len(daemon.server.addresses) > 1 else "127.0.0.1")
            assert (await peer.ask("ping"))["ok"]
            assert (await peer.ask("resolve old"))["port"] == 1
            assert (await peer.ask("resolve new"))["error"] == "not_found"
            assert len(await watching(peer)) == 2
            await until_not_resolved(daemon, "held")
        files.gate.set()
        assert (await writer.reply())["rev"] == 3
        assert (await other.reply())["rev"] == 4
        events = [await watcher.reply() for _ in range(3)]
        assert [(event["event"], event["name"]) for event in events] == [
            ("up", "new"), ("up", "next"), ("down", "held"),
        ]  # fmt: skip


async def until_not_resolved(daemon: InLoop, name: str) -> None:
    peer = await daemon.peer()
    async with asyncio.timeout(WAIT_S):
        while (await peer.ask(f"resolve {name}"))["ok"]:
            await asyncio.sleep(0)
