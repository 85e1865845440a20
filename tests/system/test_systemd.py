"""regd under systemd: socket activation, the notify socket and the unit files, with systemd's own tools."""

import contextlib
import fcntl
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.daemon import ROOT, WAIT_S, DaemonProcess, environment
from tests.support.documents import blocks
from tests.support.ports import free_port

UNITS = ROOT / "regd" / "systemd"
_TRIES = 8  # to find a port that stays free until systemd-socket-activate binds it
_QUIET_S = 1.0  # a working loop sends twenty watchdog pings meanwhile
_HIGH_FILE = 60  # a descriptor above those that a shell uses

# A daemon whose loop is blocked from SIGUSR1 until the end of its stdin. Its threads run on.
HANGS = """
import signal, sys
sys.modules["uvloop"] = None

def hang(*_):
    print("hangs", flush=True)
    sys.stdin.read()
    print("goes on", flush=True)

signal.signal(signal.SIGUSR1, hang)
from regd.cli.regd import main
raise SystemExit(main())
"""


def need(tool: str) -> str:
    if shutil.which(tool) is None:
        pytest.skip(f"no {tool} on this machine")
    return tool


@pytest.fixture
def inbox(tmp_path: Path) -> Iterator[socket.socket]:
    """The service manager's end of a notify socket."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as inbox:
        inbox.bind(str(tmp_path / "notify"))
        inbox.settimeout(WAIT_S)
        yield inbox


def wait_for(inbox: socket.socket, prefix: str) -> None:
    """Receive messages until one starts with `prefix`."""
    while not inbox.recv(4_096).decode().startswith(prefix):
        pass


def drain(inbox: socket.socket) -> list[str]:
    """Return all messages that are in the socket's buffer."""
    messages = []
    inbox.setblocking(False)
    with contextlib.suppress(BlockingIOError):
        while True:
            messages.append(inbox.recv(4_096).decode())
    inbox.settimeout(WAIT_S)
    return messages


