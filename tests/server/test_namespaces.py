"""Clients on a Unix socket from another network or pid namespace, and what they may register."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from regd.system import namespaces
from tests.support.daemon import DaemonProcess, environment

pytestmark = [
    pytest.mark.socket,
    pytest.mark.skipif(sys.platform != "linux", reason="namespaces are Linux's"),
]
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can make namespaces")

ASKING = """
import json, os, socket, sys
with socket.socket(socket.AF_UNIX) as peer:
    peer.connect(sys.argv[1])
    for request in json.loads(sys.argv[2]):
        if request.get("pid") == "own":
            request["pid"] = os.getpid()
        peer.sendall(json.dumps(request).encode() + bytes([10]))
    peer.shutdown(socket.SHUT_WR)
    print(peer.makefile().read(), end="")
"""


def ask_from(flags: list[str], path: Path, *requests: dict[str, Any]) -> list[dict[str, Any]]:
    """Send a request over a Unix socket from new namespaces (unshare(1))."""
    try:
        done = subprocess.run(
            ["unshare", *flags, sys.executable, "-c", ASKING, str(path), json.dumps(requests)],
            env=environment(),
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )
    except FileNotFoundError:
        pytest.skip("no unshare(1) here")
    if "unshare" in done.stderr:
        pytest.skip(f"no such namespace here: {done.stderr.strip()}")
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def reports_network() -> bool:
    """True if the kernel reports a socket's network namespace (Linux 5.14)."""
    with socket.socket(socket.AF_UNIX) as each:
        try:
            each.getsockopt(socket.SOL_SOCKET, namespaces._SO_NETNS_COOKIE, 8)
        except OSError:
            return False
    return True


@needs_root
def test_loopback_of_another_network_namespace_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "s"
    if not reports_network():
        pytest.skip("this kernel does not tell a socket's network namespace")
    wishes = [
        {"cmd": "register", "name": f"n{n}", "port": 1, "hold": True, "host": host}
        for n, host in enumerate(("127.0.0.1", "::1", "localhost", "127.9.9.9", "192.0.2.1"))
    ]
    del wishes[0]["host"]  # the default
    with DaemonProcess(tmp_path / "registry.json", "--unix", str(path)) as daemon:
        daemon.start()
        replies = ask_from(["-n"], path, *wishes)
        assert [reply.get("error") for reply in replies] == [*["bad_argument"] * 4, None]
        assert {reply.get("field") for reply in replies[:4]} == {"host"}
        assert all(reply["ok"] for reply in ask_from(["-m"], path, *wishes))


@needs_root
def test_process_of_another_pid_namespace_is_unsupported(tmp_path: Path) -> None:
    path = tmp_path / "s"
    wish = {"cmd": "register", "name": "a", "port": 1, "hold": True, "pid": "own"}
    with DaemonProcess(tmp_path / "registry.json", "--unix", str(path)) as daemon:
        daemon.start()
        assert [reply.get("error") for reply in ask_from(["-p", "-f"], path, wish)] == ["unsupported"]
        assert [reply.get("error") for reply in ask_from(["-m"], path, wish)] == [None]


def denied(path: object) -> str:
    raise PermissionError(13, os.strerror(13))


def test_unknown_namespace_counts_as_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(namespaces, "_SO_NETNS_COOKIE", 9_999)
    monkeypatch.setattr(os, "readlink", denied)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        assert namespaces.elsewhere(ours) == namespaces.HERE
