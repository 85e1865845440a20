"""The command `regctl` as a process: exit statuses, and output as tables, lines and JSON."""

import json
import os
import pty
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from regd.cli.output import event_line
from regd_client.blocking import BlockingConnection
from tests.support.daemon import DaemonProcess, environment
from tests.support.terminal import read_to_end

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def regctl(process: DaemonProcess) -> Run:
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
    assert regctl("list") == (0, "db\t-\t127.0.0.1:5432\tready\t-\ndb\ttwo\t[::1]:1\tready\tzone=a\n", "")
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
    assert [instance["name"] for instance in json.loads(regctl("list", "--json")[1])["instances"]] == ["db"]


def test_terminal_gets_a_table_without_escape_sequences(regctl: Run, process: DaemonProcess) -> None:
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
    shown = read_to_end(mine)
    lines = shown.splitlines()
    assert lines[0].split() == ["NAME", "INSTANCE", "ADDRESS", "STATE", "META"]
    assert lines[1].split() == ["db", "-", "127.0.0.1:5432", "ready", r"note=\x1b[31mred"]
    assert "\x1b" not in shown


def test_version_and_help(regctl: Run) -> None:
    assert regctl("--version")[1].startswith("regctl ")
    status, out, _ = regctl("--help")
    assert status == 0
    for word in ("list", "resolve", "register", "deregister", "ping", "stats", "Exit status"):
        assert word in out


@pytest.mark.sample(3)
@pytest.mark.parametrize("line", [["resolve", "db"], ["names", "d*"], ["list", "--json"], ["--help"], ["lst"]])
def test_start_imports_neither_asyncio_nor_the_daemon(line: list[str], process: DaemonProcess) -> None:
    code = "import sys; from regd.cli.regctl import main; main(sys.argv[1:]);print(*sys.modules, file=sys.stderr)"
    done = subprocess.run(
        [sys.executable, "-c", code, *line],
        env=environment(REGD_ADDRESS=process.addresses[0]), capture_output=True, text=True, timeout=20, check=True,
    )  # fmt: skip
    modules = done.stderr.split()
    assert "regd.cli.regctl" in modules
    assert not {"asyncio", "prompt_toolkit", "regd.server", "regd.core"} & set(modules)


def test_pipe_closed_by_its_reader(regctl: Run, process: DaemonProcess) -> None:
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
    for words in ("a at 127.0.0.1:2: ready", "static: has no owner", "ago: replaced"):
        assert words in shown
    assert regctl("why", "b")[0] == 1


def test_watch(regctl: Run, process: DaemonProcess) -> None:
    regctl("register", "a", "1")
    with subprocess.Popen(
        [sys.executable, "-m", "regd.cli.regctl", "watch", "a*"],
        env=environment(REGD_ADDRESS=process.addresses[0]),
        stdout=subprocess.PIPE,
        text=True,
    ) as watching:
        assert watching.stdout is not None
        assert watching.stdout.readline() == "up\ta\t-\t127.0.0.1:1\tready\t-\n"
        regctl("deregister", "a")
        assert watching.stdout.readline() == "down\ta\t-\tderegistered\n"
        watching.send_signal(signal.SIGINT)
        assert watching.wait(10) == 130


def test_wait_survives_a_restart(process: DaemonProcess) -> None:
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
        process.end(signal.SIGTERM)  # the waiting request gets `shutting_down`
        process.start()
        port = there.getsockname()[1]
        with BlockingConnection(process.addresses[0]) as peer:
            peer.ask("register", name="late", port=port)
        assert waiting.stdout is not None
        assert waiting.stdout.read() == f"late accepts connections at 127.0.0.1:{port}\n"
        assert waiting.wait(10) == 0


@pytest.mark.parametrize(("flags", "shown"), [((), ""), (("--json",), '{"ok": false, "error": "busy"')])
def test_watch_refused_by_the_daemon(regctl: Run, flags: tuple[str, ...], shown: str) -> None:
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


# Commands and options.


