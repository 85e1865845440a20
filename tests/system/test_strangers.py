"""Browsers and programs of other protocols against a daemon in a process: nothing that they send is a request.

Afterwards the registry is unchanged, in the daemon and in its file. Every such peer is counted and receives one
refusal; there is at most one log line in ten seconds. The sessions with telnet and nc are at the end.
"""

import contextlib
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from regd.protocol.messages import HTTP_REFUSAL
from regd_client.blocking import BlockingConnection
from tests.long.fuzz import oracle
from tests.support.daemon import WAIT_S, DaemonProcess
from tests.support.http_service import HttpHandler, http_service
from tests.support.polling import block_until

PAGE = Path(__file__).with_name("strangers.html")
LOG_EVERY_S = 10.0
REFUSED = {"bad_request", "unknown_command", "bad_argument"}
COMMANDS = "".join(
    json.dumps(request) + "\n"
    for request in (
        {"cmd": "register", "name": "evil", "port": 666},
        {"cmd": "register", "name": "db", "port": 666, "force": True},
        {"cmd": "update", "name": "db", "meta": {"evil": "yes"}},
        {"cmd": "deregister", "name": "db"},
    )
)
BODY = COMMANDS.encode()


class Watched:
    """A daemon with one registration, which must not change."""

    def __init__(self, daemon: DaemonProcess) -> None:
        self.daemon = daemon
        self.began = time.monotonic()
        self.peer = BlockingConnection(daemon.addresses[0])
        assert self.peer.ask("register", name="db", port=5432)["ok"]
        block_until(lambda: b'"db"' in daemon.registry.read_bytes())
        self.state = self.look()

    @property
    def port(self) -> int:
        return self.daemon.port

    def look(self) -> tuple[Any, ...]:
        listed = self.peer.ask("list")
        return listed["rev"], listed["instances"], self.daemon.registry.read_bytes()

    def strangers(self) -> int:
        return int(self.peer.ask("stats")["bad_protocol"])

    def wait_for_strangers(self, count: int) -> int:
        """Wait until the daemon has refused `count` peers, and return how many it has refused."""
        deadline = time.monotonic() + WAIT_S
        while (refused := self.strangers()) < count and time.monotonic() < deadline:
            time.sleep(0.01)
        return refused

    def check(self) -> None:
        """Check the state and the counters, stop the daemon, and check its log."""
        assert self.look() == self.state
        stats = self.peer.ask("stats")
        assert stats["requests"].keys() == {"register", "list", "stats"}
        assert stats["requests"]["register"] == 1
        assert stats["errors"].keys() <= {"bad_request", "unknown_command", "bad_argument"}
        assert sum(stats["errors"].values()) == stats["bad_protocol"]
        self.peer.close()
        _, log = self.daemon.end()
        windows = 1 + (time.monotonic() - self.began) // LOG_EVERY_S
        complaints = [line for line in log.splitlines() if "does not speak regd" in line]
        assert 1 <= len(complaints) <= windows
        assert len(log.splitlines()) <= windows + 3, (
            log
        )  # the others are the start, the registration and the stop
        text = log.replace("\n", "").replace("…", "")  # regd's own mark of truncated text
        assert text.isascii()
        assert text.isprintable()


@pytest.fixture
def watched(process: DaemonProcess) -> Iterator[Watched]:
    watched = Watched(process)
    yield watched
    watched.check()


def needs(tool: str) -> pytest.MarkDecorator:
    """Skip before the fixtures are set up: `Watched.check` fails if no peer has connected."""
    return pytest.mark.skipif(shutil.which(tool) is None, reason=f"no {tool} on this machine")


# The first bytes of other protocols.

