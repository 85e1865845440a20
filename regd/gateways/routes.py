"""The HTTP application: the gateway's paths and the response of each."""

import asyncio
import contextlib
import itertools
import json
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route, Router
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from regd.gateways import discovery, metrics
from regd.gateways.daemon_connections import DaemonClient, DaemonConnection, slot
from regd.gateways.guard import Guard, host_name
from regd.gateways.page_files import page_routes
from regd.gateways.queries import (
    COMMANDS,
    NOT_REGD,
    TARGETS,
    TRAEFIK,
    BadQuery,
    Body,
    failure,
    parse_own_query,
    parse_query,
)
from regd.gateways.readers import Readers
from regd.gateways.stream import COMMENT, EventEncoder, parse_position
from regd_client import protocol
from regd_client.errors import RegdError

__all__ = ["INPUT_ENDED", "STREAM_PATH", "Gateway"]

STREAM_PATH = "/v1/watch"
# In a request's `state`, the key of an event. The server sets the event when the client closes the connection or
# its sending side. Waits and streams then end, because most such clients are gone; short requests still get an
# answer.
INPUT_ENDED = "input_ended"
STREAMS_MAX = 256
WAITS_MAX = 256
LISTS_MAX = 2  # whole lists at a time: each takes 3 MB for 10,000 targets
_PAGE = 500  # instances per page of a whole list: about 8 ms of work
_STEPS_MAX = 8  # chunks of streams encoded per iteration of the event loop: about 3 ms of work
SILENCE_S = 15.0  # after so long without an event, a comment is sent
_SILENCES_MAX = 5  # a daemon that sends nothing for 75 s hangs, since `progress` comes every 30 s
_READ_AHEAD_BYTES = 65_536  # of a watch: read from the daemon before the HTTP client takes them
_STREAM_START: Message = {
    "type": "http.response.start",
    "status": 200,
    "headers": [(b"content-type", b"text/event-stream")],
}

Instances = list[dict[str, Any]]
_encode = json.JSONEncoder(separators=(",", ":")).encode


