"""Lines, order, flow control and closing, over real sockets and with time moved by hand."""

import asyncio
import json
import socket
import struct
import time
from pathlib import Path
from typing import Any

import pytest

from regd.core.limits import Limits
from regd.protocol.messages import HTTP_REFUSAL
from regd.server.connection import Connection
from regd.server.conversation import ConversationState
from tests.support.daemon import EPOCH, WAIT_S, InLoop
from tests.support.polling import until
from tests.support.stored import stored

pytestmark = pytest.mark.socket

PING = {"cmd": "ping"}


async def test_register_resolve_deregister(daemon: InLoop) -> None:
    peer = await daemon.peer()
    registered = await peer.ask(cmd="register", name="db", port=5432, id="x")
    assert registered == {
        "ok": True,
        "id": "x",
        "name": "db",
        "instance": "",
        "host": "127.0.0.1",
        "port": 5432,
        "rev": 1,
    }
    assert stored(daemon.registry)["db"].port == 5432
    assert await peer.ask("resolve db") == {
        "ok": True, "name": "db", "instance": "", "host": "127.0.0.1", "port": 5432, "meta": {}, "state": "ready",
        "rev": 1, "registered_at": 1_790_000_000.0,
    }  # fmt: skip
    assert await peer.ask(cmd="deregister", name="db") == {"ok": True, "removed": 1, "rev": 2}
    daemon.clock.advance(1.5)
    gone = await peer.ask(cmd="resolve", name="db")
    assert (gone["error"], gone["last"]) == ("not_found", {"reason": "deregistered", "age_s": 1.5})


async def test_ipv4_ipv6_and_unix_share_one_registry(tmp_path: Path) -> None:
    path = tmp_path / "s"
    async with InLoop(tmp_path / "registry.json", unix=path) as daemon:
        await (await daemon.peer()).ask(cmd="register", name="db", port=1)
        assert (await (await daemon.peer("::1")).ask("resolve db"))["port"] == 1
        reader, writer = await asyncio.open_unix_connection(path)
        writer.write(b"resolve db\nquit\n")
        assert json.loads(await reader.read())["port"] == 1
        writer.close()
        await writer.wait_closed()


async def test_replies_are_in_order_and_see_own_writes(daemon: InLoop) -> None:
    peer = await daemon.peer()
    expected = []
    for n in range(200):
        peer.send(
            {"cmd": "register", "name": "db", "port": 1 + n, "id": 3 * n},
            {"cmd": "resolve", "name": "db", "id": 3 * n + 1},
            "ping",
        )
        expected += [(3 * n, 1 + n), (3 * n + 1, 1 + n), (None, None)]
    replies = [await peer.reply() for _ in expected]
    assert [(reply.get("id"), reply.get("port")) for reply in replies] == expected


async def test_errors_are_in_order(daemon: InLoop) -> None:
    peer = await daemon.peer()
    peer.send(
        {"cmd": "register", "name": "a", "port": 1},
        "{",
        {"cmd": "register", "name": "a", "port": 0},
        {"cmd": "deregister", "name": "b"},
        "resolve a",
    )
    replies = [await peer.reply() for _ in range(5)]
    assert [reply.get("error", reply["ok"]) for reply in replies] == [
        True,
        "bad_json",
        "bad_argument",
        "not_found",
        True,
    ]


async def test_pipelined_registers_share_commits(daemon: InLoop) -> None:
    peer = await daemon.peer()
    for n in range(1_000):
        peer.send({"cmd": "register", "name": f"n{n}", "port": 1})
    assert [(await peer.reply())["rev"] for _ in range(1_000)] == list(range(1, 1_001))
    assert (await peer.ask(cmd="stats"))["commits"] <= 1_000 / 16


async def test_late_replies_are_sent_after_eof(daemon: InLoop) -> None:
    peer = await daemon.peer()
    peer.send({"cmd": "register", "name": "a", "port": 1}, "resolve a", b'{"cmd":"ping"}')
    peer.writer.write_eof()
    assert (await peer.rest()).count(b'"ok":true') == 3


