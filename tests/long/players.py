"""The clients of the soak: writers, owners, watchers and waiters. They check every reply.

Each client is a coroutine that runs until it is cancelled.
"""

import asyncio
import contextlib
import json
import random
import socket
import subprocess
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from regd_client.client import Client
from regd_client.errors import RegdError, Timeout, Unavailable
from regd_client.mirrors import Mirror
from regd_client.registration import Registration
from tests.long.witnesses import (
    HISTORY,
    Failure,
    Listener,
    Model,
    Record,
    Value,
    Watcher,
    digest,
    key_of,
    value_of,
)
from tests.support.daemon import WAIT_S, DaemonProcess, Peer

GRACE_S = 4.0
TTL_S = 5.0  # renewed every 0.3 s; the rest is for a busy machine
GONE_S = 5.0  # until an ended holder's entry is gone, counted from the daemon's last absence
PATIENCE_S = 20.0  # a client detects a hanging daemon within 15 s
WAIT_FOR_S = 2.0  # the `wait` of a resolve
ZONES: tuple[dict[str, str], ...] = ({}, {"zone": "a"}, {"zone": "b", "much": "x" * 1_500})
STATES = ("ready", "ready", "starting", "draining")
FINE = ("conflict", "not_found", "shutting_down")  # errors that a write may get


class SmallDaemon(DaemonProcess):
    """A daemon with a short history, small segments of the journal and frequent `progress` events."""

    def command(self, *flags: str) -> list[str]:
        program, dash_c, start, *rest = super().command(*flags)
        small = (
            "import dataclasses, regd.core.limits as of; "
            f"of.DEFAULT = dataclasses.replace(of.DEFAULT, history_changes_max={HISTORY}, progress_s=2.0, "
            "journal_segment_bytes_max=65_536); "
        )
        return [program, dash_c, small + start, *rest]


async def ask(peer: Peer, **request: Any) -> dict[str, Any]:
    """Send a request and return its reply; skip events before it."""
    peer.send(request)
    while True:
        line = await peer.line()
        if not line.endswith(b"\n"):
            raise ConnectionResetError("the connection ended")
        reply: dict[str, Any] = json.loads(line)
        if "ok" in reply:
            return reply


def started() -> subprocess.Popen[bytes]:
    return subprocess.Popen(["cat"], stdin=subprocess.PIPE)


