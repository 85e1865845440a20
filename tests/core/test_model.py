"""The rules of the section "Names and values" in PROTOCOL.md: values at each limit, and beyond it."""

from collections.abc import Callable
from typing import Any

import pytest

from regd.core import model
from regd.core.errors import Invalid

GOOD: list[tuple[Callable[[object], Any], list[object]]] = [
    (
        model.check_name,
        ["a", "_", "0", "a-b", "a_b", "_x_", "a.b.c", "a" * 63, ".".join(["a" * 63] * 3 + ["b" * 61])],
    ),
    (model.check_instance, ["", "A", "a.b-c_D", "-", ".", "x" * 63]),
    (model.check_port, [1, 5050, 65_535]),
    (
        model.check_host,
        [
            "127.0.0.1",
            "::1",
            "localhost",
            "db.example",
            "Host-1",
            "fe80::1%eth0",
            "a" * 63,
            "10.0.0.255",
            "0x.example",
        ],
    ),
    (model.check_meta, [{}, {"": ""}, {"zone": "a"}, {"k": "v" * 4_095}, {f"{n:02}": "" for n in range(64)}]),
    (model.check_state, ["starting", "ready", "draining"]),
    (model.check_flag, [True, False]),
    (model.check_pattern, ["*", "work*", "a.*", "db", "-*"]),
]

BAD: list[tuple[Callable[[object], Any], list[object]]] = [
    (
        model.check_name,
        ["", "A", "a b", "-a", "a-", ".a", "a.", "a..b", "a\n", "é", "a/b", "a" * 64, 7, None, True]
        + ["*", ".".join(["a" * 63] * 4), "a\x00"],
    ),
    (model.check_instance, ["/", " ", "é", "x" * 64, "a\n", None, 1, True]),
    (model.check_port, [0, -1, 65_536, 5050.0, "5050", True, None, 10**30]),
    (
        model.check_host,
        [
            "",
            "0.0.0.0",
            "::",
            "0:0:0:0:0:0:0:0",
            "::0",
            "::ffff:0.0.0.0",
            "0",
            "0x0",
            "1.2.3",
            "256.1.1.1",
            "00.0.0.0",
        ]
        + ["[::1]", "a b", "-a", "a-", "a..b", "a" * 64, "a." * 127 + "aa", "é", "localhost\n", None, 1],
    ),
    (
        model.check_meta,
        [None, [], "a", {"a": 1}, {"a": None}, {"a": {}}, {"a": True}, {"k": "v" * 4_096}]
        + [{"k": "é" * 2_048}, {f"{n:02}": "" for n in range(65)}],
    ),
    (model.check_state, ["", "Ready", "up", None, 1]),
    (model.check_flag, [0, 1, "true", None]),
    (model.check_pattern, ["", "A*", "a**", "*a", "a *", None, "a" * 254 + "*"]),
]


@pytest.mark.parametrize(("check", "value"), [(check, value) for check, values in GOOD for value in values])
def test_valid_values_are_accepted(check: Callable[[object], Any], value: object) -> None:
    assert check(value) == value


@pytest.mark.parametrize(("check", "value"), [(check, value) for check, values in BAD for value in values])
def test_invalid_values_are_refused_with_a_reason(check: Callable[[object], Any], value: object) -> None:
    with pytest.raises(Invalid, match=r"^(must|is) "):
        check(value)


@pytest.mark.parametrize("value", [0.5, 86_400.5, float("nan"), float("inf"), True, "1", None])
def test_invalid_seconds_are_refused(value: object) -> None:
    with pytest.raises(Invalid):
        model.check_seconds(value, 1.0, 86_400.0)


def test_seconds_may_be_integers_or_fractions() -> None:
    assert [model.check_seconds(value, 1.0, 86_400.0) for value in (1, 1.5, 86_400)] == [1.0, 1.5, 86_400.0]
