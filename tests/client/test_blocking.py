"""`regd_client.blocking`: the same verbs for programs without an event loop."""

import asyncio
import inspect
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from typing import Any

import pytest

import regd_client
from regd_client import blocking, process_registration, protocol
from regd_client.blocking import client_thread
from tests.support.daemon import QUIET_ASYNCIO, WAIT_S, DaemonProcess, environment
from tests.support.polling import block_until
from tests.support.registries import comparable


@pytest.fixture(autouse=True)
def address(process: DaemonProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REGD_ADDRESS", process.addresses[0])


def instances() -> list[dict[str, object]]:
    with blocking.BlockingConnection() as connection:
        return list(connection.ask("list")["instances"])


def run(program: str, *flags: str) -> subprocess.CompletedProcess[str]:
    quiet = QUIET_ASYNCIO if "dev" in flags else ""
    return subprocess.run(
        [sys.executable, *flags, "-c", quiet + program],
        env=environment(REGD_ADDRESS=os.environ["REGD_ADDRESS"]), capture_output=True, text=True, timeout=30, check=False,
    )  # fmt: skip


def test_the_verbs() -> None:
    with blocking.register("web", 1, instance="a", meta={"zone": "x"}) as registration:
        endpoint = blocking.resolve("web")
        assert (endpoint, str(endpoint), endpoint.meta) == (registration.endpoint, "127.0.0.1:1", {"zone": "x"})
        assert blocking.resolve_all("web", meta={"zone": "x"}) == [endpoint]
        registration.update({"zone": "y"}, state="draining")
        assert [(instance["state"], instance["meta"]) for instance in instances()] == [
            ("draining", {"zone": "y"})
        ]
    assert instances() == []
    with blocking.register("db", 2, static=True):
        pass
    assert blocking.resolve("db").port == 2
    blocking.deregister("db")
    with pytest.raises(regd_client.NotFound):
        blocking.resolve("db")
    with pytest.raises(regd_client.Timeout):
        blocking.resolve("db", wait=0.01)
    with pytest.raises(regd_client.BadArgument):
        blocking.register("no name", 1)


def test_threads_and_an_event_loop() -> None:
    """One thread registers and resolves while an event loop watches."""
    results: list[object] = []
    with blocking.listen("first") as listening:

        async def watch() -> list[str]:
            events = []
            async with asyncio.timeout(WAIT_S):
                async for event in regd_client.watch():
                    events.append(f"{event.kind} {event.endpoint.name if event.endpoint else ''}".strip())
                    if event.kind == "sync":
                        thread.start()
                    if events[-1] == "up third":
                        return events
            raise AssertionError(events)

        def work() -> None:
            results.append(blocking.resolve("first", wait=WAIT_S))
            blocking.register("second", listening.port)
            results.append(blocking.resolve("second", wait=WAIT_S).port)
            blocking.register("third", 3, static=True)

        thread = threading.Thread(target=work)
        assert asyncio.run(watch(), debug=True) == ["up first", "sync", "up second", "up third"]
        thread.join(WAIT_S)
        assert results == [listening.endpoint, listening.port]
        blocking.deregister("second")
        blocking.deregister("third")


def test_blocking_connection() -> None:
    with blocking.BlockingConnection() as one, blocking.BlockingConnection() as two:
        assert one.ask("ping") == {"ok": True}
        assert comparable(one.ask("register", name="a", port=1, hold=True)) == {"ok": True, "name": "a", "instance": "", "host": "127.0.0.1", "port": 1, "rev": 1}  # fmt: skip
        assert comparable(two.ask("register", name="a", port=2)) == {"ok": False, "error": "conflict", "owner": {"connection": True}, "rev": 1}  # fmt: skip
        assert two.ask("resolve", name="b", wait=0.01)["error"] == "timeout"
        assert two.ask("watch", name="a")["watch"] == 1
        events = two.events()
        assert [next(events)["event"], next(events)["event"]] == ["up", "sync"]
        one.close()
        assert next(events)["reason"] == "connection closed"


def test_wait_ends_when_another_thread_registers() -> None:
    ports: list[object] = []
    with blocking.listen("other") as listening, blocking.BlockingConnection(timeout_s=WAIT_S) as connection:
        waiter = threading.Thread(
            target=lambda: ports.append(connection.ask("resolve", name="a", wait=WAIT_S)["port"])
        )
        waiter.start()
        with blocking.register("a", listening.port):
            waiter.join(WAIT_S)
        assert ports == [listening.port]


def test_registration_returns_after_a_restart(process: DaemonProcess) -> None:
    registration = blocking.register("web", 1)
    process.end(signal.SIGKILL)
    process.registry.unlink()
    process.start()
    registration.update({"zone": "a"})  # waits until it is registered again
    assert blocking.resolve("web").meta == {"zone": "a"}
    registration.deregister()
    registration.deregister()
    assert instances() == []


def test_lost() -> None:
    registration = blocking.register("web", 1)
    assert not registration.lost
    blocking.deregister("web")
    with pytest.raises(regd_client.NotFound):
        registration.update(state="draining")
    assert (registration.lost, registration.lost_reason) == (True, "deregistered")


def test_listen() -> None:
    with blocking.listen("web") as listening:
        assert blocking.resolve("web", wait=WAIT_S) == listening.endpoint
        probe, _ = listening.socket.accept()  # the daemon's probe
        probe.close()
        assert listening.port == listening.endpoint.port
        assert listening.socket.getblocking()
    assert instances() == []
    assert listening.socket.fileno() == -1


def test_forked_child_has_its_own_thread() -> None:
    """A forked child registers for itself, and its end does not affect the parent's registration."""
    with blocking.register("parent", 1):
        child = os.fork()
        if child == 0:
            try:
                blocking.register("child", 2)
                known = {instance["name"]: instance["pid"] for instance in instances()}
                os._exit(0 if known == {"parent": os.getppid(), "child": os.getpid()} else 1)
            finally:
                os._exit(2)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        with pytest.raises(regd_client.Timeout):
            blocking.resolve("child", wait=0)
        assert blocking.resolve("parent").port == 1


@pytest.mark.parametrize("kind", ["socket", "mirror", "watch", "registration"])
def test_forked_child_does_not_affect_the_parents_registrations(kind: str) -> None:
    """The client's thread does not run in the child, so nothing there can end the parent's registrations."""
    client = blocking.Client()
    makers: dict[str, Callable[[], AbstractContextManager[object]]] = {
        "socket": lambda: blocking.listen("parent"),
        "mirror": client.mirror,
        "watch": client.watch,
        "registration": lambda: blocking.register("parent", 1),
    }
    context = makers[kind]()
    with context as value:
        child = os.fork()
        if child == 0:
            try:
                if isinstance(value, blocking.BlockingMirror):
                    with pytest.raises(regd_client.Unavailable, match="parent process of this fork"):
                        value.resolve("parent")
                context.__exit__(None, None, None)
                os._exit(0)
            finally:
                os._exit(2)
        try:
            block_until(lambda: os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT))
        finally:
            os.kill(child, signal.SIGKILL)
            status = os.waitpid(child, 0)[1]
        assert os.waitstatus_to_exitcode(status) == 0
        if kind in ("socket", "registration"):
            assert [each["name"] for each in instances()] == ["parent"]
    client.close()


