"""Project registries with real processes: one daemon for each, started on demand, ended when it is of no use."""

import asyncio
import contextlib
import json
import os
import re
import shutil
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import regd
import regd_client
from regd.cli.log_output import LogOutput
from regd_client import autostart, blocking, project
from regd_client.blocking_connection import BlockingConnection
from tests.support.daemon import ROOT, WAIT_S
from tests.support.demand import SLOW_S
from tests.support.polling import block_until
from tests.support.projects import Project, project_registry
from tests.system.test_autostart import ASYNC, BLOCKING, pids_of

VERSION = regd.__version__


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Project]:
    """A project in which this process is, too."""
    for name in ("REGD_ADDRESS", "REGD_AUTOSTART"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(autostart, "_failures", {})
    monkeypatch.setenv("HOME", str(tmp_path))
    with project_registry(tmp_path, tmp_path / "shop") as here:
        monkeypatch.chdir(here.place)
        yield here


@contextlib.contextmanager
def serving(here: Project, *flags: str, **extra: str) -> "Iterator[subprocess.Popen[str]]":
    """Run `regd --project` in the foreground, once it listens."""
    command = [sys.executable, "-m", "regd", "--project", str(here.folder), *flags]
    with subprocess.Popen(
        command, env=here.environment(**extra), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == f"listening unix://{here.socket}\n"
            yield process
        finally:
            process.kill()
            process.communicate()


def pid_here() -> int:
    with BlockingConnection(timeout_s=SLOW_S) as connection:
        return int(connection.ask("stats")["pid"])


def remove(folder: Path) -> None:
    """Remove a folder in which a daemon may be writing."""
    while folder.exists():
        shutil.rmtree(folder, ignore_errors=True)


# On demand.


@pytest.mark.long
def test_thirty_simultaneous_clients_start_one_daemon(here: Project) -> None:
    pids = pids_of([here.program(ASYNC if number % 5 == 0 else BLOCKING) for number in range(30)])
    assert len(pids) == 1
    block_until(lambda: here.daemons() == pids)
    assert here.starts == 1, here.log
    assert "in use" not in here.log
    names = {path.name for path in here.folder.iterdir()}
    assert {"regd.log", "regd.sock", "registry.json"} <= names
    assert all(path.stat().st_mode & 0o077 == 0 for path in here.folder.iterdir() if path.name != ".gitignore")


def test_daemon_listens_on_nothing_else(here: Project) -> None:
    pid = pid_here()
    sockets = set()
    for path in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            if match := re.fullmatch(r"socket:\[(\d+)\]", os.readlink(path)):
                sockets.add(match[1])
    listening = []
    for table in ("tcp", "tcp6"):
        rows = [line.split() for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]]
        listening += [row[1] for row in rows if row[3] == "0A" and row[9] in sockets]
    assert listening == []
    assert stat.S_IMODE(here.socket.stat().st_mode) == 0o600


async def test_autostart_off_starts_nothing_and_says_so(here: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REGD_AUTOSTART", "0")
    expected = (
        f"no regd at unix://{here.socket} (No such file or directory); start one with `regd --project {here.folder}` "
        "(REGD_AUTOSTART=0 keeps this program from starting it), or name another address in REGD_ADDRESS"
    )
    with pytest.raises(regd_client.Unavailable) as refused:
        BlockingConnection(timeout_s=0.2)
    assert str(refused.value) == expected
    with pytest.raises(regd_client.Unavailable) as refused:
        await regd_client.resolve("db")
    assert str(refused.value) == expected
    status, _, errors = here.regctl("list", REGD_AUTOSTART="0")
    assert (status, errors) == (3, f"regctl: {expected}\n")
    assert sorted(path.name for path in here.folder.iterdir()) == [".gitignore", "id"]
    assert not here.daemons()


def test_two_projects_use_the_same_names(here: Project, tmp_path: Path) -> None:
    with project_registry(tmp_path, tmp_path / "other") as other:
        for place, port in ((here, 5001), (other, 5002)):
            (place.place / "src").mkdir()
            assert place.prints("register", "db", str(port)) == f"127.0.0.1:{port}\n"
        for place, port in ((here, 5001), (other, 5002)):
            assert place.prints("resolve", "db", cwd=str(place.place / "src")) == f"127.0.0.1:{port}\n"
        assert len(here.daemons() | other.daemons()) == 2
        assert here.prints("resolve", "db", "--address", f"unix://{other.socket}") == "127.0.0.1:5002\n"


async def test_long_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("REGD_ADDRESS", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    with project_registry(tmp_path, tmp_path / ("x" * 200) / ("y" * 200)) as here:
        monkeypatch.chdir(here.place)
        assert here.prints("register", "db", "5432") == "127.0.0.1:5432\n"
        assert (await regd_client.resolve("db")).port == 5432
        assert blocking.resolve("db").port == 5432
        assert f"daemon  regd {VERSION}" in here.prints("where")
        assert here.prints("stop").startswith(f"regd at unix://{here.socket} has ended")
        assert not here.socket.exists()


@pytest.mark.long
async def test_client_starts_a_killed_daemon_again(here: Project) -> None:
    async with regd_client.Client(connect_timeout_s=SLOW_S) as client, client.register("web", 1) as registration:
        first = (await client.stats())["pid"]
        os.kill(first, signal.SIGKILL)
        async with asyncio.timeout(SLOW_S):
            await registration.update({"zone": "a"})
            assert (await client.stats())["pid"] != first


# The end.


@pytest.mark.sample(4)
@pytest.mark.parametrize("removed", ["folder", "socket", "parent", "moved"])
def test_daemon_ends_when_its_folder_or_socket_is_removed(here: Project, removed: str) -> None:
    here.prints("register", "db", "5432")
    if removed == "socket":
        here.socket.unlink()
    elif removed == "moved":
        here.place.rename(here.place.with_name("store"))
    else:
        remove(here.folder if removed == "folder" else here.place)
    block_until(lambda: not here.daemons())
    assert not here.socket.exists()
    if removed == "socket":
        assert f"{here.socket} was removed: leaving" in here.log
        assert here.prints("resolve", "db") == "127.0.0.1:5432\n"
    else:
        assert not here.folder.exists()


@pytest.mark.long
async def test_client_of_a_removed_folder_makes_nothing_there(here: Project) -> None:
    async with regd_client.Client(connect_timeout_s=2.0) as client:
        await client.ping()
        remove(here.folder)
        block_until(lambda: not here.daemons())
        refusals = []
        for _ in range(2):  # the first request notices that the connection is broken
            with pytest.raises(regd_client.Unavailable) as refused:
                await client.ping()
            refusals.append(str(refused.value))
    assert f"{here.folder} was removed: run `regctl init` again" in refusals[-1]
    assert not here.folder.exists()


@pytest.mark.long
def test_old_daemon_leaves_a_new_registry_alone(here: Project) -> None:
    """The folder is removed and made again before the first daemon has noticed."""
    here.prints("register", "old", "1")
    first = here.daemons()
    remove(here.folder)
    assert here.prints("init") != ""
    here.prints("register", "new", "2")
    block_until(lambda: not here.daemons() & first)
    assert here.prints("list").split("\t")[0] == "new"
    assert here.prints("list").count("\n") == 1
    assert len(here.daemons()) == 1


def test_connected_client_writes_nothing_into_a_new_registry(here: Project) -> None:
    """The old daemon may serve its connections for a moment longer."""
    with BlockingConnection(timeout_s=SLOW_S) as connection:
        assert connection.ask("register", name="old", port=1, hold=True)["ok"]
        remove(here.folder)
        project.init(str(here.place))
        with contextlib.suppress(regd_client.Unavailable):  # if the daemon has noticed already
            assert not connection.ask("register", name="later", port=2)["ok"]
    block_until(lambda: not here.daemons())
    assert sorted(path.name for path in here.folder.iterdir()) == [".gitignore", "id"]


@pytest.mark.long
def test_daemon_ends_when_idle_with_static_entries(here: Project) -> None:
    with serving(here, "--idle-exit", "1") as daemon:
        with BlockingConnection() as connection:
            assert connection.ask("register", name="db", port=5432)["ok"]
        _, errors = daemon.communicate(timeout=WAIT_S)
        assert daemon.returncode == 0
        assert errors.splitlines()[-1].endswith("INFO nothing had an owner and nobody connected for 1 s: leaving")
    assert here.prints("resolve", "db") == "127.0.0.1:5432\n"  # survives


@pytest.mark.long
@pytest.mark.parametrize("kind", ["hold", "pid", "ttl"])
def test_daemon_stays_while_something_has_a_holder(here: Project, kind: str) -> None:
    with serving(here, "--idle-exit", "2") as daemon, contextlib.ExitStack() as stack:
        connection = stack.enter_context(BlockingConnection())
        value = {"hold": True, "pid": os.getpid(), "ttl": 600}[kind]
        assert connection.ask("register", name="db", port=5432, **{kind: value})["ok"]
        if kind != "hold":
            connection.close()
        time.sleep(3.0)
        assert daemon.poll() is None
        with BlockingConnection() as other:
            assert other.ask("deregister", name="db")["ok"]
        connection.close()
        assert daemon.wait(WAIT_S) == 0


@pytest.mark.long
def test_regd_project_refuses_other_flags_and_folders(here: Project, tmp_path: Path) -> None:
    def refusal(*flags: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "regd", *flags], env=here.environment(), capture_output=True, text=True, timeout=WAIT_S, check=False,
        )  # fmt: skip
        assert done.returncode != 0
        assert done.stdout == ""
        assert done.stderr.count("\n") == 1
        return done.stderr

    for flag, value in (("--port", "7343"), ("--unix", "/x"), ("--registry", "/x")):
        said = refusal("--project", str(here.folder), flag, value)
        assert f"{flag} {value}: a project registry has its own; leave the flag out" in said
    assert "there is no such folder; run `regctl init` in" in refusal("--project", str(tmp_path / "none"))
    here.folder.chmod(0o755)
    assert "its mode is 0755 and must be 0700" in refusal("--project", str(here.folder))


def test_second_daemon_of_a_project_is_refused(here: Project) -> None:
    pid = pid_here()
    done = subprocess.run(
        [sys.executable, "-m", "regd", "--project", str(here.folder)], env=here.environment(), capture_output=True, text=True, timeout=WAIT_S, check=False,
    )  # fmt: skip
    assert done.returncode != 0
    assert f"is in use by another regd (process {pid})" in done.stderr
    assert here.daemons() == {pid}


# The log.


def test_log_is_at_most_two_files_of_the_size(tmp_path: Path) -> None:
    path, size = tmp_path / "regd.log", 10_000
    output = LogOutput(path, "text", size)
    output.start("info")
    try:
        for number in range(4_000):
            output._put(f"line {number} {'x' * (number % 90)}\n".encode())
            if number % 100 == 0:
                block_until(lambda: not output._pending_bytes)  # written, and perhaps rotated
                assert all(each.stat().st_size <= size for each in tmp_path.iterdir())
    finally:
        output.close()
    assert sorted(each.name for each in tmp_path.iterdir()) == ["regd.log", "regd.log.1"]
    assert all(each.stat().st_size <= size for each in tmp_path.iterdir())
    lines = ((tmp_path / "regd.log.1").read_text() + path.read_text()).splitlines()
    assert [int(line.split()[1]) for line in lines] == list(range(4_000))[-len(lines) :]


def test_log_of_a_daemon_on_demand_begins_anew_when_full(here: Project) -> None:
    log = here.folder / "regd.log"
    log.write_text("x" * (autostart.LOG_MIB * 2**20))
    here.prints("register", "db", "5432")
    assert (here.folder / "regd.log.1").stat().st_size == autostart.LOG_MIB * 2**20
    block_until(lambda: "up db at 127.0.0.1:5432" in here.log)
    assert log.stat().st_size < 1_000
    assert log.stat().st_mode & 0o777 == 0o600


def test_daemon_of_another_address_has_the_limit_too(tmp_path: Path) -> None:
    start = autostart.Autostart(regd_client.protocol.parse_address("unix:///tmp/s"))
    start._program = ["regd"]
    command = start._command()
    assert command[command.index("--log-mib") + 1] == "4"


# regctl where.


def test_where_says_which_registry_and_why(here: Project, tmp_path: Path) -> None:
    shutil.copytree(here.place, copy := here.place / "copy")
    (copy / ".regd").chmod(0o700)
    at = f"unix://{here.socket}"
    ignored = f"{copy}/.regd: it was copied or moved from elsewhere; run `regctl init` in {copy}, or remove it"
    status, out, errors = here.regctl("where", cwd=str(copy))
    assert status == 0
    assert out.splitlines() == [
        at,
        f"  why     the project registry of {here.place}",
        "  daemon  none answers; it is started when a program needs it",
        f"  regctl  {VERSION}",
        "  not     --address: it is not given",
        "  not     REGD_ADDRESS: it is not set",
        f"  not     {ignored}",
        "  not     tcp://127.0.0.1:7343, the default",
    ]
    assert errors == f"{ignored.replace('.regd:', '.regd is ignored:')}\n"  # the client's warning
    assert not here.daemons()
    pid = pid_here()
    assert here.prints("where").splitlines()[2] == f"  daemon  regd {VERSION}, process {pid}"
    assert "none answers\n" in here.prints("where", "--address", "127.0.0.1:1")
    assert here.prints("where", REGD_ADDRESS="127.0.0.1:1").splitlines()[1] == "  why     REGD_ADDRESS"
    assert f"  not     {here.folder}: REGD_ADDRESS comes first\n" in here.prints(
        "where", REGD_ADDRESS="127.0.0.1:1"
    )
    said = here.prints("where", "--address", "127.0.0.1:1", REGD_ADDRESS="127.0.0.1:2")
    assert said.splitlines()[0] == "tcp://127.0.0.1:1"
    assert "  not     REGD_ADDRESS, which is 127.0.0.1:2: --address comes first\n" in said
    said = here.prints("where", cwd=str(tmp_path))
    assert said.splitlines()[:2] == ["tcp://127.0.0.1:7343", "  why     the default"]
    assert "  not     a project registry: there is none here\n" in said


def test_where_as_json(here: Project, tmp_path: Path) -> None:
    answer = json.loads(here.prints("where", "--json"))
    assert answer == {
        "ok": True,
        "address": f"unix://{here.socket}",
        "source": "project",
        "project": str(here.folder),
        "daemon": None,
        "version": VERSION,
        "ignored": [],
    }
    pid = pid_here()
    assert json.loads(here.prints("where", "--json"))["daemon"] == {"version": VERSION, "pid": pid}
    here.folder.chmod(0o755)
    _, out, _ = here.regctl("where", "--json")
    answer = json.loads(out)
    assert (answer["source"], answer["project"]) == ("default", None)
    assert [each["folder"] for each in answer["ignored"]] == [str(here.folder)]
    here.folder.chmod(0o700)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (b"220 mail\x1b[31m ready\r\n", "not a regd reply ("),
        (b'{"ok":true,"version":7}\n', "not a regd reply ("),
        (b'{"ok":false,"error":"busy","message":"full \\u001b[31m"}\n', "full \\x1b[31m"),
        (b"", "the connection ended before the answer"),
    ],
)
def test_where_and_stop_with_another_program_on_the_socket(here: Project, line: bytes, said: str) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(here.socket))
        listener.listen()

        def answer() -> None:
            for _ in range(2):
                peer, _ = listener.accept()
                with peer:
                    peer.recv(1_000)
                    peer.sendall(line)

        thread = threading.Thread(target=answer)
        thread.start()
        out = here.prints("where")
        assert said in out.splitlines()[2]
        assert out.startswith(f"unix://{here.socket}\n")
        assert "\x1b" not in out
        status, out, errors = here.regctl("stop")
        assert status in (3, 4)
        assert (out, errors.count("\n")) == ("", 1)
        assert "\x1b" not in errors
        thread.join()
    assert not here.daemons()


