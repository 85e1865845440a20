"""`regctl run` and `regctl env` as processes: ports, names, signals and exit statuses of real commands."""

import contextlib
import errno
import functools
import json
import os
import pty
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from regd.cli import commands
from regd.cli import run as run_module
from regd.cli.arguments import UsageError
from regd.cli.child import NotRun
from regd.cli.command_port import port_in
from regd.cli.output import environment_variables, variable_prefix
from regd_client.blocking import BlockingConnection
from regd_client.ports import ephemeral_range
from tests.support.daemon import ROOT, WAIT_S, DaemonProcess, environment
from tests.support.polling import block_until
from tests.support.ports import free_port

REGCTL = [sys.executable, "-m", "regd.cli.regctl"]
START_S = 30.0  # for the start of a server on a busy machine

# Reads a line, and handles signals that arrive in the meantime. A signal just before a plain read would not
# interrupt it.
LINE = """
import os, select, signal, socket, sys

woken, waker = socket.socketpair()
waker.setblocking(False)
signal.set_wakeup_fd(waker.fileno())

def line():
    text = b""
    while not text.endswith(b"\\n"):
        if 0 not in select.select([0, woken], [], [])[0]:
            woken.recv(100)
        elif byte := os.read(0, 1):
            text += byte
        else:
            break
    return text.decode()
"""
# Prints its pid and port, waits for a line before it listens, and then prints the signals and lines that it
# receives.
COMMAND = f"""{LINE}
from regd_client import blocking

def heard(number, frame):
    try:
        found = str(blocking.resolve("web", instance=os.environ.get("INSTANCE")))
    except LookupError:
        found = "nobody"
    os.write(1, (signal.Signals(number).name + " " + found + "\\n").encode())  # print may be what was interrupted

for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
    signal.signal(number, heard)
print(os.getpid(), os.environ["PORT"], flush=True)
host = line().strip()
listening = socket.create_server((host, int(os.environ["PORT"])), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
print("listens", flush=True)
sys.exit(int(line()))
"""
PROGRAM = [sys.executable, "-c", COMMAND]