def waiting() -> int:
    with blocking.BlockingConnection() as connection:
        return int(connection.ask("stats")["waiting"])


def test_ctrl_c_ends_a_wait() -> None:
    program = """if True:
    from regd_client import blocking
    try:
        blocking.resolve("web", wait=3_600)
    except KeyboardInterrupt:
        print("ended", flush=True)
        input()
"""
    with subprocess.Popen(
        [sys.executable, "-c", program],
        env=environment(REGD_ADDRESS=os.environ["REGD_ADDRESS"]), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    ) as running:  # fmt: skip
        try:
            block_until(lambda: waiting() == 1)
            running.send_signal(signal.SIGINT)
            assert running.stdout is not None
            assert running.stdout.readline() == "ended\n"
            block_until(lambda: waiting() == 0)
        finally:
            running.kill()


Heard = list[list[dict[str, object]]]


@pytest.fixture
def heard() -> Iterator[Heard]:
    """Install a handler of SIGTERM. Yield a list of what was registered at each call of the handler."""
    calls: Heard = []
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGALRM)}
    timer = signal.setitimer(signal.ITIMER_REAL, 0.0)  # stop the timer of pytest-timeout
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.signal(signal.SIGTERM, lambda number, frame: calls.append(instances()))
    yield calls
    for number, handler in handlers.items():
        signal.signal(number, handler)
    signal.setitimer(signal.ITIMER_REAL, *timer)


