"""Hostile connections against a daemon, and the response times of a well-behaved peer meanwhile.

`python -m tests.long.siege [SCENARIO…]` prints a table; `tests/long/test_siege.py` is the short form. Each scenario
has its own daemon and peer process on loopback, with a bounded number of connections and a bounded duration.

The peer pings, resolves, registers and reconnects, before and during the scenario. Afterwards all hostile
connections must be closed, memory released, and nothing registered that should not be.
"""

import argparse
import contextlib
import json
import os
import resource
import select
import socket
import statistics
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from regd_client.blocking import BlockingConnection
from regd_client.errors import RegdError
from tests.support.daemon import ROOT, WAIT_S, DaemonProcess, environment

SEEDED = 900  # registrations of about 1 kB; a list of them all is nearly 1 MiB
PAUSE_S = 0.005  # between two rounds of the peer
SPARE_FILES = 256
OTHER = 65_533  # a uid that no user of the machine has

Sample = tuple[float, str, float]  # time, kind, and milliseconds; negative if refused


class Crowded(Exception):
    """This process may not open as many connections as the scenario needs."""


# The well-behaved peer, in a process of its own.


def behave(address: str) -> None:
    """Take samples until the end of stdin, then print them."""
    samples: list[Sample] = []

    def take(what: str, do: Callable[[], bool]) -> None:
        began = time.monotonic()
        served = do()
        samples.append((began, what, (time.monotonic() - began) * 1_000 if served else -1.0))

    def anew() -> bool:
        try:
            with BlockingConnection(address, WAIT_S) as other:
                return bool(other.ask("ping")["ok"])
        except RegdError:
            return False

    ended = threading.Event()

    def listen() -> None:
        sys.stdin.read()
        ended.set()

    threading.Thread(target=listen, daemon=True).start()
    with BlockingConnection(address, WAIT_S) as kept:
        count = 0
        while not ended.wait(PAUSE_S):
            count += 1
            register = {"name": "good", "port": 1, "meta": {"count": str(count)}}
            take("ask", lambda: bool(kept.ask("ping")["ok"]))
            take("register", lambda register=register: bool(kept.ask("register", **register)["ok"]))  # type: ignore[misc]
            take("ask", lambda: bool(kept.ask("resolve", name="good")["ok"]))
            take("connect", anew)
    sys.stdout.write(json.dumps(samples))


# One siege.


@dataclass
class Siege:
    """A daemon under siege. A scenario stays for `hold_s` seconds after its connections are open."""

    daemon: DaemonProcess
    hold_s: float = 0.0
    sockets: list[socket.socket] = field(default_factory=list)
    rss_most: float = 0.0
    notes: list[str] = field(default_factory=list)

    @property
    def pid(self) -> int:
        assert self.daemon.process is not None
        return self.daemon.process.pid

    def rss(self) -> float:
        """Return the daemon's memory in MiB (Linux: proc(5))."""
        status = Path(f"/proc/{self.pid}/status").read_text()
        return int(status.partition("VmRSS:")[2].split()[0]) / 1_024

    def connect(self, *, small: bool = False, uid: int = 0) -> socket.socket:
        """Connect, with `small` receive buffers, or as the user `uid`, for which the process must be root."""
        if uid:
            os.seteuid(uid)
        try:
            sock = socket.socket()
        finally:
            if uid:
                os.seteuid(0)
        self.sockets.append(sock)
        sock.settimeout(WAIT_S)
        if small:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4_096)
        sock.connect(("127.0.0.1", self.daemon.port))
        return sock

    def stats(self) -> dict[str, Any]:
        with BlockingConnection(self.daemon.addresses[0], WAIT_S) as peer:
            return peer.ask("stats")

    def stay(self) -> None:
        time.sleep(self.hold_s)

    def close(self) -> None:
        for sock in self.sockets:
            sock.close()
        self.sockets.clear()


def reset(made: socket.socket) -> None:
    """Reset a connection."""
    made.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    made.close()


def rest(made: socket.socket) -> list[dict[str, Any]]:
    """Read all lines until the connection ends."""
    with made.makefile("rb") as lines:
        return [json.loads(line) for line in lines]


def send(made: socket.socket, data: bytes) -> bool:
    """Send data, and return False if the connection is closed."""
    try:
        made.sendall(data)
    except OSError:
        return False
    return True