class Running:
    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self.process = process

    def line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().rstrip()

    def told(self) -> str:
        assert self.process.stderr is not None
        return self.process.stderr.readline().rstrip()

    def type(self, text: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(text + "\n")
        self.process.stdin.flush()

    def end(self, status: int = 0) -> None:
        self.type(str(status))
        assert self.process.wait(WAIT_S) == status


@contextlib.contextmanager
def running(daemon: DaemonProcess | None, *arguments: str, **more: str) -> Iterator[Running]:
    address = {"REGD_ADDRESS": daemon.addresses[0]} if daemon is not None else {}
    with subprocess.Popen(
        [*REGCTL, "run", *arguments], cwd=ROOT, env=environment(**address, **more), text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
    ) as process:  # fmt: skip
        try:
            yield Running(process)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def finished(daemon: DaemonProcess, *arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [*REGCTL, *arguments], cwd=ROOT, env=environment(REGD_ADDRESS=daemon.addresses[0]),
        capture_output=True, text=True, timeout=START_S, check=False,
    )  # fmt: skip


@pytest.fixture
def peer(process: DaemonProcess) -> Iterator[BlockingConnection]:
    with BlockingConnection(process.addresses[0]) as made:
        yield made


def names(peer: BlockingConnection) -> list[tuple[str, str, int]]:
    return [(instance["name"], instance["host"], instance["port"]) for instance in peer.ask("list")["instances"]]


# Ports.


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_free_port_is_reserved_and_registered_once_the_command_accepts(
    process: DaemonProcess, peer: BlockingConnection, host: str
) -> None:
    with running(process, "web", "--port", "auto", "--meta", "zone=a", "--", *PROGRAM) as command:
        pid, port = map(int, command.line().split())
        with socket.socket() as other, pytest.raises(OSError, match="in use"):
            other.bind(("127.0.0.1", port))
        assert peer.ask("list")["instances"] == []
        command.type(host)
        assert command.told() == f"regctl: web is registered at {f'[{host}]' if ':' in host else host}:{port}"
        [found] = peer.ask("list")["instances"]
        assert (found["host"], found["port"], found["meta"], found["pid"]) == (host, port, {"zone": "a"}, pid)
        command.end(7)
        assert peer.ask("list")["instances"] == []
        assert peer.ask("why", name="web")["departures"][0]["reason"] in ("deregistered", "process exited")


def test_priority_of_the_command(process: DaemonProcess, peer: BlockingConnection) -> None:
    with running(process, "web", "--socket", "--priority", "7", "--", "cat") as run:
        assert "web is registered at" in run.told()
        assert peer.ask("resolve", name="web")["priority"] == 7


def test_port_of_the_command(process: DaemonProcess, peer: BlockingConnection) -> None:
    port = free_port()
    with socket.create_server(("127.0.0.1", port)):
        done = finished(process, "run", "web", "--port", str(port), "--", "true")
        assert (done.returncode, done.stderr) == (
            4,
            f"regctl: cannot bind port {port}: {os.strerror(errno.EADDRINUSE)}; choose another with --port\n",
        )
    with running(process, "web", "--port", str(port), "--", *PROGRAM) as command:
        assert command.line().split()[1] == str(port)
        command.type("127.0.0.1")
        command.told()
        assert names(peer) == [("web", "127.0.0.1", port)]
        command.end()


SERVERS = {
    "http.server": ["sh", "-c", f'exec {sys.executable} -m http.server --bind 127.0.0.1 "$PORT"'],
    "http.server on ::": ["sh", "-c", f'exec {sys.executable} -m http.server --bind :: "$PORT"'],
    "uvicorn": ["sh", "-c", f'exec {sys.executable} -m uvicorn --port "$PORT" tests.cli.webapp:asgi'],
    "gunicorn": ["sh", "-c", f'exec {sys.executable} -m gunicorn --bind "127.0.0.1:$PORT" tests.cli.webapp:wsgi'],
}
INHERITING = {
    "uvicorn": [sys.executable, "-m", "uvicorn", "--fd", "3", "tests.cli.webapp:asgi"],
    "hypercorn": [sys.executable, "-m", "hypercorn", "--bind", "fd://3", "tests.cli.webapp:asgi"],
    "gunicorn": [sys.executable, "-m", "gunicorn", "tests.cli.webapp:wsgi"],  # gunicorn uses LISTEN_FDS itself
}


def status_line(port: int) -> bytes:
    with socket.create_connection(("127.0.0.1", port), START_S) as made:
        made.sendall(b"GET / HTTP/1.1\r\nHost: there\r\nConnection: close\r\n\r\n")
        with made.makefile("rb") as reply:
            return reply.readline()


@pytest.mark.sample(4)
@pytest.mark.parametrize("server", SERVERS)
def test_servers_listen_on_the_reserved_port(
    process: DaemonProcess, peer: BlockingConnection, server: str
) -> None:
    with running(process, "web", "--", *SERVERS[server]) as command:
        found = peer_wait(process)
        assert b" 200 " in status_line(found["port"])
        command.process.terminate()
        assert command.process.wait(START_S) in (0, -signal.SIGTERM)
    assert names(peer) == []


@pytest.mark.sample(3)
@pytest.mark.parametrize("server", INHERITING)
def test_servers_with_a_passed_socket(process: DaemonProcess, peer: BlockingConnection, server: str) -> None:
    with running(process, "web", "--socket", "--", *INHERITING[server]) as command:
        while not command.told().startswith("regctl: web is registered at 127.0.0.1:"):
            assert command.process.poll() is None  # stderr also has messages of the server
        [(_, _, port)] = names(peer)
        assert b" 200 " in status_line(port)  # waits until the server has started
        command.process.terminate()
        assert command.process.wait(START_S) in (0, -signal.SIGTERM)
    assert names(peer) == []


def peer_wait(process: DaemonProcess) -> dict[str, int]:
    with BlockingConnection(process.addresses[0]) as waiting:
        return waiting.ask("resolve", name="web", wait=START_S)


def test_socket_is_passed_as_by_systemd(process: DaemonProcess) -> None:
    code = """if True:
    import os, socket
    found = socket.socket(fileno=3)
    print(os.environ["LISTEN_PID"] == str(os.getpid()), os.environ["LISTEN_FDS"], os.environ["LISTEN_FDNAMES"])
    print(found.getsockname()[1] == int(os.environ["PORT"]), found.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))
    print(sorted(os.listdir("/dev/fd"))[:4], flush=True)
"""
    done = finished(process, "run", "web", "--socket", "--", sys.executable, "-c", code)
    assert done.stdout.splitlines() == ["True 1 web", "True 1", "['0', '1', '2', '3']"], done.stderr


# Exit statuses.


@pytest.mark.sample(3)
@pytest.mark.parametrize(
    ("arguments", "status", "says"),
    [
        (["web", "--", "sh", "-c", "exit 7"], 7, ""),
        (["web", "--", "./nothing"], 127, "./nothing: No such file or directory"),
        (["web", "--", "/"], 126, "/: Permission denied"),
        (["web"], 2, "name the command, after `--`"),
        (["web", "--"], 2, "name the command, after `--`"),
        (["a name", "--", "true"], 2, "name must be"),
        (["web", "--port", "0", "--", "true"], 2, "must be 1 to 65535, or auto"),
        (["web", "--meta", "x", "--", "true"], 2, "must be KEY=VALUE"),
        (["web", "--wait", "db", "--timeout", "0", "--", "true"], 1, "db: waited 0 s: 'db' was never registered"),
        (["web", "--wait", "d b", "--", "true"], 2, "name must be"),
        (["web", "--address", "127.0.0.1:1", "--wait", "db", "--timeout", "0", "--", "true"], 3, "no regd at"),
        (["web", "--address", "nonsense", "--", "true"], 2, "is not an address"),
    ],
)
def test_exit_statuses(process: DaemonProcess, arguments: list[str], status: int, says: str) -> None:
    done = finished(process, "run", *arguments)
    assert (done.returncode, says in done.stderr or done.stderr) == (status, True)
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("line", "name", "others", "argv"),
    [
        ("run web -- ./server --port 1", "web", [], ["./server", "--port", "1"]),
        ("run web ./server --port 1", "web", [], ["./server", "--port", "1"]),
        ("run --port 80 --socket web npm run dev -- -p", "web", [], ["npm", "run", "dev", "--", "-p"]),
        ("--json --address here:1 run --meta a=b web run run", "web", [], ["run", "run"]),
        ("run web --wait db cache -- ./server", "web", ["db", "cache"], ["./server"]),
        ("run web --wait db --timeout 3 ./server", "web", ["db"], ["./server"]),
        ("run --wait=db web ./server", "web", ["db"], ["./server"]),
        ("run web --wait db --wait cache -- ./server -- x", "web", ["db", "cache"], ["./server", "--", "x"]),
        ("run --wait db cache --port 80 web -- ./server", "web", ["db", "cache"], ["./server"]),
    ],
)
def test_where_the_command_begins(line: str, name: str, others: list[str], argv: list[str]) -> None:
    found = commands.read(line.split())
    assert (found["name"], found["wait"], found["argv"]) == (name, others, argv)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("run web", "name the command, after `--`"),
        ("run web --wait db ./server", "`--` before the command"),
        ("run --wait db web ./server", "required: NAME"),
        ("run --wait db web -- ./server", "put NAME before --wait"),
        ("run web --nonsense ./server", "unrecognized arguments: --nonsense"),
        ("resolve run -- x", "unrecognized arguments: x"),
    ],
)
def test_where_no_command_begins(line: str, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        commands.read(line.split())


def test_signal_that_ends_the_command_ends_regctl(process: DaemonProcess, peer: BlockingConnection) -> None:
    with running(process, "web", "--", *PROGRAM) as command:
        pid = int(command.line().split()[0])
        command.type("127.0.0.1")
        command.told()
        os.kill(pid, signal.SIGKILL)
        assert command.process.wait(WAIT_S) == -signal.SIGKILL
    assert names(peer) == []


def test_name_stays_with_the_command_if_regctl_is_killed(
    process: DaemonProcess, peer: BlockingConnection
) -> None:
    with running(process, "web", "--", *PROGRAM) as command:
        command.line()
        command.type("127.0.0.1")
        command.told()
        command.process.kill()
        command.process.wait()
        assert len(names(peer)) == 1
        command.type("0")
        block_until(lambda: names(peer) == [])


# Signals.


def test_name_is_deregistered_before_a_signal_is_passed_on(process: DaemonProcess) -> None:
    with running(process, "web", "--", *PROGRAM) as command:
        port = command.line().split()[1]
        command.type("127.0.0.1")
        assert command.line() == "listens"
        command.told()
        for number in (signal.SIGUSR1, signal.SIGHUP):
            command.process.send_signal(number)
            assert command.line() == f"{number.name} 127.0.0.1:{port}"
        for number in (signal.SIGTERM, signal.SIGINT):  # the second is sent once the name is gone
            command.process.send_signal(number)
            assert command.line() == f"{number.name} nobody"
        command.end(3)


# Counts the SIGINT that it receives, and ends when it reads a line.
COUNT = f"""{LINE}
received = 0

def heard(number, frame):
    global received
    received += 1
    os.write(1, b"%d\\n" % received)

signal.signal(signal.SIGINT, heard)
listening = socket.create_server(("127.0.0.1", int(os.environ["PORT"])))
line()
print("ends", flush=True)
"""


@pytest.mark.sample(2)
@pytest.mark.parametrize(("sender", "is_passed_on"), [("overmind", False), ("another", True)])
def test_signal_of_a_process_manager_to_the_group_is_not_passed_on(
    sender: str, is_passed_on: bool, process: DaemonProcess, peer: BlockingConnection
) -> None:
    with running(process, "web", "--", sys.executable, "-c", COUNT) as command:
        assert "is registered" in command.told()
        # Until the command has received its own signal, regctl must not send it another one: the kernel would
        # merge the two.
        command.process.send_signal(signal.SIGSTOP)
        send = f"kill -INT -{command.process.pid}; read"  # the manager continues to run
        with subprocess.Popen([sender, "-c", send], executable="/bin/bash", stdin=subprocess.PIPE) as manager:
            assert command.line() == "1"
            command.process.send_signal(signal.SIGCONT)
            block_until(lambda: names(peer) == [])
            if is_passed_on:
                assert command.line() == "2"
            else:
                time.sleep(0.5)  # regctl forwards a signal after 0.1 s
            command.type("")
            assert command.line() == "ends"
            manager.communicate(timeout=WAIT_S)


def test_signal_before_the_registration(process: DaemonProcess) -> None:
    with running(process, "web", "--", *PROGRAM) as command:
        command.line()
        command.process.terminate()
        assert command.line() == "SIGTERM nobody"
        command.type("127.0.0.1")
        command.end()


def test_ctrl_c_reaches_the_command_once(process: DaemonProcess) -> None:
    """The terminal itself sends SIGINT to the command."""
    pid, terminal = pty.fork()
    if pid == 0:
        os.execvpe(
            sys.executable,
            [*REGCTL, "run", "web", "--", *PROGRAM],
            environment(REGD_ADDRESS=process.addresses[0]),
        )
    shown = ""

    def read_until(words: str) -> None:
        nonlocal shown
        late = time.monotonic() + START_S
        while words not in shown:
            assert select.select([terminal], [], [], max(0.0, late - time.monotonic()))[0], shown
            shown += os.read(terminal, 4_096).decode()

    try:
        read_until("\n")
        os.write(terminal, b"127.0.0.1\n")
        read_until("is registered")
        os.write(terminal, b"\x03")
        read_until("SIGINT ")
        os.write(terminal, b"5\n")
        with contextlib.suppress(OSError):  # the terminal closes when the processes end
            while part := os.read(terminal, 4_096):
                shown += part.decode()
        assert shown.count("SIGINT ") == 1
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 5
    finally:
        os.close(terminal)


def test_hangup_reaches_the_command(process: DaemonProcess, tmp_path: Path) -> None:
    """The kernel sends SIGHUP only to the session leader, which is regctl under `ssh -t` and `xterm -e`."""
    heard = tmp_path / "heard"
    os.mkfifo(heard)
    code = "import signal, sys; signal.sigwait({signal.SIGHUP}); open(sys.argv[1], 'w').write('SIGHUP')"
    code = f"import signal; signal.pthread_sigmask(signal.SIG_BLOCK, {{signal.SIGHUP}}); print('waits', flush=True); {code}"
    pid, terminal = pty.fork()
    if pid == 0:
        os.execvpe(
            sys.executable,
            [*REGCTL, "run", "web", "--", sys.executable, "-c", code, str(heard)],
            environment(REGD_ADDRESS=process.addresses[0]),
        )
    try:
        shown = b""
        while b"waits\r\n" not in shown:
            assert select.select([terminal], [], [], START_S)[0]
            shown += os.read(terminal, 4_096)
    finally:
        os.close(terminal)
    reading = os.open(heard, os.O_RDONLY | os.O_NONBLOCK)
    try:
        assert select.select([reading], [], [], START_S)[0]
        block_until(lambda: os.waitpid(pid, os.WNOHANG)[0] == pid)
        assert os.read(reading, 100) == b"SIGHUP"
    finally:
        os.close(reading)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)


