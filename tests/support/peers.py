"""Peer credentials that a test sets, to be another user."""

import socket
from collections.abc import Sequence

from regd.system.peer_credentials import PeerCredentials

STRANGER = 65_533  # a uid that no user of the machine has


class FakeCredentials(PeerCredentials):
    """Every peer has the uid `uid`; None means that the system does not know it."""

    uid: int | None = STRANGER

    def open(self, listeners: Sequence[socket.socket]) -> None:
        self._ask = lambda theirs, ours: self.uid

    def uid_of(self, connection: socket.socket) -> int | None:
        return self.uid

    def is_gone(self, connection: socket.socket) -> bool:
        return False
