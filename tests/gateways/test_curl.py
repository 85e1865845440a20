"""curl: statuses, forms of `Host` and of paths, the event stream, named URLs."""

import contextlib
import json
import subprocess
from collections.abc import Iterable, Iterator

from tests.gateways.consumers import Site, find_tool, run, services
from tests.support.daemon import WAIT_S, DaemonProcess, environment

FAST = ("--max-time", str(WAIT_S))


def status(*arguments: str) -> int:
    """Return the status of the answer; 0 if there is none."""
    format = ("-sS", *FAST, "-o", "/dev/null", "-w", "%{http_code}\n")
    return int(run("curl", *format, *arguments).splitlines()[-1])


def test_statuses(site: Site, process: DaemonProcess) -> None:
    site.register("db", 5432)
    for path, expected in {
        "/v1/list": 200,
        "/v1/resolve?name=db": 200,
        "/v1/resolve?name=nobody": 404,
        "/v1/resolve?name=nobody&wait=0.01": 504,
        "/v1/resolve": 400,
        "/v1/resolve?name=a&name=b": 400,
        "/v1/list?limit=0": 400,
        "/v1/list?limit=01x": 400,
        "/v1/register?name=a&port=1": 404,
        "/v1/list/": 404,
        "/healthz": 200,
        "/metrics": 200,
        "/v1/prometheus/targets": 200,
        "/v1/traefik": 200,
        "/favicon.ico": 404,
    }.items():
        assert status(site.url + path) == expected, path
        assert status("--head", site.url + path) == expected, path
        assert status("-X", "OPTIONS", site.url + path) == 405, path
    for method in ("POST", "PUT", "DELETE", "PATCH", "TRACE", "register"):
        assert status("-X", method, f"{site.url}/v1/list") == 405, method
    assert status("-d", "name=a&port=1", f"{site.url}/v1/register") == 405
    assert status("--upload-file", __file__, f"{site.url}/v1/list") == 405
    process.end()
    for path in ("/v1/list", "/healthz", "/v1/prometheus/targets", "/v1/traefik", "/v1/watch"):
        assert status(site.url + path) == 503, path
    assert status(f"{site.url}/metrics") == 200


FLAGS = [(), ("-0",), ("--http2",), ("--compressed",), ("-r", "0-1"), ("-H", "Expect: 100-continue"), ("-g",),
         ("-H", "Accept: text/html"), ("-H", "If-None-Match: *"), ("-H", "Connection: close"), ("-u", "a:b")]  # fmt: skip


def test_the_body_is_the_reply(site: Site) -> None:
    site.register("db", 5432)
    for flags in FLAGS:
        body = run("curl", "-sS", *FAST, *flags, f"{site.url}/v1/resolve?name=db")
        assert json.loads(body)["port"] == 5432, flags
        assert (body[:11], body[-2:]) == ('{"ok":true,', "}\n"), flags


def test_one_connection_for_many_requests(site: Site) -> None:
    site.register("db", 5432)
    urls = [f"{site.url}/v1/resolve?name=db"] * 50
    output = run("curl", "-sS", *FAST, "-w", "%{num_connects}\n", *urls)
    lines = output.splitlines()
    assert [int(line) for line in lines[1::2]] == [1, *[0] * 49]
    assert {json.loads(line)["port"] for line in lines[::2]} == {5432}


def test_paths_as_they_are(site: Site) -> None:
    for path in (
        "/../v1/list", "/v1/../v1/list", "/v1/./list", "//v1/list", "//evil.example/v1/list", "/v1//list", "/v1/list/..",
        "/v1/%6cist/", "/v1/list%00", "/v1/list%0d%0aX: y", "/%2e%2e/v1/list", "/V1/list", "/v1/list;a", "/v1\\list",
        "/v1/prometheus/../list", "/page/../../serve.py", "/%c0%ae/v1/list",
    ):  # fmt: skip
        found = status("--path-as-is", site.url + path.replace(" ", "%20"))
        assert found == 404, path
    assert status("--request-target", "/v1/list", f"{site.url}/x") == 200
    assert status("--request-target", "/v1/list#part", f"{site.url}/x") in (200, 404)
    assert status("--request-target", "*", "-X", "OPTIONS", f"{site.url}/x") == 405