# Prints its name and each signal that it receives, and ends when it reads a line.
LISTENER = f"""{LINE}
def heard(number, frame):
    os.write(1, b"%d\\n" % number)  # print is not reentrant, and another signal may come meanwhile

own = (signal.SIGKILL, signal.SIGSTOP, signal.SIGCHLD, signal.SIGPIPE, signal.SIGXFSZ)
for number in signal.valid_signals().difference(own):
    signal.signal(number, heard)
print("waits", flush=True)
line()
"""
PASSED_ON = [
    signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGALRM, signal.SIGCONT, signal.SIGWINCH,
    signal.SIGURG, signal.SIGTSTP, signal.SIGTTIN, signal.SIGTTOU, signal.SIGRTMIN, signal.SIGRTMAX,
]  # fmt: skip


def test_signals_except_faults_are_passed_on(process: DaemonProcess) -> None:
    """Job control signals do not stop regctl in a new session, where no shell could resume it."""
    with running(process, "web", "--", sys.executable, "-c", LISTENER) as command:
        assert command.line() == "waits"
        for number in PASSED_ON:
            command.process.send_signal(number)
            assert command.line() == str(int(number))
        command.type("")
        assert command.process.wait(WAIT_S) == 0


@pytest.mark.sample(3)
@pytest.mark.parametrize("number", [signal.SIGTSTP, signal.SIGTTIN, signal.SIGTTOU])
def test_job_control_stops_regctl_and_resumes_it(process: DaemonProcess, number: int) -> None:
    with subprocess.Popen(
        [*REGCTL, "run", "web", "--", sys.executable, "-c", LISTENER], cwd=ROOT,
        env=environment(REGD_ADDRESS=process.addresses[0]), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        process_group=0,  # in the session of its parent, as a job of a shell
    ) as made:  # fmt: skip
        command = Running(made)
        try:
            assert command.line() == "waits"
            made.send_signal(number)
            assert command.line() == str(int(number))
            assert os.waitpid(made.pid, os.WUNTRACED)[1] == (number << 8 | 0x7F)
            made.send_signal(signal.SIGCONT)
            assert command.line() == str(int(signal.SIGCONT))
            command.end()
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(made.pid, signal.SIGKILL)


