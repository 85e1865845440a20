"""Real browsers and programs of other protocols against a real daemon: nothing they send is a request.

After each the registry is unchanged, byte for byte, in the daemon and in its file; the peer is counted, has received
one refusal, and causes at most one log line in ten seconds.
"""

import contextlib
import http.server
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
    """A daemon with one registration, which strangers are not to touch."""

    def __init__(self, daemon: DaemonProcess) -> None:
        self.daemon = daemon
        self.began = time.monotonic()
        self.peer = BlockingConnection(daemon.addresses[0])
        assert self.peer.ask("register", name="db", port=5432)["ok"]
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
        """Wait until there were so many; no attempt is over before its bytes have been looked at."""
        until = time.monotonic() + WAIT_S
        while (now := self.strangers()) < count and time.monotonic() < until:
            time.sleep(0.01)
        return now

    def end(self) -> None:
        """Hold the state and the log against what they must be."""
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
        assert len(log.splitlines()) <= windows + 3, log  # its begin, its end, and the one registration
        shown = log.replace("\n", "").replace("…", "")  # which is the daemon's own
        assert shown.isascii()
        assert shown.isprintable()


@pytest.fixture
def watched(process: DaemonProcess) -> Iterator[Watched]:
    made = Watched(process)
    yield made
    made.end()


def needs(tool: str) -> pytest.MarkDecorator:
    """Before the fixture is set up: a daemon that no stranger came to is no proof."""
    return pytest.mark.skipif(shutil.which(tool) is None, reason=f"no {tool} on this machine")


# Raw bytes, as the programs of other protocols begin.

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
    """Send, and return all that comes back until the other side ends it."""
    with socket.create_connection(("127.0.0.1", port), WAIT_S) as made:
        made.sendall(data)
        said = b""
        while part := made.recv(65_536):
            said += part
        return said


def test_greetings_of_other_protocols_are_refused(watched: Watched) -> None:
    for count, (name, greeting) in enumerate(GREETINGS.items(), 1):
        said = conversation(watched.port, greeting + b"\r\n" + BODY)
        if name.startswith("HTTP"):
            assert oracle.is_http_refusal(said), name
        else:
            assert said.count(b"\n") == 1, name
            assert json.loads(said)["error"] in REFUSED, name
        assert watched.strangers() == count, name


def test_random_bytes_change_nothing(watched: Watched) -> None:
    chance = random.Random(7)
    for count in range(1, 101):
        first = chance.choice([byte for byte in range(256) if byte not in b" \t\r\n{"])
        said = conversation(
            watched.port, bytes([first]) + chance.randbytes(chance.randrange(3, 300)) + b"\n" + BODY
        )
        assert said.count(b"\n") == 1
        assert json.loads(said)["error"] in REFUSED
        assert watched.strangers() == count


def test_each_of_many_bad_peers_is_counted_and_answered(watched: Watched) -> None:
    made = [socket.create_connection(("127.0.0.1", watched.port), WAIT_S) for _ in range(200)]
    for sock in made:
        sock.sendall(GREETINGS["HTTP/1.1"] + BODY)
    for sock in made:
        with sock, sock.makefile("rb") as said:
            assert oracle.is_http_refusal(said.read())
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
    "a name that was bound again": ("http", ["-H", "Host: evil.example", *_DATA]),
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
SHOWN = {  # these show what they got
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
            assert conversation(watched.port, b"GET / HTTP/1.1\r\n")  # so that the count goes on
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
    """A web site of a stranger: it serves the page, and takes its reports."""

    def __init__(self, tried: Callable[[], None]) -> None:
        self.reports: list[dict[str, Any]] = []
        self.attempts: list[str] = []
        self.ended = threading.Event()
        site = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.answer(BODY if self.path == "/commands" else PAGE.read_bytes())

            def do_POST(self) -> None:
                said = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                if self.path == "/end":
                    site.attempts = said["attempts"]
                    site.ended.set()
                else:
                    tried()
                    site.reports.append(said)
                self.answer(b"")

            def answer(self, body: bytes) -> None:
                self.send_response(200)
                self.send_header("Content-Type", "text/html")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: object) -> None:
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)

    @contextlib.contextmanager
    def open(self) -> Iterator[int]:
        thread = threading.Thread(target=self.server.serve_forever)
        thread.start()
        try:
            yield int(self.server.server_port)
        finally:
            self.server.shutdown()
            thread.join()
            self.server.server_close()


@contextlib.contextmanager
def browser(url: str, profile: Path) -> Iterator[None]:
    """Open a page. Names other than the stranger's are not looked up: nothing leaves this machine."""
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
            os.killpg(process.pid, signal.SIGKILL)  # the group is its own
        process.wait()


@pytest.mark.long
@needs("chromium")
@pytest.mark.parametrize("host", ["127.0.0.1", "evil.example"])
def test_web_page_in_a_browser_changes_nothing(watched: Watched, tmp_path: Path, host: str) -> None:
    """By address, and by a name that was bound again to this machine (DNS rebinding)."""
    seen = [0]

    def tried() -> None:
        seen.append(watched.wait_for_strangers(seen[-1] + 1))

    site = Site(tried)
    with (
        site.open() as port,
        browser(f"http://{host}:{port}/?daemon={host}:{watched.port}", tmp_path / "profile"),
    ):
        assert site.ended.wait(45), f"the page did not come to its end: {site.reports}"
    assert [report["attempt"] for report in site.reports] == site.attempts
    for before, now, report in zip(seen[:-1], seen[1:], site.reports, strict=True):
        assert now > before, f"it never reached the daemon: {report}"
        assert "regd" not in report["outcome"], f"a page could read: {report}"
        # An opaque response (mode "no-cors") has no text for the page.
        assert report["outcome"] == "read: " or not report["outcome"].startswith(("read", "open")), report


# People.


@needs("telnet")
def test_telnet_session(process: DaemonProcess) -> None:
    """Typed into the real program, typing errors and all; it is the daemon that closes, at `quit`."""
    with subprocess.Popen(
        ["telnet", "127.0.0.1", str(process.port)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as telnet:
        assert telnet.stdin is not None
        assert telnet.stdout is not None
        said: list[dict[str, Any]] = []
        for line in ("help", "hlep", "REGISTER db 5432", "why db", "deregister db"):
            telnet.stdin.write(line + "\n")
            telnet.stdin.flush()
            while not (got := telnet.stdout.readline()).startswith("{"):
                assert got, "telnet has ended"
            said.append(json.loads(got))
        telnet.stdin.write("quit\n")
        telnet.stdin.flush()
        telnet.communicate(timeout=WAIT_S)
    assert [reply.get("error") for reply in said] == [None, "unknown_command", None, None, None]


@needs("nc")
@pytest.mark.parametrize("end", ["", "quit\n"])
def test_nc_gets_one_reply_per_line(process: DaemonProcess, end: str) -> None:
    done = subprocess.run(
        ["nc", *([] if end else ["-N"]), "127.0.0.1", str(process.port)],
        input="register db 5432\nresolve db\n" + end, capture_output=True, text=True, timeout=WAIT_S, check=True,
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
            until = time.monotonic() + WAIT_S
            while not peer.ask("stats")["waiting"]:
                assert time.monotonic() < until
            peer.ask("register", name="late", port=1, host="db.example")
        out, _ = nc.communicate(timeout=WAIT_S)
    assert json.loads(out)["host"] == "db.example"
