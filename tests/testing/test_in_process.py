"""`regd.testing.in_process`: each method with the real client, and no process-wide change except REGD_ADDRESS."""

import asyncio
import contextlib
import logging
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import regd_client
from regd.core.transaction import Transaction
from regd.testing import HostError, Registry, in_process, running
from regd.testing.in_process import InProcessRegistry
from regd_client import Client, blocking
from regd_client.blocking import BlockingConnection
from tests.support.daemon import QUIET_ASYNCIO, WAIT_S
from tests.support.polling import until
from tests.testing.suites import Suite, clean


@pytest.fixture
def registry() -> Iterator[InProcessRegistry]:
    with in_process.running() as made:
        yield made


@pytest.fixture
async def client(registry: InProcessRegistry) -> AsyncIterator[Client]:
    async with Client() as made:
        yield made


def names(registry: Registry) -> list[str]:
    return [instance["name"] for instance in registry.instances()]


def ask(connection: BlockingConnection, cmd: str, **arguments: Any) -> dict[str, Any]:
    reply = connection.ask(cmd, **arguments)
    assert reply["ok"], reply
    return reply


@contextlib.asynccontextmanager
async def events(client: Client) -> AsyncIterator[Callable[[], Any]]:
    """Follow from now on; what is given returns the next event in a few words."""
    async with contextlib.aclosing(client.watch()) as told:
        while (await anext(told)).kind != "sync":
            pass

        async def following() -> str:
            async with asyncio.timeout(WAIT_S):
                event = await anext(told)
            assert event.endpoint is not None
            return f"{event.kind} {event.endpoint} {event.reason}".strip()

        yield following


def python(program: str, *flags: str, **variables: str) -> subprocess.CompletedProcess[str]:
    quiet = QUIET_ASYNCIO if "dev" in flags else ""
    return subprocess.run(
        [sys.executable, *flags, "-c", quiet + program], env=clean(**variables), capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip


# What has happened to registrations. The first part holds for a registry in a process of its own, too.


@pytest.fixture(params=[in_process.running, running], ids=["thread", "process"])
def either(request: pytest.FixtureRequest) -> Iterator[Registry]:
    with request.param() as made:
        yield made


def test_registrations_of_others(either: Registry) -> None:
    assert str(either.register("db", 5432, host="db.example")) == "db.example:5432"
    assert either.register("web", 80, instance="a", meta={"zone": "a"}, state="starting").meta == {"zone": "a"}
    with pytest.raises(regd_client.NotFound):
        blocking.resolve("web")
    either.update("web", state="ready", instance="a")
    assert blocking.resolve("web", meta={"zone": "a"}).port == 80
    either.update("web", {}, instance="a")
    assert either.instances("w*")[0]["meta"] == {}
    assert [instance["name"] for instance in either.instances("db")] == ["db"]
    either.deregister("db")
    assert names(either) == ["web"]


def test_priorities(either: Registry) -> None:
    primary = either.register("db", 5432, instance="1")
    standby = either.register("db", 5433, instance="2", priority=9)
    assert (primary.priority, standby.priority) == (0, 9)
    assert [blocking.resolve("db") for _ in range(3)] == [primary] * 3
    assert [instance.get("priority") for instance in either.instances()] == [None, 9]
    either.update("db", priority=10, instance="1")
    assert [blocking.resolve("db") for _ in range(3)] == [standby] * 3
    with either.away():
        pass
    assert [instance.get("priority") for instance in either.instances()] == [10, 9]
    with pytest.raises(regd_client.BadArgument):
        either.update("db", instance="1")


async def test_somebody_takes_a_name(either: Registry) -> None:
    async with regd_client.register("web", 80) as registration:
        with pytest.raises(regd_client.Conflict):
            either.register("web", 81)
        either.register("web", 81, force=True)
        async with asyncio.timeout(WAIT_S):
            await registration.lost.wait()
        assert registration.lost_reason == "replaced"
    assert (await regd_client.resolve("web")).port == 81


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (lambda registry: registry.register("NO", 1), regd_client.BadArgument),
        (lambda registry: registry.instances("a*b"), regd_client.BadArgument),
        (lambda registry: registry.update("nobody", {}), regd_client.NotFound),
        (lambda registry: registry.update("nobody"), regd_client.BadArgument),
        (lambda registry: registry.deregister("nobody"), regd_client.NotFound),
    ],
)
def test_calls_that_are_refused(
    either: Registry, call: Callable[[Registry], object], error: type[Exception]
) -> None:
    with pytest.raises(error):
        call(either)


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (lambda registry: registry.kill("nobody"), regd_client.NotFound),
        (lambda registry: registry.kill("db", "other"), regd_client.NotFound),
        (lambda registry: registry.expire("nobody"), regd_client.NotFound),
        (lambda registry: registry.advance(-1), ValueError),
        (lambda registry: registry.advance(float("nan")), ValueError),
        (lambda registry: registry.port, AttributeError),
    ],
)
def test_calls_that_are_refused_here(
    registry: InProcessRegistry, call: Callable[[InProcessRegistry], object], error: type[Exception]
) -> None:
    registry.register("db", 1)
    with pytest.raises(error):
        call(registry)
    assert names(registry) == ["db"]


