"""A reply from the resolve cache is always the reply that the registry would give at that moment."""

import itertools
import json
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, ClassVar

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from regd.core.holders import HolderEnd
from regd.core.limits import Limits
from regd.core.model import Entry, Holder, Process, Reason, State
from regd.core.registry import Registry
from regd.core.transaction import Transaction
from regd.server.resolve_cache import ResolveCache
from tests.support.length import examples
from tests.support.twins import FLUSH_ITERATIONS, PLAIN, Pair, Twins, line, system
from tests.support.wire import Wire
from tests.support.world import World


def ports(replies: list[dict[str, Any]]) -> list[Any]:
    """Return the ports or error codes of replies, without repetitions."""
    return [key for key, _ in itertools.groupby(reply.get("port", reply.get("error")) for reply in replies)]


CHANGES: dict[str, tuple[list[bytes], list[Any]]] = {
    "another port": ([line("register", name="db", port=2)], [1, 2]),
    "other meta": ([line("register", name="db", port=1, meta={"k": "v"})], [1]),
    "other meta by update": ([line("update", name="db", meta={"k": "v"})], [1]),
    "deregistered": ([line("deregister", name="db")], [1, "not_found"]),
    "draining": ([line("update", name="db", state="draining")], [1, "not_found"]),
    "starting": ([line("update", name="db", state="starting")], [1, "not_found"]),
    "registered as starting": ([line("register", name="db", port=1, state="starting")], [1, "not_found"]),
    "draining and ready again": (
        [line("update", name="db", state="draining"), line("update", name="db", state="ready")],
        [1],
    ),
    "with a lease": ([line("register", name="db", port=1, ttl=5)], [1]),
    "held": ([line("register", name="db", port=1, hold=True)], [1]),
    "with a process": ([line("register", name="db", port=1, pid=4242)], [1]),
    "replaced twice in a batch": (
        [line("register", name="db", port=2), line("register", name="db", port=3)],
        [1, 3],
    ),
    "replaced and restored in a batch": (
        [line("register", name="db", port=2), line("register", name="db", port=1)],
        [1],
    ),
    "deregistered and registered in a batch": (
        [line("deregister", name="db"), line("register", name="db", port=4)],
        [1, 4],
    ),
    "replaced by another instance": (
        [line("deregister", name="db"), line("register", name="db", port=5, instance="x")],
        [1, 5],
    ),
    "registered again": ([line("register", name="db", port=1)], [1]),
    "refused": ([line("register", name="db", port=2, **{"if": 99})], [1]),
    "another name": ([line("register", name="bd", port=2), line("deregister", name="bd")], [1]),
}


