"""Producers of the daemon's messages, at the start, in the log and on the wire: each causes one for real."""

import errno
import json
from dataclasses import replace
from typing import Any

import pytest

from regd.core.limits import DEFAULT
from regd.storage.store import StorageError
from regd.system import peer_credentials
from regd.system.listener import ListenError
from tests.support.daemon import InLoop
from tests.support.files import FULL, ToldFiles
from tests.support.peers import Told
from tests.support.polling import until
from tests.support.scenes import Producers, Scene

says = Producers()
REGISTER: dict[str, Any] = {"cmd": "register", "name": "db", "port": 5432}


# It does not start.


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
        said = await scene.regd("--port", "0", status=1)
        assert "alpha" in said
        assert pid not in said
        return said


@says("cannot tell which user is at the other end of a TCP connection: …; listen on a Unix socket alone with …")
async def nobody_tells(scene: Scene) -> str:
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
    said = await scene.process("regd", "--port", "0", status=1)
    assert list(scene.folder.iterdir()) == []
    return said


@says(
    "… is relative, and the current folder cannot be found (…); pass an absolute path, or change to another folder"
)
async def no_current_folder(scene: Scene) -> str:
    # Python 3.13.0 cannot import socket where the current folder is gone and in sys.path, as it is behind `-c`.
    gone = ("env", "PYTHONSAFEPATH=1", "sh", "-c", 'mkdir gone && cd gone && rmdir ../gone && exec "$@"', "sh")
    return await scene.regd("--port", "0", "--registry", "r.json", status=1, before=gone)


@says("…: …; nothing was changed: correct the file, or move it away to start empty")
async def registry_does_not_parse(scene: Scene) -> str:
    scene.registry.write_text('{\n"db": {"port": 5432},\n}\n')
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
    files = ToldFiles()
    files.failing["create"] = errno.EACCES
    with pytest.raises(StorageError) as caught:
        await InLoop(scene.registry, files=files).__aenter__()
    return str(caught.value)


@says("… (see regd --help)")
async def bad_flag(scene: Scene) -> str:
    return await scene.regd("--port", "70000", status=2)


# Its log.


@says("the registry file could not be written (…); the change is not in effect")
async def disk_full(scene: Scene) -> str:
    files = ToldFiles()
    async with scene.daemon(files=files):
        files.failing["write"] = FULL
        said = await scene.regctl("register", "db", "5432", status=4)
        files.failing.clear()
    await scene.logged("changes are refused until it can be written")
    return said


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
    async with scene.daemon(peers=Told()):
        said = await scene.regctl("register", "db", "5432", status=4)
    await scene.logged("denied 127.0.0.1 port ")
    return said


@says("the system does not tell regd which user you are, so you may only read; …")
async def unknown_user(scene: Scene) -> str:
    told = Told()
    told.uid = None
    async with scene.daemon(peers=told):
        return await scene.regctl("register", "db", "5432", status=4)


# The wire.


async def answer(scene: Scene, code: str, *requests: bytes | str | dict[str, Any], **how: Any) -> str:
    """Return the message of the reply to the last request."""
    async with scene.daemon(**how) as daemon:
        peer = await daemon.peer()
        for request in requests:
            reply = await peer.ask(request)
        assert reply["error"] == code
        return str(reply["message"])


@says("this is regd: one JSON object a line, such as …, or a bare line such as …")
async def stranger(scene: Scene) -> str:
    said = await answer(scene, "bad_request", b"\x16\x03\x01\n")
    await scene.logged("which does not speak regd")
    return said


@says("not JSON at character …: …")
async def no_json(scene: Scene) -> str:
    return await answer(scene, "bad_json", "{'cmd': 'ping'}")


@says("no command …")
async def unknown_command(scene: Scene) -> str:
    return await answer(scene, "unknown_command", {"cmd": "lookup", "name": "db"})


@says("… has no argument …")
async def unknown_argument(scene: Scene) -> str:
    return await answer(scene, "bad_argument", {**REGISTER, "prot": 1})


@says("a line is at most … bytes; this one was skipped")
async def long_line(scene: Scene) -> str:
    return await answer(scene, "too_large", json.dumps({**REGISTER, "meta": {"k": "x" * DEFAULT.line_bytes_max}}))


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
        await until(lambda: daemon.server.parked == 1)
        await daemon.server.stop()
        reply = await peer.reply()
        assert reply["error"] == "shutting_down"
        return str(reply["message"])