GREETINGS: dict[str, bytes] = {
    "HTTP/1.1": b"POST / HTTP/1.1\r\nHost: evil.example\r\nContent-Length: %d\r\n\r\n" % len(BODY),
    "HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes.fromhex("000000040000000000"),
    "TLS": bytes.fromhex("1603010200010001fc0303") + bytes(range(32)),
    "SOCKS 4": b"\x04\x01" + (666).to_bytes(2, "big") + bytes([127, 0, 0, 1]) + BODY + b"\0",
    "SOCKS 5": b"\x05\x01\x00",
    "SSH": b"SSH-2.0-OpenSSH_9.2p1 Debian-2\r\n",
    "Redis": b"*3\r\n$3\r\nSET\r\n$1\r\na\r\n$%d\r\n%s\r\n" % (len(BODY), BODY),
    "memcached": b"set a 0 0 %d\r\n" % len(BODY),
    "SMTP": b"EHLO evil.example\r\nMAIL FROM:<a@evil.example>\r\nDATA\r\n",
    "PostgreSQL": bytes.fromhex("0000000804d2162f"),
    "D-Bus": b"\0AUTH EXTERNAL 30\r\n",
    "a language server": b"Content-Length: %d\r\n\r\n" % len(BODY),
    "the PROXY protocol": b"PROXY TCP4 127.0.0.1 127.0.0.1 1 2\r\n",
    "STUN": bytes.fromhex("000300082112a442") + bytes(12),
    "a list of commands": b"[" + BODY.replace(b"\n", b",") + b"0]\n",
    "UTF-16": b"\xff\xfe" + COMMANDS.encode("utf-16-le"),
    "escape sequences": b"\x1b]0;evil\x07\x9b31m\xe2\x80\xae\n",
}


def conversation(port: int, data: bytes) -> bytes:
    """Send data, and return everything received until the daemon closes the connection."""
    with socket.create_connection(("127.0.0.1", port), WAIT_S) as sock, sock.makefile("rb") as stream:
        sock.sendall(data)
        return stream.read()


def test_greetings_of_other_protocols_are_refused(watched: Watched) -> None:
    for count, (name, greeting) in enumerate(GREETINGS.items(), 1):
        reply = conversation(watched.port, greeting + b"\r\n" + BODY)
        if name.startswith("HTTP"):
            assert oracle.is_http_refusal(reply), name
        else:
            assert reply.count(b"\n") == 1, name
            assert json.loads(reply)["error"] in REFUSED, name
        assert watched.strangers() == count, name


def test_random_bytes_change_nothing(watched: Watched) -> None:
    generator = random.Random(7)
    for count in range(1, 101):
        first = generator.choice([byte for byte in range(256) if byte not in b" \t\r\n{"])
        data = bytes([first]) + generator.randbytes(generator.randrange(3, 300)) + b"\n"
        reply = conversation(watched.port, data + BODY)
        assert reply.count(b"\n") == 1
        assert json.loads(reply)["error"] in REFUSED
        assert watched.strangers() == count


def test_every_one_of_200_bad_peers_is_counted_and_answered(watched: Watched) -> None:
    socks = [socket.create_connection(("127.0.0.1", watched.port), WAIT_S) for _ in range(200)]
    for sock in socks:
        sock.sendall(GREETINGS["HTTP/1.1"] + BODY)
    for sock in socks:
        with sock, sock.makefile("rb") as reply:
            assert oracle.is_http_refusal(reply.read())
    assert watched.strangers() == 200


# Programs.

