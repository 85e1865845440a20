"""The fuzz targets of the HTTP and DNS gateway: queries, event streams, DNS messages."""

import json
import random

import dns.flags
import dns.message
import dns.rcode

from regd.gateways.dns_messages import TCP_BYTES_MAX, refuse, respond
from regd.gateways.guard import find_refusal, host_name
from regd.gateways.name_index import NameIndex
from regd.gateways.queries import COMMANDS, TARGETS, BadQuery, body_of, parse_own_query, parse_query
from regd.gateways.stream import EventEncoder, parse_position

_UDP_BYTES_MIN = 512


def _instance(name: str, port: int, host: str, state: str = "ready") -> dict[str, object]:
    return {"name": name, "instance": str(port), "host": host, "port": port, "meta": {}, "state": state}


_INDEX = NameIndex()
for _number in range(40):
    _INDEX.put(_instance("many", 5_000 + _number, "127.0.0.1"))
for _name, _host in (("web", "127.0.0.1"), ("web", "::1"), ("api.team", "db.example"), ("_x", "fe80::1%eth0")):
    _INDEX.put(_instance(_name, 80, _host))
_INDEX.put(_instance("down", 80, "::1", "starting"))


def dns_message(data: bytes) -> None:
    """Any bytes get a readable response that fits, with their id, or none; UDP and TCP agree."""
    for index in (_INDEX, None):
        udp, tcp = (respond(data, index, random.Random(1), tcp=tcp) for tcp in (False, True))
        assert (udp is None) == (tcp is None) == (refuse(data) is None) == (len(data) < 12 or data[2] >= 128)
        if udp is None or tcp is None:
            continue
        short, long = dns.message.from_wire(udp), dns.message.from_wire(tcp)
        assert udp[:2] == tcp[:2] == data[:2]
        assert short.rcode() == long.rcode()
        assert len(tcp) <= TCP_BYTES_MAX
        assert not long.flags & dns.flags.TC
        assert len(udp) <= _UDP_BYTES_MIN or short.edns >= 0
        if not short.flags & dns.flags.TC:
            assert sorted(map(str, short.answer)) == sorted(map(str, long.answer)) or len(long.answer) == 1


def query(data: bytes) -> None:
    """A query string is a request, or refused with a message; a `Host`, a position and a reply are valid or not."""
    for parameters in COMMANDS.values():
        try:
            arguments = parse_query(data, parameters)
        except BadQuery as error:
            assert str(error).isprintable()
            continue
        json.dumps(arguments, allow_nan=False)
        assert not {"cmd", "id"} & set(arguments)
    try:
        assert set(parse_own_query(data, TARGETS)) <= set(TARGETS)
    except BadQuery as error:
        assert str(error).isprintable()
    name = host_name(data)
    assert name in ("", "localhost", "127.0.0.1", "[::1]") or name.endswith(".localhost")
    assert (find_refusal("GET", [(b"host", data)]) is None) == bool(host_name(data.strip()))
    position = parse_position(data.decode("latin-1"))
    assert position is None or 0 <= position["since"] < 2**63
    body = body_of(data)
    assert body.status in (200, 400, 403, 404, 502, 503, 504)
    assert body.status == 200 or isinstance(body.message, str)


def events(data: bytes) -> None:
    """What a program sends becomes events, one for each line, or ends the stream; in any pieces the same."""
    whole, pieces = (EventEncoder({"epoch": "5eed"}, resumes=False) for _ in range(2))
    try:
        stream = whole.encode(data)
    except ValueError:
        return
    assert b"".join(pieces.encode(data[at : at + 7]) for at in range(0, len(data), 7)) == stream
    blocks = stream.split(b"\n\n")[:-1]
    assert len(blocks) == data.count(b"\n")
    for block, line in zip(blocks, data.split(b"\n"), strict=False):
        fields = block.split(b"\n")
        assert [field.split(b":")[0] for field in fields] in ([b"event", b"data"], [b"event", b"id", b"data"])
        assert fields[-1] == b"data: " + line
        assert b"\r" not in block
