"""Autostart with real processes: many clients start one daemon, which outlives the client that started it."""

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import regd_client
from regd_client import autostart, connector, protocol
from regd_client.blocking import BlockingConnection
from tests.support.daemon import WAIT_S, DaemonProcess, InLoop
from tests.support.demand import SLOW_S, Demand, demand, reserved_port, stat
from tests.support.polling import block_until, until

BLOCKING = """
import sys
from regd_client.blocking import BlockingConnection
print("ready", flush=True)
sys.stdin.readline()
with BlockingConnection(timeout_s=40.0) as connection:
    print(connection.ask("stats")["pid"], flush=True)
    sys.stdin.readline()
"""
ASYNC = """
import asyncio, sys
from regd_client import Client
print("ready", flush=True)
sys.stdin.readline()
async def main():
    async with Client(connect_timeout_s=40.0) as client:
        print((await client.stats())["pid"], flush=True)
        sys.stdin.readline()
asyncio.run(main())
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Demand]:
    """A state folder and a Unix socket, set in this process's environment, too."""
    monkeypatch.setattr(autostart, "_RETRY_S", 1_000.0)
    with demand(tmp_path) as here:
        for key, value in here.environment().items():
            if key.startswith(("REGD_", "XDG_")) or key == "HOME":
                monkeypatch.setenv(key, value)
        yield here


def read_line(program: "subprocess.Popen[str]") -> str:
    assert program.stdout is not None
    line = program.stdout.readline()
    if not line:
        _, errors = program.communicate(timeout=WAIT_S)
        raise AssertionError(errors)
    return line.strip()


def send_newline(program: "subprocess.Popen[str]") -> None:
    assert program.stdin is not None
    program.stdin.write("\n")
    program.stdin.flush()


def pids_of(programs: "list[subprocess.Popen[str]]") -> set[int]:
    """Let all programs connect at once, and return the pids of the daemons that they reached."""
    try:
        for program in programs:
            assert read_line(program) == "ready"
        for program in programs:
            send_newline(program)
        pids = {int(read_line(program)) for program in programs}
        for program in programs:
            _, errors = program.communicate("\n", timeout=WAIT_S)
            assert (program.returncode, errors) == (0, "")
        return pids
    finally:
        for program in programs:
            program.kill()
            program.communicate()


def pid_of(address: str | None = None) -> int:
    with BlockingConnection(address, timeout_s=SLOW_S) as connection:
        return int(connection.ask("stats")["pid"])


@pytest.mark.sample(2)
@pytest.mark.parametrize("tcp", [False, True], ids=["unix", "tcp"])
def test_thirty_simultaneous_clients_start_one_daemon(tmp_path: Path, tcp: bool) -> None:
    with demand(tmp_path, tcp) as place:
        pids = pids_of([place.program(ASYNC if number % 5 == 0 else BLOCKING) for number in range(30)])
        assert len(pids) == 1
        block_until(lambda: place.daemons() == pids)  # processes that waited for the daemon have ended, too
        assert place.starts == 1, place.log
        assert "in use" not in place.log, place.log
        [lock] = place.folder.glob("*.json.lock")
        assert int(lock.read_text().split()[0]) in pids


def test_clients_with_different_state_folders_share_one_daemon(tmp_path: Path) -> None:
    """Without a common lock the port decides. Clients whose own daemon found it taken use the other daemon."""
    with demand(tmp_path, tcp=True) as place:
        programs = [place.program(BLOCKING, XDG_STATE_HOME=str(tmp_path / str(number))) for number in range(5)]
        pids = pids_of(programs)
        assert len(pids) == 1
        block_until(lambda: place.daemons() == pids)


def test_autostart_uses_a_daemon_that_was_faster(here: Demand, tmp_path: Path) -> None:
    """Another daemon, started without the lock of autostart, takes the address first."""
    start = autostart.Autostart(protocol.find_address())
    try:
        assert start.step() == 0.0  # it has the lock, and connects once more before it starts a daemon
        with DaemonProcess(tmp_path / "other" / "registry.json", "--unix", str(tmp_path / "s")) as other:
            other.start()
            while start.step() > 0.0:
                time.sleep(0.01)
            assert "in use by another regd" in here.log
            assert other.process is not None
            assert pid_of() == other.process.pid
    finally:
        start.close()


