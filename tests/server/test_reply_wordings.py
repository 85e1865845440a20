"""Which requests are answered without work, and in which order: as if all were done with work."""

import itertools
import json
from collections.abc import Iterator

import pytest

from tests.support.twins import FLUSH_TURNS, PLAIN, Twins, line, line_of, system
from tests.support.wire import Wire
from tests.support.world import TIGHT

# Which requests.

ANSWERED = {
    "as it is remembered": PLAIN,
    "the same twice": PLAIN * 2,
    "as json.dumps writes it": b'{"cmd": "resolve", "name": "db"}\n',
    "with a carriage return": b'{"cmd":"resolve","name":"db"}\r\n',
    "an id behind": b'{"cmd":"resolve","name":"db","id":7}\n',
    "an id behind, with blanks": b'{"cmd": "resolve", "name": "db", "id": 7}\n',
    "an id between": b'{"cmd":"resolve","id":7,"name":"db"}\n',
    "an id between, with blanks": b'{"cmd": "resolve", "id": 7, "name": "db"}\r\n',
    "an id of 18 digits": b'{"cmd":"resolve","name":"db","id":999999999999999999}\n',
    "several, with and without ids": b'{"cmd":"resolve","name":"db","id":1}\n'
    + PLAIN
    + b'{"cmd": "resolve", "id": 2, "name": "db"}\n',
    "one with each end of line": PLAIN + b'{"cmd":"resolve","name":"db"}\r\n' + PLAIN,
    "of two names": PLAIN + b'{"cmd":"resolve","name":"a.b-c_d"}\n',
}

NOT_ANSWERED = {
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
    "an instance that is not there": b'{"cmd":"resolve","name":"db","instance":"1"}\n',
    "meta": b'{"cmd":"resolve","name":"db","meta":{}}\n',
    "all": b'{"cmd":"resolve","name":"db","all":true}\n',
    "all that is false": b'{"cmd":"resolve","name":"db","all":false}\n',
    "an argument that is not known": b'{"cmd":"resolve","name":"db","nmae":1}\n',
    "a name of nobody": b'{"cmd":"resolve","name":"bd"}\n',
    "a name of nobody with an id": b'{"cmd":"resolve","name":"bd","id":3}\n',
    "a name with an upper case letter": b'{"cmd":"resolve","name":"DB"}\n',
    "a name with a quote": b'{"cmd":"resolve","name":"d\\"b"}\n',
    "a name with an escape": b'{"cmd":"resolve","name":"\\u0064b"}\n',
    "a name that is none": b'{"cmd":"resolve","name":"-db"}\n',
    "no name": b'{"cmd":"resolve","name":""}\n',
    "another command": b'{"cmd":"why","name":"db"}\n',
    "a command with an upper case letter": b'{"cmd":"Resolve","name":"db"}\n',
    "a bare word": b"resolve db\n",
    "blanks in front": b' {"cmd":"resolve","name":"db"}\n',
    "blanks behind": b'{"cmd":"resolve","name":"db"} \n',
    "a tab for a blank": b'{"cmd":"resolve",\t"name":"db"}\n',
    "a carriage return too many": b'{"cmd":"resolve","name":"db"}\r\r\n',
    "an end as telnet sends it": b'{"cmd":"resolve","name":"db"}\r\0\n',
    "a carriage return for an end": b'{"cmd":"resolve","name":"db"}\r{"cmd":"resolve","name":"db"}\n',
    "two objects": b'{"cmd":"resolve","name":"db"}{"cmd":"resolve","name":"db"}\n',
    "something behind the object": b'{"cmd":"resolve","name":"db"}]\n',
    "no quotes": b'{"cmd":"resolve","name":db}\n',
    "one that is known, and an empty line": PLAIN + b"\n",
    "an empty line, and one that is known": b"\n" + PLAIN,
    "one that is known, and a ping": PLAIN + b'{"cmd":"ping"}\n',
    "a ping, and one that is known": b'{"cmd":"ping"}\n' + PLAIN,
    "one that is known, and one that is not": PLAIN + b'{"cmd":"resolve","name":"bd"}\n' + PLAIN,
    "one that is known, and a broken one": PLAIN + b'{"cmd":"resolve","name":"db"\n' + PLAIN,
    "one that is known, and a stranger": PLAIN + b"GET / HTTP/1.1\r\n" + PLAIN,
    "one that is known, and quit": PLAIN + b"quit\n" + PLAIN,
    "one that is known, and the beginning of one": PLAIN + PLAIN[:-1],
}


