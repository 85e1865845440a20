"""The service `prices`: a name of a fruit in, its price out. `python -m shop.prices` runs it."""

import asyncio
import contextlib
import signal
from collections.abc import AsyncIterator

import regd_client

NAME = "prices"
PRICES = {"apple": 30, "pear": 40}


async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    fruit = (await reader.readline()).decode().strip()
    writer.write(f"{PRICES.get(fruit, 0)}\n".encode())
    await writer.drain()
    writer.close()
    await writer.wait_closed()


@contextlib.asynccontextmanager
async def serving() -> AsyncIterator[int]:
    """Serve on a free port, and give it."""
    async with (
        regd_client.listen(NAME) as listening,
        await asyncio.start_server(answer, sock=listening.socket),
    ):
        yield listening.port


async def price(fruit: str) -> int:
    """Ask whoever serves prices now."""
    found = await regd_client.resolve(NAME, wait=10)
    reader, writer = await asyncio.open_connection(found.host, found.port)
    writer.write(f"{fruit}\n".encode())
    line = await reader.readline()
    writer.close()
    await writer.wait_closed()
    return int(line)


async def main() -> None:
    asked_to_leave = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, asked_to_leave.set)
    async with serving():
        await asked_to_leave.wait()


if __name__ == "__main__":
    asyncio.run(main())
