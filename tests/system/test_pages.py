"""Run the examples of `client/SERVERS.md` and of `regctl run`: each must register and answer HTTP requests."""

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from regd_client.blocking import BlockingConnection
from tests.support.daemon import ROOT, WAIT_S, DaemonProcess, environment

SERVERS = ROOT / "client" / "SERVERS.md"
REGCTL = ROOT / "regd" / "cli" / "README.md"
START_S = 30.0  # to start a server and its framework on a busy machine
PATH = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])

Program = tuple[str, dict[str, str], str]  # the section's title, files by name, the command


def programs(page: Path) -> Iterator[Program]:
    """Yield each command of a page with the files above it in its section."""
    for section in page.read_text().split("\n## ")[1:]:
        title, files = section.partition("\n")[0], {}
        for kind, text in re.findall(r"^```(python|sh)\n(.*?)^```", section, re.MULTILINE | re.DOTALL):
            if kind == "python":
                name = text.partition("\n")[0].removeprefix("# ")
                files[name] = text
            else:
                yield title, dict(files), text.strip()


PROGRAMS = list(programs(SERVERS))
APPLICATION = PROGRAMS[0][1]
COMMANDS = [(title, APPLICATION, command) for title, _, command in programs(REGCTL) if "regctl run" in command]
assert len(COMMANDS) == 5


@contextlib.contextmanager
def running(command: str, folder: Path, daemon: DaemonProcess) -> "Iterator[subprocess.Popen[bytes]]":
    with subprocess.Popen(
        ["bash", "-c", f"exec {command}"],
        cwd=folder,
        env=environment(REGD_ADDRESS=daemon.addresses[0], PATH=PATH, PYTHONWARNINGS="ignore"),
        start_new_session=True,
    ) as process:
        try:
            yield process
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


@pytest.mark.sample(8)
@pytest.mark.parametrize(
    ("title", "files", "command"),
    PROGRAMS + COMMANDS,
    ids=[command.partition("\n")[0] for _, _, command in PROGRAMS + COMMANDS],
)
def test_service_page_example_runs(
    title: str, files: dict[str, str], command: str, process: DaemonProcess, tmp_path: Path
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    for name, text in files.items():
        (tmp_path / name).write_text(text.replace("8000", port))
    command = command.replace("8000", port)
    with (
        BlockingConnection(process.addresses[0], START_S) as peer,
        running(command, tmp_path, process) as server,
    ):
        instance = peer.ask("resolve", name="shop", wait=START_S)
        assert instance["ok"], instance
        with socket.create_connection((instance["host"], instance["port"]), START_S) as sock:
            sock.sendall(b"GET / HTTP/1.1\r\nHost: there\r\nConnection: close\r\n\r\n")
            with sock.makefile("rb") as reply:
                assert b" 200 " in reply.readline(), title
        server.terminate()
        server.wait(2 * START_S)  # gunicorn kills after 30 s a worker that missed the signal while it started
        deadline = time.monotonic() + WAIT_S
        while peer.ask("list")["instances"]:  # a killed server is removed a moment later
            assert time.monotonic() < deadline
