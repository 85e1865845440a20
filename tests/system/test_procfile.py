"""Run the Procfile of `services/PROCFILES.md` with honcho: names, ports, order, output and the end."""

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from regd_client.blocking import BlockingConnection
from tests.support.daemon import ROOT, WAIT_S, DaemonProcess, environment
from tests.support.demand import Demand
from tests.support.documents import blocks, fits
from tests.support.polling import block_until

PAGE = ROOT / "services" / "PROCFILES.md"
BIN = Path(sys.executable).parent
START_S = 60.0  # for a dozen Python programs at once, on a busy machine
END_S = 30.0  # for all services, on a busy machine; it takes half a second on an idle one
# honcho, except that it kills after a minute what has not ended. Its 5 s may be too short on a busy machine.
HONCHO = f"""#!{sys.executable}
import honcho.command, honcho.manager
honcho.manager.KILL_WAIT = 60
honcho.command.main()
"""

pytestmark = pytest.mark.skipif(
    not (BIN / "honcho").exists(), reason="honcho is not installed; it is in the group `dev`"
)

SLOW_END = """
import os, signal, socket, time
received = []
signal.signal(signal.SIGTERM, lambda *_: received.append(1))
listening = socket.create_server(("127.0.0.1", int(os.environ["PORT"])))
while not received:
    time.sleep(0.01)
time.sleep(1)
print(len(received), "SIGTERM", flush=True)
"""


