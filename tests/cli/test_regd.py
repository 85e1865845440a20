"""The command `regd` as a process: its output, its exit statuses, and one line for each error."""

import json
import os
import signal
import socket
import subprocess
from pathlib import Path

import pytest

import regd
from tests.support.daemon import WAIT_S, DaemonProcess, environment
from tests.support.demand import demand
from tests.support.stored import stored


def run(daemon: DaemonProcess, *flags: str, uid: int | None = None) -> tuple[int, str, str]:
    command = daemon.command(*flags)
    if uid is not None:
        command = ["setpriv", f"--reuid={uid}", f"--regid={uid}", "--clear-groups", *command]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=20, check=False)
    return done.returncode, done.stdout, done.stderr


def one_line(errors: str) -> str:
    assert errors.startswith("regd: "), errors
    assert errors.count("\n") == 1, errors
    return errors


def test_addresses_are_printed_and_accept_connections(tmp_path: Path) -> None:
    with DaemonProcess(tmp_path / "deep" / "registry.json", "--unix", str(tmp_path / "s")) as daemon:
        daemon.start()
        assert daemon.process is not None
        assert daemon.process.stdout is not None
        lines = [
            f"listening {daemon.addresses[0]}",
            *(daemon.process.stdout.readline().strip() for _ in range(2)),
        ]
        assert lines == [
            f"listening tcp://127.0.0.1:{daemon.port}",
            f"listening tcp://[::1]:{daemon.port}",
            f"listening unix://{tmp_path}/s",
        ]
        for host in ("127.0.0.1", "::1"):
            socket.create_connection((host, daemon.port)).close()
        assert json.loads(daemon.registry.read_bytes()).keys() == {"$regd"}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_ends_the_daemon_cleanly(process: DaemonProcess, number: signal.Signals) -> None:
    with socket.create_connection(("127.0.0.1", process.port)) as peer:
        peer.sendall(b'{"cmd":"register","name":"db","port":1}\n')
        assert b'"ok":true' in peer.recv(4_096)
        status, errors = process.end(number)
        assert status == 0
        assert "Traceback" not in errors
        assert peer.recv(4_096) == b""
    assert "db" in json.loads(process.registry.read_bytes())
    process.start()  # on the same port, at once
    with socket.create_connection(("127.0.0.1", process.port)) as peer:
        peer.sendall(b"resolve db\n")
        assert b'"port":1' in peer.recv(4_096)


@pytest.mark.parametrize("writes_first", [False, True])
def test_daemon_ends_if_another_has_taken_over_its_registry(process: DaemonProcess, writes_first: bool) -> None:
    """It writes nothing. The folder was removed and created again, and another daemon was started there."""

    def register(daemon: DaemonProcess, name: str) -> bytes:
        with socket.create_connection(("127.0.0.1", daemon.port)) as peer:
            peer.settimeout(WAIT_S)
            peer.sendall(b'{"cmd":"register","name":"%s","port":1}\n' % name.encode())
            return peer.recv(4_096)

    if writes_first:
        assert b'"ok":true' in register(process, "db")
    folder = process.registry.parent
    folder.rename(folder.with_name(f"{folder.name}-moved"))
    with DaemonProcess(process.registry) as other:
        other.start()
        assert b'"ok":true' in register(other, "web")
        assert b'"ok":true' not in register(process, "lost")
        assert process.process is not None
        _, errors = process.process.communicate(timeout=WAIT_S)
        assert process.process.returncode == 1
        process.process = None
        last = errors.splitlines()[-1]
        assert "another regd" in last
        assert "Traceback" not in errors
        assert b'"ok":true' in register(other, "cache")
        assert other.end()[0] == 0
    assert json.loads(other.registry.read_bytes()).keys() == {"$regd", "web", "cache"}


def test_history_is_limited_in_mib(process: DaemonProcess) -> None:
    for bad in ("0", "x", "1048577"):
        assert run(process, "--history-mib", bad)[0] == 2
    with DaemonProcess(process.registry.with_name("other.json"), "--history-mib", "3") as other:
        other.start()
        with socket.create_connection(("127.0.0.1", other.port)) as peer:
            peer.sendall(b"stats\nquit\n")
            stats = json.loads(peer.makefile().readline())
        assert stats["limits"]["journal_bytes_max"] == 3 * 1_048_576


def test_second_daemon_is_refused_and_changes_nothing(process: DaemonProcess, tmp_path: Path) -> None:
    before = process.registry.stat()
    status, out, errors = run(process, "--port", "0")
    assert (status, out) == (1, "")
    assert (
        f"in use by another regd (process {process.process.pid})" in one_line(errors)
        if process.process
        else False
    )
    other = DaemonProcess(tmp_path / "other" / "registry.json")
    status, out, errors = run(other, "--port", str(process.port))
    assert (status, out) == (1, "")
    assert f"port {process.port} on 127.0.0.1 is taken" in one_line(errors)
    assert not other.registry.parent.exists()
    assert process.registry.stat() == before


