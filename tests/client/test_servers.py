"""Under real servers, a name resolves at any moment only to a server that answers."""

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import IO

import pytest

import regd_client
from regd_client.client import Client
from tests.support.daemon import ROOT, DaemonProcess, environment
from tests.support.ports import free_port

START_S = 30.0  # to start a server and its frameworks on a busy machine

PYTHON = [sys.executable, "-W", "ignore", "-m"]  # ignore warnings of the servers
UVICORN = [*PYTHON, "uvicorn", "--host", "127.0.0.1", "--port", "0", "--log-level", "warning"]
HYPERCORN = [*PYTHON, "hypercorn", "--bind", "127.0.0.1:0", "--log-level", "warning"]
GUNICORN = [*PYTHON, "gunicorn", "--config", "tests/client/gunicorn_conf.py"]
PORT = "PORT"  # replaced with a free port
GRANIAN = [*PYTHON, "granian", "--interface", "asgi", "--host", "127.0.0.1", "--port", PORT, "--no-log"]
RESPAWN = ["--respawn-failed-workers"]  # without it granian ends when one of its workers is killed
SANIC = [*PYTHON, "sanic", "--host", "127.0.0.1", "--port", PORT, "--no-motd", "--no-access-logs"]
SERVERS = {
    "uvicorn": [*UVICORN, "tests.client.asgi_apps:fastapi_app"],
    "uvicorn on uvloop": [*UVICORN, "--loop", "uvloop", "tests.client.asgi_apps:starlette_app"],
    "uvicorn with workers": [*UVICORN, "--workers", "2", "tests.client.asgi_apps:starlette_app"],
    "hypercorn": [*HYPERCORN, "--workers", "0", "tests.client.asgi_apps:fastapi_app"],
    "hypercorn with workers": [*HYPERCORN, "--workers", "2", "tests.client.asgi_apps:starlette_app"],
    "gunicorn": [*GUNICORN, "tests.client.wsgi_app:app"],
    "gunicorn with workers": [*GUNICORN, "--workers", "2", "--threads", "2", "tests.client.wsgi_app:app"],
    "gunicorn with gevent": [*GUNICORN, "--workers", "2", "-k", "gevent", "tests.client.wsgi_app:app"],
    "gunicorn and preload": [*GUNICORN, "--workers", "2", "--preload", "tests.client.wsgi_app:app"],
    "granian": [*GRANIAN, "tests.client.asgi_apps:port_app"],
    "granian with workers": [*GRANIAN, *RESPAWN, "--workers", "2", "tests.client.asgi_apps:port_app"],
    "sanic": [*SANIC, "tests.client.sanic_app:app"],
    "sanic with workers": [*SANIC, "--workers", "2", "tests.client.sanic_app:app"],
    "sanic in one process": [*SANIC, "--single-process", "tests.client.sanic_app:early"],
    "tornado": [*PYTHON, "tests.client.apps", "tornado"],
    "aiohttp": [*PYTHON, "tests.client.apps", "aiohttp"],
    "asyncio": [*PYTHON, "tests.client.apps", "plain"],
    "asyncio and listen": [*PYTHON, "tests.client.apps", "listen"],
}