def test_init_by_regctl(here: Project, tmp_path: Path) -> None:
    fresh = tmp_path / "fresh"
    fresh.mkdir()
    line = f"{fresh}/.regd is the registry of all programs that are started in {fresh} and below\n"
    assert here.prints("init", cwd=str(fresh)) == line
    assert here.prints("init", str(fresh)) == line
    (fresh / ".regd" / "id").unlink()
    (fresh / ".regd" / "registry.json").touch()
    status, out, errors = here.regctl("init", cwd=str(fresh))
    assert (status, out) == (0, line)
    assert errors.startswith(
        f"regctl: {fresh}/.regd was not made here: its files are now in {fresh}/.regd/set-aside-"
    )
    status, _, errors = here.regctl("init", cwd=str(fresh), REGD_ADDRESS="127.0.0.1:1")
    assert status == 0
    assert "REGD_ADDRESS is 127.0.0.1:1, and comes first" in errors
    status, out, errors = here.regctl("init", str(tmp_path / "missing"))
    assert (status, out) == (4, "")
    assert errors.startswith("regctl: cannot make ")
    answer = json.loads(here.prints("init", "--json", cwd=str(fresh)))
    assert answer == {"ok": True, "project": f"{fresh}/.regd", "set_aside": None}


# regctl stop.


