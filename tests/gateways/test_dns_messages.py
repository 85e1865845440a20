"""DNS messages: the bytes of queries, and responses as decoded by dnspython."""

import random
import struct
from typing import Any

import dns.edns
import dns.flags
import dns.message
import dns.opcode
import dns.rcode
import dns.rdataclass
import dns.rdatatype
import pytest
from hypothesis import given, settings
from hypothesis import strategies as some

from regd.gateways import zone
from regd.gateways.dns_messages import TCP_BYTES_MAX, respond
from regd.gateways.name_index import NameIndex
from tests.gateways.instances import index_of, instance

INDEX = index_of(
    instance("web", "1", 5061),
    instance("web", "2", 5062, host="::1"),
    instance("api.team", port=80),
    *(instance("many", str(port), port) for port in range(2_000, 2_040)),
    *(instance("six", str(port), port, host="::1") for port in range(10_001, 11_001)),
    *(
        instance("named", str(port), port, host=".".join(["x" * 63] * 3 + ["y" * 61]))
        for port in range(10_001, 10_500)
    ),
)


def ask(
    name: str, type: str, tcp: bool = False, index: NameIndex | None = INDEX, **query: Any
) -> dns.message.Message:
    wire = dns.message.make_query(name, type, **query).to_wire()
    response = respond(wire, index, random.Random(1), tcp=tcp)
    assert response is not None
    return dns.message.from_wire(response)


def texts(section: list[Any]) -> list[str]:
    return sorted(line for rrset in section for line in rrset.to_text().splitlines())


def test_srv_answer() -> None:
    response = ask("_http._tcp.Web.REGD.internal", "SRV")
    assert texts(response.answer) == [
        "_http._tcp.Web.REGD.internal. 0 IN SRV 0 1 5061 7f000001-5061.addr.regd.internal.",
        f"_http._tcp.Web.REGD.internal. 0 IN SRV 0 1 5062 {'0' * 31}1-5062.addr.regd.internal.",
    ]
    # The names in the additional section point into the question, so they have the same case.
    assert [line.replace("REGD", "regd") for line in texts(response.additional)] == [
        f"{'0' * 31}1-5062.addr.regd.internal. 0 IN AAAA ::1",
        "7f000001-5061.addr.regd.internal. 0 IN A 127.0.0.1",
    ]
    assert response.question[0].name.to_text() == "_http._tcp.Web.REGD.internal."  # in the case of the question
    assert response.rcode() == dns.rcode.NOERROR
    assert response.flags == dns.flags.QR | dns.flags.AA | dns.flags.RD
    assert response.authority == []


def test_addresses() -> None:
    assert texts(ask("web.regd.internal", "A").answer) == ["web.regd.internal. 0 IN A 127.0.0.1"]
    assert texts(ask("web.regd.internal", "AAAA").answer) == ["web.regd.internal. 0 IN AAAA ::1"]


def test_apex() -> None:
    assert texts(ask("regd.internal", "ANY").answer) == [
        "regd.internal. 0 IN NS ns.regd.internal.",
        "regd.internal. 0 IN SOA ns.regd.internal. nobody.invalid. 1 3600 600 86400 0",
    ]


@pytest.mark.parametrize(
    ("name", "type", "rcode"),
    [
        ("nobody.regd.internal", "A", dns.rcode.NXDOMAIN),
        ("team.regd.internal", "A", dns.rcode.NOERROR),
        ("web.regd.internal", "TXT", dns.rcode.NOERROR),
        ("web.regd.internal", "TYPE65280", dns.rcode.NOERROR),
        ("nobody.regd.internal", "HTTPS", dns.rcode.NXDOMAIN),
        (r"api\.team.regd.internal", "A", dns.rcode.NXDOMAIN),
        (r"\000\255.regd.internal", "A", dns.rcode.NXDOMAIN),
    ],
)
def test_negative_answers_carry_a_soa_that_forbids_caching(name: str, type: str, rcode: dns.rcode.Rcode) -> None:
    response = ask(name, type)
    assert (response.rcode(), response.answer) == (rcode, [])
    soa = "regd.internal. 0 IN SOA ns.regd.internal. nobody.invalid. 1 3600 600 86400 0"
    assert texts(response.authority) == [soa]
    assert response.flags & dns.flags.AA


@pytest.mark.parametrize(
    ("name", "type", "rdclass"),
    [
        ("example.com", "A", "IN"),
        ("internal", "A", "IN"),
        ("web.regd.internal.example.com", "A", "IN"),
        ("xregd.internal", "A", "IN"),
        (".", "NS", "IN"),
        ("regd.internal", "AXFR", "IN"),
        ("regd.internal", "IXFR", "IN"),
        ("web.regd.internal", "A", "CH"),
        ("web.regd.internal", "A", "ANY"),
    ],
)
def test_refused(name: str, type: str, rdclass: str) -> None:
    response = ask(name, type, rdclass=rdclass)
    assert response.rcode() == dns.rcode.REFUSED
    assert not response.answer
    assert not response.flags & dns.flags.AA


