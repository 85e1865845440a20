"""Producers of the messages of the client and of regctl. Each function causes one message and returns it."""

import asyncio
import errno
import functools
import os
import socket
import sys
from collections.abc import Callable

import grpc
import pytest

import regd_client
from regd.bridge.bridge import Bridge, Options
from regd.bridge.claim import Claim, ClaimRefusal
from regd.bridge.etcd.client import Etcd
from regd.bridge.etcd.model import KeyEvent, Put, Record
from regd.bridge.foreign import Foreign
from regd.bridge.local import Local, LocalRefusal
from regd.bridge.reachability import Reachability
from regd.cli import run as run_module
from regd.cli import run_readiness
from regd.cli.port_owner import Listener
from regd.cli.run_readiness import Probe, command_probe
from regd_client import BadArgument, Client, Conflict, NotFound, Timeout, Unavailable, project, protocol
from regd_client import lifespans as lifespans_module
from regd_client.blocking import BlockingConnection
from tests.support.daemon import WAIT_S, InLoop
from tests.support.fake_etcd import FakeEtcd
from tests.support.files import FULL, RecordedFiles
from tests.support.polling import until
from tests.support.scenes import Producers, Scene, refused
from tests.support.scripted_etcd import ScriptedEtcd

says = Producers()


def unused_port() -> socket.socket:
    """Return a socket that reserves a port without listening on it."""
    reserved = socket.socket()
    reserved.bind(("127.0.0.1", 0))
    return reserved


# Many machines.


@says("a bridge on host … (process …) has the machine name …; end it, or choose another name with --machine")
async def machine_name_is_taken(scene: Scene) -> str:
    etcd, claim = FakeEtcd(), Claim("/", "a")
    etcd.apply([Put(claim.key, b'{"host":"other","pid":7}', 5)])
    with pytest.raises(ClaimRefusal) as caught:
        await claim.make(etcd.as_etcd(), 1)
    return str(caught.value)


@says("another bridge serves the daemon at …: …; end it first")
async def second_bridge(scene: Scene) -> str:
    async with InLoop(scene.folder / "registry.json") as daemon:
        await (await daemon.peer()).ask(cmd="register", name="regd.bridge", port=1, hold=True)
        local = Local(f"127.0.0.1:{daemon.port}", {"port": 2}, lambda key: None)
        with pytest.raises(LocalRefusal) as caught:
            await local.run(lambda session: asyncio.sleep(0))
        await local.close()
    return str(caught.value)


@says("regctl bridge needs the extra …, and … is missing: …")
async def no_extra(scene: Scene) -> str:
    start = "import sys; sys.modules['grpc'] = None; from regd.cli.regctl import main; raise SystemExit(main())"
    return await scene.shell("regctl", f"""'{sys.executable}' -c "{start}" bridge --etcd h:1""", status=2)


@says("no bridge is registered with this daemon; start one with …")
async def no_bridge(scene: Scene) -> str:
    async with scene.daemon():
        return await scene.regctl("bridge", "--status", status=1)


@says("no member of etcd answers; still trying: …")
async def etcd_is_away(scene: Scene) -> str:
    with unused_port() as kept:
        async with Etcd([f"127.0.0.1:{kept.getsockname()[1]}"]) as etcd:
            reading = asyncio.ensure_future(etcd.read(b"/"))
            message = await scene.logged("no member of etcd answers")
            reading.cancel()
            await asyncio.gather(reading, return_exceptions=True)
    return message


@says("etcd refuses to …: …; still trying")
async def etcd_refuses(scene: Scene) -> str:
    async with ScriptedEtcd().serve() as etcd:
        etcd.failures = [(grpc.StatusCode.PERMISSION_DENIED, "etcdserver: permission denied")] * 10
        bridge = Bridge(Options((etcd.address,), "a", address=f"unix://{scene.folder / 'none'}"))
        running = asyncio.create_task(bridge.run(lambda line: None))
        message = await scene.logged("etcd refuses to")
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
    return message


@says("ignored the key … in etcd: …")
async def key_of_another_hand(scene: Scene) -> str:
    foreign = Foreign("/", "a", Local(None, {}, lambda key: None), loopback=False)
    foreign.apply(KeyEvent(b"/b/db/", 2, Record(b"127.0.0.1:5432", 2, 0)))
    return await scene.logged("ignored the key")


@says("it accepts no connection at …: …")
async def not_reachable_by_others(scene: Scene) -> str:
    reachability = Reachability("127.0.0.1", lambda keys: None)
    with unused_port() as kept:
        reason = functools.partial(reachability.reason, ("db", ""), kept.getsockname()[1], lambda: False)
        await until(lambda: "refused" in reason())
        message = reason()
    await reachability.close()
    return message


# No daemon answers.


