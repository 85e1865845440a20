"""The parser of requests, on the rules of the section "Lines" in PROTOCOL.md.

Each rule has input that follows it and input that breaks it. The parser gets the input whole and byte by byte,
alone and with another request after it.
"""

import json
import time
from collections.abc import Iterable

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from regd.core.limits import DEFAULT, Limits
from regd.protocol.bare import Quit
from regd.protocol.commands import COMMANDS, Request
from regd.protocol.messages import HTTP_REFUSAL
from regd.protocol.parser import Problem, RequestParser
from tests.support.length import examples

MOST = DEFAULT.line_bytes_max
NEXT = b'{"cmd":"ping","id":"next"}\n'  # sent after a case, to see whether the connection stays open


def parsed(chunks: Iterable[bytes], end: bool = False, limits: Limits = DEFAULT) -> list[str]:
    """Parse chunks, and return a word for each item. `!` marks a fatal problem."""
    reader = RequestParser(limits)
    items: list[str] = []

    def drain() -> None:
        while (item := reader.next()) is not None:
            match item:
                case Request():
                    items.append(item.cmd if item.id is None else f"{item.cmd}#{item.id}")
                case Problem():
                    assert item.refusal.message
                    assert item.reply in (b"", HTTP_REFUSAL)
                    items.append(("http" if item.reply else item.refusal.code) + ("!" if item.fatal else ""))
                case Quit():
                    items.append("quit")

    for chunk in chunks:
        reader.receive(chunk)
        drain()
    if end:
        reader.end()
        drain()
    assert reader.has_partial_line or reader.waiting_bytes <= 1  # a carriage return may be kept
    return items


def padded(size: int, begin: bytes = b'{"cmd":"ping","id":"', end: bytes = b'"}') -> bytes:
    """Return a JSON line of `size` bytes. Its id may be too long."""
    return begin + b"x" * (size - len(begin) - len(end)) + end


