"""Random histories, compared with a plain model after each step, without sockets.

The steps are registrations, ends of holders and processes, jumps of time, restarts from the file, and watchers
that lag. After each step the registry equals the model, and the events of each watch add up to `list`.
"""

import json
from dataclasses import dataclass, field
from typing import Any, ClassVar

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from regd.core.errors import Refused
from regd.core.holders import HolderEnd
from regd.core.limits import Limits
from regd.core.model import Entry, Holder, Key, Process, Reason, State
from regd.core.registry import Registry
from regd.core.transaction import OwnerConflict, Transaction
from regd.protocol import messages
from regd.server.watches import Watch
from regd.storage.document import Position, entry_line, file_chunks, parse
from tests.support.length import examples

GRACE_S = 30.0
LIMITS = Limits(history_changes_max=20)


@dataclass
class Hold:
    """A holder in the model."""

    session: int | None
    hold: bool
    pid: int | None
    ttl: float | None
    withdrawn: bool = False
    due: float = float("inf")  # the end of the lease
    claim: float = float("inf")  # the deadline to claim it

    @property
    def who(self) -> tuple[object, ...]:
        if self.hold:
            return ("connection", self.session)
        return ("process", self.pid) if self.pid is not None else ("nobody",)

    @property
    def unclaimed(self) -> bool:
        return self.hold and self.session is None


@dataclass
class Known:
    """A registration in the model."""

    port: int
    meta: dict[str, str]
    state: str
    priority: int
    holds: list[Hold] = field(default_factory=list)


class Watcher:
    """A watcher, and the state that its events add up to."""

    def __init__(self, registry: Registry, meta: dict[str, str]) -> None:
        self.watch = Watch(None, 1, "*", meta, registry.rev)  # type: ignore[arg-type]  # nothing is pushed here
        self.state: dict[Key, dict[str, Any]] = {}
        self.rev = -1
        self.reset(registry)

    def reset(self, registry: Registry) -> None:
        entries = registry.page("*", self.watch.meta, None, 1_000).entries
        self.state = {entry.key: json.loads(messages.instance(entry)) for entry in entries}
        self.rev = registry.rev

    def follow(self, registry: Registry) -> None:
        if not registry.history.has_all_after(self.rev):
            self.reset(registry)
        for change in registry.history.since(self.rev, 1_000):
            assert change.rev == self.rev + 1
            self.rev = change.rev
            line = self.watch.line(change)
            if line is None:
                continue
            event = json.loads(line)
            assert event["rev"] == change.rev
            key = (event["name"], event["instance"])
            if event["event"] == "down":
                del self.state[key]
            else:
                assert (key in self.state) is (event["event"] == "change")
                self.state[key] = {name: value for name, value in event.items() if name not in ("event", "watch")}


keys = st.sampled_from([("a", ""), ("a", "1"), ("b", "")])
sessions = st.integers(0, 2)
pids = st.integers(1, 3)
priorities = st.sampled_from([0, 0, 1, 300])
zones: st.SearchStrategy[dict[str, str]] = st.sampled_from([{}, {"zone": "a"}])