def test_stop_ends_the_daemon_of_the_project(here: Project) -> None:
    here.prints("register", "db", "5432")
    [pid] = here.daemons()
    assert here.prints("stop") == f"regd at unix://{here.socket} has ended (process {pid})\n"
    assert not here.daemons()
    assert "SIGTERM: leaving" in here.log
    assert here.prints("stop") == f"no regd runs at unix://{here.socket}\n"
    assert json.loads(here.prints("stop", "--json")) == {
        "ok": True,
        "address": f"unix://{here.socket}",
        "pid": None,
    }
    assert here.prints("resolve", "db") == "127.0.0.1:5432\n"


def test_stop_of_another_unix_socket(here: Project, tmp_path: Path) -> None:
    with serving(here) as daemon:
        answer = json.loads(
            here.prints("stop", "--json", "--address", f"unix://{here.socket}", cwd=str(tmp_path))
        )
        assert answer == {"ok": True, "address": f"unix://{here.socket}", "pid": daemon.pid}
        assert daemon.wait(WAIT_S) == 0


def test_stop_over_tcp_says_how_instead(here: Project) -> None:
    more: dict[str, str]
    for more in ({}, {"REGD_ADDRESS": "127.0.0.1:1"}):
        arguments = [] if more else ["--address", "127.0.0.1:1"]
        status, out, errors = here.regctl("stop", *arguments, **more)
        assert (status, out) == (4, "")
        assert errors.startswith(
            "regctl: regctl stop works over Unix sockets only, not for tcp://127.0.0.1:1: end"
        )
        assert "Ctrl-C" in errors


