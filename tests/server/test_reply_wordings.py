"""The fast path: the requests that are answered from the resolve cache, and the order of all replies."""

import itertools
import json
from collections.abc import Iterator

import pytest

from tests.support.twins import FLUSH_ITERATIONS, PLAIN, Twins, line, line_of, system
from tests.support.wire import Wire
from tests.support.world import TIGHT

# Chunks that are answered from the cache, and chunks that are not.

FAST = {
    "as it is cached": PLAIN,
    "the same twice": PLAIN * 2,
    "as json.dumps writes it": b'{"cmd": "resolve", "name": "db"}\n',
    "with a carriage return": b'{"cmd":"resolve","name":"db"}\r\n',
    "an id at the end": b'{"cmd":"resolve","name":"db","id":7}\n',
    "an id at the end, with blanks": b'{"cmd": "resolve", "name": "db", "id": 7}\n',
    "an id in the middle": b'{"cmd":"resolve","id":7,"name":"db"}\n',
    "an id in the middle, with blanks": b'{"cmd": "resolve", "id": 7, "name": "db"}\r\n',
    "an id of 18 digits": b'{"cmd":"resolve","name":"db","id":999999999999999999}\n',
    "several, with and without ids": b'{"cmd":"resolve","name":"db","id":1}\n'
    + PLAIN
    + b'{"cmd": "resolve", "id": 2, "name": "db"}\n',
    "LF and CRLF": PLAIN + b'{"cmd":"resolve","name":"db"}\r\n' + PLAIN,
    "two names": PLAIN + b'{"cmd":"resolve","name":"a.b-c_d"}\n',
}

SLOW = {
    "an id twice": b'{"cmd":"resolve","id":1,"name":"db","id":1}\n',
    "an id twice, one of them 0": b'{"cmd":"resolve","id":0,"name":"db","id":1}\n',
    "an id of 0": b'{"cmd":"resolve","name":"db","id":0}\n',
    "an id with a leading zero": b'{"cmd":"resolve","name":"db","id":01}\n',
    "an id below 0": b'{"cmd":"resolve","name":"db","id":-1}\n',
    "an id of 19 digits": b'{"cmd":"resolve","name":"db","id":1000000000000000000}\n',
    "an id in text": b'{"cmd":"resolve","name":"db","id":"7"}\n',
    "an id in Arabic digits": '{"cmd":"resolve","name":"db","id":١}\n'.encode(),
    "an id that is a fraction": b'{"cmd":"resolve","name":"db","id":1.0}\n',
    "an id with an exponent": b'{"cmd":"resolve","name":"db","id":1e3}\n',
    "an id that is true": b'{"cmd":"resolve","name":"db","id":true}\n',
    "an id that is null": b'{"cmd":"resolve","name":"db","id":null}\n',
    "a name twice": b'{"cmd":"resolve","name":"no","name":"db"}\n',
    "cmd twice": b'{"cmd":"resolve","cmd":"resolve","name":"db"}\n',
    "another order": b'{"name":"db","cmd":"resolve"}\n',
    "an instance": b'{"cmd":"resolve","name":"db","instance":""}\n',
    "an unknown instance": b'{"cmd":"resolve","name":"db","instance":"1"}\n',
    "meta": b'{"cmd":"resolve","name":"db","meta":{}}\n',
    "all": b'{"cmd":"resolve","name":"db","all":true}\n',
    "all that is false": b'{"cmd":"resolve","name":"db","all":false}\n',
    "an unknown argument": b'{"cmd":"resolve","name":"db","nmae":1}\n',
    "an unknown name": b'{"cmd":"resolve","name":"bd"}\n',
    "an unknown name with an id": b'{"cmd":"resolve","name":"bd","id":3}\n',
    "a name with an upper case letter": b'{"cmd":"resolve","name":"DB"}\n',
    "a name with a quote": b'{"cmd":"resolve","name":"d\\"b"}\n',
    "a name with an escape": b'{"cmd":"resolve","name":"\\u0064b"}\n',
    "an invalid name": b'{"cmd":"resolve","name":"-db"}\n',
    "no name": b'{"cmd":"resolve","name":""}\n',
    "another command": b'{"cmd":"why","name":"db"}\n',
    "a command with an upper case letter": b'{"cmd":"Resolve","name":"db"}\n',
    "a bare word": b"resolve db\n",
    "leading blanks": b' {"cmd":"resolve","name":"db"}\n',
    "trailing blanks": b'{"cmd":"resolve","name":"db"} \n',
    "a tab for a blank": b'{"cmd":"resolve",\t"name":"db"}\n',
    "two carriage returns": b'{"cmd":"resolve","name":"db"}\r\r\n',
    "an end of line as telnet sends it": b'{"cmd":"resolve","name":"db"}\r\0\n',
    "a carriage return instead of a newline": b'{"cmd":"resolve","name":"db"}\r{"cmd":"resolve","name":"db"}\n',
    "two objects": b'{"cmd":"resolve","name":"db"}{"cmd":"resolve","name":"db"}\n',
    "a bracket after the object": b'{"cmd":"resolve","name":"db"}]\n',
    "no quotes": b'{"cmd":"resolve","name":db}\n',
    "a cached name, then an empty line": PLAIN + b"\n",
    "an empty line, then a cached name": b"\n" + PLAIN,
    "a cached name, then a ping": PLAIN + b'{"cmd":"ping"}\n',
    "a ping, then a cached name": b'{"cmd":"ping"}\n' + PLAIN,
    "a cached name, then an unknown one": PLAIN + b'{"cmd":"resolve","name":"bd"}\n' + PLAIN,
    "a cached name, then a truncated request": PLAIN + b'{"cmd":"resolve","name":"db"\n' + PLAIN,
    "a cached name, then HTTP": PLAIN + b"GET / HTTP/1.1\r\n" + PLAIN,
    "a cached name, then quit": PLAIN + b"quit\n" + PLAIN,
    "a cached name, then an unfinished line": PLAIN + PLAIN[:-1],
}


