"""Every verb of the client and every reply of the daemon, over a real connection."""

import asyncio
import os
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest

import regd_client
from regd_client.client import Client
from tests.support.daemon import WAIT_S
from tests.support.polling import until
from tests.support.registries import Registry, comparable, outcome

pytestmark = pytest.mark.socket


class WireEvents:
    """The events of a watch as the daemon sends them."""

    def __init__(self) -> None:
        self.events: list[dict[str, Any]] = []

    def add(self, message: dict[str, Any]) -> None:
        if "event" in message:
            self.events.append(message)

    async def begin(self, client: Client, **arguments: Any) -> dict[str, Any]:
        return await (await client._connect()).ask("watch", arguments, self.add)

    async def until(self, last: str) -> list[str]:
        """Wait for the event `last`, and return all events as text."""
        await until(lambda: self._texts()[-1:] == [last])
        return self._texts()

    def _texts(self) -> list[str]:
        return [
            " ".join(filter(None, (event["event"], event.get("name"), event.get("reason"), str(event["rev"]))))
            for event in self.events
        ]


@asynccontextmanager
async def watching(client: Client, pattern: str = "*") -> AsyncIterator[list[str]]:
    """Collect the events of a watch of the client as text."""
    events: list[str] = []

    async def listen() -> None:
        async for event in client.watch(pattern):
            events.append(f"{event.kind} {event.endpoint or ''} {event.state} {event.reason}".strip())  # noqa: PERF401

    task = asyncio.create_task(listen())
    try:
        yield events
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


# The verbs.


async def test_listed_instance_has_all_members(client: Client) -> None:
    await client.register("a", 1, host="example.org", instance="x", meta={"k": "ü"}, state="starting")
    await client.register("a", 2, static=True)
    static, own = await client.instances("a")
    assert comparable(own) == {
        "name": "a",
        "instance": "x",
        "host": "example.org",
        "port": 1,
        "meta": {"k": "ü"},
        "state": "starting",
        "rev": 1,
        "hold": True,
        "pid": os.getpid(),
    }
    assert own["registered_at"] > 1e9
    assert comparable(static) == {"name": "a", "instance": "", "host": "127.0.0.1", "port": 2, "meta": {}, "state": "ready", "rev": 2}  # fmt: skip


async def test_ping_hello_and_stats(client: Client) -> None:
    await client.ping()
    hello, stats = await client.hello(), await client.stats()
    assert (hello["server"], hello["protocol"], hello["rev"]) == ("regd", 1, 0)
    assert {"if", "force", "state", "hold", "pid", "ttl", "watch", "wait", "why", "history", "priority"} == {
        *hello["features"]
    }
    assert set(hello) == {"ok", "id", "server", "version", "protocol", "epoch", "rev", "features", "limits", "host", "loop"}  # fmt: skip
    assert hello["limits"]["reply_instances_max"] == stats["limits"]["reply_instances_max"] == 1_000
    assert {"ping": 1, "hello": 1}.items() <= stats["requests"].items()
    assert (stats["epoch"], stats["registrations"], stats["connections"]) == (hello["epoch"], 0, 1)
    assert (stats["watches"], stats["waiting"], stats["errors"]) == (0, 0, {})