class Players:
    def __init__(self, folder: Path, seed: int) -> None:
        self.rng = random.Random(seed)
        self.record, self.model = Record(), Model()
        self.daemon = SmallDaemon(folder / "registry.json", "--grace", str(GRACE_S), "--log-level", "error")
        self.going = asyncio.Event()  # not set at quiet points
        self.back_at = 0.0  # when the daemon last returned, which restarts every lease
        self.busy = 0  # clients in the middle of a step, which ends before the next quiet point
        self.watchers: list[Watcher] = []
        self.listeners: list[Listener] = []
        self.mirrors: dict[str, Mirror] = {}
        self.door: asyncio.Server  # a port that accepts connections

    # Helpers of all clients.

    @contextlib.asynccontextmanager
    async def step(self, most_s: float = 0.0) -> AsyncIterator[None]:
        """Pause, then run the block, which must end before the next quiet point."""
        if most_s:
            await asyncio.sleep(self.rng.uniform(0, most_s))
        await self.going.wait()
        self.busy += 1
        try:
            yield
        finally:
            self.busy -= 1

    @contextlib.asynccontextmanager
    async def peer(self, port: int | None = None, room: int | None = None) -> AsyncIterator[Peer]:
        """Connect to the daemon, or to the proxy at `port`; reset at the end. `room` is the size of the buffer."""
        sock = socket.socket()
        sock.setblocking(False)
        if room is not None:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, room)
        try:
            await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", port or self.daemon.port))
        except BaseException:
            sock.close()
            raise
        peer = Peer(*await asyncio.open_connection(sock=sock, limit=room or 2**21))
        try:
            yield peer
        except TimeoutError:
            if port is None:
                raise Failure("*", f"no line for {WAIT_S:g} s from a daemon that runs") from None
            raise ConnectionResetError from None
        finally:
            with contextlib.suppress(OSError):  # already closed
                await peer.reset()

    async def insist(self, **request: Any) -> dict[str, Any]:
        """Send a request directly to the daemon until it answers."""
        while True:
            with contextlib.suppress(ConnectionError):
                async with self.peer() as peer:
                    reply = await ask(peer, **request)
                    if reply.get("error") != "shutting_down":
                        return reply
            await asyncio.sleep(0.02)

    def want(self, key: str, *values: Value, sure: bool = False) -> None:
        """Record the value that a key may have from now on; with `sure` it must have it, on disk too."""
        self.record.note(key, f"may be {values}{' for sure' if sure else ''}")
        self.model.may[key] = list(values)
        (self.model.sure.add if sure else self.model.sure.discard)(key)

    # Writers.

    async def writer(self, name: str, port: int | None) -> None:
        """Write static registrations, several requests at a time. No other client writes these keys."""
        keys = [key_of(name, instance) for instance in ("", "1", "2", "3")]
        for key in keys:
            self.want(key, None, sure=True)
        revs: dict[str, list[int]] = {key: [0] for key in keys}
        while True:
            with contextlib.suppress(ConnectionError):
                async with self.peer(port) as peer:
                    while True:
                        async with self.step(0.04):
                            await self._burst(peer, revs)
            await asyncio.sleep(0.02)

    async def _burst(self, peer: Peer, revs: dict[str, list[int]]) -> None:
        with contextlib.ExitStack() as stack:
            sent = []
            for key in self.rng.sample(list(revs), self.rng.randint(1, len(revs))):
                request, value = self._write(key, revs[key])
                self.record.note(key, f"asked {request}")
                before = list(self.model.may[key])
                sent.append((key, request, before, stack.enter_context(self.model.write(key, value))))
                peer.send(request)
            for key, request, before, tell in sent:
                line = await peer.line()
                if not line.endswith(b"\n"):
                    raise ConnectionResetError
                reply = json.loads(line)
                self.record.note(key, f"answered {reply}")
                self._judge(key, before, request, reply)
                tell(reply["ok"])
                if reply["ok"]:
                    revs[key].append(reply["rev"])

    def _write(self, key: str, revs: list[int]) -> tuple[dict[str, Any], Value]:
        """Return a write request and the value that it sets."""
        name, _, instance = key.partition("/")
        may, rng = self.model.may[key], self.rng
        request: dict[str, Any] = {"cmd": "register", "name": name, "instance": instance}
        known = may[0] if len(may) == 1 else None
        if rng.random() < 0.2:
            request["cmd"] = "deregister"
            value: Value = None
        else:
            port, meta, state = rng.randint(1, 9), rng.choice(ZONES), rng.choice(STATES)
            priority = rng.choice((0, 0, 1, 65_535))
            request |= {"meta": meta, "state": state, "priority": priority}
            if known is not None and rng.random() < 0.5:
                request["cmd"], port = "update", known[0]
            else:
                request |= {"port": port, "force": rng.random() < 0.2}
            value = (port, tuple(sorted(meta.items())), state, priority)
        if rng.random() < 0.3:
            request["if"] = rng.choice(revs[-2:])
        return request, value

    def _judge(self, key: str, may: list[Value], request: dict[str, Any], reply: dict[str, Any]) -> None:
        """Compare a reply with what was certain before the write."""
        self.record.figures["writes answered" if reply["ok"] else f"refused {reply['error']}"] += 1
        was_there, was_not = None not in may, may == [None]
        wrong = None
        if not reply["ok"]:
            if reply["error"] not in FINE or (reply["error"] == "conflict" and "if" not in request):
                wrong = "such a refusal"
            elif reply["error"] == "not_found" and was_there and request["cmd"] != "register":
                wrong = "not_found, though it is there"
        elif was_not and request["cmd"] != "register":
            wrong = "done to nothing"
        elif request.get("if") == 0 and was_there:
            wrong = "`if` did not hold"
        if wrong:
            raise Failure(key, f"{wrong}: {request} {reply}")

    async def holder(self, key: str, port: int | None, ever: bool = False) -> None:
        """Hold a name by connection, register again when it breaks, and leave by closing it, or never."""
        value: Value = (7, (), "ready", 0)
        self.want(key, None)
        while True:
            async with self.step(0.5):
                self.want(key, value)
            until, left = time.monotonic() + (1e9 if ever else self.rng.uniform(0.2, 6.0)), False
            while not left:
                with contextlib.suppress(ConnectionError):
                    async with self.peer(port) as peer:
                        if (await ask(peer, cmd="register", name=key, port=7, hold=True))["ok"]:
                            self.want(key, value, sure=port is None)
                            if ever:
                                self.record.firm.add(key)
                            await self._stay(peer, until)
                            self.want(key, None)
                            left = True
                await asyncio.sleep(0.02)

    async def _stay(self, peer: Peer, until: float) -> None:
        while time.monotonic() < until or not self.going.is_set():
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(0.1):
                    if not await peer.reader.readline():
                        raise ConnectionResetError

    async def lease(self, key: str) -> None:
        """Renew a lease in time, so that it must never expire; then let it expire."""
        self.want(key, None)
        while True:
            async with self.step(0.5):
                self.want(key, None, (8, (), "ready", 0))
                if not (await self.insist(cmd="register", name=key, port=8, ttl=TTL_S))["ok"]:
                    continue
                self.want(key, (8, (), "ready", 0), sure=True)
            left = self.rng.randint(1, 30)
            while left > 0 or not self.going.is_set():
                left -= 1
                reply = await self.insist(cmd="renew", name=key)
                if not reply["ok"]:
                    raise Failure(key, f"renewed in time, and {reply}")
                await asyncio.sleep(0.3)
            async with self.step():
                self.want(key, None)
                await self._gone(key, TTL_S + GONE_S)

    async def child(self, key: str) -> None:
        """Register a process, and kill it."""
        self.want(key, None)
        while True:
            async with self.step(0.5):
                with started() as process:  # ends with this process
                    self.want(key, None, (9, (), "ready", 0))
                    reply = await self.insist(cmd="register", name=key, port=9, pid=process.pid)
                    if not reply["ok"]:
                        raise Failure(key, f"{reply}")
                    self.want(key, (9, (), "ready", 0), sure=True)
                    await asyncio.sleep(self.rng.uniform(0, 1.0))
                    self.want(key, None)
                    process.kill()
                await self._gone(key, GONE_S)

    async def _gone(self, key: str, within_s: float) -> None:
        began = time.monotonic()
        while (await self.insist(cmd="resolve", name=key))["ok"]:
            if time.monotonic() - max(began, self.back_at) > within_s:
                raise Failure(key, f"resolved {within_s:g} s after its end")
            await asyncio.sleep(0.01)
        self.record.figures["ends seen"] += 1

    async def app(self, key: str, port: int | None, firm: bool = False) -> None:
        """A service that uses the client: register, update and leave; or stay for ever, whatever happens."""
        self.want(key, None)
        async with contextlib.AsyncExitStack() as stack:
            client = Client(f"127.0.0.1:{port or self.daemon.port}")
            stack.push_async_callback(client.close)
            while True:
                async with self.step(0.5):
                    value: Value = (self.rng.randint(20, 29), (), "ready", 0)
                    assert value is not None
                    self.want(key, None, value)  # unanswered, so the entry may exist, and its process lives
                    try:
                        registration = await client.register(key, value[0])
                    except Unavailable:
                        continue
                    self.want(key, value, sure=firm)
                    if firm:
                        self.record.firm.add(key)
                for _ in range(10_000 if firm else self.rng.randint(0, 5)):
                    async with self.step(2.0):
                        value = await self._update(registration, key, value, firm)
                async with self.step():
                    if self.rng.random() < 0.3:
                        await self._rob(registration, key)
                    else:
                        await self._leave(registration, key, value)

    async def _leave(self, made: Registration, key: str, value: Value) -> None:
        there = made._connection is not None and made._connection.usable
        self.want(key, None, value)
        try:
            await made.deregister()
        except Unavailable:
            there = False
        if not there:  # a restarted daemon keeps it while its process lives
            self.record.figures["left, the daemon away"] += 1
            await self.insist(cmd="deregister", name=key)
        self.want(key, None)
        self.record.figures["left"] += 1

    async def _update(self, made: Registration, key: str, old: Value, firm: bool) -> Value:
        meta = self.rng.choice(ZONES)
        assert old is not None
        new: Value = (old[0], tuple(sorted(meta.items())), "ready", 0)
        self.want(key, old, new, sure=firm)
        try:
            await made.update(meta)
        except Unavailable:
            return old
        except RegdError as error:  # disconnected, and not registered again yet
            if error.code != "not_found" or firm:
                raise Failure(key, f"update: {error}") from error
            return old
        self.want(key, new, sure=firm)
        return new

    async def _rob(self, made: Registration, key: str) -> None:
        """Take a name over by force: its owner must be notified and must not take it back."""
        mine: Value = (66, (), "ready", 0)
        await self.insist(cmd="register", name=key, port=66, ttl=60, force=True)
        try:
            async with asyncio.timeout(PATIENCE_S):
                await made.lost.wait()
        except TimeoutError:
            raise Failure(key, "not told that it was lost") from None
        self.record.figures["lost"] += 1
        reply = await self.insist(cmd="list", name=key)
        if [value_of(instance) for instance in reply["instances"]] != [mine]:
            raise Failure(key, f"lost, and {reply}")
        self.want(key, None)
        await self.insist(cmd="deregister", name=key)

    # Readers.

    async def watcher(self, name: str, pattern: str, sleepy: float, breaks: float) -> None:
        """A watch without the client, which reads slowly, or disconnects and resumes."""
        witness = Watcher(self.record, name, pattern)
        self.watchers.append(witness)
        while True:
            with contextlib.suppress(ConnectionError):
                async with self.peer(room=4_096 if sleepy else None) as peer:
                    position = witness.position
                    witness.begin((await ask(peer, cmd="watch", name=pattern, **position))["epoch"])
                    while (line := await peer.line()).endswith(b"\n"):
                        witness.take(json.loads(line))
                        if self.going.is_set() and self.rng.random() < sleepy:
                            await asyncio.sleep(self.rng.uniform(0.5, 3.0))
                        if self.going.is_set() and self.rng.random() < breaks:
                            break
            away_s = (
                self.rng.choice((0.1, 0.1, 4.0)) if self.going.is_set() else 0.1
            )  # longer than the history reaches
            await asyncio.sleep(self.rng.uniform(0, away_s))

    async def lister(self) -> None:
        while True:
            pattern = self.rng.choice(self.watchers).pattern
            reply = await self.insist(cmd="list", name=pattern)
            self.record.agree("list", (reply["epoch"], reply["rev"], pattern), digest(reply["instances"]))
            await asyncio.sleep(0.05)

    async def listener(self, name: str, port: int, pattern: str, meta: dict[str, str]) -> None:
        witness = Listener(self.record, name, pattern, meta)
        self.listeners.append(witness)
        while True:
            async with contextlib.AsyncExitStack() as stack:
                client = Client(f"127.0.0.1:{port}")
                stack.push_async_callback(client.close)
                try:
                    async with contextlib.aclosing(client.watch(pattern, meta=meta)) as events:
                        async for event in events:
                            witness.take(event)
                except (
                    Unavailable
                ) as error:  # raised before the watch has begun; later the client retries silently
                    if witness.picture or witness.synced:
                        raise Failure(name, f"watch ended: {error}") from error

    async def mirror(self, pattern: str, port: int) -> None:
        while True:
            async with contextlib.AsyncExitStack() as stack:
                client = Client(f"127.0.0.1:{port}")
                stack.push_async_callback(client.close)
                with contextlib.suppress(Unavailable):
                    self.mirrors[pattern] = await stack.enter_async_context(client.mirror(pattern))
                    await asyncio.Event().wait()

    async def waiter(self, port: int) -> None:
        """Wait for a name that comes and goes. The reply must come in time, whatever breaks."""
        open_port = int(self.door.sockets[0].getsockname()[1])
        async with contextlib.AsyncExitStack() as stack:
            client = Client(f"127.0.0.1:{port}")
            stack.push_async_callback(client.close)
            while True:
                outcome = "cancelled"
                most_s = self.rng.choice((0.2, WAIT_FOR_S + PATIENCE_S))
                try:
                    async with asyncio.timeout(most_s):
                        endpoint = await client.resolve("late", wait=WAIT_FOR_S)
                    outcome = "found"
                    if endpoint.port != open_port:
                        raise Failure("late", f"{endpoint} accepts nobody")
                except (Timeout, Unavailable) as error:
                    outcome = error.code or "unavailable"
                except TimeoutError:
                    if most_s > WAIT_FOR_S:
                        raise Failure(
                            "late", f"a waiter for {WAIT_FOR_S:g} s was left for {most_s:g} s"
                        ) from None
                self.record.figures[f"waited, {outcome}"] += 1
                await asyncio.sleep(0.1)

    async def latecomer(self) -> None:
        """Register now and then, with a port that accepts or one that refuses connections."""
        open_port = int(self.door.sockets[0].getsockname()[1])
        self.want("late", None)
        while True:
            for port in (1, open_port):
                async with self.step(1.0):
                    value: Value = (port, (), "ready", 0)
                    self.want("late", *self.model.may["late"], value)
                    await self.insist(cmd="register", name="late", port=port)
                    self.want("late", value, sure=True)
            async with self.step(1.0):
                self.want("late", *self.model.may["late"], None)
                await self.insist(cmd="deregister", name="late")
                self.want("late", None, sure=True)
