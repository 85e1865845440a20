"""The command `regctl` as a process: exit statuses, tables for people, lines for pipes, JSON for scripts."""

import json
import os
import pty
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from regd.cli.commands import parser
from regd.cli.regctl import _PLAIN, _given
from regd_client.blocking import BlockingConnection
from tests.support.daemon import Daemon, environment

Run = Callable[..., tuple[int, str, str]]


PLAIN = [[command, *["name"] * names] for command, names in _PLAIN.items()]


@pytest.fixture
def regctl(process: Daemon) -> Run:
    def run(*arguments: str, address: str = "") -> tuple[int, str, str]:
        done = subprocess.run(
            [sys.executable, "-m", "regd.cli.regctl", *arguments],
            env=environment(REGD_ADDRESS=address or process.addresses[0]), capture_output=True, text=True, timeout=20, check=False,
        )  # fmt: skip
        assert "Traceback" not in done.stderr
        return done.returncode, done.stdout, done.stderr

    return run


def test_register_resolve_list_deregister(regctl: Run) -> None:
    assert regctl("ping") == (0, "regd answers\n", "")
    assert regctl("register", "db", "5432") == (0, "127.0.0.1:5432\n", "")
    assert regctl("register", "db", "1", "--host", "::1", "--instance", "two", "--meta", "zone=a") == (
        0,
        "[::1]:1\n",
        "",
    )
    assert regctl("resolve", "db", "--instance", "two") == (0, "[::1]:1\n", "")
    assert regctl("resolve", "db", "--meta", "zone=a") == (0, "[::1]:1\n", "")
    assert regctl("resolve", "db", "--all") == (0, "127.0.0.1:5432\n[::1]:1\n", "")
    assert regctl("list") == (0, "db\t\t127.0.0.1:5432\tready\t\ndb\ttwo\t[::1]:1\tready\tzone=a\n", "")
    assert regctl("list", "x*") == (0, "", "")
    assert regctl("deregister", "db") == (0, "", "")
    assert regctl("deregister", "db", "--instance", "two") == (0, "", "")
    assert regctl("list")[1] == ""
    assert "registrations  0" in regctl("stats")[1]


def test_exit_statuses(regctl: Run, tmp_path: Path) -> None:
    regctl("register", "runner", "1")
    status, out, errors = regctl("resolve", "runnr")
    assert (status, out) == (1, "")
    assert "did you mean 'runner'?" in errors
    assert regctl("deregister", "nobody")[0] == 1
    assert regctl("resolve")[0] == 2
    assert regctl("nonsense")[0] == 2
    assert regctl("register", "db", "70000")[0] == 2
    assert regctl("register", "db", "x")[0] == 2
    assert regctl("list", "--meta", "zone")[0] == 2
    assert regctl("ping", "--address", "nonsense")[0] == 2
    status, _, errors = regctl("ping", address=f"unix://{tmp_path}/none")
    assert status == 3
    assert "start one with `regd`" in errors
    assert errors.count("\n") == 1


def test_json_is_the_reply(regctl: Run) -> None:
    regctl("register", "db", "5432")
    status, out, _ = regctl("--json", "resolve", "db")
    assert (status, json.loads(out)["port"]) == (0, 5432)
    status, out, errors = regctl("resolve", "bd", "--json")
    assert (status, json.loads(out)["error"], json.loads(out)["near"], errors) == (1, "not_found", ["db"], "")
    assert [each["name"] for each in json.loads(regctl("list", "--json")[1])["instances"]] == ["db"]


def test_a_person_sees_a_table_and_no_escape_sequences(regctl: Run, process: Daemon) -> None:
    regctl("register", "db", "5432", "--meta", "note=\x1b[31mred")
    mine, theirs = pty.openpty()
    subprocess.run(
        [sys.executable, "-m", "regd.cli.regctl", "list"],
        env=environment(REGD_ADDRESS=process.addresses[0]),
        stdout=theirs,
        check=True,
        timeout=20,
    )
    os.close(theirs)
    shown = os.read(mine, 4_096).decode()
    os.close(mine)
    lines = shown.splitlines()
    assert lines[0].split() == ["NAME", "INSTANCE", "ADDRESS", "STATE", "META"]
    assert lines[1].split() == ["db", "127.0.0.1:5432", "ready", r"note=\x1b[31mred"]
    assert "\x1b" not in shown


def test_version_and_help(regctl: Run) -> None:
    assert regctl("--version")[1].startswith("regctl ")
    status, out, _ = regctl("--help")
    assert status == 0
    for word in ("list", "resolve", "register", "deregister", "ping", "stats", "Exit status"):
        assert word in out


@pytest.mark.parametrize("argv", PLAIN + [["resolve", ""], ["why", "a b"], ["resolve", "\n-"]])
def test_a_plain_line_is_read_as_any_other(argv: list[str]) -> None:
    read = vars(parser(str).parse_args(argv))
    assert _given(argv) == {key: value for key, value in read.items() if value not in (None, False)}
    assert _given(["--json", *argv]) == {**read, "json": True}


