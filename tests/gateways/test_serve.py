"""`regctl serve` as a process: its output, exit statuses, signals, and a daemon that starts and ends."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path

import dns.message
import dns.query
import dns.rcode
import pytest

from tests.support.daemon import WAIT_S, DaemonProcess, environment
from tests.support.polling import block_until

STOP_S = 8.0  # for what takes a second, on a busy machine; less than a client waits for a daemon that hangs


class Serving:
    """A process of `regctl serve` on free ports. `before` is the command line to run it under, such as `unshare`."""

    def __init__(self, *flags: str, address: str, hide: str = "pass", before: Sequence[str] = ()) -> None:
        start = f"import sys; {hide}; from regd.cli.regctl import main; raise SystemExit(main())"
        self.process = subprocess.Popen(
            [*before, sys.executable, "-c", start, "serve", *flags],
            env=environment(REGD_ADDRESS=address), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    def lines(self, count: int) -> list[str]:
        assert self.process.stdout is not None
        return [self.process.stdout.readline().rstrip("\n") for _ in range(count)]

    def end(self, number: int = signal.SIGTERM) -> tuple[int, str, str]:
        self.process.send_signal(number)
        return self.wait()

    def wait(self) -> tuple[int, str, str]:
        output, errors = self.process.communicate(timeout=WAIT_S)
        return self.process.returncode, output, errors


@contextlib.contextmanager
def serving(*flags: str, address: str, hide: str = "pass", before: Sequence[str] = ()) -> Iterator[Serving]:
    running = Serving(*flags, address=address, hide=hide, before=before)
    with running.process:
        try:
            yield running
        finally:
            running.process.kill()


def get(url: str) -> tuple[int, bytes]:
    try:
        with urllib.request.urlopen(url, timeout=WAIT_S) as response:
            return response.status, response.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read()


def port_of(url: str) -> int:
    return int(url.rpartition(":")[2])


def ask(port: int, name: str, type: str, host: str = "127.0.0.1") -> dns.message.Message:
    return dns.query.udp(dns.message.make_query(name, type), host, port=port, timeout=WAIT_S)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_serves_until_a_signal(process: DaemonProcess, number: int) -> None:
    with serving("--http", "0", "--dns", "0", address=process.addresses[0]) as running:
        lines = running.lines(4)
        http, dns_port = port_of(lines[0]), port_of(lines[2])
        assert lines == [
            f"listening http://127.0.0.1:{http}",
            f"listening http://[::1]:{http}",
            f"listening dns://127.0.0.1:{dns_port}",
            f"listening dns://[::1]:{dns_port}",
        ]
        for host in ("127.0.0.1", "[::1]", "localhost"):
            assert get(f"http://{host}:{http}/healthz") == (200, b"ok\n")
        stream = urllib.request.urlopen(f"http://127.0.0.1:{http}/v1/watch", timeout=WAIT_S)
        assert stream.readline() == b"retry: 1000\n"
        assert b"event: sync\n" in stream  # reads up to this line
        for host in ("127.0.0.1", "::1"):
            assert ask(dns_port, "example.com", "A", host).rcode() == dns.rcode.REFUSED
        assert running.end(number) == (0, "", "")
        with stream:
            stream.read()  # raises IncompleteRead if the response is not complete


def test_daemon_that_comes_and_goes(process: DaemonProcess) -> None:
    process.end()
    with serving("--http", "0", "--dns", "0", address=process.addresses[0]) as running:
        lines = running.lines(4)
        url, dns_port = lines[0].split()[1], port_of(lines[2])
        assert get(f"{url}/healthz")[0] == 503
        assert ask(dns_port, "web.regd.internal", "A").rcode() == dns.rcode.SERVFAIL
        process.start()
        with socket.create_connection(("127.0.0.1", process.port)) as peer, peer.makefile("rwb") as file:
            file.write(b'{"cmd":"register","name":"web","port":5061}\n')
            file.flush()
            assert json.loads(file.readline())["ok"]
        assert get(f"{url}/v1/resolve?name=web")[0] == 200
        block_until(lambda: ask(dns_port, "web.regd.internal", "A").answer)
        process.end(signal.SIGKILL)
        assert get(f"{url}/v1/resolve?name=web")[0] == 503
        assert ask(dns_port, "web.regd.internal", "A").answer  # from the last known state
        process.start()
        assert get(f"{url}/v1/resolve?name=web")[0] == 200
        assert running.end()[0] == 0


def test_servers_can_be_turned_off(process: DaemonProcess) -> None:
    with serving("--http", "off", "--dns", "0", address=process.addresses[0]) as running:
        assert [line.split(":")[0] for line in running.lines(2)] == ["listening dns"] * 2
        assert running.end()[0] == 0
    with serving("--http", "0", "--dns", "off", address=process.addresses[0]) as running:
        assert [line.split(":")[0] for line in running.lines(2)] == ["listening http"] * 2
        assert running.end()[0] == 0


@pytest.mark.parametrize("family", [socket.SOCK_STREAM, socket.SOCK_DGRAM])
@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_port_that_is_taken(family: socket.SocketKind, host: str) -> None:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, family) as taken:
        taken.bind((host, 0))
        if family == socket.SOCK_STREAM:
            taken.listen()
        port = str(taken.getsockname()[1])
        with serving("--http", "0", "--dns", port, address="127.0.0.1:1") as running:
            status, output, errors = running.wait()
    assert (status, output) == (4, "")
    assert (
        errors
        == f"regctl: port {port} is taken by another program; name another with --dns, or turn it off: --dns off\n"
    )


@pytest.mark.parametrize("module", ["dns", "prometheus_client", "starlette", "uvicorn"])
def test_missing_extra(module: str) -> None:
    with serving(address="127.0.0.1:1", hide=f"sys.modules[{module!r}] = None") as running:
        status, output, errors = running.wait()
    assert (status, output) == (2, "")
    assert "regd[serve]" in errors
    assert errors.count("\n") == 1


@pytest.mark.parametrize(
    "flags", [("--http", "65536"), ("--dns", "-1"), ("--http", "on"), ("--http", "off", "--dns", "off")]
)
def test_usage(flags: tuple[str, ...]) -> None:
    with serving(*flags, address="127.0.0.1:1") as running:
        assert running.wait()[0] == 2


@pytest.mark.long
def test_gateway_stops_in_time_while_its_daemon_hangs(process: DaemonProcess) -> None:
    assert process.process is not None
    with serving("--http", "0", "--dns", "0", address=process.addresses[0]) as running:
        url = running.lines(4)[0].split()[1]
        assert get(f"{url}/healthz")[0] == 200
        os.kill(process.process.pid, signal.SIGSTOP)
        try:
            status, body = get(f"{url}/healthz")
            assert (status, b"no reply within 2 s" in body) == (503, True)
            running.process.terminate()
            assert running.process.wait(STOP_S) == 0
        finally:
            os.kill(process.process.pid, signal.SIGCONT)


def test_the_daemon_and_the_client_import_nothing_of_the_extra(tmp_path: Path) -> None:
    names = "dns prometheus_client starlette uvicorn h11"
    code = (
        "import sys, regd_client, regd.cli.handlers, regd.cli.commands, regd.server.daemon, regd.testing; "
        f"assert not set({names!r}.split()) & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], env=environment(), check=True, timeout=WAIT_S)