@pytest.mark.parametrize(("requests", "expected"), CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("together", [True, False])
def test_change_is_visible_at_once(
    twins: Twins, requests: list[bytes], expected: list[Any], together: bool
) -> None:
    twins.cache_reply()
    first = twins.ask()
    for chunk in [b"".join(requests)] if together else requests:
        twins.writer.send(chunk)
        replies = twins.poll()
        if together:
            assert ports([first, *replies]) == expected
    assert ports(replies)[-1] == expected[-1]
    listed = twins.ask(line("list", name="db"))["instances"]
    resolved = {key: value for key, value in twins.ask().items() if key != "ok"}
    ready = [instance for instance in listed if instance["state"] == "ready"]
    assert ready == ([resolved] if "error" not in resolved else [])
    if "error" not in resolved:
        twins.cache_reply()


def test_failed_write_keeps_the_cached_reply(twins: Twins) -> None:
    twins.cache_reply()
    count = twins.cache.count
    twins.set_full(True)
    for request in (line("register", name="db", port=2), line("deregister", name="db")):
        twins.writer.send(request)
        assert ports(twins.poll()) == [1]
    assert twins.cache.count == count + 80
    twins.set_full(False)
    twins.writer.send(line("register", name="db", port=3))
    assert ports([twins.ask(), *twins.poll()]) == [1, 3]


def test_two_instances_alternate_until_one_is_removed(twins: Twins) -> None:
    twins.cache_reply()
    twins.writer.send(line("register", name="db", port=2, instance="2"))
    assert ports(twins.poll())[:6] == [1, 2, 1, 2, 1, 2]
    count = twins.cache.count
    twins.write(line("deregister", name="db", instance="2"))
    assert ports(twins.poll(5)) == [1]
    assert twins.cache.count > count
    twins.write(line("register", name="db", port=2, instance="2"))
    twins.poll(3)
    twins.write(line("deregister", name="db"))
    assert ports(twins.poll(5)) == [2]
    twins.cache_reply()


def test_primary_is_cached_beside_its_standby(twins: Twins) -> None:
    twins.cache_reply()
    standby = line("register", name="db", port=2, instance="2", priority=1)
    twins.writer.send(standby)
    assert ports(twins.poll()) == [1]
    twins.cache_reply()
    twins.writer.send(line("update", name="db", state="draining"))
    assert ports(twins.poll()) == [1, 2]
    count = twins.cache.count
    assert ports(twins.poll(5)) == [2]
    assert twins.cache.count == count  # the cached reply is still used when the primary is back
    twins.writer.send(line("update", name="db", state="ready"))
    assert ports(twins.poll()) == [2, 1]
    twins.cache_reply()
    twins.writer.send(line("deregister", name="db"))
    assert ports(twins.poll()) == [1, 2]
    twins.cache_reply()


def test_cached_replies_leave_round_robin_where_uncached_ones_do(twins: Twins) -> None:
    twins.write(line("register", name="db", port=2, instance="2", priority=1))
    twins.cache_reply()
    twins.ask(line("resolve", name="db", instance="2"))  # advances the round robin
    assert ports(twins.poll(3)) == [1]
    twins.write(line("update", name="db", instance="2", priority=0))
    assert ports(twins.poll(4)) in ([1, 2, 1, 2], [2, 1, 2, 1])


PRIORITIES: dict[str, tuple[list[bytes], list[Any]]] = {
    "a better instance": (
        [line("update", name="db", priority=2), line("register", name="db", port=2, instance="2", priority=1)],
        [1, 2],
    ),
    "better by update": (
        [line("register", name="db", port=2, instance="2", priority=1), line("update", name="db", priority=2)],
        [1, 2],
    ),
    "better by register": (
        [
            line("register", name="db", port=2, instance="2", priority=3),
            line("register", name="db", port=1, priority=4),
        ],
        [1, 2],
    ),
    "worse, and better again": (
        [
            line("register", name="db", port=2, instance="2", priority=1),
            line("update", name="db", priority=2),
            line("update", name="db", priority=0),
        ],
        [1, 2, 1],
    ),
    "another standby": (
        [
            line("register", name="db", port=2, instance="2", priority=1),
            line("register", name="db", port=3, instance="3", priority=65_535),
        ],
        [1],
    ),
}


@pytest.mark.parametrize(("requests", "expected"), PRIORITIES.values(), ids=PRIORITIES)
def test_change_of_priority_is_visible_at_once(twins: Twins, requests: list[bytes], expected: list[Any]) -> None:
    twins.cache_reply()
    replies = []
    for request in requests:
        twins.writer.send(request)
        replies += twins.poll()
        twins.cache_reply()
    assert ports(replies) == expected


def test_equal_priorities_alternate(twins: Twins) -> None:
    twins.write(line("register", name="db", port=2, instance="2", priority=1))
    twins.cache_reply()
    twins.writer.send(line("update", name="db", priority=1))
    assert ports(twins.poll())[-4:] in ([1, 2, 1, 2], [2, 1, 2, 1])
    twins.writer.send(line("update", name="db", instance="2", priority=0))
    assert ports(twins.poll())[-1] == 2
    twins.cache_reply()


@pytest.mark.parametrize("end", [Wire.reset, Wire.end])
def test_standby_is_resolved_as_soon_as_the_primary_is_dead(twins: Twins, end: Callable[[Wire], object]) -> None:
    twins.write(line("deregister", name="db"), line("register", name="db", port=2, instance="2", priority=7))
    primary = twins.connect()
    primary.send(line("register", name="db", port=1, hold=True))
    twins.settle()
    primary.received()
    twins.cache_reply()
    primary.for_each(end)
    assert ports(twins.poll(10)) in ([2], [1, 2])
    assert ports(twins.poll(2)) == [2]
    twins.cache_reply()


def test_name_with_two_instances_is_not_cached(twins: Twins) -> None:
    """This is so even while only one instance is ready."""
    twins.write(line("register", name="db", port=2, instance="2", state="draining"))
    count = twins.cache.count
    assert ports(twins.poll(5)) == [1]
    assert twins.cache.count == count
    twins.write(line("update", name="db", instance="2", state="ready"))
    assert ports(twins.poll(4)) in ([1, 2, 1, 2], [2, 1, 2, 1])


ENDINGS: dict[str, tuple[bytes, Callable[[Twins, Pair], object], str]] = {
    "reset": (
        line("register", name="db", port=1, hold=True),
        lambda _, held: held.for_each(Wire.reset),
        "closed",
    ),
    "closed": (line("register", name="db", port=1, hold=True), lambda _, held: held.for_each(Wire.end), "closed"),
    "quit": (line("register", name="db", port=1, hold=True), lambda _, held: held.send(b"quit\n"), "closed"),
    "HTTP": (
        line("register", name="db", port=1, hold=True),
        lambda _, held: held.send(b"GET / HTTP/1.1\r\n"),
        "closed",
    ),
    "exited": (
        line("register", name="db", port=1, pid=4242),
        lambda twins, _: twins.for_each(lambda world: world.do(lambda: _exit(world))),
        "exited",
    ),
    "expired": (line("register", name="db", port=1, ttl=5), lambda twins, _: twins.advance(5), "expired"),
    "expired though held": (
        line("register", name="db", port=1, ttl=5, hold=True, pid=4242),
        lambda twins, _: twins.advance(5),
        "expired",
    ),
}


def _exit(world: World) -> None:
    for process in world.parts.engine._registry.holder_index.processes:
        world.parts.reaper._process_ended(process)


@pytest.mark.parametrize(("request_", "end", "reason"), ENDINGS.values(), ids=ENDINGS)
@pytest.mark.parametrize("full", [False, True])
def test_dead_holder_is_not_resolved(
    twins: Twins, request_: bytes, end: Callable[[Twins, Pair], object], reason: str, full: bool
) -> None:
    """This is so from the moment of its death, before the removal is written, and on a full disk."""
    twins.write(line("deregister", name="db"))
    holder = twins.connect()
    holder.send(request_)
    twins.settle()
    holder.received()
    twins.cache_reply()
    twins.set_full(full)
    registry = twins.worlds[0].parts.engine._registry
    rev = registry.rev
    end(twins, holder)
    during_flush = []
    while registry.rev == rev:
        during_flush.append(twins.ask())
    assert ports(during_flush[2:]) == ["not_found"]
    assert len(during_flush) >= FLUSH_ITERATIONS
    assert reason in during_flush[-1]["last"]["reason"]
    assert ports(twins.poll(10)) == ["not_found"]
    twins.set_full(False)
    twins.advance(2)
    assert ports(twins.poll(10)) == ["not_found"]


def test_holder_that_dies_during_the_flush_is_never_resolved(twins: Twins) -> None:
    twins.cache_reply()
    holder = twins.connect()
    holder.send(line("register", name="db", port=2, hold=True))
    twins.run_once()
    twins.run_once()
    holder.for_each(Wire.reset)
    assert ports([twins.ask(), *twins.poll()]) == [1, "not_found"]


@pytest.mark.parametrize("last", [False, True])
def test_entry_lives_until_its_last_holder_dies(twins: Twins, last: bool) -> None:
    holders = [twins.connect() for _ in range(3)]
    for holder in holders:
        holder.send(line("register", name="db", port=1, hold=True))
        twins.settle()
    twins.cache_reply()
    for holder in holders[: 3 if last else 2]:
        holder.for_each(Wire.reset)
    assert ports(twins.poll())[-1] == ("not_found" if last else 1)


def test_withdrawn_holder_leaves_the_entry_to_other_holders(twins: Twins) -> None:
    one, two = twins.connect(), twins.connect()
    for holder in (one, two):
        holder.send(line("register", name="db", port=1, hold=True))
        twins.settle()
    twins.cache_reply()
    one.send(line("update", name="db", state="draining"))
    assert ports(twins.poll()) == [1]
    two.for_each(Wire.reset)
    twins.run_once()
    assert ports(twins.poll()) == ["not_found"]


def test_entry_is_not_ready_if_its_last_holder_dies_while_another_is_withdrawn(twins: Twins) -> None:
    """The withdrawal causes no event, but must invalidate the cached reply."""
    one, two = twins.connect(), twins.connect()
    for holder in (one, two):
        holder.send(line("register", name="db", port=1, hold=True))
        twins.settle()
    twins.for_each(lambda world: setattr(world.loop, "flush_iterations", 20))
    one.send(line("update", name="db", state="draining"))
    twins.run_once()
    twins.run_once()
    two.for_each(Wire.reset)
    twins.run_once()
    twins.cache_reply()
    assert ports(twins.poll(60)) == [1, "not_found"]


def test_forced_takeover_is_visible_once_written(twins: Twins) -> None:
    holder = twins.connect()
    holder.send(line("register", name="db", port=1, hold=True))
    twins.settle()
    twins.cache_reply()
    twins.writer.send(line("register", name="db", port=2), line("register", name="db", port=2, force=True))
    assert ports([twins.ask(), *twins.poll()]) == [1, 2]
    twins.cache_reply()
    holder.for_each(Wire.reset)  # it no longer holds the entry
    assert ports(twins.poll()) == [2]


def test_renewed_lease_is_resolved_until_it_expires(twins: Twins) -> None:
    twins.write(line("register", name="db", port=1, ttl=5))
    twins.cache_reply()
    for _ in range(3):
        twins.advance(4)
        twins.write(line("renew", name="db"))
        assert ports(twins.poll(3)) == [1]
    twins.advance(5)
    assert ports(twins.poll()) == ["not_found"]
    twins.write(line("register", name="db", port=1))
    twins.cache_reply()


def test_loaded_entry_is_resolved_until_the_deadline_to_claim_it(twins: Twins) -> None:
    with system():
        loaded = Twins(b'{"db": {"port": 1, "hold": true}, "old": {"port": 2, "pid": 4242, "born": "boot/1"}}')
        loaded.cache_reply()
        assert loaded.ask(line("resolve", name="old"))["error"] == "not_found"
        loaded.advance(29)
        assert ports(loaded.poll(5)) == [1]
        loaded.advance(1)
        assert ports(loaded.poll()) == ["not_found"]
        loaded.close()


def test_cache_has_only_registered_names(twins: Twins) -> None:
    for n in range(50):
        twins.write(line("register", name=f"n{n}", port=1))
        twins.cache_reply(f"n{n}")
        twins.ask(line("resolve", name=f"m{n}"))
    twins.cache_reply()
    assert len(twins.cache.known) == 51
    twins.write(*(line("deregister", name=f"n{n}") for n in range(50)))
    assert list(twins.cache.known) == [PLAIN]


# The registry's notifications to the cache.


def entry(name: str = "db", instance: str = "", port: int = 1, holders: tuple[Holder, ...] = ()) -> Entry:
    return Entry(name, instance, "127.0.0.1", port, {}, State.READY, 0, 0.0, holders)


def test_registry_notifies_of_each_name_whose_reply_changes() -> None:
    """At the time of the notification, a search already has the new result."""
    registry = Registry([entry(), entry("other")], 1)
    notified: list[tuple[str, int]] = []

    def ready_count(name: str) -> int:
        search = registry.search(name, None, {}, 10)
        assert search.step(10)
        return len(search.found)

    registry.on_entry_changed = lambda name: notified.append((name, ready_count(name)))

    def apply(change: Callable[[Transaction], object]) -> list[tuple[str, int]]:
        transaction = Transaction(registry, 0.0)
        result = change(transaction)
        if isinstance(result, Iterator):
            list(result)
        notified.clear()
        registry.apply(transaction.changes, 0.0)
        return list(notified)

    holder = Holder(0, 7, hold=True, process=Process(8, "boot/8"), ttl_s=5.0)
    assert apply(lambda transaction: transaction.register(entry(port=2))) == [("db", 0), ("db", 1)]
    assert apply(lambda transaction: transaction.register(entry(instance="x"))) == [("db", 2)]
    assert apply(lambda transaction: transaction.update(("db", "x"), None, State.DRAINING)) == [("db", 1)]
    assert apply(lambda transaction: transaction.deregister(("db", "x"))) == [("db", 1)]
    assert apply(lambda transaction: transaction.register(entry(port=2))) == []  # nothing changes
    for ending in (
        HolderEnd(Reason.CLOSED, session=7),
        HolderEnd(Reason.EXITED, process=Process(8, "boot/8")),
    ):
        apply(lambda transaction: transaction.register(entry("held", holders=(holder,)), session=7))
        notified.clear()
        registry.mark_gone(ending)
        assert notified == [("held", 0)]
        assert apply(lambda transaction, ending=ending: transaction.end(ending)) == [("held", 0)]  # type: ignore[misc]
        registry.holder_index.unmark(ending)
    apply(lambda transaction: transaction.register(entry("held", holders=(holder,)), session=7))
    notified.clear()
    assert registry.expire(4.9, 10) == []
    assert notified == []
    assert len(registry.expire(5.0, 10)) == 1
    assert notified == [("held", 0)]


def test_many_deaths_at_once_clear_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("regd.core.registry._INVALIDATED_MAX", 2)
    registry, replies = Registry(), ResolveCache()
    registry.on_entry_changed, registry.on_any_changed = replies.invalidate, replies.invalidate_all
    transaction = Transaction(registry, 0.0)
    for n in range(3):
        transaction.register(entry(f"n{n}", holders=(Holder(0, 7, hold=True),)), session=7)
    registry.apply(transaction.changes, 0.0)
    for n in range(3):
        replies.put(next(registry.instances_of(f"n{n}")))
    request = b'{"cmd":"resolve","name":"n1"}\n'
    assert replies.lookup(request) is not None
    registry.mark_gone(HolderEnd(Reason.CLOSED, session=7))
    assert replies.lookup(request) is None
    replies.put(next(registry.instances_of("n1")))
    assert replies.lookup(request) is not None


def test_invalidate_drops_one_name() -> None:
    replies = ResolveCache()
    for name in ("db", "a.b", "db2"):
        replies.put(entry(name))
    replies.invalidate("db")
    replies.invalidate("nobody")
    assert replies.lookup(PLAIN) is None
    assert replies.lookup(line("resolve", name="db", id=1)) is None
    assert replies.lookup(line("resolve", name="a.b")) is not None
    assert replies.lookup(line("resolve", name="db2") * 2) is not None
    assert replies.count == 3


# Random histories.

NAMES = ["a", "b"]
names = st.sampled_from(NAMES)
players = st.integers(0, 2)


MANY_INSTANCES = 20


def slow_twins() -> Twins:
    """Two daemons that examine one instance per loop iteration, and a name whose last instance alone is ready."""
    twins = Twins(limits=Limits(search_step_max=1))
    for n in range(MANY_INSTANCES):
        twins.write(line("register", name="db", port=1, instance=f"{n:02}", state="draining"))
    twins.write(line("register", name="db", port=2, instance="x"))
    twins.for_each(lambda world: setattr(world.loop, "flush_iterations", 8))
    return twins


def test_result_of_a_slow_search_is_not_cached_if_it_changed() -> None:
    """Only this one reply has the state at the start of the search."""
    with system():
        twins = slow_twins()
        twins.reader.send(PLAIN)
        gone = [line("deregister", name="db", instance=f"{n:02}") for n in range(MANY_INSTANCES)]
        twins.writer.send(b"".join([*gone, line("register", name="db", port=3, instance="x")]))
        twins.settle()
        assert [reply["port"] for reply in twins.reader.replies()] == [2]
        twins.reader = twins.connect()
        assert twins.ask()["port"] == 3
        twins.close()


def test_slow_search_survives_the_end_of_its_name() -> None:
    with system():
        twins = slow_twins()
        twins.reader.send(PLAIN)
        gone = [line("deregister", name="db", instance=f"{n:02}") for n in range(MANY_INSTANCES)]
        twins.writer.send(b"".join([*gone, line("deregister", name="db", instance="x")]))
        twins.settle()
        assert [world.loop.errors for world in twins.worlds] == [[], []]
        assert [reply["port"] for reply in twins.reader.replies()] == [2]
        twins.close()


def test_replies_from_the_cache_obey_the_output_limit() -> None:
    """136 requests of 30 bytes could cause 3 MB of replies; the limit is 64 KiB and one reply."""
    with system():
        twins = Twins()
        twins.write(line("register", name="db", port=1, meta={"k": "\x01" * 4_000}))
        size = len(twins.ask().__repr__())
        twins.cache_reply()
        twins.reader.for_each(lambda wire: setattr(wire, "peer_reads", False))
        twins.reader.send(PLAIN * 136)
        twins.settle()
        kept = [wire.get_write_buffer_size() for wire in twins.reader.wires]
        twins.for_each(lambda world: world.do(partial(Wire.take, twins.reader.wires[twins.worlds.index(world)])))
        twins.settle()
        assert len(twins.reader.replies()) == 136
        twins.close()
        assert max(kept) <= 65_536 + 2 * size


def test_cache_is_used_again_after_a_line_in_two_chunks() -> None:
    with system():
        twins = Twins()
        twins.write(line("register", name="db", port=1))
        twins.cache_reply()
        twins.reader.send(PLAIN[:5], PLAIN[5:])
        twins.settle()
        twins.reader.replies()
        count = twins.cache.count
        twins.ask()
        assert twins.cache.count == count + 1
        twins.close()


class Histories(RuleBasedStateMachine):
    """Three connections that write and hold, and one that resolves in every loop iteration."""

    settings: ClassVar[Any]

    def __init__(self) -> None:
        super().__init__()
        self._system = system()
        self._system.__enter__()
        self.twins = Twins()
        self.players = [self.twins.connect() for _ in range(3)]

    def teardown(self) -> None:
        self.twins.set_full(False)
        self.twins.settle()
        self.twins.close()
        self._system.__exit__(None, None, None)

    @initialize(flush=st.integers(0, 5))
    def begin(self, flush: int) -> None:
        for world in self.twins.worlds:
            world.loop.flush_iterations = flush

    @rule(
        player=players,
        name=names,
        instance=st.sampled_from(["", "", "x"]),
        port=st.integers(1, 2),
        held=st.sampled_from([{}, {}, {"hold": True}, {"pid": 4242}, {"ttl": 2}, {"hold": True, "ttl": 2}]),
        state=st.sampled_from(["ready", "ready", "ready", "draining"]),
        priority=st.sampled_from([0, 0, 1]),
        force=st.booleans(),
    )
    def register(
        self,
        player: int,
        name: str,
        instance: str,
        port: int,
        held: dict[str, Any],
        state: str,
        priority: int,
        force: bool,
    ) -> None:
        rest = {"state": state, "priority": priority, "force": force, **held}
        self.players[player].send(line("register", name=name, instance=instance, port=port, **rest))

    @rule(player=players, name=names, instance=st.sampled_from(["", "", "x"]))
    def deregister(self, player: int, name: str, instance: str) -> None:
        self.players[player].send(line("deregister", name=name, instance=instance))

    @rule(player=players, name=names, state=st.sampled_from(["ready", "draining"]), k=st.integers(1, 2))
    def update(self, player: int, name: str, state: str, k: int) -> None:
        self.players[player].send(line("update", name=name, state=state, meta={"k": str(k)}))

    @rule(player=players, name=names, instance=st.sampled_from(["", "x"]), priority=st.integers(0, 1))
    def prefer(self, player: int, name: str, instance: str, priority: int) -> None:
        self.players[player].send(line("update", name=name, instance=instance, priority=priority))

    @rule(player=players, name=names)
    def ask(self, player: int, name: str) -> None:
        self.players[player].send(line("resolve", name=name), line("resolve", name=name, id=5) * 2)

    @rule(player=players, name=names)
    def wait(self, player: int, name: str) -> None:
        self.players[player].send(line("resolve", name=name, wait=3))

    @rule(player=players, end=st.sampled_from([Wire.reset, Wire.end]))
    def leave(self, player: int, end: Callable[[Wire], object]) -> None:
        self.players[player].for_each(end)
        self.players[player] = self.twins.connect()

    @rule()
    def exit(self) -> None:
        self.twins.for_each(lambda world: world.do(lambda: _exit(world)))

    @rule(seconds=st.sampled_from([0.3, 1.0, 2.0]))
    def advance(self, seconds: float) -> None:
        self.twins.advance(seconds)

    @rule(full=st.booleans())
    def fill(self, full: bool) -> None:
        self.twins.set_full(full)

    @rule(count=st.integers(1, 6))
    def run(self, count: int) -> None:
        for _ in range(count):
            self.poll()

    @rule()
    def settle(self) -> None:
        self.twins.settle()

    def poll(self) -> None:
        for name in NAMES:
            self.twins.reader.send(line("resolve", name=name))
            self.twins.run_once()
            for pair in self.twins.pairs:
                pair.received()

    @invariant()
    def cached_replies_match_the_registry(self) -> None:
        self.poll()
        registry = self.twins.worlds[0].parts.engine._registry
        for request, reply in self.twins.cache.known.items():
            name = json.loads(request)["name"]
            instances = list(registry.instances_of(name))
            best = min(entry.priority for entry in instances)
            [entry] = [entry for entry in instances if entry.priority == best]
            assert registry.is_ready(entry)
            cached = json.loads(reply)
            assert (cached["instance"], cached.get("priority", 0)) == (entry.instance, entry.priority)
            assert (cached["port"], cached["meta"], cached["rev"]) == (entry.port, entry.meta, entry.rev)


Histories.TestCase.settings = settings(max_examples=examples(150), stateful_step_count=40, deadline=None)
TestHistories = Histories.TestCase
