"""What `regd` inherits (descriptors, signals, limits, variables), and output that cannot be written."""

import contextlib
import fcntl
import json
import os
import pty
import signal
import socket
import subprocess
import sys
import termios
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.support.daemon import WAIT_S, DaemonProcess, environment
from tests.support.demand import demand
from tests.support.polling import block_until

needs_full = pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")


def ask(path: Path, *requests: bytes) -> list[dict[str, Any]]:
    """Send requests to the daemon on a Unix socket, and return the replies."""
    with socket.socket(socket.AF_UNIX) as peer:
        peer.settimeout(WAIT_S)
        peer.connect(os.fsencode(path))
        peer.sendall(b"".join(request + b"\n" for request in requests))
        with peer.makefile("rb") as lines:
            return [json.loads(lines.readline()) for _ in requests]


def batched(requests: Sequence[bytes], count: int) -> Iterator[Sequence[bytes]]:
    for start in range(0, len(requests), count):
        yield requests[start : start + count]


def is_up(path: Path) -> bool:
    try:
        return ask(path, b"ping") == [{"ok": True}]
    except OSError:
        return False


@contextlib.contextmanager
def running(daemon: DaemonProcess, path: Path, **how: Any) -> Iterator["subprocess.Popen[bytes]"]:
    """Run a daemon in the foreground, on a Unix socket only, and yield once it answers."""
    how.setdefault("env", environment())
    with subprocess.Popen(daemon.command("--port", "off", "--unix", str(path)), **how) as process:
        try:
            block_until(lambda: is_up(path) or process.poll() is not None)
            yield process
        finally:
            process.kill()


def end(process: "subprocess.Popen[bytes]") -> int:
    process.terminate()
    return process.wait(WAIT_S)


def in_shell(line: str, command: Sequence[str]) -> list[str]:
    return ["sh", "-c", line, "sh", *command]


def place_of(pid: int, number: int) -> str:
    return os.readlink(f"/proc/{pid}/fd/{number}")


# Descriptors.


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&-", "<&- >&- 2>&-"])
def test_background_daemon_survives_closed_descriptors(closed: str, tmp_path: Path) -> None:
    log, path = tmp_path / "log", tmp_path / "s"
    daemon = DaemonProcess(tmp_path / "registry.json", "--log", str(log), "--port", "off", "--unix", str(path))
    with demand(tmp_path) as place:
        command = in_shell(f'"$@" {closed}', daemon.command("--background"))
        done = subprocess.run(command, env=environment(), capture_output=True, timeout=WAIT_S)
        assert (done.returncode, done.stderr) == (0, b"")
        assert is_up(path)
        [pid] = place.daemons()
        assert [place_of(pid, number) for number in range(3)] == [os.devnull, os.devnull, str(log)]


def test_closed_standard_descriptors_are_not_reused(tmp_path: Path) -> None:
    """Otherwise messages for stderr could be written to a socket."""
    daemon, path = (
        DaemonProcess(tmp_path / "registry.json", "--port", "off", "--unix", str(tmp_path / "s")),
        tmp_path / "s",
    )
    with subprocess.Popen(in_shell('exec "$@" <&- >&- 2>&-', daemon.command()), env=environment()) as process:
        try:
            block_until(lambda: is_up(path))
            assert {place_of(process.pid, number) for number in range(3)} == {os.devnull}
        finally:
            assert end(process) == 0


@pytest.mark.parametrize("flags", [["--registry", "/"], ["--prot", "1"]])
def test_errors_without_stderr_do_not_go_to_stdout(flags: list[str], tmp_path: Path) -> None:
    command = in_shell('"$@" 2>&-', DaemonProcess(tmp_path / "registry.json").command(*flags))
    done = subprocess.run(command, env=environment(), capture_output=True, timeout=WAIT_S)
    assert (done.returncode, done.stdout) == (1 if flags[0] == "--registry" else 2, b"")


