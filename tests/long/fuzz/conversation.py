"""A peer that sends any bytes to a daemon, a well-behaved peer beside it, and the checks afterwards.

The plan says how the stream is sent, one byte a step:

    . ~    run one iteration of the event loop; run it until it is idle
    < > )  the peer stops reading; reads again; reads 100 bytes
    t T    0.1 s passes; 21 s
    s S    a commit takes five iterations of the loop; none
    d D    the disk becomes full; has space again
    x      every process ends
    $ !    the peer ends its side; resets the connection
    other  send that many bytes of the stream up to 127; above, 16 times the rest
"""

import re
from collections.abc import Callable
from functools import partial
from typing import Any

from regd.core.errors import Code
from regd.core.limits import DEFAULT
from regd.core.model import Change, Entry, Key, Op, Reason
from regd.core.registry import Registry
from regd.core.transaction import Transaction
from regd.storage.store import peek
from tests.long.fuzz import oracle
from tests.long.fuzz.oracle import Said
from tests.support.world import REGISTRY, TIGHT, World

BEFORE = b"""{
"$regd": {"format": 1, "rev": 7},
"db": {"port": 5432},
"worker/1": {"port": 5061, "meta": {"zone": "a"}, "ttl": 10},
"cache": {"port": 6379, "hold": true},
"job": {"port": 7000, "pid": 4242, "born": "boot/4242"}
}
"""
FRIEND = b"""\
{"cmd":"watch","id":"all"}
{"cmd":"register","name":"kept","port":7001,"hold":true,"id":"mine"}
"""
_CONDITIONS = {Reason.CLOSED, Reason.EXITED, Reason.EXPIRED}