def held(name: str) -> bytes:
    return json.dumps({"cmd": "register", "name": name, "port": 1, "hold": True}).encode() + b"\n"


def open_files(wanted: int) -> int:
    """Raise the limit of open files, and return how many of the wanted connections it allows."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = wanted + SPARE_FILES if hard == resource.RLIM_INFINITY else min(wanted + SPARE_FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    return min(wanted, most - SPARE_FILES)


# The scenarios. `besiege` closes their sockets.


def half_closes(siege: Siege, count: int) -> None:
    """Peers that close their sending side in the middle of a line or of a pipeline."""
    for n in range(count):
        sock = siege.connect()
        sock.sendall(b"ping\n" * 20 + b'{"cmd":"register","name":"half","po')
        sock.shutdown(socket.SHUT_WR)
        replies = rest(sock)
        assert [reply.get("error") for reply in replies] == [None] * 20 + ["bad_json"]
        sock = siege.connect()
        sock.sendall(b"".join(held(f"half{n}-{m}") for m in range(20)) + b"resolve ")
        sock.shutdown(socket.SHUT_WR)
        replies = rest(sock)
        assert [reply.get("error") for reply in replies] == [None] * 20 + ["bad_argument"]


def resets(siege: Siege, count: int) -> None:
    """Peers that reset in the middle of a line, a reply or a wait."""
    middles = (
        b"",
        b'{"cmd":"register","name":"half","po',
        b"".join(held(f"cut{n}") for n in range(50)) + b'{"cmd":',
        b"list\n" * 50,
        b"watch\nping\n",
        b'{"cmd":"resolve","name":"none","wait":100,"id":1}\n' * 10,
        b"POST / HTTP/1.1\r\n\r\n" + held("evil"),
    )
    for n in range(count):
        sock = siege.connect()
        sock.sendall(middles[n % len(middles)])
        reset(sock)


def slow(siege: Siege, count: int) -> None:
    """Peers that send a byte a second. `line_idle_s_max` must not end them while bytes arrive."""
    socks = [siege.connect() for _ in range(open_files(count))]
    for byte in b'{"cmd"'[: max(1, int(siege.hold_s))]:
        until = time.monotonic() + min(1.0, siege.hold_s)
        for sock in socks:
            sock.sendall(bytes([byte]))
        time.sleep(max(0.0, until - time.monotonic()))
    if siege.hold_s < 1:
        return  # that a peer that stops is closed is tested elsewhere, with time moved by hand
    stopped_at = time.monotonic()
    for sock in socks:
        sock.settimeout(25)
        assert [reply["error"] for reply in rest(sock)] == ["timeout"]
    siege.notes.append(f"all were ended {time.monotonic() - stopped_at:.1f} s after their last byte")


def deaf_lists(siege: Siege, count: int) -> None:
    """Peers that request large replies and do not read them."""
    for _ in range(open_files(count)):
        send(siege.connect(small=True), b"list\n" * 1_000)
    siege.stay()
    cut = siege.stats()["dropped"]
    siege.notes.append(f"{cut} were cut")
    assert cut < count


def deaf_watches(siege: Siege, count: int) -> None:
    """Peers that open as many watches as allowed and do not read."""
    each = max(1, min(256, count))
    for _ in range(max(1, count // 256)):
        send(siege.connect(small=True), b'{"cmd":"watch"}\n' * each)
    until = time.monotonic() + WAIT_S
    while siege.stats()["watches"] < 1:
        assert time.monotonic() < until
    siege.stay()
    siege.notes.append(f"{siege.stats()['watches']} watches had begun")


def idle(siege: Siege, count: int) -> None:
    """Peers that connect and do nothing."""
    there = open_files(count)
    if there < count:
        siege.notes.append(f"only {there}: no more files may be open here")
    for _ in range(there):
        siege.connect()
    until = time.monotonic() + WAIT_S
    while siege.stats()["connections"] < there:
        assert time.monotonic() < until
    siege.stay()


def full_house(siege: Siege, count: int) -> None:
    """More connections than allowed: the excess is refused, the others served, and places are free again later."""
    most = int(siege.stats()["limits"]["connections_max"])
    if open_files(most + count) < most + count:
        raise Crowded(f"{most + count} connections are more than may be open here")
    socks = [siege.connect() for _ in range(most + count)]
    first = socks[0]
    first.sendall(b"ping\n")
    assert first.recv(100) == b'{"ok":true}\n'
    # Any of them may be refused, since the peer reconnects. It has one of the places all the time.
    poll = select.poll()
    for sock in socks:
        poll.register(sock, select.POLLIN)
    numbered = {sock.fileno(): sock for sock in socks}
    refused: set[int] = set()
    until = time.monotonic() + WAIT_S
    while len(refused) <= count:
        assert time.monotonic() < until, f"{len(refused)} of {most + count} were refused"
        for number, _ in poll.poll(100):
            poll.unregister(number)
            refused.add(number)
    assert all([reply["error"] for reply in rest(numbered[index])] == ["busy"] for index in refused)
    siege.stay()
    first.sendall(b"ping\n")
    assert first.recv(100) == b'{"ok":true}\n'
    for sock in socks[count:]:
        sock.close()  # keep a few
    assert siege_ends(siege, lambda stats: stats["connections"] <= count + 5)
    siege.notes.append(f"{len(refused)} of {most + count} were told, with room for {most}")


def comings_and_goings(siege: Siege, count: int) -> None:
    """Peers that connect and close at once."""
    for n in range(count):
        sock = siege.connect()
        (reset if n % 2 else socket.socket.close)(sock)
        siege.sockets.clear()


def endless_lines(siege: Siege, count: int) -> None:
    """Peers that send a line of the maximum length without an end."""
    line = b"{" + b"x" * 65_535
    sent = sum(send(siege.connect(), line) for _ in range(open_files(count)))
    siege.stay()
    stats = siege.stats()
    until = time.monotonic() + WAIT_S  # the daemon has not read everything yet
    while not stats["dropped"] and sent * len(line) > stats["limits"]["input_bytes_total_max"]:
        assert time.monotonic() < until, "more is buffered than allowed, and no connection was closed"
        stats = siege.stats()
    siege.notes.append(f"{stats['dropped']} were closed")


def strangers(siege: Siege, count: int) -> None:
    """HTTP requests of browsers, all at once, with commands in their bodies."""
    before = siege.stats()["bad_protocol"]
    socks = [siege.connect() for _ in range(open_files(count))]
    for sock in socks:
        send(sock, b"POST / HTTP/1.1\r\nHost: evil.example\r\n\r\n" + held("evil"))
    for sock in socks:
        with sock.makefile("rb") as reply:
            assert reply.read().startswith(b"HTTP/1.1 400 ")
    assert siege.stats()["bad_protocol"] == before + len(socks)


def pipeline(siege: Siege, count: int) -> None:
    """A peer that sends `count` requests and reads late. All are answered in order."""
    sock = siege.connect(small=True)
    requests = b"".join(b'{"cmd":"resolve","name":"seed1","id":%d}\n' % n for n in range(count))
    sock.setblocking(False)
    sent = 0
    until = time.monotonic() + max(0.2, siege.hold_s)
    while time.monotonic() < until and sent < len(requests):
        try:
            sent += sock.send(requests[sent : sent + 1_048_576])
        except BlockingIOError:
            time.sleep(0.01)
    siege.notes.append(f"{sent / len(requests):.0%} of it was taken before the first reply was read")
    sock.setblocking(True)
    sock.settimeout(WAIT_S)
    feeding = threading.Thread(target=send, args=(sock, requests[sent:]))
    feeding.start()
    with sock.makefile("rb") as lines:
        for n in range(count):
            assert b'"id":%d,' % n in next(lines)[:40]
    feeding.join()


def expensive_requests(siege: Siege, count: int) -> None:
    """Many peers with expensive requests: searches of all registrations that find none."""
    requests = b'{"cmd":"list","meta":{"no":"such"}}\n' * 100
    socks = [siege.connect() for _ in range(count)]
    for sock in socks:
        sock.sendall(requests + b"quit\n")
    assert all(len(rest(sock)) == 100 for sock in socks)


def others_list(siege: Siege, count: int) -> None:
    """Peers of another user that request large replies and do not read. Only these are dropped."""
    there = open_files(count)
    owner = siege.connect(small=True)
    owner.sendall(held("good.owner") + b"list\n" * 20)
    for _ in range(there):
        send(siege.connect(small=True, uid=OTHER), b"list\n" * 20)
    siege.stay()
    siege.notes.append(f"{siege.stats()['dropped']} were cut")
    with owner.makefile("rb") as lines:
        assert all(json.loads(next(lines))["ok"] for _ in range(21))
    owner.sendall(b'{"cmd":"deregister","name":"good.owner"}\n')
    assert json.loads(owner.recv(1_000))["ok"]


def others_ask(siege: Siege, count: int) -> None:
    """Peers of another user that send many cheap requests at once."""
    socks = [siege.connect(uid=OTHER) for _ in range(open_files(count))]
    requests = [
        b"help",
        b'{"cmd":"help"}',
        b'{"cmd":"stats"}',
        b'{"cmd":"resolve","name":"seed1"}',
        b"ping",
        b"list seed1",
    ]
    for request in requests:
        for sock in socks:
            sock.sendall(request + b"\n")
        for sock in socks:
            while not sock.recv(65_536).endswith(b"\n"):
                pass


@dataclass(frozen=True)
class Scenario:
    """A scenario with `count` connections in the long form and `few` in the short one."""

    attack: Callable[[Siege, int], None]
    count: int
    few: int
    hold_s: float = 1.0
    needs_root: bool = False

    @property
    def name(self) -> str:
        return self.attack.__name__


SCENARIOS = (
    Scenario(half_closes, 300, 8),
    Scenario(resets, 3_500, 70),
    Scenario(slow, 1_000, 50, hold_s=4.0),
    Scenario(deaf_lists, 600, 24, hold_s=2.0),
    Scenario(deaf_watches, 12_800, 256, hold_s=3.0),
    Scenario(idle, 10_000, 500, hold_s=3.0),
    Scenario(full_house, 500, 50, hold_s=2.0),
    Scenario(comings_and_goings, 5_000, 200),
    Scenario(endless_lines, 1_500, 1_100, hold_s=2.0),
    Scenario(strangers, 3_000, 200),
    Scenario(expensive_requests, 200, 5),
    Scenario(pipeline, 100_000, 20_000, hold_s=2.0),
    Scenario(others_list, 2_500, 40, hold_s=2.0, needs_root=True),
    Scenario(others_ask, 2_500, 200, needs_root=True),
)


# Before, during, after.


@dataclass
class Figures:
    """The measurements of a siege."""

    calm: list[Sample]
    under: list[Sample]
    rss: tuple[float, float, float]  # MiB before, maximum, after
    took_s: float
    gone_s: float
    log: str
    names: set[str]
    notes: list[str]

    def of(self, what: str, samples: list[Sample]) -> list[float]:
        return sorted(ms for _, kind, ms in samples if kind == what and ms >= 0)

    def refused(self) -> int:
        return sum(ms < 0 for _, _, ms in self.under)


@contextlib.contextmanager
def peer_of(address: str) -> "Iterator[subprocess.Popen[str]]":
    peer = subprocess.Popen(
        [sys.executable, "-m", "tests.long.siege", "--peer", address],
        cwd=ROOT, env=environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    with peer:
        try:
            yield peer
        except BaseException:
            peer.kill()
            raise


@contextlib.contextmanager
def sampled(siege: Siege) -> Iterator[None]:
    """Record the maximum of the daemon's memory during the block."""
    ended = threading.Event()

    def look() -> None:
        while not ended.wait(0.02):
            siege.rss_most = max(siege.rss_most, siege.rss())

    siege.rss_most = siege.rss()
    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def siege_ends(siege: Siege, is_over: Callable[[dict[str, Any]], bool]) -> bool:
    """Wait until `is_over(stats)` is true."""
    until = time.monotonic() + WAIT_S
    while time.monotonic() < until:
        with contextlib.suppress(RegdError):  # no connection may be free
            if is_over(siege.stats()):
                return True
        time.sleep(0.02)
    return False