CASES: dict[str, tuple[bytes, list[str]]] = {
    # Requests.
    "a request": (b'{"cmd":"ping"}\n', ["ping"]),
    "a return before the line feed": (b'{"cmd":"ping"}\r\n', ["ping"]),
    "blanks around": (b' \t{"cmd":"ping"} \t\n', ["ping"]),
    "empty lines": (b"\n\r\n \t \n", []),
    "an id": (b'{"cmd":"ping","id":7}\n', ["ping#7"]),
    "a negative id": (b'{"cmd":"ping","id":-7}\n', ["ping#-7"]),
    "the longest id": (b'{"cmd":"ping","id":"%s"}\n' % (b"x" * 64), ["ping#" + "x" * 64]),
    "the longest line": (padded(MOST) + b"\n", ["bad_request"]),
    "the longest line, with a return": (padded(MOST) + b"\r\n", ["bad_request"]),
    "an escaped pair": (
        rb'{"cmd":"register","name":"a","port":1,"meta":{"k":"\ud83d\ude00"}}' + b"\n",
        ["register"],
    ),
    # Bare lines.
    "help": (b"help\n", ["help"]),
    "ping": (b"ping\r\n", ["ping"]),
    "list": (b" list \n", ["list"]),
    "resolve": (b"resolve  db\t\r\n", ["resolve"]),
    "stats": (b"stats\n", ["stats"]),
    "why": (b"why db\n", ["why"]),
    "watch": (b"watch\n", ["watch"]),
    "watch of a prefix": (b"watch work*\n", ["watch"]),
    "list of a name": (b"list db\n", ["list"]),
    "list of a prefix": (b"list work*\n", ["list"]),
    "register": (b"register db 5432\n", ["register"]),
    "register with a host": (b"register db db.example:5432\n", ["register"]),
    "register with an IPv6 address": (b"register db [::1]:5432\n", ["register"]),
    "deregister": (b"deregister db\n", ["deregister"]),
    "upper case": (b"REGISTER db 5432\nRESOLVE db\nPing\n", ["register", "resolve", "ping"]),
    "the longest bare line": (b"list" + b" " * 508 + b"\n", ["list"]),
    "the longest bare line, through telnet": (b"list" + b" " * 508 + b"\r\0\r\n", ["list"]),
    "quit": (b"quit\n", ["quit"]),
    # telnet that reads from a pipe sends a carriage return as CR NUL.
    "a word through telnet": (b"list\r\0\r\n", ["list"]),
    "a name through telnet": (b"resolve db \r\0\r\n", ["resolve"]),
    "a request through telnet": (b'{"cmd":"ping"}\r\0\r\n', ["ping"]),
    "the longest line through telnet": (padded(MOST) + b"\r\0\r\n", ["bad_request"]),
    "empty lines through telnet": (b"\r\0\r\n\r\0\n \r\0\r\n", []),
    # A line that begins with { and is not valid: the connection stays open.
    "no JSON": (b"{\n", ["bad_json"]),
    "two objects": (b'{"cmd":"ping"} {}\n', ["bad_json"]),
    "duplicate key": (b'{"cmd":"ping","cmd":"ping"}\n', ["bad_json"]),
    "duplicate key inside": (b'{"cmd":"register","name":"a","port":1,"meta":{"k":"1","k":"2"}}\n', ["bad_json"]),
    "NaN": (b'{"cmd":"ping","id":NaN}\n', ["bad_json"]),
    "Infinity": (b'{"cmd":"ping","id":-Infinity}\n', ["bad_json"]),
    "an infinity in digits": (b'{"cmd":"ping","x":1e999}\n', ["bad_json"]),
    "a number of 5,000 digits": (b'{"cmd":"ping","id":' + b"9" * 5_000 + b"}\n", ["bad_json"]),
    "half a pair": (rb'{"cmd":"ping","id":"\ud800"}' + b"\n", ["bad_json"]),
    "half a pair in a key": (rb'{"cmd":"ping","\udc00":1}' + b"\n", ["bad_json"]),
    "half a pair as bytes": (b'{"cmd":"ping","id":"\xed\xa0\x80"}\n', ["bad_json"]),
    "no UTF-8": (b'{"cmd":"ping","id":"\xff"}\n', ["bad_json"]),
    "a NUL": (b'{"cmd":"ping"\0}\n', ["bad_json"]),
    "absurd nesting": (b'{"a":' * 12_000 + b"\n", ["bad_json"]),
    "absurd nesting of lists": (b'{"a":' + b"[" * 60_000 + b"\n", ["bad_json"]),
    # Valid JSON, but not a valid request.
    "no cmd": (b"{}\n", ["bad_request"]),
    "cmd of another type": (b'{"cmd":1}\n', ["bad_request"]),
    "cmd null": (b'{"cmd":null}\n', ["bad_request"]),
    "id true": (b'{"cmd":"ping","id":true}\n', ["bad_request"]),
    "id null": (b'{"cmd":"ping","id":null}\n', ["bad_request"]),
    "id with a point": (b'{"cmd":"ping","id":1.0}\n', ["bad_request"]),
    "id a list": (b'{"cmd":"ping","id":[1]}\n', ["bad_request"]),
    "id too long": (b'{"cmd":"ping","id":"%s"}\n' % (b"x" * 65), ["bad_request"]),
    "unknown command": (b'{"cmd":"pin"}\n', ["unknown_command"]),
    "unknown argument": (b'{"cmd":"resolve","name":"a","nmae":"b"}\n', ["bad_argument"]),
    "missing argument": (b'{"cmd":"register","name":"a"}\n', ["bad_argument"]),
    "wrong type": (b'{"cmd":"register","name":"a","port":"1"}\n', ["bad_argument"]),
    "a boolean as a number": (b'{"cmd":"register","name":"a","port":true}\n', ["bad_argument"]),
    "out of range": (b'{"cmd":"register","name":"a","port":0}\n', ["bad_argument"]),
    "null": (b'{"cmd":"register","name":"a","port":1,"host":null}\n', ["bad_argument"]),
    # A line that is too long: skipped to its end.
    "too long": (padded(MOST + 1) + b"\n", ["too_large"]),
    "too long, with a return": (padded(MOST + 1) + b"\r\n", ["too_large"]),
    "far too long": (padded(5 * MOST) + b"\n", ["too_large"]),
    "two too long": ((padded(MOST + 1) + b"\n") * 2, ["too_large", "too_large"]),
}