class Conversation:
    """A peer that may send anything, and a well-behaved friend that watches, holds a name, and tidies up."""

    def __init__(self, world: World) -> None:
        self.world = world
        world.loop.flush_iterations = 0
        self.engine = world.parts.engine
        self.registry = world.parts.engine._registry
        self.friend = world.connect()
        self.friend.send(FRIEND)
        world.settle()
        self.first_rev = self.registry.rev
        self.cut_before = world.parts.counters.dropped
        self.peer = world.connect()
        self.connection, self.friends = self.peer.protocol, self.friend.protocol
        self.given = bytearray()  # bytes of the stream
        self.late = False  # enough time passed for an unfinished line to time out
        self.early = False  # the end came before the whole stream was sent
        self._actions: dict[int, Callable[[], object]] = {
            ord("."): world.loop.run_once,
            ord("~"): world.settle,
            ord("<"): lambda: setattr(self.peer, "peer_reads", False),
            ord(">"): lambda: world.do(self.peer.take),
            ord(")"): lambda: world.do(lambda: self.peer.take(100)),
            ord("t"): lambda: world.pass_time(0.1),
            ord("T"): self._idle,
            ord("s"): lambda: setattr(world.loop, "flush_iterations", 5),
            ord("S"): lambda: setattr(world.loop, "flush_iterations", 0),
            ord("d"): lambda: setattr(world.files, "failing", True),
            ord("D"): lambda: setattr(world.files, "failing", False),
            ord("x"): world.end_processes,
            ord("$"): self.peer.end,
            ord("!"): self.peer.reset,
        }

    def run(self, plan: bytes, stream: bytes) -> None:
        at = 0
        for step in plan:
            action = self._actions.get(step)
            if action is not None:
                action()
            else:
                size = step if step < 128 else (step - 127) * 16
                self._say(stream[at : at + size])
                at += size
        self._say(stream[at:])
        self.world.settle()

    def _say(self, data: bytes) -> None:
        if data and (self.peer.eof_sent or self.peer.is_reset):
            self.early = True
        elif data:
            self.given += data
            self.world.do(lambda: self.peer.send(data))

    def _idle(self) -> None:
        self.late = True
        self.world.pass_time(21)

    # The checks.

    def check(self) -> None:
        world, peer = self.world, self.peer
        world.files.failing = False
        world.do(peer.take)
        world.settle()
        self._check_closed()
        self._end()
        stream = bytes(self.given)
        self._check_replies(list(oracle.understood(stream, TIGHT.line_bytes_max, ended=not peer.is_reset)))
        # EOF ends the last line, even if a reset follows.
        writes = [
            request for request in oracle.understood(stream, TIGHT.line_bytes_max) if request.cmd in oracle.WRITES
        ]
        _explain(self.registry.history.since(self.first_rev, 10_000), writes)
        self._check_nothing_left()
        self._check_friend()
        self._check_file()
        self._tidy_up()

    def _check_closed(self) -> None:
        """The daemon closes the connection after `quit` and after a line of another protocol."""
        requests = list(oracle.understood(bytes(self.given), TIGHT.line_bytes_max, ended=False))
        sure = all(expectation.ends is not None for expectation in requests)
        if requests and sure and requests[-1].ends and not self.connection._conversation.waiting:
            self.world.pass_time(2 * TIGHT.close_linger_s_max)
            assert self.peer.lost

    def _end(self) -> None:
        """Send EOF and let all waits end. A connection with watches must be closed."""
        world, peer = self.world, self.peer
        world.do(peer.end)
        world.settle()
        while self.connection._conversation.waiting:  # and for the waits after it
            world.pass_time(TIGHT.wait_s_max + 1)
        if not peer.lost and self.connection._dispatcher.watches:
            world.do(peer.reset)
            world.pass_time(TIGHT.progress_s + 1)
        world.pass_time(2 * TIGHT.close_linger_s_max)
        assert peer.lost

    def _check_replies(self, said: list[Said]) -> None:
        """Every line is valid, and the replies match the requests in order, all of them or the first ones."""
        sent, http = _without_http(bytes(self.peer.sent))
        whole, _, rest = sent.rpartition(b"\n")
        cut = self.world.parts.counters.dropped > self.cut_before
        assert not rest or cut or self.peer.is_reset, rest
        lines = [is_a_line(line + b"\n") for line in whole.split(b"\n") if line]
        replies = [line for line in lines if "ok" in line]
        expected = [expectation for expectation in said if expectation.kind not in (oracle.QUIT, oracle.HTTP)]
        depends = [expectation for expectation in expected if expectation.ends is None]
        waits = any(expectation.arguments and "wait" in expectation.arguments for expectation in said)
        complete = not (cut or self.late or self.early or self.peer.is_reset or depends)
        if not complete:
            del replies[-1:]  # it may have an error line
        elif not (waits and said[-1].ends and said[-1].kind != oracle.QUIT):  # which ends waits
            assert len(replies) == len(expected), (expected, replies)
            assert oracle.is_http_refusal(http) is any(expectation.kind == oracle.HTTP for expectation in said), (
                http
            )
        if waits or depends:
            return  # it may have been overtaken
        for reply, expectation in zip(replies, expected, strict=False):
            _answers(reply, expectation)

    def _check_nothing_left(self) -> None:
        connections, friend = self.world.connections, self.friends
        assert connections.open == {friend}
        assert list(connections.sessions._open.values()) == [friend]
        assert connections.parts.counters.connections == 1
        for share in (connections.writers, connections.readers):
            assert not share.watches._to_send
            assert len(share.waiting_resolves) == 0
            assert not share.waiting_resolves._by_name
            assert not share.waiting_resolves._by_address
            assert not share.waiting_resolves.probes._probes
            assert not share.waiting_resolves.probes._queue
            for quota in (share.input, share.output):
                assert quota.total == 0
                assert not quota._sizes
            assert not share.slow_replies._taken
            assert not share.slow_replies._waiting
        assert not connections.half_closed._waiters
        assert (len(connections.writers.watches), len(connections.readers.watches)) == (1, 0)
        [watch] = next(iter(connections.writers.watches._watches.values()))  # the friend's
        assert (connections.writers.memory.total, connections.readers.memory.total) == (watch.pending_bytes, 0)
        for call in self.world.timers:
            assert getattr(call, "__self__", None) is not self.connection, call

    def _check_friend(self) -> None:
        """The friend is served, and its events add up to the registry."""
        self.friend.send(b'{"cmd":"ping","id":"there"}\n')
        self.world.settle()
        there: dict[tuple[str, str], dict[str, Any]] = {}
        lines = [is_a_line(line + b"\n") for line in bytes(self.friend.sent).split(b"\n") if line]
        for line in lines:
            match line.get("event"):
                case "up" | "change":
                    there[line["name"], line["instance"]] = line
                case "down":
                    del there[line["name"], line["instance"]]
        assert [line.get("id") for line in lines if "ok" in line] == ["all", "mine", "there"]
        assert all(line["ok"] for line in lines if "ok" in line)
        entries = listed(self.registry)
        assert {entry.key: _shown(entry) for entry in entries} == {
            key: {name: fields[name] for name in ("host", "port", "meta", "state", "rev")}
            | {"priority": fields.get("priority", 0)}
            for key, fields in there.items()
        }

    def _check_file(self) -> None:
        """The file and the journal have the entries of the registry."""
        self.world.pass_time(2)  # retries after a failed write
        found = peek(REGISTRY, self.world.files)
        assert found.rev >= self.registry.rev  # a refused batch may be there until the next change
        if found.rev == self.registry.rev:
            assert {entry.key: (entry.port, entry.priority) for entry in found.entries} == {
                entry.key: (entry.port, entry.priority) for entry in listed(self.registry)
            }

    def _tidy_up(self) -> None:
        """After everything is deregistered and time has passed, nothing is left."""
        world, connections = self.world, self.world.connections
        for entry in listed(self.registry):
            self.engine.submit(partial(_deregister, entry.key), lambda outcome: None)
        self.friend.send(b"quit\n")
        world.settle()
        world.pass_time(TIGHT.progress_s + 2)
        assert self.friend.lost
        holders = self.registry.holder_index
        for table in (
            self.registry._instances_by_name, self.registry._names, connections.open, world.parts.reaper.processes._files,
            holders._of_session, holders._of_process, holders._due, holders._awaits_probe, holders.unclaimed,
            holders._gone_sessions, holders._gone_processes, holders._gone_holders,
            world.timers,
        ):  # fmt: skip
            assert not table, table
        assert self.registry.weight_bytes == 0