@says("no regd at … (Connection refused); start one with …, or name another address in REGD_ADDRESS")
async def no_daemon(scene: Scene) -> str:
    with unused_port() as kept:
        scene.at(kept.getsockname()[1])
        return await scene.regctl("ping", status=3)


@says("no regd at …; still trying")
async def still_trying(scene: Scene) -> str:
    with unused_port() as kept:
        scene.at(kept.getsockname()[1])
        registering = asyncio.ensure_future(regd_client.register("db", 5432, timeout=WAIT_S))
        message = await scene.logged("still trying")
        registering.cancel()
        await asyncio.gather(registering, return_exceptions=True)
    return message


@says("regd_client needs asyncio, and no asyncio event loop runs here: …")
async def no_asyncio(scene: Scene) -> str:
    async def resolve_in_a_thread() -> None:
        await asyncio.to_thread(next, regd_client.resolve("db").__await__())

    return await refused(regd_client.RegdError, resolve_in_a_thread())


@says("regd at … cannot be started: …")
async def not_started(scene: Scene) -> str:
    (scene.folder / "state").touch()
    scene.patch.setenv("XDG_STATE_HOME", str(scene.folder / "state"))
    scene.patch.setenv("REGD_AUTOSTART", "1")
    with unused_port() as kept:
        scene.at(kept.getsockname()[1])
        return await scene.regctl("ping", status=3)


@says("no regd at … (timed out); start one with …, or name another address in REGD_ADDRESS")
async def silence(scene: Scene) -> str:
    with socket.create_server(("127.0.0.1", 0)) as silent:

        def ask() -> object:
            with BlockingConnection(f"127.0.0.1:{silent.getsockname()[1]}", timeout_s=0.02) as connection:
                return connection.ask("ping")

        return await refused(Unavailable, asyncio.to_thread(ask))


@says("no regd at … (the connection broke before the reply; the change may or may not have been made); …")
async def broken(scene: Scene) -> str:
    files = RecordedFiles()
    async with scene.daemon(files=files) as daemon, Client() as client:
        files.gate.clear()
        files.syncing.clear()
        registering = asyncio.ensure_future(client.register("db", 5432, static=True))
        await until(files.syncing.is_set)
        for connection in list(daemon.server.connections):
            connection.cut()
        message = await refused(Unavailable, registering)
        files.gate.set()
    return message


@says("not a regd reply (…)…; see which program listens there")
async def no_regd(scene: Scene) -> str:
    async def refuse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readline()
        writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        writer.close()

    async with await asyncio.start_server(refuse, "127.0.0.1", 0) as server:
        scene.at(server.sockets[0].getsockname()[1])
        return await scene.regctl("ping", status=3)


@says("… is not an address; write tcp://HOST:PORT, HOST:PORT or unix:///path")
async def bad_address(scene: Scene) -> str:
    return await scene.regctl("ping", "--address", "localhost", status=2)


@says("the registry is away, still trying: …")
async def away(scene: Scene) -> str:
    async with scene.daemon() as daemon, Client() as client:
        await client.register("db", 5432)
        client._connector.timeout_s = 0.0
        await daemon.server.stop()
        return await scene.logged("still trying")


@says("the daemon has been away for … s, and stale_s_max is …")
async def too_old(scene: Scene) -> str:
    async with scene.daemon() as daemon, Client() as client, client.mirror("db", stale_s_max=0) as mirror:
        await client.register("db", 5432)
        await daemon.server.stop()
        await until(lambda: mirror.stale_s > 0)

        async def resolve() -> object:
            return mirror.resolve("db")

        return await refused(Unavailable, resolve())


# A name is not found.


@says("no service …")
async def not_found(scene: Scene) -> str:
    async with scene.daemon():
        await regd_client.register("db", 5432, static=True)
        assert "did you mean" in await refused(NotFound, regd_client.resolve("bd"))
        return await scene.regctl("resolve", "bd", status=1)


@says("… is here, but none is ready")
async def not_ready(scene: Scene) -> str:
    async with scene.daemon(), regd_client.register("db", 5432, state="starting"):
        return await refused(NotFound, regd_client.resolve("db"))


@says("no ready instance of … in the mirror")
async def not_in_the_mirror(scene: Scene) -> str:
    async with scene.daemon(), regd_client.mirror("work*") as mirror:

        async def resolve() -> object:
            return mirror.resolve("db")

        return await refused(NotFound, resolve())


@says("…waited … s: … was never registered…")
async def never_registered(scene: Scene) -> str:
    async with scene.daemon():
        await refused(Timeout, regd_client.resolve("db", wait=0))
        return await scene.regctl("wait", "db", "--timeout", "0", status=1)


