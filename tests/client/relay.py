"""A relay between clients and a daemon. It can break and refuse connections, and delay replies."""

import asyncio
import json
from collections.abc import Callable
from typing import Any

from tests.support.byte_relay import ByteRelay


class Relay(ByteRelay):
    """Forwards connections to the daemon at the port `to`, and records the requests.

    Attributes:
        flowing: while it is not set, replies are delayed.
        requests: all requests, in order.
        cut_at: whether to break the connection instead of forwarding this request.
    """

    def __init__(self, to: int) -> None:
        super().__init__(to)
        self.requests: list[dict[str, Any]] = []
        self.cut_at: Callable[[dict[str, Any]], bool] = lambda request: False

    def count(self, cmd: str) -> int:
        """Return the number of requests with this command."""
        return sum(request["cmd"] == cmd for request in self.requests)

    async def _forward_to_server(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while line := await reader.readline():
            request = json.loads(line)
            self.requests.append(request)
            if self.cut_at(request):
                break
            writer.write(line)
        raise ConnectionResetError("the connection has ended")
