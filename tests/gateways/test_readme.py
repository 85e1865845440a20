"""The users' page of `regctl serve`: each of its commands is run, and must print what the page shows."""

import contextlib
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from regd_client import blocking
from tests.gateways.test_serve import port_of, serving
from tests.support.daemon import ROOT, WAIT_S, DaemonProcess, environment
from tests.support.documents import blocks, fits
from tests.support.projects import project_registry

PAGE = ROOT / "regd" / "gateways" / "README.md"
PATH = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
# Tested elsewhere: the installation (tests/system/test_tutorial.py), the gateway itself, the reader's own program
# under `regctl run`, and the proxies (tests with the real programs).
ELSEWHERE = ("pip install ", "regctl serve", "regctl run ", "haproxy ")


def section(title: str) -> str:
    return PAGE.read_text().partition(f"\n## {title}\n")[2].partition("\n## ")[0]


def sessions(text: str) -> list[tuple[str, list[str]]]:
    """Return the commands of the console blocks with the lines that they print."""
    console = "".join(re.findall(r"^```console\n(.*?)^```", text, re.MULTILINE | re.DOTALL))
    entries = re.split(r"^\$ ", console, flags=re.MULTILINE)[1:]
    return [(entry.partition("\n")[0], entry.partition("\n")[2].splitlines()) for entry in entries]


def need_tools_of(command: str) -> None:
    for tool in ("curl", "dig", "awk"):
        if re.search(rf"\b{tool}\b", command) and shutil.which(tool) is None:
            pytest.skip(f"no {tool} on this machine")


def bash(command: str, **variables: str) -> str:
    need_tools_of(command)
    cwd = variables.pop("cwd", None)
    return subprocess.run(
        ["bash", "-c", command], cwd=cwd, env=environment(PATH=PATH, **variables), stdout=subprocess.PIPE, text=True, timeout=WAIT_S, check=True,
    ).stdout  # fmt: skip


def prints(output: str, expected: list[str]) -> bool:
    """Return whether the output matches the expected lines. A last line `…` matches any number of lines."""
    lines = output.splitlines()
    if expected[-1:] == ["…"]:
        expected, lines = expected[:-1], lines[: len(expected) - 1]
    return len(lines) == len(expected) and all(map(fits, expected, lines))


@pytest.fixture
def gateway(process: DaemonProcess) -> Iterator[dict[str, str]]:
    """The default ports and the ports of a running gateway."""
    with serving("--http", "0", "--dns", "0", address=process.addresses[0]) as running:
        lines = running.lines(4)
        yield {"7380": str(port_of(lines[0])), "7353": str(port_of(lines[2]))}


def with_ports(text: str, ports: dict[str, str]) -> str:
    for default, port in ports.items():
        text = text.replace(default, port)
    return text


def test_sessions(process: DaemonProcess, gateway: dict[str, str]) -> None:
    found = sessions(section("Look")) + sessions(section("curl"))
    assert len(found) >= 4
    for command, expected in found:
        output = bash(with_ports(command, gateway), REGD_ADDRESS=process.addresses[0])
        assert prints(output, expected), f"{command}: {output}"


def test_sessions_in_a_project(tmp_path: Path) -> None:
    found = sessions(section("In a project"))
    assert len(found) >= 2
    with project_registry(tmp_path, tmp_path / "shop") as here, subprocess.Popen(
        [sys.executable, "-m", "regd.cli.regctl", "serve"],
        cwd=here.place, env=here.environment(), stdout=subprocess.PIPE,
    ) as process:  # fmt: skip
        try:
            assert process.stdout is not None
            assert process.stdout.readline()
            for command, expected in found:
                output = bash(command, cwd=str(here.place), HOME=str(here.home))
                assert prints(output, expected), f"{command}: {output}"
        finally:
            process.kill()


def command_lines() -> list[str]:
    lines = [line.partition("   #")[0].strip() for text in blocks(PAGE, "sh") for line in text.splitlines()]
    return [line for line in lines if not line.startswith(ELSEWHERE)]


@pytest.mark.sample(3)
@pytest.mark.parametrize("line", command_lines())
def test_command_lines(line: str, process: DaemonProcess, gateway: dict[str, str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, blocking.Client(process.addresses[0]) as client:
        for name in ("db", "web", "work-1"):
            client.register(name, server.getsockname()[1], meta={"zone": "a"}, static=True)
        line = with_ports(line, gateway).replace("curl ", "curl -sS --fail ")
        if "-N" in line.split():  # this command does not end
            assert reads_first_line(line)
            return
        output = bash(line)
        assert str(server.getsockname()[1]) in output or output == "ok\n" or "127.0.0.1" in output, output


def reads_first_line(line: str) -> bytes:
    need_tools_of(line)
    with subprocess.Popen(["bash", "-c", f"exec {line}"], env=environment(), stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            return process.stdout.readline()
        finally:
            process.kill()


def test_lines_of_the_start(process: DaemonProcess) -> None:
    with contextlib.ExitStack() as stack:
        running = stack.enter_context(serving("--http", "0", "--dns", "0", address=process.addresses[0]))
        lines = running.lines(4)
    ports = {str(port_of(lines[0])): "7380", str(port_of(lines[2])): "7353"}
    assert [with_ports(line, ports) for line in lines] == blocks(PAGE, "text")[0].splitlines()
