"""`regctl serve` as a process while its daemon hangs, dies, restarts or loses changes, and while files run out."""

import json
import os
import shutil
import signal
import socket
import struct
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO

import dns.message
import dns.query
import pytest

from regd.core.model import State
from tests.gateways.test_serve import Serving, ask, get, port_of, serving
from tests.support.daemon import WAIT_S, DaemonProcess
from tests.support.polling import block_until


class Scene:
    """A daemon and its gateway, with a stream, a waiting request and a DNS client."""

    def __init__(self, daemon: DaemonProcess, gateway: Serving, stack: ExitStack) -> None:
        lines = gateway.lines(4)
        self.daemon = daemon
        self.gateway = gateway
        self.url = lines[0].split()[1]
        self.http, self.dns = port_of(lines[0]), port_of(lines[2])
        self._stack = stack

    def open(self, path: str, *headers: str) -> BinaryIO:
        """Send a request, and return the response as a file. The status line is read."""
        peer = self._stack.enter_context(socket.create_connection(("127.0.0.1", self.http), WAIT_S))
        peer.sendall("\r\n".join([f"GET {path} HTTP/1.1", "Host: localhost", *headers, "", ""]).encode())
        return self._stack.enter_context(peer.makefile("rb"))

    def command(self, **request: Any) -> dict[str, Any]:
        with (
            socket.create_connection(("127.0.0.1", self.daemon.port), WAIT_S) as peer,
            peer.makefile("rwb") as file,
        ):
            file.write(json.dumps(request).encode() + b"\n")
            file.flush()
            reply: dict[str, Any] = json.loads(file.readline())
        return reply

    def register(self, name: str, port: int = 5061) -> None:
        assert self.command(cmd="register", name=name, port=port)["ok"]

    def gauge(self, name: str, count: int) -> None:
        block_until(lambda: self.command(cmd="stats")[name] == count)

    def resolves(self, name: str) -> bool:
        return bool(ask(self.dns, f"{name}.regd.internal", "A").answer)


@pytest.fixture
def scene(process: DaemonProcess) -> Iterator[Scene]:
    with ExitStack() as stack:
        gateway = stack.enter_context(serving("--http", "0", "--dns", "0", address=process.addresses[0]))
        yield Scene(process, gateway, stack)


def until_event(stream: BinaryIO, event: str) -> tuple[str, dict[str, Any]]:
    """Read a stream up to an event, and return its id and its data."""
    lines: list[str] = []
    for line in stream:
        lines.append(line.decode().strip())
        if lines[-1].startswith("data: ") and f"event: {event}" in lines[-3:]:
            id = lines[-2].removeprefix("id: ") if lines[-2].startswith("id: ") else ""
            return id, json.loads(lines[-1].removeprefix("data: "))
    raise AssertionError(f"the stream ended without {event}: {lines}")


@pytest.mark.long
def test_daemon_that_hangs_and_continues(scene: Scene) -> None:
    scene.register("web")
    stream = scene.open("/v1/watch")
    until_event(stream, "sync")
    wait = scene.open("/v1/resolve?name=late&wait=60")
    scene.gauge("waiting", 1)
    block_until(lambda: scene.resolves("web"))
    assert scene.daemon.process is not None
    os.kill(scene.daemon.process.pid, signal.SIGSTOP)
    try:
        assert get(f"{scene.url}/healthz")[0] == 503
        assert scene.resolves("web")
    finally:
        os.kill(scene.daemon.process.pid, signal.SIGCONT)
    assert get(f"{scene.url}/healthz")[0] == 200
    with socket.create_server(("127.0.0.1", 0)) as server:
        scene.register("late", server.getsockname()[1])
        assert wait.readline().split()[1] == b"200"
    assert until_event(stream, "up")[1]["name"] == "late"