def test_register_options(regctl: Run, process: DaemonProcess) -> None:
    pid = str(os.getpid())
    assert regctl("register", "a", "[::1]:70", "--ttl", "30", "--state", "starting") == (0, "[::1]:70\n", "")
    assert regctl("register", "b", "localhost:70", "--pid", pid) == (0, "localhost:70\n", "")
    with BlockingConnection(process.addresses[0]) as peer:
        a, b = peer.ask("list")["instances"]
    assert (a["host"], a["port"], a["ttl"], a["state"]) == ("::1", 70, 30, "starting")
    assert (b["host"], b["pid"]) == ("localhost", os.getpid())
    status, out, errors = regctl("register", "b", "71")
    assert (status, out) == (4, "")
    assert "held by pid" in errors
    assert regctl("register", "b", "71", "--force") == (0, "127.0.0.1:71\n", "")


@pytest.mark.sample(5)
@pytest.mark.parametrize("place", ["::1:70", "[::1]", ":70", "70:", "a:b", "0", "65536", "-1", "٣", "1" * 5_000])
def test_malformed_endpoints(place: str, regctl: Run) -> None:
    status, out, errors = regctl("register", "db", "--", place)
    assert (status, out, errors.count("\n")) == (2, "", 1)
    assert "[::1]:5432" in errors


def test_host_given_twice(regctl: Run) -> None:
    assert regctl("register", "db", "a:1", "--host", "b") == (
        2,
        "",
        "regctl register: give the host once: as HOST:PORT, or as --host\n",
    )


def test_update_and_drain(regctl: Run) -> None:
    regctl("register", "db", "1", "--meta", "zone=a")
    assert regctl("update", "db", "--state", "starting", "--meta", "zone=b") == (0, "", "")
    assert regctl("list")[1] == "db\t-\t127.0.0.1:1\tstarting\tzone=b\n"
    assert regctl("drain", "db") == (0, "", "")
    assert regctl("list")[1] == "db\t-\t127.0.0.1:1\tdraining\tzone=b\n"
    assert regctl("update", "db")[0] == 2
    assert regctl("update", "db", "--state", "gone")[0] == 2
    assert regctl("drain", "nobody")[0] == 1
    assert regctl("register", "w", "1", "--instance", "1")[0] == 0
    assert regctl("drain", "w", "--instance", "1")[0] == 0


def test_aliases(regctl: Run) -> None:
    regctl("register", "db", "1")
    assert regctl("ls", "d*") == regctl("list", "d*") == (0, "db\t-\t127.0.0.1:1\tready\t-\n", "")
    assert regctl("rm", "db") == (0, "", "")
    assert regctl("ls") == (0, "", "")
    assert regctl("help", "ls")[1].startswith("usage: regctl list")


@pytest.mark.parametrize(
    ("typed", "meant"), [("lst", "list"), ("derigister", "deregister"), ("rmm", "rm"), ("drian", "drain")]
)
def test_unknown_command_gets_a_suggestion(typed: str, meant: str, regctl: Run) -> None:
    assert regctl("--address", "x:1", typed, "db") == (
        2,
        "",
        f"regctl: no command {typed!r}; did you mean {meant!r}?\n",
    )


def test_argument_that_is_not_utf8(regctl: Run) -> None:
    message = "regctl: register: '\\udcff' cannot be written in UTF-8; leave it out\n"
    assert regctl("register", "db", "1", "--meta", "k=a\udcff") == (2, "", message)


def test_regctl_alone_shows_help(regctl: Run) -> None:
    assert regctl() == regctl("--help")
    assert regctl()[0] == 0


@pytest.mark.sample(4)
@pytest.mark.parametrize(
    "line",
    [["lst"], ["resolve"], ["ping", "--foo"], ["register", "a", "x"], ["wait", "a", "--timeout", "x"], [], ["help", "x"],
     ["register", "a", "b:1", "--host", "c"]],
)  # fmt: skip
def test_usage_errors_as_json(line: list[str], regctl: Run) -> None:
    for argv in (["--json", *line], [*line, "--json"]):
        status, out, errors = regctl(*argv)
        assert (status, errors) == (2, "")
        said = json.loads(out)
        assert (said["ok"], said["error"]) == (False, "bad_argument")
        assert said["message"]


def test_usage_errors_of_run_leave_stdout_to_the_command(regctl: Run) -> None:
    for line in (["run"], ["run", "web"], ["run", "web", "--port", "x", "--", "true"]):
        status, out, errors = regctl("--json", *line)
        assert (status, out) == (2, "")
        assert json.loads(errors)["error"] == "bad_argument"