def test_without_a_state_servfail() -> None:
    assert ask("web.regd.internal", "A", index=None).rcode() == dns.rcode.SERVFAIL
    assert ask("example.com", "A", index=None).rcode() == dns.rcode.REFUSED


def test_edns_version() -> None:
    response = ask("web.regd.internal", "A", use_edns=1)
    assert (response.rcode(), response.edns) == (dns.rcode.BADVERS, 0)


@pytest.mark.parametrize("payload", [None, 0, 512, 1_232, 4_096, 65_535])
@pytest.mark.parametrize("name", ["web", "many", "six", "named"])
def test_udp_response_fits(name: str, payload: int | None) -> None:
    edns: dict[str, Any] = {} if payload is None else {"use_edns": 0, "payload": payload}
    wire = dns.message.make_query(f"{name}.regd.internal", "SRV", **edns).to_wire()
    response = respond(wire, INDEX, random.Random(1), tcp=False)
    assert response is not None
    assert len(response) <= min(max(512, payload or 0), 65_507)
    message = dns.message.from_wire(response)
    count = sum(len(rrset) for rrset in message.answer)
    assert count == (0 if message.flags & dns.flags.TC else len(INDEX.best(name)))
    if message.flags & dns.flags.TC:
        assert message.additional == []
        assert len(response) < 512
        assert ask(f"{name}.regd.internal", "SRV", tcp=True).answer


def test_additional_section_is_dropped_first() -> None:
    response = ask("many.regd.internal", "SRV", use_edns=0, payload=3_000)
    assert (len(response.answer[0]), response.additional, response.flags & dns.flags.TC) == (40, [], 0)


def test_every_size_is_used_to_its_last_byte() -> None:
    def respond_within(payload: int) -> dns.message.Message:
        wire = dns.message.make_query("many.regd.internal", "SRV", use_edns=0, payload=payload).to_wire()
        response = respond(wire, INDEX, random.Random(1), tcp=False)
        assert response is not None
        assert len(response) <= payload
        sizes.add(len(response))
        return dns.message.from_wire(response)

    sizes: set[int] = set()
    whole = respond_within(65_507)
    (size,) = sizes
    assert respond_within(size).additional
    bare = respond_within(size - 1)
    assert (len(bare.answer[0]), bare.additional) == (40, [])
    size = min(sizes)
    assert respond_within(size).answer
    assert respond_within(size - 1).flags & dns.flags.TC
    assert len(whole.additional) == 40


@pytest.mark.long
def test_tcp_response_is_full() -> None:
    # The pointer, the fields from type to length, and the data.
    record = 2 + 10 + 6 + 1 + 38 + len(b"\4addr\4regd\10internal\0")
    gaps = set()
    for length in range(1, 62):
        for edns in (-1, 0):
            name = f"_{'x' * length}._tcp.six.regd.internal"
            wire = dns.message.make_query(name, "SRV", use_edns=edns).to_wire()
            response = respond(wire, INDEX, random.Random(1), tcp=True)
            assert response is not None
            gaps.add(TCP_BYTES_MAX - len(response))
    assert (min(gaps), max(gaps) < record) == (0, True)


@pytest.mark.parametrize(("name", "least"), [("six", 750), ("named", 200)])
def test_tcp_response_has_as_many_records_as_fit(name: str, least: int) -> None:
    response = ask(f"{name}.regd.internal", "SRV", tcp=True)
    assert len(response.answer[0]) >= least
    assert not response.flags & dns.flags.TC
    assert len(response.to_wire(max_size=TCP_BYTES_MAX)) > 0.85 * TCP_BYTES_MAX


@given(
    some.sampled_from(["web", "many", "nobody", "_x._tcp.web", "team"]), some.sampled_from(["A", "SRV", "ANY"])
)
def test_udp_and_tcp_differ_in_order_only(name: str, type: str) -> None:
    udp, tcp = (ask(f"{name}.regd.internal", type, tcp, use_edns=0, payload=65_535) for tcp in (False, True))
    assert texts(udp.answer) == texts(tcp.answer)
    assert texts(udp.additional) == texts(tcp.additional)
    assert (udp.rcode(), udp.flags) == (tcp.rcode(), tcp.flags)


QUERY = dns.message.make_query("web.regd.internal", "A", id=7, use_edns=0).to_wire()


def rcode(wire: bytes) -> dns.rcode.Rcode:
    response = respond(wire, INDEX, random.Random(1), tcp=False)
    assert response is not None
    message = dns.message.from_wire(response)
    assert message.id == 7
    assert message.flags & dns.flags.QR
    return message.rcode()


@pytest.mark.parametrize("length", range(12))
def test_less_than_a_header_gets_no_answer(length: int) -> None:
    assert respond(QUERY[:length], INDEX, random.Random(1), tcp=False) is None


def test_a_response_gets_no_answer() -> None:
    response = respond(QUERY, INDEX, random.Random(1), tcp=False)
    assert response is not None
    assert respond(response, INDEX, random.Random(1), tcp=False) is None


