"""Example services that register themselves with one line. test_servers runs them under their servers.

python -m tests.client.apps aiohttp|plain|listen|tornado
"""

import asyncio
import os
import signal
import sys

import regd_client


def serve_aiohttp() -> None:
    from aiohttp import web

    async def answer(request: web.Request) -> web.Response:
        return web.Response(text=str(os.getpid()))

    app = web.Application()
    app.router.add_get("/", answer)
    app.cleanup_ctx.append(regd_client.lifespan("web"))
    web.run_app(app, host="127.0.0.1", port=0, print=None)


async def _answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.readuntil(b"\r\n\r\n")
    writer.write(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n%d" % os.getpid())
    await writer.drain()
    writer.close()
    await writer.wait_closed()


def _sigterm() -> asyncio.Event:
    received = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, received.set)
    return received


async def serve_plain() -> None:
    sigterm = _sigterm()
    async with regd_client.lifespan("web"), await asyncio.start_server(_answer, "127.0.0.1", 0):
        await sigterm.wait()


async def serve_listen() -> None:
    sigterm = _sigterm()
    async with (
        regd_client.listen("web") as listening,
        await asyncio.start_server(_answer, sock=listening.socket),
    ):
        await sigterm.wait()


async def serve_tornado() -> None:
    from tornado import web

    class Answer(web.RequestHandler):
        def get(self) -> None:
            self.write(str(os.getpid()))

    sigterm = _sigterm()
    async with regd_client.lifespan("web"):
        server = web.Application([("/", Answer)]).listen(0, "127.0.0.1")
        await sigterm.wait()
        server.stop()
        await server.close_all_connections()


if __name__ == "__main__":
    match sys.argv[1]:
        case "aiohttp":
            serve_aiohttp()
        case "plain":
            asyncio.run(serve_plain())
        case "listen":
            asyncio.run(serve_listen())
        case "tornado":
            asyncio.run(serve_tornado())