class Gateway:
    """The HTTP application for one daemon, with its guard."""

    def __init__(self, daemon: DaemonClient, readers: Readers) -> None:
        self._daemon = daemon
        self._stopping = asyncio.Event()
        self._streams = 0
        self._waits = 0
        self._lists = asyncio.Semaphore(LISTS_MAX)
        self._steps = asyncio.Semaphore(_STEPS_MAX)
        commands = [cmd for cmd in COMMANDS if cmd != "watch"]
        routes = [
            *(Route(f"/v1/{cmd}", self._command(cmd), methods=["GET"]) for cmd in commands),
            Route(STREAM_PATH, _Endpoint(self._watch)),
            Route("/v1/prometheus/targets", self._targets, methods=["GET"]),
            Route("/v1/traefik", self._traefik, methods=["GET"]),
            Route("/healthz", self._health, methods=["GET"]),
            Route("/metrics", self._metrics, methods=["GET"]),
            *page_routes(),
        ]
        self._router = Router(routes, redirect_slashes=False)
        self._guarded = Guard(self._dispatch, readers)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._guarded(scope, receive, send)

    def stop(self) -> None:
        """End the streams and the requests that wait, each with a complete response."""
        self._stopping.set()

    async def _dispatch(self, scope: Scope, receive: Receive, send: Send) -> None:
        host = next(value for name, value in scope["headers"] if name == b"host")
        name = host_name(host.strip())
        app: ASGIApp = self._router
        if name.endswith(".localhost"):
            app = await self._redirect(name, scope)
        await app(scope, receive, send)

    # Commands.

    def _command(self, cmd: str) -> Callable[[Request], Awaitable[Response]]:
        async def answer(request: Request) -> Response:
            try:
                arguments = parse_query(request.scope["query_string"], COMMANDS[cmd])
            except BadQuery as error:
                return _bad_query(error)
            if type(arguments.get("wait")) is float:
                return await self._wait(cmd, arguments, request.scope)
            return _json(await self._daemon.ask(cmd, arguments))

        return answer

    async def _wait(self, cmd: str, arguments: dict[str, Any], scope: Scope) -> Response:
        """Ask on a connection for this request alone, and close it as soon as the client is gone."""
        if self._waits >= WAITS_MAX:
            return _json(failure("busy", f"{self._waits} requests wait; try again later"))
        self._waits += 1
        try:
            asking = asyncio.ensure_future(self._daemon.ask_alone(cmd, arguments, arguments["wait"]))
            if await self._ended_early(asking, scope):
                return _json(
                    failure("shutting_down", "the gateway is stopping, or the client has closed its sending side")
                )
            return _json(asking.result())
        finally:
            self._waits -= 1

    async def _ended_early(self, work: asyncio.Future[Any], scope: Scope) -> bool:
        """Wait for `work`. If the client disconnects or the gateway stops first, cancel it and return True."""
        ends = [asyncio.ensure_future(event.wait()) for event in (scope["state"][INPUT_ENDED], self._stopping)]
        try:
            await asyncio.wait((work, *ends), return_when=asyncio.FIRST_COMPLETED)
            return not work.done()
        finally:
            for task in (work, *ends):
                task.cancel()
            await asyncio.gather(work, *ends, return_exceptions=True)

    # The event stream.

    async def _watch(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope)
        try:
            arguments = parse_query(scope["query_string"], COMMANDS["watch"])
        except BadQuery as error:
            await _bad_query(error)(scope, receive, send)
            return
        if "last-event-id" in request.headers:
            for name in ("epoch", "since"):
                arguments.pop(name, None)
            arguments |= parse_position(request.headers["last-event-id"]) or {}
        if scope["method"] == "HEAD":
            # Not starlette's Response: it would add a length and a charset, which the response to GET lacks.
            await send(_STREAM_START)
            await send({"type": "http.response.body", "body": b""})
        elif self._streams >= STREAMS_MAX:
            await _json(failure("busy", f"{self._streams} streams are open; try again later"))(
                scope, receive, send
            )
        else:
            self._streams += 1
            try:
                await self._stream(arguments, scope, receive, send)
            finally:
                self._streams -= 1

    async def _stream(self, arguments: dict[str, Any], scope: Scope, receive: Receive, send: Send) -> None:
        watch = self._daemon.ask_and_keep_open("watch", arguments, read_ahead_bytes=_READ_AHEAD_BYTES)
        async with watch as (body, connection):
            if body.status != 200:
                await _json(body)(scope, receive, send)
                return
            try:
                reply = protocol.check_result("watch", arguments, protocol.decode_line(body.line))
                encoder = EventEncoder(reply, resumes="since" in arguments)
            except (RegdError, ValueError):
                await _json(NOT_REGD)(scope, receive, send)
                return
            await send(_STREAM_START)
            forwarding = asyncio.ensure_future(self._forward(connection, encoder, send))
            await self._ended_early(forwarding, scope)
            await send({"type": "http.response.body", "body": b""})

    async def _forward(self, connection: DaemonConnection, encoder: EventEncoder, send: Send) -> None:
        """Send the events of a watch until the daemon closes it. Read them only as fast as the client does."""
        await _send_part(send, encoder.head())
        silences = 0
        with contextlib.suppress(OSError, ValueError):  # the daemon has ended, or another program answers
            while silences < _SILENCES_MAX:
                try:
                    async with asyncio.timeout(SILENCE_S):
                        data = await connection.read()
                except TimeoutError:
                    silences += 1
                    await _send_part(send, COMMENT)
                    continue
                if not data:
                    return
                silences = 0
                async with self._steps:
                    events = encoder.encode(data)
                    await asyncio.sleep(0)  # else many snapshots at once would block the event loop
                if events:
                    await _send_part(send, events)

    # Service discovery, metrics, health.

    async def _targets(self, request: Request) -> Response:
        try:
            arguments = parse_own_query(request.scope["query_string"], TARGETS)
        except BadQuery as error:
            return _bad_query(error)
        every = bool(arguments.pop("all", False))
        groups: list[str] = []

        def take(page: Instances) -> None:
            groups.extend(map(_encode, discovery.prometheus_targets(page, every=every)))

        if refusal := await self._read_list(arguments, take):
            return _json(refusal)
        return _json(Body(200, f"[{','.join(groups)}]\n".encode()))

    async def _traefik(self, request: Request) -> Response:
        try:
            arguments = parse_own_query(request.scope["query_string"], TRAEFIK)
        except BadQuery as error:
            return _bad_query(error)
        instances: Instances = []
        if refusal := await self._read_list(arguments, instances.extend):
            return _json(refusal)
        return _json(Body(200, _encode(discovery.traefik_configuration(instances)).encode() + b"\n"))

    async def _read_list(self, arguments: dict[str, Any], take: Callable[[Instances], None]) -> Body | None:
        """Call `take` with the instances of each page of `list`. Return the error if a page fails, else None.

        An incomplete list must not be sent: Prometheus and Traefik would drop the targets that it lacks, whereas
        they keep all targets after an error.
        """
        try:
            async with slot(self._lists):
                return await self._read_pages(arguments, take)
        except TimeoutError:
            return failure("busy", "too many other requests read whole lists; try again later")

    async def _read_pages(self, arguments: dict[str, Any], take: Callable[[Instances], None]) -> Body | None:
        after: dict[str, Any] = {}
        instances: Instances = []
        for number in itertools.count(1):
            body = await self._daemon.ask("list", {**arguments, **after, "limit": _PAGE})
            if body.status != 200:
                return body if body.status == 400 else body._replace(status=503)
            try:
                page = protocol.check_result("list", after, protocol.decode_line(body.line))
                protocol.add_page(instances, page, number)
            except RegdError as error:
                return failure("unavailable", str(error))
            take(page["instances"])
            if "next" not in page:
                return None
            after = {"after": page["next"]}
        return None

    async def _health(self, request: Request) -> Response:
        body = await self._daemon.ask("ping", {})
        return PlainTextResponse("ok\n") if body.status == 200 else PlainTextResponse(f"{body.message}\n", 503)

    async def _metrics(self, request: Request) -> Response:
        body = await self._daemon.ask("stats", {})
        stats = _check_reply("stats", {}, body)
        content_type, text = metrics.render(stats, request.headers.get("accept", ""))
        return Response(text, headers={"Content-Type": content_type})

    # Named URLs.

    async def _redirect(self, named_host: str, scope: Scope) -> Response:
        """Redirect http://NAME.localhost:7380/… to where NAME listens."""
        path = scope["raw_path"].decode("ascii")
        if not path.startswith("/"):
            return PlainTextResponse("the target must be a path\n", 400)
        if scope["query_string"]:
            path += "?" + scope["query_string"].decode("ascii")
        arguments = {"name": named_host.removesuffix(".localhost")}
        body = await self._daemon.ask("resolve", arguments)
        instance = _check_reply("resolve", arguments, body)
        if instance is None:
            refusal = NOT_REGD if body.status == 200 else body
            return PlainTextResponse(f"{refusal.message}\n", refusal.status)
        return Response(status_code=307, headers={"Location": discovery.location(instance, named_host, path)})


class _Endpoint:
    """Makes an ASGI application of a method. starlette would take the method itself for a request handler."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._app(scope, receive, send)


async def _send_part(send: Send, part: bytes) -> None:
    await send({"type": "http.response.body", "body": part, "more_body": True})


def _check_reply(cmd: str, arguments: Mapping[str, Any], body: Body) -> dict[str, Any] | None:
    """Return the reply to a command after checking it; None if it is an error, or not from regd."""
    if body.status != 200:
        return None
    try:
        return protocol.check_result(cmd, arguments, protocol.decode_line(body.line))
    except RegdError:
        return None


def _json(body: Body) -> Response:
    headers = {"Retry-After": "1"} if body.status == 503 else None
    return Response(body.line, body.status, headers, media_type="application/json")


def _bad_query(error: BadQuery) -> Response:
    return _json(failure("bad_argument", str(error), field=error.field))