ERRORS: list[tuple[str, dict[str, Any], str, dict[str, Any]]] = [
    ("nonsense", {}, "unknown_command", {"near": []}),
    ("registr", {"name": "a"}, "unknown_command", {"near": ["register"]}),
    ("register", {"name": "a"}, "bad_argument", {"field": "port"}),
    ("register", {"port": 1}, "bad_argument", {"field": "name"}),
    ("register", {"name": "a", "port": 1, "mta": {}}, "bad_argument", {"field": "mta", "near": ["meta"]}),
    ("ping", {"x": 1}, "bad_argument", {"field": "x", "near": []}),
    ("resolve", {"name": "nobody"}, "not_found", {"near": []}),
    ("resolve", {"name": "wrb"}, "not_found", {"near": ["web"]}),
    ("resolve", {"name": "web", "instance": "b"}, "not_found", {"near": []}),
    ("resolve", {"name": "web", "meta": {"k": "w"}}, "not_found", {"near": []}),
    ("resolve", {"name": "web", "meta": {"k": "w"}, "all": True}, "not_found", {"near": []}),
    ("resolve", {"name": "nobody", "wait": 0}, "timeout", {"near": []}),
    ("why", {"name": "nobody"}, "not_found", {"near": []}),
    ("why", {"name": "webb"}, "not_found", {"near": ["web"]}),
    ("update", {"name": "nobody", "state": "ready"}, "not_found", {"near": []}),
    ("update", {"name": "web"}, "bad_argument", {"field": "meta"}),
    ("update", {"name": "web", "state": "draining", "if": 7}, "conflict", {"rev": 1}),
    ("deregister", {"name": "web", "instance": "b"}, "not_found", {"near": []}),
    ("deregister", {"name": "web", "if": 0}, "conflict", {"rev": 1}),
    ("register", {"name": "web", "port": 80, "if": 0}, "conflict", {"rev": 1}),
    ("register", {"name": "nobody", "port": 80, "if": 1}, "conflict", {"rev": 0}),
    ("renew", {"name": "nobody"}, "not_found", {"near": []}),
    ("renew", {"name": "web"}, "bad_argument", {"field": "name"}),
    ("watch", {"since": 1}, "bad_argument", {"field": "epoch"}),
    ("watch", {"epoch": "e"}, "bad_argument", {"field": "since"}),
    ("unwatch", {"watch": 1}, "not_found", {}),
    ("unwatch", {}, "bad_argument", {"field": "watch"}),
]


@pytest.mark.parametrize(("cmd", "arguments", "code", "details"), ERRORS)
async def test_errors(
    client: Client, cmd: str, arguments: dict[str, Any], code: str, details: dict[str, Any]
) -> None:
    await client.register("web", 80, meta={"k": "v"}, static=True)
    _, *error = await outcome(client, cmd, **arguments)
    assert error == [code, details]
    await client.ping()  # the connection still works


VALUES: dict[str, tuple[list[Any], list[Any]]] = {  # valid values, invalid values
    "name": (
        ["a", "a.b", "_x-y_", "a" * 63, ".".join(["a" * 63] * 3 + ["b" * 61])],
        ["", "A", "a.", ".a", "a..b", "-a", "a-", "a" * 64, ".".join(["a" * 63] * 3 + ["b" * 62]), "a\n", "ä", "a/b", "a*", 1, ["a"]],
    ),
    "instance": (["", "A.b_-", "x" * 63], ["x" * 64, "a/b", "a b", "ü", 0, False]),
    "port": ([1, 65_535], [0, 65_536, -1, 1.0, "80", True]),
    "host": (
        ["127.0.0.1", "::1", "fe80::1%eth0", "localhost", "a_b.example", "1.example", "x" * 63],
        ["", "0.0.0.0", "::", "::ffff:0.0.0.0", "[::1]", "1.2.3", "0x7f", "a..b", "-a", "a b", "x" * 64, "a." * 127 + "a", "fe80::1%\n", 1],
    ),
    "meta": (
        [{}, {"": ""}, {str(n): "" for n in range(64)}, {"k": "v" * 4_095}, {"k": "ü" * 2_047}],
        [{str(n): "" for n in range(65)}, {"k": "v" * 4_096}, {"k": "ü" * 2_048}, {"k": 1}, {"k": {}}, [], "k"],
    ),
    "state": (["starting", "ready", "draining"], ["", "Ready", "up", "ready\n", 1]),
    "hold": ([True, False], [1, 0, "true"]),
    "force": ([True, False], [1, "yes"]),
    "ttl": ([1, 1.5, 86_400], [0, 0.99, 86_401, -1, "10", True]),
    "if": ([0], [-1, 2**63, 0.0, "0", True]),
    "pid": ([], [0, -1, 2**31, 1.0, "1", True]),
}  # fmt: skip


