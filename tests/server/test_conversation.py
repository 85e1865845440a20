"""The order of requests and replies, without sockets: writes, reads, waiting resolves, `quit` and EOF."""

import json
from collections import deque
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from regd.core.limits import DEFAULT
from regd.protocol.commands import COMMANDS, Request
from regd.protocol.parser import Problem
from regd.server.conversation import Conversation, ConversationState


def line(cmd: str, id: int | None = None, **arguments: Any) -> bytes:
    fields = {"cmd": cmd, **arguments} | ({} if id is None else {"id": id})
    return json.dumps(fields).encode() + b"\n"


def write(id: int) -> bytes:
    return line("register", id, name="db", port=1)


def read(id: int) -> bytes:
    return line("resolve", id, name="db")


def wait(id: int | None = None) -> bytes:
    return line("resolve", id, name="db", wait=60)


class Executor:
    """Answers reads at once, and writes and waiting resolves when the test calls `commit` and `resolve`."""

    def __init__(self, requests_in_flight_max: int = 64) -> None:
        limits = replace(DEFAULT, requests_in_flight_max=requests_in_flight_max)
        self.conversation = Conversation(limits)
        self.sent: list[Any] = []  # ids of the answered requests, or error codes
        self.writes: deque[Request] = deque()
        self.waits: list[Request] = []

    def state(self) -> ConversationState:
        return self.conversation.state

    def receive(self, *lines: bytes) -> list[Any]:
        self.conversation.receive(b"".join(lines))
        return self.work()

    def end_input(self) -> list[Any]:
        self.conversation.end_input()
        return self.work()

    def commit(self) -> list[Any]:
        """Commit the oldest write."""
        self.conversation.add_write_reply(str(self.writes.popleft().id).encode())
        return self.work()

    def resolve(self, position: int = 0) -> list[Any]:
        """Answer a resolve that waits."""
        request = self.waits.pop(position)
        self.conversation.add_waiting_reply(request, str(request.id).encode())
        return self.work()

    def work(self) -> list[Any]:
        """Carry out the requests that may be carried out now, and return the replies."""
        before = len(self.sent)
        self.sent += [json.loads(reply.replace(b"None", b"null")) for reply in self.conversation.take_replies()]
        while (item := self.conversation.next()) is not None:
            self._carry_out(item)
        return self.sent[before:]

    def _carry_out(self, item: Request | Problem) -> None:
        if isinstance(item, Problem):
            assert not self.writes
            self.sent.append(str(item.refusal.code))
        elif COMMANDS[item.cmd].waits_for_commit:
            self.conversation.count_write()
            self.writes.append(item)
        elif "wait" in item.arguments:
            assert not self.writes
            self.conversation.add_waiting(item)
            self.waits.append(item)
        else:
            assert not self.writes, "a read must see the connection's own writes"
            self.sent.append(item.id)


@pytest.fixture
def peer() -> Executor:
    return Executor()


# Writes and reads.


def test_reads_are_answered_in_order(peer: Executor) -> None:
    assert peer.receive(read(1), read(2), read(3)) == [1, 2, 3]
    assert peer.conversation.is_caught_up


def test_read_waits_for_earlier_writes(peer: Executor) -> None:
    assert peer.receive(write(1), write(2), read(3), write(4)) == []
    assert [request.id for request in peer.writes] == [1, 2]
    assert peer.commit() == [1]
    assert peer.commit() == [2, 3]
    assert peer.commit() == [4]


def test_error_waits_for_an_earlier_write(peer: Executor) -> None:
    assert peer.receive(write(1), b"{\n", read(2)) == []
    assert peer.commit() == [1, "bad_json", 2]


def test_writes_are_submitted_up_to_the_limit() -> None:
    peer = Executor(requests_in_flight_max=2)
    peer.receive(write(1), write(2), write(3))
    assert peer.conversation.in_flight == 2
    assert not peer.conversation.wants_input
    assert peer.commit() == [1]
    assert (peer.conversation.in_flight, peer.conversation.wants_input) == (2, True)
    assert peer.commit() + peer.commit() == [2, 3]


def test_deferred_request_stops_reading_until_it_is_answered(peer: Executor) -> None:
    peer.receive(write(1))
    assert (peer.conversation.wants_input, peer.conversation.is_caught_up) == (True, True)
    peer.receive(read(2))
    assert (peer.conversation.wants_input, peer.conversation.is_caught_up) == (False, False)
    assert (peer.conversation.is_deferred, peer.conversation.has_input) == (True, True)
    peer.commit()
    assert (peer.conversation.wants_input, peer.conversation.is_caught_up) == (True, True)


