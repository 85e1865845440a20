"""Producers of the daemon's messages: at the start, in the log, on the wire. Each function causes one message."""

import errno
import json
from dataclasses import replace
from typing import Any

import pytest

from regd.core.limits import DEFAULT
from regd.storage.store import StorageError, Store
from regd.system import peer_credentials
from regd.system.listener import ListenError
from tests.support.daemon import InLoop
from tests.support.files import FULL, RecordedFiles
from tests.support.peers import FakeCredentials
from tests.support.polling import until
from tests.support.scenes import Producers, Scene

says = Producers()
REGISTER: dict[str, Any] = {"cmd": "register", "name": "db", "port": 5432}


# Errors at the start.


@says("port … on … is taken by another program, or by a regd that runs already; stop that one, or …")
async def port_taken(scene: Scene) -> str:
    async with InLoop(scene.folder / "another.json") as daemon:
        return await scene.regd("--port", str(daemon.port), status=1)


@says("… is in use by another regd…; stop that one, or name another file with --registry")
async def registry_taken(scene: Scene) -> str:
    async with scene.daemon():
        return await scene.regd("--port", "0", status=1)


@says("… is in use by a regd on the machine …; name a file that only this one uses with --registry")
async def registry_taken_elsewhere(scene: Scene) -> str:
    async with scene.daemon():
        lock = scene.folder / "registry.json.lock"
        pid, boot, place, _ = lock.read_text().split()
        lock.write_text(f"{pid}\n{boot[::-1]} {place} alpha\n")
        message = await scene.regd("--port", "0", status=1)
        assert "alpha" in message
        assert pid not in message
        return message


@says("cannot tell which user is at the other end of a TCP connection: …; listen on a Unix socket alone with …")
async def no_peer_credentials(scene: Scene) -> str:
    scene.patch.setattr(peer_credentials, "_NETLINK_SOCK_DIAG", 31)
    scene.patch.setattr(peer_credentials, "_TABLES", ())
    with pytest.raises(ListenError) as caught:
        await InLoop(scene.registry).__aenter__()
    assert not scene.registry.exists()
    return str(caught.value)


@says("this process may open … files, too few for … connections; raise the limit to 1024 or more (…)")
async def few_files(scene: Scene) -> str:
    return await scene.regd("--port", "0", status=1, before=("prlimit", "--nofile=192:192"))


@says(
    "the home folder of this user, …, is not there to keep the registry in; correct HOME, or name a file with …"
)
async def no_home(scene: Scene) -> str:
    scene.patch.setenv("HOME", "home")
    scene.patch.delenv("XDG_STATE_HOME", raising=False)
    message = await scene.process("regd", "--port", "0", status=1)
    assert list(scene.folder.iterdir()) == []
    return message


@says(
    "… is relative, and the current folder cannot be found (…); pass an absolute path, or change to another folder"
)
async def no_current_folder(scene: Scene) -> str:
    # Without PYTHONSAFEPATH, `-c` adds the deleted current folder to sys.path, and 3.13.0 cannot import socket.
    gone = ("env", "PYTHONSAFEPATH=1", "sh", "-c", 'mkdir gone && cd gone && rmdir ../gone && exec "$@"', "sh")
    return await scene.regd("--port", "0", "--registry", "r.json", status=1, before=gone)


@says("…: …; nothing was changed: correct the file, or move it away to start empty")
async def registry_does_not_parse(scene: Scene) -> str:
    scene.registry.write_text('{\n"db": {"port": 5432},\n}\n')
    return await scene.regd("--port", "0", status=1)


@says(
    "…: line …: …; restore the file, or move the journal away to go on from registry.json alone; nothing was changed"
)
async def journal_damaged(scene: Scene) -> str:
    async with scene.daemon():
        pass
    scene.journal.write_bytes(b"damaged\n")
    return await scene.regd("--port", "0", status=1)


@says("… is not a regular file; name another with --registry")
async def registry_is_a_folder(scene: Scene) -> str:
    scene.registry.mkdir()
    return await scene.regd("--port", "0", status=1)


@says("cannot use the folder …: …; give its rights to this user, or name another file with --registry")
async def folder_is_a_file(scene: Scene) -> str:
    (scene.folder / "state").touch()
    scene.registry = scene.folder / "state" / "registry.json"
    return await scene.regd("--port", "0", status=1)


@says("cannot write …: …; give the rights on its folder to this user, or name another file with --registry")
async def folder_may_not_be_written(scene: Scene) -> str:
    files = RecordedFiles()
    files.failing["create"] = errno.EACCES
    with pytest.raises(StorageError) as caught:
        await InLoop(scene.registry, files=files).__aenter__()
    return str(caught.value)


@says("… (see regd --help)")
async def bad_flag(scene: Scene) -> str:
    return await scene.regd("--port", "70000", status=2)


# The log.


@says("the registry could not be written (…); the change is not in effect")
async def disk_full(scene: Scene) -> str:
    files = RecordedFiles()
    async with scene.daemon(files=files):
        files.failing["write"] = FULL
        message = await scene.regctl("register", "db", "5432", status=4)
        files.failing.clear()
    await scene.logged("changes are refused until it can be written")
    return message


