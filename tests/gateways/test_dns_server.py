"""The DNS server on real sockets: UDP, TCP, its limits, and the cache of answers."""

import asyncio
import contextlib
import random
import socket
import struct
from collections.abc import AsyncIterator
from typing import Any

import dns.asyncquery
import dns.flags
import dns.message
import dns.rcode
import pytest

from regd.gateways import dns_server
from regd.gateways.dns_server import AnswerCache, DnsServer
from regd.gateways.listeners import bind_loopback
from regd.gateways.name_index import NameIndex
from regd.gateways.readers import Readers
from tests.gateways.instances import index_of, instance
from tests.support.daemon import WAIT_S
from tests.support.polling import until

QUERY = dns.message.make_query("web.regd.internal", "A")
HOSTS = ["127.0.0.1", "::1"]


@contextlib.asynccontextmanager
async def serving(index: NameIndex | None) -> AsyncIterator[int]:
    sockets = bind_loopback(0, (socket.SOCK_DGRAM, socket.SOCK_STREAM), "--dns")
    server = DnsServer(AnswerCache(lambda: index), Readers(restricted=False))
    await server.start(sockets)
    try:
        yield sockets[0].getsockname()[1]
    finally:
        await server.close()


@pytest.fixture
async def port() -> AsyncIterator[int]:
    index = index_of(*(instance(key=str(number), port=5_061 + number) for number in range(100)))
    async with serving(index) as port:
        yield port


async def connect(port: int) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    return await asyncio.open_connection("127.0.0.1", port)


async def read_message(reader: asyncio.StreamReader) -> dns.message.Message:
    async with asyncio.timeout(WAIT_S):
        (length,) = struct.unpack("!H", await reader.readexactly(2))
        return dns.message.from_wire(await reader.readexactly(length))


async def test_udp_and_tcp(port: int) -> None:
    for query in (dns.asyncquery.udp, dns.asyncquery.tcp):
        response = await query(QUERY, "127.0.0.1", port=port, timeout=WAIT_S)
        assert [rrset.to_text() for rrset in response.answer] == ["web.regd.internal. 0 IN A 127.0.0.1"]


async def test_large_answer_comes_by_tcp(port: int) -> None:
    query = dns.message.make_query("web.regd.internal", "SRV")
    response, by_tcp = await dns.asyncquery.udp_with_fallback(query, "127.0.0.1", port=port, timeout=WAIT_S)
    assert by_tcp
    assert len(response.answer[0]) == 100


async def test_without_a_state_servfail() -> None:
    async with serving(None) as port:
        response = await dns.asyncquery.udp(QUERY, "127.0.0.1", port=port, timeout=WAIT_S)
    assert response.rcode() == dns.rcode.SERVFAIL


async def test_pipelined_queries_are_answered_in_order(port: int) -> None:
    reader, writer = await connect(port)
    for number in range(1_000):
        wire = dns.message.make_query("web.regd.internal", "A", id=number).to_wire()
        writer.write(struct.pack("!H", len(wire)) + wire)
    assert [(await read_message(reader)).id for _ in range(1_000)] == list(range(1_000))
    writer.close()


async def test_message_byte_by_byte(port: int) -> None:
    reader, writer = await connect(port)
    wire = QUERY.to_wire()
    for byte in struct.pack("!H", len(wire)) + wire:
        writer.write(bytes([byte]))
        await asyncio.sleep(0)
    assert (await read_message(reader)).answer
    writer.close()


@pytest.mark.parametrize("data", [b"", b"\0", b"\0\0", b"\0\5abc", b"\xff\xffabc"])
async def test_connection_without_a_whole_message_is_closed(
    port: int, data: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dns_server, "IDLE_S", 0.05)
    reader, writer = await connect(port)
    writer.write(data)
    async with asyncio.timeout(WAIT_S):
        assert await reader.read() == b""
    writer.close()


