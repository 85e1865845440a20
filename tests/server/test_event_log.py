"""Log lines about registrations and requests: once, at the right level, escaped, as text and as JSON."""

import json
import logging
import os
import signal
import socket
import subprocess
from pathlib import Path
from typing import Any

import pytest

from regd.core.limits import Limits
from tests.support.daemon import WAIT_S, DaemonProcess, InLoop, Peer, environment
from tests.support.files import RecordedFiles
from tests.support.peers import FakeCredentials
from tests.support.polling import until


@pytest.fixture(autouse=True)
def at_info(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "regd")


def said(caplog: pytest.LogCaptureFixture, *words: str) -> list[str]:
    """Return the log messages that start with one of these words."""
    return [line for message in caplog.messages for line in message.split("\n") if line.startswith(words)]


@pytest.mark.socket
async def test_up_and_down_are_logged_with_holder_and_reason(
    daemon: InLoop, caplog: pytest.LogCaptureFixture
) -> None:
    peer, holder = await daemon.peer(), await daemon.peer()
    port = holder.writer.get_extra_info("sockname")[1]
    await peer.ask(cmd="register", name="db", port=1)
    await peer.ask(cmd="register", name="db", port=2)  # replaces a static entry
    await peer.ask(cmd="update", name="db", meta={"a": "b"})  # changes are not logged
    await peer.ask(cmd="register", name="lease", instance="1", host="::1", port=3, ttl=5)
    await holder.ask(cmd="register", name="web", port=4, hold=True, pid=os.getpid())
    await peer.ask(cmd="deregister", name="db")
    await holder.reset()
    daemon.clock.advance(6)
    while len(lines := said(caplog, "up ", "down ")) < 8:
        daemon.clock.advance(0.5)
        await peer.ask("ping")
    assert lines[:6] == [
        "up db at 127.0.0.1:1, rev 1, static",
        "down db at 127.0.0.1:1, rev 2: replaced",
        "up db at 127.0.0.1:2, rev 3, static",
        "up lease/1 at [::1]:3, rev 5, ttl 5",
        f"up web at 127.0.0.1:4, rev 6, pid {os.getpid()}, connection 127.0.0.1 port {port}",
        "down db at 127.0.0.1:2, rev 7: deregistered",
    ]
    assert sorted(line.rpartition(": ")[2] for line in lines[6:]) == ["connection closed", "ttl expired"]


