"""DNS messages: decodes a query to a question for the zone, and encodes the zone's answer so that it fits.

Any bytes are accepted: the result is a message or None, never an exception. No message is larger than the
client accepts.
"""

import itertools
import random
import socket
import struct
from collections.abc import Iterable

import dns.exception
import dns.flags
import dns.message
import dns.name
import dns.opcode
import dns.rcode
import dns.rdata
import dns.rdataclass
import dns.rdatatype

from regd.gateways import zone
from regd.gateways.name_index import NameIndex
from regd.gateways.zone import Answer, Record

__all__ = ["TCP_BYTES_MAX", "refuse", "respond"]

TCP_BYTES_MAX = 65_535
_UDP_BYTES = (512, 65_507)  # the size that every client accepts, and the largest that UDP can carry
_HEADER = struct.Struct("!HHHHHH")  # id, flags, and the numbers of questions, answers, authorities, additionals
_TTL_S = 0  # no resolver caches an answer
_ORIGIN = dns.name.from_text(zone.ORIGIN)
_ORIGIN_WIRE = _ORIGIN.to_wire() or b""
_TRANSFERS = (dns.rdatatype.AXFR, dns.rdatatype.IXFR)
_QUERY_BYTES_MAX = 1_232  # fits into one packet everywhere; for some queries of 64 KiB, dnspython takes 0.5 s
_TYPE_AND_CLASS_BYTES = 4  # at the end of a question
_RECORD = struct.Struct("!HHIH")  # type, class, TTL, and the length of the data
_SRV = struct.Struct("!HHH")  # priority, weight, port
_TYPES = {type: dns.rdatatype.from_text(type) for type in ("A", "AAAA", "NS", "SOA", "SRV")}
_FAMILIES = {"A": socket.AF_INET, "AAAA": socket.AF_INET6}


def refuse(wire: bytes) -> bytes | None:
    """Return the response REFUSED, for a client that may not read; None for bytes that get no response."""
    return _header(wire, dns.rcode.REFUSED) if _is_query(wire) else None


def _is_query(wire: bytes) -> bool:
    return len(wire) >= _HEADER.size and not _HEADER.unpack_from(wire)[1] & dns.flags.QR


def respond(wire: bytes, index: NameIndex | None, rng: random.Random, *, tcp: bool) -> bytes | None:
    """Return the response to a query; None for bytes that get no response: too few, or a response themselves.

    Without an index the state is unknown, and the response is SERVFAIL.
    """
    if not _is_query(wire):
        return None
    _, flags, questions, *_ = _HEADER.unpack_from(wire)
    if dns.opcode.from_flags(flags) != dns.opcode.QUERY:
        return _header(wire, dns.rcode.NOTIMP)
    if len(wire) > _QUERY_BYTES_MAX:
        return _header(wire, dns.rcode.FORMERR)
    try:
        query = dns.message.from_wire(wire)
    except (dns.exception.DNSException, ValueError):
        return _header(wire, dns.rcode.FORMERR)
    if questions != 1 or len(query.question) != 1:
        return _header(wire, dns.rcode.FORMERR)
    return _respond(query, index, rng, tcp)


def _header(wire: bytes, rcode: dns.rcode.Rcode) -> bytes:
    """Return a response that is only a header, to a query whose question cannot be repeated in it."""
    id, flags, *_ = _HEADER.unpack_from(wire)
    kept_flags = flags & (0x7800 | dns.flags.RD)  # the opcode and `recursion desired`
    return _HEADER.pack(id, dns.flags.QR | kept_flags | rcode, 0, 0, 0, 0)