@pytest.mark.parametrize("field", VALUES)
async def test_valid_and_invalid_arguments(client: Client, field: str) -> None:
    good, bad = VALUES[field]
    for value in good:
        reply = await outcome(client, "register", **{"name": "a", "port": 1, "if": 0} | {field: value})
        assert (reply["ok"], reply.get(field, value)) == (True, value)
        key = {field: reply[field] for field in ("name", "instance")}
        [instance] = await client.instances(key["name"])
        assert instance.get(field, value) == value
        assert (await outcome(client, "deregister", **key))["removed"] == 1
    for value in bad:
        result = await outcome(client, "register", **{"name": "a", "port": 1} | {field: value})
        assert result == ("BadArgument", "bad_argument", {"field": field}), value
    assert await client.instances() == []


BAD: list[tuple[str, str, Any]] = [
    ("resolve", "all", 1),
    ("resolve", "wait", -1),
    ("resolve", "wait", 3_601),
    ("list", "name", "a*b"),
    ("list", "name", "A*"),
    ("list", "limit", 0),
    ("list", "limit", 1_001),
    ("list", "after", "A"),
    ("list", "after", ["a", ""]),
    ("watch", "name", ""),
    ("watch", "since", -1),
    ("watch", "epoch", ""),
    ("watch", "epoch", "e" * 65),
    ("unwatch", "watch", 0),
    ("renew", "ttl", 0.5),
]


@pytest.mark.parametrize(("cmd", "field", "value"), BAD)
async def test_other_invalid_arguments(client: Client, cmd: str, field: str, value: Any) -> None:
    assert await outcome(client, cmd, **{field: value}) == ("BadArgument", "bad_argument", {"field": field})


@pytest.mark.parametrize(
    ("call", "error", "builtin"),
    [
        (lambda client: client.resolve("nobody"), regd_client.NotFound, LookupError),
        (lambda client: client.resolve("nobody", wait=0), regd_client.Timeout, TimeoutError),
        (lambda client: client.register("NO", 1), regd_client.BadArgument, ValueError),
        (lambda client: client.register("a", 1, static=True, pid=1), regd_client.BadArgument, ValueError),
        (lambda client: client.update("a", {"k": "v" * 70_000}), regd_client.BadArgument, ValueError),
    ],
)
async def test_errors_are_also_builtin(
    client: Client, call: Callable[[Client], Awaitable[object]], error: type[Exception], builtin: type[Exception]
) -> None:
    with pytest.raises(error) as raised:
        await call(client)
    assert isinstance(raised.value, builtin)


async def test_departures_are_reported(client: Client) -> None:
    await client.register("web", 1, static=True)
    await client.deregister("web")
    with pytest.raises(regd_client.NotFound) as raised:
        await client.resolve("web")
    last = raised.value.details["last"]
    assert (last["reason"], raised.value.details["near"], last["age_s"] >= 0) == ("deregistered", [], True)
    with pytest.raises(regd_client.Timeout) as late:
        await client.resolve("web", wait=0)
    assert late.value.details["last"]["reason"] == "deregistered"
    with pytest.raises(regd_client.NotFound) as gone:
        await client.update("web", {})
    assert gone.value.details["last"]["reason"] == "deregistered"
    for port in range(1, 12):
        await client.register("web", port, static=True)
    known = await client.why("web")
    assert [departure["reason"] for departure in known["departures"]] == ["replaced"] * 8
    assert [instance["port"] for instance in known["instances"]] == [11]


async def test_list_in_pages(client: Client) -> None:
    for name, instance in (("a", ""), ("a", "2"), ("a", "10"), ("a-b", ""), ("ab", "x"), ("b", "")):
        await client.register(name, 1, instance=instance, static=True, meta={"k": name})
    pages: list[list[str]] = []
    after: dict[str, str] = {}
    while True:
        reply = await outcome(client, "list", name="a*", limit=2, **after)
        pages.append([f"{instance['name']}/{instance['instance']}" for instance in reply["instances"]])
        assert reply["rev"] == 6
        if "next" not in reply:
            break
        after = {"after": reply["next"]}
    assert pages == [["a/", "a/10"], ["a/2", "a-b/"], ["ab/x"]]
    assert len(await client.instances("a")) == 3
    assert len(await client.instances("*", meta={"k": "b"})) == 1
    assert (await outcome(client, "list", after="b"))["instances"] == []


