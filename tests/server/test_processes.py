"""The state of processes as the system reports it (ended, hidden, or out of resources), and its effects."""

import asyncio
import errno
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from regd.core.errors import Code, Refused
from regd.core.limits import DEFAULT
from regd.core.model import Process
from regd.system import processes
from regd.system.processes import Processes
from tests.support.daemon import WAIT_S, InLoop, environment
from tests.support.peers import STRANGER, FakeCredentials

pytestmark = [
    pytest.mark.socket,
    pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="this system cannot watch a process"),
]
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can make namespaces and mount")


def failing(number: int) -> Any:
    def fail(*_: object, **__: object) -> Any:
        raise OSError(number, os.strerror(number))

    return fail


@pytest.fixture
def child() -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    yield process
    process.kill()
    process.communicate()


@pytest.mark.parametrize(
    ("number", "code"),
    [
        (errno.ESRCH, "bad_argument"),
        (errno.EINVAL, "bad_argument"),  # the id of a thread
        (errno.ENOENT, "bad_argument"),  # the id of a thread, in newer kernels
        (errno.EPERM, "unsupported"),  # a container's seccomp filter
        (errno.EACCES, "unsupported"),
        (errno.ENOSYS, "unsupported"),  # a kernel before 5.3, and another kind of filter
        (errno.ENODEV, "unsupported"),
        (errno.EOPNOTSUPP, "unsupported"),
        (errno.EMFILE, "busy"),
        (errno.ENFILE, "busy"),
        (errno.ENOMEM, "busy"),
    ],
    ids=errno.errorcode.get,
)
async def test_results_of_pidfd_open(
    number: int, code: str, daemon: InLoop, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "pidfd_open", failing(number))
    peer = await daemon.peer()
    reply = await peer.ask(cmd="register", name="a", port=1, pid=os.getpid())
    assert reply["error"] == code
    if code == "unsupported":
        assert reply["message"].endswith("use hold or ttl")
    assert (await peer.ask(cmd="register", name="a", port=1, hold=True))["ok"]


@pytest.mark.parametrize("number", [errno.ENOENT, errno.EACCES, errno.EPERM])
@pytest.mark.parametrize("part", ["start_ticks", "_uids"])
async def test_hidden_process_is_unsupported_and_ended_process_is_refused(
    part: str, number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, child: subprocess.Popen[bytes]
) -> None:
    monkeypatch.setattr(processes, part, failing(number))
    async with InLoop(tmp_path / "registry.json", peers=FakeCredentials((STRANGER,))) as daemon:
        peer = await daemon.peer()
        wish = {"cmd": "register", "name": "a", "port": 1, "pid": child.pid}
        watched = os.pidfd_open(child.pid)
        assert (await peer.ask(wish))["error"] == "unsupported"
        child.kill()
        async with asyncio.timeout(WAIT_S):
            while not processes.has_ended(watched):  # the process is a zombie: its pid is not free yet
                await asyncio.sleep(0)
        assert (await peer.ask(wish))["error"] == "bad_argument"
        os.close(watched)


async def test_proc_of_another_pid_namespace_is_not_used(
    monkeypatch: pytest.MonkeyPatch, child: subprocess.Popen[bytes]
) -> None:
    monkeypatch.setattr(os, "readlink", lambda path: "4711")
    seen = Processes(DEFAULT, lambda process: None)
    with pytest.raises(Refused) as refused:
        seen.find(child.pid)
    assert refused.value.code is Code.UNSUPPORTED
    known = Process(child.pid, "boot/1")
    assert seen.watch(known)
    child.kill()
    child.wait()
    assert seen.retry() == [known]


async def test_loaded_hidden_process_lives_until_its_pid_is_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, child: subprocess.Popen[bytes]
) -> None:
    path = tmp_path / "registry.json"
    async with InLoop(path) as first:
        await (await first.peer()).ask(cmd="register", name="a", port=1, pid=child.pid)
        await first.server.stop()
    monkeypatch.setattr(processes, "start_ticks", failing(errno.ENOENT))
    async with InLoop(path) as second:
        peer = await second.peer()
        second.clock.advance(5)
        assert (await peer.ask(cmd="resolve", name="a"))["ok"]
        assert (await peer.ask(cmd="register", name="a", port=2, hold=True))["error"] == "conflict"
        child.kill()
        child.wait()
        second.clock.advance(0.5)
        assert (await peer.ask(cmd="resolve", name="a"))["last"]["reason"] == "process exited"