FAKE = """
import json, os, socket, sys
path, pid, version = sys.argv[1], int(sys.argv[2]), sys.argv[3]
listener = socket.socket(socket.AF_UNIX)
listener.bind(path)
listener.listen()
print("listening", flush=True)
stats = dict.fromkeys(("rev", "registrations", "uptime_s", "connections", "watches", "waiting"), 0)
stats |= {"pid": pid, "version": version, "epoch": "5eed5eed5eed5eed", "requests": {}, "errors": {}, "limits": {}}
hello = {"server": "regd", "version": version, "protocol": 1, "epoch": "5eed5eed5eed5eed", "rev": 0, "features": [],
         "limits": {}, "host": {"boot": None, "pid_namespace": None}, "loop": "asyncio"}
args = {key: {"type": "x", "required": False, "doc": "x"} for key in ("name", "port", "instance", "hold")}
commands = {name: {"doc": "x", "result": "x", "args": args} for name in ("hello", "help", "ping", "register", "stats")}
while True:
    peer, _ = listener.accept()
    for line in peer.makefile("rb"):
        request = json.loads(line)
        cmd, id = request.pop("cmd"), request.pop("id", None)
        unknown = [key for key in request if key not in args]
        if cmd == "hello":
            reply = {"ok": True, **hello}
        elif cmd == "help":
            reply = {"ok": True, "commands": commands}
        elif cmd == "stats":
            reply = {"ok": True, **stats}
        elif cmd == "ping":
            reply = {"ok": True}
        elif cmd not in commands:
            reply = {"ok": False, "error": "unknown_command", "message": f"no command {cmd!r}"}
        elif unknown:
            reply = {"ok": False, "error": "bad_argument", "message": f"no argument {unknown[0]!r}", "field": unknown[0]}
        else:
            reply = {"ok": True, "name": "db", "instance": "", "host": "127.0.0.1", "port": 1, "rev": 1}
        peer.sendall(json.dumps(reply | ({} if id is None else {"id": id})).encode() + b"\\n")
"""


