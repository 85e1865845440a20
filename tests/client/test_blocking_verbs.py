"""Every verb of the blocking client, at a daemon."""

import asyncio
import threading
from collections.abc import Iterator

import pytest

import regd_client
from regd.testing import Registry, in_process
from regd_client import blocking
from tests.support.daemon import WAIT_S
from tests.support.registries import comparable


@pytest.fixture(autouse=True)
def registry() -> Iterator[Registry]:
    with in_process.running() as made:
        yield made


def test_the_verbs() -> None:
    with blocking.register("web", 1, instance="a", meta={"zone": "x"}) as registration:
        found = blocking.resolve("web")
        assert (found, str(found), found.meta) == (registration.endpoint, "127.0.0.1:1", {"zone": "x"})
        assert blocking.resolve_all("web", meta={"zone": "x"}) == [found]
        registration.update({"zone": "y"}, state="draining")
        with pytest.raises(regd_client.NotFound):
            blocking.resolve("web")
    with blocking.register("db", 2, static=True):
        pass
    assert blocking.resolve("db").port == 2
    blocking.deregister("db")
    with pytest.raises(regd_client.NotFound):
        blocking.resolve("db")
    with pytest.raises(regd_client.Timeout):
        blocking.resolve("db", wait=0.01)
    with pytest.raises(regd_client.BadArgument):
        blocking.register("no name", 1)


def test_lost() -> None:
    registration = blocking.register("web", 1)
    with blocking.BlockingConnection() as connection:
        assert connection.ask("register", name="web", port=2, hold=True)["error"] == "conflict"
    blocking.deregister("web")
    with pytest.raises(regd_client.NotFound):
        registration.update(state="draining")
    assert (registration.lost, registration.lost_reason) == (True, "deregistered")


def test_listen() -> None:
    with blocking.listen("web") as listening:
        assert blocking.resolve("web", wait=WAIT_S) == listening.endpoint
        assert listening.port == listening.endpoint.port
    with pytest.raises(regd_client.NotFound):
        blocking.resolve("web")


def test_threads_and_loops_at_once() -> None:
    """One thread waits for what another registers, while an event loop follows both."""
    found: list[object] = []
    with blocking.listen("first") as listening:

        async def follow() -> list[str]:
            told = []
            async with asyncio.timeout(WAIT_S):
                async for event in regd_client.watch():
                    told.append(f"{event.kind} {event.endpoint.name if event.endpoint else ''}".strip())
                    if event.kind == "sync":
                        thread.start()
                    if told[-1] == "up third":
                        return told
            raise AssertionError(told)

        def work() -> None:
            found.append(blocking.resolve("first", wait=WAIT_S))
            blocking.register("second", listening.port)
            found.append(blocking.resolve("second", wait=WAIT_S).port)
            blocking.register("third", 3, static=True)

        thread = threading.Thread(target=work)
        assert asyncio.run(follow(), debug=True) == ["up first", "sync", "up second", "up third"]
        thread.join(WAIT_S)
        assert found == [listening.endpoint, listening.port]
        blocking.deregister("second")
        blocking.deregister("third")


def test_one_thing_after_the_other() -> None:
    with blocking.BlockingConnection() as one, blocking.BlockingConnection() as two:
        assert one.ask("ping") == {"ok": True}
        assert comparable(one.ask("register", name="a", port=1, hold=True)) == {"ok": True, "name": "a", "instance": "", "host": "127.0.0.1", "port": 1, "rev": 1}  # fmt: skip
        assert comparable(two.ask("register", name="a", port=2)) == {"ok": False, "error": "conflict", "owner": {"connection": True}, "rev": 1}  # fmt: skip
        assert two.ask("resolve", name="b", wait=0.01)["error"] == "timeout"
        assert two.ask("watch", name="a")["watch"] == 1
        events = two.events()
        assert [next(events)["event"], next(events)["event"]] == ["up", "sync"]
        one.close()
        assert next(events)["reason"] == "connection closed"


def test_who_waits_is_answered_from_another_thread() -> None:
    got: list[object] = []
    with blocking.listen("other") as listening, blocking.BlockingConnection(timeout_s=WAIT_S) as connection:
        waiting = threading.Thread(
            target=lambda: got.append(connection.ask("resolve", name="a", wait=WAIT_S)["port"])
        )
        waiting.start()
        with blocking.register("a", listening.port):
            waiting.join(WAIT_S)
        assert got == [listening.port]