@pytest.fixture(scope="module")
def table() -> Iterator[Twins]:
    with system():
        twins = Twins()
        twins.write(
            line("register", name="db", port=1, meta={"k": 'ä"'}), line("register", name="a.b-c_d", port=2)
        )
        yield twins
        twins.close()


def _answer(twins: Twins, data: bytes) -> tuple[int, bytes]:
    """Send a chunk on a new connection; return the number of replies from the cache, and all replies."""
    twins.cache_reply()
    twins.cache_reply("a.b-c_d")
    twins.reader = twins.connect()
    count = twins.cache.count
    twins.reader.send(data)
    twins.run_once()
    count = twins.cache.count - count
    twins.reader.for_each(Wire.end)
    twins.settle()
    replies = twins.reader.received()
    twins.pairs.remove(twins.reader)
    twins.reader = twins.connect()
    return count, replies


@pytest.mark.parametrize("data", FAST.values(), ids=FAST)
def test_answered_from_the_cache(table: Twins, data: bytes) -> None:
    count, replies = _answer(table, data)
    assert count == data.count(b"\n")
    assert replies.count(b'{"ok":true,') == count
    assert replies == b"".join(line_of(json.loads(reply)) for reply in replies.splitlines())  # compact JSON


@pytest.mark.parametrize("data", SLOW.values(), ids=SLOW)
def test_answered_by_the_decoder(table: Twins, data: bytes) -> None:
    count, replies = _answer(table, data)
    assert count == 0
    assert replies


