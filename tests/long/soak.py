"""Random clients of a daemon that is killed, suspended and disconnected. All must agree on its state afterwards.

`python -m tests.long.soak [--minutes M] [--seed S]`, or `make soak`. Trouble alternates with quiet points. At a quiet
point watchers, listeners, mirrors, `list`, the disk and the model of the requests must be equal. If one differs, the
history of its subject is printed, and the exit status is 1.
"""

import asyncio
import contextlib
import logging
import signal
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from regd.core.model import key_text
from regd.storage.document import Unreadable
from regd.storage.files import Files
from regd.storage.store import peek
from tests.long import command
from tests.long.players import PATIENCE_S, Players
from tests.long.proxy import Proxy
from tests.long.witnesses import Failure, Listener, Value, Watcher, endpoint_value, fitting, key_of, value_of

T = TypeVar("T")

AGREE_S = 30.0  # until all agree at a quiet point: claim deadline, patience and backoff, on a busy machine


class Soak(Players):
    proxy: Proxy

    # Trouble.

    async def spell(self, long: bool) -> None:
        acts = [self.kill, self.term, self.stop, self.cut, self.deafen]
        self.rng.shuffle(acts)
        for act in acts[: self.rng.randint(2, len(acts))]:
            await asyncio.sleep(self.rng.uniform(0.3, 1.5))
            self.record.note("*", f"=== {act.__name__}")
            self.record.figures[act.__name__] += 1
            await act()
        if long and self.rng.random() < 0.03:
            await self.black_out()
        await asyncio.sleep(self.rng.uniform(0, 1.0))

    async def kill(self) -> None:
        await self._restart(signal.SIGKILL)

    async def term(self) -> None:
        await self._restart(signal.SIGTERM)

    async def _restart(self, number: int) -> None:
        status, errors = await whole(self.daemon.end, number)
        if errors or status != (0 if number == signal.SIGTERM else -number):
            raise Failure("*", f"the daemon ended with {status}: {errors}")
        self.check_disk()
        if self.rng.random() < 0.3:
            self.proxy.cut()
            await self.stale(5.0)
        await asyncio.sleep(self.rng.choice((0.0, 0.5)))
        await whole(self.daemon.start)
        self.back_at = time.monotonic()

    async def stop(self) -> None:
        assert self.daemon.process is not None
        self.daemon.process.send_signal(signal.SIGSTOP)
        await asyncio.sleep(self.rng.uniform(0.2, 3.0))
        self.daemon.process.send_signal(signal.SIGCONT)
        self.back_at = time.monotonic()

    async def cut(self) -> None:
        self.proxy.cut(self.rng.random())

    async def deafen(self) -> None:
        self.proxy.hears.clear()
        await asyncio.sleep(self.rng.uniform(0.2, 3.0))
        self.proxy.hears.set()

    async def black_out(self) -> None:
        """Stop all traffic for longer than any client's patience."""
        self.record.note("*", "=== black_out")
        self.record.figures["black_out"] += 1
        self.proxy.hears.clear()
        await self.stale(PATIENCE_S)
        await asyncio.sleep(PATIENCE_S / 2)
        self.proxy.hears.set()

    async def stale(self, within_s: float) -> None:
        """Check that every mirror reports that it is not live while nothing is forwarded."""
        until = time.monotonic() + within_s
        while any(mirror.live for mirror in self.mirrors.values()):
            if time.monotonic() > until:
                raise Failure("mirror", f"still says that it is live, cut off for {within_s:g} s")
            await asyncio.sleep(0.02)
        if not all(mirror.stale_s > 0.0 for mirror in self.mirrors.values()):
            raise Failure("mirror", "not live, and not stale")
        self.record.figures["stale mirrors seen"] += len(self.mirrors)

    # Agreement.

    def disk(self) -> tuple[int, dict[str, Value]]:
        """Return the revision and the state that a start would find."""
        while True:
            # A running daemon may replace a file while it is read.
            with contextlib.suppress(FileNotFoundError, Unreadable):
                found = peek(self.daemon.registry, Files())
                return found.rev, {
                    key_text(entry.key): (
                        entry.port,
                        tuple(sorted(entry.meta.items())),
                        str(entry.state),
                        entry.priority,
                    )
                    for entry in found.entries
                }
            if self.daemon.process is None:
                raise Failure("*", "the files cannot be read")

    def check_disk(self) -> None:
        """Check after a kill that the disk has all acknowledged and all announced changes."""
        rev, state = self.disk()
        for watcher in self.watchers:
            if watcher.rev is not None and watcher.rev > rev:
                raise Failure(watcher.name, f"was told revision {watcher.rev}, the disk is at {rev}")
        for key in self.model.sure:
            if state.get(key) not in self.model.may[key]:
                raise Failure(key, f"the disk has {state.get(key)}, it may be {self.model.may[key]}")
        self.model.settle(state)

    async def quiet(self) -> None:
        """Stop the trouble, and wait until all agree."""
        self.going.clear()
        self.proxy.calm.set()
        self.record.note("*", "=== quiet")
        began = time.monotonic()
        while True:
            apart = "somebody is still busy", "*"
            if not self.busy:
                apart, state = await self.compare()
                if not apart[0]:
                    break
            if time.monotonic() - began > AGREE_S:
                raise Failure(apart[1], f"no agreement within {AGREE_S:g} s: {apart[0]}")
            await asyncio.sleep(0.05)
        self.record.figures["quiet points"] += 1
        self.record.figures["slowest agreement, ms"] = max(
            self.record.figures["slowest agreement, ms"], int(1_000 * (time.monotonic() - began))
        )
        self.model.settle(state)
        self.record.settle()
        self.proxy.calm.clear()
        self.going.set()

    async def compare(self) -> tuple[tuple[str, str], dict[str, Value]]:
        """Return the first witness that differs from `list`, and the list."""
        reply = await self.insist(cmd="list")
        there = {
            key_of(instance["name"], instance["instance"]): value_of(instance) for instance in reply["instances"]
        }
        rev, on_disk = self.disk()
        if (rev, on_disk) != (reply["rev"], there):
            return (f"the disk is at {rev}: {differing(on_disk, there)}", "*"), there
        for key in there.keys() | self.model.may.keys():
            if there.get(key) not in (may := self.model.may.get(key, [None])):
                return (f"{there.get(key)} is there, it may be {may}", key), there
        witnesses: Sequence[Watcher | Listener] = [*self.watchers, *self.listeners]
        for witness in witnesses:
            fits = fitting(witness.pattern, witness.meta, there)
            if witness.view != fits:
                return (f"{differing(witness.view or {}, fits)} of those who are there", witness.name), there
        for pattern, mirror in self.mirrors.items():
            ready = {
                key: value for key, value in fitting(pattern, {}, there).items() if value and value[2] == "ready"
            }
            names = {key.partition("/")[0] for key in self.model.may}
            seen = {key_of(e.name, e.instance): endpoint_value(e) for n in names for e in mirror.resolve_all(n)}
            if not mirror.live or mirror.stale_s or seen != ready:
                return (f"mirror {pattern}, live {mirror.live}: {differing(seen, ready)}", "mirror"), there
        return ("", ""), there

    async def empty(self) -> None:
        """Check that nothing is left after all clients have left."""
        static = {
            key: value for key, value in self.disk()[1].items() if value and key.startswith(("static.", "late"))
        }
        until = time.monotonic() + AGREE_S
        while True:
            stats = await self.insist(cmd="stats")
            gauges = {name: stats[name] for name in ("connections", "watches", "waiting", "processes")}
            left = {
                key_of(e["name"], e["instance"]): value_of(e)
                for e in (await self.insist(cmd="list"))["instances"]
            }
            if gauges == {"connections": 1, "watches": 0, "waiting": 0, "processes": 0} and left == static:
                return
            if time.monotonic() > until:
                raise Failure("*", f"all have left, and {gauges}, {differing(left, static)}")
            await asyncio.sleep(0.1)

    # All clients.

    def roles(self) -> list[Coroutine[Any, Any, None]]:
        bad = self.proxy.port
        return [
            *(self.writer(f"static.{n}", (None, bad)[n % 2]) for n in range(4)),
            self.holder("held.ever", None, ever=True),
            self.holder("held.firm", None),
            self.holder("held.shaky", bad),
            self.lease("leased"),
            *(self.child(f"child{n}") for n in range(2)),
            *(self.app(f"app.{n}", bad) for n in range(4)),
            *(self.app(f"firm.{n}", None, firm=True) for n in range(3)),
            self.watcher("fast", "*", 0.0, 0.0),
            self.watcher("slow", "*", 0.002, 0.0),
            self.watcher("resuming", "*", 0.0, 0.005),
            self.watcher("both", "*", 0.002, 0.002),
            self.watcher("static", "static.*", 0.0, 0.005),
            self.watcher("one", "app.1", 0.002, 0.005),
            self.lister(),
            self.listener("hears all", bad, "*", {}),
            self.listener("hears apps", bad, "app.*", {}),
            self.listener("hears a zone", bad, "*", {"zone": "a"}),
            self.listener("hears all, directly", self.daemon.port, "*", {}),
            self.mirror("*", bad),
            self.mirror("app.*", bad),
            self.mirror("static.0", bad),
            *(self.waiter(bad) for _ in range(3)),
            self.latecomer(),
        ]

    async def run(self, seconds: float) -> None:
        await asyncio.to_thread(self.daemon.start)
        self.door = await asyncio.start_server(lambda reader, writer: writer.close(), "127.0.0.1", 0)
        async with self.door, Proxy(self.daemon.port, self.rng) as self.proxy:
            until = time.monotonic() + seconds
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(role) for role in self.roles()]
                self.going.set()
                while time.monotonic() < until:
                    await self.spell(seconds > 60)
                    await self.quiet()
                for task in tasks:
                    task.cancel()
            self.record.figures.update(
                {f"proxy: {kind or 'fine'}": n for kind, n in self.proxy.accidents.items()}
            )
            await self.empty()
        status, errors = await asyncio.to_thread(self.daemon.end)
        if status or errors:
            raise Failure("*", f"the daemon ended with {status}: {errors}")