# Starts regctl with signals ignored or blocked, as some parents do.
INHERITED = """
import os, signal, sys
signal.signal(signal.SIGCHLD, signal.SIG_IGN)
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGCHLD, signal.SIGUSR1, signal.SIGTERM])
os.execv(sys.executable, [sys.executable, "-m", "regd.cli.regctl", *sys.argv[1:]])
"""
ENDS_BY_USR1 = (
    "import os, signal; signal.pthread_sigmask(signal.SIG_SETMASK, []); os.kill(os.getpid(), signal.SIGUSR1)"
)


@pytest.mark.parametrize(
    ("command", "status"),
    [
        (["sh", "-c", "exit 7"], 7),
        (["./nothing"], 127),
        ([sys.executable, "-c", ENDS_BY_USR1], -signal.SIGUSR1),
    ],
)
def test_signals_that_a_parent_ignores_or_blocks(process: DaemonProcess, command: list[str], status: int) -> None:
    done = subprocess.run(
        [sys.executable, "-c", INHERITED, "run", "web", "--", *command], cwd=ROOT,
        env=environment(REGD_ADDRESS=process.addresses[0]), capture_output=True, text=True, timeout=START_S, check=False,
    )  # fmt: skip
    assert (done.returncode, "Traceback" in done.stderr) == (status, False), done.stderr


