"""What is answered again without work is what the registry would say in that moment, whatever happens."""

import itertools
import json
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, ClassVar

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from regd.core.holders import HolderGone
from regd.core.limits import Limits
from regd.core.model import Entry, Holder, Process, Reason, State
from regd.core.registry import Registry
from regd.core.transaction import Transaction
from regd.server.resolve_cache import ResolveCache
from tests.support.length import examples
from tests.support.twins import FLUSH_TURNS, PLAIN, Line, Twins, line, system
from tests.support.wire import Wire
from tests.support.world import World


def ports(replies: list[dict[str, Any]]) -> list[Any]:
    """Return what was resolved, without repetitions."""
    return [key for key, _ in itertools.groupby(each.get("port", each.get("error")) for each in replies)]


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
    "with a lease from now on": ([line("register", name="db", port=1, ttl=5)], [1]),
    "held from now on": ([line("register", name="db", port=1, hold=True)], [1]),
    "of a process from now on": ([line("register", name="db", port=1, pid=4242)], [1]),
    "replaced twice in a batch": (
        [line("register", name="db", port=2), line("register", name="db", port=3)],
        [1, 3],
    ),
    "replaced and back in a batch": (
        [line("register", name="db", port=2), line("register", name="db", port=1)],
        [1],
    ),
    "deregistered and registered in a batch": (
        [line("deregister", name="db"), line("register", name="db", port=4)],
        [1, 4],
    ),
    "gone and come as another instance": (
        [line("deregister", name="db"), line("register", name="db", port=5, instance="x")],
        [1, 5],
    ),
    "what was there already": ([line("register", name="db", port=1)], [1]),
    "what is refused": ([line("register", name="db", port=2, **{"if": 99})], [1]),
    "another name": ([line("register", name="bd", port=2), line("deregister", name="bd")], [1]),
}


