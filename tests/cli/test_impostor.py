"""An impostor: another program listens at the daemon's address.

Whatever it replies, each command ends with a documented status and at most one line on stderr, and no shell runs
any part of the reply.
"""

import itertools
import json
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from regd.cli import complete_names, doctor, local_probe, regctl
from regd.cli.commands import COMMANDS
from regd_client import protocol
from regd_client.blocking import BlockingConnection
from tests.support.daemon import WAIT_S, DaemonProcess, environment

HOSTILE_HOST = "127.0.0.1$(touch pwned)"
INSTANCE = {
    "name": "db",
    "instance": "1",
    "host": "127.0.0.1",
    "port": 5432,
    "meta": {"zone": "a"},
    "state": "ready",
    "rev": 1,
    "registered_at": 1790000000.0,
}
WHY = {
    **INSTANCE,
    "alive": True,
    "since": 1790000000.0,
    "owners": [{"pid": 1}],
    "probe": {"accepted": False, "age_s": 1.0, "why": "refused"},
}
CHANGE = {
    "rev": 1,
    "at": 1790000000.0,
    "op": "up",
    "name": "db",
    "instance": "1",
    "host": "127.0.0.1",
    "port": 5432,
    "state": "ready",
    "by": {"pid": 1, "uid": 1000, "command": "server"},
}
REPLIES: dict[str, dict[str, Any]] = {
    "list": {"ok": True, "epoch": "e", "rev": 1, "instances": [INSTANCE]},
    "resolve": {"ok": True, **INSTANCE},
    "register": {"ok": True, **INSTANCE},
    "deregister": {"ok": True, "removed": 1, "rev": 1},
    "update": {"ok": True, "rev": 1},
    "watch": {"ok": True, "watch": 1, "epoch": "e", "rev": 1},
    "why": {"ok": True, "name": "db", "instances": [WHY], "departures": [{"instance": "1", "age_s": 1.0, "reason": "replaced"}]},
    "history": {"ok": True, "changes": [CHANGE]},
    "hello": {"ok": True, "server": "regd", "version": "1", "epoch": "e", "rev": 1, "limits": {}, "host": {}},
    "stats": {
        "ok": True, "version": "1", "registry": "/none", "pid": 1, "uptime_s": 1.0, "epoch": "e", "rev": 1, "registrations": 1,
        "connections": 1, "watches": 0, "waiting": 0, "limits": {}, "requests": {"list": 1}, "errors": {},
    },
}  # fmt: skip
EVENTS = [
    {"event": "up", "watch": 1, **INSTANCE},
    {"event": "sync", "watch": 1, "rev": 1},
    {"event": "down", "watch": 1, "name": "db", "instance": "1", "reason": "replaced", "rev": 2},
    {"ok": False, "error": "denied", "message": "no more"},
]
LINES = {
    "list": ["list"],
    "resolve": ["resolve", "db"],
    "register": ["register", "db", "5432"],
    "deregister": ["deregister", "db"],
    "update": ["update", "db", "--state", "ready"],
    "drain": ["drain", "db"],
    "watch": ["watch"],
    "wait": ["wait", "db", "--timeout", "0"],
    "env": ["env", "db"],
    "why": ["why", "db"],
    "history": ["history", "--since", "0"],
    "top": ["top"],
    "ping": ["ping"],
    "stats": ["stats", "--limits"],
    "doctor": ["doctor"],
    "names": ["names"],
    "where": ["where"],
    "run": ["run", "web", "--wait", "db", "--timeout", "0", "--", "true"],
}
ODD: tuple[Any, ...] = (None, 7, -1.5, 1e300, True, "text", [], [7], {}, {"a": {"b": [None]}})
Answer = Callable[[str], list[Any]]


@contextmanager
def impostor(answer: Answer) -> Iterator[str]:
    """Answer every request with the reply of its command, and close the connection after a `watch`."""

    def serve() -> None:
        while True:
            accepted, _ = listening.accept()
            with accepted, accepted.makefile("rwb") as lines:
                for line in lines:
                    if line == b"end\n":
                        return
                    cmd = json.loads(line)["cmd"]
                    try:
                        for reply in answer(cmd):
                            lines.write(reply if isinstance(reply, bytes) else json.dumps(reply).encode() + b"\n")
                        lines.flush()
                    except OSError:
                        break
                    if cmd == "watch":
                        break

    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield f"127.0.0.1:{listening.getsockname()[1]}"
        finally:
            with socket.create_connection(listening.getsockname()) as last:
                last.sendall(b"end\n")
            thread.join(WAIT_S)


def answers(**changed: Any) -> Answer:
    """Reply as regd does, except to some commands."""

    def answer(cmd: str) -> list[Any]:
        said = changed.get(cmd, REPLIES.get(cmd, {"ok": True}))
        return [said, *changed.get("events", EVENTS)] if cmd == "watch" else [said]

    return answer


