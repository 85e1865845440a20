"""Producers of the messages of `regctl serve`. Each function causes one message and returns it."""

import os
import socket
import sys
from typing import Any

import pytest

from regd.gateways.address_file import AddressFile
from regd.gateways.guard import find_refusal
from regd.gateways.readers import Readers
from regd.system import peer_credentials
from regd.system.listener import ListenError
from regd_client import project
from tests.support.scenes import Producers, Scene

says = Producers()


def refusal(method: str, **headers: str) -> str:
    """Return why the browser guard refuses a request."""
    fields = {"host": "localhost:7380", **{name.replace("_", "-"): value for name, value in headers.items()}}
    found = find_refusal(method, [(name.encode(), value.encode()) for name, value in fields.items()])
    assert found is not None
    return found.message


@says("regctl serve needs the extra …, and … is missing: …")
async def no_extra(scene: Scene) -> str:
    start = "import sys; sys.modules['dns'] = None; from regd.cli.regctl import main; raise SystemExit(main())"
    return await scene.shell("regctl", f"""'{sys.executable}' -c "{start}" serve""", status=2)


@says("port … is taken by another program; name another with …, or turn it off: …")
async def port_taken(scene: Scene) -> str:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
        return await scene.process("regd.cli.regctl", "serve", "--http", port, "--dns", "0", status=4)


@says(
    "the daemon is behind a Unix socket, for this user alone, and the kernel does not say which users connect to TCP ports; …"
)
async def no_peer_credentials(scene: Scene) -> str:
    scene.patch.setattr(peer_credentials, "_NETLINK_SOCK_DIAG", 31)
    scene.patch.setattr(peer_credentials, "_TABLES", ())
    with socket.create_server(("127.0.0.1", 0)) as server, pytest.raises(ListenError) as caught:
        Readers(restricted=True).open([server])
    return str(caught.value)


def project_folder(scene: Scene) -> str:
    return project.init(str(scene.folder))[0]


@says("… names another … of this project, until that one ends")
async def another_gateway(scene: Scene) -> str:
    folder = project_folder(scene)
    first, second = AddressFile(folder), AddressFile(folder)
    try:
        assert first.write(["http://127.0.0.1:1"]) == ""
        return second.write(["http://127.0.0.1:2"])
    finally:
        first.close()
        second.close()


@says("…/.regd/serve cannot be written: …")
async def no_address_file(scene: Scene) -> str:
    folder = project_folder(scene)
    os.mkdir(os.path.join(folder, "serve"))
    return AddressFile(folder).write(["http://127.0.0.1:1"])


@says("Host must be localhost, 127.0.0.1, [::1] or NAME.localhost")
async def other_host(scene: Scene) -> str:
    return refusal("GET", host="registry.example")


@says("other … may not read the registry (…)")
async def other_site(scene: Scene) -> str:
    origin: dict[str, Any] = {"origin": "http://localhost:3000"}
    assert "(Origin)" in refusal("GET", **origin)
    return refusal("GET", sec_fetch_site="same-site", **origin)


@says("only GET and HEAD: this gateway reads and never writes")
async def write(scene: Scene) -> str:
    return refusal("POST")