def _respond(query: dns.message.Message, index: NameIndex | None, rng: random.Random, tcp: bool) -> bytes:
    question = query.question[0]
    response = dns.message.make_response(query)
    if query.edns > 0:
        response.set_rcode(dns.rcode.BADVERS)
    elif (
        question.rdclass != dns.rdataclass.IN
        or question.rdtype in _TRANSFERS
        or not question.name.is_subdomain(_ORIGIN)
    ):
        response.set_rcode(dns.rcode.REFUSED)
    elif index is None:
        response.set_rcode(dns.rcode.SERVFAIL)
    else:
        labels = [label.lower().decode("latin-1") for label in question.name.relativize(_ORIGIN).labels]
        answer = zone.lookup(labels, dns.rdatatype.to_text(question.rdtype), index, rng)
        return _fit(response, answer, TCP_BYTES_MAX if tcp else _udp_bytes(query), tcp)
    return response.to_wire()


def _udp_bytes(query: dns.message.Message) -> int:
    low, high = _UDP_BYTES
    return low if query.edns < 0 else max(low, min(query.payload, high))


def _fit(response: dns.message.Message, answer: Answer, size: int, tcp: bool) -> bytes:
    """Return the answer in at most `size` bytes.

    The additional section is dropped first. If the answer still does not fit, it is empty over UDP, with TC set,
    so that the client asks again over TCP; over TCP, it has as many records as fit.
    """
    if not answer.exists:
        response.set_rcode(dns.rcode.NXDOMAIN)
    wire = response.to_wire()  # the header, the question and, if the query has it, OPT
    question_end = _HEADER.size + len(response.question[0].name.to_wire() or b"") + _TYPE_AND_CLASS_BYTES
    origin = _pointer(question_end - _TYPE_AND_CLASS_BYTES - len(_ORIGIN_WIRE))
    room = size - len(wire)
    records = [_record(record, origin) for record in answer.records]
    authority = [] if records else [_record(zone.SOA, origin)]
    additional = [_record(record, origin) for record in answer.additional]
    id, flags, _, _, _, edns_count = _HEADER.unpack_from(wire)
    flags |= dns.flags.AA
    if _size(records) > room:
        additional = []
        if tcp:
            records = _first(records, room)
        else:
            records = []
            flags |= dns.flags.TC
    elif _size(records) + _size(additional) > room:
        additional = []
    header = _HEADER.pack(id, flags, 1, len(records), len(authority), len(additional) + edns_count)
    question, edns = wire[_HEADER.size : question_end], wire[question_end:]
    return b"".join((header, question, *records, *authority, *additional, edns))


def _size(records: Iterable[bytes]) -> int:
    return sum(map(len, records))


def _first(records: list[bytes], size: int) -> list[bytes]:
    """Return as many of the first records as fit into `size` bytes."""
    ends = itertools.accumulate(map(len, records))
    return [record for record, end in zip(records, ends, strict=True) if end <= size]


# Records as bytes (RFC 1035, section 3.2.1), made here because dnspython takes 110 ms for 1,000 records.


def _record(record: Record, origin: bytes) -> bytes:
    """Return a record as bytes. All owners end with `origin`, a pointer to `regd.internal` in the question."""
    owner = _QUESTION_NAME
    if record.owner:
        owner = _labels(record.owner.removesuffix(zone.ORIGIN).removesuffix(".")) + origin
    data = _data(record)
    return owner + _RECORD.pack(_TYPES[record.type], dns.rdataclass.IN, _TTL_S, len(data)) + data


def _data(record: Record) -> bytes:
    if record.type == "SRV":
        priority, weight, port, target = record.data.split()
        return _SRV.pack(int(priority), int(weight), int(port)) + _labels(target[:-1]) + b"\0"
    if record.type in _FAMILIES:
        return socket.inet_pton(_FAMILIES[record.type], record.data)
    return dns.rdata.from_text(dns.rdataclass.IN, _TYPES[record.type], record.data).to_wire() or b""


def _labels(name: str) -> bytes:
    """Return the labels of a name, each after its length."""
    return b"".join(len(label).to_bytes(1) + label for label in name.encode().split(b".")) if name else b""


def _pointer(offset: int) -> bytes:
    """Return a pointer to a name at an offset of the message (RFC 1035, section 4.1.4)."""
    return (0xC000 | offset).to_bytes(2)


_QUESTION_NAME = _pointer(_HEADER.size)
