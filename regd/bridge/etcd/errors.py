"""What can go wrong with etcd, by what the caller can do about it."""

__all__ = [
    "Compacted",
    "DeadlineExceeded",
    "EtcdConflict",
    "EtcdError",
    "EtcdRefused",
    "EtcdUnavailable",
    "LeaseNotFound",
    "ResponseTooLarge",
    "TokenExpired",
]


class EtcdError(Exception):
    """Base class of the errors of this client."""


class EtcdUnavailable(EtcdError):
    """No member answered in time, or the cluster has no leader: try again.

    Attributes:
        may_have_effect: a write of this request may be in effect, or still come into effect.
    """

    def __init__(self, message: str, may_have_effect: bool = True) -> None:
        super().__init__(message)
        self.may_have_effect = may_have_effect


class DeadlineExceeded(EtcdUnavailable):
    """A member is connected, and did not answer in time."""


class EtcdRefused(EtcdError):
    """etcd refuses the request or the user: trying again does not help until something is changed."""


class LeaseNotFound(EtcdError):
    """The lease has ended, and its keys with it."""


class EtcdConflict(EtcdError):
    """A key of `only_if` has another revision. Nothing of this transaction is in effect."""


class Compacted(EtcdError):
    """etcd no longer has changes, or an old revision: read the prefix, and watch from there.

    Attributes:
        revision: up to which etcd has compacted its history; 0 if it did not say so.
    """

    def __init__(self, revision: int) -> None:
        super().__init__(f"etcd has compacted its history up to revision {revision}")
        self.revision = revision


class TokenExpired(EtcdRefused):
    """etcd does not accept the token: authenticate again. Raised to callers only if that does not help."""


class ResponseTooLarge(EtcdRefused):
    """The response has more bytes than the client receives at once: ask for less."""
