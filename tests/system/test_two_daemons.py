"""Two daemons that come to share one registry: the older one ends, and nothing that was acknowledged is missing.

The lock file is removed, or the folder is moved away and made again, as `git clean -fdx` does. The older daemon is
stopped by a signal meanwhile, wherever it is: also between the write of a batch and its `ok`.
"""

import asyncio
import contextlib
import os
import random
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from regd.core.model import Change, Entry, Op, State
from regd.storage.files import Files
from regd.storage.store import StorageError, Store
from tests.support.daemon import WAIT_S, DaemonProcess, Peer
from tests.support.length import LONG
from tests.support.polling import until
from tests.support.stored import stored

ROUNDS = 10 if LONG else 3
_WRITERS = 4


async def write(daemon: DaemonProcess, prefix: str, acknowledged: set[str]) -> None:
    """Register names until the daemon ends, several requests at a time."""
    peer = Peer(*await asyncio.open_connection("127.0.0.1", daemon.port))
    number = 0
    with contextlib.suppress(ConnectionError, AssertionError):  # the daemon has ended
        while True:
            names = [f"{prefix}.{number + n}" for n in range(5)]
            number += len(names)
            peer.send(*({"cmd": "register", "name": name, "port": 1} for name in names))
            for name in names:
                if (await peer.reply())["ok"]:
                    acknowledged.add(name)
    await peer.close()


async def stopped(daemon: DaemonProcess) -> None:
    """Stop a daemon, and wait until it does nothing more."""
    assert daemon.process is not None
    daemon.process.send_signal(signal.SIGSTOP)
    await asyncio.to_thread(os.waitid, os.P_PID, daemon.process.pid, os.WSTOPPED | os.WNOWAIT)


async def ended(daemon: DaemonProcess) -> str:
    """Wait until a daemon ends by itself, and return its log."""
    assert daemon.process is not None
    _, log = await asyncio.to_thread(daemon.process.communicate, timeout=WAIT_S)
    assert daemon.process.returncode == 1
    daemon.process = None
    return log


@pytest.mark.long
@pytest.mark.parametrize("way", ["lock file removed", "folder moved away"])
async def test_older_daemon_ends_and_nothing_acknowledged_is_missing(tmp_path: Path, way: str) -> None:
    for count in range(ROUNDS):
        folder, moved = tmp_path / f"{count}", tmp_path / f"{count}-moved"
        registry = folder / "registry.json"
        of_older, of_newer = set[str](), set[str]()
        with DaemonProcess(registry) as older, DaemonProcess(registry) as newer:
            await asyncio.to_thread(older.start)
            tasks = [asyncio.create_task(write(older, f"older{n}", of_older)) for n in range(_WRITERS)]
            await until(of_older.__len__)
            await asyncio.sleep(random.uniform(0, 0.2))
            assert older.process is not None
            await stopped(older)
            if way == "folder moved away":
                folder.rename(moved)
            else:
                registry.with_name("registry.json.lock").unlink()
            await asyncio.to_thread(newer.start)
            tasks += [asyncio.create_task(write(newer, f"newer{n}", of_newer)) for n in range(_WRITERS)]
            older.process.send_signal(signal.SIGCONT)
            log = await ended(older)
            assert "another regd" in log.splitlines()[-1]
            assert "Traceback" not in log
            await until(of_newer.__len__)
            newer.end(signal.SIGKILL)
            await asyncio.gather(*tasks)
        names = set(stored(registry))
        assert of_newer <= names
        if way == "folder moved away":
            assert of_older <= set(stored(moved / "registry.json"))
            assert not any(name.startswith("older") for name in names)
        else:
            assert of_older <= names


class HookedFiles(Files):
    """`Files` that call `hook` once, at a moment of a commit."""

    def __init__(self) -> None:
        self.moment = ""
        self.hook: Callable[[], None] = lambda: None

    def _at(self, moment: str) -> None:
        if moment == self.moment:
            self.moment = ""
            self.hook()

    def write(self, fd: int, data: bytes) -> None:
        self._at("before the write")
        super().write(fd, data)

    def sync_data(self, fd: int) -> None:
        self._at("before the sync")
        super().sync_data(fd)
        self._at("after the sync")


@pytest.mark.parametrize("moment", ["before the write", "before the sync", "after the sync"])
@pytest.mark.parametrize("begins", [False, True])
@pytest.mark.parametrize("way", ["lock file removed", "folder moved away"])
def test_commit_that_another_daemon_overtakes_gets_no_ok(
    tmp_path: Path, way: str, begins: bool, moment: str
) -> None:
    """The other one has read the journal before the line was there, or may have."""
    folder, files = tmp_path / "folder", HookedFiles()
    path = folder / "registry.json"
    older, newer = Store(path, lambda line: None, files), Store(path, lambda line: None)

    def take_over() -> None:
        if way == "lock file removed":
            path.with_name("registry.json.lock").unlink()
        else:
            folder.rename(tmp_path / "moved")
        newer.open(0.0)
        if begins:
            newer.begin()

    def up(rev: int, name: str) -> Change:
        return Change(rev, Op.UP, Entry(name, "", "127.0.0.1", 1, {}, State.READY, rev, 0.0))

    older.open(0.0)
    older.begin()
    older.commit([up(1, "old")])
    files.hook, files.moment = take_over, moment
    with pytest.raises(StorageError, match="another regd"):
        older.commit([up(2, "overtaken")])
    older.close()
    if not begins:
        newer.begin()
    newer.commit([up(3, "new")])
    newer.close()
    names = stored(path).keys()
    assert "new" in names
    if way == "folder moved away":
        assert names == {"new"}
        assert "old" in stored(tmp_path / "moved" / "registry.json")
    else:
        assert "old" in names


async def test_removed_lock_file_is_locked_again_before_the_next_write(tmp_path: Path) -> None:
    registry = tmp_path / "registry.json"
    with DaemonProcess(registry) as daemon, DaemonProcess(registry) as other:
        daemon.start()
        peer = Peer(*await asyncio.open_connection("127.0.0.1", daemon.port))
        registry.with_name("registry.json.lock").unlink()
        assert (await peer.ask(cmd="register", name="a", port=1))["ok"]
        with pytest.raises(AssertionError, match="in use by another regd"):
            other.start()
        assert (await peer.ask(cmd="register", name="b", port=1))["ok"]
        await peer.close()
        status, log = daemon.end()
        assert status == 0
        assert log.count("was removed by another program; regd locks it again") == 1
        assert stored(registry).keys() == {"a", "b"}