@contextlib.contextmanager
def fake_daemon(here: Project, pid: int, version: str) -> "Iterator[subprocess.Popen[str]]":
    """Run a program on the project's socket that answers as a regd of that version and states that process."""
    command = [sys.executable, "-c", FAKE, str(here.socket), str(pid), version]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as fake:
        try:
            assert fake.stdout is not None
            assert fake.stdout.readline() == "listening\n"
            yield fake
        finally:
            fake.kill()


def test_stop_does_not_signal_a_process_that_an_impostor_names(here: Project) -> None:
    with subprocess.Popen(["sleep", "100"]) as victim:
        try:
            with fake_daemon(here, victim.pid, VERSION) as fake:
                status, out, errors = here.regctl("stop")
                assert (status, out) == (4, "")
                assert f"process {fake.pid} has opened the socket, not regd (process {victim.pid})" in errors
                assert fake.poll() is None
            assert victim.poll() is None
        finally:
            victim.kill()


def test_stop_refuses_a_daemon_whose_socket_another_process_opened(here: Project, tmp_path: Path) -> None:
    """As systemd does: the kernel names it, and it must not be ended."""
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        code = (
            "import os, sys; os.dup2(int(sys.argv[1]), 3); os.environ['LISTEN_PID'] = str(os.getpid()); "
            "os.execv(sys.executable, [sys.executable, '-m', 'regd', '--registry', sys.argv[2]])"
        )
        with subprocess.Popen(
            [sys.executable, "-c", code, str(listener.fileno()), str(tmp_path / "registry.json")],
            env=here.environment(LISTEN_FDS="1"),
            pass_fds=(listener.fileno(), 3) if listener.fileno() != 3 else (3,),
            stdout=subprocess.PIPE,
            text=True,
        ) as daemon:
            try:
                assert daemon.stdout is not None
                assert daemon.stdout.readline() == f"listening unix://{path}\n"
                status, _, errors = here.regctl("stop", "--address", f"unix://{path}")
                assert status == 4
                assert f"process {os.getpid()} has opened the socket, not regd (process {daemon.pid})" in errors
                assert daemon.poll() is None
            finally:
                daemon.kill()


