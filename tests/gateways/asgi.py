"""Requests to an ASGI application without a server, and its responses, whole or in parts."""

import asyncio
from typing import Any, NamedTuple

from starlette.types import ASGIApp, Message

from regd.gateways.routes import INPUT_ENDED
from tests.support.daemon import WAIT_S


class Response(NamedTuple):
    status: int
    headers: dict[str, str]
    body: bytes


class Exchange:
    """One request in progress. `disconnect` ends it from the client's side."""

    def __init__(self, app: ASGIApp, path: str, method: str = "GET", **headers: str) -> None:
        raw_path, _, query = path.partition("?")
        self._gone = asyncio.Event()
        headers = {"host": "localhost:7380", **{name.replace("_", "-"): value for name, value in headers.items()}}
        scope: dict[str, Any] = {
            "type": "http",
            "method": method,
            "client": ("127.0.0.1", 1),
            "server": ("127.0.0.1", 7380),
            "path": raw_path,
            "raw_path": raw_path.encode(),
            "query_string": query.encode(),
            "state": {INPUT_ENDED: self._gone},
            "headers": [(name.encode(), value.encode()) for name, value in headers.items()],
        }
        self._asked = False
        self._messages: asyncio.Queue[Message] = asyncio.Queue()
        self.task = asyncio.ensure_future(app(scope, self._receive, self._messages.put))

    async def _receive(self) -> Message:
        if not self._asked:
            self._asked = True
            return {"type": "http.request", "body": b"", "more_body": False}
        await self._gone.wait()
        return {"type": "http.disconnect"}

    def disconnect(self) -> None:
        self._gone.set()

    async def message(self) -> Message:
        """Return the next message of the application."""
        getting = asyncio.ensure_future(self._messages.get())
        async with asyncio.timeout(WAIT_S):
            await asyncio.wait((getting, self.task), return_when=asyncio.FIRST_COMPLETED)
            if not getting.done() and self._messages.empty():
                getting.cancel()
                self.task.result()
                raise AssertionError("the application has sent less than a response")
            return await getting

    async def response(self) -> Response:
        """Return the whole response."""
        start = await self.message()
        body, more = b"", True
        while more:
            part = await self.message()
            body += part.get("body", b"")
            more = part.get("more_body", False)
        await self.task
        headers = {name.decode(): value.decode() for name, value in start["headers"]}
        return Response(start["status"], headers, body)

    async def body_until(self, text: str) -> str:
        """Read parts of the body until they contain a text, and return all of them."""
        body = ""
        while text not in body:
            body += (await self.message()).get("body", b"").decode()
        return body


async def get(app: ASGIApp, path: str, method: str = "GET", **headers: str) -> Response:
    return await Exchange(app, path, method, **headers).response()
