"""The members of a cluster: a connection to one of them, and to the next one when it fails."""

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Sequence
from functools import partial

from regd.bridge.etcd.errors import EtcdError, EtcdUnavailable
from regd.bridge.etcd.member import Member
from regd.bridge.etcd.model import Tls

__all__ = ["Members"]

_log = logging.getLogger("regd.bridge")


class Members:
    """Connects to one of the members, and to the next one when it does not answer.

    grpc can connect to several addresses by itself, but it stays with a member that is frozen, or cut off from
    the others, as long as the connection holds.

    Attributes:
        answered_at: when a member last answered, by the monotonic clock.
    """

    def __init__(self, addresses: Sequence[str], tls: Tls | None) -> None:
        if not addresses:
            raise ValueError("give the address of at least one member of etcd")
        self.answered_at = time.monotonic()
        self._addresses = addresses
        self._tls = tls
        self._moves = 0  # how often it has moved on to the next address
        self._current: Member | None = None
        self._open: set[Member] = set()
        self._connecting = asyncio.Lock()
        self._failures = 0  # failed connections and calls since the last answer
        self._failure = ""  # the message of the last failure
        self._is_lost = False
        self._is_closed = False

    @property
    def address(self) -> str:
        """The address of the member in use, or of the next one to try."""
        return self._addresses[self._moves % len(self._addresses)]

    @property
    def failure(self) -> str:
        """Why the last member that was tried does not answer; "" if one answers."""
        return self._failure if self._is_lost else ""

    @contextlib.asynccontextmanager
    async def use(self) -> AsyncIterator[Member]:
        """Use a connected member during the block, and give it up if the block raises `EtcdUnavailable`.

        Raises:
            EtcdUnavailable: no member accepts a connection.
            EtcdError: the client is closed.
        """
        member = await self._connected()
        member.users += 1
        try:
            yield member
        except EtcdUnavailable as error:
            if member is self._current:
                self._retire(member)
                self._failed(error)
            raise
        finally:
            member.users -= 1
            await self._close_unused(member)

    def _answered(self, address: str) -> None:
        self.answered_at = time.monotonic()
        self._failures = 0
        if self._is_lost:
            self._is_lost = False
            _log.warning("etcd answers again, at %s", address)

    def _failed(self, error: EtcdUnavailable) -> None:
        """Move on to the next member. When each has failed without an answer in between, etcd counts as lost."""
        self._moves += 1
        self._failures += 1
        self._failure = str(error)
        if self._failures >= len(self._addresses) and not self._is_lost and not self._is_closed:
            self._is_lost = True
            _log.warning("no member of etcd answers; still trying: %s", error)

    def _retire(self, member: Member) -> None:
        member.given_up.set_result(None)
        self._current = None

    async def _connected(self) -> Member:
        """Return the member in use. Calls that wait for a connection share its failures."""
        moves_max = self._moves + len(self._addresses)
        async with self._connecting:
            if self._current is not None and not self._current.is_connected:
                unused = self._current
                self._retire(unused)  # its address is tried first: etcd may have closed an idle connection
                await self._close_unused(unused)
            while self._current is None:
                if self._is_closed:
                    raise EtcdError("the client of etcd is closed")
                if self._moves >= moves_max:
                    raise EtcdUnavailable(self._failure, may_have_effect=False)
                try:
                    self._current = await self._connect(self.address)
                except EtcdUnavailable as error:
                    self._failed(error)
            return self._current

    async def _connect(self, address: str) -> Member:
        member = Member(address, self._tls, partial(self._answered, address))
        self._open.add(member)
        try:
            await member.connect()
        except BaseException:
            self._open.discard(member)
            await member.close()
            raise
        return member

    async def _close_unused(self, member: Member) -> None:
        if member.given_up.done() and not member.users and member in self._open:
            self._open.discard(member)
            await member.close()

    async def close(self) -> None:
        """Close all connections. Calls and streams on them are cancelled. Idempotent."""
        self._is_closed = True
        if self._current is not None:
            self._retire(self._current)
        while self._open:
            await self._open.pop().close()
