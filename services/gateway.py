"""gateway: receives jobs over HTTP and forwards them to `runner`.

It is registered as `gateway` while it accepts requests. It needs `pip install '.[gateway]'`.

uvicorn --app-dir services gateway:app --port 8080
curl -d '{"numbers": [1, 2, 3]}' http://127.0.0.1:8080/jobs
"""

import asyncio
import json

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

import regd_client


async def ask(job: object) -> object:
    runner = await regd_client.resolve("runner", wait=5)  # the runner may still be starting
    reader, writer = await asyncio.open_connection(runner.host, runner.port)
    try:
        writer.write(json.dumps(job).encode() + b"\n")
        return json.loads(await reader.readline())
    finally:
        writer.close()


async def forward(request: Request) -> JSONResponse:
    try:
        job = await request.json()
    except ValueError:
        return JSONResponse({"error": "the body is not JSON"}, 400)
    try:
        return JSONResponse(await ask(job))
    except (OSError, ValueError, regd_client.RegdError) as error:
        return JSONResponse({"error": f"no answer from the runner: {error}"}, 503)


app = Starlette(routes=[Route("/jobs", forward, methods=["POST"])], lifespan=regd_client.lifespan("gateway"))
