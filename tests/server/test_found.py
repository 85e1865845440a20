"""Found by reading and by trying: each of these fails until it is mended."""

import itertools
from collections.abc import Callable
from functools import partial

import pytest

from regd.core.limits import Limits
from regd.server.streams import Stream
from tests.fuzz.wire import Wire
from tests.support.streams import Bench, Told, turns, until
from tests.support.twins import PLAIN, Twins, line, system

MANY_INSTANCES = 20


def slow_twins() -> Twins:
    """Two daemons that look at one instance a turn, and a name with one that is ready, the last."""
    made = Twins(limits=Limits(search_max=1))
    for n in range(MANY_INSTANCES):
        made.write(line("register", name="db", port=1, instance=f"{n:02}", state="draining"))
    made.write(line("register", name="db", port=2, instance="x"))
    made.each(lambda world: setattr(world.loop, "flush_turns", 8))
    return made


def test_one_that_is_found_slowly_and_has_changed_meanwhile_is_not_remembered() -> None:
    """It is answered with what was there at first, and that once."""
    with system():
        twins = slow_twins()
        twins.asker.send(PLAIN)
        gone = [line("deregister", name="db", instance=f"{n:02}") for n in range(MANY_INSTANCES)]
        twins.writer.send(b"".join([*gone, line("register", name="db", port=3, instance="x")]))
        twins.settle()
        assert [each["port"] for each in twins.asker.replies()] == [2]
        twins.asker = twins.connect()
        assert twins.ask()["port"] == 3
        twins.close()


def test_one_that_is_found_slowly_may_be_gone_with_its_name_meanwhile() -> None:
    with system():
        twins = slow_twins()
        twins.asker.send(PLAIN)
        gone = [line("deregister", name="db", instance=f"{n:02}") for n in range(MANY_INSTANCES)]
        twins.writer.send(b"".join([*gone, line("deregister", name="db", instance="x")]))
        twins.settle()
        assert [world.loop.errors for world in twins.worlds] == [[], []]
        assert [each["port"] for each in twins.asker.replies()] == [2]
        twins.close()


def test_a_chunk_is_answered_without_work_as_far_as_others_are() -> None:
    """136 lines of 30 bytes may be 3 MB of replies, for a peer that reads none; with work it is 65 KB and a reply."""
    with system():
        twins = Twins()
        twins.write(line("register", name="db", port=1, meta={"k": "\x01" * 4_000}))
        size = len(twins.ask().__repr__())
        twins.know()
        twins.asker.each(lambda wire: setattr(wire, "taking", False))
        twins.asker.send(PLAIN * 136)
        twins.settle()
        kept = [wire.get_write_buffer_size() for wire in twins.asker.wires]
        twins.each(lambda world: world.do(partial(Wire.take, twins.asker.wires[twins.worlds.index(world)])))
        twins.settle()
        assert len(twins.asker.replies()) == 136
        twins.close()
        assert max(kept) <= 65_536 + 2 * size


def test_after_a_line_in_two_pieces_what_is_known_is_answered_at_once_again() -> None:
    with system():
        twins = Twins()
        twins.write(line("register", name="db", port=1))
        twins.know()
        twins.asker.send(PLAIN[:5], PLAIN[5:])
        twins.settle()
        twins.asker.replies()
        count = twins.replies.count
        twins.ask()
        assert twins.replies.count == count + 1
        twins.close()


@pytest.mark.socket
@pytest.mark.parametrize("end", [Stream.close, Stream.pause_reading])
async def test_one_with_bytes_kept_that_is_ended_in_the_turn_of_its_event_hears_nothing_more(
    bench: Bench, end: Callable[[Stream], None]
) -> None:
    pairs = [await bench.full() for _ in range(2)]
    for caller, told, _ in pairs:
        caller.send(b"0")  # with it comes word of what was taken, and there is some room
        await until(lambda told=told: told.got)
    for (_, one, _), (_, other, _) in itertools.permutations(pairs):
        one.on["data"] = partial(end, other.transport)
    for caller, _, _ in pairs:
        caller.send(b"x")
    await until(lambda: any(told.got == b"0x" for _, told, _ in pairs))
    await turns(5)
    assert sorted(bytes(told.got) for _, told, _ in pairs) == [b"0", b"0x"]


@pytest.mark.socket
async def test_a_bug_in_the_beginning_of_a_connection_ends_that_one_and_no_other(bench: Bench) -> None:
    def bug() -> None:
        raise ZeroDivisionError

    def made() -> Told:
        told = Told()
        told.on["made"] = bug
        return told

    bench.protocol = made
    caller = bench.call()
    await until(lambda: bench.errors)
    assert isinstance(bench.errors[0]["exception"], ZeroDivisionError)
    [told] = bench.told
    bench.told.clear()
    told.on.clear()
    bench.errors.clear()
    bench.protocol = Told
    _, other = await bench.pair()
    assert await caller.rest() == b""
    assert told.calls.count("lost") == 1
    assert not other.is_lost


@pytest.mark.socket
async def test_whoever_is_here_when_all_is_closed_is_served_no_more_and_can_still_be_ended(bench: Bench) -> None:
    caller, told = await bench.pair()
    kept_caller, kept, _ = await bench.full()
    bench.streams.close()
    caller.send(b"x")
    kept_caller.take()
    assert await bench.is_quiet()
    assert told.calls == ["made"]
    told.transport.close()
    kept.transport.abort()
    await until(lambda: told.is_lost and kept.is_lost)


@pytest.mark.socket
async def test_an_end_of_writing_is_said_once_as_asyncio_does(bench: Bench) -> None:
    caller, told = await bench.pair()
    caller.shut()
    await until(lambda: "eof" in told.calls)
    told.transport.write_eof()
    told.transport.write_eof()
    told.transport.close()
    told.transport.write_eof()
    assert await caller.rest() == b""
