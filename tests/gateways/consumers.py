"""A daemon and a gateway for programs that do not speak regd, and a way to run those programs."""

import contextlib
import http.server
import os
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from regd_client import blocking
from tests.gateways.test_serve import serving
from tests.support.daemon import ROOT, WAIT_S, environment

PAGE = ROOT / "regd" / "gateways" / "README.md"
EXAMPLES = ROOT / "regd" / "gateways" / "examples"
FOLLOW_S = 30.0  # for a program to see a change on a busy machine; it takes a second, or 10 s in nginx


class Site:
    """A daemon and a gateway. `register` adds static registrations."""

    def __init__(self, client: blocking.Client, http: int, dns: int) -> None:
        self.client = client
        self.http = http
        self.dns = dns
        self.url = f"http://127.0.0.1:{http}"

    def register(self, name: str, port: int, **more: Any) -> None:
        self.client.register(name, port, static=True, **more)

    def dig(self, *arguments: str) -> str:
        return run("dig", "@127.0.0.1", "-p", str(self.dns), "+time=5", "+tries=1", *arguments)


def block(language: str) -> str:
    """Return the first example in this language on the users' page."""
    return PAGE.read_text().partition(f"```{language}\n")[2].partition("```")[0]


def find_tool(*names: str) -> str:
    """Return the path of the first program that this machine has, or this Python's environment; skip without."""
    path = os.pathsep.join([os.environ.get("PATH", ""), str(Path(sys.executable).parent), "/usr/sbin"])
    for name in names:
        found = shutil.which(name, path=path)
        if found is not None:
            return found
    pytest.skip(f"no {' or '.join(names)} on this machine")


def run(tool: str, *arguments: str, input: str | None = None, before: Sequence[str] = ()) -> str:
    """Run a program that must succeed, and return what it prints. `before` is what runs it, such as `nsenter`."""
    done = subprocess.run(
        [*before, find_tool(tool), *arguments],
        input=input, env=environment(), capture_output=True, text=True, timeout=WAIT_S, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@contextlib.contextmanager
def program(*command: str, log: Path) -> Iterator[None]:
    """Run a server until the end of the block. If the test fails, its last lines are shown."""
    with (
        log.open("w") as output,
        subprocess.Popen(
            command, env=environment(HOME=str(log.parent)), stdout=output, stderr=subprocess.STDOUT
        ) as running,
    ):
        try:
            yield
        except Exception as error:
            error.add_note(log.read_text(errors="replace")[-4_000:])
            raise
        finally:
            running.kill()


def example(name: str, folder: Path, replace: Mapping[str, str]) -> Path:
    """Copy a file of the examples into a folder, with some words replaced, such as the ports."""
    text = (EXAMPLES / name).read_text()
    for old, new in replace.items():
        assert old in text, f"no {old} in {name}"
        text = text.replace(old, new)
    path = folder / name
    path.write_text(text)
    return path


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


@contextlib.contextmanager
def machine(address: str, folder: Path) -> Iterator[tuple[str, ...]]:
    """Run a gateway that is the resolver of a network of its own, and yield what runs a command there."""
    namespaces = ("unshare", "--mount", "--net", "--")
    if shutil.which("ip") is None or shutil.which("nsenter") is None:
        pytest.skip("no ip or nsenter on this machine")
    if subprocess.run([*namespaces, "true"], capture_output=True, check=False).returncode:
        pytest.skip("no namespaces here: only root may make them")
    start = "ip link set lo up"
    for name, text in (("resolv.conf", "nameserver 127.0.0.1\n"), ("nsswitch.conf", "hosts: files dns\n")):
        if not Path("/etc", name).exists():
            pytest.skip(f"no /etc/{name} on this machine")
        (folder / name).write_text(text)
        start += f" && mount --bind '{folder / name}' /etc/{name}"
    before = (*namespaces, "sh", "-c", f'{start} && exec "$@"', "sh")
    with serving("--http", "0", "--dns", "53", address=address, before=before) as running:
        assert running.lines(4)[2] == "listening dns://127.0.0.1:53"
        yield ("nsenter", "--mount", "--net", "--target", str(running.process.pid), "--")


class _Service(http.server.BaseHTTPRequestHandler):
    """Answers every request with its port and path."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        body = f"{self.server.server_port} {self.path}\n".encode()  # type: ignore[attr-defined]
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@contextlib.contextmanager
def services(count: int) -> Iterator[list[int]]:
    """Run HTTP servers in threads, and yield their ports."""
    with contextlib.ExitStack() as stack:
        ports = []
        for _ in range(count):
            server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Service)
            server.daemon_threads = True
            stack.callback(server.server_close)
            thread = threading.Thread(target=server.serve_forever, args=(0.05,))
            thread.start()
            stack.callback(thread.join)
            stack.callback(server.shutdown)
            ports.append(server.server_port)
        yield ports
