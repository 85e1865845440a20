"""What `regctl bridge --status` and `regctl doctor` print in each state of the bridge."""

import copy
import socketserver
import subprocess
import sys
import threading
from typing import Any
from unittest.mock import Mock

import pytest

from regd.cli import bridge as command
from regd.cli import doctor
from tests.support.daemon import WAIT_S, DaemonProcess, environment

STATUS: dict[str, Any] = {
    "machine": "a",
    "prefix": "/regd/v1/default/",
    "advertise": None,
    "etcd": {
        "connected": True, "member": "h:1", "silent_s": 0.1, "failure": "", "lease": "1f", "lease_remaining_s": 9.0, "refuses": [],
    },
    "daemon": {"connected": True, "address": "tcp://127.0.0.1:7343", "rev": 7, "stale_s": 0.0},
    "published": 2,
    "not_published_count": 0,
    "not_published": [],
    "peers_count": 1,
    "peers": [{"machine": "b", "host": "b.example\x1b", "instances": 3}],
    "foreign": {"count": 3, "stale_s": 0.0, "refused": 0, "shadowed": 0, "ignored": 0},
    "lag": {"publish_s": 0.004, "register_s": 0.003},
    "counts": {"differences": 0},
}  # fmt: skip
UNPUBLISHED = [{"name": f"s{number}", "instance": "", "why": "it is private"} for number in range(30)]
STATES: list[tuple[dict[str, Any], str, str | None]] = [  # what is different, a line of the status, what is wrong
    ({}, "etcd at h:1, lease 1f, 9 s left", None),
    ({"etcd": {"connected": False, "silent_s": 17.2}}, "etcd has not answered for 17 s", "has not answered for 17 s"),
    ({"etcd": {"connected": False, "silent_s": 9.0, "failure": "no"}}, "etcd has not answered for 9 s: no", "for 9 s: no"),
    ({"etcd": {"connected": False, "refuses": ["to read: no"]}}, "etcd refuses to read: no", "etcd refuses to read: no"),
    ({"etcd": {"refuses": ["to write: no"]}}, "etcd refuses to write: no", "etcd refuses to write: no"),
    ({"counts": {"differences": 2}}, "differences repaired 2", "it found 2 differences"),
    ({"daemon": {"connected": False, "stale_s": 3.0}}, "the daemon at tcp://127.0.0.1:7343 has been away for 3 s", None),
    ({"foreign": {"stale_s": 20.0}}, "from other machines 3, as of 20 s ago", None),
    ({"foreign": {"shadowed": 1}}, "  1 with the name of a local instance, which wins", None),
    ({"not_published_count": 30, "not_published": UNPUBLISHED}, "  and 10 more: see `regctl bridge --status --json`", None),
]  # fmt: skip


@pytest.mark.parametrize(("change", "line", "wrong"), STATES, ids=[line.strip() for _, line, _ in STATES])
def test_states(change: dict[str, Any], line: str, wrong: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    status = copy.deepcopy(STATUS)
    for name, value in change.items():
        status[name] = status[name] | value if isinstance(value, dict) else value
    lines = list(command._lines(status))
    assert line in lines
    assert ("etcd has not answered" in "".join(lines)) == ("etcd has not answered" in line)
    assert lines[-1].split("\t") == ["b", "b.example\\x1b", "3"]
    monkeypatch.setattr(command, "fetch_status", lambda connection: status)
    [finding] = doctor._bridge(Mock(is_here=True, is_in_another_network=False))
    if wrong is None:
        assert (finding.do, finding.found[:36]) == ("", "machine a: 2 published, 3 from 1 oth")
    else:
        assert finding.do
        assert wrong in finding.found


class Silent(socketserver.BaseRequestHandler):
    """Closes each connection."""


def test_a_bridge_that_does_not_answer(process: DaemonProcess) -> None:
    with socketserver.TCPServer(("127.0.0.1", 0), Silent) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            regctl(process, "register", "regd.bridge", str(server.server_address[1]))
            shown = regctl(process, "bridge", "--status")
            examined = regctl(process, "doctor")
        finally:
            server.shutdown()
            thread.join()
    assert (shown.returncode, shown.stdout) == (3, "")
    assert "does not tell its status" in shown.stderr
    assert "wrong  bridge" in examined.stdout


def regctl(process: DaemonProcess, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "regd.cli.regctl", *words], env=environment(REGD_ADDRESS=process.addresses[0]),
        capture_output=True, text=True, timeout=WAIT_S, check=False,
    )  # fmt: skip