def seed(address: str) -> None:
    with BlockingConnection(address, WAIT_S) as peer:
        lines = b"".join(
            json.dumps({"cmd": "register", "name": f"seed{n}", "port": 1, "meta": {"k": "v" * 1_000}}).encode()
            + b"\n"
            for n in range(SEEDED)
        )
        with socket.create_connection((peer.address.host, peer.address.port), WAIT_S) as sock:
            sock.sendall(lines + b"quit\n")
            assert len(rest(sock)) == SEEDED


def besiege(daemon: DaemonProcess, scenario: Scenario, count: int, hold_s: float, calm_s: float) -> Figures:
    """Run a scenario against a new daemon, and return the measurements."""
    daemon.start()
    seed(daemon.addresses[0])
    siege = Siege(daemon, hold_s)
    with peer_of(daemon.addresses[0]) as peer:
        assert siege_ends(siege, lambda stats: "good" in {instance["name"] for instance in listed(siege, "good")})
        began_at = time.monotonic()
        time.sleep(calm_s)
        before = siege.rss()
        siege_at = time.monotonic()
        with sampled(siege):
            with contextlib.closing(siege):
                scenario.attack(siege, count)
            over_at = time.monotonic()
            assert siege_ends(siege, lambda stats: stats["connections"] <= 3)
            gone_at = time.monotonic()
        out, _ = peer.communicate(timeout=WAIT_S)
        samples = [(at, what, ms) for at, what, ms in json.loads(out)]
    assert siege_ends(siege, lambda stats: stats["connections"] == 1 and not stats["watches"] + stats["waiting"])
    after, names = siege.rss(), {instance["name"] for instance in listed(siege, "*")}
    status, log = daemon.end()
    assert status == 0, log
    return Figures(
        [sample for sample in samples if began_at <= sample[0] < siege_at],
        [sample for sample in samples if siege_at <= sample[0] < gone_at],
        (before, siege.rss_most, after),
        over_at - siege_at, gone_at - over_at, log, names, siege.notes,
    )  # fmt: skip


