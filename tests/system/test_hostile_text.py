"""Text from peers is escaped in the output of regctl, the daemon's log and file, and the programs in `services/`."""

import json
import os
import pty
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from regd_client.blocking import BlockingConnection
from tests.support.daemon import ROOT, WAIT_S, DaemonProcess, InLoop, environment

# Control sequences that move the cursor, set a colour or a title, change the text direction, or end a line.
HOSTILE = "\x1b[31m\x1b]0;evil\x07\x9b31m\x85\x7f\x08\r\n\t\u202e\u2066\u2028\u2029\u200b\ufeff\U000e0041"
CONTROL = re.compile(r"[\x1b\x9b\x85\x7f\x07\x08\r\u202e\u2066\u2028\u2029\u200b\ufeff\U000e0041]")
COMMANDS = (
    ["list"],
    ["resolve", "bad"],
    ["resolve", "bad", "--all"],
    ["register", "bad", "1"],
    ["deregister", "bad"],
    ["why", "bad"],
    ["wait", "bad", "--timeout", "0"],
    ["stats"],
    ["ping"],
)


def harmless(text: str) -> bool:
    """True if a text is printable apart from newlines and tabs."""
    return re.sub("[\n\t]", "", text).isprintable()


def regctl(address: str, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "regd.cli.regctl", *arguments],
        env=environment(REGD_ADDRESS=address, PYTHONUTF8="1"), capture_output=True, encoding="utf-8", timeout=20, check=False,
    )  # fmt: skip
    assert "Traceback" not in done.stderr, done.stderr
    return done.stdout + done.stderr


@pytest.fixture
def marked(process: DaemonProcess) -> DaemonProcess:
    """Return a daemon with a registration whose meta is hostile."""
    with BlockingConnection(process.addresses[0]) as peer:
        assert peer.ask("register", name="bad", port=1, meta={HOSTILE: HOSTILE, "k": HOSTILE})["ok"]
    return process


@pytest.mark.parametrize("flags", [[], ["--json"]], ids=["people", "json"])
def test_regctl_escapes_text_of_registrations(marked: DaemonProcess, flags: list[str]) -> None:
    for command in COMMANDS:
        output = regctl(marked.addresses[0], *flags, *command)
        assert harmless(output), (command, output)
        assert r"\u202e" in output or command[0] != "list"


def test_terminal_receives_no_control_sequences(marked: DaemonProcess) -> None:
    master, slave = pty.openpty()
    with BlockingConnection(marked.addresses[0]) as peer:
        assert peer.ask("register", name="bad", port=1, meta={HOSTILE: HOSTILE})["ok"]
        for command in (["list"], ["why", "bad"], ["stats"]):
            subprocess.run(
                [sys.executable, "-m", "regd.cli.regctl", *command],
                env=environment(REGD_ADDRESS=marked.addresses[0]), stdout=slave, stderr=slave, check=True, timeout=20,
            )  # fmt: skip
    os.close(slave)
    output = os.read(master, 65_536).decode().replace("\r\n", "\n")
    os.close(master)
    assert harmless(output)
    assert "NAME" in output


@pytest.mark.parametrize("flags", [[], ["--json"]], ids=["people", "json"])
def test_regctl_watch_escapes_text(process: DaemonProcess, flags: list[str]) -> None:
    watching = subprocess.Popen(
        [sys.executable, "-m", "regd.cli.regctl", *flags, "watch"],
        env=environment(REGD_ADDRESS=process.addresses[0], PYTHONUTF8="1"), stdout=subprocess.PIPE, encoding="utf-8",
    )  # fmt: skip
    assert watching.stdout is not None
    with BlockingConnection(process.addresses[0]) as peer, watching:
        try:
            assert peer.ask("register", name="bad", port=1, meta={HOSTILE: HOSTILE})["ok"]
            output = ""
            while "up" not in output:
                output += watching.stdout.readline()
            assert peer.ask("update", name="bad", meta={"k": HOSTILE})["ok"]
            assert peer.ask("deregister", name="bad")["ok"]
            while "down" not in output:
                output += watching.stdout.readline()
        finally:
            watching.kill()
    assert harmless(output)


