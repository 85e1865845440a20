"""Records: every instance comes back as it went out or is refused with a reason; nothing from etcd is trusted."""

import json
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from regd.bridge import records
from regd.bridge.records import Place
from regd.core import model
from regd.core.errors import Invalid
from regd.protocol import commands

PREFIX = "/regd/v1/default/"
LABELS = st.from_regex(model._LABEL, fullmatch=True).filter(lambda text: len(text) <= 63)
NAMES = st.lists(LABELS, min_size=1, max_size=4).map(".".join).filter(lambda text: len(text) <= 253)
INSTANCES = st.from_regex(model._INSTANCE, fullmatch=True)
MACHINES = st.from_regex(records._MACHINE, fullmatch=True).filter(lambda text: len(text) <= 20)
HOSTS = st.one_of(
    st.sampled_from(
        ["127.0.0.1", "::1", "localhost", "10.0.0.7", "db.internal", "fe80::1%eth0", "::ffff:127.0.0.9"]
    ),
    st.ip_addresses(v=4).map(str).filter(lambda host: host != "0.0.0.0"),
    st.ip_addresses(v=6).map(str).filter(lambda host: host not in ("::", "::ffff:0.0.0.0")),
)
TEXTS = st.text(st.characters(exclude_categories=["Cs"]))
METAS = st.dictionaries(TEXTS, TEXTS, max_size=8)
# Up to what the daemon accepts, and a little less: whether another label fits.
FULL_METAS = st.one_of(
    st.integers(60, 64).map(lambda count: {str(number): "" for number in range(count)}),
    st.integers(4_000, 4_096).map(lambda size: {"": "x" * size}),
)
STATES = st.sampled_from(["starting", "ready", "draining"])
WHOLE = st.integers(0, 2**63 - 1)


def instances(metas: st.SearchStrategy[dict[str, str]] = METAS) -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries(
        {"name": NAMES, "instance": INSTANCES, "host": HOSTS, "port": st.integers(1, 65_535), "meta": metas,
         "state": STATES, "rev": WHOLE},
        optional={"priority": st.integers(1, 65_535), "hold": st.just(True)},
    )  # fmt: skip


@given(instances(st.one_of(METAS, FULL_METAS)), MACHINES)
def test_an_instance_arrives_as_it_is_or_is_not_published_for_a_reason(
    instance: dict[str, Any], machine: str
) -> None:
    model.check_meta(instance["meta"])
    if reason := records.reason_not_to_publish(instance, machine):
        assert reason.isprintable()
        return
    place = Place(machine, instance["name"], instance["instance"])
    key = records.key_of(PREFIX, place)
    assert records.place_of(PREFIX, key) == place
    assert key.startswith(records.machine_prefix(PREFIX, machine))
    fields = records.published(records.value_of(instance, instance["host"], "5eed"))
    assert fields == {
        **{name: instance[name] for name in ("host", "port", "meta", "state")},
        "priority": instance.get("priority", 0),
    }
    arrival = records.arrival(place, fields, loopback=True)
    assert arrival["meta"] == {**instance["meta"], "regd.machine": machine}
    assert arrival["priority"] == min(fields["priority"] + 100, 65_535)
    name, arrival_instance = records.arrival_key(place)
    commands.check_request(
        "register", None, {"name": name, "instance": arrival_instance, "hold": True, **arrival}
    )
    came_in = {"name": name, "instance": arrival_instance, "hold": True, "rev": 1, **arrival}
    assert records.is_arrival(came_in)
    assert "another machine" in records.reason_not_to_publish(came_in, machine)


@given(instances())
def test_a_local_instance_is_none_that_came_in(instance: dict[str, Any]) -> None:
    assert not records.is_arrival(instance)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"meta": {"regd.publish": "no"}}, "regd.publish=no"),
        ({"meta": {"regd.publish": "yes"}}, ""),
        ({"meta": {"regd.machine": "b"}}, "another machine"),
        (
            {"meta": {str(number): "" for number in range(64)}},
            "no room for regd.machine: it must have at most 64",
        ),
        ({"meta": {str(number): "" for number in range(63)}}, ""),
        ({"meta": {"": "x" * 4_084}}, "no room for regd.machine: it must be at most 4096 bytes"),
        ({"meta": {"": "x" * 4_083}}, ""),
        ({"host": "fe80::1%eth0"}, "this machine only"),
    ],
)
def test_reasons(change: dict[str, Any], reason: str) -> None:
    instance = {
        "name": "web",
        "instance": "",
        "host": "10.0.0.7",
        "port": 80,
        "meta": {},
        "state": "ready",
        "rev": 1,
    }
    given_reason = records.reason_not_to_publish({**instance, **change}, "a")
    assert reason in given_reason
    assert bool(reason) == bool(given_reason)


