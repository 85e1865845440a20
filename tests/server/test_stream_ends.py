"""How a stream ends: by either side, in any order, by a bug; and that nothing is left of it."""

import asyncio
import gc
import itertools
import random
import weakref
from collections.abc import Callable
from functools import partial

import pytest

from regd.server.streams import Stream
from tests.support.streams import KIB, MANY, Bench, Caller, Told, turns, until

pytestmark = pytest.mark.socket


# Ending: our side.


async def test_an_end_of_writing_comes_behind_what_is_kept(bench: Bench) -> None:
    caller, told, size = await bench.full()
    told.transport.write_eof()
    caller.send(b"asked late")  # the other way stays open
    assert await caller.rest() == MANY[:size]
    assert caller.end == "eof"
    await until(lambda: told.got == b"asked late")
    assert not told.transport.is_closing()
    assert await bench.is_quiet()
    caller.shut()
    await until(lambda: "eof" in told.calls)
    assert await bench.is_quiet()


async def test_an_end_of_writing_comes_at_once_where_nothing_is_kept(bench: Bench) -> None:
    caller, told = await bench.pair()
    assert told.transport.can_write_eof()
    told.transport.write(b"last")
    told.transport.write_eof()
    assert await caller.rest() == b"last"
    caller.send(b"more")
    await until(lambda: told.got == b"more")
    assert await bench.is_quiet()


async def test_an_end_of_writing_behind_a_reset_says_so_and_no_more(bench: Bench) -> None:
    caller, told = await bench.pair()
    caller.reset()
    with pytest.raises(OSError):
        told.transport.write_eof()
    await until(lambda: told.is_lost)
    assert isinstance(told.error, ConnectionResetError)


async def test_a_reset_before_the_kept_end_is_no_error_of_ours(bench: Bench) -> None:
    caller, told, _ = await bench.full()
    told.transport.write_eof()
    caller.reset()
    await until(lambda: told.is_lost)
    assert isinstance(told.error, OSError)


async def test_an_end_of_writing_that_a_reset_comes_before_is_no_bug(bench: Bench) -> None:
    """The peer reads all there is, closes, and answers the rest with a reset, before the end can be said."""
    caller, told = await bench.narrow()
    while not told.transport.get_write_buffer_size():
        told.transport.write(b"x" * 500)
    told.transport.write_eof()
    caller.take()
    caller.socket.close()
    await until(lambda: told.is_lost or "eof" in told.calls)
    assert bench.errors == []


async def test_closing_sends_what_is_kept_and_then_closes(bench: Bench) -> None:
    caller, told, size = await bench.full()
    told.transport.close()
    assert (told.transport.is_closing(), told.transport.is_reading()) == (True, False)
    told.transport.write(b"too late")
    told.transport.close()
    await turns(20)
    assert told.calls[1:] == ["paused"]  # it is not over
    assert await caller.rest() == MANY[:size]
    await until(lambda: told.is_lost)
    assert told.error is None


async def test_whoever_is_closing_reads_no_more(bench: Bench) -> None:
    caller, told, _ = await bench.full()
    caller.send(b"in the turn before")
    told.transport.close()
    caller.send(b"and behind")
    told.transport.resume_reading()
    assert await bench.is_quiet()
    assert (told.calls[1:], told.transport.is_reading()) == (["paused"], False)


async def test_closing_tells_in_a_turn_of_its_own(bench: Bench) -> None:
    for end in (Stream.close, Stream.abort):
        caller, told = await bench.pair()
        end(told.transport)
        assert told.calls == ["made"]
        assert told.transport.is_closing()
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert (told.calls, told.error) == (["made", "lost"], None)
        assert await caller.rest() == b""


async def test_aborting_drops_what_is_kept(bench: Bench) -> None:
    caller, told, size = await bench.full()
    kept = told.transport.get_write_buffer_size()
    told.transport.abort()
    assert (told.transport.get_write_buffer_size(), told.is_lost) == (0, False)
    told.transport.write(b"too late")
    assert len(await caller.rest()) == size - kept
    assert (told.is_lost, told.error) == (True, None)


async def test_an_abort_ends_a_close_that_the_peer_does_not_take(bench: Bench) -> None:
    _, told, _ = await bench.full()
    told.transport.close()
    assert await bench.is_quiet()
    told.transport.abort()
    await until(lambda: told.is_lost)
    assert told.error is None


class Ending(Told):
    """Ends its connection in one of its calls."""

    def __init__(self, end: Callable[[Stream], None], call: str) -> None:
        super().__init__()
        self.on[call] = lambda: end(self.transport)


