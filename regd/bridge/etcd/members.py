"""The members of a cluster: one connection at a time, to the next member when it fails."""

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Sequence

from regd.bridge.etcd.errors import EtcdError, EtcdUnavailable
from regd.bridge.etcd.member import Member
from regd.bridge.etcd.model import Tls

__all__ = ["Members"]

_log = logging.getLogger("regd.bridge")


class Members:
    """Connects to one of the members, and to the next one when it does not answer.

    grpc can connect to several addresses by itself, but stays with a member that is frozen or cut off from the
    others as long as its connection holds.

    Attributes:
        answered_at: when a member last answered, by the monotonic clock.
    """

    def __init__(self, addresses: Sequence[str], tls: Tls | None) -> None:
        if not addresses:
            raise ValueError("give the address of at least one member of etcd")
        self.answered_at = time.monotonic()
        self._addresses = addresses
        self._tls = tls
        self._turn = 0  # index of the address to connect to; grows without end
        self._current: Member | None = None
        self._open: set[Member] = set()
        self._connecting = asyncio.Lock()
        self._failures = 0  # in a row
        self._is_lost = False
        self._is_closed = False

    @property
    def address(self) -> str:
        """The address in use."""
        return self._addresses[self._turn % len(self._addresses)]

    @contextlib.asynccontextmanager
    async def use(self) -> AsyncIterator[Member]:
        """Use a connected member during the block, and give it up if the block raises `EtcdUnavailable`.

        Raises:
            EtcdUnavailable: no member accepts a connection.
            EtcdError: the client was closed.
        """
        member = await self._connected()
        member.users += 1
        try:
            yield member
        except EtcdUnavailable as error:
            self._give_up(member, error)
            raise
        finally:
            member.users -= 1
            await self._close_unused(member)

    def answered(self) -> None:
        """Note that a member has answered."""
        self.answered_at = time.monotonic()
        self._failures = 0
        if self._is_lost:
            self._is_lost = False
            _log.warning("etcd answers again, at %s", self.address)

    def _give_up(self, member: Member, error: EtcdUnavailable) -> None:
        if self._current is member:
            self._retire()
            self._failed(error)

    def _retire(self) -> None:
        if self._current is not None:
            self._current.given_up.set_result(None)
            self._current = None

    def _failed(self, error: EtcdUnavailable) -> None:
        """Go on to the next member. After one failure of each without an answer, etcd counts as lost."""
        self._turn += 1
        self._failures += 1
        if self._failures >= len(self._addresses) and not self._is_lost:
            self._is_lost = True
            _log.warning("no member of etcd answers; still trying: %s", error)

    async def _connected(self) -> Member:
        async with self._connecting:
            if self._is_closed:
                raise EtcdError("the client of etcd is closed")
            if self._current is not None and not self._current.is_connected:
                unused = self._current
                self._retire()  # the same address first: its connection may have ended for being idle
                await self._close_unused(unused)
            for _ in self._addresses:
                if self._current is not None:
                    return self._current
                try:
                    self._current = await self._connect(self.address)
                except EtcdUnavailable as error:
                    if self._is_closed:
                        raise
                    failure = error
                    self._failed(error)
            if self._current is None:
                raise failure
            return self._current

    async def _connect(self, address: str) -> Member:
        member = Member(address, self._tls)
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
        """Close all connections. Calls and streams that still use one are cancelled. Idempotent."""
        self._is_closed = True
        self._retire()
        while self._open:
            await self._open.pop().close()
