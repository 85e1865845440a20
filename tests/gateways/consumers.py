"""A daemon and a gateway for programs that do not speak regd's protocol, and functions to run such programs."""

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from regd_client import blocking
from tests.gateways.test_serve import serving
from tests.support.daemon import ROOT, WAIT_S, environment
from tests.support.http_service import HttpHandler, http_service

PAGE = ROOT / "regd" / "gateways" / "README.md"
EXAMPLES = ROOT / "regd" / "gateways" / "examples"
FOLLOW_S = 30.0  # for a program to notice a change on a busy machine; usually it takes 1 s, in nginx 10 s


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
    """Return the path of the first of these programs that is installed. Skip the test if there is none."""
    path = os.pathsep.join([os.environ.get("PATH", ""), str(Path(sys.executable).parent), "/usr/sbin"])
    for name in names:
        found = shutil.which(name, path=path)
        if found is not None:
            return found
    pytest.skip(f"no {' or '.join(names)} on this machine")


def run(tool: str, *arguments: str, input: str | None = None, before: Sequence[str] = ()) -> str:
    """Run a program that must succeed, and return its output. `before` precedes the command line (`nsenter`)."""
    done = subprocess.run(
        [*before, find_tool(tool), *arguments],
        input=input, env=environment(), capture_output=True, text=True, timeout=WAIT_S, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@contextlib.contextmanager
def program(*command: str, log: Path) -> Iterator[None]:
    """Run a server until the end of the block. If the test fails, print the last lines of its log."""
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


@contextlib.contextmanager
def machine(address: str, folder: Path) -> Iterator[tuple[str, ...]]:
    """Run a gateway that is the resolver of its own network namespace. Yield a prefix to run commands there."""
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


class _Service(HttpHandler):
    """Answers every request with its port and path."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.answer(f"{self.server.server_port} {self.path}\n".encode())  # type: ignore[attr-defined]


@contextlib.contextmanager
def services(count: int) -> Iterator[list[int]]:
    """Run HTTP servers, and yield their ports."""
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(http_service(_Service)) for _ in range(count)]