async def test_result_larger_than_a_reply(client: Client) -> None:
    meta = {"k": "v" * 4_000}
    await asyncio.gather(*(client.register("a", 1, instance=str(n), meta=meta, static=True) for n in range(400)))
    reply = await outcome(client, "resolve", name="a", all=True)
    assert reply["more"]
    assert len(reply["instances"]) < 300
    assert len(await client.resolve_all("a")) == len(await client.instances("a")) == 400


# Round robin, filters, updates.


async def test_round_robin(client: Client) -> None:
    for n, zone in enumerate("abab"):
        await client.register("w", 1 + n, instance=f"i{n}", meta={"zone": zone})

    async def ports(count: int, **more: Any) -> list[int]:
        return [(await client.resolve("w", **more)).port for _ in range(count)]

    assert await ports(5) == [1, 2, 3, 4, 1]
    assert await ports(3, meta={"zone": "b"}) == [2, 4, 2]
    assert await ports(2, instance="i3") == [4, 4]
    await client.update("w", state="draining", instance="i0")
    assert await ports(4) == [2, 3, 4, 2]
    assert await ports(3, meta={"zone": "a"}) == [3, 3, 3]
    await client.deregister("w", "i2")
    assert await ports(3) == [4, 2, 4]
    assert [endpoint.port for endpoint in await client.resolve_all("w")] == [2, 4]
    await client.register("x", 1, instance="b")
    await client.resolve("x")  # a single instance does not advance the round robin
    for instance in ("a", "c"):
        await client.register("x", 1, instance=instance)
    assert (await client.resolve("x")).instance == "a"
    assert [endpoint.port for endpoint in await client.resolve_all("w", meta={"zone": "b"})] == [2, 4]


async def test_updates(client: Client) -> None:
    registration = await client.register("a", 1, meta={"k": "1"}, state="starting")
    with pytest.raises(regd_client.NotFound):
        await client.resolve("a")
    await registration.update(state="ready")
    await registration.update({"z": "2"})
    assert (await client.resolve("a")).meta == registration.endpoint.meta == {"z": "2"}
    assert [instance["rev"] for instance in await client.instances()] == [3]
    await registration.update({"z": "2"}, state="ready")  # setting the same values is not a change
    assert [instance["rev"] for instance in await client.instances()] == [3]
    await client.update("a", {}, state="draining")
    assert comparable(await client.instances())[0] | {"rev": 4, "meta": {}, "state": "draining"} == comparable(await client.instances())[0]  # fmt: skip
    await registration.deregister()
    with pytest.raises(regd_client.NotFound):
        await registration.update({})


# Watches.


async def test_watch_events(client: Client, other: Client) -> None:
    await client.register("a", 1, static=True)
    await client.register("b", 1, static=True)
    every, zone = WireEvents(), WireEvents()
    reply = await every.begin(client)
    assert {"watch": 1, "rev": 2}.items() <= reply.items()
    assert (await zone.begin(client, name="a*", meta={"zone": "a"}))["watch"] == 2
    assert await every.until("sync 2") == ["up a 1", "up b 2", "sync 2"]
    assert every.events[0]["meta"] == {}
    async with other.register("ab", 2, meta={"zone": "a"}):
        await other.update("ab", {"zone": "b"})
        await other.update("ab", {"zone": "a"})
        await other.register("a", 3, meta={"zone": "b"}, static=True)
    await other.register("b", 4, static=True, meta={"zone": "a"})
    assert (await every.until("up b 11"))[3:] == [
        "up ab 3",
        "change ab 4",
        "change ab 5",
        "down a replaced 6",
        "up a 7",
        "change ab 8",
        "down ab deregistered 9",
        "down b replaced 10",
        "up b 11",
    ]
    assert await zone.until("down ab deregistered 9") == [
        "sync 2",
        "up ab 3",
        "down ab filtered 4",
        "up ab 5",
        "change ab 8",
        "down ab deregistered 9",
    ]
    assert comparable(zone.events[1]) == {
        "event": "up",
        "watch": 2,
        "name": "ab",
        "instance": "",
        "host": "127.0.0.1",
        "port": 2,
        "meta": {"zone": "a"},
        "state": "ready",
        "rev": 3,
        "hold": True,
        "pid": os.getpid(),
    }
    assert zone.events[2] == {"event": "down", "watch": 2, "name": "ab", "instance": "", "reason": "filtered", "rev": 4}  # fmt: skip
    await (await client._connect()).ask("unwatch", {"watch": 2})
    await client.deregister("a")
    assert (await every.until("down a deregistered 12"))[-1]
    assert len(zone.events) == 6