@pytest.mark.socket
async def test_reply_is_sent_before_the_line_is_logged(daemon: InLoop, monkeypatch: pytest.MonkeyPatch) -> None:
    """Waking the log's thread takes longer than answering the request."""
    peer = await daemon.peer()
    [connection] = daemon.server.connections
    order: list[str] = []
    transport, info = connection._transport, logging.getLogger("regd").info

    class Recorded:
        """A transport that records writes, since uvloop's transports cannot be patched."""

        def __getattr__(self, name: str) -> object:
            return getattr(transport, name)

        def write(self, data: bytes) -> None:
            order.append("reply")
            transport.write(data)

    def logged(message: object, *arguments: object) -> None:
        order.append(str(message).partition(" ")[0])
        info(message, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(connection, "_transport", Recorded())
        patch.setattr(logging.getLogger("regd"), "info", logged)
        await peer.ask(cmd="register", name="db", port=1)
        await until(lambda: "up" in order)
    assert order == ["reply", "up"]


@pytest.mark.socket
async def test_failed_write_logs_no_change(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    files = RecordedFiles()
    async with InLoop(tmp_path / "registry.json", files=files) as daemon:
        files.failing["write"] = 28
        peer = await daemon.peer()
        assert (await peer.ask(cmd="register", name="db", port=1))["error"] == "storage_failed"
        files.failing.clear()
    assert said(caplog, "up ") == []


@pytest.mark.socket
async def test_conflicts_are_logged_once_a_second_with_a_count(
    daemon: InLoop, caplog: pytest.LogCaptureFixture
) -> None:
    owner, other = await daemon.peer(), await daemon.peer()
    port = other.writer.get_extra_info("sockname")[1]
    await owner.ask(cmd="register", name="db", port=1, hold=True)

    async def clash(count: int) -> None:
        for number in range(2, 2 + count):
            assert (await other.ask(cmd="register", name="db", port=number, hold=True))["error"] == "conflict"

    await clash(5)
    first = f"conflict 127.0.0.1 port {port} (user {os.geteuid()}): register db at 127.0.0.1:"
    assert said(caplog, "conflict") == [f"{first}2: 'db' is at 127.0.0.1:1, held by {holder_of(owner)}"]
    daemon.clock.advance(1)
    assert said(caplog, "conflict")[1:] == [
        f"{first}6: 'db' is at 127.0.0.1:1, held by {holder_of(owner)} (3 more left out)"
    ]
    await clash(1)
    daemon.clock.advance(0.5)
    assert len(said(caplog, "conflict")) == 2
    daemon.clock.advance(0.5)
    assert len(said(caplog, "conflict")) == 3
    daemon.clock.advance(5)
    assert len(said(caplog, "conflict")) == 3, "a conflict is counted twice"
    assert (await other.ask({"cmd": "update", "name": "db", "meta": {}, "if": 9}))["error"] == "conflict"
    assert "register" not in said(caplog, "conflict")[3]


def holder_of(peer: Peer) -> str:
    return f"connection 127.0.0.1 port {peer.writer.get_extra_info('sockname')[1]}"


@pytest.mark.socket
async def test_delayed_conflict_is_logged_at_the_end(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async with InLoop(tmp_path / "registry.json", peers=FakeCredentials()) as daemon:
        peer = await daemon.peer()
        for name in ("a", "b", "c"):
            assert (await peer.ask(cmd="register", name=name, port=1))["error"] == "denied"
    lines = said(caplog, "denied")
    assert len(lines) == 2
    assert ": register c at 127.0.0.1:1: " in lines[1]
    assert lines[1].endswith("(1 more left out)")


@pytest.mark.socket
async def test_process_of_another_user_is_logged_as_a_denial(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with InLoop(tmp_path / "registry.json", peers=FakeCredentials((65_533,))) as daemon:
        reply = await (await daemon.peer()).ask(cmd="register", name="mine", port=1, pid=os.getpid())
        assert reply["error"] == "denied"
    [line] = said(caplog, "denied")
    assert f"process {os.getpid()} is of user" in line


@pytest.mark.socket
async def test_requests_are_logged_at_debug_only(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    requests: list[dict[str, Any]] = [
        {"cmd": "register", "name": "db", "port": 1, "meta": {"k": "\x1b[31mé\x7f\n" + "x" * 600}},
        {"cmd": "resolve", "name": "db"},
        {"cmd": "resolve", "name": "db"},  # from the resolve cache
        {"cmd": "resolve", "name": "db", "all": True},
        {"cmd": "resolve", "name": "none", "wait": 0},
        {"cmd": "deregister", "name": "db", "if": 7},
    ]
    for level in ("INFO", "DEBUG"):
        caplog.set_level(level, "regd")
        async with InLoop(tmp_path / f"{level}.json", limits=Limits(search_step_max=1)) as daemon:
            peer = await daemon.peer()
            for request in requests:
                await peer.ask(request)
            peer.send(*requests)
            for _ in requests:
                await peer.reply()
            assert (await peer.ask('{"cmd":"\\u001b"}'))["error"] == "unknown_command"
        lines = said(caplog, "request ")
        assert len(lines) == (0 if level == "INFO" else 2 * len(requests))
        assert len(said(caplog, "unknown_command ")) == (level == "DEBUG")
    port = peer.writer.get_extra_info("sockname")[1]
    assert lines[1] == f'request 127.0.0.1 port {port} (user {os.geteuid()}): resolve {{"name":"db"}}'
    assert all(line.isascii() and line.isprintable() and len(line) < 600 for line in lines)


def talk(daemon: DaemonProcess, *requests: dict[str, Any]) -> None:
    with socket.create_connection(("127.0.0.1", daemon.port), WAIT_S) as peer, peer.makefile("rb") as lines:
        for request in requests:
            peer.sendall(json.dumps(request).encode() + b"\n")
            assert lines.readline()


@pytest.mark.parametrize("level", ["info", "debug"])
def test_json_log_is_one_object_per_line(level: str, tmp_path: Path) -> None:
    held = {"cmd": "register", "name": "db", "port": 1, "hold": True}
    with DaemonProcess(tmp_path / "registry.json", "--log-level", level, "--log-format", "json") as daemon:
        daemon.start()
        with socket.create_connection(("127.0.0.1", daemon.port), WAIT_S) as peer:
            peer.sendall(json.dumps(held).encode() + b"\n")
            assert b'"ok":true' in peer.recv(4_096)
            talk(daemon, {**held, "port": 2})
        talk(daemon, {"cmd": "resolve", "name": "db", "wait": 0})
        status, log = daemon.end(signal.SIGTERM)
    assert status == 0
    lines = [json.loads(line) for line in log.splitlines()]
    assert all({"time", "level", "message"} <= line.keys() for line in lines)
    events = {line["event"]: line for line in lines if "event" in line}
    assert set(events) == {"up", "down", "conflict"} | ({"request"} if level == "debug" else set())
    up, down = events["up"], events["down"]
    assert (up["name"], up["instance"], up["host"], up["port"], up["rev"]) == ("db", "", "127.0.0.1", 1, 1)
    assert (down["reason"], down["rev"]) == ("connection closed", 2)
    assert events["conflict"]["uid"] == os.geteuid()
    if level == "debug":
        assert sum(line.get("event") == "request" for line in lines) == 3


def test_start_error_is_logged_as_json(process: DaemonProcess, tmp_path: Path) -> None:
    other = DaemonProcess(tmp_path / "other.json", "--log-format", "json", "--port", str(process.port))
    done = subprocess.run(other.command(), env=environment(), capture_output=True, text=True, timeout=WAIT_S)
    assert done.returncode == 1
    line = json.loads(done.stderr)
    assert (line["level"], "is taken" in line["message"]) == ("error", True)