# Lines that are not JSON, with their error if they are the first line of a connection. After a valid request,
# only mistyped lines are treated differently: the connection stays open.

HTTP: dict[str, bytes] = {
    "POST": b"POST / HTTP/1.1\r\nHost: 127.0.0.1:7343\r\n\r\n",
    "a body of commands": b'GET / HTTP/1.1\r\n\r\n{"cmd":"register","name":"evil","port":1}\n',
    "HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "a method that is a command": b"REGISTER /evil HTTP/1.1\r\n\r\n",
    "a method that is a command, and a name": b"watch db HTTP/1.1\n",
    "a method that is no word": b"!#$%&'*+-.^_`|~1 / HTTP/1.1\r\n",
    "many blanks": b" \tGET \t /  HTTP/1.0 \t\r\n",
    "a proxy": b"CONNECT db.example:80 HTTP/1.1\r\n",
    "a long target": b"GET /" + b"x" * 5_000 + b" HTTP/1.1\r\n",
    "the longest": b"GET /" + b"x" * (MOST - 14) + b" HTTP/1.1\r\n",
    "through telnet": b"GET / HTTP/1.1\r\0\r\n",
    "RTSP's neighbour": b"OPTIONS * HTTP/\n",
}
MISTYPED: dict[str, tuple[bytes, str]] = {
    "another word": (b"pong\n", "unknown_command"),
    "a word of JSON lines alone": (b"hello\n", "unknown_command"),
    "curl's dict": (b"CLIENT libcurl 8.5.0\r\n", "unknown_command"),
    "HTTP/0.9": (b"GET /\r\n", "unknown_command"),
    "SSH": (b"SSH-2.0-OpenSSH_9.2p1 Debian-2\r\n", "unknown_command"),
    "SMTP": (b"EHLO evil.example\r\n", "unknown_command"),
    "a header": (b"Content-Length: 5\r\n", "unknown_command"),
    "a word and more": (b"ping pong\n", "bad_argument"),
    "resolve of nothing": (b"resolve\n", "bad_argument"),
    "resolve of two": (b"resolve a b\n", "bad_argument"),
    "resolve of a bad name": (b"resolve DB\n", "bad_argument"),
    "resolve of too much": (b"resolve " + b"a" * 254 + b"\n", "bad_argument"),
    "list of two": (b"list a b\n", "bad_argument"),
    "register of a name alone": (b"register db\n", "bad_argument"),
    "register of three": (b"register db 1 2\n", "bad_argument"),
    "register of no port": (b"register db http\n", "bad_argument"),
    "register of a port too high": (b"register db 65536\n", "bad_argument"),
    "register of a huge port": (b"register db 100000000000\n", "bad_argument"),
    "register of another sign": (b"register db +1\n", "bad_argument"),
    "register of a bare IPv6 address": (b"register db ::1:80\n", "bad_argument"),
    "register of no host": (b"register db :80\n", "bad_argument"),
    "register of a host that cannot be called": (b"register db 0.0.0.0:80\n", "bad_argument"),
    "a word without an end": (b"listlistlist\n", "unknown_command"),
    "as long as may be": (b"x" * 512 + b"\n", "unknown_command"),
    "a tab": (b"list\ta b\n", "bad_argument"),
}
STRANGERS: dict[str, bytes] = {
    "TLS": bytes.fromhex("16030102000100 01fc0303") + b"x" * 50,
    "SOCKS 5": b"\x05\x01\x00",
    "random": b"\x00\xff\x80",
    "a NUL": b"\0",
    "a NUL too many": b"\r\0\0",
    "a NUL after a word": b"list\0",
    "a word that is not ASCII": "häng\n".encode(),
    "an escape": b"ping\x1b[31m\n",
    "a return within": b"resolve\rdb\n",
    "a list": b'[{"cmd":"ping"}]\n',
    "a string": b'"ping"\n',
    "Redis": b"*1\r\n",
    "a byte order mark": b'\xef\xbb\xbf{"cmd":"ping"}\n',
    "too long": b"x" * 513 + b"\n",
    "far too long": b"x" * (MOST + 1) + b"\n",
    "a word and too many blanks": b"list" + b" " * 600 + b"\n",
    "a word and a line of blanks": b"resolve" + b" " * (MOST + 9),
    "a long target, and no HTTP": b"GET /" + b"x" * 600 + b"\n",
    "HTTP that is too long": b"GET /" + b"x" * MOST + b" HTTP/1.1\r\n",
    "HTTP with a target that is not ASCII": "GET /ä HTTP/1.1\r\n".encode(),
}
GUARD: list[tuple[str, bytes, str, str]] = [
    *((f"HTTP: {name}", data, "http!", "http!") for name, data in HTTP.items()),
    *((f"mistyped: {name}", data, code + "!", code) for name, (data, code) in MISTYPED.items()),
    *((f"other: {name}", data, "bad_request!", "bad_request!") for name, data in STRANGERS.items()),
]


