"""Streams as their protocols see them, on real sockets: what is written and what is read."""

import asyncio
import itertools
import random
import socket
from functools import partial

import pytest

from regd.server import streams as module
from regd.server.streams import Stream
from tests.support.streams import KIB, MANY, Bench, Caller, Told, turns, until

pytestmark = pytest.mark.socket


# Priority.


async def test_streams_of_low_priority_get_a_bounded_time_in_a_turn_of_the_loop_and_each_its_turn(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever is of another priority is served in each turn, however many there are."""
    if bench.streams._epoll is None:
        pytest.skip("one epoll for each priority")
    _, high = await bench.pair()
    caller = bench.callers[-1]

    def made() -> Told:
        told = Told()
        told.on["made"] = lambda: setattr(told.transport, "low_priority", True)
        return told

    bench.protocol = made
    low = [await bench.pair() for _ in range(100)]
    monkeypatch.setattr(module, "_LOW_S", -1.0)  # no time at all: one is served
    for each, _ in low:
        each.send(b"low")
    order: list[Told] = []
    for _, told in low:
        told.on["data"] = partial(order.append, told)
    for count in range(1, 6):
        served, got = len(order), len(high.got)
        caller.send(b"high")
        await turns(2)
        assert len(high.got) == got + 4
        assert count <= len(order) <= served + 2
    await until(lambda: len(order) == 100)
    assert len(set(order)) == 100
    for told in (low[0][1], low[70][1]):
        told.transport.write(MANY)
        told.transport.close()
    for each in (low[0][0], low[70][0]):
        assert await each.rest() == MANY
    assert await bench.is_quiet()


# Writing.


async def test_what_the_system_takes_at_once_is_not_kept(bench: Bench) -> None:
    caller, told = await bench.pair()
    for data in (b"bytes,", bytearray(b"bytearray,"), memoryview(b"_memoryview_")[1:-1], b""):
        told.transport.write(data)
        assert told.transport.get_write_buffer_size() == 0
    told.transport.writelines([b",two ", b"pieces"])
    caller.take()
    assert caller.got == b"bytes,bytearray,memoryview,two pieces"
    assert await bench.is_quiet()


async def test_what_it_does_not_take_is_kept_and_sent_in_order(bench: Bench) -> None:
    caller, told = await bench.narrow()
    sizes = random.Random(5)
    expected = bytearray()
    while len(expected) < 600 * KIB:
        start, size = sizes.randrange(256), sizes.choice((1, 17, 3_000, 40_000))
        expected += MANY[start : start + size]
        told.transport.write(sizes.choice((bytes, bytearray, memoryview))(MANY[start : start + size]))
        for _ in range(sizes.randrange(4)):
            caller.take(sizes.randrange(20_000))
            await asyncio.sleep(0)
    assert told.calls.count("paused") > 0
    told.transport.close()
    assert await caller.rest() == expected
    assert told.calls.count("paused") - told.calls.count("resumed") in (0, 1)
    assert told.error is None


async def test_what_is_kept_is_a_copy(bench: Bench) -> None:
    caller, told, size = await bench.full()
    data = bytearray(b"as it was")
    told.transport.write(data)
    data[:] = b"changed.."
    told.transport.close()
    assert (await caller.rest())[size:] == b"as it was"


@pytest.mark.parametrize("low", [0, 1, 20_000])
async def test_the_protocol_is_told_to_pause_above_the_high_limit_and_to_resume_at_the_low_one(
    bench: Bench, low: int
) -> None:
    """asyncio: not at the high limit but above it; at the low limit already. Once each."""
    caller, told = await bench.narrow()
    transport = told.transport
    transport.set_write_buffer_limits(high=2**30)
    transport.write(MANY)
    await turns(20)
    assert told.calls == ["made"]
    high = transport.get_write_buffer_size() + 100
    transport.set_write_buffer_limits(high=high, low=low)
    transport.write(b"x" * 100)
    assert told.calls == ["made"]
    transport.write(b"y")
    assert (told.calls[1:], told.size_at["paused"]) == (["paused"], high + 1)
    transport.write(b"z" * 70_000)
    assert told.calls[1:] == ["paused"]
    total = len(MANY) + 101 + 70_000

    def all_is_there() -> bool:
        caller.take(3_000)
        assert told.calls.count("resumed") == (transport.get_write_buffer_size() <= low)
        return len(caller.got) == total

    await until(all_is_there)
    assert told.calls[1:] == ["paused", "resumed"]
    assert told.size_at["resumed"] <= low
    assert await bench.is_quiet()
    transport.write(b"all at once")
    assert told.calls[1:] == ["paused", "resumed"]


async def test_it_pauses_and_resumes_again_and_again(bench: Bench) -> None:
    caller, told = await bench.narrow()
    told.transport.set_write_buffer_limits(high=16 * KIB, low=0)
    for count in range(1, 6):
        told.transport.write(MANY)
        assert told.calls.count("paused") == count

        def resumed(count: int = count) -> bool:
            caller.take()
            return told.calls.count("resumed") == count

        await until(resumed)
    told.transport.close()
    assert await caller.rest() == MANY * 5


@pytest.mark.parametrize(
    ("given", "limits"),
    [
        ({}, (64 * KIB, 16 * KIB)),
        ({"high": 0}, (0, 0)),
        ({"high": 8_000}, (8_000, 2_000)),
        ({"high": 8_000, "low": 0}, (8_000, 0)),
    ],
)
async def test_the_limits_are_those_of_asyncio_where_none_are_given(
    bench: Bench, given: dict[str, int], limits: tuple[int, int]
) -> None:
    high, low = limits
    caller, told = await bench.narrow()
    if given:
        told.transport.set_write_buffer_limits(**given)
    while "paused" not in told.calls:
        assert told.transport.get_write_buffer_size() <= high
        told.transport.write(b"x" * 500)
    assert high < told.size_at["paused"] <= high + 500
    while "resumed" not in told.calls:
        assert told.transport.get_write_buffer_size() > low
        caller.take(500)
        await asyncio.sleep(0)
    assert told.size_at["resumed"] <= low


# Reading.


async def test_a_paused_stream_reads_nothing_and_loses_nothing(bench: Bench) -> None:
    caller, told = await bench.pair()
    told.transport.pause_reading()
    told.transport.pause_reading()
    caller.send(b"one ")
    caller.send(b"two")
    assert await bench.is_quiet()
    assert (bytes(told.got), told.transport.is_reading()) == (b"", False)
    told.transport.resume_reading()
    told.transport.resume_reading()
    await until(lambda: told.got)
    assert told.got == b"one two"


@pytest.mark.parametrize("kept", [False, True])
async def test_a_paused_stream_keeps_nobody_busy_when_its_peer_has_gone(bench: Bench, kept: bool) -> None:
    for end in (Caller.shut, lambda caller: caller.socket.close(), Caller.reset):
        caller, told = await (bench.pair() if not kept else bench.narrow())
        if kept:
            told.transport.write(MANY)
        told.transport.pause_reading()
        caller.send(b"the last")
        await turns(5)
        end(caller)
        assert await bench.is_quiet()
        assert "data" not in told.calls
        if told.is_lost:
            assert kept  # an attempt to send them has told
            continue
        told.transport.resume_reading()
        await until(lambda told=told: "eof" in told.calls or told.is_lost)
        assert await bench.is_quiet()


async def test_pausing_and_resuming_at_random_loses_nothing(bench: Bench) -> None:
    caller, told = await bench.pair()
    chance = random.Random(7)

    def sometimes() -> None:
        if chance.random() < 0.3:
            told.transport.pause_reading()

    told.on["data"] = sometimes
    sent = bytearray()
    for n in range(300):
        data = MANY[n : n + chance.randrange(1, 5_000)]
        caller.send(data)
        sent += data
        for _ in range(chance.randrange(3)):
            await asyncio.sleep(0)
        if chance.random() < 0.3:
            told.transport.resume_reading()
            if chance.random() < 0.3:
                told.transport.pause_reading()

    def all_is_there() -> bool:
        told.transport.resume_reading()
        return len(told.got) == len(sent)

    await until(all_is_there)
    assert told.got == sent


async def test_one_that_sends_much_leaves_turns_to_others(bench: Bench) -> None:
    greedy, told = await bench.pair()
    modest, other = await bench.pair()
    told.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 512 * KIB)
    told.on["data"] = lambda: greedy.send(MANY[: 16 * KIB])  # it never ends
    greedy.send(MANY[: 16 * KIB])
    for count in range(1, 20):
        before = told.calls.count("data")
        modest.send(b"x")
        await until(lambda count=count: other.calls.count("data") == count)
        assert told.calls.count("data") - before <= 4  # two turns, with two looks in each


async def test_many_that_are_ready_at_once_are_all_served(bench: Bench) -> None:
    pairs = [await bench.pair() for _ in range(300)]
    most = bench.served
    for n, (caller, _) in enumerate(pairs):
        caller.send(b"%d" % n)
    steps = []
    while bench.served < most + 300:
        before = bench.served
        await asyncio.sleep(0)
        steps.append(bench.served - before)
    assert [int(told.got) for _, told in pairs] == list(range(300))
    if bench.streams._epoll is not None:
        assert max(steps) <= 128  # and the loop turns in between
    assert await bench.is_quiet()


# Several at once.


async def test_one_that_is_ended_in_the_turn_of_its_event_hears_nothing_more(bench: Bench) -> None:
    for end in (Stream.abort, Stream.close, Stream.pause_reading):
        pairs = [await bench.pair() for _ in range(2)]
        for (_, one), (_, other) in itertools.permutations(pairs):
            one.on["data"] = partial(end, other.transport)
        for caller, _ in pairs:
            caller.send(b"x")
        await until(lambda pairs=pairs: any(told.got for _, told in pairs))
        await turns(5)
        assert sorted(told.calls[:2] for _, told in pairs) in (
            [["made"], ["made", "data"]],
            [["made", "data"], ["made", "lost"]],
        )


async def test_a_file_number_that_is_used_again_is_somebody_elses(bench: Bench) -> None:
    seen: dict[int, int] = {}
    for n in range(60):
        caller, told = await bench.pair()
        file = told.transport.file
        seen[file] = seen.get(file, 0) + 1
        told.transport.write(MANY if n % 3 else b"")
        caller.send(b"%d" % n)
        await until(lambda told=told: told.got)
        assert told.got == b"%d" % n
        [caller.shut, caller.reset, told.transport.abort, told.transport.pause_reading][n % 4]()
        await turns(3)
        told.transport.abort()
        await until(lambda told=told: told.is_lost)
        caller.socket.close()
    assert max(seen.values()) > 10
    assert not bench.streams._served


async def test_one_ends_and_another_gets_its_file_number_within_a_few_turns(bench: Bench) -> None:
    _, told = await bench.pair()
    keeper, other = await bench.pair()
    file = told.transport.file
    bench.streams.deafen()
    caller = bench.call()  # has its own number already
    keeper.send(b"x")
    other.on["data"] = told.transport.abort
    await until(lambda: told.is_lost)
    bench.streams.listen(bench.listener, bench._made)
    await until(lambda: len(bench.told) == 3)
    new = bench.told[-1]
    assert new.transport.file == file
    told.transport.abort()  # says nothing about the new one
    told.transport.resume_reading()
    told.transport.close()
    told.transport.write(b"x")
    caller.send(b"mine")
    await until(lambda: new.got == b"mine")
    assert new.calls == ["made", "data"]
    assert not caller.got
