"""The caches of requests and replies return the same as encoding and decoding without a cache."""

import asyncio
import json
from typing import Any

import pytest

import regd_client
from regd_client import protocol
from regd_client.client import Client
from tests.support.daemon import DaemonProcess

FIELDS = {"name": "a", "instance": "", "host": "h", "port": 1, "meta": {"k": "v"}, "state": "ready", "rev": 1}

SAID = b'"name":"a","instance":"","host":"h","port":1,"meta":{"k":"v"},"state":"ready","rev":%d}'


@pytest.mark.parametrize(
    "arguments",
    [
        {"name": "a"},
        {"name": ""},
        {"name": '%d "id":0 é\n%'},
        {"name": "a" * 254},
        {"name": 1},
        {"name": True},
        {"name": ["a"]},
        {"name": None},
        {"other": "a"},
        {"name": "a", "instance": "1"},
        {"name": "a", "meta": {"k": "v"}},
        {},
    ],
)
def test_cached_request_equals_the_encoded_request(arguments: dict[str, Any]) -> None:
    for id in (1, 2, 10**15):
        assert protocol.cached_request("resolve", id, arguments) == protocol.encode_request(
            "resolve", id, arguments
        )


@pytest.mark.parametrize("name", ["\ud800", "x" * 70_000, {1, 2}])
def test_request_that_cannot_be_encoded(name: object) -> None:
    for _ in range(2):
        with pytest.raises(regd_client.BadArgument):
            protocol.cached_request("resolve", 1, {"name": name})


@pytest.mark.parametrize("meta", [{}, {"k": 'v"},{'}, {"k": "é" * 200}])
def test_cached_reply_equals_the_decoded_reply(meta: dict[str, str]) -> None:
    for id in (1, 2, 10**15):
        line = json.dumps({"ok": True, "id": id, **FIELDS, "meta": meta}, separators=(",", ":")).encode()
        number, reply = protocol.split_reply(line)
        assert number == id
        assert {**protocol.cached_reply(reply), "id": id} == protocol.decode_line(line)


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b'{"event":"up"}',
        b'{"ok":true}',
        b'{"ok":true,"id":7}',
        b'{"ok":true,"id":"7","name":"a"}',
        b'{"ok":true,"id":-7,"name":"a"}',
        b'{"ok":true,"id":,"name":"a"}',
        b'{"ok":true,"id": 7,"name":"a"}',
        b'{"ok":true,"id":%s,"name":"a"}' % (b"7" * 5_000),
        b'{"ok":false,"id":7,"error":"not_found"}',
        b'{"id":7,"ok":true,"name":"a"}',
    ],
)
def test_other_replies_are_not_cached(line: bytes) -> None:
    assert protocol.split_reply(line) == (0, b"")


@pytest.mark.parametrize("said", [b"", b"}", b'"name":"a"', b'"event":"up"}', b"[]}", b"\xff}"])
def test_invalid_reply(said: bytes) -> None:
    with pytest.raises(regd_client.RegdError, match="not a regd reply"):
        protocol.cached_reply(said)


def test_caches_are_limited() -> None:
    for n in range(2 * protocol._CACHED_MAX):
        protocol.cached_request("resolve", 1, {"name": f"n{n}"})
        protocol.cached_reply(SAID % n)
    kept = [protocol._request_template.cache_info(), protocol._decode_cached.cache_info()]
    assert [cache.currsize for cache in kept] == [protocol._CACHED_MAX] * 2
    protocol.cached_request("resolve", 1, {"name": "x" * 300})
    protocol.cached_reply(SAID.replace(b'"v"', b'"' + b"v" * 1_024 + b'"') % 1)
    assert [protocol._request_template.cache_info(), protocol._decode_cached.cache_info()] == kept


@pytest.mark.socket
@pytest.mark.parametrize("said", [b'"id":1,{}', b'"id":1,"event":"up"}', b'"event":"up","id":1}', b'"name":"a"}'])
async def test_invalid_reply_is_unavailable(said: bytes) -> None:
    async def other(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readline()
        writer.write(b'{"ok":true,' + said + b"\n")
        writer.close()

    server = await asyncio.start_server(other, "127.0.0.1", 0)
    async with server, Client(f"127.0.0.1:{server.sockets[0].getsockname()[1]}") as client:
        with pytest.raises(regd_client.Unavailable):
            await client.resolve("a")


@pytest.mark.socket
async def test_endpoints_do_not_share_meta(process: DaemonProcess) -> None:
    async with Client(process.addresses[0]) as client:
        await client.register("a", 1, meta={"k": "v"})
        endpoints = [await client.resolve("a") for _ in range(2)]
        endpoints += await asyncio.gather(client.resolve("a"), client.resolve("a"))
        for endpoint in endpoints:
            assert endpoint.meta == {"k": "v"}
            endpoint.meta.clear()  # type: ignore[attr-defined]
        assert (await client.resolve("a")).meta == {"k": "v"}
        await client.update("a", {"k": "w"})
        assert (await client.resolve("a")).meta == {"k": "w"}