@pytest.mark.parametrize(("verb", "reason"), [("kill", "process exited"), ("expire", "ttl expired")])
async def test_kill_and_expire(registry: InProcessRegistry, client: Client, verb: str, reason: str) -> None:
    end = getattr(registry, verb)
    registry.register("db", 1)
    held = await client.register("web", 2)
    await client.register("web", 3, instance="b")
    with blocking.register("api", 4) as registration, BlockingConnection() as other:
        ask(other, "register", name="leased", port=5, ttl=10)
        async with events(client) as event:
            for name, port in (("db", 1), ("web", 2), ("api", 4), ("leased", 5)):
                end(name)
                assert await event() == f"down 127.0.0.1:{port} {reason}"
                with pytest.raises(regd_client.NotFound):
                    await client.resolve(name, instance="")
            end("web", "b")
            assert await event() == f"down 127.0.0.1:3 {reason}"
        assert not registration.lost
    with pytest.raises(regd_client.NotFound) as raised:
        blocking.resolve("db")
    assert raised.value.details["last"]["reason"] == reason
    assert [departure["reason"] for departure in (await client.why("web"))["departures"]] == [reason, reason]
    assert not held.lost.is_set()
    await held.deregister()
    assert names(registry) == []


def test_expire_ends_one_lease_without_waiting(registry: InProcessRegistry) -> None:
    with BlockingConnection() as connection:
        for name in ("a", "b"):
            ask(connection, "register", name=name, port=1, ttl=86_400)
        registry.expire("a")
        assert names(registry) == ["b"]
        assert connection.ask("renew", name="a")["error"] == "not_found"
        ask(connection, "renew", name="b")
        ask(connection, "register", name="a", port=1, ttl=60)
        assert names(registry) == ["a", "b"]


async def test_real_process_dies(registry: InProcessRegistry, client: Client) -> None:
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE) as process:  # noqa: ASYNC220
        await client.register("web", 80, pid=process.pid)
        async with events(client) as event:
            process.kill()
            assert await event() == "down 127.0.0.1:80 process exited"


# Time. It also passes by itself: on a busy machine, by some seconds.


def test_advance_expires_unrenewed_leases(registry: InProcessRegistry) -> None:
    with BlockingConnection() as connection:
        for name, ttl in (("short", 100), ("renewed", 100), ("long", 3_600)):
            ask(connection, "register", name=name, port=1, ttl=ttl)
        registry.advance(60)
        ask(connection, "renew", name="renewed")
        registry.advance(50)
        assert names(registry) == ["long", "renewed"]
        assert connection.ask("resolve", name="short")["last"]["reason"] == "ttl expired"
        registry.advance(0)
        registry.advance(3_600)
        assert names(registry) == []


async def test_advance_ends_a_wait(registry: InProcessRegistry, client: Client) -> None:
    waiting = asyncio.create_task(client.resolve("web", wait=3_000))
    while not (await client.stats())["waiting"]:
        pass
    registry.advance(2_900)
    await client.ping()
    assert not waiting.done()
    registry.advance(100)
    with pytest.raises(regd_client.Timeout):
        await waiting


def test_advance_ends_unclaimed_entries_after_a_restart(registry: InProcessRegistry) -> None:
    registry.register("static", 1)
    with BlockingConnection() as connection:
        ask(connection, "register", name="held", port=1, hold=True)
        registry.restart()
    registry.advance(15)
    assert names(registry) == ["held", "static"]
    registry.advance(15)
    assert names(registry) == ["static"]
    with BlockingConnection() as connection:
        assert connection.ask("resolve", name="held")["last"]["reason"] == "connection closed"