def listed(siege: Siege, pattern: str) -> list[dict[str, Any]]:
    with BlockingConnection(siege.daemon.addresses[0], WAIT_S) as peer:
        instances: list[dict[str, Any]] = []
        page = peer.ask("list", name=pattern)
        instances += page["instances"]
        while "next" in page:
            page = peer.ask("list", name=pattern, after=page["next"])
            instances += page["instances"]
        return instances


EXPECTED = {"good", *(f"seed{n}" for n in range(SEEDED))}


def shown(ms: list[float]) -> str:
    if len(ms) < 2:
        return f"{len(ms):>6} of them: too few"
    return f"{statistics.median(ms):8.2f} {statistics.quantiles(ms, n=100, method='inclusive')[98]:8.2f} {ms[-1]:8.2f}"


def show(scenario: Scenario, figures: Figures) -> None:
    say = sys.stdout.write
    say(f"{scenario.name.replace('_', ' ')}, {scenario.count}: {figures.took_s:.1f} s")
    say("".join(f"; {note}" for note in figures.notes) + "\n")
    for what in ("ask", "register", "connect"):
        say(f"  {what:<10} {shown(figures.of(what, figures.calm))}  |{shown(figures.of(what, figures.under))}\n")
    before, most, after = figures.rss
    say(f"  RSS MiB    {before:8.1f} before, {most:8.1f} at most, {after:8.1f} after")
    say(f"; all gone after {figures.gone_s:.2f} s; log of {len(figures.log.splitlines())} lines")
    say(f"; {figures.refused()} refused\n" if figures.refused() else "\n")
    if figures.names != EXPECTED:
        say(f"  WRONG: registered are {sorted(figures.names ^ EXPECTED)[:5]}\n")
    sys.stdout.flush()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.long.siege", description="Hostile connections.")
    parser.add_argument("--peer", metavar="ADDRESS", help="run as the well-behaved peer")
    parser.add_argument("--uvloop", action="store_true", help="the daemon on uvloop")
    parser.add_argument("scenarios", nargs="*", help="only these")
    args = parser.parse_args()
    if args.peer:
        behave(args.peer)
        return
    sys.stdout.write("ms: median, 99 of 100, most — in peace | under siege\n")
    for scenario in SCENARIOS:
        if args.scenarios and scenario.name not in args.scenarios:
            continue
        if scenario.needs_root and os.geteuid() != 0:
            sys.stdout.write(f"{scenario.name.replace('_', ' ')}: left out, only root can become another user\n")
            continue
        with (
            tempfile.TemporaryDirectory() as folder,
            DaemonProcess(
                Path(folder) / "registry.json", "--log-level", "warning", stock=not args.uvloop
            ) as daemon,
        ):
            try:
                show(scenario, besiege(daemon, scenario, scenario.count, scenario.hold_s, calm_s=2.0))
            except Crowded as crowded:
                sys.stdout.write(f"{scenario.name.replace('_', ' ')}: left out, {crowded}\n")


if __name__ == "__main__":
    main()