def test_regctl_escapes_its_arguments(marked: DaemonProcess, tmp_path: Path) -> None:
    """Arguments may come from a file of another user."""
    text = HOSTILE.replace("\0", "")
    address = marked.addresses[0]
    for arguments in (
        [text],
        ["list", text],
        ["list", "--meta", text],
        ["list", "--" + text],
        ["list", text, text],
        ["resolve", text],
        ["resolve", "bad", "--instance", text],
        ["register", text, "1"],
        ["register", "bad", text],
        ["register", "bad", "1", "--host", text],
        ["deregister", text],
        ["watch", text],
        ["wait", text, "--timeout", "1"],
        ["wait", "bad", "--timeout", text],
        ["why", text],
        ["ping", "--address", text],
        ["ping", "--address", f"tcp://{text}:1"],
        ["ping", "--address", f"tcp://{'a' * 64}:1"],
        ["ping", "--address", "tcp://a..b:1"],
        ["ping", "--address", f"unix://{tmp_path}/{text}"],
    ):
        output = regctl(address, *arguments)
        assert output
        assert harmless(output), (arguments, output)


# Another program at regd's address.

_BAD = {
    "name": HOSTILE,
    "instance": HOSTILE,
    "host": HOSTILE,
    "port": 1,
    "state": HOSTILE,
    "meta": {HOSTILE: HOSTILE},
}
_WHY = {
    **_BAD,
    "alive": True,
    "rev": 1,
    "since": 1.0,
    "owners": [{HOSTILE: HOSTILE, "connection": HOSTILE}],
    "probe": {"accepted": False, "age_s": 1.0, "why": HOSTILE},
}
_LEFT = {"instance": HOSTILE, "age_s": 1.0, "reason": HOSTILE}
_ERROR = {"ok": False, "error": HOSTILE, "message": HOSTILE}
ANSWERS: dict[str, dict[str, Any]] = {
    "list": {"ok": True, "instances": [_BAD]},
    "resolve": {"ok": True, **_BAD},
    "register": {"ok": True, **_BAD},
    "deregister": {"ok": True, "removed": 1, "rev": 1},
    "why": {"ok": True, "name": HOSTILE, "instances": [_WHY], "departures": [_LEFT]},
    "stats": {"ok": True, HOSTILE: HOSTILE, "requests": {HOSTILE: [HOSTILE]}},
    "ping": {"ok": True, HOSTILE: HOSTILE},
    "watch": {"ok": True, "watch": 1},
}
EVENTS = [
    {"event": "up", **_BAD},
    {"event": "change", **_BAD},
    {"event": "down", **_BAD, "reason": HOSTILE},
    {"event": HOSTILE},
]


@contextmanager
def impostor(answers: dict[str, dict[str, Any]], raw: bytes | None = None) -> Iterator[str]:
    """Answer the first request of every connection from `answers`, or with `raw`, and close the connection."""

    def serve() -> None:
        while True:
            connection, _ = listening.accept()
            with connection, connection.makefile("rwb") as stream:
                line = stream.readline()
                if not line:
                    return
                cmd = json.loads(line)["cmd"]
                replies = [answers.get(cmd, _ERROR), *(EVENTS if cmd == "watch" else [])]
                stream.write(
                    raw or b"".join(json.dumps(reply, ensure_ascii=False).encode() + b"\n" for reply in replies)
                )

    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield f"tcp://127.0.0.1:{listening.getsockname()[1]}"
        finally:
            socket.create_connection(listening.getsockname()).close()
            thread.join(WAIT_S)


@pytest.mark.sample(2)
@pytest.mark.parametrize("flags", [[], ["--json"]], ids=["people", "json"])
def test_regctl_escapes_text_of_an_impostor(flags: list[str]) -> None:
    with impostor(ANSWERS) as address:
        for command in (*COMMANDS, ["watch"]):
            output = regctl(address, *flags, *command)
            assert harmless(output), (command, output)
    with impostor({}) as address:
        for command in (*COMMANDS, ["watch"]):
            output = regctl(address, *flags, *command)
            assert output
            assert harmless(output), (command, output)
    with impostor({}, HOSTILE.encode() + b"\n") as address:
        for command in (*COMMANDS, ["watch"]):
            output = regctl(address, *flags, *command)
            assert "not a regd reply" in output
            assert harmless(output), (command, output)


# The daemon.