async def test_loaded_process_of_an_earlier_boot_has_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "registry.json"
    path.write_text(f'{{"a": {{"port": 1, "pid": {os.getpid()}, "born": "another-boot/1"}}}}')
    monkeypatch.setattr(processes, "start_ticks", failing(errno.ENOENT))
    async with InLoop(path) as daemon:
        assert (await (await daemon.peer()).ask(cmd="resolve", name="a"))["error"] == "not_found"


async def test_pid_written_by_hand_is_that_process(tmp_path: Path, child: subprocess.Popen[bytes]) -> None:
    """Such an entry has no `born`. It stays while the process lives, and the process's start time is added to it."""
    path = tmp_path / "registry.json"
    path.write_text(f'{{"a": {{"port": 1, "pid": {child.pid}}}, "gone": {{"port": 2, "pid": {2**22 + 1}}}}}')
    async with InLoop(path) as daemon:
        peer = await daemon.peer()
        assert (await peer.ask(cmd="resolve", name="a"))["pid"] == child.pid
        assert (await peer.ask(cmd="resolve", name="gone"))["error"] == "not_found"
    assert json.loads(path.read_bytes())["a"]["born"]
    async with InLoop(path) as daemon:
        peer = await daemon.peer()
        assert (await peer.ask(cmd="resolve", name="a"))["ok"]
        child.kill()
        child.wait()
        daemon.clock.advance(0.5)
        assert (await peer.ask(cmd="resolve", name="a"))["last"]["reason"] == "process exited"


async def test_unwatched_processes_are_checked_in_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    looks: list[Process] = []
    seen = Processes(DEFAULT, lambda process: None)
    known = [Process(pid, "x/1") for pid in range(600)]
    seen.unwatched = dict.fromkeys(known)
    monkeypatch.setattr(seen, "_has_certainly_ended", looks.append)
    for most in (256, 512, 768):
        seen.retry()
        assert len(looks) == most
    assert set(looks) == set(known)


# The user of a process.


async def test_root_may_register_any_process_and_others_their_own(
    tmp_path: Path, child: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "_uids", lambda pid: (1000,) * 4)
    credentials = FakeCredentials((STRANGER, 1000))
    async with InLoop(tmp_path / "registry.json", peers=credentials) as daemon:
        for uid, error in ((0, None), (1000, None), (STRANGER, "denied")):
            credentials.uid = uid
            reply = await (await daemon.peer()).ask(cmd="register", name="a", port=1, pid=child.pid)
            assert reply.get("error") == error, uid


# A real /proc with hidepid, in new namespaces.

# Run in a new mount namespace; the script checks that before it mounts anything.
HIDDEN = """
import asyncio, json, os, subprocess, sys
from pathlib import Path
from regd.server.daemon import Config, Daemon

if os.readlink("/proc/self/ns/mnt") == sys.argv[1]:
    sys.exit("not in a mount namespace of its own")
if subprocess.run(["mount", "-t", "proc", "-o", "hidepid=2", "proc", "/proc"]).returncode:
    sys.exit(77)
other = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
"".encode("idna")  # loaded now: another user may not be able to read this Python
os.setgroups([]); os.setgid(int(sys.argv[3])); os.setuid(int(sys.argv[3]))

async def main():
    server = Daemon(Config(registry=Path(sys.argv[2]), port=0))
    await server.start()
    reader, writer = await asyncio.open_connection("127.0.0.1", int(server.addresses[0].rpartition(":")[2]))
    for pid in (other.pid, 2**31 - 1):
        request = {"cmd": "register", "name": "a", "port": 1, "hold": True, "pid": pid}
        writer.write(json.dumps(request).encode() + bytes([10]))
        print(json.loads(await reader.readline())["error"])
    writer.close()
    await server.stop()

asyncio.run(main())
"""


@needs_root
def test_proc_with_hidepid(tmp_path: Path) -> None:
    if shutil.which("unshare") is None:
        pytest.skip("no unshare(1) here")
    for folder in (tmp_path, *tmp_path.parents):  # pytest-xdist adds a folder
        if folder == Path(tempfile.gettempdir()):
            break
        folder.chmod(0o777)
    arguments = [os.readlink("/proc/self/ns/mnt"), str(tmp_path / "registry.json"), str(STRANGER)]
    done = subprocess.run(
        ["unshare", "-m", sys.executable, "-c", HIDDEN, *arguments],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    if done.returncode == 77 or "unshare" in done.stderr:
        pytest.skip(f"no mount with hidepid here: {done.stderr.strip()}")
    assert (done.returncode, done.stdout.split()) == (0, ["unsupported", "bad_argument"]), done.stderr
