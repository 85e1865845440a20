"""`regctl serve` for a project registry: its own ports, the file with its addresses, and a daemon on demand."""

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from regd.gateways.address_file import AddressFile, read_addresses
from regd.gateways.listeners import bind_at_one, ports_to_try
from regd_client import project
from regd_client.blocking_connection import BlockingConnection
from regd_client.ports import ephemeral_range
from tests.gateways.test_serve import ask, get, port_of
from tests.support.daemon import WAIT_S, environment
from tests.support.demand import SLOW_S, Demand
from tests.support.polling import block_until
from tests.support.ports import free_port
from tests.support.projects import Project, project_registry

ADDRESSES = ["http://127.0.0.1:1", "dns://[::1]:2"]


@pytest.fixture
def here(tmp_path: Path) -> Iterator[Project]:
    with project_registry(tmp_path, tmp_path / "shop") as here:
        yield here


class Gateway:
    """A process of `regctl serve` in the folder of a project."""

    def __init__(self, here: Demand, process: "subprocess.Popen[str]") -> None:
        self.here = here
        self.process = process
        assert process.stdout is not None
        lines = [process.stdout.readline() for _ in range(4)]
        assert all(line.startswith("listening ") for line in lines), process.communicate()
        self.addresses = [line.split()[1] for line in lines]
        self.http, self.dns = self.addresses[0], port_of(self.addresses[2])

    def end(self) -> str:
        """Stop the gateway with SIGTERM, and return what it wrote to stderr."""
        self.process.terminate()
        output, errors = self.process.communicate(timeout=WAIT_S)
        assert (self.process.returncode, output) == (0, "")
        return errors


