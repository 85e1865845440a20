"""Measure how long single commands block the event loop with 100,000 registrations. Run by `make health`.

One process pings without a pause while another sends expensive requests. The longest ping is the time that the
command took from all other peers. `slowest` is the daemon's own measurement.
"""

import json
import multiprocessing
import socket
import sys
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from tests.support.daemon import DaemonProcess

COUNT = 100_000
LIMIT_MS = 20.0
SYNC = b'"event":"sync"'


class Caller:
    """A peer with a blocking socket."""

    def __init__(self, port: int) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port), timeout=60)
        self._lines = self.socket.makefile("rb")

    def send(self, *requests: dict[str, Any]) -> None:
        self.socket.sendall(b"".join(json.dumps(request).encode() + b"\n" for request in requests))

    def line(self) -> bytes:
        return self._lines.readline()

    def ask(self, **request: Any) -> dict[str, Any]:
        self.send(request)
        reply: dict[str, Any] = json.loads(self.line())
        return reply

    def close(self) -> None:
        self._lines.close()
        self.socket.close()


def ping(port: int, told: Connection) -> None:
    """Ping without a pause; report the longest round trip since the last request for it."""
    peer, worst_s = Caller(port), 0.0
    while True:
        began = time.perf_counter()
        peer.ask(cmd="ping")
        worst_s = max(worst_s, time.perf_counter() - began)
        if told.poll(0.0002):
            if told.recv() == "stop":
                return
            told.send(worst_s)
            worst_s = 0.0


def write_registry(path: Path, one_name: bool) -> None:
    with path.open("w") as file:
        for n in range(COUNT):
            key = f"worker/{n:06}" if one_name else f"service-{n:06}"
            fields = {"port": 1 + n % 60_000, "meta": {"zone": "abc"[n % 3], "n": str(n), "about": "x" * 80}}
            file.write(f"{',' if n else '{'}\n{json.dumps(key)}: {json.dumps(fields)}")
        file.write("\n}\n")


def asking(peer: Caller, **request: Any) -> Callable[[], None]:
    def ask() -> None:
        for _ in range(10):
            peer.ask(**request)

    return ask


def reads(port: int, name: str) -> dict[str, Callable[[], None]]:
    peer = Caller(port)

    def snapshot() -> None:
        watcher = Caller(port)
        watcher.send({"cmd": "watch"})
        while SYNC not in watcher.line():
            pass
        watcher.close()

    def pages() -> None:
        after: dict[str, Any] = {}
        while (page := peer.ask(cmd="list", **after)).get("next"):
            after = {"after": page["next"]}

    return {
        "nothing": lambda: time.sleep(1),
        "resolve": asking(peer, cmd="resolve", name=name),
        "resolve, meta that nobody has": asking(peer, cmd="resolve", name=name, meta={"zone": "z"}),
        "resolve, all": asking(peer, cmd="resolve", name=name, all=True),
        "resolve, all, meta of a third": asking(peer, cmd="resolve", name=name, all=True, meta={"zone": "b"}),
        "resolve, wait, meta": asking(peer, cmd="resolve", name=name, wait=0.05, meta={"zone": "b"}),
        "near": asking(peer, cmd="resolve", name=name[:-1] + "x"),
        "list, all pages": pages,
        "list, meta that nobody has": asking(peer, cmd="list", meta={"zone": "z"}),
        "why": asking(peer, cmd="why", name=name),
        "watch, the snapshot": snapshot,
    }


def writes(port: int, name: str) -> dict[str, Callable[[], None]]:
    peer, held = Caller(port), Caller(port)

    def hold() -> None:
        request = {"cmd": "register", "name": name, "port": 1, "hold": True}
        held.send(*({**request, "instance": f"held-{n}"} for n in range(10_000)))
        for _ in range(10_000):
            held.line()

    def let_go() -> None:
        held.close()
        while peer.ask(cmd="stats")["registrations"] > COUNT + 10:
            time.sleep(0.01)

    return {
        "register (the file is written)": asking(peer, cmd="register", name=name, instance="new", port=1),
        "10,000 held by one connection": hold,
        "its end": let_go,
    }


def measure(one_name: bool) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "registry.json"
        write_registry(path, one_name)
        with DaemonProcess(path, "--log-level", "error") as daemon:
            daemon.start()
            ours, theirs = multiprocessing.Pipe()
            pinging = multiprocessing.get_context("spawn").Process(target=ping, args=(daemon.port, theirs))
            pinging.start()
            ours.send("worst")
            ours.recv()
            print(f"{COUNT:,} registrations of {'one name' if one_name else 'as many names'}")
            name = "worker" if one_name else "service-050000"
            for what, act in (reads(daemon.port, name) | writes(daemon.port, name)).items():
                ours.send("worst")
                ours.recv()
                act()
                ours.send("worst")
                worst_ms = 1_000 * ours.recv()
                print(f"  {what:34} others wait {worst_ms:5.1f} ms at worst{'  <--' * (worst_ms > LIMIT_MS)}")
            ours.send("stop")
            pinging.join()
            stats = Caller(daemon.port).ask(cmd="stats")
            print(f"  the daemon says: slowest {stats['slowest']}, lag at most {stats['lag_max_s']} s")


if __name__ == "__main__":
    for one_name in (False, True):
        measure(one_name)
    sys.exit(0)
