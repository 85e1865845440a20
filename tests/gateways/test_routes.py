"""The HTTP application without a server, and a daemon in the same event loop."""

import asyncio
import json
import random
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, quote, urlencode

import pytest

from regd.gateways import daemon_connections, routes
from regd.gateways.daemon_connections import DaemonClient
from regd.gateways.queries import COMMANDS, body_of, failure, parse_query
from regd.gateways.readers import Readers
from regd.gateways.routes import Gateway
from regd.gateways.stream import EventEncoder
from regd_client.protocol import parse_address
from tests.gateways.asgi import Exchange, get
from tests.support.daemon import WAIT_S, Peer
from tests.support.polling import until
from tests.support.registries import Registry, running

pytestmark = pytest.mark.socket


class Scene:
    """A registry, a gateway for it, and a connection to the daemon to compare replies."""

    def __init__(self, registry: Registry, daemon: DaemonClient, app: Gateway, peer: Peer) -> None:
        self.registry = registry
        self.daemon = daemon
        self.app = app
        self.peer = peer

    async def register(self, name: str, port: int, **more: Any) -> None:
        assert (await self.peer.ask(cmd="register", name=name, port=port, **more))["ok"]

    async def gauge(self, name: str, expected: int) -> None:
        """Wait until a gauge of `stats` has this value."""
        async with asyncio.timeout(WAIT_S):
            while (await self.peer.ask(cmd="stats"))[name] != expected:
                await asyncio.sleep(0.001)


@pytest.fixture
async def scene(tmp_path: Path) -> AsyncIterator[Scene]:
    async with running(tmp_path) as registry:
        daemon = DaemonClient(parse_address(registry.address))
        peer = await registry._daemon.peer()
        yield Scene(registry, daemon, Gateway(daemon, Readers(restricted=False)), peer)
        daemon.close()


@pytest.mark.parametrize(
    ("path", "request_"),
    [
        ("/v1/list", {"cmd": "list"}),
        ("/v1/list?limit=1&name=w*", {"cmd": "list", "limit": 1, "name": "w*"}),
        ("/v1/list?limit=1&after=db", {"cmd": "list", "limit": 1, "after": "db"}),
        ("/v1/list?meta=zone%3Da", {"cmd": "list", "meta": {"zone": "a"}}),
        ("/v1/list?limit=many", {"cmd": "list", "limit": "many"}),
        ("/v1/list?nmae=db", {"cmd": "list", "nmae": "db"}),
        ("/v1/resolve?name=db", {"cmd": "resolve", "name": "db"}),
        ("/v1/resolve?name=web&all=true", {"cmd": "resolve", "name": "web", "all": True}),
        ("/v1/resolve?name=wbe", {"cmd": "resolve", "name": "wbe"}),
        ("/v1/resolve", {"cmd": "resolve"}),
        ("/v1/history?name=db&limit=3", {"cmd": "history", "name": "db", "limit": 3}),
        ("/v1/hello", {"cmd": "hello"}),
        ("/v1/help?topic=watch", {"cmd": "help", "topic": "watch"}),
    ],
)
async def test_body_is_the_reply(scene: Scene, path: str, request_: dict[str, Any]) -> None:
    await scene.register("db", 5432)
    await scene.register("web", 5061, meta={"zone": "a", "text": "\u202e</script>\n\\"})
    await scene.register("web", 5062, instance="2")
    scene.peer.send(request_)
    line = await scene.peer.line()
    response = await get(scene.app, path)
    assert response.body == line
    expected = (
        {"bad_argument": 400, "not_found": 404}[json.loads(line)["error"]] if b'"ok":false' in line else 200
    )
    assert response.status == expected
    assert response.headers["content-type"] == "application/json"


