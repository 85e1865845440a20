"""Checks with one HTTP GET request whether a service is ready.

A service is ready if the status is 2xx. A redirect is not followed and does not count as ready, since it may
lead to a login page, for example. (Kubernetes accepts 200 to 399 and follows redirects on the same host.)
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re

from regd.cli.output import visible
from regd_client.protocol import host_port

TRY_S = 5.0  # for one request and its response
_HEAD_BYTES_MAX = 65_536  # of all heads together, including 1xx responses
_BODY_BYTES_MAX = 65_536  # read at most so much of the body before the connection is closed
_BODY_S = 0.2  # and at most for so long
_STATUS = re.compile(rb"HTTP/1\.[01] ([1-5][0-9][0-9])(?: ([^\r\n]*))?\r?\n")
_REASON_CHARS_MAX = 80


class _NotHttp(Exception):
    """The response is not HTTP/1."""


async def why_not_ready(host: str, port: int, path: str, timeout_s: float = TRY_S) -> str:
    """Send the request, and return why the service is not ready; "" if it is."""
    try:
        async with asyncio.timeout(timeout_s):
            status, reason = await _get(host, port, path)
    except TimeoutError:
        return f"no response within {timeout_s:.3g} s"
    except _NotHttp as fault:
        return f"no HTTP response: {fault}"
    except OSError as error:
        # asyncio's own text for a refused connection is "Connect call failed ('127.0.0.1', 7343)".
        return os.strerror(error.errno) if error.errno and error.errno > 0 else str(error)
    return "" if 200 <= status < 300 else f"answered {status} {visible(reason)}".rstrip()


async def _get(host: str, port: int, path: str) -> tuple[int, str]:
    reader, writer = await asyncio.open_connection(host, port, limit=_HEAD_BYTES_MAX)
    try:
        writer.write(
            f"GET {path} HTTP/1.1\r\nHost: {host_port(host, port)}\r\nUser-Agent: regctl\r\n"
            "Accept: */*\r\nConnection: close\r\n\r\n".encode("ascii")
        )
        status, reason = await _status(reader)
        await _read_rest(reader)
        return status, reason
    finally:
        writer.transport.abort()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


async def _status(reader: asyncio.StreamReader) -> tuple[int, str]:
    """Return the status code and the reason of the final response, skipping interim (1xx) responses."""
    left = _HEAD_BYTES_MAX
    while True:
        line = await _line(reader, left)
        left -= len(line)
        match = _STATUS.fullmatch(line)
        if match is None:
            raise _NotHttp(f"it begins with {line[:20]!r}" if line else "the connection was closed")
        status = int(match[1])
        if status >= 200:
            return status, (match[2] or b"").decode("latin-1")[:_REASON_CHARS_MAX]
        while line not in (b"\r\n", b"\n"):
            line = await _line(reader, left)
            left -= len(line)
            if not line:
                raise _NotHttp("the connection was closed")


async def _line(reader: asyncio.StreamReader, bytes_max: int) -> bytes:
    try:
        line = await reader.readline()
    except ValueError:  # the line is longer than the reader's limit
        line = b" " * (bytes_max + 1)
    if len(line) > bytes_max:
        raise _NotHttp(f"its head has more than {_HEAD_BYTES_MAX} bytes")
    return line


async def _read_rest(reader: asyncio.StreamReader) -> None:
    """Read the rest of a short response, because closing early resets the connection, which some servers log."""
    left = _BODY_BYTES_MAX
    with contextlib.suppress(TimeoutError, OSError):
        async with asyncio.timeout(_BODY_S):
            while left > 0 and (data := await reader.read(left)):
                left -= len(data)
