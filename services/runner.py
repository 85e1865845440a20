"""runner: takes jobs on port 5050, or another, and answers them. It registers in its start-up hook.

One job a line, {"numbers": [1, 2, 3]}; one answer a line, {"sum": 6}.

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
                reply = {"error": 'a job looks like {"numbers": [1, 2, 3]}'}
            writer.write(json.dumps(reply).encode() + b"\n")
            await writer.drain()
    writer.close()


async def main() -> None:
    asked_to_leave = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, asked_to_leave.set)
    # Listen first, register then: who finds the name must find somebody there.
    server = await asyncio.start_server(answer, "127.0.0.1", PORT)
    with contextlib.closing(server):
        async with regd_client.register(NAME, PORT):
            print(f"runner: registered as {NAME!r}, waiting for jobs on port {PORT}", flush=True)
            await asked_to_leave.wait()


if __name__ == "__main__":
    try:
        asyncio.run(main())
    except (OSError, regd_client.RegdError) as error:
        sys.exit(f"runner: {error}")