VALUES: dict[str, list[str]] = {
    "name": ["db", "web", "wbe", "w*", "*", "A", "", "a b", "\u202e", "x" * 300],
    "instance": ["", "2", "a/b"],
    "after": ["db", "web/2", "none", "/"],
    "limit": ["0", "1", "1000", "1001", "-1", "1.5", "x", "99999999999999999999"],
    "since": ["0", "3", "-1", "9223372036854775807"],
    "before": ["3", "0"],
    "age_s": ["60", "0.5", "-1", "nan", "1e9"],
    "all": ["true", "false", "1"],
    "topic": ["list", "nothing"],
    "meta": ["zone=a", "zone=", "zone=b"],
    "nmae": ["db"],
}


@pytest.mark.parametrize("seed", range(4))
async def test_body_of_any_query_is_the_reply(scene: Scene, seed: int) -> None:
    rng = random.Random(seed)
    await scene.register("db", 5432)
    await scene.register("web", 5061, meta={"zone": "a", "text": "\u202e</script>\n\\"})
    await scene.register("web", 5062, instance="2", state="draining", priority=7)
    for _ in range(60):
        cmd = rng.choice([cmd for cmd in COMMANDS if cmd not in ("watch", "stats")])
        names = rng.sample(sorted(VALUES), rng.randint(0, 3)) + sorted(
            rng.sample(sorted(COMMANDS[cmd]), len(COMMANDS[cmd]) // 2)
        )
        query = urlencode({name: rng.choice(VALUES[name]) for name in names if name in VALUES}, quote_via=quote)
        arguments = parse_query(query.encode(), COMMANDS[cmd])
        if cmd == "resolve":
            arguments["all"] = True  # without `all`, round robin would give another instance
            query = urlencode(
                {"all": "true", **{k: v for k, v in parse_qsl(query, keep_blank_values=True) if k != "all"}}
            )
        scene.peer.send({"cmd": cmd, **arguments})
        response = await get(scene.app, f"/v1/{cmd}?{query}")
        assert response.body == await scene.peer.line(), query
        assert response.status == body_of(response.body).status


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/v1/list/", 404), ("/v1", 404), ("/index.html", 404), ("/page", 404), ("/page.js/", 404), ("/v1/register?name=a&port=1", 404), ("//evil.example", 404),
        ("/v1/ping", 404), ("/v1/../v1/list", 404), ("http://localhost/v1/list", 404), ("/V1/list", 404),
        ("/v1/list?name=a&name=a", 400), ("/v1/list?meta=a", 400), ("/v1/list?cmd=register", 400),
        ("/v1/list?name=%ff", 400), ("/v1/resolve?name=a&wait=61", 400), ("/v1/prometheus/targets?after=a", 400),
        ("/v1/prometheus/targets?all=1", 400), ("/v1/prometheus/targets?name=A", 400), ("/v1/traefik?all=true", 400),
        ("/v1/watch?name=A", 400), ("/v1/watch?epoch=a", 400), ("/v1/watch?x=1", 400),
    ],
)  # fmt: skip
async def test_statuses(scene: Scene, path: str, status: int) -> None:
    assert (await get(scene.app, path)).status == status


async def test_guard_comes_before_routing(scene: Scene) -> None:
    assert (await get(scene.app, "/healthz", host="evil.example")).status == 400
    response = await get(scene.app, "/nowhere", "POST")
    assert (response.status, response.headers["allow"]) == (405, "GET, HEAD")
    assert (await get(scene.app, "/v1/list", sec_fetch_site="same-site")).status == 403


