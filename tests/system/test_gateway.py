"""The gateway under a real uvicorn: it forwards HTTP requests to the runner."""

import json
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator

import pytest

from regd_client import blocking
from tests.support.daemon import ROOT, WAIT_S, DaemonProcess, environment

BUSY_S = 30.0  # to start a server and its framework on a busy machine


@pytest.fixture
def gateway(process: DaemonProcess, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Yield the URL of the gateway's jobs."""
    monkeypatch.setenv("REGD_ADDRESS", process.addresses[0])
    command = [
        sys.executable,
        "-m",
        "uvicorn",
        "--app-dir",
        "services",
        "--port",
        "0",
        "--log-level",
        "warning",
        "gateway:app",
    ]
    with subprocess.Popen(command, cwd=ROOT, env=environment(REGD_ADDRESS=process.addresses[0])) as running:
        try:
            yield f"http://{blocking.resolve('gateway', wait=BUSY_S)}/jobs"
        finally:
            running.terminate()


def post(url: str, body: bytes) -> tuple[int, object]:
    try:
        with urllib.request.urlopen(url, body, WAIT_S) as reply:
            return reply.status, json.load(reply)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.load(error)


def runner(process: DaemonProcess) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "services/runner.py", "0"],
        cwd=ROOT, env=environment(REGD_ADDRESS=process.addresses[0]), stdout=subprocess.PIPE, text=True,
    )  # fmt: skip


def test_gateway_finds_the_runner(process: DaemonProcess, gateway: str) -> None:
    for numbers in ([1, 2, 3], [4, 5]):  # the second runner is another process on another port
        with runner(process) as running:
            assert post(gateway, json.dumps({"numbers": numbers}).encode()) == (200, {"sum": sum(numbers)})
            running.kill()


def test_gateway_refuses_invalid_jobs(gateway: str) -> None:
    assert post(gateway, b"no job") == (400, {"error": "the body is not JSON"})


@pytest.mark.long
def test_gateway_without_a_daemon_reports_it(process: DaemonProcess, gateway: str) -> None:
    process.end()
    status, answer = post(gateway, b"{}")
    assert status == 503
    assert "no answer from the runner: " in str(answer)