@pytest.mark.parametrize(
    "opcode", [dns.opcode.IQUERY, dns.opcode.STATUS, dns.opcode.NOTIFY, dns.opcode.UPDATE, 15]
)
def test_other_opcodes(opcode: int) -> None:
    assert rcode(QUERY[:2] + struct.pack("!H", opcode << 11) + QUERY[4:]) == dns.rcode.NOTIMP


QUESTION = b"\3web\4regd\10internal\0\0\1\0\1"
OPT = b"\0\0\x29\2\0\0\0\0\0\0\0"


@pytest.mark.parametrize(
    "wire",
    [
        b"\0\7\1\0\0\0\0\0\0\0\0\0",  # no question
        b"\0\7\1\0\0\2\0\0\0\0\0\0" + QUESTION + QUESTION,
        b"\0\7\1\0\0\2\0\0\0\0\0\0" + QUESTION + b"\3api" + QUESTION[4:],
        b"\0\7\1\0\0\1\0\0\0\0\0\0",
        b"\0\7\1\0\0\1\0\0\0\0\0\0" + QUESTION[:-1],
        b"\0\7\1\0\0\1\0\0\0\0\0\0" + QUESTION + b"junk",
        b"\0\7\1\0\0\1\0\0\0\0\0\0\xc0\x0c\0\1\0\1",  # a pointer to itself
        b"\0\7\1\0\0\1\0\0\0\0\0\0\xc0\xff\0\1\0\1",
        b"\0\7\1\0\0\1\0\0\0\0\0\0\x40" + b"a" * 64 + b"\0\0\1\0\1",
        b"\0\7\1\0\0\1\0\0\0\0\0\0" + (b"\x3f" + b"a" * 63) * 4 + b"\0\0\1\0\1",
        b"\0\7\1\0\0\1\0\0\0\0\0\2" + QUESTION + OPT + OPT,
        # Longer than any query: dnspython would take half a second for 4,000 records with long names.
        b"\0\7\1\0\0\1\0\0\0\0\0\1" + QUESTION + OPT[:-2] + struct.pack("!H", 1_200) + b"\0\x0c\4\xac" + bytes(1_196),
    ],
)  # fmt: skip
def test_formerr(wire: bytes) -> None:
    assert rcode(wire) == dns.rcode.FORMERR


@settings(max_examples=500)
@given(
    some.lists(some.tuples(some.integers(0, len(QUERY) - 1), some.binary(max_size=3)), max_size=4),
    some.booleans(),
)
def test_any_bytes_give_a_message_or_nothing(edits: list[tuple[int, bytes]], tcp: bool) -> None:
    wire = QUERY
    for at, replacement in edits:
        wire = wire[:at] + replacement + wire[at + len(replacement) :]
    response = respond(wire, INDEX, random.Random(1), tcp=tcp)
    if response is not None:
        dns.message.from_wire(response)
        assert len(response) <= 65_535


@given(
    some.lists(
        some.tuples(
            some.sampled_from(["127.0.0.1", "10.0.0.1", "::1", "localhost", "fe80::1%eth0", "db.example", "DB"]),
            some.integers(1, 65_535),
            some.sampled_from([0, 0, 0, 7, 65_535]),
        ),
        max_size=6,
    ),
    some.sampled_from(["A", "AAAA", "SRV", "ANY", "TXT", "SOA"]),
    some.sampled_from(["web", "WEB", "_x._tcp.web", "eu", "", "ns", "7f000001-1.addr", "nobody"]),
    some.sampled_from([None, 0, 1_232]),
)
def test_message_has_the_records_of_the_zone(
    endpoints: list[tuple[str, int, int]], type: str, name: str, payload: int | None
) -> None:
    """regd encodes the message itself, so dnspython must decode it to the records of the zone."""
    instances = [
        instance("web", str(number), port, host=host, priority=priority)
        for number, (host, port, priority) in enumerate(endpoints)
    ]
    index = index_of(*instances, instance("api.eu", port=1))
    edns: dict[str, Any] = {} if payload is None else {"use_edns": 0, "payload": payload}
    response = ask(f"{name}.regd.internal".lstrip("."), type, tcp=True, index=index, **edns)
    answer = zone.lookup(name.lower().split(".") if name else [], type, index, random.Random(2))
    question = response.question[0].name.to_text()
    assert question == f"{name}.regd.internal.".lstrip(".")
    assert texts(response.answer) == sorted(
        f"{record.owner or question} 0 IN {record.type} {record.data}" for record in answer.records
    )
    assert texts(response.additional) == sorted(
        f"{record.owner}. 0 IN {record.type} {record.data}" for record in answer.additional
    )
    assert texts(response.authority) == ([] if answer.records else [f"{zone.ORIGIN}. 0 IN SOA {zone.SOA.data}"])
    assert (response.rcode() == dns.rcode.NXDOMAIN) == (not answer.exists)
    assert response.edns == (-1 if payload is None else 0)
