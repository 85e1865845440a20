"""Example Sanic applications: `app`, and `early`, which registers the name in the outermost hooks.

Sanic opens the port $WEB_PORT outside of the event loop.
"""

import os
from typing import Any

from sanic import HTTPResponse, Request, Sanic
from sanic.response import text

import regd_client


def made(name: str, start: str, stop: str) -> Any:
    app: Any = Sanic(name)
    web = regd_client.lifespan("web", int(os.environ["WEB_PORT"]))

    async def answer(request: Request) -> HTTPResponse:
        return text(str(os.getpid()))

    async def register(app: Any) -> None:
        await web.__aenter__()

    async def withdraw(app: Any) -> None:
        await web.__aexit__(None, None, None)

    app.add_route(answer, "/")
    app.register_listener(register, start)
    app.register_listener(withdraw, stop)
    return app


app = made("app", "after_server_start", "before_server_stop")
early = made("early", "before_server_start", "after_server_stop")