@contextlib.contextmanager
def gateway(here: Demand, *flags: str, cwd: Path | None = None, **extra: str) -> Iterator[Gateway]:
    with subprocess.Popen(
        [sys.executable, "-m", "regd.cli.regctl", "serve", *flags],
        cwd=cwd or here.place, env=here.environment(**extra), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        try:
            yield Gateway(here, process)
        finally:
            process.kill()


def answers(port: int, name: str) -> list[str]:
    """Wait until DNS has SRV records of a service, and return them."""
    block_until(lambda: ask(port, name, "SRV").answer)
    return [str(record) for record in ask(port, name, "SRV").answer[0]]


def named(here: Project) -> list[str]:
    """Return the addresses that `regctl where` shows, and check that text and JSON have the same."""
    lines = [line.split() for line in here.prints("where").splitlines()]
    addresses = [words[1] for words in lines if words[0] == "serve"]
    assert json.loads(here.prints("where", "--json")).get("serve", []) == addresses
    return addresses


# Ports.


@pytest.mark.long
def test_two_checkouts_at_the_same_time(here: Project, tmp_path: Path) -> None:
    with (
        project_registry(tmp_path, tmp_path / "other") as other,
        gateway(here) as first,
        gateway(other) as second,
    ):
        for place, running, port in ((here, first, 5061), (other, second, 5062)):
            place.prints("register", "web", str(port))
            status, body = get(f"{running.http}/v1/resolve?name=web")
            assert (status, json.loads(body)["port"]) == (200, port)
            [record] = answers(running.dns, "web.regd.internal")
            assert record.split()[2] == str(port)
            assert named(place) == running.addresses
            assert (place.folder / "serve").read_text().split() == running.addresses
        assert not set(first.addresses) & set(second.addresses)


def test_ports_stay_the_same(here: Project) -> None:
    with gateway(here) as running:
        before = running.addresses
        running.end()
    with gateway(here) as running:
        assert running.addresses == before
        http, dns = port_of(before[0]), port_of(before[2])
        running.end()
    first, last = ephemeral_range()
    assert not first <= http <= last
    assert not first <= dns <= last
    with socket.create_server(("127.0.0.1", http)), gateway(here) as running:  # taken, so another
        assert port_of(running.addresses[0]) != http
        assert running.addresses[2:] == before[2:]


def test_ports_by_option_and_by_default(here: Project) -> None:
    assert ports_to_try(None, 7380, "") == [7380]
    assert ports_to_try(0, 7380, "") == ports_to_try(0, 7380, "/shop/.regd") == [0]
    assert ports_to_try("off", 7380, "/shop/.regd") == []
    assert ports_to_try(None, 7380, "/shop/.regd") == ports_to_try(None, 7380, "/shop/.regd")
    assert ports_to_try(None, 7380, "/shop/.regd")[-1] == 0
    others = [ports_to_try(None, 7353, "/shop/.regd"), ports_to_try(None, 7380, "/cafe/.regd")]
    assert ports_to_try(None, 7380, "/shop/.regd")[0] not in {others[0][0], others[1][0]}
    sockets = bind_at_one([0], (socket.SOCK_DGRAM, socket.SOCK_STREAM), "--dns")
    port = sockets[0].getsockname()[1]
    for sock in sockets:
        sock.close()
    with gateway(here, "--http", "0", "--dns", str(port)) as running:
        assert running.dns == port
        assert named(here) == running.addresses


def test_default_ports_of_a_named_address(here: Project, tmp_path: Path) -> None:
    """REGD_ADDRESS takes precedence over the project registry, so the gateway does not belong to the project."""
    here.prints("register", "web", "5061")
    with gateway(here, "--http", "0", "--dns", "0", REGD_ADDRESS=here.address) as running:
        assert get(f"{running.http}/v1/resolve?name=web")[0] == 200
        assert named(here) == []
        assert not (here.folder / "serve").exists()


# The file.


def test_file_is_there_before_the_first_line_and_gone_after_the_end(here: Project) -> None:
    assert named(here) == []
    with gateway(here) as running:
        path = here.folder / "serve"
        assert path.read_text() == "".join(f"{address}\n" for address in running.addresses)
        assert path.stat().st_mode & 0o777 == 0o600
        assert named(here) == running.addresses
        assert running.end() == ""
    assert not path.exists()
    assert named(here) == []


@pytest.mark.long
def test_killed_gateway_is_not_named(here: Project) -> None:
    with gateway(here) as running:
        running.process.kill()
        running.process.wait(WAIT_S)
        assert (here.folder / "serve").exists()
        assert here.daemons()  # the gateway started the daemon, which must not keep the gateway's lock
        assert named(here) == []
    with gateway(here) as running:
        assert named(here) == running.addresses
        assert running.end() == ""
    assert not (here.folder / "serve").exists()


def test_stopped_gateway_is_named(here: Project) -> None:
    with gateway(here) as running:
        running.process.send_signal(signal.SIGSTOP)
        assert named(here) == running.addresses


@pytest.mark.long
def test_second_gateway_is_named_when_the_first_ends(here: Project) -> None:
    with gateway(here) as first, gateway(here) as second:
        assert not set(first.addresses) & set(second.addresses)
        assert named(here) == first.addresses
        assert get(f"{second.http}/healthz")[0] == 200
        assert first.end() == ""
        block_until(lambda: read_addresses(str(here.folder)) == second.addresses)
        assert named(here) == second.addresses
        expected = f"{here.folder}/serve names another `regctl serve` of this project, until that one ends\n"
        assert second.end() == expected
    assert not (here.folder / "serve").exists()


@pytest.mark.long
def test_end_of_the_second_leaves_the_file_of_the_first(here: Project) -> None:
    with gateway(here) as first, gateway(here) as second:
        second.end()
        assert named(here) == first.addresses


@pytest.mark.long
def test_removed_file_is_written_again(here: Project) -> None:
    with gateway(here) as running:
        (here.folder / "serve").unlink()
        block_until(lambda: read_addresses(str(here.folder)) == running.addresses)


@pytest.mark.long
def test_folder_that_was_made_again(here: Project) -> None:
    """The gateway continues with the new registry, and no request gets an entry of the old registry."""
    with gateway(here) as running:
        here.prints("register", "old", "5061")
        while here.folder.exists():
            shutil.rmtree(here.folder, ignore_errors=True)
        block_until(lambda: not here.daemons())
        assert get(f"{running.http}/v1/list")[0] == 503
        here.prints("init")
        block_until(lambda: read_addresses(str(here.folder)) == running.addresses)
        block_until(lambda: get(f"{running.http}/v1/list")[0] == 200)
        assert json.loads(get(f"{running.http}/v1/list")[1])["instances"] == []


def test_folder_of_others_gets_no_file(here: Project) -> None:
    """The folder became accessible to other users while the gateway was running."""
    file = AddressFile(str(here.folder))
    here.folder.chmod(0o755)
    assert file.write(ADDRESSES) == f"{here.folder} cannot be used: its mode is 0755 and must be 0700"
    assert not (here.folder / "serve").exists()
    here.folder.chmod(0o700)
    assert file.write(ADDRESSES) == ""
    assert read_addresses(str(here.folder)) == ADDRESSES
    file.close()


def test_copied_folder_is_not_used(here: Project, tmp_path: Path) -> None:
    with gateway(here) as running:
        shutil.copytree(here.place, tmp_path / "copy", ignore=shutil.ignore_patterns("regd.sock"))
        copy = tmp_path / "copy" / ".regd"
        copy.chmod(0o700)
        assert (copy / "serve").read_text().split() == running.addresses
        assert read_addresses(str(copy)) == []
        out = here.regctl("where", cwd=str(copy.parent))[1]
        assert "serve" not in out
        assert project.init(str(copy.parent))[1] is not None
        assert not (copy / "serve").exists()


@pytest.mark.long
@pytest.mark.parametrize("kind", ["folder", "link", "pipe", "full"])
def test_file_that_cannot_be_written(here: Project, kind: str) -> None:
    path = here.folder / "serve"
    target = here.place / "precious"
    target.write_text("precious")
    match kind:
        case "folder":
            path.mkdir()
        case "link":
            path.symlink_to(target)
        case "pipe":
            os.mkfifo(path)
        case "full":
            if not os.path.exists("/dev/full") or os.geteuid() != 0:
                pytest.skip("only root may make a device that is always full")
            os.mknod(path, 0o600 | 0o020000, os.makedev(1, 7))
    with gateway(here) as running:
        assert get(f"{running.http}/healthz")[0] == 200
        assert named(here) == []
        assert running.end().startswith(f"{path} cannot be written: ")
    assert target.read_text() == "precious"


@pytest.mark.parametrize(
    ("text", "addresses"),
    [
        (b"http://127.0.0.1:1\ndns://[::1]:2\n", ADDRESSES),
        (b"", []),
        (b"http://evil.example:80\nhttp://127.0.0.1:1\n", ["http://127.0.0.1:1"]),
        (b"\x1b[31m\xff\nhttp://127.0.0.1:1\x1b[0m\nhttp://127.0.0.1:0\n" + b"x" * 100_000, []),
    ],
)
def test_only_addresses_of_this_machine_are_named(tmp_path: Path, text: bytes, addresses: Sequence[str]) -> None:
    file = AddressFile(project.init(str(tmp_path))[0])
    assert file.write(["http://127.0.0.1:9"]) == ""
    (tmp_path / ".regd" / "serve").write_bytes(text)
    assert read_addresses(str(tmp_path / ".regd")) == addresses
    file.close()
    assert read_addresses(str(tmp_path / ".regd")) == []


def test_a_reader_does_not_disturb_a_gateway_that_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fcntl

    folder, _ = project.init(str(tmp_path))
    path = Path(folder, "serve")
    path.touch()
    with path.open() as reading:
        fcntl.flock(reading, fcntl.LOCK_SH)
        original, calls = fcntl.flock, []

        def flock(file: int, operation: int) -> None:
            calls.append(operation)
            if len(calls) == 3:  # the reader has finished
                original(reading, fcntl.LOCK_UN)
            original(file, operation)

        monkeypatch.setattr(fcntl, "flock", flock)
        file = AddressFile(folder)
        assert file.write(ADDRESSES) == ""
    assert read_addresses(folder) == ADDRESSES
    file.close()


def test_git_ignores_the_file(here: Project) -> None:
    if shutil.which("git") is None:
        pytest.skip("no git on this machine")
    with gateway(here):
        subprocess.run(["git", "init", "-q"], cwd=here.place, env=here.environment(), check=True)
        status = subprocess.check_output(
            ["git", "status", "--porcelain", "--ignored"], cwd=here.place, env=here.environment(), text=True
        )
    assert (here.folder / ".gitignore").read_text() == "*\n"
    assert status == "!! .regd/\n"


# A daemon on demand.


def test_gateway_starts_the_daemon_of_its_project(here: Project) -> None:
    (here.place / "src").mkdir()
    with gateway(here, cwd=here.place / "src") as running:
        assert get(f"{running.http}/healthz") == (200, b"ok\n")  # the first request finds a daemon
        assert len(here.daemons()) == 1
        assert here.starts == 1
        assert running.end() == ""


@pytest.mark.long
def test_gateway_starts_a_killed_daemon_again(here: Project) -> None:
    here.prints("register", "web", "5061")
    with gateway(here) as running:
        [pid] = here.daemons()
        os.kill(pid, signal.SIGKILL)
        block_until(lambda: get(f"{running.http}/v1/resolve?name=web")[0] == 200, SLOW_S)
        assert pid not in here.daemons()
        block_until(lambda: ask(running.dns, "web.regd.internal", "A").answer)


def test_autostart_off_starts_nothing(here: Project) -> None:
    with gateway(here, REGD_AUTOSTART="0") as running:
        status, body = get(f"{running.http}/healthz")
        assert (status, b"no regd at" in body) == (503, True)
        assert not here.daemons()
        assert named(here) == running.addresses
        assert running.end() == ""


@pytest.mark.sample(2)
@pytest.mark.parametrize("kind", ["unix", "tcp"])
def test_autostart_for_another_address(tmp_path: Path, kind: str) -> None:
    demand = Demand(tmp_path, f"unix://{tmp_path}/s" if kind == "unix" else f"tcp://127.0.0.1:{free_port()}")
    try:
        with gateway(demand, "--http", "0", "--dns", "0", REGD_AUTOSTART="1") as running:
            assert get(f"{running.http}/healthz") == (200, b"ok\n")
            assert len(demand.daemons()) == 1
            assert running.end() == ""
    finally:
        demand.end()


@pytest.mark.long
def test_daemon_that_cannot_start_is_reported_once(here: Project) -> None:
    (here.folder / "registry.json").write_text("{")
    with gateway(here) as running:
        assert get(f"{running.http}/v1/list")[0] == 503
        (here.folder / "registry.json").write_text("{}")
        block_until(lambda: get(f"{running.http}/v1/list")[0] == 200, SLOW_S)
        errors = running.end()
    assert re.fullmatch(rf"regd at {re.escape(here.address)} cannot be started: .*registry\.json.*\n", errors)


@contextlib.contextmanager
def idle_daemon(here: Project) -> "Iterator[subprocess.Popen[str]]":
    """A daemon of a project that exits after a second without a connection."""
    with subprocess.Popen(
        [sys.executable, "-m", "regd", "--project", str(here.folder), "--idle-exit", "1"],
        env=here.environment(), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
    ) as process:  # fmt: skip
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == f"listening {here.address}\n"
            yield process
        finally:
            process.kill()


@pytest.mark.long
@pytest.mark.parametrize("flags", [(), ("--http", "off", "--dns", "0"), ("--http", "0", "--dns", "off")])
def test_daemon_on_demand_does_not_exit_while_the_gateway_runs(
    here: Project, tmp_path: Path, flags: tuple[str, ...]
) -> None:
    with project_registry(tmp_path, tmp_path / "other") as other, idle_daemon(here) as daemon:
        command = [sys.executable, "-m", "regd.cli.regctl", "serve", *flags]
        # Keeps the daemon running until the gateway is connected.
        connection = BlockingConnection(here.address, autostart=False)
        with subprocess.Popen(command, cwd=here.place, env=here.environment(), stdout=subprocess.PIPE) as running:
            try:
                assert running.stdout is not None
                assert running.stdout.readline()
                connection.close()
                with idle_daemon(other) as later:
                    assert later.wait(WAIT_S) == 0  # it exits without the gateway
                assert daemon.poll() is None
                with BlockingConnection(here.address, autostart=False) as connection:
                    assert connection.ask("stats")["watches"] == 1
                running.terminate()
                assert running.wait(WAIT_S) == 0
            finally:
                running.kill()
        assert daemon.wait(WAIT_S) == 0


def test_gateway_ends_at_once_while_its_daemon_does_not_start(here: Project) -> None:
    """Ctrl-C before the first line of output, while the gateway still waits for the daemon of its project."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(here.socket))
        listener.listen()  # accepts connections but sends nothing
        with subprocess.Popen(
            [sys.executable, "-m", "regd.cli.regctl", "serve"],
            cwd=here.place, env=environment(HOME=str(here.home)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        ) as process:  # fmt: skip
            try:
                peer, _ = listener.accept()
                with peer:
                    process.send_signal(signal.SIGINT)
                    assert process.communicate(timeout=WAIT_S) == ("", "")
                    assert process.returncode == 0
            finally:
                process.kill()