async def test_a_protocol_may_end_its_connection_from_any_call(bench: Bench) -> None:
    for end, call in itertools.product(
        (Stream.close, Stream.abort), ("made", "data", "eof", "paused", "resumed")
    ):
        bench.protocol = partial(Ending, end, call)
        caller, told = await bench.narrow()
        if call == "data":
            caller.send(b"x")
        elif call == "eof":
            caller.shut()
        elif call != "made":
            told.transport.write(MANY)
        await caller.rest()
        await until(lambda told=told: told.is_lost)
        assert told.error is None
        assert call in told.calls


async def test_what_is_said_to_whoever_is_turned_away_arrives(bench: Bench) -> None:
    def made() -> Told:
        told = Told()

        def refuse() -> None:
            told.transport.write(b"busy")
            told.transport.close()

        told.on["made"] = refuse
        return told

    bench.protocol = made
    caller, told = await bench.pair()
    assert await caller.rest() == b"busy"
    await until(lambda: told.is_lost)


# Ending: the peer's.


async def test_a_peer_that_closes_its_side_is_told_once_and_served_on(bench: Bench) -> None:
    caller, told = await bench.pair()
    caller.send(b"the last")
    caller.shut()
    await until(lambda: "eof" in told.calls)
    assert told.calls == ["made", "data", "eof"]
    assert (told.transport.is_reading(), told.transport.is_closing()) == (False, False)
    assert await bench.is_quiet()
    told.transport.write(MANY)
    told.transport.close()
    assert await caller.rest() == MANY


async def test_an_end_while_bytes_are_kept_keeps_nobody_busy(bench: Bench) -> None:
    caller, told, size = await bench.full()
    caller.shut()
    await until(lambda: "eof" in told.calls)
    assert await bench.is_quiet()
    await until(lambda: len(caller.took()) == size)
    assert await bench.is_quiet()
    told.transport.write(b"and on")
    told.transport.close()
    assert await caller.rest() == MANY[:size] + b"and on"


async def test_a_peer_that_closes_its_side_is_closed_where_the_protocol_wants_no_more(bench: Bench) -> None:
    caller, told, size = await bench.full()
    told.stays = False
    caller.shut()
    assert await caller.rest() == MANY[:size]
    await until(lambda: told.is_lost)
    assert told.error is None


async def test_an_end_on_both_sides_keeps_nobody_busy(bench: Bench) -> None:
    """The system reports a hang-up then, whether anybody asks or not."""
    caller, told = await bench.pair()
    caller.shut()
    await until(lambda: "eof" in told.calls)
    told.transport.write_eof()
    assert await caller.rest() == b""
    assert await bench.is_quiet()
    assert not told.is_lost


async def test_a_reset_is_told_as_an_error(bench: Bench) -> None:
    caller, told = await bench.pair()
    caller.reset()
    await until(lambda: told.is_lost)
    assert isinstance(told.error, ConnectionResetError)


async def test_what_came_before_an_end_is_read_before_it(bench: Bench) -> None:
    caller, told = await bench.pair()
    caller.send(MANY[: 100 * KIB])
    caller.shut()
    await until(lambda: "eof" in told.calls)
    assert told.got == MANY[: 100 * KIB]


async def test_a_reset_while_bytes_are_kept_is_told(bench: Bench) -> None:
    caller, told, _ = await bench.full()
    told.transport.pause_reading()
    assert await bench.is_quiet()
    caller.reset()
    await until(lambda: told.is_lost)
    assert isinstance(told.error, OSError)
    assert told.transport.get_write_buffer_size() == 0


async def test_a_reset_is_found_by_a_write_which_does_not_raise(bench: Bench) -> None:
    caller, told = await bench.pair()
    told.transport.pause_reading()
    caller.reset()
    told.transport.write(b"into the void")
    assert told.transport.is_closing()
    assert not told.is_lost  # in a turn of its own
    told.transport.write(b"and again")
    await until(lambda: told.is_lost)
    assert isinstance(told.error, OSError)


# Errors in protocols.


@pytest.mark.parametrize("call", ["data", "eof", "resumed"])
async def test_a_bug_in_a_connection_ends_that_one_and_no_other(bench: Bench, call: str) -> None:
    other_caller, other = await bench.pair()
    caller, told = await bench.narrow()

    def bug() -> None:
        raise ZeroDivisionError

    told.on[call] = bug
    other_caller.send(b"in the same turn ")
    if call == "data":
        caller.send(b"x")
    elif call == "eof":
        caller.shut()
    else:
        told.transport.write(MANY)
    await caller.rest()
    await until(lambda: told.is_lost)
    assert told.error is None
    [error] = bench.errors
    assert isinstance(error["exception"], ZeroDivisionError)
    assert error["transport"] is told.transport
    bench.errors.clear()
    other_caller.send(b"and later")
    await until(lambda: other.got == b"in the same turn and later")
    other.transport.write(b"served on")
    other.transport.close()
    assert await other_caller.rest() == b"served on"
    error.clear()


