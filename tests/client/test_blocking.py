"""The blocking face: the same verbs from programs without an event loop."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

import regd_client
from regd_client import blocking
from regd_client.thread import Registration, client_thread
from tests.support.daemon import WAIT_S, Daemon, environment


@pytest.fixture(autouse=True)
def address(process: Daemon, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REGD_ADDRESS", process.addresses[0])


def instances() -> list[dict[str, object]]:
    with blocking.BlockingConnection() as connection:
        return list(connection.ask("list")["instances"])


def until(true: Callable[[], bool]) -> None:
    late = time.monotonic() + WAIT_S
    while not true():
        assert time.monotonic() < late


def run(program: str, *flags: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *flags, "-c", program],
        env=environment(REGD_ADDRESS=os.environ["REGD_ADDRESS"]), capture_output=True, text=True, timeout=30, check=False,
    )  # fmt: skip


def test_the_verbs() -> None:
    with blocking.register("web", 1, instance="a", meta={"zone": "x"}) as registration:
        found = blocking.resolve("web")
        assert (found, str(found), found.meta) == (registration.endpoint, "127.0.0.1:1", {"zone": "x"})
        assert blocking.resolve_all("web", meta={"zone": "x"}) == [found]
        registration.update({"zone": "y"}, state="draining")
        assert [(each["state"], each["meta"]) for each in instances()] == [("draining", {"zone": "y"})]
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


def test_it_is_there_again_after_the_daemon_was_restarted(process: Daemon) -> None:
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
        probe, _ = listening.socket.accept()  # the daemon's, who saw that it is reachable
        probe.close()
        assert listening.port == listening.endpoint.port
        assert listening.socket.getblocking()
    assert instances() == []
    assert listening.socket.fileno() == -1


def test_each_process_has_a_thread_of_its_own() -> None:
    """A child that was forked registers for itself, and its end leaves the parent's alone."""
    with blocking.register("parent", 1):
        child = os.fork()
        if child == 0:
            try:
                blocking.register("child", 2)
                known = {each["name"]: each["pid"] for each in instances()}
                os._exit(0 if known == {"parent": os.getppid(), "child": os.getpid()} else 1)
            finally:
                os._exit(2)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        with pytest.raises(regd_client.Timeout):
            blocking.resolve("child", wait=0)
        assert blocking.resolve("parent").port == 1


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
            until(lambda: waiting() == 1)
            running.send_signal(signal.SIGINT)
            assert running.stdout is not None
            assert running.stdout.readline() == "ended\n"
            until(lambda: waiting() == 0)
        finally:
            running.kill()


def test_a_server_hears_of_its_end_when_the_name_has_gone() -> None:
    got: list[list[dict[str, object]]] = []
    heard = threading.Event()

    def handler(number: int, frame: object) -> None:
        got.append(instances())
        heard.set()

    before = signal.signal(signal.SIGTERM, handler)
    try:
        blocking.serving("web", 1, drain_s=0.0)
        assert len(instances()) == 1
        os.kill(os.getpid(), signal.SIGTERM)
        assert heard.wait(WAIT_S)
        assert got == [[]]
        os.kill(os.getpid(), signal.SIGTERM)
        assert len(got) == 2
    finally:
        signal.signal(signal.SIGTERM, before)
        signal.signal(signal.SIGINT, signal.default_int_handler)


def test_a_signal_while_it_is_being_registered(monkeypatch: pytest.MonkeyPatch) -> None:
    """The server hears of it once the name has come, and has gone again."""
    heard = threading.Event()
    got: list[list[dict[str, object]]] = []
    register = blocking.register

    def handler(number: int, frame: object) -> None:
        got.append(instances())
        heard.set()

    def interrupted(*args: Any, **more: Any) -> Registration:
        os.kill(os.getpid(), signal.SIGTERM)
        made = register(*args, **more)
        assert got == []
        return made

    before = signal.signal(signal.SIGTERM, handler)
    monkeypatch.setattr(blocking, "register", interrupted)
    try:
        blocking.serving("web", 1, drain_s=0.0)
        assert heard.wait(WAIT_S)
        assert got == [[]]
    finally:
        signal.signal(signal.SIGTERM, before)
        signal.signal(signal.SIGINT, signal.default_int_handler)


def test_what_cannot_be_registered_holds_no_signal() -> None:
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(regd_client.BadArgument):
        blocking.serving("no name", 1)
    assert signal.getsignal(signal.SIGINT) is before


def test_a_program_that_ends_leaves_nothing_half_done() -> None:
    program = "from regd_client import blocking; blocking.register('web', 1); print(blocking.resolve('web'))"
    done = run(program, "-X", "dev", "-W", "error")
    assert (done.returncode, done.stdout, done.stderr) == (0, "127.0.0.1:1\n", "")
    with pytest.raises(regd_client.NotFound):
        blocking.resolve("web")


def test_a_child_that_was_forked_and_ends_leaves_the_parents_thread_alone() -> None:
    program = """if True:
    import os
    from regd_client import blocking
    with blocking.register("web", 1):
        if os.fork():
            _, status = os.wait()
            print(status, blocking.resolve("web"))
"""
    done = run(program, "-W", "ignore::DeprecationWarning")  # from 3.12 on forking with threads is one
    assert (done.stdout, done.stderr) == ("0 127.0.0.1:1\n", "")


def test_what_regctl_uses_imports_no_event_loop() -> None:
    program = "import sys; from regd_client.blocking import BlockingConnection; BlockingConnection().ask('ping'); print('asyncio' in sys.modules, 'threading' in sys.modules)"
    assert run(program, "-S").stdout == "False False\n"


def test_a_bug_in_the_thread_is_the_callers() -> None:
    async def buggy() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        client_thread().call(buggy())