@pytest.mark.parametrize("data", [b"", b"\0" * 100, b'{"a": {"port": 1}', b"[1]"])
def test_damaged_registry_is_refused_and_kept(tmp_path: Path, data: bytes) -> None:
    daemon = DaemonProcess(tmp_path / "registry.json")
    daemon.registry.write_bytes(data)
    status, out, errors = run(daemon, "--port", "0")
    assert (status, out) == (1, "")
    assert f"{daemon.registry}: " in one_line(errors)
    assert daemon.registry.read_bytes() == data


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can try it as another user")
def test_unwritable_folder_is_reported(tmp_path: Path) -> None:
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o755)
    for folder in (tmp_path, *tmp_path.parents):
        if folder.stat().st_uid == 0 and "pytest" in str(folder):
            folder.chmod(0o755)
    daemon = DaemonProcess(locked / "registry.json")
    status, out, errors = run(daemon, "--port", "0", uid=65_534)
    if status == 127 or "Permission denied: '/" in errors or "No module" in errors or "can't open" in errors:
        pytest.skip("another user cannot even run this Python")
    assert (status, out) == (1, "")
    assert "Permission denied" in one_line(errors)
    assert "--registry" in errors


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--prot", "1"], "--prot"),
        (["--port", "70000"], "0 to 65535"),
        (["--port", "x"], "0 to 65535"),
        (["--grace", "-1"], "0 to 86400"),
        (["--log-level", "loud"], "loud"),
        (["extra"], "extra"),
    ],
)
def test_usage_error_is_one_line(tmp_path: Path, flags: list[str], says: str) -> None:
    status, _, errors = run(DaemonProcess(tmp_path / "registry.json"), *flags)
    assert status == 2
    assert says in one_line(errors)
    assert "regd --help" in errors
    assert list(tmp_path.iterdir()) == []


def test_version_and_help(tmp_path: Path) -> None:
    daemon = DaemonProcess(tmp_path / "registry.json")
    assert run(daemon, "--version") == (0, f"regd {regd.__version__}\n", "")
    status, out, _ = run(daemon, "--help")
    assert status == 0
    for flag in ("--port", "--unix", "--registry", "--log-level", "7343"):
        assert flag in out


def test_uvloop_is_used_where_it_is_installed(tmp_path: Path) -> None:
    pytest.importorskip("uvloop")
    with DaemonProcess(tmp_path / "registry.json", stock=False) as daemon:
        daemon.start()
        with socket.create_connection(("127.0.0.1", daemon.port)) as peer:
            peer.sendall(b'{"cmd":"hello"}\n')
            assert json.loads(peer.makefile().readline())["loop"] == "uvloop"
        assert daemon.end()[0] == 0


def test_acknowledged_registration_survives_kill_9(tmp_path: Path) -> None:
    with DaemonProcess(tmp_path / "registry.json") as daemon:
        acknowledged = 0
        for _ in range(5):
            daemon.start()
            with socket.create_connection(("127.0.0.1", daemon.port)) as peer:
                for n in range(acknowledged, acknowledged + 400):
                    peer.sendall(b'{"cmd":"register","name":"n%d","port":1}\n' % n)
                lines = peer.makefile("rb")
                for _ in range(40):
                    assert b'"ok":true' in lines.readline()
                    acknowledged += 1
                daemon.end(signal.SIGKILL)
            held = stored(daemon.registry)
            assert all(f"n{n}" in held for n in range(acknowledged))


def test_log_file_is_complete_and_named_in_stats(tmp_path: Path) -> None:
    log = tmp_path / "regd.log"
    log.write_text("before\n")
    with DaemonProcess(tmp_path / "registry.json", "--log", str(log)) as daemon:
        daemon.start()
        with socket.create_connection(("127.0.0.1", daemon.port)) as peer:
            peer.sendall(b'{"cmd":"stats"}\n')
            assert json.loads(peer.makefile().readline())["log"] == str(log)
        status, errors = daemon.end()
    assert (status, errors) == (0, "")
    first, *_, last = log.read_text().splitlines()
    assert (first, last.endswith("INFO SIGTERM: leaving")) == ("before", True)


def test_startup_error_is_in_the_log_and_on_stderr(process: DaemonProcess, tmp_path: Path) -> None:
    log = tmp_path / "regd.log"
    status, out, errors = run(process, "--port", "0", "--log", str(log))
    assert (status, out) == (1, "")
    assert log.read_text() == one_line(errors)
    assert log.stat().st_mode & 0o777 == 0o600
    status, out, errors = run(process, "--port", "0", "--log", str(tmp_path / "none" / "log"))
    assert (status, out) == (1, "")
    assert "cannot write the log" in one_line(errors)
    assert run(process, "--background")[0] == 2
    assert run(process, "--idle-exit", "0")[0] == 2


def test_background_daemon_listens_when_the_command_returns(tmp_path: Path) -> None:
    daemon = DaemonProcess(tmp_path / "registry.json", "--log", str(tmp_path / "log"))
    with demand(tmp_path) as place:  # which ends the daemon
        status, out, errors = run(daemon, "--port", "0", "--background")  # reads until EOF
        assert (status, errors) == (0, "")
        assert place.daemons() == {int((tmp_path / "registry.json.lock").read_text().split()[0])}
        port = int(out.splitlines()[0].rpartition(":")[2])
        with socket.create_connection(("127.0.0.1", port)) as peer:
            peer.sendall(b"ping\n")
            assert peer.recv(4_096) == b'{"ok":true}\n'
        status, out, errors = run(daemon, "--port", str(port), "--background")
        assert (status, out) == (1, "")
        assert "is taken" in one_line(errors)
