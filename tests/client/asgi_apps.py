"""Example applications that register themselves with one line. test_servers runs them under their servers."""

import os

from fastapi import FastAPI
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route

import regd_client

fastapi_app = FastAPI(lifespan=regd_client.lifespan("web"))


@fastapi_app.get("/")
async def answer() -> int:
    return os.getpid()


async def starlette_answer(request: Request) -> PlainTextResponse:
    return PlainTextResponse(str(os.getpid()))


starlette_app = Starlette(routes=[Route("/", starlette_answer)], lifespan=regd_client.lifespan("web"))

# For servers that open their port outside of the event loop.
port_app = Starlette(
    routes=[Route("/", starlette_answer)],
    lifespan=regd_client.lifespan("web", int(os.environ.get("WEB_PORT", "0")) or None),
)
