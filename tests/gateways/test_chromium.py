"""The page in a real Chromium: changes, restarts, many rows, hostile texts, and attacks from other origins."""

import contextlib
import json
import random
import signal
import socket
import threading
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest

from regd_client import blocking
from tests.gateways.chromium import WITHIN_S, Chromium, Page, find_chromium
from tests.gateways.test_serve import Serving, port_of, serving
from tests.support.daemon import DaemonProcess
from tests.support.http_service import HttpHandler, http_service
from tests.support.polling import block_until

if find_chromium() is None:
    pytest.skip("no chromium on this machine", allow_module_level=True)

pytestmark = pytest.mark.timeout(300)  # seconds, on a busy machine

LIVE = "document.querySelector('#connection').dataset.state === 'live'"
NAMES = "[...document.querySelectorAll('#services tbody tr:not(.details) th')].map((cell) => cell.textContent)"
REVISIONS = "[...document.querySelectorAll('#history tbody tr')].map((row) => Number(row.dataset.rev))"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chromium]:
    """One browser for all tests, since its start takes a second."""
    rule = "--host-resolver-rules=MAP evil.example 127.0.0.1"
    with Chromium(tmp_path_factory.mktemp("chromium"), rule) as running:
        yield running


class Site:
    """A daemon, a gateway beside it, and a client."""

    def __init__(self, process: DaemonProcess, client: blocking.Client) -> None:
        self.process = process
        self.client = client
        self.port = 0

    @property
    def url(self) -> str:
        return f"http://localhost:{self.port}"

    @contextlib.contextmanager
    def gateway(self) -> Iterator[Serving]:
        """Run the gateway. A second run uses the same port."""
        with serving("--http", str(self.port), "--dns", "off", address=self.process.addresses[0]) as running:
            self.port = port_of(running.lines(2)[0])
            yield running

    def register(self, name: str, port: int, **more: Any) -> None:
        self.client.register(name, port, static=True, **more)

    def ask(self, cmd: str, **arguments: Any) -> dict[str, Any]:
        [reply] = self.ask_all([{"cmd": cmd, **arguments}])
        return reply

    def ask_all(self, requests: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Send requests at once, and return the replies."""
        lines = "".join(json.dumps(request) + "\n" for request in requests)
        with socket.create_connection(("127.0.0.1", self.process.port)) as peer, peer.makefile("rb") as file:
            sending = threading.Thread(target=peer.sendall, args=(lines.encode(),))
            sending.start()
            replies = [json.loads(file.readline()) for _ in requests]
            sending.join()
            return replies


@pytest.fixture
def site(process: DaemonProcess) -> Iterator[Site]:
    with blocking.Client(process.addresses[0]) as client:
        site = Site(process, client)
        with site.gateway():
            yield site


# The page removes its marks after some seconds, so a script in the page records them.
RECORD_MARKS = """
globalThis.marks = [];
const record = (row) => {
  const [name, , state] = row.children ?? [];
  if (row.dataset?.mark) marks.push(`${row.dataset.mark} ${name.textContent} ${state.textContent}`);
};
new MutationObserver((records) => {
  for (const {target, addedNodes} of records) [target, ...addedNodes].forEach(record);
}).observe(document.querySelector("#services"), {subtree: true, childList: true, attributeFilter: ["data-mark"]});
"""


def shows(name: str) -> str:
    return f"{NAMES}.includes({json.dumps(name)})"


@pytest.mark.long
def test_page_opens_by_three_names(browser: Chromium, site: Site) -> None:
    site.register("db", 5432)
    for host in ("localhost", "127.0.0.1", "[::1]"):
        with browser.page(f"http://{host}:{site.port}/") as page:
            page.wait(LIVE)
            page.wait(shows("db"))
            site.register("shop", 8_000)
            page.wait(shows("shop"))
            site.client.deregister("shop")
            page.wait("document.querySelectorAll('#services .state [data-state=ready]').length === 1")
            assert page.complaints() == []


def test_page_is_live(browser: Chromium, site: Site) -> None:
    site.register("db", 5432, host="LocalHost")
    site.register("worker", 45_061, instance="10", host="::1", state="draining")
    site.register("worker", 45_062, instance="9", meta={"zone": "a", "scheme": "https"}, priority=3)
    with browser.page(site.url) as page:
        page.wait(LIVE)
        page.wait(shows("db"))
        assert page.run(NAMES) == ["db", "worker/9", "worker/10"]
        links = page.run(
            "[...document.querySelectorAll('#services .address a')].map((link) => [link.textContent, link.href])"
        )
        assert links == [
            ["LocalHost:5432", "http://db.localhost:5432/"],
            ["127.0.0.1:45062", "https://worker.localhost:45062/"],
            ["[::1]:45061", "http://worker.localhost:45061/"],
        ]
        states = "[...document.querySelectorAll('#services .state span')].map((cell) => cell.textContent)"
        assert page.run(states) == ["ready", "ready, priority 3", "draining"]
        page.run(RECORD_MARKS)
        site.register("shop", 8_000)
        page.wait(shows("shop"))
        site.client.update("worker", state="ready", instance="10")
        site.client.deregister("db")
        page.wait(f"!{shows('db')}")
        assert page.run("[...new Set(marks)]") == [
            "added shop ready",
            "changed worker/10 ready",
            "removed db deregistered",
        ]
        page.wait(f"{REVISIONS}.length === 6")
        assert page.run(REVISIONS) == [6, 5, 4, 3, 2, 1]
        page.wait("document.querySelector('#registrations').textContent === '3'")
        assert page.complaints() == []
        page.run("location.hash = 'filter=shop'")
        page.wait(f"{NAMES}.length === 1")
        site.client.update("worker", state="draining", instance="9")  # a row that is not visible
        site.register("shop", 8_001, instance="2")
        page.wait(shows("shop/2"))
        assert page.run("document.querySelector('#count').textContent") == "2 of 4"
        page.run("location.hash = ''")
        page.wait(f"{NAMES}.length === 4")
        assert page.run(states) == ["ready", "ready", "draining, priority 3", "ready"]
        # From now on, the page can only use the stream.
        page.run("globalThis.fetch = () => Promise.reject(new Error('refused'))")
        site.client.deregister("shop")
        page.wait(f"{REVISIONS}[0] === 9")
        change = (
            "[...document.querySelectorAll('#history tbody tr:first-child td')].map((cell) => cell.textContent)"
        )
        assert page.run(change)[1:] == ["down deregistered", "shop", "127.0.0.1:8000", ""]


@pytest.mark.long
def test_page_survives_the_daemon_and_the_gateway(browser: Chromium, process: DaemonProcess) -> None:
    with blocking.Client(process.addresses[0]) as client:
        site = Site(process, client)
        with contextlib.ExitStack() as gateway:
            gateway.enter_context(site.gateway())
            site.register("db", 5_432)
            page = browser.open(site.url)
            page.wait(shows("db"))
            process.end(signal.SIGKILL)
            page.wait("document.body.classList.contains('away')")
            assert "This is the last known state." in page.run("document.querySelector('#notice').textContent")
            assert page.run(NAMES) == ["db"]
            process.start()
            page.wait(LIVE)
            site.register("web", 8_000)
            page.wait(shows("web"))
        page.wait("document.querySelector('#notice').textContent.includes('regctl serve does not answer')")
        site.register("missed", 8_001)
        with site.gateway():
            page.wait(LIVE)
            page.wait(shows("missed"))
            site.register("last", 8_002)
            page.wait(f"{REVISIONS}.length === 4")
            assert page.run(REVISIONS) == [4, 3, 2, 1]
            assert page.run("document.title") == "regd"
        page.close()


def streams(page: Page) -> list[str]:
    urls = [event["request"]["url"] for event in page.events("Network.requestWillBeSent")]
    return [url.partition("/v1/watch")[2] for url in urls if "/v1/watch" in url]


@pytest.mark.long
def test_hidden_pages_close_their_streams(browser: Chromium, site: Site) -> None:
    """A browser opens six connections to a host, so eight open streams would block all of them."""
    site.register("db", 5_432)
    block_until(lambda: site.ask("stats")["watches"] == 1)  # only the gateway's watch for DNS is left
    pages = []
    for _ in range(8):
        pages.append(browser.open(site.url))
        pages[-1].wait(LIVE)
    block_until(lambda: site.ask("stats")["watches"] == 2, WITHIN_S)
    for page in pages[:2]:
        assert page.run("document.hidden")
        name = f"web-{len(site.ask('list')['instances'])}"
        site.register(name, 8_000)
        page.call("Page.bringToFront")
        page.wait(shows(name))
        page.wait(LIVE)
        epoch, rev = site.ask("hello")["epoch"], site.ask("list")["rev"]
        page.wait(f"{REVISIONS}[0] === {rev}")
        assert page.run(REVISIONS) == list(range(rev, 0, -1))
        assert f"epoch={epoch}&since=" in streams(page)[-1]
    for page in pages:
        page.close()


@pytest.mark.long
def test_ten_thousand_rows(browser: Chromium, site: Site) -> None:
    count = 10_001
    requests = [
        {"cmd": "register", "name": "web", "instance": str(number), "port": 1_000 + number}
        for number in range(count)
    ]
    assert all(reply["ok"] for reply in site.ask_all(requests))
    with browser.page(site.url) as page:
        page.wait(f"{NAMES}.length === 10000")
        assert page.run(NAMES) == [f"web/{number}" for number in range(10_000)]
        assert page.run(
            "document.querySelector('#more').textContent.startsWith('These are the first 10,000 of 10,001.')"
        )
        assert page.run("getComputedStyle(document.querySelector('#more')).display") != "none"
        page.run("document.querySelector('#older').click()")
        page.wait(f"{REVISIONS}.length === 200")
        assert page.run(REVISIONS) == list(range(count, count - 200, -1))
        page.run("document.querySelector('#filter').focus()")
        page.call("Input.insertText", text="WEB/1000 127.0")
        page.wait(f"{NAMES}.length === 2")
        assert page.run(NAMES) == ["web/1000", "web/10000"]
        assert page.run("document.querySelector('#count').textContent") == "2 of 10,001"
        site.register("web", 11_999, instance="1000-new")
        page.wait(shows("web/1000-new"))
        page.run("document.querySelector('[data-column=address]').click()")
        page.run("document.querySelector('[data-column=address]').click()")
        url = page.run("location.href")
        assert url.endswith("#filter=WEB%2F1000+127.0&order=address&descending=")
        page.go(url)
        page.call("Page.reload")
        page.wait(f"{NAMES}.length === 3")
        assert page.run(NAMES) == ["web/1000-new", "web/10000", "web/1000"]
        assert (
            page.run(
                "document.querySelector('[aria-sort]').textContent + document.querySelector('[aria-sort]').ariaSort"
            )
            == "Addressdescending"
        )
        assert page.complaints() == []


def test_changed_rows_keep_the_order(browser: Chromium, site: Site) -> None:
    rng = random.Random(17)
    metas: dict[int, dict[str, str]] = {}

    def change(count: int, cmd: str) -> None:
        numbers = range(count) if cmd == "register" else [rng.randrange(30) for _ in range(count)]
        requests: list[dict[str, Any]] = []
        for number in numbers:
            metas[number] = {"n": rng.choice("0123"), "zone": rng.choice("ab")}
            requests.append({"cmd": cmd, "name": "web", "instance": str(number), "meta": metas[number]})
        if cmd == "register":
            requests = [{**request, "port": 8_000} for request in requests]
        assert all(reply["ok"] for reply in site.ask_all(requests))

    change(30, "register")
    with browser.page(f"{site.url}#filter=zone%3Da&order=meta") as page:
        for count in (0, 1, 2, 20, 40, 3, 1):
            change(count, "update")
            matching = [number for number in metas if metas[number]["zone"] == "a"]
            expected = [
                f"web/{number}" for number in sorted(matching, key=lambda number: (metas[number]["n"], number))
            ]
            page.wait(f"JSON.stringify({NAMES}) === {json.dumps(json.dumps(expected, separators=(',', ':')))}")
            page.wait(f"document.querySelector('#count').textContent === '{len(expected)} of 30'")


HOSTILE = {
    "script": "</script><script>document.title='attacked'</script>",
    "image": "<img src=x onerror=\"document.title='attacked'\">",
    "direction": "a\u202eb\u2066c\u0000\n\u2028",
    "quotes": "\"'`${1}\\",
    "<b>key": "&amp;&lt;",
    "long": "x" * 2_000,
}


def test_hostile_texts_are_shown_as_text(browser: Chromium, site: Site) -> None:
    name = ".".join(["a" * 63] * 3)
    site.register(name, 8_000, instance="b" * 63, meta=HOSTILE, host="h" * 63 + ".example")
    site.register("db", 5_432, meta={"scheme": "javascript"}, host="fe80::1%eth0")
    with browser.page(site.url) as page:
        page.wait(LIVE)
        page.wait("document.querySelectorAll('#services .label').length === 7")
        labels = page.run("[...document.querySelectorAll('#services .label')].map((label) => label.textContent)")
        expected = {
            **HOSTILE, "direction": "a\\u202eb\\u2066c\\u0000\\u000a\\u2028"
        }  # fmt: skip
        assert sorted(labels) == sorted(
            f"{key}={value}" for key, value in {**expected, "scheme": "javascript"}.items()
        )
        assert page.run("document.querySelectorAll('#services :is(script, img, b), main script').length") == 0
        assert page.run("document.querySelectorAll('#services a').length") == 1  # no URL has a zone index
        page.run("document.querySelector('#services tbody button').click()")
        page.wait("document.querySelector('.details dd') !== null")
        assert page.run("document.querySelectorAll('.details :is(script, img, b)').length") == 0
        assert page.run("document.title") == "regd"
        for width in (360, 800, 1440):
            page.call(
                "Emulation.setDeviceMetricsOverride", width=width, height=800, deviceScaleFactor=1, mobile=False
            )
            for table in ("document.documentElement", "document.querySelector('#services')"):
                assert page.run(f"{table}.scrollWidth - {table}.clientWidth") <= 0, (table, width)
            assert (
                page.run(
                    "Math.max(...[...document.querySelectorAll('#services, #services th, #services td')].map((cell) => cell.getBoundingClientRect().right))"
                )
                <= width
            )
        for sink in ("document.body.innerHTML = '<b>'", "setTimeout('1')", "document.write('<b>')", "eval('1')"):
            code = f"(() => {{ try {{ {sink}; return 'ran' }} catch (error) {{ return 'refused' }} }})()"
            result = page.call("Runtime.evaluate", expression=code, allowUnsafeEvalBlockedByCSP=False)
            assert result["result"]["value"] == "refused", sink


def accessible(page: Page) -> list[tuple[str, str]]:
    """Return the role and the name of each element as a screen reader gets them, a moment after the page has them."""
    nodes = page.call("Accessibility.getFullAXTree")["nodes"]
    return [(node["role"]["value"], node["name"]["value"]) for node in nodes if not node["ignored"]]


def test_keyboard_and_screen_reader(browser: Chromium, site: Site) -> None:
    for number in range(3):
        site.register("web", 8_000 + number, instance=str(number))
    focused = "document.activeElement.textContent"
    with browser.page(site.url) as page:
        page.wait(f"{NAMES}.length === 3")
        page.press("/")
        assert page.run("document.activeElement.id") == "filter"
        for _ in range(7):  # six headers, then the first row
            page.press("Tab")
        assert page.run(focused) == "web/0"
        page.press("ArrowDown")
        page.press("Enter", "\r")
        page.wait("document.querySelector('.details dd') !== null")
        assert page.run("document.activeElement.getAttribute('aria-expanded')") == "true"
        details = page.run("document.querySelector('.details').innerText")
        assert "nobody: it is static" in details
        assert f"http://web.localhost:{site.port}/" in details
        page.press("End")
        assert page.run(focused) == "web/2"
        page.press("Tab")
        assert page.run(focused) == "127.0.0.1:8002"
        wanted = {
            "table": 2,
            "columnheader": 6 + 5,
            "rowheader": 3,
            "cell": 3 * 5 + 1 + 3 * 5,
            "row": 1 + 3 + 1 + 1 + 3,  # with the heads, the details and the history
        }
        block_until(lambda: Counter(role for role, _ in accessible(page) if role in wanted) == wanted, WITHIN_S)
        assert [name for role, name in accessible(page) if role == "rowheader"] == ["web/0", "web/1", "web/2"]
        still = "matchMedia('(prefers-reduced-motion: reduce)').matches && getComputedStyle(document.querySelector('tbody tr')).transitionDuration"
        page.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-reduced-motion", "value": "reduce"}])
        assert page.run(still) == "0s"
        colours = []
        for scheme in ("light", "dark"):
            page.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
            colours.append(page.run("getComputedStyle(document.body).backgroundColor"))
        assert len(set(colours)) == 2


# Other origins.


class Service(HttpHandler):
    """A page of another origin. It shows the host and the path of the request."""

    def do_GET(self) -> None:
        body = f"<!doctype html><title>other</title><body>{self.headers['Host']} {self.path}"
        self.answer(body.encode(), content_type="text/html")


@pytest.fixture
def service() -> Iterator[int]:
    """The port of the other origin."""
    with http_service(Service) as port:
        yield port


def test_named_url_leads_to_the_service(browser: Chromium, site: Site, service: int) -> None:
    site.register("shop", service)
    with browser.page(f"http://shop.localhost:{site.port}/a?b=1") as page:
        page.wait("document.title === 'other'")
        assert page.run("location.href") == f"http://shop.localhost:{service}/a?b=1"
        assert page.run("document.body.innerText") == f"shop.localhost:{service} /a?b=1"


ATTACKS = """
(async (gateway, named) => {
  const load = (tag, attributes) => new Promise((done) => {
    const element = document.createElement(tag);
    element.onload = () => done("loaded");
    element.onerror = () => done("refused");
    Object.assign(element, attributes);
    document.body.append(element);
  });
  const get = (url, options) => fetch(url, options).then((response) => response.text(), () => "refused");
  const write = {method: "POST", mode: "no-cors", body: '{"cmd":"register","name":"attacked","port":1}\\n'};
  const opened = (source) => new Promise((done) => {
    source.onopen = source.onmessage = () => done("opened");
    source.addEventListener("up", (event) => done(event.data));
    source.onerror = () => { source.close(); done("refused"); };
  });
  const frame = async () => {
    await load("iframe", {src: `${gateway}/`});
    try {
      return document.querySelector("iframe").contentDocument?.body.innerText ?? "refused";
    } catch {
      return "refused";
    }
  };
  const stylesheet = async () => {
    const result = await load("link", {rel: "stylesheet", href: `${gateway}/page.css`});
    return getComputedStyle(document.body).getPropertyValue("--ink") || result;
  };
  return {
    "fetch": await get(`${gateway}/v1/list`),
    "fetch without CORS": await get(`${gateway}/v1/list`, {mode: "no-cors"}),
    "POST": await get(`${gateway}/v1/list`, write),
    "fetch with a preflight": await get(`${gateway}/v1/list`, {headers: {"X-Any": "1"}}),
    "EventSource": await opened(new EventSource(`${gateway}/v1/watch`)),
    "script of a list": await load("script", {src: `${gateway}/v1/list`}),
    "script of the page": await load("script", {type: "module", src: `${gateway}/page.js`}),
    "image": await load("img", {src: `${gateway}/v1/list`}),
    "frame": await frame(),
    "WebSocket": await opened(new WebSocket(`${gateway.replace("http", "ws")}/v1/watch`)),
    "stylesheet": await stylesheet(),
    "named URL": await get(named),
  };
})
"""


def statuses(page: Page, port: int) -> list[int]:
    """Return the statuses of the responses from a port, including those that the browser hides from the page."""
    urls = {event["requestId"]: event["request"]["url"] for event in page.events("Network.requestWillBeSent")}
    received = page.events("Network.responseReceivedExtraInfo")
    return [event["statusCode"] for event in received if f":{port}/" in urls.get(event["requestId"], "")]


def is_reported(page: Page, port: int) -> bool:
    """Return whether the statuses of the attacks have been received, also that of the POST."""
    page.run("0")  # reads the events that have arrived
    received = statuses(page, port)
    return len(received) >= 10 and 405 in received


def test_other_origins_read_and_write_nothing(browser: Chromium, site: Site, service: int) -> None:
    site.register("secret", service)
    for origin, gateway in [
        (f"http://evil.example:{service}", f"http://127.0.0.1:{site.port}"),
        (f"http://127.0.0.1:{service}", f"http://127.0.0.1:{site.port}"),
        (f"http://other.localhost:{service}", f"http://localhost:{site.port}"),
    ]:
        with browser.page(origin) as page:
            named = f"http://secret.localhost:{site.port}/"
            results = page.run(f"({ATTACKS})({json.dumps(gateway)}, {json.dumps(named)})")
            assert len(results) == 12
            assert set(results.values()) == {"refused"}, results
            # The browser may report a status later than the result. A script and a preload may share one.
            block_until(lambda page=page: is_reported(page, site.port))  # type: ignore[misc]
            assert set(statuses(page, site.port)) == {403, 405}
    assert [change["rev"] for change in site.ask("history")["changes"]] == [1]


def test_page_of_a_rebound_name_reads_nothing(browser: Chromium, site: Site) -> None:
    """The name of the attacker's page now leads to the gateway, so for the browser both are the same origin."""
    site.register("secret", 5_432)
    with browser.page(f"http://evil.example:{site.port}/") as page:
        page.call("Page.setBypassCSP", enabled=True)
        page.call("Page.reload")
        page.wait("document.readyState === 'complete'")
        read = "fetch('{}', {{method: '{}'}}).then(async (response) => [response.status, await response.text()])"
        for path in ("/", "/v1/list", "/metrics", "/v1/prometheus/targets", "/healthz"):
            for method in ("GET", "POST", "PUT"):
                status, body = page.run(read.format(path, method))
                assert (status, "secret" in body) == (400, False), (path, method)


def test_page_opens_from_a_link_elsewhere(browser: Chromium, site: Site, service: int) -> None:
    site.register("db", 5_432)
    with browser.page(f"http://evil.example:{service}") as page:
        page.run(f"location.href = '{site.url}/'")
        page.wait(f"location.port === '{site.port}'")
        page.wait(LIVE)
        page.wait(shows("db"))
