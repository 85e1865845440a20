"""Errors of the client, by what the caller can do about them."""

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
        may_have_effect: whether a write of this request may have taken effect, or may still do so.
    """

    def __init__(self, message: str, may_have_effect: bool = True) -> None:
        super().__init__(message)
        self.may_have_effect = may_have_effect


class DeadlineExceeded(EtcdUnavailable):
    """A connected member did not answer in time."""


class EtcdRefused(EtcdError):
    """etcd refuses the request or the user. Trying again is useless until an administrator changes something."""


class LeaseNotFound(EtcdError):
    """The lease has ended, and its keys are deleted."""


class EtcdConflict(EtcdError):
    """A key of `only_if` has another revision. This transaction had no effect."""


class Compacted(EtcdError):
    """etcd no longer has the changes or the revision asked for: read the prefix, and watch from there."""


class TokenExpired(EtcdRefused):
    """etcd does not accept the token. Callers see this error only if a new token is refused too."""


class ResponseTooLarge(EtcdRefused):
    """The response exceeds the size that the client accepts: ask for less."""
