"""Starting and stopping a daemon in the test's event loop: sockets, files, and errors at the start."""

import asyncio
import json
import os
import socket
import sys
from pathlib import Path

import pytest

from regd.server.daemon import Config, Daemon, default_registry
from regd.storage.store import StorageError
from regd.system.listener import ListenError
from tests.support.daemon import InLoop

pytestmark = pytest.mark.socket


async def test_taken_port_is_an_error_and_changes_nothing(daemon: InLoop, tmp_path: Path) -> None:
    path = tmp_path / "other" / "registry.json"
    with pytest.raises(ListenError, match=rf"port {daemon.port} on 127.0.0.1 is taken"):
        await Daemon(Config(registry=path, port=daemon.port)).start()
    assert not path.parent.exists()


async def test_port_taken_on_one_family_is_an_error(tmp_path: Path) -> None:
    with socket.socket(socket.AF_INET6) as holder:
        holder.bind(("::1", 0))
        holder.listen()
        with pytest.raises(ListenError, match="on ::1 is taken"):
            await Daemon(Config(registry=tmp_path / "r.json", port=holder.getsockname()[1])).start()


async def test_registry_in_use_is_an_error_and_changes_nothing(daemon: InLoop) -> None:
    before = daemon.registry.stat()
    with pytest.raises(StorageError, match="in use by another regd"):
        await Daemon(Config(registry=daemon.registry, port=0)).start()
    assert daemon.registry.stat() == before
    assert (await (await daemon.peer()).ask("ping"))["ok"]


async def test_machine_without_ipv6(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from regd.system import listener

    real = listener._tcp

    def none(family: socket.AddressFamily, host: str, port: int) -> socket.socket:
        if family == socket.AF_INET6:
            raise OSError(97, "Address family not supported by protocol")
        return real(family, host, port)

    monkeypatch.setattr(listener, "_tcp", none)
    async with InLoop(tmp_path / "registry.json") as daemon:
        assert len(daemon.server.addresses) == 1
        assert (await (await daemon.peer()).ask("ping"))["ok"]


async def test_unix_socket_is_private_and_removed_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "s"
    async with InLoop(tmp_path / "registry.json", unix=path) as daemon:
        assert path.stat().st_mode & 0o777 == 0o600
        assert daemon.server.addresses[-1] == f"unix://{path}"
        with pytest.raises(ListenError, match="in use"):
            await Daemon(Config(registry=tmp_path / "other.json", port=0, unix=path)).start()
        assert path.is_socket()
    assert not path.exists()


async def test_unix_socket_left_by_a_crash_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(path))
    async with InLoop(tmp_path / "registry.json", unix=path):
        _, writer = await asyncio.open_unix_connection(path)
        writer.close()
        await writer.wait_closed()


async def test_file_in_place_of_the_unix_socket_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "s"
    path.write_text("mine")
    with pytest.raises(ListenError, match="is not a socket"):
        await Daemon(Config(registry=tmp_path / "registry.json", port=0, unix=path)).start()
    assert path.read_text() == "mine"
    assert not (tmp_path / "registry.json").exists()


async def test_long_unix_path_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ListenError, match="cannot listen on"):
        await Daemon(Config(registry=tmp_path / "registry.json", port=0, unix=tmp_path / ("s" * 120))).start()


async def test_registrations_and_revision_survive_a_restart(tmp_path: Path) -> None:
    path = tmp_path / "registry.json"
    async with InLoop(path) as daemon:
        peer = await daemon.peer()
        await peer.ask(cmd="register", name="a", port=1, meta={"k": "é"})
        before = await peer.ask("resolve a")
        await peer.ask(cmd="register", name="b", port=2)
        await peer.ask(cmd="deregister", name="b")
    async with InLoop(path) as daemon:
        peer = await daemon.peer()
        reply = await peer.ask("resolve a")
        assert (reply["meta"], reply["rev"], reply["registered_at"]) == ({"k": "é"}, 1, before["registered_at"])
        assert (await peer.ask(cmd="register", name="c", port=3))["rev"] == 4


async def test_stop_sends_the_last_replies_and_closes(tmp_path: Path) -> None:
    async with InLoop(tmp_path / "registry.json") as daemon:
        idle, busy = await daemon.peer(), await daemon.peer()
        await idle.ask("ping")
        await busy.ask("ping")
        busy.send(*({"cmd": "register", "name": f"n{n}", "port": 1} for n in range(50)))
        await busy.writer.drain()
        reply = await busy.reply()
        assert reply["ok"]
        await daemon.server.stop()
        assert await idle.rest() == b""
        acknowledged = 1 + (await busy.rest()).count(b'"ok":true')
        assert len(json.loads((tmp_path / "registry.json").read_bytes())) == 1 + acknowledged


async def test_stop_is_idempotent(tmp_path: Path) -> None:
    async with InLoop(tmp_path / "registry.json") as daemon:
        await daemon.server.stop()


@pytest.mark.parametrize(
    ("environment", "path"),
    [
        ({"STATE_DIRECTORY": "/var/lib/regd", "XDG_STATE_HOME": "/x"}, "/var/lib/regd/registry.json"),
        ({"STATE_DIRECTORY": "/a:/b"}, "/a/registry.json"),
        ({"XDG_STATE_HOME": "/x"}, "/x/regd/registry.json"),
        ({"XDG_STATE_HOME": "not/absolute"}, str(Path.home() / ".local/state/regd/registry.json")),
        ({}, str(Path.home() / ".local/state/regd/registry.json")),
    ],
)
def test_default_registry_path(environment: dict[str, str], path: str) -> None:
    assert str(default_registry(environment)) == path


@pytest.mark.parametrize("home", ["", "relative", "~", "/nonexistent"])
def test_missing_home_is_an_error(home: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", home)
    with pytest.raises(StorageError, match="--registry"):
        default_registry({})
    assert default_registry({"XDG_STATE_HOME": "/x"}) == Path("/x/regd/registry.json")


def test_unknown_user_has_no_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HOME")
    monkeypatch.setattr(os, "getuid", lambda: 3_999_999_999)
    with pytest.raises(StorageError, match="--registry"):
        default_registry({})


def test_relative_state_directory_is_an_error() -> None:
    with pytest.raises(StorageError, match="STATE_DIRECTORY is 'here'"):
        default_registry({"STATE_DIRECTORY": "here"})


async def test_constructor_opens_nothing(tmp_path: Path) -> None:
    events: list[str] = []
    listening = True

    def listen(event: str, arguments: tuple[object, ...]) -> None:
        if listening and event.startswith(("open", "socket.", "os.", "subprocess.")):
            events.append(f"{event} {arguments}")

    sys.addaudithook(listen)  # audit hooks cannot be removed
    before = set(asyncio.all_tasks())
    Daemon(Config(registry=tmp_path / "folder" / "registry.json", port=0, unix=tmp_path / "s"))
    listening = False
    assert (events, set(asyncio.all_tasks()) - before) == ([], set())
    assert os.listdir(tmp_path) == []