async def test_watch_resumes_from_a_revision(client: Client) -> None:
    epoch = (await client.hello())["epoch"]
    for port in (1, 2, 3):
        await client.register("a", port, static=True)
    later, now, unknown, ahead = WireEvents(), WireEvents(), WireEvents(), WireEvents()
    await later.begin(client, epoch=epoch, since=2)
    assert await later.until("progress 5") == ["up a 3", "down a replaced 4", "up a 5", "progress 5"]
    await now.begin(client, name="b", epoch=epoch, since=5)
    assert await now.until("progress 5") == ["progress 5"]
    await unknown.begin(client, epoch="another", since=5)
    assert await unknown.until("sync 5") == ["reset 5", "up a 5", "sync 5"]
    await ahead.begin(client, epoch=epoch, since=6)
    assert await ahead.until("sync 5") == ["reset 5", "up a 5", "sync 5"]


async def test_events_of_the_client(client: Client, other: Client) -> None:
    await client.register("a", 1, static=True)
    async with watching(client) as events:
        await until(lambda: "sync" in events)
        async with other.register("b", 2):
            pass
        await other.register("a", 3, static=True)
        await until(lambda: len(events) == 7)
    assert events == [
        "up 127.0.0.1:1 ready",
        "sync",
        "up 127.0.0.1:2 ready",
        "change 127.0.0.1:2 draining",
        "down 127.0.0.1:2 draining deregistered",
        "down 127.0.0.1:1 ready replaced",
        "up 127.0.0.1:3 ready",
    ]


async def test_mirror(registry: Registry, client: Client, other: Client) -> None:
    await other.register("w", 1, instance="1", meta={"zone": "a"})
    async with client.mirror("w*") as mirror:
        assert (mirror.resolve("w").port, mirror.live, mirror.stale_s) == (1, True, 0.0)
        await other.register("w", 2, instance="2", meta={"zone": "b"})
        await until(lambda: len(mirror.resolve_all("w")) == 2)
        assert [mirror.resolve("w").port for _ in range(4)] in ([1, 2, 1, 2], [2, 1, 2, 1])
        assert [mirror.resolve("w", meta={"zone": "b"}).port for _ in range(2)] == [2, 2]
        assert [str(endpoint) for endpoint in mirror.resolve_all("w")] == ["127.0.0.1:1", "127.0.0.1:2"]
        async with registry.away():
            await until(lambda: not mirror.live)
            assert mirror.resolve("w").stale_s > 0
        await until(lambda: mirror.live)
        assert len(mirror.resolve_all("w")) == 2
        await other.update("w", state="draining", instance="2")
        await until(lambda: [endpoint.port for endpoint in mirror.resolve_all("w")] == [1])
        with pytest.raises(regd_client.NotFound):
            mirror.resolve("x")
        await other.deregister("w", "1")
        await until(lambda: not mirror.resolve_all("w"))
        with pytest.raises(regd_client.NotFound):
            mirror.resolve("w")


async def test_mirror_iteration_and_changed(client: Client, other: Client) -> None:
    async with client.mirror("w*") as mirror:
        assert (list(mirror), mirror.changes) == ([], 0)
        waiting = asyncio.create_task(mirror.changed())
        await asyncio.sleep(0)
        await other.register("w2", 2)
        await other.register("w1", 1)
        assert await waiting >= 1
        while mirror.changes < 2:
            await mirror.changed(mirror.changes)
        assert [(endpoint.name, endpoint.address, endpoint.url()) for endpoint in mirror] == [
            ("w1", ("127.0.0.1", 1), "http://127.0.0.1:1"),
            ("w2", ("127.0.0.1", 2), "http://127.0.0.1:2"),
        ]
        assert await mirror.changed(0) == 2  # returns at once: changed since 0
        await other.register("w3", 3, state="starting")  # not ready, so not a change of the mirror
        with pytest.raises(regd_client.Timeout):
            await mirror.changed(timeout=0.05)
        ended = asyncio.create_task(mirror.changed())
        await asyncio.sleep(0)
        await client.close()
        with pytest.raises(regd_client.Unavailable):
            await ended