def test_request_that_is_put_back_comes_next(peer: Executor) -> None:
    peer.conversation.receive(read(1) + read(2))
    request = peer.conversation.next()
    assert isinstance(request, Request)
    peer.conversation.defer(request)
    assert peer.conversation.is_deferred
    assert peer.work() == [1, 2]


def test_committed_reply_is_owed_until_it_is_taken(peer: Executor) -> None:
    peer.receive(write(1))
    peer.conversation.add_write_reply(b"1")
    assert (peer.conversation.in_flight, peer.conversation.owes_replies) == (0, True)
    assert peer.conversation.take_replies() == [b"1"]
    assert not peer.conversation.owes_replies


def test_unfinished_line_is_not_caught_up(peer: Executor) -> None:
    assert peer.receive(read(1)[:-5]) == []
    assert not peer.conversation.is_caught_up
    assert peer.receive(read(1)[-5:]) == [1]


def test_received_bytes_are_split_into_lines_by_next_alone(peer: Executor) -> None:
    peer.conversation.receive(read(1) + read(2)[:-5])
    assert (peer.conversation.parser.has_lines, peer.conversation.has_input) == (False, True)
    assert (peer.conversation.wants_input, peer.conversation.is_caught_up) == (False, False)
    assert peer.conversation.waiting_bytes == len(read(1) + read(2)[:-5])
    assert peer.work() == [1]
    assert peer.conversation.waiting_bytes == len(read(2)[:-5])
    assert peer.conversation.wants_input


def test_input_may_end_before_it_is_split(peer: Executor) -> None:
    peer.receive(read(1)[:5])
    peer.conversation.receive(read(1)[5:] + read(2)[:-1])
    assert peer.end_input() == [1, 2]
    assert peer.conversation.is_drained


# Waiting resolves.


def test_waiting_resolve_with_an_id_is_overtaken(peer: Executor) -> None:
    assert peer.receive(wait(1), read(2), wait(3)) == [2]
    assert peer.resolve(position=1) == [3]
    assert peer.resolve() == [1]
    assert peer.conversation.waiting == 0


def test_waiting_resolve_without_an_id_blocks(peer: Executor) -> None:
    assert peer.receive(wait(1), wait(), read(2)) == []
    assert peer.state() is ConversationState.BLOCKED
    assert peer.resolve(position=0) == [1]  # answered, since it has an id; the resolve without an id still blocks
    assert peer.resolve() == [None, 2]
    assert peer.state() is ConversationState.OPEN


def test_resolve_waits_for_an_earlier_write(peer: Executor) -> None:
    peer.receive(write(1), wait(2))
    assert peer.conversation.waiting == 0
    assert peer.commit() == [1]
    assert peer.conversation.waiting == 1


def test_blocked_client_is_read_up_to_a_line(peer: Executor) -> None:
    peer.receive(wait())
    peer.receive(read(1))
    assert (peer.conversation.wants_input, peer.conversation.is_caught_up) == (True, False)
    peer.receive(read(2) * 2_000)
    assert not peer.conversation.wants_input


# `quit`.


def test_quit_ends_reading(peer: Executor) -> None:
    assert peer.receive(read(1), b"quit\n", read(2)) == [1]
    assert (peer.state(), peer.conversation.is_finished) == (ConversationState.QUITTING, True)
    assert peer.receive(read(3)) == []
    assert peer.conversation.parser.waiting_bytes == 0
    assert peer.conversation.wants_input  # to notice the client's EOF


def test_quit_waits_for_writes(peer: Executor) -> None:
    peer.receive(write(1), b"quit\n", write(2))
    assert not peer.conversation.is_finished
    assert (peer.commit(), peer.conversation.is_finished) == ([1], True)
    assert not peer.writes


def test_quit_waits_for_waiting_resolves(peer: Executor) -> None:
    peer.receive(wait(1), wait(2), b"quit\n", read(3))
    assert (peer.state(), peer.conversation.is_finished) == (ConversationState.QUITTING, False)
    assert peer.resolve(position=1) == [2]
    assert not peer.conversation.is_finished
    assert peer.resolve() == [1]
    assert peer.conversation.is_finished


def test_quit_after_a_blocking_resolve(peer: Executor) -> None:
    peer.receive(wait(), b"quit\n")
    assert peer.state() is ConversationState.BLOCKED
    assert peer.resolve() == [None]
    assert peer.conversation.is_finished


def test_untaken_reply_is_owed_before_the_end(peer: Executor) -> None:
    peer.receive(wait(1), b"quit\n")
    peer.conversation.add_waiting_reply(peer.waits[0], b"1")
    assert not peer.conversation.is_finished
    peer.conversation.take_replies()
    assert peer.conversation.is_finished


# EOF, and the end of the conversation.


def test_unfinished_text_at_eof_is_a_line(peer: Executor) -> None:
    assert peer.receive(read(1)[:-1]) == []
    assert peer.end_input() == [1]
    assert peer.conversation.is_drained
    assert not peer.conversation.is_caught_up


