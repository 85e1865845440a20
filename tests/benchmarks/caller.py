"""A program that resolves names through a client library and prints how many per second.

    python -m tests.benchmarks.caller LIBRARY PORT --tasks N --warm S --seconds S

Every answer is checked. `mirror` resolves locally, beside a plain dictionary with expiring entries.
"""

import argparse
import asyncio
import contextlib
import json
import random
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

NAMES = 1_000
_PART = 2_000  # lookups between two readings of the clock, which takes longer than one lookup
_TTL_S = 60.0

# A name, and the expected value.
Card = tuple[str, Any]
Ask = Callable[[Card], Awaitable[None]]


def value(key: int) -> bytes:
    """Return the value that the load generator has stored for this name."""
    return (
        f'{{"name":"svc-{key:06}","instance":"","host":"127.0.0.1","port":{10_000 + key % 50_000},'
        '"meta":{"n":"0000000000"},"state":"ready"}'
    ).encode()


class WrongAnswer(Exception):
    pass


def check(name: str, found: object, expected: object) -> None:
    if found != expected:
        raise WrongAnswer(f"{name}: {found!r}, not {expected!r}")


@contextlib.asynccontextmanager
async def regd(port: int) -> AsyncIterator[Ask]:
    from regd_client import Client

    async with Client(f"127.0.0.1:{port}") as client:

        async def ask(card: Card) -> None:
            endpoint = await client.resolve(card[0])
            check(card[0], endpoint.port, card[1])

        yield ask


@contextlib.asynccontextmanager
async def redis(port: int) -> AsyncIterator[Ask]:
    """With the library's pool, so that concurrent tasks have connections of their own."""
    from redis.asyncio import Redis

    async with Redis(host="127.0.0.1", port=port) as client:

        async def ask(card: Card) -> None:
            check(card[0], await client.get(card[0]), card[1])

        yield ask


@contextlib.asynccontextmanager
async def nats(port: int) -> AsyncIterator[Ask]:
    import nats

    client = await nats.connect(f"nats://127.0.0.1:{port}")
    bucket = await client.jetstream().key_value("services")

    async def ask(card: Card) -> None:
        entry = await bucket.get(card[0])
        check(card[0], entry.value, card[1])

    yield ask
    await client.close()


@contextlib.asynccontextmanager
async def etcd(port: int) -> AsyncIterator[Ask]:
    """A bare gRPC call with hand-made messages: the minimum for a client of etcd."""
    import grpc.aio

    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        call = channel.unary_unary("/etcdserverpb.KV/Range")

        async def ask(card: Card) -> None:
            reply = await call(b"\x0a\x0a" + card[0].encode())
            check(card[0], card[1] in reply, True)

        yield ask


ASKING = {"regd": regd, "redis": redis, "hiredis": redis, "nats": nats, "etcd": etcd}


def cards(library: str) -> list[Card]:
    """Return all names, shuffled with a fixed seed."""
    keys = list(range(NAMES))
    random.Random(7343).shuffle(keys)
    return [
        (f"svc-{key:06}", 10_000 + key % 50_000 if library in ("regd", "mirror") else value(key)) for key in keys
    ]


async def remote(library: str, port: int, tasks: int, warm: float, seconds: float) -> dict[str, float]:
    deck = cards(library)
    done = 0
    async with ASKING[library](port) as ask:
        begin = time.perf_counter() + warm
        end = begin + seconds

        async def caller(number: int) -> None:
            nonlocal done
            at = number
            while (now := time.perf_counter()) < end:
                await ask(deck[at % NAMES])
                at += tasks
                if now >= begin:
                    done += 1

        async with asyncio.TaskGroup() as group:
            for number in range(tasks):
                group.create_task(caller(number))
    return {"a_second": done / seconds}


class Cache:
    """A dictionary with expiring entries, which an application might use instead of a mirror."""

    def __init__(self) -> None:
        self._entries: dict[str, tuple[Any, float]] = {}

    def put(self, name: str, found: object) -> None:
        self._entries[name] = (found, time.monotonic() + _TTL_S)

    def resolve(self, name: str) -> Any:
        value, end = self._entries[name]
        if time.monotonic() > end:
            raise LookupError(name)
        return value


def pace_us(resolve: Callable[[str], Any], deck: list[Card], seconds: float) -> float:
    """Return the time of a lookup, without that of the loop around it."""
    names = [deck[n % NAMES][0] for n in range(_PART)]
    for name, port in deck:
        check(name, resolve(name).port, port)
    took = 0.0
    count = 0
    end = time.perf_counter() + seconds
    while (began := time.perf_counter()) < end:
        for _ in names:
            pass
        between = time.perf_counter()
        for name in names:
            resolve(name)
        took += time.perf_counter() - between - (between - began)
        count += _PART
    return took / count * 1e6


async def local(port: int, seconds: float) -> dict[str, float]:
    from regd_client import Client

    deck = cards("mirror")
    cache = Cache()
    async with Client(f"127.0.0.1:{port}") as client, client.mirror("svc-*") as mirror:
        for name, _ in deck:
            cache.put(name, mirror.resolve(name))
        return {
            "mirror_us": pace_us(mirror.resolve, deck, seconds),
            "cache_us": pace_us(cache.resolve, deck, seconds),
        }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("library", choices=[*ASKING, "mirror"])
    parser.add_argument("port", type=int)
    parser.add_argument("--tasks", type=int, default=1)
    parser.add_argument("--warm", type=float, default=0.2)
    parser.add_argument("--seconds", type=float, default=1.0)
    args = parser.parse_args()
    if args.library != "hiredis":
        sys.modules["hiredis"] = None  # type: ignore[assignment]
    if args.library == "mirror":
        measured = asyncio.run(local(args.port, args.seconds))
    else:
        measured = asyncio.run(remote(args.library, args.port, args.tasks, args.warm, args.seconds))
    print(json.dumps(measured))


if __name__ == "__main__":
    main()
