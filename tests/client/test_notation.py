"""JSON as the module `json` has it, whichever way it is read and written."""

import json
import subprocess
import sys
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from regd_client import notation
from tests.support.daemon import environment

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
plain = st.text(st.characters(codec="ascii"))


@settings(deadline=None)
@given(st.dictionaries(plain, plain | st.integers() | values, max_size=4))
def test_what_is_written_is_json(fields: dict[str, Any]) -> None:
    assert notation.write(fields) == json.dumps(fields, separators=(",", ":"))


@pytest.mark.parametrize(
    "value",
    ["a", "", " ~", '"', "\\", "é", "\n", "\0", "\x7f", 0, -1, 10**20, True, None, 1.5, ["a"], {"k": "v"}],
)
def test_each_kind_of_word(value: object) -> None:
    for fields in ({"a": value}, {"a": value, "b": "b"}, {str(value): 1}):
        assert notation.write(fields) == json.dumps(fields, separators=(",", ":"))


@settings(deadline=None)
@given(values, st.text(" \t\r\n", max_size=2))
def test_what_is_read_is_json(value: Any, blanks: str) -> None:
    for ascii_only in (False, True):
        text = blanks + json.dumps(value, ensure_ascii=ascii_only) + blanks
        assert notation.read(text) == json.loads(text)


@pytest.mark.parametrize(
    "text",
    ["", " ", "{", "{}}", "{},", "1 2", "nul", "'a'", '{"a":1,}', '"\x01"', "[" * 100_000, "\xa0{}", "\ufeff{}", "9" * 5_000],
)  # fmt: skip
def test_what_is_no_json(text: str) -> None:
    for read in (notation.read, json.loads):
        with pytest.raises((ValueError, RecursionError)):
            read(text)


@pytest.mark.parametrize(
    "value", [float("nan"), {1, 2}, "\ud800", {"k": "\udc00"}, 10**5_000], ids=lambda value: type(value).__name__
)
def test_what_cannot_be_written(value: object) -> None:
    with pytest.raises((TypeError, ValueError)):
        notation.write({"a": value})


def test_a_python_without_the_scanner() -> None:
    code = (
        "import sys; sys.modules['_json'] = None\n"
        "from regd_client import notation\n"
        "assert notation.read(' {\"a\": [1, null]} ') == {'a': [1, None]}\n"
        "for text in ('', '{', '{} x'):\n"
        "    try: notation.read(text)\n"
        "    except ValueError: pass\n"
        "    else: raise AssertionError(text)\n"
    )
    assert subprocess.run([sys.executable, "-c", code], env=environment(), check=False).returncode == 0