def test_daemon_clock_runs_by_itself(registry: InProcessRegistry, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also when a test has frozen the time of its process; `registered_at` is the test's."""
    for name, value in (("time", 1_600_000_000.0), ("monotonic", 5.0), ("perf_counter", 5.0)):
        monkeypatch.setattr(time, name, lambda value=value: value)
    with BlockingConnection() as connection:
        ask(connection, "register", name="web", port=1, state="starting")
        assert connection.ask("resolve", name="web", wait=0.05)["error"] == "timeout"
    assert registry.instances()[0]["registered_at"] == 1_600_000_000.0


# The daemon's life.


async def test_cut(registry: InProcessRegistry, client: Client) -> None:
    registry.register("static", 1)
    with blocking.register("blocking", 2), BlockingConnection() as connection:
        ask(connection, "register", name="raw", port=3, hold=True)
        ask(connection, "register", name="leased", port=4, ttl=10)
        async with client.register("web", 5) as registration, client.mirror() as mirror:
            on = registration._connection
            waiting = asyncio.ensure_future((await client._connect()).ask("resolve", {"name": "x", "wait": 9}))
            await client.ping()
            registry.cut()
            assert not {"raw", "web"} & set(names(registry))  # this loop has not seen it yet
            with pytest.raises(regd_client.Unavailable):
                connection.ask("ping")
            with pytest.raises(regd_client.Unavailable):
                await waiting
            await registration.update({"k": "v"})  # waits until it is back
            assert registration._connection is not on
            await until(lambda: mirror.live and names(registry) == ["blocking", "leased", "static", "web"])
            await until(lambda: mirror.resolve("web").meta == {"k": "v"})  # the event may come after the reply
            assert not registration.lost.is_set()


async def test_away(registry: InProcessRegistry, client: Client) -> None:
    registry.register("db", 5432)
    with blocking.register("blocking", 1):
        async with client.mirror() as mirror, client.register("web", 80) as registration:
            on = registration._connection
            with registry.away():
                await until(lambda: not mirror.live)
                assert mirror.resolve("db").stale_s > 0
                with pytest.raises(regd_client.Unavailable):
                    async with Client(connect_timeout_s=0.01) as other:
                        await other.ping()
                with pytest.raises(regd_client.Unavailable, match="no regd at unix:"):
                    BlockingConnection()
                for call in (lambda: registry.kill("db"), lambda: registry.advance(1), registry.instances):
                    with pytest.raises(regd_client.Unavailable):
                        call()
                registry.cut()
                assert "stopped" in registry.described()
                assert '"db": {"port": 5432' in registry.described()
                registry.stop()  # idempotent
            assert {"blocking", "db", "web"} == set(names(registry))  # claimed already, or waiting for it
            await until(lambda: mirror.live and registration._connection is not on)
            assert not registration.lost.is_set()
    assert names(registry) == ["db"]


async def test_wait_continues_across_a_restart(registry: InProcessRegistry, client: Client) -> None:
    async with regd_client.listen("other") as listening:
        waiting = asyncio.create_task(client.resolve("web", wait=WAIT_S))
        while not (await client.stats())["waiting"]:
            pass
        registry.restart()
        registry.start()  # idempotent
        registry.register("web", listening.port)
        assert (await waiting).port == listening.port


def test_restart_for_the_blocking_client(registry: InProcessRegistry) -> None:
    with blocking.register("web", 80) as registration:
        registry.restart()
        registration.update({"k": "v"})
        assert blocking.resolve("web").meta == {"k": "v"}
    assert names(registry) == []


# Coming and going.


def left_behind(before: dict[str, set[Any]]) -> list[str]:
    """Return what there is now and was not before, by its kind. Threads and files of earlier tests may end."""
    return [kind for kind, things in state().items() if things - before[kind]]


def state() -> dict[str, set[Any]]:
    return {
        "environment": set(os.environ.items()),
        "threads": {thread for thread in threading.enumerate() if thread.name != "regd-client"},
        "folders": {name for name in os.listdir(tempfile.gettempdir()) if name.startswith("regd-")},
        "files": set(open_files()),
    }


def open_files() -> Iterator[str]:
    """Yield the number and the target of each file descriptor."""
    for number in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # the descriptor of the list itself
            yield f"{number} {os.readlink(f'/proc/self/fd/{number}')}"


@pytest.fixture
def own_folder(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A temporary folder for this test alone: in the usual one, other processes make registries meanwhile."""
    with tempfile.TemporaryDirectory() as folder:  # short: in a long one the socket would be made elsewhere
        monkeypatch.setattr(tempfile, "tempdir", folder)
        yield


@pytest.mark.parametrize("away", [False, True])
def test_error_inside_the_block(away: bool, own_folder: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REGD_ADDRESS", "tcp://127.0.0.1:1")
    monkeypatch.setenv("REGD_AUTOSTART", "1")
    before = state()
    with pytest.raises(ZeroDivisionError), in_process.running() as registry:  # noqa: PT012
        assert left_behind(before) == ["environment", "threads", "folders", "files"]
        with registry.away() if away else contextlib.nullcontext():
            raise ZeroDivisionError
    assert left_behind(before) == []
    registry.end()
    for call in (registry.restart, registry.stop, lambda: registry.kill("a"), registry.cut):
        with pytest.raises(HostError, match="has ended"):
            call()


def test_registry_that_cannot_start(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(InProcessRegistry, "_listener", lambda self: os.open("/nowhere", os.O_RDONLY))
    before = state()
    with pytest.raises(FileNotFoundError), in_process.running():
        raise AssertionError("it runs")
    assert left_behind(before) == []


def test_unix_sockets_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """As pytest-socket does it: whoever makes one has to say its family."""

    class Guarded(socket.socket):
        def __init__(self, family: int = -1, *more: Any, **named: Any) -> None:
            assert family == socket.AF_UNIX
            super().__init__(family, *more, **named)

    monkeypatch.setattr(socket, "socket", Guarded)
    with in_process.running() as registry:
        registry.register("db", 1)
        registry.restart()
        assert names(registry) == ["db"]


def test_temporary_folder_with_a_long_path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    folder = tmp_path / ("x" * 100)
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    with in_process.running() as registry:
        registry.register("db", 1)
        assert blocking.resolve("db").port == 1


def test_two_at_once() -> None:
    with in_process.running() as outer:
        outer.register("outer", 1)
        with in_process.running() as inner:
            inner.register("inner", 1)
            assert (names(outer), names(inner)) == (["outer"], ["inner"])
            assert os.environ["REGD_ADDRESS"] == inner.address == str(inner)
            assert blocking.resolve("inner").port == 1
            inner.advance(100)
            outer.restart()
            outer.kill("outer")
            assert (names(outer), names(inner)) == ([], ["inner"])
        assert os.environ["REGD_ADDRESS"] == outer.address
        with pytest.raises(regd_client.Unavailable):
            inner.instances()


async def test_registrations_are_lost_when_the_registry_ends() -> None:
    """And goes to no other daemon."""
    async with contextlib.AsyncExitStack() as stack:
        with in_process.running():
            client = await stack.enter_async_context(Client())
            registration = await client.register("web", 80)
            thread = blocking.register("blocking", 81)
        with in_process.running() as other:
            async with asyncio.timeout(WAIT_S):
                await registration.lost.wait()
            assert registration.lost_reason == "deregistered"
            await until(lambda: thread.lost)
            await until(lambda: client._connector.usable is None)
            await client.ping()
            await registration.deregister()
            thread.deregister()
            assert names(other) == []


def ask_until_it_breaks(connection: BlockingConnection) -> None:
    while True:
        connection.ask("ping")


def test_daemon_bug_is_reported(
    own_folder: None, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*given: object) -> None:
        raise ZeroDivisionError

    before = state()
    with contextlib.ExitStack() as stack:
        registry = stack.enter_context(in_process.running())
        registry.register("db", 1)
        connection = stack.enter_context(BlockingConnection())
        monkeypatch.setattr(Transaction, "drop", fail)
        with pytest.raises(ZeroDivisionError):
            registry.kill("db")
        with pytest.raises(regd_client.Unavailable):
            ask_until_it_breaks(connection)
        with pytest.raises(HostError, match="has failed"):
            registry.cut()
        with pytest.raises(HostError, match="ZeroDivisionError"):
            registry.end()
    assert left_behind(before) == []
    assert [record.levelno for record in caplog.records] == [logging.CRITICAL]


def test_process_wide_state_is_unchanged() -> None:
    program = """
import asyncio, gc, logging, os, resource, signal, socket, sys, threading, time
from regd.testing import in_process
from regd_client import blocking

resource.setrlimit(resource.RLIMIT_NOFILE, (256, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
os.environ["REGD_AUTOSTART"] = "0"

def state():
    umask = os.umask(0o22)
    os.umask(umask)
    return {
        "signals": [signal.getsignal(each) for each in signal.valid_signals()],
        "mask": signal.pthread_sigmask(signal.SIG_BLOCK, ()),
        "wakeup": wakeup(),
        "limits": [resource.getrlimit(getattr(resource, each)) for each in dir(resource) if each[:7] == "RLIMIT_"],
        "collector": (gc.get_threshold(), gc.get_freeze_count(), gc.isenabled(), gc.get_debug(), len(gc.callbacks)),
        "switches": sys.getswitchinterval(),
        "hooks": (sys.excepthook, sys.unraisablehook, threading.excepthook, sys.gettrace(), sys.getprofile()),
        "logging": [(each, logging.getLogger(each).level, logging.getLogger(each).handlers,
                     logging.getLogger(each).disabled) for each in (None, "regd", "asyncio", "regd_client")],
        "handlers": logging._handlers.data if hasattr(logging._handlers, "data") else 0,
        "folder": os.getcwd(),
        "umask": umask,
        "priority": os.getpriority(os.PRIO_PROCESS, 0),
        "timeout": socket.getdefaulttimeout(),
        "policy": policy(),
        "loop": no_loop(),
        "streams": (sys.stdout, sys.stderr, sys.path[:], sys.argv[:]),
    }

def wakeup():
    number = signal.set_wakeup_fd(-1)
    signal.set_wakeup_fd(number)
    return number

def policy():
    return asyncio.events._event_loop_policy

def no_loop():
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None

environment, threads = dict(os.environ), threading.enumerate()
before = state()
with in_process.running() as registry:
    registry.register("db", 1)
    registry.restart()
    registry.advance(60)
    registry.kill("db")
    registry.cut()
    during = state()
    assert [key for key in before if before[key] != during[key]] == []
    other = {key for key in os.environ | environment if os.environ.get(key) != environment.get(key)}
    assert other == {"REGD_ADDRESS", "REGD_AUTOSTART"}, other
    assert len(threading.enumerate()) == len(threads) + 3  # the loop, and those that write
after = state()
assert [key for key in before if before[key] != after[key]] == []
assert os.environ == environment
assert threading.enumerate() == threads
assert not {"regd.cli.regd", "ctypes"} & set(sys.modules)  # who sets the allocator
"""
    done = python(program, "-X", "dev", "-W", "error")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_program_that_never_leaves_the_block_ends() -> None:
    done = python(
        "from regd.testing import in_process\n"
        "made = in_process.running()\n"
        "made.__enter__().register('db', 1)\n"
        "print('end')\n"
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "end\n", "")


# Threads, loops, processes.


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
def test_inside_a_loop_of_the_caller(loop: str) -> None:
    pytest.importorskip(loop)
    program = f"""
import asyncio, regd_client, {loop}
from regd.testing import in_process

async def main():
    with in_process.running() as registry:
        async with regd_client.register("web", 80):
            registry.cut()
            assert (await regd_client.resolve("web", instance="") if registry.instances() else None) is None
            registry.restart()
    with in_process.running() as registry:
        async with regd_client.listen("web") as listening:
            assert (await regd_client.resolve("web", wait=10)).port == listening.port
            with registry.away():
                await asyncio.sleep(0)

{loop}.run(main())
"""
    done = python(program, "-W", "error")
    assert (done.returncode, done.stderr) == (0, "")


def test_many_threads(registry: InProcessRegistry) -> None:
    """Each on a loop of its own: all that they wrote is there, and each change was told once, in order."""
    threads, each_does = 6, 25
    told: list[int] = []

    async def follow() -> None:
        async with Client() as client:
            all_told = asyncio.Event()

            def hear(event: dict[str, int]) -> None:
                if "event" in event:
                    told.append(event["rev"])
                    if event["rev"] == threads * each_does:
                        all_told.set()

            await (await client._connect()).ask("watch", {}, hear)
            for thread in working:
                thread.start()
            async with asyncio.timeout(WAIT_S):
                await all_told.wait()

    async def work(number: int) -> None:
        async with Client() as client:
            for n in range(each_does):
                await client.register(f"s{number}", 1 + n, instance=str(n), static=True)

    working = [threading.Thread(target=lambda n=n: asyncio.run(work(n))) for n in range(threads)]
    asyncio.run(follow(), debug=True)
    for thread in working:
        thread.join(WAIT_S)
    assert told == list(range(threads * each_does + 1))
    assert len(registry.instances()) == threads * each_does


def test_many_threads_call_at_once(registry: InProcessRegistry) -> None:
    def use(name: str) -> None:
        try:
            for _ in range(10):
                registry.register(name, 1)
                registry.kill(name)
            done.append(name)
        except BaseException as error:
            done.append(repr(error))

    done: list[str] = []
    threads = [threading.Thread(target=use, args=(f"n{number}",)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(done) == [f"n{number}" for number in range(6)]


def test_forked_child() -> None:
    """It reaches the daemon as any process does, and does not keep its sockets open."""
    program = """
import os, sys, regd_client
from regd.testing import HostError, in_process
from regd_client.blocking import BlockingConnection

with in_process.running() as registry:
    registry.register("db", 5432)
    waiting = BlockingConnection()
    ended, end = os.pipe()
    told, tell = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            with BlockingConnection() as connection:
                assert connection.ask("register", name="child", port=1, hold=True, pid=os.getpid())["ok"]
                try:
                    registry.kill("db")
                except HostError as error:
                    assert "of this fork" in str(error)
                else:
                    raise AssertionError
                registry.end()
                os.write(tell, b"ready")
                os.close(end)
                os.read(ended, 1)
            status = 0
        finally:
            os._exit(status)
    os.read(told, 5)
    assert [each["name"] for each in registry.instances()] == ["child", "db"]
    registry.cut()
    try:
        waiting.ask("ping")  # broken, though the child lives
    except regd_client.Unavailable:
        pass
    else:
        raise AssertionError
    with registry.away():
        try:
            BlockingConnection()
        except regd_client.Unavailable:
            pass
        else:
            raise AssertionError
    registry.register("web", 80)
    os.close(end)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    waiting.close()
"""
    done = python(program, "-X", "dev", "-W", "error", "-W", "ignore:This process:DeprecationWarning")
    assert (done.returncode, done.stderr) == (0, "")


# The fixture.

FIXTURE = """
import os, sys, pytest, regd_client
from regd_client import blocking

@pytest.mark.parametrize("number", range(4))
def test_it(regd_in_process, number):
    assert regd_in_process.instances() == []
    with blocking.register("web", 80):
        assert os.environ["REGD_ADDRESS"] == regd_in_process.address
        assert blocking.resolve("web").port == 80
        regd_in_process.kill("web")
        with pytest.raises(regd_client.NotFound):
            blocking.resolve("web")
    spawn = sys.modules["regd.testing.host_process"]
    assert not spawn._hosts  # no process was begun

async def test_async(regd_in_process):
    async with regd_client.register("web", 80) as registration:
        regd_in_process.restart()
        await registration.update({"k": "v"})

def test_after():
    assert "REGD_ADDRESS" not in os.environ
"""


@pytest.mark.sample(2)
@pytest.mark.parametrize("flags", [[], ["-n", "2"]], ids=["alone", "workers"])
def test_fixture(tmp_path: Path, flags: list[str]) -> None:
    assert "6 passed" in Suite(tmp_path, FIXTURE).passes(*flags)


def test_both_fixtures(tmp_path: Path) -> None:
    tests = """
def test_it(regd, regd_in_process):
    regd.register("process", 1)
    regd_in_process.register("thread", 1)
    assert [each["name"] for each in regd.instances()] == ["process"]
    assert [each["name"] for each in regd_in_process.instances()] == ["thread"]
"""
    Suite(tmp_path, tests).passes()


def test_failed_test_shows_the_registry(tmp_path: Path) -> None:
    tests = """
import pytest

def test_it(regd_in_process):
    regd_in_process.register("shown", 5432)
    assert False

@pytest.fixture
def broken(request):
    request.getfixturevalue("regd_in_process").register("also", 1)
    raise ValueError

def test_set_up(broken, regd_in_process):
    pass
"""
    status, shown = Suite(tmp_path, tests).run()
    assert status == pytest.ExitCode.TESTS_FAILED
    assert '"shown": {"port": 5432' in shown
    assert '"also": {"port": 1' in shown
    assert shown.count("- regd -") == 2
