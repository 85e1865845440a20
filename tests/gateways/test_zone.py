"""The DNS zone on values: for every name the result is exactly one of answer, NODATA and NXDOMAIN."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as some

from regd.gateways.name_index import NameIndex, is_own_name
from regd.gateways.zone import INSTANCES_MAX, NODATA, NXDOMAIN, Answer, lookup
from tests.gateways.instances import index_of, instance

INDEX = index_of(
    instance("web", "1", 5061),
    instance("web", "2", 5062),
    instance("web", "3", 5063, host="::1"),
    instance("web", "4", 5064, priority=1),
    instance("web", "5", 5065, state="draining"),
    instance("six", host="::1"),
    instance("named", host="db.example"),
    instance("local", host="localhost"),
    instance("capitals", host="LOCALHOST"),
    instance("zoned", host="fe80::1%eth0"),
    instance("down", state="starting"),
    instance("api.team.eu"),
    instance("team.eu"),
    instance("_odd"),
    instance("backup", priority=7),
    instance("twins", "1"),
    instance("twins", "2"),
    instance("ns", port=1),
    instance("my.addr", port=1),
    instance("_http._tcp.web", port=1),
)
LOOPBACK6 = "0" * 31 + "1"


def ask(name: str, type: str, index: NameIndex = INDEX) -> Answer:
    return lookup(name.split(".") if name else [], type, index, random.Random(1))


def data(name: str, type: str) -> list[str]:
    answer = ask(name, type)
    assert answer.exists
    assert all(record.owner == "" for record in answer.records)
    return sorted(record.data for record in answer.records)


WEB = [
    "0 1 5061 7f000001-5061.addr.regd.internal.",
    "0 1 5062 7f000001-5062.addr.regd.internal.",
    f"0 1 5063 {LOOPBACK6}-5063.addr.regd.internal.",
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "type", "expected"),
    [
        ("web", "A", ["127.0.0.1"]),
        ("web", "AAAA", ["::1"]),
        ("web", "SRV", WEB),
        ("web", "ANY", WEB),
        ("_http._tcp.web", "SRV", WEB),
        ("_anything._tcp.web", "SRV", WEB),
        ("_web._tcp", "SRV", WEB),
        ("_web._tcp", "ANY", WEB),
        ("six", "AAAA", ["::1"]),
        ("named", "SRV", ["0 1 5061 db.example."]),
        ("local", "A", ["127.0.0.1"]),
        ("capitals", "A", ["127.0.0.1"]),
        ("capitals", "SRV", ["0 1 5061 7f000001-5061.addr.regd.internal."]),
        ("zoned", "AAAA", ["fe80::1"]),
        ("backup", "SRV", ["7 1 5061 7f000001-5061.addr.regd.internal."]),
        ("twins", "SRV", ["0 1 5061 7f000001-5061.addr.regd.internal."]),
        ("_x._tcp.api.team.eu", "SRV", ["0 1 5061 7f000001-5061.addr.regd.internal."]),
        ("_odd", "A", ["127.0.0.1"]),
        ("__odd._tcp", "SRV", ["0 1 5061 7f000001-5061.addr.regd.internal."]),
        ("7f000001-5061.addr", "A", ["127.0.0.1"]),
        ("0a000001-1.addr", "A", ["10.0.0.1"]),
        (LOOPBACK6 + "-65535.addr", "AAAA", ["::1"]),
        ("7f000001-5061.addr", "ANY", ["127.0.0.1"]),
        ("ns", "A", ["127.0.0.1"]),
        ("", "NS", ["ns.regd.internal."]),
        ("", "SOA", ["ns.regd.internal. nobody.invalid. 1 3600 600 86400 0"]),
    ],
)
def test_answers(name: str, type: str, expected: list[str]) -> None:
    assert data(name, type) == expected


@pytest.mark.parametrize(
    ("name", "type"),
    [
        ("web", "TXT"), ("six", "A"), ("backup", "AAAA"), ("named", "A"), ("down", "A"), ("down", "SRV"),
        ("down", "ANY"), ("_http._tcp.down", "SRV"), ("_web._tcp", "A"), ("_http._tcp.web", "A"), ("_web.web", "A"),
        ("_tcp.web", "SRV"), ("_a._udp.web", "SRV"), ("eu", "A"), ("eu", "SRV"), ("_http._tcp.eu", "SRV"),
        ("addr", "A"), ("7f000001-5061.addr", "AAAA"), ("7f000001-5061.addr", "SRV"), ("ns", "AAAA"),
        ("_x._tcp.ns", "SRV"), ("_x._tcp.addr", "SRV"), ("_x.7f000001-1.addr", "A"), ("", "A"), ("", "TXT"),
        ("_tcp", "SRV"),
    ],
)  # fmt: skip
def test_nodata(name: str, type: str) -> None:
    answer = ask(name, type)
    assert (answer.exists, list(answer.records), list(answer.additional)) == (True, [], [])


@pytest.mark.parametrize(
    "name",
    [
        "nobody", "web.nobody", "nobody.web", "_nobody._tcp", "_http._tcp.nobody", "_nobody", "_x._y._tcp", "_eu._tcp",
        "u", "team", "my.addr", "_http._tcp.my.addr", "x.ns", "7f000001.addr", "7f000001-0.addr",
        "7f000001-65536.addr", "7f000001-05061.addr", "7f0000-5061.addr", "7g000001-1.addr", "7f000001-1-1.addr",
        "a.7f000001-5061.addr", "*", "*.web",
    ],
)  # fmt: skip
def test_nxdomain(name: str) -> None:
    for type in ("A", "AAAA", "SRV", "ANY", "TXT"):
        assert ask(name, type) == NXDOMAIN


def test_dot_inside_a_label_is_no_separator() -> None:
    assert lookup(["team.eu"], "A", INDEX, random.Random(1)) == NXDOMAIN
    assert lookup(["api.team", "eu"], "A", INDEX, random.Random(1)) == NXDOMAIN


def test_target_of_each_endpoint_has_its_address() -> None:
    answer = ask("web", "SRV")
    targets = [record.data.split()[3].removesuffix(".regd.internal.") for record in answer.records]
    assert len(set(targets)) == 3
    additional = {record.owner.removesuffix(".regd.internal"): record for record in answer.additional}
    for target in targets:
        record = additional[target]
        assert data(target, record.type) == [record.data]
    assert ask("named", "SRV").additional == []


def test_of_many_instances_a_random_choice() -> None:
    many = index_of(*(instance("many", str(port), port) for port in range(1, INSTANCES_MAX + 200)))
    first = lookup(["many"], "SRV", many, random.Random(1)).records
    assert len(first) == INSTANCES_MAX
    assert set(first) != set(lookup(["many"], "SRV", many, random.Random(2)).records)


def test_order_is_shuffled() -> None:
    rng = random.Random(1)
    orders = {tuple(lookup(["web"], "SRV", INDEX, rng).records) for _ in range(50)}
    assert len(orders) == 6


LABELS = ["web", "six", "eu", "team", "api", "addr", "ns", "_tcp", "_udp", "_web", "_http", "x", "7f000001-5061"]


@given(
    some.lists(some.sampled_from(LABELS), max_size=5),
    some.sets(some.lists(some.sampled_from(LABELS), min_size=1, max_size=3).map(".".join)),
)
def test_every_name_is_one_of_three(labels: list[str], names: set[str]) -> None:
    index = index_of(*(instance(name) for name in names))
    answers = {type: lookup(labels, type, index, random.Random(1)) for type in ("A", "AAAA", "SRV", "ANY", "TXT")}
    assert len({answer.exists for answer in answers.values()}) == 1  # existence does not depend on the type
    exists = answers["A"].exists
    name = ".".join(labels)
    if name in names and not is_own_name(name):
        assert answers["A"].records
        assert answers["SRV"].records
        assert answers["AAAA"] == NODATA._replace(records=[])
    if any(other.endswith("." + name) and not is_own_name(other) for other in names):
        assert exists
    if not exists:  # RFC 8020: no name below it exists either
        assert not lookup(["x", *labels], "A", index, random.Random(1)).exists
        assert not lookup(["_x", *labels], "A", index, random.Random(1)).exists


@given(
    some.lists(
        some.tuples(some.sampled_from(["a", "b.a", "c.b.a", "c"]), some.sampled_from(["", "1"]), some.booleans())
    )
)
def test_updated_index_equals_a_new_index(changes: list[tuple[str, str, bool]]) -> None:
    index, new, expected = NameIndex(), NameIndex(), {}
    for name, key, is_up in changes:
        if is_up:
            index.put(instance(name, key))
            expected[name, key] = instance(name, key)
        else:
            index.remove(name, key)
            expected.pop((name, key), None)
        new = index_of(*expected.values())
        for each in ("a", "b.a", "c.b.a", "c", "none"):
            assert index.best(each) == new.best(each)
    assert vars(index) == vars(new)


def test_best_instances_follow_every_change() -> None:
    index = index_of(instance("a", "1", priority=1), instance("a", "2", priority=1))
    assert [each["instance"] for each in index.best("a")] == ["1", "2"]
    index.remove("a", "1")
    assert [each["instance"] for each in index.best("a")] == ["2"]
    index.put(instance("a", "3"))
    assert [each["instance"] for each in index.best("a")] == ["3"]
    index.put(instance("a", "3", state="draining"))
    assert [each["instance"] for each in index.best("a")] == ["2"]
    index.remove("a", "3")
    index.remove("a", "2")
    assert index.best("a") == []