async def test_connections_are_limited(port: int) -> None:
    wire = QUERY.to_wire()
    streams = []
    for number in range(dns_server.CONNECTIONS_MAX):
        reader, writer = await asyncio.open_connection(HOSTS[number % 2], port)
        writer.write(struct.pack("!H", len(wire)) + wire)
        await read_message(reader)
        streams.append(writer)
    reader, writer = await connect(port)
    with contextlib.suppress(ConnectionError):
        writer.write(struct.pack("!H", len(wire)) + wire)
        assert await reader.read() == b""
    for each in (*streams, writer):
        each.close()
    async with asyncio.timeout(WAIT_S):  # there is room as soon as other connections are closed
        has_room = False
        while not has_room:
            reader, writer = await connect(port)
            with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
                writer.write(struct.pack("!H", len(wire)) + wire)
                await read_message(reader)
                has_room = True
            writer.close()


async def test_invalid_datagrams_get_no_answer_and_do_no_harm(port: int) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp:
        udp.connect(("127.0.0.1", port))
        for junk in (b"", b"x", b"x" * 11, b"\xff" * 60_000):
            udp.send(junk)
    response = await dns.asyncquery.udp(QUERY, "127.0.0.1", port=port, timeout=WAIT_S)
    assert response.answer


async def test_answers_go_to_the_client_that_asked(port: int) -> None:
    """Many clients share the sockets of both families. Each gets the answers to its own questions only."""

    async def ask(number: int) -> None:
        host, name = HOSTS[number % 2], f"n{number}.regd.internal"
        ids = [number, number + 1_000]
        answers: list[tuple[bytes, Any]] = []
        with socket.socket((socket.AF_INET, socket.AF_INET6)[number % 2], socket.SOCK_DGRAM) as udp:
            udp.setblocking(False)
            for id in ids:
                udp.sendto(dns.message.make_query(name, "A", id=id).to_wire(), (host, port))
            while len(answers) < 2:
                await asyncio.sleep(0)
                with contextlib.suppress(BlockingIOError):
                    answers.append(udp.recvfrom(512))
            with pytest.raises(BlockingIOError):
                udp.recv(1)
        messages = [dns.message.from_wire(wire) for wire, _ in answers]
        assert [message.id for message in messages] == ids
        assert {message.question[0].name.to_text() for message in messages} == {name + "."}
        assert {peer[:2] for _, peer in answers} == {(host, port)}

    async with asyncio.timeout(WAIT_S):
        await asyncio.gather(*map(ask, range(60)))


@pytest.mark.parametrize("host", HOSTS)
async def test_largest_datagram_arrives(host: str) -> None:
    index = NameIndex()
    for number in range(1_001):
        index.put(instance(key=str(number), port=10_000 + number, host=host))
    query = dns.message.make_query("web.regd.internal", "SRV", use_edns=0, payload=65_535)
    async with serving(index) as port:
        udp = await dns.asyncquery.udp(query, host, port=port, timeout=WAIT_S)
        tcp = await dns.asyncquery.tcp(query, host, port=port, timeout=WAIT_S)
    assert len(tcp.answer[0]) >= 800
    if host == "127.0.0.1":
        assert (len(udp.answer[0]), udp.flags & dns.flags.TC) == (1_000, 0)
        assert len(tcp.answer[0]) == 1_000
    else:  # 1,000 records do not fit
        assert (udp.answer, udp.flags & dns.flags.TC) == ([], dns.flags.TC)


@pytest.mark.parametrize("host", HOSTS)
async def test_half_closed_client_gets_all_answers(port: int, host: str) -> None:
    reader, writer = await asyncio.open_connection(host, port)
    wire = QUERY.to_wire()
    writer.write((struct.pack("!H", len(wire)) + wire) * 20 + b"\0\0" + struct.pack("!H", len(wire)) + wire[:5])
    writer.write_eof()
    for _ in range(20):
        assert (await read_message(reader)).answer
    assert await reader.read() == b""
    writer.close()