# Keys.


PLACES = st.builds(Place, MACHINES, NAMES, INSTANCES)


@given(PLACES, PLACES)
def test_two_instances_have_two_keys_and_two_names(one: Place, other: Place) -> None:
    assume(one != other)
    assert records.key_of(PREFIX, one) != records.key_of(PREFIX, other)
    assert records.arrival_key(one) != records.arrival_key(other)


@given(MACHINES, PLACES)
def test_a_machine_has_only_its_own_keys(machine: str, place: Place) -> None:
    for other in (place.machine, machine, f"{machine}a"[:20], machine[:1]):
        key = records.key_of(PREFIX, place._replace(machine=other))
        assert key.startswith(records.machine_prefix(PREFIX, machine)) == (other == machine)


@given(MACHINES, st.lists(INSTANCES, min_size=2, max_size=2, unique=True))
def test_instances_of_one_machine_have_different_names(machine: str, two: list[str]) -> None:
    one, other = (records.arrival_key(Place(machine, "web", instance)) for instance in two)
    assert one != other


def test_an_instance_that_looks_like_a_shortened_one_is_shortened() -> None:
    long = Place("a", "web", "x" * 63)
    shortened = records.arrival_key(long)[1]
    assert len(shortened) == 63
    assert shortened.startswith("a.xxx")
    imitation = Place("a", "web", shortened.removeprefix("a."))
    assert records.arrival_key(imitation)[1] != shortened


@pytest.mark.parametrize(
    ("instance", "expected"), [("", "a"), ("1", "a.1"), ("b.c", "a.b.c"), ("x" * 61, "a." + "x" * 61)]
)
def test_names_of_arrivals(instance: str, expected: str) -> None:
    assert records.arrival_key(Place("a", "web", instance)) == ("web", expected)


def test_the_claim_of_a_machine() -> None:
    key = records.claim_key(PREFIX, "a")
    assert key == b"/regd/v1/default/a/.bridge"
    assert records.place_of(PREFIX, key) == Place("a", "", "")


@pytest.mark.parametrize(
    "key",
    [
        b"", b"/", b"a", b"a/", b"a/web", b"a/web/1/2", b"/web/1", b"A/web/1", b"a/Web/1", b"a//", b"a/.web/",
        b"-a/web/1", b"a/web-/1", b"a/web/x y", b"a/web/\x1b[2J", b"a/web/\xff", "a/wéb/1".encode(), b"a/web/\n",
        b"a" * 21 + b"/web/1", b"a/" + b"x" * 254 + b"/1", b"a/web/" + b"x" * 64, b"a/.bridge/", b"../web/1",
    ],
)  # fmt: skip
def test_hostile_keys(key: bytes) -> None:
    with pytest.raises(Invalid):
        records.place_of(PREFIX, PREFIX.encode() + key)


@given(st.binary(max_size=80))
def test_any_key_is_a_place_or_refused(key: bytes) -> None:
    try:
        place = records.place_of(PREFIX, PREFIX.encode() + key)
    except Invalid as error:
        assert str(error).isprintable()
    else:
        if place.name:
            assert records.key_of(PREFIX, place) == PREFIX.encode() + key
        else:
            assert records.claim_key(PREFIX, place.machine) == PREFIX.encode() + key


def test_a_key_with_another_prefix() -> None:
    with pytest.raises(Invalid):
        records.place_of(PREFIX, b"/regd/v1/other/a/web/1")


@pytest.mark.parametrize("machine", ["", "-a", "a-", "a.b", "A", "a" * 21, "a/b", "ä", "a\n", " "])
def test_bad_machines(machine: str) -> None:
    with pytest.raises(Invalid):
        records.check_machine(machine)


@pytest.mark.parametrize("prefix", ["", "/", "regd/", "/regd", "/re gd/", "/\x00/", "/ü/", "/" + "x" * 200 + "/"])
def test_bad_prefixes(prefix: str) -> None:
    with pytest.raises(Invalid):
        records.check_prefix(prefix)


# Values.


