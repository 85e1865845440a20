"""Peer credentials of another user, without another user."""

import socket
from collections.abc import Sequence

from regd.system.peer_credentials import PeerCredentials

STRANGER = 65_533  # a number that nobody here has


class Told(PeerCredentials):
    """Says of every TCP peer what the test says."""

    uid: int | None = STRANGER

    def open(self, listeners: Sequence[socket.socket]) -> None:
        self._ask = lambda theirs, ours: self.uid

    def uid_of(self, connection: socket.socket) -> int | None:
        return self.uid

    def is_gone(self, connection: socket.socket) -> bool:
        return False