def test_background_daemon_closes_files_of_its_parent(tmp_path: Path) -> None:
    daemon = DaemonProcess(
        tmp_path / "registry.json", "--log", str(tmp_path / "log"), "--port", "off", "--unix", str(tmp_path / "s")
    )
    heard, told = os.pipe()
    high = fcntl.fcntl(told, fcntl.F_DUPFD, 200)
    with demand(tmp_path), os.fdopen(heard, "rb", buffering=0) as pipe:
        done = subprocess.run(
            daemon.command("--background"), env=environment(), stdout=subprocess.DEVNULL, timeout=WAIT_S,
            pass_fds=(told, high),
        )  # fmt: skip
        os.close(told)
        os.close(high)
        assert done.returncode == 0
        os.set_blocking(heard, False)
        assert pipe.read() == b"", "the pipe of the caller is still open"
        assert is_up(tmp_path / "s")


def test_background_daemon_keeps_inherited_sockets(tmp_path: Path) -> None:
    path = tmp_path / "s"
    daemon = DaemonProcess(tmp_path / "registry.json", "--log", str(tmp_path / "log"))
    with demand(tmp_path), socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        line = 'export LISTEN_PID=$$ LISTEN_FDS=1; exec "$@"'
        done = subprocess.run(
            in_shell(line, daemon.command("--background")), env=environment(), capture_output=True,
            timeout=WAIT_S, pass_fds=(3,), preexec_fn=lambda: os.dup2(listener.fileno(), 3),
        )  # fmt: skip
        assert (done.returncode, done.stdout, done.stderr) == (0, f"listening unix://{path}\n".encode(), b"")
        assert is_up(path)


# Output that cannot be written.


