"""Replies: one line of compact ASCII, with the fields of an instance."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from regd.core.errors import Code, Refused
from regd.core.model import Entry, Holder, Process, State
from regd.protocol import messages

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)


def entry(**fields: object) -> Entry:
    plain: dict[str, object] = {
        "name": "db",
        "instance": "",
        "host": "::1",
        "port": 1,
        "meta": {},
        "state": State.READY,
    }
    return Entry(**{**plain, "rev": 7, "registered_at": 5.5, **fields})  # type: ignore[arg-type]


@given(
    st.none() | st.integers() | st.text(st.characters(exclude_categories=["Cs"]), max_size=64),
    st.dictionaries(texts, texts, max_size=3),
)
def test_instance_in_replies_to_resolve_and_list(id: str | int | None, meta: dict[str, str]) -> None:
    one = entry(meta=meta)
    fields = {
        "name": "db",
        "instance": "",
        "host": "::1",
        "port": 1,
        "meta": meta,
        "state": "ready",
        "rev": 7,
        "registered_at": 5.5,
    }
    head = {"ok": True} if id is None else {"ok": True, "id": id}
    flat, listed = messages.resolved(id, one), messages.instances(id, {"rev": 9}, [one, one])
    for line in (flat, listed):
        assert line.isascii()
        assert line.index(b"\n") == len(line) - 1
    assert json.loads(flat) == {**head, **fields}
    assert list(json.loads(flat)) == [*head, *fields]
    assert json.loads(listed) == {**head, "rev": 9, "instances": [fields, fields]}
    assert json.loads(messages.instances(id, {"rev": 9}, [])) == {**head, "rev": 9, "instances": []}


def test_conditions_are_shown_where_they_apply() -> None:
    assert messages.instance(entry(holders=(Holder(1, 7, True, Process(3, "b/1"), 2.5),))).endswith(
        b',"hold":true,"pid":3,"ttl":2.5}'
    )


def test_error_has_code_message_and_details() -> None:
    line = messages.error(Refused(Code.NOT_FOUND, "no service 'é'", near=["e"]), 4)
    assert line == b'{"ok":false,"id":4,"error":"not_found","message":"no service \'\\u00e9\'","near":["e"]}\n'


@pytest.mark.parametrize(("size", "fits"), [(10, 1), (400, 3), (10_000, 5)])
def test_reply_size_is_bounded(size: int, fits: int) -> None:
    entries = [entry(instance=str(n)) for n in range(5)]
    assert messages.count_fitting(entries, size) == fits
    around = len(messages.instances(None, {}, []))
    assert fits == 1 or len(messages.instances(None, {}, entries[:fits])) <= size + around
