"""The DNS zone `regd.internal`: finds the records that answer a question. It knows no messages and no sockets.

A name has records of the requested type (an answer), exists without them (NODATA), or does not exist
(NXDOMAIN). Registered names always exist, because a resolver that gets NXDOMAIN for AAAA would conclude that
there is no A either (RFC 8020).
"""

import functools
import ipaddress
import random
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from regd.gateways.name_index import NameIndex, is_service_prefix

__all__ = ["INSTANCES_MAX", "NODATA", "NXDOMAIN", "ORIGIN", "Answer", "Record", "lookup"]

ORIGIN = "regd.internal"
INSTANCES_MAX = 1_000  # in an answer; if there are more, `lookup` chooses some at random
_ADDRESSES = f"addr.{ORIGIN}"
_NAME_SERVER = f"ns.{ORIGIN}"
_WEIGHT = 1  # some clients never choose an instance of weight 0
_HEX_CHARS = (8, 32)  # digits of an IPv4 and of an IPv6 address

IpAddress = ipaddress.IPv4Address | ipaddress.IPv6Address


class Record(NamedTuple):
    """A record. `owner` "" is the name in the question; `data` is in the format of zone files (RFC 1035)."""

    owner: str
    type: str
    data: str


class Answer(NamedTuple):
    exists: bool
    records: Sequence[Record] = ()
    additional: Sequence[Record] = ()


NODATA = Answer(True)
NXDOMAIN = Answer(False)
SOA = Record(ORIGIN, "SOA", f"{_NAME_SERVER}. nobody.invalid. 1 3600 600 86400 0")  # minimum 0: never cached
_APEX = (Record("", "SOA", SOA.data), Record("", "NS", f"{_NAME_SERVER}."))
_NAME_SERVER_ADDRESS = (Record("", "A", "127.0.0.1"),)


def lookup(labels: Sequence[str], type: str, index: NameIndex, rng: random.Random) -> Answer:
    """Answer a question about a name of the zone.

    Args:
        labels: the labels before `regd.internal`, in lower case.
        type: `A`, `SRV`, `ANY`, …
        index: the state.
        rng: shuffles the instances.
    """
    labels = tuple(labels)
    if any("." in label for label in labels):
        return NXDOMAIN  # with a dot inside a label, the joined labels would look like another name
    if not labels:
        return _of_type(_APEX, type)
    if labels == ("ns",):
        return _of_type(_NAME_SERVER_ADDRESS, type)
    if len(labels) == 2 and labels[1] == "addr" and (address := _parse_address(labels[0])) is not None:
        return _of_type([_address_record("", address)], type)
    service = _service_of(labels)
    if service is not None and service in index:
        instances = _choose(index.best(service), rng)
        if type in ("SRV", "ANY"):
            return _service_answer(instances)
        if not is_service_prefix(labels):
            return _of_type(_address_records(instances), type)
        return NODATA
    return NODATA if _exists(labels, index) else NXDOMAIN


def _of_type(records: Iterable[Record], type: str) -> Answer:
    return Answer(True, [record for record in records if type in (record.type, "ANY")])


def _service_of(labels: tuple[str, ...]) -> str | None:
    """Return the service in a name: NAME, _SERVICE._tcp.NAME or _NAME._tcp. It may not be registered."""
    if not is_service_prefix(labels):
        return ".".join(labels)
    return ".".join(labels[2:]) or labels[0][1:]


def _exists(labels: tuple[str, ...], index: NameIndex) -> bool:
    """Return whether a name without records exists: the zone, a parent of other names, or `_…` below a name."""
    if labels == ("_tcp",):
        return True
    while labels:
        name = ".".join(labels)
        if name in ("ns", "addr") or name in index or index.has_names_below(name):
            return True
        if len(labels) == 2 and labels[1] == "addr" and _parse_address(labels[0]) is not None:
            return True
        if not labels[0].startswith("_"):
            return False
        labels = labels[1:]
    return False


def _choose(instances: Sequence[Mapping[str, Any]], rng: random.Random) -> list[Mapping[str, Any]]:
    return rng.sample(instances, min(len(instances), INSTANCES_MAX))


def _service_answer(instances: Iterable[Mapping[str, Any]]) -> Answer:
    """Return the SRV records of instances, each with a target of its own, and the addresses of the targets.

    Instances do not share a target, because HAProxy would give all servers with one target the same address.
    """
    records: dict[Record, None] = {}
    additional: dict[Record, None] = {}
    for instance in instances:
        address, port = _address(instance["host"]), instance["port"]
        target = instance["host"]
        if address is not None:
            target = f"{address.packed.hex()}-{port}.{_ADDRESSES}"
            additional[_address_record(target, address)] = None
        data = f"{instance.get('priority', 0)} {_WEIGHT} {port} {target}."
        records[Record("", "SRV", data)] = None
    return Answer(True, list(records), list(additional))


def _address_records(instances: Iterable[Mapping[str, Any]]) -> list[Record]:
    addresses = [_address(instance["host"]) for instance in instances]
    return list(dict.fromkeys(_address_record("", address) for address in addresses if address is not None))


def _address_record(owner: str, address: IpAddress) -> Record:
    return Record(owner, "A" if address.version == 4 else "AAAA", str(address))


@functools.lru_cache(4_096)
def _address(host: str) -> IpAddress | None:
    """Return the address of a host; None if the host is a name."""
    if host.lower() == "localhost":
        host = "127.0.0.1"
    try:
        return ipaddress.ip_address(host.partition("%")[0])  # DNS has no zone indexes
    except ValueError:
        return None


def _parse_address(label: str) -> IpAddress | None:
    """Parse HEX-PORT, the first label of a target; None for any other label."""
    text, _, port = label.partition("-")
    is_port = port.isascii() and port.isdigit() and len(port) <= 5 and 1 <= int(port) <= 65_535
    if not is_port or port[0] == "0" or len(text) not in _HEX_CHARS:
        return None
    if any(character not in "0123456789abcdef" for character in text):
        return None
    return ipaddress.ip_address(bytes.fromhex(text))