@says("…waited … s: … is registered, and cannot be reached: …")
async def unreachable(scene: Scene) -> str:
    with unused_port() as kept:
        async with scene.daemon() as daemon:
            await regd_client.register("db", kept.getsockname()[1], static=True)
            peer = await daemon.peer()
            peer.send({"cmd": "resolve", "name": "db", "wait": 60})
            await until(lambda: daemon.server.probed > 0)
            daemon.clock.advance(60)
            return str((await peer.reply())["message"])


@says("…waited … s: … left … s ago: …")
async def left(scene: Scene) -> str:
    async with scene.daemon():
        async with regd_client.register("db", 5432):
            pass
        return await scene.regctl("wait", "db", "--timeout", "0", status=1)


# A service is not registered, or no longer registered.


async def hold(daemon: InLoop, name: str, **more: bool) -> None:
    """Register the name from another connection."""
    reply = await (await daemon.peer()).ask(cmd="register", name=name, port=1, hold=True, **more)
    assert reply["ok"], reply


@says("name must be labels of a-z 0-9 - _, …")
async def bad_name(scene: Scene) -> str:
    async with scene.daemon():
        return await refused(BadArgument, regd_client.register("Web server", 8000))


@says("host is nothing to call: … means every address here; give one, such as 127.0.0.1")
async def every_address(scene: Scene) -> str:
    async with scene.daemon():
        return await refused(BadArgument, regd_client.register("web", 8000, host="0.0.0.0"))


@says("… is at …, held by …; stop that one, take another name or instance, or take over with force")
async def held(scene: Scene) -> str:
    async with scene.daemon() as daemon:
        await hold(daemon, "db")
        await refused(Conflict, regd_client.register("db", 5433))
        return await scene.regctl("register", "db", "5433", status=4)


@says("… serves at …, not registered yet, still trying: …")
async def not_yet(scene: Scene) -> str:
    files = RecordedFiles()
    async with (
        scene.daemon(files=files),
        regd_client.lifespan("web") as service,
    ):
        files.failing["write"] = FULL
        async with await asyncio.start_server(lambda reader, writer: None, "127.0.0.1", 0):
            message = await scene.logged("not registered yet")
            files.failing.clear()
            await service.registration()
    return message


@says("… is not registered: no server has opened its port on this event loop for … s; name the port: …")
async def no_server(scene: Scene) -> str:
    scene.patch.setattr(lifespans_module, "_WARN_S", 0.0)
    async with regd_client.lifespan("web"):
        return await scene.logged("no server has opened")


@says("lost the registration of …: …")
async def lost(scene: Scene) -> str:
    async with scene.daemon() as daemon, regd_client.register("db", 5432):
        await hold(daemon, "db", force=True)
        return await scene.logged("lost the registration")


@says("left … registered: …")
async def left_registered(scene: Scene) -> str:
    files = RecordedFiles()
    async with scene.daemon(files=files):
        async with regd_client.register("db", 5432):
            files.failing["write"] = FULL
        files.failing.clear()
    return await scene.logged("left db")


@says("the registry has not confirmed yet that … ended")
async def not_confirmed(scene: Scene) -> str:
    async with scene.daemon() as daemon, regd_client.register("db", 5432):
        await daemon.server.stop()
    return await scene.logged("not confirmed")


# `regctl run`, `regctl env`, and usage errors.


@says("cannot bind port …: …; choose another with --port")
async def port_of_another(scene: Scene) -> str:
    with socket.create_server(("127.0.0.1", 0)) as another:
        scene.at(1)
        return await scene.regctl("run", "web", "--port", str(another.getsockname()[1]), "--", "true", status=4)


@says("PORT is …, which is no port from 1 to 65535; unset it, or use --port")
async def port_of_the_environment(scene: Scene) -> str:
    scene.at(1)
    scene.patch.setenv("PORT", "http")
    return await scene.regctl("run", "web", "--", "true", status=2)


@says("… is not ready: …")
async def command_not_ready(scene: Scene) -> str:
    scene.patch.setattr(run_readiness, "_SILENT_S", 0.0)
    async with scene.daemon():
        with socket.create_server(("127.0.0.1", 0)) as listening:
            port = listening.getsockname()[1]
            return await not_registered(scene, port, lambda host, port: command_probe("exit 3", {}, ()))


@says("…: No such file or directory")
async def no_such_command(scene: Scene) -> str:
    return await scene.process("regd.cli.regctl", "run", "web", "--", "./web", status=127)


@says("… is not registered: nothing has accepted connections at … for … s; the command must listen on port …")
async def nothing_accepts(scene: Scene) -> str:
    scene.patch.setattr(run_module, "_SILENT_S", 0.0)
    with unused_port() as kept:
        return await not_registered(scene, kept.getsockname()[1])