async def test_resolve_all_without_instances_is_empty(client: Client) -> None:
    assert await client.resolve_all("nobody") == []
    async with client.mirror("*") as mirror:
        assert mirror.resolve_all("nobody") == []


async def test_reprs(client: Client) -> None:
    registration = await client.register("web", 1, instance="a")
    listening = await regd_client.listen("db", drain_s=0)
    async with client.mirror("web") as mirror:
        assert repr(registration) == "<Registration web/a at 127.0.0.1:1, registered>"
        assert repr(mirror) == "<Mirror 'web' 1 ready, live>"
        assert repr(listening) == f"<RegisteredSocket db at 127.0.0.1:{listening.port}, listening>"
        assert repr(client).endswith(", connected>")
        assert repr(regd_client.lifespan("web", 1)) == "<lifespan('web', 1)>"
    await listening.close()
    await registration.deregister()
    assert repr(registration) == "<Registration web/a at 127.0.0.1:1, deregistered>"


def test_url_escapes_the_scope_of_an_ipv6_address() -> None:
    endpoint = regd_client.Endpoint("a", "", "fe80::1%eth0", 1, {})
    assert (str(endpoint), endpoint.url("ws")) == ("[fe80::1%eth0]:1", "ws://[fe80::1%25eth0]:1")


# Waiting.


async def test_wait_ends_when_an_instance_is_ready(client: Client, other: Client) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
        waiting = asyncio.create_task(client.resolve("web", wait=WAIT_S, meta={"k": "v"}))
        late = await outcome(
            client, "resolve", name="web", meta={"k": "w"}, wait=0
        )  # not delayed by the other wait
        assert late == ("Timeout", "timeout", {"near": []})
        await other.register("web", port, instance="no")
        registration = await other.register("web", port, meta={"k": "v"}, state="starting")
        assert not waiting.done()
        await registration.update(state="ready")
        assert (await waiting).port == port
        assert (await client.resolve("web", wait=0)).port == port
        reply = await outcome(client, "resolve", name="web", wait=WAIT_S, all=True)
        assert [instance["instance"] for instance in reply["instances"]] == ["", "no"]
        assert (await client.resolve("web")).instance == ""  # `all` has advanced the round robin


async def test_wait_continues_after_a_restart(registry: Registry, client: Client, other: Client) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        waiting = asyncio.create_task(client.resolve("web", wait=WAIT_S))
        await until(lambda: client._connector.usable)
        async with registry.away():
            pass
        await regd_client.register("web", listening.getsockname()[1], static=True)
        assert (await waiting).name == "web"


async def test_cancelled_wait_does_not_affect_others(client: Client) -> None:
    waiting = asyncio.create_task(client.resolve("web", wait=WAIT_S))
    await client.ping()
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    await client.register("web", 1)
    assert (await client.resolve("web")).port == 1


# Several owners of one name.


async def test_conflict_names_the_owner(client: Client, other: Client) -> None:
    await client.register("a", 1)
    other_process = await outcome(other, "register", name="a", port=2, hold=True)
    assert other_process == (
        "Conflict",
        "conflict",
        {"owner": {"pid": os.getpid(), "connection": True}, "rev": 1},
    )
    assert (await outcome(other, "register", name="a", port=2))[1] == "conflict"
    # The owner is this process.
    assert (await outcome(other, "register", name="a", port=2, hold=True, pid=os.getpid()))["replaced"]
    assert (await client.resolve("a")).port == 2


