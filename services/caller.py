"""caller: looks `runner` up by name and sends it a job every 2 s. This program contains no address.

It resolves from a mirror, a local copy of the registry, and prints each event about the runner.

python3 services/caller.py [--once]
"""

import asyncio
import itertools
import json
import sys

import regd_client


async def send(runner: regd_client.Endpoint, job: dict[str, list[int]]) -> None:
    reader, writer = await asyncio.open_connection(runner.host, runner.port)
    try:
        writer.write(json.dumps(job).encode() + b"\n")
        reply = json.loads(await reader.readline())
    finally:
        writer.close()
    age = f" (as of {runner.stale_s:.0f} s ago)" if runner.stale_s else ""
    # json.dumps escapes control characters of the reply, which else would reach the terminal.
    print(f"caller: found runner at {runner}{age}, sent {json.dumps(job)}, got {json.dumps(reply)}", flush=True)


async def work(mirror: regd_client.Mirror) -> None:
    for count in itertools.count(1):
        try:
            await send(mirror.resolve("runner"), {"numbers": list(range(1, count + 1))})
        except (OSError, ValueError, regd_client.NotFound) as error:  # look the runner up again in 2 s
            print(f"caller: {error}", flush=True)
        if "--once" in sys.argv[1:]:
            return
        await asyncio.sleep(2)


async def listen(client: regd_client.Client) -> None:
    async for event in client.watch("runner"):
        if event.endpoint is not None:
            print(f"caller: runner at {event.endpoint} is {event.kind} {event.reason}".rstrip(), flush=True)


async def main() -> None:
    async with regd_client.Client() as client, client.mirror("runner") as mirror:
        listening = asyncio.create_task(listen(client))
        try:
            await work(mirror)
        finally:
            listening.cancel()


if __name__ == "__main__":
    try:
        asyncio.run(main())
    except KeyboardInterrupt:
        pass
    except regd_client.RegdError as error:
        sys.exit(f"caller: {error}")