@pytest.mark.parametrize(("requests", "expected"), CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("together", [True, False])
def test_after_a_change_nobody_hears_what_was_before_it(
    twins: Twins, requests: list[bytes], expected: list[Any], together: bool
) -> None:
    twins.know()
    before = twins.ask()
    for chunk in [b"".join(requests)] if together else requests:
        twins.writer.send(chunk)
        replies = twins.follow()
        if together:
            assert ports([before, *replies]) == expected
    assert ports(replies)[-1] == expected[-1]
    listed = twins.ask(line("list", name="db"))["instances"]
    found = {key: value for key, value in twins.ask().items() if key != "ok"}
    assert [each for each in listed if each["state"] == "ready"] == ([found] if "error" not in found else [])
    if "error" not in found:
        twins.know()


def test_a_change_that_the_disk_refuses_leaves_what_was_right(twins: Twins) -> None:
    twins.know()
    count = twins.replies.count
    twins.set_full(True)
    for request in (line("register", name="db", port=2), line("deregister", name="db")):
        twins.writer.send(request)
        assert ports(twins.follow()) == [1]
    assert twins.replies.count == count + 80
    twins.set_full(False)
    twins.writer.send(line("register", name="db", port=3))
    assert ports([twins.ask(), *twins.follow()]) == [1, 3]


def test_of_two_instances_each_has_its_turn_and_of_one_again_none_is_taken(twins: Twins) -> None:
    twins.know()
    twins.writer.send(line("register", name="db", port=2, instance="2"))
    assert ports(twins.follow())[:6] == [1, 2, 1, 2, 1, 2]
    count = twins.replies.count
    twins.write(line("deregister", name="db", instance="2"))
    assert ports(twins.follow(5)) == [1]
    assert twins.replies.count > count
    twins.write(line("register", name="db", port=2, instance="2"))
    twins.follow(3)
    twins.write(line("deregister", name="db"))
    assert ports(twins.follow(5)) == [2]
    twins.know()


def test_one_that_is_ready_among_those_that_are_not_is_found_by_looking(twins: Twins) -> None:
    """Its turn may not be the only one for long: two instances are never remembered."""
    twins.write(line("register", name="db", port=2, instance="2", state="draining"))
    count = twins.replies.count
    assert ports(twins.follow(5)) == [1]
    assert twins.replies.count == count
    twins.write(line("update", name="db", instance="2", state="ready"))
    assert ports(twins.follow(4)) in ([1, 2, 1, 2], [2, 1, 2, 1])


ENDINGS: dict[str, tuple[bytes, Callable[[Twins, Line], object], str]] = {
    "reset": (line("register", name="db", port=1, hold=True), lambda _, held: held.each(Wire.reset), "closed"),
    "closed": (line("register", name="db", port=1, hold=True), lambda _, held: held.each(Wire.end), "closed"),
    "quit": (line("register", name="db", port=1, hold=True), lambda _, held: held.send(b"quit\n"), "closed"),
    "a stranger": (
        line("register", name="db", port=1, hold=True),
        lambda _, held: held.send(b"GET / HTTP/1.1\r\n"),
        "closed",
    ),
    "exited": (
        line("register", name="db", port=1, pid=4242),
        lambda twins, _: twins.each(lambda world: world.do(lambda: _exit(world))),
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
    for process in world.services.engine._registry.lifetimes.processes:
        world.services.reaper._process_ended(process)


@pytest.mark.parametrize(("request_", "end", "reason"), ENDINGS.values(), ids=ENDINGS)
@pytest.mark.parametrize("full", [False, True])
def test_who_is_gone_is_not_resolved_from_that_moment(
    twins: Twins, request_: bytes, end: Callable[[Twins, Line], object], reason: str, full: bool
) -> None:
    """Long before that has landed, and though the disk is full."""
    twins.write(line("deregister", name="db"))
    holder = twins.connect()
    holder.send(request_)
    twins.settle()
    holder.new()
    twins.know()
    twins.set_full(full)
    registry = twins.worlds[0].services.engine._registry
    rev = registry.rev
    end(twins, holder)
    before_it_landed = []
    while registry.rev == rev:
        before_it_landed.append(twins.ask())
    assert ports(before_it_landed[2:]) == ["not_found"]
    assert len(before_it_landed) >= FLUSH_TURNS
    assert reason in before_it_landed[-1]["last"]["reason"]
    assert ports(twins.follow(10)) == ["not_found"]
    twins.set_full(False)
    twins.advance(2)
    assert ports(twins.follow(10)) == ["not_found"]


def test_who_ends_while_its_registration_is_on_its_way_is_never_resolved(twins: Twins) -> None:
    twins.know()
    holder = twins.connect()
    holder.send(line("register", name="db", port=2, hold=True))
    twins.turn()
    twins.turn()
    holder.each(Wire.reset)
    assert ports([twins.ask(), *twins.follow()]) == [1, "not_found"]


@pytest.mark.parametrize("last", [False, True])
def test_of_several_holders_each_may_go_and_the_last_takes_it_along(twins: Twins, last: bool) -> None:
    holders = [twins.connect() for _ in range(3)]
    for holder in holders:
        holder.send(line("register", name="db", port=1, hold=True))
        twins.settle()
    twins.know()
    for holder in holders[: 3 if last else 2]:
        holder.each(Wire.reset)
    assert ports(twins.follow())[-1] == ("not_found" if last else 1)


def test_a_holder_that_withdraws_leaves_it_to_the_others(twins: Twins) -> None:
    one, two = twins.connect(), twins.connect()
    for holder in (one, two):
        holder.send(line("register", name="db", port=1, hold=True))
        twins.settle()
    twins.know()
    one.send(line("update", name="db", state="draining"))
    assert ports(twins.follow()) == [1]
    two.each(Wire.reset)
    twins.turn()
    assert ports(twins.follow()) == ["not_found"]


def test_the_last_that_holds_it_may_withdraw_before_the_end_of_another_has_landed(twins: Twins) -> None:
    """The change is one that no watcher hears of, and makes it unready all the same."""
    one, two = twins.connect(), twins.connect()
    for holder in (one, two):
        holder.send(line("register", name="db", port=1, hold=True))
        twins.settle()
    twins.each(lambda world: setattr(world.loop, "flush_turns", 20))
    one.send(line("update", name="db", state="draining"))
    twins.turn()
    twins.turn()
    two.each(Wire.reset)
    twins.turn()
    twins.know()
    assert ports(twins.follow(60)) == [1, "not_found"]


def test_a_take_over_by_force_is_seen_when_it_lands(twins: Twins) -> None:
    holder = twins.connect()
    holder.send(line("register", name="db", port=1, hold=True))
    twins.settle()
    twins.know()
    twins.writer.send(line("register", name="db", port=2), line("register", name="db", port=2, force=True))
    assert ports([twins.ask(), *twins.follow()]) == [1, 2]
    twins.know()
    holder.each(Wire.reset)  # it holds nothing any more
    assert ports(twins.follow()) == [2]


def test_a_lease_that_is_renewed_goes_on(twins: Twins) -> None:
    twins.write(line("register", name="db", port=1, ttl=5))
    twins.know()
    for _ in range(3):
        twins.advance(4)
        twins.write(line("renew", name="db"))
        assert ports(twins.follow(3)) == [1]
    twins.advance(5)
    assert ports(twins.follow()) == ["not_found"]
    twins.write(line("register", name="db", port=1))
    twins.know()


def test_what_was_loaded_and_is_not_claimed_in_time_is_not_resolved(twins: Twins) -> None:
    with system():
        loaded = Twins(b'{"db": {"port": 1, "hold": true}, "old": {"port": 2, "pid": 4242, "born": "boot/1"}}')
        loaded.know()
        assert loaded.ask(line("resolve", name="old"))["error"] == "not_found"
        loaded.advance(29)
        assert ports(loaded.follow(5)) == [1]
        loaded.advance(1)
        assert ports(loaded.follow()) == ["not_found"]
        loaded.close()


def test_nothing_is_remembered_of_names_that_are_gone(twins: Twins) -> None:
    """What is remembered is bounded by what is registered."""
    for n in range(50):
        twins.write(line("register", name=f"n{n}", port=1))
        twins.know(f"n{n}")
        twins.ask(line("resolve", name=f"m{n}"))
    twins.know()
    assert len(twins.replies.known) == 51
    twins.write(*(line("deregister", name=f"n{n}") for n in range(50)))
    assert list(twins.replies.known) == [PLAIN]


# What the registry tells.


def entry(name: str = "db", instance: str = "", port: int = 1, holders: tuple[Holder, ...] = ()) -> Entry:
    return Entry(name, instance, "127.0.0.1", port, {}, State.READY, 0, 0.0, holders)


def test_the_registry_tells_of_each_name_that_readers_are_told_otherwise_of() -> None:
    """When it tells, they would be told so already."""
    registry = Registry([entry(), entry("other")], 1)
    told: list[tuple[str, int]] = []

    def ready(name: str) -> int:
        search = registry.search(name, None, {}, 10)
        assert search.go_on(10)
        return len(search.found)

    registry.on_entry_changed = lambda name: told.append((name, ready(name)))

    def land(*judge: Callable[[Transaction], object]) -> list[tuple[str, int]]:
        transaction = Transaction(registry, 0.0)
        for each in judge:
            made = each(transaction)
            if isinstance(made, Iterator):
                list(made)
        told.clear()
        registry.apply(transaction.changes, 0.0)
        return list(told)

    holder = Holder(0, 7, hold=True, process=Process(8, "boot/8"), ttl_s=5.0)
    assert land(lambda transaction: transaction.register(entry(port=2))) == [("db", 0), ("db", 1)]
    assert land(lambda transaction: transaction.register(entry(instance="x"))) == [("db", 2)]
    assert land(lambda transaction: transaction.update(("db", "x"), None, State.DRAINING)) == [("db", 1)]
    assert land(lambda transaction: transaction.deregister(("db", "x"))) == [("db", 1)]
    assert land(lambda transaction: transaction.register(entry(port=2))) == []  # nothing changes
    for ending in (
        HolderGone(Reason.CLOSED, session=7),
        HolderGone(Reason.EXITED, process=Process(8, "boot/8")),
    ):
        land(lambda transaction: transaction.register(entry("held", holders=(holder,)), session=7))
        told.clear()
        registry.mark_dead(ending)
        assert told == [("held", 0)]
        assert land(lambda transaction, ending=ending: transaction.end(ending)) == [("held", 0)]  # type: ignore[misc]
        registry.lifetimes.settle(ending)
    land(lambda transaction: transaction.register(entry("held", holders=(holder,)), session=7))
    told.clear()
    assert registry.expire(4.9, 10) == []
    assert told == []
    assert len(registry.expire(5.0, 10)) == 1
    assert told == [("held", 0)]


def test_an_end_of_very_many_forgets_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("regd.core.registry._TOUCHED_MAX", 2)
    registry, replies = Registry(), ResolveCache()
    registry.on_entry_changed, registry.on_any_changed = replies.invalidate, replies.invalidate_all
    transaction = Transaction(registry, 0.0)
    for n in range(3):
        transaction.register(entry(f"n{n}", holders=(Holder(0, 7, hold=True),)), session=7)
    registry.apply(transaction.changes, 0.0)
    for n in range(3):
        replies.put(next(registry.instances_of(f"n{n}")))
    asked = b'{"cmd":"resolve","name":"n1"}\n'
    assert replies.lookup(asked) is not None
    registry.mark_dead(HolderGone(Reason.CLOSED, session=7))
    assert replies.lookup(asked) is None
    replies.put(next(registry.instances_of("n1")))
    assert replies.lookup(asked) is not None


def test_what_is_remembered_is_forgotten_by_name() -> None:
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


# All of it, in any order.

NAMES = ["a", "b"]
names = st.sampled_from(NAMES)
players = st.integers(0, 2)


MANY_INSTANCES = 20


def slow_twins() -> Twins:
    """Two daemons that look at one instance a turn, and a name with one that is ready, the last."""
    made = Twins(limits=Limits(search_step_max=1))
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


class Histories(RuleBasedStateMachine):
    """Two connections and more that write and hold, and one that asks in every turn."""

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
            world.loop.flush_turns = flush

    @rule(
        player=players,
        name=names,
        instance=st.sampled_from(["", "", "x"]),
        port=st.integers(1, 2),
        held=st.sampled_from([{}, {}, {"hold": True}, {"pid": 4242}, {"ttl": 2}, {"hold": True, "ttl": 2}]),
        state=st.sampled_from(["ready", "ready", "ready", "draining"]),
        force=st.booleans(),
    )
    def register(
        self, player: int, name: str, instance: str, port: int, held: dict[str, Any], state: str, force: bool
    ) -> None:
        self.players[player].send(
            line("register", name=name, instance=instance, port=port, state=state, force=force, **held)
        )

    @rule(player=players, name=names, instance=st.sampled_from(["", "", "x"]))
    def deregister(self, player: int, name: str, instance: str) -> None:
        self.players[player].send(line("deregister", name=name, instance=instance))

    @rule(player=players, name=names, state=st.sampled_from(["ready", "draining"]), k=st.integers(1, 2))
    def update(self, player: int, name: str, state: str, k: int) -> None:
        self.players[player].send(line("update", name=name, state=state, meta={"k": str(k)}))

    @rule(player=players, name=names)
    def ask(self, player: int, name: str) -> None:
        self.players[player].send(line("resolve", name=name), line("resolve", name=name, id=5) * 2)

    @rule(player=players, name=names)
    def wait(self, player: int, name: str) -> None:
        self.players[player].send(line("resolve", name=name, wait=3))

    @rule(player=players, end=st.sampled_from([Wire.reset, Wire.end]))
    def leave(self, player: int, end: Callable[[Wire], object]) -> None:
        self.players[player].each(end)
        self.players[player] = self.twins.connect()

    @rule()
    def exit(self) -> None:
        self.twins.each(lambda world: world.do(lambda: _exit(world)))

    @rule(seconds=st.sampled_from([0.3, 1.0, 2.0]))
    def advance(self, seconds: float) -> None:
        self.twins.advance(seconds)

    @rule(full=st.booleans())
    def fill(self, full: bool) -> None:
        self.twins.set_full(full)

    @rule(count=st.integers(1, 6))
    def turn(self, count: int) -> None:
        for _ in range(count):
            self.look()

    @rule()
    def settle(self) -> None:
        self.twins.settle()

    def look(self) -> None:
        for name in NAMES:
            self.twins.asker.send(line("resolve", name=name))
            self.twins.turn()
            for each in self.twins.lines:
                each.new()

    @invariant()
    def all_say_the_same_and_the_registry_says_it_too(self) -> None:
        self.look()
        registry = self.twins.worlds[0].services.engine._registry
        for request, reply in self.twins.replies.known.items():
            name = json.loads(request)["name"]
            [found] = registry.instances_of(name)
            assert registry.is_ready(found)
            told = json.loads(reply)
            assert (told["port"], told["meta"], told["rev"]) == (found.port, found.meta, found.rev)


Histories.TestCase.settings = settings(max_examples=examples(150), stateful_step_count=40, deadline=None)
TestHistories = Histories.TestCase