def test_reason_says_who_starts_the_daemon(here: Demand) -> None:
    first, second = (autostart.Autostart(protocol.find_address()) for _ in range(2))
    try:
        first.step()
        assert first.why.startswith("it is being started; its log is ")
        second.step()
        assert second.why.startswith("another process is starting it; its log is ")
    finally:
        first.close()
        second.close()


def test_cancelled_autostart_reaps_the_child(here: Demand) -> None:
    start = autostart.Autostart(protocol.find_address())
    try:
        start.step()
        start.step()
        process = start._process
        assert process is not None
    finally:
        start.close()
    block_until(lambda: process.returncode == 0)  # reaped
    assert pid_of() in here.daemons()
    assert here.starts == 1


def test_daemon_outlives_its_starter_and_inherits_nothing(here: Demand, tmp_path: Path) -> None:
    (tmp_path / "inherited").touch()
    code = f"""
import os, signal
file = os.open({str(tmp_path / "inherited")!r}, os.O_RDONLY)
os.set_inheritable(file, True)
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
{BLOCKING}"""
    program = here.program(code, LISTEN_FDS="1", NOTIFY_SOCKET="/nowhere", STATE_DIRECTORY=str(tmp_path / "x"))
    try:
        assert read_line(program) == "ready"
        send_newline(program)
        pid = int(read_line(program))
        # It has no child left, not even a zombie.
        block_until(lambda: not children(program.pid))
        assert stat(pid)["session"] == str(pid)
    finally:
        program.kill()
        program.communicate()
    assert pid_of() == pid
    assert str(tmp_path / "inherited") not in files_of(pid)
    variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    assert not [
        variable for variable in variables if variable.startswith((b"REGD_", b"LISTEN_", b"NOTIFY_", b"STATE_"))
    ]
    assert os.readlink(f"/proc/{pid}/cwd") == "/"
    assert not (tmp_path / "x").exists()
    os.kill(pid, signal.SIGTERM)
    block_until(lambda: not here.daemons())
    assert "SIGTERM: leaving" in here.log


def files_of(pid: int) -> list[str]:
    files = []
    for path in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # a connection that was closed meanwhile
            files.append(os.readlink(path))
    assert os.devnull in files
    return files


def children(parent: int) -> list[int]:
    pids = []
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if stat(int(path.name))["parent"] == str(parent):
                pids.append(int(path.name))
    return pids


def test_regctl_autostarts_and_stats_show_the_registry(here: Demand) -> None:
    assert pid_of() in here.daemons()
    assert here.regctl("ping") == (0, "regd answers\n", "")
    status, out, _ = here.regctl("stats")
    assert status == 0
    paths = {
        name: Path(path) for name, path in (line.split("  ", 1) for line in out.splitlines() if line.startswith(("registry  ", "log  ")))
    }  # fmt: skip
    assert paths["registry"].parent == paths["log"].parent == here.folder
    assert paths["registry"].stat().st_mode & 0o777 == 0o600
    assert paths["log"].stat().st_mode & 0o777 == 0o600
    assert "registrations at revision" in paths["log"].read_text()


@pytest.mark.sample(2)
@pytest.mark.parametrize("command", ["wait", "run"])
def test_regctl_wait_and_run_autostart(here: Demand, command: str) -> None:
    if command == "run":
        done = here.regctl("run", "web", "--wait", "db", "--timeout", "0.5", "--", "true")
    else:
        done = here.regctl("wait", "db", "--timeout", "0.5")
    assert done[0] in (1, 3)  # 1: db is not registered; 3: the daemon did not start within 0.5 s
    assert pid_of() in here.daemons()
    block_until(lambda: here.starts == 1)


@pytest.mark.long
async def test_client_restarts_a_killed_daemon(here: Demand) -> None:
    async with (
        regd_client.Client(connect_timeout_s=SLOW_S) as client,
        client.register("web", 1) as registration,
    ):
        first = (await client.stats())["pid"]
        os.kill(first, signal.SIGKILL)
        async with asyncio.timeout(SLOW_S):
            await registration.update({"zone": "a"})  # waits until it is registered again
            assert (await client.stats())["pid"] != first
            assert (await client.resolve("web")).meta == {"zone": "a"}


