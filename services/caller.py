"""caller: finds `runner` by its name and sends it jobs. No address is written in here.

python3 services/caller.py [--once]
"""

import asyncio
import itertools
import json
import sys

import regd_client


async def send(job: dict[str, list[int]]) -> None:
    runner = await regd_client.resolve("runner")
    reader, writer = await asyncio.open_connection(runner.host, runner.port)
    try:
        writer.write(json.dumps(job).encode() + b"\n")
        reply = await reader.readline()
    finally:
        writer.close()
    print(f"caller: found runner at {runner}, sent {json.dumps(job)}, got {reply.decode().strip()}", flush=True)


async def main() -> None:
    for count in itertools.count(1):
        try:
            await send({"numbers": list(range(1, count + 1))})
        except (OSError, regd_client.NotFound) as error:  # not there just now: ask again, by name
            print(f"caller: {error}", flush=True)
        if "--once" in sys.argv[1:]:
            return
        await asyncio.sleep(2)


if __name__ == "__main__":
    try:
        asyncio.run(main())
    except KeyboardInterrupt:
        pass
    except regd_client.RegdError as error:
        sys.exit(f"caller: {error}")