class Histories(RuleBasedStateMachine):
    settings: ClassVar[Any]

    def __init__(self) -> None:
        super().__init__()
        self.now = 1_000.0
        self.open = [1, 2, 3]  # the number of the connection that plays each session
        self.opened = 3
        self.born = {1: 1, 2: 1, 3: 1}
        self.registry = Registry(limits=LIMITS, now=self.now, claim_s=GRACE_S)
        self.model: dict[Key, Known] = {}
        self.watchers = [Watcher(self.registry, {}), Watcher(self.registry, {"zone": "a"})]

    def process(self, pid: int) -> Process:
        return Process(pid, f"boot/{self.born[pid]}")

    def land(self, transaction: Transaction) -> None:
        self.registry.apply(transaction.changes, self.now)

    def end(self, ending: HolderEnd) -> None:
        self.registry.mark_gone(ending)
        transaction = Transaction(self.registry, 5.0)
        list(transaction.end(ending))
        self.land(transaction)
        self.registry.holder_index.unmark(ending)

    def model_end(self, gone: Any) -> None:
        """Remove holders from the model, and the registrations whose last holder is removed."""
        for key, known in list(self.model.items()):
            kept = [holder for holder in known.holds if not gone(holder)]
            if len(kept) < len(known.holds):
                known.holds = kept
                if all(holder.withdrawn for holder in kept):
                    del self.model[key]

    @rule(
        key=keys,
        player=sessions,
        port=st.integers(1, 2),
        meta=zones,
        priority=priorities,
        hold=st.booleans(),
        pid=st.none() | pids,
        ttl=st.none() | st.sampled_from([5.0, 20.0]),
        force=st.booleans(),
    )
    def register(
        self,
        key: Key,
        player: int,
        port: int,
        meta: dict[str, str],
        priority: int,
        hold: bool,
        pid: int | None,
        ttl: float | None,
        force: bool,
    ) -> None:
        session = self.open[player]
        wish = Hold(session, hold, pid, ttl, due=self.now + ttl if ttl else float("inf"))
        conditional = hold or pid is not None or ttl is not None
        known = self.model.get(key)
        conflict = False
        if known is None:
            self.model[key] = Known(port, meta, "ready", priority, [wish] if conditional else [])
        elif known.port == port:
            same = [holder for holder in known.holds if holder.who == wish.who]
            claimed = [holder for holder in known.holds if hold and holder.unclaimed and holder.pid == pid]
            old = (same or claimed)[:1]
            others = [
                holder for holder in known.holds if all(holder is not one for one in old)
            ]  # the two may be equal
            known.holds = [*others, wish] if conditional else []
            known.meta, known.state, known.priority = meta, "ready", priority
        else:
            rivals = [
                holder
                for holder in known.holds
                if not (
                    holder.withdrawn
                    # A process that is a holder lives, else the holder would have ended.
                    or (holder.unclaimed and holder.pid is None)
                    or holder.session == session
                    or (pid and holder.pid == pid)
                )
            ]
            conflict = bool(rivals) and not force
            if not conflict:
                self.model[key] = Known(port, meta, "ready", priority, [wish] if conditional else [])
        transaction = Transaction(self.registry, 5.0)
        holders = (Holder(0, session, hold, self.process(pid) if pid else None, ttl),) if conditional else ()
        new = Entry(*key, "127.0.0.1", port, meta, State.READY, 0, 0.0, holders, priority)
        try:
            transaction.register(new, session=session, force=force)
        except OwnerConflict:
            assert conflict
            assert not transaction.changes
        else:
            assert not conflict
        self.land(transaction)

    @rule(key=keys, player=sessions)
    def deregister(self, key: Key, player: int) -> None:
        session = self.open[player]
        transaction = Transaction(self.registry, 5.0)
        known = self.model.get(key)
        try:
            removed = transaction.deregister(key, session=session)
        except Refused:
            assert known is None
            return
        assert known is not None
        others = [holder for holder in known.holds if holder.session != session]
        if len(others) < len(known.holds) and any(not holder.withdrawn for holder in others):
            known.holds = others
            assert removed == 0
        else:
            del self.model[key]
            assert removed == 1
            assert {lost.session for lost in transaction.lost} == {
                holder.session for holder in others if holder.session is not None
            }
        self.land(transaction)

    @rule(
        key=keys, player=sessions, state=st.sampled_from(["ready", "draining"]), priority=st.none() | priorities
    )
    def update(self, key: Key, player: int, state: str, priority: int | None) -> None:
        session = self.open[player]
        transaction = Transaction(self.registry, 5.0)
        known = self.model.get(key)
        try:
            transaction.update(key, None, State(state), priority=priority, session=session)
        except Refused:
            assert known is None
            return
        assert known is not None
        known.priority = known.priority if priority is None else priority
        own = [holder for holder in known.holds if holder.session == session]
        others = [holder for holder in known.holds if holder.session != session and not holder.withdrawn]
        if state == "draining" and own and others:
            for holder in own:
                holder.withdrawn = True
        else:
            known.state = state
            for holder in own:
                holder.withdrawn = False
        self.land(transaction)

    @rule(key=keys)
    def renew(self, key: Key) -> None:
        entry = self.registry.get(key)
        if entry is not None:
            for holder in entry.holders:
                if holder.ttl_s is not None:
                    self.registry.holder_index.renew(key, holder, self.now, holder.ttl_s)
            for hold in self.model[key].holds:
                hold.due = self.now + hold.ttl if hold.ttl else float("inf")

    @rule(player=sessions)
    def close(self, player: int) -> None:
        session = self.open[player]
        self.opened += 1
        self.open[player] = self.opened
        self.model_end(lambda each: each.hold and each.session == session)
        self.end(HolderEnd(Reason.CLOSED, session=session))

    @rule(pid=pids)
    def exit(self, pid: int) -> None:
        process = self.process(pid)
        self.born[pid] += 1
        self.model_end(lambda each: each.pid == pid)
        self.end(HolderEnd(Reason.EXITED, process=process))

    @rule(seconds=st.sampled_from([1.0, 4.9, 5.0, 20.0, 30.0]), refused=st.booleans())
    def advance(self, seconds: float, refused: bool) -> None:
        """Advance time. Unclaimed entries with a process are probed; `refused` is the result at all addresses."""
        self.now += seconds
        late = [holder for known in self.model.values() for holder in known.holds if holder.claim <= self.now]
        for holder in late:
            if holder.pid is not None and not refused:
                holder.claim = self.now + GRACE_S
        self.model_end(lambda each: each.due <= self.now or each.claim <= self.now)
        holders = self.registry.holder_index
        for ending in self.registry.expire(self.now, 1_000):
            self.end(ending)
        while holders.unclaimed:
            key, holder_id = holders.unclaimed.popleft()
            if refused:
                self.end(HolderEnd(Reason.CLOSED, holder=(key, holder_id)))
            else:
                holders.probe_at(key, holder_id, self.now + GRACE_S)

    @rule()
    def stall(self) -> None:
        """Suspend the daemon. The time is added to every deadline."""
        self.now += 100.0
        self.registry.holder_index.prolong(100.0)
        for known in self.model.values():
            for holder in known.holds:
                holder.due += 100.0
                holder.claim += 100.0

    @rule()
    def restart(self) -> None:
        entries = self.registry.page("*", {}, None, 1_000).entries
        written = b"".join(file_chunks(self.registry.rev, Position("epoch", 1), [*map(entry_line, entries)]))
        document = parse(written, 5.0)
        assert document.rev >= self.registry.rev
        self.registry = Registry(document.entries, document.rev, LIMITS, now=self.now, claim_s=GRACE_S)
        self.open = [session + 10 for session in self.open]
        self.opened = max(self.open)
        for known in self.model.values():
            known.holds = [holder for holder in known.holds if not holder.withdrawn]
            for holder in known.holds:
                holder.session = None
                holder.due = self.now + holder.ttl if holder.ttl else float("inf")
                holder.claim = self.now + GRACE_S if holder.hold else float("inf")
        self.watchers = [Watcher(self.registry, watcher.watch.meta) for watcher in self.watchers]  # type: ignore[arg-type]

    @rule(which=st.integers(0, 1))
    def watch(self, which: int) -> None:
        """Let a watcher read, perhaps after many changes."""
        watcher = self.watchers[which]
        watcher.follow(self.registry)
        entries = self.registry.page("*", watcher.watch.meta, None, 1_000).entries
        assert watcher.state == {entry.key: json.loads(messages.instance(entry)) for entry in entries}
        assert watcher.rev == self.registry.rev

    @invariant()
    def state_is_the_model(self) -> None:
        entries = self.registry.page("*", {}, None, 1_000).entries
        assert {entry.key for entry in entries} == set(self.model)
        for entry in entries:
            known = self.model[entry.key]
            assert (entry.port, entry.meta, entry.state) == (known.port, known.meta, known.state)
            assert entry.priority == known.priority
            held = [
                (
                    holder.session,
                    holder.hold,
                    holder.process and holder.process.pid,
                    holder.ttl_s,
                    holder.withdrawn,
                )
                for holder in entry.holders
            ]
            expected = [
                (holder.session, holder.hold, holder.pid, holder.ttl, holder.withdrawn) for holder in known.holds
            ]
            assert sorted(map(str, held)) == sorted(map(str, expected))

    @invariant()
    def ready_entries_are_resolved(self) -> None:
        for name in ("a", "b"):
            ready = [(known.priority, key) for key, known in self.model.items() if known.state == "ready"]
            ready = sorted((priority, key) for priority, key in ready if key[0] == name)
            search = self.registry.search(name, None, {}, 1_000)
            assert search.step(1_000)
            assert [(entry.priority, entry.key) for entry in search.found] == ready

    @invariant()
    def resolve_goes_around_among_the_best(self) -> None:
        for name, meta in (("a", {}), ("a", {"zone": "a"}), ("b", {})):
            fits = {
                key: known.priority
                for key, known in self.model.items()
                if key[0] == name and known.state == "ready" and meta.items() <= known.meta.items()
            }
            best = sorted(key for key, priority in fits.items() if priority == min(fits.values()))
            seen = []
            for _ in range(2 * len(best)):
                search = self.registry.search_round_robin(name, None, meta, 1)
                assert search.step(1_000)
                self.registry.mark_served(search.found[0], meta)
                seen.append(search.found[0].key)
            assert sorted(seen[: len(best)]) == sorted(seen[len(best) :]) == best
            assert seen[: len(best)] == seen[len(best) :]

    @invariant()
    def next_deadline_is_the_nearest_of_the_model(self) -> None:
        due = [min(holder.due, holder.claim) for known in self.model.values() for holder in known.holds]
        nearest = min(due, default=float("inf"))
        assert (self.registry.holder_index.next_deadline() or float("inf")) == pytest.approx(nearest)

    @invariant()
    def ended_holders_are_forgotten(self) -> None:
        index = self.registry.holder_index
        holders = [
            holder for entry in self.registry.page("*", {}, None, 1_000).entries for holder in entry.holders
        ]
        assert set(index._of_session) == {
            holder.session for holder in holders if holder.hold and holder.session is not None
        }
        assert set(index.processes) == {holder.process for holder in holders if holder.process is not None}
        assert {holder_id for holder_id, _ in index._due} <= {holder.id for holder in holders}
        assert index._awaits_probe == {holder.id for holder in holders if holder.unclaimed and holder.process}
        assert not index._gone_holders


Histories.TestCase.settings = settings(max_examples=examples(300), stateful_step_count=50, deadline=None)
TestHistories = Histories.TestCase