def connections() -> int:
    with blocking.BlockingConnection() as connection:
        return int(connection.ask("stats")["connections"])


def test_server_gets_the_signal_after_the_name_is_withdrawn(heard: Heard) -> None:
    blocking.register_process("web", 1, drain_s=0.0)
    assert len(instances()) == 1
    os.kill(os.getpid(), signal.SIGTERM)
    assert heard == [[]]
    os.kill(os.getpid(), signal.SIGTERM)
    assert len(heard) == 2


def test_process_that_forks_workers_has_no_extra_threads(heard: Heard) -> None:
    threads = threading.active_count()
    blocking.register_process("web", 1, meta={"zone": "a"})
    assert threading.active_count() == threads
    block_until(lambda: connections() == 1)  # the connection of this request
    [instance] = instances()
    assert (instance["pid"], instance["meta"], "hold" in instance) == (os.getpid(), {"zone": "a"}, False)


def test_signal_to_a_forked_worker_keeps_the_name(heard: Heard) -> None:
    blocking.register_process("web", 1)
    if not (pid := os.fork()):
        os.kill(os.getpid(), signal.SIGTERM)
        os._exit(len(heard))
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 1
    assert len(instances()) == 1


def test_name_of_several_processes_lives_until_the_last_leaves(heard: Heard) -> None:
    with subprocess.Popen(["sleep", "1000"]) as other:
        try:
            with blocking.BlockingConnection() as connection:
                blocking.register_process("web", 1, drain_s=0.0)
                assert connection.ask("register", name="web", port=1, pid=other.pid)["ok"]
                os.kill(os.getpid(), signal.SIGTERM)
                [[instance]] = heard
                assert instance["state"] == "ready"
        finally:
            other.kill()
    block_until(lambda: instances() == [])


def test_name_taken_over_by_another_program_stays(heard: Heard) -> None:
    blocking.register_process("web", 1, drain_s=0.0)
    with blocking.BlockingConnection() as connection:
        assert connection.ask("register", name="web", port=2, force=True)["ok"]
    os.kill(os.getpid(), signal.SIGTERM)
    assert [instance["port"] for instance in heard[0]] == [2]


def test_unseen_process_holds_its_name_by_connection(heard: Heard, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "own_host", lambda: {"boot": "another", "pid_namespace": "pid:[1]"})
    blocking.register_process("web", 1, drain_s=0.0)
    [instance] = instances()
    assert (instance["hold"], "pid" in instance) == (True, False)
    assert connections() == 2
    os.kill(os.getpid(), signal.SIGTERM)
    assert heard == [[]]
    block_until(lambda: connections() == 1)


