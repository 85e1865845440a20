"""Arbitrary bytes change only what valid requests in them ask for: the corpus, and mutated requests.

The long form, coverage-guided, is `python -m tests.long.fuzz.run`.
"""

import gc
import json
import os
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from regd.core.history import History
from regd.protocol.commands import COMMANDS
from tests.long.fuzz import oracle
from tests.long.fuzz.conversation import BEFORE, Conversation
from tests.long.fuzz.run import CORPUS
from tests.long.fuzz.run import TARGETS as NAMES
from tests.long.fuzz.targets import SEPARATOR, TARGETS, decoder, journal, loader, planned, reader, session
from tests.support.length import LONG, examples
from tests.support.world import TIGHT, World, faked_system

pytestmark = pytest.mark.skipif(not hasattr(os, "eventfd"), reason="no eventfd, which stands for processes here")

KEPT = sorted(CORPUS.glob("*/*"))
STRANGERS = [path.read_bytes()[1:] for path in KEPT if path.name.startswith("stranger-")]
JOURNALS = [path.read_bytes() for path in KEPT if path.parent.name == "journal"]
FILES = [path.read_bytes() for path in KEPT if path.parent.name == "loader"]


def test_corpus_is_complete() -> None:
    assert list(TARGETS) == list(NAMES)
    assert {path.parent.name for path in KEPT} == set(TARGETS)
    assert len(KEPT) >= 100


def test_oracle_has_every_command() -> None:
    assert oracle.COMMANDS.keys() == COMMANDS.keys()
    for cmd, (needed, optional) in oracle.COMMANDS.items():
        assert needed == set(COMMANDS[cmd].required)
        assert needed | optional == COMMANDS[cmd].arguments.keys()


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize("of", TARGETS)
def test_corpus(of: str, name: str) -> None:
    """Every input of the corpus runs through all targets."""
    for path in (CORPUS / of).iterdir():
        try:
            TARGETS[name](path.read_bytes())
        except BaseException as error:
            error.add_note(f"python -m tests.long.fuzz.run {name} --input {path.relative_to(CORPUS.parents[3])}")
            raise


# Valid and nearly valid requests, with bytes flipped, cut, doubled and joined.

names = st.sampled_from(["a", "b", "db", "worker", "cache", "job", "kept", "a.b-c_d"])
instances = st.sampled_from(["", "1", "A.b_c-1"])
texts = st.text(max_size=4)
values: dict[str, st.SearchStrategy[object]] = {
    "name": names,
    "port": st.sampled_from([1, 2, 5061, 5432, 6379, 7000, 7001, 65_535]),
    "host": st.sampled_from(["127.0.0.1", "::1", "localhost", "db.example"]),
    "instance": instances,
    "meta": st.sampled_from([{}, {"zone": "a"}]) | st.dictionaries(texts, texts, max_size=2),
    "state": st.sampled_from(["starting", "ready", "draining"]),
    "priority": st.sampled_from([0, 1, 65_535]),
    "hold": st.booleans(),
    "force": st.booleans(),
    "all": st.booleans(),
    "pid": st.sampled_from([22, 23, 24, 4242]),
    "ttl": st.sampled_from([1, 1.5, 30, 86_400]),
    "wait": st.sampled_from([0, 0.5, 30]),
    "if": st.integers(0, 9),
    "since": st.integers(6, 12),
    "before": st.integers(6, 12),
    "age_s": st.sampled_from([0, 0.5, 60]),
    "watch": st.integers(1, 4),
    "limit": st.integers(1, 4),
    "topic": st.sampled_from(sorted(oracle.COMMANDS)),
    "epoch": st.sampled_from(["5eed5eed5eed5eed", "another"]),
    "after": st.sampled_from(["db", "worker/1"]),
}
odd: st.SearchStrategy[object] = st.sampled_from(
    [None, True, -1, 0, 1e999, float("nan"), 2**63, "", "\ud800", [], {}, {"a": 1}, "*", "::", "A"]
)


@st.composite
def requests(draw: st.DrawFn) -> bytes:
    cmd = draw(st.sampled_from(sorted(oracle.COMMANDS)))
    needed, optional = oracle.COMMANDS[cmd]
    chosen = sorted(needed) + draw(
        st.lists(st.sampled_from(sorted(optional) or ["name"]), max_size=3, unique=True)
    )
    fields = {
        "cmd": cmd,
        **{argument: draw(values[argument]) for argument in chosen if argument in needed | optional},
    }
    if draw(st.booleans()):
        fields["id"] = draw(st.integers(0, 3) | texts)
    if draw(st.integers(0, 9)) == 0:
        fields[draw(st.sampled_from(["id", "cmd", *values]))] = draw(odd)
    line = json.dumps(fields, ensure_ascii=draw(st.booleans())).encode("utf-8", "surrogatepass")
    if draw(st.integers(0, 9)) == 0 and len(fields) > 1:
        line = line[:-1] + b"," + line[1:]  # duplicate keys
    return line