@contextlib.contextmanager
def running(command: list[str], **variables: str) -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(
        command, env=environment(**variables), stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        try:
            yield process
        finally:
            if process.poll() is None:
                process.kill()


def end(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Terminate the daemon, and return its exit status and its log."""
    process.terminate()
    _, errors = process.communicate(timeout=WAIT_S)
    return process.returncode, errors


def suspend(process: subprocess.Popen[str]) -> None:
    """Send SIGSTOP, and wait until the process is stopped."""
    process.send_signal(signal.SIGSTOP)
    assert os.WIFSTOPPED(os.waitpid(process.pid, os.WUNTRACED)[1])


# Socket activation.


@contextlib.contextmanager
def activator(daemon: DaemonProcess, path: Path, **variables: str) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """Start systemd-socket-activate, which becomes the daemon. Yield its process and its TCP port.

    It listens on 127.0.0.1 and ::1 at that port, and on a Unix socket at `path`.
    """
    all_variables = environment(**variables)
    passed = [f"-E{key}={all_variables[key]}" for key in ("PYTHONPATH", *variables)]
    output: list[str] = []
    for _ in range(_TRIES):
        port = free_port()
        where = [f"--listen={address}" for address in (f"127.0.0.1:{port}", f"[::1]:{port}", str(path))]
        with running([need("systemd-socket-activate"), *where, *passed, *daemon.command()]) as tool:
            assert tool.stderr is not None
            for line in tool.stderr:
                output.append(line)
                if line.startswith(f"Listening on {path} as"):
                    yield tool, port
                    return
        path.unlink(missing_ok=True)
    raise AssertionError(f"systemd-socket-activate does not listen: {output}")


def ask(where: tuple[str, int] | str, line: bytes) -> socket.socket:
    """Connect and send a line, without waiting for the reply."""
    client = socket.socket(socket.AF_UNIX) if isinstance(where, str) else socket.socket(family(where[0]))
    client.settimeout(WAIT_S)
    client.connect(where)
    client.sendall(line)
    return client


def family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET


def test_connection_before_the_daemon_starts_is_answered(tmp_path: Path, inbox: socket.socket) -> None:
    path = tmp_path / "s"
    daemon = DaemonProcess(tmp_path / "registry.json")
    with activator(daemon, path, NOTIFY_SOCKET=inbox.getsockname()) as (tool, port):
        suspend(tool)  # until all requests are sent
        places: list[tuple[str, int] | str] = [("127.0.0.1", port), ("::1", port), str(path)]
        clients = [
            ask(where, b'{"cmd":"register","name":"n%d","port":1}\n' % n) for n, where in enumerate(places)
        ]
        assert not daemon.registry.exists()
        tool.send_signal(signal.SIGCONT)
        for client in clients:
            with client, client.makefile("rb") as lines:
                assert json.loads(lines.readline())["ok"]
        assert tool.stdout is not None
        assert [tool.stdout.readline() for _ in places] == [
            f"listening tcp://127.0.0.1:{port}\n",
            f"listening tcp://[::1]:{port}\n",
            f"listening unix://{path}\n",
        ]
        wait_for(inbox, "READY=1")
        assert end(tool)[0] == 0
        wait_for(inbox, "STOPPING=1")
    assert set(json.loads(daemon.registry.read_bytes())) == {"$regd", "n0", "n1", "n2"}
    assert path.is_socket()  # the socket of the service manager stays


def test_address_flags_conflict_with_activation_sockets(tmp_path: Path) -> None:
    for flags in (["--port", "0"], ["--unix", str(tmp_path / "own")]):
        daemon = DaemonProcess(tmp_path / "registry.json", *flags)
        with activator(daemon, tmp_path / "s") as (tool, port), ask(("127.0.0.1", port), b"ping\n"):
            _, errors = tool.communicate(timeout=WAIT_S)
            assert tool.returncode == 2
            assert errors.splitlines()[-1].startswith(f"regd: {flags[0]} {flags[1]}: "), errors
            assert "Traceback" not in errors
        assert not daemon.registry.exists()
        (tmp_path / "s").unlink()


def run_activated(command: list[str], sock: socket.socket, pid: str = "$$") -> tuple[int, str, str]:
    """Run a command with a socket at descriptor 3 (sd_listen_fds(3)), and return its exit status and output."""
    high = fcntl.fcntl(sock, fcntl.F_DUPFD, _HIGH_FILE)
    try:
        done = subprocess.run(
            ["bash", "-c", f'LISTEN_PID={pid} LISTEN_FDS=1 exec "$@" 3<&{high} {high}<&-', "bash", *command],
            env=environment(), pass_fds=[high], capture_output=True, text=True, timeout=WAIT_S, check=False,
        )  # fmt: skip
    finally:
        os.close(high)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize(
    ("kind", "host", "says"),
    [
        (socket.SOCK_STREAM, "0.0.0.0", "listens on 0.0.0.0, but regd takes loopback addresses only"),
        (socket.SOCK_STREAM, "::", "listens on ::, but regd takes loopback addresses only"),
        (socket.SOCK_DGRAM, "127.0.0.1", "is neither a TCP nor a Unix stream socket"),
    ],
)
def test_unusable_activation_socket_is_one_line(
    tmp_path: Path, kind: socket.SocketKind, host: str, says: str
) -> None:
    daemon = DaemonProcess(tmp_path / "registry.json")
    with socket.socket(family(host), kind) as sock:
        sock.bind((host, 0))
        if kind == socket.SOCK_STREAM:
            sock.listen()
        status, out, errors = run_activated(daemon.command(), sock)
    assert (status, out) == (1, "")
    assert errors.startswith("regd: the inherited socket 3 ('unknown') ")
    assert says in errors
    assert errors.count("\n") == 1
    assert not daemon.registry.exists()


def test_activation_sockets_of_another_process_are_ignored(tmp_path: Path) -> None:
    """Then regd listens on its own port. Here that port is taken, and the error proves that regd tried it."""
    with socket.create_server(("127.0.0.1", 0)) as inherited, socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        daemon = DaemonProcess(tmp_path / "registry.json", "--port", str(port))
        status, _, errors = run_activated(daemon.command(), inherited, pid="1")
        assert (status, errors.count("\n")) == (1, 1)
        assert f"port {port} on 127.0.0.1 is taken" in errors
        status, _, errors = run_activated(daemon.command(), inherited)
        assert (status, errors.count("\n")) == (2, 1)


# Notifications.


@pytest.mark.sample(2)
@pytest.mark.parametrize("abstract", [False, True], ids=["path", "abstract"])
def test_notify_ready_watchdog_stopping(tmp_path: Path, inbox: socket.socket, abstract: bool) -> None:
    daemon = DaemonProcess(tmp_path / "registry.json")
    daemon.registry.write_text('{"db": {"port": 5432}}')
    with contextlib.ExitStack() as stack:
        address = inbox.getsockname()
        if abstract:
            address = f"@regd-test-{os.getpid()}"
            inbox = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM))
            inbox.bind(f"\0{address[1:]}")
            inbox.settimeout(WAIT_S)
        process = stack.enter_context(
            running(daemon.command("--port", "0"), NOTIFY_SOCKET=address, WATCHDOG_USEC="400000")
        )
        first = inbox.recv(4_096).decode().splitlines()
        assert first == ["READY=1", "STATUS=1 registrations at revision 1, 0 connections", "WATCHDOG=1"]
        assert process.stdout is not None
        port = int(process.stdout.readline().rpartition(":")[2])
        client = stack.enter_context(ask(("127.0.0.1", port), b"resolve db\n"))
        assert json.loads(client.recv(4_096))["port"] == 5432
        for _ in range(3):
            assert inbox.recv(4_096).startswith(b"WATCHDOG=1")
        process.terminate()
        assert client.recv(1) == b""
        assert drain(inbox)[-1] == "STOPPING=1\nSTATUS=stopping"  # before anything was closed
        _, errors = process.communicate(timeout=WAIT_S)
        assert (process.returncode, "Traceback" in errors) == (0, False)
        assert drain(inbox) == []


def test_failed_start_sends_no_ready(tmp_path: Path, inbox: socket.socket) -> None:
    daemon = DaemonProcess(tmp_path / "registry.json")
    daemon.registry.write_text("{")
    with running(daemon.command("--port", "0"), NOTIFY_SOCKET=inbox.getsockname()) as process:
        process.communicate(timeout=WAIT_S)
        assert process.returncode == 1
    assert drain(inbox) == []


@pytest.mark.long
def test_blocked_loop_sends_no_watchdog_ping(tmp_path: Path, inbox: socket.socket) -> None:
    command = [sys.executable, "-c", HANGS, "--port", "0", "--registry", str(tmp_path / "registry.json")]
    with running(command, NOTIFY_SOCKET=inbox.getsockname(), WATCHDOG_USEC="100000") as process:
        assert process.stdin is not None
        assert process.stdout is not None
        wait_for(inbox, "READY=1")
        wait_for(inbox, "WATCHDOG=1")
        process.send_signal(signal.SIGUSR1)
        assert any(line == "hangs\n" for line in process.stdout)
        drain(inbox)
        inbox.settimeout(_QUIET_S)
        with pytest.raises(TimeoutError):
            inbox.recv(4_096)
        inbox.settimeout(WAIT_S)
        process.stdin.close()
        assert process.stdout.readline() == "goes on\n"
        wait_for(inbox, "WATCHDOG=1")
        process.stdin = None  # it is closed; `communicate` would write to it
        assert end(process)[0] == 0


@pytest.mark.long
def test_suspended_process_sends_no_watchdog_ping(tmp_path: Path, inbox: socket.socket) -> None:
    command = DaemonProcess(tmp_path / "registry.json").command("--port", "0")
    with running(command, NOTIFY_SOCKET=inbox.getsockname(), WATCHDOG_USEC="100000") as process:
        wait_for(inbox, "WATCHDOG=1")
        suspend(process)
        drain(inbox)
        inbox.settimeout(_QUIET_S)
        with pytest.raises(TimeoutError):
            inbox.recv(4_096)
        inbox.settimeout(WAIT_S)
        process.send_signal(signal.SIGCONT)
        wait_for(inbox, "WATCHDOG=1")
        assert end(process)[0] == 0


def test_unreachable_notify_socket_is_one_log_line(tmp_path: Path) -> None:
    command = DaemonProcess(tmp_path / "registry.json").command("--port", "0")
    with running(command, NOTIFY_SOCKET=str(tmp_path / "nobody"), WATCHDOG_USEC="2000") as process:
        assert process.stdout is not None
        port = int(process.stdout.readline().rpartition(":")[2])
        for _ in range(50):  # long enough for several watchdog pings
            with ask(("127.0.0.1", port), b"ping\n") as client:
                assert client.recv(100) == b'{"ok":true}\n'
        status, errors = end(process)
    assert (status, "Traceback" in errors) == (0, False)
    assert errors.count("cannot notify") == 1


# The unit files.


def analyze(*arguments: str, **variables: str) -> str:
    """Run systemd-analyze, which must succeed, and return its output."""
    done = subprocess.run(
        [need("systemd-analyze"), *arguments],
        env=environment(**variables), capture_output=True, text=True, timeout=WAIT_S, check=False,
    )  # fmt: skip
    output = done.stdout + done.stderr
    if "unrecognized option" in output or "Unknown command" in output or "Failed to initialize manager" in output:
        pytest.skip(f"this systemd-analyze cannot do it: {output.strip()}")
    assert done.returncode == 0, output
    return output


def installed(unit: Path) -> str:
    """Return a unit with the path of its program: systemd-analyze ignores ExecSearchPath=."""
    text = unit.read_text().replace("ExecStart=regd ", f"ExecStart={sys.executable} -m regd ")
    return text.replace("ExecStart=regctl ", f"ExecStart={sys.executable} -m regd.cli.regctl ")


@pytest.mark.parametrize("settings", blocks(UNITS / "README.md", "ini"))
def test_settings_of_the_page_are_valid(settings: str, tmp_path: Path) -> None:
    [variable] = re.findall(r'Environment="([A-Z_]+)=', settings)
    unit = {"REGD_FLAGS": "regd", "REGD_SERVE_FLAGS": "regd-serve", "REGD_BRIDGE_FLAGS": "regd-bridge"}[variable]
    (tmp_path / f"{unit}.service").write_text(installed(UNITS / f"{unit}.service"))
    (tmp_path / f"{unit}.service.d").mkdir()
    (tmp_path / f"{unit}.service.d" / "override.conf").write_text(settings)
    output = analyze("verify", "--system", str(tmp_path / f"{unit}.service"))
    assert not [line for line in output.splitlines() if "regd" in line], output


@pytest.mark.parametrize(("folder", "manager"), [(UNITS, "--system"), (UNITS / "user", "--user")])
def test_units_are_valid(tmp_path: Path, folder: Path, manager: str) -> None:
    names = ("regd.service", "regd.socket", "regd-serve.service", "regd-bridge.service")
    for name in names:
        (tmp_path / name).write_text(installed(folder / name))
    units = [str(tmp_path / name) for name in names]
    output = analyze("verify", manager, *units, XDG_RUNTIME_DIR=str(tmp_path), HOME=str(tmp_path))
    assert not [line for line in output.splitlines() if "regd" in line], output


@pytest.mark.parametrize(
    ("unit", "exposure_max"),
    [
        ("regd.service", 20),
        ("regd-serve.service", 20),
        ("regd-bridge.service", 25),
        ("user/regd.service", 70),
        ("user/regd-serve.service", 70),
        ("user/regd-bridge.service", 70),
    ],
)
def test_units_are_hardened(unit: str, exposure_max: int) -> None:
    """The exposure level is out of 100. Most sandboxing of a user manager needs a user namespace, which hides uids."""
    analyze("security", "--offline=true", f"--threshold={exposure_max}", str(UNITS / unit))


def test_units_of_the_gateway_start_it_as_a_user_who_may_only_read() -> None:
    for folder in (UNITS, UNITS / "user"):
        assert "ExecStart=regctl serve $REGD_SERVE_FLAGS" in (folder / "regd-serve.service").read_text()
    users = [line for line in (UNITS / "regd-serve.service").read_text().splitlines() if "User=" in line]
    assert users == ["DynamicUser=yes", "User=regd-serve"]


def test_units_of_the_bridge_start_it_as_the_user_of_the_daemon() -> None:
    for folder in (UNITS, UNITS / "user"):
        assert "ExecStart=regctl bridge $REGD_BRIDGE_FLAGS" in (folder / "regd-bridge.service").read_text()
    of_daemon, of_bridge = (
        [line for line in (UNITS / name).read_text().splitlines() if line.startswith(("User=", "DynamicUser="))]
        for name in ("regd.service", "regd-bridge.service")
    )
    assert of_bridge == of_daemon


def test_units_start_the_installed_command() -> None:
    for folder in (UNITS, UNITS / "user"):
        service = (folder / "regd.service").read_text().splitlines()
        assert "ExecStart=regd $REGD_FLAGS" in service
        assert "Type=notify" in service
        assert "StateDirectory=regd" in service
        assert not [line for line in service if line.startswith(("PrivateUsers=", "ProtectProc=", "ProcSubset="))]
        for line in (folder / "regd.socket").read_text().splitlines():
            if line.startswith("ListenStream="):
                assert line.partition("=")[2].startswith(("127.0.0.1:", "[::1]:", "%t/")), line
