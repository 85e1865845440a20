"""Who may read through the gateway of a daemon behind a Unix socket: real users, by HTTP and DNS."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from regd.gateways.readers import Readers
from tests.gateways.test_serve import port_of, serving
from tests.support.daemon import WAIT_S, DaemonProcess, environment
from tests.support.peers import STRANGER

AS_ANOTHER = """
import json, os, sys, http.client, dns.message, dns.query, dns.rcode
http_port, dns_port = map(int, sys.argv[1:3])
query = dns.message.make_query("web.regd.internal", "A")
os.setuid(int(sys.argv[3]))
answers = []
for host in ("127.0.0.1", "::1"):
    connection = http.client.HTTPConnection(host, http_port)
    connection.request("GET", "/v1/list", headers={"Host": "localhost"})
    answers.append(connection.getresponse().status)
    for ask in (dns.query.udp, dns.query.tcp):
        answers.append(dns.rcode.to_text(ask(query, host, port=dns_port, timeout=10).rcode()))
print(json.dumps(answers))
"""
pytestmark = [
    pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user"),
    pytest.mark.skipif(sys.platform != "linux", reason="asks Linux's kernel"),
]


def answers_to(uid: int, http_port: int, dns_port: int) -> list[int | str]:
    done = subprocess.run(
        [sys.executable, "-c", AS_ANOTHER, str(http_port), str(dns_port), str(uid)],
        env=environment(), stdout=subprocess.PIPE, timeout=2 * WAIT_S, check=True,
    )  # fmt: skip
    return list(json.loads(done.stdout))


@pytest.mark.parametrize("via", ["unix", "tcp"])
def test_real_users(via: str, tmp_path: Path) -> None:
    with DaemonProcess(tmp_path / "registry.json", "--unix", str(tmp_path / "s")) as daemon:
        daemon.start()
        address = f"unix://{tmp_path / 's'}" if via == "unix" else daemon.addresses[0]
        with serving("--http", "0", "--dns", "0", address=address) as running:
            lines = running.lines(4)
            ports = (port_of(lines[0]), port_of(lines[2]))
            passed, refused = [200, "NXDOMAIN", "NXDOMAIN"] * 2, [403, "REFUSED", "REFUSED"] * 2
            assert answers_to(os.geteuid(), *ports) == passed
            assert answers_to(STRANGER, *ports) == (refused if via == "unix" else passed)


def test_closed_connection_may_not_read() -> None:
    assert not Readers(restricted=True).may_read_by_tcp(None, ("127.0.0.1", 1))
    assert not Readers(restricted=True).may_read_by_tcp(("127.0.0.1", 2), ("127.0.0.1", 1))
    assert not Readers(restricted=True).may_read_by_udp(("127.0.0.1", 2), ("127.0.0.1", 1))
    assert Readers(restricted=False).may_read_by_tcp(None, None)