async def test_static_entry_is_replaced(client: Client, other: Client) -> None:
    await client.register("a", 1, static=True)
    assert (await outcome(other, "register", name="a", port=2, static=None)) == {"ok": True, "name": "a", "instance": "", "host": "127.0.0.1", "port": 2, "rev": 3, "replaced": True}  # fmt: skip
    registration = await other.register("a", 2)  # the static entry is held from now on
    assert comparable((await client.why("a"))["instances"][0]["owners"]) == [
        {"connection": True, "pid": os.getpid()}
    ]
    await client.register("a", 2, static=True)
    assert (await client.why("a"))["instances"][0]["owners"] == [{"static": True}]
    await registration.deregister()
    assert await client.instances() == []


async def test_lost_name_is_reported(client: Client, other: Client) -> None:
    first = await client.register("a", 1)
    await outcome(other, "register", name="a", port=2, hold=True, force=True)
    async with asyncio.timeout(WAIT_S):
        await first.lost.wait()
    assert first.lost_reason == "replaced"
    with pytest.raises(regd_client.Conflict):
        await client.register("a", 1)
    with pytest.raises(regd_client.NotFound):
        await first.update({})
    await first.deregister()
    assert (await client.resolve("a")).port == 2
    second = await client.register("b", 1)
    await other.deregister("b")
    async with asyncio.timeout(WAIT_S):
        await second.lost.wait()
    assert second.lost_reason == "deregistered"


async def test_several_holders_of_one_address(client: Client, other: Client) -> None:
    events = WireEvents()
    await events.begin(client)
    first = await client.register("a", 1)
    second = await other.register("a", 1, meta={"k": "v"})
    [known] = (await client.why("a"))["instances"]
    assert len(known["owners"]) == 2
    await first.deregister()  # removes one of two holders
    assert (await client.resolve("a")).meta == {"k": "v"}
    assert not second.lost.is_set()
    await client.register("a", 1, meta={"k": "v"})
    await outcome(client, "update", name="a", state="draining")  # withdraws this connection's holder
    assert sorted("withdrawn" in owner for owner in (await client.why("a"))["instances"][0]["owners"]) == [
        False,
        True,
    ]
    assert (await client.resolve("a")).port == 1
    await second.deregister()
    with pytest.raises(regd_client.NotFound):
        await client.resolve("a")
    assert await events.until("down a deregistered 4") == ["sync 0", "up a 1", "change a 2", "change a 3", "down a deregistered 4"]  # fmt: skip


async def test_withdrawn_holder_no_longer_keeps_the_entry(registry: Registry, client: Client) -> None:
    events = WireEvents()
    await events.begin(client)
    held = {"port": 1, "hold": True}
    await outcome(client, "register", name="a", **held)
    async with Client() as short:
        for name in ("a", "b"):
            await outcome(short, "register", name=name, **held)
        await outcome(client, "register", name="b", **held)
        await outcome(client, "update", name="a", state="draining")
    assert await events.until("down a connection closed 3") == [
        "sync 0",
        "up a 1",
        "up b 2",
        "down a connection closed 3",
    ]
    async with Client() as second:
        await outcome(second, "register", name="b", **held)
        await outcome(client, "update", name="b", state="draining")
        async with registry.away():
            pass
    async with Client() as fresh:
        assert comparable((await fresh.why("b"))["instances"][0]["owners"]) == [{"connection": False}]


async def test_entries_held_by_a_connection_end_with_it(registry: Registry, client: Client) -> None:
    events = WireEvents()
    await events.begin(client)
    async with Client() as short:
        await short.register("a", 1)
        await short.register("b", 2, static=True)
        await outcome(short, "register", name="c", port=3, pid=os.getpid())
        await outcome(short, "register", name="d", port=4, ttl=10)
    assert (await events.until("down a connection closed 5"))[-1]
    assert [instance["name"] for instance in await client.instances()] == ["b", "c", "d"]


async def test_registration_for_another_process(registry: Registry, client: Client) -> None:
    async with Client() as short:
        await short.register("a", 1, pid=os.getpid())
    assert (await client.why("a"))["instances"][0]["owners"] == [{"pid": os.getpid()}]
    await client.deregister("a")


