"""The benchmark: how long things take on this machine. `make bench` runs it; no test depends on its figures.

Everything is on loopback, daemon and client in processes of their own, and bounded in count.
"""

import asyncio
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from regd_client.client import Client
from tests.support.daemon import Daemon, Peer, environment


def show(what: str, value: float, unit: str) -> None:
    sys.stdout.write(f"{what:<58} {value:>12,.1f} {unit}\n")


async def calls_a_second(client: Client, tasks: int, calls: int) -> float:
    async def ask() -> None:
        for _ in range(calls // tasks):
            await client.resolve("service")

    began = time.perf_counter()
    await asyncio.gather(*(ask() for _ in range(tasks)))
    return calls / (time.perf_counter() - began)


async def lookups(address: str) -> None:
    async with Client(address) as client:
        await client.register("service", 5050)
        show("resolve, one task", await calls_a_second(client, 1, 5_000), "calls/s")
        show("resolve, 50 tasks on one connection", await calls_a_second(client, 50, 100_000), "calls/s")
        async with client.mirror("service") as mirror:
            began = time.perf_counter()
            for _ in range(100_000):
                mirror.resolve("service")
            show("resolve from a mirror", (time.perf_counter() - began) * 10, "µs")


async def news(address: str) -> None:
    """From the writer's `ok` to the mirror that knows it, in one process; negative where the mirror was first."""
    late_ms = []
    async with Client(address) as writer, Client(address) as reader, reader.mirror("news") as mirror:
        for port in range(1, 301):
            heard = asyncio.get_running_loop().create_future()
            before = mirror.changed

            def changed(event: object, heard: "asyncio.Future[float]" = heard, port: int = port) -> None:
                before(event)  # type: ignore[arg-type]  # noqa: B023 - the same method every time
                endpoint = getattr(event, "endpoint", None)
                if endpoint is not None and endpoint.port == port and not heard.done():
                    heard.set_result(time.perf_counter())

            mirror.changed = changed  # type: ignore[method-assign]
            await writer._ask("register", name="news", port=port)
            ok_at = time.perf_counter()
            late_ms.append((await heard - ok_at) * 1_000)
            mirror.changed = before  # type: ignore[method-assign]
    show("news in a mirror after the writer's ok, median", statistics.median(late_ms), "ms")
    show("news in a mirror after the writer's ok, 99 of 100", statistics.quantiles(late_ms, n=100)[98], "ms")


_WRITER = """
import sys, time
from regd_client.blocking import BlockingConnection
with BlockingConnection(sys.argv[1]) as connection:
    for n in range(20):
        began = time.monotonic()
        connection.ask("register", name="fan", port=1, meta={"n": str(n)})
        print(began, time.monotonic(), flush=True)
        time.sleep(0.1)
"""


async def heard(peer: Peer) -> float:
    await peer.line()
    return time.monotonic()


async def fan_out(address: str, count: int) -> None:
    """One name, many watchers of which one never reads: how long until the others have heard."""
    host, _, port = address.removeprefix("tcp://").rpartition(":")
    peers = [Peer(*await asyncio.open_connection(host, int(port))) for _ in range(count)]
    for peer in peers:
        assert (await peer.ask(cmd="watch", name="fan"))["ok"]
        while (await peer.reply())["event"] != "sync":
            pass
    deaf = Peer(*await asyncio.open_connection(host, int(port)))
    await deaf.ask(cmd="watch", name="fan")
    deaf.writer.transport.pause_reading()  # type: ignore[attr-defined]
    writer = await asyncio.create_subprocess_exec(
        sys.executable, "-c", _WRITER, address, stdout=subprocess.PIPE, env=environment()
    )
    assert writer.stdout is not None
    heard_ms, ok_ms = [], []
    for _ in range(20):
        heard_at = await asyncio.gather(*(heard(peer) for peer in peers))
        sent_at, ok_at = map(float, (await writer.stdout.readline()).split())
        heard_ms.append((statistics.median(heard_at) - sent_at) * 1_000)
        ok_ms.append((ok_at - sent_at) * 1_000)
    await writer.wait()
    show(f"a change until half of {count} watchers have heard, median", statistics.median(heard_ms), "ms")
    show("the writer's ok meanwhile, median", statistics.median(ok_ms), "ms")
    for peer in [*peers, deaf]:
        await peer.close()


def main() -> None:
    with (
        tempfile.TemporaryDirectory() as folder,
        Daemon(Path(folder) / "registry.json", stock="uvloop" not in sys.argv) as daemon,
    ):
        daemon.start()
        address = daemon.addresses[0]
        asyncio.run(lookups(address))
        asyncio.run(news(address))
        asyncio.run(fan_out(address, 1_000))


if __name__ == "__main__":
    main()
