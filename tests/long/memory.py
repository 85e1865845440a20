"""Measure a daemon's memory with every limit used to the full, and compare it with the table of limits.

Run by `make memory`. Each limit is filled until the daemon refuses or drops, and stays full. Takes two minutes and a
gibibyte.
"""

import contextlib
import json
import resource
import socket
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from regd.core.limits import DEFAULT
from tests.long.health import Caller
from tests.support.daemon import DaemonProcess

BIG = {f"{n:02}" + "k" * 28: "v" * 34 for n in range(64)}  # the largest meta that is allowed
MIB = 2**20


def resident_bytes(pid: int) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1_024
    raise AssertionError("no VmRSS")


class Saturation:
    """The peers of a daemon. `open` keeps their connections until the end."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.open: list[Caller] = []
        self.client = self.caller()

    def caller(self) -> Caller:
        self.open.append(Caller(self.port))
        return self.open[-1]

    def stats(self) -> dict[str, Any]:
        return self.client.ask(cmd="stats")

    def registry(self) -> None:
        """Fill the registry and its history."""
        peers = [self.caller() for _ in range(16)]
        for round in range(1_000):
            for number, peer in enumerate(peers):
                peer.send(
                    *(
                        {"cmd": "register", "name": f"n{number}-{round}-{n}", "port": 1, "meta": BIG}
                        for n in range(64)
                    )
                )
            replies = [json.loads(peer.line()) for peer in peers for _ in range(64)]
            if any(not reply["ok"] for reply in replies):
                assert {reply.get("error") for reply in replies} <= {None, "busy"}
                return

    def kept(self) -> None:
        """Open watches with the largest filters."""
        while True:
            peer = self.caller()
            peer.send(*({"cmd": "watch", "name": f"x{n}", "meta": BIG} for n in range(250)))
            for _ in range(250):
                while "event" in (reply := json.loads(peer.line())):
                    pass
                if not reply["ok"]:
                    assert reply["error"] == "busy"
                    return

    def input(self) -> None:
        """Send unfinished lines until the first connection is closed."""
        line = b"{" + b" " * (DEFAULT.line_bytes_max - 2)
        for _ in range(DEFAULT.input_bytes_total_max // len(line)):
            self.caller().socket.sendall(line)
        self.stats()

    def output(self) -> None:
        """Request pages without reading until the first connection is dropped."""
        before = self.stats()["dropped"]
        while self.stats()["dropped"] == before:
            with contextlib.suppress(ConnectionError):
                self.caller().send(*({"cmd": "list"} for _ in range(64)))

    def connections(self) -> None:
        """Open idle connections until one is refused."""
        while True:
            peer = socket.create_connection(("127.0.0.1", self.port))
            peer.settimeout(0.0005)
            with contextlib.suppress(TimeoutError):
                assert b"busy" in peer.recv(4_096)
                return
            keeper = Caller.__new__(Caller)
            keeper.socket = peer
            self.open.append(keeper)


def main() -> int:
    files = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (files[1], files[1]))
    promised = DEFAULT.memory_bytes
    with tempfile.TemporaryDirectory() as folder, DaemonProcess(Path(folder) / "registry.json") as daemon:
        daemon.start()
        assert daemon.process is not None
        pid = daemon.process.pid
        began = before = resident_bytes(pid)
        print(f"{'started':12} {began / MIB:6.0f} MiB")
        saturation = Saturation(daemon.port)
        steps: list[Callable[[], None]] = [
            saturation.registry,
            saturation.kept,
            saturation.input,
            saturation.output,
            saturation.connections,
        ]
        for step in steps:
            step()
            now = resident_bytes(pid)
            print(f"{step.__name__:12} {now / MIB:6.0f} MiB, {(now - before) / MIB:+.0f}", flush=True)
            before = now
        stats = saturation.stats()
        print(
            {key: stats[key] for key in ("registrations", "registry_bytes", "watches", "connections", "dropped")}
        )
        print(
            f"the table promises {promised / MIB:.0f} MiB beside the program; taken: {(before - began) / MIB:.0f} MiB"
        )
        return int(before - began > promised + 100 * MIB)


if __name__ == "__main__":
    sys.exit(main())