@pytest.mark.parametrize(
    "value",
    [
        b"", b"null", b"[]", b"{}", b"42", b'"x"', b"{", b"\xff\xfe", b'{"host":"10.0.0.7"}', b'{"port":80}',
        b'{"host":"10.0.0.7","port":0}', b'{"host":"10.0.0.7","port":65536}', b'{"host":"10.0.0.7","port":true}',
        b'{"host":"10.0.0.7","port":80.0}', b'{"host":"10.0.0.7","port":"80"}', b'{"host":"","port":80}',
        b'{"host":"0.0.0.0","port":80}', b'{"host":"::","port":80}', b'{"host":"1","port":80}',
        b'{"host":"a b","port":80}', b'{"host":"10.0.0.7","host":"10.0.0.8","port":80}',
        b'{"host":"10.0.0.7","port":NaN}', b'{"host":"10.0.0.7","port":1e999}',
        b'{"host":"10.0.0.7","port":80,"meta":[]}', b'{"host":"10.0.0.7","port":80,"meta":{"a":1}}',
        b'{"host":"10.0.0.7","port":80,"meta":{"a":"\\ud800"}}', b'{"host":"10.0.0.7","port":80,"meta":null}', b'{"host":"10.0.0.7","port":80,"meta":{"' + b"x" * 60_000 + b'":1}}',
        b'{"host":"10.0.0.7","port":80,"state":"up"}', b'{"host":"10.0.0.7","port":80,"priority":65536}',
        b'{"host":"10.0.0.7","port":80,"priority":-1}', b"[" * 60_000,
        b'{"host":"10.0.0.7","port":80,"meta":{"a":"' + b"x" * 70_000 + b'"}}',
        b'{"host":"10.0.0.7","port":80,"meta":{"a":"' + b"x" * 4_096 + b'"}}',
        b'{"host":"10.0.0.7","port":80,"x":' + b"9" * 5_000 + b"}",
    ],
)  # fmt: skip
def test_hostile_values(value: bytes) -> None:
    with pytest.raises(Invalid) as caught:
        records.published(value)
    assert len(str(caught.value)) < 300
    assert str(caught.value).isprintable()


JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=8), inner, max_size=3)),
)


@given(
    st.one_of(
        st.binary(max_size=80),
        st.dictionaries(
            st.sampled_from(["host", "port", "meta", "state", "priority", "rev", "epoch", "x"]),
            st.one_of(JSON, HOSTS, STATES, METAS, st.integers(1, 65_535)),
        ).map(lambda fields: json.dumps(fields).encode()),
    )
)
def test_any_value_can_be_registered_or_is_refused(value: bytes) -> None:
    place = Place("b", "web", "1")
    try:
        arrival = records.arrival(place, records.published(value), loopback=False)
    except Invalid:
        return
    commands.check_request("register", None, {"name": "web", "instance": "b.1", "hold": True, **arrival})
    assert arrival["meta"]["regd.machine"] == "b"
    assert not records.is_loopback(arrival["host"])


def test_defaults_of_a_value_by_hand() -> None:
    assert records.published(b'{"host":"10.0.0.7","port":80}') == {
        "host": "10.0.0.7", "port": 80, "meta": {}, "state": "ready", "priority": 0,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("priority", "expected"), [(0, 100), (65_435, 65_535), (65_436, 65_535), (65_535, 65_535)]
)
def test_priority_of_an_arrival(priority: int, expected: int) -> None:
    fields = {"host": "10.0.0.7", "port": 80, "meta": {}, "state": "ready", "priority": priority}
    assert records.arrival(Place("b", "web", ""), fields, loopback=False)["priority"] == expected


def test_another_machine_cannot_pretend_to_be_a_third() -> None:
    fields = records.published(b'{"host":"10.0.0.7","port":80,"meta":{"regd.machine":"c"}}')
    assert records.arrival(Place("b", "web", ""), fields, loopback=False)["meta"] == {"regd.machine": "b"}


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "127.3.2.1", "::1", "localhost", "LocalHost", "x.localhost", "::ffff:127.0.0.1"]
)
def test_loopback(host: str) -> None:
    assert records.is_loopback(host)
    fields = {"host": host, "port": 80, "meta": {}, "state": "ready", "priority": 0}
    with pytest.raises(Invalid, match="not an address of another machine"):
        records.arrival(Place("b", "web", ""), fields, loopback=False)
    assert records.arrival(Place("b", "web", ""), fields, loopback=True)["host"] == host


def test_an_address_of_one_interface_is_not_taken() -> None:
    fields = records.published(b'{"host":"fe80::1%eth0","port":80}')
    with pytest.raises(Invalid, match="not an address of another machine"):
        records.arrival(Place("b", "web", ""), fields, loopback=True)


@pytest.mark.parametrize("host", ["10.0.0.7", "::2", "example.org", "localhost.example.org", "169.254.1.1"])
def test_not_loopback(host: str) -> None:
    assert not records.is_loopback(host)
