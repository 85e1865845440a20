"""Decides who may read through the gateway: the users who could also read at the daemon's own address."""

import socket
from collections.abc import Sequence

from regd.system.listener import ListenError
from regd.system.peer_credentials import PeerCredentials

__all__ = ["Readers"]

End = tuple[str, int]  # an address and a port; for IPv6, asyncio adds two more


class Readers:
    """The users who may read: every local user, or only this user and root.

    Args:
        restricted: let only this user and root read, as at a daemon's Unix socket.
    """

    def __init__(self, *, restricted: bool) -> None:
        self._credentials = PeerCredentials() if restricted else None

    def open(self, listeners: Sequence[socket.socket]) -> None:
        """Choose the way to ask the kernel for the user of a client.

        Raises:
            ListenError: the kernel does not tell which user a client is.
        """
        if self._credentials is None:
            return
        try:
            self._credentials.open(listeners)
        except ListenError:
            raise ListenError(
                "the daemon is behind a Unix socket, for this user alone, and the kernel does not say which "
                "users connect to TCP ports; run the daemon on TCP if all users may read"
            ) from None

    def close(self) -> None:
        if self._credentials is not None:
            self._credentials.close()

    def may_read_by_tcp(self, peer: End | None, own: End | None) -> bool:
        """Return whether the client's user may read. An address is None if the connection is closed."""
        if self._credentials is None:
            return True
        if peer is None or own is None:
            return False
        return self._credentials.may_write(self._credentials.uid_of_tcp_peer(peer[:2], own[:2]))

    def may_read_by_udp(self, peer: End, own: End) -> bool:
        """Return whether the user whose socket receives the datagrams at `peer` may read."""
        if self._credentials is None:
            return True
        return self._credentials.may_write(self._credentials.uid_of_udp_peer(peer[:2], own[:2]))
