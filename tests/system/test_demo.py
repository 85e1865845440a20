"""`make run` in a fresh checkout prints what the README shows and leaves no process behind."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

from tests.support.daemon import ROOT
from tests.support.ports import free_port


def end(process: "subprocess.Popen[str]") -> None:
    """End `make run` if the test has failed. It ends its three programs, which are in sessions of their own."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGTERM)
    with process:  # waits, and closes the pipe
        pass


BARE = str(Path(sys.base_prefix) / "bin" / "python3")  # most likely without any package


@pytest.mark.sample(2)
@pytest.mark.parametrize(("number", "python"), [(signal.SIGINT, BARE), (signal.SIGTERM, sys.executable)])
def test_make_run(tmp_path: Path, number: signal.Signals, python: str, request: pytest.FixtureRequest) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", 5050))
        except OSError:
            pytest.skip("port 5050, which the runner wants, is taken on this machine")
    for name in ("regd", "client", "services", "Makefile"):
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, tmp_path / name, ignore=shutil.ignore_patterns("registry", "__pycache__"))
        else:
            shutil.copy(source, tmp_path / name)
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": str(tmp_path),
        "PORT": str(free_port()),
        "PYTHONUNBUFFERED": "1",
        "PYTHON": python,
    }
    process = subprocess.Popen(
        ["make", "-s", "run"],
        cwd=tmp_path,
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    request.addfinalizer(lambda: end(process))
    assert process.stdout is not None
    output = ""

    def read_until(text: str) -> None:
        nonlocal output
        while text not in output:
            line = process.stdout.readline()  # type: ignore[union-attr]
            assert line, f"make run has ended: {output}"
            output += line

    read_until("Ctrl-C ends")
    urls = re.findall(r"^  (http://127\.0\.0\.1:\d+)/   # the registry, in a browser\n", output, re.MULTILINE)
    extra = [python, "-c", "import dns, prometheus_client, starlette, uvicorn"]
    has_extra = subprocess.run(extra, stderr=subprocess.DEVNULL, check=False).returncode == 0
    assert len(urls) == has_extra
    for url in urls:
        with urllib.request.urlopen(f"{url}/v1/resolve?name=runner", timeout=30) as response:
            assert json.load(response)["port"] == 5050
    # As the output suggests: kill the runner and start it on another port. The caller sees both at once.
    os.kill(int(output.partition("kill -9 ")[2].split()[0]), signal.SIGKILL)
    read_until("runner at 127.0.0.1:5050 is down")
    port = str(free_port())
    with subprocess.Popen(
        [sys.executable, "services/runner.py", port],
        cwd=tmp_path,
        env=environment | {"PYTHONPATH": "client", "REGD_ADDRESS": f"127.0.0.1:{environment['PORT']}"},
        stdout=subprocess.DEVNULL,
    ) as runner:
        read_until(f"runner at 127.0.0.1:{port} is up")
        read_until(f"found runner at 127.0.0.1:{port}")
        runner.terminate()
    os.killpg(process.pid, number)
    output += process.communicate(timeout=30)[0]
    for words in (
        "listening tcp://127.0.0.1:",
        "runner: registered",
        '"runner": {"port": 5050, "hold": true, "pid": ',
        "found runner at 127.0.0.1:5050",
        '{"sum": 1}',
        "nc 127.0.0.1",
    ):
        assert words in output
    for url in urls:
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])))
    assert ("7380" in output, output.count("http://")) == (False, len(urls))
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", 5050))
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", int(environment["PORT"])))
    assert "runner" not in (tmp_path / "services/registry/registry.json").read_text()