def test_daemon_that_dies_and_returns(scene: Scene) -> None:
    scene.register("web")
    stream = scene.open("/v1/watch", "Connection: close")
    position, _ = until_event(stream, "sync")
    wait = scene.open("/v1/resolve?name=late&wait=60")
    scene.gauge("waiting", 1)
    block_until(lambda: scene.resolves("web"))
    scene.daemon.end(signal.SIGKILL)
    assert stream.read().endswith(b"0\r\n\r\n")
    assert wait.readline().split()[1] == b"503"
    assert scene.open("/v1/watch").readline().split()[1] == b"503"
    assert scene.resolves("web")
    scene.daemon.start()
    scene.register("api")
    resumed = scene.open("/v1/watch", f"Last-Event-ID: {position}")
    assert until_event(resumed, "up")[1]["name"] == "api"  # without `reset` or any other event before
    block_until(lambda: scene.resolves("api"))
    assert scene.resolves("web")


def test_daemon_that_returns_with_an_older_registry(scene: Scene, tmp_path: Path) -> None:
    registry = scene.daemon.registry
    scene.register("web")
    scene.daemon.end()
    shutil.copy(registry, tmp_path / "backup.json")
    scene.daemon.start()
    scene.register("api")
    position, _ = until_event(scene.open("/v1/watch"), "sync")
    block_until(lambda: scene.resolves("api"))
    scene.daemon.end()
    registry.with_suffix(".journal").unlink()
    shutil.copy(tmp_path / "backup.json", registry)
    scene.daemon.start()
    stream = scene.open("/v1/watch", f"Last-Event-ID: {position}")
    _, reset = until_event(stream, "reset")
    assert reset
    assert until_event(stream, "up")[1]["name"] == "web"
    until_event(stream, "sync")
    block_until(lambda: not scene.resolves("api"))
    assert scene.resolves("web")


@pytest.mark.long
def test_another_program_at_the_address_before_the_daemon(process: DaemonProcess) -> None:
    """DNS finds the daemon, although another program answered at its address before."""
    process.end()
    with (
        socket.create_server(("127.0.0.1", process.port)) as other,
        serving("--http", "0", "--dns", "0", address=process.addresses[0]) as gateway,
    ):
        port = port_of(gateway.lines(4)[2])
        for junk in (
            b"220 mail\r\n",
            b'{"ok":true}\n',
            b'{"ok":true,"watch":1,"epoch":1,"rev":"x"}\n[]\n',
            b"\xff\0\n",
        ):
            peer, _ = other.accept()
            with peer:
                peer.sendall(junk)
                peer.shutdown(socket.SHUT_WR)
                while peer.recv(65_536):
                    pass
        other.close()
        process.start()
        block_until(lambda: ask(port, "nobody.regd.internal", "A").rcode() == dns.rcode.NXDOMAIN)
        assert gateway.end() == (0, "", "")


@pytest.mark.long
def test_gateway_stops_in_time_whatever_its_clients_do(scene: Scene) -> None:
    """Some clients do not read, are idle or have sent half a request, and the daemon hangs. Nothing is logged."""
    scene.register("web")
    for number in range(300):
        assert scene.command(cmd="register", name="big", instance=str(number), port=1, meta={"a": "x" * 4_000})[
            "ok"
        ]
    with ExitStack() as stack:

        def connect(request: bytes) -> socket.socket:
            peer = stack.enter_context(socket.socket())
            peer.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4_096)
            peer.connect(("127.0.0.1", scene.http))
            peer.sendall(request)
            return peer

        for path in ["/v1/watch", "/v1/prometheus/targets?all=true"] * 10:
            connect(f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode() * 3)
        for beginning in (
            b"",
            b"GET / HT",
            b"GET /v1/resolve?name=late&wait=60 HTTP/1.1\r\nHost: localhost\r\n\r\n",
        ):
            connect(beginning)
        tcp = stack.enter_context(socket.create_connection(("127.0.0.1", scene.dns)))
        wire = dns.message.make_query("big.regd.internal", "SRV").to_wire()
        tcp.sendall((struct.pack("!H", len(wire)) + wire) * 500)
        scene.gauge("watches", 11)  # including the watch for DNS
        assert scene.daemon.process is not None
        os.kill(scene.daemon.process.pid, signal.SIGSTOP)
        try:
            connect(b"GET /v1/list HTTP/1.1\r\nHost: localhost\r\n\r\n")
            scene.gateway.process.terminate()
            assert scene.gateway.process.wait(WAIT_S) == 0  # 0.7 s on an idle machine
        finally:
            os.kill(scene.daemon.process.pid, signal.SIGCONT)
        assert scene.gateway.wait() == (0, "", "")


