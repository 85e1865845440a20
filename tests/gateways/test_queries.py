"""From query strings to requests, and from replies to statuses."""

import json
from typing import Any
from urllib.parse import quote, urlencode

import pytest
from hypothesis import given
from hypothesis import strategies as some

from regd.core.errors import Code
from regd.gateways.queries import COMMANDS, TARGETS, BadQuery, body_of, failure, parse_own_query, parse_query
from regd.protocol import commands


@pytest.mark.parametrize(
    ("cmd", "query", "arguments"),
    [
        ("list", "", {}),
        ("list", "name=work*&limit=2&after=worker/1", {"name": "work*", "limit": 2, "after": "worker/1"}),
        ("list", "meta=zone=a&meta=role=", {"meta": {"zone": "a", "role": ""}}),
        ("list", "meta=key%3Da%3Db", {"meta": {"key": "a=b"}}),
        ("resolve", "name=db&all=true", {"name": "db", "all": True}),
        ("resolve", "name=db&all=false&wait=1.5", {"name": "db", "all": False, "wait": 1.5}),
        ("resolve", "instance=", {"instance": ""}),
        ("history", "since=9223372036854775807&age_s=60", {"since": 2**63 - 1, "age_s": 60}),
        ("watch", "epoch=5eed-1&since=42", {"epoch": "5eed-1", "since": 42}),
        ("list", "name=a+b%20c%E2%80%AE", {"name": "a b c\u202e"}),
        ("list", "&&name=a&", {"name": "a"}),
        # Passed on, so that the daemon refuses them:
        ("list", "limit=abc", {"limit": "abc"}),
        ("list", "limit=1e3", {"limit": "1e3"}),
        ("list", "limit=", {"limit": ""}),
        ("resolve", "wait=nan", {"wait": "nan"}),
        ("resolve", "wait=inf", {"wait": "inf"}),
        ("resolve", "all=yes", {"all": "yes"}),
        ("resolve", "nmae=db", {"nmae": "db"}),
        ("why", "meta=a=b", {"meta": "a=b"}),
    ],
)
def test_query_becomes_arguments(cmd: str, query: str, arguments: dict[str, Any]) -> None:
    assert parse_query(query.encode(), COMMANDS[cmd]) == arguments


@pytest.mark.parametrize(
    ("query", "field"),
    [
        ("name=a&name=a", "name"),
        ("meta=a", "meta"),
        ("meta=a=1&meta=a=1", "meta"),
        ("cmd=register", "cmd"),
        ("id=1", "id"),
        ("wait=60.5", "wait"),
        ("name=%ff", ""),
        ("%c0%af=1", ""),
        ("name=%ED%A0%80", ""),  # a surrogate
        ("&".join(f"a{n}=" for n in range(10_000)), ""),
    ],
)
def test_query_that_is_refused_here(query: str, field: str) -> None:
    with pytest.raises(BadQuery) as caught:
        parse_query(query.encode(), COMMANDS["resolve"])
    assert caught.value.field == field


def test_query_of_a_path_that_is_no_command() -> None:
    assert parse_own_query(b"name=work*&meta=a=b&all=true", TARGETS) == {
        "name": "work*",
        "meta": {"a": "b"},
        "all": True,
    }
    for query, field in [(b"al=true", "al"), (b"after=a", "after"), (b"all=yes", "all"), (b"limit=1", "limit")]:
        with pytest.raises(BadQuery) as caught:
            parse_own_query(query, TARGETS)
        assert caught.value.field == field
    with pytest.raises(BadQuery, match="did you mean 'name'"):
        parse_own_query(b"nmae=a", TARGETS)


def test_commands_are_those_of_the_daemon_that_only_read() -> None:
    reads = {cmd: command for cmd, command in commands.COMMANDS.items() if not command.needs_write_access}
    for cmd in ("ping", "unwatch"):  # of no use over HTTP
        del reads[cmd]
    assert COMMANDS.keys() == reads.keys()
    for cmd, parameters in COMMANDS.items():
        assert set(parameters) == set(reads[cmd].arguments)
        assert not reads[cmd].waits_for_commit


@given(some.dictionaries(some.sampled_from(["name", "instance", "after", "topic"]), some.text()))
def test_text_survives_the_query_string(arguments: dict[str, str]) -> None:
    try:
        query = urlencode(arguments, quote_via=quote)
    except UnicodeEncodeError:  # a lone surrogate
        return
    assert parse_query(query.encode(), COMMANDS["list"]) == arguments


@given(some.sampled_from(sorted(COMMANDS)), some.binary(max_size=200))
def test_any_query_string_is_a_request_or_is_refused(cmd: str, query: bytes) -> None:
    try:
        arguments = parse_query(query, COMMANDS[cmd])
    except BadQuery as error:
        assert str(error).isprintable()
        return
    json.dumps(arguments, allow_nan=False)
    assert not {"cmd", "id"} & set(arguments)


STATUSES = {"bad_argument": 400, "bad_request": 400, "unknown_command": 400, "denied": 403, "not_found": 404,
            "timeout": 504, "busy": 503, "shutting_down": 503}  # fmt: skip


@pytest.mark.parametrize("code", list(Code))
def test_status_of_every_error(code: str) -> None:
    line = json.dumps({"ok": False, "error": code, "message": "why"}).encode() + b"\n"
    body = body_of(line)
    assert body == (STATUSES.get(code, 502), line)
    assert body.message == "why"


def test_a_good_reply_is_passed_on_unchanged() -> None:
    line = b'{"ok":true,"name":"db"}\n'
    assert body_of(line) == (200, line)


@pytest.mark.parametrize(
    "line", [b"", b"HTTP/1.1 400 Bad Request\r\n", b"[]\n", b"{}\n", b"\xff", b"[" * 100_000]
)
def test_reply_of_another_program_is_unavailable(line: bytes) -> None:
    body = body_of(line)
    assert body.status == 503
    assert json.loads(body.line)["error"] == "unavailable"


def test_failure_has_the_form_of_a_refusal() -> None:
    body = failure("bad_argument", "no", field="wait")
    assert body == (400, b'{"ok":false,"error":"bad_argument","message":"no","field":"wait"}\n')