@pytest.mark.sample(4)
@pytest.mark.parametrize(
    "line", [["deregister", "w"], ["rm", "w"], ["update", "w", "--state", "ready"], ["drain", "w"]]
)
def test_not_found_lists_existing_instances(line: list[str], regctl: Run) -> None:
    regctl("register", "w", "1", "--instance", "1")
    status, out, errors = regctl(*line)
    assert (status, out) == (1, "")
    assert errors.endswith("; there is w/1: `--instance 1`\n")
    for number in range(2, 8):
        regctl("register", "w", "1", "--instance", str(number))
    message = json.loads(regctl("--json", *line)[1])["message"]
    assert message.endswith("; there are w/1, w/2, w/3, w/4, w/5, …: `--instance 1`")


def test_not_found_instance_lists_the_others(regctl: Run) -> None:
    regctl("register", "db", "1")
    for line in (
        ["resolve", "db", "--instance", "x"],
        ["why", "db", "--instance", "x"],
        ["rm", "db", "--instance", "x"],
    ):
        status, _, errors = regctl(*line)
        assert (status, errors.count("there is db: leave out --instance")) == (1, 1), line
    assert "there is" not in regctl("rm", "nobody")[2]


def test_stats_with_limits(regctl: Run) -> None:
    assert "connections_max" not in regctl("stats")[1]
    status, out, _ = regctl("stats", "--limits")
    assert status == 0
    assert "connections_max" in out
    assert "registrations" in out
    assert "connections_max" in json.loads(regctl("stats", "--json")[1])["limits"]


# `watch` over restarts.