def test_ignored_signal_is_passed_on_and_the_name_stays(process: DaemonProcess) -> None:
    """As SIGINT for a script in the background: the command ignores it, unless it sets a handler."""
    code = INHERITED.replace("SIGCHLD, signal.SIG_IGN", "SIGINT, signal.SIG_IGN").replace("[signal.SIGCHLD,", "[")
    with subprocess.Popen(
        [sys.executable, "-c", code, "run", "web", "--socket", "--", *PROGRAM], cwd=ROOT, start_new_session=True,
        env=environment(REGD_ADDRESS=process.addresses[0]), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    ) as made:  # fmt: skip
        command = Running(made)
        try:
            port = command.line().split()[1]
            peer_wait(process)
            for _ in range(2):
                made.send_signal(signal.SIGINT)
                assert command.line() == f"SIGINT 127.0.0.1:{port}"
        finally:
            os.killpg(made.pid, signal.SIGKILL)


def test_blocked_signal_is_passed_on(process: DaemonProcess) -> None:
    code = LISTENER.replace('print("waits"', 'signal.pthread_sigmask(signal.SIG_SETMASK, []); print("waits"')
    with subprocess.Popen(
        [sys.executable, "-c", INHERITED, "run", "web", "--", sys.executable, "-c", code], cwd=ROOT,
        env=environment(REGD_ADDRESS=process.addresses[0]), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    ) as made:  # fmt: skip
        command = Running(made)
        assert command.line() == "waits"
        made.send_signal(signal.SIGTERM)
        assert command.line() == str(int(signal.SIGTERM))
        command.end()


# Messages that cannot be printed.


@pytest.mark.sample(3)
@pytest.mark.parametrize("stderr", ["2>/dev/full", "2>&-", "a pipe that nobody reads"])
def test_name_stays_with_a_broken_stderr(process: DaemonProcess, peer: BlockingConnection, stderr: str) -> None:
    """stdout has only the output of the command."""
    reading, writing = os.pipe()
    os.close(reading)
    if not stderr.startswith("2>"):
        stderr = f"2>&{writing}"
    script = f"exec {' '.join(REGCTL)} run web --socket -- {sys.executable} -c '{COMMAND}' {stderr}"
    # Python ends with 120 if it cannot flush a traceback.
    surroundings = environment(REGD_ADDRESS=process.addresses[0], PYTHONUNBUFFERED="1")
    try:
        with subprocess.Popen(
            ["bash", "-c", script], cwd=ROOT, env=surroundings, text=True, pass_fds=[writing],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        ) as made:  # fmt: skip
            command = Running(made)
            port = command.line().split()[1]
            peer.ask("resolve", name="web", wait=WAIT_S)
            made.send_signal(signal.SIGUSR1)
            assert command.line() == f"SIGUSR1 127.0.0.1:{port}"
            peer.ask("deregister", name="web")  # regctl reports that it has lost the name
            made.send_signal(signal.SIGUSR1)
            assert command.line() == "SIGUSR1 nobody"
            command.type("127.0.0.1")  # the command cannot listen there, since it already uses the port
            assert made.stdout is not None
            assert made.stdout.read() == ""
            assert made.wait(WAIT_S) == 1
    finally:
        os.close(writing)


