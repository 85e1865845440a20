"""The browser guard: which requests are refused before routing, so that no web page can read the registry.

Every web page can send requests to loopback. These checks are made in this order:

1. `Host` must name this machine. A page whose own name was rebound to 127.0.0.1 sends its own name as `Host`, and
   nothing else distinguishes its requests from those of curl.
2. The method must be GET or HEAD. A preflight (OPTIONS) is refused like any other method, since the gateway
   permits other origins nothing.
3. `Sec-Fetch-Site` (Fetch Metadata) must be `same-origin` or `none`, except to open a page. Another port of
   localhost is the same site, so `same-site` is refused.
4. `Origin`, if present, must be the gateway's own.
"""

import re
from collections.abc import Iterable
from typing import NamedTuple

from starlette.types import ASGIApp, Receive, Scope, Send

from regd.gateways.readers import Readers

__all__ = ["HEADERS", "HEAD_BYTES_MAX", "Guard", "Refusal", "find_refusal", "host_name"]

# The headers of every response, including the server's own errors.
HEADERS = [
    ("Cache-Control", "no-store"),
    ("Content-Security-Policy", (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; base-uri 'none'; "
        "form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'"
    )),
    ("Cross-Origin-Opener-Policy", "same-origin"),
    ("Cross-Origin-Resource-Policy", "same-origin"),
    ("Referrer-Policy", "no-referrer"),
    ("X-Content-Type-Options", "nosniff"),
    ("X-Frame-Options", "DENY"),
]  # fmt: skip
_HOST = re.compile(
    rb"(localhost|127\.0\.0\.1|\[::1\]|[a-z0-9_-][a-z0-9_.-]*\.localhost)(:[0-9]{1,5})?", re.IGNORECASE
)
HEAD_BYTES_MAX = 16_384  # of the request line and the headers
_METHODS = ("GET", "HEAD")
_OWN_SITE = (b"same-origin", b"none")

Headers = Iterable[tuple[bytes, bytes]]


class Refusal(NamedTuple):
    status: int
    message: str


def host_name(host: bytes) -> str:
    """Return the name or address in a `Host` header in lower case, without the port; "" for another machine's."""
    match = _HOST.fullmatch(host)
    return match[1].decode().lower() if match else ""


def find_refusal(method: str, headers: Headers) -> Refusal | None:
    """Return why a request is refused, or None. The names in `headers` are in lower case, as in ASGI."""
    values: dict[bytes, list[bytes]] = {}
    for name, value in headers:
        values.setdefault(name, []).append(value.strip())
    hosts = values.get(b"host", [])
    if len(hosts) != 1 or not host_name(hosts[0]):
        return Refusal(400, "Host must be localhost, 127.0.0.1, [::1] or NAME.localhost")
    if method not in _METHODS:
        return Refusal(405, "only GET and HEAD: this gateway reads and never writes")
    sites = values.get(b"sec-fetch-site", [])
    if any(site.lower() not in _OWN_SITE for site in sites) and not _opens_a_page(values):
        return Refusal(403, "other sites may not read the registry (Sec-Fetch-Site)")
    origins = values.get(b"origin", [])
    if any(origin.lower() != b"http://" + hosts[0].lower() for origin in origins):
        return Refusal(403, "other origins may not read the registry (Origin)")
    return None


def _opens_a_page(values: dict[bytes, list[bytes]]) -> bool:
    """Return whether a browser opens the URL in a tab. The page that led to it cannot read the response there."""
    return values.get(b"sec-fetch-mode") == [b"navigate"] and values.get(b"sec-fetch-dest") == [b"document"]


class Guard:
    """An ASGI application that answers refused requests itself, and passes on all others."""

    def __init__(self, app: ASGIApp, readers: Readers) -> None:
        self._app = app
        self._readers = readers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        refusal = self._refusal(scope)
        if refusal is None:
            await self._app(scope, receive, send)
            return
        body = f"{refusal.message}\n".encode()
        headers = [(b"content-type", b"text/plain; charset=utf-8"), (b"content-length", b"%d" % len(body))]
        if refusal.status == 400:
            headers.append((b"connection", b"close"))
        if refusal.status == 405:
            headers.append((b"allow", ", ".join(_METHODS).encode()))
        await send({"type": "http.response.start", "status": refusal.status, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    def _refusal(self, scope: Scope) -> Refusal | None:
        if not self._readers.may_read_by_tcp(scope["client"], scope["server"]):
            return Refusal(403, "this user may not read the registry")
        if _head_bytes(scope) > HEAD_BYTES_MAX:  # uvicorn limits only heads that arrive in parts
            return Refusal(400, f"the head of the request is longer than {HEAD_BYTES_MAX} bytes")
        return find_refusal(scope["method"], scope["headers"])


def _head_bytes(scope: Scope) -> int:
    """Return the size of a head with one blank after each colon, as clients write it."""
    query_bytes = len(b"?" + scope["query_string"]) if scope["query_string"] else 0
    line_bytes = len(scope["method"]) + len(scope["raw_path"]) + query_bytes + len("  HTTP/1.1\r\n")
    field_bytes = sum(len(name) + len(value) + len(": \r\n") for name, value in scope["headers"])
    return line_bytes + field_bytes + len("\r\n")