def _without_http(sent: bytes) -> tuple[bytes, bytes]:
    """Split the output into the lines and the HTTP response after them."""
    match = re.search(rb"^HTTP/", sent, re.MULTILINE)
    at = match.start() if match else len(sent)
    return sent[:at], sent[at:]


def listed(registry: Registry) -> list[Entry]:
    entries: list[Entry] = []
    after: Key | None = None
    while True:
        page = registry.page("*", {}, after, 1_000)
        entries += page.entries
        after = page.after
        if after is None:
            return entries


def _deregister(key: Key, transaction: Transaction) -> bytes:
    return b"%d" % transaction.deregister(key)


def _shown(entry: Entry) -> dict[str, object]:
    return {
        "host": entry.host,
        "port": entry.port,
        "meta": entry.meta,
        "state": str(entry.state),
        "rev": entry.rev,
        "priority": entry.priority,
    }


# Errors that depend on the daemon's state, or on several arguments of a valid request.
_LATER = {"update", "watch", "renew", "register", "history"}
_OF_THE_LINE = {Code.BAD_JSON, Code.BAD_REQUEST, Code.UNKNOWN_COMMAND, Code.TOO_LARGE}


def _answers(reply: dict[str, Any], said: Said) -> None:
    """Check that a reply fits its request."""
    if said.kind == oracle.UNSURE:
        return
    assert reply.get("id") == said.id, (reply, said)
    error = reply.get("error")
    if said.kind == oracle.STRANGER:
        assert error == Code.BAD_REQUEST, (reply, said)
    elif said.kind != oracle.REQUEST:
        assert error == said.kind, (reply, said)
    else:
        assert error not in _OF_THE_LINE, (reply, said)
        assert error not in (Code.INTERNAL, Code.SHUTTING_DOWN), (reply, said)
        assert error != Code.BAD_ARGUMENT or said.cmd in _LATER, (reply, said)


def _explain(changes: list[Change], asked: list[Said]) -> None:
    """Check that every change belongs to one request, in order, or is the end of a lifetime."""
    requests = iter(asked)
    request = next(requests, None)
    for change in changes:
        if _is_an_end(change):
            continue
        while request is not None and not _explains(request, change):
            request = next(requests, None)
        assert request is not None, f"no request explains {change}"
        if change.reason != Reason.REPLACED:  # its replacement follows
            request = next(requests, None)


def _is_an_end(change: Change) -> bool:
    before = change.previous
    if change.op is Op.CHANGE and before is not None and len(change.entry.holders) < len(before.holders):
        return True
    if change.op is not Op.DOWN or change.reason not in _CONDITIONS:
        return False
    entry = change.entry
    conditions = {Reason.CLOSED: entry.hold, Reason.EXITED: entry.pid, Reason.EXPIRED: entry.ttl_s}
    assert conditions[Reason(change.reason)], f"{change} had no such condition"
    return True


def _explains(said: Said, change: Change) -> bool:
    arguments, entry = said.arguments or {}, change.entry
    if (arguments.get("name"), arguments.get("instance", "")) != entry.key:
        return False
    if change.reason == Reason.DEREGISTERED:
        return said.cmd == "deregister"
    if said.cmd == "update":
        state = arguments.get("state", entry.state)
        same_state = state in (
            entry.state,
            "draining",
        )  # draining by one of several holders withdraws that holder
        same = arguments.get("meta", entry.meta) == entry.meta and same_state
        return change.op is Op.CHANGE and same and arguments.get("priority", entry.priority) == entry.priority
    address = (arguments.get("host", "127.0.0.1"), arguments.get("port")) == (entry.host, entry.port)
    if change.reason == Reason.REPLACED:
        return said.cmd == "register" and not address
    same = arguments.get("meta", {}) == entry.meta and arguments.get("state", "ready") == entry.state
    return said.cmd == "register" and address and same and arguments.get("priority", 0) == entry.priority


def is_a_line(sent: bytes) -> dict[str, Any]:
    """Check a line of the daemon: ASCII, strict JSON, with exactly one of `ok` and `event`."""
    assert len(sent) <= DEFAULT.reply_bytes_max
    assert sent.isascii()
    assert sent.index(b"\n") == len(sent) - 1
    assert not re.search(rb"[\x00-\x1f\x7f]", sent[:-1])
    fields = oracle.read(sent)
    assert ("ok" in fields) != ("event" in fields)
    if fields.get("ok") is False:
        assert fields["error"] in set(Code)
        assert isinstance(fields["message"], str)
    return fields