# A daemon that is older than the client.


async def test_older_daemon_is_unsupported(here: Project) -> None:
    message = (
        "regd 0.0.9 at unix://"
        + str(here.socket)
        + " has no {}, and this client is "
        + VERSION
        + "; restart that regd"
    )
    command, argument = message.format("command history"), message.format("argument priority of register")
    with fake_daemon(here, os.getpid(), "0.0.9"):

        def ask() -> None:
            with BlockingConnection() as connection:
                reply = connection.ask("history")
                assert (reply["error"], reply["message"]) == ("unsupported", command)
                reply = connection.ask("register", name="db", port=1, priority=1)
                assert (reply["error"], reply["message"]) == ("unsupported", argument)
                assert connection.ask("register", name="db", port=1)["ok"]

        await asyncio.to_thread(ask)
        status, _, errors = await asyncio.to_thread(here.regctl, "history")
        assert (status, errors) == (4, f"regctl: {command}\n")
        status, _, errors = await asyncio.to_thread(here.regctl, "register", "db", "1", "--ttl", "9")
        assert (status, errors) == (4, f"regctl: {message.format('argument ttl of register')}\n")


async def test_older_daemon_is_unsupported_for_client(here: Project) -> None:
    with fake_daemon(here, os.getpid(), "0.0.9"):
        async with regd_client.Client() as client:
            with pytest.raises(
                regd_client.RegdError, match=r"regd 0\.0\.9 at .* has no command history, and"
            ) as refused:
                await client.history()
            assert refused.value.code == "unsupported"
            with pytest.raises(regd_client.RegdError, match=r"has no argument meta of register, and") as refused:
                await client.register("db", 1, meta={"zone": "a"})
            assert refused.value.code == "unsupported"
            with pytest.raises(regd_client.RegdError, match="has no command watch, and"):
                async for _ in client.watch("db"):
                    pass
    here.socket.unlink()
    with fake_daemon(here, os.getpid(), VERSION):  # as new as the client: its own words
        async with regd_client.Client() as client:
            with pytest.raises(regd_client.RegdError, match="no command 'history'") as refused:
                await client.history()
            assert refused.value.code == "unknown_command"


# doctor, run, lifespan and the blocking client inside a project.


def test_doctor_in_a_project(here: Project) -> None:
    status, out, _ = here.regctl("doctor")
    assert status == 0, out
    assert f"unix://{here.socket}, from the project registry of {here.place}\n" in out
    assert f"none runs at unix://{here.socket}; it is started when a program needs it\n" in out
    assert not here.daemons()
    status, out, _ = here.regctl("doctor", REGD_AUTOSTART="0")
    assert (status, "no program listens at" in out) == (1, True)
    pid_here()
    out = here.regctl("doctor")[1]
    assert f"regd {VERSION} answers at unix://{here.socket}\n" in out
    here.folder.chmod(0o755)
    status, out, _ = here.regctl("doctor", "--json")
    assert status == 1
    [finding] = [each for each in json.loads(out)["findings"] if each["check"] == "project"]
    assert finding == {
        "check": "project",
        "ok": False,
        "found": f"{here.folder} is ignored: its mode is 0755 and must be 0700",
        "do": f"run `regctl init` in {here.place}, or remove it",
    }
    here.folder.chmod(0o700)


