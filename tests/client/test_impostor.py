"""Another, perhaps hostile, program may answer: the client checks every reply before using it."""

import asyncio
import contextlib
import copy
import json
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from typing import Any, cast

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import regd_client
from regd_client import connection as connection_module
from regd_client import protocol, registrar, registration, replies
from regd_client.blocking import BlockingConnection
from regd_client.client import Client
from regd_client.connection import Connection
from regd_client.errors import RegdError, Unavailable
from regd_client.protocol import Address
from regd_client.watches import WatchState
from tests.client.test_connection import Nowhere

INSTANCE: dict[str, Any] = {
    "name": "db",
    "instance": "1",
    "host": "127.0.0.1",
    "port": 5432,
    "meta": {"zone": "a"},
    "state": "ready",
    "rev": 7,
    "registered_at": 1_790_000_000.5,
    "hold": True,
    "pid": 12,
    "ttl": 10,
}
ENDPOINT: dict[str, Any] = {key: INSTANCE[key] for key in ("name", "instance", "host", "port")}
KNOWN: dict[str, Any] = {
    "instance": "1",
    "host": "127.0.0.1",
    "port": 5432,
    "state": "ready",
    "alive": True,
    "rev": 7,
    "since": 1_790_000_000.5,
    "owners": [
        {"connection": None, "pid": 12, "ttl": 10.5},
        {"connection": "127.0.0.1 port 1", "withdrawn": True},
    ],
    "more_owners": False,
    "probe": {"accepted": False, "age_s": 0.5, "why": "refused"},
}
HELLO: dict[str, Any] = {
    "server": "regd",
    "version": "1",
    "protocol": 1,
    "epoch": "e",
    "rev": 7,
    "features": ["hold"],
    "limits": {"line_bytes_max": 65_536},
    "host": {"boot": "b", "pid_namespace": "n"},
    "loop": "asyncio",
}
STATS: dict[str, Any] = {
    "version": "1",
    "pid": 5,
    "loop": "asyncio",
    "registry": "/r.json",
    "log": None,
    "started_at": 1_790_000_000.5,
    "uptime_s": 1.5,
    "epoch": "e",
    "rev": 7,
    "registrations": 1,
    "connections": 1,
    "watches": 0,
    "waiting": 0,
    "lag_s": 0.0,
    "slowest": {"what": "list", "took_s": 0.1, "age_s": 2},
    "requests": {"ping": 1},
    "errors": {},
    "limits": {"line_bytes_max": 65_536},
}
REFUSAL: dict[str, Any] = {
    "ok": False,
    "error": "conflict",
    "message": "held",
    "near": ["dc"],
    "field": "name",
    "last": {"reason": "replaced", "age_s": 1.5},
    "owner": {"pid": 1},
    "rev": 3,
}
CHANGE: dict[str, Any] = {
    **ENDPOINT,
    "rev": 7,
    "at": 1_790_000_000.5,
    "op": "down",
    "state": "ready",
    "priority": 10,
    "reason": "replaced",
    "by": {"pid": 12, "uid": 1_000, "command": "server"},
}
REPLIES: dict[str, dict[str, Any]] = {
    "ping": {"ok": True},
    "hello": {"ok": True, **HELLO},
    "register": {"ok": True, **ENDPOINT, "rev": 7, "replaced": True},
    "deregister": {"ok": True, "removed": 1, "rev": 8},
    "resolve": {"ok": True, **INSTANCE},
    "resolve all": {"ok": True, "rev": 7, "instances": [INSTANCE], "more": False},
    "list": {"ok": True, "epoch": "e", "rev": 7, "instances": [INSTANCE]},
    "update": {"ok": True, "rev": 8},
    "renew": {"ok": True, "ttl": 10},
    "why": {
        "ok": True,
        "name": "db",
        "instances": [KNOWN],
        "departures": [{"instance": "1", "reason": "replaced", "age_s": 0.5}],
    },
    "history": {"ok": True, "changes": [CHANGE], "next": 6},
    "stats": {"ok": True, **STATS},
    "watch": {"ok": True, "watch": 1, "epoch": "e", "rev": 7},
    "unwatch": {"ok": True},
}
EVENTS: list[dict[str, Any]] = [
    {"event": "up", "watch": 1, **INSTANCE},
    {"event": "change", "watch": 1, **INSTANCE},
    {"event": "down", "watch": 1, "name": "db", "instance": "1", "reason": "replaced", "rev": 8},
    {"event": "sync", "watch": 1, "rev": 9},
    {"event": "progress", "watch": 1, "rev": 9},
    {"event": "reset", "watch": 1, "rev": 9},
    {"event": "lost", "name": "db", "instance": "1", "reason": "replaced", "rev": 8},
]
# Sent as written here, since no JSON encoder would produce some of these lines.
JUNK = [
    "null", "true", "false", "0", "1", "-1", "1.5", "1e999", "NaN", "-Infinity", "9" * 30, "1" + "0" * 5_000,
    '""', '"$(touch pwned)"', '"127.0.0.1 X=1"', '"a\\nb"', '"\\ud800"', '"\\u0000"', '"' + "x" * 300 + '"',
    "[]", "[1]", '["\\ud800"]', "{}", '{"a":1}', '{"":{"":[null]}}', "[" * 300 + "]" * 300, '{"a":' * 300 + "1" + "}" * 300,
]  # fmt: skip