@needs_full
def test_daemon_survives_a_full_stdout(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with (
        open("/dev/full", "wb") as full,
        running(DaemonProcess(tmp_path / "r.json"), path, stdout=full, stderr=subprocess.PIPE) as process,
    ):
        assert is_up(path)
        assert end(process) == 0
        assert process.stderr is not None
        log = process.stderr.read().decode()
    assert f"cannot write to stdout: No space left on device; listening on unix://{path}\n" in log
    assert "Traceback" not in log


def test_daemon_survives_a_closed_pipe(tmp_path: Path) -> None:
    path = tmp_path / "s"
    heard, told = os.pipe()
    os.close(heard)
    with running(DaemonProcess(tmp_path / "r.json"), path, stdout=told, stderr=subprocess.DEVNULL) as process:
        os.close(told)
        assert is_up(path)
        assert end(process) == 0


@needs_full
@pytest.mark.parametrize("flags", [[], ["--log", "/dev/full"]])
def test_daemon_survives_a_log_on_a_full_disk(flags: list[str], tmp_path: Path) -> None:
    path = tmp_path / "s"
    with (
        open("/dev/full", "wb") as full,
        running(
            DaemonProcess(tmp_path / "r.json", *flags),
            path,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE if flags else full,
        ) as process,
    ):
        assert ask(path, b'{"cmd":"register","name":"a","port":1}')[0]["ok"]
        assert end(process) == 0
        if process.stderr is not None:
            assert process.stderr.read() == b""


@needs_full
@pytest.mark.parametrize(
    ("flags", "where", "status"), [(["--help"], ">", 1), (["--version"], ">", 1), (["--prot"], "2>", 2)]
)
def test_exit_statuses_with_a_full_stdout(flags: list[str], where: str, status: int, tmp_path: Path) -> None:
    command = in_shell(f'"$@" {where}/dev/full', DaemonProcess(tmp_path / "r.json").command(*flags))
    done = subprocess.run(command, env=environment(), capture_output=True, timeout=WAIT_S)
    assert (done.returncode, done.stdout) == (status, b"")
    assert done.stderr == (b"regd: cannot write to stdout: No space left on device\n" if status == 1 else b"")


def test_unread_log_does_not_block_the_daemon(tmp_path: Path) -> None:
    path = tmp_path / "s"
    heard, told = os.pipe()
    requests = [b'{"cmd":"register","name":"%s-%d","port":1}' % (b"n" * 50, number) for number in range(2_000)]
    with running(DaemonProcess(tmp_path / "r.json"), path, stdout=subprocess.DEVNULL, stderr=told) as process:
        os.close(told)
        for some in batched(requests, 50):
            assert all(reply["ok"] for reply in ask(path, *some)), "twice the pipe's size is logged in the end"
        assert end(process) == 0
    with os.fdopen(heard, "rb") as log:
        assert len(log.read()) > 32_768, "the pipe was full"


# Paths that an encoding cannot represent.


@pytest.mark.parametrize(
    ("variables", "name", "shown"),
    [
        ({"PYTHONIOENCODING": "ascii"}, "é", r"\xe9"),
        ({"PYTHONUTF8": "1"}, "\udcff", r"\udcff"),
        ({"PYTHONUTF8": "1"}, "a\nb\x1b", r"a\nb\x1b"),
    ],
)
def test_path_that_stdout_cannot_encode_is_escaped(
    variables: dict[str, str], name: str, shown: str, tmp_path: Path
) -> None:
    path, log = tmp_path / f"{name}.sock", tmp_path / f"{name}.log"
    with running(
        DaemonProcess(tmp_path / f"{name}.json", "--log", str(log)),
        path,
        stdout=subprocess.PIPE,
        env=environment(**variables),
    ) as process:
        assert is_up(path)
        assert process.stdout is not None
        assert process.stdout.readline().decode() == f"listening unix://{tmp_path}/{shown}.sock\n"
        assert end(process) == 0
    assert f"{tmp_path}/{shown if name != 'é' else name}.json" in log.read_text()


# Signals.


def test_other_signals_are_logged_and_ignored(tmp_path: Path) -> None:
    path, log = tmp_path / "s", tmp_path / "log"
    with running(
        DaemonProcess(tmp_path / "r.json", "--log", str(log)), path, stdout=subprocess.DEVNULL
    ) as process:
        names = ["SIGUSR1", "SIGUSR2", "SIGALRM", "SIGPROF"]
        numbers = {name: int(getattr(signal, name)) for name in names}
        if sys.platform == "linux":
            numbers |= {"SIGPWR": signal.SIGPWR, "SIGRTMIN+0": signal.SIGRTMIN, "SIGRTMIN+7": signal.SIGRTMIN + 7}
        for name, number in numbers.items():
            process.send_signal(number)
            block_until(lambda name=name: f"{name}: ignored" in log.read_text())  # type: ignore[misc]
        process.send_signal(signal.SIGPIPE)
        assert is_up(path)
        assert end(process) == 0


def test_sighup_reopens_the_log(tmp_path: Path) -> None:
    path, log, old = tmp_path / "s", tmp_path / "logs" / "log", tmp_path / "logs" / "old"
    log.parent.mkdir()
    with running(
        DaemonProcess(tmp_path / "r.json", "--log", str(log)), path, stdout=subprocess.DEVNULL
    ) as process:
        log.rename(old)
        process.send_signal(signal.SIGHUP)
        block_until(lambda: log.exists() and "log reopened" in log.read_text())
        assert ask(path, b'{"cmd":"register","name":"a","port":1}')[0]["ok"]
        block_until(lambda: "up a at 127.0.0.1:1, rev 1, static" in log.read_text())
        assert "up a" not in old.read_text()
        log.parent.rename(tmp_path / "moved")  # so it cannot be reopened, and the old file stays in use
        process.send_signal(signal.SIGHUP)
        block_until(lambda: "SIGHUP: cannot write the log" in (tmp_path / "moved" / "log").read_text())
        assert is_up(path)
        assert end(process) == 0


def test_sighup_without_log_file_and_terminal_is_ignored(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with running(
        DaemonProcess(tmp_path / "r.json"),
        path,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        start_new_session=True,
    ) as process:
        process.send_signal(signal.SIGHUP)
        assert process.stderr is not None
        assert b"registrations at revision" in process.stderr.readline()
        assert b"SIGHUP: ignored" in process.stderr.readline()
        assert is_up(path)
        assert end(process) == 0


def has_terminal_as_its_own() -> None:
    os.setsid()
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


def ignores_sighup() -> None:
    has_terminal_as_its_own()
    signal.signal(signal.SIGHUP, signal.SIG_IGN)


@pytest.mark.parametrize("flags", [[], ["--log"]])
def test_daemon_shuts_down_when_its_terminal_hangs_up(flags: list[str], tmp_path: Path) -> None:
    path, log = tmp_path / "s", tmp_path / "log"
    ours, theirs = pty.openpty()
    with running(
        DaemonProcess(tmp_path / "r.json", *flags, *([str(log)] if flags else [])), path,
        stdin=theirs, stdout=theirs, stderr=theirs, preexec_fn=has_terminal_as_its_own,
    ) as process:  # fmt: skip
        os.close(theirs)
        if flags:  # while the daemon has a terminal, SIGHUP reopens the log
            process.send_signal(signal.SIGHUP)
            block_until(lambda: "log reopened" in log.read_text())
        os.close(ours)
        assert process.wait(WAIT_S) == 0
    assert not path.exists()
    if flags:
        assert log.read_text().endswith("INFO SIGHUP: leaving\n")


def test_daemon_under_nohup_outlives_its_terminal(tmp_path: Path) -> None:
    path, log = tmp_path / "s", tmp_path / "log"
    ours, theirs = pty.openpty()
    with running(
        DaemonProcess(tmp_path / "r.json", "--log", str(log)), path,
        stdin=theirs, stdout=theirs, stderr=theirs, preexec_fn=ignores_sighup,
    ) as process:  # fmt: skip
        os.close(theirs)
        os.close(ours)
        block_until(lambda: "log reopened" in log.read_text())
        assert is_up(path)
        assert end(process) == 0


def test_signal_blocked_by_the_parent_ends_the_daemon(tmp_path: Path) -> None:
    def block() -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTERM,))

    path = tmp_path / "s"
    with running(
        DaemonProcess(tmp_path / "r.json"),
        path,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        preexec_fn=block,
    ) as process:
        assert end(process) == 0