@pytest.mark.parametrize("half_closes", [True, False])
async def test_tcp_client_that_does_not_read_is_dropped(
    monkeypatch: pytest.MonkeyPatch, half_closes: bool
) -> None:
    monkeypatch.setattr(dns_server, "IDLE_S", 0.1)
    index = NameIndex()
    for number in range(800):
        index.put(instance(key=str(number), port=10_000 + number))
    query = dns.message.make_query("web.regd.internal", "SRV").to_wire()
    transports: list[asyncio.WriteTransport] = []
    accept = DnsServer._accept

    def keep(self: DnsServer, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        transports.append(writer.transport)
        accept(self, reader, writer)

    monkeypatch.setattr(DnsServer, "_accept", keep)
    async with serving(index) as port:
        _, writer = await connect(port)
        writer.transport.pause_reading()  # type: ignore[attr-defined]
        writer.write((struct.pack("!H", len(query)) + query) * 200)  # 8 MB of answers
        if half_closes:
            writer.write_eof()
        await until(lambda: transports and transports[0].get_write_buffer_size())
        await until(lambda: not transports[0].get_write_buffer_size() and transports[0].is_closing())
        writer.transport.abort()


async def test_server_survives_any_bytes_by_tcp(port: int, caplog: pytest.LogCaptureFixture) -> None:
    rng = random.Random(7)
    wire = QUERY.to_wire()
    for number in range(150):
        data = b"".join(struct.pack("!H", len(wire)) + wire for _ in range(3))
        for _ in range(rng.randint(1, 4)):
            at = rng.randrange(len(data))
            data = data[:at] + rng.randbytes(rng.randint(0, 3)) + data[at + rng.randint(0, 3) :]
        reader, writer = await asyncio.open_connection(HOSTS[number % 2], port)
        writer.write(data)
        writer.write_eof()
        async with asyncio.timeout(WAIT_S):
            answers = await reader.read()
        while answers:
            length = int.from_bytes(answers[:2])
            dns.message.from_wire(answers[2 : 2 + length])
            answers = answers[2 + length :]
        writer.close()
    assert [record.getMessage() for record in caplog.records if record.levelname == "ERROR"] == []


# The cache.


class Counting:
    """A state that counts how often it is read, and a clock."""

    def __init__(self) -> None:
        self.index = NameIndex()
        self.reads = 0
        self.now = 0.0
        self.cache = AnswerCache(self.state, lambda: self.now)

    def state(self) -> NameIndex:
        self.reads += 1
        return self.index

    def ask(self, id: int, name: str = "web", tcp: bool = False) -> dns.message.Message:
        answer = self.cache.answer(dns.message.make_query(f"{name}.regd.internal", "A", id=id).to_wire(), tcp=tcp)
        assert answer is not None
        return dns.message.from_wire(answer)


def test_equal_queries_are_answered_a_few_times_in_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dns_server, "_ORDERS", 2)
    scene = Counting()
    assert [scene.ask(id).id for id in range(100)] == list(range(100))
    assert scene.reads == 2
    for id in range(100):
        scene.ask(id, tcp=True)
        scene.ask(id, "WEB")
    assert scene.reads == 6  # queries by TCP, and queries in another case
    scene.now = 1.0
    scene.ask(6)
    assert scene.reads == 7


def test_equal_queries_within_a_second_get_several_orders() -> None:
    scene = Counting()
    for number in range(1, 101):
        scene.index.put(instance(key=str(number), host=f"127.0.0.{number}"))
    first = [str(scene.ask(id, tcp=True).answer[0][0]) for id in range(100)]
    assert len(set(first)) > 1
    assert scene.reads <= 8


def test_change_empties_the_cache() -> None:
    scene = Counting()
    assert not scene.ask(1).answer
    scene.index.put(instance(port=1))
    scene.cache.clear()
    assert scene.ask(2).answer


def test_cache_is_limited() -> None:
    scene = Counting()
    for number in range(3_000):
        scene.ask(1, f"n{number}")
    assert len(scene.cache._answers) <= 1_024