@pytest.mark.parametrize(("line", "shown"), [(["resolve", "db"], "127.0.0.1:5432\n"), (["names", "d*"], "db\n")])
def test_a_plain_line_imports_nothing_dear(line: list[str], shown: str, process: Daemon) -> None:
    """They took as long as Python's own start, and half as long again."""
    dear = {
        "asyncio",
        "argparse",
        "typing",
        "json",
        "re",
        "enum",
        "functools",
        "collections",
        "socket",
        "encodings.idna",
    }
    code = (
        "import sys; before = set(sys.modules); from regd.cli.regctl import main\n"
        "if 'names' in sys.argv: import regd.cli.names as names; names._ANSWER_S = names._END_S = 15.0  # busy machines\n"
        "status = main(sys.argv[1:])\n"
        "print(*(set(sys.modules) - before), file=sys.stderr); sys.exit(status)"
    )
    with BlockingConnection(process.addresses[0]) as peer:
        peer.ask("register", name="db", port=5432, meta={"k": "é"})
    done = subprocess.run(
        [sys.executable, "-c", code, *line],
        env=environment(REGD_ADDRESS=process.addresses[0]), capture_output=True, text=True, timeout=20, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, shown)
    loaded = done.stderr.split()
    assert not dear & set(loaded)
    assert len(loaded) <= 14, loaded


@pytest.mark.parametrize(
    "argv", [[], ["resolve"], ["ping", "a"], ["resolve", "-a"], ["resolve", "--help"], ["why", "--"]]
)
def test_what_is_not_plain_is_left_to_the_parser(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        _given(argv)
    assert "regctl" in "".join(capsys.readouterr())


def test_a_pipe_that_has_seen_enough(regctl: Run, process: Daemon) -> None:
    for n in range(3):
        regctl("register", f"n{n}", "1")
    command = f"{sys.executable} -m regd.cli.regctl list | true"
    done = subprocess.run(
        ["bash", "-c", command],
        env=environment(REGD_ADDRESS=process.addresses[0]),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stderr == ""


def test_wait(regctl: Run) -> None:
    with socket.create_server(("127.0.0.1", 0)) as there:
        port = str(there.getsockname()[1])
        regctl("register", "here", port)
        assert regctl("wait", "here", "--timeout", "10") == (
            0,
            f"here accepts connections at 127.0.0.1:{port}\n",
            "",
        )
    status, shown, told = regctl("wait", "here", "nobody", "--timeout", "0.1")
    assert (status, shown) == (1, "")
    assert "connection refused" in told
    status, _, told = regctl("wait", "nobody", "--timeout", "0")
    assert (status, "never registered" in told) == (1, True)
    assert regctl("wait", "a", "--timeout", "0.2", address="127.0.0.1:1")[0] == 3
    assert regctl("wait", "a", "--timeout", "x")[0] == 2


def test_why(regctl: Run) -> None:
    regctl("register", "a", "1")
    regctl("register", "a", "2")
    status, shown, _ = regctl("why", "a")
    assert status == 0
    for words in ("a at 127.0.0.1:2: ready", "static: nobody holds it", "ago: replaced"):
        assert words in shown
    assert regctl("why", "b")[0] == 1


def test_watch(regctl: Run, process: Daemon) -> None:
    regctl("register", "a", "1")
    with subprocess.Popen(
        [sys.executable, "-m", "regd.cli.regctl", "watch", "a*"],
        env=environment(REGD_ADDRESS=process.addresses[0]),
        stdout=subprocess.PIPE,
        text=True,
    ) as watching:
        assert watching.stdout is not None
        assert watching.stdout.readline() == "up\ta\t\t127.0.0.1:1\tready\t\n"
        regctl("deregister", "a")
        assert watching.stdout.readline() == "down\ta\t\tderegistered\n"
        watching.send_signal(signal.SIGINT)
        assert watching.wait(10) == 130


def test_wait_goes_on_over_a_restart(process: Daemon) -> None:
    with (
        subprocess.Popen(
            [sys.executable, "-m", "regd.cli.regctl", "wait", "late", "--timeout", "30"],
            env=environment(REGD_ADDRESS=process.addresses[0]),
            stdout=subprocess.PIPE,
            text=True,
        ) as waiting,
        socket.create_server(("127.0.0.1", 0)) as there,
    ):
        with BlockingConnection(process.addresses[0]) as peer:
            while not peer.ask("stats")["waiting"]:
                time.sleep(0.01)
        process.end(signal.SIGTERM)  # who waits is told that it is stopping
        process.start()
        port = there.getsockname()[1]
        with BlockingConnection(process.addresses[0]) as peer:
            peer.ask("register", name="late", port=port)
        assert waiting.stdout is not None
        assert waiting.stdout.read() == f"late accepts connections at 127.0.0.1:{port}\n"
        assert waiting.wait(10) == 0


@pytest.mark.parametrize(("flags", "shown"), [((), ""), (("--json",), '{"ok": false, "error": "busy"')])
def test_a_watch_that_the_daemon_ends(regctl: Run, flags: tuple[str, ...], shown: str) -> None:
    def answer(listening: socket.socket) -> None:
        connection, _ = listening.accept()
        with connection:
            connection.recv(65_536)
            connection.sendall(b'{"ok":true,"watch":1,"epoch":"e","rev":0}\n')
            connection.sendall(b'{"ok":false,"error":"busy","message":"too much waits"}\n')

    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=answer, args=(listening,))
        thread.start()
        status, out, errors = regctl("watch", *flags, address=f"127.0.0.1:{listening.getsockname()[1]}")
        thread.join()
    assert (status, out[: len(shown)]) == (4, shown)
    assert errors == ("" if flags else "regctl: too much waits\n")


@pytest.mark.parametrize("command", ["list", "ping", "resolve nobody"])
def test_a_closed_stdout(process: Daemon, command: str) -> None:
    done = subprocess.run(
        ["bash", "-c", f"{sys.executable} -m regd.cli.regctl {command} >&-"],
        env=environment(REGD_ADDRESS=process.addresses[0]),
        stderr=subprocess.PIPE,
        text=True,
        check=False,
        timeout=20,
    )
    assert done.returncode == (1 if command.startswith("resolve") else 0)
    assert "Traceback" not in done.stderr
