"""The open connections by session number. A holder names its connection by this number."""

from typing import Protocol

from regd.core.transaction import OwnershipLost
from regd.protocol import messages


class SessionConnection(Protocol):
    """A connection, as `Sessions` uses it."""

    @property
    def address(self) -> str: ...

    def has_client_hung_up(self) -> bool: ...

    def push(self, data: bytes) -> None: ...


class Sessions:
    def __init__(self) -> None:
        self._count = 0
        self._open: dict[int, SessionConnection] = {}

    def add(self, connection: SessionConnection) -> int:
        """Add a connection and return its session number. No number is used twice."""
        self._count += 1
        self._open[self._count] = connection
        return self._count

    def remove(self, session: int) -> None:
        """Remove a connection that has closed. Idempotent."""
        self._open.pop(session, None)

    def has_client_hung_up(self, session: int) -> bool:
        """Return whether the client has closed the connection or its sending side.

        The kernel is asked, since it knows before the event loop.
        """
        connection = self._open.get(session)
        return connection is None or connection.has_client_hung_up()

    def address_of(self, session: int) -> str | None:
        """Return the client's address for people, None if the connection has closed."""
        connection = self._open.get(session)
        return connection.address if connection else None

    def push_lost(self, lost: OwnershipLost) -> None:
        """Send a `lost` event to the connection whose registration another client has taken over or ended."""
        connection = self._open.get(lost.session)
        if connection is not None:
            entry = lost.entry
            connection.push(
                messages.event("lost", lost.rev, name=entry.name, instance=entry.instance, reason=lost.reason)
            )