@contextlib.contextmanager
def serving(
    command: list[str], daemon: DaemonProcess, folder: Path | None = None, log: IO[bytes] | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """Run a server during the block, in a process group that is killed at the end."""
    port = str(free_port())
    process = subprocess.Popen(
        [port if word == PORT else word for word in command],
        cwd=folder or ROOT,
        env=environment(REGD_ADDRESS=daemon.addresses[0], WEB_PORT=port),
        start_new_session=True,
        stderr=log,
    )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


class Dropped(Exception):
    """The server accepted the connection and closed it before it had answered."""


async def fetch(endpoint: regd_client.Endpoint, path: str = "/") -> int:
    """Send a GET request and return the reply, which is the pid of the server's process."""
    reader, writer = await asyncio.open_connection(endpoint.host, endpoint.port)
    try:
        writer.write(f"GET {path} HTTP/1.1\r\nHost: there\r\nConnection: close\r\n\r\n".encode())
        head, _, body = (await reader.read()).partition(b"\r\n\r\n")
    finally:
        writer.close()
    if not body:  # servers send the head and the body separately, and may be killed in between
        raise Dropped
    assert head.startswith(b"HTTP/1.1 200 "), head
    return int(body)


class Caller:
    """Resolves and calls the service in a loop, and counts the answers. Every resolved server must answer."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._moved = asyncio.Event()
        self.answered = 0
        self.missing = 0  # consecutive NotFound errors
        self.last = 0
        self.may_be_dropped = False

    async def run(self) -> None:
        while True:
            try:
                endpoint = await self._client.resolve("web")
            except regd_client.NotFound:
                self.missing += 1
                await asyncio.sleep(0)
            else:
                try:
                    self.last = await fetch(endpoint)
                except (Dropped, ConnectionError):
                    assert self.may_be_dropped
                self.answered += 1
                self.missing = 0
            self._moved.set()

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(START_S):
            while not condition():
                self._moved.clear()
                await self._moved.wait()

    async def more(self, count: int = 20) -> None:
        """Wait for `count` more answers."""
        target = self.answered + count
        await self.until(lambda: self.answered >= target)


@contextlib.asynccontextmanager
async def calling(daemon: DaemonProcess) -> AsyncIterator[tuple[Client, Caller]]:
    async with Client(daemon.addresses[0]) as client:
        caller = Caller(client)
        async with asyncio.TaskGroup() as group:
            task = group.create_task(caller.run())
            yield client, caller
            task.cancel()


async def until_owners(client: Client, condition: Callable[[list[int]], bool]) -> list[int]:
    async with asyncio.timeout(START_S):
        while not condition(pids := await owners(client)):
            await asyncio.sleep(0.01)
    return pids


async def owners(client: Client) -> list[int]:
    try:
        [instance] = (await client.why("web"))["instances"]
    except (regd_client.NotFound, ValueError):
        return []
    return [owner["pid"] for owner in instance["owners"]]


@pytest.mark.sample(9)
@pytest.mark.sample(9)
@pytest.mark.parametrize("server", SERVERS)
async def test_every_resolved_server_answers(server: str, process: DaemonProcess) -> None:
    """From before its start until after its end, no connection is refused and no request is unanswered."""
    async with calling(process) as (client, caller):
        with serving(SERVERS[server], process) as running:
            await caller.more()
            if server.split()[0] in ("granian", "hypercorn", "sanic", "uvicorn") and server.endswith("workers"):
                # Granian ignores an earlier SIGTERM; a worker that starts late may register when the others have left.
                await until_owners(client, lambda pids: len(pids) == 2)
            # Hypercorn's workers get no signal that could be delayed, and drop new connections. Its master kills
            # the remaining workers as soon as one has ended. Sanic's outermost hooks withdraw the name after the
            # port is closed.
            caller.may_be_dropped = server in ("hypercorn with workers", "sanic in one process")
            running.terminate()
            await caller.until(lambda: caller.missing > 100)
            await until_owners(client, lambda pids: not pids)  # a worker may still have been draining
            assert await client.instances() == []
            if server not in ("sanic", "sanic with workers"):  # Sanic may hang, also without regd: see SERVERS.md
                assert await asyncio.to_thread(running.wait, START_S) in (0, -signal.SIGTERM)
        departures = (await client.why("web"))["departures"]
        assert {departure["reason"] for departure in departures} == {"deregistered"}  # a late worker adds one


@pytest.mark.sample(4)
@pytest.mark.parametrize("server", ["uvicorn with workers", "hypercorn with workers", "granian with workers"])
async def test_workers_share_one_registration(server: str, process: DaemonProcess) -> None:
    async with calling(process) as (client, caller):
        with serving(SERVERS[server], process):
            async with asyncio.timeout(START_S):
                while len(both := await owners(client)) < 2:
                    await caller.more(1)
            [instance] = await client.instances()
            caller.may_be_dropped = True  # the killed worker may drop a connection
            if server == "hypercorn with workers":
                return  # Hypercorn ends when one of its workers is killed
            os.kill(both[0], signal.SIGKILL)
            await caller.until(lambda: caller.last == both[1])
            async with asyncio.timeout(START_S):
                while both[0] in await owners(client):
                    await asyncio.sleep(0)
            assert (await client.instances())[0]["port"] == instance["port"]


APP = """
import os
import regd_client
from fastapi import FastAPI
app = FastAPI(lifespan=regd_client.lifespan("web"))
@app.get("/")
async def answer() -> int:
    return os.getpid()
"""


@pytest.mark.long
async def test_reload(process: DaemonProcess, tmp_path: Path) -> None:
    program = tmp_path / "app.py"
    program.write_text(APP)
    command = [*UVICORN, "--reload", "--reload-dir", str(tmp_path), "app:app"]
    async with calling(process) as (client, caller):
        with serving(command, process, tmp_path):
            await caller.more()
            before = caller.last
            edited = tmp_path / "edited"
            edited.write_text(APP + "# edited\n")
            os.utime(edited, (2_000_000_000, 2_000_000_000))
            edited.replace(program)  # one change, or uvicorn could load the program twice
            await caller.until(lambda: caller.last not in (0, before))
            # A connection to the old process may wait until the new one accepts it, before that is registered.
            await until_owners(client, lambda pids: pids == [caller.last])


# gunicorn, whose master process registers the name.

WSGI = """
import os, pathlib, time
here = pathlib.Path(__file__).parent

def until(name):
    (here / f"{name}.begun").touch()
    while not (here / f"{name}.may_go_on").exists():
        time.sleep(0.01)

if (here / "slow").exists():
    until("import")

def app(environ, start):
    if environ["PATH_INFO"] == "/slow":
        until("request")
    (here / "served").touch()
    body = str(os.getpid()).encode()
    start("200 OK", [("Content-Length", str(len(body)))])
    return [body]
"""
KINDS = {
    "sync": ["-k", "sync"],
    "gthread": ["--threads", "4"],
    "gevent": ["-k", "gevent"],
    "gevent in the master, too": ["-k", "gevent", "--config", "gevent_conf.py"],
}


def gunicorn(folder: Path, *arguments: str) -> list[str]:
    config = (ROOT / "tests" / "client" / "gunicorn_conf.py").read_text()
    (folder / "gunicorn_conf.py").write_text(config)
    (folder / "gevent_conf.py").write_text("from gevent import monkey\nmonkey.patch_all()\n" + config)
    (folder / "application.py").write_text(WSGI)
    return [*PYTHON, "gunicorn", "--config", "gunicorn_conf.py", *arguments, "application:app"]


async def until_exists(path: Path) -> None:
    async with asyncio.timeout(START_S):
        while not path.exists():  # noqa: ASYNC240
            await asyncio.sleep(0.01)


@pytest.mark.sample(4)
@pytest.mark.parametrize("kind", KINDS)
async def test_request_in_progress_at_sigterm_is_answered(
    kind: str, process: DaemonProcess, tmp_path: Path
) -> None:
    async with Client(process.addresses[0]) as client:
        with serving(gunicorn(tmp_path, *KINDS[kind]), process, tmp_path) as running:
            endpoint = await client.resolve("web", wait=START_S)
            under_way = asyncio.create_task(fetch(endpoint, "/slow"))
            await until_exists(tmp_path / "request.begun")
            running.terminate()
            assert await until_owners(client, lambda pids: not pids) == []
            assert not under_way.done()
            (tmp_path / "request.may_go_on").touch()
            assert await under_way > 0
            assert await asyncio.to_thread(running.wait, START_S) == 0
        [departure] = (await client.why("web"))["departures"]
        assert departure["reason"] == "deregistered"


async def test_reload_with_a_slow_import_keeps_the_name(process: DaemonProcess, tmp_path: Path) -> None:
    async with Client(process.addresses[0]) as client:
        with serving(gunicorn(tmp_path), process, tmp_path) as running:
            endpoint = await client.resolve("web", wait=START_S)
            before = await fetch(endpoint)
            assert await owners(client) == [running.pid]
            (tmp_path / "slow").touch()
            running.send_signal(signal.SIGHUP)
            await until_exists(tmp_path / "import.begun")
            waiting = [asyncio.create_task(fetch(await client.resolve("web"))) for _ in range(3)]
            (tmp_path / "import.may_go_on").touch()
            after = [await task for task in waiting]
            async with asyncio.timeout(START_S):
                while await fetch(await client.resolve("web")) == before:
                    pass
            assert all(after)
            assert (await client.why("web"))["departures"] == []


async def test_workers_with_max_requests_keep_the_name(process: DaemonProcess, tmp_path: Path) -> None:
    async with calling(process) as (client, caller):
        caller.may_be_dropped = True  # a gunicorn worker drops new connections at its end
        with serving(gunicorn(tmp_path, "--workers", "2", "--max-requests", "3"), process, tmp_path):
            await caller.more(1)
            rev = (await client.hello())["rev"]
            first = caller.last
            await caller.more(20)
            await caller.until(lambda: caller.last != first)
            assert caller.missing == 0
            assert (await client.hello())["rev"] == rev


async def test_name_stays_registered_during_an_upgrade(process: DaemonProcess, tmp_path: Path) -> None:
    """After SIGUSR2, a second master with the same port joins the registration, and the old master leaves it."""
    async with Client(process.addresses[0]) as client:
        with serving(gunicorn(tmp_path), process, tmp_path) as running:
            endpoint = await client.resolve("web", wait=START_S)
            running.send_signal(signal.SIGUSR2)
            pids = await until_owners(client, lambda pids: len(pids) == 2)
            [upgraded] = set(pids) - {running.pid}
            async with asyncio.timeout(START_S):
                while len({await fetch(endpoint) for _ in range(10)}) < 2:  # until the new master has a worker
                    pass
            running.terminate()
            assert await asyncio.to_thread(running.wait, START_S) == 0
            assert await until_owners(client, lambda pids: len(pids) == 1) == [upgraded]
            assert (await client.resolve("web")).port == endpoint.port
            assert await fetch(endpoint) > 0
            assert (await client.why("web"))["departures"] == []
            os.kill(upgraded, signal.SIGTERM)
            await until_owners(client, lambda pids: not pids)
        [departure] = (await client.why("web"))["departures"]
        assert departure["reason"] == "deregistered"


@pytest.mark.long
async def test_master_is_registered_when_the_daemon_starts(tmp_path: Path) -> None:
    with DaemonProcess(tmp_path / "registry.json") as daemon:
        daemon.start()
        daemon.end()
        log = tmp_path / "log"
        with log.open("wb") as written, serving(gunicorn(tmp_path), daemon, tmp_path, written) as running:
            async with asyncio.timeout(START_S):
                while "not registered yet" not in log.read_text():
                    await asyncio.sleep(0.01)
            daemon.start()
            async with Client(daemon.addresses[0]) as client:
                assert await fetch(await client.resolve("web", wait=START_S)) > 0
                assert await owners(client) == [running.pid]
            assert (
                log.read_text().count("not registered yet") == log.read_text().count("is registered now, at") == 1
            )