def test_signal_during_registration(heard: Heard, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server's handler is called after the name is registered and withdrawn again."""
    ask = blocking.BlockingConnection.ask
    commands: list[str] = []

    def interrupted(connection: blocking.BlockingConnection, cmd: str, **arguments: Any) -> dict[str, Any]:
        commands.append(cmd)
        if commands.count("register") == 1 and cmd == "register":
            os.kill(os.getpid(), signal.SIGTERM)
            assert heard == []
        return ask(connection, cmd, **arguments)

    monkeypatch.setattr(blocking.BlockingConnection, "ask", interrupted)
    blocking.register_process("web", 1, drain_s=0.0)
    assert heard == [[]]
    assert "deregister" in commands


def test_failed_registration_leaves_the_signal_handlers(heard: Heard) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(regd_client.BadArgument):
        blocking.register_process("no name", 1)
    assert signal.getsignal(signal.SIGTERM) is before


def test_server_waits_for_a_name_with_another_owner(
    heard: Heard, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(process_registration, "_PAUSE_S", 0.01)
    with blocking.BlockingConnection() as owner:
        owner.ask("register", name="web", port=2, hold=True)
        blocking.register_process("web", 1)
        block_until(lambda: stats()["requests"]["register"] >= 4)
        assert [instance["port"] for instance in instances()] == [2]
    block_until(lambda: [instance["port"] for instance in instances()] == [1])
    block_until(lambda: "is registered now, at 127.0.0.1:1" in caplog.text)
    assert caplog.text.count("not registered yet") == 1
    assert signal.getsignal(signal.SIGALRM) is signal.SIG_DFL


def stats() -> dict[str, Any]:
    with blocking.BlockingConnection() as connection:
        return connection.ask("stats")


def test_server_that_ends_before_it_is_registered_is_not_retried(
    heard: Heard, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process_registration, "_PAUSE_S", 0.01)
    with blocking.BlockingConnection() as owner:
        owner.ask("register", name="web", port=2, hold=True)
        blocking.register_process("web", 1, drain_s=0.0)
        os.kill(os.getpid(), signal.SIGTERM)
        assert [instance["port"] for instance in heard[0]] == [2]
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)
    assert signal.getsignal(signal.SIGALRM) is signal.SIG_DFL


def test_error_where_no_timer_can_be_created(heard: Heard) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with blocking.BlockingConnection() as owner:
        owner.ask("register", name="web", port=2, hold=True)
        with ThreadPoolExecutor(1) as pool, pytest.raises(regd_client.Conflict):
            pool.submit(blocking.register_process, "web", 1).result()
        signal.signal(signal.SIGALRM, lambda number, frame: None)
        with pytest.raises(regd_client.Conflict):
            blocking.register_process("web", 1)
        assert signal.getsignal(signal.SIGTERM) is before


def test_program_ends_cleanly() -> None:
    program = "from regd_client import blocking; blocking.register('web', 1); print(blocking.resolve('web'))"
    done = run(program, "-X", "dev", "-W", "error")
    assert (done.returncode, done.stdout, done.stderr) == (0, "127.0.0.1:1\n", "")
    with pytest.raises(regd_client.NotFound):
        blocking.resolve("web")


def test_end_of_a_forked_child_leaves_the_parents_thread() -> None:
    program = """if True:
    import os
    from regd_client import blocking
    with blocking.register("web", 1):
        if os.fork():
            _, status = os.wait()
            print(status, blocking.resolve("web"))
"""
    done = run(program, "-W", "ignore::DeprecationWarning")  # Python 3.12 and later warn of a fork with threads
    assert (done.stdout, done.stderr) == ("0 127.0.0.1:1\n", "")


def test_blocking_connection_does_not_import_asyncio() -> None:
    program = "import sys; from regd_client.blocking_connection import BlockingConnection; BlockingConnection().ask('ping'); print('asyncio' in sys.modules, 'threading' in sys.modules)"
    assert run(program, "-S").stdout == "False False\n"


def test_exception_in_the_thread_is_raised_in_the_caller() -> None:
    async def buggy() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        client_thread().call(buggy())


def test_client_has_every_verb(process: DaemonProcess) -> None:
    for name, verb in inspect.getmembers(regd_client.Client, inspect.isfunction):
        if not name.startswith("_"):
            here = inspect.signature(getattr(blocking.Client, name))
            assert list(here.parameters) == list(inspect.signature(verb).parameters), name
    address = process.addresses[0]
    with blocking.Client(address) as client, blocking.Client(address) as other:
        client.ping()
        assert client.hello()["server"] == "regd"
        with client.register("web", 1, meta={"zone": "x"}) as registration:
            assert client.resolve("web") == other.resolve("web", wait=None) == registration.endpoint
            assert [endpoint.port for endpoint in client.resolve_all("web")] == [1]
            other.update("web", {"zone": "y"})
            assert [instance["meta"] for instance in client.instances("we*")] == [{"zone": "y"}]
            assert client.why("web")["instances"]
            with other.mirror("web") as mirror:
                assert (mirror.resolve("web").meta, mirror.resolve_all("web")[0].port) == ({"zone": "y"}, 1)
                assert (mirror.live, mirror.stale_s) == (True, 0.0)
                with pytest.raises(regd_client.NotFound):
                    mirror.resolve("db")
            with client.watch("web") as events:
                kinds = [next(events).kind, next(events).kind]
                other.update("web", {})
                kinds.append(next(events).kind)
            assert kinds == ["up", "sync", "change"]
        with pytest.raises(regd_client.NotFound):
            client.deregister("web")
        assert client.stats(timeout=WAIT_S)["watches"] == 0


def test_closed_client_ends_its_watch(process: DaemonProcess) -> None:
    client = blocking.Client(process.addresses[0])
    events = client.watch()
    assert next(events).kind == "sync"
    client.close()
    assert list(events) == []


def test_forked_child_has_its_own_client(process: DaemonProcess) -> None:
    with blocking.Client(process.addresses[0]) as client:
        client.register("web", 1)
        child = os.fork()
        if child == 0:
            try:
                os._exit(0 if client.resolve("web", timeout=WAIT_S).port == 1 else 1)
            finally:
                os._exit(2)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert client.resolve("web").port == 1


LATE = """if True:
    import atexit
    import regd_client
    from regd_client import blocking

    def late():
        registration.deregister()
        listening.close()
        for call in (lambda: blocking.resolve("web"), client.ping, lambda: registration.update({})):
            try:
                call()
            except regd_client.Unavailable as error:
                print(error)

    class Late:
        def __del__(self):
            late()

    EARLIER
    registration, listening, client = blocking.register("web", 1), blocking.listen("db"), blocking.Client()
"""


@pytest.mark.parametrize("how", ["atexit.register(late)", "kept = Late()"])
def test_call_at_process_exit_is_silent_or_unavailable(how: str) -> None:
    done = run(LATE.replace("EARLIER", how), "-X", "dev", "-W", "error")
    message = "this process is exiting; regd_client.blocking can no longer be used\n"
    assert (done.returncode, done.stdout, done.stderr) == (0, 3 * message, "")


@pytest.mark.parametrize("make", ["regd_client.watch()", "client.watch()"])
def test_watch_abandoned_at_the_end_of_a_loop(make: str) -> None:
    program = f"""if True:
    import asyncio, regd_client
    async def main():
        async with regd_client.Client() as client:
            for watch in watches: watch.append({make})
            for watch in watches: await anext(watch[0])
    watches = [], []
    asyncio.run(main())
"""
    done = run(program, "-W", "error")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_stopped_clock_does_not_block_the_client() -> None:
    pytest.importorskip("freezegun")
    program = """if True:
    import asyncio, freezegun, regd_client
    async def main():
        async with regd_client.listen("web"):
            print((await regd_client.resolve("web")).name)
    with freezegun.freeze_time("2030-01-01"):
        asyncio.run(main())
"""
    done = run(program)
    assert (done.returncode, done.stdout, done.stderr) == (0, "web\n", "")
