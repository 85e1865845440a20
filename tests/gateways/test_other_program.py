"""Another program at the daemon's address: every request gets a response, but never status 500."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as some

from regd.gateways.daemon_connections import DaemonClient
from regd.gateways.readers import Readers
from regd.gateways.routes import Gateway
from regd_client.protocol import parse_address
from tests.gateways.asgi import Response, get
from tests.support.length import examples

pytestmark = pytest.mark.socket
PATHS = ["/v1/list", "/v1/resolve?name=a&wait=1", "/v1/watch", "/v1/watch?epoch=a&since=1", "/healthz", "/metrics",
         "/v1/prometheus/targets?all=true", "/v1/traefik", "/v1/stats"]  # fmt: skip
INSTANCE = {"name": "a", "instance": "", "host": "::1", "port": 1, "meta": {}, "state": "ready", "rev": 1}
REPLIES: list[dict[str, Any]] = [
    {"ok": True, **INSTANCE},
    {"ok": True, "epoch": "5eed", "rev": 1, "instances": [INSTANCE]},
    {"ok": True, "watch": 1, "epoch": "5eed", "rev": 1},
    {
        "ok": True,
        "version": "1",
        "loop": "asyncio",
        "requests": {"ping": 1},
        "errors": {},
        "rev": 1,
        "lag_s": 0.1,
    },
    {"ok": False, "error": "not_found", "message": "no a"},
    {"ok": False, "error": "busy"},
    {"ok": False, "error": ["busy"], "message": 1},
]
odd: some.SearchStrategy[Any] = some.sampled_from(
    [None, True, -1, 0, 1e999, 2**70, "", "a\r\nb", "\ud800", "🦀", [], {}, [[]], {"a": 1}, [INSTANCE]]
)


@some.composite
def replies(draw: some.DrawFn) -> bytes:
    """Return lines of a daemon with a member changed or missing, or cut short, or any other bytes."""
    fields = dict(draw(some.sampled_from(REPLIES)))
    match draw(some.integers(0, 5)):
        case 0:
            return draw(some.binary(max_size=40))
        case 1:
            del fields[draw(some.sampled_from(sorted(fields)))]
        case 2 | 3:
            fields[draw(some.sampled_from(sorted(fields)))] = draw(odd)
        case 4 if fields.get("instances"):
            fields["instances"] = [INSTANCE | {draw(some.sampled_from(sorted(INSTANCE))): draw(odd)}]
    line = json.dumps(fields, separators=(",", ":")).encode()
    return line[: draw(some.integers(0, len(line)))] if draw(some.integers(0, 5)) == 0 else line


@contextlib.asynccontextmanager
async def gateway_beside(reply: bytes) -> AsyncIterator[Gateway]:
    """Run the gateway with another program as its daemon, which answers with `reply` and two invalid events."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            await reader.readline()
            writer.write(reply + b"\n" + reply + b"\n")
            writer.write_eof()
            await reader.read()
        writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        daemon = DaemonClient(parse_address(f"127.0.0.1:{server.sockets[0].getsockname()[1]}"))
        try:
            yield Gateway(daemon, Readers(restricted=False))
        finally:
            daemon.close()


async def ask(reply: bytes, path: str, **headers: str) -> Response:
    async with gateway_beside(reply) as app:
        return await get(app, path, **headers)


@given(replies(), some.sampled_from([*PATHS, "/x"]))
@settings(max_examples=examples(400), deadline=None)
def test_any_reply_gives_an_answer(reply: bytes, path: str) -> None:
    headers = {"host": "a.localhost"} if path == "/x" else {}
    response = asyncio.run(ask(reply, path, **headers))
    assert response.status in (200, 307, 400, 403, 404, 502, 503, 504)
    assert all(value.isprintable() for value in response.headers.values())


@pytest.mark.parametrize(
    "reply", [b'{"ok":true}', b'{"ok":true,"epoch":"a\\nid: 1","watch":1,"rev":1}', b'{"ok":true']
)
@pytest.mark.parametrize("path", ["/v1/watch", "/v1/prometheus/targets", "/v1/traefik"])
async def test_reply_without_a_required_member_is_unavailable(reply: bytes, path: str) -> None:
    response = await ask(reply, path)
    assert (response.status, json.loads(response.body)["error"]) == (503, "unavailable")


async def test_refusal_without_a_message(caplog: pytest.LogCaptureFixture) -> None:
    reply = b'{"ok":false,"error":"busy"}'
    assert (await ask(reply, "/healthz")).status == 503
    assert (await ask(reply, "/x", host="a.localhost")).status == 503