@pytest.fixture(scope="module")
def table() -> Iterator[Twins]:
    with system():
        made = Twins()
        made.write(
            line("register", name="db", port=1, meta={"k": 'ä"'}), line("register", name="a.b-c_d", port=2)
        )
        yield made
        made.close()


def _answered(twins: Twins, data: bytes) -> tuple[int, bytes]:
    """Send a chunk on a new connection; return how many requests were answered without work, and all replies."""
    twins.know()
    twins.know("a.b-c_d")
    twins.asker = twins.connect()
    count = twins.replies.count
    twins.asker.send(data)
    twins.turn()
    count = twins.replies.count - count
    twins.asker.each(Wire.end)
    twins.settle()
    said = twins.asker.new()
    twins.lines.remove(twins.asker)
    twins.asker = twins.connect()
    return count, said


@pytest.mark.parametrize("data", ANSWERED.values(), ids=ANSWERED)
def test_these_are_answered_without_work_and_as_ever(table: Twins, data: bytes) -> None:
    count, said = _answered(table, data)
    assert count == data.count(b"\n")
    assert said.count(b'{"ok":true,') == count
    assert said == b"".join(
        line_of(json.loads(each)) for each in said.splitlines()
    )  # compact, as all that is said


@pytest.mark.parametrize("data", NOT_ANSWERED.values(), ids=NOT_ANSWERED)
def test_these_are_left_to_the_decoder(table: Twins, data: bytes) -> None:
    count, said = _answered(table, data)
    assert count == 0
    assert said


