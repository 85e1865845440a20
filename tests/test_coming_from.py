"""COMING_FROM.md: regd's side of each part is run against a new daemon."""

import contextlib
import json
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from tests.support.daemon import ROOT, WAIT_S, DaemonProcess, environment
from tests.support.polling import block_until

PAGE = ROOT / "client" / "COMING_FROM.md"
PARTS = dict(re.findall(r"^## (.*?)\n(.*?)(?=^## |\Z)", PAGE.read_text(), re.DOTALL | re.MULTILINE))
TASKS = ("register", "wait", "find", "list", "watch", "health", "drain", "deregister", "in tests")
BACKGROUND = ("regctl run", "regctl watch")  # commands that run until they get a signal
OWN = ("regctl ", "curl ", "dig ")  # beginnings of commands that ask regd
COMMAND_S = 40.0  # most timeouts on the page are 30 s
COMMANDS = {
    "regctl": f'exec "{sys.executable}" -m regd.cli.regctl "$@"',
    "python3": f'exec "{sys.executable}" "$@"',
    "migrate": "exit 0",
}


def commands_of(part: str) -> list[str]:
    """Return regd's commands of the table, row after row."""
    rows = re.findall(r"^\| .* \| .* \| (.*) \|$", PARTS[part], re.MULTILINE)
    codes = [code for row in rows for code in re.findall(r"`([^`]+)`", row)]
    return [code for code in codes if "regctl " in code or code.startswith(OWN)]


class Shell:
    """Runs command lines in a folder with `regctl`, `python3` and `./migrate`, and ends what still runs."""

    def __init__(self, folder: Path, daemon: DaemonProcess) -> None:
        for name, script in COMMANDS.items():
            path = folder / name
            path.write_text(f"#!/bin/sh\n{script}\n")
            path.chmod(path.stat().st_mode | stat.S_IXUSR)
        self._folder = folder
        self._environment = environment(
            REGD_ADDRESS=daemon.addresses[0], PATH=f"{folder}{os.pathsep}{os.environ['PATH']}"
        )
        self._running: list[subprocess.Popen[str]] = []

    def begin(self, line: str) -> "subprocess.Popen[str]":
        process = subprocess.Popen(
            ["bash", "-c", line], cwd=self._folder, env=self._environment, text=True, start_new_session=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        self._running.append(process)
        return process

    def run(self, line: str) -> str:
        done = subprocess.run(
            ["bash", "-c", line], cwd=self._folder, env=self._environment, text=True,
            stdin=subprocess.DEVNULL, capture_output=True, timeout=COMMAND_S, check=False,
        )  # fmt: skip
        assert (done.returncode, done.stderr) == (0, ""), line
        return done.stdout

    def end(self) -> None:
        for process in self._running:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
            try:
                process.communicate(timeout=WAIT_S)
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)


@pytest.fixture
def shell(process: DaemonProcess, tmp_path: Path) -> Iterator[Shell]:
    (folder := tmp_path / "shell").mkdir()
    shell = Shell(folder, process)
    yield shell
    shell.end()


def has_records(shell: Shell, dig: str) -> bool:
    return re.search(r"\sIN\s+SRV\s+0 1 ", shell.run(dig)) is not None


@pytest.mark.sample(3)
@pytest.mark.parametrize("part", PARTS)
def test_table(part: str, shell: Shell) -> None:
    lines = commands_of(part)
    assert len(lines) >= 7
    ports: dict[str, str] = {}
    for line in lines:
        for default, port in ports.items():
            line = line.replace(default, port)
        if line == "regctl serve":
            output = shell.begin(f"{line} --http 0 --dns 0").stdout
            assert output is not None
            numbers = [output.readline().strip().rpartition(":")[2] for _ in range(4)]
            ports = {"7380": numbers[0], "7353": numbers[2]}
        elif shutil.which(line.split()[0]) is None and line.startswith(("curl ", "dig ")):
            continue  # not on this machine
        elif line.startswith("curl "):
            assert json.loads(shell.run(line.replace("curl ", "curl -sS ")))["instances"]
        elif line.startswith("dig "):
            block_until(partial(has_records, shell, line))  # DNS follows the registry by a watch
        elif line.startswith("regctl watch"):
            output = shell.begin(line).stdout
            assert output is not None
            assert output.readline().startswith("up\t"), line
        elif line.startswith(BACKGROUND):
            shell.begin(line)
        else:
            shell.run(line)
    names = {line.partition("\t")[0] for line in shell.run("regctl list").splitlines()}
    assert names
    assert not names & set(re.findall("regctl deregister ([a-z]+)", "\n".join(lines)))


@pytest.mark.parametrize("part", [part for part in PARTS if "```sh\n" in PARTS[part]])
def test_script(part: str, shell: Shell) -> None:
    [script] = re.findall(r"^```sh\n(.*?)^```", PARTS[part], re.MULTILINE | re.DOTALL)
    output = shell.begin(f"set -e\n{script}echo done\nwait").stdout
    assert output is not None
    text = ""
    while not text.endswith("done\n"):
        line = output.readline()
        assert line, f"the script ended: {text}"
        text += line
    [address] = re.findall("^db accepts connections at (.*)", text, re.MULTILINE)
    assert re.findall("^the database is at (.*)", text, re.MULTILINE) == [address]
    assert "\nweb accepts connections at " in text


@pytest.mark.parametrize("part", [part for part in PARTS if "```python\n" in PARTS[part]])
def test_program(part: str, process: DaemonProcess, tmp_path: Path) -> None:
    [program] = re.findall(r"^```python\n(.*?)^```", PARTS[part], re.MULTILINE | re.DOTALL)
    (path := tmp_path / "program.py").write_text(program)
    done = subprocess.run(
        [sys.executable, "-W", "error", str(path)], env=environment(REGD_ADDRESS=process.addresses[0]),
        capture_output=True, text=True, timeout=COMMAND_S, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, ""), program
    assert "127.0.0.1" in done.stdout


@pytest.mark.parametrize("part", ["Consul", "etcd", "Eureka"])
def test_every_table_has_the_same_tasks(part: str) -> None:
    rows = re.findall(r"^\| ([^|]*) \|", PARTS[part], re.MULTILINE)
    for task in TASKS:
        assert any(row.startswith(task) for row in rows), task


def test_every_part_says_what_differs_and_when_to_stay() -> None:
    assert list(PARTS) == ["Consul", "etcd", "Eureka", "docker compose", "wait-for-it"]
    for text in PARTS.values():
        assert "\nWhat is different:\n" in text
        assert "\nStay with " in text
        assert "the pytest fixture `regd`" in text


def test_links_lead_to_files() -> None:
    for link in re.findall(r"\]\(([^)#:]+)\)", PAGE.read_text()):
        assert (PAGE.parent / link).exists(), link