async def test_replies_and_file_are_ascii(daemon: InLoop) -> None:
    peer = await daemon.peer()
    watching = await daemon.peer()
    await watching.ask(cmd="watch")
    meta = {HOSTILE: HOSTILE}
    requests: list[dict[str, Any]] = [
        {"cmd": "register", "name": "bad", "port": 1, "meta": meta},
        {"cmd": "resolve", "name": "bad"},
        {"cmd": "resolve", "name": "bad", "meta": {HOSTILE: "no"}},
        {"cmd": "resolve", "name": "bad", "instance": HOSTILE},
        {"cmd": "resolve", "name": HOSTILE},
        {"cmd": "list"},
        {"cmd": "why", "name": "bad"},
        {"cmd": HOSTILE},
        {"cmd": "help", "topic": HOSTILE},
        {"cmd": "list", HOSTILE: HOSTILE},
        {"cmd": "list", "after": HOSTILE},
        {"cmd": "register", "name": "bad", "port": 1, "meta": {HOSTILE: 1}},
        {"cmd": "register", "name": "bad", "port": 1, "host": HOSTILE},
        {"cmd": "register", "name": "bad", "port": 1, "state": HOSTILE},
        {"cmd": "unwatch", "watch": 1},
    ]
    for request in requests:
        for ascii in (True, False):
            line = json.dumps({**request, "id": HOSTILE}, ensure_ascii=ascii).encode()
            peer.send(line + b"\n")
            reply = await peer.line()
            assert json.loads(reply).get("id") == HOSTILE, (line, reply)
            assert harmless_bytes(reply), reply
    for _ in range(2):
        assert harmless_bytes(await watching.line())
    assert harmless_bytes(daemon.registry.read_bytes())


def harmless_bytes(data: bytes) -> bool:
    return data.isascii() and data.replace(b"\n", b"").decode().isprintable()


STRANGERS = [
    HOSTILE.encode(),
    HOSTILE.strip().encode("utf-16-le"),
    b"\x9b31m\x90\x1b\\",
    b"GET /" + HOSTILE.replace("\n", "").encode() + b" HTTP/1.1\r\n",
    bytes(range(33, 256)),
    b"ping \x1b[31m",
    b"resolve \x1b[31m\n",
]


async def test_log_escapes_bytes_of_bad_peers(daemon: InLoop, caplog: pytest.LogCaptureFixture) -> None:
    """Within ten seconds at most one line is logged."""
    caplog.set_level("DEBUG", "regd")
    caplog.clear()
    for count, data in enumerate(STRANGERS, 1):
        for _ in range(3):
            peer = await daemon.peer()
            peer.send(data)
            assert json.loads(await peer.rest())["error"] == "bad_request"
            await peer.close()
            daemon.clock.advance(3.3)  # 9.9 s in all
        assert sum(record.name == "regd" for record in caplog.records) == count  # asyncio may log slow callbacks
        daemon.clock.advance(0.2)
    for record in caplog.records:
        message = record.getMessage().replace("…", "")  # regd's own mark of truncated text
        assert harmless_bytes(message.encode()), message


def test_log_of_a_process_is_escaped_at_every_level(tmp_path: Path) -> None:
    with DaemonProcess(tmp_path / "registry.json", "--log-level", "debug") as process:
        process.start()
        for data in STRANGERS:
            with socket.create_connection(("127.0.0.1", process.port), WAIT_S) as sock:
                sock.sendall(b'{"cmd":"register","name":"a","port":1}\n' + data)
                while sock.recv(65_536):
                    pass
        with BlockingConnection(process.addresses[0]) as peer:
            assert peer.ask("register", name="bad", port=1, meta={HOSTILE: HOSTILE})["ok"]
            assert peer.ask(HOSTILE)["error"] == "unknown_command"
        _, log = process.end()
    assert "does not speak regd" in log
    assert harmless(log)


# The programs of `services/`.


@contextmanager
def fake_runner(answer: bytes) -> Iterator[int]:
    """Accept one job and answer it with `answer`."""

    def serve() -> None:
        connection, _ = listening.accept()
        with connection:
            connection.recv(65_536)
            connection.sendall(answer)

    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield int(listening.getsockname()[1])
        thread.join(WAIT_S)


@pytest.mark.sample(4)
@pytest.mark.parametrize(
    "answer",
    [
        json.dumps({"sum": HOSTILE}, ensure_ascii=False).encode() + b"\n",
        HOSTILE.encode() + b"\n",
        b"\xff\x9b\n",
        b"",
    ],
    ids=["JSON", "text", "no text", "nothing"],
)
def test_caller_escapes_answers(process: DaemonProcess, answer: bytes) -> None:
    with fake_runner(answer) as port, BlockingConnection(process.addresses[0]) as peer:
        assert peer.ask("register", name="runner", port=port, meta={HOSTILE: HOSTILE})["ok"]
        done = subprocess.run(
            [sys.executable, str(ROOT / "services" / "caller.py"), "--once"],
            env=environment(REGD_ADDRESS=process.addresses[0], PYTHONUTF8="1"), capture_output=True, encoding="utf-8", timeout=20, check=False,
        )  # fmt: skip
    assert "Traceback" not in done.stderr, done.stderr
    assert harmless(done.stdout + done.stderr), done.stdout