def test_so_much_is_answered_at_once_and_no_more(table: Twins) -> None:
    """The rest of a large chunk has its turns, as all else that is much."""
    table.asker = table.connect()
    for size, expected in ((4_096, True), (4_097, False)):
        count, over = divmod(size, len(line("resolve", name="db", id=1)))
        chunk = line("resolve", name="db", id=1) * (count - 3)
        for digits in (over // 3, over // 3, over - over // 3 * 2):
            chunk += line("resolve", name="db", id=10**digits)
        assert len(chunk) == size
        got, said = _answered(table, chunk)
        assert got == (count if expected else 0)
        assert said.count(b"\n") == count


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


def test_wherever_a_conversation_is_cut_the_replies_are_the_same(twins: Twins) -> None:
    whole = b"".join(CONVERSATION)
    expected: list[bytes] = []
    cuts = [*range(1, len(whole)), *((cut, cut + 7) for cut in range(1, len(whole) - 7, 5))]
    for cut in cuts:
        first, last = cut if isinstance(cut, tuple) else (cut, cut)
        twins.write(line("register", name="db", port=1))
        twins.know()
        asker = twins.connect()
        rev = twins.worlds[0].services.engine._registry.rev
        asker.send(*filter(None, (whole[:first], whole[first:last], whole[last:])))
        twins.settle()
        said = asker.new().replace(b'"rev":%d' % rev, b'"rev":0').replace(b'"rev":%d' % (rev + 2), b'"rev":2')
        expected = expected or [said]
        assert [said] == expected, cut
        asker.each(Wire.end)
        twins.settle()
        twins.lines.remove(asker)
    assert len(expected[0].splitlines()) == len(CONVERSATION) - 1


def test_byte_by_byte_it_is_the_same(twins: Twins) -> None:
    twins.know()
    whole = b"".join(CONVERSATION)
    twins.asker.send(*(whole[at : at + 1] for at in range(len(whole))))
    twins.settle()
    assert [each.get("port") for each in twins.asker.replies()] == [1, 1, None, 1, 2, 2, 2, None, 2, 2]


# Order.


def test_a_peer_sees_its_own_writes(twins: Twins) -> None:
    twins.know()
    for cuts in ([], [1], [1, 2], [2]):
        requests = [line("register", name="db", port=2), PLAIN, line("register", name="db", port=1), PLAIN]
        edges = [0, *cuts, 4]
        twins.asker.send(*(b"".join(requests[a:b]) for a, b in itertools.pairwise(edges)))
        twins.settle()
        assert [each["port"] for each in twins.asker.replies()] == [2, 2, 1, 1]


@pytest.mark.parametrize("turns", range(12))
def test_a_resolve_waits_for_the_write_before_it_whenever_it_comes(twins: Twins, turns: int) -> None:
    """In each turn of the flush, and in the one in which its reply is on its way."""
    twins.know()
    twins.asker.send(line("register", name="db", port=2))
    for _ in range(turns):
        twins.turn()
    twins.asker.send(PLAIN)
    twins.settle()
    assert [(each["port"], "state" in each) for each in twins.asker.replies()] == [(2, False), (2, True)]


def test_a_resolve_behind_a_parked_one_waits_unless_that_has_an_id(twins: Twins) -> None:
    twins.know()
    twins.asker.send(line("resolve", name="late", wait=60, id=1), PLAIN)
    twins.turn()
    twins.turn()
    assert [each["port"] for each in twins.asker.replies()] == [1]  # it does not wait
    twins.asker.send(line("resolve", name="later", wait=60), PLAIN, line("resolve", name="db", id=2))
    twins.settle()
    assert twins.asker.new() == b""
    twins.write(line("register", name="later", port=8))  # even ports accept
    twins.settle()
    assert [each["port"] for each in twins.asker.replies()] == [8, 1, 1]
    twins.write(line("register", name="late", port=6))
    assert [each["port"] for each in twins.asker.replies()] == [6]
    count = twins.replies.count
    twins.ask()
    assert twins.replies.count == count + 1  # and all is as before


@pytest.mark.parametrize("turns", range(8))
def test_a_resolve_that_comes_as_a_parked_one_is_answered_keeps_its_place(twins: Twins, turns: int) -> None:
    twins.know()
    twins.asker.send(line("resolve", name="late", wait=60))
    twins.turn()
    twins.writer.send(line("register", name="late", port=8))
    for _ in range(FLUSH_TURNS + turns):
        twins.turn()
    twins.asker.send(PLAIN)
    twins.settle()
    assert [each["name"] for each in twins.asker.replies()] == ["late", "db"]


def test_an_unfinished_line_is_finished_first(twins: Twins) -> None:
    twins.know()
    twins.asker.send(PLAIN[:-1])
    twins.turn()
    twins.asker.send(b"\n" + PLAIN, PLAIN, b"{", PLAIN, b"\r", PLAIN)
    twins.settle()
    replies = twins.asker.replies()
    assert [each.get("port", each.get("error")) for each in replies] == [1, 1, 1, "bad_json", 1]
    twins.asker.send(b"{")
    twins.turn()
    twins.asker.send(b"}\n")
    twins.settle()
    assert [world.connections.writers.input.total for world in twins.worlds] == [
        0,
        0,
    ]  # nor does anything wait any more


def test_behind_quit_and_behind_a_stranger_nothing_is_answered(twins: Twins) -> None:
    twins.know()
    for last, count in ((b"quit\n", 1), (b"[1]\r\n", 2)):
        asker = twins.connect()
        asker.send(PLAIN, last, PLAIN, PLAIN)
        twins.settle()
        assert len(asker.replies()) == count, last
        asker.each(Wire.end)
        twins.settle()


@pytest.mark.parametrize("dear", [False, True])
def test_a_peer_that_does_not_read_is_not_answered_on_and_gets_all_in_order(dear: bool) -> None:
    """Whether it was a reply of the one kind or the other that it did not take."""
    with system():
        twins = Twins(limits=TIGHT)
        for name in ("db", "db2", "db3"):
            twins.write(line("register", name=name, port=1, meta={"k": "v" * 500}))
        twins.know()
        twins.asker.each(lambda wire: setattr(wire, "taking", False))
        for n in range(1, 40):
            twins.asker.send(line("list", id=n) if dear and n == 1 else line("resolve", name="db", id=n))
            twins.turn()
            twins.turn()
        for wire in twins.asker.wires:
            assert wire.get_write_buffer_size() <= 2 * TIGHT.output_bytes_max
        twins.each(lambda world: world.do(twins.asker.wires[twins.worlds.index(world)].take))
        twins.settle()
        assert [each["id"] for each in twins.asker.replies()] == list(range(1, 40))
        twins.know()
        twins.close()


def test_the_counters_do_not_tell_how_it_was_answered(twins: Twins) -> None:
    before = [twins.ask(line("stats"))["requests"].get("resolve", 0)]
    for data, count in (
        (PLAIN, 1),
        (PLAIN * 3, 3),
        (line("resolve", name="db", id=4) * 2, 2),
        (b"resolve db\n", 1),
    ):
        twins.asker.send(data)
        twins.settle()
        assert len(twins.asker.replies()) == count
        stats = twins.ask(line("stats"))
        before.append(stats["requests"]["resolve"])
    assert [later - earlier for earlier, later in itertools.pairwise(before)] == [1, 3, 2, 1]
    assert twins.replies.count == 5