# Limits.


@pytest.mark.skipif(sys.platform != "linux", reason="prlimit is Linux's")
def test_low_file_limit_is_logged_with_the_number_of_connections(tmp_path: Path) -> None:
    path = tmp_path / "s"
    daemon = DaemonProcess(tmp_path / "r.json", before=("prlimit", "--nofile=256:256"))
    with running(daemon, path, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
        assert process.stderr is not None
        warning = process.stderr.readline().decode()
        assert "may open 256 files" in warning
        count = int(warning.partition("regd takes ")[2].split()[0])
        assert count >= 16
        with contextlib.ExitStack() as stack:
            for number in range(count + 1):
                peer = stack.enter_context(socket.socket(socket.AF_UNIX))
                peer.settimeout(WAIT_S)
                peer.connect(str(path))
                peer.sendall(b"ping\n")
                reply = json.loads(stack.enter_context(peer.makefile()).readline())
                assert reply.get("error") == (None if number < count else "busy")


# Folders.


@pytest.mark.parametrize("home", ["", "relative", "/nonexistent", "~"])
def test_without_a_home_no_folder_is_created(home: str, tmp_path: Path) -> None:
    plain = {key: value for key, value in environment(HOME=home).items() if key != "XDG_STATE_HOME"}
    done = subprocess.run(
        [sys.executable, "-m", "regd", "--port", "off", "--unix", "s"], env=plain, cwd=tmp_path,
        capture_output=True, text=True, timeout=WAIT_S,
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    assert "--registry" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_unexpanded_tilde_is_refused(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "regd", "--registry=~/r.json"], env=environment(), cwd=tmp_path,
        capture_output=True, text=True, timeout=WAIT_S,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "regd: --registry ~/r.json: the shell did not expand ~; write out the home folder\n"
    assert list(tmp_path.iterdir()) == []


def test_created_folder_is_logged(tmp_path: Path) -> None:
    path, folder = tmp_path / "s", tmp_path / "typo" / "deep"
    for told in (1, 0):
        with running(
            DaemonProcess(folder / "r.json"), path, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        ) as process:
            assert end(process) == 0
            assert process.stderr is not None
            assert process.stderr.read().decode().count(f"made the folder {folder}") == told


# Addresses.


def test_port_off_listens_on_no_tcp(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with running(
        DaemonProcess(tmp_path / "r.json"), path, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as process:
        assert end(process) == 0
        assert process.stdout is not None
        assert process.stdout.read() == f"listening unix://{path}\n".encode()


def test_port_off_alone_is_bad_usage(tmp_path: Path) -> None:
    done = subprocess.run(
        DaemonProcess(tmp_path / "r.json").command("--port", "off"), env=environment(), capture_output=True, text=True,
        timeout=WAIT_S,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "regd: --port off: no address to listen on; name a Unix socket with --unix PATH\n"
    assert list(tmp_path.iterdir()) == []