@pytest.mark.parametrize("stderr", ["2>/dev/full", "2>&-"])
def test_status_with_a_broken_stderr(process: DaemonProcess, stderr: str) -> None:
    for arguments, status in (
        ("-- ./nothing", 127),
        ("--wait db --timeout 0 -- true", 1),
        ("", 2),
        ("--nonsense", 2),
    ):
        done = subprocess.run(
            ["bash", "-c", f"exec {' '.join(REGCTL)} run web {arguments} {stderr}"], cwd=ROOT,
            env=environment(REGD_ADDRESS=process.addresses[0]), capture_output=True, text=True, timeout=START_S, check=False,
        )  # fmt: skip
        assert (done.returncode, done.stdout) == (status, ""), arguments


def test_signal_after_a_sent_one_is_not_lost(process: DaemonProcess) -> None:
    """Neither that signal nor another one in between is lost while the first signal is delayed."""
    with running(process, "web", "--", sys.executable, "-c", LISTENER) as command:
        assert command.line() == "waits"
        for number in (signal.SIGTERM, signal.SIGWINCH, signal.SIGUSR1, signal.SIGINT):
            command.process.send_signal(number)
        heard = {int(command.line()) for _ in range(4)}
        assert heard == {signal.SIGTERM, signal.SIGWINCH, signal.SIGUSR1, signal.SIGINT}
        command.type("")
        assert command.process.wait(WAIT_S) == 0


# The registry.


def test_waits_for_services_and_sets_their_variables(process: DaemonProcess, peer: BlockingConnection) -> None:
    code = "import os; print(*(os.environ[f'SHOP_DB_{each}'] for each in ('HOST', 'PORT', 'ADDRESS')))"
    with socket.create_server(("::1", 0), family=socket.AF_INET6) as there:
        port = there.getsockname()[1]
        with running(process, "web", "--wait", "shop.db", "late", "--", sys.executable, "-c", code) as command:
            peer.ask("register", name="shop.db", port=port, host="::1")
            block_until(lambda: peer.ask("stats")["waiting"] == 1)
            peer.ask("register", name="late", port=port, host="::1")
            assert command.line() == f"::1 {port} [::1]:{port}"
            assert command.process.wait(WAIT_S) == 0


@pytest.mark.long
def test_daemon_started_later(process: DaemonProcess) -> None:
    process.end()
    with running(process, "web", "--", *PROGRAM) as command:
        port = command.line().split()[1]
        command.type("127.0.0.1")
        assert "not registered yet, still trying: no regd at" in command.told()
        process.start()
        assert command.told() == f"regctl: web is registered at 127.0.0.1:{port}"
        process.end()
        assert "the registry is away, still trying: " in command.told()
        process.start()
        assert command.told() == "regctl: the registry is back"
        command.end()


def test_name_that_becomes_free(process: DaemonProcess, peer: BlockingConnection) -> None:
    peer.ask("register", name="web", port=1, hold=True)
    with running(process, "web", "--", *PROGRAM) as command:
        command.line()
        command.type("127.0.0.1")
        assert "not registered yet, still trying: " in command.told()
        peer.ask("deregister", name="web")
        assert command.told().startswith("regctl: web is registered at ")
        peer.ask("deregister", name="web")
        assert command.told() == "regctl: lost the registration of web: deregistered"
        command.end()


def test_events_of_run_as_json(process: DaemonProcess) -> None:
    with running(process, "web", "--json", "--instance", "a", "--", *PROGRAM, INSTANCE="a") as command:
        port = command.line().split()[1]
        command.type("127.0.0.1")
        told = json.loads(command.told())
        assert (told["event"], told["name"], told["address"]) == ("registered", "web", f"127.0.0.1:{port}")
        command.end()
    done = finished(process, "--json", "run", "web", "--", "./nothing")
    assert (json.loads(done.stderr)["event"], json.loads(done.stderr)["error"]) == ("refused", "cannot_run")