def test_run_in_a_project(here: Project) -> None:
    code = "import os, socket, time; s = socket.create_server(('127.0.0.1', int(os.environ['PORT']))); time.sleep(100)"
    command = [sys.executable, "-m", "regd.cli.regctl", "run", "web", "--", sys.executable, "-c", code]
    with subprocess.Popen(command, cwd=here.place, env=here.environment(), stderr=subprocess.DEVNULL) as run:
        try:
            assert here.prints("wait", "web", "--timeout", "30").startswith(
                "web accepts connections at 127.0.0.1:"
            )
        finally:
            run.terminate()
            run.wait(WAIT_S)


async def test_ports_and_numbers_stay_in_a_project(here: Project) -> None:
    """The history of the project's registry tells the ports, also to `regctl run` and after a new daemon."""
    async with regd_client.listen("web") as first, regd_client.listen("web", instance="auto") as second:
        ports = {"": first.port, "1": second.port}
        assert second.endpoint.instance == "1"
    await asyncio.to_thread(here.prints, "stop")
    async with regd_client.listen("web", instance="auto") as copy:
        assert (copy.endpoint.instance, copy.port) == ("1", ports["1"])
    printed = await asyncio.to_thread(here.prints, "run", "web", "--", "sh", "-c", "echo $PORT")
    assert int(printed) == ports[""]


async def test_lifespan_and_blocking_client_in_a_project(here: Project) -> None:
    async with regd_client.listen("shop") as listening:
        assert (await regd_client.resolve("shop")).port == listening.endpoint.port
        assert (await asyncio.to_thread(blocking.resolve, "shop")).port == listening.endpoint.port
        assert here.prints("resolve", "shop") == f"{listening.endpoint}\n"
    assert len(here.daemons()) == 1


def test_warning_of_a_test_that_uses_the_project(here: Project) -> None:
    test = here.place / "test_shop.py"
    test.write_text(
        "from regd_client import blocking\n"
        "def test_one():\n    blocking.register('db', 1)\n"
        "def test_two():\n    blocking.resolve('db')\n"
        "def test_private(regd):\n    assert blocking.resolve_all('db') == []\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-o", "log_cli=true", str(test)], cwd=here.place, env=here.environment(), capture_output=True, text=True, timeout=SLOW_S, check=False,
    )  # fmt: skip
    assert "3 passed" in done.stdout, done.stdout
    assert done.stdout.count("a test uses the project registry") == 1, done.stdout


def test_daemon_that_cannot_start_says_why_although_its_log_begins_anew(here: Project) -> None:
    (here.folder / "regd.log").write_text("x" * (autostart.LOG_MIB * 2**20))
    (here.folder / "registry.json").write_text("{")
    for _ in range(2):
        status, _, errors = here.regctl("list")
        assert status == 3
        assert f"{here.folder}/registry.json" in errors
        assert "nothing was changed: correct the file" in errors


# Trust, and other places.


def test_folder_that_came_with_a_repository_does_not_count(here: Project, tmp_path: Path) -> None:
    def git(*words: str) -> None:
        identity = ["-c", "user.name=A", "-c", "user.email=a@example.org", "-c", "init.defaultBranch=main"]
        subprocess.run(
            ["git", *identity, *words], cwd=here.place, env=here.environment(), check=True, capture_output=True
        )

    if shutil.which("git") is None:
        pytest.skip("no git on this machine")
    (here.folder / "registry.json").write_text('{\n"db": {"port": 1}\n}\n')
    git("init")
    git("add", "-A")
    status = subprocess.check_output(["git", "status", "--porcelain"], cwd=here.place, env=here.environment())
    assert status == b""  # git ignores all of it
    git("add", "-f", ".regd")
    git("commit", "-m", "hostile")
    git("clone", str(here.place), str(tmp_path / "clone"))
    clone = tmp_path / "clone"
    assert (clone / ".regd" / "id").exists()
    for mode in (0o755, 0o700):
        (clone / ".regd").chmod(mode)
        assert project.search(str(clone)).folder is None
    out = here.regctl("where", cwd=str(clone))[1]
    assert "tcp://127.0.0.1:7343\n" in out
    _, aside = project.init(str(clone))
    assert aside is not None
    assert Path(aside, "registry.json").exists()
    with project_registry(tmp_path, clone) as cloned:
        assert cloned.regctl("resolve", "db")[0] == 1