async def test_quit_closes_after_the_replies(daemon: InLoop) -> None:
    peer = await daemon.peer()
    peer.send({"cmd": "register", "name": "a", "port": 1}, "quit", {"cmd": "register", "name": "b", "port": 1})
    assert (await peer.rest()).count(b"\n") == 1
    assert (await (await daemon.peer()).ask("resolve b"))["error"] == "not_found"


async def test_client_that_stays_after_quit_is_closed(daemon: InLoop) -> None:
    peer = await daemon.peer()
    peer.send("quit")
    assert await peer.rest() == b""
    assert len(daemon.server.connections) == 1
    daemon.clock.advance(1.0)
    await until(lambda: not daemon.server.connections)


async def test_browser_is_refused_and_its_body_is_not_parsed(
    daemon: InLoop, caplog: pytest.LogCaptureFixture
) -> None:
    body = b'{"cmd":"register","name":"evil","port":1}\n' * 1_000
    for _ in range(3):
        peer = await daemon.peer()
        peer.send(b"POST / HTTP/1.1\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
        assert await peer.rest() == HTTP_REFUSAL
        await peer.close()
    assert (await (await daemon.peer()).ask("resolve evil"))["error"] == "not_found"
    assert len([record for record in caplog.records if "does not speak regd" in record.message]) == 1
    assert r"b'POST / HTTP/1.1'" in caplog.text


async def test_telnet_session_of_bare_lines(daemon: InLoop) -> None:
    """A typing error does not close the connection; a bare `register` is static."""
    peer = await daemon.peer()
    peer.send(b"HELP\r\0\r\n")
    line = await peer.line()
    assert len(line) < 600
    assert "register NAME [HOST:]PORT" in json.loads(line)["bare"]
    assert (await peer.ask("pong"))["near"] == ["ping"]
    assert (await peer.ask("register db 5432"))["rev"] == 1
    assert (await peer.ask("REGISTER db [::1]:5433"))["replaced"]
    assert (await peer.ask("resolve db"))["host"] == "::1"
    assert [instance["name"] for instance in (await peer.ask("list d*"))["instances"]] == ["db"]
    assert (await peer.ask("why db"))["instances"][0]["owners"] == [{"static": True}]
    assert (await peer.ask("register db http"))["field"] == "port"
    assert (await peer.ask("stats"))["requests"]["register"] == 2
    peer.writer.write_eof()
    assert await peer.rest() == b""
    other = await daemon.peer()
    assert (await other.ask("DEREGISTER db"))["removed"] == 1


async def test_cached_reply_counts_as_a_valid_request(daemon: InLoop) -> None:
    """A typing error after a reply from the cache does not close the connection."""
    resolve = b'{"cmd":"resolve","name":"db"}\n'
    peer, other = await daemon.peer(), await daemon.peer()
    assert (await peer.ask("register db 5432"))["ok"]
    assert (await peer.ask(resolve))["ok"]
    assert (await other.ask(resolve))["ok"]
    assert (await other.ask("pong"))["error"] == "unknown_command"
    assert (await other.ask("ping"))["ok"]


async def test_help_is_cached_and_has_the_id(daemon: InLoop) -> None:
    peer = await daemon.peer()
    for topic in ({}, {"topic": "ping"}):
        first = await peer.ask(cmd="help", **topic)
        assert first["commands"].keys() >= {"ping"}
        for id in ("x", 7):
            assert await peer.ask(cmd="help", id=id, **topic) == {**first, "id": id}


async def test_error_line_is_not_lost_to_a_reset(daemon: InLoop) -> None:
    peer = await daemon.peer()
    peer.send(b"GET / HTTP/1.1\r\n" + b"x" * 3_000_000)  # more than the daemon reads before it replies
    async with asyncio.timeout(WAIT_S):
        assert await peer.reader.readexactly(len(HTTP_REFUSAL)) == HTTP_REFUSAL


async def test_reset_after_a_refusal_logs_no_traceback(daemon: InLoop, caplog: pytest.LogCaptureFixture) -> None:
    """`shutdown` fails on such a connection, and the connection is freed."""
    for _ in range(3):
        plain = socket.create_connection(("127.0.0.1", daemon.port))
        await until(lambda: daemon.server.connections)
        [connection] = daemon.server.connections
        connection.data_received(b"GET / HTTP/1.1\r\n")
        plain.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        plain.close()
        await until(lambda: not daemon.server.connections)
    assert [record.levelname for record in caplog.records if record.exc_info] == []


async def test_long_and_invalid_lines_do_not_close_the_connection(daemon: InLoop) -> None:
    peer = await daemon.peer()
    assert (await peer.ask(b"{" + b"x" * 200_000 + b"\n"))["error"] == "too_large"
    assert (await peer.ask(b"{]\n"))["error"] == "bad_json"
    assert (await peer.ask(PING))["ok"]


async def test_client_that_does_not_read_is_not_read(daemon: InLoop) -> None:
    setup, deaf = await daemon.peer(), await daemon.peer()
    for n in range(500):
        setup.send({"cmd": "register", "name": f"n{n}", "port": 1, "meta": {"k": "v" * 1_000}})
    for _ in range(500):
        await setup.reply()
    deaf.send(b"list\n" * 2_000)  # a gigabyte of replies
    await until(lambda: daemon.server.unsent_bytes)
    assert (await setup.ask(PING))["ok"]
    assert daemon.server.unsent_bytes < 2_000_000
    for _ in range(2_000):
        assert len((await deaf.reply())["instances"]) == 500
        if _ == 20:
            break


async def test_unsent_bytes_are_limited_in_total(tmp_path: Path) -> None:
    async with InLoop(tmp_path / "registry.json", limits=Limits(output_bytes_total_max=300_000)) as daemon:
        setup = await daemon.peer()
        for n in range(900):
            setup.send({"cmd": "register", "name": f"n{n}", "port": 1, "meta": {"k": "v" * 1_000}})
        for _ in range(900):
            await setup.reply()
        for _ in range(12):
            deaf = await daemon.peer()
            deaf.writer.transport.pause_reading()  # type: ignore[attr-defined]
            deaf.send(b"list\n" * 100)
        async with asyncio.timeout(WAIT_S):
            while not (await setup.ask(cmd="stats"))["dropped"]:
                pass
        assert daemon.server.unsent_bytes <= 300_000
        assert (await setup.ask("resolve n1"))["ok"]


async def test_resets_do_not_disturb_other_connections(daemon: InLoop) -> None:
    other = await daemon.peer()
    for n in range(50):
        plain = socket.create_connection(("127.0.0.1", daemon.port))
        plain.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        plain.sendall(b'{"cmd":"register","name":"r%d","port":1}\nlist\n' % n)
        plain.close()
    await until(lambda: len(daemon.server.connections) <= 1)
    assert (await other.ask(PING))["ok"]


async def test_pages_are_limited_and_complete(tmp_path: Path) -> None:
    async with InLoop(
        tmp_path / "registry.json", limits=Limits(reply_instances_max=3, reply_bytes_max=2_000)
    ) as daemon:
        peer = await daemon.peer()
        for n in range(8):
            await peer.ask(cmd="register", name="w", instance=str(n), port=1, meta={"k": "v" * 200})
        seen: list[str] = []
        after: dict[str, Any] = {}
        while True:
            page = await peer.ask(cmd="list", name="w*", **after)
            assert page["epoch"] == EPOCH
            assert 1 <= len(page["instances"]) <= 3
            seen += [instance["instance"] for instance in page["instances"]]
            if "next" not in page:
                break
            after = {"after": page["next"]}
        assert seen == [str(n) for n in range(8)]
        every = await peer.ask(cmd="resolve", name="w", all=True)
        assert (len(every["instances"]), every["more"]) == (3, True)
        assert "more" not in await peer.ask(cmd="resolve", name="w", all=True, instance="3")


async def test_resolve_explains(daemon: InLoop) -> None:
    peer = await daemon.peer()
    await peer.ask(cmd="register", name="runner", port=1, meta={"zone": "a"})
    await peer.ask(cmd="register", name="cache", port=1, state="draining")
    assert (await peer.ask("resolve runnr"))["near"] == ["runner"]
    assert "ready" in (await peer.ask("resolve cache"))["message"]
    assert "meta" in (await peer.ask(cmd="resolve", name="runner", meta={"zone": "b"}))["message"]
    assert "no instance" in (await peer.ask(cmd="resolve", name="runner", instance="7"))["message"]
    assert (await peer.ask(cmd="resolve", name="runner", meta={"zone": "a"}))["port"] == 1
    assert (await peer.ask(cmd="resolve", name="cache", all=True))["error"] == "not_found"
    assert (await peer.ask(cmd="deregister", name="runnr"))["near"] == ["runner"]


async def test_update_and_if(daemon: InLoop) -> None:
    peer = await daemon.peer()
    assert (await peer.ask(cmd="update", name="a", meta={}))["error"] == "not_found"
    assert (await peer.ask(cmd="register", name="a", port=1, **{"if": 0}))["rev"] == 1
    assert (await peer.ask(cmd="update", name="a"))["field"] == "meta"
    assert (await peer.ask(cmd="update", name="a", meta={"k": "v"}, **{"if": 1}))["rev"] == 2
    stale = await peer.ask(cmd="update", name="a", state="draining", **{"if": 1})
    assert (stale["error"], stale["rev"]) == ("conflict", 2)
    assert (await peer.ask(cmd="update", name="a", state="draining"))["rev"] == 3
    listed = (await peer.ask("list"))["instances"]
    assert [(instance["meta"], instance["state"]) for instance in listed] == [({"k": "v"}, "draining")]
    on_disk = stored(daemon.registry)["a"]
    assert (on_disk.port, on_disk.meta, on_disk.state) == (1, {"k": "v"}, "draining")
    assert (await peer.ask(cmd="register", name="a", port=1))["rev"] == 4  # omitted arguments take their defaults
    assert (await peer.ask("resolve a"))["meta"] == {}
    replaced = await peer.ask(cmd="register", name="a", port=2, force=True)
    assert (replaced["replaced"], replaced["rev"]) == (True, 6)


async def test_hello_and_stats_describe_the_daemon(daemon: InLoop) -> None:
    peer = await daemon.peer()
    hello = await peer.ask(cmd="hello")
    assert (hello["server"], hello["protocol"], hello["epoch"], hello["rev"]) == ("regd", 1, EPOCH, 0)
    assert hello["loop"] == type(asyncio.get_running_loop()).__module__.partition(".")[0]
    assert hello["host"].keys() == {"boot", "pid_namespace"}
    assert hello["limits"]["line_bytes_max"] == 65_536
    stats = await peer.ask(cmd="stats")
    assert (stats["requests"], stats["connections"], stats["loop"]) == ({"hello": 1}, 1, hello["loop"])
    assert stats["registry"] == str(daemon.registry)


async def test_client_with_many_requests_does_not_delay_others(daemon: InLoop) -> None:
    greedy, other = await daemon.peer(), await daemon.peer()
    greedy.send(b"ping\n" * 20_000)
    other.send("ping")
    assert (await other.reply())["ok"]
    assert (await (await daemon.peer()).ask(cmd="stats"))["requests"]["ping"] < 20_001


async def test_committed_reply_is_not_overtaken(daemon: InLoop, monkeypatch: pytest.MonkeyPatch) -> None:
    """Replies stay in order, and `quit` loses none, if bytes arrive in the loop iteration in which a commit ends."""
    peer = await daemon.peer()
    [connection] = [connection for connection in daemon.server.connections if connection.address]
    send_late, to_come = Connection.send_late_replies, [b""]

    def send(self: Connection) -> None:
        self.data_received(to_come.pop())  # the reply to the commit is not sent yet
        send_late(self)

    monkeypatch.setattr(Connection, "send_late_replies", send)
    for request, count in ((b'{"cmd":"ping","id":2}\n', 2), (b"quit\n", 1)):
        to_come[:] = [request]
        connection.data_received(b'{"cmd":"register","name":"a","port":1,"id":1}\n')
        assert [(await peer.reply())["id"] for _ in range(count)] == [1, 2][:count]


async def test_search_for_similar_names_is_bounded(daemon: InLoop) -> None:
    """Long, similar names with few different letters are expensive to compare."""
    peer = await daemon.peer()
    labels = ["".join("ab"[n >> bit & 1] for bit in range(8)) * 7 for n in range(128)]
    for n, label in enumerate(labels):
        peer.send({"cmd": "register", "name": ".".join([label, "ab" * 31, "ba" * 31]), "port": n + 1})
    for _ in labels:
        assert (await peer.reply())["ok"]
    began = time.process_time()
    reply = await peer.ask(cmd="resolve", name=".".join(["ab" * 28, "ba" * 31, "ab" * 31]))
    assert reply["error"] == "not_found"
    assert time.process_time() - began < 2.0  # without the limit it takes over a minute


async def test_round_robin_with_filters(daemon: InLoop) -> None:
    peer = await daemon.peer()
    for n, zone in enumerate("aabb", 1):
        await peer.ask(cmd="register", name="w", port=n, instance=str(n), meta={"zone": zone})
    ports_by_zone: dict[str, list[int]] = {"a": [], "b": []}
    for _ in range(4):
        for zone, ports in ports_by_zone.items():
            ports.append((await peer.ask(cmd="resolve", name="w", meta={"zone": zone}))["port"])
            assert (await peer.ask(cmd="resolve", name="w", meta={"zone": "c"}))["error"] == "not_found"
    assert ports_by_zone == {"a": [1, 2, 1, 2], "b": [3, 4, 3, 4]}
    # An instance that comes and goes does not disturb the round robin of the others.
    seen = set()
    for n in range(6):
        await peer.ask(cmd="register", name="w", port=10 + n, instance="0")
        seen |= {(await peer.ask(cmd="resolve", name="w"))["instance"] for _ in range(2)}
    assert seen >= {"1", "2", "3", "4"}


async def test_last_is_reported_in_a_pipeline(daemon: InLoop) -> None:
    peer = await daemon.peer()
    await peer.ask(cmd="register", name="a", port=1)
    peer.send({"cmd": "deregister", "name": "a"}, {"cmd": "deregister", "name": "a"})
    assert (await peer.reply())["ok"]
    assert (await peer.reply())["last"]["reason"] == "deregistered"


async def test_reply_is_at_most_a_mebibyte_with_any_id(daemon: InLoop) -> None:
    peer = await daemon.peer()
    meta = {"k": "v" * 4_000}
    peer.send(
        *({"cmd": "register", "name": "w", "port": 1, "instance": f"{n:03}", "meta": meta} for n in range(300))
    )
    for _ in range(300):
        assert (await peer.reply())["ok"]
    for id in ("\U0001f600" * 64, int("9" * 4_300)):
        for request in ({"cmd": "list"}, {"cmd": "resolve", "name": "w", "all": True}):
            peer.send({**request, "id": id})
            line = await peer.line()
            assert 1_000_000 < len(line) <= 1_048_576


async def test_host_with_control_characters_is_refused(daemon: InLoop) -> None:
    peer = await daemon.peer()
    for host in ("fe80::1%\n\x1b[31m", "fe80::1%", "fe80::1%a b", "::%\n"):
        assert (await peer.ask(cmd="register", name="a", port=1, host=host))["field"] == "host"
    assert (await peer.ask(cmd="register", name="a", port=1, host="fe80::1%eth0"))["ok"]


async def test_largest_buffers_are_dropped_until_the_rest_fits(tmp_path: Path) -> None:
    limits = Limits(input_bytes_total_max=100_000)
    async with InLoop(tmp_path / "registry.json", limits=limits) as daemon:
        small = [await daemon.peer() for _ in range(20)]
        for peer in small:
            peer.send(b"{")
        for peer in [await daemon.peer() for _ in range(8)]:
            peer.send(b"{" + b"x" * 30_000)
        await until(lambda: daemon.server.waiting_bytes > 80_000 or daemon.server.connections)
        for peer in small:
            peer.send(b'"cmd":"ping"}\n')
            assert (await peer.reply())["ok"]
        assert daemon.server.waiting_bytes <= 100_000


async def test_reset_during_a_refusal_raises_no_error(daemon: InLoop) -> None:
    """`shutdown` raises ENOTCONN before asyncio has seen the reset."""
    errors: list[dict[str, object]] = []
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: errors.append(context))
    for _ in range(50):
        raw = socket.create_connection(("127.0.0.1", daemon.port))
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        raw.sendall(b"GET / HTTP/1.1\r\n\r\n")
        while not any(
            connection._conversation.state is ConversationState.ENDED for connection in daemon.server.connections
        ):
            await asyncio.sleep(0)
        raw.close()
        async with asyncio.timeout(WAIT_S):
            while daemon.server.connections:
                await asyncio.sleep(0)
    assert errors == []