words = st.sampled_from(
    [b"help", b"ping", b"list", b"watch", b"resolve db", b"watch w*", b"quit", b"", b"\r\0", b"stats", b"LIST d*",
     b"register db 5061", b"Register db [::1]:1", b"register a localhost:2", b"deregister db", b"why db", b"history", b"pong",
     b"history db",
     b"resolve", b"register db", b"hello", b"REGISTER /db HTTP/1.1", b"GET / HTTP/1.0"]
)  # fmt: skip
ends = st.sampled_from([b"\n", b"\n", b"\n", b"\r\n", b"\r\0\r\n", b"\r\0\n", b" \n", b""])
lines = st.builds(
    bytes.__add__, st.one_of(requests(), requests(), requests(), words, st.sampled_from(STRANGERS)), ends
)


@st.composite
def mutated(draw: st.DrawFn, whole: st.SearchStrategy[bytes]) -> bytes:
    data = draw(whole)
    for _ in range(draw(st.sampled_from([0, 0, 1, 2]))):
        at = draw(st.integers(0, len(data)))
        to = draw(st.integers(at, min(at + 20, len(data))))
        match draw(st.integers(0, 3)):
            case 0 if at < len(data):
                data = data[:at] + bytes([data[at] ^ 1 << draw(st.integers(0, 7))]) + data[at + 1 :]
            case 1:
                data = data[:at] + data[to:]
            case 2:
                data = data[:to] + data[at:]
            case _:
                data = data[:at] + draw(st.binary(max_size=3)) + data[at:]
    return data


plans = st.text(st.sampled_from([*".~<>)tTsSdDx$!", *map(chr, (1, 2, 7, 40, 90, 127))]), max_size=12).map(
    lambda plan: plan.encode("latin-1")
)
streams = mutated(st.lists(lines, max_size=8).map(b"".join))
planned_streams = st.builds(lambda plan, stream: plan + b"\n" + stream, plans, streams)
within = settings(deadline=None, print_blob=True)


@given(planned_streams | st.binary(max_size=60))
@settings(within, max_examples=examples(300))
def test_stream_parses_equally_in_any_chunks(data: bytes) -> None:
    reader(data)


@given(mutated(requests()))
@settings(within, max_examples=examples(500))
def test_any_line_is_a_request_or_refused(data: bytes) -> None:
    decoder(data)


@given(planned_streams)
@settings(within, max_examples=examples(400))
def test_any_session_leaves_only_requested_changes(data: bytes) -> None:
    session(data)


@given(mutated(st.sampled_from(FILES)))
@settings(within, max_examples=examples(500))
def test_any_file_loads_or_is_refused(data: bytes) -> None:
    loader(data)


parts = st.lists(
    st.sampled_from([line for data in JOURNALS for line in data.splitlines(keepends=True)]), max_size=6
).map(b"".join)
journals = st.sampled_from(JOURNALS) | st.builds(
    lambda data, more: SEPARATOR.join([data, *more]), st.sampled_from(JOURNALS), st.lists(parts, max_size=2)
)


@given(mutated(journals) | st.lists(parts, max_size=3).map(SEPARATOR.join))
@settings(within, max_examples=examples(1_000))
def test_any_journal_loads_or_is_refused(data: bytes) -> None:
    journal(data)


# Memory.

ROUNDS = 16 if LONG else 4


def census(world: World) -> Counter[str]:
    """Count the objects of regd's classes, except the history, which has a limit."""
    registry = world.parts.engine._registry
    registry.history = History(registry.rev, TIGHT)
    registry._departures.clear()
    assert world.server._findings is not None
    world.server._findings._last.clear()
    return Counter(
        f"{kind.__module__}.{kind.__qualname__}"
        for kind in map(type, gc.get_objects())
        if str(kind.__module__).startswith("regd.")
    )


@pytest.mark.long
@pytest.mark.timeout(300)
def test_memory_does_not_grow() -> None:
    """Many conversations with one daemon leave no objects. The garbage collector runs once, at the end."""
    inputs = [path.read_bytes() for path in KEPT if path.parent.name == "session"]

    def talk() -> None:
        for data in inputs:
            conversation = Conversation(world)
            conversation.run(*planned(data))
            conversation.check()
            vars(conversation).clear()  # the test's own reference cycles

    with faked_system():
        world = World(BEFORE)
        try:
            talk()
            gc.collect()
            before = census(world)
            gc.disable()
            for _ in range(ROUNDS):
                talk()
            gc.collect()
            left = census(world) - before
        finally:
            gc.enable()
            world.stop()
    assert not left