class Honcho:
    """`honcho start` in a folder, as the leader of a process group."""

    def __init__(self, process: "subprocess.Popen[bytes]", output: Path) -> None:
        self.process = process
        self._output = output

    def lines(self) -> list[tuple[str, str]]:
        """Return the output so far: the name of each line's process, and its text."""
        return re.findall(r"^[0-9:]+ (\S+) +\| (.*)$", self._output.read_text(), re.MULTILINE)

    def pid(self, name: str) -> int:
        """Return the process id of the shell of a line, which is its process group too."""
        [started] = re.findall(rf"\| {re.escape(name)} started \(pid=(\d+)\)", self._output.read_text())
        return int(started)

    def kill_groups(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        for group in re.findall(r"started \(pid=(\d+)\)", self._output.read_text()):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(int(group), signal.SIGKILL)

    def survivors(self) -> list[str]:
        """Return the command lines of the processes that are left in the groups."""
        groups = set(map(int, re.findall(r"started \(pid=(\d+)\)", self._output.read_text())))
        left = []
        for path in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if os.getpgid(int(path.name)) in groups and (text := (path / "cmdline").read_text()):
                    left.append(text)
        return left


@contextlib.contextmanager
def honcho(folder: Path, procfile: str, *arguments: str, **variables: str) -> Iterator[Honcho]:
    (folder / "Procfile").write_text(procfile)
    [service] = blocks(PAGE, "python")
    (folder / "service.py").write_text(service)
    program = folder / "bin" / "honcho"  # regctl knows it by its name
    program.parent.mkdir(exist_ok=True)
    program.write_text(HONCHO)
    program.chmod(0o700)
    path = os.pathsep.join([str(BIN), os.environ["PATH"]])
    with (
        (folder / "output").open("w") as output,
        subprocess.Popen(
            [str(program), "start", *arguments], cwd=folder, env=environment(PATH=path) | variables,
            stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
        ) as process,
    ):  # fmt: skip
        running = Honcho(process, folder / "output")
        try:
            yield running
        finally:
            running.kill_groups()


def procfile() -> str:
    [text] = blocks(PAGE, "procfile")
    return text


def command() -> list[str]:
    """Return the arguments of the page's `honcho start`."""
    [line] = [text for text in blocks(PAGE, "sh") if text.startswith("honcho start")]
    return line.split()[2:]


@pytest.fixture
def peer(process: DaemonProcess) -> Iterator[BlockingConnection]:
    with BlockingConnection(process.addresses[0]) as connection:
        yield connection


def instances(peer: BlockingConnection) -> list[dict[str, Any]]:
    listed: list[dict[str, Any]] = peer.ask("list")["instances"]
    return listed


def ports_by_name(peer: BlockingConnection) -> set[tuple[str, int]]:
    return {(instance["name"], instance["port"]) for instance in instances(peer)}


def are_ready(peer: BlockingConnection, count: int) -> bool:
    return [instance["state"] for instance in instances(peer)] == ["ready"] * count


ALL = [("pages", ""), ("price", ""), ("shop", "1"), ("shop", "2")]


def printed(manager: Honcho, name: str) -> list[str]:
    """Return what one of honcho's processes has printed so far, without the lines of Python's web server."""
    servers = ("127.0.0.1 - - ", "Serving HTTP")
    return [text for process, text in manager.lines() if process == name and not text.startswith(servers)]


def test_page_runs_under_honcho(process: DaemonProcess, peer: BlockingConnection, tmp_path: Path) -> None:
    with honcho(tmp_path, procfile(), *command(), REGD_ADDRESS=process.addresses[0]) as manager:
        block_until(lambda: are_ready(peer, 4), START_S)
        before = instances(peer)
        assert [(each["name"], each["instance"]) for each in before] == ALL
        ports = ports_by_name(peer)
        assert len({port for _, port in ports}) == 4
        assert not any(5_000 <= port < 5_400 for _, port in ports), "honcho's PORT was taken for the user's"

        # Order: the shops began once price accepted connections.
        [price] = [each["port"] for each in before if each["name"] == "price"]
        first = {(name, f"price is at 127.0.0.1:{price}") for name in ("shop.1", "shop.2")}
        block_until(lambda: first <= set(manager.lines()), WAIT_S)

        # Output: the page's lines and no others. The lines of one process are in the page's order.
        [shown] = blocks(PAGE, "text")
        expected = {
            name: [line.partition("| ")[2] for line in shown.splitlines() if f" {name} " in line]
            for name in ("price.1", "shop.1", "shop.2", "pages.1")
        }
        counts = {name: len(texts) for name, texts in expected.items()}
        block_until(lambda: all(len(printed(manager, name)) >= counts[name] for name in counts), WAIT_S)
        for name, texts in expected.items():
            assert len(printed(manager, name)) == counts[name], printed(manager, name)
            assert all(map(fits, texts, printed(manager, name))), printed(manager, name)

        os.killpg(manager.process.pid, signal.SIGINT)
        assert manager.process.wait(END_S) == 130
        assert manager.survivors() == []
        block_until(lambda: instances(peer) == [])
        assert not [text for _, text in manager.lines() if "Traceback" in text or "sending SIGKILL" in text]

    # The ports stay. Copies that start together may get each other's numbers.
    with honcho(tmp_path, procfile(), *command(), REGD_ADDRESS=process.addresses[0]):
        block_until(lambda: are_ready(peer, 4), START_S)
        assert ports_by_name(peer) == ports


@pytest.mark.sample(3)
@pytest.mark.parametrize(("end", "status"), [("exec false", 1), ("exit 7", 7), ("kill -9 $$", 137)])
def test_one_service_that_ends_ends_all(
    end: str, status: int, process: DaemonProcess, peer: BlockingConnection, tmp_path: Path
) -> None:
    lines = f"{procfile()}fails: regctl run fails --wait shop pages -- sh -c '{end}'\n"
    with honcho(tmp_path, lines, REGD_ADDRESS=process.addresses[0]) as manager:
        assert manager.process.wait(START_S) == status
        assert manager.survivors() == []
        block_until(lambda: instances(peer) == [])
        assert ("system", f"fails.1 stopped (rc={status})") in manager.lines()
        assert not [text for _, text in manager.lines() if "Traceback" in text or "sending SIGKILL" in text]


@pytest.mark.long
def test_command_receives_the_signal_of_honcho_once(
    process: DaemonProcess, peer: BlockingConnection, tmp_path: Path
) -> None:
    """honcho sends it to the process group; a second one would interrupt the command's cleanup."""
    (tmp_path / "slow_end.py").write_text(SLOW_END)
    lines = "price: regctl run price -- python3 slow_end.py\n"
    with honcho(tmp_path, lines, REGD_ADDRESS=process.addresses[0]) as manager:
        block_until(lambda: are_ready(peer, 1), START_S)
        manager.process.terminate()
        block_until(lambda: instances(peer) == [])
        assert manager.process.wait(WAIT_S) == 143
        assert [
            text for name, text in manager.lines() if name == "price.1" and not text.startswith("regctl")
        ] == ["1 SIGTERM"]


def test_sigterm_ends_services_that_still_wait(process: DaemonProcess, tmp_path: Path) -> None:
    lines = "shop: regctl run shop --wait price -- python3 service.py\n"
    with honcho(tmp_path, lines, REGD_ADDRESS=process.addresses[0]) as manager:
        with BlockingConnection(process.addresses[0]) as peer:
            block_until(lambda: peer.ask("stats")["waiting"] == 1, START_S)
        manager.process.terminate()
        assert manager.process.wait(END_S) == 143
        assert manager.survivors() == []
        assert [text for name, text in manager.lines() if name == "shop.1"] == []


def test_service_that_is_missing_ends_all(process: DaemonProcess, tmp_path: Path) -> None:
    lines = "shop: regctl run shop --timeout 0.2 --wait price -- python3 service.py\n"
    with honcho(tmp_path, lines, REGD_ADDRESS=process.addresses[0]) as manager:
        assert manager.process.wait(START_S) == 1
        [line] = [text for name, text in manager.lines() if name == "shop.1"]
        assert line.startswith("regctl: price: ")


def test_port_of_honcho_can_be_named(process: DaemonProcess, peer: BlockingConnection, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    lines = "price: regctl run price --port $PORT -- python3 service.py\n"
    with honcho(tmp_path, lines, "-p", str(port), REGD_ADDRESS=process.addresses[0]):
        block_until(lambda: [each["port"] for each in instances(peer)] == [port], START_S)


def test_daemon_on_demand_stays_when_honcho_ends(tmp_path: Path) -> None:
    demand = Demand(tmp_path, f"unix://{tmp_path}/regd.sock")
    try:
        (tmp_path / ".env").write_text("REGD_AUTOSTART=1\n")
        variables = {key: value for key, value in demand.environment().items() if key != "REGD_AUTOSTART"}
        with honcho(
            tmp_path, procfile(), **variables | {"PATH": f"{BIN}{os.pathsep}{variables['PATH']}"}
        ) as manager:
            block_until(lambda: ("pages.1", "regctl: pages is ready") in manager.lines(), START_S)
            block_until(lambda: any(text.startswith("regctl: shop is") for _, text in manager.lines()), START_S)
            os.killpg(manager.process.pid, signal.SIGINT)
            assert manager.process.wait(END_S) == 130
            assert len(demand.daemons()) == 1
            assert demand.regctl("list")[:2] == (0, "")
            assert not [text for _, text in manager.lines() if "Traceback" in text]
    finally:
        demand.end()