def test_input_is_drained_when_all_is_answered(peer: Executor) -> None:
    peer.receive(write(1), read(2))
    peer.end_input()
    assert not peer.conversation.is_drained
    assert peer.commit() == [1, 2]
    assert peer.conversation.is_drained


def test_waiting_resolves_outlive_the_input(peer: Executor) -> None:
    peer.receive(wait(1))
    peer.end_input()
    assert (peer.conversation.is_drained, peer.conversation.waiting) == (True, 1)
    assert peer.resolve() == [1]


def test_nothing_is_drained_before_eof(peer: Executor) -> None:
    peer.receive(read(1))
    assert not peer.conversation.is_drained


@pytest.mark.parametrize("request_line", [write(1), wait(1), wait()])
def test_late_replies_are_dropped_after_the_end(request_line: bytes, peer: Executor) -> None:
    peer.receive(request_line)
    peer.conversation.end()
    assert not peer.conversation.owes_replies
    assert (peer.commit() if peer.writes else peer.resolve()) == []
    assert (peer.receive(read(2)), peer.state()) == ([], ConversationState.ENDED)


def test_end_drops_untaken_replies(peer: Executor) -> None:
    peer.receive(write(1), read(2))
    peer.conversation.add_write_reply(b"1")
    peer.conversation.end()
    assert peer.conversation.take_replies() == []
    assert not peer.conversation.is_deferred


# Random conversations.

_KINDS = st.sampled_from(["read", "write", "wait", "blocking", "error"])


@given(st.lists(_KINDS, max_size=12), st.lists(st.integers(0, 5), max_size=40), st.booleans(), st.integers(1, 3))
def test_random_conversations(kinds: list[str], choices: list[int], quits: bool, in_flight_max: int) -> None:
    """Each request is answered once, and only waiting resolves are overtaken.

    The order in which writes are committed and resolves answered is random. The executor checks that a read sees
    the writes before it.
    """
    peer = Executor(in_flight_max)
    lines = {"read": read, "write": write, "wait": wait}
    script = [lines[kind](n) if kind in lines else wait() if kind == "blocking" else b"{\n"
              for n, kind in enumerate(kinds)]  # fmt: skip
    expected = [
        n if kind in lines else None if kind == "blocking" else "bad_json" for n, kind in enumerate(kinds)
    ]
    stream = deque([*script, *([b"quit\n", read(99)] if quits else [])])
    for choice in [*choices, *range(6)] * (len(kinds) + 2):
        if choice in (0, 1) and stream:
            peer.receive(stream.popleft())
        elif choice in (2, 3) and peer.writes:
            peer.commit()
        elif choice in (4, 5) and peer.waits:
            peer.resolve(choice % len(peer.waits))
    while stream or peer.writes or peer.waits:
        peer.receive(*stream)
        stream.clear()
        if peer.writes:
            peer.commit()
        elif peer.waits:
            peer.resolve()
    overtaken = {n for n, kind in enumerate(kinds) if kind == "wait"}
    assert sorted(map(str, peer.sent)) == sorted(map(str, expected))
    in_order = [reply for reply in peer.sent if reply not in overtaken]
    assert in_order == [reply for reply in expected if reply not in overtaken]
    assert peer.conversation.is_finished is quits
    assert peer.conversation.is_caught_up is not quits


def test_large_read_is_split_in_slices() -> None:
    conversation = Conversation(DEFAULT)
    conversation.receive(b" \n" * 100_000 + read(1) + b"unfinished")
    sizes = [conversation.waiting_bytes]
    while (item := conversation.next()) is None:
        assert conversation.has_unsplit
        sizes.append(conversation.waiting_bytes)
    assert isinstance(item, Request)
    assert max(before - after for before, after in pairwise(sizes)) <= 16_384
    conversation.end_input()
    assert isinstance(conversation.next(), Problem)
    assert not conversation.has_unsplit


def test_input_of_a_blocked_client_is_not_split() -> None:
    peer = Executor()
    assert peer.receive(wait(), read(1) * 1_000) == []
    assert not peer.conversation.has_unsplit
    assert len(peer.resolve()) == 1_001


def test_line_whose_end_waits_to_be_split_is_not_unfinished() -> None:
    """The client has sent the whole line, so it must not be closed for an unfinished line."""
    conversation = Conversation(DEFAULT)
    conversation.receive(b'{"cmd":"resolve","name":"a","wait":1}\nping\n{"cmd":')
    request = conversation.next()
    assert isinstance(request, Request)
    conversation.add_waiting(request)
    assert conversation.is_within_line
    conversation.receive(b'"ping"}\n')
    assert conversation.next() is None
    assert not conversation.is_within_line