def one_by_one(data: bytes) -> list[bytes]:
    return [data[at : at + 1] for at in range(len(data))]


@pytest.mark.parametrize(("data", "expected"), CASES.values(), ids=CASES)
def test_lines(data: bytes, expected: list[str]) -> None:
    assert parsed([data]) == expected
    assert parsed([data + NEXT]) == [*expected, "ping#next"]
    assert parsed([NEXT + data + NEXT]) == ["ping#next", *expected, "ping#next"]


@pytest.mark.parametrize(("data", "expected"), CASES.values(), ids=CASES)
def test_lines_byte_by_byte(data: bytes, expected: list[str]) -> None:
    assert parsed(one_by_one(data + NEXT)) == [*expected, "ping#next"]
    assert parsed([data[:9], data[9:] + NEXT]) == [*expected, "ping#next"]


guard = pytest.mark.parametrize(
    ("data", "first", "later"), [row[1:] for row in GUARD], ids=[row[0] for row in GUARD]
)


@guard
def test_guard_against_other_protocols(data: bytes, first: str, later: str) -> None:
    """After a fatal problem all further bytes are ignored, however the bytes are divided into chunks."""
    ends = b"" if data.endswith(b"\n") else b"\n"
    assert parsed([data + ends + NEXT]) == [first]
    assert parsed([data + ends, NEXT, b"\n" + NEXT]) == [first]
    assert parsed(one_by_one(data + ends + NEXT)) == [first]
    following = [] if later.endswith("!") else ["ping#next"]
    assert parsed([NEXT + data + ends, NEXT]) == ["ping#next", later, *following]
    assert parsed(one_by_one(NEXT + data + ends + NEXT)) == ["ping#next", later, *following]
    assert parsed([data.rstrip(b"\n")], end=True) == [first]


@pytest.mark.parametrize("before", [b"{\n", b'{"cmd":"pin"}\n', b"\n", b'{"cmd":"ping","id":[]}\n'])
def test_unknown_word_after_any_line_is_refused(before: bytes) -> None:
    assert parsed([before + b"pong\n" + NEXT])[-1] == "unknown_command!"


