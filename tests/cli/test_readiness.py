"""`regctl run --ready-http` and `--ready-command`, and `regctl wait --http`, with real processes."""

import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from regd.cli import commands, queries, regctl, run_readiness
from regd.cli.arguments import UsageError
from regd.cli.run_readiness import command_probe, http_probe, until_ready
from regd_client.blocking import BlockingConnection
from tests.cli.test_run import REGCTL, Running, finished, running
from tests.support.daemon import ROOT, WAIT_S, DaemonProcess, environment
from tests.support.http_service import HttpHandler, http_service
from tests.support.polling import block_until

# A service that answers with the status that a file contains, and ends when it reads a line.
SERVICE = """if True:
    import http.server, os, pathlib, sys, threading

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(int(pathlib.Path(sys.argv[1]).read_text()))
            self.send_header("Location", "/other")
            self.end_headers()

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", int(os.environ["PORT"])), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    print("listens", flush=True)
    sys.exit(int(sys.stdin.readline()))
"""


@pytest.fixture
def peer(process: DaemonProcess) -> Iterator[BlockingConnection]:
    with BlockingConnection(process.addresses[0]) as made:
        yield made


@pytest.fixture
def status(tmp_path: Path) -> Path:
    path = tmp_path / "status"
    path.write_text("503")
    return path


def command(status: Path) -> list[str]:
    return [sys.executable, "-c", SERVICE, str(status)]


def states(peer: BlockingConnection) -> list[str]:
    return [instance["state"] for instance in peer.ask("list")["instances"]]


def set_status(path: Path, status: str) -> None:
    """Replace the file atomically, since the service may be reading it."""
    new = path.with_suffix(".new")
    new.write_text(status)
    new.replace(path)


def is_starting(service: Running, peer: BlockingConnection) -> None:
    """Wait until the service is registered as starting, and check that it cannot be resolved."""
    assert service.line() == "listens"
    assert service.told().endswith(", and starting")
    assert states(peer) == ["starting"]
    assert peer.ask("resolve", name="web")["error"] == "not_found"


@pytest.mark.sample(3)
@pytest.mark.parametrize("not_ready", ["503", "302", "404"])
def test_ready_http(process: DaemonProcess, peer: BlockingConnection, status: Path, not_ready: str) -> None:
    set_status(status, not_ready)
    with running(process, "web", "--ready-http", "/healthz", "--", *command(status)) as service:
        is_starting(service, peer)
        set_status(status, "204")
        assert service.told() == "regctl: web is ready"
        assert states(peer) == ["ready"]
        service.end()
    assert states(peer) == []


def test_ready_command_gets_the_port_and_nothing_of_it_is_printed(
    process: DaemonProcess, peer: BlockingConnection, status: Path
) -> None:
    ready = f'echo out; echo err >&2; test "$PORT" -gt 0 && grep -q 200 {status}'
    with running(process, "web", "--ready-command", ready, "--", *command(status)) as service:
        is_starting(service, peer)
        set_status(status, "200")
        assert service.told() == "regctl: web is ready"
        assert states(peer) == ["ready"]
        service.end(3)


@pytest.mark.parametrize("option", [("--ready-http", "/"), ("--ready-command", "sleep 1000")])
def test_registration_ends_with_a_command_that_never_was_ready(
    process: DaemonProcess, peer: BlockingConnection, status: Path, option: tuple[str, str]
) -> None:
    """regctl ends with the command, although a probe is still running."""
    with running(process, "web", *option, "--", *command(status)) as service:
        is_starting(service, peer)
        service.end(7)
    assert states(peer) == []
    assert peer.ask("why", name="web")["departures"][0]["reason"] in ("deregistered", "process exited")


def test_signal_before_it_is_ready(process: DaemonProcess, peer: BlockingConnection, status: Path) -> None:
    with running(process, "web", "--ready-http", "/", "--", *command(status)) as service:
        is_starting(service, peer)
        service.process.terminate()
        assert service.process.wait(WAIT_S) == -signal.SIGTERM
    assert states(peer) == []


@pytest.mark.long
def test_service_stays_starting_after_a_restart_of_the_daemon(process: DaemonProcess, status: Path) -> None:
    with running(process, "web", "--ready-http", "/", "--", *command(status)) as service:
        with BlockingConnection(process.addresses[0]) as peer:
            is_starting(service, peer)
        process.end()
        assert "the registry is away" in service.told()
        process.start()
        assert service.told() == "regctl: the registry is back"
        with BlockingConnection(process.addresses[0]) as peer:
            assert states(peer) == ["starting"]
            set_status(status, "200")
            assert service.told() == "regctl: web is ready"
            assert states(peer) == ["ready"]
        service.end()


# Command lines.


@pytest.mark.parametrize("path", ["healthz", "", "/a b", "/a\r\nX: y", "/ä"])
@pytest.mark.parametrize("line", [["wait", "web", "--http"], ["run", "web", "--ready-http"]])
def test_invalid_path_is_a_usage_error(line: list[str], path: str) -> None:
    with pytest.raises(UsageError, match="must be a path such as /healthz"):
        commands.read([*line, path, *(["--", "true"] if line[0] == "run" else [])])