def test_forms_of_host(site: Site) -> None:
    url = f"{site.url}/v1/hello"
    for host, expected in {
        "localhost": 200,
        f"LocalHost:{site.http}": 200,
        "127.0.0.1": 200,
        "127.0.0.1:1": 200,
        "[::1]": 200,
        f"[::1]:{site.http}": 200,
        "nobody.localhost": 404,
        "evil.example": 400,
        f"evil.example:{site.http}": 400,
        "127.0.0.1.evil.example": 400,
        "localhost.evil.example": 400,
        "localhost@evil.example": 400,
        "localhost.": 400,
        "127.1": 400,
        "0.0.0.0": 400,
        "[::]": 400,
        "[::ffff:127.0.0.1]": 400,
        "::1": 400,
        "localhost:port": 400,
        "localhost evil.example": 400,
        ".localhost": 400,
    }.items():
        assert status("-H", f"Host: {host}", url) == expected, host
    assert status("-H", "Host:", url) == 400  # without the header
    assert status("-0", "-H", "Host:", url) == 400
    assert status("-H", "Host;", url) == 400  # an empty one
    # A target in the form for proxies: the guard checks `Host`.
    assert status("--request-target", "http://evil.example/v1/hello", "-H", "Host: evil.example", url) == 400
    assert status("--proxy", site.url, "http://evil.example/v1/hello") == 400
    for name in ("localhost", "127.0.0.1", "[::1]"):
        assert status(f"http://{name}:{site.http}/v1/hello") == 200


def test_headers_of_browsers(site: Site) -> None:
    url = f"{site.url}/v1/list"
    own = f"Origin: http://127.0.0.1:{site.http}"
    for headers, expected in [
        (("Origin: http://evil.example",), 403),
        (("Origin: null",), 403),
        ((own,), 200),
        (("Sec-Fetch-Site: same-site",), 403),
        (("Sec-Fetch-Site: cross-site", "Sec-Fetch-Mode: no-cors", "Sec-Fetch-Dest: script"), 403),
        (("Sec-Fetch-Site: cross-site", "Sec-Fetch-Mode: navigate", "Sec-Fetch-Dest: document"), 200),
        (("Sec-Fetch-Site: none", own), 200),
    ]:
        assert status(*(part for header in headers for part in ("-H", header)), url) == expected, headers
    answer = run("curl", "-sSi", *FAST, "-H", own, url).lower()
    assert "access-control" not in answer
    assert "\nserver:" not in answer
    assert "\nset-cookie:" not in answer


@contextlib.contextmanager
def stream(*arguments: str) -> Iterator[Iterator[dict[str, str]]]:
    """Run curl on an event stream, and yield the fields of each event that has data."""

    def events(lines: Iterable[str]) -> Iterator[dict[str, str]]:
        event: dict[str, str] = {}
        for line in lines:
            name, _, value = line.rstrip("\n").partition(":")
            if name:
                event[name] = value.strip()
            elif "data" in event:
                yield event
                event = {}

    command = [find_tool("curl"), "-sSN", *FAST, *arguments]
    with subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, text=True) as running:
        assert running.stdout is not None
        try:
            yield events(running.stdout)
        finally:
            running.kill()


def test_event_stream(site: Site) -> None:
    site.register("db", 5432)
    with stream(f"{site.url}/v1/watch?name=d*") as events:
        first = [next(events) for _ in range(3)]
        assert [event["event"] for event in first] == ["reset", "up", "sync"]
        site.register("other", 1)
        site.register("deep", 5433)
        up = next(events)
        assert (up["event"], json.loads(up["data"])["port"]) == ("up", 5433)
    site.client.deregister("db")
    with stream("-H", f"Last-Event-ID: {first[-1]['id']}", f"{site.url}/v1/watch?name=d*") as events:
        missed = [json.loads(next(events)["data"]) for _ in range(2)]
    assert [(event["event"], event["name"]) for event in missed] == [("up", "deep"), ("down", "db")]


def test_named_urls(site: Site) -> None:
    """curl knows that *.localhost is this machine (RFC 6761), and follows the redirect to the service."""
    with services(1) as [port]:
        site.register("eu.shop", port)
        named = f"http://eu.shop.localhost:{site.http}"
        for path in ("/", "/cart?item=1&item=2", "/a%20b/%C3%A9?x=%2F", "/v1/list"):
            output = run("curl", "-sSL", *FAST, "-w", "%{num_redirects}", f"{named}{path}")
            assert output == f"{port} {path}\n1"
        for path in ("//evil.example/", "/../v1/list", "/\\evil.example", "/@evil.example"):
            location = run("curl", "-sS", *FAST, "--path-as-is", "-w", "%header{location}", f"{named}{path}")
            assert location == f"http://eu.shop.localhost:{port}{path}"
        assert status(f"http://nobody.localhost:{site.http}/") == 404
        assert status("-X", "POST", f"{named}/") == 405