async def test_leases(client: Client, other: Client) -> None:
    await outcome(client, "register", name="a", port=1, ttl=10)
    assert (await client.instances())[0]["ttl"] == 10
    assert await outcome(other, "renew", name="a") == {"ok": True, "ttl": 10}
    assert await outcome(other, "renew", name="a", ttl=2.5) == {"ok": True, "ttl": 2.5}
    await outcome(client, "register", name="a", port=1, ttl=20, hold=True)
    assert await outcome(client, "renew", name="a") == {"ok": True, "ttl": 20}


# Broken connections and restarts.


async def test_registration_returns_after_a_cut(registry: Registry, client: Client) -> None:
    registration = await client.register("a", 1, meta={"k": "1"})
    await registration.update({"k": "2"}, state="draining")
    async with Client() as watcher, watching(watcher) as events:
        await until(lambda: events[-1:] == ["sync"])
        registry.cut()
        await registration.update(state="ready")  # waits until it is registered again
        assert (await regd_client.resolve("a")).meta == {"k": "2"}
    assert not registration.lost.is_set()
    await registration.deregister()
    assert await client.instances() == []


async def test_registration_survives_a_restart(registry: Registry, client: Client) -> None:
    hello = await client.hello()
    registration = await client.register("a", 1, meta={"k": "v"})
    await client.register("b", 2, static=True)
    held = registration._connection
    async with watching(client) as events:
        await until(lambda: events[-1:] == ["sync"])
        async with registry.away():
            pass
        async with registry.client() as fresh:
            # The entries are listed before they are claimed.
            assert [instance["name"] for instance in await fresh.instances()] == ["a", "b"]
            assert (await fresh.resolve("a")).port == 1
            new_hello = await fresh.hello()
            assert (new_hello["rev"], new_hello["epoch"] == hello["epoch"]) == (2, False)
            await until(lambda: registration._connection is not held)
            assert (await fresh.hello())["rev"] == 2  # a claim is not a change
            assert len((await fresh.why("a"))["instances"][0]["owners"]) == 1
            await fresh.register("c", 3, static=True)
            await until(lambda: len(events) == 4)
    assert events == ["up 127.0.0.1:1 ready", "up 127.0.0.1:2 ready", "sync", "up 127.0.0.1:3 ready"]
    assert not registration.lost.is_set()
    await registration.deregister()


async def test_calls_fail_while_the_daemon_is_away(registry: Registry, client: Client) -> None:
    await client.ping()
    async with registry.away():
        client._connector.timeout_s = 0
        for _ in range(2):
            with pytest.raises(regd_client.Unavailable) as raised:
                await client.ping()
            assert isinstance(raised.value, ConnectionError)
        with pytest.raises(regd_client.Unavailable):
            await client.resolve("a", wait=0)
    client._connector.timeout_s = WAIT_S
    await client.ping()


async def test_name_taken_during_a_restart_is_lost(registry: Registry) -> None:
    async with registry.client() as client:
        registration = await client.register("a", 1)
        client._registrar.stop()  # so that it registers again after the other client
        async with registry.away():
            pass
        async with Client() as other:
            await outcome(other, "register", name="a", port=2, hold=True, force=True)  # the owner's process lives
            client._registrar._update_task()
            async with asyncio.timeout(WAIT_S):
                await registration.lost.wait()
            assert (await other.resolve("a")).port == 2


async def test_request_in_progress_fails_with_the_connection(registry: Registry, client: Client) -> None:
    waiting = asyncio.ensure_future((await client._connect()).ask("resolve", {"name": "a", "wait": WAIT_S}))
    await client.ping()
    registry.cut()
    with pytest.raises(regd_client.Unavailable):
        await waiting


# Sockets.


async def test_listen_and_serving(client: Client) -> None:
    async with regd_client.listen("l", meta={"k": "v"}) as listening:
        endpoint = await client.resolve("l", wait=WAIT_S)
        assert (endpoint.port, endpoint.meta) == (listening.port, {"k": "v"})

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.close()

    async with regd_client.lifespan("s", drain_s=0):
        server = await asyncio.start_server(answer, "127.0.0.1", 0)
        async with server:
            assert (await client.resolve("s", wait=WAIT_S)).port == server.sockets[0].getsockname()[1]
    assert await client.instances() == []