@pytest.mark.parametrize(
    ("argument", "hint"),
    [
        ("50000", "($PORT)\n"),
        (
            "--bind=:5000",
            "($PORT), not 5000, with which a shell replaced $PORT; use sh -c '… \"$PORT\"' in single quotes\n",
        ),
    ],
)
def test_command_that_never_listens_is_reported(
    argument: str,
    hint: str,
    process: DaemonProcess,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("REGD_ADDRESS", process.addresses[0])
    monkeypatch.setattr(run_module, "_SILENT_S", 0.0)
    monkeypatch.setenv("PORT", "5000")  # as honcho does
    os.mkfifo(tmp_path / "end")
    child = subprocess.Popen(
        ["sh", "-c", f"read x < {tmp_path / 'end'}"],
    )
    try:
        name = run_module._Name(
            {"name": "web", "instance": None, "meta": None, "argv": ["server", argument]},
            functools.partial(run_module._report, False),
            child.pid,
            1,
        )
        name.begin(accepts=False)
        shown = ""

        def said() -> bool:
            nonlocal shown
            shown += capfd.readouterr().err
            return (
                "nothing has accepted connections at 127.0.0.1:1 for 0 s; the command must listen on port 1 "
                + hint
                in shown
            )

        block_until(said)
        assert name.withdraw()
        assert name.is_gone(WAIT_S)
    finally:
        child.kill()
        child.wait()


def test_pid_is_registered_for_commands_of_this_user_only() -> None:
    assert run_module._bound_to(os.getpid()) == os.getpid()
    assert run_module._bound_to(2**22) is None


# env


@pytest.mark.parametrize(
    ("name", "begins"), [("db", "DB"), ("shop.db-1", "SHOP_DB_1"), ("3d", "_3D"), ("_a", "_A")]
)
def test_variable_prefix(name: str, begins: str) -> None:
    assert variable_prefix(name) == begins


def test_variables_of_the_first_instance_and_of_one_service_per_prefix() -> None:
    rows = [("a-b", "127.0.0.1", 1), ("a-b", "::1", 2), ("a.b", "h", 3)]
    found, hidden = environment_variables(
        [{"name": name, "host": host, "port": port} for name, host, port in rows]
    )
    assert found == {"A_B_HOST": "127.0.0.1", "A_B_PORT": "1", "A_B_ADDRESS": "127.0.0.1:1"}
    assert hidden == ["a.b"]


def test_env(process: DaemonProcess, peer: BlockingConnection) -> None:
    peer.ask("register", name="shop.db", port=5432, host="::1")
    peer.ask("register", name="cache", port=6379)
    peer.ask("register", name="later", port=1, state="starting")
    peer.ask("register", name="shop-db", port=9)
    done = finished(process, "env")
    cache = ["CACHE_HOST=127.0.0.1", "CACHE_PORT=6379", "CACHE_ADDRESS=127.0.0.1:6379"]
    assert done.stdout.splitlines()[:3] == cache
    assert done.stderr == "regctl: shop.db is left out: another service has the same variables\n"
    for shell in ("sh", "bash"):
        script = f'eval "$({" ".join(REGCTL)} env shop.db)"; echo "$SHOP_DB_ADDRESS"; env $({" ".join(REGCTL)} env cache) sh -c \'echo "$CACHE_PORT"\''
        sourced = subprocess.run(
            [shell, "-c", script], env=environment(REGD_ADDRESS=process.addresses[0]), capture_output=True, text=True, check=True, timeout=START_S,
        )  # fmt: skip
        assert sourced.stdout == "[::1]:5432\n6379\n"
    assert json.loads(finished(process, "env", "cache", "--json").stdout) == dict(
        line.split("=") for line in cache
    )
    done = finished(process, "env", "cache", "later")
    assert (done.returncode, done.stdout) == (1, "")


def test_errors_as_json(process: DaemonProcess) -> None:
    for arguments, status, error in (
        (["env", "nobody"], 1, "not_found"),
        (["wait", "nobody", "--timeout", "0"], 1, "timeout"),
        (["ping", "--address", "127.0.0.1:1"], 3, "unavailable"),
        (["ping", "--address", "nonsense"], 2, "bad_argument"),
    ):
        done = finished(process, "--json", *arguments)
        told = json.loads(done.stdout)
        assert (done.returncode, told["ok"], told["error"], done.stderr) == (status, False, error, "")
        assert told["message"]


# Ports that stay.


def port_of(command: Running) -> int:
    return int(command.line().split()[1])


def listen_and_end(command: Running) -> None:
    """Let the command listen, wait until it is registered, and end it."""
    command.type("127.0.0.1")
    assert " is registered at 127.0.0.1:" in command.told()
    command.end()


def test_command_gets_the_port_that_the_name_had(process: DaemonProcess) -> None:
    first, last = ephemeral_range()
    ports = []
    for _ in range(2):
        with (
            running(process, "web", "--", *PROGRAM) as command,
            running(process, "web", "--instance", "a", "--", *PROGRAM) as other,
        ):
            ports.append((port_of(command), port_of(other)))
            listen_and_end(command)
            listen_and_end(other)
    assert ports[0] == ports[1]
    assert len(set(ports[0])) == 2
    assert not any(first <= port <= last for port in ports[0])
    with running(process, "web", "--socket", "--", *PROGRAM) as command:
        assert port_of(command) == ports[0][0]


def test_port_that_another_program_has_taken(process: DaemonProcess) -> None:
    with running(process, "web", "--", *PROGRAM) as command:
        port = port_of(command)
        listen_and_end(command)
    with (
        socket.create_server(("::1", port), family=socket.AF_INET6),
        running(process, "web", "--", *PROGRAM) as command,
    ):
        assert port_of(command) != port


@pytest.mark.parametrize("options", [[], ["--socket"]])
def test_two_runs_of_one_name_at_once_have_two_ports(process: DaemonProcess, options: list[str]) -> None:
    """Both find the same last port in the history."""
    with running(process, "web", "--", *PROGRAM) as command:
        port = port_of(command)
        listen_and_end(command)
    with (
        running(process, "web", *options, "--", *PROGRAM) as one,
        running(process, "web", *options, "--", *PROGRAM) as two,
    ):
        ports = {port_of(one), port_of(two)}
        assert len(ports) == 2
        assert port in ports


def test_port_of_an_ended_server_is_taken_again(process: DaemonProcess, peer: BlockingConnection) -> None:
    """Closed connections of the server keep the port busy for a minute, for sockets without SO_REUSEADDR."""
    code = "import os, socket; sock = socket.create_server(('127.0.0.1', int(os.environ['PORT']))); print(0, os.environ['PORT'], flush=True)\nwhile True: sock.accept()[0].close()"
    ports = []
    for _ in range(2):
        with running(process, "web", "--", sys.executable, "-c", code) as command:
            ports.append(port_of(command))
            command.told()
            with socket.create_connection(("127.0.0.1", ports[-1])) as caller:
                assert caller.recv(1) == b""
            command.process.terminate()
            command.process.wait(WAIT_S)
    assert ports[0] == ports[1]


def test_without_a_daemon_a_free_port_is_passed(process: DaemonProcess) -> None:
    process.end()
    with running(process, "web", "--", *PROGRAM) as command:
        assert port_of(command)


PRINT_PORT = [sys.executable, "-c", "import os; print(os.environ['PORT'], os.environ['REGD_RUN_PORT'])"]


@pytest.mark.parametrize(
    ("more", "counts"),
    [
        ({}, True),
        ({"REGD_RUN_PORT": "1"}, True),  # $PORT was set between an outer regctl run and this one
        ({"REGD_RUN_PORT": "same"}, False),
        ({"HONCHO_PROCESS_NAME": "web.1"}, False),
        ({"FOREMAN_WORKER_NAME": "web.1"}, False),
        ({"PS": "web.1"}, False),
        ({"PS": "$"}, True),
        ({"TMUX": "/tmp/tmux-1000/overmind-shop-V1StGXR8,4242,0"}, False),
        ({"TMUX": "/tmp/tmux-1000/default,4242,0"}, True),
    ],
)  # fmt: skip
def test_port_of_the_environment_counts_if_the_user_has_set_it(more: dict[str, str], counts: bool) -> None:
    more = {key: "5000" if value == "same" else value for key, value in more.items()}
    assert port_in({"PORT": "5000", **more}) == (5_000 if counts else None)


@pytest.mark.parametrize("text", ["", "0"])
def test_environment_without_a_port(text: str) -> None:
    assert port_in({}) is port_in({"PORT": text}) is None


@pytest.mark.parametrize("text", ["80a", "65536", "-1", "tcp://10.0.0.1:80"])
def test_invalid_port_in_the_environment_is_an_error(text: str) -> None:
    with pytest.raises(NotRun, match="which is no port") as failure:
        port_in({"PORT": text})
    assert failure.value.status == 2
    assert port_in({"PORT": text, "HONCHO_PROCESS_NAME": "web.1"}) is None


def test_port_of_the_environment_is_the_command_s(process: DaemonProcess) -> None:
    port = str(free_port())
    with running(process, "web", "--", *PRINT_PORT, PORT=port) as command:
        assert command.line() == f"{port} {port}"
    with running(process, "web", "--port", "auto", "--", *PRINT_PORT, PORT=port) as command:
        assert command.line() != f"{port} {port}"
    with socket.create_server(("", int(port))), running(process, "web", "--", "true", PORT=port) as command:
        assert command.told().startswith(f"regctl: cannot bind port {port}: ")


def test_inner_run_has_a_port_of_its_own(process: DaemonProcess) -> None:
    inner = [*REGCTL, "run", "db", "--", *PRINT_PORT]
    shell = ["sh", "-c", 'echo "$PORT"; exec "$@"', "sh", *inner]
    with running(process, "web", "--", *shell) as command:
        outer = command.line()
        assert outer not in command.line().split()


def test_copies_get_their_numbers_again_after_a_restart(process: DaemonProcess, peer: BlockingConnection) -> None:
    def instances() -> list[str]:
        return [instance["instance"] for instance in peer.ask("list")["instances"]]

    auto = ["web", "--instance", "auto", "--", *PROGRAM]
    with running(process, *auto) as first, running(process, *auto) as second:
        ports = []
        for number, command in enumerate((first, second), 1):
            ports.append(port_of(command))
            command.type("127.0.0.1")
            at = f"127.0.0.1:{ports[-1]}"
            assert command.told() == f"regctl: web is registered at {at} as instance {number}"
            assert instances() == ["1", "2"][:number]
        first.end()
        assert instances() == ["2"]
        with running(process, *auto) as again:
            assert port_of(again) == ports[0]
            again.type("127.0.0.1")
            again.told()
            assert instances() == ["1", "2"]
