"""How streams take callers: in slices, without a file for them, until they are told to take no more."""

import asyncio
import errno
import itertools
import logging
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest

from regd.server import streams as module
from tests.support.daemon import WAIT_S, InLoop
from tests.support.streams import WAYS, Bench, Told, made_streams, turns, until

pytestmark = pytest.mark.socket


class NoFiles(socket.socket):
    """A listener that cannot take anybody while `number` is set: stands where the system has no file left."""

    number = 0
    asked = 0

    def accept(self) -> tuple[socket.socket, Any]:
        self.asked += 1
        if self.number:
            raise OSError(self.number, os.strerror(self.number))
        return super().accept()


class LaterByHand:
    """The running loop, but for `call_later`: what is to be called, and after how long."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self.later: list[tuple[float, Callable[[], object]]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loop, name)

    def call_later(self, delay: float, callback: Callable[..., object], *args: Any) -> None:
        self.later.append((delay, lambda: callback(*args)))


def without_files(bench: Bench, number: int) -> tuple[NoFiles, LaterByHand]:
    """Have callers come to a listener that gets no file for them, and the time for the next try by hand."""
    loop = LaterByHand()
    bench.streams._loop = cast(asyncio.AbstractEventLoop, loop)
    bench.streams.deafen()
    bench.listener.close()
    bench.listener = listener = NoFiles()
    listener.bind(("127.0.0.1", 0))
    listener.listen(64)
    listener.number = number
    bench.streams.listen(listener, bench._made)
    return listener, loop


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM])
async def test_without_a_file_for_callers_it_says_so_once_and_tries_again(
    bench: Bench, caplog: pytest.LogCaptureFixture, number: int
) -> None:
    _, told = await bench.pair()
    listener, loop = without_files(bench, number)
    callers = [bench.call() for _ in range(3)]
    for count in (1, 2):
        await until(lambda: loop.later)
        await turns(50)
        assert (listener.asked, len(loop.later)) == (count, 1)
        assert [os.strerror(number) in each for each in caplog.messages] == [True] * count
        assert [each.levelno for each in caplog.records] == [logging.ERROR] * count
        after, again = loop.later.pop()
        assert after == 1.0
        again()
    listener.number = 0
    bench.callers[0].send(b"whoever is here")  # is served all the same
    await until(lambda: told.got == b"whoever is here")
    after, again = loop.later.pop() if loop.later else (1.0, lambda: None)
    again()
    await until(lambda: len(bench.told) == 4)
    callers[2].send(b"taken")
    await until(lambda: any(each.got == b"taken" for each in bench.told))
    assert len(caplog.messages) <= 3


async def test_who_takes_no_more_callers_does_not_try_again(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    listener, loop = without_files(bench, errno.EMFILE)
    bench.call()
    await until(lambda: loop.later)
    bench.streams.deafen()
    listener.number = 0
    [(_, again)] = loop.later
    again()
    assert await bench.is_quiet()
    assert (bench.told, listener.asked) == ([], 1)
    assert len(caplog.messages) == 1


async def test_a_caller_that_went_before_it_was_taken_is_no_trouble(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    for number in (errno.ECONNABORTED, errno.EINTR, errno.EAGAIN):
        listener, loop = without_files(bench, number)
        caller = bench.call()
        await until(lambda listener=listener: listener.asked)
        listener.number = 0
        caller.send(b"x")
        await until(lambda: bench.told and bench.told[-1].got)
        assert loop.later == []
    assert caplog.messages == []


async def test_what_else_fails_in_taking_callers_is_reported_and_ends_nothing(bench: Bench) -> None:
    listener, loop = without_files(bench, errno.EPERM)
    bench.call()
    await until(lambda: bench.errors)
    listener.number = 0
    assert {type(each["exception"]) for each in bench.errors} == {PermissionError}
    bench.errors.clear()
    await until(lambda: bench.told)
    assert loop.later == []


async def test_callers_are_taken_in_slices(bench: Bench) -> None:
    """So that a whole test suite that starts at once does not hold up who is here already."""
    for _ in range(200):
        bench.call()
    counts = [len(bench.told)]
    while counts[-1] < 200:
        await asyncio.sleep(0)
        counts.append(len(bench.told))
    steps = [after - before for before, after in itertools.pairwise(counts)]
    assert max(steps) == 64
    assert len({each.transport.file for each in bench.told}) == 200


async def test_whoever_calls_behind_deafen_is_not_taken_and_the_others_are_served(bench: Bench) -> None:
    caller, told = await bench.pair()
    bench.streams.deafen()
    bench.streams.deafen()
    bench.call()
    assert await bench.is_quiet()
    assert len(bench.told) == 1
    caller.send(b"still here")
    await until(lambda: told.got == b"still here")


async def test_sockets_are_as_a_protocol_of_short_lines_needs_them(bench: Bench, tmp_path: Path) -> None:
    caller, told = await bench.pair()
    connected = told.transport.get_extra_info("socket")
    assert not connected.getblocking()
    assert connected.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
    assert told.transport.get_extra_info("peername") == caller.socket.getsockname()
    assert told.transport.get_extra_info("cipher") is None
    assert told.transport.get_extra_info("cipher", "none") == "none"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(os.fspath(tmp_path / "s"))
        listener.listen()
        bench.streams.listen(listener, bench._made)
        with socket.socket(socket.AF_UNIX) as unix:
            unix.connect(os.fspath(tmp_path / "s"))
            unix.sendall(b"by path")
            await until(lambda: bench.told[-1].got == b"by path")
            assert bench.told[-1].transport.get_extra_info("socket").family == socket.AF_UNIX
            bench.told[-1].transport.abort()
            await turns(2)
        bench.streams.deafen()


async def test_closing_all_serves_nobody_any_more_and_twice_is_harmless(bench: Bench) -> None:
    caller, told = await bench.pair()
    told.transport.abort()
    await until(lambda: told.is_lost)
    epoll = bench.streams._epoll
    file = bench.listener.fileno() if epoll is None else epoll.fileno()
    bench.streams.close()
    bench.streams.close()
    assert not asyncio.get_running_loop().remove_reader(file)  # the number is soon another file's
    bench.call()
    assert await bench.is_quiet()
    assert len(bench.told) == 1
    assert await caller.rest() == b""


@pytest.mark.parametrize("way", WAYS)
async def test_a_daemon_serves_either_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    monkeypatch.setattr(module, "Streams", lambda: made_streams(way))
    monkeypatch.setattr("regd.server.lifecycle.Streams", lambda: made_streams(way))
    async with InLoop(tmp_path / "registry.json") as daemon:
        one, two = await daemon.peer(), await daemon.peer("::1")
        assert (await one.ask(cmd="register", name="a", port=1, hold=True))["ok"]
        for _ in range(3):
            assert (await two.ask("resolve a"))["port"] == 1
        await one.reset()
        async with asyncio.timeout(WAIT_S):
            while (await two.ask("resolve a"))["ok"]:
                pass
        two.send("quit")
        assert await two.rest() == b""


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