def test_two_terminals_share_the_daemon(here: Project) -> None:
    """Each shell is a session of its own, and the end of the first one does not end the daemon."""
    if shutil.which("script") is None:
        pytest.skip("no script(1) on this machine")
    for command in ("register db 5432", "resolve db"):
        done = subprocess.run(
            ["script", "-qec", f"{sys.executable} -m regd.cli.regctl {command}", "/dev/null"], cwd=here.place, env=here.environment(), capture_output=True, text=True, timeout=SLOW_S, check=False,
        )  # fmt: skip
        assert "127.0.0.1:5432" in done.stdout
    assert len(here.daemons()) == 1
    assert here.starts == 1


def test_empty_environment_as_of_cron(here: Project) -> None:
    here.prints("register", "db", "5432")
    here.prints("stop")
    path = f"{ROOT}{os.pathsep}{ROOT / 'client'}"
    code = f"import sys; sys.path[:0] = {path.split(os.pathsep)!r}; from regd_client import blocking; print(blocking.resolve('db'))"
    done = subprocess.run(
        ["env", "-i", sys.executable, "-c", code], cwd=here.place, capture_output=True, text=True, timeout=SLOW_S, check=False,
    )  # fmt: skip
    assert (done.stdout, done.stderr) == ("127.0.0.1:5432\n", "")
    assert len(here.daemons()) == 1


@pytest.fixture
def unshare() -> list[str]:
    """A command line that runs a program in other namespaces."""
    command = ["unshare", "--user", "--map-root-user", "--pid", "--fork", "--mount-proc"]
    if os.geteuid() == 0:
        command = ["unshare", "--pid", "--fork", "--mount-proc"]
    if (
        shutil.which("unshare") is None
        or subprocess.run([*command, "true"], capture_output=True, check=False).returncode
    ):
        pytest.skip("this machine does not let the tests make namespaces")
    return command


def test_container_with_the_folder_mounted(here: Project, unshare: list[str]) -> None:
    """Another pid namespace: its programs use the daemon, and hold their names by their connections."""
    with blocking.register("web", 1):
        code = """
import sys
from regd_client import blocking
with blocking.register("db", 5432):
    print(blocking.resolve("web"), flush=True)
    sys.stdin.readline()
"""
        with subprocess.Popen(
            [*unshare, sys.executable, "-c", code], cwd=here.place, env=here.environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        ) as there:  # fmt: skip
            assert there.stdout is not None
            assert there.stdout.readline() == "127.0.0.1:1\n", there.communicate()
            with BlockingConnection() as connection:
                [entry] = connection.ask("resolve", name="db", all=True)["instances"]
            assert entry["hold"]
            assert "pid" not in entry
            there.communicate("\n", timeout=SLOW_S)
        block_until(lambda: not blocking.resolve_all("db"))
        status, out, errors = subprocess_result([*unshare, sys.executable, "-m", "regd.cli.regctl", "stop"], here)
        assert (status, out) == (4, "")
        assert "the kernel does not say which process this regd is" in errors
    assert len(here.daemons()) == 1


def subprocess_result(command: list[str], here: Project) -> tuple[int, str, str]:
    done = subprocess.run(
        command,
        cwd=here.place,
        env=here.environment(),
        capture_output=True,
        text=True,
        timeout=SLOW_S,
        check=False,
    )
    return done.returncode, done.stdout, done.stderr


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may run a program as another user")
def test_container_with_another_user(here: Project, tmp_path: Path) -> None:
    """The folder is another user's there: it is ignored, and nothing is made in it."""
    for folder in (here.place, here.folder, *here.folder.iterdir()):
        os.chown(folder, 4711, 4711)
    status, out, errors = here.regctl("where")
    assert status == 0
    assert out.startswith("tcp://127.0.0.1:7343\n")
    assert "it belongs to user 4711, and this program runs as user 0" in errors
    assert sorted(path.name for path in here.folder.iterdir()) == [".gitignore", "id"]
