"""The browser guard: a table of requests, each with its status. All combinations are tested."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as some

from regd.gateways.guard import find_refusal, host_name

OWN = [b"localhost", b"localhost:7380", b"LOCALHOST:7380", b"127.0.0.1", b"127.0.0.1:7380", b"[::1]", b"[::1]:1",
       b"shop.localhost:7380", b"eu.shop_1.localhost", b"-.localhost", b" localhost "]  # fmt: skip
FOREIGN = [b"", b"evil.example", b"evil.example:7380", b"127.0.0.1.evil.example", b"localhost.evil.example",
           b"localhost@evil.example", b"evil@localhost", b"localhost:", b"localhost:x", b"localhost:123456",
           b"::1", b"[::1", b"[::2]", b"127.0.0.2", b"127.1", b"0.0.0.0", b"localhost.", b".localhost",
           b"notlocalhost", b"a b.localhost", b"a/.localhost", b"localhost, evil.example", b"localhost\x00",
           b"\xffa.localhost", b"http://localhost"]  # fmt: skip


@pytest.mark.parametrize("host", OWN)
def test_own_hosts_pass(host: bytes) -> None:
    assert find_refusal("GET", [(b"host", host)]) is None


@pytest.mark.parametrize("host", FOREIGN)
def test_foreign_hosts_are_refused(host: bytes) -> None:
    assert status("GET", host) == 400


def test_a_request_has_one_host() -> None:
    assert find_refusal("GET", []) is not None
    assert find_refusal("GET", [(b"host", b"localhost"), (b"host", b"localhost")]) is not None


@pytest.mark.parametrize(
    ("host", "name"),
    [(b"Shop.LOCALHOST:80", "shop.localhost"), (b"[::1]:7380", "[::1]"), (b"evil.example", "")],
)
def test_name_in_a_host_header(host: bytes, name: str) -> None:
    assert host_name(host) == name


METHODS = {"GET": 200, "HEAD": 200, "OPTIONS": 405, "POST": 405, "PUT": 405, "DELETE": 405, "PATCH": 405,
           "TRACE": 405, "CONNECT": 405, "get": 405, "REGISTER": 405, "": 405}  # fmt: skip
SITES = {None: 200, "none": 200, "same-origin": 200, "Same-Origin": 200, "same-site": 403, "cross-site": 403,
         "": 403, "none, none": 403, "other": 403}  # fmt: skip
# (`Sec-Fetch-Mode`, `Sec-Fetch-Dest`): whether a browser opens a page.
FETCHES = {(None, None): False, ("navigate", "document"): True, ("navigate", None): False,
           ("navigate", "iframe"): False, ("navigate", "embed"): False, ("cors", "empty"): False,
           ("no-cors", "script"): False, ("no-cors", "document"): False, ("websocket", "websocket"): False,
           ("Navigate", "document"): False}  # fmt: skip
ORIGINS = {None: 200, "http://localhost:7380": 200, "HTTP://LOCALHOST:7380": 200, "http://localhost:5061": 403,
           "http://localhost": 403, "https://localhost:7380": 403, "http://127.0.0.1:7380": 403, "null": 403,
           "http://evil.example": 403, "": 403, "http://localhost:7380.evil.example": 403}  # fmt: skip
HOSTS = {b"localhost:7380": 200, b"evil.example": 400}


def status(
    method: str,
    host: bytes,
    site: str | None = None,
    fetch: tuple[str | None, str | None] = (None, None),
    origin: str | None = None,
) -> int:
    optional = {
        b"sec-fetch-site": site,
        b"sec-fetch-mode": fetch[0],
        b"sec-fetch-dest": fetch[1],
        b"origin": origin,
    }
    headers = [
        (b"host", host),
        *((name, value.encode()) for name, value in optional.items() if value is not None),
    ]
    refusal = find_refusal(method, headers)
    return 200 if refusal is None else refusal.status


def test_every_row_of_the_table() -> None:
    rows = 0
    for host, method, site, fetch, origin in itertools.product(HOSTS, METHODS, SITES, FETCHES, ORIGINS):
        site_status = 200 if FETCHES[fetch] else SITES[site]
        checks = (HOSTS[host], METHODS[method], site_status, ORIGINS[origin])
        expected = next((check for check in checks if check != 200), 200)  # the first check that fails decides
        assert status(method, host, site, fetch, origin) == expected, (host, method, site, fetch, origin)
        rows += 1
    assert rows == 2 * 12 * 9 * 10 * 11


def test_a_second_value_does_not_pass() -> None:
    host = (b"host", b"localhost:7380")
    twice = [(b"sec-fetch-site", b"none"), (b"sec-fetch-site", b"cross-site")]
    assert find_refusal("GET", [host, *twice]) is not None
    origins = [(b"origin", b"http://localhost:7380"), (b"origin", b"http://evil.example")]
    assert find_refusal("GET", [host, *origins]) is not None


@given(some.binary(max_size=40))
def test_any_bytes_as_host_get_an_answer(host: bytes) -> None:
    name = host_name(host)
    assert (find_refusal("GET", [(b"host", host.strip())]) is None) == bool(host_name(host.strip()))
    assert name in ("", "localhost", "127.0.0.1", "[::1]") or name.endswith(".localhost")