@pytest.mark.parametrize("data", [b"\x16\x03", b"ping\0", "ä".encode(), b"x" * 516, b"[" * 516, b"list\r\n\x16"])
def test_other_protocols_are_recognized_without_a_line_feed(data: bytes) -> None:
    assert parsed([data])[-1] == "bad_request!"


@pytest.mark.parametrize(
    "data",
    [
        b"p",
        b"resolv",
        b"resolve ",
        b"pong",
        b" \t",
        b"{",
        b"quit ",
        b"GET / HTTP/1.1",
        b"GET /" + b"x" * 9_000,
        b"[",
    ],
)
def test_beginning_of_a_valid_line_gives_nothing(data: bytes) -> None:
    assert parsed([data]) == []


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"ping", ["ping"]),
        (b'{"cmd":"ping"}', ["ping"]),
        (b'{"cmd":"pi', ["bad_json"]),
        (b"pin", ["unknown_command!"]),
        (b"", []),
        (b" ", []),
    ],
)
def test_end_of_input_ends_a_line(data: bytes, expected: list[str]) -> None:
    assert parsed([data], end=True) == expected


@pytest.mark.parametrize(
    ("line", "arguments"),
    [
        (b"help", {"short": True}),
        (b"list", {}),
        (b"watch  work*\t", {"name": "work*"}),
        (b"why db", {"name": "db"}),
        (b"register db 5432", {"name": "db", "port": 5432}),
        (b"register db 0080", {"name": "db", "port": 80}),
        (b"REGISTER db db.example:5432", {"name": "db", "port": 5432, "host": "db.example"}),
        (b"register db [::1]:5432", {"name": "db", "port": 5432, "host": "::1"}),
    ],
)
def test_bare_line_becomes_a_request(line: bytes, arguments: dict[str, object]) -> None:
    reader = RequestParser()
    reader.receive(line + b"\n")
    item = reader.next()
    assert isinstance(item, Request)
    assert (item.cmd, item.id, item.arguments) == (line.split()[0].decode().lower(), None, arguments)


@pytest.mark.parametrize(
    ("line", "details", "hint"),
    [
        (b"pong", {"near": ["ping"]}, "did you mean 'ping'?"),
        (b"zzz", {"near": []}, "help lists them"),
        (b"HELLO", {"near": ["hello"]}, '{"cmd":"hello"}'),
        (b"resolve", {"field": "name"}, "resolve NAME"),
        (b"register db", {"field": "port"}, "register NAME [HOST:]PORT"),
        (b"register db x", {"field": "port"}, "HOST:PORT"),
        (b"register DB 1", {"field": "name"}, "name "),
        (b"ping pong", {"field": "pong"}, "takes none"),
        (b"resolve a b", {"field": "b"}, "resolve NAME"),
    ],
)
def test_mistyped_line_gets_a_suggestion(line: bytes, details: dict[str, object], hint: str) -> None:
    for before in (b"", NEXT):
        reader = RequestParser()
        reader.receive(before + line + b"\n")
        item = reader.next()
        if before:
            item = reader.next()
        assert isinstance(item, Problem)
        assert item.refusal.details == details
        assert hint in item.refusal.message
        assert ("closed" in item.refusal.message) is item.fatal is (not before)


def test_http_refusal_is_complete_and_constant() -> None:
    head, _, body = HTTP_REFUSAL.partition(b"\r\n\r\n")
    assert head.split(b"\r\n") == [
        b"HTTP/1.1 400 Bad Request",
        b"Connection: close",
        b"Content-Type: text/plain; charset=utf-8",
        b"Content-Length: %d" % len(body),
        b"X-Content-Type-Options: nosniff",
    ]
    assert body.isascii()
    assert b"does not speak HTTP" in body


def test_endless_line_is_discarded_as_it_arrives() -> None:
    reader = RequestParser()
    for _ in range(1_000):
        reader.receive(b"{" * 10_000)
        assert reader.waiting_bytes <= MOST + 3
    assert reader.has_partial_line