def test_both_ready_options_are_a_usage_error() -> None:
    with pytest.raises(UsageError, match="not both"):
        commands.read(["run", "web", "--ready-http", "/", "--ready-command", "true", "--", "true"])


# The probes, in this process.


async def test_probe_that_hangs_is_killed_with_its_children(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_readiness, "TRY_S", 0.3)
    path = tmp_path / "pid"
    path.touch()
    probe = command_probe(f"sleep 1000 & echo $! > {path}; wait", {}, ())
    while not path.read_text():  # on a busy machine, a shell may be killed before it has started `sleep`
        assert (await probe()).endswith("has not ended within 0.3 s")
    pid = int(path.read_text())
    block_until(lambda: not is_running(pid))


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("true", ""),
        ("exit 3", "`exit 3` ended with status 3"),
        ("kill -9 $$", "`kill -9 $$` ended with signal 9"),
    ],
)
async def test_readiness_by_command(text: str, why: str) -> None:
    assert await command_probe(text, {}, ())() == why


async def test_probe_command_has_the_signal_mask_that_regctl_inherited() -> None:
    """regctl itself blocks all signals that it forwards."""
    blocked = 'test "$(sed -n "s/^SigBlk:.//p" /proc/self/status)" = 0000000000000000'
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGALRM})
    try:
        assert await command_probe(blocked, {}, mask)() == ""
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


async def test_probe_that_keeps_failing_is_reported_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_readiness, "_SILENT_S", 0.0)
    monkeypatch.setattr(run_readiness, "_PAUSE_S", (0.0, 0.0))
    answers = ["no", "no", ""]
    reports: list[str] = []

    async def probe() -> str:
        return answers.pop(0)

    await until_ready(probe, reports.append)
    assert (answers, reports) == ([], ["no"])


async def test_http_probe_names_the_url(unused_tcp_port: int) -> None:
    why = await http_probe("127.0.0.1", unused_tcp_port, "/healthz")()
    assert why == f"http://127.0.0.1:{unused_tcp_port}/healthz: Connection refused"


# regctl wait --http.


class Service:
    """An HTTP server that answers with `status`."""

    def __init__(self) -> None:
        service = self
        self.status = 503
        self.port = 0
        self.paths: list[str] = []

        class Handler(HttpHandler):
            def do_GET(self) -> None:
                service.paths.append(self.path)
                self.answer(b"", status=service.status)

        self.handler = Handler


@pytest.fixture
def service() -> Iterator[Service]:
    service = Service()
    with http_service(service.handler) as service.port:
        yield service


def test_wait_until_it_answers(process: DaemonProcess, peer: BlockingConnection, service: Service) -> None:
    peer.ask("register", name="web", port=service.port)
    with subprocess.Popen(
        [*REGCTL, "wait", "web", "--http", "/healthz"], cwd=ROOT, text=True, stdout=subprocess.PIPE,
        env=environment(REGD_ADDRESS=process.addresses[0]),
    ) as waiting:  # fmt: skip
        block_until(lambda: len(service.paths) > 1)
        assert waiting.poll() is None
        service.status = 200
        assert waiting.wait(WAIT_S) == 0
        assert waiting.stdout is not None
        assert waiting.stdout.read() == f"web answers at http://127.0.0.1:{service.port}/healthz\n"
    assert set(service.paths) == {"/healthz"}


@pytest.mark.parametrize("status", [302, 503])
def test_wait_times_out(
    process: DaemonProcess,
    peer: BlockingConnection,
    service: Service,
    status: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(queries, "_TRY_S_MIN", WAIT_S)
    service.status = status
    peer.ask("register", name="web", port=service.port)
    line = ["--address", process.addresses[0], "wait", "web", "--timeout", "0"]
    assert regctl.main([*line, "--http", "/"]) == 1
    url = f"http://127.0.0.1:{service.port}/"
    assert capsys.readouterr().err.startswith(f"regctl: web: waited 0 s: {url}: answered {status} ")
    assert regctl.main(line) == 0


@pytest.mark.long
def test_wait_moves_with_the_service(process: DaemonProcess, peer: BlockingConnection, service: Service) -> None:
    """When the instance that hangs is replaced, the registry is asked again."""
    service.status = 200
    with socket.create_server(("127.0.0.1", 0)) as hanging:
        peer.ask("register", name="web", port=hanging.getsockname()[1])
        with subprocess.Popen(
            [*REGCTL, "wait", "web", "--http", "/"], cwd=ROOT, env=environment(REGD_ADDRESS=process.addresses[0]),
            stdout=subprocess.DEVNULL,
        ) as waiting:  # fmt: skip
            is_probe = True  # a probe by the daemon
            while is_probe:
                connection = hanging.accept()[0]
                is_probe = connection.recv(3) != b"GET"
                if is_probe:
                    connection.close()
            peer.ask("register", name="web", port=service.port)
            assert waiting.wait(WAIT_S) == 0
            connection.close()


def test_wait_for_a_service_that_is_not_registered(process: DaemonProcess) -> None:
    done = finished(process, "wait", "web", "--http", "/", "--timeout", "0")
    assert (done.returncode, done.stderr) == (1, "regctl: web: waited 0 s: 'web' was never registered\n")
