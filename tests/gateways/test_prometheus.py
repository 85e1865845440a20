"""Prometheus and promtool, with the configuration of the users' page."""

import json
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from tests.gateways.consumers import FOLLOW_S, Site, block, find_tool, program, run, services
from tests.gateways.test_serve import get
from tests.support.daemon import WAIT_S, DaemonProcess
from tests.support.polling import block_until
from tests.support.ports import free_port


def configuration(site: Site, folder: Path) -> str:
    path = folder / "prometheus.yml"
    page = block("yaml").replace("127.0.0.1:7380", f"127.0.0.1:{site.http}").replace("5s", "1s")
    path.write_text(f"global: {{scrape_interval: 1s}}\n{page}")
    return str(path)


def test_promtool_finds_nothing_in_the_metrics(site: Site, process: DaemonProcess) -> None:
    site.register("db", 5432)
    get(f"{site.url}/v1/resolve?name=nobody")  # so that `regd_errors_total` has a value
    status, text = get(f"{site.url}/metrics")
    assert status == 200
    assert b'regd_errors_total{code="not_found"} 1.0\n' in text
    assert run("promtool", "check", "metrics", input=text.decode()) == ""
    process.end()
    status, text = get(f"{site.url}/metrics")
    assert status == 200
    assert b"regd_up 0.0\n" in text
    assert run("promtool", "check", "metrics", input=text.decode()) == ""


@pytest.mark.long
def test_promtool_discovers_services(site: Site, tmp_path: Path) -> None:
    site.register(
        "shop.web", 5061, instance="2", meta={"metrics": "/stats", "scheme": "https", "zone-1": 'a"\\\n'}
    )
    site.register("six", 5062, host="::1", state="draining", meta={"metrics": ""})
    site.register("db", 5432)
    path = configuration(site, tmp_path)
    output = run("promtool", "check", "service-discovery", "--timeout=3s", path, "regd")
    # promtool may log below the result that its time ended during another request.
    targets, _ = json.JSONDecoder().raw_decode(output, output.index("["))
    shop, six = sorted(targets, key=lambda target: target["labels"]["instance"])
    assert {
        "__address__": "127.0.0.1:5061",
        "__metrics_path__": "/stats",
        "__scheme__": "https",
        "instance": "shop.web/2",
        "job": "shop.web",
    }.items() <= shop["labels"].items()
    assert shop["discoveredLabels"]["__meta_regd_meta_zone_1"] == 'a"\\\n'
    assert (six["labels"]["__address__"], six["labels"]["__metrics_path__"]) == ("[::1]:5062", "/metrics")
    assert six["discoveredLabels"]["__meta_regd_state"] == "draining"


class Prometheus:
    def __init__(self, port: int) -> None:
        self._url = f"http://127.0.0.1:{port}/api/v1"

    def _get(self, path: str) -> Any:
        try:
            with urllib.request.urlopen(f"{self._url}/{path}", timeout=WAIT_S) as response:
                return json.load(response)["data"]
        except urllib.error.HTTPError as error:
            error.close()
        except OSError:  # Prometheus does not listen yet
            pass
        return None

    def value(self, query: str) -> str:
        """Return the value of the only series in the result of a query; "" if there is none."""
        data = self._get(f"query?query={urllib.parse.quote(query)}")
        series = data["result"] if data else []
        return str(series[0]["value"][1]) if len(series) == 1 else ""

    def targets(self) -> list[str]:
        data = self._get("targets?state=active")
        return sorted(target["scrapeUrl"] for target in data["activeTargets"]) if data else []


@pytest.mark.long
def test_prometheus_scrapes_registered_targets(site: Site, process: DaemonProcess, tmp_path: Path) -> None:
    """A target is scraped, keeps its series when its port changes and the daemon is away, and is removed."""
    port = free_port()
    flags = (f"--storage.tsdb.path={tmp_path / 'data'}", f"--web.listen-address=127.0.0.1:{port}")
    prometheus = Prometheus(port)
    log = tmp_path / "prometheus.log"
    command = (find_tool("prometheus"), f"--config.file={configuration(site, tmp_path)}", *flags)
    with program(*command, log=log), services(1) as [plain]:
        site.register("gateway", site.http, meta={"metrics": "/metrics"})
        site.register("shop", 1, instance="2", meta={"metrics": "/stats"})
        block_until(lambda: prometheus.value('regd_up{job="gateway",instance="gateway"}') == "1", FOLLOW_S)
        block_until(lambda: prometheus.value('up{job="shop",instance="shop/2"}') == "0", FOLLOW_S)
        site.register("shop", plain, instance="2", meta={"metrics": "/stats"})
        urls = sorted([f"{site.url}/metrics", f"http://127.0.0.1:{plain}/stats"])
        block_until(lambda: prometheus.targets() == urls, FOLLOW_S)
        assert prometheus.value('count(count_over_time(up{job="shop"}[10m]))') == "1"  # the same series
        process.end()
        block_until(lambda: "HTTP status 503" in log.read_text(), FOLLOW_S)
        block_until(lambda: prometheus.value("regd_up") == "0", FOLLOW_S)
        assert prometheus.targets() == urls
        process.start()
        site.client.deregister("shop", "2")
        block_until(lambda: prometheus.targets() == [f"{site.url}/metrics"], FOLLOW_S)