@says("… is not the file that this regd wrote: another regd was started on this registry; this one ends, and …")
async def taken_over(scene: Scene) -> str:
    store = Store(scene.registry, lambda line: None)
    store.open(0.0)
    store.begin()
    scene.journal.rename(scene.folder / "moved")
    scene.journal.touch()
    try:
        with pytest.raises(StorageError) as caught:
            store.ensure_saved()
    finally:
        store.close()
    return str(caught.value)


@says("… was removed by another program; regd begins a new one")
async def journal_removed(scene: Scene) -> str:
    async with scene.daemon() as daemon:
        scene.journal.unlink()
        assert (await (await daemon.peer()).ask(REGISTER))["ok"]
    return await scene.logged("begins a new one")


@says("… ends in a batch that was not written whole: cut off at byte …")
async def torn_batch(scene: Scene) -> str:
    async with scene.daemon():
        pass
    with scene.journal.open("ab") as file:
        file.write(b'{"line":2,"batch":1,"rev":1')
    async with scene.daemon():
        return await scene.logged("not written whole")


@says("… is damaged, and registry.json has what was lost; history begins after the damage")
async def history_damaged(scene: Scene) -> str:
    async with scene.daemon() as daemon:
        assert (await (await daemon.peer()).ask(REGISTER))["ok"]
    async with scene.daemon():
        pass
    scene.journal.write_bytes(scene.journal.read_bytes().replace(b'"state":"ready"', b'"state":"rea#y"'))
    async with scene.daemon():
        return await scene.logged("history begins after the damage")


@says("the journal beside … does not have the line that the file names, so it is set aside")
async def journal_of_another_file(scene: Scene) -> str:
    async with scene.daemon():
        pass
    text = scene.registry.read_text()
    scene.registry.write_text(text.replace('"line": 1', '"line": 99'))
    async with scene.daemon():
        return await scene.logged("does not have the line")


@says("… is missing, so the journal is set aside")
async def file_missing(scene: Scene) -> str:
    async with scene.daemon():
        pass
    scene.registry.unlink()
    async with scene.daemon():
        return await scene.logged("so the journal is set aside")


@says(
    "… was changed by another program: its content is kept as …, and regd writes its own. To edit the file, stop regd first"
)
async def file_edited(scene: Scene) -> str:
    async with scene.daemon() as daemon:
        scene.registry.write_text('{"web": {"port": 8000}}\n')
        assert (await (await daemon.peer()).ask(REGISTER))["ok"]
    return await scene.logged("another program")


@says("user … may only read here; run a regd of your own, …, and set REGD_ADDRESS=…; or have this one …")
async def other_user(scene: Scene) -> str:
    async with scene.daemon(peers=FakeCredentials()):
        message = await scene.regctl("register", "db", "5432", status=4)
    await scene.logged("denied 127.0.0.1 port ")
    return message


@says("the system does not tell regd which user you are, so you may only read; …")
async def unknown_user(scene: Scene) -> str:
    peers = FakeCredentials()
    peers.uid = None
    async with scene.daemon(peers=peers):
        return await scene.regctl("register", "db", "5432", status=4)


# The wire.


async def error_message(scene: Scene, code: str, request: bytes | str | dict[str, Any]) -> str:
    async with scene.daemon() as daemon:
        reply = await (await daemon.peer()).ask(request)
        assert reply["error"] == code
        return str(reply["message"])


@says("this is regd: one JSON object a line, such as …, or a bare line such as …")
async def stranger(scene: Scene) -> str:
    message = await error_message(scene, "bad_request", b"\x16\x03\x01\n")
    await scene.logged("which does not speak regd")
    return message


@says("not JSON at character …: …")
async def no_json(scene: Scene) -> str:
    return await error_message(scene, "bad_json", "{'cmd': 'ping'}")


@says("no command …")
async def unknown_command(scene: Scene) -> str:
    return await error_message(scene, "unknown_command", {"cmd": "lookup", "name": "db"})


@says("… has no argument …")
async def unknown_argument(scene: Scene) -> str:
    return await error_message(scene, "bad_argument", {**REGISTER, "prot": 1})


@says("a line is at most … bytes; this one was skipped")
async def long_line(scene: Scene) -> str:
    line = json.dumps({**REGISTER, "meta": {"k": "x" * DEFAULT.line_bytes_max}})
    return await error_message(scene, "too_large", line)


@says("too many connections (…); close some or try again later")
async def too_many_connections(scene: Scene) -> str:
    async with scene.daemon(limits=replace(DEFAULT, connections_max=1)) as daemon:
        assert (await (await daemon.peer()).ask("ping"))["ok"]
        return await scene.regctl("ping", status=4)


@says("regd is stopping; connect again in a moment")
async def stopping(scene: Scene) -> str:
    async with scene.daemon() as daemon:
        peer = await daemon.peer()
        peer.send({"cmd": "resolve", "name": "db", "wait": 60})
        await until(lambda: daemon.server.waiting == 1)
        await daemon.server.stop()
        reply = await peer.reply()
        assert reply["error"] == "shutting_down"
        return str(reply["message"])
