"""DNS messages: the bytes of a query become a question for the zone, and its answer bytes that fit.

Total: any bytes give a message or nothing, and no message is larger than the client takes.
"""

import random
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
import dns.rrset
from dns.rdtypes.IN.SRV import SRV

from regd.gateways import zone
from regd.gateways.name_index import NameIndex
from regd.gateways.zone import Answer, Record

__all__ = ["TCP_BYTES_MAX", "refuse", "respond"]

TCP_BYTES_MAX = 65_535
_UDP_BYTES = (512, 65_507)  # the least that every client takes, and the most that UDP can carry
_HEADER = struct.Struct("!HHHHHH")  # id, flags, and the numbers of questions, answers, authorities, additionals
_TTL_S = 0  # nothing is ever cached
_ORIGIN = dns.name.from_text(zone.ORIGIN)
_TRANSFERS = (dns.rdatatype.AXFR, dns.rdatatype.IXFR)
_KEPT = 0.9  # the part of the records that stays, each time that an answer does not fit into TCP


def refuse(wire: bytes) -> bytes | None:
    """Return REFUSED, for a client that may not read; None for bytes that get no response."""
    return _header(wire, dns.rcode.REFUSED) if _is_query(wire) else None


def _is_query(wire: bytes) -> bool:
    return len(wire) >= _HEADER.size and not _HEADER.unpack_from(wire)[1] & dns.flags.QR


def respond(wire: bytes, index: NameIndex | None, rng: random.Random, *, tcp: bool) -> bytes | None:
    """Return the response to a query; None if it gets none, because it is a response itself or too short.

    Without an index, the zone is not known: SERVFAIL.
    """
    if not _is_query(wire):
        return None
    _, flags, questions, *_ = _HEADER.unpack_from(wire)
    if dns.opcode.from_flags(flags) != dns.opcode.QUERY:
        return _header(wire, dns.rcode.NOTIMP)
    try:
        query = dns.message.from_wire(wire)
    except (dns.exception.DNSException, ValueError):
        return _header(wire, dns.rcode.FORMERR)
    if questions != 1 or len(query.question) != 1:
        return _header(wire, dns.rcode.FORMERR)
    return _respond(query, index, rng, tcp)


def _header(wire: bytes, rcode: dns.rcode.Rcode) -> bytes:
    """Return a response of a header alone, to a query that cannot be echoed."""
    id, flags, *_ = _HEADER.unpack_from(wire)
    kept = flags & (0x7800 | dns.flags.RD)  # the opcode and `recursion desired`
    return _HEADER.pack(id, dns.flags.QR | kept | rcode, 0, 0, 0, 0)


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
    so that the client asks again over TCP; over TCP it has as many records as fit.
    """
    response.flags |= dns.flags.AA
    owner = response.question[0].name
    records = list(answer.records)
    if not answer.exists:
        response.set_rcode(dns.rcode.NXDOMAIN)
    if not records:
        response.authority = _rrsets([zone.SOA], owner)
    response.answer = _rrsets(records, owner)
    response.additional = _rrsets(answer.additional, owner)
    while True:
        try:
            return response.to_wire(max_size=size)
        except dns.exception.TooBig:
            if response.additional:
                response.additional = []
            elif tcp:
                records = records[: int(len(records) * _KEPT)]
                response.answer = _rrsets(records, owner)
            else:
                response.answer = []
                response.flags |= dns.flags.TC


def _rrsets(records: Iterable[Record], question: dns.name.Name) -> list[dns.rrset.RRset]:
    sets: dict[tuple[str, str], list[dns.rdata.Rdata]] = {}
    for record in records:
        sets.setdefault((record.owner, record.type), []).append(_rdata(record))
    return [
        dns.rrset.from_rdata_list(dns.name.from_text(owner) if owner else question, _TTL_S, rdatas)
        for (owner, _), rdatas in sets.items()
    ]


def _rdata(record: Record) -> dns.rdata.Rdata:
    if record.type == "SRV":  # `from_text` takes five times as long
        priority, weight, port, target = record.data.split()
        return SRV(  # type: ignore[no-untyped-call]
            dns.rdataclass.IN,
            dns.rdatatype.SRV,
            int(priority),
            int(weight),
            int(port),
            dns.name.from_text(target),
        )
    return dns.rdata.from_text(dns.rdataclass.IN, dns.rdatatype.from_text(record.type), record.data)
