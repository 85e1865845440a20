"""Programs that do not speak regd, for real: Prometheus, HAProxy, dig and curl beside a gateway."""

import contextlib
import json
import shutil
import socket
import subprocess
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from regd_client import blocking
from tests.gateways.test_serve import port_of, serving
from tests.support.daemon import ROOT, WAIT_S, DaemonProcess, environment
from tests.support.polling import block_until

PAGE = ROOT / "regd" / "gateways" / "README.md"
FOLLOW_S = 30.0  # for Prometheus and HAProxy to see a change on a busy machine


class Site:
    """A daemon and a gateway. `register` adds static registrations."""

    def __init__(self, client: blocking.Client, http: int, dns: int) -> None:
        self.client = client
        self.http = http
        self.dns = dns
        self.url = f"http://127.0.0.1:{http}"

    def register(self, name: str, port: int, **more: Any) -> None:
        self.client.register(name, port, static=True, **more)

    def dig(self, *arguments: str) -> str:
        return run("dig", "@127.0.0.1", "-p", str(self.dns), "+time=5", "+tries=1", *arguments)


@pytest.fixture
def site(process: DaemonProcess) -> Iterator[Site]:
    with serving("--http", "0", "--dns", "0", address=process.addresses[0]) as running:
        lines = running.lines(4)
        with blocking.Client(process.addresses[0]) as client:
            yield Site(client, port_of(lines[0]), port_of(lines[2]))


def need(tool: str) -> str:
    found = shutil.which(tool)
    if found is None:
        pytest.skip(f"no {tool} on this machine")
    return found


def run(tool: str, *arguments: str, input: str | None = None) -> str:
    done = subprocess.run(
        [need(tool), *arguments],
        input=input, env=environment(), capture_output=True, text=True, timeout=WAIT_S, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@contextlib.contextmanager
def program(tool: str, *arguments: str) -> Iterator[None]:
    """Run a server until the end of the block."""
    command = [need(tool), *arguments]
    with subprocess.Popen(
        command, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as running:
        try:
            yield
        finally:
            running.kill()


def block(language: str) -> str:
    """Return the first example in this language on the users' page."""
    return PAGE.read_text().partition(f"```{language}\n")[2].partition("```")[0]


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


# Prometheus.


@pytest.mark.parametrize("accept", ["text/plain", "application/openmetrics-text"])
def test_promtool_finds_nothing_in_the_metrics(site: Site, accept: str) -> None:
    site.register("db", 5432)
    text = run("curl", "-sS", "-H", f"Accept: {accept}", f"{site.url}/metrics")
    assert "regd_registrations 1.0\n" in text
    if accept == "text/plain":  # promtool reads no OpenMetrics
        assert run("promtool", "check", "metrics", input=text) == ""


def configuration(site: Site, folder: Path) -> str:
    path = folder / "prometheus.yml"
    page = block("yaml").replace("127.0.0.1:7380", f"127.0.0.1:{site.http}").replace("5s", "1s")
    path.write_text(f"global: {{scrape_interval: 1s}}\n{page}")
    return str(path)


def test_promtool_discovers_services(site: Site, tmp_path: Path) -> None:
    site.register(
        "shop.web", 5061, instance="2", meta={"metrics": "/stats", "scheme": "https", "zone-1": 'a"\\\n'}
    )
    site.register("db", 5432)
    output = run("promtool", "check", "service-discovery", "--timeout=3s", configuration(site, tmp_path), "regd")
    [target] = json.loads(output[output.index("[") :])
    assert {
        "__address__": "127.0.0.1:5061",
        "__metrics_path__": "/stats",
        "__scheme__": "https",
        "instance": "shop.web/2",
        "job": "shop.web",
    }.items() <= target["labels"].items()
    assert target["discoveredLabels"]["__meta_regd_meta_zone_1"] == 'a"\\\n'


@pytest.mark.long
def test_prometheus_scrapes_a_registered_service(site: Site, tmp_path: Path) -> None:
    port = free_port()
    site.register("gateway", site.http, meta={"metrics": "/metrics"})
    flags = (f"--storage.tsdb.path={tmp_path / 'data'}", f"--web.listen-address=127.0.0.1:{port}")
    query = urllib.parse.quote('regd_up{job="gateway",instance="gateway"}')

    def value() -> str:
        with contextlib.suppress(OSError):
            url = f"http://127.0.0.1:{port}/api/v1/query?query={query}"
            with urllib.request.urlopen(url, timeout=WAIT_S) as response:
                for series in json.load(response)["data"]["result"]:
                    return str(series["value"][1])
        return ""

    with program("prometheus", f"--config.file={configuration(site, tmp_path)}", *flags):
        block_until(lambda: value() == "1", FOLLOW_S)


# DNS.


def test_dig(site: Site) -> None:
    site.register("web", 5061, instance="1")
    site.register("web", 5062, instance="2", host="::1")
    block_until(lambda: site.dig("web.regd.internal", "AAAA", "+short"))
    assert site.dig("web.regd.internal", "A", "+short") == "127.0.0.1\n"
    assert site.dig("web.regd.internal", "AAAA", "+short", "+tcp") == "::1\n"
    expected = ["0 1 5061 7f000001-5061.addr.regd.internal.", f"0 1 5062 {'0' * 31}1-5062.addr.regd.internal."]
    for flags in ((), ("+tcp",), ("+noedns",), ("+bufsize=512",), ("+nocookie",), ("+dnssec",)):
        assert sorted(site.dig("_http._tcp.WEB.regd.internal", "SRV", "+short", *flags).splitlines()) == expected
    for arguments, status in [
        (("nobody.regd.internal", "A"), "NXDOMAIN"),
        (("web.regd.internal", "TXT"), "NOERROR"),
        (("example.com", "A"), "REFUSED"),
        (("web.regd.internal", "A", "-c", "CH"), "REFUSED"),
        (("regd.internal", "SOA", "+opcode=notify"), "NOTIMP"),
        (("web.regd.internal", "A", "+edns=1", "+noednsnegotiation"), "BADVERS"),
    ]:
        assert f"status: {status}" in site.dig(*arguments), arguments
    answer = site.dig("web.regd.internal", "SRV")
    assert "WARNING" not in answer.replace("WARNING: recursion requested but not available", "")
    assert "flags: qr aa rd;" in answer


# HAProxy.


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
def haproxy(site: Site, folder: Path, name_server: str) -> Iterator[HAProxy]:
    path, control = folder / "haproxy.cfg", folder / "control"
    page = (
        block("haproxy")
        .replace("127.0.0.1:7353", name_server)
        .replace("127.0.0.1:8080", f"127.0.0.1:{free_port()}")
    )
    timeouts = "".join(f"    timeout {side} 5s\n" for side in ("connect", "client", "server"))
    path.write_text(f"global\n    stats socket {control}\ndefaults\n    mode http\n{timeouts}{page}")
    with program("haproxy", "-db", "-f", str(path)):
        block_until(control.exists, FOLLOW_S)
        yield HAProxy(control)


@pytest.mark.parametrize(("count", "protocol"), [(2, ""), (40, "tcp@"), (200, ""), (200, "tcp@")])
def test_haproxy_follows_the_registry(site: Site, tmp_path: Path, count: int, protocol: str) -> None:
    need("haproxy")
    for number in range(count):
        site.register("worker", 20_000 + number, instance=str(number))
    with haproxy(site, tmp_path, f"{protocol}127.0.0.1:{site.dns}") as proxy:
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