def paths(value: object, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if isinstance(value, dict | list):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield (*path, key)
            yield from paths(item, (*path, key))


MARK = "a mark that is replaced by what no encoder would make"


def put(
    fields: dict[str, Any], path: tuple[Any, ...], value: object = None, *, drop: bool = False
) -> dict[str, Any]:
    result = copy.deepcopy(fields)
    at: Any = result
    for key in path[:-1]:
        at = at[key]
    if drop:
        del at[path[-1]]
    else:
        at[path[-1]] = value
    return result


def spoilt(fields: dict[str, Any], junks: list[str] = JUNK) -> Iterator[str]:
    """Yield variants of a valid line: a part is missing or has another type or value; then invalid lines."""
    for path in [*paths(fields), ("unknown",)]:
        if path != ("unknown",):
            yield json.dumps(put(fields, path, drop=True))
        text = json.dumps(put(fields, path, MARK))
        for junk in junks:
            yield text.replace(f'"{MARK}"', junk)
    yield from ("", "{}", "[]", "null", "7", "HTTP/1.1 400 Bad Request", '{"ok":true', "[" * 100_000)
    yield from (json.dumps({"event": "up", **fields}), json.dumps({"ok": True}), json.dumps({"ok": 1}))
    yield from map(json.dumps, EVENTS)


def with_id(line: str, id: object) -> bytes:
    return line.replace("{", f'{{"id":{json.dumps(id)},', 1).replace(",}", "}").encode() + b"\n"


class Impostor:
    """A server that replies as regd does. But `says` maps commands to other lines to send."""

    def __init__(self) -> None:
        self.says: dict[str, str] = {}
        self.pages: Iterator[str] = iter(())  # consecutive replies to `list`
        self.address = ""
        self._transports: set[asyncio.WriteTransport] = set()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._transports.add(writer.transport)
        with contextlib.closing(writer.transport), contextlib.suppress(OSError):
            while line := await reader.readline():
                fields = json.loads(line)
                cmd = "resolve all" if fields.get("all") else fields["cmd"]
                page = next(self.pages, None) if cmd == "list" else None
                writer.write(with_id(page or self.says.get(cmd) or json.dumps(REPLIES[cmd]), fields["id"]))

    async def cut(self) -> None:
        """Close all connections.

        asyncio sets up an accepted connection in a separate task. If the server is closed before that, the
        connection is never closed (`_attach` fails).
        """
        for _ in range(5):
            await asyncio.sleep(0)
        for transport in self._transports:
            transport.abort()
        for _ in range(5):
            await asyncio.sleep(0)


@asynccontextmanager
async def impostor() -> AsyncIterator[Impostor]:
    impostor = Impostor()
    server = await asyncio.start_server(impostor.serve, "127.0.0.1", 0)
    async with server:
        impostor.address = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
        yield impostor
        await impostor.cut()


async def leave(client: Client) -> None:
    await (await client.register("db", 5432, instance="1")).deregister()


async def mirror(client: Client) -> None:
    async with client.mirror("db", timeout=0.001):
        pass


CALLS: dict[str, list[Callable[[Client], Awaitable[object]]]] = {
    "ping": [Client.ping],
    "hello": [Client.hello, leave],
    "register": [lambda client: client.register("db", 5432)],
    "deregister": [lambda client: client.deregister("db"), leave],
    "resolve": [lambda client: client.resolve("db"), lambda client: client.resolve("db", wait=0.01)],
    "resolve all": [lambda client: client.resolve_all("db")],
    "list": [lambda client: client.instances()],
    "update": [lambda client: client.update("db", {}), leave],
    "why": [lambda client: client.why("db")],
    "history": [lambda client: client.history("db", since=1)],
    "stats": [Client.stats],
    "watch": [mirror],
}


@pytest.mark.sample(8)
@pytest.mark.parametrize("cmd", CALLS)
@pytest.mark.parametrize("refusal", [False, True])
async def test_verb_raises_only_documented_errors(
    cmd: str, refusal: bool, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registration, "_WITHDRAW_S", 0.001)
    monkeypatch.setattr(registration, "_WITHDRAW_AWAY_S", 0.001)
    monkeypatch.setattr(registrar, "_CLOSE_S", 0.001)
    monkeypatch.setattr(connection_module, "HANGS_S", 0.02)  # for events, after which there is no reply
    monkeypatch.setattr(connection_module, "_RECHECK_S", 0.001)
    async with impostor() as other:
        for line in spoilt(REFUSAL if refusal else REPLIES[cmd], ["null", "[[]]", '"$(touch pwned)"']):
            other.says = {cmd: line}
            for call in CALLS[cmd]:
                client = Client(other.address)
                try:
                    await call(client)
                except RegdError as error:
                    assert str(error).isprintable(), line[:200]
                finally:
                    await client.close()
    assert not [record for record in caplog.records if record.exc_info], "a traceback"


@pytest.mark.sample(4)
@pytest.mark.parametrize("cmd", REPLIES)
@pytest.mark.parametrize("refusal", [False, True])
def test_blocking_connection_raises_only_documented_errors(
    cmd: str, refusal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`regctl` uses this class and relies on its checks."""
    cmd, *everything = cmd.split()
    arguments = {"all": True} if everything else {}
    valid = REFUSAL if refusal else REPLIES[" ".join([cmd, *everything])]
    for line in [json.dumps(valid), *spoilt(valid)]:
        ours, theirs = socket.socketpair()
        with ours, theirs:
            monkeypatch.setattr(BlockingConnection, "_connect", lambda self, timeout_s, ours=ours: ours)
            theirs.sendall(line.encode() + b"\n")
            theirs.shutdown(socket.SHUT_WR)
            with BlockingConnection() as connection:
                try:
                    reply = connection.ask(cmd, **arguments)
                except RegdError as error:
                    assert str(error).isprintable()
                else:
                    assert type(reply["ok"]) is bool
                    assert not reply["ok"] or replies.result_fault(cmd, arguments, reply) == ""
                    json.dumps(reply)


@pytest.mark.parametrize(
    ("member", "value"),
    [
        ("rev", -1), ("at", "now"), ("op", 7), ("name", "DB"), ("instance", None), ("host", ""), ("port", 0), ("state", "up"),
        ("priority", 65_536), ("reason", ["replaced"]), ("by", {"uid": "root"}),
    ],
)  # fmt: skip
def test_change_with_a_value_of_another_form(member: str, value: object) -> None:
    assert replies.result_fault("history", {}, REPLIES["history"]) == ""
    wrong = put(REPLIES["history"], ("changes", 0, member), value)
    assert replies.result_fault("history", {}, wrong) != ""


async def test_endless_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    """The client stops reading full pages at its limit of instances, and empty pages at its limit of pages."""
    monkeypatch.setattr(protocol, "INSTANCES_MAX", 5)
    monkeypatch.setattr(protocol, "PAGES_MAX", 9)
    async with impostor() as other, Client(other.address) as client:
        for instances, pages, most in ([INSTANCE], 6, 6), ([], 9, 9):
            page = {**REPLIES["list"], "instances": instances}
            other.pages = iter([json.dumps({**page, "next": f"n{n}/"}) for n in range(1, pages + 1)])
            with pytest.raises(Unavailable, match="without an end"):
                await client.instances()
            assert next(other.pages, None) is None
            other.pages = iter(
                [*(json.dumps({**page, "next": f"n{n}/"}) for n in range(1, most - 1)), json.dumps(page)]
            )
            assert len(await client.instances()) == len(instances) * (most - 1)


def test_endless_snapshot(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "INSTANCES_MAX", 5)
    follow = WatchState("*", None, lambda event: None)
    follow.begin(cast(Any, None))
    follow.take(REPLIES["watch"])
    for n in range(5):
        follow.take({**EVENTS[0], "name": f"n{n}"})
    follow.take({**EVENTS[0], "name": "n0"})
    with pytest.raises(Unavailable, match="more than 5"):
        follow.take({**EVENTS[0], "name": "n5"})


@pytest.mark.parametrize("event", EVENTS, ids=lambda event: event["event"])
async def test_event_raises_only_documented_errors(event: dict[str, Any]) -> None:
    for line in [json.dumps(event), *spoilt(event)]:
        connection = Connection(Address("h", 1), lambda connection, event: None)
        connection.connection_made(Nowhere())
        follow = WatchState("*", None, lambda event: None)
        connection.ask("watch", follow.begin(connection), follow.take)
        for data in (
            with_id(json.dumps(REPLIES["watch"]), 1),
            line.encode() + b"\n",
            json.dumps(event).encode() + b"\n",
        ):
            while data:
                room = connection.get_buffer(-1)
                piece, data = data[: len(room)], data[len(room) :]
                room[: len(piece)] = piece
                connection.buffer_updated(len(piece))
        for key, fields in follow.instances.items():
            assert (fields["name"], fields["instance"]) == key
            assert replies.is_host(fields["host"])
        connection.connection_lost(None)


BAD: dict[str, list[Any]] = {
    "name": ["", "Db", "d b", "a..b", "-a", "a-", "a/b", "a" * 64, ".".join(["a" * 63] * 4), "db\n", "d$b"],
    "instance": ["a b", "a/b", "a\n", "é", "x" * 64, "$(x)"],
    "host": [
        "", "127.0.0.1$(touch x)", "127.0.0.1 X=1", "a;b", "a\nb", "a\tb", "`x`", "'a'", '"a"', "a\0b", "é.example",
        "0.0.0.0", "::", "::ffff:0.0.0.0", "[::1]", "::1%", "::1%a b", "fe80::1%$(x)", "::g", "1.2.3", "1.2.3.256",
        "01.2.3.4", "1.2.3.4.5", "127.1", "0x7f000001", "a.0x", "a..b", ".a", "a.", "-a", "a-", "a" * 64, "a." * 127 + "a",
        "a/b", "a\\b", "a|b", "a&b", "a>b", "a*", "~", "a=b", "a:b", "\ud800",
    ],
    "port": [0, -1, 65_536, "5432", 5432.0, True, None],
    "meta": [None, [], {"v": 1}, {"v": None}, {"v": "\ud800"}, {str(n): "" for n in range(65)}, {"k": "x" * 4_096}],
    "state": ["", "READY", "gone", None, True, ["ready"]],
    "rev": [-1, True, "1", 1.0, None, 2**63],
}  # fmt: skip
GOOD: dict[str, list[Any]] = {
    "name": ["a", "_", "a-b_c.d0"],
    "instance": ["", "1", "A.b_c-d", "x" * 63],
    "host": ["127.0.0.1", "::1", "fe80::1%eth0", "::ffff:1.2.3.4", "localhost", "db.example", "a_b", "1a", "x" * 63, "255.255.255.255"],
    "port": [1, 65_535],
    "meta": [{}, {"": ""}, {"é\n": "'$(x)"}, {str(n): "" for n in range(64)}, {"k": "x" * 4_095}],
    "state": ["starting", "ready", "draining"],
    "rev": [0, 2**63 - 1],
}  # fmt: skip


@pytest.mark.parametrize("key", BAD)
def test_values_that_a_reply_may_have(key: str) -> None:
    lines: list[tuple[str, dict[str, Any]]] = [("resolve", {}), ("resolve", {"all": True}), ("list", {})]
    for value, valid in [*((value, True) for value in GOOD[key]), *((value, False) for value in BAD[key])]:
        fields = {**INSTANCE, key: value}
        many = {"ok": True, "epoch": "e", "rev": 7, "instances": [INSTANCE, fields]}
        for cmd, arguments in lines:
            reply = {"ok": True, **fields} if (cmd, arguments) == ("resolve", {}) else many
            assert (replies.result_fault(cmd, arguments, reply) == "") is valid, value
        assert (replies.fault({"event": "up", "watch": 1, **fields}) == "") is valid, value
        if key in ("name", "instance", "host", "port", "rev"):
            assert (replies.result_fault("register", {}, {**REPLIES["register"], key: value}) == "") is valid


@pytest.mark.parametrize("cmd", [*REPLIES])
def test_required_members_of_a_reply(cmd: str) -> None:
    """Only optional members may be missing."""
    optional = {
        "ok",
        "replaced",
        "more",
        "registered_at",
        "hold",
        "pid",
        "ttl",
        "registry",
        "log",
        "loop",
        "lag_s",
        "slowest",
        "next",
        "started_at",
    }
    if cmd in ("hello", "renew"):
        optional -= {"loop", "ttl"}
    word = cmd.removesuffix(" all")
    arguments = {"all": True} if cmd != word else {}
    assert replies.result_fault(word, arguments, REPLIES[cmd]) == ""
    for key in REPLIES[cmd]:
        fault = replies.result_fault(word, arguments, put(REPLIES[cmd], (key,), drop=True))
        assert (fault == "") is (key in optional), key


def test_reply_to_a_command_of_a_later_daemon() -> None:
    assert replies.result_fault("count", {"name": "db"}, {"ok": True, "count": 7}) == ""


async def test_reply_with_an_unknown_id() -> None:
    for id in (2, -1, 0, 10**40, "1", True, 1.5, None, [1], {"a": 1}, "x" * 65):
        connection = Connection(Address("h", 1), lambda connection, event: None)
        connection.connection_made(Nowhere())
        ping = connection.ask("ping", {})
        line = with_id('{"ok":true}', id)
        connection.get_buffer(-1)[: len(line)] = line
        connection.buffer_updated(len(line))
        assert isinstance(ping.exception(), Unavailable), id
        assert not connection.usable


def test_reply_about_another_instance() -> None:
    other = {**INSTANCE, "name": "docker"}
    request = {"name": INSTANCE["name"]}
    instance = INSTANCE["instance"]
    for cmd, arguments, reply in (
        ("resolve", {}, INSTANCE),
        ("resolve", {"instance": instance}, INSTANCE),
        ("resolve", {"all": True}, {"instances": [INSTANCE, INSTANCE], "rev": 1}),
        ("register", {"instance": instance}, INSTANCE),
    ):
        assert replies.result_fault(cmd, request | arguments, {"ok": True, **reply}) == ""
    for cmd, arguments, reply in (
        ("resolve", {}, other),
        ("resolve", {"instance": instance + "x"}, INSTANCE),
        ("resolve", {"all": True}, {"instances": [INSTANCE, other], "rev": 1}),
        ("register", {}, other),
    ):
        assert "instead of" in replies.result_fault(cmd, request | arguments, {"ok": True, **reply})


def test_pages_that_do_not_advance(monkeypatch: pytest.MonkeyPatch) -> None:
    page = {"ok": True, "epoch": "e", "rev": 1, "instances": []}
    for after, following, valid in (
        ("b", "b", False),
        ("b", "a", False),
        ("b/1", "b", False),
        ("b/1", "b/2", True),
        ("b", "c", True),
        (None, "a", True),
    ):
        fault = replies.result_fault("list", {"after": after}, {**page, "next": following})
        assert (fault == "") is valid


async def test_wait_fails_at_once_if_another_program_answers() -> None:
    async with impostor() as other, asyncio.timeout(30), Client(other.address) as client:
        other.says = {"resolve": '{"ok":true}'}
        with pytest.raises(Unavailable, match="not a regd reply") as raised:
            await client.resolve("db", wait=3_600)
    assert raised.value.code == protocol.NOT_REGD


async def test_text_of_another_program_is_escaped() -> None:
    async with impostor() as other, Client(other.address) as client:
        other.says = {"ping": '{"ok":false,"error":"busy","message":"\\u001b[2J\\nERROR a\\ud800"}'}
        with pytest.raises(RegdError) as raised:
            await client.ping()
    assert str(raised.value) == r"\x1b[2J\nERROR a\ud800"


async def test_unknown_members_of_a_newer_daemon() -> None:
    """Unknown events are ignored; unknown members are kept in results."""
    async with impostor() as other, Client(other.address) as client:
        other.says = {"hello": json.dumps({**REPLIES["hello"], "later": {"a": [1]}})}
        assert dict(await client.hello())["later"] == {"a": [1]}
    assert replies.fault({"event": "later", "what": [1]}) == ""


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text()
    | st.sampled_from(["ok", "db", "127.0.0.1"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)


@given(
    cmd=st.sampled_from(list(REPLIES)),
    change=st.dictionaries(
        st.sampled_from(
            [
                *INSTANCE,
                *STATS,
                *HELLO,
                "ok",
                "id",
                "event",
                "instances",
                "next",
                "near",
                "owner",
                "error",
                "message",
            ]
        ),
        JSON,
        max_size=3,
    ),
)
@settings(deadline=None, suppress_health_check=list(HealthCheck))
def test_any_reply_is_accepted_or_refused(cmd: str, change: dict[str, Any]) -> None:
    for valid in (REPLIES[cmd], REFUSAL, *EVENTS):
        fields = {**valid, **change}
        line = json.dumps(fields).encode()
        word = cmd.removesuffix(" all")
        try:
            reply = protocol.check_result(word, {"all": word != cmd}, protocol.decode_line(line))
        except Unavailable as error:
            assert str(error).isprintable()
            continue
        if reply["ok"] and word in ("resolve", "list", "register", "why"):
            for instance in reply["instances"] if "instances" in REPLIES[cmd] else [reply]:
                assert replies.is_host(instance["host"])
        if not reply["ok"]:
            assert str(regd_client.errors.from_reply(reply)).isprintable()