@pytest.mark.parametrize("word", [b"resolve", b"watch", b"list", b"ping"])
def test_run_of_blanks_parses_in_linear_time(word: bytes) -> None:
    """It took quadratic time: most of a minute for one chunk of 64 KiB."""
    began = time.process_time()
    for blank in (b" ", b"\t", b"\r", b"\r\0"):
        for size, times in ((50_000, 1), (500, 1_000)):
            for _ in range(times):
                reader = RequestParser()
                reader.receive(word + blank * (size // len(blank)) + b"\1")
                assert isinstance(reader.next(), Problem)
    assert time.process_time() - began < 1.0


def test_memory_of_short_lines_includes_their_objects() -> None:
    reader = RequestParser()
    reader.receive(b"{\n" * 1_000)
    assert reader.waiting_bytes >= 50 * 1_000


def test_refused_request_keeps_its_id() -> None:
    reader = RequestParser()
    reader.receive(b'{"cmd":"pin","id":"x"}\n')
    item = reader.next()
    assert isinstance(item, Problem)
    assert item.refusal.details["id"] == "x"


valid = st.sampled_from([json.dumps({"cmd": cmd, "name": "a", "port": 1}).encode() for cmd in COMMANDS])
mutated = st.builds(
    lambda line, at, byte: line[:at] + byte + line[at + 1 :], valid, st.integers(0, 40), st.binary(max_size=2)
)
streams = st.lists(
    st.one_of(
        st.binary(max_size=40),
        valid,
        mutated,
        st.just(b"\n"),
        st.just(b"resolve a\r\n"),
        st.just(b"pong\n"),
        st.just(b"GET / HTTP/1.1\r\n"),
        st.just(b"\r\0"),
        st.just(b"{" * 57),
    )
)


@given(streams, st.integers(1, 20))
@example([b"\xed\xa0\x80"], 1)
@example([b"\r\x00", b"{\x00"], 1)
@example([b"{" * 57, b"\r\0", b"\r\0", b"\n"], 1)
@settings(max_examples=examples(400), deadline=None)
def test_any_bytes_in_any_chunks(pieces: list[bytes], cut: int) -> None:
    """Any bytes give requests and problems, the same for any division into chunks. Only the last can be fatal."""
    data = b"".join(pieces)
    limits = Limits(line_bytes_max=60)
    whole = parsed([data], end=True, limits=limits)
    assert parsed([data[at : at + cut] for at in range(0, len(data), cut)], end=True, limits=limits) == whole
    assert not any(line.endswith("!") for line in whole[:-1])


@pytest.mark.parametrize(
    "line",
    [
        b'{"cmd":"ping"}',
        b'{"cmd":"register","name":"a","port":1,"meta":{"a":"b"}}',
        b'{"cmd":"help"',
        b'{"cmd":"ping"}\r',
        b'{"cmd":"ping"} ',
        b' {"cmd":"ping"}',
        b'{"cmd":"ping"}}',
        b'{"cmd":"ping"}\n{"cmd":"ping"}',
        b'{"cmd":"none"}',
        b'{"id":{}}',
        b"{}",
        b"ping",
        b"}",
        b"",
        b"{" + b" " * MOST + b"}",
    ],
)
def test_single_line_is_parsed_like_any_other(line: bytes) -> None:
    single, parser = RequestParser(), RequestParser()
    item = single.parse_single(line + b"\n")
    assert single.parse_single(line) is None
    parser.receive(line + b"\n")
    if item is None:
        assert single.is_empty
        return
    usual = parser.next()
    assert parser.next() is None
    assert parser.had_valid_request is single.had_valid_request
    if isinstance(item, Problem):
        assert isinstance(usual, Problem)
        assert (item.refusal.code, item.refusal.message) == (usual.refusal.code, usual.refusal.message)
    else:
        assert item == usual
