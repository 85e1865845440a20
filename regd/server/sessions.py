"""The table of open connections by session number, by which a registration knows the connection that holds it."""

from typing import Protocol

from regd.core.transaction import OwnershipLost
from regd.protocol import messages


class SessionPeer(Protocol):
    """A connection, as this table sees it."""

    @property
    def address(self) -> str: ...

    def is_cut(self) -> bool: ...

    def push(self, data: bytes) -> None: ...


class Sessions:
    def __init__(self) -> None:
        self._count = 0
        self._open: dict[int, SessionPeer] = {}

    def add(self, peer: SessionPeer) -> int:
        """Return the connection's number. No number is used twice."""
        self._count += 1
        self._open[self._count] = peer
        return self._count

    def remove(self, session: int) -> None:
        """Forget a connection that has closed. Idempotent."""
        self._open.pop(session, None)

    def is_cut(self, session: int) -> bool:
        """Return whether the connection has ended as far as the kernel knows, even before the event loop does."""
        peer = self._open.get(session)
        return peer is None or peer.is_cut()

    def address_of(self, session: int) -> str | None:
        """Return the peer's address for people, None when the connection has closed."""
        peer = self._open.get(session)
        return peer.address if peer else None

    def push_lost(self, lost: OwnershipLost) -> None:
        """Send a `lost` event to the connection whose registration another client has taken over."""
        peer = self._open.get(lost.session)
        if peer is not None:
            entry = lost.entry
            peer.push(
                messages.event("lost", lost.rev, name=entry.name, instance=entry.instance, reason=lost.reason)
            )