_DATA = ["--data-binary", COMMANDS]
CURL: dict[str, tuple[str, list[str]]] = {
    "POST": ("http", _DATA),
    "a line end first": ("http", ["--data-binary", "\r\n\n" + COMMANDS]),
    "chunked": ("http", ["-H", "Transfer-Encoding: chunked", *_DATA]),
    "HTTP/1.0": ("http", ["--http1.0", *_DATA]),
    "HTTP/2": ("http", ["--http2-prior-knowledge", *_DATA]),
    "HTTP/0.9": ("http", ["--http0.9", *_DATA]),
    "upload": ("http", ["-T", "-"]),
    "form": ("http", ["-F", f"{COMMANDS}=x"]),
    "DNS rebinding": ("http", ["-H", "Host: evil.example", *_DATA]),
    "headers": ("http", ["-H", f"X-Command: {COMMANDS.splitlines()[0]}", "-A", COMMANDS.splitlines()[0]]),
    "another method": ("http", ["-X", "list", *_DATA]),
    "a method that is a command": ("http", ["-X", "REGISTER", *_DATA]),
    "a long target": ("http", ["--request-target", "/" + "x" * 9_000, *_DATA]),
    "TLS": ("https", ["-k", *_DATA]),
    "SSH": ("sftp", ["-k", "-u", "a:b"]),
    "gopher": ("gopher", []),
    "dict": ("dict", []),
    "dict with a command": ("dict", []),
    "rtsp": ("rtsp", []),
    "telnet": ("telnet", []),
    "mqtt": ("mqtt", []),
}
PATHS = {"dict with a command": "register:evil:666"}
SHOWN = {  # these programs print the reply
    "gopher": "unknown_command",
    "dict": "unknown_command",
    "dict with a command": "unknown_command",
    "telnet": "unknown_command",
}


@pytest.fixture(scope="module")
def curl_protocols() -> set[str]:
    done = subprocess.run(["curl", "--version"], capture_output=True, text=True, check=True)
    return set(done.stdout.partition("Protocols:")[2].splitlines()[0].split())


@needs("curl")
def test_curl(watched: Watched, curl_protocols: set[str]) -> None:
    for count, (name, (scheme, flags)) in enumerate(CURL.items(), 1):
        if scheme not in curl_protocols:
            assert conversation(watched.port, b"GET / HTTP/1.1\r\n")  # counts in place of curl
            continue
        done = subprocess.run(
            ["curl", "-sS", "--noproxy", "*", "--max-time", "10", *flags,
             f"{scheme}://127.0.0.1:{watched.port}/{PATHS.get(name, '1docs')}"],
            input="\n".join(["hello", COMMANDS]), capture_output=True, text=True, timeout=20, check=False,
        )  # fmt: skip
        assert watched.wait_for_strangers(count) == count, (name, done.stderr)
        errors = [line for line in done.stdout.splitlines() if line.startswith("{")]
        if name in SHOWN:
            assert [json.loads(line)["error"] for line in errors] == [SHOWN[name]], name
        elif scheme == "http" and name != "HTTP/2":
            assert (done.returncode, done.stdout) == (0, HTTP_REFUSAL.decode().partition("\r\n\r\n")[2]), name
        else:
            assert (done.returncode != 0, errors) == (True, []), name


@needs("openssl")
def test_openssl(watched: Watched) -> None:
    done = subprocess.run(
        ["openssl", "s_client", "-connect", f"127.0.0.1:{watched.port}", "-servername", "evil.example"],
        input=COMMANDS, capture_output=True, text=True, timeout=20, check=False,
    )  # fmt: skip
    assert done.returncode != 0
    assert watched.wait_for_strangers(1) == 1


# A browser.


class Site:
    """A hostile web site: it serves the page and receives a report of each attempt."""

    def __init__(self, on_attempt: Callable[[], None]) -> None:
        self.reports: list[dict[str, Any]] = []
        self.attempts: list[str] = []
        self.ended = threading.Event()
        site = self

        class Handler(HttpHandler):
            def do_GET(self) -> None:
                self.answer(BODY if self.path == "/commands" else PAGE.read_bytes(), content_type="text/html")

            def do_POST(self) -> None:
                report = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                if self.path == "/end":
                    site.attempts = report["attempts"]
                    site.ended.set()
                else:
                    on_attempt()
                    site.reports.append(report)
                self.answer(b"")

        self.handler = Handler