@pytest.mark.sample(2)
@pytest.mark.parametrize("flags", [(), ("--json",)], ids=["people", "json"])
def test_watch_survives_a_restart_and_prints_differences(
    flags: tuple[str, ...], regctl: Run, process: DaemonProcess
) -> None:
    for name in ("stays", "goes", "changes"):
        regctl("register", name, "1")
    watching = subprocess.Popen(
        [sys.executable, "-u", "-m", "regd.cli.regctl", "watch", *flags],
        env=environment(REGD_ADDRESS=process.addresses[0]), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert watching.stdout is not None
    assert watching.stderr is not None

    def told() -> tuple[str, str]:
        """Return the kind and the name of the next event about an instance."""
        while True:
            assert watching.stdout is not None
            line = watching.stdout.readline()
            said = json.loads(line) if flags else {}
            if said.get("event") not in ("sync", "progress"):
                return (said["event"], said["name"]) if flags else (line.split("\t")[0], line.split("\t")[1])

    with watching:
        try:
            assert {told() for _ in range(3)} == {("up", "stays"), ("up", "goes"), ("up", "changes")}
            process.end()
            assert watching.stderr.readline().startswith(
                "regctl: the registry is away, still trying: no regd at "
            )
            fields = json.loads(process.registry.read_text())
            fields.pop("$regd")
            fields["changes"]["port"] = 2
            del fields["goes"]
            fields["comes"] = {"port": 3}
            process.registry.write_text(json.dumps(fields))
            process.start()
            assert {told() for _ in range(3)} == {("down", "goes"), ("change", "changes"), ("up", "comes")}
            assert watching.stderr.readline() == "regctl: the registry is back\n"
            regctl("deregister", "stays")
            assert told() == ("down", "stays")
        finally:
            watching.send_signal(signal.SIGINT)
        assert watching.wait(10) == 130
        assert watching.stderr.read() == ""


def test_watch_ends_if_another_program_takes_the_port(process: DaemonProcess) -> None:
    with subprocess.Popen(
        [sys.executable, "-m", "regd.cli.regctl", "watch", "--json"],
        env=environment(REGD_ADDRESS=process.addresses[0]), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as watching:  # fmt: skip
        assert watching.stdout is not None
        assert watching.stderr is not None
        assert json.loads(watching.stdout.readline())["event"] == "sync"
        process.end()
        assert "away" in watching.stderr.readline()
        with socket.create_server(("127.0.0.1", process.port)) as another:
            accepted, _ = another.accept()
            with accepted:
                accepted.recv(65_536)
                accepted.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
                assert json.loads(watching.stdout.readline())["error"] == "not_regd"
        assert watching.wait(20) == 3


def test_watch_ends_if_the_reader_is_gone_while_the_daemon_is_away(process: DaemonProcess) -> None:
    with subprocess.Popen(
        [sys.executable, "-m", "regd.cli.regctl", "watch", "--json"],
        env=environment(REGD_ADDRESS=process.addresses[0]), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as watching:  # fmt: skip
        assert watching.stdout is not None
        assert watching.stderr is not None
        assert json.loads(watching.stdout.readline())["event"] == "sync"
        process.end()
        assert "away" in watching.stderr.readline()
        watching.stdout.close()
        assert watching.wait(20) == 0


# Output that cannot be written.


def shell(process: DaemonProcess, script: str) -> "subprocess.CompletedProcess[str]":
    """Run a bash script with `regctl` as a function, and a pipe without a reader as descriptor 9."""
    with_regctl = f'regctl() {{ "{sys.executable}" -m regd.cli.regctl "$@"; }}\n'
    reading, writing = os.pipe()
    os.close(reading)
    try:
        done = subprocess.run(
            ["bash", "-c", f"exec 9>&{writing}\n{with_regctl}{script}"], pass_fds=[writing],
            env=environment(REGD_ADDRESS=process.addresses[0]), capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
    finally:
        os.close(writing)
    assert "Traceback" not in done.stderr, done.stderr
    assert "Exception ignored" not in done.stderr, done.stderr
    return done


SAY = [
    "list", "list --json", "resolve db", "stats", "why db", "ping", "env db", "names", "help", "help run", "--help",
    "--version", "manual", "manual regd", "completion bash", "top", "top --json", "wait here --timeout 10", "doctor",
    "watch", "history", "history --json", "history --follow", "register db 5432", "", "lst --json", "resolve nobody --json",
]  # fmt: skip


@pytest.fixture
def peopled(process: DaemonProcess) -> Iterator[DaemonProcess]:
    with BlockingConnection(process.addresses[0]) as peer, socket.create_server(("127.0.0.1", 0)) as here:
        for name in ("db", "here"):
            assert peer.ask("register", name=name, port=here.getsockname()[1])["ok"]
        yield process


@pytest.mark.sample(15)
@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full on this system")
@pytest.mark.parametrize("line", SAY)
def test_full_stdout_is_an_error(line: str, peopled: DaemonProcess) -> None:
    done = shell(peopled, f"regctl {line} >/dev/full")
    assert (done.returncode, done.stderr) == (4, "regctl: cannot write to stdout: No space left on device\n")


@pytest.mark.sample(15)
@pytest.mark.parametrize("line", SAY)
def test_pipe_without_a_reader_is_not_an_error(line: str, peopled: DaemonProcess) -> None:
    done = shell(peopled, f"regctl {line} >&9")
    status = {"lst --json": 2, "resolve nobody --json": 1}.get(line, 0)
    assert done.stderr == ""
    assert done.returncode == status or line == "doctor"


@pytest.mark.parametrize("line", ["watch nobody", "history nobody --follow"])
def test_closed_pipe_is_noticed_without_anything_to_print(line: str, peopled: DaemonProcess) -> None:
    done = shell(peopled, f"regctl {line} >&9")
    assert (done.returncode, done.stderr) == (0, "")


def test_wait_continues_with_a_broken_stdout(peopled: DaemonProcess) -> None:
    assert shell(peopled, "regctl wait here nobody --timeout 0.3 >&9 && echo goes on").stdout == ""
    assert shell(peopled, "regctl wait here nobody --timeout 0.3 >/dev/full && echo goes on").stdout == ""


FAIL = {
    "wait nobody --timeout 0.1": 1,
    "resolve nobody": 1,
    "deregister nobody": 1,
    "register a b": 2,
    "lst": 2,
    "run": 2,
    "help lst": 2,
    "ping --address 127.0.0.1:1": 3,
    "env db nobody": 1,
    "top --address 127.0.0.1:1": 3,
    "watch --address 127.0.0.1:1": 3,
    "history --since x": 2,
    "history --follow --address 127.0.0.1:1": 3,
}


@pytest.mark.sample(64)
@pytest.mark.sample(5)
@pytest.mark.parametrize("stderr", ["2>&9", "2>/dev/full", "2>&-", "2>&- >&-", "2>&- >&- <&-", "2>&- >&9"])
@pytest.mark.parametrize("line", FAIL)
def test_broken_stderr_does_not_change_the_status(line: str, stderr: str, peopled: DaemonProcess) -> None:
    done = shell(peopled, f"regctl {line} {stderr}")
    assert (done.returncode, done.stdout, done.stderr) == (FAIL[line], "", "")


def test_broken_output_does_not_change_the_effect(peopled: DaemonProcess) -> None:
    done = shell(
        peopled,
        "for to in /dev/full '&9' '&-'; do eval \"regctl register shop-db 1 2>$to >$to\"; done; regctl ls shop*",
    )
    assert done.stdout == "shop-db\t-\t127.0.0.1:1\tready\t-\n"
    script = "regctl register shop.db 1 >/dev/null; regctl env shop-db shop.db"  # warns: one left out
    assert (
        len({shell(peopled, f"{script} {end}; echo $?").stdout for end in ("2>/dev/null", "2>&9", "2>&-")}) == 1
    )


@pytest.mark.sample(3)
@pytest.mark.parametrize("command", ["list", "ping", "resolve nobody", "top", "stats", "list --json"])
def test_closed_stdout(peopled: DaemonProcess, command: str) -> None:
    done = shell(peopled, f"regctl {command} >&-")
    assert done.returncode == (1 if command.startswith("resolve") else 0)


@pytest.mark.parametrize("closed", ["<&-", "<&- >&-", "<&- >&- 2>&-"])
def test_nothing_is_written_into_a_reused_descriptor(closed: str, peopled: DaemonProcess) -> None:
    """Otherwise the connection to the daemon could get descriptor 0, 1 or 2."""
    for command in ("resolve nobody", "list", "watch nobody --address 127.0.0.1:1", "register x 1"):
        shell(peopled, f"regctl {command} {closed}")
    with BlockingConnection(peopled.addresses[0]) as peer:
        stats = peer.ask("stats")
    assert stats["bad_protocol"] == 0
    assert not stats["errors"].get("bad_request")
    assert not stats["errors"].get("bad_json")


def test_priority(regctl: Run) -> None:
    regctl("register", "db", "1", "--instance", "a")
    assert [line.split("\t") for line in regctl("list")[1].splitlines()] == [
        ["db", "a", "127.0.0.1:1", "ready", "-"]
    ]
    regctl("register", "db", "2", "--instance", "b", "--priority", "10", "--meta", "zone=x")
    regctl("register", "db", "3", "--instance", "c", "--priority", "65535")
    assert [line.split("\t") for line in regctl("list")[1].splitlines()] == [
        ["db", "a", "127.0.0.1:1", "ready", "-", "0"],
        ["db", "b", "127.0.0.1:2", "ready", "zone=x", "10"],
        ["db", "c", "127.0.0.1:3", "ready", "-", "65535"],
    ]
    assert [regctl("resolve", "db")[1] for _ in range(2)] == ["127.0.0.1:1\n"] * 2
    assert regctl("resolve", "db", "--meta", "zone=x")[1] == "127.0.0.1:2\n"
    assert regctl("update", "db", "--instance", "a", "--priority", "20")[0] == 0
    assert regctl("resolve", "db")[1] == "127.0.0.1:2\n"
    assert regctl("resolve", "db", "--all")[1].split() == ["127.0.0.1:2", "127.0.0.1:1", "127.0.0.1:3"]
    assert "DB_PORT=2" in regctl("env")[1].splitlines()
    assert "db/a at 127.0.0.1:1: ready, priority 20" in regctl("why", "db")[1].splitlines()
    regctl("drain", "db", "--instance", "b")
    assert "DB_PORT=1" in regctl("env")[1].splitlines()
    regctl("update", "db", "--instance", "a", "--priority", "0")
    assert "db/a at 127.0.0.1:1: ready" in regctl("why", "db")[1].splitlines()


@pytest.mark.sample(8)
@pytest.mark.parametrize("value", ["-1", "65536", "1.5", "x", "", "٣", "1_0", "999999"])
@pytest.mark.parametrize("command", [["register", "db", "1"], ["update", "db"], ["run", "db"]])
def test_other_priorities_are_usage_errors(command: list[str], value: str, regctl: Run) -> None:
    status, _, errors = regctl(*command, f"--priority={value}", *(["--", "true"] if command[0] == "run" else []))
    assert status == 2
    assert f"must be 0 to 65535, not {value!r}" in errors


def test_event_line_has_the_priority_unless_it_is_0() -> None:
    entry = {"name": "db", "instance": "", "host": "::1", "port": 1, "state": "ready", "meta": {}}
    assert event_line({"event": "up", **entry}) == "up\tdb\t-\t[::1]:1\tready\t-"
    assert event_line({"event": "change", **entry, "priority": 7}) == "change\tdb\t-\t[::1]:1\tready\t-\t7"
