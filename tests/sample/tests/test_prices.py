"""Each test has a registry of its own, so all of them may use the same name, one after the other or at once."""

import asyncio
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import regd_client
from regd.testing import Registry
from regd.testing.in_process import InProcessRegistry
from regd_client import blocking
from shop.prices import NAME, price, serving

PROJECT = Path(__file__).resolve().parents[1]


@pytest.fixture
def service(regd: Registry) -> Iterator["subprocess.Popen[bytes]"]:
    """The service as a process. It is told nothing of the registry."""
    with subprocess.Popen([sys.executable, "-m", "shop.prices"], cwd=PROJECT) as process:
        yield process
        process.terminate()


def test_a_process_is_found(regd: Registry, service: "subprocess.Popen[bytes]") -> None:
    found = blocking.resolve(NAME, wait=10)
    [instance] = regd.instances()
    assert (instance["port"], instance["pid"]) == (found.port, service.pid)
    assert asyncio.run(price("apple")) == 30


async def test_a_service_in_the_same_loop(regd: Registry) -> None:
    async with serving() as port:
        assert [instance["port"] for instance in regd.instances()] == [port]
        assert await price("pear") == 40
    assert regd.instances() == []


async def test_a_process_and_a_registry_that_was_restarted(
    regd: Registry, service: "subprocess.Popen[bytes]"
) -> None:
    assert await price("apple") == 30
    regd.restart()
    assert await price("pear") == 40


async def test_a_process_that_is_killed_is_gone(regd: Registry, service: "subprocess.Popen[bytes]") -> None:
    assert await price("apple") == 30
    async for event in regd_client.watch(NAME):
        if event.kind == "sync":
            service.kill()
        if event.kind == "down":
            break
    with pytest.raises(regd_client.NotFound):
        await regd_client.resolve(NAME)


async def test_prices_without_a_process(regd_in_process: InProcessRegistry) -> None:
    async with serving():
        assert await price("apple") == 30
        regd_in_process.kill(NAME)
        with pytest.raises(regd_client.NotFound):
            await regd_client.resolve(NAME)


@pytest.mark.parametrize("number", range(8))
def test_many_at_once(regd: Registry, number: int) -> None:
    assert regd.instances() == []
    with blocking.register(NAME, 5050 + number):
        assert str(blocking.resolve(NAME)) == f"127.0.0.1:{5050 + number}"


def test_by_hand(regd: Registry) -> None:
    def regctl(*words: str) -> str:
        command = [sys.executable, "-m", "regd.cli.regctl", *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    regctl("register", "db", "5432")
    assert regctl("resolve", "db") == "127.0.0.1:5432\n"