@contextlib.contextmanager
def browser(url: str, profile: Path) -> Iterator[None]:
    """Open a page. No name but evil.example is resolved, so nothing leaves this machine."""
    process = subprocess.Popen(
        [
            "chromium", "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
            "--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync",
            "--host-resolver-rules=MAP evil.example 127.0.0.1, MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
            f"--user-data-dir={profile}", url,
        ],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    try:
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.mark.long
@needs("chromium")
@pytest.mark.parametrize("host", ["127.0.0.1", "evil.example"])
def test_web_page_in_a_browser_changes_nothing(watched: Watched, tmp_path: Path, host: str) -> None:
    """By address, and by a name that now resolves to this machine (DNS rebinding)."""
    counts = [0]

    def count_attempt() -> None:
        counts.append(watched.wait_for_strangers(counts[-1] + 1))

    site = Site(count_attempt)
    with (
        http_service(site.handler) as port,
        browser(f"http://{host}:{port}/?daemon={host}:{watched.port}", tmp_path / "profile"),
    ):
        assert site.ended.wait(45), f"the page did not finish: {site.reports}"
    assert [report["attempt"] for report in site.reports] == site.attempts
    for previous, count, report in zip(counts[:-1], counts[1:], site.reports, strict=True):
        assert count > previous, f"the attempt did not reach the daemon: {report}"
        assert "regd" not in report["outcome"], f"the page could read the reply: {report}"
        # An opaque response (mode "no-cors") has no text for the page.
        assert report["outcome"] == "read: " or not report["outcome"].startswith(("read", "open")), report


# Sessions with telnet and nc.


@needs("telnet")
def test_telnet_session(process: DaemonProcess) -> None:
    """A session with a typing error. The daemon closes it at `quit`."""
    with subprocess.Popen(
        ["telnet", "127.0.0.1", str(process.port)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as telnet:
        assert telnet.stdin is not None
        assert telnet.stdout is not None
        replies: list[dict[str, Any]] = []
        for line in ("help", "hlep", "REGISTER db 5432", '{"cmd":"resolve","name":"db"}', "deregister db"):
            telnet.stdin.write(line + "\n")
            telnet.stdin.flush()
            while not (output := telnet.stdout.readline()).startswith("{"):
                assert output, "telnet has ended"
            replies.append(json.loads(output))
        telnet.stdin.write("quit\n")
        telnet.stdin.flush()
        telnet.communicate(timeout=WAIT_S)
    assert [reply.get("error") for reply in replies] == [None, "unknown_command", None, None, None]


@pytest.mark.sample(4)
@pytest.mark.parametrize(
    ("command", "end"),
    [
        pytest.param(["nc.openbsd"], "quit\r\n", marks=needs("nc.openbsd"), id="openbsd"),
        pytest.param(["nc.openbsd", "-N"], "", marks=needs("nc.openbsd"), id="openbsd -N"),
        pytest.param(["nc.openbsd", "-w", "3"], "", marks=needs("nc.openbsd"), id="openbsd -w"),
        pytest.param(["nc.traditional"], "quit\r\n", marks=needs("nc.traditional"), id="traditional"),
    ],
)
def test_nc_gets_one_reply_per_line(process: DaemonProcess, command: list[str], end: str) -> None:
    done = subprocess.run(
        [*command, "127.0.0.1", str(process.port)],
        input='{"cmd":"register","name":"db","port":5432}\nresolve db\r\n' + end,
        capture_output=True, text=True, timeout=WAIT_S, check=False,
    )  # fmt: skip
    assert [json.loads(line)["ok"] for line in done.stdout.splitlines()] == [True, True]


@needs("nc")
def test_half_closed_nc_gets_its_pending_reply(process: DaemonProcess) -> None:
    with subprocess.Popen(
        ["nc", "-N", "127.0.0.1", str(process.port)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as nc:
        assert nc.stdin is not None
        nc.stdin.write('{"cmd":"resolve","name":"late","wait":60}\n')
        nc.stdin.close()
        nc.stdin = None
        with BlockingConnection(process.addresses[0]) as peer:
            deadline = time.monotonic() + WAIT_S
            while not peer.ask("stats")["waiting"]:
                assert time.monotonic() < deadline
            peer.ask("register", name="late", port=1, host="db.example")
        out, _ = nc.communicate(timeout=WAIT_S)
    assert json.loads(out)["host"] == "db.example"
