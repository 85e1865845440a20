"""Calls with a deadline, repeated at the next member, and with a new token when the old one has expired."""

import time
from pathlib import Path
from typing import TypeVar

from google.protobuf.message import Message

from regd.bridge.etcd.backoff import Backoff
from regd.bridge.etcd.errors import DeadlineExceeded, EtcdRefused, EtcdUnavailable, TokenExpired
from regd.bridge.etcd.member import Member, Metadata
from regd.bridge.etcd.members import Members
from regd.bridge.etcd.methods import AUTHENTICATE, Method
from regd.bridge.etcd.model import User

__all__ = ["Calls", "metadata"]

Q = TypeVar("Q", bound=Message)
R = TypeVar("R", bound=Message)

_REPEAT_PAUSE_S_MAX = 0.5
_DEADLINE_S_MAX = 16.0


def metadata(token: str) -> Metadata:
    """Return the metadata of a call or a stream: the token, and that a member without a leader must refuse it."""
    return (("hasleader", "true"), *((("token", token),) if token else ()))


class Calls:
    """Calls methods of a cluster.

    Args:
        members: of the cluster.
        user: to authenticate as; None for no user, or if the client's certificate names the user.
        deadline_s: for a call at one member. It is doubled after each call that exceeds it, up to 16 s.

    Attributes:
        repeat_s: how long a call is repeated: longer than the election of a leader takes.
    """

    def __init__(self, members: Members, user: User | None, deadline_s: float) -> None:
        self.members = members
        self.repeat_s = 5.0
        self._user = user
        self._token: str | None = None  # None: authenticate before the next call; "": etcd asks for none
        self._deadline_s = self._first_deadline_s = deadline_s

    async def call(self, method: Method[Q, R], request: Q, repeatable: bool) -> R:
        """Call a method and return its response.

        Args:
            repeatable: whether the call may take effect several times, for example because it only reads. If not,
                it is repeated only while no attempt can have had an effect.

        Raises:
            EtcdUnavailable: no member answered in time.
            EtcdError: etcd answered with an error.
        """
        backoff = Backoff(_REPEAT_PAUSE_S_MAX)
        end = time.monotonic() + self.repeat_s
        while True:
            try:
                return await self._call_member(method, request)
            except EtcdUnavailable as error:
                if time.monotonic() >= end or not (repeatable or not error.may_have_effect):
                    raise
            await backoff.pause()

    async def _call_member(self, method: Method[Q, R], request: Q) -> R:
        """Call once, and once more with a new token if etcd does not accept the old one."""
        async with self.members.use() as member:
            token = await self.token(member)
            try:
                return await self._ask(member, method, request, token)
            except TokenExpired:
                if not self.forget_token(token):
                    raise
            return await self._ask(member, method, request, await self.token(member))

    async def _ask(self, member: Member, method: Method[Q, R], request: Q, token: str) -> R:
        deadline_s = self._deadline_s
        try:
            response = await member.ask(method, request, metadata(token), deadline_s)
        except DeadlineExceeded:
            self._deadline_s = min(2 * deadline_s, _DEADLINE_S_MAX)
            raise
        self._deadline_s = self._first_deadline_s
        return response

    async def token(self, member: Member) -> str:
        """Return the token for calls and streams; "" for none.

        A call that authenticates at a frozen member does not hold up the calls that have moved to another member.

        Raises:
            EtcdUnavailable: the member does not answer, or was given up.
            EtcdRefused: the user or the password is wrong, or the password file cannot be read.
        """
        if self._user is None:
            return ""
        async with member.authenticating:
            if self._token is None:
                if member.given_up.done():
                    message = f"the connection to etcd at {member.address} was given up"
                    raise EtcdUnavailable(message, may_have_effect=False)
                self._token = await self._authenticate(member, self._user)
            return self._token

    def forget_token(self, token: str) -> bool:
        """Forget a token that etcd refused, unless it was replaced. Return whether there can be a new one."""
        if self._token == token:
            self._token = None
        return self._user is not None

    async def _authenticate(self, member: Member, user: User) -> str:
        request = AUTHENTICATE.request(name=user.name, password=_read_password(user.password_file))
        try:
            response = await self._ask(member, AUTHENTICATE, request, "")
        except EtcdUnavailable as error:
            error.may_have_effect = False  # the request itself was not sent, or refused
            raise
        except EtcdRefused as error:
            if "authentication is not enabled" in str(error):
                return ""  # until a request without a token is refused
            raise EtcdRefused(f"{error} (user {user.name!r})") from None
        return response.token


def _read_password(file: Path) -> str:
    """Return the first line of a file."""
    try:
        return file.read_text().partition("\n")[0].rstrip("\r")
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not text"
        raise EtcdRefused(f"cannot read {file}: {why}") from None