def variants(fields: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield variants of a reply: a member, or a member of an instance, is missing or has another type."""
    for key, value in fields.items():
        if key in ("ok", "event"):
            continue
        yield {name: value for name, value in fields.items() if name != key}
        for odd in ODD:
            yield {**fields, key: odd}
        if isinstance(value, list) and value and isinstance(value[0], dict):
            for variant in variants(value[0]):
                yield {**fields, key: [variant]}


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hide other daemons of this machine."""
    monkeypatch.setattr(local_probe, "addresses", lambda other_than: [])
    monkeypatch.setattr(local_probe, "accepts", lambda host, port: True)
    monkeypatch.setattr(doctor, "ANSWER_S", WAIT_S)
    monkeypatch.setattr(complete_names, "_ANSWER_S", WAIT_S)
    monkeypatch.setattr(complete_names, "_END_S", 10 * WAIT_S)


@pytest.fixture
def ran(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    def run(address: str, *line: str) -> tuple[int, str, str]:
        status = regctl.main(["--address", address, *line])
        out, told = capsys.readouterr()
        return status, out, told

    return run


def test_every_command_with_a_request_is_covered() -> None:
    # `stop` uses Unix sockets only (tests/system/test_projects.py). `serve` passes replies on unchanged
    # (tests/gateways/test_daemon_connections.py). `bridge` uses the async client (tests/client/test_impostor.py).
    assert set(LINES) == set(COMMANDS) - {"bridge", "completion", "help", "init", "manual", "serve", "stop"}


IN_PROCESS = [command for command in LINES if command not in ("run", "top")]


@pytest.mark.sample(3)
@pytest.mark.parametrize("flags", [[], ["--json"]], ids=["people", "json"])
@pytest.mark.parametrize("command", IN_PROCESS)
def test_replies_with_missing_or_mistyped_members(
    command: str, flags: list[str], ran: Callable[..., tuple[int, str, str]]
) -> None:
    said: list[Any] = [{}]
    asked: list[str] = []

    def answer(cmd: str) -> list[Any]:
        asked.append(cmd)
        return answers(**said[0])(cmd)

    with impostor(answer) as address:
        status, _, told = ran(address, *flags, *LINES[command])
        assert status == {"doctor": 1, "watch": 4}.get(command, 0), told
        for cmd in set(asked) & set(REPLIES):
            for variant in variants(REPLIES[cmd]):
                said[0] = {cmd: variant}
                status, out, told = ran(address, *flags, *LINES[command])
                assert status in (0, 1, 2, 3, 4), (cmd, variant)
                assert told.count("\n") == bool(told), (cmd, variant, told)
                assert not flags or all(json.loads(line) is not None for line in out.splitlines())


ERRORS = [
    {"ok": False},
    {"ok": False, "error": [], "message": "x"},
    {"ok": False, "error": "busy", "message": 7},
    {"ok": False, "error": "not_found", "message": None, "near": 7},
    {"event": 7},
    b"[]\n",
    b"HTTP/1.1 400 Bad Request\r\n\r\n",
    b"\xff\xfe\n",
    b'{"ok":true' + b"[" * 5_000 + b"\n",
]


@pytest.mark.sample(3)
@pytest.mark.parametrize("flags", [[], ["--json"]], ids=["people", "json"])
@pytest.mark.parametrize("command", IN_PROCESS)
def test_malformed_refusals_and_lines(
    command: str, flags: list[str], ran: Callable[..., tuple[int, str, str]]
) -> None:
    said: list[Any] = [None]
    with impostor(lambda cmd: [said[0]]) as address:
        for said[0] in ERRORS:
            status, out, told = ran(address, *flags, *LINES[command])
            assert told.count("\n") == bool(told), told
            if command == "names":  # prints no errors
                assert (status in (0, 3), told) == (True, "")
            elif command == "where":  # reports what listens there instead of a daemon
                assert (status, told) == (0, "")
                assert ('"daemon": null' if flags else "  daemon  none: ") in out
            else:
                assert status in (1, 2, 3, 4)
                assert out or told


@pytest.mark.sample(3)
@pytest.mark.parametrize(
    ("command", "cmd", "without"),
    [
        ("list", "list", "instances"), ("resolve", "resolve", "host"), ("register", "register", "port"),
        ("watch", "watch", "epoch"), ("wait", "resolve", "host"), ("env", "resolve", "name"), ("why", "why", "instances"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("flags", [[], ["--json"]], ids=["people", "json"])
def test_incomplete_reply_is_an_error(
    command: str, cmd: str, without: str, flags: list[str], ran: Callable[..., tuple[int, str, str]]
) -> None:
    reply = {key: value for key, value in REPLIES[cmd].items() if key != without}
    with impostor(answers(**{cmd: reply})) as address:
        status, out, told = ran(address, *flags, *LINES[command])
    assert status in (3, 4)
    message = json.loads(out)["message"] if flags else told
    assert without in message


@pytest.mark.parametrize("command", [["list"], ["resolve", "db", "--all"]], ids=["list", "resolve"])
def test_pages_without_an_end(
    command: list[str], ran: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(protocol, "INSTANCES_MAX", 5)
    count = itertools.count(1)

    def answer(cmd: str) -> list[Any]:
        if cmd == "resolve":
            return [{"ok": True, "rev": 1, "instances": [INSTANCE], "more": True}]
        return [{**REPLIES["list"], "next": f"n{next(count):09}/"}]

    with impostor(answer) as address:
        status, out, told = ran(address, *command)
    assert (status, out) == (3, "")
    assert "without an end" in told
    assert next(count) == 7


@pytest.mark.sample(4)
@pytest.mark.parametrize("flags", [[], ["--json"]], ids=["people", "json"])
@pytest.mark.parametrize("command", ["top", "run"])
def test_commands_in_a_process_of_their_own(command: str, flags: list[str], tmp_path: Path) -> None:
    """`top` uses the async client, and `run` forks."""
    wrong: list[dict[str, Any]] = [
        {"watch": {"ok": True}, "resolve": {"ok": True}},
        {"watch": {"ok": True, "epoch": 7}, "events": [{"event": "up"}], "resolve": {"ok": False}},
        {"stats": {"ok": True}, "resolve": {"ok": True, **INSTANCE, "host": 7}},
    ]
    for changes in wrong:
        with impostor(answers(**changes)) as address:
            done = subprocess.run(
                [sys.executable, "-m", "regd.cli.regctl", *flags, *LINES[command]],
                env=environment(REGD_ADDRESS=address), cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False,
            )  # fmt: skip
        assert "Traceback" not in done.stderr, done.stderr
        assert done.returncode in (0, 1, 3, 4)


# What reaches a shell.


@pytest.mark.parametrize("member", ["host", "name"])
def test_eval_of_env_output_runs_no_command(member: str, tmp_path: Path) -> None:
    with impostor(answers(resolve={**REPLIES["resolve"], member: HOSTILE_HOST})) as address:
        done = subprocess.run(
            ["bash", "-c", f'eval "$({sys.executable} -m regd.cli.regctl env db)"; echo "at $DB_HOST"'],
            env=environment(REGD_ADDRESS=address), cwd=tmp_path, capture_output=True, text=True, timeout=30, check=False,
        )  # fmt: skip
    assert not (tmp_path / "pwned").exists()
    assert done.stdout in (f"at {HOSTILE_HOST}\n", "at \n")  # the whole host, or nothing


@pytest.mark.parametrize("form", ["shell", "docker"])
@pytest.mark.parametrize("host", ["a\nPATH=/evil", "a\x1b[31m", "a\0b"])
def test_env_takes_no_control_characters(form: str, host: str, ran: Callable[..., tuple[int, str, str]]) -> None:
    with impostor(answers(resolve={**REPLIES["resolve"], "host": host})) as address:
        status, out, told = ran(address, "env", "db", "--format", form)
    assert (status in (3, 4), out) == (True, "")
    assert told.count("\n") == 1


def test_formats_of_env(process: DaemonProcess, ran: Callable[..., tuple[int, str, str]]) -> None:
    with BlockingConnection(process.addresses[0]) as peer:
        assert peer.ask("register", name="db", port=5432, host="::1")["ok"]
    shown = {form: ran(process.addresses[0], "env", "db", "--format", form) for form in ("shell", "docker")}
    assert shown["shell"] == (
        0,
        "DB_HOST='::1'\nDB_PORT=5432\nDB_ADDRESS='[::1]:5432'\n".replace("'::1'", "::1"),
        "",
    )
    assert shown["docker"] == (0, "DB_HOST=::1\nDB_PORT=5432\nDB_ADDRESS=[::1]:5432\n", "")


@pytest.mark.parametrize("code", ["unsupported", "unknown_command"])
@pytest.mark.parametrize("flags", [[], ["--follow"]], ids=["once", "follow"])
def test_history_of_a_daemon_without_it(
    code: str, flags: list[str], ran: Callable[..., tuple[int, str, str]]
) -> None:
    refusal = {"ok": False, "error": code, "message": "no command 'history'"}
    host = {"boot": None, "pid_namespace": None}
    hello = {**REPLIES["hello"], "protocol": 1, "features": [], "loop": "asyncio", "host": host}
    with impostor(answers(history=refusal, hello=hello)) as address:
        status, out, told = ran(address, "history", *flags)
        assert (status, out, told) == (4, "", "regctl: no command 'history'\n")
        status, out, told = ran(address, "history", "--json", *flags)
        assert (status, json.loads(out), told) == (4, refusal, "")


def test_pages_of_history_without_an_end(ran: Callable[..., tuple[int, str, str]]) -> None:
    with impostor(answers(history={"ok": True, "changes": [], "next": 7})) as address:
        status, out, told = ran(address, "history", "--since", "0")
    assert (status in (3, 4), out, told.count("\n")) == (True, "", 1)
