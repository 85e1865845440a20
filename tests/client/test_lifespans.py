"""`lifespan` and `listen`: the server that is registered, the time when it is, and its end, also by signals."""

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

import regd_client
from regd_client import lifespans as lifespans_module
from regd_client.client import Client
from tests.support.daemon import WAIT_S, InLoop, environment
from tests.support.polling import until

pytestmark = pytest.mark.socket


@pytest.fixture(autouse=True)
def address(daemon: InLoop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REGD_ADDRESS", f"tcp://127.0.0.1:{daemon.port}")


@pytest.fixture
async def client() -> AsyncIterator[Client]:
    async with Client() as client:
        yield client


class Nothing(asyncio.Protocol):
    """A protocol that does nothing."""


async def server(port: int = 0, host: str = "127.0.0.1") -> asyncio.AbstractServer:
    return await asyncio.get_running_loop().create_server(Nothing, host, port)


def port_of(server: object) -> int:
    return int(server.sockets[0].getsockname()[1])  # type: ignore[attr-defined]


def accepts(port: int) -> bool:
    with socket.socket() as trying:
        return trying.connect_ex(("127.0.0.1", port)) == 0


async def names(client: Client) -> list[tuple[str, int]]:
    return [(instance["name"], instance["port"]) for instance in await client.instances()]


async def gone(client: Client, name: str = "web") -> None:
    async with asyncio.timeout(WAIT_S):
        while await client.instances(name):
            await asyncio.sleep(0)


class Withdrawing:
    """A withdrawal that waits for the test."""

    def __init__(self) -> None:
        self.begun = asyncio.Event()
        self.may_end = asyncio.Event()


def delay_withdrawal(registration: regd_client.Registration, monkeypatch: pytest.MonkeyPatch) -> Withdrawing:
    withdrawing, leave = Withdrawing(), registration.deregister

    async def deregister() -> None:
        withdrawing.begun.set()
        await withdrawing.may_end.wait()
        await leave()

    monkeypatch.setattr(registration, "deregister", deregister)
    return withdrawing


async def test_registered_when_the_port_is_open(client: Client) -> None:
    async with regd_client.lifespan("web") as service:
        await client.ping()
        assert await names(client) == []
        async with await server() as opened:
            endpoint = (await service.registration()).endpoint
            assert await names(client) == [("web", port_of(opened))] == [("web", endpoint.port)]
        assert await names(client) == []


async def test_listener_is_open_until_the_name_is_withdrawn(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with regd_client.lifespan("web", drain_s=0.0) as service:
        opened = await server()
        registration = await service.registration()
        withdrawing = delay_withdrawal(registration, monkeypatch)
        opened.close()
        await withdrawing.begun.wait()
        assert accepts(port_of(opened))
        withdrawing.may_end.set()
        await opened.wait_closed()
        assert await names(client) == []
        await until(lambda: not opened.is_serving())


async def test_exit_withdraws_the_name_and_keeps_the_server(client: Client) -> None:
    async with regd_client.lifespan("web") as service:
        opened = await server()
        await service.registration()
    assert await names(client) == []
    assert accepts(port_of(opened))
    opened.close()
    await opened.wait_closed()
    assert "create_server" not in vars(asyncio.get_running_loop())


async def test_port_selects_the_server(client: Client) -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    async with regd_client.lifespan("web", port) as service, await server(), await server(port):
        await service.registration()
        assert await names(client) == [("web", port)]


async def test_two_services_in_one_loop(client: Client) -> None:
    with contextlib.ExitStack() as stack:
        one, two = (stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(2))
        ports = [sock.getsockname()[1] for sock in (one, two)]
    async with (
        regd_client.lifespan("one", ports[0]) as first,
        regd_client.lifespan("two", ports[1]) as second,
        await server(ports[1]),
        await server(ports[0]),
    ):
        await asyncio.gather(first.registration(), second.registration())
        assert await names(client) == [("one", ports[0]), ("two", ports[1])]
    assert await names(client) == []


async def test_server_that_starts_serving_later_is_registered_later(client: Client) -> None:
    async with regd_client.lifespan("web") as service:
        opened = await asyncio.get_running_loop().create_server(Nothing, "127.0.0.1", 0, start_serving=False)
        assert not service._opened.done()
        await opened.start_serving()
        await service.registration()
        opened.close()
        await opened.wait_closed()


async def test_serve_forever_ends_with_the_name(client: Client) -> None:
    async with regd_client.lifespan("web") as service:
        opened = await server()
        task: asyncio.Task[None] = asyncio.create_task(opened.serve_forever())
        await service.registration()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await names(client) == []
        assert not opened.is_serving()


async def test_passed_socket_may_be_closed_by_its_owner(client: Client) -> None:
    passed = socket.create_server(("127.0.0.1", 0))
    port = passed.getsockname()[1]
    async with regd_client.lifespan("web") as service:
        opened = await asyncio.get_running_loop().create_server(Nothing, sock=passed)
        await service.registration()
        opened.close()
        passed.close()
        assert accepts(port)  # the port is open until the name is gone
        await opened.wait_closed()
        assert not accepts(port)


async def test_second_server_is_not_registered(client: Client) -> None:
    async with regd_client.lifespan("web") as service, await server() as first:
        await service.registration()
        async with await server():
            pass
        assert await names(client) == [("web", port_of(first))]


async def test_listener_stays_open_for_drain_s(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    pauses_s: list[float] = []
    is_over = asyncio.Event()

    async def pause(seconds: float) -> None:
        pauses_s.append(seconds)
        await is_over.wait()

    monkeypatch.setattr(lifespans_module, "pause", pause)
    async with regd_client.lifespan("web", drain_s=0.05) as service, await server() as opened:
        await service.registration()
        opened.close()
        await until(lambda: pauses_s == [0.05])
        assert await names(client) == []
        assert accepts(port_of(opened))
        is_over.set()
        await opened.wait_closed()
        assert not opened.is_serving()
    assert pauses_s == [0.05]


async def test_exit_closes_the_connection(client: Client) -> None:
    async with regd_client.lifespan("web") as service, await server():
        await service.registration()
    async with asyncio.timeout(WAIT_S):
        while (await client.stats())["connections"] > 1:
            await asyncio.sleep(0)


async def test_passed_socket_stays_open_if_the_server_fails() -> None:
    async with regd_client.lifespan("web"):
        with socket.create_server(("127.0.0.1", 0)) as passed:
            before = len(os.listdir("/dev/fd"))
            with pytest.raises(TypeError):
                await asyncio.get_running_loop().create_server(Nothing, sock=passed, backlog="many")  # type: ignore[call-overload]
            assert len(os.listdir("/dev/fd")) == before


async def test_error_of_the_server_is_raised(client: Client) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        async with regd_client.lifespan("web"):
            with pytest.raises(OSError, match="in use"):
                await server(taken.getsockname()[1])


async def test_unix_server_is_not_registered(client: Client, tmp_path: Path) -> None:
    async with regd_client.lifespan("web") as service:
        with socket.socket(socket.AF_UNIX) as path:
            path.bind(str(tmp_path / "socket"))
            async with await asyncio.get_running_loop().create_server(Nothing, sock=path):
                assert not service._opened.done()
        async with await server() as opened:
            assert (await service.registration()).endpoint.port == port_of(opened)


@pytest.mark.parametrize(
    ("host", "told"), [("0.0.0.0", "127.0.0.1"), ("::", "::1"), ("::1", "::1"), (None, "127.0.0.1")]
)
async def test_registered_host_can_be_called(client: Client, host: str, told: str) -> None:
    async with regd_client.lifespan("web") as service, await server(host=host):
        assert (await service.registration()).endpoint.host == told


async def test_daemon_that_starts_later(
    daemon: InLoop, client: Client, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lifespans_module, "Client", lambda: Client(connect_timeout_s=0.05))
    await daemon.server.stop()
    async with regd_client.lifespan("web") as service, await server() as opened:
        await until(lambda: "not registered yet" in caplog.text)
        daemon.server = InLoop(daemon.registry).server
        await daemon.server.start()
        monkeypatch.setenv("REGD_ADDRESS", f"tcp://127.0.0.1:{daemon.port}")
        assert (await service.registration()).endpoint.port == port_of(opened)
    assert caplog.text.count("not registered yet") == 1


async def test_name_that_becomes_free(
    daemon: InLoop, client: Client, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lifespans_module, "_PAUSE_S", 0.01)
    await (await daemon.peer()).ask(cmd="register", name="web", port=1, hold=True)
    async with regd_client.lifespan("web") as service, await server():
        async with asyncio.timeout(WAIT_S):
            while (await client.stats())["requests"]["register"] < 4:
                await asyncio.sleep(0)
        await client.deregister("web")
        await service.registration()
    assert caplog.text.count("not registered yet") == 1


async def test_invalid_name(client: Client, caplog: pytest.LogCaptureFixture) -> None:
    async with regd_client.lifespan("no name") as service, await server():
        with pytest.raises(regd_client.BadArgument):
            await service.registration()
    assert "cannot be registered" in caplog.text


async def test_no_server_is_opened(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(lifespans_module, "_WARN_S", 0.0)
    async with regd_client.lifespan("web"):
        await until(lambda: "no server has opened its port" in caplog.text)


@pytest.mark.parametrize("module", ["granian", "sanic"])
async def test_server_that_opens_its_port_outside_the_loop(
    module: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, module, sys)
    monkeypatch.setattr(lifespans_module, "_WARN_UNSEEN_S", 0.0)
    async with regd_client.lifespan("web"):
        await until(lambda: 'name the port: lifespan("web", PORT)' in caplog.text)


def test_daphne_runs_no_lifespan(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    assert caplog.text == ""
    monkeypatch.setitem(sys.modules, "daphne.cli", sys)
    regd_client.lifespan("web")
    assert "web is not registered: daphne does not run the lifespan" in caplog.text


async def test_port_opened_outside_the_loop_is_found(client: Client) -> None:
    with socket.create_server(("127.0.0.1", 0)) as another, socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        port = opened.getsockname()[1]
        async with regd_client.lifespan("web", port) as service:
            assert another.getsockname()[1] != port
            assert not service._hook.find_open_port()  # the socket is bound but does not listen yet
            opened.listen()
            assert (await service.registration()).endpoint.port == port
        assert await names(client) == []


async def test_listener_added_with_add_reader_is_found(client: Client) -> None:
    """Tornado and Twisted use add_reader."""
    loop = asyncio.get_running_loop()
    async with regd_client.lifespan("web") as service:
        one, other = socket.socketpair()
        with one, other, socket.create_server(("127.0.0.1", 0)) as opened:
            loop.add_reader(one, lambda: None)
            loop.remove_reader(one)
            assert not service._opened.done()
            loop.add_reader(opened.fileno(), lambda: None)
            assert (await service.registration()).endpoint.port == opened.getsockname()[1]
            loop.remove_reader(opened.fileno())
    assert "add_reader" not in vars(loop)


async def test_registration_in_progress_is_withdrawn(client: Client) -> None:
    """The daemon has the entry, but its reply has not arrived yet."""
    opened = None
    async with regd_client.lifespan("web"):
        opened = await server()
        async with asyncio.timeout(WAIT_S):
            while (await client.stats())["requests"].get("register", 0) == 0:
                await asyncio.sleep(0)
    opened.close()
    await opened.wait_closed()
    assert [departure["reason"] for departure in (await client.why("web"))["departures"]] == ["deregistered"]


async def test_lifespan_can_be_entered_again(client: Client) -> None:
    lifespan = regd_client.lifespan("web")
    for _ in range(2):
        async with lifespan(object()), await server() as opened:
            await client.resolve("web", wait=WAIT_S)
            assert await names(client) == [("web", port_of(opened))]
        assert await names(client) == []


async def test_lifespan_is_an_async_iterator_too(client: Client) -> None:
    """An iterator that yields once, as aiohttp before 3.14 expects."""
    once = aiter(regd_client.lifespan("web")(object()))
    await anext(once)
    async with await server():
        await client.resolve("web", wait=WAIT_S)
        with pytest.raises(StopAsyncIteration):
            await anext(once)
        assert await names(client) == []


# Signals.


@contextlib.asynccontextmanager
async def signalled(number: int, on_loop: bool) -> AsyncIterator[list[int]]:
    """Install a signal handler as a server does, and collect its calls."""
    calls: list[int] = []
    loop = asyncio.get_running_loop()
    original = signal.getsignal(number)
    if on_loop:
        loop.add_signal_handler(number, calls.append, number)
    else:
        signal.signal(number, lambda number, frame: calls.append(number))
    try:
        yield calls
    finally:
        if on_loop:
            loop.remove_signal_handler(number)
        signal.signal(number, original)


@pytest.mark.parametrize("on_loop", [False, True])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_termination_signal_is_delivered_after_the_withdrawal(
    client: Client, number: int, on_loop: bool
) -> None:
    async with (
        signalled(number, on_loop) as signals,
        regd_client.lifespan("web", drain_s=0.0) as service,
        await server() as opened,
    ):
        await service.registration()
        os.kill(os.getpid(), number)
        assert signals == []
        await gone(client)
        assert accepts(port_of(opened))
        await until(lambda: signals == [number])
        os.kill(os.getpid(), number)  # signals are not delayed any more
        await until(lambda: signals == [number, number])


@pytest.mark.parametrize("on_loop", [False, True])
async def test_second_signal_is_delivered_at_once(on_loop: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    async with (
        signalled(signal.SIGTERM, on_loop) as signals,
        regd_client.lifespan("web", drain_s=0.0) as service,
        await server(),
    ):
        withdrawing = delay_withdrawal(await service.registration(), monkeypatch)
        os.kill(os.getpid(), signal.SIGTERM)
        await withdrawing.begun.wait()
        assert signals == []
        os.kill(os.getpid(), signal.SIGTERM)
        await until(lambda: signals == [signal.SIGTERM] * 2)
        withdrawing.may_end.set()


@pytest.mark.parametrize("on_loop", [False, True])
async def test_other_signals_and_later_handlers_are_not_delayed(client: Client, on_loop: bool) -> None:
    async with signalled(signal.SIGUSR1, True) as other, signalled(signal.SIGTERM, on_loop) as signals:
        async with regd_client.lifespan("web", drain_s=0.0) as service, await server():
            await service.registration()
            os.kill(os.getpid(), signal.SIGUSR1)
            await until(lambda: other == [signal.SIGUSR1])
            assert await names(client) != []
        os.kill(os.getpid(), signal.SIGTERM)
        await until(lambda: signals == [signal.SIGTERM])


async def test_handler_added_during_the_withdrawal_is_called() -> None:
    async with regd_client.lifespan("web"):
        late = signalled(signal.SIGUSR2, True)
        signals = await late.__aenter__()
    os.kill(os.getpid(), signal.SIGUSR2)
    await until(lambda: signals == [signal.SIGUSR2])
    await late.__aexit__(None, None, None)


async def test_signal_without_a_handler_is_not_delayed() -> None:
    before = signal.getsignal(signal.SIGTERM)
    async with regd_client.lifespan("web"):
        assert signal.getsignal(signal.SIGTERM) is before is signal.SIG_DFL


RUNS = """
import asyncio, os, signal, sys
import regd_client

async def main():
    loop = asyncio.get_running_loop()
    if early:
        loop.add_signal_handler(signal.SIGTERM, loop.stop)
    lifespan = regd_client.lifespan("web", drain_s=0.0)
    service = await lifespan.__aenter__()
    server = await loop.create_server(asyncio.Protocol, "127.0.0.1", 0)
    await service.registration()
    if not early:
        loop.add_signal_handler(signal.SIGTERM, loop.stop)
    return lifespan, server

async def end(lifespan, server):
    async with regd_client.Client() as client:
        print([each["state"] for each in await client.instances()])
    await lifespan.__aexit__(None, None, None)
    server.close()
    await server.wait_closed()

early = sys.argv[2] == "early"
if sys.argv[1] == "uvloop":
    import uvloop
    loop = uvloop.new_event_loop()
else:
    loop = asyncio.new_event_loop()
made = loop.run_until_complete(main())
loop.call_soon(loop.call_soon, os.kill, os.getpid(), signal.SIGTERM)
loop.run_forever()
loop.run_until_complete(end(*made))
loop.close()
"""


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
@pytest.mark.parametrize(("handler", "states"), [("early", "[]"), ("late", "['ready']")])
async def test_event_loop_that_runs_several_times(loop: str, handler: str, states: str) -> None:
    """Sanic and granian do this. A handler installed before `lifespan` is called after the withdrawal."""
    command = [sys.executable, "-c", RUNS, loop, handler]
    done = await asyncio.to_thread(
        subprocess.run, command, env=environment(**os.environ), capture_output=True, text=True, timeout=WAIT_S
    )
    assert (done.stdout, done.stderr, done.returncode) == (states + "\n", "", 0)


BLOCKED = """
import asyncio, signal, sys, time
import regd_client

def handler(number, frame):
    print("heard", flush=True)
    if number == signal.SIGTERM:
        raise SystemExit(3)

async def main():
    if "SIGTERM" in sys.argv:
        signal.signal(signal.SIGTERM, handler)
    registered = regd_client.listen("web") if "listen" in sys.argv else regd_client.lifespan("web")
    async with registered:
        print("blocked", flush=True)
        if "sleep" in sys.argv:
            time.sleep(1_000)
        while True:
            pass

loop = {"asyncio": asyncio.new_event_loop}
if "uvloop" in sys.argv:
    import uvloop
    loop["uvloop"] = uvloop.new_event_loop
asyncio.Runner(loop_factory=loop[sys.argv[1]]).run(main())
"""


def blocked(*arguments: str) -> "subprocess.Popen[str]":
    command = [sys.executable, "-c", BLOCKED, *arguments]
    return subprocess.Popen(
        command, env=environment(**os.environ), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


@pytest.mark.sample(9)
@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
@pytest.mark.parametrize("what", ["lifespan", "listen"])
@pytest.mark.parametrize("how", ["sleep", "work"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
async def test_second_signal_ends_a_blocked_program(
    loop: str, what: str, how: str, number: signal.Signals
) -> None:
    with blocked(loop, what, how, number.name) as program:
        try:
            assert program.stdout is not None
            assert await asyncio.to_thread(program.stdout.readline) == "blocked\n"
            sent = 0
            async with asyncio.timeout(WAIT_S):
                while program.poll() is None:  # Python merges two signals that arrive together
                    program.send_signal(number)
                    sent += 1
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        await asyncio.to_thread(program.wait, 0.2)
            assert sent >= 2  # the first signal was delayed until the withdrawal
            _, errors = await asyncio.to_thread(program.communicate, timeout=WAIT_S)
            # The handler exits with 3; a third signal may arrive after Python has removed the handlers.
            assert program.returncode in ((3, -number) if number == signal.SIGTERM else (-number,)), errors
        finally:
            program.kill()


def test_signals_are_not_delayed_in_another_thread(daemon: InLoop) -> None:
    async def serve() -> None:
        async with regd_client.lifespan("web"):
            pass

    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    thread.join(WAIT_S)
    assert not thread.is_alive()


# listen


async def test_listen_returns_a_registered_socket(client: Client) -> None:
    async with regd_client.listen("web", meta={"zone": "a"}) as listening:
        assert accepts(listening.port)
        assert not listening.socket.getblocking()
        endpoint = await client.resolve("web")
        assert (endpoint.port, endpoint.meta, listening.endpoint.port) == (
            listening.port,
            {"zone": "a"},
            endpoint.port,
        )
        with pytest.raises(OSError, match="in use"), socket.socket() as other:
            other.bind(("127.0.0.1", listening.port))
    assert await names(client) == []
    assert not accepts(endpoint.port)


async def test_listen_without_a_block(client: Client) -> None:
    listening = await regd_client.listen("web")
    await listening.close()
    await listening.close()
    assert await names(client) == []
    assert listening.socket.fileno() == -1


async def test_listener_closes_after_the_name_is_withdrawn(client: Client) -> None:
    async with regd_client.listen("web") as listening:
        opened = await asyncio.get_running_loop().create_server(Nothing, sock=listening.socket)
        opened.close()
        await opened.wait_closed()
        assert await names(client) == []


@pytest.mark.parametrize("trouble", ["conflict", "no daemon", "bad name"])
async def test_failed_listen_closes_the_socket(
    daemon: InLoop, trouble: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    socks: list[socket.socket] = []

    def create(*args: object, **more: object) -> socket.socket:
        socks.append(socket.create_server(("127.0.0.1", 0)))
        return socks[-1]

    monkeypatch.setattr("regd_client.lifespans.listening_socket", create)
    await (await daemon.peer()).ask(cmd="register", name="web", port=1, hold=True)
    if trouble == "no daemon":
        monkeypatch.setenv("REGD_ADDRESS", "127.0.0.1:1")
        monkeypatch.setattr(lifespans_module, "Client", lambda: Client(connect_timeout_s=0.0))
    expected = {
        "conflict": regd_client.Conflict,
        "no daemon": regd_client.Unavailable,
        "bad name": regd_client.BadArgument,
    }
    with pytest.raises(expected[trouble]):
        await regd_client.listen("bad name" if trouble == "bad name" else "web", 0)
    assert socks[0].fileno() == -1
    assert "create_server" not in vars(asyncio.get_running_loop())


async def test_taken_port_is_not_registered(client: Client) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(OSError, match="in use"):
        await regd_client.listen("web", taken.getsockname()[1])
    assert await names(client) == []
