"""runner: takes jobs on port 5050, or another (0: any that is free), and answers them. It registers as `runner`.

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
    # A port and its name in one act: who finds the name finds somebody there.
    async with (
        regd_client.listen(NAME, PORT) as listening,
        await asyncio.start_server(answer, sock=listening.socket),
    ):
        print(f"runner: registered as {NAME!r}, waiting for jobs on port {listening.port}", flush=True)
        await asked_to_leave.wait()


if __name__ == "__main__":
    try:
        asyncio.run(main())
    except (OSError, regd_client.RegdError) as error:
        sys.exit(f"runner: {error}")
