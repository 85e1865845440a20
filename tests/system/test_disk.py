"""A disk that is full, read-only, gone or slow: writes are refused, reads go on, and the daemon recovers.

Uses real file systems where this user may mount one, and failing `Files` in a daemon in the loop.
"""

import asyncio
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.daemon import WAIT_S, DaemonProcess, InLoop, Peer
from tests.support.files import BROKEN, FULL, RecordedFiles
from tests.support.polling import until

STEPS = ("create", "write", "sync", "rename", "sync_folder", "print")
_FILE_SYSTEM_BYTES = 64 * 1_024


def held(path: Path) -> set[str]:
    """Return the names that the file holds; none where there is no file."""
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


async def test_full_disk(small: Path, peers: Callable[[DaemonProcess], Any]) -> None:
    with DaemonProcess(small / "registry.json") as daemon:
        daemon.start()
        peer, watcher = await peers(daemon), await peers(daemon)
        assert (await peer.ask(cmd="register", name="old", port=1))["ok"]
        assert len(await watching(watcher)) == 1
        filler = fill(small)
        await all_are_refused(peer, "No space left")
        assert not daemon.registry.with_name(
            "registry.json.tmp"
        ).exists()  # it would keep others from what is left
        daemon.end(signal.SIGKILL)

        daemon.start()  # on a disk that is full
        peer, watcher = await peers(daemon), await peers(daemon)
        assert [event["name"] for event in await watching(watcher)] == ["old"]
        await all_are_refused(peer, "No space left")
        filler.unlink()
        assert (await peer.ask(cmd="register", name="late", port=4))["rev"] == 2
        event = await watcher.reply()  # of what was refused it has heard nothing
        assert (event["event"], event["name"], event["rev"]) == ("up", "late", 2)
        assert held(daemon.registry) == {"old", "late"}
        assert sorted(os.listdir(small)) == ["registry.json", "registry.json.lock"]
        assert daemon.end()[0] == 0


def idle() -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)


async def test_process_that_dies_on_a_full_disk_is_removed_from_the_file_later(
    small: Path, peers: Callable[[DaemonProcess], Any]
) -> None:
    with DaemonProcess(small / "registry.json") as daemon:
        daemon.start()
        peer, holder, watcher = [await peers(daemon) for _ in range(3)]
        with idle() as process:
            assert (await peer.ask(cmd="register", name="process", port=1, pid=process.pid))["ok"]
            assert (await holder.ask(cmd="register", name="connection", port=1, hold=True))["ok"]
            assert (await peer.ask(cmd="register", name="lease", port=1, ttl=1))["ok"]
            await watching(watcher)
            filler = fill(small)
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
        assert (reply["instances"], reply["rev"]) == ([], 6)


async def test_disk_becomes_read_only(small: Path, peers: Callable[[DaemonProcess], Any]) -> None:
    with DaemonProcess(small / "registry.json") as daemon:
        daemon.start()
        peer, watcher = await peers(daemon), await peers(daemon)
        assert (await peer.ask(cmd="register", name="old", port=1))["ok"]
        await watching(watcher)
        mount("--bind", str(small), str(small))  # the lock is open for writing, and stays so below this one
        try:
            mount("-o", "remount,bind,ro", str(small))
            await all_are_refused(peer, "Read-only")
        finally:
            unmount(small)
        assert (await peer.ask(cmd="register", name="late", port=4))["rev"] == 2
        assert (await watcher.reply())["name"] == "late"
        assert held(daemon.registry) == {"old", "late"}


async def test_registry_folder_disappears_and_returns(
    tmp_path: Path, peers: Callable[[DaemonProcess], Any]
) -> None:
    with DaemonProcess(tmp_path / "deep" / "registry.json") as daemon:
        daemon.start()
        peer, watcher = await peers(daemon), await peers(daemon)
        assert (await peer.ask(cmd="register", name="old", port=1))["ok"]
        await watching(watcher)
        shutil.rmtree(daemon.registry.parent)
        await all_are_refused(peer, "No such file")
        # What is there already changes nothing, but is not in the file: nobody is told that it is.
        assert (await peer.ask(cmd="register", name="old", port=1))["error"] == "storage_failed"
        daemon.registry.parent.mkdir()
        await until(lambda: held(daemon.registry) == {"old"})  # nobody asks for anything
        assert (await peer.ask(cmd="register", name="late", port=4))["rev"] == 2
        assert (await watcher.reply())["name"] == "late"
        daemon.end(signal.SIGKILL)
        daemon.start()
        assert await names(await peers(daemon)) == {"old", "late"}


# The faked door.


@pytest.mark.socket
@pytest.mark.parametrize("number", [FULL, BROKEN])
@pytest.mark.parametrize("step", STEPS)
async def test_refused_write_is_not_applied_later(tmp_path: Path, step: str, number: int) -> None:
    files = RecordedFiles()
    path = tmp_path / "registry.json"
    async with InLoop(path, files=files) as daemon:
        peer, watcher = await daemon.peer(), await daemon.peer()
        assert (await peer.ask(cmd="register", name="old", port=1))["ok"]
        await watching(watcher)
        files.failing[step] = number
        await all_are_refused(peer, os.strerror(number))
        daemon.clock.advance(5)
        assert await names(peer) == {"old"}
        files.failing.clear()
        daemon.clock.advance(1)
        await until(lambda: held(path) == {"old"})
        assert json.loads(path.read_bytes())["old"] == {"port": 1}
        assert (await peer.ask(cmd="register", name="late", port=4))["rev"] == 2
        assert (await watcher.reply())["name"] == "late"
    async with InLoop(path) as daemon:
        peer = await daemon.peer()
        assert await names(peer) == {"old", "late"}
        assert (await peer.ask("resolve old"))["port"] == 1


@pytest.mark.socket
@pytest.mark.parametrize("step", STEPS)
async def test_holder_that_leaves_on_a_failed_disk_is_removed_from_the_file_later(
    tmp_path: Path, step: str
) -> None:
    files = RecordedFiles()
    path = tmp_path / "registry.json"
    async with InLoop(path, files=files) as daemon:
        peer, holder, watcher = [await daemon.peer() for _ in range(3)]
        assert (await holder.ask(cmd="register", name="connection", port=1, hold=True))["ok"]
        assert (await peer.ask(cmd="register", name="lease", port=1, ttl=3))["ok"]
        assert (await peer.ask(cmd="register", name="static", port=1))["ok"]
        await watching(watcher)
        files.failing[step] = BROKEN
        await holder.reset()
        assert (await watcher.reply())["reason"] == "connection closed"
        daemon.clock.advance(4)
        assert (await watcher.reply())["reason"] == "ttl expired"
        assert await names(peer) == {"static"}
        assert (await peer.ask(cmd="register", name="new", port=1))["error"] == "storage_failed"
        files.failing.clear()
        daemon.clock.advance(1)
        await until(lambda: held(path) == {"static"})  # nobody asks for anything
        assert json.loads(path.read_bytes())["$regd"]["rev"] == 5
    async with InLoop(path) as daemon:
        assert await names(await daemon.peer()) == {"static"}


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