async def test_wait(scene: Scene) -> None:
    exchange = Exchange(scene.app, "/v1/resolve?name=late&wait=60")
    await scene.gauge("waiting", 1)
    async with await asyncio.start_server(lambda _, writer: writer.close(), "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        await scene.register("late", port)
        assert json.loads((await exchange.response()).body)["port"] == port
    assert (await get(scene.app, "/v1/resolve?name=nobody&wait=0")).status == 504


async def test_wait_ends_with_the_client(scene: Scene) -> None:
    exchange = Exchange(scene.app, "/v1/resolve?name=late&wait=60")
    await scene.gauge("waiting", 1)
    exchange.disconnect()
    await scene.gauge("waiting", 0)
    await exchange.response()


async def test_waits_are_limited(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routes, "WAITS_MAX", 1)
    exchange = Exchange(scene.app, "/v1/resolve?name=late&wait=60")
    await scene.gauge("waiting", 1)
    response = await get(scene.app, "/v1/resolve?name=late&wait=60")
    assert (response.status, json.loads(response.body)["error"]) == (503, "busy")
    assert response.headers["retry-after"] == "1"
    scene.app.stop()
    assert (await exchange.response()).status == 503


async def test_without_a_daemon(scene: Scene) -> None:
    async with scene.registry.away():
        for path in (
            "/v1/list",
            "/v1/resolve?name=a&wait=5",
            "/v1/prometheus/targets",
            "/v1/traefik",
            "/v1/watch",
        ):
            response = await get(scene.app, path)
            assert (response.status, json.loads(response.body)["error"]) == (503, "unavailable"), path
        response = await get(scene.app, "/healthz")
        assert response.status == 503
        assert response.body.count(b"\n") == 1
        assert (await get(scene.app, "/v1/x", host="web.localhost")).status == 503
        response = await get(scene.app, "/metrics")
        assert response.status == 200
        assert [line for line in response.body.splitlines() if not line.startswith(b"#")] == [b"regd_up 0.0"]


async def test_health(scene: Scene) -> None:
    response = await get(scene.app, "/healthz")
    assert (response.status, response.body) == (200, b"ok\n")
    assert response.headers["content-type"] == "text/plain; charset=utf-8"


async def test_metrics(scene: Scene) -> None:
    await scene.register("db", 5432)
    response = await get(scene.app, "/metrics", accept="application/openmetrics-text")
    assert response.headers["Content-Type".lower()].startswith("application/openmetrics-text")
    assert b"\nregd_registrations 1.0\n" in response.body
    assert (await get(scene.app, "/metrics")).headers["content-type"].startswith("text/plain; version=0.0.4")


async def test_targets_and_traefik_take_all_pages(scene: Scene) -> None:
    count = 1_100  # a page has 1,000 at most
    for number in range(count):
        scene.peer.send({"cmd": "register", "name": "web", "instance": str(number), "port": 2_000 + number})
    for _ in range(count):
        assert (await scene.peer.reply())["ok"]
    assert (await get(scene.app, "/v1/prometheus/targets")).body == b"[]\n"
    response = await get(scene.app, "/v1/prometheus/targets?all=true&name=w*")
    targets = [group["targets"] for group in json.loads(response.body)]
    assert sorted(targets) == [[f"127.0.0.1:{2_000 + number}"] for number in range(count)]
    assert response.headers["content-type"] == "application/json"
    traefik = json.loads((await get(scene.app, "/v1/traefik")).body)
    assert len(traefik["http"]["services"]["web"]["loadBalancer"]["servers"]) == count
    assert (await get(scene.app, "/v1/traefik?name=none")).body == b"{}\n"


async def test_whole_lists_are_limited(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    await scene.register("a", 1)
    ask, reading, most = scene.daemon.ask, 0, 0

    async def count(cmd: str, arguments: Any) -> Any:
        nonlocal reading, most
        reading += 1
        most = max(most, reading)
        try:
            return await ask(cmd, arguments)
        finally:
            reading -= 1

    monkeypatch.setattr(scene.daemon, "ask", count)
    paths = ["/v1/prometheus/targets?all=true", "/v1/traefik"] * 10
    assert {response.status for response in await asyncio.gather(*(get(scene.app, path) for path in paths))} == {
        200
    }
    assert most == routes.LISTS_MAX
    for _ in range(routes.LISTS_MAX):
        await scene.app._lists.acquire()
    monkeypatch.setattr(daemon_connections, "REPLY_S", 0.01)
    for path in paths[:2]:
        response = await get(scene.app, path)
        assert (response.status, json.loads(response.body)["error"]) == (503, "busy")
        assert response.headers["retry-after"] == "1"


async def test_streams_share_the_event_loop(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of many streams with events to send, only a few are encoded per iteration of the event loop."""
    iteration = 0
    encoded: Counter[int] = Counter()
    encode = EventEncoder.encode

    async def count_iterations() -> None:
        nonlocal iteration
        while True:
            iteration += 1
            await asyncio.sleep(0)

    def count(self: EventEncoder, data: bytes) -> bytes:
        encoded[iteration] += 1
        return encode(self, data)

    monkeypatch.setattr(EventEncoder, "encode", count)
    counting = asyncio.create_task(count_iterations())
    streams = [Exchange(scene.app, "/v1/watch") for _ in range(50)]
    await scene.gauge("watches", 50)
    await scene.register("a", 1)
    await until(lambda: all(stream._messages.qsize() >= 4 for stream in streams))
    counting.cancel()
    assert max(encoded.values()) <= routes._STEPS_MAX
    scene.app.stop()
    await asyncio.gather(*(stream.task for stream in streams))


async def test_hostile_labels_are_data_everywhere(scene: Scene) -> None:
    meta = {'"\\\n</script>\u202e': "a\r\nb", "metrics": "/m\r\nX: 1", "scheme": "http\n", "🦀": "\0"}
    await scene.register("web", 5061, meta=meta)
    listed = json.loads((await get(scene.app, "/v1/list")).body)
    assert listed["instances"][0]["meta"] == meta
    response = await get(scene.app, "/v1/prometheus/targets")
    assert response.body.isascii()
    assert response.body.count(b"\n") == 1
    (group,) = json.loads(response.body)
    assert group["labels"]["__metrics_path__"] == meta["metrics"]
    assert "__scheme__" not in group["labels"]
    assert all(name.isascii() and name.replace("_", "a").isalnum() for name in group["labels"])
    assert b"script" not in (await get(scene.app, "/metrics")).body
    assert b"http://127.0.0.1:5061" in (await get(scene.app, "/v1/traefik")).body
    location = (await get(scene.app, "/", host="web.localhost")).headers["location"]
    assert location == "http://web.localhost:5061/"
    exchange = Exchange(scene.app, "/v1/watch")
    await exchange.message()
    body = await exchange.body_until("event: sync")
    assert body.isascii()
    assert body.count("event: ") == 3
    exchange.disconnect()
    await exchange.task


async def test_list_fails_if_one_of_its_pages_fails(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []
    ask = scene.daemon.ask

    async def fail(cmd: str, arguments: Any) -> Any:
        asked.append(arguments)
        if "after" in arguments:
            return failure("shutting_down", "not now")
        return await ask(cmd, {**arguments, "limit": 1})

    await scene.register("a", 1)
    await scene.register("b", 2)
    monkeypatch.setattr(scene.daemon, "ask", fail)
    assert (await get(scene.app, "/v1/prometheus/targets?all=true")).status == 503
    assert [request.get("after") for request in asked] == [None, "a"]


async def test_named_url(scene: Scene) -> None:
    await scene.register("shop.web", 5061)
    await scene.register("far", 80, host="db.example", meta={"scheme": "https"})
    for path in ("/", "/v1/list?x=1&y=%2F", "//evil.example/a"):
        response = await get(scene.app, path, host="Shop.Web.localhost:7380")
        assert (response.status, response.headers["location"]) == (307, f"http://shop.web.localhost:5061{path}")
    response = await get(scene.app, "/a", host="far.localhost")
    assert response.headers["location"] == "https://db.example:80/a"
    response = await get(scene.app, "/", host="nobody.localhost")
    assert response.status == 404
    assert b"nobody" in response.body
    assert response.headers["content-type"].startswith("text/plain")
    assert (await get(scene.app, "/", host="-x.localhost")).status == 400
    assert (await get(scene.app, "http://evil.example/", host="far.localhost")).status == 400


async def test_stream_follows_the_registry_and_resumes(scene: Scene) -> None:
    await scene.register("a", 1)
    exchange = Exchange(scene.app, "/v1/watch")
    start = await exchange.message()
    assert (start["status"], start["headers"]) == (200, [(b"content-type", b"text/event-stream")])
    body = await exchange.body_until("event: sync")
    assert body.startswith("retry: 1000\n\nevent: reset\nid: \ndata: {}\n\nevent: up\ndata: ")
    await scene.register("b", 2)
    body = await exchange.body_until("event: up")
    position = body.partition("id: ")[2].partition("\n")[0]
    exchange.disconnect()
    await scene.gauge("watches", 0)
    await scene.register("c", 3)
    for resumed in (
        Exchange(scene.app, "/v1/watch", last_event_id=position),
        Exchange(scene.app, "/v1/watch?epoch={}&since={}".format(*position.rsplit("-", 1))),
        Exchange(scene.app, "/v1/watch?epoch=x&since=1", last_event_id=position),
    ):
        await resumed.message()
        body = await resumed.body_until("event: progress")
        assert body.startswith("retry: 1000\n\nevent: up\nid: ")
        assert body.count("data: ") == 2
        assert '"name":"c"' in body
        resumed.disconnect()
        await resumed.task


@pytest.mark.parametrize("position", ["", "junk", "another-1", "x" * 10_000, "5eed5eed5eed5eed-99999"])
async def test_unknown_position_gets_the_whole_state(scene: Scene, position: str) -> None:
    await scene.register("a", 1)
    exchange = Exchange(scene.app, "/v1/watch", last_event_id=position)
    await exchange.message()
    body = await exchange.body_until("event: sync")
    kinds = [line.removeprefix("event: ") for line in body.splitlines() if line.startswith("event: ")]
    assert kinds == ["reset", "up", "sync"]
    exchange.disconnect()
    await exchange.task


async def test_streams_end_with_the_daemon_and_with_the_gateway(scene: Scene) -> None:
    first, second = Exchange(scene.app, "/v1/watch"), Exchange(scene.app, "/v1/watch?name=a")
    await scene.gauge("watches", 2)
    scene.app.stop()
    assert (await first.response()).body.startswith(b"retry: ")
    assert (await second.response()).status == 200
    scene.app._stopping.clear()
    third = Exchange(scene.app, "/v1/watch")
    await scene.gauge("watches", 1)
    async with scene.registry.away():
        assert (await third.response()).status == 200


async def test_head_of_a_stream_opens_no_watch(scene: Scene) -> None:
    response = await get(scene.app, "/v1/watch", "HEAD")
    assert response.status == 200
    assert (await scene.peer.ask(cmd="stats"))["watches"] == 0
    exchange = Exchange(scene.app, "/v1/watch")
    await scene.gauge("watches", 1)
    exchange.disconnect()
    assert response.headers == (await exchange.response()).headers


async def test_streams_are_limited(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routes, "STREAMS_MAX", 1)
    exchange = Exchange(scene.app, "/v1/watch")
    await scene.gauge("watches", 1)
    assert (await get(scene.app, "/v1/watch")).status == 503
    exchange.disconnect()
    await exchange.task
    await scene.gauge("watches", 0)
    exchange = Exchange(scene.app, "/v1/watch")
    await scene.gauge("watches", 1)
    exchange.disconnect()
    await exchange.task


async def test_silent_stream_has_comments(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routes, "SILENCE_S", 0.01)
    response = await Exchange(scene.app, "/v1/watch").response()  # ends, since the daemon hangs
    assert response.body.endswith(b"}\n\n" + b":\n\n" * routes._SILENCES_MAX)