async def test_a_bug_in_the_end_of_a_connection_still_closes_its_socket(bench: Bench) -> None:
    def bug() -> None:
        raise ZeroDivisionError

    _, told = await bench.pair()
    told.on["lost"] = bug
    told.transport.abort()
    await until(lambda: bench.errors)
    assert isinstance(bench.errors.pop()["exception"], ZeroDivisionError)
    assert told.transport.get_extra_info("socket").fileno() == -1


# In all orders, and what is left.


class Acts:
    """What may happen to a connection, on both sides of it."""

    def __init__(self, caller: Caller, told: Told) -> None:
        self.caller, self.told, self.stream = caller, told, told.transport

    def write(self) -> None:
        self.stream.write(MANY)

    def end_writing(self) -> None:
        if not (self.stream.is_closing() or self.stream._shutting):
            self.stream.write_eof()

    def close(self) -> None:
        self.stream.close()

    def abort(self) -> None:
        self.stream.abort()

    def pause(self) -> None:
        self.stream.pause_reading()

    def resume(self) -> None:
        if "eof" not in self.told.calls:
            self.stream.resume_reading()

    def send(self) -> None:
        if not self.caller.has_ended:
            self.caller.socket.send(b"x")

    def shut(self) -> None:
        if not self.caller.has_ended:
            self.caller.shut()

    def reset(self) -> None:
        self.caller.reset()


ACTS = (
    Acts.write,
    Acts.end_writing,
    Acts.close,
    Acts.abort,
    Acts.pause,
    Acts.resume,
    Acts.send,
    Acts.shut,
    Acts.reset,
)


async def test_in_any_order_of_what_happens_each_is_told_as_promised_and_lost_once(bench: Bench) -> None:
    """`Told` sees to the promises; here everything is tried behind everything."""
    orders = list(itertools.product(ACTS, ACTS))
    some = random.Random(3)
    orders += [tuple(some.choices(ACTS, k=6)) for _ in range(120)]  # type: ignore[misc]  # longer
    for number, order in enumerate(orders):
        caller, told = await bench.narrow()
        told.stays = number % 2 == 0
        acts = Acts(caller, told)
        for act in order:
            try:
                act(acts)
            except OSError:
                assert act in (Acts.end_writing, Acts.send, Acts.shut)  # the other side has gone
            await turns(number % 3)
        assert await bench.is_quiet(), order
        told.transport.abort()
        await until(lambda told=told: told.is_lost)
        assert told.calls.count("lost") == 1, order
        caller.socket.close()
        assert not bench.errors, order
    assert not bench.streams._served


async def test_nothing_is_left_for_the_collector(bench: Bench) -> None:
    """The daemon lets the collector look at nothing twice, so what ends must go by itself."""
    gc.collect()
    gc.disable()
    try:
        ways = (Acts.abort, Acts.close, Acts.shut, Acts.reset, Acts.write, None)
        for stays, act in itertools.product((True, False), ways):
            caller, told = await bench.narrow()
            told.stays = stays
            protocol = weakref.ref(told)
            connected = weakref.ref(told.transport.get_extra_info("socket"))
            if act is None:
                told.on["data"] = lambda: 1 // 0
                caller.send(b"x")
                await until(lambda: bench.errors)
                bench.errors.clear()
            else:
                act(Acts(caller, told))
            await turns(5)
            if not told.is_lost:
                told.transport.abort()
                await turns(3)
            assert told.is_lost
            bench.told.clear()
            del told
            assert (protocol(), connected()) == (None, None), act
            caller.socket.close()
    finally:
        gc.enable()


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


async def test_whoever_is_here_when_all_is_closed_is_served_no_more_and_can_still_be_ended(bench: Bench) -> None:
    caller, told = await bench.pair()
    kept_caller, kept, _ = await bench.full()
    _, paused = await bench.pair()
    paused.transport.pause_reading()
    bench.streams.close()
    paused.transport.resume_reading()
    caller.send(b"x")
    kept_caller.take()
    assert await bench.is_quiet()
    assert told.calls == ["made"]
    told.transport.close()
    kept.transport.abort()
    await until(lambda: told.is_lost and kept.is_lost)


async def test_an_end_of_writing_is_said_once_as_asyncio_does(bench: Bench) -> None:
    caller, told = await bench.pair()
    caller.shut()
    await until(lambda: "eof" in told.calls)
    told.transport.write_eof()
    told.transport.write_eof()
    told.transport.close()
    told.transport.write_eof()
    assert await caller.rest() == b""