def descriptors(process: int) -> int:
    return len(os.listdir(f"/proc/{process}/fd"))


@pytest.mark.long
@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="counts descriptors in /proc")
def test_few_files_are_enough(process: DaemonProcess) -> None:
    """With few files it accepts fewer connections. DNS works, and HTTP once other connections are closed."""
    limit = "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (900, 900))"
    with serving("--http", "0", "--dns", "0", address=process.addresses[0], hide=limit) as gateway:
        lines = gateway.lines(4)
        http, port = port_of(lines[0]), port_of(lines[2])
        url = f"http://127.0.0.1:{http}"
        assert get(f"{url}/healthz")[0] == 200
        block_until(lambda: ask(port, "nobody.regd.internal", "A").rcode() == dns.rcode.NXDOMAIN)
        before = descriptors(gateway.process.pid)
        with ExitStack() as stack:
            for _ in range(500):
                stack.enter_context(socket.create_connection(("127.0.0.1", http)))
            for host in ("127.0.0.1", "::1"):
                assert ask(port, "nobody.regd.internal", "A", host).rcode() == dns.rcode.NXDOMAIN
        block_until(lambda: get(f"{url}/healthz")[0] == 200)
        block_until(lambda: descriptors(gateway.process.pid) <= before)
        assert gateway.end() == (0, "", "")


def test_too_few_files() -> None:
    limit = "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))"
    with serving("--http", "0", "--dns", "0", address="127.0.0.1:1", hide=limit) as gateway:
        status, output, errors = gateway.wait()
    assert (status, output) == (4, "")
    assert errors.startswith("regctl: this process may open too few files")
    assert errors.count("\n") == 1


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="counts descriptors in /proc")
def test_gateway_leaks_no_descriptors(scene: Scene) -> None:
    """After requests of every kind, cut at any point, the gateway has as many descriptors as before."""
    requests = [
        f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode()
        for path in (
            "/v1/list",
            "/v1/watch",
            "/v1/resolve?name=late&wait=60",
            "/metrics",
            "/v1/prometheus/targets",
        )
    ]
    wire = dns.message.make_query("web.regd.internal", "SRV").to_wire()
    question = struct.pack("!H", len(wire)) + wire

    def round() -> None:
        for host in ("127.0.0.1", "::1"):
            for port, data in [*((scene.http, request) for request in requests), (scene.dns, question)]:
                for end in (5, len(data)):
                    with socket.create_connection((host, port), WAIT_S) as peer:
                        peer.sendall(data[:end])
                        if end == len(data):
                            assert peer.recv(1 if b"wait" not in data else 0) or b"wait" in data

    round()
    scene.gauge("watches", 1)
    scene.gauge("waiting", 0)
    block_until(lambda: get(f"{scene.url}/healthz")[0] == 200)
    before = descriptors(scene.gateway.process.pid)
    for _ in range(5):
        round()
    scene.gauge("watches", 1)
    scene.gauge("waiting", 0)
    block_until(lambda: descriptors(scene.gateway.process.pid) <= before)


def test_every_state_of_an_instance(scene: Scene) -> None:
    """Only ready instances are in DNS, in whatever order states change."""
    for state in (State.STARTING, State.READY, State.DRAINING, State.READY):
        assert scene.command(cmd="register", name="web", port=5061, state=state)["ok"]
        block_until(lambda expected=state is State.READY: scene.resolves("web") == expected)  # type: ignore[misc]
