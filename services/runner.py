"""runner: a service that adds numbers. It registers as `runner`.

It listens on PORT, 5050 by default; 0 picks a free port.
A job is one line, {"numbers": [1, 2, 3]}, and so is its answer, {"sum": 6}.

python3 services/runner.py [PORT]
"""

import asyncio
import contextlib
import json
import signal
import sys

import regd_client

NAME = "runner"
PORT = int(sys.argv[1]) if len(sys.argv) > 1 else 5050


async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(ConnectionError, ValueError):
        while line := await reader.readline():
            try:
                reply = {"sum": sum(json.loads(line)["numbers"])}
            except (KeyError, TypeError, ValueError):
                reply = {"error": 'not a job; send a line such as {"numbers": [1, 2, 3]}'}
            writer.write(json.dumps(reply).encode() + b"\n")
            await writer.drain()
    writer.close()


async def main() -> None:
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    # `listen` opens the port before it registers the name, so a caller that finds the name can connect.
    async with (
        regd_client.listen(NAME, PORT) as listening,
        await asyncio.start_server(answer, sock=listening.socket),
    ):
        print(f"runner: registered as {NAME!r}, waiting for jobs on port {listening.port}", flush=True)
        await stop.wait()


if __name__ == "__main__":
    try:
        asyncio.run(main())
    except (OSError, regd_client.RegdError) as error:
        sys.exit(f"runner: {error}")