@says("… is not registered: user … listens at …, not the command; stop that program, or use --socket")
async def another_user_listens(scene: Scene) -> str:
    scene.patch.setattr(run_module, "_PROBE_S", 0.5)
    scene.patch.setattr(run_module, "listener", lambda host, port: Listener(os.geteuid() + 1, 0))
    with socket.create_server(("127.0.0.1", 0)) as another:
        return await not_registered(scene, another.getsockname()[1])


async def not_registered(scene: Scene, port: int, prober: Callable[[str, int], Probe] | None = None) -> str:
    """Return the message of `regctl run` about a command that does not listen on its port, or is not ready."""
    arguments = {"name": "web", "instance": None, "meta": None}
    name = run_module._Name(arguments, functools.partial(run_module._report, False), os.getpid(), port, prober)
    name.begin(accepts=False)
    message = ""
    while " is not " not in message or not message.endswith("\n"):
        await asyncio.sleep(0)
        message += scene.stderr()
    assert name.withdraw()
    assert await asyncio.to_thread(name.is_gone, WAIT_S)
    # "… is registered" may come before or after it.
    [line] = [line for line in message.splitlines() if " is not " in line]
    return line.removeprefix("regctl: ")


@says("… is left out: another service has the same variables")
async def same_variables(scene: Scene) -> str:
    async with scene.daemon():
        for name in ("shop-db", "shop.db"):
            await regd_client.register(name, 5432, static=True)
        return await scene.regctl("env", status=0)


@says("cannot write to stdout: …")
async def full_stdout(scene: Scene) -> str:
    command = f"'{sys.executable}' -m regd.cli.regctl --version >/dev/full"
    return await scene.shell("regctl", command, status=4)


@says("no registration of …; there is …: …")
async def with_an_instance(scene: Scene) -> str:
    async with scene.daemon():
        await regd_client.register("worker", 5061, instance="1", static=True)
        return await scene.regctl("deregister", "worker", status=1)


@says("REGD_AUTOSTART is …, which is neither yes nor no: no daemon is started; write 1 or 0")
async def neither_yes_nor_no(scene: Scene) -> str:
    scene.patch.setattr(protocol, "_warned", set())
    scene.patch.setenv("REGD_AUTOSTART", "maybe")
    protocol.autostart_wanted(protocol.Address("127.0.0.1", 1))
    return await scene.logged("REGD_AUTOSTART")


def in_a_project(scene: Scene) -> None:
    """Make a project registry in the scene's folder, and make that the current one."""
    for name in ("REGD_ADDRESS", "REGD_AUTOSTART"):
        scene.patch.delenv(name, raising=False)
    scene.patch.setenv("HOME", str(scene.folder))
    scene.patch.chdir(scene.folder)
    scene.patch.setattr(protocol, "_warned", set())
    project.init(str(scene.folder))


@says(
    "no regd at … (No such file or directory); start one with … (REGD_AUTOSTART=… keeps this program from starting it), …"
)
async def may_not_start(scene: Scene) -> str:
    in_a_project(scene)
    scene.patch.setenv("REGD_AUTOSTART", "0")
    scene.patch.delenv("PYTEST_CURRENT_TEST")
    return await scene.regctl("ping", status=3)


@says("… is ignored: …; run … in …, or remove it")
async def ignored(scene: Scene) -> str:
    in_a_project(scene)
    (scene.folder / ".regd").chmod(0o755)
    protocol.find_address()
    return await scene.logged("is ignored")


@says("a test uses the project registry …; the fixture … has a private one")
async def warned_test(scene: Scene) -> str:
    in_a_project(scene)
    protocol.find_address()
    return await scene.logged("a test uses")


@says("regd … at … has no …, and this client is …; restart that regd")
async def older_daemon(scene: Scene) -> str:
    scene.patch.setattr(protocol, "VERSION", "9.0.0")
    async with scene.daemon(), Client() as client:
        return await refused(regd_client.RegdError, client._ask("preview"))


@says(
    "… is on a file system without Unix sockets (…); use a checkout on a local disk, or run … and set REGD_ADDRESS"
)
async def no_sockets(scene: Scene) -> str:
    def refuse(*arguments: object) -> None:
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    with scene.patch.context() as patch:
        patch.setattr(socket.socket, "bind", refuse)
        with pytest.raises(project.ProjectError) as caught:
            project.init(str(scene.folder))
    return str(caught.value)


@says("regctl stop works over Unix sockets only, not for …: …")
async def stop_over_tcp(scene: Scene) -> str:
    scene.at(1)
    return await scene.regctl("stop", status=4)


@says("name the command, after …")
async def no_command(scene: Scene) -> str:
    return await scene.regctl("run", "web", status=2, prefix="regctl run")


@says("… (see regctl … --help)")
async def bad_line(scene: Scene) -> str:
    return await scene.regctl("resolve", status=2, prefix="regctl resolve")