def test_chunks_above_4096_bytes_are_not_answered_from_the_cache(table: Twins) -> None:
    table.reader = table.connect()
    for size, expected in ((4_096, True), (4_097, False)):
        count, over = divmod(size, len(line("resolve", name="db", id=1)))
        chunk = line("resolve", name="db", id=1) * (count - 3)
        for digits in (over // 3, over // 3, over - over // 3 * 2):
            chunk += line("resolve", name="db", id=10**digits)
        assert len(chunk) == size
        from_cache, replies = _answer(table, chunk)
        assert from_cache == (count if expected else 0)
        assert replies.count(b"\n") == count


CONVERSATION = [
    PLAIN,
    line("resolve", name="db", id=1),
    line("resolve", name="bd", id=2),
    b"\n",
    b'{"cmd": "resolve", "name": "db", "id": 3}\r\n',
    line("register", name="db", port=2, id=4),
    PLAIN,
    line("resolve", name="db", id=5),
    b"{]\n",
    b"resolve db\n",
    PLAIN,
]


def test_replies_do_not_depend_on_how_the_input_is_split(twins: Twins) -> None:
    whole = b"".join(CONVERSATION)
    expected: list[bytes] = []
    cuts = [*range(1, len(whole)), *((cut, cut + 7) for cut in range(1, len(whole) - 7, 5))]
    for cut in cuts:
        first, last = cut if isinstance(cut, tuple) else (cut, cut)
        twins.write(line("register", name="db", port=1))
        twins.cache_reply()
        reader = twins.connect()
        rev = twins.worlds[0].parts.engine._registry.rev
        reader.send(*filter(None, (whole[:first], whole[first:last], whole[last:])))
        twins.settle()
        replies = reader.received()
        replies = replies.replace(b'"rev":%d' % rev, b'"rev":0').replace(b'"rev":%d' % (rev + 2), b'"rev":2')
        expected = expected or [replies]
        assert [replies] == expected, cut
        reader.for_each(Wire.end)
        twins.settle()
        twins.pairs.remove(reader)
    assert len(expected[0].splitlines()) == len(CONVERSATION) - 1


def test_replies_to_input_that_arrives_byte_by_byte(twins: Twins) -> None:
    twins.cache_reply()
    whole = b"".join(CONVERSATION)
    twins.reader.send(*(whole[at : at + 1] for at in range(len(whole))))
    twins.settle()
    assert [reply.get("port") for reply in twins.reader.replies()] == [1, 1, None, 1, 2, 2, 2, None, 2, 2]


# Order.


def test_client_sees_its_own_writes(twins: Twins) -> None:
    twins.cache_reply()
    for cuts in ([], [1], [1, 2], [2]):
        requests = [line("register", name="db", port=2), PLAIN, line("register", name="db", port=1), PLAIN]
        edges = [0, *cuts, 4]
        twins.reader.send(*(b"".join(requests[a:b]) for a, b in itertools.pairwise(edges)))
        twins.settle()
        assert [reply["port"] for reply in twins.reader.replies()] == [2, 2, 1, 1]


@pytest.mark.parametrize("iterations", range(12))
def test_resolve_waits_for_the_write_before_it(twins: Twins, iterations: int) -> None:
    """The resolve is sent in each loop iteration of the flush, and in the iteration that sends the write's reply."""
    twins.cache_reply()
    twins.reader.send(line("register", name="db", port=2))
    for _ in range(iterations):
        twins.run_once()
    twins.reader.send(PLAIN)
    twins.settle()
    assert [(reply["port"], "state" in reply) for reply in twins.reader.replies()] == [(2, False), (2, True)]


def test_resolve_after_a_waiting_resolve_waits_unless_that_has_an_id(twins: Twins) -> None:
    twins.cache_reply()
    twins.reader.send(line("resolve", name="late", wait=60, id=1), PLAIN)
    twins.run_once()
    twins.run_once()
    assert [reply["port"] for reply in twins.reader.replies()] == [1]
    twins.reader.send(line("resolve", name="later", wait=60), PLAIN, line("resolve", name="db", id=2))
    twins.settle()
    assert twins.reader.received() == b""
    twins.write(line("register", name="later", port=8))  # a probe of an even port succeeds
    twins.settle()
    assert [reply["port"] for reply in twins.reader.replies()] == [8, 1, 1]
    twins.write(line("register", name="late", port=6))
    assert [reply["port"] for reply in twins.reader.replies()] == [6]
    count = twins.cache.count
    twins.ask()
    assert twins.cache.count == count + 1  # the fast path is used again


@pytest.mark.parametrize("iterations", range(8))
def test_resolve_sent_while_a_waiting_resolve_is_answered_keeps_its_order(twins: Twins, iterations: int) -> None:
    twins.cache_reply()
    twins.reader.send(line("resolve", name="late", wait=60))
    twins.run_once()
    twins.writer.send(line("register", name="late", port=8))
    for _ in range(FLUSH_ITERATIONS + iterations):
        twins.run_once()
    twins.reader.send(PLAIN)
    twins.settle()
    assert [reply["name"] for reply in twins.reader.replies()] == ["late", "db"]


def test_unfinished_line_is_completed_by_the_next_chunk(twins: Twins) -> None:
    twins.cache_reply()
    twins.reader.send(PLAIN[:-1])
    twins.run_once()
    twins.reader.send(b"\n" + PLAIN, PLAIN, b"{", PLAIN, b"\r", PLAIN)
    twins.settle()
    replies = twins.reader.replies()
    assert [reply.get("port", reply.get("error")) for reply in replies] == [1, 1, 1, "bad_json", 1]
    twins.reader.send(b"{")
    twins.run_once()
    twins.reader.send(b"}\n")
    twins.settle()
    assert [world.connections.writers.input.total for world in twins.worlds] == [0, 0]


def test_nothing_is_answered_after_quit_or_invalid_input(twins: Twins) -> None:
    twins.cache_reply()
    for last, count in ((b"quit\n", 1), (b"[1]\r\n", 2)):
        reader = twins.connect()
        reader.send(PLAIN, last, PLAIN, PLAIN)
        twins.settle()
        assert len(reader.replies()) == count, last
        reader.for_each(Wire.end)
        twins.settle()


@pytest.mark.parametrize("slow_first", [False, True])
def test_replies_to_a_client_that_does_not_read_are_limited_and_in_order(slow_first: bool) -> None:
    """The first unread reply comes from the cache, or from the decoder (`slow_first`)."""
    with system():
        twins = Twins(limits=TIGHT)
        for name in ("db", "db2", "db3"):
            twins.write(line("register", name=name, port=1, meta={"k": "v" * 500}))
        twins.cache_reply()
        twins.reader.for_each(lambda wire: setattr(wire, "peer_reads", False))
        for n in range(1, 40):
            twins.reader.send(line("list", id=n) if slow_first and n == 1 else line("resolve", name="db", id=n))
            twins.run_once()
            twins.run_once()
        for wire in twins.reader.wires:
            assert wire.get_write_buffer_size() <= 2 * TIGHT.output_bytes_max
        twins.for_each(lambda world: world.do(twins.reader.wires[twins.worlds.index(world)].take))
        twins.settle()
        assert [reply["id"] for reply in twins.reader.replies()] == list(range(1, 40))
        twins.cache_reply()
        twins.close()


def test_stats_count_replies_from_the_cache(twins: Twins) -> None:
    counts = [twins.ask(line("stats"))["requests"].get("resolve", 0)]
    for data, count in (
        (PLAIN, 1),
        (PLAIN * 3, 3),
        (line("resolve", name="db", id=4) * 2, 2),
        (b"resolve db\n", 1),
    ):
        twins.reader.send(data)
        twins.settle()
        assert len(twins.reader.replies()) == count
        stats = twins.ask(line("stats"))
        counts.append(stats["requests"]["resolve"])
    assert [later - earlier for earlier, later in itertools.pairwise(counts)] == [1, 3, 2, 1]
    assert twins.cache.count == 5
