"""`regctl history`: past changes as a table and as JSON, and new changes across restarts of the daemon."""

import json
import os
import pty
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from regd_client.blocking import BlockingConnection
from tests.support.daemon import WAIT_S, DaemonProcess, environment
from tests.support.terminal import read_to_end

Run = Callable[..., tuple[int, str, str]]
COMMAND = [sys.executable, "-u", "-m", "regd.cli.regctl", "history"]
WHEN = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d")
USER = f"user {os.geteuid()}"


@pytest.fixture
def history(process: DaemonProcess) -> Run:
    def run(*arguments: str) -> tuple[int, str, str]:
        done = subprocess.run(
            [*COMMAND, *arguments],
            env=environment(REGD_ADDRESS=process.addresses[0]), capture_output=True, text=True, timeout=20, check=False,
        )  # fmt: skip
        assert "Traceback" not in done.stderr
        return done.returncode, done.stdout, done.stderr

    return run


def register(process: DaemonProcess, name: str, *ports: int) -> None:
    with BlockingConnection(process.addresses[0]) as peer:
        for port in ports:
            assert peer.ask("register", name=name, port=port)["ok"]


@contextmanager
def following(process: DaemonProcess, *arguments: str) -> Iterator["subprocess.Popen[str]"]:
    with subprocess.Popen(
        [*COMMAND, "--follow", *arguments],
        env=environment(REGD_ADDRESS=process.addresses[0]), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as running:  # fmt: skip
        try:
            yield running
        finally:
            running.kill()


def read_line(running: "subprocess.Popen[str]") -> str:
    assert running.stdout is not None
    return running.stdout.readline()


def test_columns(history: Run, process: DaemonProcess) -> None:
    register(process, "db", 1, 2)
    register(process, "web", 3)
    status, out, errors = history("db")
    assert (status, errors) == (0, "")
    rows = [line.split("\t") for line in out.splitlines()]
    assert all(WHEN.fullmatch(row[0]) for row in rows)
    assert [row[1:] for row in rows] == [
        ["up", "db", "127.0.0.1:1", "-", USER],
        ["down", "db", "127.0.0.1:1", "replaced", USER],
        ["up", "db", "127.0.0.1:2", "-", USER],
    ]
    assert len(history()[1].splitlines()) == 4
    assert history("db", "--instance", "1") == (0, "", "")
    assert history("nobody") == (0, "", "")


def test_latest_changes_of_a_service_before_many_others(history: Run, process: DaemonProcess) -> None:
    """The daemon looks at 2,000 changes for a page, so that the first page has none of this service."""
    register(process, "db", *range(1, 61))
    others = [json.dumps({"cmd": "register", "name": "web", "port": port}) for port in range(1, 2_100)]
    with socket.create_connection(("127.0.0.1", process.port)) as peer, peer.makefile("rwb") as lines:
        lines.write("\n".join([*others, "quit", ""]).encode())
        lines.flush()
        assert len(lines.readlines()) == len(others)
    ports = [int(line.split("\t")[3].split(":")[1]) for line in history("db")[1].splitlines()]
    assert ports == [port for port in range(10, 61) for _ in range(2)][1:-1]
    assert history("nobody") == (0, "", "")


def test_states_and_priorities(history: Run, process: DaemonProcess) -> None:
    """The last column shows what has changed. It is empty for a new instance that is ready and has priority 0."""
    with BlockingConnection(process.addresses[0]) as peer:
        for request in (
            {"cmd": "register", "port": 1},
            {"cmd": "update", "state": "draining"},
            {"cmd": "update", "priority": 10, "state": "ready"},
            {"cmd": "update", "priority": 0},
            {"cmd": "register", "port": 2, "state": "starting", "priority": 7},
            {"cmd": "deregister"},
        ):
            assert peer.ask(request.pop("cmd"), name="db", **request)["ok"]  # type: ignore[arg-type]
    assert [tuple(line.split("\t")[1:5:3]) for line in history("db")[1].splitlines()] == [
        ("up", "-"),
        ("change", "draining"),
        ("change", "ready, priority 10"),
        ("change", "ready"),
        ("down", "replaced"),
        ("up", "starting, priority 7"),
        ("down", "deregistered"),
    ]


@pytest.mark.parametrize(("name", "rows"), [("db", 2), ("nobody", 1)])
def test_table_of_a_terminal(name: str, rows: int, process: DaemonProcess) -> None:
    register(process, "db", 1)
    mine, theirs = pty.openpty()
    environ = environment(REGD_ADDRESS=process.addresses[0])
    subprocess.run([*COMMAND, name], env=environ, stdout=theirs, check=True, timeout=20)
    os.close(theirs)
    lines = read_to_end(mine).splitlines()
    assert len(lines) == rows
    if rows == 1:
        assert lines == ["nothing has changed"]
    else:
        assert lines[0].split() == ["TIME", "CHANGE", "SERVICE", "ADDRESS", "WHY", "BY"]
        assert lines[1].split()[2:] == ["up", "db", "127.0.0.1:1", "-", *USER.split()]


def test_program_at_the_other_end_of_a_unix_socket(process: DaemonProcess) -> None:
    path = process.registry.with_name("socket")
    with DaemonProcess(process.registry.with_name("other.json"), "--unix", str(path)) as other:
        other.start()
        environ = environment(REGD_ADDRESS=f"unix://{path}")
        with BlockingConnection(f"unix://{path}") as peer:
            assert peer.ask("register", name="db", port=1)["ok"]
        done = subprocess.run([*COMMAND, "--json"], env=environ, capture_output=True, timeout=20, check=True)
        [change] = json.loads(done.stdout)["changes"]
        assert (change["by"]["pid"], change["by"]["uid"]) == (os.getpid(), os.geteuid())
        done = subprocess.run(COMMAND, env=environ, capture_output=True, timeout=20, check=True)
        who = done.stdout.decode().rstrip("\n").split("\t")[-1]
        assert who == f"{change['by']['command']}, process {os.getpid()}, {USER}"


def test_since(history: Run, process: DaemonProcess) -> None:
    """`--since` is a revision or a duration. Without it, the latest hundred changes are shown."""
    register(process, "db", *range(1, 81))  # 159 revisions
    assert len(history()[1].splitlines()) == 100
    assert len(history("--since", "0")[1].splitlines()) == 159
    assert [line.split("\t")[3] for line in history("--since", "157")[1].splitlines()] == [
        "127.0.0.1:79", "127.0.0.1:80",
    ]  # fmt: skip
    for duration in ("60s", "10m", "1h", "7d"):
        assert len(history("--since", duration)[1].splitlines()) == 159
    assert history("--since", "0s") == (0, "", "")
    assert history("--since", "159") == (0, "", "")


@pytest.mark.sample(6)
@pytest.mark.parametrize("since", ["", "1y", "-1", "1.5h", "h", "yesterday"])
def test_malformed_since(since: str, history: Run) -> None:
    status, out, errors = history(f"--since={since}")
    assert (status, out) == (2, "")
    assert "30s, 10m, 2h or 7d" in errors


def test_json(history: Run, process: DaemonProcess) -> None:
    register(process, "db", 1, 2)
    status, out, errors = history("--json", "--since", "1")
    assert (status, errors) == (0, "")
    said = json.loads(out)
    assert said["ok"]
    assert [(change["rev"], change["op"]) for change in said["changes"]] == [(2, "down"), (3, "up")]
    assert json.loads(history("--json", "nobody")[1]) == {"ok": True, "changes": []}


def test_history_survives_a_restart(history: Run, process: DaemonProcess) -> None:
    register(process, "db", 1, 2)
    before = history()
    for number in (signal.SIGTERM, signal.SIGKILL):
        process.end(number)
        process.start()
        assert history() == before


@pytest.mark.sample(2)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_follow_over_a_restart(number: int, process: DaemonProcess) -> None:
    """Each change is printed once, including changes made while regctl had no connection."""
    register(process, "db", 1)
    register(process, "web", 1)
    with following(process, "db", "--json") as running:
        assert json.loads(read_line(running))["rev"] == 1
        register(process, "db", 2)
        assert [json.loads(read_line(running))["rev"] for _ in range(2)] == [3, 4]
        running.send_signal(signal.SIGSTOP)
        process.end(number)
        process.start()
        register(process, "web", 2)
        register(process, "db", 3)
        running.send_signal(signal.SIGCONT)
        assert [json.loads(read_line(running))["rev"] for _ in range(2)] == [7, 8]
        assert running.stderr is not None
        assert running.stderr.readline().startswith("regctl: the registry is away, still trying: ")
        assert running.stderr.readline() == "regctl: the registry is back\n"
        register(process, "db", 4)
        assert [json.loads(read_line(running))["port"] for _ in range(2)] == [3, 4]
        running.send_signal(signal.SIGINT)
        assert running.wait(WAIT_S) == 130
        assert running.stderr.read() == ""


def test_follow_prints_rows(process: DaemonProcess) -> None:
    register(process, "db", 1)
    with following(process, "--since", "1") as running:
        register(process, "db", 2)
        assert [read_line(running).split("\t")[1] for _ in range(2)] == ["down", "up"]


def test_follow_ends_when_the_reader_has_gone(process: DaemonProcess) -> None:
    register(process, "db", 1)
    with following(process) as running:
        assert read_line(running).split("\t")[1] == "up"
        assert running.stdout is not None
        running.stdout.close()
        register(process, "db", 2)
        assert running.wait(WAIT_S) == 0
        assert running.stderr is not None
        assert running.stderr.read() == ""


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full on this system")
def test_follow_ends_if_stdout_is_full(process: DaemonProcess) -> None:
    register(process, "db", 1)
    environ = environment(REGD_ADDRESS=process.addresses[0])
    with open("/dev/full", "w") as full:
        done = subprocess.run([*COMMAND, "--follow"], env=environ, stdout=full, stderr=subprocess.PIPE, text=True, timeout=20, check=False)  # fmt: skip
    assert (done.returncode, done.stderr) == (4, "regctl: cannot write to stdout: No space left on device\n")


def test_follow_needs_a_daemon_at_the_start(history: Run, process: DaemonProcess) -> None:
    process.end()
    status, out, errors = history("--follow")
    assert (status, out) == (3, "")
    assert errors.count("\n") == 1