async def test_client_during_shutdown_gets_a_new_daemon(here: Demand, tmp_path: Path) -> None:
    """The kernel connects clients that the stopping daemon no longer accepts. They are reset, and start a daemon."""

    async def async_pid() -> int:
        async with regd_client.Client(connect_timeout_s=SLOW_S) as client:
            return int((await client.stats())["pid"])

    async with InLoop(tmp_path / "registry.json", unix=tmp_path / "s", idle_exit_s=80.0) as stopping:
        stopping.clock.advance(90.0)
        await stopping.server.ended()
        async with asyncio.timeout(SLOW_S):
            tasks = [asyncio.create_task(async_pid()), asyncio.create_task(asyncio.to_thread(pid_of))]
            until_s = time.monotonic() + 0.05
            while time.monotonic() < until_s:  # long enough for both to send their request
                await asyncio.sleep(0)
            await stopping.server.stop()
            pids = set(await asyncio.gather(*tasks))
    await until(lambda: here.daemons() == pids)  # one that came too late has ended


# Where no daemon is started.


@pytest.mark.sample(4)
@pytest.mark.parametrize("value", [None, "", "0", "false", "No", "OFF", "11", "ja"])
async def test_autostart_is_off_by_default(
    here: Demand, value: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if value is None:
        monkeypatch.delenv("REGD_AUTOSTART")
    else:
        monkeypatch.setenv("REGD_AUTOSTART", value)
    await assert_not_started(here)


@pytest.mark.parametrize("value", ["1", "true", "YES", "On"])
def test_values_that_enable_autostart(
    value: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("REGD_AUTOSTART", value)
    assert protocol.autostart_wanted(protocol.Address("127.0.0.1", 1))
    assert not protocol.autostart_wanted(protocol.Address("far.example", 1))
    assert not caplog.records


@pytest.mark.parametrize("value", ["11", "ja", " 1", "\x1b[31m"])
def test_invalid_autostart_value_is_logged_once(
    value: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(protocol, "_warned", set())
    monkeypatch.setenv("REGD_AUTOSTART", value)
    for _ in range(3):
        assert not protocol.autostart_wanted(protocol.Address("127.0.0.1", 1))
    assert caplog.messages == [
        f"REGD_AUTOSTART is {value!r}, which is neither yes nor no: no daemon is started; write 1 or 0"
    ]


async def assert_not_started(here: Demand, address: str | None = None) -> None:
    with pytest.raises(regd_client.Unavailable, match="no regd at"):
        BlockingConnection(address, timeout_s=0.2)
    with pytest.raises(regd_client.Unavailable, match="no regd at"):
        async with regd_client.Client(address, connect_timeout_s=0.2):
            pass
    assert not here.folder.exists()
    assert not here.daemons()


async def test_autostart_never_for_another_host(here: Demand) -> None:
    with reserved_port() as port:
        # 127.0.0.2 stands for another host: it refuses connections, and regd does not listen on it.
        await assert_not_started(here, f"tcp://127.0.0.2:{port}")
    for host in ("192.0.2.1", "db.example", "localhost.example", "127.0.0.1.example", "0.0.0.0", "::"):
        assert not protocol.autostart_wanted(protocol.Address(host, 1)), host
    for host in ("127.0.0.1", "::1", "localhost"):
        assert protocol.autostart_wanted(protocol.Address(host, 1)), host


async def test_autostart_never_when_a_daemon_is_silent(here: Demand, tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as silent:
        silent.bind(str(tmp_path / "s"))
        silent.listen()
        await assert_not_started(here)


def test_autostart_never_for_doctor_and_completion(here: Demand) -> None:
    assert "no program listens at" in here.regctl("doctor")[1]
    names = here.program("from regd.cli.complete_names import names; print(names(None, None))")
    assert names.communicate(timeout=SLOW_S) == ("None\n", "")
    assert not here.folder.exists()
    assert not here.daemons()


async def test_lost_daemon_gets_time_to_return(here: Demand, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connector, "_RESTART_S", 1_000.0)
    pid = await asyncio.to_thread(pid_of)
    async with regd_client.Client() as client:
        assert (await client.stats())["pid"] == pid
        client._connector.timeout_s = 0.2
        os.kill(pid, signal.SIGKILL)
        block_until(lambda: not here.daemons())
        for _ in range(2):  # the first request notices that the connection is broken
            with pytest.raises(regd_client.Unavailable, match="no regd at"):
                await client.stats()
    assert not here.daemons()
    assert here.starts == 1


async def test_autostart_never_when_another_program_answers(here: Demand, tmp_path: Path) -> None:
    async def greet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"220 mail ready\r\n")
        await reader.read()
        writer.close()

    async with await asyncio.start_unix_server(greet, tmp_path / "s"):
        with pytest.raises(regd_client.Unavailable, match="not a regd reply"):
            await regd_client.Client().ping()
        with pytest.raises(regd_client.Unavailable, match="not a regd reply"):
            await asyncio.to_thread(BlockingConnection)
    assert not here.folder.exists()


# Where the daemon cannot be started.


async def error_message(address: str | None = None) -> str:
    """Return the error message of both clients, which must be the same single line."""
    with pytest.raises(regd_client.Unavailable) as blocking:
        BlockingConnection(address, timeout_s=SLOW_S)
    with pytest.raises(regd_client.Unavailable) as asyncs:
        await regd_client.Client(address, connect_timeout_s=SLOW_S).ping()
    assert str(blocking.value) == str(asyncs.value)
    assert blocking.value.code == asyncs.value.code == autostart.NOT_STARTED
    assert "\n" not in str(blocking.value)
    return str(blocking.value)


async def test_state_folder_cannot_be_created(here: Demand, tmp_path: Path) -> None:
    (tmp_path / "state").touch()
    assert await error_message() == (
        f"regd at unix://{tmp_path}/s cannot be started: cannot use {here.folder}: Not a directory; "
        "give this user write access, or name another folder in XDG_STATE_HOME"
    )
    status, out, errors = here.regctl("wait", "db", "--timeout", "1000")  # does not retry
    assert (status, out) == (3, "")
    assert errors.startswith(f"regctl: regd at unix://{tmp_path}/s cannot be started: ")
    assert errors.count("\n") == 1


async def test_port_taken_on_one_address_family(here: Demand) -> None:
    """The address is free, but the daemon cannot listen on ::1. The error has the daemon's message and its log."""
    with reserved_port() as port, socket.socket(socket.AF_INET6) as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        other.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        other.bind(("::1", port))
        other.listen()
        assert await error_message(f"tcp://127.0.0.1:{port}") == (
            f"regd at tcp://127.0.0.1:{port} cannot be started: port {port} on ::1 is taken by another program, or "
            "by a regd that runs already; stop that one, or name another with --port; "
            f"its log is {here.folder}/registry-{port}.log"
        )
    assert here.log.count("is taken by") == 1  # not tried again for a while
    assert not list(here.folder.glob("*.json"))


async def test_client_package_without_daemon_reports_it(here: Demand, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(autostart, "_package_folder", lambda: None)
    monkeypatch.setenv("PATH", str(here.place))
    assert (await error_message()).endswith(
        "this Python does not have the package regd, and PATH does not have `regd`"
    )


def test_client_package_starts_regd_from_path(here: Demand, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(autostart, "_package_folder", lambda: None)
    command = here.place / "bin" / "regd"
    command.parent.mkdir()
    command.write_text(f"#!/bin/sh\nexec '{sys.executable}' -m regd \"$@\"\n")
    command.chmod(0o700)
    monkeypatch.setenv("PATH", f"{command.parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", here.environment()["PYTHONPATH"])
    assert pid_of() in here.daemons()


@pytest.fixture
def app(here: Demand, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make `sys.executable` a program that is not Python and that records its starts in a file."""
    program = here.place / "app"
    program.write_text(f"#!/bin/sh\necho \"$@\" >> '{here.place}/started'\n")
    program.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(program))
    monkeypatch.setenv("PATH", str(here.place))
    return program


@pytest.mark.parametrize("how", ["frozen", "embedded", "none"])
async def test_program_that_is_not_python_is_not_started_as_daemon(
    here: Demand, app: Path, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    subject = str(app)
    if how == "frozen":
        monkeypatch.setattr(sys, "frozen", True, raising=False)
    else:
        monkeypatch.setattr(sys, "exec_prefix", str(here.place))
    if how == "none":
        monkeypatch.setattr(sys, "executable", None)
        subject = "this program"
    assert (await error_message()).endswith(
        f"{subject} is not a Python interpreter, and PATH does not have `regd`; install regd, or start it yourself"
    )
    assert sorted(path.name for path in here.place.iterdir()) == ["app"]


def test_embedded_python_uses_the_interpreter_beside_it(here: Demand, app: Path) -> None:
    assert pid_of() in here.daemons()
    assert not (here.place / "started").exists()


def test_frozen_program_starts_regd_from_path(here: Demand, app: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the system's libraries, not with the bundled ones."""
    monkeypatch.setattr(sys, "frozen", True, raising=False)
    folder = here.place / "bin"
    folder.mkdir()
    command = folder / "regd"
    python = Path(sys.exec_prefix) / "bin" / "python"
    command.write_text(f"#!/bin/sh\nexec '{python}' -m regd \"$@\"\n")
    command.chmod(0o700)
    for key, value in {
        "PATH": f"{folder}:/usr/bin:/bin",
        "PYTHONPATH": here.environment()["PYTHONPATH"],
        "LD_LIBRARY_PATH": "/bundled",
        "LD_LIBRARY_PATH_ORIG": "/before",
        "_PYI_ARCHIVE_FILE": "app",
    }.items():
        monkeypatch.setenv(key, value)
    pid = pid_of()
    variables = Path(f"/proc/{pid}/environ").read_text().split("\0")
    assert "LD_LIBRARY_PATH=/before" in variables
    assert not [variable for variable in variables if variable.startswith(("_PYI", "LD_LIBRARY_PATH_ORIG"))]
    assert not (here.place / "started").exists()


@pytest.mark.parametrize("home", [None, "", "relative"])
async def test_autostart_without_a_home_creates_nothing(
    here: Demand, home: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(here.place)
    monkeypatch.delenv("XDG_STATE_HOME")
    monkeypatch.setattr(autostart, "_home", lambda: "")
    if home is None:
        monkeypatch.delenv("HOME")
    else:
        monkeypatch.setenv("HOME", home)
    assert (await error_message()).endswith(
        "it has no folder for its registry: HOME is not an absolute path, and this user has no home folder; set HOME "
        "or XDG_STATE_HOME"
    )
    assert list(here.place.iterdir()) == []


@pytest.mark.parametrize("path", ["bin", f"bin{os.pathsep}/usr/bin"])
def test_autostart_from_a_deleted_folder(here: Demand, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Relative entries of PATH and PYTHONPATH are skipped."""
    folder = here.place / "deleted"
    folder.mkdir()
    original = Path.cwd()
    os.chdir(folder)
    folder.rmdir()
    try:
        monkeypatch.setenv("PATH", path)
        monkeypatch.setenv("PYTHONPATH", f"relative{os.pathsep}{here.environment()['PYTHONPATH']}")
        assert autostart._daemon_environment()["PYTHONPATH"].count("relative") == 0
        assert pid_of() in here.daemons()
    finally:
        os.chdir(original)


def test_daemon_does_not_inherit_ignored_signals(here: Demand) -> None:
    code = f"""
import signal
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD):
    signal.signal(number, signal.SIG_IGN)
{BLOCKING}"""
    [pid] = pids_of([here.program(code)])
    os.kill(pid, signal.SIGTERM)
    block_until(lambda: not here.daemons())
    assert here.starts == 1


@pytest.mark.long
def test_idle_exit_is_an_orderly_stop(tmp_path: Path) -> None:
    with DaemonProcess(tmp_path / "registry.json", "--idle-exit", "1") as daemon:
        daemon.start()
        assert daemon.process is not None
        _, errors = daemon.process.communicate(timeout=WAIT_S)
        assert daemon.process.returncode == 0
        daemon.process = None
    assert errors.splitlines()[-1].endswith(
        "INFO nothing was registered and nobody connected for 1 s: leaving"
    ), errors
    assert not os.path.exists(tmp_path / "registry.json.tmp")