async def whole(call: Callable[..., T], *arguments: int) -> T:
    """Call a function in a thread, and wait for its end even if cancelled, so that no process is half started."""
    running = asyncio.ensure_future(asyncio.to_thread(call, *arguments))
    try:
        return await asyncio.shield(running)
    except asyncio.CancelledError:
        await running
        raise


def differing(one: Mapping[str, Value], other: Mapping[str, Value]) -> dict[str, tuple[Value, Value]]:
    return {
        key: (one.get(key), other.get(key)) for key in one.keys() | other.keys() if one.get(key) != other.get(key)
    }


async def soak(folder: Path, seed: int, seconds: float) -> Counter[str]:
    """Run the soak, and return its figures.

    Raises:
        Failure: a promise was broken; the exception's notes are the history of its subject.
    """
    run = Soak(folder, seed)
    with run.daemon:
        try:
            await run.run(seconds)
        except* Failure as failures:
            failure = next(iter(leaves(failures)))
            for line in run.record.about(failure.subject):
                failure.add_note(line)
            raise failure from None
    return run.record.figures


def leaves(group: BaseExceptionGroup[Failure]) -> list[Failure]:
    failures: list[Failure] = []
    for error in group.exceptions:
        failures += leaves(error) if isinstance(error, BaseExceptionGroup) else [error]
    return failures


if __name__ == "__main__":
    logging.getLogger("regd_client").setLevel(logging.ERROR)
    raise SystemExit(command.main("tests.long.soak", __doc__, soak, Failure))
