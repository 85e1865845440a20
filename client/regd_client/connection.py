"""One asyncio connection that many tasks share: requests out, replies to whoever asked.

Every request has a number, and a reply goes to the request of its number, so that a caller who was cancelled
harms nobody. What the tasks of one turn of the loop write is sent as one. Must not know commands.
"""

import asyncio
from typing import Any, cast

from regd_client import wire
from regd_client.errors import RegdError, Unavailable
from regd_client.wire import Address


class Connection(asyncio.Protocol):
    """Use `Connection.open`; `closed` is done once the socket is gone."""

    def __init__(self, address: Address) -> None:
        self.address = address
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._waiting: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._number = 0
        self._out: list[bytes] = []
        self._rest = bytearray()
        self._broken: RegdError | None = None
        self.closed: asyncio.Future[None] = self._loop.create_future()

    @classmethod
    async def open(cls, address: Address) -> "Connection":
        """Connect once.

        Raises:
            OSError: nobody listens there.
        """
        loop = asyncio.get_running_loop()
        if address.path:
            _, made = await loop.create_unix_connection(lambda: cls(address), address.path)
        else:
            _, made = await loop.create_connection(lambda: cls(address), address.host, address.port)
        return made

    @property
    def usable(self) -> bool:
        return self._broken is None and self._transport is not None and not self._transport.is_closing()

    async def ask(self, cmd: str, arguments: dict[str, Any]) -> dict[str, Any]:
        """Send a request and return its reply, when that is `ok`.

        Raises:
            RegdError: what the daemon says, or `Unavailable` when the connection breaks before it says anything.
        """
        if self._broken is not None:
            raise _copy(self._broken)
        self._number += 1
        number = self._number
        line = wire.request(cmd, number, arguments)
        answer = self._loop.create_future()
        self._waiting[number] = answer
        if not self._out:
            self._loop.call_soon(self._send)
        self._out.append(line)
        return wire.result(await answer)

    async def close(self) -> None:
        """Close, and wait until it is. Twice is harmless."""
        if self._transport is not None:
            self._transport.close()
            await asyncio.shield(self.closed)

    def _send(self) -> None:
        if self.usable:
            assert self._transport is not None
            self._transport.write(b"".join(self._out))
        self._out.clear()

    # What asyncio calls.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        first, *lines = data.split(b"\n")
        if not lines:
            self._rest += first
            if len(self._rest) > wire.REPLY_BYTES_MAX:
                self._break(RegdError(f"whoever answers at {self.address} is no regd: a line without an end"))
            return
        last = lines.pop()
        if self._rest:
            first = bytes(self._rest) + first
        self._rest[:] = last
        self._answer(first)
        for line in lines:
            self._answer(line)

    def _answer(self, line: bytes) -> None:
        if self._broken is not None:
            return
        try:
            fields = wire.reply(line)
        except RegdError as error:
            self._break(error)
            return
        number = fields.get("id")
        if number is None:
            self._break(wire.unavailable(self.address, str(fields.get("message", "it closed the conversation"))))
            return
        answer = self._waiting.pop(number, None)
        if answer is not None and not answer.done():  # done: its caller was cancelled
            answer.set_result(fields)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._broken is None:
            self._break(
                Unavailable(
                    f"the connection to regd at {self.address} broke before the answer came; "
                    "a change may have been made or not"
                )
            )
        if not self.closed.done():
            self.closed.set_result(None)

    def _break(self, error: RegdError) -> None:
        """Tell everybody who waits, and take no more."""
        self._broken = error
        waiting, self._waiting = self._waiting, {}
        for answer in waiting.values():
            if not answer.done():
                answer.set_exception(_copy(error))
        if self._transport is not None:
            self._transport.close()


def _copy(error: RegdError) -> RegdError:
    """One exception object for each waiter: raising the same one twice would mix their tracebacks."""
    return type(error)(str(error), error.code, error.details)
